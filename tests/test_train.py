"""The scripts as a user runs them: a tiny data set goes through every stage, mistakes are one
sentence, two processes equal one.

Everything happens in a temporary folder, so that nobody's data/ or out/ is touched. It is made and
trained once; a test reads out/tiny and writes into a folder of its own.
"""
import ast
import glob
import json
import math
import os
import re
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import PROJECT, PYTHON, TORCHRUN, run_script

from lib import toy
from lib.data import save_meta, save_split
from lib.motion import SKELETONS, features_to_joints, joints_to_features
from vq import RVQVAE, VQConfig

GOLDEN = os.path.join(PROJECT, '..', 'shared', 'golden', 't2m', 'momask_checkpoints')
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
CONFIG = 'config/tiny.py'


def run(folder, *command, ok=True, launcher=None):
    """Run a script in `folder`; returns stdout + stderr. ok=False: it must end with exit code 2 and
    one sentence, no traceback."""
    code, out, err = run_script(folder, *command, launcher=launcher)
    if ok:
        assert code == 0, out + err
    else:
        assert code == 2 and 'Traceback' not in out + err, out + err
        assert len(err.strip().splitlines()) == 1, err
    return out + err


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
    meta = dict(name='tiny', skeleton='smpl22', fps=20, dim=263, n_joints=22, unit_length=4,
                min_frames=40, max_frames=80, contact_threshold=0.002, units_per_metre=1,
                counts=counts)
    save_meta(folder, meta, np.zeros(263), np.ones(263))


def build(folder):
    """The data, and all that training makes of it; <stage>.log holds what the user saw."""
    os.makedirs(folder / 'config')
    (folder / CONFIG).write_text(TINY)
    write_data(str(folder / 'data' / 'tiny'))
    for stage in ('vq', 'eval', 'mask', 'res', 'len'):
        (folder / f'{stage}.log').write_text(run(folder, *train(stage)))


def train(stage):
    """The command that trains it, without its overrides."""
    if stage in ('vq', 'eval'):
        return [f'train_{stage}.py', CONFIG]
    return ['train_mask.py', CONFIG, f'--stage={stage}']


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """The built folder, one for all workers of pytest-xdist: whoever comes first builds it."""
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
        build(folder)
    finally:
        ready.touch()   # also after a failure: nobody shall wait for ever
    return folder


def out_dir(folder, name, *files):
    """A new folder out/<name> with copies of files of out/tiny -> 'out/<name>'."""
    os.makedirs(folder / 'out' / name)
    for file in files:
        shutil.copy(folder / 'out' / 'tiny' / file, folder / 'out' / name)
    return f'out/{name}'


def motions(folder, samples_dir):
    return [np.load(path) for path in sorted(glob.glob(str(folder / samples_dir / '*.npy')))]


# ------------------------------------------------------------------------------------- what it does


def test_the_whole_chain(folder):
    """Prompt in, motion out; the same seed gives the same motion; the length estimator answers
    where no length is given."""
    command = ['sample.py', CONFIG, '--prompt=a person walks 3 steps', '--length=44']
    assert 'written to a/' in run(folder, *command, '--samples_dir=a', launcher=PYTHON)
    run(folder, *command, '--samples_dir=b')
    assert {'000_a-person-walks-3-steps' + suffix for suffix in ('.gif', '.png', '.npy', '.bvh')
            } <= set(os.listdir(folder / 'a'))
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
    """Parts in one motion; a span of a motion drawn anew; a motion led over to another."""
    long = 'a person walks#40 | a person walks 3 steps#60 | a person walks#80'
    run(folder, 'sample.py', CONFIG, f'--prompt={long}', '--samples_dir=long')
    first, = motions(folder, 'long')
    assert first.shape == (180, 22, 3)
    np.save(folder / 'walk.npy', first[:64])

    edit = ['sample.py', CONFIG, '--prompt=a person walks 2 steps', '--source=walk.npy']
    run(folder, *edit, '--edit=0.5:0.75', '--repeats=2', '--samples_dir=edited')
    one, other = motions(folder, 'edited')
    assert one.shape == other.shape == (64, 22, 3)
    assert not np.array_equal(one, other)
    run(folder, *edit, '--edit=32:48,60:64', '--samples_dir=frames')
    assert motions(folder, 'frames')[0].shape == (64, 22, 3)
    run(folder, *edit, '--then=walk.npy', '--length=20', '--samples_dir=led')
    assert motions(folder, 'led')[0].shape == (64 + 20 + 64, 22, 3)

    np.save(folder / 'flat.npy', first[:, 0])
    for wrong, words in {
            '--edit=0.7:0.4': 'which is no part of 64 frames',
            '--edit=some': 'expected shares or frames',
            '--edit=0:100': 'which is no part of 64 frames',
            '--then=none.npy': 'none.npy cannot be read',
            '--then=flat.npy': 'flat.npy has shape (180, 3), expected finite (T, 22, 3)'}.items():
        assert words in run(folder, *edit, wrong, ok=False)
    assert 'Editing needs --source' in run(folder, *edit, ok=False)


