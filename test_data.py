"""motion.py and prepare_data.py: the representation against the field's own numbers, BVH, packing, each rule of each
data set on a small folder written here, and the sentences that bad input gets."""
import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

import motion
import prepare_data
from motion import SKELETONS

SHARED = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', 'shared')
GOLDEN = os.path.join(SHARED, 'golden', 't2m', 'motion.npz')
SAMPLES = os.path.join(SHARED, 'data', 'hml3d_samples', 'HumanML3D')
needs_shared = pytest.mark.skipif(not os.path.exists(GOLDEN), reason='../shared is not here: no golden arrays to compare with')
SMPL, KIT = SKELETONS['smpl22'], SKELETONS['kit21']
rng = np.random.default_rng(0)


def body(T, skeleton=SMPL, seed=0):
    """A body that wanders and wobbles: (T, J, 3) with smooth random bone directions around the rest pose."""
    r = np.random.default_rng(seed)
    wave = np.sin(np.linspace(0, 6, T)[:, None, None] * r.uniform(0.5, 2, (skeleton.n_joints, 3)) + r.uniform(0, 6, (skeleton.n_joints, 3)))
    bones = skeleton.raw_offsets * 0.25 + 0.08 * wave
    joints = np.zeros((T, skeleton.n_joints, 3))
    joints[:, 0] = [0.4, 1.0, -0.3] + np.stack([np.linspace(0, 1, T), 0.05 * np.sin(np.arange(T) / 5), np.linspace(0, 2, T)], -1)
    for chain in skeleton.chains:
        for parent, j in zip(chain, chain[1:]):
            joints[:, j] = joints[:, parent] + bones[:, j]
    return joints


# ------------------------------------------------------------------------------------------------------ representation

@needs_shared
@pytest.mark.parametrize('i', [0, 1])
def test_features_and_recovery_equal_the_field(i):
    golden = np.load(GOLDEN)
    features = motion.joints_to_features(golden[f'positions_{i}'], SMPL, golden['tgt_offsets'])
    assert np.abs(features - golden[f'features_{i}']).max() < 1e-4
    joints = motion.features_to_joints(golden[f'features_{i}'], 22)
    assert np.abs(joints - golden[f'recovered_{i}']).max() < 1e-5


@needs_shared
@pytest.mark.parametrize('clip', ['000612', '012314'])
def test_recovery_of_published_clips(clip):
    features = np.load(os.path.join(SAMPLES, 'new_joint_vecs', f'{clip}.npy'))
    assert np.abs(motion.features_to_joints(features, 22) - np.load(GOLDEN)[f'hml_{clip}_recovered']).max() < 1e-5


@needs_shared
def test_skeletons_equal_the_field():
    with open(os.path.join(SHARED, 'golden', 'skeletons.json')) as f:
        golden = json.load(f)
    for key, skeleton in (('hml3d', SMPL), ('kit', KIT)):
        want = golden[key]
        assert (skeleton.raw_offsets == want['raw_offsets']).all()
        assert [list(c) for c in skeleton.chains] == want['kinematic_chains'] and list(skeleton.leg_joints) == want['leg_joints']
        assert list(skeleton.feet) == want['left_foot'] + want['right_foot']
        assert list(skeleton.facing) == want['facing_joints_rhip_lhip_rsho_lsho']
        assert (skeleton.fps, skeleton.contact_threshold) == (want['fps'], want['foot_contact_threshold'])
    assert list(SMPL.names) == golden['hml3d']['joint_names']


@pytest.mark.parametrize('skeleton', [SMPL, KIT])
def test_round_trip_keeps_the_motion(skeleton):
    """Recovered joints are the input ones moved as a whole to the origin, floor and facing: all distances are kept."""
    joints = body(90, skeleton)
    features = motion.joints_to_features(joints, skeleton)
    assert features.shape == (89, skeleton.dim)
    back = motion.features_to_joints(features, skeleton.n_joints)
    for t in (0, 40, 88):
        want = np.linalg.norm(joints[t][:, None] - joints[0][None], axis=-1)
        assert np.allclose(np.linalg.norm(back[t][:, None] - back[0][None], axis=-1), want, atol=1e-9)
    assert np.allclose(back[0, 0, [0, 2]], 0) and back[..., 1].min() > -1e-9


