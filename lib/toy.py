"""The tiny-shakespeare of motion: procedural SMPL-22 clips at 20 fps, with captions.

A script is a list of one to three items {'action', 'side', 'speed'}. A `Plan` turns it into
footsteps and curves, `body` turns a plan into joints, and lib/toy_language.py into words. Feet
never slide, because footsteps are planned first: the pelvis follows the feet, and inverse
kinematics fills in the knees.

Units are metres, seconds and radians. Y points up from the floor. A clip starts at x = z = 0 and
faces Z+, so X+ is the character's left, and yaw is positive to the left. Side 0 is left, 1 right.
A place is (x, z, yaw).
"""
import re

import numpy as np
from scipy import ndimage
from scipy.interpolate import CubicHermiteSpline
from scipy.spatial.transform import Rotation

from lib import motion
from lib.toy_language import LANGUAGE, SPEEDS, caption, make_script

FPS = 20
MIN_FRAMES, MAX_FRAMES = 40, 196
LEFTWARD = np.array([1, -1])  # sign of X by side

PELVIS, SPINE1, SPINE2, SPINE3, NECK, HEAD = 0, 3, 6, 9, 12, 15
HIPS, KNEES, ANKLES, TOES = [1, 2], [4, 5], [7, 8], [10, 11]   # left, right
COLLARS, SHOULDERS, ELBOWS, WRISTS = [13, 14], [16, 17], [18, 19], [20, 21]

# Body measures: HumanML3D's default skeleton, rounded. Vectors are (left, up, forward).
THIGH, SHIN, UPPER_ARM, FOREARM = 0.385, 0.43, 0.257, 0.266
LEG_REACH = 0.995 * (THIGH + SHIN)  # a planted leg never straightens completely
MAX_STRETCH = 0.999                 # nor does a limb in inverse kinematics
FOOT_SPREAD = 0.085                 # half of the distance between the feet
FOOT_LENGTH, TOE_Y = 0.125, 0.02
TOE_TO_ANKLE = [0, 0.055, -FOOT_LENGTH]
BONES = [  # joint, parent, its share of the trunk's pitch and twist, offset in that rotated frame
    (SPINE1, PELVIS, 0.35, 0, 0.12, -0.03),
    (HIPS[0], PELVIS, 0.35, 0.062, -0.085, -0.005),
    (HIPS[1], PELVIS, 0.35, -0.062, -0.085, -0.005),
    (SPINE2, SPINE1, 0.6, 0, 0.138, 0.02),
    (SPINE3, SPINE2, 0.8, 0, 0.055, 0.01),
    (NECK, SPINE3, 1.0, 0, 0.217, -0.025),
    (COLLARS[0], SPINE3, 1.0, 0.075, 0.12, -0.01),
    (COLLARS[1], SPINE3, 1.0, -0.075, 0.12, -0.01),
    (SHOULDERS[0], COLLARS[0], 1.0, 0.12, -0.035, -0.015),
    (SHOULDERS[1], COLLARS[1], 1.0, -0.12, -0.035, -0.015),
    (HEAD, NECK, 0.85, 0, 0.092, 0.045),
]


def rotation(yaw, pitch=0.0):
    """Angles (...) -> matrices (..., 3, 3) that pitch forward, then turn left."""
    yaw, pitch = np.broadcast_arrays(yaw, pitch)
    angles = np.stack([yaw.ravel(), pitch.ravel()], -1)
    return Rotation.from_euler('YX', angles).as_matrix().reshape(*yaw.shape, 3, 3)


def smooth(x, sigma):
    """Gaussian filter along axis 0, sigma in seconds."""
    return motion.smooth(x, sigma * FPS)


def relative_to(place, ahead=0.0, left=0.0):
    """The place `ahead` and `left` of another one (x, z, yaw), with the same yaw."""
    x, z, yaw = place
    sin, cos = np.sin(yaw), np.cos(yaw)
    return np.array([x + ahead * sin + left * cos, z + ahead * cos - left * sin, yaw])


# ---------------------------------------------------------------------------------- script to plan


