"""Kinematic detectors: does a motion, wherever it comes from, do what a script says?

    parse(text)              caption or prompt -> script
    passes(joints, script)   does the motion contain every item of the script, in its order?

Scripts and captions are toy.py's. Each action has one detector: thresholds on what a body does in
space, with no knowledge of how the motion was made. It gives the stretches of frames (slices) that
are evidence of its action; 1.5 cm of noise must not change the verdict.
"""
import re

import numpy as np
from scipy.ndimage import find_objects, label
from scipy.signal import find_peaks

from toy import (FPS, HEAD, L_ANKLE, L_HIP, L_SHOULDER, L_TOE, L_WRIST, LANGUAGE, LEFTWARD, NECK,
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
        others = re.findall(r"[a-z']+", re.sub(PATTERNS[action], '', clause))
        if not set(others) <= set(LANGUAGE['filler']):
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
        forward = np.cross(left, [0, 1, 0])
        self.axes = np.stack([left, np.broadcast_to([0, 1, 0], left.shape), forward], 1)
        self.yaw = np.unwrap(np.arctan2(forward[:, 0], forward[:, 2]))
        self.turning = np.gradient(smooth(self.yaw, 0.1)) * FPS

        pelvis, feet = joints[:, PELVIS], joints[:, [L_ANKLE, R_ANKLE]].mean(1)
        self.travel = self.local(np.gradient(smooth(pelvis, 0.15), axis=0) * FPS)
        self.feet_travel = self.local(np.gradient(feet, axis=0) * FPS)
        self.feet_ahead = self.local(feet - pelvis)[:, FORWARD]
        trunk = self.local(joints[:, NECK] - pelvis)
        self.lean = np.arctan2(trunk[:, FORWARD], trunk[:, UP])
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

    def low(self):
        """Stretches with the pelvis low, begun by somebody who stood."""
        stood = self.height[:, PELVIS] > 0.78
        spans = stretches(self.height[:, PELVIS] < 0.66, 0.15, 0.2)
        return [span for span in spans if stood[:span.start].any()]

    def on_chair(self, span):
        """Is the low pelvis far behind the feet?"""
        return self.feet_ahead[span].max() > 0.22


def walk(view):
    speed = view.travel[:, FORWARD]
    spans = stretches((speed > 0.22) & (speed < 1.9), 0.9)
    return [span for span in spans if view.moved(span, FORWARD) > 0.6]


def run(view):
    spans = stretches(view.travel[:, FORWARD] > 1.9, 0.4)
    return [span for span in spans if view.moved(span, FORWARD) > 0.8]


def side_step(view, side):
    sideways = view.travel[:, LEFT] * LEFTWARD[side] > 0.1
    found = []
    for span in stretches(sideways & (np.abs(view.turning) < 0.8), 0.5, 0.3):
        aside, ahead = view.moved(span, LEFT) * LEFTWARD[side], view.moved(span, FORWARD)
        if aside > max(0.35, 2 * abs(ahead)) and abs(view.turned(span)) < 0.6:
            found.append(span)
    return found


def turn(view, side):
    spans = stretches(view.turning * LEFTWARD[side] > 0.3, 0.3, 0.25)  # two steps may pause between
    return [span for span in spans if 0.85 < view.turned(span) * LEFTWARD[side] < 3.5]


def kick(view, side):
    """A leg stretched out in front while the other foot stands."""
    leg = view.between(L_HIP + side, L_ANKLE + side)
    raised = view.height[:, L_ANKLE + side] > 0.32
    stretched = (leg[:, FORWARD] > 0.38) & (np.linalg.norm(leg, axis=-1) > 0.58)
    stands = view.height[:, L_TOE + 1 - side] < 0.1
    return stretches(raised & stretched & stands, 0.1, 0.1)


def punch(view, side):
    """A wrist shot out at the shoulder's height, the other one not."""
    near, far = view.arms[side], view.arms[1 - side]
    straight = (np.abs(near[:, UP]) < 0.2) & (np.abs(near[:, LEFT]) < 0.25)
    out = straight & (near[:, FORWARD] > 0.35) & (far[:, FORWARD] < 0.33)
    speed = np.gradient(near[:, FORWARD]) * FPS
    return [span for span in stretches(out, 0.0, 0.5)
            if speed[max(span.start - 6, 0):span.stop].max() > 0.7]


def wave(view, side):
    """One hand up, going to and fro."""
    near, far = view.arms[side], view.arms[1 - side]
    found = []
    for span in stretches((near[:, UP] > 0.03) & (far[:, UP] < 0), 0.6, 0.1):
        turns = [find_peaks(way * near[span, LEFT], prominence=0.06)[0] for way in (1, -1)]
        if len(turns[0]) + len(turns[1]) >= 3:
            found.append(span)
    return found


def raise_arms(view):
    lower_hand = view.height[:, [L_WRIST, R_WRIST]].min(1)
    return stretches(lower_hand > view.height[:, HEAD] + 0.05, 0.25, 0.1)


def jump(view):
    """Both feet off the floor, side by side."""
    toes = view.height[:, [L_TOE, R_TOE]]
    apart = np.abs(view.between(R_TOE, L_TOE)[:, FORWARD])
    return stretches((toes.min(1) > 0.08) & (np.ptp(toes, axis=1) < 0.12) & (apart < 0.25), 0.1)


def hop(view):
    """One foot stays up while the other leaves the floor at least twice."""
    found = []
    for side in (0, 1):
        hops = view.height[:, L_TOE + 1 - side] > 0.06
        for span in stretches(view.height[:, L_ANKLE + side] > 0.2, 0.8, 0.1):
            if len(stretches(hops[span], 0.1)) >= 2:
                found.append(span)
    return found


def squat(view):
    stood = view.height[:, PELVIS] > 0.78
    return [span for span in view.low() if not view.on_chair(span) and stood[span.stop - 1:].any()]


def sit_down(view):
    """The way down to the chair."""
    return [slice(max(span.start - 10, 0), min(span.start + 6, span.stop))
            for span in view.low() if view.on_chair(span) and span.stop - span.start > 9]


def bow(view):
    return stretches((view.lean > 0.48) & (view.height[:, PELVIS] > 0.74), 0.2, 0.1)


DETECTORS = {
    'walk': walk, 'run': run, 'side-step': side_step, 'turn': turn, 'kick': kick, 'punch': punch,
    'wave': wave, 'raise arms': raise_arms, 'jump': jump, 'hop': hop, 'squat': squat,
    'sit down': sit_down, 'bow': bow,
}


def middle(span):
    return span.start + span.stop - 1


def find(view, item):
    """The evidence of a script item, early to late."""
    detector = DETECTORS[item['action']]
    if item['action'] not in SIDED:
        return sorted(detector(view), key=middle)
    sides = {'left': [0], 'right': [1], None: [0, 1]}[item['side']]
    return sorted((span for side in sides for span in detector(view, side)), key=middle)


def detect(joints, item):
    """Does the motion (T, 22, 3) contain this item anywhere?"""
    return bool(find(View(joints), item))


def describe(joints):
    """All that is seen in a motion (T, 22, 3), early to late: ['walk', 'kick left', ...]."""
    view, seen = View(joints), []
    for action in DETECTORS:
        for side in ('left', 'right') if action in SIDED else ('',):
            evidence = find(view, {'action': action, 'side': side})
            seen += [(middle(span), f'{action} {side}'.strip()) for span in evidence]
    return [name for _, name in sorted(seen)]


def passes(joints, script):
    """Does the motion contain every item of the script, in its order (by the middles of the
    stretches of evidence)?"""
    view, now = View(joints), -1
    for item in script:
        later = [middle(span) for span in find(view, item) if middle(span) > now]
        if not later:
            return False
        now = later[0]
    return True
