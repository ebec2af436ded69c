"""Other people's motion as the body that everything else here works with.

`read_take` is the one door: a BVH file, joint positions or features (.npy, .npz) -> joints
(T, 22, 3) of SMPL in metres, y up. It finds joints by their names, the unit by the length of the
legs and the axes by the body itself, for each file on its own, and then looks at the result. It
refuses what is no human body, in a sentence that names the setting that would help.
"""
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy.interpolate import interp1d

from lib.bvh import bvh_to_joints, read_bvh
from lib.configurator import ROOT, UserError
from lib.data import LARGEST
from lib.motion import (SKELETONS, features_to_joints, joints_to_features, mirror, resample,
                        unit_vectors)
from lib.runtime import read, read_array, read_json

SMPL = SKELETONS['smpl22']
KIT = SKELETONS['kit21']
JOINT_NAMES = json.loads(Path(ROOT, 'config', 'joint_names.json').read_text(encoding='utf-8'))
del JOINT_NAMES['about']
SUFFIXES = ('.bvh', '.npy', '.npz')
MAX_FRAMES = 196   # the longest motion of HumanML3D, 49 tokens

UNITS = {'m': 1.0, 'cm': 0.01, 'mm': 0.001, 'inch': 0.0254}
CMU_UNIT = 0.0254 / 0.45           # metres; the CMU database scales inches by 0.45
LEG = (0.5, 1.3)                   # metres from hip to ankle along the bones: children to giants
MAY_BE_MISSING = {'spine1', 'spine2', 'spine3', 'neck', 'left_collar', 'right_collar'}
LIMBS = {'thigh': ('hip', 'knee'), 'shin': ('knee', 'ankle'),
         'upper arm': ('shoulder', 'elbow'), 'forearm': ('elbow', 'wrist')}
# where x, y, z of a body that is y up come from, without a change of handedness
AXES = {'y': 'x y z', 'z': 'x z -y', '-y': 'x -y -z', '-z': 'x -z y', 'x': '-y x z', '-x': 'y -x z'}


@dataclass
class TakeSettings:
    """How to read a file, where it should not be found out."""
    joints: dict = field(default_factory=dict)   # our joint -> its name, or number in an array
    unit: float = 0.0                            # metres
    up: str = ''                                 # a key of AXES
    root: str = ''                               # of several people: a root's name, or 1, 2, ...


@dataclass
class Take:
    joints: np.ndarray   # (T, J, 3) metres, y up
    notes: list          # how it was read and what was mended, without the numbers of this file
    unused: set          # names of TakeSettings.joints that the file has not


def take_settings(joints='', unit='', up='', root=''):
    """The text of --joints (a json file), --unit, --up and --root -> TakeSettings."""
    try:
        metres = UNITS.get(unit) or float(unit or 0)
        if not 0 <= metres < math.inf:
            raise ValueError
    except ValueError:
        raise UserError(f"--unit is '{unit}', expected {', '.join(UNITS)} or a number of metres"
                        ) from None
    if up and up not in AXES:
        raise UserError(f"--up is '{up}', expected {', '.join(AXES)}")
    return TakeSettings(read_joint_map(joints) if joints else {}, metres, up, root)


def read_joint_map(path):
    """A json file {our joint: name in the files, or number in arrays} -> the same, as text."""
    names = read_json(path, 'config/joint_names.json shows what is expected')
    known = set(SMPL.names) | set(KIT.names)
    if not isinstance(names, dict) or not set(names) <= known or not all(
            isinstance(name, (str, int)) for name in names.values()):
        wrong = sorted(set(names) - known) if isinstance(names, dict) else [names]
        raise UserError(f'{path} has {wrong[:1] or "other values"}, expected names or numbers of '
                        f'joints for {", ".join(SMPL.names)}')
    return {ours: str(theirs) for ours, theirs in names.items()}


# ---------------------------------------------------------------------------------- which is which


def _lower(name):
    """A name in small letters, without its namespace: 'mixamorig:LeftUpLeg' -> 'leftupleg'."""
    return re.sub(r'^.*[:|]', '', name.lower())


def _shared_prefix(names):
    """The longest prefix, up to a mark, of at least three quarters of the names: 'bip01 '."""
    names = [_lower(name) for name in names]
    counts = Counter(name[:mark.end()] for name in names for mark in re.finditer(r'[\W_]+', name))
    return max((prefix for prefix, n in counts.items() if n >= 0.75 * len(names)), key=len,
               default='')


