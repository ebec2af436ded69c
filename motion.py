"""The 263-/251-dim motion representation: joints <-> features, skeletons, BVH in, the packed data format, drawing.

Shapes: T frames, J joints (22, KIT 21), D = 4 + (J-1)*3 + (J-1)*6 + J*3 + 4 features per frame:

    [0]            root yaw velocity, the arcsin of the half-angle turned in one frame (radians)
    [1:3]          root x and z velocity in the root's own frame (metres per frame; KIT millimetres)
    [3]            root height above the floor
    (J-1)*3        joint positions in the root frame: facing Z+, root at x = z = 0, heights above the floor
    (J-1)*6        joint rotations, first two columns of the matrix, from swing-only inverse kinematics
    J*3            joint velocities in the root frame
    4              foot contacts: left ankle, left toe, right ankle, right toe

The layout and its formulas are those of HumanML3D (Guo et al. 2022, "Generating Diverse and Natural 3D Human Motions
from Text"), quirks included, because published models and statistics are tied to them.
"""
import json
import math
import os
import re
import textwrap
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# ---------------------------------------------------------------------------------------------------------------------
# Skeletons


@dataclass(frozen=True, eq=False)
class Skeleton:
    """What the representation has to know about a body. Joint numbers index axis -2 of every `joints` array."""
    names: tuple             # J joint names; a left_/right_ prefix decides the colour in drawings
    chains: tuple            # kinematic chains, root outwards
    raw_offsets: np.ndarray  # (J, 3) unit direction of each bone in the rest pose
    leg_joints: tuple        # knee and ankle of one leg: their bones measure a body's size
    feet: tuple              # left ankle, left toe, right ankle, right toe
    facing: tuple            # right hip, left hip, right shoulder, left shoulder
    fps: float
    contact_threshold: float  # squared displacement per frame below which a foot stands
    units_per_metre: float

    @property
    def n_joints(self):
        return len(self.names)

    @property
    def dim(self):
        return 12 * self.n_joints - 1  # 4 + 3(J-1) + 6(J-1) + 3J + 4

    @property
    def parents(self):
        """(J,) parent of each joint, -1 for the root."""
        parents = np.full(self.n_joints, -1)
        for chain in self.chains:
            parents[list(chain[1:])] = chain[:-1]
        return parents

    @property
    def swap(self):
        """(J,) the joint on the other side of the body, itself in the middle."""
        other = {'left': 'right', 'right': 'left'}
        return np.array([self.names.index('_'.join([other.get(s, s) for s in n.split('_')])) for n in self.names])


def _directions(code):  # 'x' is +x, 'X' is -x, '.' is no direction
    return np.array([[(c == a) - (c == a.upper()) for a in 'xyz'] for c in code], dtype=np.float64)


SKELETONS = {
    'smpl22': Skeleton(
        names=('pelvis', 'left_hip', 'right_hip', 'spine1', 'left_knee', 'right_knee', 'spine2', 'left_ankle', 'right_ankle',
               'spine3', 'left_foot', 'right_foot', 'neck', 'left_collar', 'right_collar', 'head', 'left_shoulder',
               'right_shoulder', 'left_elbow', 'right_elbow', 'left_wrist', 'right_wrist'),
        chains=((0, 2, 5, 8, 11), (0, 1, 4, 7, 10), (0, 3, 6, 9, 12, 15), (9, 14, 17, 19, 21), (9, 13, 16, 18, 20)),
        raw_offsets=_directions('.xXyYYyYYyzzyxXzYYYYYY'),
        leg_joints=(5, 8), feet=(7, 10, 8, 11), facing=(2, 1, 17, 16), fps=20, contact_threshold=0.002, units_per_metre=1),
    'kit21': Skeleton(
        names=('pelvis', 'spine1', 'spine2', 'neck', 'head', 'right_shoulder', 'right_elbow', 'right_wrist', 'left_shoulder',
               'left_elbow', 'left_wrist', 'right_hip', 'right_knee', 'right_ankle', 'right_heel', 'right_foot', 'left_hip',
               'left_knee', 'left_ankle', 'left_heel', 'left_foot'),
        chains=((0, 11, 12, 13, 14, 15), (0, 16, 17, 18, 19, 20), (0, 1, 2, 3, 4), (3, 5, 6, 7), (3, 8, 9, 10)),
        raw_offsets=_directions('.yyyyxYYXYYxYYzzXYYzz'),
        leg_joints=(17, 18), feet=(19, 20, 14, 15), facing=(11, 16, 5, 8), fps=12.5, contact_threshold=0.05,
        units_per_metre=1000)}


