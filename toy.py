"""The tiny-shakespeare of motion: procedural SMPL-22 clips at 20 fps, with captions and with detectors that read them back.

Three parts, each usable without the others:

    the body       make_clip(seed): a plan of footsteps and keyed curves -> joints (T, 22, 3)
    the language   a small grammar: script -> captions with tags, and parse(caption) -> script
    the detectors  passes(joints, script): does this motion, wherever it comes from, do what the script says?

A script is a list of items {'action', 'side', 'speed'}, done one after the other. Units: metres, seconds, radians. Y is up, the
floor is y = 0, a clip starts at x = z = 0 facing +Z, so +X is the character's left; yaw is positive to the left. Feet never slide:
footsteps come first, the pelvis follows the mean of the feet, and two-bone inverse kinematics fills in the knees.
"""
import re

import numpy as np

FPS = 20
MIN_FRAMES, MAX_FRAMES = 40, 196
ACTIONS = ['walk', 'run', 'walk backwards', 'side-step', 'turn', 'spin', 'kick', 'punch', 'wave', 'raise arms', 'jump', 'hop',
           'squat', 'sit down', 'stand up', 'bow', 'idle']
SIDED = {'side-step', 'turn', 'kick', 'punch', 'wave'}
SPEEDS = {'slow': 0.75, 'normal': 1.0, 'fast': 1.3}  # how much faster than normal the clock runs

(PELVIS, L_HIP, R_HIP, SPINE1, L_KNEE, R_KNEE, SPINE2, L_ANKLE, R_ANKLE, SPINE3, L_TOE, R_TOE, NECK, L_COLLAR, R_COLLAR, HEAD,
 L_SHOULDER, R_SHOULDER, L_ELBOW, R_ELBOW, L_WRIST, R_WRIST) = range(22)

# ---------------------------------------------------------------------------------------------------------------------
# The body. Sizes as in HumanML3D's default skeleton, rounded.

THIGH, SHIN, UPPER_ARM, FOREARM = 0.385, 0.43, 0.257, 0.266
FOOT_LENGTH, FOOT_DROP, TOE_Y = 0.125, 0.055, 0.02   # ankle to toe, forward and down; a planted toe's height
REACH = 0.995 * (THIGH + SHIN)                       # a leg never straightens completely
SPREAD = 0.085                                       # half the distance between the feet
HIP = np.array([0.062, -0.085, -0.005])              # left; the right side has -x
COLLAR, SHOULDER = np.array([0.075, 0.12, -0.01]), np.array([0.12, -0.035, -0.015])
ELBOW_POLE = np.array([0.5, -0.6, -0.6])             # elbows point out, down and back, in the chest's frame (left)
# joint, parent, offset from the parent, and the share of the trunk's bend that has built up in the parent's frame
SPINE = [(SPINE1, PELVIS, (0, 0.12, -0.03), 0.35), (SPINE2, SPINE1, (0, 0.138, 0.02), 0.6), (SPINE3, SPINE2, (0, 0.055, 0.01), 0.8),
         (NECK, SPINE3, (0, 0.217, -0.025), 1.0), (HEAD, NECK, (0, 0.092, 0.045), 0.85)]


def rotation(yaw, pitch=0.0, roll=0.0):
    """Angles (T,) -> (T, 3, 3). Pitch bends forward, roll leans to the right, yaw turns left and is applied last."""
    yaw, pitch, roll = np.broadcast_arrays(yaw, pitch, roll)
    cy, sy, cp, sp, cr, sr = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
    return np.stack([np.stack([cy * cr + sy * sp * sr, sy * sp * cr - cy * sr, sy * cp], -1),
                     np.stack([cp * sr, cp * cr, -sp], -1),
                     np.stack([cy * sp * sr - sy * cr, sy * sr + cy * sp * cr, cy * cp], -1)], -2)


def smooth(x, sigma):
    """Gaussian low-pass along axis 0, sigma in seconds, ends held."""
    r = int(np.ceil(3 * sigma * FPS))
    w = np.exp(-0.5 * (np.arange(-r, r + 1) / (sigma * FPS)) ** 2)
    padded = np.pad(x, [(r, r)] + [(0, 0)] * (x.ndim - 1), mode='edge')
    return np.tensordot(np.lib.stride_tricks.sliding_window_view(padded, 2 * r + 1, axis=0), w / w.sum(), 1)


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)


def two_bone(root, target, a, b, pole):
    """Bones of lengths a and b from root towards target (T, 3), bending towards pole (T, 3) -> middle joint, end joint.
    A target out of reach is pulled in, so bones keep their lengths."""
    line = target - root
    d = np.clip(np.linalg.norm(line, axis=-1, keepdims=True), 0.1, 0.999 * (a + b))
    line = unit(line)
    bend = unit(pole - line * (pole * line).sum(-1, keepdims=True))
    along = (a * a - b * b + d * d) / (2 * d)
    middle = root + along * line + np.sqrt(np.maximum(a * a - along * along, 0)) * bend
    return middle, root + d * line


