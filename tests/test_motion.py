"""motion.py: agreement with HumanML3D's own arrays, and properties that must hold for any body."""
import json
import os

import numpy as np
import pytest
import torch

from lib import motion
from lib import toy
from lib.motion import SKELETONS, features_to_joints, joints_to_features

SHARED = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..', 'shared')
GOLDEN = os.path.join(SHARED, 'golden', 't2m', 'motion.npz')
SAMPLES = os.path.join(SHARED, 'data', 'hml3d_samples', 'HumanML3D')
SMPL, KIT = SKELETONS['smpl22'], SKELETONS['kit21']
needs_shared = pytest.mark.skipif(
    not os.path.exists(GOLDEN), reason='the golden arrays (../shared) are missing')
both_headings = pytest.mark.parametrize('steady', [False, True])


def joints_from_bones(root, bones, skeleton):
    """Root (T, 3) and bones (T, J, 3) from each joint's parent to the joint -> joints (T, J, 3)."""
    joints = np.zeros_like(bones)
    joints[:, 0] = root
    for chain in skeleton.chains:
        for parent, joint in zip(chain, chain[1:]):
            joints[:, joint] = joints[:, parent] + bones[:, joint]
    return joints


def body(T, skeleton=SMPL, seed=0):
    """A body (T, J, 3) that walks away while its bones wobble smoothly around the rest pose."""
    rng = np.random.default_rng(seed)
    J = skeleton.n_joints
    time = np.linspace(0, 6, T)[:, None, None]
    wave = np.sin(time * rng.uniform(0.5, 2, (J, 3)) + rng.uniform(0, 6, (J, 3)))
    bones = skeleton.raw_offsets * 0.25 + 0.08 * wave
    root = np.stack([0.4 + np.linspace(0, 1, T),
                     1.0 + 0.05 * np.sin(np.arange(T) / 5),
                     -0.3 + np.linspace(0, 2, T)], -1)
    return joints_from_bones(root, bones, skeleton)


@needs_shared
@pytest.mark.parametrize('i', [0, 1])
def test_features_and_joints_match_humanml3d(i):
    golden = np.load(GOLDEN)
    # the arrays were made for one body: bones of its lengths, and a path scaled with leg length
    joints = golden[f'positions_{i}'].astype(float)
    bones = joints - joints[:, SMPL.parents]
    own = np.linalg.norm(bones, axis=-1, keepdims=True)
    wanted = np.linalg.norm(golden['tgt_offsets'], axis=-1)[:, None]
    scale = wanted[[5, 8]].sum() / own[0, [5, 8]].sum()   # right knee and ankle
    joints = joints_from_bones(scale * joints[:, 0], wanted * bones / np.maximum(own, 1e-8), SMPL)
    features = joints_to_features(joints, SMPL)
    assert np.abs(features - golden[f'features_{i}']).max() < 1e-4
    joints = features_to_joints(golden[f'features_{i}'], 22)
    assert np.abs(joints - golden[f'recovered_{i}']).max() < 1e-5

    clip = ['000612', '012314'][i]
    features = np.load(os.path.join(SAMPLES, 'new_joint_vecs', f'{clip}.npy'))
    joints = features_to_joints(features, 22)
    assert np.abs(joints - golden[f'hml_{clip}_recovered']).max() < 1e-5


@needs_shared
def test_skeletons_match_humanml3d():
    with open(os.path.join(SHARED, 'golden', 'skeletons.json')) as f:
        golden = json.load(f)
    for key, skeleton in (('hml3d', SMPL), ('kit', KIT)):
        want = golden[key]
        assert (skeleton.raw_offsets == want['raw_offsets']).all()
        assert [list(chain) for chain in skeleton.chains] == want['kinematic_chains']
        assert list(skeleton.feet) == want['left_foot'] + want['right_foot']
        assert list(skeleton.facing) == want['facing_joints_rhip_lhip_rsho_lsho']
        assert skeleton.fps == want['fps']
        assert skeleton.contact_threshold == want['foot_contact_threshold']
    assert list(SMPL.names) == golden['hml3d']['joint_names']