def test_spinning():
    """Two turns in 6 s: through +-180 degrees the published code gives one frame's yaw velocity the wrong sign; and only the
    steady heading is free of jumps."""
    spin = np.linspace(0, 4 * np.pi, 120)
    rest = body(1)[0] - body(1)[0, 0] + [0, 1, 0]
    joints = np.stack([rest @ np.array([[np.cos(a), 0, -np.sin(a)], [0, 1, 0], [np.sin(a), 0, np.cos(a)]]) for a in spin])
    for steady in (False, True):
        features = motion.joints_to_features(joints, SMPL, steady=steady)
        back = motion.features_to_joints(features, 22)
        around = np.unwrap(np.arctan2(*np.moveaxis((back[:, 1] - back[:, 2])[:, [2, 0]], -1, 0)))
        assert np.allclose(np.abs(around - around[0]), spin[:-1], atol=1e-6)
        assert (np.abs(features[:, 0]).max() < 0.06) == steady  # a half-angle: 2 pi / 59.5 frames is 0.053


def test_features_do_not_depend_on_where_the_body_stands():
    joints = body(60)
    c, s = np.cos(0.7), np.sin(0.7)
    moved = joints @ np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]]) + [3, 1, -2]
    a, b = motion.joints_to_features(joints, SMPL), motion.joints_to_features(moved, SMPL)
    assert np.allclose(a, b, atol=1e-8)


def test_recovery_in_torch_batched():
    torch = pytest.importorskip('torch')
    features = motion.joints_to_features(body(50), SMPL)
    batch = torch.tensor(np.stack([features, features[::-1].copy()]), dtype=torch.float32)
    joints = motion.features_to_joints(batch, 22)
    assert joints.shape == (2, 49, 22, 3) and joints.dtype == torch.float32
    assert np.abs(joints[0].numpy() - motion.features_to_joints(features, 22)).max() < 1e-5


def test_mirror_twice_is_identity_and_swaps_contacts():
    for skeleton in (SMPL, KIT):
        joints = body(30, skeleton)
        assert np.allclose(motion.mirror(motion.mirror(joints, skeleton), skeleton), joints)
    joints = np.repeat(body(1), 41, 0)
    joints[:, [8, 11], 2] += np.linspace(0, 4, 41)[:, None]  # only the right foot moves
    contacts = motion.joints_to_features(joints, SMPL)[:, -4:]
    assert (contacts == [1, 1, 0, 0]).all()
    assert (motion.joints_to_features(motion.mirror(joints, SMPL), SMPL)[:, -4:] == [0, 0, 1, 1]).all()


def test_retargeting_gives_the_bone_lengths_asked_for():
    offsets = motion.bone_offsets(body(1, seed=5)[0], SMPL)
    back = motion.features_to_joints(motion.joints_to_features(body(50), SMPL, offsets), 22)
    lengths = np.linalg.norm(back - back[:, np.maximum(SMPL.parents, 0)], axis=-1)
    assert np.allclose(lengths, np.linalg.norm(offsets, axis=-1), atol=1e-9)


def test_degenerate_poses_stay_finite():
    joints = np.zeros((5, 22, 3))  # every bone without length
    assert np.isfinite(motion.joints_to_features(joints, SMPL)).all()
    upside_down = np.repeat(body(1) * [1, -1, 1], 5, 0)
    upside_down[:, 5] = upside_down[:, 2] - SMPL.raw_offsets[5]  # a bone exactly opposite to its rest direction
    assert np.isfinite(motion.joints_to_features(upside_down, SMPL)).all()


def test_bad_joints_and_widths_are_refused():
    with pytest.raises(ValueError, match='22, 3'):
        motion.joints_to_features(np.zeros((9, 21, 3)), SMPL)
    with pytest.raises(ValueError, match='NaN'):
        motion.joints_to_features(np.full((9, 22, 3), np.nan), SMPL)
    with pytest.raises(ValueError, match='width 263 .* found 251'):
        motion.features_to_joints(np.zeros((9, 251)), 22)


# ----------------------------------------------------------------------------------------------------------------- BVH

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
ROWS = ['0 20 0 0 0 0 0 0 0 0 0 0 0 0 0', '1 20 0 90 0 0 0 0 0 0 0 0 0 0 0', '1e0 2.0E1 0 0 0 90 0 90 0 0 0 0 0 0 -1.5e-7']


