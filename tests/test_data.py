"""prepare_data.py: each rule of each data set on a small folder written here, and the messages for
bad input. data.py: the packed format, the length rule, and what a batch holds."""
import io
import json
import os
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_script
from test_takes import MIXAMO, rename

import prepare_data
from lib import data, toy
from lib.bandai import BANDAI_JOINTS, PHRASES, bandai_captions, swap_sides
from lib.bvh import write_bvh
from lib.configurator import ROOT, UserError
from lib.data import Clips, Tokens, Windows, load_meta, load_split
from lib.humanml import simple_tags
from lib.motion import SKELETONS, features_to_joints, joints_to_features

SAMPLES = os.path.join(ROOT, '..', 'shared', 'data', 'hml3d_samples', 'HumanML3D')
SMPL = SKELETONS['smpl22']
rng = np.random.default_rng(0)


def prepare(name, out, src=None):
    prepare_data.main([name, f'--out={out}'] + ([f'--src={src}'] if src else []))


# ----------------------------------------------------------------------------------- one for all


def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path):
    for arguments, words in ((('hml3d', f'--src={tmp_path}/nope'), 'nope has no folder'),
                             (('bandai',), 'bandai needs --src'),
                             (('cmu', f'--src={tmp_path}'), 'cmu needs --texts')):
        code, _, err = run_script(tmp_path, 'prepare_data.py', *arguments, f'--out={tmp_path}/x')
        assert code == 2
        assert err.count('\n') == 1
        assert words in err
    assert os.listdir(tmp_path) == []


def test_out_that_is_something_else_is_left_alone(tmp_path):
    field_folder(tmp_path / 'src', {'a': noise(60)}, {'a': WALKS}, {})
    (tmp_path / 'home').mkdir()
    (tmp_path / 'home' / 'thesis.txt').write_text('years of work')
    with pytest.raises(UserError, match='thesis.txt'):
        prepare('hml3d', tmp_path / 'home', tmp_path / 'src')
    assert os.listdir(tmp_path / 'home') == ['thesis.txt']


def test_jobs_are_read_a_little_ahead():
    read = []

    def jobs():
        for job in range(40):
            read.append(job)
            yield -job

    results = []
    for result in prepare_data.in_parallel(abs, jobs(), 'abs', ahead=5):
        results.append(result)
        assert len(read) <= len(results) + 5
    assert results == list(range(40))


def test_a_killed_worker_is_one_sentence():
    with pytest.raises(UserError, match='worker process was killed'):
        list(prepare_data.in_parallel(os._exit, [1, 1, 1], 'exit'))


def test_toy_preparation(tmp_path):
    for out in ('a', 'b'):
        os.mkdir(tmp_path / out)
        prepare_data.prepare_toy(str(tmp_path / out), {'train': 4, 'val': 2, 'test': 2})
    a, b = (load_split(tmp_path / out, 'train') for out in ('a', 'b'))
    assert np.array_equal(a.features, b.features)   # deterministic
    assert a.captions == b.captions
    assert a.names.tolist() == [f'toy-0000000{i}' for i in range(4)]
    assert {'clip', 'text', 'tokens', 'script'} <= set(a.captions[0])
    assert a.length.min() >= 39
    assert a.length.max() <= 196
    meta = load_meta(tmp_path / 'a')[0]
    assert meta['steady']
    assert meta['contact_threshold'] == prepare_data.TOY_CONTACT
    clip = np.array(a.clip(0))
    feet = features_to_joints(clip, 22)[:, list(SMPL.feet)]
    step = np.linalg.norm(np.diff(feet, axis=0), axis=-1)
    assert step[clip[:-1, -4:] > 0.5].max() < 0.0101   # contact 1: the foot moves less than 1 cm


# ---------------------------------------------------------------------------------------- bandai


def bandai_bvh(n_frames, seed=0):
    """A Bandai-like file: all joints hang from the root by position channels."""
    names = ['joint_Root'] + sorted(BANDAI_JOINTS.values())
    block = '{\nOFFSET 0 0 0\nCHANNELS 3 Xposition Yposition Zposition\n'
    text = 'HIERARCHY\nROOT joint_Root\n' + block
    for name in names[1:]:
        text += f'JOINT {name}\n{block}End Site\n{{\nOFFSET 0 0 0\n}}\n}}\n'
    places = np.random.default_rng(seed).uniform(0, 100, (1, 63))
    places = places + np.linspace(0, 50, n_frames)[:, None]
    text += f'}}\nMOTION\nFrames: {n_frames}\nFrame Time: 0.0333333\n'
    rows = np.concatenate([np.zeros((n_frames, 3)), places], 1)
    return text + '\n'.join(' '.join(f'{x:.4f}' for x in row) for row in rows)


