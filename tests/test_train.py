"""The scripts as a user runs them: a tiny data set goes through every stage, mistakes are one
sentence, and two processes train like one.

Everything happens in a temporary folder, so no data/ or out/ of the user is touched. It is built
and trained once. A test reads out/tiny and writes into a folder of its own.
"""
import ast
import glob
import json
import math
import os
import shutil
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import PROJECT, PYTHON, TORCHRUN, run_script

from generate import load_pipeline
from lib import toy
from lib.data import load_split, save_meta, save_split
from lib.motion import SKELETONS, features_to_joints, joints_to_features
from vq import RVQVAE, VQConfig

GOLDEN = os.path.join(PROJECT, '..', 'shared', 'golden', 't2m', 'momask_checkpoints')
CONFIG = 'config/tiny.py'
TINY = '''
data = 'tiny'
text_encoder = 'hash'
spectral_attn = True
mask_by = 'msd'
vq_width = 16
code_dim = 16
n_codes = 32
n_quantizers = 3
window_frames = 32
vq_iters = 12
vq_batch = 16
vq_warmup = 2
vq_lr = 1e-3
vq_eval_every = 6
latent = 24
n_layers = 2
n_heads = 2
ff = 32
batch_size = 8
lr = 1e-3
warmup = 2
mask_iters = 12
res_iters = 6
len_iters = 6
eval_every = 6
log_every = 1
dropout = 0.0
dtype = 'float32'
ev_movement = 32
ev_code = 32
ev_motion_hidden = 32
ev_text_hidden = 32
ev_out = 32
ev_ae_steps = 2
ev_steps = 4
ev_batch = 8
ev_eval_every = 4
'''


def run(folder, *command, ok=True, launcher=None):
    """Run a script in `folder` -> stdout + stderr. ok=False: it must end with exit code 2 and one
    sentence, no traceback."""
    code, out, err = run_script(folder, *command, launcher=launcher)
    if ok:
        assert code == 0, out + err
    else:
        assert code == 2 and 'Traceback' not in out + err, out + err
        assert len(err.strip().splitlines()) == 1, err
    return out + err


def run_script_with(hook, folder, *command):
    """Run a script after the lines `hook`, which change modules -> exit code, stdout, stderr."""
    start = 'sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name="__main__")\n'
    with tempfile.NamedTemporaryFile('w', suffix='.py') as script:
        script.write(f'import runpy\nimport sys\n{hook}\n{start}')
        script.flush()
        return run_script(folder, script.name, os.path.join(PROJECT, command[0]), *command[1:])


def load(path):
    return torch.load(path, weights_only=True)


def write_data(folder):
    """A data set of random smooth features."""
    os.makedirs(folder)
    rng = np.random.default_rng(0)
    counts = {}
    for split, n in (('train', 40), ('val', 8), ('test', 40)):
        clips = []
        for i in range(n):
            steps = 0.05 * rng.standard_normal((int(rng.integers(40, 80)), 263))
            tokens = f'a/DET person/NOUN walk/VERB {i % 5}/NUM steps/NOUN'
            caption = dict(text=f'a person walks {i % 5} steps', tokens=tokens)
            clips.append((f'clip{i}', np.cumsum(steps, 0).astype(np.float32), [caption]))
        counts[split] = save_split(folder, split, clips)
    meta = dict(name='tiny', skeleton='smpl22', max_frames=80, contact_threshold=0.002,
                counts=counts)
    save_meta(folder, meta, np.zeros(263), np.ones(263))


def train(stage):
    """The command that trains a stage, without overrides."""
    if stage in ('vq', 'eval'):
        return [f'train_{stage}.py', CONFIG]
    return ['train_mask.py', CONFIG, f'--stage={stage}']


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """A folder with the tiny data set and all its checkpoints; <stage>.log is what the user saw.
    The first worker of pytest-xdist builds it for all of them."""
    root = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        root = root.parent
    folder = root / 'scripts'
    ready = root / 'scripts_ready'
    try:
        os.mkdir(folder)
    except FileExistsError:
        while not ready.exists():
            time.sleep(0.1)
        return folder
    try:
        os.makedirs(folder / 'config')
        (folder / CONFIG).write_text(TINY)
        write_data(str(folder / 'data' / 'tiny'))
        for stage in ('vq', 'eval', 'mask', 'res', 'len'):
            (folder / f'{stage}.log').write_text(run(folder, *train(stage)))
    finally:
        ready.touch()   # also after a failure, or the other workers would wait forever
    return folder


