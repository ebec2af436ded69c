"""Bad input and damaged files: everything that once ended in a traceback, took all memory or was
silently wrong, and the sentence that it gets now. Whole runs are in test_runs.py."""
import errno
import io
import json
import os
import re
import resource
import tarfile
import threading

import numpy as np
import pytest
import torch
from conftest import PROJECT
from test_bvh import HEAD, ROWS, tiny
from test_data import WALKS, FrameNumbers, field_folder, noise, packed, prepare

import momask
import prepare_data
from lib import bandai, data, runtime, text
from lib.bvh import read_bvh
from lib.configurator import LIMITS, SHARED, UserError, configure, settings_lines
from vq import RVQVAE, VQConfig, load_tokenizer

SCRIPTS = ('train_vq', 'train_mask', 'train_eval', 'sample', 'eval_t2m', 'eval_edit', 'app', 'study',
           'bench')


def sentence(work, *words):
    """work() ends in a UserError of one line that holds all the words."""
    with pytest.raises(UserError) as error:
        work()
    said = str(error.value)
    assert '\n' not in said
    assert len(said) < 1500
    for word in words:
        assert word in said, said


# ----------------------------------------------------------------------------------- configurator


def settings_of(script):
    """Its settings and their defaults, with nothing imported."""
    path = os.path.join(PROJECT, f'{script}.py')
    lines = settings_lines(path)
    with open(path, encoding='utf-8') as f:
        if 'shared=True' in f.read():
            lines = settings_lines(SHARED) + lines
    found = {}
    exec('\n'.join(line for line in lines if re.match(r'\w+ = ', line)), found)
    del found['__builtins__']
    return found


def test_defaults_are_within_the_limits():
    for script in SCRIPTS:
        settings = settings_of(script)
        assert configure(dict(settings), []) == settings
        for key, value in settings.items():
            if key in LIMITS:
                low, high = LIMITS[key]
                assert low <= value <= high, (script, key)


@pytest.mark.parametrize('script, argument', [
    ('train_mask', argument) for argument in (
        'seed=-1', 'seed=4294967296', 'batch_size=0', 'batch_size=-8', 'eval_every=0',
        'log_every=0', 'n_heads=0', 'n_layers=-1', 'n_layers=0', 'dropout=1.0', 'dropout=-0.1',
        'window=1000', 'window=0', 'latent=0', 'latent=1000000000', 'lr=' + '-' * 9000 + '1',
        'lr=nan', 'lr=1e400', 'lr=-1e-4', 'mask_iters=0', 'cond_drop=2', 'seed=1_0e',
        'alpha0=-inf', 'seed=' + '9' * 5000, 'grad_clip=0', 'data=\udcff', 'text=\0', 'rotary=1')
] + [
    ('train_vq', argument) for argument in (
        'n_codes=0', 'n_codes=40000', 'n_quantizers=0', 'vq_depth=-1', 'vq_batch=0',
        'vq_eval_every=0', 'window_frames=0', 'code_dim=0')
] + [
    ('sample', argument) for argument in (
        'cond_scale=1e400', 'cond_scale=nan', 'steps=0', 'temperature=0', 'top_share=0',
        'repeats=0', 'length=-4', 'res_layers=-2')
] + [('eval_t2m', 'repeats=0'), ('train_eval', 'ev_batch=0'), ('train_eval', 'ev_steps=0')])
def test_settings_that_make_no_sense(script, argument):
    key = argument.split('=')[0]
    sentence(lambda: configure(settings_of(script), [f'--{argument}']), key, 'expected')


@pytest.mark.parametrize('line, words', [
    ('steps = [1]', 'steps is [1], expected int'),
    ('steps = None', 'steps is None, expected int'),
    ('cond_scale = float("nan")', 'cond_scale is nan'),
    ('cond_scale = 10**400', 'cond_scale is'),
    ('seed = 10**5000', 'seed is a huge number'),
    ('steps = True', 'steps is True, expected int'),
    ('steps = ' + 300 * '(' + '1' + 300 * ')', 'is not a config file'),
    ('steps = 1 / 0', 'is not a config file: ZeroDivisionError'),
    ('raise SystemExit', 'is not a config file: SystemExit'),
    ('clock = 3', 'sets clock')])
