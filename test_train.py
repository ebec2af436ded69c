"""The scripts as a user runs them: a tiny data set goes through every stage, mistakes are one sentence, two processes equal one.

Everything happens in a copy of the folder's files, so that nobody's data/ or out/ is touched.
"""
import glob
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
TINY = '''
data = 'tiny'
text_encoder = 'hash'
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
'''


def run(folder, *command, ok=True, ranks=1, threads=1):
    """Run a script in `folder`; returns stdout + stderr. ok=False: it must end with exit code 2, one sentence, no traceback."""
    launcher = [sys.executable] if ranks == 1 else [sys.executable, '-m', 'torch.distributed.run', '--standalone',
                                                    f'--nproc_per_node={ranks}']
    env = {**os.environ, 'OMP_NUM_THREADS': str(threads), 'PYTHONWARNINGS': 'ignore'}
    p = subprocess.run([*launcher, *command], cwd=folder, capture_output=True, text=True, env=env, timeout=300)
    out = p.stdout + p.stderr
    if ok:
        assert p.returncode == 0, out
    else:
        assert p.returncode == 2 and 'Traceback' not in out, out
        assert len(p.stderr.strip().splitlines()) == 1, p.stderr
    return out


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The scripts, a tiny prepared data set of random smooth features, and a config; tokenizer and transformers trained."""
    folder = tmp_path_factory.mktemp('work')
    for path in glob.glob(os.path.join(HERE, '*.py')):
        shutil.copy(path, folder)
    os.makedirs(folder / 'config')
    (folder / 'config' / 'tiny.py').write_text(TINY)
    data = folder / 'data' / 'tiny'
    os.makedirs(data)
    rng = np.random.default_rng(0)
    sys.path.insert(0, HERE)
    import motion
    counts = {}
    for split, n in (('train', 40), ('val', 8), ('test', 40)):
        clips = [(f'clip{i}', np.cumsum(0.05 * rng.standard_normal((int(rng.integers(40, 80)), 263)), 0).astype(np.float32)) for i in range(n)]
        captions = [{'clip': i, 'text': f'a person walks {i % 5} steps', 'tokens': f'a/DET person/NOUN walk/VERB {i % 5}/NUM steps/NOUN'} for i in range(n)]
        motion.save_split(str(data), split, clips, captions)
        counts[split] = {'clips': n}
    meta = {'name': 'tiny', 'skeleton': 'smpl22', 'fps': 20, 'dim': 263, 'n_joints': 22, 'unit_length': 4, 'min_frames': 40,
            'max_frames': 80, 'contact_threshold': 0.002, 'units_per_metre': 1, 'counts': counts}
    motion.save_meta(str(data), meta, np.zeros(263), np.ones(263))
    run(folder, 'train_vq.py', 'config/tiny.py')
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda stage: run(folder, 'train_mask.py', 'config/tiny.py', f'--stage={stage}'), ('mask', 'res', 'len')))
    return folder


def test_the_whole_chain(folder):
    """Prompt in, motion out; the same seed gives the same motion; the length estimator answers where no length is given."""
    out = run(folder, 'sample.py', 'config/tiny.py', '--prompt=a person walks 3 steps', '--length=44', '--samples_dir=a')
    assert 'written to a/' in out
    run(folder, 'sample.py', 'config/tiny.py', '--prompt=a person walks 3 steps', '--length=44', '--samples_dir=b')
    a, b = (np.load(folder / d / '000_a-person-walks-3-steps.npy') for d in 'ab')
    assert a.shape == (44, 22, 3) and np.array_equal(a, b)
    (folder / 'prompts.txt').write_text('a person walks#40\na person walks 2 steps\n')
    run(folder, 'sample.py', 'config/tiny.py', '--prompts=prompts.txt', '--repeats=2', '--samples_dir=c')
    lengths = [len(np.load(p)) for p in sorted(glob.glob(str(folder / 'c' / '*.npy')))]
    assert lengths[:2] == [40, 40] and len(lengths) == 4 and all(4 <= n <= 80 for n in lengths)


def test_evaluation(folder):
    run(folder, 'train_eval.py', 'config/tiny.py', '--ev_ae_steps=2', '--ev_steps=4', '--ev_batch=8', '--ev_eval_every=4')
    run(folder, 'eval_t2m.py', 'config/tiny.py', '--repeats=2', '--steps=2', '--mm_batches=1', '--strata=True')
    rows = json.load(open(folder / 'out' / 'tiny' / 'eval_tiny_test.json'))['rows']
    assert list(rows) == ['real motion', 'tokenizer', 'base tokens only', 'full']
    assert rows['real motion']['FID'][0] < 1e-6 < rows['full']['FID'][0]
    assert all(np.isfinite(v).all() for row in rows.values() for v in row.values())
    assert rows['tokenizer']['MPJPE mm'][0] > 0 and 'MModality' in rows['full'] and 'FID complex' in rows['full']
    # in batches of 10 on two cores every clip comes back to its own place
    run(folder, 'eval_t2m.py', 'config/tiny.py', '--repeats=2', '--steps=2', '--mm_batches=0', '--strata=True', '--gen_batch=10',
        '--eval_json=small.json', threads=2)
    small = json.load(open(folder / 'small.json'))['rows']
    for row in ('real motion', 'tokenizer'):
        assert all(np.allclose(small[row][k], rows[row][k], rtol=1e-3, atol=1e-6) for k in rows[row])


GOLDEN = os.path.join(HERE, '..', 'shared', 'golden', 't2m', 'momask_checkpoints')


@pytest.mark.skipif(not os.path.isdir(GOLDEN), reason='the reference checkpoints (../shared/golden) are not here')
def test_official_checkpoints_sample_and_evaluate(folder):
    golden = ['--init_from=momask', f'--momask_root={GOLDEN}', '--momask_text=hash']
    run(folder, 'sample.py', *golden, '--prompt=a man kicks', '--samples_dir=m')
    assert glob.glob(str(folder / 'm' / '*.gif'))
    out = run(folder, 'eval_t2m.py', '--data=tiny', *golden, '--repeats=1', '--steps=2', '--mm_batches=0', '--out_dir=out/momask')
    assert 'hashed words' in out and 'full' in out
    assert 'no_such is missing' in run(folder, 'sample.py', *golden[:1], '--momask_root=no_such', '--momask_mask=no_such', '--momask_res=x', '--prompt=a', ok=False).replace('no_such/t2m/no_such/opt.txt', 'no_such')


def test_resume_continues_where_it_stopped(folder):
    """12 steps in one go, and 6 + 6: the same weights."""
    for script, more, last in (('train_mask.py', [], 'mask_last.pt'), ('train_vq.py', [], 'vq_last.pt')):
        iters = 'mask_iters' if 'mask' in script else 'vq_iters'
        shutil.copytree(folder / 'out' / 'tiny', folder / 'out' / 'cut', dirs_exist_ok=True)
        # the learning rate depends on the planned length: stop the long run at its first checkpoint
        stop = f"import runpy, sys, torch; import vq; save = vq.save\nclass Stop(Exception): pass\ndef cut(obj, path):\n    save(obj, path)\n    if path.endswith('{last}'): sys.exit(0)\nvq.save = cut\nsys.argv = ['{script}', 'config/tiny.py', '--out_dir=out/cut']\nrunpy.run_path('{script}', run_name='__main__')"
        run(folder, '-c', stop)
        assert torch.load(folder / 'out' / 'cut' / last, weights_only=True)['it'] == 6
        run(folder, script, 'config/tiny.py', '--out_dir=out/cut', '--init_from=resume')
        a, b = (torch.load(folder / 'out' / d / last, weights_only=True) for d in ('tiny', 'cut'))
        assert a['it'] == b['it'] == 12
        assert all(torch.equal(a['model'][k], b['model'][k]) for k in a['model'])


@pytest.mark.parametrize('script,last,more', [('train_vq.py', 'vq_last.pt', []), ('train_mask.py', 'mask_last.pt', []),
                                              ('train_mask.py', 'res_last.pt', ['--stage=res'])])
def test_two_processes_equal_one(folder, script, last, more):
    """torchrun with 2 gloo processes: the loss curve of one process with the same global batch, to rounding."""
    out = f'out/two_{last[:3]}'
    shutil.copytree(folder / 'out' / 'tiny', folder / out, dirs_exist_ok=True)
    run(folder, script, 'config/tiny.py', f'--out_dir={out}', f'--vq={folder}/out/tiny/vq.pt' if 'mask' in script else '--seed=0', *more, ranks=2)
    a, b = (torch.load(folder / d / last, weights_only=True) for d in ('out/tiny', out))
    assert len(a['history']) == len(b['history']) >= 6
    assert max(abs(x[1] - y[1]) / abs(x[1]) for x, y in zip(a['history'], b['history'])) < 1e-3
    assert not glob.glob(str(folder / out / '*.tmp'))


def test_codebooks_are_identical_on_all_ranks(folder):
    """EMA and resets: after 20 steps every rank holds the same bits, those of one process."""
    (folder / 'ranks.py').write_text("""