def mirror(joints, skeleton):
    """Left and right exchanged, the body reflected in the plane x = 0: joints (..., J, 3) -> (..., J, 3)."""
    return joints[..., skeleton.swap, :] * np.array([-1, 1, 1], dtype=joints.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Joints -> features. Quaternions are (w, x, y, z).


def _qmul(a, b):
    aw, ax, ay, az = np.moveaxis(a, -1, 0)
    bw, bx, by, bz = np.moveaxis(b, -1, 0)
    return np.stack([aw * bw - ax * bx - ay * by - az * bz, aw * bx + ax * bw + ay * bz - az * by,
                     aw * by - ax * bz + ay * bw + az * bx, aw * bz + ax * by - ay * bx + az * bw], -1)


def _qrot(q, v):
    """v + 2 u x (u x v + w v) with q = (w, u)."""
    uv = _cross(q[..., 1:], v)
    return v + 2 * (q[..., :1] * uv + _cross(q[..., 1:], uv))


def _cross(a, b):  # np.cross spends more time on its arguments than on its products
    ax, ay, az = a[..., 0], a[..., 1], a[..., 2]
    bx, by, bz = b[..., 0], b[..., 1], b[..., 2]
    return np.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], -1)


def _qbetween(u, v):
    """Shortest rotation from unit u to unit v; a half turn (where the axis is arbitrary) about u's neighbour axis."""
    q = np.concatenate([1 + (u * v).sum(-1, keepdims=True), _cross(u, v)], -1)
    norm = np.linalg.norm(q, axis=-1, keepdims=True)
    half_turn = np.concatenate([np.zeros_like(norm), np.broadcast_to(np.roll(u, 1, -1), q.shape[:-1] + (3,))], -1)
    return np.where(norm > 1e-8, q / np.maximum(norm, 1e-8), half_turn)


def _unit(v, fallback):
    norm = np.linalg.norm(v, axis=-1, keepdims=True)
    return np.where(norm > 1e-8, v / np.maximum(norm, 1e-8), fallback)


def _facing(joints, skeleton, hip_sign=1):
    """Forward (..., 3): up x the unit line across hips and shoulders. On the floor, shorter than 1 where that line tilts."""
    r_hip, l_hip, r_shoulder, l_shoulder = (joints[..., j, :] for j in skeleton.facing)
    across = _unit(hip_sign * (r_hip - l_hip) + r_shoulder - l_shoulder, np.array([-1., 0., 0.]))
    return np.stack([across[..., 2], np.zeros_like(across[..., 0]), -across[..., 0]], -1)


def _smooth(x, sigma=20):
    """Gaussian filter along axis 0 with the ends held, cut at 4 sigma (scipy's gaussian_filter1d, mode 'nearest')."""
    radius = 4 * sigma
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(x, ((radius, radius), (0, 0)), mode='edge')
    return np.stack([np.convolve(column, kernel, 'valid') for column in padded.T], -1)


def _bone_directions(joints, skeleton):
    """Unit vector from the parent to each joint (T, J, 3); the rest pose's direction for a bone of no length."""
    parents = np.maximum(skeleton.parents, 0)
    return _unit(joints - joints[:, parents], skeleton.raw_offsets)


def bone_offsets(joints, skeleton):
    """Rest-pose offsets (J, 3) of the body seen in one pose (J, 3): the `offsets` that `joints_to_features` takes."""
    lengths = np.linalg.norm(joints - joints[np.maximum(skeleton.parents, 0)], axis=-1)
    return skeleton.raw_offsets * lengths[:, None]


def _retarget(joints, skeleton, offsets):
    """The same bone directions on a body with other bone lengths; root travel scales with leg length. (T, J, 3)"""
    lengths = np.linalg.norm(offsets, axis=-1)
    own = np.linalg.norm(bone_offsets(joints[0], skeleton), axis=-1)
    legs = list(skeleton.leg_joints)
    directions = _bone_directions(joints, skeleton)
    out = np.empty_like(joints)
    out[:, 0] = joints[:, 0] * (lengths[legs].sum() / own[legs].sum())
    for chain in skeleton.chains:
        for parent, j in zip(chain, chain[1:]):
            out[:, j] = out[:, parent] + lengths[j] * directions[:, j]
    return out


