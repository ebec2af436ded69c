"""The 263-/251-dim motion representation: skeletons, and joints <-> features.

Shapes: T frames, J joints (22, KIT 21), D = 4 + (J-1)*3 + (J-1)*6 + J*3 + 4 features per frame:

    [0]        root yaw velocity: minus half of the angle turned to the next frame (radians)
    [1:3]      root x and z velocity in the root's own frame (metres per frame; KIT millimetres)
    [3]        root height above the floor
    (J-1)*3    joint positions in the root frame: facing Z+, root at x = z = 0, height above floor
    (J-1)*6    joint rotations, first two columns of the matrix, from swing-only inverse kinematics
    J*3        joint velocities in the root frame
    4          foot contacts: left ankle, left toe, right ankle, right toe

Layout and formulas are those of HumanML3D (Guo et al. 2022), quirks included: published models and
statistics are tied to them.
"""
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d


@dataclass(frozen=True, eq=False)
class Skeleton:
    """What the representation has to know about a body. Joint numbers index axis -2 of `joints`."""
    names: tuple              # J joint names, with a left_ or right_ prefix
    chains: tuple             # kinematic chains, root outwards
    raw_offsets: np.ndarray   # (J, 3) unit direction of each bone in the rest pose
    leg_joints: tuple         # knee and ankle of one leg: their bones measure a body's size
    feet: tuple               # left ankle (KIT: heel), left toe, right ankle, right toe
    facing: tuple             # right hip, left hip, right shoulder, left shoulder
    fps: float
    min_frames: int           # the field's shortest clip
    contact_threshold: float  # squared displacement per frame below which a foot stands (KIT: mm²)
    units_per_metre: float

    @property
    def n_joints(self):
        return len(self.names)

    @property
    def dim(self):
        return 12 * self.n_joints - 1

    @property
    def parents(self):
        """(J,) parent of each joint; the root is its own."""
        parents = np.zeros(self.n_joints, dtype=int)
        for chain in self.chains:
            parents[list(chain[1:])] = chain[:-1]
        return parents

    @property
    def swap(self):
        """(J,) the joint on the other side of the body, itself in the middle."""
        swap = []
        for name in self.names:
            side, _, part = name.partition('_')
            partner = {'left': f'right_{part}', 'right': f'left_{part}'}.get(side, name)
            swap.append(self.names.index(partner))
        return np.array(swap)


def _rest_directions(axes):
    """'. +x -y' -> (J, 3): a unit vector along each signed axis, zeros for '.'"""
    directions = np.zeros((len(axes.split()), 3))
    for direction, axis in zip(directions, axes.split()):
        if axis != '.':
            direction['xyz'.index(axis[1])] = float(axis[0] + '1')
    return directions


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
        leg_joints=(5, 8), feet=(7, 10, 8, 11), facing=(2, 1, 17, 16),
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
        leg_joints=(17, 18), feet=(19, 20, 14, 15), facing=(11, 16, 5, 8),
        fps=12.5, min_frames=24, contact_threshold=0.05, units_per_metre=1000),
}


def mirror(joints, skeleton):
    """Left and right exchanged: joints (..., J, 3) reflected in the plane x = 0."""
    return joints[..., skeleton.swap, :] * np.array([-1, 1, 1], joints.dtype)


def bone_offsets(joints, skeleton):
    """Rest-pose offsets (J, 3) of the body seen in one pose (J, 3), for `joints_to_features`."""
    bones = joints - joints[skeleton.parents]
    lengths = np.linalg.norm(bones, axis=-1)
    return skeleton.raw_offsets * lengths[:, None]