def out_dir(folder, name, *files):
    """A new folder out/<name> with copies of files of out/tiny -> 'out/<name>'."""
    os.makedirs(folder / 'out' / name)
    for file in files:
        shutil.copy(folder / 'out' / 'tiny' / file, folder / 'out' / name)
    return f'out/{name}'


def motions(folder, samples_dir):
    return [np.load(path) for path in sorted(glob.glob(str(folder / samples_dir / '*.npy')))]


# ------------------------------------------------------------------------- sampling and evaluation


def test_prompts_become_motion(folder):
    """The same seed gives the same motion. Without a length, the length estimator decides."""
    command = ['sample.py', CONFIG, '--prompt=a person walks 3 steps', '--length=44']
    assert 'a/' in run(folder, *command, '--samples_dir=a', launcher=PYTHON)
    run(folder, *command, '--samples_dir=b')
    for suffix in ('.gif', '.png', '.npy', '.bvh'):
        assert (folder / 'a' / f'000_a-person-walks-3-steps_s0{suffix}').exists()
    a, = motions(folder, 'a')
    b, = motions(folder, 'b')
    assert a.shape == (44, 22, 3) and np.array_equal(a, b)

    (folder / 'prompts.txt').write_text('a person walks#8\na person walks 2 steps\n')
    run(folder, 'sample.py', CONFIG, '--prompts=prompts.txt', '--repeats=2', '--samples_dir=c',
        '--footlock=True')
    assert all('_footlock.' in name for name in os.listdir(folder / 'c'))
    lengths = [len(motion) for motion in motions(folder, 'c')]
    assert lengths[:2] == [8, 8] and len(lengths) == 4
    assert all(4 <= n <= 80 for n in lengths)


def test_editing_and_long_motion(folder):
    """Several prompts in one motion, a span of a motion regenerated, two motions connected."""
    long = 'a person walks#40 | a person walks 3 steps#60 | a person walks#80'
    run(folder, 'sample.py', CONFIG, f'--prompt={long}', '--samples_dir=long')
    first, = motions(folder, 'long')
    assert first.shape == (180, 22, 3)
    body = toy.make_clip(1)['joints']   # sources must be human bodies
    np.save(folder / 'walk.npy', body[:64])
    np.save(folder / 'flat.npy', first[:, 0])

    edit = ['sample.py', CONFIG, '--prompt=a person walks 2 steps', '--source=walk.npy']
    run(folder, *edit, '--edit=0.5:0.75', '--repeats=2', '--samples_dir=edited')
    one, other = motions(folder, 'edited')
    assert one.shape == other.shape == (64, 22, 3)
    assert not np.array_equal(one, other)
    run(folder, *edit, '--edit=32:48,60:64', '--samples_dir=frames')
    assert motions(folder, 'frames')[0].shape == (64, 22, 3)
    run(folder, *edit, '--then=walk.npy', '--length=20', '--samples_dir=connected')
    assert motions(folder, 'connected')[0].shape == (64 + 20 + 64, 22, 3)

    for wrong, words in (('--edit=0.7:0.4', '0.7:0.4'), ('--edit=some', 'some'),
                         ('--edit=0:100', '64 frames'), ('--then=none.npy', 'none.npy'),
                         ('--then=flat.npy', 'flat.npy'), ('--repeats=2', '--edit')):
        assert words in run(folder, *edit, wrong, ok=False)


