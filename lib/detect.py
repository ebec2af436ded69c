"""Kinematic detectors: does a motion, from whatever source, do what a toy script says?

`parse` turns a caption or prompt into a script. `View` recognizes actions in a motion: each action
has a method with thresholds on how the joints move through space, independent of how the motion was
made. It returns the spans of frames (slices) in which it sees the action. Noise of 1.5 cm must not
change the verdict.
"""
import re

import numpy as np
from scipy.ndimage import find_objects, label
from scipy.signal import find_peaks

from lib.motion import unit_vectors
from lib.toy import (ANKLES, FPS, HEAD, HIPS, LEFTWARD, NECK, PELVIS, SHOULDERS, TOE_Y, TOES,
                     WRISTS, smooth)
from lib.toy_language import LANGUAGE, SIDED

LEFT, UP, FORWARD = range(3)  # components of a vector in the body's frame

SEPARATOR = r'[,.;]|\b(?:' + '|'.join(LANGUAGE['separators']) + r')\b'
PATTERNS = {action: rf'\b(?:{stems})[a-z]*' for action, stems in LANGUAGE['understood'].items()}


def parse(text):
    """Caption or prompt -> script, or None if any part of it is not understood. Accepts more than
    the grammar generates, because people type prompts. A side that the text leaves open is None."""
    script = []
    for clause in re.split(SEPARATOR, text.lower()):
        clause = clause.strip()
        if not clause or clause in LANGUAGE['people']:
            continue
        actions = [action for action in PATTERNS if re.search(PATTERNS[action], clause)]
        if len(actions) != 1:
            return None
        action = actions[0]
        words = set(re.findall(r"[a-z0-9']+", re.sub(PATTERNS[action], '', clause)))
        if not words <= set(LANGUAGE['filler']):
            return None

        side = re.search(r'\b(left|right)\b', clause) if action in SIDED else None
        speed = 'fast' if words & {'quick', 'quickly', 'fast'} else 'normal'
        if words & {'slow', 'slowly'}:
            speed = 'slow'
        script.append({'action': action, 'side': side and side[1], 'speed': speed})
    return script or None


def find_spans(mask, min_seconds=0.0, max_gap=0.0):
    """Spans in which a mask (T,) is True for at least min_seconds. Spans that are at most max_gap
    seconds apart are joined first."""
    spans = []
    for (span,) in find_objects(label(mask)[0]):
        if spans and span.start - spans[-1].stop <= max_gap * FPS:
            span = slice(spans.pop().start, span.stop)
        spans.append(span)
    return [span for span in spans if span.stop - span.start >= min_seconds * FPS]


