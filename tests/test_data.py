"""prepare_data.py: each rule of each data set on a small folder written here, and the messages for
bad input. data.py: the packed format, the length rule, and what a batch holds."""
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_script, sentence
from test_takes import MIXAMO, rename

import prepare_data
from lib import data, toy
from lib.bandai import BANDAI_JOINTS, PHRASES, bandai_captions, bandai_files, swap_sides
from lib.bvh import write_bvh
from lib.data import Clips, Tokens, Windows, load_meta, load_split
from lib.humanml import simple_tags
from lib.motion import SKELETONS, features_to_joints, joints_to_features

SMPL = SKELETONS['smpl22']
rng = np.random.default_rng(0)


def prepare(name, out, src=None, *settings):
    prepare_data.main([name, f'--out={out}', f'--src={src}', *settings])


# ----------------------------------------------------------------------------------- one for all


@pytest.mark.parametrize('command, words', [
    ('hml3d --src={}/nope', 'nope has no folder'), ('bandai', 'bandai needs --src'),
    ('bandai --src={}/b.tar', 'b.tar cannot be read'), ('cmu --src={}', 'cmu needs --texts'),
    ('folder --src={}', 'holds no .bvh')])
def test_a_mistake_is_one_sentence_and_leaves_nothing(tmp_path, command, words):
    arguments = f'{command} --out={{}}/x'.format(tmp_path, tmp_path).split()
    sentence(lambda: prepare_data.main(arguments), words)
    assert os.listdir(tmp_path) == []


def test_a_mistake_is_exit_code_2(tmp_path):
    code, _, said = run_script(tmp_path, 'prepare_data.py', 'bandai')
    assert code == 2
    assert said.count('\n') == 1


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
    sentence(lambda: list(prepare_data.in_parallel(os._exit, [1, 1, 1], 'exit')),
             'worker process was killed')


def test_toy_preparation(tmp_path):
    prepare_data.prepare_toy(tmp_path, {'train': 4, 'val': 2, 'test': 2})
    train = load_split(tmp_path, 'train')
    assert train.names.tolist() == [f'toy-0000000{i}' for i in range(4)]
    assert {'clip', 'text', 'tokens', 'script'} <= set(train.captions[0])
    meta = load_meta(tmp_path)[0]
    assert meta['steady']
    assert meta['contact_threshold'] == prepare_data.TOY_CONTACT
    clip = np.array(train.clip(0))
    feet = features_to_joints(clip, 22)[:, list(SMPL.feet)]
    step = np.linalg.norm(np.diff(feet, axis=0), axis=-1)
    assert step[clip[:-1, -4:] > 0.5].max() < 0.0101   # contact 1: the foot moves less than 1 cm


# ---------------------------------------------------------------------------------------- bandai


def bandai_bvh(n_frames, seed=0):
    """A Bandai-like file: all joints hang from the root by position channels."""
    block = '{\nOFFSET 0 0 0\nCHANNELS 3 Xposition Yposition Zposition\n'
    text = 'HIERARCHY\nROOT joint_Root\n' + block
    for name in sorted(BANDAI_JOINTS.values()):
        text += f'JOINT {name}\n{block}End Site\n{{\nOFFSET 0 0 0\n}}\n}}\n'
    text += f'}}\nMOTION\nFrames: {n_frames}\nFrame Time: 0.0333333\n'
    places = np.random.default_rng(seed).uniform(0, 100, 63)
    rows = places + np.linspace(0, 50, n_frames)[:, None]
    return text + '\n'.join(' '.join(f'{x:.4f}' for x in [0, 0, 0, *row]) for row in rows)