def joints_to_features(joints, skeleton, offsets=None, contact_threshold=None, steady=False):
    """World joint positions (T, J, 3), Y up, at the skeleton's frame rate -> features (T-1, D) float64.

    offsets (J, 3): retarget to the body with these rest-pose offsets first (`bone_offsets`). contact_threshold: squared
    displacement under which a foot counts as standing (default: the skeleton's). The last frame is used up by velocities.
    steady: smooth the heading as an angle instead of as a vector. The field's smoothed vector vanishes in the middle of a
    spin, where the root frame then flips within one frame, and its first heading is set to 0 whatever the next ones are:
    jumps of up to half a turn, which a model must get right to the degree. The joints that come back are the same.
    Raises ValueError for a wrong shape, fewer than 2 frames or numbers that are not finite.
    """
    joints = np.asarray(joints, dtype=np.float64)
    if joints.ndim != 3 or joints.shape[1:] != (skeleton.n_joints, 3) or len(joints) < 2:
        raise ValueError(f'expected joints of shape (T >= 2, {skeleton.n_joints}, 3), found {joints.shape}')
    if not np.isfinite(joints).all():
        raise ValueError('joint positions hold NaN or infinity')
    if offsets is not None:
        joints = _retarget(joints, skeleton, np.asarray(offsets, dtype=np.float64))

    # floor at y = 0, first root over the origin, first pose facing Z+
    forward_z = np.array([0., 0., 1.])
    origin = joints[0, 0] * [1, 0, 1] + [0, joints[..., 1].min(), 0]
    forward = _unit(_facing(joints[0], skeleton), forward_z)
    joints = _qrot(_qbetween(forward, forward_z)[None, None], joints - origin)

    # per-frame heading (T, 4), which turns the world into the root frame
    if steady:
        forward = _facing(joints, skeleton)
        angle = -_smooth(np.unwrap(np.arctan2(forward[:, 0], forward[:, 2]))[:, None])[:, 0]
        heading = np.stack([np.cos(angle / 2), 0 * angle, np.sin(angle / 2), 0 * angle], -1)
    else:
        # The reference subtracts the hip line here where it means to add it (its index names are in another order than
        # its tuple): shoulders are wider than hips, so the direction survives, and models expect it.
        forward = _unit(_smooth(_facing(joints, skeleton, hip_sign=-1)), forward_z)
        heading = _qbetween(forward, forward_z)
        heading[0] = [1, 0, 0, 0]

    # swing-only inverse kinematics: each bone's world rotation takes its rest direction to where it points now; every
    # chain starts from the heading, the arms too (their rotation is not relative to the spine's)
    world = _qbetween(skeleton.raw_offsets, _bone_directions(joints, skeleton))    # (T, J, 4)
    world[:, 0] = heading
    before = np.zeros(skeleton.n_joints, dtype=int)
    for chain in skeleton.chains:
        before[list(chain[2:])] = chain[1:-1]
    w, x, y, z = np.moveaxis(_qmul(world[:, before] * [1, -1, -1, -1], world)[:-1, 1:], -1, 0)
    rotations = np.stack([1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y),      # first column
                          2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)], -1)  # second column

    step = joints[1:] - joints[:-1]
    turn = _qmul(heading[1:], heading[:-1] * [1, -1, -1, -1])
    turn *= np.where(turn[:, :1] < 0, -1, 1)  # q and -q turn alike; the reference turns the wrong way past 180 degrees here
    root_step = _qrot(heading[1:], step[:, 0])
    local = _qrot(heading[:-1, None], (joints - joints[:, :1] * [1, 0, 1])[:-1])
    if contact_threshold is None:
        contact_threshold = skeleton.contact_threshold
    contacts = (step[:, list(skeleton.feet)] ** 2).sum(-1) < contact_threshold
    n = len(step)
    return np.concatenate([
        np.arcsin(np.clip(turn[:, 2:3], -1, 1)), root_step[:, [0, 2]], local[:, 0, 1:2],
        local[:, 1:].reshape(n, -1), rotations.reshape(n, -1), _qrot(heading[:-1, None], step).reshape(n, -1), contacts], -1)