def test_evaluation(folder):
    command = ['eval_t2m.py', CONFIG, '--steps=2', '--strata=True']
    run(folder, *command, '--repeats=2', '--mm_batches=1', '--eval_json=all.json')
    written = json.loads((folder / 'all.json').read_text())
    rows = written['rows']
    assert list(rows) == ['real motion', 'tokenizer', 'base tokens only', 'full']
    assert rows['real motion']['FID'][0] < 1e-6 < rows['full']['FID'][0]
    assert all(np.isfinite(value).all() for row in rows.values() for value in row.values())
    assert rows['tokenizer']['MPJPE mm'][0] > 0
    assert 'MModality' in rows['full'] and 'FID complex' in rows['full']

    # batches of another size give every clip the same result
    run(folder, *command, '--repeats=1', '--mm_batches=0', '--gen_batch=10', '--dynamics=True',
        '--eval_json=small.json')
    small = json.loads((folder / 'small.json').read_text())
    for row in ('real motion', 'tokenizer'):
        for metric, value in written['per_repeat'][0][row].items():
            assert np.isclose(small['rows'][row][metric][0], value, rtol=1e-3, atol=1e-6), metric
    assert small['tokens'] and small['pooled']


SLIDE = '''
import runpy
import sys

import numpy as np

sys.argv = sys.argv[1:]
look = runpy.run_path(sys.argv[0], run_name='__main__')['look']
world = look.__globals__
world['standing_height'] = np.full(4, 0.05)


def slide(height, *step, unit=1):
    """Of a body whose joints are all at one height (m) and move by a step (x, y, z), m a frame."""
    joints = np.zeros((9, 22, 3))
    joints[..., 1] = height
    joints += np.arange(9)[:, None, None] * step
    world['meta'].update(units_per_metre=unit)
    return look(unit * joints, {})['slide cm']


assert slide(0.04, 0, 0, 0) == 0
assert np.isclose(slide(0.04, 0.006, 0, 0.008), 1)
assert np.isclose(slide(0.04, 0.006, 0, 0.008, unit=1000), 1)
assert slide(0.04, 0, -0.01, 0) == 0   # into the floor, not along it
assert np.isnan(slide(0.06, 0.006, 0, 0.008)), 'a foot in the air'
assert np.isnan(slide(0.04, 0.06, 0, 0.08)), 'a foot that swings'

clips = iter([np.nan] + 63 * [3.0])   # 32 real ones come first, then the tokenizer's
world['look'] = lambda joints, caption: {'slide cm': next(clips)}
assert world['one_repeat'](0)['real motion']['slide cm'] == 3
'''


def test_evaluation_of_a_tokenizer_alone_and_foot_slide(folder):
    """Slide is centimetres along the floor per frame, of feet that are low and slow. A clip without
    such feet has no slide and does not count."""
    out = out_dir(folder, 'only_vq', 'vq.pt', 'evaluator.pt')
    script = folder / 'slide.py'
    script.write_text(SLIDE)
    run(folder, str(script), os.path.join(PROJECT, 'eval_t2m.py'), CONFIG, f'--out_dir={out}',
        '--repeats=1')
    rows = json.loads((folder / out / 'eval_tiny_test.json').read_text())['rows']
    assert list(rows) == ['real motion', 'tokenizer']


def test_pictures_of_clips(folder):
    """The first clips of two splits side by side; a clip beside its reconstruction."""
    data = str(folder / 'data' / 'tiny')
    names = [load_split(data, split).names[0] for split in ('train', 'test')]
    run(folder, 'sample.py', CONFIG, f'--msd_of={",".join(names)}')
    assert (folder / 'out' / 'tiny' / f'msd_{"_".join(names)}.png').exists()
    run(folder, 'sample.py', CONFIG, f'--reconstruct={names[0]}')
    assert (folder / 'out' / 'tiny' / f'reconstruction_{names[0]}.gif').exists()


@pytest.mark.skipif(not os.path.isdir(GOLDEN),
                    reason='the reference checkpoints (../shared/golden) are not here')