def test_bandai_end_to_end(tmp_path, capsys):
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

    out = tmp_path / 'data' / 'bandai'
    prepare('bandai', out, src)
    printed = capsys.readouterr().out
    for words in ('skipped 2: shorter than 40', 'truncated', 'moonwalk', 'without Chest'):
        assert words in printed
    meta = load_meta(out)[0]
    assert (meta['fps'], meta['dim'], meta['steady']) == (20, 263, True)
    assert sum(meta['skipped'].values()) == 5

    train = load_split(out, 'train')
    names = train.names.tolist()
    sides = [{word for c in train.captions if c['clip'] == k for word in c['text'].split()}
             & {'left', 'right'} for k in range(len(train))]
    for name in [name for name in names if not name.startswith('M')]:
        i, j = names.index(name), names.index('M' + name)   # its mirror image, the words swapped
        assert sides[i] == ({'left'} if 'left' in name else set())
        assert sides[j] == ({'right'} if 'left' in name else set())
        assert np.allclose(train.clip(i)[:, :4] * [-1, -1, 1, 1], train.clip(j)[:, :4], atol=1e-5)
    assert train.length.max() <= 196
    assert train.length.min() >= 40
    assert (train.n_captions == 6).all()
    everything = [n for split in meta['counts'] for n in load_split(out, split).names.tolist()]
    dances = sorted(name for name in everything if 'dance' in name and name[0] != 'M')
    assert dances == [f'dataset-1_dance-long_normal_001-{i}' for i in range(3)]

    archive = shutil.make_archive(tmp_path / 'b', 'xztar', src)   # gives the very same data
    one, other = ([content for _, content in bandai_files(place)] for place in (src, archive))
    assert one == other


def test_bandai_captions_are_english_with_tags():
    contents = list(PHRASES['content'])
    for content in contents + [swap_sides(c) for c in contents]:
        for style in PHRASES['style']:
            captions = bandai_captions(content, style)
            assert len({c['text'] for c in captions}) >= 4
            for caption in captions:
                words = caption['text'].split()
                assert len(words) == len(caption['tokens'].split())
                assert not set('=/') & set(caption['text'])
                assert '=' not in caption['tokens']
                for side in ('left', 'right'):
                    assert (side in words) == (side in content)
    assert bandai_captions('walk-turn-left', 'angry')[0] == {
        'text': 'a person walks forward and turns left angrily',
        'tokens': 'a/DET person/NOUN walk/VERB forward/ADV and/CCONJ turn/VERB left/ADV '
                  'angrily/ADV'}


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
    prepare('hml3d', tmp_path / 'hml3d', src)

    train = load_split(tmp_path / 'hml3d', 'train')
    # sub-clips by from/to are clips of their own, but for 2.0-3.5 s, which is too short
    names = ['whole', 'parts-1', 'parts-3', 'parts', 'min', 'max', 'badline']
    assert train.names.tolist() == names
    assert train.length.tolist() == [100, 60, 70, 150, 40, 199, 60]
    assert train.n_captions.tolist() == [2, 1, 1, 1, 1, 1, 1]
    assert np.array_equal(train.clip(1), clips['parts'][20:80].astype(np.float32))
    tokens = 'a/DET person/NOUN walk/VERB'
    assert train.captions[0] == {'clip': 0, 'text': 'a person walks.', 'tokens': tokens}
    meta, _, std = load_meta(tmp_path / 'hml3d')
    broken, = (reason for reason in meta['skipped'] if 'broken.npy cannot be read' in reason)
    assert meta['skipped'].pop(broken) == 1
    assert meta['skipped'] == {
        'clip shorter than 40 frames': 1, 'clip of 200 or more frames': 1,
        'sub-clip shorter than 40 frames': 1, 'NaN, infinity or huge numbers in features': 1,
        'features not 263 wide (found (251,))': 1, 'text file missing': 1,
        'features file missing': 1, 'caption line without text, tags, from and to': 2}
    assert std.tolist() == [np.float32(data.STD_FLOOR)] + 262 * [1]   # the folder's own, floored
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
    sentence(lambda: prepare('hml3d', tmp_path / 'hml3d', src), 'hml3d has 263, kit 251')


def test_folder_without_split_files_or_statistics(tmp_path, capsys):
    src = tmp_path / 'src'
    field_folder(src, {'a': noise(60)}, {'a': WALKS}, {}, stats=False)
    prepare('hml3d', tmp_path / 'hml3d', src)
    printed = capsys.readouterr().out
    assert 'all 1 clips go into all three splits' in printed
    assert 'no Mean.npy and Std.npy' in printed
    assert len(load_split(tmp_path / 'hml3d', 'test')) == 1
    np.save(src / 'new_joint_vecs' / 'a.npy', noise(39))
    sentence(lambda: prepare('hml3d', tmp_path / 'again', src), 'no usable training clip')
    assert not (tmp_path / 'again').exists()


