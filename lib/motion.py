"""The motion representation: skeletons, and conversion between joint positions and features.

Shapes: T frames, J joints (22; KIT-ML 21), D = 4 + (J-1)*3 + (J-1)*6 + J*3 + 4 features per frame
(263; KIT-ML 251):

    [0]        root yaw velocity: minus half of the yaw change to the next frame, in radians
    [1:3]      root velocity along x and z in the root frame, in metres per frame (KIT-ML: mm)
    [3]        height of the root above the floor
    (J-1)*3    joint positions in the root frame: facing Z+, root at x = z = 0, height above floor
    (J-1)*6    joint rotations: the first two columns of each matrix, from swing-only IK
    J*3        joint velocities in the root frame
    4          foot contacts: left ankle, left toe, right ankle, right toe

The layout and the formulas are HumanML3D's (Guo et al. 2022), including their quirks, because the
published models and statistics depend on them.
"""
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d


@dataclass(frozen=True, eq=False)
class Skeleton:
    """What the representation needs to know about a body. Joint numbers index axis -2 of joints."""
    names: tuple              # J joint names; those off the middle start with left_ or right_
    chains: tuple             # kinematic chains, from the root outwards
    raw_offsets: np.ndarray   # (J, 3) unit direction of each bone in the rest pose
    feet: tuple               # left ankle (KIT-ML: heel), left toe, right ankle, right toe
    facing: tuple             # right hip, left hip, right shoulder, left shoulder
    fps: float
    min_frames: int           # the standard data preparation drops shorter clips
    contact_threshold: float  # a foot that moves less touches the floor (squared, per frame)
    units_per_metre: float

    @property
    def n_joints(self):
        return len(self.names)

    @property
    def dim(self):
        return 12 * self.n_joints - 1

    @property
    def parents(self):
        """(J,) parent of each joint. The root is its own parent."""
        parents = np.zeros(self.n_joints, dtype=int)
        for chain in self.chains:
            parents[list(chain[1:])] = chain[:-1]
        return parents

    @property
    def swap(self):
        """(J,) the corresponding joint on the other side of the body; a middle joint is its own."""
        other_side = {'left': 'right', 'right': 'left'}
        swap = []
        for name in self.names:
            side, mark, part = name.partition('_')
            swap.append(self.names.index(other_side.get(side, side) + mark + part))
        return np.array(swap)


AXES = {'.': (0, 0, 0), '+x': (1, 0, 0), '-x': (-1, 0, 0), '+y': (0, 1, 0), '-y': (0, -1, 0),
        '+z': (0, 0, 1)}


def _rest_directions(axes):
    """'. +x -y' -> (J, 3): a unit vector along each signed axis, zeros for '.'"""
    return np.array([AXES[axis] for axis in axes.split()], float)


SKELETONS = {
    'smpl22': Skeleton(
        names=('pelvis', 'left_hip', 'right_hip', 'spine1', 'left_knee', 'right_knee', 'spine2',
               'left_ankle', 'right_ankle', 'spine3', 'left_foot', 'right_foot', 'neck',
               'left_collar', 'right_collar', 'head', 'left_shoulder', 'right_shoulder',
               'left_elbow', 'right_elbow', 'left_wrist', 'right_wrist'),
        chains=((0, 2, 5, 8, 11), (0, 1, 4, 7, 10), (0, 3, 6, 9, 12, 15),
                (9, 14, 17, 19, 21), (9, 13, 16, 18, 20)),
        raw_offsets=_rest_directions(
            '. +x -x +y -y -y +y -y -y +y +z +z +y +x -x +z -y -y -y -y -y -y'),
        feet=(7, 10, 8, 11), facing=(2, 1, 17, 16),
        fps=20, min_frames=40, contact_threshold=0.002, units_per_metre=1),
    'kit21': Skeleton(
        names=('pelvis', 'spine1', 'spine2', 'neck', 'head', 'right_shoulder', 'right_elbow',
               'right_wrist', 'left_shoulder', 'left_elbow', 'left_wrist', 'right_hip',
               'right_knee', 'right_ankle', 'right_heel', 'right_foot', 'left_hip', 'left_knee',
               'left_ankle', 'left_heel', 'left_foot'),
        chains=((0, 11, 12, 13, 14, 15), (0, 16, 17, 18, 19, 20), (0, 1, 2, 3, 4),
                (3, 5, 6, 7), (3, 8, 9, 10)),
        raw_offsets=_rest_directions(
            '. +y +y +y +y +x -y -y -x -y -y +x -y -y +z +z -x -y -y +z +z'),
        feet=(19, 20, 14, 15), facing=(11, 16, 5, 8),
        fps=12.5, min_frames=24, contact_threshold=0.05, units_per_metre=1000),
}


