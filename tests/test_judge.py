"""Tests of train_eval.py: its evaluator tells right from wrong captions, FID rises with damage to
motion, and a finished run can be resumed. tests/test_kill.py kills and resumes it."""
import json

import numpy as np
import pytest
import torch
from conftest import run_script

import prepare_data
from lib import data
from lib.evaluator import Evaluator, fid, r_precision

COMMAND = ('train_eval.py --data=toy --ev_steps=60 --ev_ae_steps=20 --ev_eval_every=60 '
           '--ev_movement=32 --ev_code=32 --ev_motion_hidden=32 --ev_text_hidden=32 --ev_out=32 '
           '--ev_batch=32 --ev_lr=5e-3 --dtype=float32').split()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A few hundred toy clips, and an evaluator that was trained on them."""
    folder = tmp_path_factory.mktemp('judge')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare_data.prepare_toy('data/toy', sizes=dict(train=300, val=64, test=96))
    code, _, err = run_script(folder, *COMMAND)
    assert code == 0, err
    return folder


@pytest.fixture(scope='module')
def judged(folder):
    """The evaluator, test clips, captions, and embeddings."""
    model = Evaluator.load(folder / 'out' / 'toy' / 'evaluator.pt')
    clips = data.Clips(str(folder / 'data' / 'toy'), 'test')
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


def test_a_finished_run_can_be_resumed(folder):
    path = folder / 'out' / 'toy' / 'evaluator.json'
    figures = json.loads(path.read_text())
    assert figures['r_precision'][2] > 2 * figures['r_precision_shuffled'][2]
    code, _, err = run_script(folder, *COMMAND, '--init_from=resume')
    assert code == 0, err
    assert json.loads(path.read_text())['r_precision'] == figures['r_precision']