def test_babel(tmp_path):
    src, out = tmp_path / 'src', tmp_path / 'babel'
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
    prepare('babel', out, src)
    train = load_split(out, 'train')
    assert train.names.tolist() == ['11-0', '11-3', '12-0']
    assert train.length.tolist() == [60, 140, 80]
    assert train.captions[0] == {'clip': 0, 'text': 'turn left', 'tokens': 'turn/VERB left/ADV'}
    assert load_meta(out)[0]['skipped'] == {   # in each of three splits
        'segment without a label, or a transition': 3, 'segment shorter than 40 frames': 3,
        'features file missing': 3}
    os.remove(src / 'val.json')
    sentence(lambda: prepare('babel', out, src), 'val.json')
    assert len(load_split(out, 'train')) == 3   # the old data set is still there


def test_simple_tags():
    assert simple_tags('Turn left then sit slowly with the left arm') == (
        'turn/VERB left/ADV then/CCONJ sit/VERB slowly/ADV with/ADP the/DET left/ADJ arm/NOUN')


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
    """-> {name: (split, number of the clip in it, its captions)}"""
    prepare('folder', out, src, *settings)
    clips = {}
    for split in (load_split(out, name) for name in ('train', 'val', 'test')):
        for i, name in enumerate(split.names):
            clips[name] = split, i, [c for c in split.captions if c['clip'] == i]
    return clips


def test_bvh_files_of_ones_own(tmp_path, capsys):
    src = tmp_path / 'src'
    own_folder(src, write_take, '.bvh')
    write_take(src / 'short.bvh', TAKES[0][:30])
    text = (src / 'take0.bvh').read_text()
    (src / 'toeless.bvh').write_text(text.replace('LeftToeBase', 'Bone2'))
    (src / 'broken.BVH').write_text(text[:3000])
    clips = prepare_own(src, tmp_path / 'data' / 'mine')
    printed = capsys.readouterr().out
    for words in ('cm, y up', 'Mixamo', 'spine2 put between', 'skipped 1: shorter than 40',
                  'left_foot', 'broken.BVH is not a whole BVH file', 'skipped 2: line of the captions',
                  'skipped 1: caption of a file that is not there', '1 files have no caption'):
        assert words in printed
    meta = load_meta(tmp_path / 'data' / 'mine')[0]
    assert meta['name'] == 'mine'
    assert [count['clips'] for count in meta['counts'].values()] == [8, 1, 1]

    for i, joints in enumerate(TAKES):
        split, k, captions = clips[f'more-take{i}' if i % 2 else f'take{i}']
        wanted = features_to_joints(joints_to_features(joints, SMPL, steady=True), 22)
        error = np.abs(features_to_joints(split.clip(k), 22) - wanted)
        assert np.delete(error, SMPL.names.index('spine2'), axis=1).max() < 0.01
        assert len(captions) == [1, 2, 1, 2, 0, 1][i]
    assert clips['take0'][2][0]['text'] == 'a person waves with the left hand, then bows'
    mirrored = {name[1:]: clips[name] for name in clips if name[0] == 'M'}
    assert len(mirrored) == 4
    for name, (split, _, captions) in mirrored.items():
        assert clips[name][0] is split   # in training, both
        assert {c['tokens'] for c in captions if 'hand' in c['text']} <= {
            'a/DET person/NOUN waves/VERB with/ADP the/DET right/ADJ hand/NOUN then/CCONJ '
            'bows/VERB'}


def test_mistakes_with_ones_own_files(tmp_path):
    src, stones, names = tmp_path / 'src', tmp_path / 'stones', tmp_path / 'names.json'
    own_folder(src, np.save, '.npy')
    own_folder(stones, lambda path, joints: np.save(path, 20 * joints), '.npy')
    names.write_text('{"head": "Hed"}')
    for folder, setting, *words in (
            (src, '--fps=0', '0 usable files', 'give --fps'),
            (stones, '--unit=', '0 usable files', 'give --unit'),
            (src, f'--joints={names}', 'names.json has Hed'),
            (src, f'--joints={src}/captions.csv', 'captions.csv'),
            (src, f'--captions={src}/no.csv', 'expected lines file,caption')):
        out = tmp_path / 'out'
        sentence(lambda: prepare('folder', out, folder, '--fps=20', setting), *words)
        assert not out.exists()