def mirror(joints, skeleton):
    """Exchange left and right: joints (..., J, 3) reflected in the plane x = 0."""
    return joints[..., skeleton.swap, :] * np.array([-1, 1, 1], joints.dtype)


def unit_vectors(vectors, fallback=0.0):
    """Vectors (..., 3) scaled to length 1, or `fallback` where the length is 0."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    directions = vectors / np.maximum(length, 1e-8)
    return np.where(length > 1e-8, directions, fallback)


def smooth(x, sigma):
    """Gaussian filter of (T, ...) along axis 0, sigma in frames; the end values are repeated."""
    return gaussian_filter1d(x, sigma, axis=0, mode='nearest')


def resample(joints, fps, new_fps):
    """Change the frame rate of joints (T, J, 3) by linear interpolation."""
    times = np.arange(0, len(joints) - 1 + 1e-6, fps / new_fps)
    before = np.minimum(times.astype(int), len(joints) - 2)
    weight = (times - before)[:, None, None]
    return joints[before] * (1 - weight) + joints[before + 1] * weight


# -------------------------------------------------------------------------------------------------
# Joints <-> features. Yaw is the angle about Y that a body faces, measured from Z+ towards X+.


def _rotate_y(vectors, yaw):
    """Rotate vectors (..., 3) about Y by yaw (...); the two broadcast."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    x, y, z = np.moveaxis(vectors, -1, 0)
    rotated = np.broadcast_arrays(cos * x + sin * z, y, cos * z - sin * x)
    return np.stack(rotated, -1)


def _facing(joints, skeleton, hip_sign=1):
    """x and z (..., 2) of the direction that a body faces: the cross product of the up axis and the
    unit vector across hips and shoulders. It is shorter than 1 where that vector tilts."""
    right_hip, left_hip, right_shoulder, left_shoulder = (
        joints[..., joint, :] for joint in skeleton.facing)
    across = hip_sign * (right_hip - left_hip) + right_shoulder - left_shoulder
    across = unit_vectors(across, np.array([-1.0, 0.0, 0.0]))
    return np.stack([across[..., 2], -across[..., 0]], -1)


def _yaw(facing):
    return np.arctan2(facing[..., 0], facing[..., 1])


def _heading(joints, skeleton, steady):
    """Smoothed yaw (T,) of a motion, unwrapped (no jumps of a full turn)."""
    if steady:
        return smooth(np.unwrap(_yaw(_facing(joints, skeleton))), 20)

    # HumanML3D's code subtracts the hip line here where it means to add it. Shoulders are wider
    # than hips, so the direction is still right, and published models expect it. The code also
    # sets the first heading to 0.
    yaw = _yaw(smooth(_facing(joints, skeleton, hip_sign=-1), 20))
    yaw[0] = 0
    return np.unwrap(yaw)


def _half_turns(axes):
    """Rotation matrices (..., 3, 3) by 180 degrees about unit axes (..., 3)."""
    return 2 * axes[..., :, None] * axes[..., None, :] - np.eye(3)


def _rotations(joints, skeleton, yaw):
    """Swing-only inverse kinematics: (T, J-1, 6), two columns of each joint's relative rotation.

    In the world, a bone's rotation takes its rest direction to its current direction by the
    shortest arc: a half turn about the rest direction, then one about the bisector of the two.
    """
    rest = skeleton.raw_offsets
    # A bone of length 0 points as at rest. Opposite directions have no bisector: any axis that is
    # perpendicular to both will do.
    directions = unit_vectors(joints - joints[:, skeleton.parents], rest)
    bisector = unit_vectors(rest + directions, np.roll(rest, -1, axis=-1))
    world = _half_turns(bisector) @ _half_turns(rest)

    # As in HumanML3D's code, every chain starts from the rotation into the root frame (the arms do
    # not follow the spine), and what is applied is the inverse of that rotation. So the result
    # still depends on the world heading (see `steady` in joints_to_features).
    world[:, 0] = _rotate_y(np.eye(3), yaw[:, None])  # the rows of the rotation into the root frame
    before = np.zeros(skeleton.n_joints, dtype=int)
    for chain in skeleton.chains:
        before[list(chain[2:])] = chain[1:-1]
    inverse = world[:, before].swapaxes(-1, -2)
    columns = (inverse @ world[..., :2]).swapaxes(-1, -2)
    return columns[:, 1:].reshape(len(joints), -1, 6)


