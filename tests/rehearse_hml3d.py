"""Run the scripts on random data of HumanML3D's size and layout, by hand:

    python tests/rehearse_hml3d.py [--clips=23000] [--dir=FOLDER]

Writes random walks in feature space with captions from a small grammar, runs the scripts on them as
a user would, and prints a table with the time and the peak memory of each. It needs 6 GB of disk. A
temporary folder is removed afterwards, --dir is kept.
"""
import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
from lib.text import encode_captions

SUBJECTS = 'a/DET person/NOUN, the/DET man/NOUN, someone/PRON'.split(', ')
VERBS = 'walk/VERB, run/VERB, jump/VERB, crawl/VERB, dance/VERB, kick/VERB'.split(', ')
MANNERS = 'slowly/ADV, quickly/ADV, twice/ADV, backwards/ADV, forward/ADV'.split(', ')
PLACES = ('in/ADP a/DET circle/NOUN, to/ADP the/DET left/NOUN, over/ADP a/DET wall/NOUN, '
          'with/ADP both/DET arm/NOUN raised/VERB').split(', ')
CONFIG = str(PROJECT / 'config' / 'hml3d.py')
FEW_STEPS = ['--vq_iters=2', '--vq_width=32', '--code_dim=32', '--vq_depth=1', '--vq_batch=32']
ONE_STEP = ['--mask_iters=1', '--n_layers=1', '--batch_size=8', '--overwrite=True']


def caption_line(rng):
    """One line of a texts/ file: caption#word/TAG ...#from#to, with one to three clauses."""
    clauses = [' '.join(rng.choice(phrases) for phrases in (VERBS, MANNERS, PLACES))
               for _ in range(rng.integers(1, 4))]
    tagged = f'{rng.choice(SUBJECTS)} {" then/ADV ".join(clauses)}'
    caption = ' '.join(word.split('/')[0] for word in tagged.split())
    return f'{caption}.#{tagged}#0.0#0.0'


def write_source(folder, n_clips):
    """new_joint_vecs/, texts/ and the lists of the splits: 80, 5 and 15% of the clips."""
    rng = np.random.default_rng(0)
    for part in ('new_joint_vecs', 'texts'):
        (folder / part).mkdir(parents=True)
    names = [f'{i:06d}' for i in range(n_clips)]
    for name in names:
        steps = 0.05 * rng.standard_normal((rng.integers(40, 200), 263), dtype=np.float32)
        np.save(folder / 'new_joint_vecs' / f'{name}.npy', np.cumsum(steps, 0))
        lines = [caption_line(rng) for _ in range(rng.choice([2, 3, 4], p=[0.1, 0.75, 0.15]))]
        (folder / 'texts' / f'{name}.txt').write_text('\n'.join(lines), encoding='utf-8')
    ends = int(0.8 * n_clips), int(0.85 * n_clips)
    for split, ids in zip(('train', 'val', 'test'), np.split(names, ends)):
        (folder / f'{split}.txt').write_text('\n'.join(ids))


def cache_random_clip_vectors(folder):
    """Fill the cache of CLIP's vectors, so that training finds all captions encoded."""
    captions = [caption['text'] for path in folder.glob('*_captions.json')
                for caption in json.loads(path.read_text(encoding='utf-8'))]
    for text in ('sentence', 'clauses'):
        encode_captions(captions, 'clip', text, cache=folder,
                        tower=lambda device: lambda new: torch.randn(len(new), 512))


def measure(title, folder, script, *arguments):
    """Run a script in the folder and print a row of the table. Peak memory is that of the process,
    with the pages of the memory map that it has read."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(PROJECT / script), *arguments], cwd=folder)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f'{script} ended with exit code {process.returncode}')
    cpu = usage.ru_utime + usage.ru_stime
    print(f'| {title} | {seconds:.1f} | {cpu:.1f} | {usage.ru_maxrss / 1024:,.0f} |', flush=True)


def rehearse(folder, n_clips):
    prepared = folder / 'data' / 'hml3d'
    write_source(folder / 'HumanML3D', n_clips)
    print('| command | seconds | CPU seconds | peak memory, MB |\n|---|---:|---:|---:|', flush=True)
    measure('prepare_data.py hml3d', folder, 'prepare_data.py', 'hml3d', '--src=HumanML3D')
    measure('train_vq.py, 2 steps and the token cache', folder, 'train_vq.py', CONFIG, *FEW_STEPS)
    cache_random_clip_vectors(prepared)
    for encoder in ('hash', 'clip'):
        measure(f'train_mask.py, 1 step, {encoder}, cached', folder, 'train_mask.py', CONFIG,
                f'--text_encoder={encoder}', *ONE_STEP)
    n_bytes = sum(path.stat().st_size for path in prepared.iterdir())
    print(f'\n{n_clips:,} clips; data/{prepared.name} takes {n_bytes / 1e9:.2f} GB on disk')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--clips', type=int, default=23000)
    parser.add_argument('--dir', help='an empty folder outside the project, default a temporary')
    args = parser.parse_args()
    place = contextlib.nullcontext(args.dir) if args.dir else tempfile.TemporaryDirectory()
    with place as folder:
        rehearse(Path(folder).resolve(), args.clips)