def features_to_joints(features, n_joints):
    """Features (..., T, D) -> world joint positions (..., T, J, 3); numpy in, numpy out; torch in, torch out.

    Integrates root yaw and root velocity, then places the root-frame positions (rotations and velocities are not used,
    as in the field). Computed in float64 on the host and returned in the input's type. ValueError for a wrong width.
    """
    if not isinstance(features, np.ndarray):
        import torch  # only when a tensor comes in: data preparation does without torch's start-up time
        joints = features_to_joints(features.detach().cpu().to(torch.float64).numpy(), n_joints)
        return torch.from_numpy(joints).to(features)
    if features.shape[-1] != 12 * n_joints - 1:
        raise ValueError(f'expected features of width {12 * n_joints - 1} for {n_joints} joints, found {features.shape[-1]}')
    x = features.astype(np.float64)
    # velocities move from frame t to t + 1: integrate with a zero in front
    shifted = np.concatenate([np.zeros_like(x[..., :1, :3]), x[..., :-1, :3]], -2)
    angle = 2 * np.cumsum(shifted[..., 0], -1)[..., None]      # feature 0 is the half-angle
    cos, sin = np.cos(angle), np.sin(angle)

    def to_world(px, pz, c, s):  # rotation by -angle about Y
        return c * px - s * pz, s * px + c * pz

    vx, vz = to_world(shifted[..., 1], shifted[..., 2], cos[..., 0], sin[..., 0])
    root_x, root_z = np.cumsum(vx, -1)[..., None], np.cumsum(vz, -1)[..., None]
    local = x[..., 4:4 + 3 * (n_joints - 1)].reshape(*x.shape[:-1], n_joints - 1, 3)
    px, pz = to_world(local[..., 0], local[..., 2], cos, sin)
    joints = np.empty((*x.shape[:-1], n_joints, 3))
    joints[..., 0, :] = np.concatenate([root_x, x[..., 3:4], root_z], -1)
    joints[..., 1:, :] = np.stack([px + root_x, local[..., 1], pz + root_z], -1)
    return joints.astype(features.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# BVH in


def read_bvh(file):
    """A BVH motion file -> (names, parents, offsets (J, 3), channels, frames (T, C), fps), in the file's own units.

    file: a path, or (name, bytes) when the bytes are at hand (an archive's member). channels holds one tuple of channel
    names per joint; end sites are left out. ValueError, one sentence naming the file, for anything that does not parse.
    """
    if isinstance(file, tuple):
        file, data = file
    else:
        with open(file, 'rb') as f:
            data = f.read()
    head, motion_word, body = data.partition(b'MOTION')
    if not head.lstrip().startswith(b'HIERARCHY') or not motion_word:
        raise ValueError(f'{file} is not a BVH file: it lacks the words HIERARCHY and MOTION; export it as BVH again')
    names, parents, offsets, channels = [], [], [], []
    block, open_blocks = None, []  # joint number of each open brace; None for an end site
    words = iter(head.decode('latin-1').split()[1:])
    try:
        for word in words:
            if word in ('ROOT', 'JOINT'):
                block = len(names)
                names.append(next(words))
                parents.append(open_blocks[-1] if open_blocks else -1)
                offsets.append([0.0, 0.0, 0.0])
                channels.append(())
            elif word == 'End':
                next(words)
                block = None
            elif word == '{':
                open_blocks.append(block)
            elif word == '}':
                open_blocks.pop()
            elif word == 'OFFSET':
                offset = [float(next(words)) for _ in range(3)]
                if open_blocks[-1] is not None:
                    offsets[open_blocks[-1]] = offset
            elif word == 'CHANNELS':
                channels[open_blocks[-1]] = tuple(next(words).lower() for _ in range(int(next(words))))
            else:
                raise ValueError(word)
        known = all(re.fullmatch('([xyz]position)*([xyz]rotation){0,3}', ''.join(c)) for c in channels)
        if not known or not names or open_blocks or not np.isfinite(offsets).all():
            raise ValueError('channels or braces')
    except (ValueError, StopIteration, IndexError, TypeError, RuntimeError):
        raise ValueError(f'{file} has a HIERARCHY that cannot be read (after {len(names)} joints); '
                         'export it as BVH again') from None
    match = re.match(rb'\s*Frames:\s*(\d+)\s+Frame\s+Time:\s*(\d*\.?\d+(?:[eE][+-]?\d+)?)', body)
    if not match or not float(match[2]) > 0:
        raise ValueError(f'{file} has no "Frames:" and "Frame Time:" lines after MOTION; export it as BVH again')
    expected, width = int(match[1]), sum(map(len, channels))
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # numpy only warns when text stops being numbers
        try:
            values = np.fromstring(body[match.end():], dtype=np.float64, sep=' ')
        except (DeprecationWarning, ValueError):
            raise ValueError(f'{file} has text that is not a number in its MOTION block; repair or drop the file') from None
    if values.size != expected * width or not np.isfinite(values).all():
        found = f'{values.size / max(width, 1):.4g} frames' if np.isfinite(values).all() else 'NaN or infinity'
        raise ValueError(f'{file} holds {found} where its header promises {expected} frames of {width} numbers; '
                         'it is truncated or damaged: copy it again')
    return names, np.array(parents), np.array(offsets), channels, values.reshape(expected, width), 1 / float(match[2])


def bvh_to_joints(parents, offsets, channels, frames):
    """Forward kinematics of what `read_bvh` returns: world joint positions (T, J, 3), in the file's units.

    Position channels replace a joint's OFFSET; rotations (degrees) multiply in the order in which they are listed.
    """
    T, J = len(frames), len(parents)
    local = np.broadcast_to(offsets, (T, J, 3)).copy()
    angles, axes = np.zeros((T, J, 3)), np.zeros((J, 3), dtype=int)
    column = 0
    for j, joint_channels in enumerate(channels):
        turns = 0
        for channel in joint_channels:
            axis = 'xyz'.index(channel[0])
            if channel.endswith('position'):
                local[:, j, axis] = frames[:, column]
            else:
                angles[:, j, turns], axes[j, turns] = np.deg2rad(frames[:, column]), axis
                turns += 1
            column += 1
    cos, sin = np.cos(angles), np.sin(angles)
    elementary = np.zeros((T, J, 3, 3, 3))
    j, k = np.indices((J, 3))
    second, third = (axes + 1) % 3, (axes + 2) % 3
    elementary[:, j, k, axes, axes] = 1
    elementary[:, j, k, second, second] = elementary[:, j, k, third, third] = cos
    elementary[:, j, k, second, third], elementary[:, j, k, third, second] = -sin, sin
    rotation = elementary[:, :, 0] @ elementary[:, :, 1] @ elementary[:, :, 2]
    joints = np.empty((T, J, 3))
    for j, parent in enumerate(parents):
        if parent < 0:
            joints[:, j] = local[:, j]
        else:
            joints[:, j] = joints[:, parent] + (rotation[:, parent] @ local[:, j, :, None])[..., 0]
            rotation[:, j] = rotation[:, parent] @ rotation[:, j]
    return joints


def resample(joints, fps, new_fps):
    """Linear interpolation in time of (T, J, 3) from one frame rate to another."""
    at = np.arange(0, len(joints) - 1 + 1e-6, fps / new_fps)
    before = np.minimum(at.astype(int), len(joints) - 2)
    share = (at - before)[:, None, None]
    return joints[before] * (1 - share) + joints[before + 1] * share


# ---------------------------------------------------------------------------------------------------------------------
# The packed format: data/<name>/ holds meta.json, mean.npy, std.npy (D,) and per split
#   <split>_motion.npy     float32 (frames, D), all clips end to end, not normalised, opened as a memory map
#   <split>_clips.npz      start, length (clips,) int64; name (clips,) text
#   <split>_captions.json  [{"clip": 0, "text": "a person walks", "tokens": "a/DET person/NOUN walk/VERB"}, ...]

STD_FLOOR = 1e-3  # a feature that never varies is divided by this, not by zero; real groups lie above 0.01


@dataclass
class Split:
    features: np.ndarray  # (frames, D) float32, a read-only memory map
    start: np.ndarray     # (clips,) int64
    length: np.ndarray    # (clips,) int64
    names: np.ndarray     # (clips,) str
    captions: list        # dicts with clip, text, tokens (toy: script too)

    def __len__(self):
        return len(self.start)

    def clip(self, i):
        """Features (T, D) of clip i."""
        return self.features[self.start[i]:self.start[i] + self.length[i]]


def save_split(dir, split, clips, captions):
    """Write one split; returns its counts, {} (and no file) if there are no clips.

    clips: any iterable of (name, features (T, D)), written as it is read, so that a large set never has to fit in memory.
    captions: a list of dicts with clip (index), text and tokens, which may still grow while clips are being read.
    """
    path = os.path.join(dir, f'{split}_motion.npy')
    names, length, dim = [], [], 0

    def header():  # numpy pads it to the same size whatever the number of frames: the true one goes in at the end
        np.lib.format.write_array_header_1_0(f, dict(descr='<f4', fortran_order=False, shape=(sum(length), dim)))

    with open(path, 'wb') as f:
        for name, features in clips:
            dim = features.shape[1]
            if not names:
                header()
            f.write(np.ascontiguousarray(features, dtype='<f4').data)
            names.append(name)
            length.append(len(features))
        f.seek(0)
        header()
    if not names:
        os.remove(path)
        return {}
    length = np.array(length, dtype=np.int64)
    np.savez(os.path.join(dir, f'{split}_clips.npz'), start=np.cumsum(length) - length, length=length, name=np.array(names))
    with open(os.path.join(dir, f'{split}_captions.json'), 'w', encoding='utf-8') as f:
        json.dump(captions, f, ensure_ascii=False)
    return dict(clips=len(names), frames=int(length.sum()), captions=len(captions))


def save_meta(dir, meta, mean, std):
    """Write meta.json and the statistics; std is floored at STD_FLOOR."""
    np.save(os.path.join(dir, 'mean.npy'), np.asarray(mean, dtype=np.float32))
    np.save(os.path.join(dir, 'std.npy'), np.maximum(std, STD_FLOOR).astype(np.float32))
    with open(os.path.join(dir, 'meta.json'), 'w') as f:
        json.dump(meta, f, indent=1)


def mean_std(features, n_joints):
    """Mean and std (D,) of flat features (frames, D); std is averaged within each group of features that share a unit
    (yaw, xz velocity, height, positions, rotations, velocities, contacts), as HumanML3D does."""
    chunks = [features[i:i + 16384] for i in range(0, len(features), 16384)]
    mean = sum(c.sum(0, dtype=np.float64) for c in chunks) / len(features)
    square = sum(np.square(c - mean.astype(np.float32)).sum(0, dtype=np.float64) for c in chunks)
    J = n_joints
    groups = np.split(np.sqrt(square / len(features)), np.cumsum([1, 2, 1, (J - 1) * 3, (J - 1) * 6, J * 3]))
    return mean, np.concatenate([np.full(len(g), g.mean()) for g in groups])


def load_meta(dir):
    """-> (meta dict, mean (D,), std (D,)) of a prepared data set. FileNotFoundError names the command that makes it."""
    try:
        with open(os.path.join(dir, 'meta.json')) as f:
            return json.load(f), np.load(os.path.join(dir, 'mean.npy')), np.load(os.path.join(dir, 'std.npy'))
    except FileNotFoundError:
        name = os.path.basename(os.path.normpath(dir))
        raise FileNotFoundError(f'{dir} holds no prepared data; run `python prepare_data.py {name}` first') from None


def load_split(dir, split):
    """Open one split of a prepared data set. FileNotFoundError where it is missing, ValueError for a width other than
    meta.json's or a NaN in the features, each one sentence that says what to do."""
    meta = load_meta(dir)[0]
    again = f'run `python prepare_data.py {meta["name"]}` again'
    motion_file = os.path.join(dir, f'{split}_motion.npy')
    if not os.path.exists(motion_file):
        raise FileNotFoundError(f'{dir} has no split "{split}" (it has {", ".join(meta["counts"])}); {again}')
    features = np.load(motion_file, mmap_mode='r')
    if features.ndim != 2 or features.shape[1] != meta['dim']:
        raise ValueError(f'{motion_file} has shape {features.shape} where meta.json says width {meta["dim"]}; {again}')
    for i in range(0, len(features), 65536):  # a sum is NaN or infinite if one of its terms is: no array of flags
        if not np.isfinite(features[i:i + 65536].sum()):
            raise ValueError(f'{motion_file} holds NaN or infinity in frames {i} to {i + 65535}; {again}')
    with np.load(os.path.join(dir, f'{split}_clips.npz')) as clips:
        start, length, names = clips['start'], clips['length'], clips['name']
    with open(os.path.join(dir, f'{split}_captions.json'), encoding='utf-8') as f:
        captions = json.load(f)
    return Split(features, start, length, names, captions)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing: perspective by numpy, polygons and lines by Pillow at twice the size, then halved (antialiasing)

SIDE_COLOURS = {'left': (38, 116, 190), 'right': (222, 82, 62), 'middle': (62, 66, 82)}
BACKGROUND, TILES = (250, 250, 248), ((228, 231, 236), (240, 242, 244))
SHADOW, PATH, INK = (196, 200, 208), (240, 178, 60), (40, 42, 54)


def _blend(a, b, share):
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b))