def bvh(text):
    return 'tiny.bvh', text.encode()


def test_bvh_reader_and_forward_kinematics(tmp_path):
    path = tmp_path / 'tiny.bvh'
    path.write_bytes((HEAD + '\n'.join(ROWS) + '\n\n \n').replace('\n', '\r\n').encode())
    names, parents, offsets, channels, frames, fps = motion.read_bvh(str(path))
    assert names == ['Hips', 'Leg', 'Foot', 'Arm'] and parents.tolist() == [-1, 0, 1, 0] and fps == 20
    assert frames.shape == (3, 15) and [len(c) for c in channels] == [6, 3, 3, 3]
    assert offsets[2].tolist() == [0, -5, 1] and offsets[3].tolist() == [2, 0, 0]  # end sites leave no trace
    joints = motion.bvh_to_joints(parents, offsets, channels, frames)
    assert np.allclose(joints[0], [[0, 20, 0], [0, 10, 0], [0, 5, 1], [2, 20, 0]])
    assert np.allclose(joints[1], [[1, 20, 0], [11, 20, 0], [16, 20, 1], [1, 22, 0]])       # 90 degrees about Z
    assert np.allclose(joints[2], [[1, 20, 0], [1, 10, 0], [-4, 9, 0], [1, 20, -2]], atol=1e-6)  # root 90 about Y, leg 90 about X


def test_position_channels_replace_offsets():
    head = HEAD.replace('CHANNELS 3', 'CHANNELS 6 Xposition Yposition Zposition')
    row = '0 20 0 0 0 0  0 -11 0 0 0 0  0 -6 0 0 0 0  3 0 0 0 0 0'
    _, parents, offsets, channels, frames, _ = motion.read_bvh(bvh(head.replace('Frames: 3', 'Frames: 1') + row))
    joints = motion.bvh_to_joints(parents, offsets, channels, frames)
    assert np.allclose(joints[0], [[0, 20, 0], [0, 9, 0], [0, 3, 0], [3, 20, 0]])


@pytest.mark.parametrize('text, words', [
    (HEAD + '\n'.join(ROWS[:2]), '2 frames where its header promises 3'),
    (HEAD + '\n'.join(ROWS)[:-14], 'truncated'),
    (HEAD + '\n'.join(ROWS) + '\n' + ROWS[0], '4 frames where its header promises 3'),
    (HEAD + '\n'.join(ROWS).replace('90', 'ninety', 1), 'not a number'),
    (HEAD + '\n'.join(ROWS).replace('90', 'nan', 1), 'NaN'),
    (HEAD[:150] + HEAD[HEAD.index('MOTION'):], 'HIERARCHY that cannot be read'),
    (HEAD.split('MOTION')[0], 'not a BVH file'),
    (HEAD.replace('Frames: 3', 'Frames: many'), 'Frames:'),
    ('garbage', 'not a BVH file'), ('', 'not a BVH file')])
def test_broken_bvh_gets_one_sentence(text, words):
    with pytest.raises(ValueError, match='tiny.bvh') as error:
        motion.read_bvh(bvh(text))
    assert words in str(error.value) and '\n' not in str(error.value)


def test_another_skeleton_gets_one_sentence():
    with pytest.raises(ValueError, match=r'tiny.bvh has another skeleton \(4 joints, without .*expected the 21 joints'):
        prepare_data.bandai_joints(bvh(HEAD + '\n'.join(ROWS)))


def test_resampling_keeps_straight_lines():
    line = np.arange(31)[:, None, None] * np.ones((1, 2, 3)) / 30
    out = motion.resample(line, 30, 20)
    assert len(out) == 21 and np.allclose(out[:, 0, 0], np.arange(21) / 20)


# --------------------------------------------------------------------------------------------------------------- bandai