@pytest.fixture
def bandai_folder(tmp_path):
    files = {f'2_wave-left-hand_elderly_{i:03d}': bandai_bvh(90, i) for i in range(12)}
    files['1_walk_happy_001'] = bandai_bvh(30)               # too short
    files['1_run_happy_001'] = bandai_bvh(1)
    files['1_dance-long_normal_001'] = bandai_bvh(700)       # too long: cut
    files['1_bow_sad_001'] = bandai_bvh(90)[:-400]           # truncated
    files['1_moonwalk_sad_001'] = bandai_bvh(90)             # unknown words
    files['1_bye_sad_001'] = bandai_bvh(90).replace('Chest', 'Thorax')
    src = tmp_path / 'src'
    src.mkdir()
    for name, text in files.items():
        (src / f'dataset-{name}.bvh').write_text(text)
    (src / 'notes.txt').write_text('not a clip')
    return src


def test_bandai_end_to_end(bandai_folder, tmp_path, capsys):
    out = tmp_path / 'data' / 'bandai'
    prepare('bandai', out, bandai_folder)
    printed = capsys.readouterr().out
    assert 'skipped 2: shorter than 40 frames' in printed
    assert 'truncated' in printed
    assert 'moonwalk' in printed
    assert 'without Chest' in printed
    meta = load_meta(out)[0]
    assert (meta['fps'], meta['dim'], meta['steady']) == (20, 263, True)
    assert sum(meta['skipped'].values()) == 5

    train = load_split(out, 'train')
    names = train.names.tolist()
    for name in [name for name in names if not name.startswith('M')]:
        i, j = names.index(name), names.index('M' + name)   # its mirror image, the words swapped
        sides = [words_of(train, k) & {'left', 'right'} for k in (i, j)]
        assert sides == ([{'left'}, {'right'}] if 'left' in name else [set(), set()])
        a, b = train.clip(i), train.clip(j)
        assert np.allclose(a[:, [0, 1]], -b[:, [0, 1]], atol=1e-5)
        assert np.allclose(a[:, [2, 3]], b[:, [2, 3]], atol=1e-5)
    assert train.length.max() <= 196
    assert train.length.min() >= 40
    assert (train.n_captions == 6).all()
    everything = [n for split in meta['counts'] for n in load_split(out, split).names.tolist()]
    dances = sorted(name for name in everything if 'dance' in name and name[0] != 'M')
    assert dances == [f'dataset-1_dance-long_normal_001-{i}' for i in range(3)]

    archive = tmp_path / 'b.tar.xz'   # gives the very same data
    with tarfile.open(archive, 'w:xz') as tar:
        for name in sorted(os.listdir(bandai_folder)):
            tar.add(bandai_folder / name, f'x/{name}')
    prepare('bandai', tmp_path / 'data' / 'again', archive)
    again = load_split(tmp_path / 'data' / 'again', 'train')
    assert again.names.tolist() == names
    assert np.array_equal(again.features, train.features)
    assert again.captions == train.captions


def words_of(split, clip):
    return {w for c in split.captions if c['clip'] == clip for w in c['text'].split()}


def test_bandai_captions_are_english_with_tags():
    contents = list(PHRASES['content'])
    for content in contents + [swap_sides(c) for c in contents]:
        for style in PHRASES['style']:
            captions = bandai_captions(content, style)
            assert len({c['text'] for c in captions}) >= 4
            for caption in captions:
                words = caption['text'].split()
                assert len(words) == len(caption['tokens'].split())
                assert '=' not in caption['text'] + caption['tokens']
                assert '/' not in caption['text']
                assert [s in words for s in ('left', 'right')] == [
                    s in content for s in ('left', 'right')]
    assert bandai_captions('walk-turn-left', 'angry')[0] == {
        'text': 'a person walks forward and turns left angrily',
        'tokens': 'a/DET person/NOUN walk/VERB forward/ADV and/CCONJ turn/VERB left/ADV '
                  'angrily/ADV'}