def test_official_checkpoints(folder):
    """DynMask's decoding is off for them unless it is asked for."""
    official = ['--init_from=momask', f'--momask_root={GOLDEN}', '--text_encoder=hash']
    command = ['sample.py', *official, '--prompt=a man kicks', '--length=40']
    run(folder, *command, '--samples_dir=default')
    for value in (False, True):
        run(folder, *command, f'--samples_dir={value}', f'--das_sampling={value}')
    default, off, on = (motions(folder, name)[0] for name in ('default', 'False', 'True'))
    assert np.array_equal(default, off) and not np.array_equal(default, on)
    out = run(folder, 'eval_t2m.py', '--data=tiny', *official, '--repeats=1', '--steps=2',
              '--mm_batches=0', '--out_dir=out/momask')
    assert 'full' in out


# -------------------------------------------------------------------------------------- training


@pytest.mark.parametrize('stage', ['vq', 'mask', 'res', 'len'])
def test_progress_line(folder, stage):
    log = (folder / f'{stage}.log').read_text()
    assert 'loss' in log and 'TFLOP/s' in log
    assert 'nan' not in log and 'best inf' not in log


def test_terms_of_the_tokenizer_loss():
    """`foot_steps` are the distances that feet move over the ground. `foot_error` and
    `heading_error` are 0 for a copy and right for a motion that turns a degree per frame more."""
    with open(os.path.join(PROJECT, 'train_vq.py'), encoding='utf-8') as f:
        tree = ast.parse(f.read())
    names = ('foot_steps', 'foot_error', 'heading_error')
    tree.body = [part for part in tree.body if getattr(part, 'name', '') in names]
    script = dict(torch=torch, SKELETONS=SKELETONS, model=RVQVAE(VQConfig(width=8, code_dim=8)),
                  meta=dict(skeleton='smpl22', units_per_metre=1.0))
    exec(compile(tree, 'train_vq.py', 'exec'), script)

    skeleton = SKELETONS['smpl22']
    joints = toy.make_clip(5)['joints']   # hops, turns right, squats
    features = joints_to_features(joints, skeleton, steady=True)
    x = torch.from_numpy(features)[None].float()
    feet = features_to_joints(features, 22)[:, skeleton.feet][..., [0, 2]]
    expected = np.linalg.norm(np.diff(feet, axis=0), axis=-1)               # (T - 1, 4)
    steps = script['foot_steps'](x)[0].norm(dim=-1)
    assert expected.max() > 0.02
    assert np.abs(steps.numpy() - expected).max() < 1e-5

    assert script['heading_error'](x, x) == script['foot_error'](x, x) == 0
    turned = x.clone()
    turned[..., 0] += math.radians(0.5)   # the feature is half the angle
    T = x.shape[1]
    assert script['heading_error'](x, turned) == pytest.approx(math.radians((T + 1) / 2), rel=1e-4)
    assert script['foot_error'](x, turned) > 1e-4


# the learning rate depends on the planned length, so a long run is stopped at its first checkpoint
STOP = '''
from lib import runtime

save = runtime.save


def save_and_stop(checkpoint, path):
    save(checkpoint, path)
    if path.endswith('_last.pt'):
        sys.exit(0)


runtime.save = save_and_stop
'''
HGM3 = ('--mask_by=loss', '--text=graph', '--rotary=True', '--neighbours=1')


@pytest.mark.parametrize('stage, settings', [
    ('vq', ()), ('mask', ()), ('mask', HGM3), ('eval', ('--ev_eval_every=2',))],
    ids=['vq', 'mask', 'hgm3', 'eval'])
def test_resume_continues_where_it_stopped(folder, stage, settings, request):
    """Training in one run and training that is stopped and resumed end with the same weights."""
    name = f'resume_{request.node.callspec.id}'
    files = [] if stage in ('vq', 'eval') else ['vq.pt']
    whole, cut = (out_dir(folder, f'{name}_{part}', *files) for part in ('whole', 'cut'))
    script, *settings = [*train(stage), *settings]
    run(folder, script, *settings, f'--out_dir={whole}')

    settings.append(f'--out_dir={cut}')
    code, out, err = run_script_with(STOP, folder, script, *settings)
    assert code == 0, out + err
    last = 'evaluator_last.pt' if stage == 'eval' else f'{stage}_last.pt'
    stopped = load(folder / cut / last)['it']
    run(folder, script, *settings, '--init_from=resume')
    one, two = (load(folder / out / last) for out in (whole, cut))
    assert stopped < one['it'] == two['it']
    for part in ('model', 'miner'):
        weights = one.get(part) or {}
        assert all(torch.equal(weights[key], two[part][key]) for key in weights)