@pytest.mark.parametrize('skeleton', [SMPL, KIT])
def test_round_trip_keeps_the_motion(skeleton):
    """The round trip moves the body as a whole, so it keeps the distances between all joints."""
    joints = body(90, skeleton)
    features = joints_to_features(joints, skeleton)
    assert features.shape == (89, skeleton.dim)
    back = features_to_joints(features, skeleton.n_joints)
    for t in (0, 40, 88):
        want = np.linalg.norm(joints[t][:, None] - joints[0], axis=-1)
        assert np.allclose(np.linalg.norm(back[t][:, None] - back[0], axis=-1), want, atol=1e-9)
    assert np.allclose(back[0, 0, [0, 2]], 0)
    assert back[..., 1].min() > -1e-9

    batch = torch.tensor(np.stack([features[::-1], features]), dtype=torch.float32)
    from_torch = features_to_joints(batch, skeleton.n_joints)
    assert from_torch.shape == (2, *back.shape) and from_torch.dtype == torch.float32
    assert np.abs(from_torch[1].numpy() - back).max() < 1e-5


@both_headings
def test_spin_keeps_its_angle(steady):
    """Two turns in 6 s: HumanML3D's heading jumps in the middle of a turn, the steady one never."""
    angles = np.linspace(0, 4 * np.pi, 120)
    pose = body(1)[0] - body(1)[0, 0] + [0, 1, 0]
    joints = motion._rotate_y(np.repeat(pose[None], 120, 0), angles[:, None])
    features = joints_to_features(joints, SMPL, steady=steady)
    back = features_to_joints(features, 22)
    hips = back[:, 1] - back[:, 2]
    around = np.unwrap(np.arctan2(hips[:, 2], hips[:, 0]))
    assert np.allclose(np.abs(around - around[0]), angles[:-1], atol=1e-6)
    # half an angle: 2 pi / 59.5 frames is 0.053
    assert (np.abs(features[:, 0]).max() < 0.06) == steady


@both_headings
def test_features_do_not_depend_on_place_and_direction(steady):
    """Including a body that faces exactly backwards, where yaw is ambiguous (plus or minus pi)."""
    joints = body(60)
    moved = motion._rotate_y(joints, np.full((60, 1), 0.7)) + [3, 1, -2]
    rest = joints_from_bones(0, np.repeat(SMPL.raw_offsets[None] * 0.25, 30, 0), SMPL)
    for a, b in ((joints, moved), (rest, rest * [-1, 1, -1])):
        assert np.allclose(joints_to_features(a, SMPL, steady=steady),
                           joints_to_features(b, SMPL, steady=steady), atol=1e-8)


@both_headings
def test_only_steady_rotations_are_the_same_after_a_turn(steady):
    pose = body(2)[0]
    pose[:, [0, 2]] -= pose[0, [0, 2]]
    turn = np.pi / 2 * np.clip((np.arange(200) - 60) / 80, 0, 1)
    joints = motion._rotate_y(np.repeat(pose[None], 200, 0), turn[:, None])
    features = joints_to_features(joints, SMPL, steady=steady)
    before, after = features[5], features[190]
    rotations = slice(67, 193)
    assert np.allclose(np.delete(before, rotations), np.delete(after, rotations), atol=1e-3)
    assert np.allclose(before[rotations], after[rotations], atol=0.01) == steady

    humanml3d = joints_to_features(joints, SMPL)
    assert np.allclose(features_to_joints(features, 22), features_to_joints(humanml3d, 22),
                       atol=1e-3)


def test_mirror_is_its_own_inverse_and_swaps_contacts():
    for skeleton in (SMPL, KIT):
        joints = body(30, skeleton)
        assert np.allclose(motion.mirror(motion.mirror(joints, skeleton), skeleton), joints)
    joints = np.repeat(body(1), 41, 0)
    joints[:, [8, 11], 2] += np.linspace(0, 4, 41)[:, None]  # only the right foot moves
    mirrored = motion.mirror(joints, SMPL)
    assert np.array_equal(mirrored[:, 1], joints[:, 2] * [-1, 1, 1])
    assert (joints_to_features(joints, SMPL)[:, -4:] == [1, 1, 0, 0]).all()
    assert (joints_to_features(mirrored, SMPL)[:, -4:] == [0, 0, 1, 1]).all()