def test_what_training_says(folder):
    """The progress line has a loss from the first step on, and no infinity before the first
    validation."""
    for stage in ('vq', 'mask', 'res', 'len'):
        log = (folder / f'{stage}.log').read_text()
        assert 'loss' in log and 'MFU' in log
        assert 'best inf' not in log


def test_help_lists_every_setting(folder):
    """With its comment, as it stands in the source."""
    out = run(folder, 'train_mask.py', '--help', launcher=PYTHON).splitlines()
    with open(os.path.join(PROJECT, 'train_mask.py'), encoding='utf-8') as f:
        block = f.read().split('\n# ---')[1]
    settings = [line for line in block.splitlines() if re.match(r'(?!config)[a-z]\w* = ', line)]
    saved = load(folder / 'out' / 'tiny' / 'mask.pt')['settings']
    names = {line.split(' = ')[0] for line in settings}
    assert names == {name for name in saved if not name.isupper()}
    for line in settings:
        assert line in out


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

    # in batches of 10 every clip comes back to its own place
    run(folder, *command, '--repeats=1', '--mm_batches=0', '--gen_batch=10',
        '--eval_json=small.json')
    small = json.loads((folder / 'small.json').read_text())['rows']
    first_repeat = written['per_repeat'][0]
    for row in ('real motion', 'tokenizer'):
        for metric, value in first_repeat[row].items():
            assert np.isclose(small[row][metric][0], value, rtol=1e-3, atol=1e-6), (row, metric)


def test_evaluation_of_a_tokenizer_alone(folder):
    out = out_dir(folder, 'only_vq', 'vq.pt', 'evaluator.pt')
    said = run(folder, 'eval_t2m.py', CONFIG, f'--out_dir={out}', '--repeats=1', launcher=PYTHON)
    rows = json.loads((folder / out / 'eval_tiny_test.json').read_text())['rows']
    assert list(rows) == ['real motion', 'tokenizer']
    assert 'real motion' in said and 'tokenizer  ' in said
    assert 'base tokens only' not in said


SLIDE = '''
import runpy
import sys

import numpy as np

sys.argv = sys.argv[1:]
look = runpy.run_path(sys.argv[0], run_name='__main__')['look']
world = look.__globals__
world['standing_height'] = np.full(4, 0.05)


def slide(height, *step, unit=1):
    """Of a body that is all at one height (m) and moves by a step (x, y, z), m a frame."""
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
assert np.isnan(slide(0.04, 0.06, 0, 0.08)), 'a foot in a hurry'

clips = iter([np.nan] + 63 * [3.0])   # 32 real ones come first, then the tokenizer's
world['look'] = lambda joints, caption: {'slide cm': next(clips)}
assert world['one_repeat'](0)['real motion']['slide cm'] == 3
'''


def test_terms_of_the_tokenizer_loss():
    """`foot_steps` are the ways that feet go over the ground in the joints; what its error and
    `heading_error` say of a motion that turns by a degree a frame too much, and of itself."""
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
    went = np.linalg.norm(np.diff(feet, axis=0), axis=-1)                   # (T - 1, 4)
    steps = script['foot_steps'](x)[0].norm(dim=-1)
    assert went.max() > 0.02
    assert np.abs(steps.numpy() - went).max() < 1e-5

    assert script['heading_error'](x, x) == script['foot_error'](x, x) == 0
    turned = x.clone()
    turned[..., 0] += math.radians(0.5)   # the feature is half the angle
    T = x.shape[1]
    assert script['heading_error'](x, turned) == pytest.approx(math.radians((T + 1) / 2), rel=1e-4)
    assert script['foot_error'](x, turned) > 1e-4


def test_foot_slide(folder):
    """In eval_t2m.py: centimetres along the floor, a frame, of feet that are low and slow. A clip
    without such feet has no slide and does not count."""
    out = out_dir(folder, 'slide', 'vq.pt', 'evaluator.pt')
    script = folder / 'slide.py'
    script.write_text(SLIDE)
    run(folder, str(script), os.path.join(PROJECT, 'eval_t2m.py'), CONFIG, f'--out_dir={out}',
        '--repeats=1')


