"""The tiny-shakespeare of motion: procedural SMPL-22 clips at 20 fps, with captions.

A script is one to three items {'action', 'side', 'speed'}. A Plan acts them out as footsteps and
curves of all else, body() turns it into joints, and caption() puts the script into words.

Metres, seconds, radians. Y is up from the floor. A clip starts at x = z = 0 and faces +Z, so +X is
the character's left; yaw is positive to the left. A side is 0 for left, 1 for right. Feet never
slide: footsteps come first, the pelvis follows them, and inverse kinematics fills in the knees.
"""
import json
import re
from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.interpolate import CubicHermiteSpline
from scipy.spatial.transform import Rotation

from lib.configurator import ROOT
from lib.motion import two_bone, unit

FPS = 20
MIN_FRAMES, MAX_FRAMES = 40, 196
SPEEDS = {'slow': 0.75, 'normal': 1.0, 'fast': 1.3}  # how much faster than normal the clock runs
LEFTWARD = np.array([1, -1])  # by side
DOWN = dict(lift=0.0, fwd=0.0, tip=0.0)  # a foot on the floor
LANGUAGE = json.loads(Path(ROOT, 'config', 'toy_language.json').read_text())

(PELVIS, L_HIP, R_HIP, SPINE1, L_KNEE, R_KNEE, SPINE2, L_ANKLE, R_ANKLE, SPINE3, L_TOE, R_TOE,
 NECK, L_COLLAR, R_COLLAR, HEAD, L_SHOULDER, R_SHOULDER, L_ELBOW, R_ELBOW, L_WRIST,
 R_WRIST) = range(22)

# The body's sizes, as in HumanML3D's default skeleton, rounded. Vectors are (left, up, forward).
THIGH, SHIN, UPPER_ARM, FOREARM = 0.385, 0.43, 0.257, 0.266
LEG_REACH = 0.995 * (THIGH + SHIN)  # a leg never straightens completely
STRETCH = 0.999                     # nor does a limb of inverse kinematics
SPREAD = 0.085                      # half the distance between the feet
FOOT_LENGTH, TOE_Y = 0.125, 0.02
HEEL = [0, 0.055, -FOOT_LENGTH]     # toe to ankle
BONES = [  # joint, parent, the share it takes of the trunk's pitch and twist, offset in that frame
    (SPINE1, PELVIS, 0.35, 0, 0.12, -0.03),
    (L_HIP, PELVIS, 0.35, 0.062, -0.085, -0.005),
    (R_HIP, PELVIS, 0.35, -0.062, -0.085, -0.005),
    (SPINE2, SPINE1, 0.6, 0, 0.138, 0.02),
    (SPINE3, SPINE2, 0.8, 0, 0.055, 0.01),
    (NECK, SPINE3, 1.0, 0, 0.217, -0.025),
    (L_COLLAR, SPINE3, 1.0, 0.075, 0.12, -0.01),
    (R_COLLAR, SPINE3, 1.0, -0.075, 0.12, -0.01),
    (L_SHOULDER, L_COLLAR, 1.0, 0.12, -0.035, -0.015),
    (R_SHOULDER, R_COLLAR, 1.0, -0.12, -0.035, -0.015),
    (HEAD, NECK, 0.85, 0, 0.092, 0.045),
]


def rotation(yaw, pitch=0.0):
    """Angles (...) -> matrices (..., 3, 3) that bend forward, then turn left."""
    yaw, pitch = np.broadcast_arrays(yaw, pitch)
    angles = np.stack([yaw.ravel(), pitch.ravel()], -1)
    matrices = Rotation.from_euler('YX', angles).as_matrix()
    return matrices.reshape(*yaw.shape, 3, 3)


def smooth(x, sigma):
    """Gaussian low-pass along axis 0, sigma in seconds, ends held."""
    return ndimage.gaussian_filter1d(x, sigma * FPS, axis=0, mode='nearest')


def beside(place, ahead=0.0, left=0.0):
    """So many metres ahead and to the left of a place (x, z, yaw), facing the same way."""
    x, z, yaw = place
    sin, cos = np.sin(yaw), np.cos(yaw)
    x = x + ahead * sin + left * cos
    z = z + ahead * cos - left * sin
    return np.array([x, z, yaw])