class Plan:
    """What a body is going to do: footsteps, and curves of everything else as keys (time, value, velocity).

    Curves: height, shift, sway (pelvis: up; forward and left of the feet), pitch, twist, roll (trunk), and per side 0 left / 1 right
    flex, abduct, reach (the wrist seen from the shoulder: angle forward, angle outward, distance) and foot_up, foot_fwd,
    foot_pitch (added to a foot in the air). An action adds steps and keys from self.t on and moves self.t to its end."""

    def __init__(self, rng):
        self.rng, self.t = rng, rng.uniform(0.1, 0.4)
        self.rest = {'height': rng.uniform(0.948, 0.96), 'shift': 0.025, 'sway': 0.0, 'pitch': rng.uniform(0, 0.06), 'twist': 0.0, 'roll': 0.0}
        abduct, reach = rng.uniform(0.1, 0.22), rng.uniform(0.485, 0.51)
        for s in '01':
            self.rest |= {'flex' + s: rng.uniform(0.02, 0.16), 'abduct' + s: abduct, 'reach' + s: reach,
                          'foot_up' + s: 0.0, 'foot_fwd' + s: 0.0, 'foot_pitch' + s: 0.0}
        self.keys = {name: [(0.0, value, 0.0)] for name, value in self.rest.items()}
        self.feet = [np.array([SPREAD, 0, 0.0]), np.array([-SPREAD, 0, 0.0])]  # x, z, yaw of the ankle's spot on the floor
        self.start = [f.copy() for f in self.feet]
        self.steps = [[], []]

    def move(self, t0, t1, **targets):
        """Move curves to new values between t0 and t1; a target may be (value, velocity). Whatever was planned on a curve after
        t0 is dropped: the curve then bends from its last key straight to the new one, so consecutive actions blend."""
        for name, target in targets.items():
            value, velocity = target if isinstance(target, tuple) else (target, 0.0)
            keys = self.keys[name]
            if keys[-1][0] < t0:
                keys.append((t0, keys[-1][1], 0.0))
            while keys[-1][0] > t0 + 1e-6 and len(keys) > 1:
                keys.pop()
            keys.append((t1, value, velocity))

    def relax(self, t0, t1, only=()):
        """Bring every curve that is away from its rest value (or only the named ones) back to it."""
        self.move(t0, t1, **{n: v for n, v in self.rest.items() if (not only or n in only) and self.keys[n][-1][1:] != (v, 0.0)})

    def step(self, foot, t0, t1, spot, lift=0.06, roll=0.3, flight=False):
        """Foot 0 or 1 leaves the floor at t0 and lands at t1 on spot (x, z, yaw). The heel comes up before, over the toe, to an
        angle roll. A flight is a symmetric parabola, an ordinary step peaks early."""
        free_from = self.steps[foot][-1][2] if self.steps[foot] else 0.0
        self.steps[foot].append((max(t0 - 0.12, free_from), t0, t1, self.feet[foot], np.asarray(spot), lift, roll, flight))
        self.feet[foot] = np.asarray(spot)

    def where(self):
        """x, z, yaw midway between the feet."""
        return (self.feet[0] + self.feet[1]) / 2

    def spot(self, foot, x, z, yaw):
        side = SPREAD * (1 - 2 * foot)
        return np.array([x + side * np.cos(yaw), z - side * np.sin(yaw), yaw])


def gait(p, n, length, period, swing, lift, roll, turn=0.0, arm=0.35, arm_mid=0.08, reach=None, ramp=1.0, lean=0.0):
    """n steps of a length (negative: backwards) and a closing one. swing: share of a period the foot is in the air; above 1 both
    feet leave the floor in between, and the pelvis flies."""
    x, z, yaw = p.where()
    foot, t0 = int(p.rng.integers(2)), p.t
    running, sign = swing > 1, np.sign(length)
    p.move(t0, t0 + 0.4, pitch=p.rest['pitch'] + lean, **({'reach0': reach, 'reach1': reach} if reach else {}))
    for k in range(n + 1):
        if k < n:
            yaw += turn / n
            now = length * (ramp if k in (0, n - 1) else 1)
            x, z = x + now * np.sin(yaw), z + now * np.cos(yaw)
        lift_off = t0 + k * period
        land = lift_off + (min(swing, 1.1) if k == n else swing) * period
        share = 0.6 if k in (0, n) else 1.0
        p.step(foot, lift_off, land, p.spot(foot, x, z, yaw), lift * share, roll * share)
        a, key = arm * sign * share, (lift_off if k == 0 else land_before)
        if k < n:  # the arm of the other side goes forward with the foot, and the chest with it
            p.move(key, land, **{f'flex{foot}': arm_mid - a, f'flex{1 - foot}': arm_mid + a, 'twist': (0.2 * a if foot == 0 else -0.2 * a)})
        if running:
            p.move(lift_off, lift_off + 0.2 * period, height=p.rest['height'] + 0.01)
            p.move(lift_off + 0.2 * period, lift_off + 0.7 * period, height=p.rest['height'] - 0.07)
        foot, land_before = 1 - foot, land
    p.t = land
    p.relax(p.t - 0.6 * period, p.t + 0.3)


def walk(p, side, pace):
    gait(p, int(p.rng.integers(4, 8)), p.rng.uniform(0.48, 0.6) * pace ** 0.4, p.rng.uniform(0.5, 0.56) / pace ** 0.8, 0.8, p.rng.uniform(0.05, 0.09),
         p.rng.uniform(0.5, 0.7), turn=p.rng.uniform(-0.25, 0.25), arm=p.rng.uniform(0.25, 0.45), ramp=0.8, lean=0.03)


def run(p, side, pace):
    gait(p, int(p.rng.integers(6, 10)), p.rng.uniform(0.92, 1.02) * pace ** 0.3, p.rng.uniform(0.33, 0.36) / pace ** 0.3, 1.35, p.rng.uniform(0.2, 0.3),
         1.2, turn=p.rng.uniform(-0.2, 0.2), arm=p.rng.uniform(0.45, 0.65), arm_mid=0.6, reach=0.37, ramp=0.6, lean=0.15)


def walk_backwards(p, side, pace):
    gait(p, int(p.rng.integers(4, 7)), -p.rng.uniform(0.34, 0.46) * pace ** 0.4, p.rng.uniform(0.5, 0.6) / pace ** 0.8, 0.8, p.rng.uniform(0.05, 0.08),
         0.2, arm=p.rng.uniform(0.1, 0.25), ramp=0.8)


def side_step(p, side, pace):
    x, z, yaw = p.where()
    d, period = p.rng.uniform(0.28, 0.4), p.rng.uniform(0.4, 0.5) / pace ** 0.8
    for k in range(2 * int(p.rng.integers(2, 5))):  # lead foot out, other foot after it
        foot = side if k % 2 == 0 else 1 - side
        if foot == side:
            x, z = x + d * (1 - 2 * side) * np.cos(yaw), z - d * (1 - 2 * side) * np.sin(yaw)
            p.move(p.t, p.t + 0.85 * period, abduct0=0.3, abduct1=0.3, height=p.rest['height'] - 0.03)
        p.step(foot, p.t, p.t + 0.85 * period, p.spot(foot, x, z, yaw), 0.07, 0.25)
        p.t += period
    p.relax(p.t - 0.2, p.t + 0.2)


def turn_in_place(p, angle, pairs, period):
    x, z, yaw = p.where()
    lead = 0 if angle > 0 else 1  # the inner foot opens first, so legs do not cross
    for k in range(2 * pairs):
        if k % 2 == 0:
            yaw += angle / pairs
            p.move(p.t, p.t + period, twist=0.25 * np.sign(angle))  # the chest leads
        foot = lead if k % 2 == 0 else 1 - lead
        p.step(foot, p.t, p.t + 0.85 * period, p.spot(foot, x, z, yaw), 0.06, 0.3)
        p.t += period
    p.relax(p.t - period, p.t + 0.2)
    p.t += 0.15