def test_a_damaged_archive_leaves_nothing(tmp_path):
    archive = tmp_path / 'b.tar.xz'
    with tarfile.open(archive, 'w:xz') as tar:
        noise = os.urandom(200_000).hex().encode()
        info = tarfile.TarInfo('x/dataset-1_bow_sad_001.bvh')
        info.size = len(noise)
        tar.addfile(info, io.BytesIO(noise))
    archive.write_bytes(archive.read_bytes()[:100_000])
    for src in (archive, tmp_path / 'b.tar'):
        with pytest.raises(UserError, match=f'{src} cannot be read'):
            prepare('bandai', tmp_path / 'data' / 'bandai', src)
    assert os.listdir(tmp_path / 'data') == []


# ------------------------------------------------------------------------------ hml3d, kit, babel

WALKS = 'walks#walk/VERB#0.0#0.0'


def noise(n_frames, dim=263):
    return rng.standard_normal((n_frames, dim))


def field_folder(root, clips, texts, splits, dim=263, stats=True):
    os.makedirs(root / 'new_joint_vecs')
    os.makedirs(root / 'texts')
    for name, array in clips.items():
        np.save(root / 'new_joint_vecs' / f'{name}.npy', array)
    for name, text in texts.items():
        (root / 'texts' / f'{name}.txt').write_bytes(text.encode())
    for split, names in splits.items():
        (root / f'{split}.txt').write_bytes('\r\n'.join(names).encode() + b'\r\n')
    if stats:
        np.save(root / 'Mean.npy', np.zeros(dim))
        np.save(root / 'Std.npy', np.r_[0.0, np.ones(dim - 1)])


def test_every_rule_of_hml3d(tmp_path, capsys):
    nan = noise(60)
    nan[7, 7] = np.nan
    clips = {
        'whole': noise(100), 'parts': noise(150), 'short': noise(39), 'min': noise(40),
        'long': noise(200), 'max': noise(199), 'nan': nan, 'narrow': noise(60, 251),
        'notext': noise(60), 'badline': noise(60)}

    line = 'a person walks.#a/DET person/NOUN walk/VERB#{}#{}'
    simple = line.format(0.0, 0.0)
    texts = dict.fromkeys(['short', 'min', 'long', 'max', 'nan', 'narrow', 'missing'], simple)
    nans = line.format('nan', 'nan')   # means 0
    texts['whole'] = f'{simple}\r\n{nans}\r\n\r\n'
    spans = [(0.0, 0.0), (1.0, 4.0), (2.0, 3.5), (4.0, 9.0)]
    texts['parts'] = '\n'.join(line.format(*span) for span in spans)
    texts['badline'] = f'only words\n#no/DET text/NOUN#0.0#0.0\n{simple}'

    src = tmp_path / 'src'
    lists = {'train': [*clips, 'missing', 'broken'], 'val': ['min'], 'test': ['max']}
    field_folder(src, clips, texts, lists)
    (src / 'new_joint_vecs' / 'broken.npy').write_bytes(b'\x93NUMPY no')
    out = tmp_path / 'hml3d'
    prepare('hml3d', out, src)

    train = load_split(out, 'train')
    # sub-clips by from/to are clips of their own, but for 2.0-3.5 s, which is too short
    names = ['whole', 'parts-1', 'parts-3', 'parts', 'min', 'max', 'badline']
    assert train.names.tolist() == names
    assert train.length.tolist() == [100, 60, 70, 150, 40, 199, 60]
    assert train.n_captions.tolist() == [2, 1, 1, 1, 1, 1, 1]
    assert np.array_equal(train.clip(1), clips['parts'][20:80].astype(np.float32))
    tokens = 'a/DET person/NOUN walk/VERB'
    assert train.captions[0] == {'clip': 0, 'text': 'a person walks.', 'tokens': tokens}
    meta, _, std = load_meta(out)
    broken, = (reason for reason in meta['skipped'] if 'broken.npy cannot be read' in reason)
    assert meta['skipped'].pop(broken) == 1
    assert meta['skipped'] == {
        'clip shorter than 40 frames': 1, 'clip of 200 or more frames': 1,
        'sub-clip shorter than 40 frames': 1, 'NaN, infinity or huge numbers in features': 1,
        'features not 263 wide (found (251,))': 1, 'text file missing': 1,
        'features file missing': 1,
        'caption line without text, tags, from and to': 2}
    assert std[0] == np.float32(data.STD_FLOOR)   # the folder's own, floored
    assert (std[1:] == 1).all()
    assert 'skipped 1: NaN, infinity or huge numbers in features' in capsys.readouterr().out


