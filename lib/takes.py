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
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from scipy.interpolate import interp1d

from lib.bvh import MAX_FPS, bvh_to_joints, read_bvh
from lib.configurator import ROOT, UserError
from lib.data import FRAMES_PER_TOKEN, LARGEST
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
# where x, y, z of a body that is y up come from, without a change of handedness
AXES = {'y': 'x y z', 'z': 'x z -y', '-y': 'x -y -z', '-z': 'x -z y', 'x': '-y x z', '-x': 'y -x z'}

# Joints at the ends of each limb, and how much the left one may differ from the right one and from
# its own length in other frames (5th to 95th percentile). Of 96 motions of the toy model, which has
# no rigid bones, legs vary by up to 0.15 (thigh) and 0.24 (shin), and arms by up to 0.38.
LIMBS = {'thigh': ('hip', 'knee', 0.1, 0.25), 'shin': ('knee', 'ankle', 0.1, 0.35),
         'upper arm': ('shoulder', 'elbow', 0.25, 0.6), 'forearm': ('elbow', 'wrist', 0.25, 0.6)}


class Take(NamedTuple):
    joints: np.ndarray   # (T, J, 3) metres, y up
    notes: list          # how it was read and what was mended, without the numbers of this file
    unused: set          # names of --joints that the file has not


def take_settings(joints='', unit='', up='', root=''):
    """How to read a file, from the texts of --joints (a json file {our joint: its name in a file,
    or its number in an array}), --unit (of UNITS, or metres), --up (of AXES) and --root (of several
    people: the name of a root, or 1, 2 ...). What is '' is found out for each file."""
    try:
        metres = UNITS.get(unit) or float(unit or 0)
    except ValueError:
        metres = math.nan
    if not 0 <= metres < math.inf:
        raise UserError(f"--unit is '{unit}', expected {', '.join(UNITS)} or a number of metres")
    if up and up not in AXES:
        raise UserError(f"--up is '{up}', expected {', '.join(AXES)}")
    names = read_json(joints, 'config/joint_names.json shows what is expected') if joints else {}
    wrong = [names]
    if isinstance(names, dict):
        wrong = [ours for ours, theirs in names.items()
                 if ours not in (*SMPL.names, *KIT.names) or not isinstance(theirs, (str, int))]
    if wrong:
        raise UserError(f'{joints} has {wrong[0]!r:.80}, expected names or numbers of joints for '
                        f'{", ".join(SMPL.names)}')
    names = {ours: str(theirs) for ours, theirs in names.items()}
    return SimpleNamespace(joints=names, unit=metres, up=up, root=root)


# ---------------------------------------------------------------------------------- which is which


def _normalizer(names):
    """-> a function that reduces a name to small letters, without its namespace, a prefix that
    three quarters of `names` share, and marks: 'Bip01 L UpperArm' -> 'lupperarm'."""
    def small(name):
        return re.sub(r'^.*[:|]', '', name.lower())

    counts = Counter(name[:mark.end()] for name in map(small, names)
                     for mark in re.finditer(r'[\W_]+', name))
    shared = [prefix for prefix, n in counts.items() if n >= 0.75 * len(names)]
    prefix = max(shared, key=len, default='')
    return lambda name: re.sub(r'^mixamorig\d*|[\W_]', '', small(name).removeprefix(prefix))