def turn(p, side, pace):
    turn_in_place(p, p.rng.uniform(1.2, 2.2) * (1 - 2 * side), int(p.rng.integers(2, 4)), p.rng.uniform(0.3, 0.38) / pace)


def spin(p, side, pace):
    turn_in_place(p, 2 * np.pi * p.rng.choice([-1, 1]), int(p.rng.integers(5, 7)), p.rng.uniform(0.25, 0.3) / pace)


def kick(p, side, pace):
    s, o = str(side), str(1 - side)
    angle = p.rng.uniform(1.1, 1.55)  # of the stretched leg, from hanging down
    up, fwd = 0.82 - 0.81 * np.cos(angle), 0.81 * np.sin(angle)
    t = p.t + np.cumsum([0, 0.3, 0.35, 0.25, 0.1, 0.3, 0.3]) / pace ** 0.7  # shift, cock, strike, hold, knee, down
    spot = p.feet[side]
    p.move(t[0], t[1] + 0.1, sway=0.055 * (2 * side - 1))
    p.step(side, t[1], t[6], spot, 0.0, 0.15)
    p.move(t[1], t[2], **{'foot_up' + s: 0.3, 'foot_fwd' + s: -0.22, 'foot_pitch' + s: 0.7, 'flex' + o: 0.7, 'flex' + s: -0.3,
                          'twist': 0.2 * (2 * side - 1), 'abduct0': 0.4, 'abduct1': 0.4, 'height': p.rest['height'] - 0.03})
    p.move(t[2], t[3], **{'foot_up' + s: up, 'foot_fwd' + s: fwd, 'foot_pitch' + s: -0.8, 'pitch': p.rest['pitch'] - 0.22,
                          'twist': -0.2 * (2 * side - 1), 'flex' + o: -0.2, 'flex' + s: 0.4})
    p.move(t[4], t[5], **{'foot_up' + s: 0.3, 'foot_fwd' + s: 0.12, 'foot_pitch' + s: 0.2})
    p.move(t[5], t[6], **{'foot_up' + s: 0.0, 'foot_fwd' + s: 0.0, 'foot_pitch' + s: 0.0})
    p.t = t[6]
    p.relax(t[4], t[6] + 0.1, only=('pitch', 'twist', 'flex0', 'flex1', 'abduct0', 'abduct1', 'height'))
    p.relax(t[5] + 0.1, t[6] + 0.2, only=('sway',))


def punch(p, side, pace):
    s, o, t = str(side), str(1 - side), p.t
    guard = {'flex0': 1.45, 'flex1': 1.45, 'abduct0': -0.2, 'abduct1': -0.2, 'reach0': 0.25, 'reach1': 0.25}
    p.move(t, t + 0.45 / pace ** 0.5, **guard, height=p.rest['height'] - 0.04)
    t += 0.5 / pace ** 0.5
    for _ in range(int(p.rng.integers(1, 4))):
        out, hold, back = np.array([0.18, 0.1, 0.27]) / pace ** 0.7
        p.move(t, t + out, **{'reach' + s: p.rng.uniform(0.5, 0.52), 'flex' + s: p.rng.uniform(1.5, 1.62), 'twist': 0.3 * (2 * side - 1),
                              'pitch': p.rest['pitch'] + 0.1})
        p.move(t + out + hold, t + out + hold + back, **{'reach' + s: 0.25, 'flex' + s: 1.45, 'twist': 0.0, 'pitch': p.rest['pitch']})
        t += out + hold + back + p.rng.uniform(0.02, 0.15)
    p.relax(t, t + 0.45)
    p.t = t + 0.3


def wave(p, side, pace):
    s, t = str(side), p.t
    high, beat = p.rng.uniform(2.4, 2.6), p.rng.uniform(0.2, 0.26) / pace
    p.move(t, t + 0.5, **{'flex' + s: 0.25, 'abduct' + s: high, 'reach' + s: 0.39, 'roll': 0.04 * (1 - 2 * side)})
    t += 0.5
    for k in range(2 * int(p.rng.integers(2, 5)) + 1):
        p.move(t, t + beat, **{'abduct' + s: high + (0.33 if k % 2 else -0.33)})
        t += beat
    p.relax(t, t + 0.5)
    p.t = t + 0.35


def raise_arms(p, side, pace):
    t, up, hold, down = p.t, p.rng.uniform(0.7, 0.9) / pace, p.rng.uniform(0.4, 0.9), p.rng.uniform(0.6, 0.8) / pace
    if p.rng.random() < 0.5:  # through the front, or through the sides
        pose = {'flex': p.rng.uniform(2.75, 2.95), 'abduct': -0.15, 'reach': 0.51}
    else:
        pose = {'flex': 0.1, 'abduct': p.rng.uniform(2.75, 2.95), 'reach': 0.51}
    p.move(t, t + up, **{name + s: value for name, value in pose.items() for s in '01'}, pitch=p.rest['pitch'] - 0.06)
    p.relax(t + up + hold, t + up + hold + down)
    p.t = t + up + hold + down - 0.1


def jump(p, side, pace):
    forward = p.rng.uniform(0, 0.2)
    for _ in range(int(p.rng.integers(1, 3))):
        h = p.rng.uniform(0.14, 0.26)
        flight = 2 * np.sqrt(2 * h / 9.81)
        off = p.t + 0.55 / pace ** 0.5
        land, v, stand = off + flight, 9.81 * flight / 2, p.rest['height']
        p.move(p.t, off - 0.2, height=0.7, pitch=0.45, shift=-0.06, flex0=-0.6, flex1=-0.6)
        p.move(off - 0.2, off, height=(stand + 0.04, v), pitch=0.05, shift=0.03)
        p.move(off, land, height=(stand, -v))
        p.move(off - 0.2, off + flight / 2, flex0=1.9, flex1=1.9)
        p.move(off + flight / 2, land + 0.2, flex0=0.4, flex1=0.4, pitch=0.3)
        p.move(land, land + 0.18, height=stand - 0.17, shift=-0.02)
        x, z, yaw = p.where()
        for foot in (0, 1):
            p.step(foot, off, land, p.spot(foot, x + forward * np.sin(yaw), z + forward * np.cos(yaw), yaw), h + 0.05, 0.75, flight=True)
        p.t = land + 0.2
    p.relax(p.t, p.t + 0.4)
    p.t += 0.3


