"""What a run does to a folder that is not its own, to a checkpoint when it diverges, and what it
says about places that it cannot write."""
import json
import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import PROJECT, run_script
from test_damage import sentence
from test_train import CONFIG, folder, load, out_dir, run, train   # noqa: F401

from lib import runtime
from lib.data import digest

MAIN = SimpleNamespace(main=True)
SETTINGS = dict(init_from='scratch', overwrite=False, lr=1e-3, weight_decay=1e-5, seed=0,
                text_encoder='hash', mask_iters=100, eval_every=10, device='cpu')


def start(folder, identity=dict(data_hash='d', vq_hash='v'), **changes):
    """The start of a run; its lock is given back."""
    settings = {**SETTINGS, **changes}
    try:
        return runtime.open_run(MAIN, folder, 'mask', settings, settings['mask_iters'], **identity)
    finally:
        runtime.locks.pop().release()


def save_run(folder, name='mask_last.pt', **changes):
    checkpoint = dict(kind='mask', it=70, model={}, settings=SETTINGS, data_hash='d', vq_hash='v')
    runtime.save({**checkpoint, **changes}, folder / name)


# ------------------------------------------------------------------------------ whose folder it is


@pytest.mark.parametrize('name', ['mask.pt', 'mask_last.pt'])
def test_a_run_from_scratch_leaves_another_alone(tmp_path, name):
    assert start(tmp_path) is None
    save_run(tmp_path, name)
    said = (f'{name} exists, step 70 of {time.strftime("%Y-")}', '--init_from',
            '--overwrite=True')
    sentence(lambda: start(tmp_path), *said)
    sentence(lambda: start(tmp_path, lr=2e-3), 'lr was 0.001, now 0.002', *said)
    assert start(tmp_path, overwrite=True) is None
    (tmp_path / name).write_bytes(b'of another program')
    sentence(lambda: start(tmp_path), name)
    assert start(tmp_path, overwrite=True) is None


@pytest.mark.parametrize('key, value', [
    ('weight_decay', 0.5), ('text_encoder', 'clip'), ('seed', 1), ('lr', 2e-3)])
def test_resume_refuses_another_run(tmp_path, key, value):
    save_run(tmp_path)
    sentence(lambda: start(tmp_path, init_from='resume', **{key: value}),
             f'{key} was {SETTINGS[key]}, now {value}', 'step 70')


def test_resume_refuses_other_data_and_tokens(tmp_path):
    save_run(tmp_path)
    for key in ('data_hash', 'vq_hash'):
        identity = {**dict(data_hash='d', vq_hash='v'), key: 'other'}
        sentence(lambda: start(tmp_path, identity, init_from='resume'), f'{key} was')


def test_what_resume_may_change(tmp_path):
    save_run(tmp_path)
    changes = dict(mask_iters=200, eval_every=5, device='cuda', overwrite=True)
    assert start(tmp_path, init_from='resume', **changes)['it'] == 70
    assert runtime.MAY_CHANGE.isdisjoint(
        'lr weight_decay seed text text_encoder batch_size warmup dropout window_frames'.split())


def test_resume_of_an_older_checkpoint(tmp_path):
    """From before there was a hash of the data, and some of the settings."""
    older = {key: value for key, value in SETTINGS.items() if key != 'overwrite'}
    checkpoint = dict(kind='mask', it=70, model={}, settings=older, vq_hash='v')
    torch.save(checkpoint, tmp_path / 'mask_last.pt')
    assert start(tmp_path, init_from='resume')['it'] == 70


@pytest.mark.parametrize('checkpoint, words', [
    (dict(kind='vq'), 'holds vq, expected mask'),
    (dict(kind='mask', it=1, model={}), 'lacks the entry settings'),
    ([1], 'it is not a checkpoint')])
def test_resume_of_something_else(tmp_path, checkpoint, words):
    torch.save(checkpoint, tmp_path / 'mask_last.pt')
    sentence(lambda: start(tmp_path, init_from='resume'), 'mask_last.pt', words)


def test_the_lock_keeps_others_out_and_ends_with_its_process(tmp_path):
    child = os.fork()
    if not child:
        runtime.lock(tmp_path, 'mask')
        (tmp_path / 'locked').write_text('')
        time.sleep(60)
        os._exit(0)
    try:
        while not (tmp_path / 'locked').exists():
            time.sleep(0.01)
        sentence(lambda: runtime.lock(tmp_path, 'mask'), str(tmp_path), 'mask.pt')
        runtime.lock(tmp_path, 'res')   # for other files
        (tmp_path / '.mask_last.pt.x1.tmp').write_text('half of it')
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    runtime.lock(tmp_path, 'mask')
    assert not (tmp_path / '.mask_last.pt.x1.tmp').exists()
    while runtime.locks:
        runtime.locks.pop().release()


def test_a_lock_that_was_removed_stops_the_next_save(tmp_path):
    runtime.lock(tmp_path, 'mask')
    try:
        runtime.save({'a': 1}, tmp_path / 'mask.pt')
        os.remove(tmp_path / '.mask.lock')
        sentence(lambda: runtime.save({'a': 2}, tmp_path / 'mask.pt'), '.mask.lock')
    finally:
        runtime.locks.pop().release()
    assert torch.load(tmp_path / 'mask.pt')['a'] == 1


def test_resume_with_fewer_steps_than_done(tmp_path):
    save_run(tmp_path)
    sentence(lambda: start(tmp_path, init_from='resume', mask_iters=60), 'has 70 steps', '60')