# ---------------------------------------------------------------------------------- packed format


def features_of(clip, n_frames):
    """Features (n_frames, 263): clip, frame, and then noise."""
    features = np.random.default_rng(clip).standard_normal((n_frames, 263), np.float32)
    features[:, 0] = clip
    features[:, 1] = np.arange(n_frames)
    return features


def packed(folder, lengths=(50, 61), n_captions=(0, 1), name='tiny'):
    """A data set of one split, which is also returned."""
    os.makedirs(folder, exist_ok=True)
    clips = [(f'clip{i}', features_of(i, length),
              [dict(text=f'naïve {k}', tokens='naïve/ADJ') for k in range(n)])
             for i, (length, n) in enumerate(zip(lengths, n_captions))]
    counts = {'train': data.save_split(folder, 'train', iter(clips))}
    stats = data.mean_std(np.load(os.path.join(folder, 'train_motion.npy')), 22)
    meta = dict(name=name, skeleton='smpl22', max_frames=199, counts=counts)
    data.save_meta(folder, meta, *stats)
    return load_split(folder, 'train')


def test_packed_round_trip(tmp_path):
    split = packed(tmp_path)
    assert isinstance(split.features, np.memmap)
    assert split.names.tolist() == ['clip0', 'clip1']
    assert split.captions == [dict(clip=1, text='naïve 0', tokens='naïve/ADJ')]
    assert split.n_captions.tolist() == [0, 1]
    clips = [features_of(0, 50), features_of(1, 61)]
    for i, features in enumerate(clips):
        assert np.array_equal(split.clip(i), features)
    meta, mean, std = load_meta(tmp_path)
    assert meta['counts'] == {'train': dict(clips=2, frames=111, captions=1)}
    flat = np.concatenate(clips).astype(float)
    assert np.allclose(mean, flat.mean(0), atol=1e-6)
    for group in (slice(1, 3), slice(4, 67), slice(259, 263)):
        assert np.allclose(std[group], flat.std(0)[group].mean(), atol=1e-6)

    assert data.save_split(tmp_path, 'val', iter([])) == {}
    assert not (tmp_path / 'val_motion.npy').exists()


def test_features_that_are_not_finite_are_refused_while_writing(tmp_path):
    clips = [('one', features_of(1, 50), []), ('two', features_of(2, 50) + np.inf, [])]
    sentence(lambda: data.save_split(tmp_path, 'train', clips), 'two has NaN or infinite features')


def test_missing_data_names_the_command(tmp_path):
    command = 'python prepare_data.py toy'
    sentence(lambda: load_split(tmp_path / 'toy', 'train'), command)
    packed(tmp_path / 'toy', name='toy')
    sentence(lambda: load_split(tmp_path / 'toy', 'test'), 'no split "test"', 'train', command)


# ------------------------------------------------------------------------------ lengths and groups


def within(count, n, share, sigmas=5):
    """Is the count of n draws that have this share what chance allows?"""
    return abs(count - n * share) < sigmas * np.sqrt(n * share * (1 - share))


def test_field_length_is_the_fields_rule():
    generator = torch.Generator().manual_seed(0)
    length = torch.randint(8, 200, (60_000,), generator=generator)
    start, tokens = data.field_length(length, generator)
    lost = length // 4 - tokens
    assert set(lost.tolist()) == {0, 1}
    assert start.min() == 0
    assert (start + 4 * tokens <= length).all()
    for some in (lost, lost[length % 4 == 0]):
        assert within(some.sum().item(), len(some), 1 / 3)   # a third of a token is lost on average

    start, tokens = data.field_length(torch.full((30_000,), 43), generator)
    for kept, places in ((10, 4), (9, 8)):   # it starts in any of 43 - 40 + 1 and 43 - 36 + 1
        counts = start[tokens == kept].bincount()
        assert len(counts) == places
        assert all(within(count, counts.sum().item(), 1 / places) for count in counts.tolist())