def test_kit_has_251_dims_and_24_frames(tmp_path):
    src = tmp_path / 'src'
    lists = {split: ['a', 'b'] for split in ('train', 'val', 'test')}
    clips = {'a': noise(24, 251), 'b': noise(23, 251)}
    field_folder(src, clips, {'a': WALKS, 'b': WALKS}, lists, dim=251)
    prepare('kit', tmp_path / 'kit', src)
    meta = load_meta(tmp_path / 'kit')[0]
    assert (meta['dim'], meta['fps'], meta['skeleton']) == (251, 12.5, 'kit21')
    assert meta['units_per_metre'] == 1000
    assert load_split(tmp_path / 'kit', 'test').length.tolist() == [24]
    with pytest.raises(UserError, match='hml3d has 263, kit 251'):
        prepare('hml3d', tmp_path / 'hml3d', src)
    assert not os.path.exists(tmp_path / 'hml3d')


def test_folder_without_split_files_or_statistics(tmp_path, capsys):
    field_folder(tmp_path / 'src', {'a': noise(60)}, {'a': WALKS}, {}, stats=False)
    prepare('hml3d', tmp_path / 'hml3d', tmp_path / 'src')
    printed = capsys.readouterr().out
    assert 'all 1 clips go into all three splits' in printed
    assert 'no Mean.npy and Std.npy' in printed
    assert len(load_split(tmp_path / 'hml3d', 'test')) == 1


def test_nothing_usable_leaves_nothing(tmp_path):
    field_folder(tmp_path / 'src', {'a': np.full((60, 263), np.nan)}, {'a': WALKS}, {})
    with pytest.raises(UserError, match='no usable training clip'):
        prepare('hml3d', tmp_path / 'hml3d', tmp_path / 'src')
    assert os.listdir(tmp_path) == ['src']


@pytest.mark.skipif(not os.path.exists(SAMPLES), reason='../shared is not here: no real clips')
def test_hml3d_samples(tmp_path):
    prepare('hml3d', tmp_path / 'hml3d', SAMPLES)
    train = load_split(tmp_path / 'hml3d', 'train')
    assert train.names.tolist() == ['000000']
    assert len(train.captions) == 4


def test_babel(tmp_path):
    src = tmp_path / 'src'
    os.makedirs(src / 'new_joint_vecs')
    np.save(src / 'new_joint_vecs' / '11.npy', noise(300))
    np.save(src / 'new_joint_vecs' / 'walk_poses.npy', noise(80))

    def labels(*rows):
        return {'labels': [dict(zip(('proc_label', 'start_t', 'end_t'), row)) for row in rows]}

    segments = labels(('turn left', 0.0, 3.0), ('transition', 3.0, 6.0), ('wave', 6.0, 7.0),
                      ('walk forward', 7.0, 14.0))
    entries = {
        '11': dict(babel_sid=11, feat_p='CMU/a/b_poses.npz', seq_ann=labels(('all of it',)),
                   frame_ann=segments),
        '12': dict(babel_sid=12, feat_p='CMU/a/walk_poses.npz', seq_ann=labels(('jog',)),
                   frame_ann=None),
        '13': dict(babel_sid=13, feat_p='CMU/a/gone.npz', seq_ann=None, frame_ann=None)}
    for file in ('train.json', 'val.json'):
        (src / file).write_text(json.dumps(entries))
    out = tmp_path / 'babel'
    prepare('babel', out, src)
    train = load_split(out, 'train')
    assert train.names.tolist() == ['11-0', '11-3', '12-0']
    assert train.length.tolist() == [60, 140, 80]
    assert train.captions[0] == {'clip': 0, 'text': 'turn left', 'tokens': 'turn/VERB left/ADV'}
    assert load_meta(out)[0]['skipped'] == {   # in each of three splits
        'segment without a label, or a transition': 3, 'segment shorter than 40 frames': 3,
        'features file missing': 3}

    (src / 'val.json').write_text('{"1": ')
    with pytest.raises(UserError, match='val.json cannot be read .Expecting'):
        prepare('babel', out, src)
    assert len(load_split(out, 'train')) == 3   # the old data set is still there
    os.remove(src / 'val.json')
    with pytest.raises(UserError, match='val.json .*--src is the folder'):
        prepare('babel', out, src)


def test_simple_tags():
    assert (simple_tags('Turn left with the left arm')
            == 'turn/VERB left/ADV with/ADP the/DET left/ADJ arm/NOUN')
    assert (simple_tags('walk backwards slowly then sit')
            == 'walk/VERB backwards/ADV slowly/ADV then/CCONJ sit/VERB')


# ---------------------------------------------------------------------------------------- folder