import os, torch, torch.distributed as dist
from vq import RVQVAE, VQConfig, gather
rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
if world > 1:
    dist.init_process_group('gloo')
torch.manual_seed(0)
vq, g = RVQVAE(VQConfig(dim=263, n_codes=32, code_dim=8, n_quantizers=3, width=8)), torch.Generator().manual_seed(0)
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
    dist.barrier()                  # a rank that leaves early aborts the other's teardown
    dist.destroy_process_group()
""")
    run(folder, 'ranks.py')
    run(folder, 'ranks.py', ranks=2)
    one, two = (torch.load(folder / f'books{n}.pt') for n in (1, 2))
    assert float((one - two).abs().max()) < 1e-4


def test_mistakes_are_one_sentence(folder):
    (folder / 'config' / 'typo.py').write_text('n_layer = 3\n')
    (folder / 'config' / 'bad.py').write_text('n_layers = = 3\n')
    mistakes = [
        ('is not a setting of train_mask.py; close: alpha0', 'train_mask.py', 'config/tiny.py', '--alpha=0'),
        ('expected int', 'train_mask.py', 'config/tiny.py', '--batch_size=many'),
        ('fusion is \'sharp\', expected rescaled, zscore', 'train_mask.py', 'config/tiny.py', '--fusion=sharp'),
        ('init_from is \'resum\', expected scratch, resume', 'train_vq.py', 'config/tiny.py', '--init_from=resum'),
        ('config/none.py does not exist', 'train_vq.py', 'config/none.py'),
        ('n_layer, which no script here knows', 'train_mask.py', 'config/typo.py'),
        ('is not a config file', 'train_mask.py', 'config/bad.py'),
        ('python prepare_data.py toy', 'train_vq.py', '--data=toy'),
        ('train_vq.py', 'train_mask.py', 'config/tiny.py', '--out_dir=out/empty'),
        ('train_mask.py config/tiny.py', 'sample.py', 'config/tiny.py', '--out_dir=out/empty/tiny', '--prompt=x'),
        ('The prompt is empty', 'sample.py', 'config/tiny.py', '--prompt=  '),
        ('expected 4 to 80', 'sample.py', 'config/tiny.py', '--prompt=a person', '--length=3'),
        ('expected 4 to 80', 'sample.py', 'config/tiny.py', '--prompt=a person', '--length=84'),
        ('does not exist', 'sample.py', 'config/tiny.py', '--prompts=none.txt'),
    ]
    with ThreadPoolExecutor(2) as pool:
        for (words, *_), out in zip(mistakes, pool.map(lambda m: run(folder, *m[1:], ok=False), mistakes)):
            assert words in out


def test_a_transformer_refuses_another_tokenizer(folder):
    other = folder / 'out' / 'other'
    shutil.copytree(folder / 'out' / 'tiny', other, dirs_exist_ok=True)
    d = torch.load(other / 'mask.pt', weights_only=True)
    torch.save({**d, 'vq_hash': 'ffff'}, other / 'mask.pt')
    assert 'was trained on tokenizer ffff' in run(folder, 'sample.py', 'config/tiny.py', '--out_dir=out/other', '--prompt=a', ok=False)
    torch.save({**torch.load(other / 'mask_last.pt', weights_only=True), 'vq_hash': 'ffff'}, other / 'mask_last.pt')
    assert 'another tokenizer' in run(folder, 'train_mask.py', 'config/tiny.py', '--out_dir=out/other', '--init_from=resume', ok=False)
    assert 'another config' in run(folder, 'train_mask.py', 'config/tiny.py', '--init_from=resume', '--n_layers=3', ok=False)
    shutil.copy(other / 'vq.pt', other / 'mask.pt')
    assert 'holds vq, expected mask' in run(folder, 'sample.py', 'config/tiny.py', '--out_dir=out/other', '--prompt=a', ok=False)


def test_features_of_the_wrong_width_or_with_nan(folder):
    bad = folder / 'data' / 'bad'
    shutil.copytree(folder / 'data' / 'tiny', bad)
    x = np.load(bad / 'train_motion.npy')
    np.save(bad / 'train_motion.npy', x[:, :100])
    assert '(' in run(folder, 'train_vq.py', 'config/tiny.py', '--data=bad', ok=False)
    x[5, 7] = np.nan
    np.save(bad / 'train_motion.npy', x)
    assert 'NaN' in run(folder, 'train_vq.py', 'config/tiny.py', '--data=bad', ok=False)