def bandai_bvh(T, seed=0):
    """A Bandai-like file: all 22 joints hang from the root by position channels."""
    r = np.random.default_rng(seed)
    names = ['joint_Root'] + sorted(prepare_data.BANDAI_JOINTS.values())
    text = 'HIERARCHY\nROOT joint_Root\n{\nOFFSET 0 0 0\nCHANNELS 3 Xposition Yposition Zposition\n'
    for name in names[1:]:
        text += f'JOINT {name}\n{{\nOFFSET 0 0 0\nCHANNELS 3 Xposition Yposition Zposition\nEnd Site\n{{\nOFFSET 0 0 0\n}}\n}}\n'
    rows = np.concatenate([np.zeros((T, 3)), r.uniform(0, 100, (1, 63)) + np.linspace(0, 50, T)[:, None]], 1)
    return text + f'}}\nMOTION\nFrames: {T}\nFrame Time: 0.0333333\n' + '\n'.join(' '.join(f'{x:.4f}' for x in row) for row in rows)


@pytest.fixture
def bandai_folder(tmp_path):
    src = tmp_path / 'src'
    src.mkdir()
    for i in range(12):
        (src / f'dataset-2_wave-left-hand_elderly_{i:03d}.bvh').write_text(bandai_bvh(90, i))
    (src / 'dataset-1_walk_happy_001.bvh').write_text(bandai_bvh(30))                       # too short
    (src / 'dataset-1_dance-long_normal_001.bvh').write_text(bandai_bvh(700))               # too long: cut
    (src / 'dataset-1_bow_sad_001.bvh').write_text(bandai_bvh(90)[:-400])                   # truncated
    (src / 'dataset-1_moonwalk_sad_001.bvh').write_text(bandai_bvh(90))                     # unknown words
    (src / 'notes.txt').write_text('not a clip')
    return str(src)


def test_bandai_end_to_end(bandai_folder, tmp_path, capsys):
    out = str(tmp_path / 'data' / 'bandai')
    assert prepare_data.main(['bandai', f'--src={bandai_folder}', f'--out={out}']) == 0
    printed = capsys.readouterr().out
    assert 'skipped 1: shorter than 40 frames' in printed and 'truncated' in printed and 'moonwalk' in printed
    meta, mean, std = motion.load_meta(out)
    assert meta['fps'] == 20 and meta['dim'] == 263 and meta['unit_length'] == 4 and meta['steady'] and sum(meta['skipped'].values()) == 3
    train = motion.load_split(out, 'train')
    names = train.names.tolist()
    for name in [n for n in names if not n.startswith('M')]:
        i, j = names.index(name), names.index('M' + name)  # each training clip has its mirror image, words swapped
        sides = [{w for c in train.captions if c['clip'] == k for w in c['text'].split()} & {'left', 'right'} for k in (i, j)]
        assert sides == ([{'left'}, {'right'}] if 'left' in name else [set(), set()])
        a, b = train.clip(i), train.clip(j)
        assert np.allclose(a[:, [0, 1]], -b[:, [0, 1]], atol=1e-5) and np.allclose(a[:, [2, 3]], b[:, [2, 3]], atol=1e-5)
    assert train.length.max() <= 196 and train.length.min() >= 40
    assert all(len({c['text'] for c in train.captions if c['clip'] == k}) >= 4 for k in range(len(train)))
    everything = sum((motion.load_split(out, s).names.tolist() for s in meta['counts']), [])
    assert sorted(n for n in everything if 'dance' in n and n[0] != 'M') == [f'dataset-1_dance-long_normal_001-{i}' for i in range(3)]

    archive = str(tmp_path / 'b.tar.xz')  # the archive gives the very same data
    with tarfile.open(archive, 'w:xz') as tar:
        for name in sorted(os.listdir(bandai_folder)):
            tar.add(os.path.join(bandai_folder, name), f'x/{name}')
    again = str(tmp_path / 'data' / 'again')
    assert prepare_data.main(['bandai', f'--src={archive}', f'--out={again}']) == 0
    other = motion.load_split(again, 'train')
    assert other.names.tolist() == names and np.array_equal(other.features, train.features) and other.captions == train.captions


def test_bandai_captions_are_english_with_tags():
    for content in list(prepare_data.CONTENT) + [prepare_data.swap_sides(c) for c in prepare_data.CONTENT]:
        for style in prepare_data.STYLE:
            captions = prepare_data.bandai_captions(content, style)
            assert len({text for text, _ in captions}) >= 4
            for text, tokens in captions:
                assert len(text.split()) == len(tokens.split()) and '=' not in text + tokens and '/' not in text
                assert ('left' in text.split()) == ('left' in content) and ('right' in text.split()) == ('right' in content)
    assert prepare_data.bandai_captions('walk-turn-left', 'angry')[0] == (
        'a person walks forward and turns left angrily',
        'a/DET person/NOUN walk/VERB forward/ADV and/CCONJ turn/VERB left/ADV angrily/ADV')


