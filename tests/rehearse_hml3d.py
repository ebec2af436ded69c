"""A rehearsal of HumanML3D's size without its licence, by hand (pytest does not collect it):

    python tests/rehearse_hml3d.py [--clips=23000] [--dir=FOLDER]

Writes a folder laid out as the data set's, of smooth random motion with captions from a small
grammar, runs the scripts on it as a user would, and prints a table of how long each took and the
most memory it held. The real thing is 22,000 clips of 3 captions after the field's rules. Needs
6 GB of disk; a temporary folder is removed afterwards, --dir stays.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DIM = 263
SUBJECTS = 'a/DET person/NOUN, the/DET man/NOUN, a/DET woman/NOUN, someone/PRON'
VERBS = 'walk/VERB, run/VERB, jump/VERB, step/VERB, crawl/VERB, dance/VERB, turn/VERB, kick/VERB'
MANNERS = 'slowly/ADV, quickly/ADV, carefully/ADV, twice/ADV, backwards/ADV, forward/ADV'
PLACES = ('in/ADP a/DET circle/NOUN, to/ADP the/DET left/NOUN, to/ADP the/DET right/NOUN, '
          'over/ADP a/DET low/ADJ wall/NOUN, with/ADP both/DET arm/NOUN raised/VERB')


def caption_line(rng):
    """One line of a texts/ file: caption#word/TAG ...#from#to, of one to three clauses."""
    def one_of(phrases):
        return str(rng.choice(phrases.split(', ')))

    parts = [one_of(SUBJECTS)]
    for clause in range(rng.integers(1, 4)):
        if clause:
            parts.append('then/ADV')
        parts += [one_of(VERBS), one_of(MANNERS), one_of(PLACES)]
    tagged = ' '.join(parts)
    words = [word.split('/')[0] for word in tagged.split()]
    return f'{" ".join(words)}.#{tagged}#0.0#0.0'


def smooth_features(rng, T):
    """(T, 263) float32: random knots every eighth frame, straight lines between them."""
    knots = rng.standard_normal((T // 8 + 2, DIM), dtype=np.float32)
    knot, part = np.divmod(np.arange(T), 8)
    part = (part / 8).astype(np.float32)[:, None]
    return knots[knot] * (1 - part) + knots[knot + 1] * part


def write_source(folder, n_clips):
    """new_joint_vecs/, texts/ and the lists, shared out as the data set does: 80, 5 and 15%."""
    rng = np.random.default_rng(0)
    for part in ('new_joint_vecs', 'texts'):
        (folder / part).mkdir(parents=True)
    names = [f'{i:06d}' for i in range(n_clips)]
    for name in names:
        features = smooth_features(rng, T=int(rng.integers(40, 200)))
        np.save(folder / 'new_joint_vecs' / f'{name}.npy', features)
        lines = [caption_line(rng) for _ in range(rng.choice([2, 3, 4], p=[0.1, 0.75, 0.15]))]
        (folder / 'texts' / f'{name}.txt').write_text('\n'.join(lines), encoding='utf-8')
    first, second = int(0.8 * n_clips), int(0.85 * n_clips)
    splits = {'train': names[:first], 'val': names[first:second], 'test': names[second:]}
    for split, ids in splits.items():
        (folder / f'{split}.txt').write_text('\n'.join(ids))


def write_clip_cache(folder):
    """text_clip.npz with random vectors, so that training finds all captions encoded."""
    captions = set()
    for path in folder.glob('*_captions.json'):
        captions |= {caption['text'] for caption in json.loads(path.read_text(encoding='utf-8'))}
    vectors = np.random.default_rng(0).standard_normal((len(captions), 512), dtype=np.float32)
    np.savez(folder / 'text_clip.npz', captions=sorted(captions), vectors=vectors)


def measure(title, folder, script, *arguments):
    """Run a script in the folder -> a row of the table. The peak is this one process's (wait4);
    pages of the memory map that it has touched count as its own."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(ROOT / script), *arguments], cwd=folder)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(f'{script} ended with exit code {process.returncode}')
    cpu = usage.ru_utime + usage.ru_stime
    return f'| {title} | {seconds:.1f} | {cpu:.1f} | {usage.ru_maxrss / 1024:,.0f} |'


def rehearse(folder, n_clips):
    source = folder / 'HumanML3D'
    start = time.perf_counter()
    write_source(source, n_clips)
    print(f'{n_clips:,} clips written in {time.perf_counter() - start:.0f} s', flush=True)

    config = str(ROOT / 'config' / 'hml3d.py')
    prepared = folder / 'data' / 'hml3d'
    rows = [measure('prepare_data.py hml3d', folder, 'prepare_data.py', 'hml3d',
                    f'--src={source}')]

    tiny = ['--vq_iters=2', '--vq_width=32', '--code_dim=32', '--vq_depth=1', '--vq_batch=32']
    rows.append(measure('train_vq.py, 2 steps and the token cache', folder, 'train_vq.py', config,
                        *tiny))
    write_clip_cache(prepared)
    start_only = ['--mask_iters=1', '--n_layers=1', '--batch_size=8']
    for encoder in ('hash', 'clip'):
        rows.append(measure(f'train_mask.py, start to exit, {encoder}, cached', folder,
                            'train_mask.py', config, f'--text_encoder={encoder}', *start_only))

    n_bytes = sum(path.stat().st_size for path in prepared.iterdir())
    print(f'\n{n_clips:,} clips; data/{prepared.name} takes {n_bytes / 1e9:.2f} GB on disk\n')
    print('| command | seconds | CPU seconds | peak memory, MB |')
    print('|---|---:|---:|---:|')
    print('\n'.join(rows))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--clips', type=int, default=23000)
    parser.add_argument('--dir', help='an empty folder outside the project, default a temporary')
    args = parser.parse_args()
    if args.dir:
        rehearse(Path(args.dir).resolve(), args.clips)
    else:
        with tempfile.TemporaryDirectory(prefix='hml3d-') as folder:
            rehearse(Path(folder), args.clips)