def joints_to_features(joints, skeleton, contact_threshold=None, steady=False):
    """World joint positions (T, J, 3), Y up, at the skeleton's frame rate -> (T-1, D) float64.
    The last frame only serves to compute velocities.

    contact_threshold: the skeleton's by default.
    steady: correct two faults of HumanML3D's features around turns. `features_to_joints` returns
        the same joints either way.
        1. The smoothed facing vector vanishes in the middle of a spin, where the root frame then
           flips within one frame, and the first heading is always 0. With steady, the heading is
           smoothed as an angle.
        2. Rotations depend on the world heading, so the same pose has different rotations after a
           turn (on toy by 7 std). With steady, they are computed in the root frame.

    ValueError for a wrong shape, fewer than 2 frames, NaN or infinity.
    """
    joints = np.asarray(joints, dtype=np.float64)
    if joints.shape[1:] != (skeleton.n_joints, 3) or len(joints) < 2:
        raise ValueError(f'expected joints of shape (T >= 2, {skeleton.n_joints}, 3), '
                         f'found {joints.shape}')
    if not np.isfinite(joints).all():
        raise ValueError('joint positions contain NaN or infinity')
    if contact_threshold is None:
        contact_threshold = skeleton.contact_threshold

    # put the floor at y = 0 and the first root above the origin, and let the first pose face Z+
    origin = [joints[0, 0, 0], joints[..., 1].min(), joints[0, 0, 2]]
    joints = _rotate_y(joints - origin, -_yaw(_facing(joints[0], skeleton)))

    yaw = _heading(joints, skeleton, steady)
    step = np.diff(joints, axis=0)
    # HumanML3D uses the next frame's heading here; features_to_joints does the same
    root_velocity = _rotate_y(step[:, 0], -yaw[1:])
    below_root = joints[:, :1] * [1, 0, 1]
    in_root_frame = _rotate_y(joints - below_root, -yaw[:, None])
    rotations = (_rotations(in_root_frame, skeleton, np.zeros_like(yaw)) if steady
                 else _rotations(joints, skeleton, yaw))
    velocities = _rotate_y(step, -yaw[:-1, None])
    foot_movement = (step[:, skeleton.feet] ** 2).sum(-1)

    n = len(step)
    return np.concatenate([
        -np.diff(yaw)[:, None] / 2,
        root_velocity[:, [0, 2]],
        in_root_frame[:-1, 0, 1:2],
        in_root_frame[:-1, 1:].reshape(n, -1),
        rotations[:-1].reshape(n, -1),
        velocities.reshape(n, -1),
        foot_movement < contact_threshold,
    ], -1)


def features_to_joints(features, n_joints):
    """Features (..., T, D) -> world joint positions (..., T, J, 3), as a NumPy array or a torch
    tensor like the input.

    Integrates root yaw and root velocity, then places the root-frame positions. As in HumanML3D's
    code, rotations and joint velocities are not used. ValueError for features of another width.
    """
    if isinstance(features, torch.Tensor):
        joints = features_to_joints(features.detach().cpu().double().numpy(), n_joints)
        return torch.from_numpy(joints).to(features)
    if features.shape[-1] != 12 * n_joints - 1:
        raise ValueError(f'expected features of width {12 * n_joints - 1} for {n_joints} joints, '
                         f'found {features.shape[-1]}')
    x = features.astype(np.float64)

    # velocity t leads from frame t to frame t + 1, so the first frame starts from 0
    velocity = np.zeros_like(x[..., :3])
    velocity[..., 1:, :] = x[..., :-1, :3]
    yaw = -2 * np.cumsum(velocity[..., 0], -1)  # feature 0 is minus half of the change
    step = np.stack([velocity[..., 1], np.zeros_like(yaw), velocity[..., 2]], -1)
    root = np.cumsum(_rotate_y(step, yaw), -2)

    joints = np.zeros((*x.shape[:-1], n_joints, 3))
    joints[..., 0, 1] = x[..., 3]
    joints[..., 1:, :] = x[..., 4:3 * n_joints + 1].reshape(joints[..., 1:, :].shape)
    joints = _rotate_y(joints, yaw[..., None]) + root[..., None, :]
    return joints.astype(features.dtype)