def test_hgm3_samples_with_an_explanation(folder):
    """A model with loss predictor, semantic graph, rotary positions and neighbours."""
    out = out_dir(folder, 'hgm3', 'vq.pt')
    run(folder, *train('mask'), f'--out_dir={out}', '--mask_iters=2', *HGM3)
    assert load(folder / out / 'mask.pt')['tags']['walk'] == 'VERB'
    run(folder, 'sample.py', CONFIG, f'--out_dir={out}', '--length=40', '--samples_dir=graph',
        '--prompt=a person walks, then 3 steps', '--explain=True')
    assert motions(folder, 'graph')[0].shape == (40, 22, 3)
    assert (folder / 'graph' / '000_a-person-walks-then-3-steps_s0_explained.png').exists()


@pytest.mark.parametrize('paper', ['momask', 'hgm3', 'dynmask'])
def test_papers_as_published(folder, paper):
    """The preset of a paper behind another config, trained and sampled."""
    out = out_dir(folder, f'preset_{paper}', 'vq.pt')
    preset = os.path.join(PROJECT, 'config', f'{paper}.py')
    few = ['--mask_iters=2', '--res_iters=2', '--batch_size=8']
    for stage in ('mask', 'res'):
        run(folder, *train(stage), preset, f'--out_dir={out}', *few)
    saved, res = (load(folder / out / f'{stage}_last.pt') for stage in ('mask', 'res'))
    assert saved['settings']['text'] == ('graph' if paper == 'hgm3' else 'sentence')
    assert res['settings']['text'] == 'sentence'
    assert saved['settings']['optimizer'] == 'adamw' and len(saved['optimizers']) == 1
    run(folder, 'sample.py', CONFIG, preset, f'--out_dir={out}', '--prompt=a person walks',
        '--length=40', f'--samples_dir={paper}')
    assert motions(folder, paper)[0].shape == (40, 22, 3)


def test_networks_of_other_text_are_refused(folder):
    out = out_dir(folder, 'mixed', 'vq.pt', 'mask.pt', 'res.pt')
    run(folder, *train('res'), f'--out_dir={out}', '--text=graph', '--res_iters=2',
        '--overwrite=True')
    sample = ['sample.py', CONFIG, f'--out_dir={out}', '--prompt=a person walks', '--length=40']
    run(folder, *sample)   # with the sentence, as HGM3
    run(folder, *train('mask'), f'--out_dir={out}', '--text=sentence', '--mask_iters=2',
        '--overwrite=True')
    shutil.copy(folder / 'out' / 'tiny' / 'res.pt', folder / out)
    said = run(folder, *sample, ok=False)
    assert 'res.pt' in said and '--text=clauses' in said


def test_a_network_beyond_memory_is_refused(folder):
    out = out_dir(folder, 'huge', 'vq.pt')
    sizes = ['--latent=16384', '--n_layers=128', '--n_heads=128']
    assert 'GB' in run(folder, *train('mask'), f'--out_dir={out}', *sizes, ok=False)


def test_a_copied_run_uses_its_own_tokenizer(folder):
    copy = folder / 'out' / 'copied'
    shutil.copytree(folder / 'out' / 'tiny', copy)
    for name in ('mask.pt', 'res.pt', 'len.pt'):
        torch.save({**load(copy / name), 'vq': str(folder / 'nowhere' / 'vq.pt')}, copy / name)
    pipe = load_pipeline(str(copy))
    assert pipe.vq.fingerprint() == load(copy / 'mask.pt')['vq_hash']


