"""Runs never damage another run's files, and keep their own checkpoints when they diverge."""
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import PROJECT, heed_ctrl_c
from test_damage import sentence
from test_train import CONFIG, folder, load, out_dir, run, run_script_with, train   # noqa: F401

from lib import runtime
from lib.configurator import read_config_file
from lib.data import digest

SETTINGS = dict(init_from='scratch', overwrite=False, lr=1e-3, weight_decay=1e-5, seed=0,
                text_encoder='hash', mask_iters=100, eval_every=10, device='cpu')
IDENTITY = dict(data_hash='d', vq_hash='v')


def start(folder, **changes):
    """Open a run and release its lock."""
    identity = {key: changes.pop(key, value) for key, value in IDENTITY.items()}
    settings = {**SETTINGS, **changes}
    try:
        return runtime.open_run(SimpleNamespace(main=True), folder, 'mask', settings,
                                settings['mask_iters'], **identity)
    finally:
        runtime.locks.pop().release()


def save_run(folder, name='mask_last.pt'):
    runtime.save(dict(kind='mask', it=70, model={}, settings=SETTINGS, **IDENTITY), folder / name)


# ------------------------------------------------------------------------- folders of other runs


@pytest.mark.parametrize('name', ['mask.pt', 'mask_last.pt'])
def test_a_run_from_scratch_leaves_another_alone(tmp_path, name):
    assert start(tmp_path) is None
    save_run(tmp_path, name)
    facts = (name, 'step 70', time.strftime('%Y-'), '--init_from', '--overwrite=True')
    sentence(lambda: start(tmp_path), *facts)
    sentence(lambda: start(tmp_path, lr=2e-3), 'lr was 0.001, now 0.002', *facts)
    assert start(tmp_path, overwrite=True) is None
    (tmp_path / name).write_bytes(b'of another program')
    sentence(lambda: start(tmp_path, overwrite=True), name)
    assert (tmp_path / name).read_bytes() == b'of another program'


@pytest.mark.parametrize('key, value', [
    ('weight_decay', 0.5), ('text_encoder', 'clip'), ('seed', 1), ('lr', 2e-3),
    ('data_hash', 'other'), ('vq_hash', 'other')])
def test_resume_refuses_another_run(tmp_path, key, value):
    save_run(tmp_path)
    sentence(lambda: start(tmp_path, init_from='resume', **{key: value}), f'{key} was',
             f'now {value}', 'step 70')


def test_what_resume_may_change(tmp_path):
    save_run(tmp_path)
    changes = dict(mask_iters=200, eval_every=5, device='cuda', overwrite=True)
    assert start(tmp_path, init_from='resume', **changes)['it'] == 70
    sentence(lambda: start(tmp_path, init_from='resume', mask_iters=60), '70 steps', '60')
    assert {'ev_steps', 'ev_eval_every', 'glove_dir'} <= runtime.MAY_CHANGE
    assert runtime.MAY_CHANGE.isdisjoint(
        'lr weight_decay seed text text_encoder batch_size warmup dropout window_frames'.split())


def test_resume_of_an_older_checkpoint(tmp_path):
    """It has no hash of the data and lacks a setting."""
    older = {key: value for key, value in SETTINGS.items() if key != 'overwrite'}
    checkpoint = dict(kind='mask', it=70, model={}, settings=older, vq_hash='v')
    torch.save(checkpoint, tmp_path / 'mask_last.pt')
    assert start(tmp_path, init_from='resume')['it'] == 70


@pytest.mark.parametrize('checkpoint', [dict(kind='vq'), dict(kind='mask', it=1, model={}), [1]])
def test_resume_of_something_else(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / 'mask_last.pt')
    sentence(lambda: start(tmp_path, init_from='resume'), 'mask_last.pt')


def test_the_lock_keeps_others_out_and_ends_with_its_process(tmp_path):
    """A run that has lost its lock does not save."""
    child = os.fork()
    if not child:
        runtime.lock(tmp_path, 'mask')
        (tmp_path / 'locked').write_text('')
        time.sleep(60)
        os._exit(0)
    try:
        while not (tmp_path / 'locked').exists():
            time.sleep(0.01)
        sentence(lambda: runtime.lock(tmp_path, 'mask'), tmp_path, 'mask.pt')
        runtime.lock(tmp_path, 'res')   # for other files
        (tmp_path / '.mask_last.pt.x1.tmp').write_text('half of it')
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    runtime.lock(tmp_path, 'mask')
    assert not (tmp_path / '.mask_last.pt.x1.tmp').exists()
    try:
        runtime.save({'a': 1}, tmp_path / 'mask.pt')
        os.remove(tmp_path / '.mask.lock')
        sentence(lambda: runtime.save({'a': 2}, tmp_path / 'mask.pt'), '.mask.lock')
    finally:
        while runtime.locks:
            runtime.locks.pop().release()
    assert load(tmp_path / 'mask.pt')['a'] == 1


