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
from concurrent.futures import ThreadPoolExecutor

import filelock
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
vq_width = code_dim = vq_batch = 16
n_codes = window_frames = ff = 32
n_quantizers = 3
latent = 24
n_layers = n_heads = 2
batch_size = ev_batch = 8
vq_lr = lr = 1e-3
vq_warmup = warmup = ev_ae_steps = 2
vq_iters = mask_iters = 12
res_iters = len_iters = vq_eval_every = eval_every = 6
ev_steps = ev_eval_every = 4
ev_movement = ev_code = ev_motion_hidden = ev_text_hidden = ev_out = 32
log_every = 1
dropout = 0.0
dtype = 'float32'
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


def functions_of(script, *names, **world):
    """Functions of a script, which cannot be imported; world: the names that they use."""
    with open(os.path.join(PROJECT, script), encoding='utf-8') as f:
        tree = ast.parse(f.read())
    tree.body = [part for part in tree.body if getattr(part, 'name', '') in names]
    exec(compile(tree, script, 'exec'), world)
    return [world[name] for name in names]


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


def write_folder(folder):
    """config/tiny.py and data/tiny."""
    os.makedirs(folder / 'config', exist_ok=True)
    (folder / CONFIG).write_text(TINY)
    write_data(str(folder / 'data' / 'tiny'))


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
    with filelock.FileLock(f'{folder}.lock'):
        if not folder.exists():
            write_folder(folder)
            for stage in ('vq', 'eval', 'mask', 'res', 'len'):
                (folder / f'{stage}.log').write_text(run(folder, *train(stage)))
    return folder


def out_dir(folder, name, *files):
    """A new folder out/<name> with copies of files of out/tiny -> 'out/<name>'."""
    os.makedirs(folder / 'out' / name)
    for file in files:
        shutil.copy(folder / 'out' / 'tiny' / file, folder / 'out' / name)
    return f'out/{name}'


def sample(folder, samples_dir, *settings, launcher=None):
    """Run sample.py -> the motions that it wrote into samples_dir."""
    run(folder, 'sample.py', *settings, f'--samples_dir={samples_dir}', launcher=launcher)
    return [np.load(path) for path in sorted(glob.glob(str(folder / samples_dir / '*.npy')))]


# ------------------------------------------------------------------------- sampling and evaluation


def test_prompts_become_motion(folder):
    """The same seed gives the same motion. Without a length, the length estimator decides."""
    command = [CONFIG, '--prompt=a person walks 3 steps', '--length=44']
    a, = sample(folder, 'a', *command, launcher=PYTHON)
    b, = sample(folder, 'b', *command)
    assert a.shape == (44, 22, 3) and np.array_equal(a, b)
    for suffix in ('.gif', '.png', '.npy', '.bvh'):
        assert (folder / 'a' / f'000_a-person-walks-3-steps_s0{suffix}').exists()

    (folder / 'prompts.txt').write_text('a person walks#8\na person walks 2 steps\n')
    motions = sample(folder, 'c', CONFIG, '--prompts=prompts.txt', '--repeats=2', '--footlock=True')
    assert all('_footlock.' in name for name in os.listdir(folder / 'c'))
    lengths = [len(motion) for motion in motions]
    assert lengths[:2] == [8, 8] and len(lengths) == 4
    assert all(4 <= n <= 80 for n in lengths)


def test_editing_and_long_motion(folder):
    """Several prompts in one motion, a span of a motion regenerated, two motions connected."""
    long = 'a person walks#40 | a person walks 3 steps#60 | a person walks#80'
    first, = sample(folder, 'long', CONFIG, f'--prompt={long}')
    assert first.shape == (180, 22, 3)
    body = toy.make_clip(1)['joints']   # sources must be human bodies
    np.save(folder / 'walk.npy', body[:64])
    np.save(folder / 'flat.npy', first[:, 0])

    edit = [CONFIG, '--prompt=a person walks 2 steps', '--source=walk.npy']
    one, other = sample(folder, 'edited', *edit, '--edit=0.5:0.75', '--repeats=2')
    assert one.shape == other.shape == (64, 22, 3)
    assert not np.array_equal(one, other)
    frames, = sample(folder, 'frames', *edit, '--edit=32:48,60:64')
    assert frames.shape == (64, 22, 3)
    connected, = sample(folder, 'connected', *edit, '--then=walk.npy', '--length=20')
    assert connected.shape == (64 + 20 + 64, 22, 3)

    for wrong, words in (('--edit=0.7:0.4', '0.7:0.4'), ('--edit=some', 'some'),
                         ('--edit=0:100', '64 frames'), ('--then=none.npy', 'none.npy'),
                         ('--then=flat.npy', 'flat.npy'), ('--repeats=2', '--edit')):
        assert words in run(folder, 'sample.py', *edit, wrong, ok=False)