def _bare(name, prefix):
    """A name without prefix, case and marks: 'Bip01 L UpperArm' -> 'lupperarm'."""
    return re.sub(r'^mixamorig\d*|[\W_]', '', _lower(name).removeprefix(prefix))


def find_joints(names, tables, extra=(), skeleton=SMPL):
    """Names of a file's joints -> {our joint: its index}, the table that fits best, our joints that
    have no place, and the names in `extra` that the file has not.

    tables: {whose: {our joint: their name, or a list}}. extra: a table that adds to all of them.
    """
    prefix = _shared_prefix(names)
    at = {}
    for i, name in enumerate(names):
        at.setdefault(_bare(name, prefix), i)
    exact = {name: i for i, name in reversed(list(enumerate(names)))}

    def index(name):
        return exact.get(name, at.get(_bare(name, prefix)))

    given = {ours: index(theirs) for ours, theirs in dict(extra).items()}
    unused = {extra[ours] for ours, i in given.items() if i is None}
    results = []
    for whose, table in tables.items():
        found = {}
        for ours, theirs in table.items():
            theirs = [theirs] if isinstance(theirs, str) else theirs
            found[ours] = next((i for i in map(index, theirs) if i is not None), None)
        n_missing = list(found.values()).count(None)
        found.update((ours, i) for ours, i in given.items() if i is not None)
        found = {ours: i for ours, i in found.items() if i is not None and ours in skeleton.names}
        lost = [name for name in skeleton.names if name not in found and name not in MAY_BE_MISSING]
        results.append((len(lost), n_missing, -len(found), len(results), found, whose, lost))
    *_, found, whose, lost = min(results)
    return found, whose, lost, unused


def place_joints(world, found, skeleton=SMPL):
    """A file's joints (..., N, 3) and {our joint: index} -> ours (..., J, 3). What is missing of
    spine, neck and collars is put on the line between its neighbours in the chain."""
    joints = np.full((*world.shape[:-2], skeleton.n_joints, 3), np.nan)
    for ours, i in found.items():
        joints[..., skeleton.names.index(ours), :] = world[..., i, :]
    for chain in map(list, skeleton.chains):
        there = [k for k, j in enumerate(chain) if np.isfinite(joints[..., j, :]).all()]
        between = interp1d(there, joints[..., [chain[k] for k in there], :], axis=-2)
        joints[..., chain, :] = between(range(len(chain)))
    return joints


# ------------------------------------------------------------------------------- what is in a file


def _read_array_file(path):
    """An .npy or .npz file -> names of joints, joints (T, J, 3), fps or None."""
    fps = None
    if path.suffix.lower() == '.npz':
        arrays = read(path, 'expected joints (T, J, 3)', lambda path: dict(np.load(path)))
        usable = [key for key, a in arrays.items() if a.ndim == 3 and a.shape[2] == 3
                  or a.ndim == 2 and a.shape[1] in (SMPL.dim, KIT.dim)]
        key = 'joints' if 'joints' in usable else usable[0] if len(usable) == 1 else None
        if key is None:
            raise UserError(f'{path} holds {", ".join(arrays) or "nothing"}, expected one array of '
                            'joints (T, J, 3): save them as "joints" (parameters of a body model '
                            'are not joints)')
        for rate in ('fps', 'mocap_framerate', 'mocap_frame_rate'):
            if rate in arrays and arrays[rate].size == 1 and float(arrays[rate].item()) > 0:
                fps = float(arrays[rate].item())
        array = arrays[key]
    else:
        array = read_array(path, 'expected joints or features as .npy')
    skeleton = {SMPL.dim: SMPL, KIT.dim: KIT}.get(array.shape[-1]) if array.ndim == 2 else None
    if skeleton:
        joints = features_to_joints(array.astype(np.float64), skeleton.n_joints)
        return list(skeleton.names), joints, skeleton.fps
    if array.ndim != 3 or array.shape[2] != 3:
        raise UserError(f'{path} has shape {array.shape}, expected joints (T, J, 3) or features '
                        f'(T, {SMPL.dim}) or (T, {KIT.dim})')
    order = KIT.names if array.shape[1] == KIT.n_joints else SMPL.names   # SMPL-H and -X are longer
    names = [*order, *map(str, range(len(order), array.shape[1]))][:array.shape[1]]
    return names, array.astype(np.float64), fps