def test_field_length_of_whole_short_and_limited_clips():
    length = torch.tensor([4, 7, 40, 43, 196, 199])
    start, tokens = data.field_length(length)
    assert start.tolist() == [0] * 6
    assert tokens.tolist() == [1, 1, 10, 10, 49, 49]
    assert data.field_length(length.numpy(), longest=12)[1].tolist() == [1, 1, 10, 10, 12, 12]
    many = length.repeat(100)
    start, tokens = data.field_length(many, torch.Generator().manual_seed(2), longest=12)
    assert set(tokens.tolist()) == {1, 9, 10, 11, 12}
    assert (start + 4 * tokens <= many).all()
    assert start.max() > 100   # of a long clip any part


def test_clips_of_similar_length_are_grouped():
    lengths = torch.randint(10, 20, (200,), generator=torch.Generator().manual_seed(0))
    groups = data.by_length(lengths, 32)
    assert [len(group) for group in groups] == [32] * 6 + [8]
    assert torch.equal(lengths[torch.cat(groups)], lengths.sort().values)
    assert sorted(torch.cat(groups).tolist()) == list(range(200))


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
    data.cached_tokens(FrameNumbers(), split, folder / 'ids.npz')
    cannot_encode = SimpleNamespace(config=FrameNumbers.config)   # the file has all ids
    ids = data.cached_tokens(cannot_encode, split, folder / 'ids.npz')
    n = len(split.captions)
    vectors = torch.arange(n).float()[:, None].expand(n, 512)
    index = torch.arange(n)[:, None].expand(n, 3)
    role = torch.tensor([1, 0, 0], dtype=torch.int8).expand(n, 3)
    return Tokens(split, ids, vectors, index, role, 'cpu')


def test_a_crops_tokens_are_those_of_its_frames(tmp_path):
    lengths = torch.tensor([48, 41, 199, 67])
    tokens = tokens_of(tmp_path, lengths.tolist(), (1, 2, 1, 1))
    captions = torch.arange(5).repeat(400)
    clip = torch.tensor([0, 1, 1, 2, 3]).repeat(400)
    ids, c, role, valid = tokens.batch(captions, torch.Generator().manual_seed(0))
    assert ids.shape == (2000, 49, 2)
    assert c.shape == (2000, 1, 512)   # as many condition tokens as the batch needs
    assert torch.equal(c[:, 0, 0], captions.float())
    assert role.all()
    n = valid.sum(1)
    assert set((lengths[clip] // 4 - n).tolist()) == {0, 1}
    assert torch.equal(valid, torch.arange(49) < n[:, None])   # no holes

    start = ids[:, 0, 1]
    frames = start[:, None] + 4 * torch.arange(49)
    expected = torch.stack([clip[:, None].expand_as(frames), frames], -1)
    assert torch.equal(ids[valid], expected[valid])
    assert (start + 4 * n <= lengths[clip]).all()
    assert set((start % 4).tolist()) == {0, 1, 2, 3}

    # whole clips, and in a fixed width, which may exceed all tokens that there are
    whole, _, _, valid = tokens.batch(torch.tensor([0, 1]), width=100)
    assert whole.shape == (2, 100, 2)
    assert valid.sum(1).tolist() == [12, 10]
    assert whole[1, :10, 1].tolist() == list(range(0, 40, 4))
    assert tokens.batch(torch.tensor([1]))[0].shape == (1, 10, 2)


def test_a_clip_is_drawn_first_then_its_caption(tmp_path):
    tokens = tokens_of(tmp_path, (40, 40, 40), (1, 0, 9))
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
    assert len(batch[:, 0, :2].unique(dim=0)) == len(windows)   # and every window is drawn

    names = split.names_at(torch.tensor([0, 63, 64, 127])).tolist()
    assert names == ['clip0', 'clip0', 'clip1', 'clip2']
    sentence(lambda: Windows(split, 104, 'cpu'), 'No clip has 104 frames')


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