def hop(p, side, pace):
    foot, n, forward = int(p.rng.integers(2)), int(p.rng.integers(3, 6)), p.rng.uniform(0.0, 0.1)
    free, t0 = 1 - foot, p.t
    f, (x, z, yaw) = str(free), p.where()
    p.move(t0, t0 + 0.35, sway=0.06 * (1 - 2 * foot))
    p.move(t0 + 0.15, t0 + 0.5, **{'foot_up' + f: 0.24, 'foot_fwd' + f: -0.16, 'foot_pitch' + f: 0.7, 'abduct0': 0.5, 'abduct1': 0.5, 'reach0': 0.42, 'reach1': 0.42})
    t = t0 + 0.55
    for _ in range(n):
        h = p.rng.uniform(0.07, 0.11)
        flight, stand = 2 * np.sqrt(2 * h / 9.81), p.rest['height']
        off = t + 0.28 / pace ** 0.5
        v = 9.81 * flight / 2
        p.move(t, off - 0.12, height=stand - 0.09, flex0=0.0, flex1=0.0)
        p.move(off - 0.12, off, height=(stand + 0.02, v))
        p.move(off, off + flight, height=(stand, -v), flex0=0.6, flex1=0.6)
        x, z = x + forward * np.sin(yaw), z + forward * np.cos(yaw)
        p.step(foot, off, off + flight, p.spot(foot, x, z, yaw), h + 0.02, 0.5, flight=True)
        t = off + flight
    p.step(free, t0 + 0.15, t + 0.45, p.spot(free, x, z, yaw), 0.0, 0.3)
    p.relax(t, t + 0.45)
    p.t = t + 0.5


def squat(p, side, pace):
    t, down, hold, up = p.t, p.rng.uniform(0.7, 0.9) / pace, p.rng.uniform(0.05, 0.4), p.rng.uniform(0.6, 0.8) / pace
    arms = p.rng.uniform(0.9, 1.5)
    p.move(t, t + down, height=p.rng.uniform(0.48, 0.58), shift=-0.1, pitch=p.rng.uniform(0.35, 0.55), flex0=arms, flex1=arms, abduct0=0.0, abduct1=0.0)
    p.relax(t + down + hold, t + down + hold + up)
    p.t = t + down + hold + up


def seated(p):
    return {'height': p.rng.uniform(0.45, 0.5), 'shift': -0.36, 'pitch': 0.03, 'flex0': 0.62, 'flex1': 0.62, 'abduct0': 0.05, 'abduct1': 0.05, 'reach0': 0.44, 'reach1': 0.44}


def sit_down(p, side, pace):
    t, down, pose = p.t, p.rng.uniform(1.0, 1.3) / pace, seated(p)
    p.move(t, t + 0.7 * down, pitch=0.5)
    p.move(t, t + down, **{name: value for name, value in pose.items() if name != 'pitch'})
    p.move(t + 0.7 * down, t + down + 0.3, pitch=pose['pitch'])
    p.t = t + down + p.rng.uniform(0.6, 1.4)


def stand_up(p, side, pace):
    t, up = p.t, p.rng.uniform(0.9, 1.2) / pace
    p.move(t, t + 0.4 * up, pitch=0.6)
    p.relax(t + 0.15 * up, t + 1.15 * up, only=('height', 'shift', 'flex0', 'flex1', 'abduct0', 'abduct1', 'reach0', 'reach1'))
    p.move(t + 0.4 * up, t + 1.15 * up, pitch=p.rest['pitch'])
    p.t = t + 1.2 * up


def bow(p, side, pace):
    t, down, hold, up = p.t, p.rng.uniform(0.7, 0.9) / pace, p.rng.uniform(0.2, 0.6), p.rng.uniform(0.7, 0.9) / pace
    angle = p.rng.uniform(0.95, 1.3)
    p.move(t, t + down, pitch=angle, shift=-0.09, flex0=0.6 * angle, flex1=0.6 * angle)
    p.relax(t + down + hold, t + down + hold + up)
    p.t = t + down + hold + up


def idle(p, side, pace):
    p.t += p.rng.uniform(1.8, 2.8)


DO = dict(zip(ACTIONS, [walk, run, walk_backwards, side_step, turn, spin, kick, punch, wave, raise_arms, jump, hop, squat, sit_down,
                        stand_up, bow, idle]))


def curve(keys, times):
    """Keys (time, value, velocity) -> cubic Hermite values (T,), held before the first and after the last."""
    t, v, m = np.array(keys).T
    if len(t) == 1:
        return np.full(len(times), v[0])
    i = np.clip(np.searchsorted(t, times, 'right') - 1, 0, len(t) - 2)
    h = t[i + 1] - t[i]
    s = np.clip((times - t[i]) / h, 0, 1)
    return v[i] * (1 + 2 * s) * (1 - s) ** 2 + m[i] * h * s * (1 - s) ** 2 + v[i + 1] * s * s * (3 - 2 * s) + m[i + 1] * h * s * s * (s - 1)


def foot_path(start, steps, times):
    """Footsteps -> spot (T, 3: x, z, yaw of the ankle over the floor), lift (T,), pitch (T,), ankle planted (T,), toe planted (T,)."""
    spot, lift, pitch = np.tile(start, (len(times), 1)), np.zeros(len(times)), np.zeros(len(times))
    ankle, toe = np.ones(len(times), bool), np.ones(len(times), bool)
    for heel_off, off, land, a, b, high, roll, flight in steps:
        rolling, air = (times > heel_off) & (times <= off), (times > off) & (times < land)
        pitch[rolling] = roll * ((times[rolling] - heel_off) / (off - heel_off)) ** 2
        s = (times[air] - off) / (land - off)
        spot[air] = a + (b - a) * (s if flight else s * s * (3 - 2 * s))[:, None]  # a body in flight does not speed up
        spot[times >= land] = b
        lift[air] = high * (4 * s * (1 - s) if flight else s * (1 - s) ** 1.5 / 0.186)
        pitch[air] = roll * (1 - s) ** 2 * (1 + 4 * s) - (0 if flight else 1.2 * roll * s ** 3 * (1 - s))
        # planted says: does not move from this frame to the next
        ankle &= (times + 1 / FPS <= heel_off + 1e-9) | (times >= land - 1e-9)
        toe &= (times + 1 / FPS <= off + 1e-9) | (times >= land - 1e-9)
    return spot, lift, pitch, ankle, toe