def still(value=0.0):
    """A curve is its keys (time, value, velocity); this one stays at a value."""
    return [(0.0, value, 0.0)]


def bend(keys, start, end, value, velocity=0.0):
    """Lead a curve to a new value. What was planned after start is dropped: actions blend."""
    if keys[-1][0] < start - 1e-6:
        keys.append((start, keys[-1][1], 0.0))
    while keys[-1][0] > start + 1e-6 and len(keys) > 1:
        keys.pop()
    keys.append((end, value, velocity))


class Plan:
    """What a body is going to do, as curves.

    Trunk, counted from standing: height, shift, sway (the pelvis: up; forward and left of the
    feet's middle), pitch, twist. Arms: flex, abduct, reach (the wrist seen from the shoulder:
    angle forward, angle outward, distance). Legs: x, z, yaw (where the body would stand) and, for
    a foot in the air, lift, fwd, tip (height, distance ahead, angle of the toes down).

    An action is a method with a side (ignored where there is none) and a pace (1 is normal) that
    starts at self.t and moves self.t to its end."""

    TRUNK = 'height', 'shift', 'sway', 'pitch', 'twist'
    LEG = 'x', 'z', 'yaw', 'lift', 'fwd', 'tip'

    def __init__(self, rng):
        self.some, self.count = rng.uniform, rng.integers
        self.t = self.some(0.1, 0.4)
        self.feet = np.zeros((2, 3))  # where the body would stand: x, z, yaw
        self.trunk = {name: still() for name in self.TRUNK}
        self.limbs = [{}, {}]
        for limb in self.limbs:
            limb['flex'] = still(self.some(0.02, 0.16))
            limb['abduct'] = still(self.some(0.1, 0.22))
            limb['reach'] = still(self.some(0.485, 0.51))
            limb.update((name, still()) for name in self.LEG)

    def move(self, end, side=None, start=0.0, speed=0.0, **targets):
        """Lead curves of the trunk and of one or both sides' limbs to new values from start to end,
        in seconds from now. speed: at the end."""
        limbs = self.limbs if side is None else [self.limbs[side]]
        for name, value in targets.items():
            for part in [self.trunk] if name in self.TRUNK else limbs:
                bend(part[name], self.t + start, self.t + end, value, speed)

    def go(self, seconds, side=None, **targets):
        """The same from now on, and wait for it."""
        self.move(seconds, side, **targets)
        self.t += seconds

    def relax(self, end, start=0.0):
        """Bring trunk and arms back to rest, where their first keys are, and wait for most of it.
        Feet are put down by who lifted them."""
        for part in (self.trunk, *self.limbs):
            for name in part.keys() - self.LEG:
                keys = part[name]
                bend(keys, self.t + start, self.t + end, keys[0][1])
        self.t += end - 0.1

    def where(self):
        """The place between the feet."""
        return self.feet.mean(0)

    def carry(self, foot, seconds, place):
        """Bring a foot to where it belongs when the body stands at a place."""
        self.feet[foot] = place
        x, z, yaw = place
        self.move(seconds, foot, x=x, z=z, yaw=yaw)

    def step(self, foot, seconds, place, lift=0.06, tip=0.3, flight=False):
        """The foot leaves the floor now, with its heel up at the angle tip, and lands so many
        seconds later: softly, or when the whole body flies after a parabola."""
        self.carry(foot, seconds, place)
        landed = self.limbs[foot]['tip'][-1][0] - self.t
        self.move(0.0, foot, start=max(-0.12, landed), tip=tip)
        self.move(seconds, foot, tip=0.0)

        # slopes at the ends of the cubics that peak at 1: 4 t (1 - t), 27/4 t (1 - t)^2
        rise, fall = (4.0, -4.0) if flight else (6.75, 0.0)
        speed = lift / seconds
        nearly = seconds - 0.001  # speeds come and go at once
        self.move(0.001, foot, speed=rise * speed, lift=0.0)
        self.move(nearly, foot, start=0.001, speed=fall * speed, lift=0.0)
        self.move(seconds, foot, start=nearly, lift=0.0)

    def shuffle(self, side, period, place, **how):
        """Step to a place, the foot of that side first: legs do not cross."""
        for foot in (side, 1 - side):
            self.step(foot, 0.85 * period, place, **how)
            self.t += period

    def gait(self, n, length, period, swing, lift, tip, arm, arm_mid):
        """n steps and a closing one, on a slight bend. swing: how long a foot is in the air, in
        periods; above 1 both are, for a moment, and the pelvis flies."""
        place = self.where()
        turn = self.some(-0.25, 0.25) / n
        foot = self.count(2)
        landed = (swing - 1) * period
        lands = swing * period
        for k in range(n + 1):
            share = 1.0 if 0 < k < n - 1 else 0.7
            if k < n:
                place = beside(place + [0, 0, turn], length * share)
            self.step(foot, lands, place, lift * share, tip * share)

            # from landing to landing, the other arm goes forward with the foot, and the chest too
            reach = arm * share
            self.move(lands, foot, landed, flex=arm_mid - reach)
            self.move(lands, 1 - foot, landed, flex=arm_mid + reach)
            self.move(lands, None, landed, twist=0.2 * reach * LEFTWARD[foot])
            if swing > 1:
                self.move(0.2 * period, height=0.01)
                self.move(0.7 * period, start=0.2 * period, height=-0.07)
            self.t += period
            foot = 1 - foot
        self.t += landed
        self.relax(0.3, -0.6 * period)

    def fly(self, feet, place, crouch, rise, tuck, tip):
        """Push off for crouch seconds, rise, and land at a place when gravity says so."""
        speed = np.sqrt(2 * 9.81 * rise)
        flight = 2 * speed / 9.81
        self.go(crouch, speed=speed, height=0.03)
        self.move(flight, speed=-speed, height=0.0)
        for foot in feet:
            self.step(foot, flight, place, rise + tuck, tip, flight=True)
        self.t += flight

    def pose(self, pace, hold, **targets):
        """Into a pose, hold it, and out of it again."""
        self.go(self.some(0.7, 0.9) / pace, **targets)
        self.t += hold
        self.relax(self.some(0.6, 0.9) / pace)
        self.t += 0.1  # a squat that runs into sitting down is none

    def walk(self, side, pace):
        self.move(0.4, pitch=0.03)
        self.gait(
            length=self.some(0.48, 0.6) * pace ** 0.4,
            period=self.some(0.5, 0.56) / pace ** 0.8,
            n=self.count(4, 8),
            lift=self.some(0.05, 0.09),
            tip=self.some(0.5, 0.7),
            arm=self.some(0.25, 0.45),
            swing=0.8, arm_mid=0.08)

    def run(self, side, pace):
        self.move(0.4, pitch=0.15, reach=0.37)
        self.gait(
            length=self.some(0.92, 1.02) * pace ** 0.3,
            period=self.some(0.33, 0.36) / pace ** 0.3,
            n=self.count(6, 10),
            lift=self.some(0.2, 0.3),
            arm=self.some(0.45, 0.65),
            tip=1.2, swing=1.35, arm_mid=0.6)

    def side_step(self, side, pace):
        width = self.some(0.28, 0.4) * LEFTWARD[side]
        period = self.some(0.4, 0.5) / pace ** 0.8
        self.move(0.3, abduct=0.3, height=-0.03)
        for _ in range(self.count(2, 5)):
            place = beside(self.where(), left=width)
            self.shuffle(side, period, place, lift=0.07, tip=0.25)
        self.relax(0.2, -0.2)

    def turn(self, side, pace):
        pairs = self.count(2, 4)
        angle = self.some(1.2, 2.2) * LEFTWARD[side] / pairs
        period = self.some(0.3, 0.38) / pace
        place = self.where()
        self.move(period, twist=0.25 * LEFTWARD[side])  # the chest leads
        for _ in range(pairs):
            place = place + [0, 0, angle]
            self.shuffle(side, period, place)
        self.relax(0.2, -period)

    def kick(self, side, pace):
        tempo = pace ** 0.6
        left = LEFTWARD[side]
        angle = self.some(1.1, 1.55)  # of the stretched leg, from hanging down
        height = 0.82 - 0.81 * np.cos(angle)
        ahead = 0.81 * np.sin(angle)
        # weight on the other foot, cock, strike and hold, fold, put down
        self.move(0.4 / tempo, sway=-0.055 * left)
        self.t += 0.3 / tempo
        self.move(0.35 / tempo, flex=0.7, abduct=0.4, twist=-0.2 * left, height=-0.03)
        self.go(0.35 / tempo, side, flex=-0.3, lift=0.3, fwd=-0.22, tip=0.7)
        self.move(0.3 / tempo, flex=-0.2, twist=0.2 * left, pitch=-0.22)
        self.go(0.3 / tempo, side, flex=0.4, lift=height, fwd=ahead, tip=-0.8)
        self.t += 0.1 / tempo
        self.go(0.35 / tempo, side, lift=0.3, fwd=0.12, tip=0.2)
        self.go(0.3 / tempo, side, **DOWN)
        self.relax(0.2, -0.3 / tempo)

    def punch(self, side, pace):
        tempo = pace ** 0.7
        self.go(0.47 / pace ** 0.5, flex=1.45, abduct=-0.2, reach=0.25, height=-0.04)
        for _ in range(self.count(1, 4)):
            self.move(0.2 / tempo, twist=-0.3 * LEFTWARD[side], pitch=0.1)
            reach = self.some(0.5, 0.52)
            self.go(0.2 / tempo, side, reach=reach, flex=self.some(1.5, 1.62))
            self.t += 0.14 / tempo
            self.go(0.27 / tempo, side, reach=0.25, flex=1.45, twist=0.0, pitch=0.0)
            self.t += self.some(0.02, 0.15)
        self.relax(0.45)

    def wave(self, side, pace):
        high = self.some(2.4, 2.6)
        beat = self.some(0.24, 0.3) / pace ** 0.6
        self.go(0.5, side, flex=0.25, abduct=high, reach=0.39)
        for _ in range(self.count(2, 5)):
            self.go(beat, side, abduct=high - 0.35)
            self.go(beat, side, abduct=high + 0.35)
        self.go(beat, side, abduct=high - 0.35)
        self.relax(0.5)

    def jump(self, side, pace):
        ahead = self.some(0.0, 0.2)
        crouch = 0.55 / pace ** 0.5 - 0.2
        for _ in range(self.count(1, 3)):
            self.go(crouch, height=-0.25, pitch=0.42, shift=-0.085, flex=-0.6)
            self.move(0.2, pitch=0.02, shift=0.005)
            self.move(0.4, flex=self.some(1.7, 2.3))
            rise = self.some(0.14, 0.26)
            place = beside(self.where(), ahead)
            self.fly((0, 1), place, 0.2, rise, tuck=0.05, tip=0.75)
            self.move(0.3, flex=0.4)
            self.go(0.2, height=-0.17, pitch=0.27, shift=-0.045)
        self.relax(0.4)

    def hop(self, side, pace):
        foot = self.count(2)
        free = 1 - foot
        ahead = self.some(0.0, 0.1)
        crouch = 0.28 / pace ** 0.5 - 0.12
        self.move(0.4, sway=0.06 * LEFTWARD[foot], abduct=0.5, reach=0.42)
        self.move(0.5, free, start=0.15, lift=0.24, fwd=-0.16, tip=0.7)
        self.t += 0.55
        for _ in range(self.count(3, 6)):
            place = beside(self.where(), ahead)
            self.go(crouch, height=-0.09, flex=0.0)
            self.move(0.35, start=0.12, flex=0.6)
            self.carry(free, 0.35, place)
            rise = self.some(0.07, 0.11)
            self.fly([foot], place, 0.12, rise, tuck=0.02, tip=0.5)
        self.move(0.35, free, **DOWN)
        self.relax(0.45)

    def raise_arms(self, side, pace):
        flex, abduct = self.some(2.75, 2.95), -0.15  # through the front
        if self.count(2):
            flex, abduct = 0.1, flex                 # through the sides
        hold = self.some(0.4, 0.9)
        self.pose(pace, hold, flex=flex, abduct=abduct, reach=0.51, pitch=-0.06)

    def squat(self, side, pace):
        self.move(0.8 / pace, flex=self.some(0.9, 1.5), abduct=0.0)
        hold = self.some(0.05, 0.4)
        height = self.some(-0.47, -0.37)
        pitch = self.some(0.32, 0.52)
        self.pose(pace, hold, height=height, pitch=pitch, shift=-0.125)

    def bow(self, side, pace):
        angle = self.some(0.92, 1.27)
        hold = self.some(0.2, 0.6)
        self.pose(pace, hold, pitch=angle, shift=-0.115, flex=0.6 * angle)

    def sit_down(self, side, pace):
        down = self.some(1.0, 1.3) / pace
        height = self.some(-0.5, -0.455)
        self.move(down, height=height, shift=-0.385)
        self.move(down, flex=0.62, abduct=0.05, reach=0.44)
        self.go(0.7 * down, pitch=0.47)
        self.go(0.3 * down + 0.3, pitch=0.0)
        self.t += self.some(0.3, 1.1)


