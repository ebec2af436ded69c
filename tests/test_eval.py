"""Tests of lib/evaluator.py and train_eval.py. The golden ones need ../shared, which a bare clone
does not have."""
import json
import os
import pickle

import numpy as np
import pytest
import torch
from conftest import PROJECT, PYTHON, run_script

from lib import data
from lib import evaluator as E
from lib.configurator import UserError
from lib.evaluator import Evaluator, Words

GOLDEN = os.path.join(PROJECT, '..', 'shared', 'golden')
golden = pytest.mark.skipif(not os.path.isdir(GOLDEN), reason='no ../shared/golden here')
each = pytest.mark.parametrize('name', ['t2m', 'kit'])
SMALL = dict(movement=8, code=8, motion_hidden=12, text_hidden=10, out=6)
HASHED_WALK = [-0.38018644, -0.04030117]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Evaluator(np.zeros(23), np.ones(23), Words(), **SMALL)


def rand(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# ------------------------------------------------------------------------------------------- golden


@golden
@each
def test_golden_network(name):
    import momask
    ev = momask.evaluator(f'{GOLDEN}/{name}/momask_checkpoints', name)
    arrays = np.load(f'{GOLDEN}/{name}/evaluator.npz')
    z = {k: torch.from_numpy(v) for k, v in arrays.items()}
    with torch.no_grad():
        text = ev.text_encoder(z['word_embs'], z['pos_onehot'], z['cap_lens'])
        motion = ev.encode_motion(z['motion'], z['m_lens'])
    assert (text - z['text_embedding']).abs().max() < 1e-5
    assert (motion - z['motion_embedding']).abs().max() < 1e-5
    # embed_motion gives the same for raw features, for the clip that fills its tensor, as clips of
    # 196 frames do in the standard evaluation
    ev.config['max_frames'] = z['motion'].shape[1]
    raw = z['motion'] * ev.std + ev.mean
    embedding = ev.embed_motion(raw, z['m_lens'])
    assert (embedding[0] - z['motion_embedding'][0]).abs().max() < 1e-5


@golden
@each
def test_golden_metrics(name):
    z = np.load(f'{GOLDEN}/{name}/metrics.npz')
    assert abs(E.fid(z['real'], z['gen']) - z['fid']) < 1e-6
    r = E.r_precision(z['text'], z['motion'])
    assert np.abs(r - z['r_precision']).max() < 1e-12
    assert abs(E.mm_dist(z['text'], z['motion']) - z['mm_dist']) < 1e-9
    error = E.mpjpe(z['pred_joints'], z['gt_joints'])
    assert np.abs(error - z['mpjpe_per_frame']).max() < 1e-6


@golden
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
    order = np.array([3, 0, 6, 5, 1, 4, 2])
    shuffled = model.embed_motion(features[order], lengths[order], batch=2)
    assert torch.allclose(shuffled, whole[order], atol=1e-6)
    dirty = features.copy()
    for row, n in zip(dirty, lengths):
        row[n:] = np.nan
    assert torch.allclose(model.embed_motion(dirty, lengths), whole, atol=1e-6)
    single = [model.embed_motion([f[:n]], [n]) for f, n in zip(features, lengths)]
    assert torch.allclose(torch.cat(single), whole, atol=1e-6)
    # the standard evaluation pads with zeros to 196 frames
    x = torch.zeros(1, 196, 23)
    x[0, :20] = torch.from_numpy(features[0, :20])
    assert torch.allclose(model.encode_motion(x, torch.tensor([20])), whole[:1], atol=1e-6)
    assert model.embed_motion([], []).shape == (0, 6)


def test_a_caption_has_one_embedding(model):
    captions = ['walk/VERB', 'a/DET person/NOUN jump/VERB high/ADV', 'sit/VERB down/ADV',
                'walk/VERB', '']
    text = model.embed_text(captions)
    assert text.shape == (5, 6)
    assert torch.equal(text[0], text[3])
    assert not torch.allclose(text[0], text[4])
    assert torch.allclose(model.embed_text(captions[::-1], batch=2), text.flip(0), atol=1e-6)
    assert model.embed_text([]).shape == (0, 6)


def test_zero_std_and_bad_motion(model):
    still = Evaluator(np.zeros(23), np.zeros(23), Words(), **SMALL)
    assert torch.isfinite(still.embed_motion(rand(2, 16, 23), [16, 12])).all()
    x = rand(2, 16, 23)
    with pytest.raises(ValueError, match='reads .T, 23. features'):
        model.embed_motion(x[..., :20], [16, 16])
    with pytest.raises(ValueError, match='2 motions but 1 lengths'):
        model.embed_motion(x, [16])
    for length in (3, 17):
        with pytest.raises(ValueError, match=f'length {length}'):
            model.embed_motion(x, [16, length])
    x[1, 5, 3] = np.nan
    with pytest.raises(ValueError, match='motion 1 holds NaN'):
        model.embed_motion(x, [16, 16])


def test_save_load_round_trip(model, tmp_path):
    model.save(tmp_path / 'e.pt', 5, {'ev_steps': 5}, note='x')
    again = Evaluator.load(tmp_path / 'e.pt')
    assert os.listdir(tmp_path) == ['e.pt']
    assert torch.equal(again.embed_text(['run/VERB']), model.embed_text(['run/VERB']))
    x = rand(1, 8, 23)
    assert torch.equal(again.embed_motion(x, [8]), model.embed_motion(x, [8]))
    model.save(tmp_path / 'e.pt', 4, {'ev_steps': 5})
    with pytest.raises(UserError, match='e.pt has been trained for 4 of 5 steps'):
        Evaluator.load(tmp_path / 'e.pt')
    with pytest.raises(UserError, match='no.pt is missing'):
        Evaluator.load(tmp_path / 'no.pt')
    torch.save({'model': 1}, tmp_path / 'other.pt')
    with pytest.raises(UserError, match='other.pt holds something else, expected evaluator'):
        Evaluator.load(tmp_path / 'other.pt')


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
    assert vectors.shape == (2, 22, 300)
    assert tags.shape == (2, 22, 15)
    assert lengths.tolist() == [22, 2]
    assert np.array_equal(vectors[0, 21], words.vector('eos'))
    assert np.array_equal(vectors[0, 20], words.vector('w19'))
    assert np.array_equal(vectors[1, 2], words.vector('unk'))
    # the same in every object and on every machine
    assert np.array_equal(Words().vector('walk'), words.vector('walk'))
    assert Words().vector('walk')[:2] == pytest.approx(HASHED_WALK, abs=1e-6)
    with pytest.raises(UserError, match="'walk'.*no tag"):
        words.embed_captions(['walk'])


def write_glove(folder, vocabulary=('unk', 'sos', 'eos', 'walk'), index=None):
    np.save(folder / 'our_vab_data.npy', rand(len(vocabulary), 300))
    index = index or {word: i for i, word in enumerate(vocabulary)}
    (folder / 'our_vab_words.pkl').write_bytes(pickle.dumps(list(vocabulary)))
    (folder / 'our_vab_idx.pkl').write_bytes(pickle.dumps(index))


class Code:
    def __reduce__(self):
        return os.mkdir, ('was_executed',)


def test_glove(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_glove(tmp_path)
    words = Words(str(tmp_path))
    table = np.load('our_vab_data.npy').astype(np.float32)
    vectors = words.embed_captions(['walk/NOUN zebra/NOUN'])[0][0]
    assert np.array_equal(vectors[1], table[3])
    assert np.array_equal(vectors[2], table[0])   # unk's
    assert tags_of(words, 'walk/NOUN zebra/NOUN') == ['OTHER', 'Act_VIP', 'OTHER', 'OTHER']
    with pytest.raises(UserError, match='50-d word vectors.*300'):
        Evaluator(np.zeros(23), np.ones(23), words, word_dim=50)

    def refuses(sentence):
        with pytest.raises(UserError, match=sentence) as e:
            Words(str(tmp_path))
        assert '\n' not in str(e.value)

    write_glove(tmp_path, index={'unk': 0, 'sos': 1, 'eos': 2, 'walk': 9})
    refuses('do not fit together.*index 9')
    write_glove(tmp_path, vocabulary=('walk', 'unk'))
    refuses('do not fit together.*eos')
    for wrong in ([1, 2], 3, 'text'):
        (tmp_path / 'our_vab_idx.pkl').write_bytes(pickle.dumps(wrong))
        refuses('do not fit together')
    for payload in (pickle.dumps({'walk': Code()}), b'\x80\x04junk', b''):
        (tmp_path / 'our_vab_idx.pkl').write_bytes(payload)
        refuses('our_vab_idx.pkl was not loaded')
    assert not (tmp_path / 'was_executed').exists()
    (tmp_path / 'our_vab_idx.pkl').unlink()
    refuses('our_vab_idx.pkl was not loaded')


# ------------------------------------------------- official files that are not what they should be


def write_official(root, change=None):
    """An official tree with tiny random weights, as the released one is laid out."""
    model = Evaluator(np.zeros(23), np.ones(23), **SMALL)
    names = ('movement_encoder', 'text_encoder', 'motion_encoder')
    parts = {name: getattr(model, name).state_dict() for name in names}
    if change is not None:
        change(parts)
    for folder in ('t2m/text_mot_match/model', 't2m/Comp_v6_KLD005/meta'):
        (root / folder).mkdir(parents=True, exist_ok=True)
    torch.save({**parts, 'epoch': 1}, root / 't2m/text_mot_match/model/finest.tar')
    for name in ('mean', 'std'):
        np.save(root / f't2m/Comp_v6_KLD005/meta/{name}.npy', np.ones(23, dtype=np.float32))


def test_official_layout_and_its_errors(tmp_path, monkeypatch):
    import momask
    monkeypatch.chdir(tmp_path)
    write_official(tmp_path)
    ev = momask.evaluator(tmp_path, 't2m')
    assert ev.embed_motion(rand(1, 8, 23), [8]).shape == (1, 6)
    with pytest.raises(UserError, match='our_vab_data.npy'):
        ev.embed_text(['walk/VERB'])
    (tmp_path / 'glove').mkdir()
    write_glove(tmp_path / 'glove')
    assert momask.evaluator(tmp_path, 't2m').embed_text(['walk/VERB']).shape == (1, 6)

    def refuses(sentence, change=None, dataset='t2m'):
        if change is not None:
            write_official(tmp_path, change)
        with pytest.raises(UserError, match=sentence) as e:
            momask.evaluator(tmp_path, dataset)
        assert '\n' not in str(e.value)

    refuses('kit', dataset='kit')
    refuses('text_encoder', lambda p: p.pop('text_encoder'))
    refuses('hidden', lambda p: p['motion_encoder'].pop('hidden'))
    refuses('gru.bias_hh_l0', lambda p: p['text_encoder'].pop('gru.bias_hh_l0'))
    refuses('tensor extra', lambda p: p['text_encoder'].update(extra=torch.zeros(1)))
    refuses(r'input_emb.weight is \(3, 4\)',
            lambda p: p['motion_encoder'].update({'input_emb.weight': torch.zeros(3, 4)}))
    refuses('finest.tar', lambda p: p['movement_encoder'].update({'main.0.weight': 'x'}))
    refuses('code', lambda p: p.update(movement_encoder=Code()))
    assert not (tmp_path / 'was_executed').exists()
    (tmp_path / 't2m/text_mot_match/model/finest.tar').write_bytes(b'not a checkpoint')
    refuses('finest.tar cannot be read')
    write_official(tmp_path)
    np.save(tmp_path / 't2m/Comp_v6_KLD005/meta/std.npy', np.ones(20))
    refuses('23')
    os.remove(tmp_path / 't2m/Comp_v6_KLD005/meta/std.npy')
    refuses('std.npy')


# ------------------------------------------------------------------------------------------ metrics


def plain_fid(a, b):
    """The textbook form, by the eigenvalues of C1 C2 (real and not negative but for rounding)."""
    c1 = np.cov(a, rowvar=False)
    c2 = np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(c1 @ c2).real.clip(min=0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * root


def test_fid():
    a = rand(200, 8)
    b = rand(150, 8, seed=1) @ rand(8, 8, seed=2) + 0.3
    assert E.fid(a, b) == pytest.approx(plain_fid(a, b), abs=1e-9)
    assert E.fid(a, b) == pytest.approx(E.fid(b, a), abs=1e-9)
    assert E.fid(a, a) < 1e-9
    assert E.fid(a, a + 2) == pytest.approx(32, abs=1e-8)
    assert E.fid(torch.from_numpy(a), b.astype(np.float32)) == pytest.approx(E.fid(a, b), rel=1e-4)
    for n, m, d in ((2, 2, 64), (2, 100, 16), (5, 5, 512), (3, 4, 1), (40, 2, 512)):
        x = rand(n, d)
        y = rand(m, d, seed=1)
        assert np.isfinite(E.fid(x, y)) and E.fid(x, y) > 0
        assert E.fid(x, x) < 1e-6
        assert E.fid(x, y) == pytest.approx(E.fid(y, x), rel=1e-6)
    assert E.fid(np.ones((3, 4)), np.ones((3, 4))) == 0
    x = rand(2, 1)   # in 1-d: (m1 - m2)^2 + (s1 - s2)^2
    y = rand(9, 1, seed=1)
    expected = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
    assert E.fid(x, y) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match='at least 2'):
        E.fid(a[:1], b)
    with pytest.raises(ValueError, match='NaN'):
        E.fid(a, np.full((4, 8), np.nan))


def test_r_precision():
    n = 80
    text = np.eye(n)
    assert E.r_precision(text, text).tolist() == [1, 1, 1]
    # one step off within each batch of 32: own motion never nearest, but second for everybody
    off = text.copy()
    for k in (0, 32):
        off[k:k + 32] = text[k:k + 32] * 0.4 + np.roll(text[k:k + 32], 1, axis=0) * 0.6
    off[64:] = -text[64:]   # the partial batch is hopeless, and dropped
    assert E.r_precision(text, off).tolist() == [0, 1, 1]
    assert E.r_precision(text, off, batch=80)[2] < 1
    # neighbours with the same caption: the wrong motion is a right one
    same = [f'caption {i}' for i in range(n)]
    wrong = text.copy()
    wrong[[0, 1]] = text[[1, 0]]
    assert E.r_precision(text, wrong)[0] == pytest.approx(62 / 64)
    same[1] = same[0]
    assert E.r_precision(text, wrong, same=same).tolist() == [1, 1, 1]
    collapsed = np.zeros((64, 4))
    assert E.r_precision(collapsed, collapsed).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match='at least 32'):
        E.r_precision(text[:31], text[:31])
    chance = E.r_precision(rand(3200, 4), rand(3200, 4, seed=1))
    assert chance == pytest.approx([1 / 32, 2 / 32, 3 / 32], abs=0.02)


def test_small_metrics():
    def rng():
        return np.random.default_rng(1)

    x = rand(50, 4)
    assert E.mm_dist(x, x + [3, 0, 4, 0]) == pytest.approx(5)
    assert E.diversity(np.ones((10, 3)), rng()) == 0
    assert E.diversity(x, rng()) == E.diversity(x, rng()) > 0
    assert E.multimodality(np.repeat(rand(5, 1, 4), 30, axis=1), rng()) == 0
    spread = E.multimodality(rand(5, 30, 4), np.random.default_rng(0))
    assert spread == pytest.approx(8 ** 0.5, abs=0.5)
    with pytest.raises(ValueError, match='only 5'):
        E.multimodality(rand(5, 5, 4), rng())
    joints = rand(6, 22, 3)
    assert E.mpjpe(joints + [1, 2, 3], joints).max() < 1e-12   # moving the whole body is no error
    other = joints.copy()
    other[:, 3, 0] += 0.22
    assert E.mpjpe(other, joints) == pytest.approx(np.full(6, 0.01))
    mean, half = E.interval([[1.0, 5.0], [3.0, 5.0]])
    assert mean.tolist() == [2, 5]
    assert half == pytest.approx([1.96 / 2 ** 0.5, 0])


# ----------------------------------------------------------------------------------------- training


def write_data(folder):
    """Noise in which each of four actions lifts features of its own."""
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


def test_train_eval_smoke(tmp_path):
    write_data(tmp_path / 'data' / 'fake')
    out = tmp_path / 'out'

    def run(*settings, launcher=None):
        return run_script(tmp_path, 'train_eval.py', '--out_dir=out', *settings, launcher=launcher)

    sizes = ['--data=fake', '--ev_steps=30', '--ev_ae_steps=5', '--ev_batch=32',
             '--ev_eval_every=15', '--ev_movement=32', '--ev_code=32', '--ev_motion_hidden=32',
             '--ev_text_hidden=32', '--ev_out=32', '--ev_lr=5e-3']
    code, _, err = run(*sizes)
    assert code == 0, err
    files = {'evaluator.json', 'evaluator.pt', 'evaluator_last.pt'}
    assert files == {name for name in os.listdir(out) if name != '.evaluator.lock'}
    with open(out / 'evaluator.json') as f:
        figures = json.load(f)
    assert figures['r_precision'][2] > 0.7
    assert figures['r_precision'][2] > figures['r_precision_shuffled'][2]
    again = Evaluator.load(out / 'evaluator.pt')
    assert again.embed_text(['walk/VERB']).shape == (1, 32)
    # resuming a finished run trains no further and measures the same
    code, _, err = run(*sizes, '--init_from=resume')
    assert code == 0, err
    with open(out / 'evaluator.json') as f:
        assert json.load(f)['r_precision'] == figures['r_precision']
    code, _, err = run('--data=nothing', '--overwrite=True', launcher=PYTHON)
    assert code == 2
    assert 'prepare_data.py' in err and 'Traceback' not in err