def unit(vectors, fallback=0.0):
    """Vectors (..., 3) at length 1; the fallback where there is no length."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    directions = vectors / np.maximum(length, 1e-8)
    return np.where(length > 1e-8, directions, fallback)


def smooth(x, sigma):
    """Gaussian filter along axis 0, the ends held, cut at 4 sigma: (T, ...) -> (T, ...)."""
    return gaussian_filter1d(x, sigma, axis=0, mode='nearest')


def resample(joints, fps, new_fps):
    """Linear interpolation in time of (T, J, 3) from one frame rate to another."""
    at = np.arange(0, len(joints) - 1 + 1e-6, fps / new_fps)
    before = np.minimum(at.astype(int), len(joints) - 2)
    share = (at - before)[:, None, None]
    return joints[before] * (1 - share) + joints[before + 1] * share


# A yaw is an angle about Y from Z+ towards X+, the way a body faces.


def _turn(vectors, yaw):
    """Vectors (..., 3) turned about Y by yaw (...); the two broadcast."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    x, y, z = np.moveaxis(vectors, -1, 0)
    turned = np.broadcast_arrays(cos * x + sin * z, y, cos * z - sin * x)
    return np.stack(turned, -1)


def _facing(joints, skeleton, hip_sign=1):
    """The way that a body faces, its x and z (..., 2): the cross product of up with the unit vector
    across hips and shoulders; short where that tilts."""
    facing = np.moveaxis(joints[..., skeleton.facing, :], -2, 0)
    right_hip, left_hip, right_shoulder, left_shoulder = facing
    across = hip_sign * (right_hip - left_hip) + right_shoulder - left_shoulder
    across = unit(across, np.array([-1.0, 0.0, 0.0]))
    return np.stack([across[..., 2], -across[..., 0]], -1)


def _yaw(forward):
    return np.arctan2(forward[..., 0], forward[..., 1])


def _heading(joints, skeleton, steady):
    """Smoothed yaw (T,) of a motion, without jumps of a full turn."""
    if steady:
        yaw = np.unwrap(_yaw(_facing(joints, skeleton)))
        return smooth(yaw, 20)
    # The reference subtracts the hip line here where it means to add it (its index names are in
    # another order than its tuple): shoulders are wider than hips, so the direction survives, and
    # models expect it. It also sets the first heading to 0.
    yaw = _yaw(smooth(_facing(joints, skeleton, hip_sign=-1), 20))
    yaw[0] = 0
    return np.unwrap(yaw)


def _bone_directions(joints, skeleton):
    """Unit vector from the parent to each joint (T, J, 3); at rest for a bone of no length."""
    return unit(joints - joints[:, skeleton.parents], skeleton.raw_offsets)


def _retarget(joints, skeleton, offsets):
    """The same bone directions with other bone lengths; root travel scales with leg length."""
    lengths = np.linalg.norm(offsets, axis=-1)
    own_lengths = np.linalg.norm(bone_offsets(joints[0], skeleton), axis=-1)
    legs = list(skeleton.leg_joints)
    scale = lengths[legs].sum() / own_lengths[legs].sum()
    bones = lengths[:, None] * _bone_directions(joints, skeleton)
    result = scale * joints   # the root stays so
    for chain in skeleton.chains:
        for parent, j in zip(chain, chain[1:]):
            result[:, j] = result[:, parent] + bones[:, j]
    return result


def _half_turn(axes):
    """Matrices (..., 3, 3) of the half turns about unit axes (..., 3)."""
    return 2 * axes[..., :, None] * axes[..., None, :] - np.eye(3)


def _rotations(joints, skeleton, yaw):
    """Swing-only inverse kinematics: (T, J-1, 6), two columns of each joint's relative rotation.

    In the world a bone's rotation takes its rest direction to where it points now by the shortest
    way: a half turn about the rest direction, then one about the line halfway between the two.
    """
    rest = skeleton.raw_offsets
    # opposite directions have no line between them; any axis square to both will do
    square = np.roll(rest, -1, axis=-1)
    halfway = unit(rest + _bone_directions(joints, skeleton), square)
    world = _half_turn(halfway) @ _half_turn(rest)

    # every chain starts from the turn into the root frame, the arms' too, not from the spine's;
    # that its inverse is applied keeps the world's heading in them, a quirk (see `steady`)
    world[:, 0] = _turn(np.eye(3), yaw[:, None])  # the rows of that turn's matrix
    before = np.zeros(skeleton.n_joints, dtype=int)
    for chain in skeleton.chains:
        before[list(chain[2:])] = chain[1:-1]
    inverse = world[:, before].swapaxes(-1, -2)
    columns = (inverse @ world[..., :2]).swapaxes(-1, -2)
    return columns[:, 1:].reshape(len(joints), -1, 6)