def body(plan, n_frames):
    """Plan -> joints (T, 22, 3), planted (T, 4: left ankle, left toe, right ankle, right toe)."""
    times = np.arange(n_frames) / FPS
    c = {name: curve(keys, times) for name, keys in plan.keys.items()}
    for name, size in (('pitch', 0.012), ('roll', 0.01), ('sway', 0.006), ('flex0', 0.02), ('flex1', 0.02)):  # nobody stands like a statue
        c[name] = c[name] + size * np.sin(2 * np.pi * (plan.rng.uniform(0.2, 0.4) * times + plan.rng.random()))
    paths = [foot_path(plan.start[f], plan.steps[f], times) for f in (0, 1)]
    centre = smooth((paths[0][0] + paths[1][0]) / 2, 0.13)  # the pelvis follows its feet
    yaw = centre[:, 2]
    sway = c['sway'] + 0.035 * smooth(paths[0][4] * 1.0 - paths[1][4], 0.08)  # and leans over the one that stands
    pelvis = np.zeros((n_frames, 3))
    pelvis[:, 0] = centre[:, 0] + sway * np.cos(yaw) + c['shift'] * np.sin(yaw)
    pelvis[:, 2] = centre[:, 1] - sway * np.sin(yaw) + c['shift'] * np.cos(yaw)
    pelvis[:, 1] = c['height']
    turned = [rotation(yaw + share * c['twist'], share * c['pitch'], share * c['roll']) for *_, share in SPINE]

    ankles, feet, hips, too_high = [], [], [], np.zeros(n_frames)
    for f, (spot, lift, pitch, _, toe_down) in enumerate(paths):
        flat = rotation(spot[:, 2])
        pitch, lift = pitch + c[f'foot_pitch{f}'], lift + c[f'foot_up{f}']
        toe = np.stack([spot[:, 0], TOE_Y + lift, spot[:, 1]], -1) + flat[..., 2] * (FOOT_LENGTH + c[f'foot_fwd{f}'])[:, None]
        back, up = FOOT_DROP * np.sin(pitch) - FOOT_LENGTH * np.cos(pitch), FOOT_DROP * np.cos(pitch) + FOOT_LENGTH * np.sin(pitch)
        feet.append(flat[..., 2] * back[:, None] + np.array([0, 1, 0]) * up[:, None])  # toe to ankle
        ankles.append(toe + feet[f])
        hips.append(turned[0] @ (HIP * [1 - 2 * f, 1, 1]))
        apart = (pelvis + hips[f] - ankles[f])[:, [0, 2]]
        limit = ankles[f][:, 1] + np.sqrt(np.maximum(REACH ** 2 - (apart ** 2).sum(-1), 0.01)) - hips[f][:, 1]
        near = np.convolve(np.pad(toe_down, 1, mode='edge'), np.ones(3), 'valid') > 0
        too_high = np.maximum(too_high, np.where(near, pelvis[:, 1] - limit, 0))
    # a planted foot out of reach lowers the pelvis: the running maximum, then its mean, is smooth and never too little
    for reduce in (np.max, np.mean):
        too_high = reduce(np.lib.stride_tricks.sliding_window_view(np.pad(too_high, 2, mode='edge'), 5), -1)
    pelvis[:, 1] -= too_high

    joints = np.zeros((n_frames, 22, 3))
    joints[:, PELVIS] = pelvis
    for (joint, parent, offset, _), frame in zip(SPINE, turned):
        joints[:, joint] = joints[:, parent] + frame @ np.array(offset)
    chest = turned[3]
    for f in (0, 1):
        mirror = np.array([1 - 2 * f, 1, 1])
        hip = pelvis + hips[f]
        direction = unit(ankles[f] - hip)
        forward = np.cross(direction, turned[0][..., 0])  # knees bend forward of the leg, wherever it points
        joints[:, L_HIP + f] = hip
        joints[:, L_KNEE + f], joints[:, L_ANKLE + f] = two_bone(hip, ankles[f], THIGH, SHIN, forward)
        joints[:, L_TOE + f] = joints[:, L_ANKLE + f] - feet[f]
        joints[:, L_COLLAR + f] = joints[:, SPINE3] + chest @ (COLLAR * mirror)
        joints[:, L_SHOULDER + f] = joints[:, L_COLLAR + f] + chest @ (SHOULDER * mirror)
        flex, abduct = c[f'flex{f}'], c[f'abduct{f}']
        wrist = np.stack([np.cos(flex) * np.sin(abduct), -np.cos(flex) * np.cos(abduct), np.sin(flex)], -1) * mirror
        wrist = joints[:, L_SHOULDER + f] + (chest @ wrist[..., None])[..., 0] * c[f'reach{f}'][:, None]
        joints[:, L_ELBOW + f], joints[:, L_WRIST + f] = two_bone(joints[:, L_SHOULDER + f], wrist, UPPER_ARM, FOREARM, chest @ (ELBOW_POLE * mirror))
    joints[..., [0, 2]] -= joints[0, 0, [0, 2]]
    joints = joints @ rotation(np.array(yaw[0]))  # row vectors times R: turns by -yaw, so frame 0 faces +Z
    return joints.astype(np.float32), np.stack([paths[0][3], paths[0][4], paths[1][3], paths[1][4]], -1)


def make_script(rng):
    """One to three different actions (so that a caption's word pairs settle their order) that can follow each other."""
    n = int(rng.choice([1, 2, 3], p=[0.22, 0.53, 0.25]))
    while True:
        actions = [str(a) for a in rng.choice(ACTIONS, n, replace=False)]
        sit, up = (actions.index(a) if a in actions else None for a in ('sit down', 'stand up'))
        if up not in (None, 0) and sit != up - 1:
            continue  # whoever stands up has sat
        if sit is not None and sit != n - 1 and up != sit + 1:
            continue  # whoever sits does nothing else but stand up
        if any({a, b} == {'turn', 'spin'} for a, b in zip(actions, actions[1:])):
            continue  # these would run into one another
        break
    speeds = rng.choice(list(SPEEDS), n, p=[0.2, 0.6, 0.2])
    return [{'action': a, 'side': str(rng.choice(['left', 'right'])) if a in SIDED else None, 'speed': 'normal' if a == 'idle' else str(v)}
            for a, v in zip(actions, speeds)]