class _Scene:
    """One motion (T, J, 3) ready to be drawn frame by frame at width x height pixels, by a camera that follows the root."""

    def __init__(self, joints, width, height):
        joints = np.asarray(joints, dtype=np.float64)
        self.skeleton = next((s for s in SKELETONS.values() if s.n_joints == joints.shape[1]), None)
        if self.skeleton is None or not np.isfinite(joints).all():
            raise ValueError(f'cannot draw joints of shape {joints.shape}: expected finite (T, 22 or 21, 3)')
        self.joints = joints / self.skeleton.units_per_metre
        self.width, self.height = 2 * width, 2 * height
        root = self.joints[:, 0]
        top = max(1.2, self.joints[..., 1].max())
        self.target = _smooth(root * [1, 0, 1], 4) + [0, top / 2, 0]
        reach = np.abs(self.joints[..., [0, 2]] - self.target[:, None, [0, 2]]).max()
        tall = max(top + 0.3, 2.1 * reach * height / width)
        azimuth, elevation, self.distance = np.deg2rad(32), np.deg2rad(16), 6.0
        back = np.array([np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)])
        right = np.array([np.cos(azimuth), 0, -np.sin(azimuth)])
        self.axes = np.stack([right, np.cross(back, right), back])  # camera x, y, towards the camera
        self.zoom = 0.84 * self.height / tall * self.distance

    def project(self, points, t):
        """World (..., 3) -> pixels (..., 2) and the scale in pixels per metre (...)."""
        x, y, z = np.moveaxis((points - self.target[t]) @ self.axes.T, -1, 0)
        scale = self.zoom / np.maximum(self.distance - z, 0.5)
        return np.stack([self.width / 2 + x * scale, self.height * 0.5 - y * scale], -1), scale

    def draw(self, t):
        """Frame t as an RGB image."""
        image = Image.new('RGB', (self.width, self.height), BACKGROUND)
        pen = ImageDraw.Draw(image)
        # checkerboard of half-metre tiles around the camera's target, fading with distance
        centre = self.target[t, [0, 2]]
        first = np.floor(centre / 0.5).astype(int) - 7
        corners = np.zeros((16, 16, 3))
        corners[..., 0] = (first[0] + np.arange(16))[:, None] * 0.5
        corners[..., 2] = (first[1] + np.arange(16))[None] * 0.5
        pixels, _ = self.project(corners, t)
        for a in range(15):
            for b in range(15):
                away = np.hypot(*(corners[a, b, [0, 2]] + 0.25 - centre)) / 3.4
                if away < 1:
                    colour = _blend(TILES[(first.sum() + a + b) % 2], BACKGROUND, round(away ** 2 * 6) / 6)
                    pen.polygon([tuple(pixels[i, j]) for i, j in ((a, b), (a + 1, b), (a + 1, b + 1), (a, b + 1))], colour)
        ground = self.joints[:, 0] * [1, 0, 1]
        near = np.abs(ground - ground[t]).max(-1) < 4  # a path behind the camera has no picture
        for span, colour in ((slice(t, None), _blend(PATH, BACKGROUND, 0.6)), (slice(0, t + 1), PATH)):
            points = [tuple(p) for p in self.project(ground[span][near[span]], t)[0]]
            if len(points) > 1:
                pen.line(points, colour, 5, joint='curve')

        pose, parents = self.joints[t], self.skeleton.parents
        flat, scale = self.project(pose * [1, 0, 1], t)
        for j in range(1, len(pose)):
            self.limb(pen, flat[parents[j]], flat[j], 0.05 * scale[j], SHADOW)
        pixels, scale = self.project(pose, t)
        depth = pose @ self.axes[2]
        for j in sorted(range(1, len(pose)), key=lambda j: depth[j] + depth[parents[j]]):
            name = self.skeleton.names[j]
            side = name.split('_')[0] if '_' in name else 'middle'
            thick = (0.06 if side == 'middle' else 0.05) * scale[j]
            pen.line((*pixels[parents[j]], *pixels[j]), BACKGROUND, round(thick + 5))  # a rim separates crossing limbs
            self.limb(pen, pixels[parents[j]], pixels[j], thick, SIDE_COLOURS[side])
            if name == 'head':
                for radius, colour in ((0.1 * scale[j] + 2.5, BACKGROUND), (0.1 * scale[j], SIDE_COLOURS['middle'])):
                    x, y = pixels[j] + (pixels[j] - pixels[parents[j]]) * 0.3
                    pen.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
        return image.reduce(2)

    @staticmethod
    def limb(pen, a, b, thick, colour):
        pen.line((*a, *b), colour, round(thick))
        for x, y in (a, b):
            r = thick / 2
            pen.ellipse((x - r, y - r, x + r, y + r), colour)


