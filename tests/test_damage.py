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
from conftest import PROJECT, sentence
from test_data import WALKS, FrameNumbers, field_folder, noise, packed, prepare

import momask
import prepare_data
from lib import bandai, configurator, data, runtime, text
from lib.bvh import read_bvh
from lib.configurator import LIMITS, SHARED, allowed_words, configure, settings_lines
from vq import RVQVAE, VQConfig, load_tokenizer

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


@pytest.mark.parametrize('script', ['train_vq', 'train_mask', 'train_eval', 'sample', 'eval_t2m',
                                    'eval_edit', 'app', 'study', 'bench'])
def test_defaults_are_allowed(script):
    settings = settings_of(script)
    assert configure(dict(settings), []) == settings
    for key, value in settings.items():
        low, high = LIMITS.get(key, (value, value))
        assert low <= value <= high, key
    for key, words in allowed_words(lines_of(script)).items():
        assert not words or settings[key] in words, key


def test_allowed_words_come_from_the_comment():
    assert allowed_words(lines_of('train_mask'))['mask_by'] == [
        'random', 'msd', 'velocity', 'loss', 'msd+loss']
    settings = settings_of('train_mask') | {'__file__': os.path.join(PROJECT, 'train_mask.py')}
    sentence(lambda: configure(settings, ['--mask_by=nonsense']), 'mask_by', 'velocity')
    assert configure(settings, ['--mask_by=msd+loss'])['mask_by'] == 'msd+loss'


@pytest.mark.parametrize('script, arguments', [
    ('train_mask', ['seed=-1', 'seed=4294967296', 'seed=' + '9' * 5000, 'batch_size=0', 'lr=nan',
                    'log_every=0', 'n_layers=-1', 'dropout=1.0', 'window=1000', 'lr=-1e-4',
                    'latent=1000000000', 'lr=1e400', 'alpha0=-inf', 'data=\udcff', 'text=\0',
                    'lr=' + '-' * 9000 + '1', 'rotary=1']),
    ('train_vq', ['n_codes=40000', 'vq_depth=-1']),
    ('sample', ['top_share=0', 'length=-4', 'res_layers=-2', 'repeats=1000000000']),
    ('train_eval', ['ev_steps=0']),
    ('eval_t2m', ['pooled=0', 'mm_batches=100000'])])
def test_settings_that_make_no_sense(script, arguments):
    settings = settings_of(script)
    for argument in arguments:
        key = argument.split('=')[0]
        sentence(lambda: configure(settings, [f'--{argument}']), key, 'expected')


@pytest.mark.parametrize('content, fact', [
    ('steps = True', 'steps is True'),
    ('cond_scale = float("nan")', 'cond_scale is nan'),
    ('cond_scale = 10**400', 'cond_scale is'),
    ('steps = ' + 300 * '(' + '1' + 300 * ')', ''),
    ('raise SystemExit', 'SystemExit'),
    ('clock = 3', 'clock')])
def test_config_files_that_make_no_sense(tmp_path, content, fact):
    path = tmp_path / 'my.py'
    path.write_text(content)
    sentence(lambda: configure(settings_of('sample'), [str(path)]), 'my.py', fact)


# ------------------------------------------------------------------------ files that are no files


@pytest.mark.parametrize('what', ['folder', 'pipe', 'nothing'])
@pytest.mark.parametrize('read', [
    read_bvh, load_tokenizer, lambda path: configure(settings_of('sample'), [path])])
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
    assert [content for _, content in found] == [b'HIERARCHY', b'', b'']
    _, clips, skipped = prepare_data.bandai_clips(found[1])
    assert not clips
    assert CLIP.format(1) in next(iter(skipped))

    os.mkdir(tmp_path / 'folder')
    os.mkdir(tmp_path / 'folder' / CLIP.format(0))
    os.mkfifo(tmp_path / 'folder' / CLIP.format(1))
    assert [content for _, content in bandai.bandai_files(tmp_path / 'folder')] == [b'', b'']


@pytest.mark.parametrize('file', ['Std.npy', 'train.txt'])
def test_statistics_and_lists_that_make_no_sense(tmp_path, file):
    src = tmp_path / 'src'
    field_folder(src, {'a': noise(60)}, {'a': WALKS}, {'train': ['a']})
    (src / file).write_bytes(b'\xff\xfe\xff')
    sentence(lambda: prepare('hml3d', tmp_path / 'out', src), file)


# ------------------------------------------------------------------------ packed format and caches


@pytest.mark.parametrize('file', ['mean.npy', 'std.npy', 'train_motion.npy', 'train_clips.npz',
                                  'train_captions.json'])
