"""Tests of train_eval.py: it learns, it resumes exactly, and FID rises with damage to motion."""
import json
import os

import numpy as np
import pytest
import torch
from conftest import PROJECT, run_script

import prepare_data
from lib import data
from lib.configurator import UserError
from lib.evaluator import Evaluator, fid, r_precision

SIZES = ('--ev_movement=32 --ev_code=32 --ev_motion_hidden=32 --ev_text_hidden=32 --ev_out=32 '
         '--ev_batch=32 --ev_lr=5e-3 --dtype=float32').split()
CUT = '''
import runpy
import sys

from lib import runtime

save, wanted = runtime.save, int(sys.argv[1])


def save_and_stop(checkpoint, path):
    global wanted
    save(checkpoint, path)
    wanted -= path.endswith('_last.pt')
    if not wanted:
        sys.exit(0)


runtime.save = save_and_stop
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name='__main__')
'''


def write_data(folder):
    """Noise in which each of four actions raises features of its own."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    counts = dict(train=80, val=40, test=40)
    for split, n in counts.items():
        clips = []
        for i in range(n):
            x = rng.standard_normal((int(rng.integers(16, 60)), 263)).astype(np.float32)
            x[:, 4 + 30 * (i % 4):34 + 30 * (i % 4)] += 2
            act = ['walk', 'jump', 'kick', 'sit'][i % 4]
            captions = [dict(text=f'a person {act}s', tokens=f'a/DET person/NOUN {act}/VERB'),
                        dict(text=f'someone {act}s', tokens=f'someone/PRON {act}/VERB')]
            clips.append((f'{split}{i}', x, captions))
        data.save_split(folder, split, clips)
    meta = dict(name='fake', dim=263, fps=20, counts=counts, skeleton='smpl22', n_joints=22,
                max_frames=196, units_per_metre=1)
    data.save_meta(folder, meta, np.zeros(263), np.ones(263))


def test_training_and_resuming(tmp_path):
    """It learns. A run that is cut in both stages resumes to the same bits, and its evaluator.pt is
    refused until it is finished."""
    write_data(tmp_path / 'data' / 'fake')
    (tmp_path / 'cut.py').write_text(CUT)
    script = os.path.join(PROJECT, 'train_eval.py')
    steps = ['--ev_steps=30', '--ev_ae_steps=6', '--ev_eval_every=5']
    command = [script, '--data=fake', *steps, *SIZES]

    def run(*words):
        code, _, err = run_script(tmp_path, *words)
        assert code == 0, err

    run(*command, '--out_dir=whole')
    with open(tmp_path / 'whole' / 'evaluator.json') as f:
        figures = json.load(f)
    assert figures['r_precision'][2] > max(0.7, figures['r_precision_shuffled'][2])

    cut = [str(tmp_path / 'cut.py'), '2', *command, '--out_dir=cut']
    run(*cut[:1], '1', *cut[2:])                        # after 5 steps of the first stage
    run(*cut, '--init_from=resume')                     # after 10 of the second
    with pytest.raises(UserError, match='evaluator.pt.* of 30'):
        Evaluator.load(tmp_path / 'cut' / 'evaluator.pt')
    run(*command, '--out_dir=cut', '--init_from=resume')
    for name in ('evaluator.pt', 'evaluator_last.pt'):
        one, two = (torch.load(tmp_path / folder / name) for folder in ('whole', 'cut'))
        assert one['it'] == two['it'] == 30
        assert all(torch.equal(x, two['model'][key]) for key, x in one['model'].items())
    run(*command, '--out_dir=cut', '--init_from=resume')   # nothing is left to train
    with open(tmp_path / 'cut' / 'evaluator.json') as f:
        assert json.load(f)['r_precision'] == figures['r_precision']


# -------------------------------------------------------------------------------------- damage


@pytest.fixture(scope='module')
def judged(tmp_path_factory):
    """An evaluator trained on a few hundred toy clips, test clips, captions, and embeddings."""
    folder = str(tmp_path_factory.mktemp('judge'))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare_data.prepare_toy('data/toy', sizes=dict(train=300, val=64, test=96))
    code, _, err = run_script(folder, 'train_eval.py', '--data=toy', '--ev_steps=60',
                              '--ev_ae_steps=20', '--ev_eval_every=60', *SIZES)
    assert code == 0, err
    model = Evaluator.load(os.path.join(folder, 'out', 'toy', 'evaluator.pt'))
    clips = data.Clips(os.path.join(folder, 'data', 'toy'), 'test')
    rows = torch.randperm(len(clips), generator=torch.Generator().manual_seed(0))
    captions, first, frames = clips.draw(rows, torch.Generator().manual_seed(0), crop=False)
    motions = clips.features(first, frames)
    texts = [clips.split.captions[i] for i in captions]
    return model, motions, texts, embed(model, motions)


def embed(model, motions):
    return model.embed_motion(motions, [len(motion) for motion in motions]).numpy()


def add_noise(model, motions, real, level, rng):
    """Add noise of `level` standard deviations of each feature."""
    std = model.std.numpy()
    noisy = [motion + level * std * rng.standard_normal(motion.shape) for motion in motions]
    return embed(model, [motion.astype(np.float32) for motion in noisy])


def warp_time(model, motions, real, level, rng):
    """Play each clip at a speed of 1 + level * cos(one turn over the clip), velocities included."""
    return embed(model, [warp(motion, level, rng.uniform(0, 2 * np.pi)) for motion in motions])


def wrong_motions(model, motions, real, level, rng):
    """Answer this share of the prompts with one of eight other motions."""
    replaced = rng.permutation(len(real))[:int(level * len(real))]
    out = real.copy()
    out[replaced] = real[np.resize(rng.choice(len(real), 8, replace=False), len(replaced))]
    return out


def warp(x, strength, phase):
    """x (T, D) played at a varying speed; the duration stays."""
    T, D = x.shape
    u = np.linspace(0, 2 * np.pi, T)
    played = u + strength * (np.sin(u + phase) - np.sin(phase))
    t = played / (2 * np.pi) * (T - 1)
    low = t.astype(int).clip(0, T - 2)
    share = np.float32(t - low)[:, None]
    y = x[low] * (1 - share) + x[low + 1] * share
    speed = np.float32(1 + strength * np.cos(u + phase))[:, None]
    y[:, :3] *= speed                      # root yaw and ground velocity
    y[:, -4 - (D + 1) // 4:-4] *= speed    # joint velocities, 3 J of them
    return y


@pytest.mark.parametrize('damage, levels', [
    (add_noise, (0.0, 0.1, 0.2, 0.4, 0.8)), (warp_time, (0.0, 0.3, 0.6, 0.9)),
    (wrong_motions, (0.0, 0.25, 0.5, 1.0))])
def test_fid_rises_with_damage(judged, damage, levels):
    model, motions, _, real = judged
    fids = [fid(real, damage(model, motions, real, level, np.random.default_rng(0)))
            for level in levels]
    assert fids[0] < 1e-3
    assert (np.diff(fids) > 0).all(), fids


def test_right_captions_are_nearer_than_wrong_ones(judged):
    model, _, texts, real = judged
    text = model.embed_text([caption['tokens'] for caption in texts]).numpy()
    same = [caption['text'] for caption in texts]
    assert r_precision(text, real, same=same)[2] > 2 * r_precision(text[::-1], real)[2]
