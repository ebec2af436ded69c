"""motion.py: agreement with HumanML3D's own arrays, and properties that must hold for any body."""
import json
import os

import numpy as np
import pytest
import torch
from conftest import in_shared

from lib import motion, toy
from lib.motion import SKELETONS, features_to_joints, joints_to_features

GOLDEN, needs_golden = in_shared('golden')
SAMPLES, needs_samples = in_shared('data', 'hml3d_samples', 'HumanML3D')
SMPL, KIT = SKELETONS['smpl22'], SKELETONS['kit21']
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
    height = 1.0 + 0.05 * np.sin(np.arange(T) / 5)
    root = np.stack([0.4 + np.linspace(0, 1, T), height, -0.3 + np.linspace(0, 2, T)], -1)
    return joints_from_bones(root, bones, skeleton)


@needs_golden
@needs_samples
@pytest.mark.parametrize('i, clip', [(0, '000612'), (1, '012314')])
def test_features_and_joints_match_humanml3d(i, clip):
    golden = np.load(os.path.join(GOLDEN, 't2m', 'motion.npz'))
    # the arrays were made for one body: bones of its lengths, and a path scaled with leg length
    joints = golden[f'positions_{i}'].astype(float)
    bones = joints - joints[:, SMPL.parents]
    own = np.linalg.norm(bones, axis=-1, keepdims=True)
    wanted = np.linalg.norm(golden['tgt_offsets'], axis=-1)[:, None]
    scale = wanted[[5, 8]].sum() / own[0, [5, 8]].sum()   # right knee and ankle
    joints = joints_from_bones(scale * joints[:, 0], wanted * bones / np.maximum(own, 1e-8), SMPL)
    assert np.abs(joints_to_features(joints, SMPL) - golden[f'features_{i}']).max() < 1e-4

    real = np.load(os.path.join(SAMPLES, 'new_joint_vecs', f'{clip}.npy'))
    for features, recovered in ((golden[f'features_{i}'], golden[f'recovered_{i}']),
                                (real, golden[f'hml_{clip}_recovered'])):
        assert np.abs(features_to_joints(features, 22) - recovered).max() < 1e-5


@needs_golden
def test_skeletons_match_humanml3d():
    with open(os.path.join(GOLDEN, 'skeletons.json')) as f:
        golden = json.load(f)
    assert list(SMPL.names) == golden['hml3d']['joint_names']
    for key, skeleton in (('hml3d', SMPL), ('kit', KIT)):
        want = golden[key]
        assert (skeleton.raw_offsets == want['raw_offsets']).all()
        assert [list(chain) for chain in skeleton.chains] == want['kinematic_chains']
        assert list(skeleton.feet) == want['left_foot'] + want['right_foot']
        assert list(skeleton.facing) == want['facing_joints_rhip_lhip_rsho_lsho']
        assert skeleton.fps == want['fps']
        assert skeleton.contact_threshold == want['foot_contact_threshold']


@both_headings
@pytest.mark.parametrize('skeleton', [SMPL, KIT])
def test_round_trip_keeps_the_motion(skeleton, steady):
    """The round trip moves the body as a whole, so it keeps the distances between all joints."""
    joints = body(90, skeleton)
    features = joints_to_features(joints, skeleton, steady=steady)
    assert features.shape == (89, skeleton.dim)
    back = features_to_joints(features, skeleton.n_joints)
    for t in (0, 40, 88):
        distances = [np.linalg.norm(x[t][:, None] - x[0], axis=-1) for x in (joints, back)]
        assert np.allclose(*distances, atol=1e-9)
    assert np.allclose(back[0, 0, [0, 2]], 0)
    assert back[..., 1].min() > -1e-9

    batch = torch.tensor(np.stack([features[::-1], features]), dtype=torch.float32)
    from_torch = features_to_joints(batch, skeleton.n_joints)
    assert from_torch.dtype == torch.float32
    assert np.abs(from_torch[1].numpy() - back).max() < 1e-5


