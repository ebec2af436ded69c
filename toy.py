"""The tiny-shakespeare of motion: procedural SMPL-22 clips at 20 fps, with captions and with detectors that read them back.

Three parts, each usable without the others:

    the body       make_clip(seed): a plan of footsteps and keyed curves -> joints (T, 22, 3)
    the language   a small grammar: script -> captions with tags, and parse(caption) -> script
    the detectors  passes(joints, script): does this motion, wherever it comes from, do what the script says?

A script is a list of items {'action', 'side', 'speed'}, done one after the other. Units: metres, seconds, radians. Y is up,
the floor is y = 0, a clip starts at x = z = 0 facing +Z, so +X is the character's left; yaw is positive to the left. Feet never
slide: footsteps come first, the pelvis follows the mean of the feet, and two-bone inverse kinematics fills in the knees.
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
SPINE = [(SPINE1, PELVIS, (0, 0.12, -0.03), 0.35), (SPINE2, SPINE1, (0, 0.138, 0.02), 0.6),
         (SPINE3, SPINE2, (0, 0.055, 0.01), 0.8), (NECK, SPINE3, (0, 0.217, -0.025), 1.0), (HEAD, NECK, (0, 0.092, 0.045), 0.85)]


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

    Curves: height, shift, sway (the pelvis: up; forward and left of the feet's middle), pitch, twist, roll (the trunk), and per
    side, 0 left and 1 right: flex, abduct, reach (the wrist seen from the shoulder: angle forward, angle outward, distance) and
    up, fwd, tip (a foot in the air: added height, added distance ahead, angle of the toes down). 'flex' is short for flex0 and
    flex1. An action (one method each, side 0 or 1, pace 1 for normal) starts at self.t and moves self.t to its end."""

    def __init__(self, rng):
        self.rng, self.some, self.t = rng, rng.uniform, rng.uniform(0.1, 0.4)
        self.rest = {'height': self.some(0.948, 0.96), 'shift': 0.025, 'sway': 0.0, 'pitch': self.some(0, 0.06), 'twist': 0.0,
                     'roll': 0.0} | {n + s: 0.0 for n in ('up', 'fwd', 'tip') for s in '01'}
        for name, low, high in (('flex', 0.02, 0.16), ('abduct', 0.1, 0.22), ('reach', 0.485, 0.51)):
            self.rest |= {name + '0': self.some(low, high), name + '1': self.some(low, high)}
        self.keys = {name: [(0.0, value, 0.0)] for name, value in self.rest.items()}
        self.start = [self.spot(f, 0, 0, 0) for f in (0, 1)]
        self.feet, self.steps = list(self.start), [[], []]

    def count(self, low, high):
        return int(self.rng.integers(low, high + 1))

    def move(self, t0, t1, **targets):
        """Move curves to new values between t0 and t1; a target may be (value, velocity). Whatever was planned on a curve after
        t0 is dropped: the curve then bends from its last key straight to the new one, so consecutive actions blend."""
        for name, target in targets.items():
            value, velocity = target if isinstance(target, tuple) else (target, 0.0)
            for full in [name] if name in self.keys else [name + '0', name + '1']:
                keys = self.keys[full]
                if keys[-1][0] < t0:
                    keys.append((t0, keys[-1][1], 0.0))
                while keys[-1][0] > t0 + 1e-6 and len(keys) > 1:
                    keys.pop()
                keys.append((t1, value, velocity))

    def go(self, seconds, **targets):
        """The same from now on, and wait for it."""
        self.move(self.t, self.t + seconds, **targets)
        self.t += seconds

    def relax(self, t0, t1, but=()):
        """Bring every curve that is away from its rest value back to it."""
        self.move(t0, t1, **{n: v for n, v in self.rest.items() if self.keys[n][-1][1:] != (v, 0.0) and n not in but})

    def step(self, foot, t0, t1, spot, lift=0.06, roll=0.3, flight=False):
        """The foot leaves the floor at t0 and lands at t1 on spot (x, z, yaw). Its heel comes up before that, over the toe, to
        the angle roll. In a flight of the whole body it follows a parabola; an ordinary step rises early and lands softly."""
        landed = self.steps[foot][-1][2] if self.steps[foot] else 0.0
        self.steps[foot].append((max(t0 - 0.12, landed), t0, t1, self.feet[foot], spot, lift, roll, flight))
        self.feet[foot] = spot

    def where(self, ahead=0.0, left=0.0):
        """x, z, yaw midway between the feet, or so many metres from there."""
        x, z, yaw = (self.feet[0] + self.feet[1]) / 2
        return x + ahead * np.sin(yaw) + left * np.cos(yaw), z + ahead * np.cos(yaw) - left * np.sin(yaw), yaw

    def spot(self, foot, x, z, yaw):
        """Where a foot belongs (the ankle's x, z and its yaw) when the body stands at x, z."""
        left = SPREAD * (1 - 2 * foot)
        return np.array([x + left * np.cos(yaw), z - left * np.sin(yaw), yaw])

    def gait(self, n, length, period, lift, roll, swing=0.8, turn=0.0, arm=0.3, arm_mid=0.08, ramp=0.8, **posture):
        """n steps of a length (negative: backwards) and a closing one. swing: how long a foot is in the air, in periods; above 1
        both are, for a moment, and the pelvis flies. ramp: the first and last step, relative to the others."""
        (x, z, yaw), foot, t0, landed = self.where(), self.count(0, 1), self.t, self.t
        self.move(t0, t0 + 0.4, **posture)
        for k in range(n + 1):
            off, share = t0 + k * period, 0.6 if k in (0, n) else 1.0
            land = off + min(swing, 1.1 if k == n else 9) * period
            if k < n:
                yaw, ahead = yaw + turn / n, length * (ramp if k in (0, n - 1) else 1)
                x, z = x + ahead * np.sin(yaw), z + ahead * np.cos(yaw)
                a = arm * share * np.sign(length)  # the other side's arm goes forward with the foot, and the chest with it
                self.move(landed, land, **{f'flex{foot}': arm_mid - a, f'flex{1 - foot}': arm_mid + a},
                          twist=0.2 * a * (1 - 2 * foot))
            self.step(foot, off, land, self.spot(foot, x, z, yaw), lift * share, roll * share)
            if swing > 1:
                self.move(off, off + 0.2 * period, height=self.rest['height'] + 0.01)
                self.move(off + 0.2 * period, off + 0.7 * period, height=self.rest['height'] - 0.07)
            foot, landed = 1 - foot, land
        self.t = landed
        self.relax(self.t - 0.6 * period, self.t + 0.3)

    def walk(self, side, pace):
        self.gait(self.count(4, 7), self.some(0.48, 0.6) * pace ** 0.4, self.some(0.5, 0.56) / pace ** 0.8, self.some(0.05, 0.09),
                  self.some(0.5, 0.7), turn=self.some(-0.25, 0.25), arm=self.some(0.25, 0.45), pitch=self.rest['pitch'] + 0.03)

    def run(self, side, pace):
        self.gait(self.count(6, 9), self.some(0.92, 1.02) * pace ** 0.3, self.some(0.33, 0.36) / pace ** 0.3, self.some(0.2, 0.3),
                  1.2, swing=1.35, turn=self.some(-0.2, 0.2), arm=self.some(0.45, 0.65), arm_mid=0.6, ramp=0.6, reach=0.37,
                  pitch=self.rest['pitch'] + 0.15)

    def walk_backwards(self, side, pace):
        self.gait(self.count(4, 6), -self.some(0.34, 0.46) * pace ** 0.4, self.some(0.5, 0.6) / pace ** 0.8,
                  self.some(0.05, 0.08), 0.2, arm=self.some(0.1, 0.25))

    def side_step(self, side, pace):
        d, period = self.some(0.28, 0.4) * (1 - 2 * side), self.some(0.4, 0.5) / pace ** 0.8
        self.move(self.t, self.t + 0.3, abduct=0.3, height=self.rest['height'] - 0.03)
        for _ in range(self.count(2, 4)):  # lead foot out, other foot after it
            place = self.where(left=d)
            for foot in (side, 1 - side):
                self.step(foot, self.t, self.t + 0.85 * period, self.spot(foot, *place), 0.07, 0.25)
                self.t += period
        self.relax(self.t - 0.2, self.t + 0.2)

    def turn_in_place(self, angle, pairs, period):
        x, z, yaw = self.where()
        inner = 0 if angle > 0 else 1  # opens first, so that the legs do not cross
        self.move(self.t, self.t + period, twist=0.25 * np.sign(angle))  # the chest leads
        for k in range(1, pairs + 1):
            for foot in (inner, 1 - inner):
                self.step(foot, self.t, self.t + 0.85 * period, self.spot(foot, x, z, yaw + angle * k / pairs), 0.06, 0.3)
                self.t += period
        self.relax(self.t - period, self.t + 0.2)
        self.t += 0.15

    def turn(self, side, pace):
        self.turn_in_place(self.some(1.2, 2.2) * (1 - 2 * side), self.count(2, 3), self.some(0.3, 0.38) / pace)

    def spin(self, side, pace):
        self.turn_in_place(2 * np.pi * self.rng.choice([-1, 1]), self.count(5, 6), self.some(0.25, 0.3) / pace)

    def kick(self, side, pace):
        s, o, right = str(side), str(1 - side), 2 * side - 1
        angle = self.some(1.1, 1.55)  # of the stretched leg, from hanging down
        shift, cock, strike, hold, fold, down = np.array([0.3, 0.35, 0.3, 0.1, 0.35, 0.3]) / pace ** 0.6
        self.move(self.t, self.t + shift + 0.1, sway=0.055 * right)
        self.t += shift
        self.step(side, self.t, self.t + cock + strike + hold + fold + down, self.feet[side], 0.0, 0.15)
        self.go(cock, **{'up' + s: 0.3, 'fwd' + s: -0.22, 'tip' + s: 0.7, 'flex' + o: 0.7, 'flex' + s: -0.3}, abduct=0.4,
                twist=0.2 * right, height=self.rest['height'] - 0.03)
        self.go(strike, **{'up' + s: 0.82 - 0.81 * np.cos(angle), 'fwd' + s: 0.81 * np.sin(angle), 'tip' + s: -0.8,
                           'flex' + o: -0.2, 'flex' + s: 0.4}, twist=-0.2 * right, pitch=self.rest['pitch'] - 0.22)
        self.t += hold
        self.relax(self.t, self.t + fold + down + 0.1, but=('sway', 'up' + s, 'fwd' + s, 'tip' + s))
        self.go(fold, **{'up' + s: 0.3, 'fwd' + s: 0.12, 'tip' + s: 0.2})
        self.go(down, **{'up' + s: 0.0, 'fwd' + s: 0.0, 'tip' + s: 0.0})
        self.move(self.t - down + 0.1, self.t + 0.2, sway=0.0)

    def punch(self, side, pace):
        s, right = str(side), 2 * side - 1
        guard = {'reach' + s: 0.25, 'flex' + s: 1.45, 'twist': 0.0, 'pitch': self.rest['pitch']}
        self.go(0.47 / pace ** 0.5, flex=1.45, abduct=-0.2, reach=0.25, height=self.rest['height'] - 0.04)
        for _ in range(self.count(1, 3)):
            self.go(0.2 / pace ** 0.7, **{'reach' + s: self.some(0.5, 0.52), 'flex' + s: self.some(1.5, 1.62)},
                    twist=0.3 * right, pitch=self.rest['pitch'] + 0.1)
            self.t += 0.14 / pace ** 0.7
            self.go(0.27 / pace ** 0.7, **guard)
            self.t += self.some(0.02, 0.15)
        self.relax(self.t, self.t + 0.45)
        self.t += 0.3

    def wave(self, side, pace):
        s, high, beat = str(side), self.some(2.4, 2.6), self.some(0.24, 0.3) / pace ** 0.6
        self.go(0.5, **{'flex' + s: 0.25, 'abduct' + s: high, 'reach' + s: 0.39}, roll=0.04 * (1 - 2 * side))
        for k in range(2 * self.count(2, 4) + 1):
            self.go(beat, **{'abduct' + s: high + (0.35 if k % 2 else -0.35)})
        self.relax(self.t, self.t + 0.5)
        self.t += 0.35

    def raise_arms(self, side, pace):
        up, hold, down, high = self.some(0.7, 0.9) / pace, self.some(0.4, 0.9), self.some(0.6, 0.8) / pace, self.some(2.75, 2.95)
        flex, abduct = (high, -0.15) if self.rng.random() < 0.5 else (0.1, high)  # through the front, or through the sides
        self.go(up, flex=flex, abduct=abduct, reach=0.51, pitch=self.rest['pitch'] - 0.06)
        self.relax(self.t + hold, self.t + hold + down)
        self.t += hold + down - 0.1

    def fly(self, feet, h, forward, tuck, roll, crouch):
        """From now: push off for crouch seconds, rise by h, land after the time that gravity asks for (and advance to it)."""
        off, flight, stand = self.t + crouch, 2 * np.sqrt(2 * h / 9.81), self.rest['height']
        self.move(self.t, off, height=(stand + 0.03, 9.81 * flight / 2))
        self.move(off, off + flight, height=(stand, -9.81 * flight / 2))
        place = self.where(ahead=forward)
        for foot in feet:
            self.step(foot, off, off + flight, self.spot(foot, *place), h + tuck, roll, flight=True)
        self.t = off + flight

    def jump(self, side, pace):
        forward = self.some(0, 0.2)
        for _ in range(self.count(1, 2)):
            self.go(0.55 / pace ** 0.5 - 0.2, height=0.7, pitch=0.45, shift=-0.06, flex=-0.6)
            self.move(self.t, self.t + 0.2, pitch=0.05, shift=0.03)
            self.move(self.t, self.t + 0.4, flex=self.some(1.7, 2.3))
            self.fly((0, 1), self.some(0.14, 0.26), forward, 0.05, 0.75, 0.2)
            self.move(self.t - 0.1, self.t + 0.2, flex=0.4, pitch=0.3)
            self.go(0.2, height=self.rest['height'] - 0.17, shift=-0.02)
        self.relax(self.t, self.t + 0.4)
        self.t += 0.3

    def hop(self, side, pace):
        foot, forward, t0 = self.count(0, 1), self.some(0.0, 0.1), self.t + 0.15
        free = str(1 - foot)
        self.move(self.t, self.t + 0.35, sway=0.06 * (1 - 2 * foot))
        self.move(t0, t0 + 0.35, **{'up' + free: 0.24, 'fwd' + free: -0.16, 'tip' + free: 0.7}, abduct=0.5, reach=0.42)
        (x, z, yaw), self.t = self.where(), self.t + 0.55
        for k in range(1, self.count(3, 5) + 1):
            self.go(0.28 / pace ** 0.5 - 0.12, height=self.rest['height'] - 0.09, flex=0.0)
            self.move(self.t + 0.12, self.t + 0.35, flex=0.6)
            # the free foot still waits at its old spot: where() is half a hop behind
            self.fly((foot,), self.some(0.07, 0.11), forward * (k + 1) / 2, 0.02, 0.5, 0.12)
        place = x + forward * k * np.sin(yaw), z + forward * k * np.cos(yaw), yaw
        self.step(1 - foot, t0, self.t + 0.45, self.spot(1 - foot, *place), 0.0, 0.3)
        self.relax(self.t, self.t + 0.45)
        self.t += 0.5

    def dip(self, down, hold, up, **pose):
        self.go(down, **pose)
        self.relax(self.t + hold, self.t + hold + up)
        self.t += hold + up

    def squat(self, side, pace):
        self.dip(self.some(0.7, 0.9) / pace, self.some(0.05, 0.4), self.some(0.6, 0.8) / pace, height=self.some(0.48, 0.58),
                 shift=-0.1, pitch=self.some(0.35, 0.55), flex=self.some(0.9, 1.5), abduct=0.0)

    def bow(self, side, pace):
        angle = self.some(0.95, 1.3)
        self.dip(self.some(0.7, 0.9) / pace, self.some(0.2, 0.6), self.some(0.7, 0.9) / pace, pitch=angle, shift=-0.09,
                 flex=0.6 * angle)

    def seated(self):
        return {'height': self.some(0.45, 0.5), 'shift': -0.36, 'flex': 0.62, 'abduct': 0.05, 'reach': 0.44}

    def sit_down(self, side, pace):
        down = self.some(1.0, 1.3) / pace
        self.move(self.t, self.t + 0.7 * down, pitch=0.5)
        self.move(self.t + 0.7 * down, self.t + down + 0.3, pitch=0.03)
        self.go(down, **self.seated())
        self.t += self.some(0.6, 1.4)

    def stand_up(self, side, pace):
        up = self.some(0.9, 1.2) / pace
        self.relax(self.t + 0.15 * up, self.t + 1.15 * up)
        self.move(self.t, self.t + 0.4 * up, pitch=0.6)
        self.move(self.t + 0.4 * up, self.t + 1.15 * up, pitch=self.rest['pitch'])
        self.t += 1.2 * up

    def idle(self, side, pace):
        self.t += self.some(1.8, 2.8)


