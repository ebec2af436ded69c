"""Kill training many times, at random moments, and check that nothing is lost:

    python tests/kill_all.py [--kills=20] [--stages=vq,mask,res,len,eval]

Every stage is trained twice on a tiny data set: once without interruption, and once with SIGKILLs,
each followed by --init_from=resume. Both runs must end with the same bits: weights, optimizer,
random states, history. After every kill, the checkpoints in the folder must load. The moment of a
kill is random, but half of the kills come right after a file of the run has appeared or changed.
"""
import argparse
import contextlib
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import torch
from conftest import PROJECT, become, server
from test_train import out_dir, run, train, write_folder

from lib import runtime

FEW = '''
vq_iters = mask_iters = res_iters = len_iters = ev_steps = {steps}
vq_eval_every = eval_every = ev_eval_every = 4
ev_ae_steps = 8
'''


def begin(folder, *command):
    """Start a script in its own process, which receives signals as a new interpreter would."""
    log = str(folder / 'log')
    open(log, 'w').close()
    argv = [os.path.join(PROJECT, command[0]), *command[1:]]
    process = server.Process(target=become, args=(str(folder), argv, {}, log, log))
    process.start()
    return process


def file_times(out, stage, watched):
    """{name: time of the last change} of the watched files. Every checkpoint must load."""
    for file in out.glob(f'{stage}*.pt'):
        runtime.load(file, '', stage)
    times = {}
    for path in out.glob(watched):
        with contextlib.suppress(FileNotFoundError):   # it was renamed in the meantime
            times[path.name] = path.stat().st_mtime_ns
    return times


def kill_and_resume(folder, stage, kills, steps, seed=0):
    """Train `stage` in out/whole without interruption and in out/cut with kills. Returns, for each
    kill that hit a running process, the step of the checkpoint at that time."""
    rng = random.Random(seed)
    (folder / 'config' / 'few.py').write_text(FEW.format(steps=steps))
    outs = [out_dir(folder, f'{stage}_{name}', *['vq.pt'][stage == 'vq':])
            for name in ('whole', 'cut')]
    whole, cut = ([*train(stage), 'config/few.py', f'--out_dir={out}'] for out in outs)
    run(folder, *whole)

    stage = 'evaluator' if stage == 'eval' else stage   # from here on, the name of its files
    out = folder / outs[1]
    last = out / f'{stage}_last.pt'

    def next_command():
        return [*cut, '--init_from=resume' if last.exists() else '--overwrite=True']

    done = []
    while len(done) < kills:
        watched = rng.choice([f'*{stage}*.pt*', last.name])   # the first includes unfinished files
        before = file_times(out, stage, watched)
        process = begin(folder, *next_command())
        deadline = time.monotonic() + 60
        while file_times(out, stage, watched) == before and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(rng.choice([0, 0.15]) * rng.random())
        process.kill()
        process.join()
        file_times(out, stage, watched)
        if process.exitcode != -signal.SIGKILL:   # the run ended before the signal
            assert process.exitcode == 0, (folder / 'log').read_text()
            break
        done.append(torch.load(last)['it'] if last.exists() else 0)
    run(folder, *next_command())

    for name in (f'{stage}.pt', last.name):
        one, two = (torch.load(folder / out / name) for out in outs)
        assert one.keys() == two.keys()
        for key in one.keys() - {'settings', 'vq'}:   # these name the folder
            assert same(one[key], two[key]), f'{key} in {name} differs after kills at {done}'
    assert not list(out.glob('.*.tmp'))
    return done


def same(a, b):
    """Do two nested dicts and lists hold the same numbers?"""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return same([*a.items()], [*b.items()])
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--stages', default='vq,mask,res,len,eval')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_folder(folder)
        run(folder, *train('vq'), '--out_dir=out/tiny')
        for stage in args.stages.split(','):
            start = time.time()
            done = kill_and_resume(folder, stage, args.kills, steps=16 * args.kills)
            print(f'{stage}: {len(done)} of {args.kills} kills, at the saved steps {done}; the '
                  f'final bits are the same; {time.time() - start:.0f} s', flush=True)
