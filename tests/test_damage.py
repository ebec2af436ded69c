"""Bad settings, bad input and damaged files end in one sentence. Inputs that hypothesis generates
are in test_fuzz.py, whole runs are in test_runs.py."""
import errno
import io
import json
import os
import re
import resource
import shutil
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import PROJECT
from test_data import WALKS, FrameNumbers, field_folder, noise, packed, prepare

import momask
import prepare_data
from lib import bandai, configurator, data, runtime, text
from lib.bvh import read_bvh
from lib.configurator import LIMITS, SHARED, UserError, allowed_words, configure, settings_lines
from vq import RVQVAE, VQConfig, load_tokenizer

SCRIPTS = ('train_vq', 'train_mask', 'train_eval', 'sample', 'eval_t2m', 'eval_edit', 'app',
           'study', 'bench')


def sentence(work, *words):
    """work() must end in a UserError of one line that contains all the words."""
    with pytest.raises(UserError) as error:
        work()
    said = str(error.value)
    assert '\n' not in said
    assert len(said) < 1500
    for word in words:
        assert str(word) in said, said


# ----------------------------------------------------------------------------------- configurator


def lines_of(script):
    """The lines with settings of a script and, if it uses them, of config/decoding.py."""
    path = os.path.join(PROJECT, f'{script}.py')
    lines = settings_lines(path)
    with open(path, encoding='utf-8') as f:
        if 'shared=True' in f.read():
            lines = settings_lines(SHARED) + lines
    return [line for line in lines if re.match(r'\w+ = ', line)]


def settings_of(script):
    """The settings of a script with their defaults. Nothing is imported."""
    found = {}
    exec('\n'.join(lines_of(script)), found)
    del found['__builtins__']
    return found


@pytest.mark.parametrize('script', SCRIPTS)
def test_defaults_are_allowed(script):
    settings = settings_of(script)
    assert configure(dict(settings), []) == settings
    for key, value in settings.items():
        low, high = LIMITS.get(key, (value, value))
        assert low <= value <= high, key
    for key, words in allowed_words(lines_of(script)).items():
        assert not words or settings[key] in words, key


def test_allowed_words_come_from_the_comment():
    lines = lines_of('train_mask')
    assert allowed_words(lines)['mask_by'] == ['random', 'msd', 'velocity', 'loss', 'msd+loss']
    settings = settings_of('train_mask') | {'__file__': os.path.join(PROJECT, 'train_mask.py')}
    sentence(lambda: configure(settings, ['--mask_by=nonsense']), 'mask_by', 'velocity')
    assert configure(settings, ['--mask_by=msd+loss'])['mask_by'] == 'msd+loss'


@pytest.mark.parametrize('script, argument', [
    ('train_mask', argument) for argument in (
        'seed=-1', 'seed=4294967296', 'batch_size=0', 'log_every=0', 'n_layers=-1', 'dropout=1.0',
        'window=1000', 'latent=1000000000', 'lr=nan', 'lr=1e400', 'lr=-1e-4', 'alpha0=-inf',
        'lr=' + '-' * 9000 + '1', 'seed=' + '9' * 5000, 'data=\udcff', 'text=\0', 'rotary=1')
] + [('train_vq', 'n_codes=40000'), ('train_vq', 'vq_depth=-1'), ('sample', 'top_share=0'),
     ('sample', 'length=-4'), ('sample', 'res_layers=-2'), ('train_eval', 'ev_steps=0'),
     ('sample', 'repeats=1000000000'), ('eval_t2m', 'pooled=0'), ('eval_t2m', 'mm_batches=100000')])
def test_settings_that_make_no_sense(script, argument):
    key = argument.split('=')[0]
    sentence(lambda: configure(settings_of(script), [f'--{argument}']), key, 'expected')


@pytest.mark.parametrize('content, fact', [
    (b'steps = [1]', 'steps is [1]'),
    (b'steps = True', 'steps is True'),
    (b'cond_scale = float("nan")', 'cond_scale is nan'),
    (b'cond_scale = 10**400', 'cond_scale is'),
    (b'seed = 10**5000', 'seed is'),
    (b'steps = ' + 300 * b'(' + b'1' + 300 * b')', ''),
    (b'steps = 1 / 0', 'ZeroDivisionError'),
    (b'raise SystemExit', 'SystemExit'),
    (b'seed = 1   # \xff', ''),
    (b'clock = 3', 'clock')])
def test_config_files_that_make_no_sense(tmp_path, content, fact):
    path = tmp_path / 'my.py'
    path.write_bytes(content)
    sentence(lambda: configure(settings_of('sample'), [str(path)]), 'my.py', fact)


# ------------------------------------------------------------------------ files that are no files