def lead(keys, start, end, value, velocity=0.0):
    """Lead a curve to a new value from time start to end. A curve is a list of keys (time, value,
    velocity); those after start are dropped, so that one action can run into the next."""
    if keys[-1][0] < start - 1e-6:
        keys.append((start, keys[-1][1], 0.0))
    while keys[-1][0] > start + 1e-6 and len(keys) > 1:
        keys.pop()
    keys.append((end, value, velocity))


class Plan:
    """What a body is going to do, as curves.

    Trunk, relative to standing: height (of the pelvis), shift and sway (of the pelvis, forward and
        left of the midpoint between the feet), pitch, twist.
    Arms: flex, abduct, reach (the wrist as seen from the shoulder: angle forward, angle outward,
        distance).
    Legs: x, z, yaw (the place where the body would stand) and, for a foot in the air, lift, ahead,
        tip (its height, how far ahead it is, the angle by which the toes point down).

    Each action is a method that starts at time self.t and advances self.t to its end. Its arguments
    are a side (ignored by actions without one) and a pace (1 is normal).
    """

    TRUNK = 'height', 'shift', 'sway', 'pitch', 'twist'
    LEG = 'x', 'z', 'yaw', 'lift', 'ahead', 'tip'

    def __init__(self, rng):
        self.uniform, self.integers = rng.uniform, rng.integers
        self.t = self.uniform(0.1, 0.4)
        self.feet = np.zeros((2, 3))  # for each foot, the place where the body would stand
        self.trunk = {name: [(0.0, 0.0, 0.0)] for name in self.TRUNK}
        self.limbs = []
        for _ in range(2):
            rest = dict(flex=self.uniform(0.02, 0.16), abduct=self.uniform(0.1, 0.22),
                        reach=self.uniform(0.485, 0.51), **dict.fromkeys(self.LEG, 0.0))
            self.limbs.append({name: [(0.0, value, 0.0)] for name, value in rest.items()})

    def move(self, end, side=None, start=0.0, velocity=0.0, **targets):
        """Lead curves of the trunk and of the limbs (of one side, or of both) to new values, from
        `start` to `end` seconds from now. velocity: of the curves at the end."""
        limbs = self.limbs if side is None else [self.limbs[side]]
        for name, value in targets.items():
            for part in [self.trunk] if name in self.TRUNK else limbs:
                lead(part[name], self.t + start, self.t + end, value, velocity)

    def move_and_wait(self, seconds, side=None, **targets):
        self.move(seconds, side, **targets)
        self.t += seconds

    def relax(self, end, start=0.0):
        """Return trunk and arms to rest, the value of their first keys, and wait for most of it.
        Lifted feet stay up: the action puts them down."""
        for part in (self.trunk, *self.limbs):
            for name in part.keys() - self.LEG:
                keys = part[name]
                lead(keys, self.t + start, self.t + end, keys[0][1])
        self.t += end - 0.1

    def move_foot(self, foot, seconds, place):
        """Move a foot to its position under a body that stands at a place."""
        self.feet[foot] = place
        x, z, yaw = place
        self.move(seconds, foot, x=x, z=z, yaw=yaw)

    def step(self, foot, seconds, place, lift=0.06, tip=0.3, flight=False):
        """Lift a foot now, with its heel raised by the angle `tip`, and put it down at a place. It
        lands softly, or, if the whole body is in flight, at the end of a parabola."""
        last_landing = self.limbs[foot]['tip'][-1][0] - self.t
        self.move_foot(foot, seconds, place)
        self.move(0.0, foot, start=max(-0.12, last_landing), tip=tip)
        self.move(seconds, foot, tip=0.0)

        # slopes at the ends of the cubics that peak at 1: 4 t (1 - t) and 27/4 t (1 - t)^2;
        # speed appears and vanishes within a millisecond
        rise, fall = (4.0, -4.0) if flight else (6.75, 0.0)
        speed = lift / seconds
        almost = seconds - 0.001
        self.move(0.001, foot, velocity=rise * speed, lift=0.0)
        self.move(almost, foot, start=0.001, velocity=fall * speed, lift=0.0)
        self.move(seconds, foot, start=almost, lift=0.0)

    def step_both(self, side, period, place, **how):
        """Step to a place, first with the foot of that side, so that the legs do not cross."""
        for foot in (side, 1 - side):
            self.step(foot, 0.85 * period, place, **how)
            self.t += period

    def gait(self, n, length, period, swing, lift, tip, arm, arm_mid):
        """Take n steps and a closing one, on a slight curve. The first and last are smaller.

        period: seconds from one step to the next. swing: how long a foot is in the air, in periods;
        above 1, both are for a moment, and the pelvis flies. The arms swing by arm around arm_mid.
        """
        place = self.feet.mean(0)
        turn = self.uniform(-0.25, 0.25) / n
        foot = self.integers(2)
        last_landing, landing = (swing - 1) * period, swing * period
        for k in range(n + 1):
            size = 1.0 if 0 < k < n - 1 else 0.7
            if k < n:
                place = relative_to(place + [0, 0, turn], length * size)
            self.step(foot, landing, place, lift * size, tip * size)

            # between landings, the opposite arm and the chest go forward with the foot
            angle = arm * size
            self.move(landing, foot, last_landing, flex=arm_mid - angle)
            self.move(landing, 1 - foot, last_landing, flex=arm_mid + angle)
            self.move(landing, None, last_landing, twist=0.2 * angle * LEFTWARD[foot])
            if swing > 1:
                self.move(0.2 * period, height=0.01)
                self.move(0.7 * period, start=0.2 * period, height=-0.07)
            self.t += period
            foot = 1 - foot
        self.t += last_landing
        self.relax(0.3, -0.6 * period)

    def fly(self, feet, place, push, rise, tuck, tip):
        """Push off for `push` seconds, rise, and land at a place when gravity says so."""
        speed = np.sqrt(2 * 9.81 * rise)
        flight = 2 * speed / 9.81
        self.move_and_wait(push, velocity=speed, height=0.03)
        self.move(flight, velocity=-speed, height=0.0)
        for foot in feet:
            self.step(foot, flight, place, rise + tuck, tip, flight=True)
        self.t += flight

    def pose(self, pace, hold, **targets):
        """Take a pose, hold it for so many seconds, and relax."""
        self.move_and_wait(self.uniform(0.7, 0.9) / pace, **targets)
        self.t += hold
        self.relax(self.uniform(0.6, 0.9) / pace)
        self.t += 0.1  # or sitting down could begin before the body stands up from a squat

    def walk(self, side, pace):
        self.move(0.4, pitch=0.03)
        self.gait(
            length=self.uniform(0.48, 0.6) * pace ** 0.4,
            period=self.uniform(0.5, 0.56) / pace ** 0.8,
            n=self.integers(4, 8), lift=self.uniform(0.05, 0.09), tip=self.uniform(0.5, 0.7),
            arm=self.uniform(0.25, 0.45), swing=0.8, arm_mid=0.08)

    def run(self, side, pace):
        self.move(0.4, pitch=0.15, reach=0.37)
        self.gait(
            length=self.uniform(0.92, 1.02) * pace ** 0.3,
            period=self.uniform(0.33, 0.36) / pace ** 0.3,
            n=self.integers(6, 10), lift=self.uniform(0.2, 0.3), tip=1.2,
            arm=self.uniform(0.45, 0.65), swing=1.35, arm_mid=0.6)

    def side_step(self, side, pace):
        width = self.uniform(0.28, 0.4) * LEFTWARD[side]
        period = self.uniform(0.4, 0.5) / pace ** 0.8
        self.move(0.3, abduct=0.3, height=-0.03)
        for _ in range(self.integers(2, 5)):
            place = relative_to(self.feet.mean(0), left=width)
            self.step_both(side, period, place, lift=0.07, tip=0.25)
        self.relax(0.2, -0.2)

    def turn(self, side, pace):
        n_steps = self.integers(2, 4)
        angle = self.uniform(1.2, 2.2) * LEFTWARD[side] / n_steps
        period = self.uniform(0.3, 0.38) / pace
        place = self.feet.mean(0)
        self.move(period, twist=0.25 * LEFTWARD[side])  # the chest leads
        for _ in range(n_steps):
            place = place + [0, 0, angle]
            self.step_both(side, period, place)
        self.relax(0.2, -period)

    def kick(self, side, pace):
        tempo = pace ** 0.6
        left = LEFTWARD[side]
        angle = self.uniform(1.1, 1.55)  # of the stretched leg, from vertical
        height = 0.82 - 0.81 * np.cos(angle)
        ahead = 0.81 * np.sin(angle)

        # put the weight on the other foot, cock the leg, strike and hold, fold, put the foot down
        self.move(0.4 / tempo, sway=-0.055 * left)
        self.t += 0.3 / tempo
        self.move(0.35 / tempo, flex=0.7, abduct=0.4, twist=-0.2 * left, height=-0.03)
        self.move_and_wait(0.35 / tempo, side, flex=-0.3, lift=0.3, ahead=-0.22, tip=0.7)
        self.move(0.3 / tempo, flex=-0.2, twist=0.2 * left, pitch=-0.22)
        self.move_and_wait(0.3 / tempo, side, flex=0.4, lift=height, ahead=ahead, tip=-0.8)
        self.t += 0.1 / tempo
        self.move_and_wait(0.35 / tempo, side, lift=0.3, ahead=0.12, tip=0.2)
        self.move_and_wait(0.3 / tempo, side, lift=0.0, ahead=0.0, tip=0.0)
        self.relax(0.2, -0.3 / tempo)

    def punch(self, side, pace):
        tempo = pace ** 0.7
        self.move_and_wait(0.47 / pace ** 0.5, flex=1.45, abduct=-0.2, reach=0.25, height=-0.04)
        for _ in range(self.integers(1, 4)):
            self.move(0.2 / tempo, twist=-0.3 * LEFTWARD[side], pitch=0.1)
            reach = self.uniform(0.5, 0.52)
            self.move_and_wait(0.2 / tempo, side, reach=reach, flex=self.uniform(1.5, 1.62))
            self.t += 0.14 / tempo
            self.move_and_wait(0.27 / tempo, side, reach=0.25, flex=1.45, twist=0.0, pitch=0.0)
            self.t += self.uniform(0.02, 0.15)
        self.relax(0.45)

    def wave(self, side, pace):
        angle = self.uniform(2.4, 2.6)
        beat = self.uniform(0.24, 0.3) / pace ** 0.6
        self.move_and_wait(0.5, side, flex=0.25, abduct=angle, reach=0.39)
        for _ in range(self.integers(2, 5)):
            self.move_and_wait(beat, side, abduct=angle - 0.35)
            self.move_and_wait(beat, side, abduct=angle + 0.35)
        self.move_and_wait(beat, side, abduct=angle - 0.35)
        self.relax(0.5)

    def jump(self, side, pace):
        ahead = self.uniform(0.0, 0.2)
        crouch = 0.55 / pace ** 0.5 - 0.2
        for _ in range(self.integers(1, 3)):
            self.move_and_wait(crouch, height=-0.25, pitch=0.42, shift=-0.085, flex=-0.6)
            self.move(0.2, pitch=0.02, shift=0.005)
            self.move(0.4, flex=self.uniform(1.7, 2.3))
            rise = self.uniform(0.14, 0.26)
            place = relative_to(self.feet.mean(0), ahead)
            self.fly((0, 1), place, 0.2, rise, tuck=0.05, tip=0.75)
            self.move(0.3, flex=0.4)
            self.move_and_wait(0.2, height=-0.17, pitch=0.27, shift=-0.045)
        self.relax(0.4)

    def hop(self, side, pace):
        foot = self.integers(2)
        free = 1 - foot
        ahead = self.uniform(0.0, 0.1)
        crouch = 0.28 / pace ** 0.5 - 0.12
        self.move(0.4, sway=0.06 * LEFTWARD[foot], abduct=0.5, reach=0.42)
        self.move(0.5, free, start=0.15, lift=0.24, ahead=-0.16, tip=0.7)
        self.t += 0.55
        for _ in range(self.integers(3, 6)):
            place = relative_to(self.feet.mean(0), ahead)
            self.move_and_wait(crouch, height=-0.09, flex=0.0)
            self.move(0.35, start=0.12, flex=0.6)
            self.move_foot(free, 0.35, place)
            rise = self.uniform(0.07, 0.11)
            self.fly([foot], place, 0.12, rise, tuck=0.02, tip=0.5)
        self.move(0.35, free, lift=0.0, ahead=0.0, tip=0.0)
        self.relax(0.45)

    def raise_arms(self, side, pace):
        flex, abduct = self.uniform(2.75, 2.95), -0.15  # through the front
        if self.integers(2):
            flex, abduct = 0.1, flex                    # through the sides
        self.pose(pace, self.uniform(0.4, 0.9), flex=flex, abduct=abduct, reach=0.51, pitch=-0.06)

    def squat(self, side, pace):
        self.move(0.8 / pace, flex=self.uniform(0.9, 1.5), abduct=0.0)
        self.pose(pace, self.uniform(0.05, 0.4), height=self.uniform(-0.47, -0.37),
                  pitch=self.uniform(0.32, 0.52), shift=-0.125)

    def bow(self, side, pace):
        angle = self.uniform(0.92, 1.27)
        self.pose(pace, self.uniform(0.2, 0.6), pitch=angle, shift=-0.115, flex=0.6 * angle)

    def sit_down(self, side, pace):
        down = self.uniform(1.0, 1.3) / pace
        height = self.uniform(-0.5, -0.455)
        self.move(down, height=height, shift=-0.385, flex=0.62, abduct=0.05, reach=0.44)
        self.move_and_wait(0.7 * down, pitch=0.47)
        self.move_and_wait(0.3 * down + 0.3, pitch=0.0)
        self.t += self.uniform(0.3, 1.1)