ACTIONS = {action: getattr(Plan, re.sub(r'\W', '_', action)) for action in LANGUAGE['phrases']}
SIDED = {'side-step', 'turn', 'kick', 'punch', 'wave'}


def play(curves, times):
    """{name: keys} -> {name: values (T,)}: cubic between the keys, held after the last. One spline
    (0.1 ms to make) holds all curves, each in a minute of its own."""
    laid_out = []
    for minute, keys in enumerate(curves.values()):
        held = (59.0, keys[-1][1], 0.0)
        for time, value, velocity in [*keys, held]:
            laid_out.append((60.0 * minute + time, value, velocity))
    spline = CubicHermiteSpline(*np.array(laid_out).T)
    return {name: spline(60.0 * minute + times) for minute, name in enumerate(curves)}


def body(plan, n_frames):
    """Plan -> joints (T, 22, 3) float32."""
    times = np.arange(n_frames) / FPS
    trunk = play(plan.trunk, times)
    sides = [play(limb, times) for limb in plan.limbs]
    limb = {name: np.array([side[name] for side in sides]) for name in sides[0]}  # (2, T)
    outward = LEFTWARD[:, None]
    for name, size in (('pitch', 0.012), ('sway', 0.008)):  # nobody stands like a statue
        turns = plan.some(0.2, 0.4) * times + plan.some(0.0, 1.0)
        trunk[name] += size * np.sin(2 * np.pi * turns)

    # the pelvis follows its feet, and leans over the one that stands
    place = np.array([limb['x'], limb['z'], limb['yaw']])  # (3, 2, T)
    down = limb['lift'] == 0
    centre = smooth(place.mean(1).T, 0.13).T
    lean = smooth(down[0] * 1.0 - down[1], 0.08)
    ahead = 0.025 + trunk['shift']
    x, z, yaw = beside(centre, ahead, trunk['sway'] + 0.035 * lean)
    y = plan.some(0.948, 0.96) + trunk['height']
    joints = np.zeros((22, n_frames, 3))
    joints[PELVIS] = np.stack([x, y, z], -1)

    pitch = plan.some(0.0, 0.06) + trunk['pitch']
    frame = {}
    for joint, parent, share, *offset in BONES:
        frame[joint] = rotation(yaw + share * trunk['twist'], share * pitch)
        joints[joint] = joints[parent] + frame[joint] @ offset
    pelvis, chest = frame[SPINE1], frame[NECK]

    # a foot turns over its toe
    x, z, _ = beside(place, FOOT_LENGTH + limb['fwd'], SPREAD * outward)
    toe = np.stack([x, TOE_Y + limb['lift'], z], -1)
    heel = rotation(limb['yaw'], limb['tip']) @ HEEL
    ankle = toe + heel

    # a planted foot out of reach lowers the pelvis, and all that hangs on it
    x, y, z = np.moveaxis(joints[[L_HIP, R_HIP]] - ankle, -1, 0)
    squared = LEG_REACH ** 2 - x ** 2 - z ** 2
    reach = np.sqrt(np.maximum(squared, 0.01))
    planted = ndimage.binary_dilation(down, [[1, 1, 1]])
    too_high = np.maximum(y - reach, 0) * planted
    lower = ndimage.maximum_filter1d(too_high.max(0), 5)
    joints[..., 1] -= ndimage.uniform_filter1d(lower, 5)  # smooth, and never too little

    hip = joints[[L_HIP, R_HIP]]
    pole = np.cross(unit(ankle - hip), pelvis[..., 0])  # knees bend forward of the leg
    knee, ankle = two_bone(hip, ankle, THIGH, SHIN, pole, STRETCH)
    joints[[L_KNEE, R_KNEE]] = knee
    joints[[L_ANKLE, R_ANKLE]] = ankle
    joints[[L_TOE, R_TOE]] = ankle - heel

    # the wrist, in the chest's frame, and the elbow behind and below
    flex = limb['flex']
    abduct = limb['abduct'] * outward
    left = np.cos(flex) * np.sin(abduct)
    up = -np.cos(flex) * np.cos(abduct)
    arm = np.array([left, up, np.sin(flex)]) * limb['reach']
    arm = np.einsum('tij,jst->sti', chest, arm)
    pole = np.array([chest @ [out, -0.6, -0.6] for out in 0.5 * LEFTWARD])
    shoulder = joints[[L_SHOULDER, R_SHOULDER]]
    elbow, wrist = two_bone(shoulder, shoulder + arm, UPPER_ARM, FOREARM, pole, STRETCH)
    joints[[L_ELBOW, R_ELBOW]] = elbow
    joints[[L_WRIST, R_WRIST]] = wrist

    # frame 0 stands at the origin and faces +Z: row vectors times R turn by -yaw
    joints = joints.transpose(1, 0, 2)
    start = joints[0, PELVIS] * [1, 0, 1]
    joints = joints - start
    return (joints @ rotation(yaw[0])).astype(np.float32)


