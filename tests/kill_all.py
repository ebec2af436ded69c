"""Kill training as often as one likes, at any moment, and see that nothing is lost:

    python tests/kill_all.py [--kills=20] [--stages=vq,mask,res,len]

Every stage is trained on a tiny data set in one go, and again with so many SIGKILLs, each followed
by --init_from=resume. The two must end with the same bits: weights, optimizer, random states,
history. Whenever it is killed, the checkpoints that lie there must load. Where it is killed is
chance, but half of the kills come right after a file of the run has appeared or changed.
"""
import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import PROJECT, become, server
from test_train import CONFIG, TINY, train, write_data

sys.path.insert(0, PROJECT)
from lib import runtime

STEPS = {'vq': '--vq_iters={0} --vq_eval_every=4'}
for stage in ('mask', 'res', 'len'):
    STEPS[stage] = f'--{stage}_iters={{0}} --eval_every=4'


def begin(folder, *command):
    """A script in a process of its own, which gets a signal as a new interpreter would."""
    log = str(folder / 'log')
    open(log, 'w').close()
    argv = [os.path.join(PROJECT, command[0]), *command[1:]]
    process = server.Process(target=become, args=(str(folder), argv, {}, log, log))
    process.start()
    return process


def finish(folder, *command):
    process = begin(folder, *command)
    process.join(300)
    assert process.exitcode == 0, (folder / 'log').read_text()


def look(out, stage, watched):
    """Names and times of the files that are watched; every checkpoint must load."""
    for file in out.glob(f'{stage}*.pt'):
        runtime.load(file, '', stage)
    times = {}
    for path in out.glob(watched):
        with contextlib.suppress(FileNotFoundError):   # it has just taken its place
            times[path.name] = path.stat().st_mtime_ns
    return times


def kill_and_resume(folder, stage, kills, steps, seed=0):
    """Train `stage` in out/whole in one go and in out/cut with kills -> (kills that met a run at
    work, the steps that were in the checkpoint at each)."""
    rng = random.Random(seed)
    outs = [folder / 'out' / f'{stage}_{name}' for name in ('whole', 'cut')]
    for out in outs:
        os.makedirs(out)
        if stage != 'vq':
            shutil.copy(folder / 'out' / 'tiny' / 'vq.pt', out)
    whole, cut = ([*train(stage), f'--out_dir={out}', *STEPS[stage].format(steps).split()]
                  for out in outs)
    finish(folder, *whole)

    last = outs[1] / f'{stage}_last.pt'
    done = []
    while len(done) < kills:
        command = [*cut, '--init_from=resume' if last.exists() else '--overwrite=True']
        watched = rng.choice([f'*{stage}*.pt*', last.name])   # also what is half written
        there = look(outs[1], stage, watched)
        process = begin(folder, *command)
        patience = time.monotonic() + 60
        while look(outs[1], stage, watched) == there and process.is_alive():
            assert time.monotonic() < patience
            time.sleep(0.001)
        time.sleep(rng.choice([0, 0.15]) * rng.random())
        process.kill()
        process.join()
        look(outs[1], stage, watched)
        if process.exitcode != -signal.SIGKILL:   # it was faster
            assert process.exitcode == 0, (folder / 'log').read_text()
            break
        done.append(torch.load(last)['it'] if last.exists() else 0)
    finish(folder, *cut, '--init_from=resume' if last.exists() else '--overwrite=True')

    for name in (f'{stage}.pt', f'{stage}_last.pt'):
        one, two = (torch.load(out / name) for out in outs)
        for checkpoint in (one, two):
            del checkpoint['settings']   # these say where the run lies
            checkpoint.pop('vq', None)
        assert same(one, two), f'{name} differs after kills at {done}'
    assert not list(outs[1].glob('.*.tmp'))
    return done


def same(a, b):
    """The same numbers in nested dicts and lists?"""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--stages', default='vq,mask,res,len')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.makedirs(folder / 'config')
        (folder / CONFIG).write_text(TINY)
        write_data(str(folder / 'data' / 'tiny'))
        finish(folder, *train('vq'))
        for stage in args.stages.split(','):
            start = time.time()
            done = kill_and_resume(folder, stage, args.kills, steps=16 * args.kills)
            print(f'{stage}: {len(done)} of {args.kills} kills, with step {done} saved; the end is '
                  f'the same to the bit; {time.time() - start:.0f} s', flush=True)


if __name__ == '__main__':
    main()