def test_a_damaged_archive_leaves_nothing(tmp_path, capsys):
    archive = tmp_path / 'b.tar.xz'
    with tarfile.open(archive, 'w:xz') as tar:
        data = os.urandom(200_000).hex().encode()
        info = tarfile.TarInfo('x/dataset-1_bow_sad_001.bvh')
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    archive.write_bytes(archive.read_bytes()[:100_000])
    assert prepare_data.main(['bandai', f'--src={archive}', f'--out={tmp_path}/data/bandai']) == 2
    assert 'b.tar.xz cannot be read' in capsys.readouterr().err
    assert prepare_data.main(['bandai', f'--src={tmp_path}/nope', f'--out={tmp_path}/data/bandai']) == 2
    assert prepare_data.main(['bandai', f'--out={tmp_path}/data/bandai']) == 2
    assert not os.path.exists(tmp_path / 'data') or os.listdir(tmp_path / 'data') == []


# ----------------------------------------------------------------------------------------------------- hml3d, kit, babel

def field_folder(root, clips, texts, splits, dim=263, stats=True):
    os.makedirs(os.path.join(root, 'new_joint_vecs'))
    os.makedirs(os.path.join(root, 'texts'))
    for name, array in clips.items():
        np.save(os.path.join(root, 'new_joint_vecs', f'{name}.npy'), array)
    for name, text in texts.items():
        with open(os.path.join(root, 'texts', f'{name}.txt'), 'wb') as f:
            f.write(text.encode())
    for split, names in splits.items():
        with open(os.path.join(root, f'{split}.txt'), 'wb') as f:
            f.write('\r\n'.join(names).encode() + b'\r\n')
    if stats:
        np.save(os.path.join(root, 'Mean.npy'), np.zeros(dim))
        np.save(os.path.join(root, 'Std.npy'), np.r_[0.0, np.ones(dim - 1)])


def test_every_rule_of_hml3d(tmp_path, capsys):
    def clip(T, dim=263):
        return rng.standard_normal((T, dim))

    nan = clip(60)
    nan[7, 7] = np.nan
    line = 'a person walks.#a/DET person/NOUN walk/VERB#{}#{}'
    clips = {'whole': clip(100), 'parts': clip(150), 'short': clip(39), 'min': clip(40), 'long': clip(200), 'max': clip(199),
             'nan': nan, 'narrow': clip(60, 251), 'notext': clip(60), 'badline': clip(60)}
    texts = dict.fromkeys(['short', 'min', 'long', 'max', 'nan', 'narrow', 'missing'], line.format(0.0, 0.0))
    texts['whole'] = line.format(0.0, 0.0) + '\r\n' + line.format('nan', 'nan') + '\r\n\r\n'  # Windows line ends, nan is 0
    texts['parts'] = '\n'.join([line.format(0.0, 0.0), line.format(1.0, 4.0), line.format(2.0, 3.5), line.format(4.0, 9.0)])
    texts['badline'] = 'only words\n#no/DET text/NOUN#0.0#0.0\n' + line.format(0.0, 0.0)
    field_folder(tmp_path / 'src', clips, texts, {'train': list(clips) + ['missing'], 'val': ['min'], 'test': ['max']})
    (tmp_path / 'src' / 'new_joint_vecs' / 'broken.npy').write_bytes(b'\x93NUMPY no')
    with open(tmp_path / 'src' / 'train.txt', 'a') as f:
        f.write('broken\n')
    out = str(tmp_path / 'hml3d')
    assert prepare_data.main(['hml3d', f'--src={tmp_path}/src', f'--out={out}']) == 0
    train = motion.load_split(out, 'train')
    # sub-clips by from/to are clips of their own; 2.0-3.5 s is too short for one; the whole clip keeps its own caption
    assert dict(zip(train.names.tolist(), train.length.tolist())) == {
        'whole': 100, 'parts-1': 60, 'parts-3': 70, 'parts': 150, 'min': 40, 'max': 199, 'badline': 60}
    per_clip = {str(train.names[i]): sum(c['clip'] == i for c in train.captions) for i in range(len(train))}
    assert per_clip == {'whole': 2, 'parts-1': 1, 'parts-3': 1, 'parts': 1, 'min': 1, 'max': 1, 'badline': 1}
    i = train.names.tolist().index('parts-1')
    assert np.array_equal(train.clip(i), clips['parts'][20:80].astype(np.float32))
    assert train.captions[0] == {'clip': 0, 'text': 'a person walks.', 'tokens': 'a/DET person/NOUN walk/VERB'}
    meta, mean, std = motion.load_meta(out)
    assert meta['skipped'] == {
        'clip shorter than 40 frames': 1, 'clip of 200 frames or more': 1, 'sub-clip shorter than 40 frames': 1,
        'NaN or infinity in features': 1, 'features not 263 wide (found shape (T, 251))': 1, 'text file missing': 1,
        'features file missing': 1, 'features file unreadable': 1, 'caption line without text, tags, from and to': 2}
    assert std[0] == np.float32(motion.STD_FLOOR) and (std[1:] == 1).all()  # the folder's own, floored
    assert 'skipped 1: NaN or infinity in features' in capsys.readouterr().out