def _read_joints(path, settings, skeleton, notes):
    """A file -> our joints (T, J, 3) in its unit and axes; the joints (J, 3) of its rest pose, None
    without one; fps or None; whose names; names of the map that it has not."""
    rest = None
    extra = settings.joints
    tables = JOINT_NAMES
    if path.suffix.lower() == '.bvh':
        names, parents, offsets, channels, frames, fps = read_bvh(str(path), notes)
        world = bvh_to_joints(parents, offsets, channels, frames)
        rest = np.zeros_like(offsets)
        for j, parent in enumerate(parents):
            rest[j] = offsets[j] + (rest[parent] if parent >= 0 else 0)
        roots = np.flatnonzero(parents < 0)
        if len(roots) > 1:
            person = _one_person(path, names, roots, settings, skeleton)
            names, world, rest = names[person], world[:, person], rest[person]
            notes.append(f'one root of {len(roots)} was used')
    else:
        names, world, fps = _read_array_file(path)
        tables = {'their order': {name: name for name in (*SMPL.names, *KIT.names)}}
        extra = {ours: names[int(i)] if i.isdecimal() and int(i) < len(names) else i
                 for ours, i in extra.items()}
    if len(world) < 2 or not (np.abs(world) < LARGEST).all():
        raise UserError(f'{path} holds a single frame, NaN, infinity or huge numbers in its joints')

    found, whose, lost, unused = find_joints(names, tables, extra, skeleton)
    if lost:
        strange = f' (it has no {", ".join(sorted(unused))} of --joints either)' if unused else ''
        raise UserError(f'{path} has no {", ".join(lost)} among its joints {", ".join(names[:4])} '
                        f'...{strange}, with {whose} as the nearest known names: give '
                        '--joints=map.json with their names')
    guessed = [name for name in skeleton.names if name not in found]
    between = f', {", ".join(guessed)} put between their neighbours' if guessed else ''
    notes.append(f'joints found by {whose}{between}')
    return (place_joints(world, found, skeleton),
            None if rest is None else place_joints(rest, found, skeleton), fps, whose, unused)


def _one_person(path, names, roots, settings, skeleton):
    """The joints (a slice) below one of several roots: the one that is asked for, or the only one
    with a whole body."""
    people = [slice(*ends) for ends in pairwise([*roots, len(names)])]
    whole = [i for i, person in enumerate(people)
             if not find_joints(names[person], JOINT_NAMES, settings.joints, skeleton)[2]]
    if settings.root:
        whole = [i for i in range(len(people))
                 if settings.root in (str(i + 1), names[roots[i]])]
    if len(whole) != 1:
        listed = ', '.join(f'{i + 1} {names[root]}' for i, root in enumerate(roots))
        raise UserError(f'{path} has several roots ({listed}), expected one person: say which with '
                        '--root=1, --root=2 ...')
    return people[whole[0]]


# --------------------------------------------------------------------------- unit, axes, the look


def upright(joints, up):
    """Joints (..., 3) whose axis `up` points up -> with y up."""
    columns = [joints[..., 'xyz'.index(axis[-1])] * (-1 if axis[0] == '-' else 1)
               for axis in AXES[up].split()]
    return np.stack(columns, -1)


def _body(joints, skeleton):
    """Joints (..., J, 3) -> a function of a joint's name, and the unit vectors (..., 3) from feet
    to head and to the left."""
    def at(name):
        return joints[..., skeleton.names.index(name), :]

    ankles = (at('left_ankle') + at('right_ankle')) / 2
    axis = unit_vectors(unit_vectors(at('head') - at('pelvis'))
                        + unit_vectors(at('pelvis') - ankles))
    left = unit_vectors(at('left_hip') - at('right_hip') + at('left_shoulder')
                        - at('right_shoulder'))
    return at, axis, left


def _limb_lengths(joints, skeleton):
    """{(limb, side): lengths (T,)}"""
    at, _, _ = _body(joints, skeleton)
    return {(limb, side): np.linalg.norm(at(f'{side}_{start}') - at(f'{side}_{end}'), axis=-1)
            for limb, (start, end) in LIMBS.items() for side in ('left', 'right')}