def make_clip(seed):
    """-> dict(joints (T, 22, 3) float32, captions [(text, tokens)], script, planted (T, 4) bool), the same for the same seed.
    Left ankle, left toe, right ankle, right toe: planted[t] says that the joint stays where it is from frame t to t + 1."""
    rng = np.random.default_rng(seed)
    while True:
        script, plan = make_script(rng), Plan(rng)
        if script[0]['action'] == 'stand up':
            plan.keys |= {name: [(0.0, value, 0.0)] for name, value in seated(plan).items()}
            plan.t += 0.3
        for item in script:
            DO[item['action']](plan, 1 if item['side'] == 'right' else 0, SPEEDS[item['speed']])
            plan.t += rng.uniform(0.05, 0.25)
        n_frames = max(MIN_FRAMES, int((plan.t + rng.uniform(0.2, 0.4)) * FPS))
        if n_frames <= MAX_FRAMES:
            break
    joints, planted = body(plan, n_frames)
    captions = {caption(script, rng) for _ in range(20)}
    captions = [sorted(captions)[i] for i in rng.permutation(len(captions))[:4]]
    return {'joints': joints, 'captions': captions, 'script': script, 'planted': planted}


def generate(n, seed):
    """-> n clips; other seeds give other clips."""
    return [make_clip(seed * 1_000_003 + i) for i in range(n)]


# ---------------------------------------------------------------------------------------------------------------------
# The language. Phrases are written as lemma/TAG. The marker of an item's place ("then", "finally") stands right before its verb
# and the speed comes last, so that word pairs alone tell the order; each action has two or three verbs and its own words for limbs.

PHRASES = {
    'walk': ['walk/VERB forward/ADV', 'walk/VERB ahead/ADV', 'stroll/VERB forward/ADV', 'stroll/VERB ahead/ADV'],
    'run': ['run/VERB forward/ADV', 'run/VERB ahead/ADV', 'jog/VERB forward/ADV', 'jog/VERB ahead/ADV'],
    'walk backwards': ['walk/VERB backwards/ADV', 'walk/VERB backward/ADV', 'back/VERB up/ADV'],
    'side-step': ['sidestep/VERB to/ADP the/DET {side}/NOUN', 'sidestep/VERB {side}/ADV', 'shuffle/VERB {side}/ADV', 'shuffle/VERB to/ADP the/DET {side}/NOUN'],
    'turn': ['turn/VERB {side}/ADV', 'turn/VERB to/ADP the/DET {side}/NOUN', 'pivot/VERB {side}/ADV', 'pivot/VERB to/ADP the/DET {side}/NOUN'],
    'spin': ['spin/VERB around/ADV', 'twirl/VERB around/ADV', 'spin/VERB in/ADP a/DET circle/NOUN'],
    'kick': ['kick/VERB with/ADP the/DET {side}/ADJ leg/NOUN', 'kick/VERB with/ADP the/DET {side}/ADJ foot/NOUN', 'kick/VERB the/DET {side}/ADJ leg/NOUN'],
    'punch': ['punch/VERB with/ADP the/DET {side}/ADJ fist/NOUN', 'jab/VERB with/ADP the/DET {side}/ADJ fist/NOUN', 'punch/VERB with/ADP the/DET {side}/ADJ arm/NOUN'],
    'wave': ['wave/VERB with/ADP the/DET {side}/ADJ hand/NOUN', 'wave/VERB the/DET {side}/ADJ hand/NOUN'],
    'raise arms': ['raise/VERB both/DET arm/NOUN', 'lift/VERB both/DET arm/NOUN', 'raise/VERB both/DET hand/NOUN'],
    'jump': ['jump/VERB up/ADV', 'jump/VERB', 'leap/VERB up/ADV'],
    'hop': ['hop/VERB on/ADP one/NUM leg/NOUN', 'hop/VERB on/ADP one/NUM foot/NOUN', 'bounce/VERB on/ADP one/NUM leg/NOUN'],
    'squat': ['squat/VERB down/ADV', 'squat/VERB', 'crouch/VERB down/ADV'],
    'sit down': ['sit/VERB down/ADV', 'sit/VERB on/ADP a/DET chair/NOUN', 'take/VERB a/DET seat/NOUN'],
    'stand up': ['stand/VERB up/ADV', 'get/VERB up/ADV', 'rise/VERB'],
    'bow': ['bow/VERB', 'bow/VERB forward/ADV', 'bend/VERB forward/ADV'],
    'idle': ['stand/VERB still/ADV', 'stay/VERB still/ADV', 'wait/VERB'],
}
SUBJECTS = ['a/DET person/NOUN', 'the/DET person/NOUN', 'a/DET man/NOUN', 'someone/PRON']
FIRST = ['', '', 'first/ADV']
MIDDLE = [', then/ADV', 'and/CCONJ then/ADV', ', next/ADV', 'and/CCONJ after/ADP that/PRON']
LAST = [', finally/ADV', 'and/CCONJ finally/ADV', ', lastly/ADV']  # of three; the second of two is a middle
ADVERBS = {'slow': ['slowly/ADV'], 'normal': [''], 'fast': ['quickly/ADV', 'fast/ADV']}


def caption(script, rng):
    """-> (text, tokens) of one of the many ways to say it."""
    pick = lambda options: options[int(rng.integers(len(options)))]
    parts = [pick(SUBJECTS)]
    for i, item in enumerate(script):
        parts.append(pick((FIRST if len(script) > 1 else ['']) if i == 0 else MIDDLE if i == 1 else LAST))
        parts += [pick(PHRASES[item['action']]).format(side=item['side']), pick(ADVERBS[item['speed']])]
    tagged, words = ' '.join(parts).split(), []
    for i, token in enumerate(tagged):
        word, _, tag = token.partition('/')
        if tag == 'VERB':
            word += 'es' if word.endswith('ch') else 's'
        words.append(word + 's' if tagged[i - 1] == 'both/DET' else word)
    return ' '.join(words).replace(' ,', ','), ' '.join(t for t in tagged if t != ',')


def _verb(*stems):
    return rf"\b(?:{'|'.join(stems)})(?:e?s|ing|ed)?\b"