def test_kit_has_251_dims_and_24_frames(tmp_path, capsys):
    clips = {'a': rng.standard_normal((24, 251)), 'b': rng.standard_normal((23, 251))}
    line = 'walks#walk/VERB#0.0#0.0'
    field_folder(tmp_path / 'src', clips, {'a': line, 'b': line}, {s: ['a', 'b'] for s in ('train', 'val', 'test')}, dim=251)
    assert prepare_data.main(['kit', f'--src={tmp_path}/src', f'--out={tmp_path}/kit']) == 0
    meta, _, _ = motion.load_meta(str(tmp_path / 'kit'))
    assert (meta['dim'], meta['fps'], meta['skeleton'], meta['min_frames'], meta['units_per_metre']) == (251, 12.5, 'kit21', 24, 1000)
    assert motion.load_split(str(tmp_path / 'kit'), 'test').length.tolist() == [24]
    assert prepare_data.main(['hml3d', f'--src={tmp_path}/src', f'--out={tmp_path}/hml3d']) == 2  # 251 is not 263
    assert 'hml3d has 263, kit 251' in capsys.readouterr().err and not os.path.exists(tmp_path / 'hml3d')


def test_folder_without_split_files_or_statistics(tmp_path, capsys):
    field_folder(tmp_path / 'src', {'a': rng.standard_normal((60, 263))}, {'a': 'walks#walk/VERB#0.0#0.0'}, {}, stats=False)
    assert prepare_data.main(['hml3d', f'--src={tmp_path}/src', f'--out={tmp_path}/hml3d']) == 0
    assert 'all 1 clips go into all three splits' in capsys.readouterr().out
    assert len(motion.load_split(str(tmp_path / 'hml3d'), 'test')) == 1
    assert prepare_data.main(['hml3d', f'--src={tmp_path}', f'--out={tmp_path}/x']) == 2
    assert 'has no folder new_joint_vecs' in capsys.readouterr().err


def test_nothing_usable_leaves_nothing(tmp_path, capsys):
    field_folder(tmp_path / 'src', {'a': np.full((60, 263), np.nan)}, {'a': 'walks#walk/VERB#0.0#0.0'}, {})
    assert prepare_data.main(['hml3d', f'--src={tmp_path}/src', f'--out={tmp_path}/hml3d']) == 2
    assert 'no usable training clip' in capsys.readouterr().err and sorted(os.listdir(tmp_path)) == ['src']


@needs_shared
def test_hml3d_samples(tmp_path):
    assert prepare_data.main(['hml3d', f'--src={SAMPLES}', f'--out={tmp_path}/hml3d']) == 0
    train = motion.load_split(str(tmp_path / 'hml3d'), 'train')
    assert train.names.tolist() == ['000000'] and len(train.captions) == 4