def _find_unit(path, joints, skeleton, whose, given):
    """-> name and metres of the unit that is given, or else in which legs are as long as a
    person's."""
    lengths = _limb_lengths(joints, skeleton)
    leg = np.median([lengths['thigh', side] + lengths['shin', side] for side in ('left', 'right')])
    units = {'units of the CMU database': CMU_UNIT, **UNITS} if whose == 'CMU' else UNITS
    for name, metres in {'the given unit': given}.items() if given else units.items():
        if LEG[0] <= leg * metres <= LEG[1]:
            return name, metres
    raise UserError(f'{path} has legs of {leg:.3g} units, expected {LEG[0]} to {LEG[1]} m'
                    f'{f" ({given:g} m each)" if given else ""}: give --unit, or --joints=map.json')


def _axis_of(direction):
    """A direction (3,) -> the key of AXES that is nearest."""
    i = np.abs(direction).argmax()
    return ('-' if direction[i] < 0 else '') + 'xyz'[i]


def _find_up(joints, rest, skeleton):
    """The axis that points up, None if the body does not tell. The rest pose decides where it is a
    standing body, so that a lying one stays lying. Otherwise the frames: a body is upright most of
    the time, and at the beginning. Without a rest pose only y and z are up, or y down."""
    if rest is not None:
        at, axis, _ = _body(rest, skeleton)
        up = _axis_of(axis)
        feet, hips, head = (upright(at(name), up)[1] for name in ('left_ankle', 'pelvis', 'head'))
        if axis @ unit_vectors(axis.round()) > 0.9 and feet < hips < head:
            return up
    _, axis, _ = _body(joints, skeleton)
    scores = {}
    for up in ('y', 'z', '-y'):
        is_up = upright(axis, up)[:, 1] > 0.6
        scores[up] = is_up.mean() + 0.3 * is_up[0] if is_up.mean() > 0.1 else 0
    scores['y'] += 0.1 * (scores['y'] > 0)
    best = max(scores, key=scores.get)
    return best if scores[best] and (best != '-y' or scores[best] > 1) else None


def _t_pose_frames(joints, skeleton):
    """How many frames at the beginning are a T-pose that the next frame has left abruptly."""
    at, axis, left = _body(joints, skeleton)
    arms = np.stack([unit_vectors(at(f'{side}_wrist') - at(f'{side}_shoulder'))
                     for side in ('left', 'right')], 1)
    legs = np.stack([unit_vectors(at(f'{side}_hip') - at(f'{side}_ankle'))
                     for side in ('left', 'right')], 1)
    sideways = (arms * np.stack([left, -left], 1)).sum(-1).min(-1) > 0.9
    is_t = sideways & ((legs * axis[:, None]).sum(-1).min(-1) > 0.85)
    n = len(is_t) if is_t.all() else is_t.argmin()
    if 0 < n < len(is_t) - 1 and (arms[n - 1] * arms[n]).sum(-1).min() < math.cos(math.radians(15)):
        return n
    return 0


def _what_is_wrong(joints, skeleton):
    """Joints (T, J, 3), metres, y up -> what is no human body about them and which setting would
    help, '' if nothing."""
    lengths = _limb_lengths(joints, skeleton)
    middle = {key: 100 * max(np.median(length), 1e-9) for key, length in lengths.items()}
    help_of = 'give --joints=map.json'
    for limb, most in {'thigh': 1.1, 'shin': 1.1, 'upper arm': 1.25, 'forearm': 1.25}.items():
        left, right = middle[limb, 'left'], middle[limb, 'right']
        if max(left / right, right / left) > most:
            return f'a left {limb} of {left:.1f} cm and a right one of {right:.1f} cm: {help_of}'
    for upper, lower, most in ('thigh', 'shin', 1.7), ('upper arm', 'forearm', 2.5):
        a, b = middle[upper, 'left'], middle[lower, 'left']
        if max(a / b, b / a) > most:
            return f'a {upper} of {a:.1f} cm and a {lower} of {b:.1f} cm: {help_of}'
    for (limb, side), length in lengths.items():
        low, high = 100 * np.percentile(length, [5, 95])
        if high - low > 0.6 * middle[limb, side]:   # generated arms vary by up to 0.4
            return f'a {side} {limb} of {low:.1f} to {high:.1f} cm, not of one length: {help_of}'
    at, axis, _ = _body(joints, skeleton)
    feet = np.linalg.norm(at('left_foot') - at('left_ankle'), axis=-1).mean()
    if feet < 0.02:
        return f'feet of {100 * feet:.1f} cm: {help_of}, with the toes'
    if np.median(axis[:, 1]) < -0.5:
        return 'its head below its feet: give --up'
    return ''