def curve(keys, times):
    """Keys (time, value, velocity) -> cubic Hermite values (T,), held before the first and after the last."""
    t, v, m = np.array(keys).T
    if len(t) == 1:
        return np.full(len(times), v[0])
    i = np.clip(np.searchsorted(t, times, 'right') - 1, 0, len(t) - 2)
    h = np.maximum(t[i + 1] - t[i], 1e-9)
    s = np.clip((times - t[i]) / h, 0, 1)
    return ((v[i] * (1 + 2 * s) + m[i] * h * s) * (1 - s) ** 2 + (v[i + 1] * (3 - 2 * s) + m[i + 1] * h * (s - 1)) * s ** 2)


def foot_path(start, steps, times):
    """Footsteps -> spot (T, 3: x, z, yaw of the ankle over the floor), lift, pitch, ankle planted, toe planted (each (T,))."""
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
    # nobody stands like a statue
    for name, size in (('pitch', 0.012), ('roll', 0.01), ('sway', 0.006), ('flex0', 0.02), ('flex1', 0.02)):
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
        pitch, lift = pitch + c[f'tip{f}'], lift + c[f'up{f}']
        toe = np.stack([spot[:, 0], TOE_Y + lift, spot[:, 1]], -1) + flat[..., 2] * (FOOT_LENGTH + c[f'fwd{f}'])[:, None]
        back = FOOT_DROP * np.sin(pitch) - FOOT_LENGTH * np.cos(pitch)
        up = FOOT_DROP * np.cos(pitch) + FOOT_LENGTH * np.sin(pitch)
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
        joints[:, L_ELBOW + f], joints[:, L_WRIST + f] = two_bone(joints[:, L_SHOULDER + f], wrist, UPPER_ARM, FOREARM,
                                                                  chest @ (ELBOW_POLE * mirror))
    joints[..., [0, 2]] -= joints[0, 0, [0, 2]]
    joints = joints @ rotation(np.array(yaw[0]))  # row vectors times R: turns by -yaw, so frame 0 faces +Z
    return joints.astype(np.float32), np.stack([paths[0][3], paths[0][4], paths[1][3], paths[1][4]], -1)