UNDERSTOOD = {  # wider than the grammar, for what a user types; exactly one of them must match each clause
    'walk': _verb('walk', 'stroll') + '(?!.*back)', 'run': _verb('run', 'runn', 'jog', 'jogg'), 'walk backwards': r'\bbacks? up|\bbackwards?\b',
    'side-step': _verb('side-?step', 'side-?stepp', 'shuffle') + r'|\bsteps? (to the )?(left|right)|\bsteps? sideways', 'turn': _verb('turn', 'pivot', 'rotate'),
    'spin': _verb('spin', 'spinn', 'twirl'), 'kick': _verb('kick'), 'punch': _verb('punch', 'jab', 'jabb'), 'wave': _verb('wave', 'wav'),
    'raise arms': _verb('raise', 'rais', 'lift') + r' (both|their|his|her|the)?\b ?(arms|hands)', 'jump': _verb('jump', 'leap'), 'hop': _verb('hop', 'hopp', 'bounce'),
    'squat': _verb('squat', 'squatt', 'crouch'), 'sit down': _verb('sit', 'sitt') + r'|\bseat\b', 'stand up': _verb('stand', 'get', 'gett') + r' up|' + _verb('rise', 'ris'),
    'bow': _verb('bow', 'bend'), 'idle': _verb('stand', 'stay') + ' (still|in place)|' + _verb('wait'),
}
MARKER = r'[,.;]|\b(?:and|then|next|after that|afterwards|finally|lastly|first)\b'
FILLER = set('a an the person man woman someone he she they left right with on in to one both his her their leg legs foot feet hand hands '
             'arm arms fist fists forward forwards ahead straight around up down back circle chair take takes taking walk walks walking '
             'slow slowly quick quickly fast'.split())


def parse(text):
    """Caption or prompt in the grammar's style -> script, or None if any part of it is not understood. A side left open is None."""
    script = []
    for clause in re.split(MARKER, text.lower()):
        clause = clause.strip()
        if not clause or re.fullmatch(r'(a|the) (person|man|woman)|someone|he|she|they', clause):
            continue
        actions = [a for a, pattern in UNDERSTOOD.items() if re.search(pattern, clause)]
        if len(actions) != 1 or set(re.findall(r"[a-z']+", re.sub(UNDERSTOOD[actions[0]], '', clause))) - FILLER:
            return None
        side = re.search(r'\b(left|right)\b', clause)
        speed = 'slow' if re.search(r'\bslow(ly)?\b', clause) else 'fast' if re.search(r'\b(quickly|fast|quick)\b', clause) else 'normal'
        script.append({'action': actions[0], 'side': side[1] if side and actions[0] in SIDED else None, 'speed': speed})
    return script or None


# ---------------------------------------------------------------------------------------------------------------------
# The detectors: thresholds on what a body does in space, with no knowledge of how the motion was made. Each gives the stretches of
# frames (first, last) that are evidence of its item; 1.5 cm of noise must not change the verdict.

