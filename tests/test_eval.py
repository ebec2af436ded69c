"""Tests of lib/evaluator.py. The golden tests need ../shared."""
import json
import os
import pickle

import numpy as np
import pytest
import torch
from conftest import PROJECT

import momask
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
    embedding = ev.embed_motion(z['motion'] * ev.std + ev.mean, z['m_lens'])
    assert (embedding[0] - z['motion_embedding'][0]).abs().max() < 1e-5


@golden
@each
def test_golden_metrics(name):
    z = np.load(f'{GOLDEN}/{name}/metrics.npz')
    assert abs(E.fid(z['real'], z['gen']) - z['fid']) < 1e-6
    assert np.abs(E.r_precision(z['text'], z['motion']) - z['r_precision']).max() < 1e-12
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
    # the standard evaluation pads with zeros to 196 frames
    x = torch.zeros(1, 196, 23)
    x[0, :20] = torch.from_numpy(features[0, :20])
    assert torch.allclose(model.encode_motion(x, torch.tensor([20])), whole[:1], atol=1e-6)


def test_a_caption_has_one_embedding(model):
    captions = ['walk/VERB', 'a/DET person/NOUN jump/VERB high/ADV', 'sit/VERB down/ADV',
                'walk/VERB', '']
    text = model.embed_text(captions)
    assert torch.equal(text[0], text[3])
    assert not torch.allclose(text[0], text[4])
    assert torch.allclose(model.embed_text(captions[::-1], batch=2), text.flip(0), atol=1e-6)


def test_zero_std_and_bad_motion(model):
    still = Evaluator(np.zeros(23), np.zeros(23), Words(), **SMALL)
    assert torch.isfinite(still.embed_motion(rand(2, 16, 23), [16, 12])).all()
    x = rand(2, 16, 23)
    for lengths in ([16], [16, 3], [16, 17]):
        with pytest.raises(ValueError):
            model.embed_motion(x, lengths)
    x[1, 5, 3] = np.nan
    with pytest.raises(ValueError, match='finite'):
        model.embed_motion(x, [16, 16])


def test_save_load_round_trip(model, tmp_path):
    model.save(tmp_path / 'e.pt', 5, {'ev_steps': 5}, note='x')
    again = Evaluator.load(tmp_path / 'e.pt')
    assert os.listdir(tmp_path) == ['e.pt']
    assert torch.equal(again.embed_text(['run/VERB']), model.embed_text(['run/VERB']))
    x = rand(1, 8, 23)
    assert torch.equal(again.embed_motion(x, [8]), model.embed_motion(x, [8]))

    model.save(tmp_path / 'half.pt', 4, {'ev_steps': 5})
    torch.save({'model': 1}, tmp_path / 'other.pt')
    for name, fact in (('half.pt', '4 of 5'), ('other.pt', 'expected evaluator'), ('no.pt', '')):
        with pytest.raises(UserError, match=f'{name}.*{fact}'):
            Evaluator.load(tmp_path / name)


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
    assert Words().vector('walk')[:2] == pytest.approx(HASHED_WALK, abs=1e-6)
    with pytest.raises(UserError, match="'walk'"):
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
    with pytest.raises(UserError, match='50-d.*300'):
        Evaluator(np.zeros(23), np.ones(23), words, word_dim=50)

    def refuses(fact):
        with pytest.raises(UserError, match=fact) as e:
            Words(str(tmp_path))
        assert '\n' not in str(e.value)

    write_glove(tmp_path, index={'unk': 0, 'sos': 1, 'eos': 2, 'walk': 9})
    refuses('our_vab.*index 9')
    write_glove(tmp_path, vocabulary=('walk', 'unk'))
    refuses('our_vab.*eos')
    for payload in (pickle.dumps([1, 2]), pickle.dumps({'walk': Code()}), b'\x80\x04junk', b''):
        (tmp_path / 'our_vab_idx.pkl').write_bytes(payload)
        refuses('our_vab_')
    assert not (tmp_path / 'was_executed').exists()
    (tmp_path / 'our_vab_idx.pkl').unlink()
    refuses('our_vab_idx.pkl')


# ------------------------------------------------- official files that are not what they should be


