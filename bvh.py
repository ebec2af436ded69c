"""BVH motion files: reading, and forward kinematics from their channels to joint positions.

A file has two parts. HIERARCHY nests the joints in braces, each with an OFFSET from its parent and
a list of CHANNELS; MOTION gives the frame rate and then one row of channel values a frame.
"""
import re
from pathlib import Path

import numpy as np

from configurator import UserError
from runtime import read

FASTEST = 2000          # frames a second; at 1 a second or fewer nobody has recorded motion
FURTHEST = 1e7          # of any number: 100 km in centimetres
CHANNELS = {axis + kind for axis in 'xyz' for kind in ('position', 'rotation')}
TIMING = re.compile(rb'\s*Frames:\s*(\d{1,9})\s+Frame\s+Time:\s*(\d*\.?\d+(?:[eE][+-]?\d+)?)')


def read_bvh(file):
    """A BVH file -> (names, parents (J,), offsets (J, 3), channels, frames (T, C), fps).

    file: a path, or (name, bytes) when the bytes are at hand (an archive's member). channels holds
    one tuple of channel names per joint; end sites are left out; lengths are in the file's unit.
    UserError, one sentence naming the file, for anything that does not parse.
    """
    if isinstance(file, tuple):
        file, data = file
    else:
        data = read(file, 'expected a BVH file', lambda path: Path(path).read_bytes())
    hierarchy, motion_word, motion = data.partition(b'MOTION')
    if not hierarchy.lstrip().startswith(b'HIERARCHY') or not motion_word:
        raise UserError(f'{file} is not a BVH file: it lacks the words HIERARCHY and MOTION; '
                        'export it as BVH again')
    names, parents, offsets, channels = _read_hierarchy(file, hierarchy)

    timing = TIMING.match(motion)
    if not timing or not 1 / FASTEST <= float(timing[2]) <= 1:
        raise UserError(f'{file} has no "Frames:" and "Frame Time:" lines after MOTION that make '
                        f'sense (a frame takes 1 second at most, 1/{FASTEST} at least); export it '
                        'as BVH again')
    n_frames = int(timing[1])
    width = sum(len(c) for c in channels)
    try:
        values = np.array(motion[timing.end():].split(), dtype=np.float64)
    except ValueError:
        raise UserError(f'{file} has text that is not a number in its MOTION block; '
                        'repair or drop the file') from None
    good = (np.abs(values) < FURTHEST).all()   # nor is NaN
    if values.size != n_frames * width or not good or not width:
        found = 'NaN, infinity or huge numbers'
        if good:
            found = f'{values.size / max(width, 1):.4g} frames'
        raise UserError(f'{file} holds {found} where its header promises {n_frames} frames of '
                        f'{width} numbers; it is truncated or damaged: copy it again')
    return names, parents, offsets, channels, values.reshape(n_frames, width), 1 / float(timing[2])


def _read_hierarchy(file, text):
    names, parents, offsets, channels = [], [], [], []
    joint = None      # the joint that the next brace belongs to, None for an end site
    open_joints = []  # the same for each brace that is still open
    words = iter(text.decode('latin-1').split()[1:])
    try:
        for word in words:
            if word in ('ROOT', 'JOINT'):
                if None in open_joints:
                    raise ValueError('a joint inside an end site')
                joint = len(names)
                names.append(next(words))
                parents.append(open_joints[-1] if open_joints else -1)
                offsets.append([0.0, 0.0, 0.0])
                channels.append(())
            elif word == 'End':
                next(words)
                joint = None
            elif word == '{':
                open_joints.append(joint)
            elif word == '}':
                open_joints.pop()
            elif word == 'OFFSET':
                offset = [float(next(words)) for _ in range(3)]
                if open_joints[-1] is not None:
                    offsets[open_joints[-1]] = offset
            elif word == 'CHANNELS':
                count = int(next(words))
                channels[open_joints[-1]] = tuple(next(words).lower() for _ in range(count))
            else:
                raise ValueError(word)
        understood = all(set(c) <= CHANNELS and len(set(c)) == len(c) for c in channels)
        near = (np.abs(offsets) < FURTHEST).all()
        if not names or open_joints or not understood or not near:
            raise ValueError('braces, channels or offsets')
    # what next(), float() and the list of open joints raise on a text in another order
    except (ValueError, StopIteration, RuntimeError, IndexError, TypeError):
        raise UserError(f'{file} has a HIERARCHY that cannot be read (after {len(names)} joints); '
                        'export it as BVH again') from None
    return names, np.array(parents), np.array(offsets), channels


def _elementary(axis, degrees):
    """Matrices (T, 3, 3) of the turns about one axis by angles (T,)."""
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    second, third = (axis + 1) % 3, (axis + 2) % 3
    matrices = np.zeros((len(degrees), 3, 3))
    matrices[:, axis, axis] = 1
    matrices[:, second, second] = cos
    matrices[:, third, third] = cos
    matrices[:, third, second] = sin
    matrices[:, second, third] = -sin
    return matrices


def bvh_to_joints(parents, offsets, channels, frames):
    """Forward kinematics of what `read_bvh` returns: world positions (T, J, 3), in its units.

    Position channels replace a joint's OFFSET; rotations (degrees) multiply in their listed order.
    """
    joints = np.zeros((len(frames), len(parents), 3))
    rotations = []           # of each joint in the world
    columns = iter(frames.T)
    for j, parent in enumerate(parents):
        local = np.tile(offsets[j], (len(frames), 1))
        rotation = rotations[parent] if parent >= 0 else np.eye(3)
        for channel in channels[j]:
            axis = 'xyz'.index(channel[0])
            if channel.endswith('position'):
                local[:, axis] = next(columns)
            else:
                rotation = rotation @ _elementary(axis, next(columns))
        rotations.append(rotation)
        joints[:, j] = local
        if parent >= 0:
            joints[:, j] = joints[:, parent] + (rotations[parent] @ local[:, :, None])[:, :, 0]
    return joints