class View:
    """A motion, joints (T, 22, 3), in the body's frame (left, up, forward): slightly smoothed, with
    the floor at height 0."""

    def __init__(self, joints):
        self.joints = joints = smooth(np.asarray(joints, np.float64), 0.04)
        self.height = joints[..., 1]
        self.height -= np.percentile(self.height[:, TOES].min(1), 20) - TOE_Y

        left = (joints[:, HIPS[0]] - joints[:, HIPS[1]]
                + joints[:, SHOULDERS[0]] - joints[:, SHOULDERS[1]])
        left = unit_vectors(smooth(unit_vectors(left * [1, 0, 1]), 0.1))
        forward = np.cross(left, [0, 1, 0])
        self.axes = np.stack([left, np.broadcast_to([0, 1, 0], left.shape), forward], 1)
        self.yaw = np.unwrap(np.arctan2(forward[:, 0], forward[:, 2]))
        self.yaw_rate = np.gradient(smooth(self.yaw, 0.1)) * FPS

        pelvis = joints[:, PELVIS]
        feet = joints[:, ANKLES].mean(1)
        self.velocity = self.local(np.gradient(smooth(pelvis, 0.15), axis=0) * FPS)
        self.feet_velocity = self.local(np.gradient(feet, axis=0) * FPS)
        self.feet_ahead = self.local(feet - pelvis)[:, FORWARD]
        self.standing = self.height[:, PELVIS] > 0.78
        self.trunk = self.between(PELVIS, NECK)
        self.arms = [self.between(SHOULDERS[side], WRISTS[side]) for side in (0, 1)]

    def local(self, vectors):
        """World vectors (T, 3) -> their components (left, up, forward)."""
        return np.einsum('tij,tj->ti', self.axes, vectors)

    def between(self, a, b):
        """Vectors (T, 3) from joint a to joint b, in the body's frame."""
        return self.local(self.joints[:, b] - self.joints[:, a])

    def travel(self, span, axis):
        """Metres that both pelvis and feet moved along an axis. Leaning is not travel."""
        pelvis = self.velocity[span, axis].sum() / FPS
        feet = self.feet_velocity[span, axis].sum() / FPS
        return min(pelvis, feet, key=abs) if pelvis * feet > 0 else 0.0

    def turned(self, span):
        """Yaw change during a span, in radians."""
        return self.yaw[span.stop - 1] - self.yaw[span.start]

    def walk(self):
        speed = self.velocity[:, FORWARD]
        spans = find_spans((speed > 0.22) & (speed < 1.9), 0.9)
        return [span for span in spans if self.travel(span, FORWARD) > 0.6]

    def run(self):
        spans = find_spans(self.velocity[:, FORWARD] > 1.9, 0.4)
        return [span for span in spans if self.travel(span, FORWARD) > 0.8]

    def side_step(self, side):
        sideways = self.velocity[:, LEFT] * LEFTWARD[side] > 0.1
        spans = find_spans(sideways & (np.abs(self.yaw_rate) < 0.8), 0.5, 0.3)
        least = [max(0.35, 2 * abs(self.travel(span, FORWARD))) for span in spans]
        return [span for span, metres in zip(spans, least)
                if self.travel(span, LEFT) * LEFTWARD[side] > metres
                and abs(self.turned(span)) < 0.6]

    def turn(self, side):
        turning = self.yaw_rate * LEFTWARD[side] > 0.3
        spans = find_spans(turning, 0.3, 0.25)  # there can be a pause between two steps
        return [span for span in spans if 0.85 < self.turned(span) * LEFTWARD[side] < 3.5]

    def kick(self, side):
        """A leg is stretched out in front while the other foot stays on the floor."""
        leg = self.between(HIPS[side], ANKLES[side])
        raised = self.height[:, ANKLES[side]] > 0.32
        stretched = np.linalg.norm(leg, axis=-1) > 0.58
        in_front = leg[:, FORWARD] > 0.38
        other_down = self.height[:, TOES[1 - side]] < 0.1
        return find_spans(raised & stretched & in_front & other_down, 0.1, 0.1)

    def punch(self, side):
        """One wrist, not both, moves fast to the front at shoulder height."""
        left, up, forward = self.arms[side].T
        level = (np.abs(up) < 0.2) & (np.abs(left) < 0.25)
        other = self.arms[1 - side][:, FORWARD]
        spans = find_spans(level & (forward > 0.35) & (other < 0.33), 0.0, 0.5)
        speed = np.gradient(forward) * FPS
        return [span for span in spans if speed[max(span.start - 6, 0):span.stop].max() > 0.7]

    def wave(self, side):
        """One hand, not both, is up and changes direction at least three times."""
        arm, other = self.arms[side], self.arms[1 - side]
        spans = find_spans((arm[:, UP] > 0.03) & (other[:, UP] < 0), 0.6, 0.1)

        def n_maxima(curve):
            return len(find_peaks(curve, prominence=0.06)[0])
        return [span for span in spans
                if n_maxima(arm[span, LEFT]) + n_maxima(-arm[span, LEFT]) >= 3]

    def raise_arms(self):
        lower_hand = self.height[:, WRISTS].min(1)
        return find_spans(lower_hand > self.height[:, HEAD] + 0.05, 0.25, 0.1)

    def jump(self):
        """Both feet are off the floor, side by side."""
        toes = self.height[:, TOES]
        apart = np.abs(self.between(TOES[1], TOES[0])[:, FORWARD])
        together = (np.ptp(toes, axis=1) < 0.12) & (apart < 0.25)
        return find_spans(together & (toes.min(1) > 0.08), 0.1)

    def hop(self):
        """One foot stays up while the other leaves the floor at least twice."""
        airborne = self.height[:, TOES] > 0.06
        return [span for side in (0, 1)
                for span in find_spans(self.height[:, ANKLES[side]] > 0.2, 0.8, 0.1)
                if len(find_spans(airborne[span, 1 - side], 0.1)) >= 2]

    def crouch(self, on_chair):
        """The pelvis goes down from standing: far behind the feet (on a chair), or not."""
        return [span for span in find_spans(self.height[:, PELVIS] < 0.66, 0.15, 0.2)
                if self.standing[:span.start].any()
                and (self.feet_ahead[span].max() > 0.22) == on_chair]

    def squat(self):
        """A crouch, after which the body stands up again."""
        return [span for span in self.crouch(on_chair=False)
                if self.standing[span.stop - 1:].any()]

    def sit_down(self):
        """The way down to a chair."""
        return [slice(max(span.start - 10, 0), min(span.start + 6, span.stop))
                for span in self.crouch(on_chair=True) if span.stop - span.start > 9]

    def bow(self):
        lean = np.arctan2(self.trunk[:, FORWARD], self.trunk[:, UP])
        return find_spans((lean > 0.48) & (self.height[:, PELVIS] > 0.74), 0.2, 0.1)

    def times(self, action, side=None):
        """When an action is seen, in order: the middle of each span, in half frames. Without a
        side, either side counts."""
        detector = getattr(self, re.sub(r'\W', '_', action))   # 'side-step' -> side_step
        if action not in SIDED:
            spans = detector()
        elif side:
            spans = detector(('left', 'right').index(side))
        else:
            spans = detector(0) + detector(1)
        return sorted(span.start + span.stop for span in spans)


def describe(joints):
    """All actions seen in a motion (T, 22, 3), in order of time: ['walk', 'kick left', ...]."""
    view = View(joints)
    seen = [(time, f'{action} {side}'.strip()) for action in PATTERNS
            for side in (('left', 'right') if action in SIDED else ('',))
            for time in view.times(action, side)]
    return [name for _, name in sorted(seen)]


def passes(joints, script):
    """Does the motion (T, 22, 3) contain every item of the script, in the script's order?"""
    view = View(joints)
    now = 0
    for item in script:
        later = [time for time in view.times(item['action'], item['side']) if time > now]
        if not later:
            return False
        now = later[0]
    return True