def _write(image, box, text, size, colour=INK):
    """Text centred and wrapped in box = (left, top, width); returns the height used."""
    font = ImageFont.load_default(size)
    lines = textwrap.wrap(text, max(8, int(box[2] / (0.5 * size)))) or ['']
    if image is not None:
        for i, line in enumerate(lines):
            ImageDraw.Draw(image).text((box[0] + box[2] / 2, box[1] + (i + 0.5) * 1.25 * size), line, colour, font, 'mm')
    return math.ceil(len(lines) * 1.25 * size)


def _palette():
    """Every colour above and its blends with what lies behind it: small files, no flicker from frame to frame."""
    fades = [_blend(tile, BACKGROUND, i / 6) for tile in TILES for i in range(7)]
    inks = [*SIDE_COLOURS.values(), SHADOW, PATH, _blend(PATH, BACKGROUND, 0.6), INK]
    colours = fades + [_blend(ink, BACKGROUND, i / 4) for ink in inks for i in range(4)]
    image = Image.new('P', (1, 1))
    image.putpalette(sum(colours, ()))
    return image


def _save_gif(frames, path, fps):
    palette = _palette()
    frames = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0, optimize=True)


def draw_gif(joints, path, caption, fps=None, size=(320, 340)):
    """Animate joints (T, J, 3) as a GIF: left blue, right red, root path yellow, caption above. fps: the skeleton's."""
    scene = _Scene(joints, *size)
    top = _write(None, (0, 0, size[0] - 20), caption, 15) + 16
    frames = []
    for t in range(len(joints)):
        frame = Image.new('RGB', (size[0], size[1] + top), BACKGROUND)
        frame.paste(scene.draw(t), (0, top))
        _write(frame, (10, 10, size[0] - 20), caption, 15)
        ImageDraw.Draw(frame).rectangle((0, frame.height - 3, size[0] * (t + 1) / len(joints), frame.height), PATH)
        frames.append(frame)
    _save_gif(frames, path, fps or scene.skeleton.fps)