@both_headings
def test_spin_keeps_its_angle(steady):
    """In 6 s to the right of where it began: HumanML3D's heading jumps in the middle of a turn,
    and its rotations depend on the heading. The steady ones do neither."""
    angles = 3.5 * np.pi * np.clip((np.arange(260) - 70) / 120, 0, 1)
    pose = body(1)[0] - body(1)[0, 0] + [0, 1, 0]
    joints = motion._rotate_y(np.repeat(pose[None], 260, 0), angles[:, None])
    features = joints_to_features(joints, SMPL, steady=steady)
    back = features_to_joints(features, 22)
    hips = back[:, 1] - back[:, 2]
    around = np.unwrap(np.arctan2(hips[:, 2], hips[:, 0]))
    assert np.allclose(np.abs(around - around[0]), angles[:-1], atol=1e-6)
    assert (np.abs(features[:, 0]).max() < 0.05) == steady   # half of 3.5 pi / 120 is 0.046
    assert np.allclose(features[5, 67:193], features[250, 67:193], atol=0.01) == steady


@both_headings
def test_features_do_not_depend_on_place_and_direction(steady):
    """Including a body that faces exactly backwards, where yaw is ambiguous (plus or minus pi)."""
    joints = body(60)
    moved = motion._rotate_y(joints, np.full((60, 1), 0.7)) + [3, 1, -2]
    rest = joints_from_bones(0, np.repeat(SMPL.raw_offsets[None] * 0.25, 30, 0), SMPL)
    for pair in ((joints, moved), (rest, rest * [-1, 1, -1])):
        assert np.allclose(*[joints_to_features(x, SMPL, steady=steady) for x in pair], atol=1e-8)


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
    assert np.isfinite(joints_to_features(np.zeros((5, 22, 3)), SMPL)).all()   # of no length


@pytest.mark.parametrize('work, words', [
    (lambda: joints_to_features(np.zeros((9, 21, 3)), SMPL), '22, 3'),
    (lambda: joints_to_features(np.full((9, 22, 3), np.nan), SMPL), 'NaN'),
    (lambda: features_to_joints(np.zeros((9, 251)), 22), '263 .* 251')])
def test_invalid_arrays_raise(work, words):
    with pytest.raises(ValueError, match=words):
        work()


def test_smoothing_and_resampling_keep_straight_lines():
    line = np.arange(31)[:, None, None] * np.ones((1, 2, 3)) / 30
    assert np.allclose(motion.smooth(line, 3)[12:18], line[12:18])
    assert np.allclose(motion.smooth(np.ones(30), 3), 1)   # the ends too
    resampled = motion.resample(line, 30, 20)
    assert resampled.shape == (21, 2, 3)
    assert np.allclose(resampled[:, 0, 0], np.arange(21) / 20)


def slide(joints):
    """Mean step, in metres per frame, of feet that are low and slow."""
    feet = joints[:, list(SMPL.feet)]
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
    assert slide(locked) < slide(skating) / 2

    moved = np.linalg.norm(locked - skating, axis=-1)
    assert 0.001 < moved.mean(0).max() < 0.03
    legs = [j for j, name in enumerate(SMPL.names) if name.endswith(('knee', 'ankle', 'foot'))]
    assert np.delete(moved, legs, axis=1).max() == 0
    lengths = [np.linalg.norm(x - x[:, SMPL.parents], axis=-1) for x in (skating, locked)]
    assert np.allclose(*lengths, atol=1e-3)


def test_foot_locking_in_millimetres_and_without_planted_feet():
    joints = body(60, KIT) * KIT.units_per_metre
    moved = np.linalg.norm(motion.lock_feet(joints, KIT) - joints, axis=-1)
    assert moved.mean(0).max() < 30   # false for NaN as well
    too_fast = np.repeat(body(1), 40, 0)
    too_fast[:, :, 2] += np.linspace(0, 8, 40)[:, None]   # 4 m/s
    assert np.allclose(motion.lock_feet(too_fast, SMPL), too_fast, atol=1e-9)