TAKES = [toy.make_clip(seed)['joints'] for seed in range(6)]


def write_take(path, joints):
    """As BVH with Mixamo's names, but for spine2, which has an unknown name."""
    write_bvh(path, joints, SMPL)
    path.write_text(rename(path.read_text(), dict(MIXAMO, spine2='Bone')))


def own_folder(src, write, suffix):
    (src / 'more').mkdir(parents=True)
    for i, joints in enumerate(TAKES):
        write(src / ('more' if i % 2 else '') / f'take{i}{suffix}', joints)
    rows = ['file,caption', '', ',a caption of nothing', 'take0,', 'take9.bvh,nobody']
    rows += [f'take{i},A person waves with the left hand, then bows' for i in range(4)]
    rows += [f'more/take{i}{suffix},"somebody, waving"' for i in (1, 3, 5)]
    (src / 'captions.csv').write_text('\n'.join(rows), encoding='utf-8-sig')


def prepare_own(src, out, *settings):
    prepare_data.main(['folder', f'--src={src}', f'--out={out}', *settings])
    splits = {name: load_split(out, name) for name in ('train', 'val', 'test')}
    return {name: (split, i) for split in splits.values() for i, name in enumerate(split.names)}


def test_bvh_files_of_ones_own(tmp_path, capsys):
    src = tmp_path / 'src'
    own_folder(src, write_take, '.bvh')
    write_take(src / 'short.bvh', TAKES[0][:30])
    write_take(src / 'toeless.bvh', TAKES[0])
    toeless = (src / 'toeless.bvh').read_text()
    (src / 'toeless.bvh').write_text(toeless.replace('LeftToeBase', 'Bone2'))
    (src / 'broken.BVH').write_text(toeless[:3000])
    clips = prepare_own(src, tmp_path / 'data' / 'mine')
    printed = capsys.readouterr().out
    for words in ('cm, y up', 'Mixamo', 'spine2 put between', 'skipped 1: shorter than 40',
                  'left_foot', 'broken.BVH is not a BVH file', 'skipped 2: line of the captions',
                  'skipped 1: caption of a file that is not there', '1 files have no caption'):
        assert words in printed
    meta = load_meta(tmp_path / 'data' / 'mine')[0]
    assert meta['name'] == 'mine'
    assert [count['clips'] for count in meta['counts'].values()] == [8, 1, 1]

    for i, joints in enumerate(TAKES):
        split, k = clips[f'more-take{i}' if i % 2 else f'take{i}']
        known = np.delete(np.arange(22), 6)
        wanted = joints_to_features(joints, SMPL, steady=True)
        same = np.abs(features_to_joints(split.clip(k), 22) - features_to_joints(wanted, 22))
        assert same[:, known].max() < 0.01
        texts = [c['text'] for c in split.captions if c['clip'] == k]
        assert len(texts) == split.n_captions[k] == [1, 2, 1, 2, 0, 1][i]
        if i == 0:
            assert texts == ['a person waves with the left hand, then bows']
    mirrored = {name[1:]: clips[name] for name in clips if name[0] == 'M'}
    assert len(mirrored) == 4
    for name, (split, k) in mirrored.items():
        assert clips[name][0] is split   # in training, both
    swapped = [c['tokens'] for split, k in mirrored.values() for c in split.captions
               if c['clip'] == k and 'hand' in c['text']]
    assert set(swapped) == {'a/DET person/NOUN waves/VERB with/ADP the/DET right/ADJ hand/NOUN '
                            'then/CCONJ bows/VERB'}


def test_npy_files_of_ones_own(tmp_path):
    """In SMPL's order, metres and Y up; and in another order, millimetres and Z up."""
    def shuffled(path, joints):
        joints = 1000 * joints[:, ::-1, [0, 2, 1]] * [1, -1, 1]
        np.save(path, joints.astype(np.float32))

    own_folder(tmp_path / 'plain', np.save, '.npy')
    own_folder(tmp_path / 'foreign', shuffled, '.npy')
    numbers = {name: 21 - j for j, name in enumerate(SMPL.names)}
    (tmp_path / 'map.json').write_text(json.dumps(numbers))
    one = prepare_own(tmp_path / 'plain', tmp_path / 'one', '--fps=20')
    two = prepare_own(tmp_path / 'foreign', tmp_path / 'two', '--fps=20',
                      f'--joints={tmp_path}/map.json')
    assert list(one) == list(two)
    for name, (split, k) in one.items():
        other, l = two[name]
        assert k == l
        assert np.allclose(split.clip(k)[:, :-4], other.clip(l)[:, :-4], atol=1e-4)
        assert split.captions == other.captions