def _toes_ahead(joints, skeleton):
    """-1 to 1: how much the toes point to where the body faces, if axes are right-handed."""
    at, axis, left = _body(joints, skeleton)
    toes = unit_vectors(at('left_foot') - at('left_ankle')
                        + at('right_foot') - at('right_ankle'))
    return np.median((toes * unit_vectors(np.cross(left, axis))).sum(-1))


def read_take(path, settings=TakeSettings(), fps=None, new_fps=SMPL.fps, skeleton=SMPL):
    """One file of motion -> Take: joints in metres, y up, at new_fps.

    path: .bvh; .npy or .npz of joints (T, N, 3), in SMPL's order unless settings.joints says
    otherwise, or of features (T, 263) or (T, 251). fps: of arrays that do not tell it. UserError
    names the file, what is wrong, and the setting that would help.
    """
    path = Path(path)
    notes = []
    joints, rest, own_fps, whose, unused = _read_joints(path, settings, skeleton, notes)

    unit, metres = _find_unit(path, joints, skeleton, whose, settings.unit)
    up = settings.up or _find_up(joints, rest, skeleton)
    if not up:
        raise UserError(f'{path} has a body that is upright along neither y nor z: give --up, the '
                        'axis that points up')
    notes.append(f'{unit}, {up} up')
    joints = upright(joints, up) * metres

    n = _t_pose_frames(joints, skeleton)
    if n:
        joints = joints[n:]
        notes.append(f'a T-pose before the motion left out (frames: {n})')
    wrong = _what_is_wrong(joints, skeleton)
    if wrong:
        raise UserError(f'{path} has {wrong}')
    ahead = _toes_ahead(joints, skeleton)
    if ahead < -0.3:
        joints = joints * [-1, 1, 1]
        notes.append('toes pointed backwards, so axes are left-handed: mirrored (if left and right '
                     'joints are exchanged instead, give --joints)')
    elif ahead < 0.1:
        raise UserError(f'{path} has toes that do not point to where the body faces: give '
                        '--joints=map.json')

    own_fps = own_fps or fps
    if not own_fps:
        raise UserError(f'{path} does not tell its frame rate: give --fps')
    if abs(own_fps - round(own_fps)) < 5e-4 * own_fps:   # frame times have few digits
        own_fps = round(own_fps)
    return Take(resample(joints, own_fps, new_fps), notes, unused)


# ------------------------------------------------------------------------------- clips of a motion


def swap_sides(text):
    """Left for right and right for left, word by word."""
    other = {'left': 'right', 'right': 'left'}
    return re.sub(r'\b(left|right)\b', lambda match: other[match[0]], text)


def cut(name, joints, captions):
    """Joints (T, 22, 3) of a motion and its captions -> [(clip, its mirror image)], each a (name,
    features, captions). Long motion is cut into equal pieces. The name of a mirror image is 'M' +
    name. UserError if the motion is too short."""
    frames = len(joints) - 1   # velocities use up one
    if frames < SMPL.min_frames:
        raise UserError(f'shorter than {SMPL.min_frames} frames')
    swapped = [{key: swap_sides(text) for key, text in c.items()} for c in captions]
    pairs = []
    edges = np.linspace(0, frames, math.ceil(frames / MAX_FRAMES) + 1).astype(int)
    for number, (first, last) in enumerate(pairwise(edges)):
        suffix = f'-{number}' if frames > MAX_FRAMES else ''
        piece = joints[first:last + 1]   # one frame more, for the last velocity
        pair = []
        for mark, body, texts in ('', piece, captions), ('M', mirror(piece, SMPL), swapped):
            features = joints_to_features(body, SMPL, steady=True).astype(np.float32)
            pair.append((mark + name + suffix, features, texts))
        pairs.append(pair)
    return pairs