ACTIONS = {action: getattr(Plan, re.sub(r'\W', '_', action)) for action in LANGUAGE['phrases']}


# ---------------------------------------------------------------------------------- plan to joints


def sample_curves(curves, times):
    """{name: keys} -> {name: values (T,)}: cubic between keys, constant after the last one. Making
    a spline takes 0.1 ms, so all curves share one, each in a minute of its own."""
    all_keys = []
    for minute, keys in enumerate(curves.values()):
        keys = [*keys, (59.0, keys[-1][1], 0.0)]
        all_keys += [(60.0 * minute + time, value, velocity) for time, value, velocity in keys]
    spline = CubicHermiteSpline(*np.array(all_keys).T)
    return {name: spline(60.0 * minute + times) for minute, name in enumerate(curves)}


def body(plan, n_frames):
    """Plan -> joints (T, 22, 3) float32."""
    times = np.arange(n_frames) / FPS
    trunk = sample_curves(plan.trunk, times)
    sides = [sample_curves(limb, times) for limb in plan.limbs]
    limbs = {name: np.array([side[name] for side in sides]) for name in sides[0]}  # (2, T)
    for name, size in (('pitch', 0.012), ('sway', 0.008)):  # people never stand quite still
        phase = plan.uniform(0.2, 0.4) * times + plan.uniform(0.0, 1.0)
        trunk[name] += size * np.sin(2 * np.pi * phase)

    joints = np.zeros((22, n_frames, 3))
    feet = np.array([limbs['x'], limbs['z'], limbs['yaw']])  # (3, 2, T)
    yaw, pelvis_axes, chest_axes = _place_trunk(joints, plan, trunk, feet, limbs['lift'] == 0)
    _place_legs(joints, feet, limbs, pelvis_axes)
    _place_arms(joints, limbs, chest_axes)

    # move the first frame to the origin and let it face Z+: row vectors times R turn by -yaw
    joints = joints.transpose(1, 0, 2)
    joints = joints - joints[0, PELVIS] * [1, 0, 1]
    return (joints @ rotation(yaw[0])).astype(np.float32)