def write_official(root, change=lambda parts: None):
    """Write random weights in the layout of the official ones."""
    model = Evaluator(np.zeros(23), np.ones(23), **SMALL)
    names = ('movement_encoder', 'text_encoder', 'motion_encoder')
    parts = {name: getattr(model, name).state_dict() for name in names}
    change(parts)
    for folder in ('t2m/text_mot_match/model', 't2m/Comp_v6_KLD005/meta'):
        (root / folder).mkdir(parents=True, exist_ok=True)
    torch.save({**parts, 'epoch': 1}, root / 't2m/text_mot_match/model/finest.tar')
    for name in ('mean', 'std'):
        np.save(root / f't2m/Comp_v6_KLD005/meta/{name}.npy', np.ones(23, dtype=np.float32))


def test_official_layout_and_its_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_official(tmp_path)
    ev = momask.evaluator(tmp_path, 't2m')
    assert ev.embed_motion(rand(1, 8, 23), [8]).shape == (1, 6)
    with pytest.raises(UserError, match='our_vab_data.npy'):
        ev.embed_text(['walk/VERB'])
    (tmp_path / 'glove').mkdir()
    write_glove(tmp_path / 'glove')
    assert momask.evaluator(tmp_path, 't2m').embed_text(['walk/VERB']).shape == (1, 6)

    def refuses(fact, dataset='t2m'):
        with pytest.raises(UserError, match=fact) as e:
            momask.evaluator(tmp_path, dataset)
        assert '\n' not in str(e.value)

    refuses('kit', 'kit')
    for fact, change in (
            ('text_encoder', lambda p: p.pop('text_encoder')),
            ('gru.bias_hh_l0', lambda p: p['text_encoder'].pop('gru.bias_hh_l0')),
            ('tensor extra', lambda p: p['text_encoder'].update(extra=torch.zeros(1))),
            ('input_emb.weight', lambda p: p['motion_encoder'].update(
                {'input_emb.weight': torch.zeros(3, 4)})),
            ('finest.tar', lambda p: p['movement_encoder'].update({'main.0.weight': 'x'})),
            ('code', lambda p: p.update(movement_encoder=Code()))):
        write_official(tmp_path, change)
        refuses(fact)
    assert not (tmp_path / 'was_executed').exists()
    write_official(tmp_path)
    np.save(tmp_path / 't2m/Comp_v6_KLD005/meta/std.npy', np.ones(20))
    refuses('std.npy.*23')


# ------------------------------------------------------------------------------------------ metrics


def plain_fid(a, b):
    """The textbook form, by the eigenvalues of C1 C2 (real and nonnegative except for rounding)."""
    c1, c2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(c1 @ c2).real.clip(min=0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * root


def test_fid():
    a = rand(200, 8)
    b = rand(150, 8, seed=1) @ rand(8, 8, seed=2) + 0.3
    assert E.fid(a, b) == pytest.approx(plain_fid(a, b), abs=1e-9)
    assert E.fid(a, a + 2) == pytest.approx(32, abs=1e-8)
    for n, m, d in ((2, 2, 64), (5, 5, 512), (3, 4, 1)):   # fewer vectors than dimensions
        x, y = rand(n, d), rand(m, d, seed=1)
        assert np.isfinite(E.fid(x, y)) and E.fid(x, y) > 0
        assert E.fid(x, x) < 1e-6
    for wrong in (a[:1], np.full((4, 8), np.nan)):
        with pytest.raises(ValueError):
            E.fid(wrong, b)


def test_r_precision():
    n = 80
    text = np.eye(n)
    assert E.r_precision(text, text).tolist() == [1, 1, 1]
    # shifted by one within each batch of 32: a text's own motion is never first but always second
    off = text.copy()
    for k in (0, 32):
        off[k:k + 32] = text[k:k + 32] * 0.4 + np.roll(text[k:k + 32], 1, axis=0) * 0.6
    off[64:] = -text[64:]   # the partial batch is all wrong, and dropped
    assert E.r_precision(text, off).tolist() == [0, 1, 1]
    # a wrong motion with the same caption is right
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
    other = joints.copy()
    other[:, 3, 0] += 0.22
    assert E.mpjpe(other, joints) == pytest.approx(np.full(6, 0.01))
    mean, half = E.interval([[1.0, 5.0], [3.0, 5.0]])
    assert mean.tolist() == [2, 5]
    assert half == pytest.approx([1.96 / 2 ** 0.5, 0])