@pytest.mark.parametrize('stage, files', [
    ('vq', ['vq.pt', 'vq_last.pt']), ('mask', ['vq.pt', 'mask.pt', 'mask_last.pt']),
    ('eval', ['evaluator.pt'])])
def test_scripts_leave_another_run_alone(folder, stage, files):   # noqa: F811
    out = out_dir(folder, f'taken_{stage}', *files)
    before = [(folder / out / file).read_bytes() for file in files]
    said = run(folder, *train(stage), f'--out_dir={out}', '--seed=5', ok=False)
    assert f'{files[-1]} exists, step ' in said and 'seed was' in said
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
import torch

calls = 0


def diverge(network, inputs, out):
    global calls
    if type(network).__name__ != '{network}' or network.training != ('{mode}' == 'training'):
        return out
    calls += 1
    if calls < {call}:
        return out
    nan = float('nan')
    return (out[0] * nan, *out[1:]) if isinstance(out, tuple) else out * nan


torch.nn.modules.module.register_module_forward_hook(diverge)
'''


NETWORK = dict(mask='MaskTransformer', vq='RVQVAE', eval='BiGRU')


@pytest.mark.parametrize('stage, mode, call, fact, step', [
    ('mask', 'training', 10, 'nan at step 9', 6),   # the first call counts FLOPs
    ('mask', 'validation', 4, 'nan at step 12', 6),
    ('vq', 'training', 10, 'nan at step 9', 6),
    ('vq', 'validation', 5, 'nan at step 12', 6),
    ('eval', 'training', 3, 'nan at step 3', 2),
    ('eval', 'validation', 2, 'NaN', 0)])
def test_divergence_spares_checkpoints(folder, stage, mode, call, fact, step):   # noqa: F811
    """From that call on, the network returns NaN. The sentence names clips of the batch."""
    out = out_dir(folder, f'nan_{stage}_{mode}', *['vq.pt'][stage != 'mask':])
    # the loss is looked at when it is logged, here only at evaluations
    rarely = '--ev_eval_every=2' if stage == 'eval' else '--log_every=50'
    hook = DIVERGE.format(network=NETWORK[stage], mode=mode, call=call)
    code, _, err = run_script_with(hook, folder, *train(stage), f'--out_dir={out}', rarely)
    assert code == 2
    assert fact in err.splitlines()[-1]
    assert step == 0 or 'clip' in err.split(fact)[1]
    for path in (folder / out).glob(f'{stage}*.pt'):
        saved = load(path)
        assert saved['it'] == step
        assert runtime.not_finite(saved['model']) is None


# ------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize('content, fact', [
    (b'a person \xff walks', 'bad_16.txt'), ('walks#²'.encode(), '²'), (b' \n', 'bad_2.txt'),
    (b'walks#' + b'9' * 5000, 'bad_5006.txt'), ('человек идёт'.encode(), 'человек')])
def test_prompt_files(folder, content, fact):   # noqa: F811
    name = f'bad_{len(content)}.txt'
    (folder / name).write_bytes(content)
    assert fact in run(folder, 'sample.py', CONFIG, f'--prompts={name}', ok=False)


def test_a_config_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / 'notepad.py').write_bytes(b'\xef\xbb\xbfseed = 3\r\n')
    assert read_config_file(str(tmp_path / 'notepad.py'), {'seed': 0}) == {'seed': 3}


# ----------------------------------------------------------------------------------------- signals

each_signal = pytest.mark.parametrize('number, word', [(2, 'Interrupted.'), (15, 'Terminated.')])


@each_signal
def test_a_signal_ends_training_in_one_sentence(folder, number, word):   # noqa: F811
    out = out_dir(folder, f'signal_{number}', 'vq.pt')
    script, *settings = [*train('mask'), f'--out_dir={out}', '--mask_iters=100000']
    process = subprocess.Popen([sys.executable, os.path.join(PROJECT, script), *settings],
                               cwd=folder, stderr=subprocess.PIPE, text=True,
                               preexec_fn=heed_ctrl_c)
    try:
        while not (folder / out / 'mask_last.pt').exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert 'Traceback' not in said and said.count(word) == 1
    assert load(folder / out / 'mask_last.pt')['it'] > 0
    assert not list((folder / out).glob('.*.tmp'))


@each_signal
def test_signals_while_a_script_imports(number, word):
    """Every script imports the configurator first, so that this holds for its other imports."""
    code = (f'import os, sys; sys.argv = ["{PROJECT}/sample.py"]; import lib.configurator; '
            f'os.kill(os.getpid(), {number}); import torch')
    p = subprocess.run([sys.executable, '-c', code], cwd=PROJECT, capture_output=True, text=True,
                       preexec_fn=heed_ctrl_c)
    assert (p.returncode, p.stderr) == (128 + number, f'{word}\n')
    for path in glob.glob(os.path.join(PROJECT, '*.py')):
        with open(path, encoding='utf-8') as f:
            text = f.read()
        if 'configure(globals()' in text:
            first = re.search('^(import|from) .*', text, re.MULTILINE)[0]
            assert first.startswith('import lib.configurator'), path