def stretches(mask, at_least=0.0, gap=0.0):
    """(T,) bool -> [(first, last)] runs of True that last at_least seconds, after bridging holes of up to gap seconds."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]]).astype(int)))
    runs = []
    for a, b in zip(edges[::2], edges[1::2] - 1):
        if runs and a - runs[-1][1] - 1 <= gap * FPS:
            runs[-1] = (runs[-1][0], b)
        else:
            runs.append((a, b))
    return [(int(a), int(b)) for a, b in runs if b - a + 1 >= at_least * FPS]


class View:
    """Joints (T, 22, 3) seen from the body: (left, up, forward) axes, floor at 0, light smoothing."""

    def __init__(self, joints):
        j = smooth(np.asarray(joints, np.float64), 0.04)
        j[..., 1] -= np.percentile(j[:, [L_TOE, R_TOE], 1].min(1), 20) - TOE_Y
        self.joints, self.height = j, j[..., 1]
        left = smooth(unit((j[:, L_HIP] - j[:, R_HIP] + j[:, L_SHOULDER] - j[:, R_SHOULDER]) * [1, 0, 1]), 0.1)
        self.axes = np.stack([unit(left), np.broadcast_to([0.0, 1, 0], left.shape), unit(np.cross(left, [0, 1, 0]))], 1)  # rows
        self.yaw = np.unwrap(np.arctan2(self.axes[:, 2, 0], self.axes[:, 2, 2]))
        self.turning = np.gradient(smooth(self.yaw, 0.1)) * FPS
        travel = self.axes @ (np.gradient(smooth(j[:, PELVIS], 0.15), axis=0) * FPS)[..., None]
        self.leftward, _, self.forward = travel[..., 0].T  # pelvis velocity, m/s
        self.steps = self.local(np.gradient((j[:, L_ANKLE] + j[:, R_ANKLE]) / 2, axis=0))  # how far the feet got in each frame
        self.behind = self.local((j[:, L_ANKLE] + j[:, R_ANKLE]) / 2 - j[:, PELVIS])[:, 2]
        self.lean = np.arctan2(*(self.local(j[:, NECK] - j[:, PELVIS])[:, k] for k in (2, 1)))

    def local(self, v):
        """World vectors (T, 3) -> their (left, up, forward) parts."""
        return (self.axes @ v[..., None])[..., 0]

    def moved(self, run, axis):
        """How far pelvis and feet both went along left (0) or forward (2) in a stretch: leaning or sitting back is no travel."""
        part = slice(run[0], run[1] + 1)
        pelvis, feet = (self.leftward, None, self.forward)[axis][part].sum() / FPS, self.steps[part, axis].sum()
        return min(pelvis, feet, key=abs) if pelvis * feet > 0 else 0.0


def _travel(v, speed, direction, axis, least, seconds, gap=0.0):
    return [r for r in stretches((speed > direction[0]) & (speed < direction[1]), seconds, gap) if abs(v.moved(r, axis)) > least]


def _walk(v, side):
    return _travel(v, v.forward, (0.22, 1.9), 2, 0.6, 0.9)


def _run(v, side):
    return _travel(v, v.forward, (1.9, 99), 2, 0.8, 0.4)


def _walk_backwards(v, side):
    return _travel(v, v.forward, (-99, -0.15), 2, 0.4, 0.7, 0.2)


def _side_step(v, side):
    runs = _travel(v, v.leftward * (1 - 2 * side) * (np.abs(v.turning) < 0.8), (0.1, 99), 0, 0.35, 0.5, 0.3)
    return [(a, b) for a, b in runs if abs(v.moved((a, b), 0)) > 2 * abs(v.moved((a, b), 2)) and abs(v.yaw[b] - v.yaw[a]) < 0.6]


def _turned(v, sign):
    """Stretches of turning to one side (pauses between two steps bridged), with their angles."""
    return [(r, (v.yaw[r[1]] - v.yaw[r[0]]) * sign) for r in stretches(v.turning * sign > 0.3, 0.3, 0.25)]


def _turn(v, side):
    return [r for r, angle in _turned(v, 1 - 2 * side) if 0.85 < angle < 3.5]


def _spin(v, side):
    return [r for sign in (1, -1) for r, angle in _turned(v, sign) if angle > 4.5]


def _kick(v, side):
    hip, ankle = v.joints[:, L_HIP + side], v.joints[:, L_ANKLE + side]
    leg = v.local(ankle - hip)
    stands = v.height[:, L_TOE + 1 - side] < 0.1
    return stretches((leg[:, 2] > 0.4) & (v.height[:, L_ANKLE + side] > 0.33) & (np.linalg.norm(leg, axis=-1) > 0.62) & stands, 0.1, 0.1)


def _arm(v, side):
    return v.local(v.joints[:, L_WRIST + side] - v.joints[:, L_SHOULDER + side])


def _punch(v, side):
    arm, other = _arm(v, side), _arm(v, 1 - side)
    out = (arm[:, 2] > 0.37) & (np.abs(arm[:, 1]) < 0.2) & (np.abs(arm[:, 0]) < 0.25) & (other[:, 2] < 0.35)
    speed = np.gradient(arm[:, 2]) * FPS
    return [(a, b) for a, b in stretches(out, 0.0, 0.5) if speed[max(a - 6, 0):b + 1].max() > 0.8]


def _wave(v, side):
    found, swing = [], _arm(v, side)[:, 0]
    for a, b in stretches((_arm(v, side)[:, 1] > 0.03) & (_arm(v, 1 - side)[:, 1] < 0), 0.6, 0.1):
        beats, low, high, rising = 0, swing[a], swing[a], None
        for x in swing[a:b + 1]:  # count reversals of more than 7 cm
            low, high = min(low, x), max(high, x)
            if rising is not False and x < high - 0.07:
                beats, rising, low = beats + 1, False, x
            elif rising is not True and x > low + 0.07:
                beats, rising, high = beats + 1, True, x
        if beats >= 4:
            found.append((a, b))
    return found


def _raise_arms(v, side):
    return stretches(v.height[:, [L_WRIST, R_WRIST]].min(1) > v.height[:, HEAD] + 0.05, 0.25, 0.1)


def _jump(v, side):
    toes = v.height[:, [L_TOE, R_TOE]]
    apart = np.abs(v.local(v.joints[:, L_TOE] - v.joints[:, R_TOE])[:, 2])
    return stretches((toes.min(1) > 0.09) & (np.ptp(toes, axis=1) < 0.12) & (apart < 0.25), 0.1)


def _hop(v, side):
    found = []
    for free in (0, 1):
        for a, b in stretches(v.height[:, L_ANKLE + free] > 0.2, 0.8, 0.1):
            if len(stretches(v.height[a:b + 1, L_TOE + 1 - free] > 0.065, 0.1)) >= 2:
                found.append((a, b))
    return found


def _low(v):
    """Stretches with the pelvis low, and whether it is then far behind the feet, as on a chair."""
    return [(a, b, v.behind[a:b + 1].max() > 0.22) for a, b in stretches(v.height[:, PELVIS] < 0.66, 0.15, 0.2)]


def _squat(v, side):
    return [(a, b) for a, b, chair in _low(v) if not chair and (v.height[:a, PELVIS] > 0.78).any() and (v.height[b:, PELVIS] > 0.78).any()]


def _sit_down(v, side):
    return [(max(a - 10, 0), min(a + 5, b)) for a, b, chair in _low(v) if chair and b - a > 8 and (v.height[:a, PELVIS] > 0.78).any()]


def _stand_up(v, side):
    return [(max(b - 5, a), b + 10) for a, b, chair in _low(v) if chair and (v.height[b:, PELVIS] > 0.78).any()]


def _bow(v, side):
    return stretches((v.lean > 0.48) & (v.height[:, PELVIS] > 0.74), 0.2, 0.1)


def _idle(v, side):
    n = int(1.3 * FPS)
    if len(v.joints) < n:
        return []
    parts = v.joints[:, [PELVIS, L_ANKLE, R_ANKLE, NECK, L_WRIST, R_WRIST]]
    window = np.lib.stride_tricks.sliding_window_view(parts, n, axis=0)
    still = (np.ptp(window, axis=-1).max(-1) < [0.08, 0.08, 0.08, 0.1, 0.14, 0.14]).all(-1)
    standing = v.height[:len(still), PELVIS] > 0.8
    upright = np.lib.stride_tricks.sliding_window_view(v.lean, n).max(-1) < 0.3
    low_hands = v.height[:len(still), [L_WRIST, R_WRIST]].max(1) < v.height[:len(still), PELVIS] + 0.15
    return [(a, b + n - 1) for a, b in stretches(still & standing & upright & low_hands)]


EVIDENCE = dict(zip(ACTIONS, [_walk, _run, _walk_backwards, _side_step, _turn, _spin, _kick, _punch, _wave, _raise_arms, _jump, _hop,
                              _squat, _sit_down, _stand_up, _bow, _idle]))


def _evidence(view, item):
    sides = {'left': [0], 'right': [1]}.get(item['side'], [0, 1] if item['action'] in SIDED else [0])
    return sorted((r for s in sides for r in EVIDENCE[item['action']](view, s)), key=sum)


def detect(joints, item):
    """Does the motion (T, 22, 3) contain this item anywhere?"""
    return bool(_evidence(View(joints), item))


def passes(joints, script):
    """Does the motion contain every item of the script, in its order (by the middles of the stretches of evidence)?
    A script of nothing but idling asks for little motion throughout."""
    view, now = View(joints), -1
    if [item['action'] for item in script] == ['idle']:
        return sum(b - a + 1 for a, b in _evidence(view, script[0])) >= 0.8 * len(joints)
    for item in script:
        later = [sum(r) for r in _evidence(view, item) if sum(r) > now]
        if not later:
            return False
        now = later[0]
    return True