def test_babel(tmp_path, capsys):
    os.makedirs(tmp_path / 'src' / 'new_joint_vecs')
    np.save(tmp_path / 'src' / 'new_joint_vecs' / '11.npy', rng.standard_normal((300, 263)))
    np.save(tmp_path / 'src' / 'new_joint_vecs' / 'walk_poses.npy', rng.standard_normal((80, 263)))

    def label(text, *span):
        return dict(raw_label=text, proc_label=text, act_cat=['x'], **dict(zip(('start_t', 'end_t'), span)))

    entries = {'11': dict(babel_sid=11, feat_p='CMU/a/b_poses.npz', dur=15.0, seq_ann=dict(labels=[label('all of it')]), frame_ann=dict(labels=[
                   label('turn left', 0.0, 3.0), label('transition', 3.0, 6.0), label('wave', 6.0, 7.0), label('walk forward', 7.0, 14.0)])),
               '12': dict(babel_sid=12, feat_p='CMU/a/walk_poses.npz', dur=4.0, seq_ann=dict(labels=[label('jog')]), frame_ann=None),
               '13': dict(babel_sid=13, feat_p='CMU/a/gone.npz', dur=4.0, seq_ann=None, frame_ann=None)}
    for file in ('train.json', 'val.json'):
        (tmp_path / 'src' / file).write_text(json.dumps(entries))
    assert prepare_data.main(['babel', f'--src={tmp_path}/src', f'--out={tmp_path}/babel']) == 0
    train = motion.load_split(str(tmp_path / 'babel'), 'train')
    assert dict(zip(train.names.tolist(), train.length.tolist())) == {'11-0': 60, '11-3': 140, '12-0': 80}
    assert train.captions[0] == {'clip': 0, 'text': 'turn left', 'tokens': 'turn/VERB left/ADV'}
    skipped = motion.load_meta(str(tmp_path / 'babel'))[0]['skipped']
    assert skipped['segment shorter than 40 frames'] == skipped['features file missing'] == 3  # once in each split
    (tmp_path / 'src' / 'val.json').write_text('{"1": ')
    assert prepare_data.main(['babel', f'--src={tmp_path}/src', f'--out={tmp_path}/babel']) == 2
    assert 'val.json is not JSON' in capsys.readouterr().err
    assert len(motion.load_split(str(tmp_path / 'babel'), 'train')) == 3  # the old data set is still there


def test_simple_tags():
    assert prepare_data.simple_tags('Turn left with the left arm') == 'turn/VERB left/ADV with/ADP the/DET left/ADJ arm/NOUN'
    assert prepare_data.simple_tags('walk backwards slowly then sit') == 'walk/VERB backwards/ADV slowly/ADV then/CCONJ sit/VERB'


# -------------------------------------------------------------------------------------------------------- packed format

def small_set(folder, name='tiny', dim=263):
    os.makedirs(folder, exist_ok=True)
    clips = [('one', rng.standard_normal((50, dim)).astype(np.float32)), ('two', rng.standard_normal((61, dim)).astype(np.float32))]
    captions = [dict(clip=1, text='naïve walk', tokens='naïve/ADJ walk/NOUN')]
    counts = {'train': motion.save_split(folder, 'train', iter(clips), captions)}
    stats = motion.mean_std(np.load(os.path.join(folder, 'train_motion.npy')), 22)
    motion.save_meta(folder, dict(name=name, dim=dim, counts=counts), *stats)
    return clips, captions, stats


def test_packed_round_trip(tmp_path):
    clips, captions, (mean, std) = small_set(tmp_path)
    split = motion.load_split(str(tmp_path), 'train')
    assert isinstance(split.features, np.memmap) and len(split) == 2 and split.captions == captions
    for i, (name, features) in enumerate(clips):
        assert split.names[i] == name and np.array_equal(split.clip(i), features)
    flat = np.concatenate([f for _, f in clips]).astype(np.float64)
    assert np.allclose(mean, flat.mean(0), atol=1e-6) and np.allclose(std[4:67], flat.std(0)[4:67].mean(), atol=1e-6)
    assert np.allclose(std[1:3], flat.std(0)[1:3].mean(), atol=1e-6) and np.allclose(std[-4:], flat.std(0)[-4:].mean(), atol=1e-6)