def test_bench(folder):
    """Every table, at the smallest size."""
    run(folder, 'bench.py', '--batch=1', '--frames=16', '--prompts=1', '--max_tokens=49',
        '--warm=0', '--rounds=1', '--bench_json=bench.json')
    tables = json.loads((folder / 'bench.json').read_text())
    assert tables.pop('machine')['name']
    assert len(tables) == 5
    masked, _, _, generation, attention = tables.values()
    assert all(table['plain']['ms'] > 0 and table['ours']['ms'] > 0 for table in tables.values())
    for table in (masked, generation):
        assert table['ours, DynMask']['times ours'] > 0
    assert attention['largest difference'] < 1e-5


@pytest.mark.skipif(not os.path.isdir(GOLDEN),
                    reason='The reference checkpoints (../shared/golden) are not here.')
class TestOfficialCheckpoints:
    official = ['--init_from=momask', f'--momask_root={GOLDEN}', '--momask_text=hash']

    def test_sample_as_momask_decodes(self, folder):
        """DynMask's decoding is off for them unless one asks for it."""
        command = ['sample.py', *self.official, '--prompt=a man kicks', '--length=40']
        run(folder, *command, '--samples_dir=momask')
        run(folder, *command, '--samples_dir=momask_off', '--das_sampling=False')
        run(folder, *command, '--samples_dir=momask_on', '--das_sampling=True')
        default, = motions(folder, 'momask')
        off, = motions(folder, 'momask_off')
        on, = motions(folder, 'momask_on')
        assert glob.glob(str(folder / 'momask' / '*.gif'))
        assert np.array_equal(default, off)
        assert not np.array_equal(default, on)

    def test_evaluate(self, folder):
        out = run(folder, 'eval_t2m.py', '--data=tiny', *self.official, '--repeats=1', '--steps=2',
                  '--mm_batches=0', '--out_dir=out/momask')
        assert 'hashed words' in out and 'full' in out


# -------------------------------------------------------------------------------- how it is trained

# the learning rate depends on the planned length: a long run is stopped at its first checkpoint
STOP = '''
import runpy
import sys

from lib import runtime

save = runtime.save
last, script = sys.argv[1:3]


def save_and_stop(obj, path):
    save(obj, path)
    if path.endswith(last):
        sys.exit(0)


runtime.save = save_and_stop
sys.argv = sys.argv[2:]
runpy.run_path(script, run_name='__main__')
'''


@pytest.mark.parametrize('stage,drawn', [('vq', ''), ('mask', ''), ('vq', '--vq_sample=0.5')])
def test_resume_continues_where_it_stopped(folder, stage, drawn):
    """12 steps in one go, and 6 + 6: the same weights, also where training draws codes."""
    out = out_dir(folder, f'cut_{stage}{bool(drawn):d}', *['vq.pt'][stage == 'vq':])
    last = f'{stage}_last.pt'
    script, *settings = [*train(stage), f'--out_dir={out}', *drawn.split()]
    stop = folder / f'stop_{stage}.py'
    stop.write_text(STOP)
    run(folder, str(stop), last, os.path.join(PROJECT, script), *settings)
    assert load(folder / out / last)['it'] == 6
    run(folder, script, *settings, '--init_from=resume')
    cut = load(folder / out / last)
    if drawn:
        run(folder, script, *settings, '--overwrite=True')
    whole = load(folder / (out if drawn else 'out/tiny') / last)
    assert whole['it'] == cut['it'] == 12
    assert all(torch.equal(whole['model'][name], cut['model'][name]) for name in whole['model'])


