"""motion.py: the representation against the field's own numbers, and what must hold of any body."""
import json
import os

import numpy as np
import pytest

from lib import motion
from lib import toy
from lib.motion import SKELETONS, features_to_joints, joints_to_features

SHARED = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..', 'shared')
GOLDEN = os.path.join(SHARED, 'golden', 't2m', 'motion.npz')
SAMPLES = os.path.join(SHARED, 'data', 'hml3d_samples', 'HumanML3D')
SMPL, KIT = SKELETONS['smpl22'], SKELETONS['kit21']
needs_shared = pytest.mark.skipif(
    not os.path.exists(GOLDEN), reason='../shared is not here: no golden arrays to compare with')


def body(T, skeleton=SMPL, seed=0):
    """A body that wanders and wobbles (T, J, 3): smooth random bones around the rest pose."""
    r = np.random.default_rng(seed)
    J = skeleton.n_joints
    time = np.linspace(0, 6, T)[:, None, None]
    wave = np.sin(time * r.uniform(0.5, 2, (J, 3)) + r.uniform(0, 6, (J, 3)))
    bones = skeleton.raw_offsets * 0.25 + 0.08 * wave
    joints = np.zeros((T, J, 3))
    joints[:, 0, 0] = 0.4 + np.linspace(0, 1, T)
    joints[:, 0, 1] = 1.0 + 0.05 * np.sin(np.arange(T) / 5)
    joints[:, 0, 2] = -0.3 + np.linspace(0, 2, T)
    for chain in skeleton.chains:
        for parent, j in zip(chain, chain[1:]):
            joints[:, j] = joints[:, parent] + bones[:, j]
    return joints


def turned(joints, angle):
    """A pose (J, 3) turned about the Y axis."""
    c, s = np.cos(angle), np.sin(angle)
    return joints @ np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])


# ----------------------------------------------------------------------------------- the field

@needs_shared
@pytest.mark.parametrize('i', [0, 1])
def test_features_and_recovery_equal_the_field(i):
    golden = np.load(GOLDEN)
    features = joints_to_features(golden[f'positions_{i}'], SMPL, golden['tgt_offsets'])
    assert np.abs(features - golden[f'features_{i}']).max() < 1e-4
    joints = features_to_joints(golden[f'features_{i}'], 22)
    assert np.abs(joints - golden[f'recovered_{i}']).max() < 1e-5


@needs_shared
@pytest.mark.parametrize('clip', ['000612', '012314'])
def test_recovery_of_published_clips(clip):
    features = np.load(os.path.join(SAMPLES, 'new_joint_vecs', f'{clip}.npy'))
    joints = features_to_joints(features, 22)
    assert np.abs(joints - np.load(GOLDEN)[f'hml_{clip}_recovered']).max() < 1e-5


@needs_shared
def test_skeletons_equal_the_field():
    with open(os.path.join(SHARED, 'golden', 'skeletons.json')) as f:
        golden = json.load(f)
    for key, skeleton in (('hml3d', SMPL), ('kit', KIT)):
        want = golden[key]
        assert (skeleton.raw_offsets == want['raw_offsets']).all()
        assert [list(chain) for chain in skeleton.chains] == want['kinematic_chains']
        assert list(skeleton.leg_joints) == want['leg_joints']
        assert list(skeleton.feet) == want['left_foot'] + want['right_foot']
        assert list(skeleton.facing) == want['facing_joints_rhip_lhip_rsho_lsho']
        assert skeleton.fps == want['fps']
        assert skeleton.contact_threshold == want['foot_contact_threshold']
    assert list(SMPL.names) == golden['hml3d']['joint_names']


# ------------------------------------------------------------------------------------ any body

@pytest.mark.parametrize('skeleton', [SMPL, KIT])
def test_round_trip_keeps_the_motion(skeleton):
    """What comes back is the input moved as a whole to the origin, floor and facing: all
    distances are kept."""
    joints = body(90, skeleton)
    features = joints_to_features(joints, skeleton)
    assert features.shape == (89, skeleton.dim)
    back = features_to_joints(features, skeleton.n_joints)
    for t in (0, 40, 88):
        want = np.linalg.norm(joints[t][:, None] - joints[0], axis=-1)
        assert np.allclose(np.linalg.norm(back[t][:, None] - back[0], axis=-1), want, atol=1e-9)
    assert np.allclose(back[0, 0, [0, 2]], 0)
    assert back[..., 1].min() > -1e-9