def test_zero_variance_does_not_blow_up(tmp_path):
    flat = np.full((100, 263), 0.3, dtype=np.float32)
    mean, std = motion.mean_std(flat, 22)
    motion.save_meta(str(tmp_path), {}, mean, std)
    _, mean, std = motion.load_meta(str(tmp_path))
    assert (std >= motion.STD_FLOOR).all() and np.abs((flat - mean) / std).max() < 1e-2


def test_missing_or_damaged_data_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'run `python prepare_data.py toy` first'):
        motion.load_split(str(tmp_path / 'toy'), 'train')
    small_set(tmp_path / 'toy', 'toy')
    with pytest.raises(FileNotFoundError, match='no split "test" .*train.*prepare_data.py toy'):
        motion.load_split(str(tmp_path / 'toy'), 'test')
    path = tmp_path / 'toy' / 'train_motion.npy'
    bad = np.load(path)
    bad[60, 5] = np.nan
    np.save(path, bad)
    with pytest.raises(ValueError, match='holds NaN'):
        motion.load_split(str(tmp_path / 'toy'), 'train')
    np.save(path, bad[:, :251])
    with pytest.raises(ValueError, match='width 263'):
        motion.load_split(str(tmp_path / 'toy'), 'train')


def test_out_that_is_something_else_is_left_alone(tmp_path, capsys):
    field_folder(tmp_path / 'src', {'a': rng.standard_normal((60, 263))}, {'a': 'walks#walk/VERB#0.0#0.0'}, {})
    (tmp_path / 'home').mkdir()
    (tmp_path / 'home' / 'thesis.txt').write_text('years of work')
    assert prepare_data.main(['hml3d', f'--src={tmp_path}/src', f'--out={tmp_path}/home']) == 2
    assert 'not a prepared data set' in capsys.readouterr().err and os.path.exists(tmp_path / 'home' / 'thesis.txt')


def test_toy_preparation(tmp_path):
    sizes = {'train': 4, 'val': 2, 'test': 2}
    for out in ('a', 'b'):
        prepare_data.prepare_toy(str(tmp_path / out), sizes)
    a, b = (motion.load_split(str(tmp_path / out), 'train') for out in ('a', 'b'))
    assert np.array_equal(a.features, b.features) and a.captions == b.captions and len(a) == 4  # deterministic
    assert {'clip', 'text', 'tokens', 'script'} <= set(a.captions[0])
    assert a.length.min() >= 39 and a.length.max() <= 196
    joints = motion.features_to_joints(np.array(a.clip(0)), 22)  # contact 1: that foot moves less than 1 cm
    step = np.linalg.norm(np.diff(joints[:, list(SMPL.feet)], axis=0), axis=-1)
    assert step[a.clip(0)[:-1, -4:] > 0.5].max() < 0.0101


# ------------------------------------------------------------------------------------------------------------- drawing

def test_gif_has_one_frame_per_pose(tmp_path):
    path = str(tmp_path / 'a.gif')
    motion.draw_gif(body(30), path, 'a person with a rather long caption ' * 3)
    with Image.open(path) as gif:
        assert gif.n_frames == 30 and gif.info['duration'] == 50
    motion.draw_gif(np.repeat(body(1, KIT) * 1000, 12, 0), path, 'stands still')  # equal frames are not merged
    with Image.open(path) as gif:
        assert gif.n_frames == 12 and gif.info['duration'] == 80


def test_strip_and_grid(tmp_path):
    strip = motion.draw_strip(body(40), None, 'walks', n_poses=5, size=(100, 150))
    assert strip.width == 500
    pixels = {tuple(p) for p in np.asarray(strip).reshape(-1, 3).tolist()}
    assert all(colour in pixels for colour in motion.SIDE_COLOURS.values())
    motions = [('walks', body(40)), ('runs', body(30, seed=1)), ('waves', body(20, seed=2))]
    for suffix in ('png', 'gif'):
        motion.draw_grid(motions, str(tmp_path / f'grid.{suffix}'), columns=2, size=(100, 120))
    with Image.open(tmp_path / 'grid.gif') as gif:
        assert gif.width == 200 and gif.n_frames > 10
    with pytest.raises(ValueError, match='cannot draw'):
        motion.draw_gif(np.full((5, 22, 3), np.nan), str(tmp_path / 'b.gif'), 'nothing')
    assert not os.path.exists(tmp_path / 'b.gif')