def test_mistakes_with_ones_own_files(tmp_path):
    src = tmp_path / 'src'
    (tmp_path / 'empty').mkdir()
    own_folder(src, np.save, '.npy')
    own_folder(tmp_path / 'stones', lambda path, joints: np.save(path, 20 * joints), '.npy')
    (tmp_path / 'map.json').write_text('{"tail": "Tail"}')
    (tmp_path / 'none.csv').write_text('file,caption\n')
    for settings, words in {
            f'--src={tmp_path}/empty': 'empty holds no .bvh',
            f'--src={src}': 'give --fps',
            f'--src={tmp_path}/stones --fps=20': 'give --unit',
            f'--src={src} --fps=20 --joints={tmp_path}/map.json': "'tail'",
            f'--src={src} --fps=20 --joints={src}/captions.csv': 'captions.csv',
            f'--src={src} --fps=20 --captions={src}/no.csv': 'expected lines file,caption',
            f'--src={src} --fps=20 --captions={tmp_path}/none.csv': '6 of them without a caption',
            f'--src={src} --fps=999': '0 usable files'}.items():
        with pytest.raises(UserError) as error:
            prepare_data.main(['folder', *settings.split(), f'--out={tmp_path}/out'])
        assert words in str(error.value)
        assert '\n' not in str(error.value)
    assert not (tmp_path / 'out').exists()


# ---------------------------------------------------------------------------------- packed format


META = dict(skeleton='smpl22', fps=20, dim=263, n_joints=22, max_frames=199, units_per_metre=1)


def packed(folder, lengths=(50, 61), n_captions=(0, 1), name='tiny'):
    """A data set of one split, which is also returned. Features: clip, frame, and then noise."""
    os.makedirs(folder, exist_ok=True)
    clips = []
    for i, (length, n) in enumerate(zip(lengths, n_captions)):
        features = noise(length).astype(np.float32)
        features[:, 0] = i
        features[:, 1] = np.arange(length)
        captions = [dict(text=f'naïve {k}', tokens='naïve/ADJ') for k in range(n)]
        clips.append((f'clip{i}', features, captions))
    counts = {'train': data.save_split(folder, 'train', iter(clips))}
    stats = data.mean_std(np.load(os.path.join(folder, 'train_motion.npy')), 22)
    data.save_meta(folder, dict(META, name=name, counts=counts), *stats)
    return load_split(folder, 'train')


def test_packed_round_trip(tmp_path):
    caption = dict(text='naïve walk', tokens='naïve/ADJ walk/NOUN')
    clips = [('one', noise(50), []), ('two', noise(61), [caption])]
    counts = data.save_split(tmp_path, 'train', iter(clips))
    assert counts == dict(clips=2, frames=111, captions=1)
    assert data.save_split(tmp_path, 'val', iter([])) == {}
    assert not os.path.exists(tmp_path / 'val_motion.npy')
    flat = np.concatenate([features for _, features, _ in clips])
    mean, std = data.mean_std(flat.astype(np.float32), 22)
    data.save_meta(tmp_path, dict(META, name='x', counts=counts), mean, std)

    split = load_split(tmp_path, 'train')
    assert isinstance(split.features, np.memmap)
    assert len(split) == 2
    assert split.captions == [dict(clip=1, **caption)]
    for i, (name, features, _) in enumerate(clips):
        assert split.names[i] == name
        assert np.array_equal(split.clip(i), features.astype(np.float32))
    assert split.n_captions.tolist() == [0, 1]
    assert np.allclose(mean, flat.mean(0), atol=1e-6)
    for group in (slice(1, 3), slice(4, 67), slice(259, 263)):
        assert np.allclose(std[group], flat.std(0)[group].mean(), atol=1e-6)


def test_zero_variance_does_not_blow_up(tmp_path):
    flat = np.full((100, 263), 0.3, dtype=np.float32)
    data.save_meta(tmp_path, dict(META, name='x', counts={}), *data.mean_std(flat, 22))
    _, mean, std = load_meta(tmp_path)
    assert (std >= data.STD_FLOOR).all()
    assert np.abs((flat - mean) / std).max() < 1e-2


def test_features_that_are_not_finite_are_refused_while_writing(tmp_path):
    bad = noise(50)
    bad[20, 5] = np.inf
    with pytest.raises(UserError, match='two has NaN or infinite features'):
        data.save_split(tmp_path, 'train', [('one', noise(50), []), ('two', bad, [])])


