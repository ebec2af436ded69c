"""Tests of lib/evaluator.py, train_eval.py, lib/report.py and lib/strata.py: the evaluator and its
training, the metrics, and what the evaluation scripts write. The golden tests need ../shared."""
import io
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import PROJECT, PYTHON, run_script
from scipy.interpolate import interp1d
from test_damage import sentence
from test_model import GOLDEN, each_dataset, needs_golden, root, worst

import momask
import prepare_data
from lib import evaluator as E
from lib import report, strata
from lib.data import Clips
from lib.evaluator import Evaluator, Words

SMALL = dict(movement=8, code=8, motion_hidden=12, text_hidden=10, out=6)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Evaluator(np.zeros(23), np.ones(23), Words(), **SMALL)


def rand(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# ------------------------------------------------------------------------------------------- golden


@needs_golden
@each_dataset
@torch.no_grad()
def test_golden_network(data):
    ev = momask.evaluator(root(data), data)
    with np.load(f'{GOLDEN}/{data}/evaluator.npz') as arrays:
        z = {k: torch.from_numpy(v) for k, v in arrays.items()}
    text = ev.text_encoder(z['word_embs'], z['pos_onehot'], z['cap_lens'])
    motion = ev.encode_motion(z['motion'], z['m_lens'])
    assert worst(text, z['text_embedding']) < 1e-5
    assert worst(motion, z['motion_embedding']) < 1e-5
    # embed_motion gives the same for raw features, for the clip that fills its tensor, as clips of
    # 196 frames do in the standard evaluation
    ev.config['max_frames'] = z['motion'].shape[1]
    embedding = ev.embed_motion(z['motion'] * ev.std + ev.mean, z['m_lens'])
    assert worst(embedding[0], z['motion_embedding'][0]) < 1e-5


@needs_golden
@each_dataset
def test_golden_metrics(data):
    with np.load(f'{GOLDEN}/{data}/metrics.npz') as z:
        assert abs(E.fid(z['real'], z['gen']) - z['fid']) < 1e-6
        assert np.abs(E.r_precision(z['text'], z['motion']) - z['r_precision']).max() < 1e-12
        assert abs(E.mm_dist(z['text'], z['motion']) - z['mm_dist']) < 1e-9
        error = E.mpjpe(z['pred_joints'], z['gt_joints'])
        assert np.abs(error - z['mpjpe_per_frame']).max() < 1e-6


@needs_golden
def test_word_lists_are_the_standard_ones():
    with open(f'{GOLDEN}/word_tags.json') as f:
        z = json.load(f)
    assert E.TAGS == z['pos_tags']
    assert {k: v.split() for k, v in E.VIP_WORDS.items()} == z['vip_words']


# --------------------------------------------------------------------------------------- embeddings


def test_order_batching_and_padding_do_not_matter(model):
    lengths = np.array([20, 8, 41, 196, 4, 200, 36])
    features = rand(7, 210, 23).astype(np.float32)
    whole = model.embed_motion(features, lengths)
    # the standard evaluation pads with zeros to 196 frames
    x = torch.zeros(1, 196, 23)
    x[0, :20] = torch.from_numpy(features[0, :20])
    assert worst(model.encode_motion(x, torch.tensor([20])), whole[:1]) < 1e-6
    for row, n in zip(features, lengths):
        row[n:] = np.nan
    order = np.array([3, 0, 6, 5, 1, 4, 2])
    assert worst(model.embed_motion(features[order], lengths[order], batch=2), whole[order]) < 1e-6


def test_a_caption_has_one_embedding(model):
    captions = ['walk/VERB', 'a/DET person/NOUN jump/VERB high/ADV', 'walk/VERB', '']
    text = model.embed_text(captions)
    assert torch.equal(text[0], text[2])
    assert worst(text[0], text[3]) > 1e-3
    assert worst(model.embed_text(captions[::-1], batch=2), text.flip(0)) < 1e-6


def test_zero_std_and_bad_motion(model):
    still = Evaluator(np.zeros(23), np.zeros(23), Words(), **SMALL)
    x = rand(2, 16, 23)
    assert torch.isfinite(still.embed_motion(x, [16, 12])).all()
    broken = x.copy()
    broken[1, 5, 3] = np.nan
    for motion, lengths in ((x, [16]), (x, [16, 3]), (x, [16, 17]), (broken, [16, 16])):
        with pytest.raises(ValueError):
            model.embed_motion(motion, lengths)


def test_save_load_round_trip(model, tmp_path):
    model.save(tmp_path / 'e.pt', 5, {'ev_steps': 5}, note='x')
    again = Evaluator.load(tmp_path / 'e.pt')
    assert torch.equal(again.embed_text(['run/VERB']), model.embed_text(['run/VERB']))
    x = rand(1, 8, 23)
    assert torch.equal(again.embed_motion(x, [8]), model.embed_motion(x, [8]))

    model.save(tmp_path / 'half.pt', 4, {'ev_steps': 5})
    torch.save({'model': 1}, tmp_path / 'other.pt')
    for name, fact in (('half.pt', '4 of 5'), ('other.pt', 'expected evaluator'), ('no.pt', '')):
        sentence(lambda: Evaluator.load(tmp_path / name), name, fact)


# -------------------------------------------------------------------------------------------- words


def tags_of(words, caption):
    _, tags, lengths = words.embed_captions([caption])
    assert (tags.sum(-1) == 1).all()
    return [E.TAGS[i] for i in tags[0].argmax(-1)[:lengths[0]]]


def test_word_and_tag_rules():
    words = Words()
    assert tags_of(words, 'walk/VERB left/ADJ person/NOUN or/CCONJ') == [
        'OTHER', 'Act_VIP', 'Loc_VIP', 'NOUN', 'OTHER', 'OTHER']
    long = ' '.join(f'w{i}/NOUN' for i in range(30))
    vectors, tags, lengths = words.embed_captions([long, ''])
    assert vectors.shape == (2, 22, 300) and tags.shape == (2, 22, 15)
    assert lengths.tolist() == [22, 2]
    for row, place, word in ((0, 21, 'eos'), (0, 20, 'w19'), (1, 2, 'unk')):
        assert np.array_equal(vectors[row, place], words.vector(word))
    # the same in every object and on every machine
    assert Words().vector('walk')[:2] == pytest.approx([-0.38018644, -0.04030117], abs=1e-6)
    sentence(lambda: words.embed_captions(['walk']), "'walk'")


def write_glove(folder, vocabulary=('unk', 'sos', 'eos', 'walk'), index=None):
    os.makedirs(folder, exist_ok=True)
    np.save(folder / 'our_vab_data.npy', rand(len(vocabulary), 300))
    index = index or {word: i for i, word in enumerate(vocabulary)}
    (folder / 'our_vab_words.pkl').write_bytes(pickle.dumps(list(vocabulary)))
    (folder / 'our_vab_idx.pkl').write_bytes(pickle.dumps(index))


class Code:
    """Creates a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ('was_executed',)


def test_glove(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_glove(tmp_path)
    words = Words(str(tmp_path))
    table = np.load('our_vab_data.npy').astype(np.float32)
    vectors = words.embed_captions(['walk/NOUN zebra/NOUN'])[0][0]
    assert np.array_equal(vectors[1:3], table[[3, 0]])   # zebra's are unk's
    assert tags_of(words, 'walk/NOUN zebra/NOUN') == ['OTHER', 'Act_VIP', 'OTHER', 'OTHER']
    sentence(lambda: Evaluator(np.zeros(23), np.ones(23), words, word_dim=50), '50-d', '300')

    write_glove(tmp_path, index={'unk': 0, 'sos': 1, 'eos': 2, 'walk': 9})
    sentence(lambda: Words(str(tmp_path)), 'our_vab', 'index 9')
    write_glove(tmp_path, vocabulary=('walk', 'unk'))
    sentence(lambda: Words(str(tmp_path)), 'our_vab', 'eos')
    for payload in (pickle.dumps([1, 2]), pickle.dumps({'walk': Code()}), b'\x80\x04junk', b''):
        (tmp_path / 'our_vab_idx.pkl').write_bytes(payload)
        sentence(lambda: Words(str(tmp_path)), 'our_vab_')
    assert not (tmp_path / 'was_executed').exists()
    (tmp_path / 'our_vab_idx.pkl').unlink()
    sentence(lambda: Words(str(tmp_path)), 'our_vab_idx.pkl')


# ------------------------------------------------- official files that are not what they should be


def write_official(root, change=lambda parts: None, dim=23):
    """Write random weights in the layout of the official ones."""
    model = Evaluator(np.zeros(dim), np.ones(dim), **SMALL)
    names = ('movement_encoder', 'text_encoder', 'motion_encoder')
    parts = {name: getattr(model, name).state_dict() for name in names}
    change(parts)
    for folder in ('t2m/text_mot_match/model', 't2m/Comp_v6_KLD005/meta'):
        (root / folder).mkdir(parents=True, exist_ok=True)
    torch.save(parts, root / 't2m/text_mot_match/model/finest.tar')
    for name in ('mean', 'std'):
        np.save(root / f't2m/Comp_v6_KLD005/meta/{name}.npy', np.ones(dim, dtype=np.float32))


def test_official_layout(tmp_path):
    write_official(tmp_path)
    ev = momask.evaluator(tmp_path, 't2m')
    assert ev.embed_motion(rand(1, 8, 23), [8]).shape == (1, 6)
    sentence(lambda: ev.embed_text(['walk/VERB']), 'our_vab_data.npy')
    write_glove(tmp_path / 'glove')
    assert momask.evaluator(tmp_path, 't2m').embed_text(['walk/VERB']).shape == (1, 6)
    sentence(lambda: momask.evaluator(tmp_path, 'kit'), 'kit')
    np.save(tmp_path / 't2m/Comp_v6_KLD005/meta/std.npy', np.ones(20))
    sentence(lambda: momask.evaluator(tmp_path, 't2m'), 'std.npy', '23')


@pytest.mark.parametrize('fact, change', [
    ('text_encoder', lambda p: p.pop('text_encoder')),
    ('gru.bias_hh_l0', lambda p: p['text_encoder'].pop('gru.bias_hh_l0')),
    ('tensor extra', lambda p: p['text_encoder'].update(extra=torch.zeros(1))),
    ('(3, 4)', lambda p: p['motion_encoder'].update({'input_emb.weight': torch.zeros(3, 4)})),
    ('finest.tar', lambda p: p['movement_encoder'].update({'main.0.weight': 'x'})),
    ('code', lambda p: p.update(movement_encoder=Code()))])
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_official_weights_must_fit_and_no_code_is_run(tmp_path, monkeypatch, fact, change):
    monkeypatch.chdir(tmp_path)
    write_official(tmp_path, change)
    sentence(lambda: momask.evaluator(tmp_path, 't2m'), 'finest.tar', fact)
    (tmp_path / 't2m/text_mot_match/model/finest.tar').write_bytes(pickle.dumps(Code()))
    sentence(lambda: momask.evaluator(tmp_path, 't2m'), 'finest.tar')
    assert not (tmp_path / 'was_executed').exists()


# ------------------------------------------------------------------------------------------ metrics


def test_fid():
    a = rand(200, 8)
    assert E.fid(a, a + 2) == pytest.approx(32, abs=1e-8)
    for n, m, d in ((2, 2, 64), (5, 5, 512), (3, 4, 1)):   # fewer vectors than dimensions
        x, y = rand(n, d), rand(m, d, seed=1)
        assert np.isfinite(E.fid(x, y)) and E.fid(x, y) > 0
        assert E.fid(x, x) < 1e-6
    for wrong in (a[:1], np.full((4, 8), np.nan)):
        with pytest.raises(ValueError):
            E.fid(wrong, a)


def test_r_precision():
    """Shifted by one within each batch of 32, a text's own motion is second. The partial batch is
    dropped. A wrong motion with the same caption is right. A collapsed network scores 0."""
    text = np.eye(80)
    shifted = -text
    for k in (0, 32):
        shifted[k:k + 32] = text[k:k + 32] * 0.4 + np.roll(text[k:k + 32], 1, axis=0) * 0.6
    assert E.r_precision(text, shifted).tolist() == [0, 1, 1]
    same = ['first', 'first', *map(str, range(78))]
    swapped = text[[1, 0, *range(2, 80)]]
    assert E.r_precision(text, swapped)[0] == pytest.approx(62 / 64)
    assert E.r_precision(text, swapped, same=same).tolist() == [1, 1, 1]
    assert not E.r_precision(0 * text, 0 * text).any()
    with pytest.raises(ValueError, match='at least 32'):
        E.r_precision(text[:31], text[:31])


def test_small_metrics():
    rng = np.random.default_rng
    x = rand(50, 4)
    assert E.mm_dist(x, x + [3, 0, 4, 0]) == pytest.approx(5)
    assert E.diversity(x, rng(1)) == E.diversity(x, rng(1)) > 0
    assert E.multimodality(np.repeat(rand(5, 1, 4), 30, axis=1), rng(1)) == 0
    assert E.multimodality(rand(5, 30, 4), rng(0)) == pytest.approx(8 ** 0.5, abs=0.5)
    with pytest.raises(ValueError):   # fewer than ten
        E.multimodality(rand(5, 5, 4), rng(0))
    joints = rand(6, 22, 3)
    assert E.mpjpe(joints + [1, 2, 3], joints).max() < 1e-12   # moving the whole body is no error
    mean, half = E.interval([[1.0, 5.0], [3.0, 5.0]])
    assert mean.tolist() == [2, 5]
    assert half == pytest.approx([1.96 / 2 ** 0.5, 0])


# ---------------------------------------------------------------- training it: train_eval.py on toy

COMMAND = ('train_eval.py --data=toy --ev_steps=60 --ev_ae_steps=20 --ev_eval_every=60 '
           '--ev_movement=32 --ev_code=32 --ev_motion_hidden=32 --ev_text_hidden=32 --ev_out=32 '
           '--ev_batch=32 --ev_lr=5e-3 --dtype=float32').split()


@pytest.fixture(scope='module')
def judge_folder(tmp_path_factory):
    """A few hundred toy clips, and an evaluator that was trained on them."""
    folder = tmp_path_factory.mktemp('judge')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare_data.prepare_toy('data/toy', sizes=dict(train=300, val=64, test=96))
    code, _, err = run_script(folder, *COMMAND)
    assert code == 0, err
    return folder


def noisy(motions, level, std, rng):
    """With noise of `level` standard deviations of each feature."""
    noise = (level * std * rng.standard_normal(motion.shape) for motion in motions)
    return [motion + x.astype(np.float32) for motion, x in zip(motions, noise)]


def warped(motions, level, std, rng):
    """Played at a speed of 1 + level cos(one turn over the clip), velocities included."""
    out = []
    for x in motions:
        T, D = x.shape
        phase = rng.uniform(0, 2 * np.pi)
        u = np.linspace(0, 2 * np.pi, T)
        played = u + level * (np.sin(u + phase) - np.sin(phase))
        frame = (played / (2 * np.pi) * (T - 1)).clip(0, T - 1)
        y = interp1d(np.arange(T), x, axis=0)(frame).astype(np.float32)
        speed = np.float32(1 + level * np.cos(u + phase))[:, None]
        y[:, :3] *= speed                      # root yaw and ground velocity
        y[:, -4 - (D + 1) // 4:-4] *= speed    # joint velocities, 3 J of them
        out.append(y)
    return out


def replaced(motions, share, std, rng):
    """With this share of them replaced by one of eight."""
    few = rng.permutation(len(motions))[:8]
    return [motions[rng.choice(few)] if rng.random() < share else motion for motion in motions]


@pytest.mark.parametrize('damage, levels', [
    (noisy, (0.0, 0.1, 0.2, 0.4, 0.8)), (warped, (0.0, 0.3, 0.6, 0.9)),
    (replaced, (0.0, 0.25, 0.5, 1.0))])
def test_fid_rises_with_damage(judge_folder, damage, levels):
    model = Evaluator.load(judge_folder / 'out' / 'toy' / 'evaluator.pt')
    clips = Clips(str(judge_folder / 'data' / 'toy'), 'test')
    rows = torch.arange(len(clips))
    _, first, frames = clips.draw(rows, torch.Generator().manual_seed(0), crop=False)
    motions = clips.features(first, frames)
    embeddings = []
    for level in levels:
        worse = damage(motions, level, model.std.numpy(), np.random.default_rng(0))
        embeddings.append(model.embed_motion(worse, [len(motion) for motion in worse]))
    fids = [E.fid(embeddings[0], embedding) for embedding in embeddings]
    assert fids[0] < 1e-3
    assert (np.diff(fids) > 0).all(), fids


def test_right_captions_are_nearer_and_a_finished_run_can_be_resumed(judge_folder):
    path = judge_folder / 'out' / 'toy' / 'evaluator.json'
    figures = json.loads(path.read_text())
    assert figures['r_precision'][2] > 2 * figures['r_precision_shuffled'][2]
    code, _, err = run_script(judge_folder, *COMMAND, '--init_from=resume')
    assert code == 0, err
    assert json.loads(path.read_text())['r_precision'] == figures['r_precision']


# ------------------------------------------------------------------------------- tables and strata


def test_results_are_written_and_shown(tmp_path, monkeypatch):
    path = tmp_path / 'eval.json'
    report.refuse_other_files(path)
    rows = {'full': {'FID': (np.float64(1.5), np.nan)}}
    report.write_results(path, rows=rows, per_repeat=[], settings={})
    assert json.loads(path.read_text())['rows'] == {'full': {'FID': [1.5, None]}}
    report.refuse_other_files(path)   # its own file may be replaced
    for name, content in (('vq.pt', b'PK\3\4'), ('notes.json', b'{"title": 1}'), ('l.json', b'[]'),
                          ('/dev/full', b'')):   # reading it would never end
        (tmp_path / name).write_bytes(content)
        sentence(lambda: report.refuse_other_files(tmp_path / name), name)

    out = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    monkeypatch.setattr(sys, 'stdout', out)
    report.say('1.5 ±0.1')
    assert out.buffer.getvalue() == b'1.5 ?0.1\n'


def test_a_closed_pipe_is_no_error(tmp_path):
    code = ('from lib.report import say\n'
            'for i in range(20_000): say("a line that nothing reads")\n'
            'import sys; print("done", file=sys.stderr)\n')
    writer = subprocess.Popen([*PYTHON, '-c', code], cwd=PROJECT, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)
    writer.stdout.readline()
    writer.stdout.close()
    assert writer.stderr.read() == 'done\n' and writer.wait() == 0


def test_strata():
    texts = ['a person walks', 'someone jumps and stands', 'a person stands'] * 10
    joints = [rand(20 + i, 22, 3, seed=i) * (1 + i) for i in range(30)]
    parts = strata.clip_strata(texts, joints)
    assert [parts[name].min() for name in ('simple', 'medium', 'complex')] == [0, 10, 20]
    assert set(parts['dynamic']) == set(range(1, 30, 3))   # also where both kinds are mentioned
    emb = {'real motion': rand(30, 4), 'full': rand(30, 4, seed=1)}
    one, two = (strata.strata_fids([(emb, parts)] * n)['full'] for n in (1, 2))
    assert one['FID complex'] == pytest.approx(E.fid(emb['real motion'][20:], emb['full'][20:]))
    assert two['FID complex'] != one['FID complex']


def test_errors_by_speed():
    """The error of this model is the speed: quarters and correlations show it, and masks of low
    confidence hide the fast tokens."""
    valid = torch.arange(40) < torch.tensor([40, 24])[:, None]
    speed = torch.from_numpy(rand(2, 40)).exp().float()
    batch = dict(ids=torch.zeros(2, 40, dtype=torch.long), valid=valid, speed=speed, omega=-speed,
                 velocity=speed ** 2, confidence=-speed)

    def log_probabilities(batch, masked):
        assert ((masked == 8) <= valid).all()
        return -speed[..., None].expand(2, 40, 8)

    rows = strata.error_by_speed([batch], log_probabilities, MASK=8)
    assert [*rows] == [f'{kind} {share}%' for kind in ('uniform', 'confidence')
                       for share in (30, 60, 90)]
    uniform = rows['uniform 90%']
    quarters = [uniform[name] for name in strata.QUARTERS]
    assert quarters == sorted(quarters) and quarters[0] < uniform['all'] < quarters[3]
    assert uniform['rho speed'] == pytest.approx(1) and uniform['rho omega'] == pytest.approx(-1)
    assert rows['confidence 30%']['all'] > rows['uniform 30%']['all'] + 0.1
    assert strata.hide_lowest(-speed, 0.3, valid).sum(1).tolist() == [12, 7]
    walk = np.zeros((9, 22, 3))
    walk[..., 0] = 0.05 * np.arange(9)[:, None]
    assert strata.token_speed(walk, fps=20) == pytest.approx([1, 1])
