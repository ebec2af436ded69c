"""Kinematic detectors: does a motion, wherever it comes from, do what a toy script says?

parse() makes a script of a caption or prompt. View looks at a motion: a method for each action,
thresholds on what a body does in space that know nothing of how the motion was made. It gives the
stretches of frames (slices) that are evidence of its action; 1.5 cm of noise must not change the
verdict.
"""
import re

import numpy as np
from scipy.ndimage import find_objects, label
from scipy.signal import find_peaks

from lib.toy import (FPS, HEAD, L_ANKLE, L_HIP, L_SHOULDER, L_TOE, L_WRIST, LANGUAGE, LEFTWARD, NECK,
                 PELVIS, R_ANKLE, R_HIP, R_SHOULDER, R_TOE, R_WRIST, SIDED, TOE_Y, smooth, unit)

LEFT, UP, FORWARD = range(3)  # components of what View.local gives

SEPARATOR = r'[,.;]|\b(?:' + '|'.join(LANGUAGE['separators']) + r')\b'
PATTERNS = {action: rf'\b(?:{stems})[a-z]*' for action, stems in LANGUAGE['understood'].items()}


def parse(text):
    """Caption or prompt in the grammar's style -> script, or None if any part is not understood.
    Wider than the grammar, for what people type. A side left open is None."""
    script = []
    for clause in re.split(SEPARATOR, text.lower()):
        clause = clause.strip()
        if not clause or clause in LANGUAGE['people']:
            continue
        actions = [action for action in PATTERNS if re.search(PATTERNS[action], clause)]
        if len(actions) != 1:
            return None
        action = actions[0]
        others = re.sub(PATTERNS[action], '', clause)
        if not set(re.findall(r"[a-z']+", others)) <= set(LANGUAGE['filler']):
            return None
        side = re.search(r'\b(left|right)\b', clause) if action in SIDED else None
        speed = 'normal'
        if re.search(r'\bslow', clause):
            speed = 'slow'
        elif re.search(r'\b(quick|fast)', clause):
            speed = 'fast'
        script.append({'action': action, 'side': side and side[1], 'speed': speed})
    return script or None


def stretches(mask, at_least=0.0, gap=0.0):
    """(T,) bool -> slices in which it is True for at_least seconds, after bridging holes of up to
    gap seconds."""
    spans = []
    for (span,) in find_objects(label(mask)[0]):
        if spans and span.start - spans[-1].stop <= gap * FPS:
            span = slice(spans.pop().start, span.stop)
        spans.append(span)
    return [span for span in spans if span.stop - span.start >= at_least * FPS]