def test_hgm3_trains_resumes_and_samples(folder):
    """Loss predictor, semantic graph, rotary positions and neighbours through the same scripts; 12
    steps are 6 + 6."""
    keys = ['--mask_by=loss', '--text=graph', '--rotary=True', '--neighbours=1']
    whole, cut = (out_dir(folder, name, 'vq.pt') for name in ('hgm3', 'hgm3_cut'))
    run(folder, *train('mask'), f'--out_dir={whole}', *keys)
    stop = folder / 'stop_hgm3.py'
    stop.write_text(STOP)
    command = [os.path.join(PROJECT, 'train_mask.py'), CONFIG, f'--out_dir={cut}', *keys]
    run(folder, str(stop), 'mask_last.pt', *command)
    run(folder, *train('mask'), f'--out_dir={cut}', *keys, '--init_from=resume')
    one, two = (load(folder / out / 'mask_last.pt') for out in (whole, cut))
    for part in ('model', 'miner'):
        assert all(torch.equal(one[part][name], two[part][name]) for name in one[part])
    assert one['tags']['walk'] == 'VERB'
    run(folder, 'sample.py', CONFIG, f'--out_dir={whole}', '--length=40', '--samples_dir=graph',
        '--prompt=a person walks, then 3 steps', '--explain=True')
    assert motions(folder, 'graph')[0].shape == (40, 22, 3)
    assert os.path.exists(folder / 'graph' / '000_a-person-walks-then-3-steps_explained.png')


def test_the_letter_of_the_papers(folder):
    """config/letter.py behind another config takes back every departure."""
    out = out_dir(folder, 'letter', 'vq.pt')
    letter = os.path.join(PROJECT, 'config', 'letter.py')
    run(folder, 'train_mask.py', CONFIG, letter, f'--out_dir={out}', '--mask_iters=6')
    settings = load(folder / out / 'mask.pt')['settings']
    assert settings['optimizer'] == 'adamw'
    assert settings['text'] == 'sentence'
    assert settings['omega'] == 'flatness'
    assert len(load(folder / out / 'mask_last.pt')['optimizers']) == 1


def run_two(folder, *command):
    """What torchrun does, without the start of three interpreters: two ranks of a script."""
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
    """Two gloo processes: the loss curve of one process with the same global batch, to rounding."""
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
        _, _, ids, seen = vq(mine)
    vq.update_codebooks(ids, seen, 1 + step % 3, g)
books = torch.stack([q.codebook for q in vq.quantizers])
if world > 1:
    everyone = gather(books[None])
    assert torch.equal(everyone[0], everyone[1]), 'the ranks differ'
if rank == 0:
    torch.save(books, f'books{world}.pt')
if world > 1:
    dist.barrier()   # a rank that leaves early aborts the other's teardown
    dist.destroy_process_group()
'''


def test_codebooks_are_identical_on_all_ranks(folder):
    """EMA and resets: after 20 steps every rank holds the same bits, those of one process."""
    script = folder / 'ranks.py'
    script.write_text(RANKS)
    run(folder, str(script))
    run_two(folder, str(script))
    one, two = (load(folder / f'books{world}.pt') for world in (1, 2))
    assert float((one - two).abs().max()) < 1e-4


def test_validation_never_sees_the_clean_msd(folder):
    """What attention reads while training changes the training loss and not the validation, as long
    as the weights are the same: here those of the start, because nothing is learned."""
    histories = []
    validations = []
    for source in ('visible', 'clean'):
        out = out_dir(folder, f'msd_{source}', 'vq.pt')
        said = run(folder, 'train_mask.py', CONFIG, f'--out_dir={out}', f'--msd_attn={source}',
                   '--mask_iters=1', '--lr=0.0')
        histories.append(load(folder / out / 'mask_last.pt')['history'])
        saved = load(folder / out / 'mask.pt')['val']
        validations.append(saved)
        assert f'step 1: val cross-entropy 30% {saved["30%"]:.3f}, 60%' in said
    assert validations[0] == validations[1]
    assert histories[0] != histories[1]


RECORD = '''
import runpy
import sys

import torch

from model import MaskTransformer

forward = MaskTransformer.forward
read = []
path = sys.argv[1]
sys.argv = sys.argv[2:]


def record(self, ids, c, *others, **named):
    if self.training:
        read.append((ids, c))
    return forward(self, ids, c, *others, **named)