def test_missing_data_names_the_command(tmp_path):
    with pytest.raises(UserError, match='run `python prepare_data.py toy` first'):
        load_split(tmp_path / 'toy', 'train')
    packed(tmp_path / 'toy', name='toy')
    with pytest.raises(UserError, match='no split "test" .*train.*prepare_data.py toy'):
        load_split(tmp_path / 'toy', 'test')


# ------------------------------------------------------------------------------ lengths and groups


def within(count, n, share, sigmas=5):
    """Is the count of n draws that have this share what chance allows?"""
    return abs(count - n * share) < sigmas * np.sqrt(n * share * (1 - share))


def test_field_length_is_the_fields_rule():
    generator = torch.Generator().manual_seed(0)
    n = 60_000
    length = torch.randint(8, 200, (n,), generator=generator)
    start, tokens = data.field_length(length, generator)
    lost = length // 4 - tokens
    assert set(lost.tolist()) == {0, 1}
    assert within(lost.sum().item(), n, 1 / 3)
    assert start.min() == 0
    assert (start + 4 * tokens <= length).all()
    exact = length % 4 == 0
    assert within(lost[exact].sum().item(), exact.sum().item(), 1 / 3)   # mean loss of 1/3 token


def test_field_length_starts_anywhere_alike():
    generator = torch.Generator().manual_seed(1)
    n = 30_000
    start, tokens = data.field_length(torch.full((n,), 43), generator)
    for kept, places in ((10, 4), (9, 8)):   # 43 - 40 + 1 and 43 - 36 + 1
        counts = start[tokens == kept].bincount()
        assert len(counts) == places
        assert all(within(count, counts.sum().item(), 1 / places) for count in counts.tolist())


def test_field_length_of_whole_short_and_limited_clips():
    length = torch.tensor([4, 7, 40, 43, 196, 199])
    start, tokens = data.field_length(length)
    assert start.tolist() == [0] * 6
    assert tokens.tolist() == [1, 1, 10, 10, 49, 49]
    generator = torch.Generator().manual_seed(2)
    start, tokens = data.field_length(length.repeat(100), generator, longest=12)
    assert set(tokens.tolist()) == {1, 9, 10, 11, 12}
    assert (start + 4 * tokens <= length.repeat(100)).all()
    assert start.max() > 100   # of a long clip any part
    assert data.field_length(length.numpy(), longest=12)[1].tolist() == [1, 1, 10, 10, 12, 12]


def test_by_length_and_equal_lengths():
    lengths = torch.randint(10, 20, (200,), generator=torch.Generator().manual_seed(0))
    groups = data.by_length(lengths, 32)
    assert [len(g) for g in groups] == [32] * 6 + [8]
    assert sorted(torch.cat(groups).tolist()) == list(range(200))
    assert torch.equal(lengths[torch.cat(groups)], lengths.sort().values)

    groups = data.equal_lengths(lengths.numpy(), 8)
    assert sorted(torch.cat(groups).tolist()) == list(range(200))
    assert all(1 <= len(g) <= 8 for g in groups)
    assert all(len(lengths[g].unique()) == 1 for g in groups)


# ---------------------------------------------------------------------------------------- batches


class FrameNumbers:
    """A tokenizer whose two codes of a token are its clip and the first frame that it covers."""
    config = SimpleNamespace(n_quantizers=2, n_codes=200)

    def to(self, device):
        return self

    def eval(self):
        return self

    def normalize(self, motion):
        return motion

    def encode(self, motion):
        assert motion.shape[1] % 4 == 0
        return motion[:, ::4, :2].long()


def tokens_of(folder, lengths, n_captions):
    split = packed(folder, lengths, n_captions)
    ids = data.cached_tokens(FrameNumbers(), split, folder / 'ids.npz')
    n = len(split.captions)
    vectors = torch.arange(n).float()[:, None].expand(n, 512)
    index = torch.arange(n)[:, None].expand(n, 3)
    role = torch.tensor([1, 0, 0], dtype=torch.int8).expand(n, 3)
    return split, Tokens(split, ids, vectors, index, role, 'cpu')


def test_tokens_are_made_once(tmp_path, monkeypatch):
    split = packed(tmp_path, (50, 61))
    ids = data.cached_tokens(FrameNumbers(), split, tmp_path / 'ids.npz')
    assert ids.shape == (4, 12 + 15, 2)
    assert ids.dtype == np.int16
    assert ids[3, 12:26].tolist() == [[1, 3 + 4 * k] for k in range(14)]
    monkeypatch.delattr(FrameNumbers, 'encode')
    assert np.array_equal(data.cached_tokens(FrameNumbers(), split, tmp_path / 'ids.npz'), ids)