def test_config_files_that_make_no_sense(tmp_path, line, words):
    path = tmp_path / 'my.py'
    path.write_text(line)
    sentence(lambda: configure(settings_of('sample'), [str(path)]), 'my.py', words)


def test_a_config_file_that_is_none(tmp_path):
    os.mkfifo(tmp_path / 'pipe.py')
    (tmp_path / 'latin.py').write_bytes(b'seed = 1   # \xff')
    for path in (tmp_path, tmp_path / 'pipe.py', tmp_path / 'latin.py'):
        sentence(lambda: configure(settings_of('sample'), [str(path)]), str(path))


def test_scripts_are_read_once_for_foreign_keys(tmp_path):
    """A second was the time of it, at every foreign key."""
    path = tmp_path / 'my.py'
    path.write_text('\n'.join(f'{key} = {value!r}' for key, value in settings_of('bench').items()
                              if key not in settings_of('sample')))
    configure(settings_of('sample'), [str(path)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    for _ in range(20):
        configure(settings_of('sample'), [str(path)])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 1


# ------------------------------------------------------------------------------------ BVH, archives

BVH = HEAD + '\n'.join(ROWS)
END_SITE = 'End Site\n      {\n        OFFSET 0 0 7\n'


@pytest.mark.parametrize('text', [
    BVH.replace('Frame Time: 0.05', 'Frame Time: 1000'),
    BVH.replace('Frame Time: 0.05', 'Frame Time: 1e400'),
    BVH.replace('Frame Time: 0.05', 'Frame Time: 1e-9'),
    BVH.replace('Frames: 3', 'Frames: ' + '9' * 5000),
    BVH.replace(END_SITE, END_SITE + 'JOINT x\n{\nOFFSET 0 0 0\n}\n'),
    re.sub('CHANNELS .*', 'CHANNELS 0', HEAD).replace('Frames: 3', 'Frames: 999999999'),
    BVH.replace('2.0E1', '1e300'),
    BVH.replace('OFFSET 0 -10 0', 'OFFSET 0 -1e300 0')],
    ids=['slow', 'infinite', 'fast', 'digits', 'end site', 'no channels', 'far', 'long'])
def test_bvh(text):
    assert text != BVH
    sentence(lambda: read_bvh(tiny(text)), 'tiny.bvh')


def test_a_bvh_path_that_is_no_file(tmp_path):
    os.mkdir(tmp_path / 'a.bvh')
    os.mkfifo(tmp_path / 'b.bvh')
    for name in ('a.bvh', 'b.bvh', 'c.bvh'):
        sentence(lambda: read_bvh(str(tmp_path / name)), name)


CLIP = 'dataset-1_bow_sad_{:03d}.bvh'


def archive_of(path, members):
    with tarfile.open(path, 'w:xz') as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if len(content) == 1:   # a type, not a file's content
                info.type = content
                info.linkname = CLIP.format(0)
                content = b''
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize('kind', [tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.SYMTYPE])
def test_an_archive_with_something_else_named_bvh(tmp_path, kind):
    path = tmp_path / 'a.tar'
    archive_of(path, [(CLIP.format(0), b'HIERARCHY'), (CLIP.format(1), kind),
                      (CLIP.format(2), b'')])
    found = list(bandai.bandai_files(path))
    assert [len(content) for _, content in found] == [9, 0, 0]
    _, clips, skipped = prepare_data.bandai_clips(found[1])
    assert not clips
    assert CLIP.format(1) in next(iter(skipped))


def test_a_folder_with_something_else_named_bvh(tmp_path):
    os.mkdir(tmp_path / CLIP.format(0))
    os.mkfifo(tmp_path / CLIP.format(1))
    assert [content for _, content in bandai.bandai_files(tmp_path)] == [b'', b'']


def test_an_archive_with_a_flipped_bit(tmp_path):
    """A header or a stream that is damaged gave the files before it, and no word."""
    path = tmp_path / 'a.tar'
    archive_of(path, [(CLIP.format(i), os.urandom(200).hex().encode()) for i in range(8)])
    whole = path.read_bytes()
    good = list(bandai.bandai_files(path))
    assert len(good) == 8
    rng = np.random.default_rng(0)
    for place in rng.integers(len(whole), size=60).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        sentence(lambda: list(bandai.bandai_files(path)), str(path))
    for share in (0.3, 0.5, 0.7):
        path.write_bytes(whole[:int(share * len(whole))])
        sentence(lambda: list(bandai.bandai_files(path)), str(path))


# ----------------------------------------------------------------------------- hml3d, kit and babel


@pytest.mark.parametrize('tags', ['inf#inf', '0.0#inf', '-1.0#3.0', '3.0#1.0', '0#-inf', '1e9#2e9'])
def test_tags_that_name_no_frames(tmp_path, tags, capsys):
    whole = 'walks#walk/VERB#0.0#0.0'
    src = tmp_path / 'src'
    field_folder(src, {'a': noise(100)}, {'a': f'{whole}\nturns#turn/VERB#{tags}'},
                 {'train': ['a']})
    prepare('hml3d', tmp_path / 'out', src)
    split = data.load_split(tmp_path / 'out', 'train')
    assert split.names.tolist() == ['a']
    assert len(split.captions) == 1
    assert 'skipped 1: sub-clip from and to of no frames' in capsys.readouterr().out


def test_caption_without_tags(tmp_path, capsys):
    src = tmp_path / 'src'
    field_folder(src, {'a': noise(60)}, {'a': f'{WALKS}\nwalks#walk/VERB on#0.0#0.0'},
                 {'train': ['a']})
    prepare('hml3d', tmp_path / 'out', src)
    assert len(data.load_split(tmp_path / 'out', 'train').captions) == 1
    assert 'skipped 1: caption line without' in capsys.readouterr().out


def as_npz(path, array):
    with open(path, 'wb') as f:
        np.savez(f, array)


def cut(path, array):
    np.save(path, array)
    with open(path, 'r+b') as f:
        f.truncate(os.path.getsize(path) - 1000)


def longer(path, array):
    np.save(path, array)
    with open(path, 'ab') as f:
        f.write(b'more')


WRONG_ARRAYS = {
    'npz': as_npz, 'cut': cut, 'longer': longer,
    'text': lambda path, array: np.save(path, array.astype(str)),
    'pickle': lambda path, array: np.save(path, array.astype(object)),
    'complex': lambda path, array: np.save(path, array.astype(complex)),
    'header': lambda path, array: path.write_bytes(b'\x93NUMPY\x01\x00v\x00{' + b'(' * 200),
    'huge header': lambda path, array: path.write_bytes(
        b'\x93NUMPY\x01\x00v\x00' + b"{'descr': '<f4', 'fortran_order': False, "
        b"'shape': (99999999999999, 263), }".ljust(117) + b'\n'),
    'empty': lambda path, array: path.write_bytes(b''),
    'folder': lambda path, array: os.mkdir(path),
    'pipe': lambda path, array: os.mkfifo(path)}


@pytest.mark.parametrize('how', WRONG_ARRAYS)
def test_features_that_are_none(tmp_path, how):
    src = tmp_path / 'src'
    field_folder(src, {'a': noise(60)}, dict(a=WALKS, b=WALKS), {'train': ['a', 'b']})
    WRONG_ARRAYS[how](src / 'new_joint_vecs' / 'b.npy', noise(60))
    prepare('hml3d', tmp_path / 'out', src)
    skipped = data.load_meta(tmp_path / 'out')[0]['skipped']
    assert [re.sub('.*/', '', reason)[:20] for reason in skipped] == ['b.npy cannot be read']


def test_huge_features_are_skipped_and_not_written(tmp_path):
    src = tmp_path / 'src'
    field_folder(src, {'a': noise(60), 'b': 1e300 * noise(60)}, dict(a=WALKS, b=WALKS),
                 {'train': ['a', 'b']})
    prepare('hml3d', tmp_path / 'out', src)
    assert data.load_split(tmp_path / 'out', 'train').names.tolist() == ['a']


def test_statistics_and_lists_that_are_none(tmp_path):
    src = tmp_path / 'src'
    field_folder(src, {'a': noise(60)}, {'a': WALKS}, {'train': ['a']})
    (src / 'Std.npy').write_bytes(b'nothing')
    sentence(lambda: prepare('hml3d', tmp_path / 'out', src), 'Std.npy')
    os.remove(src / 'Std.npy')
    (src / 'train.txt').write_bytes(b'\xff\xfe\xff')
    sentence(lambda: prepare('hml3d', tmp_path / 'out', src), 'train.txt')


@pytest.mark.parametrize('entry', [
    '{"frame_ann": {"labels": [{"proc_label": "x", "start_t": 0, "end_t": Infinity}]}}',
    '{"frame_ann": {"labels": [{"proc_label": "x", "start_t": -3, "end_t": 3}]}}',
    '{"frame_ann": {"labels": [{"proc_label": "x", "start_t": "a", "end_t": 3}]}}',
    '{"frame_ann": {"labels": [{"proc_label": 3, "start_t": 0, "end_t": 3}]}}',
    '{"frame_ann": {"labels": [3]}}', '{"frame_ann": [3]}', '{"frame_ann": {"labels": 3}}',
    '{"feat_p": 3}', '[]', '3', 'null'])
def test_babel_entries_that_are_none(tmp_path, entry):
    good = '{"seq_ann": {"labels": [{"proc_label": "walk"}]}}'
    os.makedirs(tmp_path / 'new_joint_vecs')
    for name in ('1', '2'):
        np.save(tmp_path / 'new_joint_vecs' / f'{name}.npy', noise(80))
    for file in ('train.json', 'val.json'):
        (tmp_path / file).write_text(f'{{"1": {good}, "2": {entry}}}')
    prepare('babel', tmp_path / 'out', tmp_path)
    assert data.load_split(tmp_path / 'out', 'train').names.tolist() == ['1-0']
    (tmp_path / 'val.json').write_text('[1]')
    sentence(lambda: prepare('babel', tmp_path / 'out', tmp_path), 'val.json')


# ---------------------------------------------------------------------------------- packed format


def no_file(file):
    return lambda folder: os.remove(folder / file)


def write(file, content):
    return lambda folder: (folder / file).write_bytes(content)


def meta(**changes):
    def apply(folder):
        content = json.loads((folder / 'meta.json').read_text())
        (folder / 'meta.json').write_text(json.dumps(content | changes))

    return apply


def cut_file(file):
    return lambda folder: os.truncate(folder / file, os.path.getsize(folder / file) // 2)


def flip(file):
    def apply(folder):
        content = bytearray((folder / file).read_bytes())
        content[content.index(b'NUMPY') + 130] ^= 4   # behind the header
        (folder / file).write_bytes(content)

    return apply


def become_folder(path):
    os.remove(path)
    os.mkdir(path)


DAMAGE = {
    'meta is cut': ('meta.json', cut_file('meta.json')),
    'meta is a list': ('meta.json', write('meta.json', b'[1]')),
    'meta is not text': ('meta.json', write('meta.json', b'\xff\xff')),
    'meta is deep': ('meta.json', write('meta.json', b'[' * 100_000)),
    'no name': ('meta.json', meta(name=None)),
    'no skeleton': ('meta.json', meta(skeleton=['smpl22'])),
    'no digests': ('meta.json', meta(files=3)),
    'no max_frames': ('meta.json', meta(max_frames=0)),
    'no mean': ('mean.npy', no_file('mean.npy')),
    'std is cut': ('std.npy', cut_file('std.npy')),
    'motion is a folder': ('train_motion.npy',
                           lambda folder: become_folder(folder / 'train_motion.npy')),
    'clips have a flipped bit': ('train_clips.npz', flip('train_clips.npz')),
    'captions are a dict': ('train_captions.json', write('train_captions.json', b'{}'))}


@pytest.mark.parametrize('what', DAMAGE)
def test_a_packed_set(tmp_path, what):
    folder = tmp_path / 'toy'
    packed(folder)
    words, damage = DAMAGE[what]
    damage(folder)
    sentence(lambda: data.load_split(folder, 'train'), words, str(folder))


@pytest.mark.parametrize('change', [
    lambda ids: ids[:, :-1], lambda ids: ids[..., :1], lambda ids: ids.astype(np.int64), np.ravel])
def test_cached_tokens(tmp_path, change):
    split = packed(tmp_path)
    path = tmp_path / 'ids.npz'
    ids = data.cached_tokens(FrameNumbers(), split, path)
    whole = bytearray(path.read_bytes())
    np.savez(path, ids=change(ids))
    sentence(lambda: data.cached_tokens(FrameNumbers(), split, path), 'ids.npz', 'delete it')
    whole[whole.index(b'NUMPY') + 130] ^= 1   # one bit behind the header
    path.write_bytes(whole)
    sentence(lambda: data.cached_tokens(FrameNumbers(), split, path), 'ids.npz', 'delete it')


@pytest.mark.parametrize('damage', [
    write('text_clip.npz', b'nothing'), cut_file('text_clip.npz'), flip('text_clip.npz'),
    lambda folder: np.savez(folder / 'text_clip.npz', captions=['a']),
    lambda folder: np.savez(folder / 'text_clip.npz', captions=['a'], vectors=np.ones((2, 512))),
    lambda folder: np.savez(folder / 'text_clip.npz', captions=['a'],
                            vectors=np.full((1, 512), np.nan, np.float32))],
    ids=['foreign', 'cut', 'flipped', 'key', 'fewer', 'NaN'])
def test_cached_text(tmp_path, damage):
    def tower(device):
        return lambda captions: torch.ones(len(captions), 512)

    text.caption_vectors(['a', 'b'], 'clip', cache=str(tmp_path), tower=tower)
    damage(tmp_path)
    sentence(lambda: text.caption_vectors(['a'], 'clip', cache=str(tmp_path), tower=tower),
             'text_clip.npz', 'delete it')


@pytest.mark.parametrize('prompt', [
    'человек идёт', '人が歩く', 'the a of', '!?', '\N{WAVING HAND SIGN}'])
def test_a_prompt_of_no_words(prompt):
    """Its vector was zeros: no condition at all, and no word of it."""
    sentence(lambda: text.caption_vectors(['a person walks', prompt], 'hash', 'clauses'), prompt,
             'text_encoder=clip')


# ------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope='module')
def vq_file(tmp_path_factory):
    config = dict(dim=23, n_codes=8, code_dim=4, n_quantizers=2, width=4)
    torch.manual_seed(0)
    model = RVQVAE(VQConfig(**config))
    path = tmp_path_factory.mktemp('vq') / 'vq.pt'
    runtime.save(dict(kind='vq', config=config, model=model.state_dict()), path)
    return path


def edited(change):
    def apply(path):
        checkpoint = torch.load(path)
        change(checkpoint)
        torch.save(checkpoint, path)

    return apply


def set_weight(value):
    def change(checkpoint):
        checkpoint['model']['encoder.0.weight'][0, 0, 0] = value

    return edited(change)


def become_pipe(path):
    os.remove(path)
    os.mkfifo(path)


CHECKPOINTS = {
    'folder': become_folder,
    'pipe': become_pipe,
    'no file': os.remove,
    'empty': lambda path: os.truncate(path, 0),
    'cut': lambda path: os.truncate(path, os.path.getsize(path) // 2),
    'zip of something else': lambda path: as_npz(path, np.ones(3)),
    'list': lambda path: torch.save([1, 2], path),
    'tensor': lambda path: torch.save(torch.ones(3), path),
    'another program': lambda path: torch.save({'state_dict': {}}, path),
    'another kind': edited(lambda c: c.update(kind='mask')),
    'no config': edited(lambda c: c.pop('config')),
    'no model': edited(lambda c: c.pop('model')),
    'config of another version': edited(lambda c: c['config'].update(heads=3)),
    'config of wrong types': edited(lambda c: c['config'].update(width='4')),
    'codes beyond int16': edited(lambda c: c['config'].update(n_codes=40000)),
    'config is a list': edited(lambda c: c.update(config=[3])),
    'model is a list': edited(lambda c: c.update(model=[3])),
    'a weight that is none': edited(lambda c: c['model'].update({'encoder.0.bias': 3})),
    'NaN': set_weight(np.nan),
    'infinity': set_weight(-np.inf)}


@pytest.mark.parametrize('what', CHECKPOINTS)
def test_a_checkpoint(tmp_path, vq_file, what):
    path = tmp_path / 'vq.pt'
    path.write_bytes(vq_file.read_bytes())
    CHECKPOINTS[what](path)
    sentence(lambda: load_tokenizer(str(path)), str(path))


def test_flipped_bits_in_a_checkpoint(tmp_path, vq_file):
    """Of any hundred places; where nothing is refused, nothing is changed. Two thirds of them once
    loaded as other weights."""
    whole = vq_file.read_bytes()
    right = load_tokenizer(vq_file).state_dict()
    path = tmp_path / 'vq.pt'
    refused = 0
    rng = np.random.default_rng(0)
    for place in rng.integers(len(whole), size=100).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            weights = load_tokenizer(path).state_dict()
            assert all(torch.equal(weights[name], right[name]) for name in right)
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 50


def test_no_checkpoint_of_nan_is_written(tmp_path):
    path = tmp_path / 'x.pt'
    runtime.save({'model': {'a': torch.ones(2)}}, path)
    before = path.read_bytes()
    for bad in (np.nan, np.inf):
        wrong = {'model': {'a': torch.ones(2), 'b': torch.tensor([1, bad])}}
        sentence(lambda: runtime.save(wrong, path), str(path), 'b has NaN')
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ['x.pt']


def test_a_full_disk(tmp_path):
    """A limit on the size of files is the nearest thing to it that a test may have."""
    path = tmp_path / 'x.pt'
    runtime.save({'a': torch.ones(2)}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        sentence(lambda: runtime.save({'a': torch.ones(1_000_000)}, path), str(path), 'disk full?')
        with pytest.raises(UserError, match='x.npy was not written'):
            with runtime.atomic_write(tmp_path / 'x.npy') as f:
                np.save(f, np.ones(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ['x.pt']


def test_a_checkpoint_is_readable_at_every_moment(tmp_path):
    """Two writers and a reader."""
    path = tmp_path / 'x.pt'
    checkpoints = [{'a': torch.full((50_000,), float(i))} for i in range(2)]
    runtime.save(checkpoints[0], path)

    written = [0, 0]
    enough = threading.Event()

    def write(i):
        while not enough.is_set():
            runtime.save(checkpoints[i], path)
            written[i] += 1

    writers = [threading.Thread(target=write, args=(i,)) for i in range(2)]
    for writer in writers:
        writer.start()
    try:
        looks = 0
        while looks < 40 or min(written) < 20:
            assert len(runtime.load(path, '')['a'].unique()) == 1
            looks += 1
    finally:
        enough.set()
        for writer in writers:
            writer.join()
    assert os.listdir(tmp_path) == ['x.pt']


@pytest.mark.parametrize('opt', [
    b'n_heads: 0\nvq_name: a\n', b'n_heads: six\nvq_name: a\n', b'n_heads: 6\nvq_name: ../../a\n',
    b'vq_name: a\n', b'\xff\xff', b''])
def test_options_of_official_checkpoints(tmp_path, opt):
    os.makedirs(tmp_path / 't2m' / 'x')
    path = tmp_path / 't2m' / 'x' / 'opt.txt'
    path.write_bytes(opt)
    sentence(lambda: momask.read_opt(tmp_path, 't2m', 'x'), 'opt.txt')


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    for path in (tmp_path / 'file' / 'x.json', '/proc/x/y.json', '/dev/null/x', tmp_path,
                 tmp_path / ('n' * 300) / 'x', 'a\0b/x'):
        sentence(lambda: runtime.must_be_writable(path), 'x' if path != tmp_path else str(path))


def test_a_disk_that_is_full_of_something_else(capsys):
    """Where no writer of ours is at work the system's error is the sentence."""
    from lib import configurator
    import sys
    hook = sys.excepthook
    configurator.install_error_hook()
    try:
        with pytest.raises(SystemExit):
            sys.excepthook(OSError, OSError(errno.ENOSPC, 'No space left on device'), None)
    finally:
        sys.excepthook = hook
    assert capsys.readouterr().err == '[Errno 28] No space left on device\n'
