"""bvh.py: a tiny file whose poses can be worked out by hand, and the sentences for broken ones.
What is written reads back as the joints it was made of."""
import itertools

import numpy as np
import pytest
from conftest import in_shared, sentence
from test_motion import KIT, SMPL, body

from lib import toy
from lib.bandai import bandai_files, bandai_joints
from lib.bvh import bvh_to_joints, fit_rotations, read_bvh, write_bvh
from lib.motion import features_to_joints, joints_to_features

BANDAI, needs_bandai = in_shared('data', 'bandai-namco.tar.xz')

HEAD = '''HIERARCHY
ROOT Hips
{
  OFFSET 0 0 0
  CHANNELS 6 Xposition Yposition Zposition Zrotation Xrotation Yrotation
  JOINT Leg {
    OFFSET 0 -10 0
    CHANNELS 3 Zrotation Xrotation Yrotation
    JOINT Foot {
      OFFSET 0 -5 1
      CHANNELS 3 Zrotation Xrotation Yrotation
      End Site { OFFSET 0 0 7 }
    }
  }
  JOINT Arm {
    OFFSET 2 0 0
    CHANNELS 3 Zrotation Xrotation Yrotation
    End Site { OFFSET 1 0 0 }
  }
}
MOTION
Frames: 3
Frame Time: 0.05
'''
ROWS = ['0 20 0 0 0 0 0 0 0 0 0 0 0 0 0',
        '1 20 0 90 0 0 0 0 0 0 0 0 0 0 0',
        '1e0 2.0E1 0 0 0 90 0 90 0 0 0 0 0 0 -1.5e-7']
NAMES = ['Hips', 'Leg', 'Foot', 'Foot_end', 'Arm', 'Arm_end']


def test_reader_and_forward_kinematics(tmp_path):
    path = tmp_path / 'tiny.bvh'
    path.write_bytes((HEAD + '\n'.join(ROWS) + '\n\n \n').replace('\n', '\r\n').encode())
    names, parents, offsets, channels, frames, fps = read_bvh(str(path))
    assert names == NAMES
    assert parents.tolist() == [-1, 0, 1, 2, 0, 4]
    assert fps == 20
    assert np.allclose(bvh_to_joints(parents, offsets, channels, frames), [
        [[0, 20, 0], [0, 10, 0], [0, 5, 1], [0, 5, 8], [2, 20, 0], [3, 20, 0]],
        # 90 degrees about Z
        [[1, 20, 0], [11, 20, 0], [16, 20, 1], [16, 20, 8], [1, 22, 0], [1, 23, 0]],
        # the root 90 degrees about Y, the leg 90 about X
        [[1, 20, 0], [1, 10, 0], [-4, 9, 0], [-4, 2, 0], [1, 20, -2], [1, 20, -3]]], atol=1e-6)


def test_position_channels_replace_offsets():
    head = HEAD.replace('CHANNELS 3', 'CHANNELS 6 Xposition Yposition Zposition')
    row = '0 20 0 0 0 0  0 -11 0 0 0 0  0 -6 0 0 0 0  3 0 0 0 0 0'
    text = head.replace('Frames: 3', 'Frames: 1') + row
    _, parents, offsets, channels, frames, _ = read_bvh(('tiny.bvh', text.encode()))
    joints = bvh_to_joints(parents, offsets, channels, frames)[0, [0, 1, 2, 4]]
    assert np.allclose(joints, [[0, 20, 0], [0, 9, 0], [0, 3, 0], [3, 20, 0]])


MOTION = '\n'.join(ROWS)


@pytest.mark.parametrize('text, fact', [
    (HEAD + ROWS[0], 'promises 3'),
    (HEAD + MOTION[:-14], 'truncated'),
    (HEAD + '\n'.join(ROWS + ROWS[:2]), 'promises 3'),
    (HEAD + MOTION.replace('90', 'ninety', 1), 'not a number'),
    (HEAD.replace('}', '', 1) + MOTION, 'HIERARCHY'),
    (HEAD.replace('0 0 7', '0 0 7 JOINT Toe { OFFSET 0 0 1 }') + MOTION, 'HIERARCHY'),
    (HEAD.replace('Xrotation', 'Wrotation') + MOTION, 'HIERARCHY'),
    (HEAD.replace('Xrotation', 'Zrotation') + MOTION, 'HIERARCHY'),
    (HEAD.split('MOTION')[0], 'MOTION'),
    (HEAD.replace('Frames: 3', 'Frames: many') + MOTION, 'Frames:')])