@pytest.mark.parametrize('what', ['folder', 'pipe', 'nothing'])
@pytest.mark.parametrize('read', [
    read_bvh, load_tokenizer, lambda path: configure(settings_of('sample'), [path]),
    lambda path: runtime.read_array(path, ''), lambda path: runtime.read_text(path, ''),
    lambda path: runtime.read_json(path, ''), lambda path: runtime.read_arrays(path, '', ['a'])])
def test_a_path_that_is_not_a_file(tmp_path, read, what):
    path = str(tmp_path / 'x.any')
    if what == 'folder':
        os.mkdir(path)
    if what == 'pipe':
        os.mkfifo(path)
    sentence(lambda: read(path), path)


CLIP = 'dataset-1_bow_sad_{:03d}.bvh'


def archive_of(path, members):
    """Write a .tar.xz of (name, content). A content of one byte is the type of a special file."""
    with tarfile.open(path, 'w:xz') as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if len(content) == 1:
                info.type = content
                info.linkname = CLIP.format(0)
                content = b''
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize('kind', [tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.SYMTYPE])
def test_special_files_with_the_name_of_a_clip(tmp_path, kind):
    path = tmp_path / 'a.tar'
    archive_of(path, [(CLIP.format(0), b'HIERARCHY'), (CLIP.format(1), kind),
                      (CLIP.format(2), b'')])
    found = list(bandai.bandai_files(path))
    assert [len(content) for _, content in found] == [9, 0, 0]
    _, clips, skipped = prepare_data.bandai_clips(found[1])
    assert not clips
    assert CLIP.format(1) in next(iter(skipped))

    os.mkdir(tmp_path / 'folder')
    os.mkdir(tmp_path / 'folder' / CLIP.format(0))
    os.mkfifo(tmp_path / 'folder' / CLIP.format(1))
    assert [content for _, content in bandai.bandai_files(tmp_path / 'folder')] == [b'', b'']


# ----------------------------------------------------------------------------- hml3d, kit and babel


@pytest.mark.parametrize('file', ['Std.npy', 'train.txt'])
def test_statistics_and_lists_that_make_no_sense(tmp_path, file):
    src = tmp_path / 'src'
    field_folder(src, {'a': noise(60)}, {'a': WALKS}, {'train': ['a']})
    (src / file).write_bytes(b'\xff\xfe\xff')
    sentence(lambda: prepare('hml3d', tmp_path / 'out', src), file)


# ------------------------------------------------------------------------ packed format and caches

FILES = ('mean.npy', 'std.npy', 'train_motion.npy', 'train_clips.npz', 'train_captions.json')