# -------------------------------------------------------------------------------------------------
# Foot locking

PLANTED_SPEED = 0.8    # metres per second; a slower foot near the floor is planted
PLANTED_HEIGHT = 0.03  # metres above the lowest 5% of the joint's heights
MAX_SHIFT = 0.025      # metres by which a foot is moved at most, before inverse kinematics


def two_bone_ik(root, target, upper, lower, pole, max_reach=1.0):
    """Inverse kinematics of a limb with two bones -> positions of its middle and end joint.

    root, target, pole (..., 3): the fixed joint, where the end should be, and the direction in
    which the middle joint bends. upper, lower: bone lengths, which are kept: a target beyond
    max_reach of their sum is pulled in.
    """
    to_target = target - root
    direction = unit_vectors(to_target)
    distance = np.linalg.norm(to_target, axis=-1, keepdims=True)
    distance = distance.clip(0.1, max_reach * (upper + lower))

    # the middle joint, along the line to the target and perpendicular to it
    along = (upper * upper - lower * lower + distance * distance) / (2 * distance)
    across = np.sqrt(np.maximum(upper * upper - along * along, 0))
    bend = unit_vectors(pole - direction * (pole * direction).sum(-1, keepdims=True))
    middle = root + along * direction + across * bend
    return middle, root + distance * direction


def _planting_shifts(path, skeleton, fps):
    """Horizontal shifts (T, 3) for the path (T, 3) of a foot joint. While the foot is planted, they
    move it to its mean position of that period; in between they are interpolated."""
    metre = skeleton.units_per_metre
    speed = np.linalg.norm(np.gradient(path[:, [0, 2]], axis=0), axis=-1)
    low = path[:, 1] < np.percentile(path[:, 1], 5) + PLANTED_HEIGHT * metre
    planted = np.flatnonzero(low & (speed < PLANTED_SPEED * metre / fps))
    if not len(planted):
        return np.zeros_like(path)

    shifts = []
    for frames in np.split(planted, np.flatnonzero(np.diff(planted) > 1) + 1):
        shift = (path[frames].mean(0) - path[frames]) * [1, 0, 1]
        length = np.linalg.norm(shift, axis=-1, keepdims=True)
        shifts.append(shift * np.minimum(1, MAX_SHIFT * metre / np.maximum(length, 1e-9)))
    shifts = np.concatenate(shifts)
    frames = np.arange(len(path))
    return np.stack([np.interp(frames, planted, axis) for axis in shifts.T], -1)


def lock_feet(joints, skeleton, fps=None):
    """Joints (T, J, 3) -> the same motion without sliding of planted feet. The legs follow by
    inverse kinematics, and bones keep their lengths. fps: the skeleton's by default.

    This is post-processing for viewing; do not evaluate its result. On 64 generated test clips with
    rigid bones (see lib/bvh.py), foot sliding as eval_t2m.py measures it falls from 0.17 to 0.06 cm
    per frame on toy and from 0.37 to 0.16 on bandai. No joint moves by more than 1.3 cm on average,
    or by more than 2.7 cm in any one clip.
    """
    joints = np.array(joints, dtype=np.float64)
    locked = joints.copy()
    for foot in skeleton.feet:
        locked[:, foot] += _planting_shifts(joints[:, foot], skeleton, fps or skeleton.fps)

    lengths = np.linalg.norm(joints - joints[:, skeleton.parents], axis=-1, keepdims=True)
    for side, heel, toe in zip(('left', 'right'), skeleton.feet[::2], skeleton.feet[1::2]):
        hip, knee, ankle = (skeleton.names.index(f'{side}_{part}')
                            for part in ('hip', 'knee', 'ankle'))

        # the toe decides where the foot is, the heel only where it points
        sole = unit_vectors(locked[:, heel] - locked[:, toe])
        locked[:, heel] = locked[:, toe] + lengths[:, toe] * sole

        target = joints[:, ankle] + locked[:, heel] - joints[:, heel]
        pole = joints[:, knee] - (joints[:, hip] + joints[:, ankle]) / 2
        locked[:, knee], reached = two_bone_ik(
            joints[:, hip], target, lengths[:, knee], lengths[:, ankle], pole)

        # when the leg is too short, the whole foot follows the ankle
        for joint in (heel, toe):
            locked[:, joint] += reached - target
        locked[:, ankle] = reached
    return locked
