"""Motion of other skeletons, from BVH files or arrays of joints: which joint is which (by its
name), in what unit, which way is up -> the 22 joints of SMPL that all else here works with."""
import json
import math
import re
from pathlib import Path

import numpy as np
from scipy.interpolate import interp1d

from lib.bvh import bvh_to_joints, read_bvh
from lib.configurator import ROOT, UserError
from lib.data import LARGEST
from lib.motion import SKELETONS, resample
from lib.runtime import read_array, read_json

SMPL = SKELETONS['smpl22']
JOINT_NAMES = json.loads(Path(ROOT, 'config', 'joint_names.json').read_text(encoding='utf-8'))
IN_ORDER = {'SMPL': {name: str(j) for j, name in enumerate(SMPL.names)}}   # of an .npy's joints
UNITS = {'m': 1.0, 'cm': 0.01, 'mm': 0.001}
LEG = (0.5, 1.3)   # metres from hip to ankle along the bones: from children to giants
TRIED = 20         # files that are looked at for unit and axes


def unit(text):
    """'cm' or '0.0564' -> metres."""
    metres = UNITS.get(text) or float(text)
    if not 0 < metres < math.inf:
        raise ValueError
    return metres


def bare(name):
    """A name without prefix, case and marks: 'mixamorig:LeftUpLeg' -> 'leftupleg', 'm_avg_L_Hip' ->
    'lhip'."""
    return re.sub(r'^.*:|^mixamorig\d*|^[mf]_avg_|[^a-z0-9]', '', str(name).lower())


def place_joints(world, names, maps):
    """A file's joints (T, N, 3) and their names -> SMPL's (T, 22, 3), and how they were found.

    maps: {whose: {our joint: their name}}, of which the one that lacks least is taken. A joint that
    is missing between two others of its chain is put between them. UserError for any other."""
    at = {bare(name): i for i, name in enumerate(names)}
    found = {}
    for whose, theirs in maps.items():
        found[whose] = {ours: at[bare(name)] for ours, name in theirs.items() if bare(name) in at}
    whose = min(maps, key=lambda whose: (len(maps[whose]) - len(found[whose]), -len(found[whose])))

    joints = np.full((len(world), SMPL.n_joints, 3), np.nan)
    for ours, i in found[whose].items():
        joints[:, SMPL.names.index(ours)] = world[:, i]
    for chain in map(list, SMPL.chains):
        there = np.flatnonzero(np.isfinite(joints[0, chain, 0]))
        if len(there) > 1:
            between = interp1d(there, joints[:, chain][:, there], axis=1, bounds_error=False)
            joints[:, chain] = between(range(len(chain)))
    lost = [name for name, x in zip(SMPL.names, joints[0, :, 0]) if np.isnan(x)]
    if lost:
        raise UserError(f'no place for {", ".join(lost)} among joints named {", ".join(names[:4])} '
                        f'... ({whose} fits best): say which they are in --joints=map.json')
    guessed = [name for name in SMPL.names if name not in found[whose]]
    between = f'; put between their neighbours: {", ".join(guessed)}' if guessed else ''
    return joints, f'joints found by the names of {whose}{between}'


def own_joints(path, maps, fps):
    """A BVH or .npy file -> joints (T, 22, 3) in its own unit and axes, frames a second (an .npy's
    are fps), and how the joints were found. maps: as in `place_joints`, None for the known ones."""
    if path.suffix.lower() == '.bvh':
        names, parents, offsets, channels, frames, fps = read_bvh(str(path))
        world = bvh_to_joints(parents, offsets, channels, frames)
        maps = maps or JOINT_NAMES
    else:
        world = read_array(path, 'get it again').astype(np.float64)
        if world.ndim != 3 or world.shape[2] != 3:
            raise UserError(f'.npy file of shape {world.shape}, expected joints (T, J, 3)')
        names = [str(j) for j in range(world.shape[1])]
        maps = maps or IN_ORDER
    if len(world) < 2 or not (np.abs(world) < LARGEST).all():
        raise UserError('a single frame, or NaN or infinity in joints')
    joints, how = place_joints(world, names, maps)
    return joints, fps, how


def unit_and_up(files, maps, fps):
    """What the first of the files look like: metres of their unit and the axis that points up."""
    legs, bodies, reasons = [], [], []
    for path in files[:TRIED]:
        try:
            joints, _, _ = own_joints(path, maps, fps)
        except UserError as reason:
            reasons.append(reason)
            continue
        bones = np.linalg.norm(joints - joints[:, SMPL.parents], axis=-1)
        legs.append(np.median(bones[:, SMPL.leg_joints].sum(-1)))
        feet = joints[:, SMPL.feet].mean(1)
        bodies.append((joints[:, SMPL.names.index('head')] - feet).mean(0))
    if not legs:
        raise UserError(f'none of the first {len(files[:TRIED])} files can be used, the first '
                        f'because of: {reasons[0]}')
    leg, body = np.median(legs), np.median(bodies, axis=0)
    axis = np.abs(body).argmax()
    up = 'xyz'[axis] if axis and body[axis] > 0 else None   # no file format has x up
    metres = [metres for metres in UNITS.values() if LEG[0] < leg * metres < LEG[1]]
    return leg, metres[0] if metres else None, up


def read_joint_names(path):
    """A json file {our joint: the files' name of it, or its number in an .npy} -> the same."""
    names = read_json(path, 'config/joint_names.json shows what is expected')
    unknown = sorted(set(names) - set(SMPL.names)) if isinstance(names, dict) else [names]
    if unknown:
        raise UserError(f'{path} has {unknown[0]!r}, expected names of joints for '
                        f'{", ".join(SMPL.names)}')
    return names


def upright(joints, up):
    """Joints (..., 3) whose axis `up` is 'y' or 'z' -> with y up."""
    return joints[..., [0, 2, 1]] * [1, 1, -1] if up == 'z' else joints


def read_motion(path, fps):
    """One BVH file or .npy of SMPL's joints -> joints (T, 22, 3) in metres, y up, at `fps`, which
    an .npy is taken to have. UserError where no unit makes it a body's size, or no axis is up."""
    path = Path(path)
    joints, own_fps, _ = own_joints(path, None, fps)
    leg, metres, up = unit_and_up([path], None, fps)
    if not metres or not up:
        raise UserError(f'{path}: legs are {leg:.3g} units long and {up or "no axis"} points up, '
                        'expected a body in m, cm or mm with y or z up.')
    return resample(upright(joints, up) * metres, own_fps, fps)