def joints_to_features(joints, skeleton, offsets=None, contact_threshold=None, steady=False):
    """World joint positions (T, J, 3), Y up, at the skeleton's frame rate -> (T-1, D) float64.

    offsets (J, 3): retarget to the body with these rest-pose offsets first (`bone_offsets`).
    contact_threshold: default the skeleton's. The last frame is used up by velocities.
    steady: two things that the field's features get wrong around turns; the joints that come back
    are the same. Its smoothed facing vector vanishes in the middle of a spin, where the root frame
    then flips within one frame, and its first heading is 0 whatever the next ones are: steady
    smooths the heading as an angle. Its rotations are taken in the world, so that after a turn the
    same pose has other ones (on toy 7 std away): steady takes them in the root frame.
    ValueError for a wrong shape, fewer than 2 frames or numbers that are not finite.
    """
    joints = np.asarray(joints, dtype=np.float64)
    if joints.ndim != 3 or joints.shape[1:] != (skeleton.n_joints, 3) or len(joints) < 2:
        raise ValueError(f'expected joints of shape (T >= 2, {skeleton.n_joints}, 3), '
                         f'found {joints.shape}')
    if not np.isfinite(joints).all():
        raise ValueError('joint positions hold NaN or infinity')
    if offsets is not None:
        joints = _retarget(joints, skeleton, np.asarray(offsets, dtype=np.float64))
    if contact_threshold is None:
        contact_threshold = skeleton.contact_threshold

    # floor at y = 0, first root over the origin, first pose facing Z+
    origin = [joints[0, 0, 0], joints[..., 1].min(), joints[0, 0, 2]]
    joints = _turn(joints - origin, -_yaw(_facing(joints[0], skeleton)))

    yaw = _heading(joints, skeleton, steady)
    step = np.diff(joints, axis=0)
    # by the next frame's heading, a quirk of the field; features_to_joints knows
    root_velocity = _turn(step[:, 0], -yaw[1:])
    below_root = joints[:, :1] * [1, 0, 1]
    in_root_frame = _turn(joints - below_root, -yaw[:, None])
    if steady:
        rotations = _rotations(in_root_frame, skeleton, np.zeros_like(yaw))
    else:
        rotations = _rotations(joints, skeleton, yaw)
    velocities = _turn(step, -yaw[:-1, None])
    moved = (step[:, skeleton.feet] ** 2).sum(-1)
    n = len(step)
    return np.concatenate([
        -np.diff(yaw)[:, None] / 2,
        root_velocity[:, [0, 2]],
        in_root_frame[:-1, 0, 1:2],
        in_root_frame[:-1, 1:].reshape(n, -1),
        rotations[:-1].reshape(n, -1),
        velocities.reshape(n, -1),
        moved < contact_threshold,
    ], -1)


def features_to_joints(features, n_joints):
    """Features (..., T, D) -> world joint positions (..., T, J, 3); numpy to numpy, torch to torch.

    Integrates root yaw and root velocity, then places the root-frame positions; rotations and
    velocities are not used, as in the field. Computed in float64 on the host. ValueError for a
    wrong width.
    """
    if isinstance(features, torch.Tensor):
        joints = features_to_joints(features.detach().cpu().double().numpy(), n_joints)
        return torch.from_numpy(joints).to(features)
    dim = 12 * n_joints - 1
    if features.shape[-1] != dim:
        raise ValueError(f'expected features of width {dim} for {n_joints} joints, '
                         f'found {features.shape[-1]}')
    x = features.astype(np.float64)

    # velocities lead from frame t to t + 1: the first frame has none
    velocity = np.zeros_like(x[..., :3])
    velocity[..., 1:, :] = x[..., :-1, :3]
    yaw = -2 * np.cumsum(velocity[..., 0], -1)  # feature 0 is half the angle, the other way round
    step = np.stack([velocity[..., 1], np.zeros_like(yaw), velocity[..., 2]], -1)
    root = np.cumsum(_turn(step, yaw), -2)

    joints = np.zeros((*x.shape[:-1], n_joints, 3))
    joints[..., 0, 1] = x[..., 3]
    positions = x[..., 4:3 * n_joints + 1]
    joints[..., 1:, :] = positions.reshape(*x.shape[:-1], n_joints - 1, 3)
    joints = _turn(joints, yaw[..., None]) + root[..., None, :]
    return joints.astype(features.dtype)


