"""bvh.py: a tiny file whose poses can be worked out by hand, and the sentences for broken ones."""
import numpy as np
import pytest

from bvh import bvh_to_joints, read_bvh
from configurator import UserError

HEAD = '''HIERARCHY
ROOT Hips
{
  OFFSET 0 0 0
  CHANNELS 6 Xposition Yposition Zposition Zrotation Xrotation Yrotation
  JOINT Leg
  {
    OFFSET 0 -10 0
    CHANNELS 3 Zrotation Xrotation Yrotation
    JOINT Foot
    {
      OFFSET 0 -5 1
      CHANNELS 3 Zrotation Xrotation Yrotation
      End Site
      {
        OFFSET 0 0 7
      }
    }
  }
  JOINT Arm
  {
    OFFSET 2 0 0
    CHANNELS 3 Zrotation Xrotation Yrotation
    End Site
    {
      OFFSET 1 0 0
    }
  }
}
MOTION
Frames: 3
Frame Time: 0.05
'''
ROWS = ['0 20 0 0 0 0 0 0 0 0 0 0 0 0 0',
        '1 20 0 90 0 0 0 0 0 0 0 0 0 0 0',
        '1e0 2.0E1 0 0 0 90 0 90 0 0 0 0 0 0 -1.5e-7']


def tiny(text):
    return 'tiny.bvh', text.encode()


def test_reader_and_forward_kinematics(tmp_path):
    path = tmp_path / 'tiny.bvh'
    text = HEAD + '\n'.join(ROWS) + '\n\n \n'
    path.write_bytes(text.replace('\n', '\r\n').encode())
    names, parents, offsets, channels, frames, fps = read_bvh(str(path))
    assert names == ['Hips', 'Leg', 'Foot', 'Arm']
    assert parents.tolist() == [-1, 0, 1, 0]
    assert fps == 20
    assert frames.shape == (3, 15)
    assert [len(c) for c in channels] == [6, 3, 3, 3]
    # end sites leave no trace
    assert offsets[2].tolist() == [0, -5, 1]
    assert offsets[3].tolist() == [2, 0, 0]

    joints = bvh_to_joints(parents, offsets, channels, frames)
    assert np.allclose(joints[0], [[0, 20, 0], [0, 10, 0], [0, 5, 1], [2, 20, 0]])
    # 90 degrees about Z
    assert np.allclose(joints[1], [[1, 20, 0], [11, 20, 0], [16, 20, 1], [1, 22, 0]])
    # the root 90 degrees about Y, the leg 90 about X
    want = [[1, 20, 0], [1, 10, 0], [-4, 9, 0], [1, 20, -2]]
    assert np.allclose(joints[2], want, atol=1e-6)


def test_position_channels_replace_offsets():
    head = HEAD.replace('CHANNELS 3', 'CHANNELS 6 Xposition Yposition Zposition')
    head = head.replace('Frames: 3', 'Frames: 1')
    row = '0 20 0 0 0 0  0 -11 0 0 0 0  0 -6 0 0 0 0  3 0 0 0 0 0'
    _, parents, offsets, channels, frames, _ = read_bvh(tiny(head + row))
    joints = bvh_to_joints(parents, offsets, channels, frames)
    assert np.allclose(joints[0], [[0, 20, 0], [0, 9, 0], [0, 3, 0], [3, 20, 0]])


@pytest.mark.parametrize('text, words', [
    (HEAD + '\n'.join(ROWS[:2]), '2 frames where its header promises 3'),
    (HEAD + '\n'.join(ROWS)[:-14], 'truncated'),
    (HEAD + '\n'.join(ROWS) + '\n' + ROWS[0], '4 frames where its header promises 3'),
    (HEAD + '\n'.join(ROWS).replace('90', 'ninety', 1), 'not a number'),
    (HEAD + '\n'.join(ROWS).replace('90', 'nan', 1), 'NaN'),
    (HEAD[:150] + HEAD[HEAD.index('MOTION'):], 'HIERARCHY that cannot be read'),
    (HEAD.replace('Xrotation', 'Wrotation') + '\n'.join(ROWS), 'HIERARCHY that cannot be read'),
    (HEAD.replace('Xrotation', 'Zrotation') + '\n'.join(ROWS), 'HIERARCHY that cannot be read'),
    (HEAD.split('MOTION')[0], 'not a BVH file'),
    (HEAD.replace('Frames: 3', 'Frames: many'), 'Frames:'),
    ('garbage', 'not a BVH file'),
    ('', 'not a BVH file')])
def test_a_broken_file_gets_one_sentence(text, words):
    with pytest.raises(UserError, match='tiny.bvh') as error:
        read_bvh(tiny(text))
    assert words in str(error.value)
    assert '\n' not in str(error.value)