def find_joints(names, tables, extra, skeleton):
    """Names of a file's joints -> the table that fits best, {our joint: its index}, our joints that
    have no place, and the names in `extra` that the file has not.

    tables: {whose: {our joint: their name, or a list}}. extra: a table that adds to all of them.
    """
    bare = _normalizer(names)
    index = {}
    for i, name in [*enumerate(names), *enumerate(map(bare, names))]:
        index.setdefault(name, i)

    def look_up(table):
        found = {}
        for ours, theirs in table.items():
            options = [theirs] if isinstance(theirs, str) else theirs
            for name in reversed(options):
                found[ours] = index.get(name, index.get(bare(name), found.get(ours)))
        return {ours: i for ours, i in found.items() if i is not None}

    given = look_up(extra)
    results = []
    for whose, table in tables.items():
        of_table = look_up(table)
        found = {ours: i for ours, i in (of_table | given).items() if ours in skeleton.names}
        lost = [name for name in skeleton.names if name not in found and name not in MAY_BE_MISSING]
        fit = len(lost), len(table) - len(of_table), -len(found)
        results.append((fit, whose, found, lost))
    _, whose, found, lost = min(results, key=lambda result: result[0])
    return whose, found, lost, {extra[ours] for ours in extra.keys() - given.keys()}


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
    if path.suffix.lower() == '.npy':
        arrays = {'joints': read_array(path, 'expected joints or features as .npy')}
    else:
        arrays = read(path, 'expected joints (T, J, 3)', lambda path: dict(np.load(path)))
        arrays = {key: array for key, array in arrays.items()
                  if isinstance(array, np.ndarray) and array.dtype.kind in 'fi'}
    rates = [arrays[key].item() for key in ('fps', 'mocap_framerate', 'mocap_frame_rate')
             if key in arrays and arrays[key].size == 1 and arrays[key] > 0]

    by_width = {SMPL.dim: SMPL, KIT.dim: KIT}
    usable = {key: array for key, array in arrays.items() if array.ndim == 3
              and array.shape[2] == 3 or array.ndim == 2 and array.shape[1] in by_width}
    if 'joints' not in usable and len(usable) != 1:
        found = ', '.join(f'{key} {array.shape}' for key, array in arrays.items()) or 'no numbers'
        raise UserError(f'{path} holds {found}, expected joints (T, J, 3) or features '
                        f'(T, {SMPL.dim}) or (T, {KIT.dim}) as its only array, or called joints')
    array = usable.get('joints', list(usable.values())[0]).astype(np.float64)
    if array.ndim == 2:
        skeleton = by_width[array.shape[1]]
        return list(skeleton.names), features_to_joints(array, skeleton.n_joints), skeleton.fps
    order = KIT.names if array.shape[1] == KIT.n_joints else SMPL.names   # SMPL-H and -X are longer
    names = [*order, *map(str, range(len(order), array.shape[1]))]
    return names[:array.shape[1]], array, rates[0] if rates else None


def _read_joints(path, settings, skeleton, notes):
    """A file -> our joints (T, J, 3) in its unit and axes; those of its rest pose (1, J, 3), or
    (0, J, 3) without one; fps or None; whose names; names of the map that it has not."""
    extra = settings.joints
    tables = JOINT_NAMES
    if path.suffix.lower() == '.bvh':
        names, parents, offsets, channels, frames, fps = read_bvh(str(path), notes)
        world = bvh_to_joints(parents, offsets, channels, frames)
        rest = bvh_to_joints(parents, offsets, [()] * len(names), frames[:1])
        roots = np.flatnonzero(parents < 0)
        if len(roots) > 1:
            person = _one_person(path, names, roots, settings, skeleton)
            names, world, rest = names[person], world[:, person], rest[:, person]
            notes.append(f'one root of {len(roots)} was used')
    else:
        names, world, fps = _read_array_file(path)
        rest = world[:0]
        tables = {'their order': {name: name for name in (*SMPL.names, *KIT.names)}}
        extra = {ours: names[int(i)] if i.isdecimal() and int(i) < len(names) else i
                 for ours, i in extra.items()}
    if len(world) < 2 or not (np.abs(world) < LARGEST).all():   # false for NaN as well
        raise UserError(f'{path} holds a single frame, NaN, infinity or huge numbers in its joints')

    whose, found, lost, unused = find_joints(names, tables, extra, skeleton)
    if lost:
        strange = f' (it has no {", ".join(sorted(unused))} of --joints either)' if unused else ''
        raise UserError(f'{path} has no {", ".join(lost)} among its joints {", ".join(names[:4])} '
                        f'...{strange}, with {whose} as the nearest known names: give '
                        '--joints=map.json with their names')
    guessed = ', '.join(name for name in skeleton.names if name not in found)
    notes.append(f'joints found by {whose}'
                 + (f', {guessed} put between their neighbours' if guessed else ''))
    poses = place_joints(np.concatenate([rest, world]), found, skeleton)
    return poses[len(rest):], poses[:len(rest)], fps, whose, unused


def _one_person(path, names, roots, settings, skeleton):
    """The joints (a slice) below one of several roots: the one that is asked for, or the only one
    with a whole body."""
    people = [slice(*ends) for ends in pairwise([*roots, len(names)])]
    if settings.root:
        fits = [settings.root in (str(i), names[root]) for i, root in enumerate(roots, 1)]
    else:
        fits = [not find_joints(names[person], JOINT_NAMES, settings.joints, skeleton)[2]
                for person in people]
    if sum(fits) != 1:
        listed = ', '.join(f'{i} {names[root]}' for i, root in enumerate(roots, 1))
        raise UserError(f'{path} has several roots ({listed}), expected one person: say which with '
                        '--root=1, --root=2 ...')
    return people[fits.index(True)]