def test_spinning():
    """Two turns in 6 s: through +-180 degrees the published code gives one frame's yaw velocity
    the wrong sign; and only the steady heading is free of jumps."""
    spin = np.linspace(0, 4 * np.pi, 120)
    rest = body(1)[0] - body(1)[0, 0] + [0, 1, 0]
    joints = np.stack([turned(rest, angle) for angle in spin])
    for steady in (False, True):
        features = joints_to_features(joints, SMPL, steady=steady)
        back = features_to_joints(features, 22)
        hips = back[:, 1] - back[:, 2]
        around = np.unwrap(np.arctan2(hips[:, 2], hips[:, 0]))
        assert np.allclose(np.abs(around - around[0]), spin[:-1], atol=1e-6)
        # a half-angle: 2 pi / 59.5 frames is 0.053
        assert (np.abs(features[:, 0]).max() < 0.06) == steady


@pytest.mark.parametrize('angle', [0.7, np.pi])
def test_features_do_not_depend_on_where_the_body_stands(angle):
    joints = body(60)
    moved = turned(joints, angle) + [3, 1, -2]
    a, b = joints_to_features(joints, SMPL), joints_to_features(moved, SMPL)
    assert np.allclose(a, b, atol=1e-8)


@pytest.mark.parametrize('steady', [False, True])
def test_a_pose_has_the_same_features_after_a_turn(steady):
    """The field's rotations know which way the body faced at first; steady ones do not."""
    pose = body(2)[0]
    pose[:, [0, 2]] -= pose[0, [0, 2]]
    turn = np.pi / 2 * np.clip((np.arange(200) - 60) / 80, 0, 1)
    joints = motion._turn(np.repeat(pose[None], 200, 0), turn[:, None])
    features = joints_to_features(joints, SMPL, steady=steady)
    before, after = features[5], features[190]
    rotations = slice(67, 193)
    assert np.allclose(np.delete(before, np.r_[rotations]), np.delete(after, np.r_[rotations]),
                       atol=1e-3)
    assert np.allclose(before[rotations], after[rotations], atol=0.01) == steady
    field = joints_to_features(joints, SMPL)
    assert np.allclose(features_to_joints(features, 22), features_to_joints(field, 22), atol=1e-3)


@pytest.mark.parametrize('steady', [False, True])
def test_a_body_that_faces_exactly_backwards(steady):
    """Half a turn to Z+ has no shortest way: it must still be one about Y."""
    rest = SMPL.raw_offsets * 0.25
    joints = np.zeros((30, 22, 3))
    for chain in SMPL.chains:
        for parent, j in zip(chain, chain[1:]):
            joints[:, j] = joints[:, parent] + rest[j]
    backwards = joints * [-1, 1, -1]
    assert np.allclose(joints_to_features(backwards, SMPL, steady=steady),
                       joints_to_features(joints, SMPL, steady=steady), atol=1e-9)


def test_recovery_in_torch_batched():
    torch = pytest.importorskip('torch')
    features = joints_to_features(body(50), SMPL)
    batch = torch.tensor(np.stack([features, features[::-1]]), dtype=torch.float32)
    joints = features_to_joints(batch, 22)
    assert joints.shape == (2, 49, 22, 3)
    assert joints.dtype == torch.float32
    assert np.abs(joints[0].numpy() - features_to_joints(features, 22)).max() < 1e-5


def test_mirror_twice_is_identity_and_swaps_contacts():
    for skeleton in (SMPL, KIT):
        joints = body(30, skeleton)
        assert np.allclose(motion.mirror(motion.mirror(joints, skeleton), skeleton), joints)
    joints = np.repeat(body(1), 41, 0)
    joints[:, [8, 11], 2] += np.linspace(0, 4, 41)[:, None]  # only the right foot moves
    contacts = joints_to_features(joints, SMPL)[:, -4:]
    assert (contacts == [1, 1, 0, 0]).all()
    contacts = joints_to_features(motion.mirror(joints, SMPL), SMPL)[:, -4:]
    assert (contacts == [0, 0, 1, 1]).all()