def test_rotations_give_the_directions_of_the_bones():
    joints = body(40)
    joints[:, 5] = joints[:, 2] - SMPL.raw_offsets[5]  # a bone opposite to its rest direction
    features = joints_to_features(joints, SMPL, steady=True)
    positions = np.insert(features[:, 4:67].reshape(39, 21, 3), 0, 0, axis=1)
    positions[:, 0, 1] = features[:, 3]
    x, y = np.moveaxis(features[:, 67:193].reshape(39, 21, 2, 3), 2, 0)
    rotations = np.stack([x, y, np.cross(x, y)], -1)
    for chain in SMPL.chains:
        world = np.eye(3)
        for parent, joint in zip(chain, chain[1:]):
            world = world @ rotations[:, joint - 1]
            bone = motion.unit_vectors(positions[:, joint] - positions[:, parent])
            assert np.allclose(world @ SMPL.raw_offsets[joint], bone, atol=1e-9)

    bones_of_no_length = np.zeros((5, 22, 3))
    assert np.isfinite(joints_to_features(bones_of_no_length, SMPL)).all()


def test_invalid_arrays_raise():
    with pytest.raises(ValueError, match='22, 3'):
        joints_to_features(np.zeros((9, 21, 3)), SMPL)
    with pytest.raises(ValueError, match='NaN'):
        joints_to_features(np.full((9, 22, 3), np.nan), SMPL)
    with pytest.raises(ValueError, match='263 .* 251'):
        features_to_joints(np.zeros((9, 251)), 22)


def test_smoothing_and_resampling_keep_straight_lines():
    line = np.arange(31)[:, None, None] * np.ones((1, 2, 3)) / 30
    assert np.allclose(motion.smooth(line, 3)[12:18], line[12:18])
    assert np.allclose(motion.smooth(np.ones(30), 3), 1)   # the ends too
    resampled = motion.resample(line, 30, 20)
    assert resampled.shape == (21, 2, 3)
    assert np.allclose(resampled[:, 0, 0], np.arange(21) / 20)


def slide(joints, skeleton):
    """Mean step, in metres per frame, of feet that are low and slow."""
    feet = joints[:, list(skeleton.feet)] / skeleton.units_per_metre
    step = np.linalg.norm(np.diff(feet, axis=0)[..., [0, 2]], axis=-1)
    low = feet[:-1, :, 1] < np.percentile(feet[..., 1], 5, axis=0) + 0.02
    return step[low & (step < 0.04)].mean()


@pytest.mark.parametrize('seed', range(4))
def test_locked_feet_slide_less_than_half_as_far(seed):
    joints = toy.make_clip(seed)['joints'].astype(float)
    noise = np.random.default_rng(seed).normal(0, 0.03, (len(joints), 1, 3))
    skating = joints + motion.smooth(noise, 3) * [1, 0, 1]
    before = skating.copy()
    locked = motion.lock_feet(skating, SMPL)
    assert np.array_equal(skating, before)
    assert slide(locked, SMPL) < slide(skating, SMPL) / 2

    moved = np.linalg.norm(locked - skating, axis=-1)
    assert 0.001 < moved.mean(0).max() < 0.03
    legs = [j for j, name in enumerate(SMPL.names) if name.endswith(('knee', 'ankle', 'foot'))]
    assert np.delete(moved, legs, axis=1).max() == 0
    lengths = [np.linalg.norm(x - x[:, SMPL.parents], axis=-1) for x in (skating, locked)]
    assert np.allclose(*lengths, atol=1e-3)


def test_foot_locking_in_millimetres_and_without_planted_feet():
    joints = body(60, KIT) * KIT.units_per_metre
    locked = motion.lock_feet(joints, KIT)
    assert np.isfinite(locked).all()
    assert np.linalg.norm(locked - joints, axis=-1).mean(0).max() < 30
    too_fast = np.repeat(body(1), 40, 0)
    too_fast[:, :, 2] += np.linspace(0, 8, 40)[:, None]   # 4 m/s
    assert np.allclose(motion.lock_feet(too_fast, SMPL), too_fast, atol=1e-9)