# --------------------------------------------------------------------------- unit, axes, the look
# at: {name of a joint: its positions (..., 3)}


def _named(joints, skeleton):
    return dict(zip(skeleton.names, np.moveaxis(joints, -2, 0)))


def _axis(at):
    """Unit vectors (..., 3) from the feet to the head."""
    ankles = (at['left_ankle'] + at['right_ankle']) / 2
    return unit_vectors(unit_vectors(at['head'] - at['pelvis'])
                        + unit_vectors(at['pelvis'] - ankles))


def _lengths(at):
    """{limb: lengths (2, T) on the left and on the right}"""
    return {limb: np.array([np.linalg.norm(at[f'{side}_{start}'] - at[f'{side}_{end}'], axis=-1)
                            for side in ('left', 'right')])
            for limb, (start, end, *_) in LIMBS.items()}


def upright(joints, up):
    """Joints (..., 3) whose axis `up` points up -> with y up."""
    columns = [joints[..., 'xyz'.index(axis[-1])] * (-1 if axis[0] == '-' else 1)
               for axis in AXES[up].split()]
    return np.stack(columns, -1)


def _find_unit(path, at, whose, given):
    """-> name and metres of the unit that is given, or else in which legs are as long as a
    person's."""
    lengths = _lengths(at)
    leg = np.median(lengths['thigh'] + lengths['shin'])
    units = {'units of the CMU database': CMU_UNIT, **UNITS} if whose == 'CMU' else UNITS
    for name, metres in {'the given unit': given}.items() if given else units.items():
        if LEG[0] <= leg * metres <= LEG[1]:
            return name, metres
    if given:
        raise UserError(f'{path} has legs of {leg * given:.3g} m in the unit of --unit, expected '
                        f'{LEG[0]} to {LEG[1]}: leave --unit out, or give another one')
    raise UserError(f'{path} has legs of {leg:.3g} units, expected {LEG[0]} to {LEG[1]} m: give '
                    '--unit, or --joints=map.json')


def _find_up(path, joints, rest, skeleton):
    """The axis that points up. The rest pose decides where it is a standing body, so that a lying
    one stays lying. Otherwise the frames: a body is upright most of the time, and at the beginning.
    Without a rest pose only y and z are up, or y down."""
    for pose in rest:
        at = _named(pose, skeleton)
        axis = _axis(at)
        i = np.abs(axis).argmax()
        heights = [at[name][i] * np.sign(axis[i]) for name in ('left_ankle', 'pelvis', 'head')]
        if abs(axis[i]) > 0.9 and heights == sorted(heights):
            return ('-' if axis[i] < 0 else '') + 'xyz'[i]
    axis = _axis(_named(joints, skeleton))
    scores = {}
    for up in ('y', 'z', '-y'):
        is_up = upright(axis, up)[:, 1] > 0.6
        scores[up] = is_up.mean() + 0.3 * is_up[0] if is_up.mean() > 0.1 else 0
    scores['y'] += 0.1 * (scores['y'] > 0)
    best = max(scores, key=scores.get)
    if scores[best] > (best == '-y'):
        return best
    raise UserError(f'{path} has a body that is upright along neither y nor z: give --up, the axis '
                    'that points up')


def _t_pose_frames(at):
    """How many frames at the beginning are a T-pose that the next frame has left abruptly."""
    axis = _axis(at)
    left = unit_vectors(at['left_hip'] - at['right_hip'] + at['left_shoulder']
                        - at['right_shoulder'])
    is_t = True
    arms = []
    for side, outwards in ('left', left), ('right', -left):
        arm = unit_vectors(at[f'{side}_wrist'] - at[f'{side}_shoulder'])
        leg = unit_vectors(at[f'{side}_hip'] - at[f'{side}_ankle'])
        is_t &= (np.vecdot(arm, outwards) > 0.9) & (np.vecdot(leg, axis) > 0.85)
        arms.append(arm)
    n = is_t.argmin()   # the first frame that is not a T-pose; 0 if all are
    stays = min(arm[n - 1] @ arm[n] for arm in arms)
    return n if n < len(is_t) - 1 and stays < math.cos(math.radians(15)) else 0