@pytest.mark.parametrize('damage', ['one bit', 'half of it', 'nothing left'])
@pytest.mark.parametrize('file', FILES)
def test_a_damaged_file_of_a_data_set_is_found(tmp_path, file, damage):
    """Also with the time and size that it had before. A copy with other times is not damaged."""
    packed(tmp_path / 'toy')
    shutil.copytree(tmp_path / 'toy', tmp_path / 'copy', copy_function=shutil.copyfile)
    assert len(data.load_split(tmp_path / 'copy', 'train')) == 2
    path = tmp_path / 'toy' / file
    content = bytearray(path.read_bytes())
    time = path.stat().st_mtime_ns
    content[2 * len(content) // 3] ^= 4
    path.write_bytes(content if damage == 'one bit' else content[:len(content) // 2])
    os.utime(path, ns=(time, time))
    if damage == 'nothing left':
        os.remove(path)
    sentence(lambda: data.load_split(tmp_path / 'toy', 'train'), path)


@pytest.mark.parametrize('content', [
    b'[1]', b'\xff\xff', b'[' * 100_000, dict(name=None), dict(skeleton=['smpl22']), dict(files=3),
    dict(max_frames=0)])
def test_meta_that_makes_no_sense(tmp_path, content):
    packed(tmp_path)
    path = tmp_path / 'meta.json'
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content).encode()
    path.write_bytes(content)
    sentence(lambda: data.load_split(tmp_path, 'train'), path)


@pytest.mark.parametrize('change', [
    lambda ids: ids[:, :-1], lambda ids: ids[..., :1], lambda ids: ids.astype(np.int64), np.ravel])
def test_cached_tokens_of_another_shape(tmp_path, change):
    split = packed(tmp_path)
    path = tmp_path / 'ids.npz'
    np.savez(path, ids=change(data.cached_tokens(FrameNumbers(), split, path)))
    sentence(lambda: data.cached_tokens(FrameNumbers(), split, path), path, 'delete it')


@pytest.mark.parametrize('vectors', [None, np.ones((2, 512)), np.full((1, 512), np.nan, 'f4')])
def test_cached_text_of_another_kind(tmp_path, vectors):
    arrays = {} if vectors is None else dict(vectors=vectors)
    np.savez(tmp_path / 'text_clip.npz', captions=['a'], **arrays)
    sentence(lambda: text.caption_vectors(['a'], 'clip', cache=str(tmp_path)), 'text_clip.npz',
             'delete it')


@pytest.mark.parametrize('prompt', ['человек идёт', '人が歩く', 'the a of', '!?'])
def test_a_prompt_without_a_word_that_the_encoder_reads(prompt):
    sentence(lambda: text.caption_vectors(['a person walks', prompt], 'hash', 'clauses'), prompt,
             'text_encoder=clip')


# ------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope='module')
def vq_file(tmp_path_factory):
    """A small tokenizer's checkpoint."""
    config = dict(dim=23, n_codes=8, code_dim=4, n_quantizers=2, width=4)
    torch.manual_seed(0)
    model = RVQVAE(VQConfig(**config))
    path = tmp_path_factory.mktemp('vq') / 'vq.pt'
    runtime.save(dict(kind='vq', config=config, model=model.state_dict()), path)
    return path


CHANGES = {
    'another program': lambda c: {'state_dict': {}},
    'a tensor': lambda c: torch.ones(3),
    'another kind': lambda c: c | dict(kind='mask'),
    'no config': lambda c: {key: c[key] for key in ('kind', 'model')},
    'a setting of another version': lambda c: c | dict(config=c['config'] | dict(heads=3)),
    'a setting of another type': lambda c: c | dict(config=c['config'] | dict(width='4')),
    'codes beyond int16': lambda c: c | dict(config=c['config'] | dict(n_codes=40000)),
    'config is a list': lambda c: c | dict(config=[3]),
    'model is a list': lambda c: c | dict(model=[3]),
    'a weight that is a number': lambda c: c | dict(model=c['model'] | {'encoder.0.bias': 3}),
    'NaN': lambda c: c | dict(model=c['model'] | {'encoder.0.bias': torch.full((4,), np.nan)})}


@pytest.mark.parametrize('what', CHANGES)
def test_checkpoints_that_make_no_sense(tmp_path, vq_file, what):
    path = tmp_path / 'vq.pt'
    torch.save(CHANGES[what](torch.load(vq_file)), path)
    sentence(lambda: load_tokenizer(str(path)), path)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_no_checkpoint_with_nan_is_written(tmp_path, bad):
    path = tmp_path / 'x.pt'
    runtime.save({'model': {'a': torch.ones(2)}}, path)
    before = path.read_bytes()
    wrong = {'model': {'a': torch.ones(2), 'b': torch.tensor([1, bad])}}
    sentence(lambda: runtime.save(wrong, path), path, 'b has NaN')
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ['x.pt']


def test_a_full_disk(tmp_path, capsys, monkeypatch):
    """A limit on the size of files takes its place. An error of the system outside of our own
    writers is printed as its sentence, too."""
    path = tmp_path / 'x.pt'
    runtime.save({'a': torch.ones(2)}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        sentence(lambda: runtime.save({'a': torch.ones(1_000_000)}, path), path, 'disk')
        with pytest.raises(UserError, match='x.npy was not written'):
            with runtime.atomic_write(tmp_path / 'x.npy') as f:
                np.save(f, np.ones(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ['x.pt']

    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    configurator.install_error_hook()
    with pytest.raises(SystemExit):
        sys.excepthook(OSError, OSError(errno.ENOSPC, 'No space left on device'), None)
    assert capsys.readouterr().err == '[Errno 28] No space left on device\n'


def test_a_checkpoint_is_readable_at_every_moment(tmp_path):
    """Two threads write it while the test reads it."""
    path = tmp_path / 'x.pt'

    def write(value):
        for _ in range(20):
            runtime.save({'a': torch.full((50_000,), value)}, path)

    write(0.0)
    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(write, value) for value in (0.0, 1.0)]
        while not all(writer.done() for writer in writers):
            assert len(runtime.load(path, '')['a'].unique()) == 1
    for writer in writers:
        writer.result()
    assert os.listdir(tmp_path) == ['x.pt']


@pytest.mark.parametrize('opt', [
    b'n_heads: 0\nvq_name: a\n', b'n_heads: 6\nvq_name: ../../a\n', b'vq_name: a\n', b'\xff\xff'])
def test_options_of_official_checkpoints(tmp_path, opt):
    path = tmp_path / 't2m' / 'x' / 'opt.txt'
    os.makedirs(path.parent)
    path.write_bytes(opt)
    sentence(lambda: momask.read_opt(tmp_path, 't2m', 'x'), path)


@pytest.mark.parametrize('name', ['file/x.json', 'n' * 300 + '/x', 'folder', 'a\0b/x'])
def test_places_that_cannot_be_written(tmp_path, name):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'folder').mkdir()
    path = os.path.join(tmp_path, name)
    sentence(lambda: runtime.must_be_writable(path), path)