def make_script(rng):
    """One to three different actions (so that a caption's word pairs settle their order) that can follow each other."""
    n = int(rng.choice([1, 2, 3], p=[0.22, 0.53, 0.25]))
    weights = np.array([1.7 if a in ('sit down', 'stand up') else 1.0 for a in ACTIONS])  # they fit in fewer places
    while True:
        actions = [str(a) for a in rng.choice(ACTIONS, n, replace=False, p=weights / weights.sum())]
        sit, up = (actions.index(a) if a in actions else None for a in ('sit down', 'stand up'))
        if up not in (None, 0) and sit != up - 1:
            continue  # whoever stands up has sat
        if sit is not None and sit != n - 1 and up != sit + 1:
            continue  # whoever sits does nothing else but stand up
        if any({a, b} == {'turn', 'spin'} for a, b in zip(actions, actions[1:])):
            continue  # these would run into one another
        break
    speeds = rng.choice(list(SPEEDS), n, p=[0.2, 0.6, 0.2])
    return [{'action': a, 'side': str(rng.choice(['left', 'right'])) if a in SIDED else None,
             'speed': 'normal' if a == 'idle' else str(v)} for a, v in zip(actions, speeds)]


def make_clip(seed):
    """-> dict(joints (T, 22, 3) float32, captions [(text, tokens)], script, planted (T, 4) bool), the same for the same seed.
    Left ankle, left toe, right ankle, right toe: planted[t] says that the joint stays where it is from frame t to t + 1."""
    rng = np.random.default_rng(seed)
    while True:
        script, plan = make_script(rng), Plan(rng)
        if script[0]['action'] == 'stand up':
            plan.move(0.0, 0.0, **plan.seated())
            plan.t += 0.3
        for item in script:
            getattr(plan, re.sub('[ -]', '_', item['action']))(1 if item['side'] == 'right' else 0, SPEEDS[item['speed']])
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
# and the speed comes last, so that word pairs alone tell the order; each action has two or three verbs, each limb its own noun.