def run_two(folder, *command):
    """Two ranks of a script, as torchrun starts them, without the start of three interpreters."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    group = dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))

    def run_rank(rank):
        return run_script(folder, *command, RANK=str(rank), **group)

    with ThreadPoolExecutor(2) as pool:
        for code, out, err in pool.map(run_rank, range(2)):
            assert code == 0, out + err


@pytest.mark.parametrize('stage', ['vq', 'mask', 'res'])
def test_two_processes_equal_one(folder, stage):
    """Two gloo processes have the loss curve of one process with the same global batch."""
    out = out_dir(folder, f'two_{stage}', *['vq.pt'][stage == 'vq':])
    command = [*train(stage), f'--out_dir={out}']
    if stage == 'mask':
        run(folder, *command, launcher=TORCHRUN)
    else:
        run_two(folder, *command)
    one = load(folder / 'out' / 'tiny' / f'{stage}_last.pt')['history']
    two = load(folder / out / f'{stage}_last.pt')['history']
    assert len(one) == len(two) >= 6
    assert np.allclose([loss for _, loss in one], [loss for _, loss in two], rtol=1e-3, atol=0)
    assert not glob.glob(str(folder / out / '.*.tmp'))


RANKS = '''
import os

import torch
import torch.distributed as dist

from lib.runtime import gather
from vq import RVQVAE, VQConfig

rank = int(os.environ.get('RANK', 0))
world = int(os.environ.get('WORLD_SIZE', 1))
if world > 1:
    dist.init_process_group('gloo')
torch.manual_seed(0)
vq = RVQVAE(VQConfig(dim=263, n_codes=32, code_dim=8, n_quantizers=3, width=8))
g = torch.Generator().manual_seed(0)
data = torch.randn(8, 32, 263) * torch.arange(1, 9)[:, None, None]
mine = data.view(world, -1, 32, 263)[rank]
vq.init_codebooks(mine, g)
for step in range(20):
    with torch.no_grad():
        _, _, ids, residuals = vq(mine)
    vq.update_codebooks(ids, residuals, 1 + step % 3, g)
books = torch.stack([q.codebook for q in vq.quantizers])
if world > 1:
    of_all_ranks = gather(books[None])
    assert torch.equal(of_all_ranks[0], of_all_ranks[1]), 'the ranks differ'
if rank == 0:
    torch.save(books, f'books{world}.pt')
if world > 1:
    dist.barrier()   # a rank that exits early aborts the other's teardown
    dist.destroy_process_group()
'''


def test_codebooks_are_identical_on_all_ranks(folder):
    """After 20 steps of EMA and resets all ranks hold the same bits, and those of one process to
    rounding."""
    script = folder / 'ranks.py'
    script.write_text(RANKS)
    run(folder, str(script))
    run_two(folder, str(script))
    one, two = (load(folder / f'books{world}.pt') for world in (1, 2))
    assert float((one - two).abs().max()) < 1e-4


def test_validation_never_uses_the_clean_msd(folder):
    """`msd_attn` changes the training loss and not the validation of the same weights. The learning
    rate is 0, so the weights stay the initial ones."""
    histories = []
    validations = []
    for source in ('visible', 'clean'):
        out = out_dir(folder, f'msd_{source}', 'vq.pt')
        run(folder, 'train_mask.py', CONFIG, f'--out_dir={out}', f'--msd_attn={source}',
            '--mask_iters=1', '--lr=0.0')
        histories.append(load(folder / out / 'mask_last.pt')['history'])
        validations.append(load(folder / out / 'mask.pt')['val'])
    assert list(validations[0]) == ['30%', '60%', '90%']
    assert validations[0] == validations[1]
    assert histories[0] != histories[1]


RECORD = '''
import torch

from model import MaskTransformer, ResTransformer


def recorded(forward):
    inputs = []

    def record(self, ids, c, *others, **named):
        if self.training:
            inputs.append((ids, c))
            torch.save(inputs, 'inputs.pt')
        return forward(self, ids, c, *others, **named)

    return record


for network in (MaskTransformer, ResTransformer):
    network.forward = recorded(network.forward)
'''


@pytest.mark.parametrize('stage', ['mask', 'res'])
def test_text_is_dropped_after_masks_are_chosen(folder, stage):
    """Both transformers drop texts for classifier-free guidance. Eq 10 reads every text, so this
    changes no mask: here the masks depend on the text alone, and all texts are dropped or none."""
    inputs = []
    for cond_drop in (0.0, 1.0):
        out = out_dir(folder, f'cond_drop_{stage}_{cond_drop}', 'vq.pt')
        code, _, err = run_script_with(
            RECORD, folder, *train(stage), f'--out_dir={out}', f'--{stage}_iters=1',
            '--cfs_lambda=1.0', '--cfs_noise=0.0', f'--cond_drop={cond_drop}')
        assert code == 0, err
        inputs.append(load(folder / 'inputs.pt'))
    assert len(inputs[0]) == len(inputs[1]) == 2   # the batch that counts FLOPs, and step 1
    for (ids, c), (ids_without, no_text) in zip(*inputs):
        assert torch.equal(ids, ids_without)
        assert c.any() and not no_text.any()


# ----------------------------------------------------------------------------------------- mistakes

TRAIN = ('train_mask.py', CONFIG)
SAMPLE = ('sample.py', CONFIG)
NO_GOLDEN = ('--init_from=momask', '--momask_root=no_such', '--momask_mask=x', '--momask_res=x')
MISTAKES = [   # a key fact of the sentence, and the command
    ('alpha0', *TRAIN, '--alpha=0'),
    ('FRAMES_PER_TOKEN', *TRAIN, '--FRAMES_PER_TOKEN=5'),
    ('latent is 26', *TRAIN, '--latent=26', '--n_heads=3', '--overwrite=True'),
    ('config/none.py', 'train_vq.py', 'config/none.py'),
    ('n_layer,', 'train_mask.py', 'config/typo.py'),
    ('`python prepare_data.py toy`', 'train_vq.py', '--data=toy'),
    ('out/empty/vq.pt', *TRAIN, '--out_dir=out/empty'),
    ('out/none/mask.pt', *SAMPLE, '--out_dir=out/none', '--prompt=x'),
    ('--then', *SAMPLE, '--prompt=x', '--source=a.npy', '--edit=0:1', '--then=a.npy'),
    ('empty', *SAMPLE, '--prompt=  '),
    ('3 frames', *SAMPLE, '--prompt=a person', '--length=3'),
    ('84 frames', *SAMPLE, '--prompt=a person', '--length=84'),
    ('none.txt', *SAMPLE, '--prompts=none.txt'),
    ('no_such/t2m/x/opt.txt', 'sample.py', *NO_GOLDEN, '--prompt=a'),
]


@pytest.mark.parametrize('fact, command', [(fact, command) for fact, *command in MISTAKES])
def test_mistakes_are_one_sentence(folder, fact, command):
    (folder / 'config' / 'typo.py').write_text('n_layer = 3\n')
    assert fact in run(folder, *command, ok=False)


def test_a_mistake_in_a_new_interpreter(folder):
    """It ends as in the forked processes of the other tests."""
    command = ['train_vq.py', '--data=toy']
    assert run(folder, *command, ok=False, launcher=PYTHON) == run(folder, *command, ok=False)


def test_a_transformer_refuses_another_tokenizer(folder):
    out = out_dir(folder, 'other', 'vq.pt', 'mask.pt', 'mask_last.pt')
    sample = ['sample.py', CONFIG, f'--out_dir={out}', '--prompt=a']
    for name in ('mask.pt', 'mask_last.pt'):
        path = folder / out / name
        torch.save({**load(path), 'vq_hash': 'ffff'}, path)
    assert 'ffff' in run(folder, *sample, ok=False)
    resumed = run(folder, *TRAIN, '--init_from=resume', f'--out_dir={out}', ok=False)
    assert 'vq_hash was ffff' in resumed
    shutil.copy(folder / out / 'vq.pt', folder / out / 'mask.pt')
    assert 'mask.pt' in run(folder, *sample, ok=False)