MaskTransformer.forward = record
runpy.run_path(sys.argv[0], run_name='__main__')
torch.save(read, path)
'''


def test_text_is_dropped_after_the_masks_are_chosen(folder):
    """Eq 10 reads every text. Those that the network then learns without (classifier-free guidance)
    change no mask: here masks come of the text alone, and all or no texts are dropped."""
    recorder = folder / 'record.py'
    recorder.write_text(RECORD)
    read = []
    for cond_drop in (0.0, 1.0):
        out = out_dir(folder, f'cond_drop_{cond_drop}', 'vq.pt')
        run(folder, str(recorder), f'{out}/read.pt', os.path.join(PROJECT, 'train_mask.py'), CONFIG,
            f'--out_dir={out}', '--mask_iters=1', '--cfs_lambda=1.0', '--cfs_noise=0.0',
            f'--cond_drop={cond_drop}')
        read.append(load(folder / out / 'read.pt'))
    assert len(read[0]) == len(read[1]) == 2   # the batch whose products are counted, and step 1
    for (ids, c), (ids_without, no_text) in zip(*read):
        assert torch.equal(ids, ids_without)
        assert c.any() and not no_text.any()


# ----------------------------------------------------------------------------------------- mistakes


TRAIN = ['train_mask.py', CONFIG]
SAMPLE = ['sample.py', CONFIG]
NO_GOLDEN = ['--init_from=momask', '--momask_root=no_such', '--momask_mask=x', '--momask_res=x']
MISTAKES = {
    'is not a setting of train_mask.py; close: alpha0, alpha_schedule': [*TRAIN, '--alpha=0'],
    '--FRAMES_PER_TOKEN=5 is not a setting': [*TRAIN, '--FRAMES_PER_TOKEN=5'],
    'expected int': [*TRAIN, '--batch_size=many'],
    "fusion is 'sharp', expected rescaled, zscore": [*TRAIN, '--fusion=sharp'],
    "init_from is 'resum', expected scratch, resume": [
        'train_vq.py', CONFIG, '--init_from=resum'],
    'config/none.py does not exist': ['train_vq.py', 'config/none.py'],
    'n_layer, which no script here knows': ['train_mask.py', 'config/typo.py'],
    'is not a config file': ['train_mask.py', 'config/bad.py'],
    'run `python prepare_data.py toy` first': ['train_vq.py', '--data=toy'],
    'out/empty/vq.pt is missing': [*TRAIN, '--out_dir=out/empty'],
    'run `python train_mask.py config/none.py` first': [
        *SAMPLE, '--out_dir=out/none', '--prompt=x'],
    'the prompt is empty': [*SAMPLE, '--prompt=  '],
    'is 3 frames, expected 4 to 80': [*SAMPLE, '--prompt=a person', '--length=3'],
    'is 84 frames, expected 4 to 80': [*SAMPLE, '--prompt=a person', '--length=84'],
    'none.txt cannot be read (there is no such file)': [*SAMPLE, '--prompts=none.txt'],
    'no_such/t2m/x/opt.txt cannot be read (there is no such file)': ['sample.py', *NO_GOLDEN, '--prompt=a'],
}


@pytest.mark.parametrize('words', MISTAKES)
def test_mistakes_are_one_sentence(folder, words):
    (folder / 'config' / 'typo.py').write_text('n_layer = 3\n')
    (folder / 'config' / 'bad.py').write_text('n_layers = = 3\n')
    assert words in run(folder, *MISTAKES[words], ok=False)


def test_a_mistake_in_a_new_interpreter(folder):
    """It ends as in the forked processes of the other tests."""
    command = ['train_vq.py', '--data=toy']
    said = run(folder, *command, ok=False, launcher=PYTHON)
    assert said == run(folder, *command, ok=False)


def test_a_transformer_refuses_another_tokenizer(folder):
    out = out_dir(folder, 'other', 'vq.pt', 'mask.pt', 'mask_last.pt')
    other = folder / out
    sample = ['sample.py', CONFIG, f'--out_dir={out}', '--prompt=a']
    train = ['train_mask.py', CONFIG, '--init_from=resume']
    for name in ('mask.pt', 'mask_last.pt'):
        torch.save({**load(other / name), 'vq_hash': 'ffff'}, other / name)
    assert 'was trained on tokenizer ffff' in run(folder, *sample, ok=False)
    assert 'vq_hash was ffff, now' in run(folder, *train, f'--out_dir={out}', ok=False)
    assert 'n_layers was 2, now 3' in run(folder, *train, '--n_layers=3', ok=False)
    shutil.copy(other / 'vq.pt', other / 'mask.pt')
    assert 'holds vq, expected mask' in run(folder, *sample, ok=False)


def test_features_that_are_not_those_prepared(folder):
    """A file of another width, and one in which a number was changed afterwards."""
    bad = folder / 'data' / 'bad'
    shutil.copytree(folder / 'data' / 'tiny', bad)
    features = np.load(bad / 'train_motion.npy')
    changed = features.copy()
    changed[5, 7] = np.nan
    for wrong in (features[:, :100], changed):
        np.save(bad / 'train_motion.npy', wrong)
        out = run(folder, 'train_vq.py', CONFIG, '--data=bad', ok=False)
        assert 'is not the file that prepare_data.py wrote' in out