def draw_strip(joints, path, caption, n_poses=8, size=(150, 200)):
    """Poses of joints (T, J, 3) at n_poses equal steps of time, side by side, with seconds below; returns the image and
    writes it to path unless that is None."""
    scene = _Scene(joints, *size)
    width = size[0] * n_poses
    top = _write(None, (0, 0, width - 20), caption, 16) + 14 if caption else 0
    strip = Image.new('RGB', (width, top + size[1] + 20), BACKGROUND)
    _write(strip, (10, 8, width - 20), caption, 16)
    for i, t in enumerate(np.linspace(0, len(joints) - 1, n_poses).round().astype(int)):
        strip.paste(scene.draw(t), (i * size[0], top))
        _write(strip, (i * size[0], top + size[1], size[0]), f'{t / scene.skeleton.fps:.1f} s', 12, _blend(INK, BACKGROUND, 0.4))
    if path is not None:
        strip.save(path)
    return strip


def draw_grid(motions, path, columns=3, fps=10, size=(210, 230)):
    """[(caption, joints (T, J, 3))] in one picture: path .gif animates them side by side at fps (a short one holds its last
    pose), any other suffix gives each a strip of poses, one below the other."""
    if not path.endswith('.gif'):
        strips = [draw_strip(joints, None, caption, size=(size[0] * 3 // 5, size[1] * 3 // 4)) for caption, joints in motions]
        sheet = Image.new('RGB', (strips[0].width, sum(s.height for s in strips)), BACKGROUND)
        top = 0
        for strip in strips:
            sheet.paste(strip, (0, top))
            top += strip.height
        sheet.save(path)
        return
    scenes = [_Scene(joints, *size) for _, joints in motions]
    top = max(_write(None, (0, 0, size[0] - 10), caption, 13) for caption, _ in motions) + 8
    rows = -(-len(motions) // columns)
    frames = []
    for second in np.arange(0, max(len(s.joints) / s.skeleton.fps for s in scenes), 1 / fps):
        sheet = Image.new('RGB', (size[0] * columns, (size[1] + top) * rows), BACKGROUND)
        for i, (scene, (caption, _)) in enumerate(zip(scenes, motions)):
            x, y = i % columns * size[0], i // columns * (size[1] + top)
            sheet.paste(scene.draw(min(round(second * scene.skeleton.fps), len(scene.joints) - 1)), (x, y + top))
            _write(sheet, (x + 5, y + 6, size[0] - 10), caption, 13)
        frames.append(sheet)
    _save_gif(frames, path, fps)