def test_a_missing_file_of_a_data_set_is_found(tmp_path, file):
    """A copy with other times is not damaged. Of what is damaged, see test_fuzz.py."""
    packed(tmp_path / 'toy')
    shutil.copytree(tmp_path / 'toy', tmp_path / 'copy', copy_function=shutil.copyfile)
    assert len(data.load_split(tmp_path / 'copy', 'train')) == 2
    os.remove(tmp_path / 'copy' / file)
    sentence(lambda: data.load_split(tmp_path / 'copy', 'train'), tmp_path / 'copy' / file)


@pytest.mark.parametrize('change', [
    dict(name=None), dict(skeleton=['smpl22']), dict(files=3), dict(max_frames=0)])
def test_meta_that_makes_no_sense(tmp_path, change):
    packed(tmp_path)
    path = tmp_path / 'meta.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    sentence(lambda: data.load_split(tmp_path, 'train'), path)


@pytest.mark.parametrize('change', [
    lambda ids: ids[:, :-1], lambda ids: ids[..., :1], lambda ids: ids.astype(np.int64), np.ravel])
def test_cached_tokens_of_another_shape(tmp_path, change):
    split = packed(tmp_path)
    path = tmp_path / 'ids.npz'
    np.savez(path, ids=change(data.cached_tokens(FrameNumbers(), split, path)))
    sentence(lambda: data.cached_tokens(FrameNumbers(), split, path), path, 'delete it')


@pytest.mark.parametrize('arrays', [
    {}, dict(vectors=np.ones((2, 512))), dict(vectors=np.full((1, 512), np.nan, 'f4'))])
def test_cached_text_of_another_kind(tmp_path, arrays):
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


@pytest.mark.parametrize('change', [
    lambda c: {'state_dict': {}},                                                # another program
    lambda c: torch.ones(3),
    lambda c: c | dict(kind='mask'),
    lambda c: {key: c[key] for key in ('kind', 'model')},
    lambda c: c | dict(config=c['config'] | dict(heads=3)),                      # another version
    lambda c: c | dict(config=c['config'] | dict(width='4')),
    lambda c: c | dict(config=c['config'] | dict(n_codes=40000)),                # beyond int16
    lambda c: c | dict(config=[3]),
    lambda c: c | dict(model=[3]),
    lambda c: c | dict(model=c['model'] | {'encoder.0.bias': 3}),
    lambda c: c | dict(model=c['model'] | {'encoder.0.bias': torch.full((4,), np.nan)})])
def test_checkpoints_that_make_no_sense(tmp_path, vq_file, change):
    path = tmp_path / 'vq.pt'
    torch.save(change(torch.load(vq_file)), path)
    sentence(lambda: load_tokenizer(str(path)), path)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint, which is still there after a test that fails to replace it."""
    path = tmp_path / 'x.pt'
    runtime.save({'model': {'a': torch.ones(2)}}, path)
    before = path.read_bytes()
    yield path
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ['x.pt']


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_no_checkpoint_with_nan_is_written(saved, bad):
    wrong = {'model': {'a': torch.ones(2), 'b': torch.tensor([1, bad])}}
    sentence(lambda: runtime.save(wrong, saved), saved, 'b has NaN')


def test_a_full_disk(saved):
    """A limit on the size of files takes its place."""
    def write_array(path):
        with runtime.atomic_write(path) as f:
            np.save(f, np.ones(1_000_000))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        sentence(lambda: runtime.save({'a': torch.ones(1_000_000)}, saved), saved, 'disk')
        sentence(lambda: write_array(saved), saved, 'disk')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_an_error_of_the_system_is_one_sentence(capsys, monkeypatch):
    """Also outside of our own writers."""
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
    'n_heads: 0\nvq_name: a\n', 'n_heads: 6\nvq_name: ../../a\n', 'vq_name: a\n'])
def test_options_of_official_checkpoints(tmp_path, opt):
    path = tmp_path / 't2m' / 'x' / 'opt.txt'
    path.parent.mkdir(parents=True)
    path.write_text(opt)
    sentence(lambda: momask.read_opt(tmp_path, 't2m', 'x'), path)


@pytest.mark.parametrize('name', ['file/x.json', 'n' * 300 + '/x', 'folder', 'a\0b/x'])
def test_places_that_cannot_be_written(tmp_path, name):
    (tmp_path / 'file').touch()
    (tmp_path / 'folder').mkdir()
    path = os.path.join(tmp_path, name)
    sentence(lambda: runtime.must_be_writable(path), path)