def test_evaluation(folder):
    """Clips without a planted foot have no slide and do not count. Batches of another size give
    every clip the same result. A tokenizer can be evaluated alone."""
    def evaluate(path, *settings):
        run(folder, 'eval_t2m.py', CONFIG, *settings, f'--eval_json={path}')
        return json.loads((folder / path).read_text())

    command = ['--steps=2']
    written = evaluate('all.json', *command, '--repeats=2', '--mm_batches=1')
    rows = written['rows']
    assert list(rows) == ['real motion', 'tokenizer', 'base tokens only', 'full']
    assert rows['real motion']['FID'][0] < 1e-6 < rows['full']['FID'][0]
    assert all(np.isfinite(value).all() for row in rows.values() for value in row.values())
    assert rows['tokenizer']['MPJPE mm'][0] > 0
    assert 'MModality' in rows['full']

    small = evaluate('small.json', *command, '--repeats=1', '--mm_batches=0', '--gen_batch=10',
                     '--dynamics=True')
    for row in ('real motion', 'tokenizer'):
        for metric, value in written['per_repeat'][0][row].items():
            assert np.isclose(small['rows'][row][metric][0], value, rtol=1e-3, atol=1e-6), metric
    assert small['tokens'] and 'FID complex' in small['pooled']['full']

    out = out_dir(folder, 'only_vq', 'vq.pt', 'evaluator.pt')
    alone = evaluate('alone.json', f'--out_dir={out}', '--repeats=1')
    assert list(alone['rows']) == ['real motion', 'tokenizer']


@pytest.mark.parametrize('edit', ['0.4:0.7', '0.5:1'])
def test_edits_are_evaluated(folder, edit):
    out = run(folder, 'eval_edit.py', CONFIG, '--clips=3', '--steps=2', f'--edit={edit}')
    lines = [line.split('|')[1:-1] for line in out.splitlines() if line.startswith('|')]
    kept = {row.strip(): figures[-1].strip() for row, *figures in lines[2:]}
    assert kept['real clip'] == '0.00' and float(kept['edited']) > 0 and kept['joined'] == ''


@pytest.mark.parametrize('height, step, unit, slide', [
    (0.04, (0, 0, 0), 1, 0),
    (0.04, (0.006, 0, 0.008), 1, 1),
    (0.04, (0.006, 0, 0.008), 1000, 1),     # with the same threshold, whatever the data set's
    (0.04, (0, -0.01, 0), 1, 0),            # into the floor, not along it
    (0.06, (0.006, 0, 0.008), 1, np.nan),   # a foot in the air
    (0.04, (0.06, 0, 0.08), 1, np.nan)])    # a foot that swings
def test_foot_slide(height, step, unit, slide):
    """Centimetres along the floor per frame, of feet that are low and slow, where all joints are at
    one height (m) and move by a step (x, y, z) per frame."""
    meta = dict(units_per_metre=unit, contact_threshold=0.002 / unit, fps=20)
    look, = functions_of('eval_t2m.py', 'look', np=np, meta=meta, skeleton=SKELETONS['smpl22'],
                         standing_height=np.full(4, 0.05))
    joints = np.zeros((9, 22, 3))
    joints[..., 1] = height
    joints += np.arange(9)[:, None, None] * step
    assert look(unit * joints, {})['slide cm'] == pytest.approx(slide, nan_ok=True)


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
    command = [*official, '--prompt=a man kicks', '--length=40']
    default, = sample(folder, 'default', *command)
    off, on = (sample(folder, f'das_{value}', *command, f'--das_sampling={value}')[0]
               for value in (False, True))
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
    foot_steps, foot_error, heading_error = functions_of(
        'train_vq.py', 'foot_steps', 'foot_error', 'heading_error', torch=torch,
        SKELETONS=SKELETONS, model=RVQVAE(VQConfig(width=8, code_dim=8)),
        meta=dict(skeleton='smpl22', units_per_metre=1.0))
    skeleton = SKELETONS['smpl22']
    joints = toy.make_clip(5)['joints']   # hops, turns right, squats
    features = joints_to_features(joints, skeleton, steady=True)
    x = torch.from_numpy(features)[None].float()
    feet = features_to_joints(features, 22)[:, skeleton.feet][..., [0, 2]]
    expected = np.linalg.norm(np.diff(feet, axis=0), axis=-1)               # (T - 1, 4)
    assert expected.max() > 0.02
    assert np.abs(foot_steps(x)[0].norm(dim=-1).numpy() - expected).max() < 1e-5

    assert heading_error(x, x) == foot_error(x, x) == 0
    turned = x.clone()
    turned[..., 0] += math.radians(0.5)   # the feature is half the angle
    T = x.shape[1]
    assert heading_error(x, turned) == pytest.approx(math.radians((T + 1) / 2), rel=1e-4)
    assert foot_error(x, turned) > 1e-4


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