PHRASES = {
    'walk': ['walk/VERB forward/ADV', 'walk/VERB ahead/ADV', 'stroll/VERB forward/ADV', 'stroll/VERB ahead/ADV'],
    'run': ['run/VERB forward/ADV', 'run/VERB ahead/ADV', 'jog/VERB forward/ADV', 'jog/VERB ahead/ADV'],
    'walk backwards': ['walk/VERB backwards/ADV', 'walk/VERB backward/ADV', 'back/VERB up/ADV'],
    'side-step': ['sidestep/VERB {side}/ADV', 'sidestep/VERB to/ADP the/DET {side}/NOUN', 'shuffle/VERB {side}/ADV',
                  'shuffle/VERB to/ADP the/DET {side}/NOUN'],
    'turn': ['turn/VERB {side}/ADV', 'turn/VERB to/ADP the/DET {side}/NOUN', 'pivot/VERB {side}/ADV',
             'pivot/VERB to/ADP the/DET {side}/NOUN'],
    'spin': ['spin/VERB around/ADV', 'twirl/VERB around/ADV', 'spin/VERB in/ADP a/DET circle/NOUN'],
    'kick': ['kick/VERB with/ADP the/DET {side}/ADJ leg/NOUN', 'kick/VERB with/ADP the/DET {side}/ADJ foot/NOUN',
             'kick/VERB the/DET {side}/ADJ leg/NOUN'],
    'punch': ['punch/VERB with/ADP the/DET {side}/ADJ fist/NOUN', 'jab/VERB with/ADP the/DET {side}/ADJ fist/NOUN',
              'punch/VERB with/ADP the/DET {side}/ADJ arm/NOUN'],
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


UNDERSTOOD = {  # wider than the grammar, for what people type; a clause must match exactly one
    'walk': r'\b(walk|stroll)(?!.*back)\w*', 'run': r'\b(run|jog)\w*', 'walk backwards': r'\bbacks? up|\bbackwards?\b',
    'side-step': r'\b(side-?step|shuffle)\w*|\bsteps? (to the )?(left|right|sideways)', 'turn': r'\b(turn|pivot|rotat)\w*',
    'spin': r'\b(spin|twirl)\w*', 'kick': r'\bkick\w*', 'punch': r'\b(punch|jab)\w*', 'wave': r'\bwav\w*',
    'raise arms': r'\b(rais|lift)\w* (both|their|his|her|the)?\b ?(arms|hands)', 'jump': r'\b(jump|leap)\w*',
    'hop': r'\b(hop|bounc)\w*', 'squat': r'\b(squat|crouch)\w*', 'sit down': r'\b(sit|seat)\w*',
    'stand up': r'\b(stand|get)\w* up|\bris(es|ing|e)\b', 'bow': r'\b(bow|bend)\w*',
    'idle': r'\b(stand|stay)\w* (still|in place)|\bwait\w*',
}
MARKER = r'[,.;]|\b(?:and|then|next|after that|afterwards|finally|lastly|first)\b'
FILLER = set("""a an the person man woman someone he she they both his her their one left right leg legs foot feet hand hands
    arm arms fist fists with on in to up down around forward forwards ahead straight back circle chair take takes
    is are walk walks walking step steps slow slowly quick quickly fast""".split())


def parse(text):
    """Caption or prompt in the grammar's style -> script, or None if any part is not understood. A side left open is None."""
    script = []
    for clause in re.split(MARKER, text.lower()):
        clause = clause.strip()
        if not clause or re.fullmatch(r'(a|the) (person|man|woman)|someone|he|she|they', clause):
            continue
        actions = [a for a, pattern in UNDERSTOOD.items() if re.search(pattern, clause)]
        if len(actions) != 1 or set(re.findall(r"[a-z']+", re.sub(UNDERSTOOD[actions[0]], '', clause))) - FILLER:
            return None
        side = re.search(r'\b(left|right)\b', clause)
        speed = 'slow' if re.search(r'\bslow', clause) else 'fast' if re.search(r'\b(quick|fast)', clause) else 'normal'
        script.append({'action': actions[0], 'side': side[1] if side and actions[0] in SIDED else None, 'speed': speed})
    return script or None


# ---------------------------------------------------------------------------------------------------------------------
# The detectors: thresholds on what a body does in space, with no knowledge of how the motion was made. Each gives the stretches
# of frames (first, last) that are evidence of its item; 1.5 cm of noise must not change the verdict.

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


def reversals(x, least):
    """How often x (T,) changes direction, counting swings larger than least."""
    count, low, high, direction = 0, x[0], x[0], 0
    for now in x:
        low, high = min(low, now), max(high, now)
        if direction >= 0 and now < high - least or direction <= 0 and now > low + least:
            count, direction = count + 1, -1 if now < high - least else 1
            low = high = now
    return count


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
        self.arms = [self.local(j[:, L_WRIST + s] - j[:, L_SHOULDER + s]) for s in (0, 1)]
        self.lean = np.arctan2(*(self.local(j[:, NECK] - j[:, PELVIS])[:, k] for k in (2, 1)))

    def local(self, v):
        """World vectors (T, 3) -> their (left, up, forward) parts."""
        return (self.axes @ v[..., None])[..., 0]

    def moved(self, run, axis):
        """How far pelvis and feet both went along left (0) or forward (2) in a stretch: leaning or sitting back is no travel."""
        part = slice(run[0], run[1] + 1)
        pelvis, feet = (self.leftward, None, self.forward)[axis][part].sum() / FPS, self.steps[part, axis].sum()
        return min(pelvis, feet, key=abs) if pelvis * feet > 0 else 0.0

    def travels(self, speed, low, high, axis, least, seconds, gap=0.0):
        return [r for r in stretches((speed > low) & (speed < high), seconds, gap) if abs(self.moved(r, axis)) > least]

    def turns(self, sign, least, most):
        runs = stretches(self.turning * sign > 0.3, 0.3, 0.25)  # the pause between two steps is no end
        return [(a, b) for a, b in runs if least < (self.yaw[b] - self.yaw[a]) * sign < most]

    def low(self, chair):
        """Stretches with the pelvis low: far behind the feet, as on a chair, or not."""
        runs = stretches(self.height[:, PELVIS] < 0.66, 0.15, 0.2)
        return [(a, b) for a, b in runs if (self.behind[a:b + 1].max() > 0.22) == chair]

    def stood(self, part):
        return (self.height[part, PELVIS] > 0.78).any()

    def still(self):
        """Stretches of standing upright with hands down, in which nothing moves much for 1.3 s."""
        n = int(1.3 * FPS)
        if len(self.joints) < n:
            return []
        over = lambda x: np.lib.stride_tricks.sliding_window_view(x, n, axis=0)
        spread = np.ptp(over(self.joints[:, [PELVIS, L_ANKLE, R_ANKLE, NECK, L_WRIST, R_WRIST]]), axis=-1).max(-1)
        stands = (self.height[:, PELVIS] > 0.8) & (self.lean < 0.3)
        stands &= self.height[:, [L_WRIST, R_WRIST]].max(1) < self.height[:, PELVIS] + 0.15
        calm = (spread < [0.08, 0.1, 0.1, 0.1, 0.16, 0.16]).all(-1) & (np.ptp(over(self.yaw), axis=-1) < 0.3)
        return [(a, b + n - 1) for a, b in stretches(calm & over(stands).all(-1))]

    def evidence(self, action, side):
        """Stretches (first, last frame) that show the action, done with or towards the side (0 left, 1 right)."""
        near, far, height = self.arms[side], self.arms[1 - side], self.height
        match action:
            case 'walk':
                return self.travels(self.forward, 0.22, 1.9, 2, 0.6, 0.9)
            case 'run':
                return self.travels(self.forward, 1.9, 99, 2, 0.8, 0.4)
            case 'walk backwards':
                return self.travels(-self.forward, 0.15, 99, 2, 0.4, 0.7, 0.2)
            case 'side-step':
                speed = self.leftward * (1 - 2 * side) * (np.abs(self.turning) < 0.8)
                runs = self.travels(speed, 0.1, 99, 0, 0.35, 0.5, 0.3)
                return [(a, b) for a, b in runs if abs(self.moved((a, b), 0)) > 2 * abs(self.moved((a, b), 2))
                        and abs(self.yaw[b] - self.yaw[a]) < 0.6]
            case 'turn':
                return self.turns(1 - 2 * side, 0.85, 3.5)
            case 'spin':
                return self.turns(1, 4.5, 99) + self.turns(-1, 4.5, 99)
            case 'kick':  # leg stretched out in front while the other foot stands
                leg = self.local(self.joints[:, L_ANKLE + side] - self.joints[:, L_HIP + side])
                out = (leg[:, 2] > 0.38) & (height[:, L_ANKLE + side] > 0.32) & (np.linalg.norm(leg, axis=-1) > 0.58)
                return stretches(out & (height[:, L_TOE + 1 - side] < 0.1), 0.1, 0.1)
            case 'punch':  # wrist shot out at the shoulder's height, the other one not
                out = (near[:, 2] > 0.35) & (np.abs(near[:, 1]) < 0.2) & (np.abs(near[:, 0]) < 0.25) & (far[:, 2] < 0.33)
                speed = np.gradient(near[:, 2]) * FPS
                return [(a, b) for a, b in stretches(out, 0.0, 0.5) if speed[max(a - 6, 0):b + 1].max() > 0.7]
            case 'wave':  # one hand up, going to and fro
                runs = stretches((near[:, 1] > 0.03) & (far[:, 1] < 0), 0.6, 0.1)
                return [(a, b) for a, b in runs if reversals(near[a:b + 1, 0], 0.06) >= 3]
            case 'raise arms':
                return stretches(height[:, [L_WRIST, R_WRIST]].min(1) > height[:, HEAD] + 0.05, 0.25, 0.1)
            case 'jump':  # both feet off the floor, side by side
                toes, apart = height[:, [L_TOE, R_TOE]], self.local(self.joints[:, L_TOE] - self.joints[:, R_TOE])[:, 2]
                return stretches((toes.min(1) > 0.08) & (np.ptp(toes, axis=1) < 0.12) & (np.abs(apart) < 0.25), 0.1)
            case 'hop':  # one foot stays up while the other leaves the floor at least twice
                return [(a, b) for free in (0, 1) for a, b in stretches(height[:, L_ANKLE + free] > 0.2, 0.8, 0.1)
                        if len(stretches(height[a:b + 1, L_TOE + 1 - free] > 0.06, 0.1)) >= 2]
            case 'squat':
                return [(a, b) for a, b in self.low(chair=False) if self.stood(slice(a)) and self.stood(slice(b, None))]
            case 'sit down':
                return [(max(a - 10, 0), min(a + 5, b)) for a, b in self.low(chair=True) if b - a > 8 and self.stood(slice(a))]
            case 'stand up':
                return [(max(b - 5, a), b + 10) for a, b in self.low(chair=True) if self.stood(slice(b, None))]
            case 'bow':
                return stretches((self.lean > 0.48) & (height[:, PELVIS] > 0.74), 0.2, 0.1)
            case 'idle':
                return self.still()

    def find(self, item):
        """The evidence of a script item, early to late."""
        sides = {'left': [0], 'right': [1]}.get(item['side'], [0, 1] if item['action'] in SIDED else [0])
        return sorted((r for side in sides for r in self.evidence(item['action'], side)), key=sum)


def detect(joints, item):
    """Does the motion (T, 22, 3) contain this item anywhere?"""
    return bool(View(joints).find(item))


def passes(joints, script):
    """Does the motion contain every item of the script, in its order (by the middles of the stretches of evidence)?
    A script of nothing but idling asks for little motion throughout."""
    view, now = View(joints), -1
    if [item['action'] for item in script] == ['idle']:
        return sum(b - a + 1 for a, b in view.find(script[0])) >= 0.8 * len(joints)
    for item in script:
        later = [sum(r) for r in view.find(item) if sum(r) > now]
        if not later:
            return False
        now = later[0]
    return True