def _place_trunk(joints, plan, trunk, feet, down):
    """Fill in the trunk -> yaw (T,) and the axes (T, 3, 3) of pelvis and chest. The pelvis follows
    the feet (3, 2, T), and leans over the one that is down (2, T)."""
    centre = smooth(feet.mean(1).T, 0.13).T
    lean = smooth(down[0] * 1.0 - down[1], 0.08)
    ahead = 0.025 + trunk['shift']
    x, z, yaw = relative_to(centre, ahead, trunk['sway'] + 0.035 * lean)
    y = plan.uniform(0.948, 0.96) + trunk['height']
    joints[PELVIS] = np.stack([x, y, z], -1)

    pitch = plan.uniform(0.0, 0.06) + trunk['pitch']
    axes = {}
    for joint, parent, share, *offset in BONES:
        axes[joint] = rotation(yaw + share * trunk['twist'], share * pitch)
        joints[joint] = joints[parent] + axes[joint] @ offset
    return yaw, axes[SPINE1], axes[NECK]


def _place_legs(joints, feet, limbs, pelvis_axes):
    """Fill in the legs, by inverse kinematics from the feet. A foot rotates about its toe."""
    x, z, _ = relative_to(feet, FOOT_LENGTH + limbs['ahead'], FOOT_SPREAD * LEFTWARD[:, None])
    toe = np.stack([x, TOE_Y + limbs['lift'], z], -1)
    toe_to_ankle = rotation(limbs['yaw'], limbs['tip']) @ TOE_TO_ANKLE
    ankle = toe + toe_to_ankle

    # lower the whole trunk where a planted foot is out of reach
    x, y, z = np.moveaxis(joints[HIPS] - ankle, -1, 0)
    reach = np.sqrt(np.maximum(LEG_REACH ** 2 - x ** 2 - z ** 2, 0.01))
    planted = ndimage.binary_dilation(limbs['lift'] == 0, [[1, 1, 1]])
    too_high = np.maximum(y - reach, 0) * planted
    lower = ndimage.maximum_filter1d(too_high.max(0), 5)
    joints[..., 1] -= ndimage.uniform_filter1d(lower, 5)  # smooth, and never too little

    hip = joints[HIPS]
    pole = np.cross(motion.unit_vectors(ankle - hip), pelvis_axes[..., 0])  # knees bend forward
    joints[KNEES], joints[ANKLES] = motion.two_bone_ik(hip, ankle, THIGH, SHIN, pole, MAX_STRETCH)
    joints[TOES] = joints[ANKLES] - toe_to_ankle