def test_a_broken_file_gets_one_sentence(text, fact):
    """NaN, and whatever else may be in a file, is in test_fuzz.py."""
    sentence(lambda: read_bvh(('tiny.bvh', text.encode())), 'tiny.bvh', fact)


def written(path, joints, skeleton):
    """The joints (T, J, 3) of a file that was written from some, {joint or end site: its place
    (3,) in the file's T-pose}, both in centimetres, and the channels (T, C)."""
    write_bvh(path, joints, skeleton)
    names, parents, offsets, channels, frames, fps = read_bvh(str(path))
    assert np.isclose(fps, skeleton.fps)
    order = [names.index(name) for name in skeleton.names]
    back = bvh_to_joints(parents, offsets, channels, frames)[:, order]
    pose = bvh_to_joints(parents, offsets, channels, np.zeros_like(frames[:1]))[0]
    return back, dict(zip(names, pose)), frames


@pytest.mark.parametrize('seed', range(2))
def test_what_is_written_reads_back(tmp_path, seed):
    joints = toy.make_clip(seed)['joints']
    back, _, frames = written(tmp_path / 'a.bvh', joints, SMPL)
    assert np.abs(back / 100 - joints).max() < 0.002
    assert np.abs(np.diff(frames, axis=0)).max() < 90   # no angle jumps by half a turn
    names, parents, offsets, channels, frames, _ = read_bvh(str(tmp_path / 'a.bvh'))
    ends = [name.endswith('foot_end') for name in names]
    heights = bvh_to_joints(parents, offsets, channels, frames)[:, ends, 1]
    assert heights.min() > -0.5   # toes bend; stiff ones would go 10 cm below the floor


@pytest.mark.parametrize('skeleton, mirrored', [(SMPL, 1), (KIT, -1)])
def test_zero_is_a_t_pose_in_centimetres(tmp_path, skeleton, mirrored):
    joints = body(50, skeleton) * [mirrored, 1, 1]   # KIT's rest directions have left at X-
    back, at, _ = written(tmp_path / 'a.bvh', joints * skeleton.units_per_metre, skeleton)
    assert np.abs(back / 100 - fit_rotations(joints, skeleton)[2]).max() < 1e-4
    lengths = [np.linalg.norm(x - x[:, skeleton.parents], axis=-1) for x in (joints, back / 100)]
    assert np.allclose(lengths[1], np.median(lengths[0], axis=0), atol=1e-4)   # and stay that
    for side, x in (('left', 1), ('right', -1)):
        across = at[f'{side}_wrist'] - at[f'{side}_shoulder']
        assert across[0] * x > 25
        assert np.abs(across[1:]).max() < 1
        ankle, foot, site = (at[f'{side}_{part}'] for part in ('ankle', 'foot', 'foot_end'))
        assert ankle[1] < at[f'{side}_hip'][1] - 25
        assert foot[2] > ankle[2] + 3
        assert abs(site[1] - foot[1]) < 1   # as steep as the foot it would be below the floor
    assert at['head'][1] > 25


@pytest.mark.parametrize('name, axis', [
    ('left_elbow', [0, -1, 0]), ('right_elbow', [0, 1, 0]), ('left_knee', [1, 0, 0]),
    ('right_knee', [1, 0, 0])])
def test_elbows_and_knees_bend_like_hinges(name, axis):
    """The turn of a bent elbow is about the axis that an elbow has in a T-pose, a knee's too."""
    _, world, _ = fit_rotations(toy.make_clip(5)['joints'], SMPL)
    j = SMPL.names.index(name)
    turns = toy.Rotation.from_matrix(world[:, SMPL.parents[j]].mT @ world[:, j]).as_rotvec()
    angles = np.linalg.norm(turns, axis=-1)
    bent = angles > 0.7
    assert bent.sum() > 50
    assert (turns[bent] @ axis > 0.98 * angles[bent]).all()


@needs_bandai
def test_real_clips_keep_their_joints_within_a_centimetre(tmp_path):
    for file in itertools.islice(bandai_files(BANDAI), 6):
        joints = bandai_joints(file)
        joints = features_to_joints(joints_to_features(joints, SMPL, steady=True), 22)
        back, _, _ = written(tmp_path / 'a.bvh', joints, SMPL)
        error = np.linalg.norm(back / 100 - joints, axis=-1)
        assert error.max() < 0.01
        assert error.mean() < 0.001