# -------------------------------------------------------------------------------------------------
# Feet that stand


def two_bone(root, target, a, b, pole, most=1.0):
    """Bones of lengths a and b from root towards target (..., 3), bending towards pole -> middle
    joint, end joint. A target beyond most of their reach is pulled in, so bones keep their
    lengths."""
    way = target - root
    line = unit(way)
    distance = np.linalg.norm(way, axis=-1, keepdims=True)
    distance = distance.clip(0.1, most * (a + b))
    along = (a * a - b * b + distance * distance) / (2 * distance)
    aside = np.sqrt(np.maximum(a * a - along * along, 0))
    across = unit(pole - line * (pole * line).sum(-1, keepdims=True))
    middle = root + along * line + aside * across
    return middle, root + distance * line


STANDS = 0.8      # metres a second: a low foot that is slower stands
LOW = 0.03        # metres above its lowest 5% of frames
FARTHEST = 0.025  # metres that a foot is moved at most, before inverse kinematics


def _pinning(place, skeleton, fps):
    """Path of a foot's joint (T, 3) -> what to add to it (T, 3), so that it rests in the middle of
    each stretch in which it stands; in between the way from one such offset to the next."""
    metre = skeleton.units_per_metre
    speed = np.linalg.norm(np.gradient(place[:, [0, 2]], axis=0), axis=-1)
    low = place[:, 1] < np.percentile(place[:, 1], 5) + LOW * metre
    stands = low & (speed < STANDS * metre / fps)
    frames = np.flatnonzero(stands)
    if not len(frames):
        return np.zeros_like(place)
    offsets = []
    for stretch in np.split(frames, np.flatnonzero(np.diff(frames) > 1) + 1):
        offset = (place[stretch].mean(0) - place[stretch]) * [1, 0, 1]
        length = np.linalg.norm(offset, axis=-1, keepdims=True)
        offsets.append(offset * np.minimum(1, FARTHEST * metre / np.maximum(length, 1e-9)))
    offsets = np.concatenate(offsets)
    everywhere = np.arange(len(place))
    return np.stack([np.interp(everywhere, frames, axis) for axis in offsets.T], -1)


def lock_feet(joints, skeleton, fps=None):
    """Joints (T, J, 3) -> the same with feet that do not slide while they stand; legs follow by
    inverse kinematics, and bones keep their lengths. Post-processing, for the eye: it has no place
    in an evaluation. fps: the skeleton's.

    64 generated test clips, rigid body (bvh.py) and this: eval_t2m.py's slide falls from 0.17 to
    0.06 cm a frame on toy, from 0.37 to 0.16 on bandai; no joint moves by more than 1.3 cm on
    average, in no clip by more than 2.7.
    """
    joints = np.array(joints, dtype=np.float64)
    pinned = joints.copy()
    for foot in skeleton.feet:
        pinned[:, foot] += _pinning(joints[:, foot], skeleton, fps or skeleton.fps)

    lengths = np.linalg.norm(joints - joints[:, skeleton.parents], axis=-1, keepdims=True)
    for side, heel, toe in zip(('left', 'right'), skeleton.feet[::2], skeleton.feet[1::2]):
        hip, knee, ankle = (skeleton.names.index(f'{side}_{part}')
                            for part in ('hip', 'knee', 'ankle'))
        sole = unit(pinned[:, heel] - pinned[:, toe])
        pinned[:, heel] = pinned[:, toe] + lengths[:, toe] * sole
        goal = joints[:, ankle] + pinned[:, heel] - joints[:, heel]
        pole = joints[:, knee] - (joints[:, hip] + joints[:, ankle]) / 2
        pinned[:, knee], reached = two_bone(joints[:, hip], goal, lengths[:, knee],
                                            lengths[:, ankle], pole)
        for joint in (heel, toe):
            pinned[:, joint] += reached - goal
        pinned[:, ankle] = reached
    return pinned