@pytest.mark.parametrize('name, stage, settings', [
    ('vq', 'vq', []), ('mask', 'mask', []), ('evaluator', 'eval', ['--ev_eval_every=2']),
    ('mask', 'mask', ['--mask_by=loss', '--text=graph', '--rotary=True', '--neighbours=1'])])
def test_resume_continues_where_it_stopped(folder, name, stage, settings):
    """Training in one run and training that is stopped and resumed end with the same weights."""
    files = ['vq.pt'] if stage == 'mask' else []
    whole, cut = (out_dir(folder, f'resume_{name}{len(settings)}_{part}', *files)
                  for part in ('whole', 'cut'))
    command = [*train(stage), *settings]
    run(folder, *command, f'--out_dir={whole}')
    command.append(f'--out_dir={cut}')
    code, out, err = run_script_with(STOP, folder, *command)
    assert code == 0, out + err
    stopped = load(folder / cut / f'{name}_last.pt')['it']
    run(folder, *command, '--init_from=resume')
    one, two = (load(folder / out / f'{name}_last.pt') for out in (whole, cut))
    assert stopped < one['it'] == two['it']
    for part in ('model', 'miner'):
        weights = one.get(part) or {}
        assert all(torch.equal(weights[key], two[part][key]) for key in weights)


@pytest.mark.parametrize('paper, more', [
    ('momask', ()), ('hgm3', ()), ('dynmask', ()), ('hgm3', ('--rotary=True', '--neighbours=1'))])
def test_papers_as_published(folder, paper, more):
    """The preset of a paper behind another config, trained, and sampled with an explanation."""
    out = out_dir(folder, f'preset_{paper}_{len(more)}', 'vq.pt')
    preset = [os.path.join(PROJECT, 'config', f'{paper}.py'), f'--out_dir={out}']
    for stage in ('mask', 'res'):
        run(folder, *train(stage), *preset, *more, '--mask_iters=2', '--res_iters=2')
    mask, res = (load(folder / out / f'{stage}.pt') for stage in ('mask', 'res'))
    assert mask['settings']['text'] == ('graph' if paper == 'hgm3' else 'sentence')
    assert paper != 'hgm3' or mask['tags']['walk'] == 'VERB'
    assert res['settings']['text'] == 'sentence'
    motion, = sample(folder, f'{out}/samples', CONFIG, *preset, '--prompt=a person walks, then 3',
                     '--length=40', '--explain=True')
    assert motion.shape == (40, 22, 3)
    assert glob.glob(str(folder / out / 'samples' / '*_explained.png'))


def test_networks_of_other_text_are_refused(folder):
    out = out_dir(folder, 'mixed', 'vq.pt', 'mask.pt', 'res.pt')
    command = ['sample.py', CONFIG, f'--out_dir={out}', '--prompt=a person walks', '--length=40']
    few = [f'--out_dir={out}', '--res_iters=2', '--mask_iters=2', '--overwrite=True']
    run(folder, *train('res'), '--text=graph', *few)
    run(folder, *command)   # with the sentence, as HGM3
    run(folder, *train('mask'), '--text=sentence', *few)
    shutil.copy(folder / 'out' / 'tiny' / 'res.pt', folder / out)
    said = run(folder, *command, ok=False)
    assert 'res.pt' in said and '--text=clauses' in said


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