def test_a_crops_tokens_are_those_of_its_frames(tmp_path):
    lengths = torch.tensor([48, 41, 199, 67])
    split, tokens = tokens_of(tmp_path, lengths.tolist(), (1, 2, 1, 1))
    captions = torch.arange(5).repeat(400)
    clip = torch.tensor([0, 1, 1, 2, 3]).repeat(400)
    ids, c, role, valid = tokens.batch(captions, torch.Generator().manual_seed(0))
    assert ids.shape == (2000, 49, 2)
    assert c[:, 0, 0].tolist() == captions.tolist()
    assert c.shape == (2000, 1, 512)   # as many condition tokens as the batch needs
    assert role.all()
    n = valid.sum(1)
    lost = lengths[clip] // 4 - n
    assert set(lost.tolist()) == {0, 1}
    assert torch.equal(valid, torch.arange(49) < n[:, None])   # no holes

    start = ids[:, 0, 1]
    frames = start[:, None] + 4 * torch.arange(49)
    expected = torch.stack([clip[:, None].expand_as(frames), frames], -1)
    assert torch.equal(ids[valid], expected[valid])
    assert (start + 4 * n <= lengths[clip]).all()
    for phase in range(4):
        assert (start % 4 == phase).any()


def test_whole_clips_in_a_fixed_width(tmp_path):
    split, tokens = tokens_of(tmp_path, (48, 41), (1, 1))
    ids, _, _, valid = tokens.batch(torch.tensor([0, 1]), width=60)   # 60 > 22, all that there is
    assert ids.shape == (2, 60, 2)
    assert valid.sum(1).tolist() == [12, 10]
    assert ids[1, :10, 1].tolist() == list(range(0, 40, 4))
    assert tokens.batch(torch.tensor([1]))[0].shape == (1, 10, 2)


def test_a_clip_is_drawn_first_then_its_caption(tmp_path):
    split, tokens = tokens_of(tmp_path, (40, 40, 40), (1, 0, 9))
    n = 40_000
    counts = tokens.draw(n, torch.Generator().manual_seed(0)).bincount().tolist()
    assert len(counts) == 10
    assert within(counts[0], n, 1 / 2)   # the clip of one caption as often as that of nine
    assert all(within(count, n, 1 / 18) for count in counts[1:])


def test_windows_never_leave_a_clip(tmp_path):
    split = packed(tmp_path, (64, 63, 70, 100), (0,) * 4)
    windows = Windows(split, 64, 'cpu')
    assert len(windows) == 1 + 0 + 7 + 37
    batch = windows.batch(windows.draw(2000, torch.Generator().manual_seed(0)))
    assert batch.shape == (2000, 64, 263)
    clip, frame = batch[..., 0], batch[..., 1]
    assert (clip == clip[:, :1]).all()
    assert torch.equal(frame, frame[:, :1] + torch.arange(64))
    seen = {(int(c), int(f)) for c, f in zip(clip[:, 0], frame[:, 0])}
    assert len(seen) == len(windows)   # and every window is drawn

    assert (split.names_at(torch.tensor([0, 63, 64, 127])) == ['clip0', 'clip0', 'clip1',
                                                               'clip2']).all()
    with pytest.raises(UserError, match='No clip has 104 frames'):
        Windows(split, 104, 'cpu')


def test_clips_for_the_evaluator(tmp_path):
    packed(tmp_path, (80, 3, 60, 100), (2, 1, 0, 1))
    clips = Clips(tmp_path, 'train')
    assert clips.clips.tolist() == [0, 3]   # one is too short for a token, one has no caption
    rows = torch.tensor([0, 1]).repeat(200)
    captions, first, frames = clips.draw(rows, torch.Generator().manual_seed(0), longest=20)
    assert set(captions[0::2].tolist()) == {0, 1}
    assert set(captions[1::2].tolist()) == {3}
    assert set(frames.tolist()) == {76, 80}
    for row, features in zip(rows.tolist(), clips.features(first, frames)):
        assert (features[:, 0] == [0, 3][row]).all()   # nothing of a neighbour
    _, first, frames = clips.draw(torch.tensor([0, 1]), torch.Generator(), crop=False)
    assert first.tolist() == [0, 143]
    assert frames.tolist() == [80, 100]