@pytest.mark.parametrize('stage, files', [
    ('vq', ['vq.pt', 'vq_last.pt']), ('mask', ['vq.pt', 'mask.pt', 'mask_last.pt']),
    ('eval', ['evaluator.pt'])])
def test_scripts_leave_another_run_alone(folder, stage, files):   # noqa: F811
    out = out_dir(folder, f'taken_{stage}', *files)
    before = [(folder / out / file).read_bytes() for file in files]
    said = run(folder, *train(stage), f'--out_dir={out}', '--seed=5', ok=False)
    assert f'{files[-1]} exists, step ' in said
    assert 'seed was' in said and 'now 5' in said
    assert before == [(folder / out / file).read_bytes() for file in files]


def test_resume_on_other_data(folder):   # noqa: F811
    """The same clips and one more caption, prepared again."""
    other = folder / 'data' / 'other'
    shutil.copytree(folder / 'data' / 'tiny', other)
    command = [*train('mask'), '--init_from=resume', '--data=other', '--out_dir=out/tiny']
    path = other / 'train_captions.json'
    path.write_text(path.read_text().replace('walks', 'strolls', 1))
    assert 'train_captions.json' in run(folder, *command, ok=False)   # edited by hand
    meta = json.loads((other / 'meta.json').read_text())
    meta['files'][path.name] = digest(path)
    (other / 'meta.json').write_text(json.dumps(meta))
    assert 'data_hash was' in run(folder, *command, ok=False)


# -------------------------------------------------------------------------------------- divergence

DIVERGE = '''
import runpy
import sys

from lib import evaluator
import model
import vq

kind, step, mode, sys.argv = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:]
owner, name = {'mask': (model.MaskTransformer, 'forward'), 'vq': (vq.RVQVAE, 'forward'),
               'eval': (evaluator.Evaluator, 'encode_motion')}[kind]
original = getattr(owner, name)
calls = 0


def forward(self, *inputs, **named):
    global calls
    out = original(self, *inputs, **named)
    if self.training == (mode == 'training'):
        calls += 1
        if calls >= step:
            return out * float('nan') if kind != 'vq' else (out[0] * float('nan'), *out[1:])
    return out


setattr(owner, name, forward)
runpy.run_path(sys.argv[0], run_name='__main__')
'''


@pytest.mark.parametrize('stage, mode, call, words, step', [
    ('mask', 'training', 10, 'The loss is nan at step 9', 6),   # the first call counts FLOPs
    ('mask', 'validation', 4, 'The validation error is nan at step 12', 6),
    ('vq', 'training', 10, 'The loss is nan at step 9', 6),
    ('vq', 'validation', 5, 'The validation error is nan at step 12', 6),
    ('eval', 'training', 3, 'The loss is nan at step 3', 2),
    ('eval', 'validation', 2, 'a metric was given NaN', 0)])
def test_divergence_spares_checkpoints(folder, stage, mode, call, words, step):   # noqa: F811
    out = out_dir(folder, f'nan_{stage}_{mode}', *['vq.pt'][stage != 'mask':])
    script = folder / f'diverge_{stage}_{mode}.py'
    script.write_text(DIVERGE)
    name, *settings = train(stage)
    if stage == 'eval':
        settings.append('--ev_eval_every=2')
    else:
        settings.append('--log_every=50')   # it diverges between two logs
    code, _, said = run_script(folder, str(script), stage, str(call), mode,
                               os.path.join(PROJECT, name), *settings, f'--out_dir={out}')
    assert code == 2
    assert words in said.splitlines()[-1]
    assert stage == 'eval' and mode == 'validation' or 'clip' in said.split(words)[1]
    for file in os.listdir(folder / out):
        if file.endswith('.pt') and not (stage == 'mask' and file == 'vq.pt'):
            saved = load(folder / out / file)
            assert saved['it'] == step
            assert runtime.not_finite(saved.get('model') or saved['state']) is None


# ---------------------------------------------------------------------------- places and prompts


def test_places_are_looked_at_before_the_work(folder):   # noqa: F811
    (folder / 'a_file').write_text('')
    os.makedirs(folder / 'a_folder.json', exist_ok=True)
    sample = ['sample.py', CONFIG, '--prompt=a person walks', '--length=40']
    said = run(folder, *sample, '--samples_dir=a_file/samples', ok=False)
    assert 'a_file/samples' in said and 'generated' not in said
    evaluate = ['eval_t2m.py', CONFIG, '--repeats=1', '--mm_batches=0']
    for path in ('a_folder.json', '/proc/x/y.json'):
        said = run(folder, *evaluate, f'--eval_json={path}', ok=False)
        assert path in said and 'generated' not in said
    for stage in ('vq', 'mask', 'eval'):
        vq = '--data=tiny' if stage == 'eval' else '--data=tiny --vq=out/tiny/vq.pt'
        command = [*train(stage), *vq.split()[:2 if stage == 'mask' else 1]]
        said = run(folder, *command, '--out_dir=a_file/out', ok=False)
        assert 'a_file/out' in said and 'step' not in said


@pytest.mark.parametrize('content, words', [
    (b'a person \xff walks', "'utf-8' codec"), ('walks#²'.encode(), "'²' behind # is not"),
    (b'walks#' + b'9' * 5000, 'behind # is not a number'), (b' \n', 'holds no prompt'),
    (None, 'it is not a file'), ('человек идёт'.encode(), 'no word for the hash')])
def test_prompt_files(folder, content, words):   # noqa: F811
    path = folder / f'prompts_{abs(hash(content))}.txt'
    if content is None:
        os.mkdir(path)
    else:
        path.write_bytes(content)
    assert words in run(folder, 'sample.py', CONFIG, f'--prompts={path.name}', ok=False)