def _place_arms(joints, limbs, chest_axes):
    """Fill in the arms: wrists from the curves, elbows behind and below."""
    flex = limbs['flex']
    abduct = limbs['abduct'] * LEFTWARD[:, None]
    arm = np.array([np.cos(flex) * np.sin(abduct), -np.cos(flex) * np.cos(abduct), np.sin(flex)])
    arm = np.einsum('tij,jst->sti', chest_axes, arm * limbs['reach'])

    shoulder = joints[SHOULDERS]
    pole = np.array([chest_axes @ [out, -0.6, -0.6] for out in 0.5 * LEFTWARD])
    joints[ELBOWS], joints[WRISTS] = motion.two_bone_ik(
        shoulder, shoulder + arm, UPPER_ARM, FOREARM, pole, MAX_STRETCH)


def make_clip(seed):
    """The clip of a seed: dict(joints (T, 22, 3) float32, captions [(text, tokens)], script)."""
    rng = np.random.default_rng(seed)
    n_frames = MAX_FRAMES + 1
    while n_frames > MAX_FRAMES:
        script = make_script(rng)
        plan = Plan(rng)
        for item in script:
            side = 1 if item['side'] == 'right' else 0
            ACTIONS[item['action']](plan, side, SPEEDS[item['speed']])
            plan.t += rng.uniform(0.05, 0.25)
        n_frames = max(MIN_FRAMES, int((plan.t + rng.uniform(0.2, 0.4)) * FPS))
    joints = body(plan, n_frames)
    captions = dict.fromkeys(caption(script, rng) for _ in range(20))  # distinct, in this order
    return dict(joints=joints, captions=list(captions)[:4], script=script)