def test_retargeting_gives_the_bone_lengths_asked_for():
    offsets = motion.bone_offsets(body(1, seed=5)[0], SMPL)
    back = features_to_joints(joints_to_features(body(50), SMPL, offsets), 22)
    lengths = np.linalg.norm(back - back[:, SMPL.parents], axis=-1)
    assert np.allclose(lengths, np.linalg.norm(offsets, axis=-1), atol=1e-9)


def test_degenerate_poses_stay_finite():
    joints = np.zeros((5, 22, 3))  # every bone without length
    assert np.isfinite(joints_to_features(joints, SMPL)).all()
    upside_down = np.repeat(body(1) * [1, -1, 1], 5, 0)
    # a bone exactly opposite to its rest direction
    upside_down[:, 5] = upside_down[:, 2] - SMPL.raw_offsets[5]
    assert np.isfinite(joints_to_features(upside_down, SMPL)).all()


def test_bad_joints_and_widths_are_refused():
    with pytest.raises(ValueError, match='22, 3'):
        joints_to_features(np.zeros((9, 21, 3)), SMPL)
    with pytest.raises(ValueError, match='NaN'):
        joints_to_features(np.full((9, 22, 3), np.nan), SMPL)
    with pytest.raises(ValueError, match='width 263 .* found 251'):
        features_to_joints(np.zeros((9, 251)), 22)


def test_smoothing_keeps_constants_and_ends():
    x = np.stack([np.ones(30), np.arange(30)], -1)
    out = motion.smooth(x, 3)
    assert out.shape == x.shape
    assert np.allclose(out[:, 0], 1)
    assert np.allclose(out[12:18], x[12:18])  # far from the ends a line stays a line
    assert np.allclose(motion.smooth(x[:, 1], 3), out[:, 1])


def test_resampling_keeps_straight_lines():
    line = np.arange(31)[:, None, None] * np.ones((1, 2, 3)) / 30
    out = motion.resample(line, 30, 20)
    assert len(out) == 21
    assert np.allclose(out[:, 0, 0], np.arange(21) / 20)


# ------------------------------------------------------------------------------- feet that stand


def slide(joints, skeleton):
    """Mean step, metres a frame, of feet that are low and slow."""
    feet = joints[:, list(skeleton.feet)] / skeleton.units_per_metre
    step = np.linalg.norm(np.diff(feet, axis=0)[..., [0, 2]], axis=-1)
    low = feet[:-1, :, 1] < np.percentile(feet[..., 1], 5, axis=0) + 0.02
    return step[low & (step < 0.04)].mean()


def test_locked_feet_slide_less_than_half_as_far():
    r = np.random.default_rng(0)
    for seed in range(4):
        joints = toy.make_clip(seed)['joints'].astype(float)
        drift = motion.smooth(r.normal(0, 0.03, (len(joints), 1, 3)), 3) * [1, 0, 1]
        skates = joints + drift
        before = skates.copy()
        locked = motion.lock_feet(skates, SMPL)
        assert np.array_equal(skates, before)
        assert slide(locked, SMPL) < slide(skates, SMPL) / 2
        moved = np.linalg.norm(locked - skates, axis=-1)
        assert 0.001 < moved.mean(0).max() < 0.03
        legs = [j for j, name in enumerate(SMPL.names) if name.endswith(('knee', 'ankle', 'foot'))]
        others = np.setdiff1d(np.arange(22), legs)
        assert moved[:, others].max() == 0
        for j in legs:
            bones = [np.linalg.norm(x[:, j] - x[:, SMPL.parents[j]], axis=-1)
                     for x in (skates, locked)]
            assert np.allclose(*bones, atol=1e-3)


def test_feet_of_kit_and_feet_in_the_air():
    joints = body(60, KIT) * KIT.units_per_metre
    locked = motion.lock_feet(joints, KIT)
    assert np.isfinite(locked).all()
    assert np.linalg.norm(locked - joints, axis=-1).mean(0).max() < 30
    runs = np.repeat(body(1), 40, 0)
    runs[:, :, 2] += np.linspace(0, 8, 40)[:, None]   # 4 m/s: nothing stands
    assert np.allclose(motion.lock_feet(runs, SMPL), runs, atol=1e-9)