def test_codebooks_are_those_of_one_process(folder):
    """After 12 steps of EMA and resets on all ranks. The learning rate is 0, so latents differ by
    rounding only. The loss is the mean over ranks, so it shows a rank with other codebooks."""
    runs = []
    for name, start in (('one', run), ('two', run_two)):
        out = out_dir(folder, f'codebooks_{name}')
        start(folder, *train('vq'), '--vq_lr=0.0', f'--out_dir={out}')
        runs.append(load(folder / out / 'vq_last.pt'))
    for book in (f'quantizers.{q}.codebook' for q in range(3)):
        assert (runs[0]['model'][book] - runs[1]['model'][book]).abs().max() < 1e-4
    assert np.allclose(runs[0]['history'], runs[1]['history'], rtol=1e-5, atol=0)


def test_validation_never_uses_the_clean_msd(folder):
    """`msd_attn` changes the training loss and not the validation of the same weights. The learning
    rate is 0, so the weights stay the initial ones."""
    histories = []
    validations = []
    for source in ('visible', 'clean'):
        out = out_dir(folder, f'msd_{source}', 'vq.pt')
        run(folder, *train('mask'), f'--out_dir={out}', f'--msd_attn={source}', '--mask_iters=1',
            '--lr=0.0')
        histories.append(load(folder / out / 'mask_last.pt')['history'])
        validations.append(load(folder / out / 'mask.pt')['val'])
    assert list(validations[0]) == ['30%', '60%', '90%']
    assert validations[0] == validations[1]
    assert histories[0] != histories[1]


RECORD = '''
import torch

inputs = []


def record(network, batch):
    if type(network).__name__ in ('MaskTransformer', 'ResTransformer') and network.training:
        inputs.append(batch[:2])   # ids, c
        torch.save(inputs, 'inputs.pt')


torch.nn.modules.module.register_module_forward_pre_hook(record)
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
    ('GB', *TRAIN, '--latent=16384', '--n_layers=128', '--n_heads=128', '--overwrite=True'),
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
    ('a_file/x', *SAMPLE, '--prompt=a person', '--length=40', '--samples_dir=a_file/x'),
    ('out/tiny', 'eval_t2m.py', CONFIG, '--repeats=1', '--eval_json=out/tiny'),
    ('/proc/x.json', 'eval_t2m.py', CONFIG, '--repeats=1', '--eval_json=/proc/x.json'),
    ('a_file/x', 'train_vq.py', CONFIG, '--out_dir=a_file/x'),
    ('a_file/x', 'train_eval.py', CONFIG, '--out_dir=a_file/x'),
    ('a_file/x', *TRAIN, '--vq=out/tiny/vq.pt', '--out_dir=a_file/x'),
]


@pytest.mark.parametrize('fact, command', [(fact, command) for fact, *command in MISTAKES])
def test_mistakes_are_one_sentence_before_the_work(folder, fact, command):
    (folder / 'config' / 'typo.py').write_text('n_layer = 3\n')
    (folder / 'a_file').write_text('')
    said = run(folder, *command, ok=False)
    assert fact in said
    assert 'generated' not in said and 'step' not in said


def test_a_mistake_in_a_new_interpreter(folder):
    """It ends as in the forked processes of the other tests."""
    command = ['train_vq.py', '--data=toy']
    assert run(folder, *command, ok=False, launcher=PYTHON) == run(folder, *command, ok=False)


def test_a_transformer_refuses_another_tokenizer(folder):
    out = out_dir(folder, 'other', 'vq.pt', 'mask.pt', 'mask_last.pt')
    command = ['sample.py', CONFIG, f'--out_dir={out}', '--prompt=a']
    for name in ('mask.pt', 'mask_last.pt'):
        path = folder / out / name
        torch.save({**load(path), 'vq_hash': 'ffff'}, path)
    assert 'ffff' in run(folder, *command, ok=False)
    resumed = run(folder, *TRAIN, '--init_from=resume', f'--out_dir={out}', ok=False)
    assert 'vq_hash was ffff' in resumed
    shutil.copy(folder / out / 'vq.pt', folder / out / 'mask.pt')
    assert 'mask.pt' in run(folder, *command, ok=False)