class View:
    """Joints (T, 22, 3) seen from the body: (left, up, forward), floor at 0, a bit smoothed."""

    def __init__(self, joints):
        joints = smooth(np.asarray(joints, np.float64), 0.04)
        lowest = joints[:, [L_TOE, R_TOE], 1].min(1)
        joints[..., 1] -= np.percentile(lowest, 20) - TOE_Y
        self.joints = joints
        self.height = joints[..., 1]

        left = joints[:, L_HIP] - joints[:, R_HIP] + joints[:, L_SHOULDER] - joints[:, R_SHOULDER]
        left = unit(smooth(unit(left * [1, 0, 1]), 0.1))
        up = np.broadcast_to([0, 1, 0], left.shape)
        forward = np.cross(left, up)
        self.axes = np.stack([left, up, forward], 1)
        self.yaw = np.unwrap(np.arctan2(forward[:, 0], forward[:, 2]))
        self.turning = np.gradient(smooth(self.yaw, 0.1)) * FPS

        pelvis = joints[:, PELVIS]
        feet = joints[:, [L_ANKLE, R_ANKLE]].mean(1)
        self.travel = self.local(np.gradient(smooth(pelvis, 0.15), axis=0) * FPS)
        self.feet_travel = self.local(np.gradient(feet, axis=0) * FPS)
        self.feet_ahead = self.local(feet - pelvis)[:, FORWARD]
        self.trunk = self.between(PELVIS, NECK)
        self.arms = [self.between(L_SHOULDER, L_WRIST), self.between(R_SHOULDER, R_WRIST)]

    def local(self, vectors):
        """World vectors (T, 3) -> their (left, up, forward) parts."""
        return np.einsum('tij,tj->ti', self.axes, vectors)

    def between(self, a, b):
        return self.local(self.joints[:, b] - self.joints[:, a])

    def moved(self, span, axis):
        """How far pelvis and feet both went along an axis: leaning or sitting back is no travel."""
        pelvis = self.travel[span, axis].sum() / FPS
        feet = self.feet_travel[span, axis].sum() / FPS
        return min(pelvis, feet, key=abs) if pelvis * feet > 0 else 0.0

    def turned(self, span):
        return self.yaw[span.stop - 1] - self.yaw[span.start]

    def walk(self):
        speed = self.travel[:, FORWARD]
        spans = stretches((speed > 0.22) & (speed < 1.9), 0.9)
        return [span for span in spans if self.moved(span, FORWARD) > 0.6]

    def run(self):
        spans = stretches(self.travel[:, FORWARD] > 1.9, 0.4)
        return [span for span in spans if self.moved(span, FORWARD) > 0.8]

    def side_step(self, side):
        found = []
        sideways = self.travel[:, LEFT] * LEFTWARD[side] > 0.1
        straight = np.abs(self.turning) < 0.8
        for span in stretches(sideways & straight, 0.5, 0.3):
            aside = self.moved(span, LEFT) * LEFTWARD[side]
            ahead = abs(self.moved(span, FORWARD))
            if aside > max(0.35, 2 * ahead) and abs(self.turned(span)) < 0.6:
                found.append(span)
        return found

    def turn(self, side):
        turning = self.turning * LEFTWARD[side] > 0.3
        spans = stretches(turning, 0.3, 0.25)  # two steps may pause between
        return [span for span in spans if 0.85 < self.turned(span) * LEFTWARD[side] < 3.5]

    def kick(self, side):
        """A leg stretched out in front while the other foot stands."""
        leg = self.between(L_HIP + side, L_ANKLE + side)
        raised = self.height[:, L_ANKLE + side] > 0.32
        stretched = np.linalg.norm(leg, axis=-1) > 0.58
        in_front = leg[:, FORWARD] > 0.38
        stands = self.height[:, L_TOE + 1 - side] < 0.1
        return stretches(raised & stretched & in_front & stands, 0.1, 0.1)

    def punch(self, side):
        """A wrist shot out at the shoulder's height, the other one not."""
        left, up, forward = self.arms[side].T
        level = (np.abs(up) < 0.2) & (np.abs(left) < 0.25)
        other = self.arms[1 - side][:, FORWARD]
        spans = stretches(level & (forward > 0.35) & (other < 0.33), 0.0, 0.5)
        speed = np.gradient(forward) * FPS
        return [span for span in spans if speed[max(span.start - 6, 0):span.stop].max() > 0.7]

    def wave(self, side):
        """One hand up, going to and fro."""
        near, far = self.arms[side], self.arms[1 - side]
        found = []
        for span in stretches((near[:, UP] > 0.03) & (far[:, UP] < 0), 0.6, 0.1):
            to, _ = find_peaks(near[span, LEFT], prominence=0.06)
            fro, _ = find_peaks(-near[span, LEFT], prominence=0.06)
            if len(to) + len(fro) >= 3:
                found.append(span)
        return found

    def raise_arms(self):
        lower_hand = self.height[:, [L_WRIST, R_WRIST]].min(1)
        return stretches(lower_hand > self.height[:, HEAD] + 0.05, 0.25, 0.1)

    def jump(self):
        """Both feet off the floor, side by side."""
        toes = self.height[:, [L_TOE, R_TOE]]
        apart = np.abs(self.between(R_TOE, L_TOE)[:, FORWARD])
        together = (np.ptp(toes, axis=1) < 0.12) & (apart < 0.25)
        return stretches(together & (toes.min(1) > 0.08), 0.1)

    def hop(self):
        """One foot stays up while the other leaves the floor at least twice."""
        found = []
        for side in (0, 1):
            hops = self.height[:, L_TOE + 1 - side] > 0.06
            for span in stretches(self.height[:, L_ANKLE + side] > 0.2, 0.8, 0.1):
                if len(stretches(hops[span], 0.1)) >= 2:
                    found.append(span)
        return found

    def low(self, on_chair):
        """The pelvis low, far behind the feet or not, of somebody who stood before."""
        found = []
        for span in stretches(self.height[:, PELVIS] < 0.66, 0.15, 0.2):
            stood = self.height[:span.start, PELVIS] > 0.78
            behind = self.feet_ahead[span].max() > 0.22
            if stood.any() and behind == on_chair:
                found.append(span)
        return found

    def squat(self):
        stands = self.height[:, PELVIS] > 0.78
        return [span for span in self.low(on_chair=False) if stands[span.stop - 1:].any()]

    def sit_down(self):
        """The way down to the chair."""
        return [slice(max(span.start - 10, 0), min(span.start + 6, span.stop))
                for span in self.low(on_chair=True) if span.stop - span.start > 9]

    def bow(self):
        lean = np.arctan2(self.trunk[:, FORWARD], self.trunk[:, UP])
        return stretches((lean > 0.48) & (self.height[:, PELVIS] > 0.74), 0.2, 0.1)

    def times(self, action, side=None):
        """When an action is seen, early to late: the middles of its stretches, in half frames.
        Without a side either one will do."""
        detector = getattr(self, re.sub(r'\W', '_', action))   # 'side-step': side_step
        if action not in SIDED:
            spans = detector()
        elif side:
            spans = detector(('left', 'right').index(side))
        else:
            spans = detector(0) + detector(1)
        return sorted(span.start + span.stop for span in spans)


def describe(joints):
    """All that is seen in a motion (T, 22, 3), early to late: ['walk', 'kick left', ...]."""
    view = View(joints)
    seen = []
    for action in PATTERNS:
        for side in ('left', 'right') if action in SIDED else ('',):
            name = f'{action} {side}'.strip()
            seen += [(time, name) for time in view.times(action, side)]
    return [name for _, name in sorted(seen)]


def passes(joints, script):
    """Does the motion (T, 22, 3) contain every item of the script, in its order?"""
    view = View(joints)
    now = 0
    for item in script:
        later = [time for time in view.times(item['action'], item['side']) if time > now]
        if not later:
            return False
        now = later[0]
    return True