def make_script(rng):
    """Different actions, so that a caption's word pairs settle their order. Who sits does so last:
    nobody stands up again."""
    n = rng.choice([1, 2, 3], p=[0.22, 0.53, 0.25])
    actions = rng.permutation(list(ACTIONS))[:n].tolist()
    actions.sort(key=lambda action: action == 'sit down')
    script = []
    for action in actions:
        side = str(rng.choice(['left', 'right'])) if action in SIDED else None
        speed = str(rng.choice(list(SPEEDS), p=[0.2, 0.6, 0.2]))
        script.append({'action': action, 'side': side, 'speed': speed})
    return script


def caption(script, rng):
    """Script -> (text, tokens) of one of the many ways to say it. Phrases are written as word/TAG
    or word=lemma/TAG. An item's marker ("then", "finally") stands right before its verb and the
    speed comes last, so that word pairs alone tell the order."""
    def pick(options):
        return options[rng.integers(len(options))]

    parts = [pick(LANGUAGE['subjects'])]
    for place, item in enumerate(script):
        if len(script) > 1:
            parts.append(pick(LANGUAGE['markers'][place]))
        phrase = pick(LANGUAGE['phrases'][item['action']])
        parts.append(phrase.format(side=item['side']))
        parts.append(pick(LANGUAGE['adverbs'][item['speed']]))
    tagged = ' '.join(part for part in parts if part)
    text = re.sub(r'(=\w+)?/[A-Z]+', '', tagged).replace(' ,', ',')
    tokens = re.sub(r'\w+=|, ', '', tagged)
    return text, tokens


def make_clip(seed):
    """-> dict(joints (T, 22, 3) float32, captions [(text, tokens)], script), the same for the same
    seed."""
    rng = np.random.default_rng(seed)
    n_frames = MAX_FRAMES + 1
    while n_frames > MAX_FRAMES:
        script = make_script(rng)
        plan = Plan(rng)
        for item in script:
            side = 1 if item['side'] == 'right' else 0
            ACTIONS[item['action']](plan, side, SPEEDS[item['speed']])
            plan.t += rng.uniform(0.05, 0.25)
        seconds = plan.t + rng.uniform(0.2, 0.4)
        n_frames = max(MIN_FRAMES, int(seconds * FPS))
    joints = body(plan, n_frames)
    captions = dict.fromkeys(caption(script, rng) for _ in range(20))  # each once, in order
    return dict(joints=joints, captions=list(captions)[:4], script=script)