def _problems(at):
    """Yield what is no human body about joints in metres, y up, and which setting would help."""
    help_of = 'give --joints=map.json'
    typical = {}
    for limb, lengths in _lengths(at).items():
        *_, unequal, varying = LIMBS[limb]
        left, right = typical[limb] = 100 * np.median(lengths, axis=1) + 1e-6
        if max(left, right) > (1 + unequal) * min(left, right):
            yield f'a left {limb} of {left:.1f} cm and a right one of {right:.1f} cm: {help_of}'
        for low, high in 100 * np.percentile(lengths, [5, 95], axis=1).T:
            if high - low > varying * left:
                yield f'a {limb} of {low:.1f} to {high:.1f} cm, not of one length: {help_of}'
    for upper, lower, most in ('thigh', 'shin', 1.7), ('upper arm', 'forearm', 2.5):
        a, b = typical[upper][0], typical[lower][0]
        if max(a, b) > most * min(a, b):
            yield f'a {upper} of {a:.1f} cm and a {lower} of {b:.1f} cm: {help_of}'
    feet = np.linalg.norm(at['left_foot'] - at['left_ankle'], axis=-1).mean()
    if feet < 0.02:
        yield f'feet of {100 * feet:.1f} cm: {help_of}, with the toes'
    if np.median(_axis(at)[:, 1]) < -0.5:
        yield 'its head below its feet: give --up'


def _toes_ahead(at):
    """-1 to 1: how much the toes point ahead of the shins, if axes are right-handed. (Of the whole
    body they do not: in a run legs are behind it for most of the time.)"""
    left = at['left_hip'] - at['right_hip']
    return np.median([np.vecdot(
        unit_vectors(at[f'{side}_foot'] - at[f'{side}_ankle']),
        unit_vectors(np.cross(left, at[f'{side}_knee'] - at[f'{side}_ankle'])))
        for side in ('left', 'right')])


def read_take(path, settings=take_settings(), fps=None, new_fps=SMPL.fps, skeleton=SMPL):
    """One file of motion -> Take: joints in metres, y up, at new_fps.

    path: .bvh; .npy or .npz of joints (T, N, 3), in SMPL's order unless settings.joints says
    otherwise, or of features (T, 263) or (T, 251). settings: of `take_settings`. fps: of arrays
    that do not tell it. UserError names the file, what is wrong, and the setting that would help.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f'{path} is not a motion file, expected {", ".join(SUFFIXES)}')
    notes = []
    joints, rest, own_fps, whose, unused = _read_joints(path, settings, skeleton, notes)
    unit, metres = _find_unit(path, _named(joints, skeleton), whose, settings.unit)
    up = settings.up or _find_up(path, joints, rest, skeleton)
    notes.append(f'{unit}, {up} up')
    joints = upright(joints, up) * metres

    n = _t_pose_frames(_named(joints, skeleton))
    if n:
        joints = joints[n:]
        notes.append(f'a T-pose before the motion left out (frames: {n})')
    at = _named(joints, skeleton)
    for problem in _problems(at):
        raise UserError(f'{path} has {problem}')
    ahead = _toes_ahead(at)
    if ahead < -0.3:
        joints = joints * [-1, 1, 1]
        notes.append('toes pointed backwards, so axes are left-handed: mirrored (if left and right '
                     'joints are exchanged instead, give --joints)')
    elif ahead < 0.1:
        raise UserError(f'{path} has toes that do not point to where the body faces: give '
                        '--joints=map.json')

    own_fps = own_fps or fps or 0
    if not 1 <= own_fps <= MAX_FPS:
        raise UserError(f'{path} has {own_fps:g} frames per second, expected 1 to {MAX_FPS}: give '
                        '--fps')
    if abs(own_fps - round(own_fps)) < 5e-4 * own_fps:   # frame times have few digits
        own_fps = round(own_fps)
    return Take(resample(joints, own_fps, new_fps), notes, unused)


def read_features(path, settings, meta):
    """A file of motion -> features (T, D) for a model of the data set that meta describes, and
    notes on how it was read (list of str). settings: of `take_settings`."""
    skeleton, fps = SKELETONS[meta['skeleton']], meta['fps']
    take = read_take(path, settings, fps, fps, skeleton)
    if take.unused:
        raise UserError(f'--joints has {", ".join(sorted(take.unused))}, which {path} has not: '
                        'correct these names.')
    if len(take.joints) <= FRAMES_PER_TOKEN:
        raise UserError(f'{path} has {len(take.joints)} frames, expected more than '
                        f'{FRAMES_PER_TOKEN}.')
    joints = take.joints * skeleton.units_per_metre
    joints = np.concatenate([joints, 2 * joints[-1:] - joints[-2:-1]])   # features use up one
    features = joints_to_features(joints, skeleton, steady=meta.get('steady', False),
                                  contact_threshold=meta.get('contact_threshold'))
    return features.astype(np.float32), take.notes


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
