"""Tokenizer and transformers: the reference's outputs, our own invariants, fast forms against plain ones.

The golden arrays and checkpoints of the reference code lie in ../shared/golden; those tests skip where it is absent.
"""
import os
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model
import msd
import text
from model import (Attention, LengthEstimator, MaskTransformer, ModelConfig, Pipeline, ResTransformer, dropout, guided,
                   sample, twice)
from vq import CheckpointError, RVQVAE, VQConfig, load, save

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', 'shared', 'golden')
needs_golden = pytest.mark.skipif(not os.path.isdir(GOLDEN), reason='the arrays of the reference code (../shared/golden) are not here')
SMALL = dict(n_codes=20, code_dim=8, n_quantizers=4, latent=24, n_layers=3, n_heads=3, ff=32)


def golden(data, name):
    with np.load(os.path.join(GOLDEN, data, name + '.npz')) as f:
        return {k: torch.from_numpy(f[k]) for k in f.files}


def root(data):
    return os.path.join(GOLDEN, data, 'momask_checkpoints')


def worst(a, b):
    return float((a - b).abs().max())


# ------------------------------------------------------------------------------------------------------ official weights

@needs_golden
@pytest.mark.parametrize('data', ['t2m', 'kit'])
@torch.no_grad()
def test_official_tokenizer(data):
    g, vq = golden(data, 'rvq'), RVQVAE.from_momask(root(data), data, 'rvq_tiny')
    ids = vq.encode(g['motion'])
    assert torch.equal(ids, g['ids'])
    codes = torch.stack([q.codebook[ids[..., v]].transpose(1, 2) for v, q in enumerate(vq.quantizers)])
    assert worst(codes, g['codes']) < 1e-4
    assert worst(vq(g['motion'])[0], g['recon']) < 1e-4
    assert worst(vq.decode(ids), g['from_ids']) < 1e-4
    assert worst(vq.decode(ids[..., :1]), g['from_base']) < 1e-4


@needs_golden
@pytest.mark.parametrize('data', ['t2m', 'kit'])
@torch.no_grad()
def test_official_transformers(data):
    g, m = golden(data, 'mask_transformer'), MaskTransformer.from_momask(root(data), data, 't2m_tiny')
    ids, c, valid = g['ids'], g['cond'], ~g['padding_mask']
    assert worst(m(ids, c, valid).mT, g['logits']) < 1e-4
    assert worst(m(ids, c * 0, valid).mT, g['logits_uncond']) < 1e-4
    ids2, valid2 = twice(ids, valid)
    assert worst(guided(lambda c2: m(ids2, c2, valid2), c, 4).mT, g['logits_cfg4']) < 1e-4

    g, m = golden(data, 'res_transformer'), ResTransformer.from_momask(root(data), data, 'tres_tiny')
    ids, c, valid = g['ids'], g['cond'], ~g['padding_mask']
    ids2, valid2 = twice(ids, valid)
    for q in range(1, ids.shape[-1]):
        assert worst(m(ids, c, valid, q).mT, g[f'logits_q{q}']) < 1e-4
        assert worst(guided(lambda c2: m(ids2, c2, valid2, q), c, 5).mT, g[f'logits_cfg5_q{q}']) < 1e-4

    g = golden(data, 'length_estimator')
    assert worst(LengthEstimator.from_momask(root(data), data)(g['text_emb']), g['logits']) < 1e-4


@needs_golden
@pytest.mark.parametrize('data', ['t2m', 'kit'])
def test_official_pipeline_generates(data):
    pipe = Pipeline.from_momask(root(data), data)
    c, n = torch.randn(3, 512), torch.tensor([10, 4, 7])
    ids = pipe.generate(c, n, steps=4)
    assert torch.equal(ids, pipe.generate(c, n, steps=4)) and ids.shape == (3, 10, 4)
    motions = pipe.features(ids, n)
    assert [len(m) for m in motions] == [40, 16, 28] and all(m.isfinite().all() for m in motions)
    assert (pipe.lengths(c) >= 1).all() and (pipe.lengths(c) <= 49).all()


class Evil:
    def __reduce__(self):
        return os.system, ('touch /tmp/dynmask_test_evil',)


@needs_golden
def test_official_errors_in_words(tmp_path):
    with pytest.raises(CheckpointError, match='missing'):
        RVQVAE.from_momask(root('t2m'), 't2m', 'no_such_name')
    with pytest.raises(CheckpointError, match='expected t2m_transformer'):
        MaskTransformer.from_momask(root('t2m'), 't2m', 't2m_tiny', checkpoint='../../rvq_tiny/model/net_best_fid.tar')
    with pytest.raises(CheckpointError, match='expected one'):
        Pipeline.from_momask(str(tmp_path), 't2m')
    folder = tmp_path / 't2m' / 'len' / 'model'
    os.makedirs(folder)
    w = torch.load(os.path.join(root('t2m'), 't2m/length_estimator/model/finest.tar'), weights_only=True)
    w['estimator']['output.4.weight'] = torch.zeros(3, 3)
    torch.save(w, folder / 'finest.tar')
    with pytest.raises(CheckpointError, match=r'output.4.weight is \(3, 3\), expected \(256, 512\)'):
        LengthEstimator.from_momask(str(tmp_path), 't2m', 'len')
    with open(folder / 'finest.tar', 'wb') as f:
        pickle.dump({'estimator': Evil()}, f)
    with pytest.raises(CheckpointError, match='code in it was not run'):
        LengthEstimator.from_momask(str(tmp_path), 't2m', 'len')
    torch.save({'estimator': Evil()}, folder / 'finest.tar')
    with pytest.raises(CheckpointError, match='code in it was not run'):
        LengthEstimator.from_momask(str(tmp_path), 't2m', 'len')
    assert not os.path.exists('/tmp/dynmask_test_evil')


# --------------------------------------------------------------------------------------------------------------- tokenizer

def small_vq(**more):
    torch.manual_seed(0)
    return RVQVAE(VQConfig(**{**dict(dim=263, n_codes=16, code_dim=8, n_quantizers=3, width=16), **more}))


def test_vq_shapes_and_straight_through():
    vq, x = small_vq(), torch.randn(2, 32, 263)
    vq.init_codebooks(x, torch.Generator().manual_seed(0))
    y, commit, ids, seen = vq(x)
    assert y.shape == x.shape and ids.shape == (2, 8, 3) and commit > 0 and len(seen) == 3
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vq.parameters())
    assert vq.encode(x).shape == (2, 8, 3) and vq.decode(ids).shape == x.shape
    # quantization dropout: with one active layer the output is the base reconstruction
    assert worst(vq(x, torch.tensor(1))[0], vq.decode(ids[..., :1])) < 1e-5


def test_vq_ema_follows_the_data_and_dead_codes_move():
    vq, g = small_vq(n_quantizers=1, code_dim=4), torch.Generator().manual_seed(0)
    centres = torch.randn(8, 4) * 5
    r = centres.repeat(100, 1) + 0.01 * torch.randn(800, 4)
    quantizer = vq.quantizers[0]
    quantizer.init(torch.full((16, 4), 100.0))                    # every code is dead
    for _ in range(300):
        pick = r[torch.randint(800, (16,), generator=g)]
        quantizer.update(r, quantizer.nearest(r), pick)
    assert (torch.cdist(centres, quantizer.codebook).min(1).values < 0.05).all()


def test_vq_zero_variance_features_do_not_blow_up():
    std = torch.ones(263)
    std[50:60] = 0
    vq = RVQVAE(small_vq().config, torch.zeros(263), std)
    x = vq.normalize(torch.zeros(2, 32, 263))
    assert x.isfinite().all() and x.abs().max() < 10 and vq.denormalize(x).abs().max() < 1e-3


def test_vq_padding_does_not_touch_a_motion():
    vq = small_vq()
    vq.init_codebooks(torch.randn(4, 32, 263), torch.Generator().manual_seed(0))
    ids, n = torch.randint(16, (3, 10, 3)), torch.tensor([10, 4, 7])
    out = vq.decode_padded(ids, n)
    for row, length in enumerate(n.tolist()):
        assert worst(out[row, :4 * length], vq.decode(ids[row:row + 1, :length])[0]) < 1e-5
        assert (out[row, 4 * length:] == 0).all()


# ------------------------------------------------------------------------------------------------------------ transformers

def plain_attention(layer, x, valid, phi, seen, heads, front=1):
    """Motion-aware attention to the letter: logits, z-score, Eq 13, softmax."""
    B, N, d = x.shape
    q, k, v = (t.view(B, N, heads, d // heads).transpose(1, 2) for t in layer.in_proj(x).chunk(3, -1))
    A = q @ k.mT / (d // heads) ** 0.5
    w = msd.band_weights(phi.shape[-1])
    out = torch.zeros_like(v)
    for b in range(B):
        ok = valid[b][:, None] & valid[b][None]
        S = torch.zeros(N, N)
        s = -(w * (phi[b][:, None] - phi[b][None]).square()).sum(-1)                                # Eq 11
        known = seen[b] & valid[b][front:]
        pair = known[:, None] & known[None]
        if pair.any():
            values = s[pair]
            S[front:, front:][pair] = (values - values.mean()) / (values.var(unbiased=False) + msd.EPS).sqrt()
        for h in range(heads):
            a = A[b, h][ok]
            mean, sigma = a.mean(), (a.var(unbiased=False) + msd.EPS).sqrt()
            fused = (1 - layer.alpha) * (A[b, h] - mean) / sigma + layer.alpha * S                  # Eq 13
            if layer.fusion == 'rescaled':
                fused = (1 - layer.alpha) * (A[b, h] - mean) + layer.alpha * sigma.detach() * S
            out[b, h] = fused.masked_fill(~valid[b][None], float('-inf')).softmax(-1) @ v[b, h]
    return layer.out_proj(out.transpose(1, 2).reshape(B, N, d))


@pytest.mark.parametrize('fusion', ['zscore', 'rescaled', 'temperature'])
@pytest.mark.parametrize('seed', range(5))
@torch.no_grad()
def test_motion_aware_attention_equals_plain(fusion, seed, monkeypatch):
    torch.manual_seed(seed)
    c = ModelConfig(**SMALL, fusion=fusion, dropout=0.0, window=6)
    layer, B, n = Attention(c, 1), 4, 21
    length = torch.randint(2, n + 1, (B, 1))
    valid = torch.arange(n) < length
    ids = torch.where(torch.rand(B, n) < 0.3, 20, torch.randint(20, (B, n)))
    phi, seen = msd.descriptor(ids, msd.gram(torch.randn(20, 8)), (ids < 20) & valid, 6)
    x, full = torch.randn(B, n + 1, 24) * 3, F.pad(valid, (1, 0), value=True)
    pad = torch.zeros(B, n + 1).masked_fill(~full, -torch.inf)[:, None, None]
    trunk = MaskTransformer(c).trunk
    expected = plain_attention(layer, x, full, phi, seen, 3)
    for short in (True, False):             # logits formed, and dimensions appended for the fused kernel
        monkeypatch.setattr(model, 'forms_logits', lambda x: short)
        prior = trunk.spread_prior(x, full, *msd.prior_qk(phi, seen & valid))
        assert prior[0].shape[-1] == (n + 1 if short else 8)   # z(S), or W + 2 dimensions
        assert worst(layer(x, full, pad, prior)[full], expected[full]) < 1e-5


@pytest.mark.parametrize('fusion', ['zscore', 'rescaled'])
def test_same_losses_as_plain_training(fusion, monkeypatch):
    """Six training steps with the closed forms and six with the letter of Eq 13: the same losses, to rounding."""
    def losses():
        torch.manual_seed(4)
        m = MaskTransformer(ModelConfig(**SMALL, fusion=fusion, dropout=0.0, alpha0=0.5), torch.randn(20, 8)).train()
        optimizer, out = torch.optim.AdamW(m.parameters(), 1e-3), []
        for _ in range(6):
            ids, c = torch.randint(20, (6, 15)), torch.randn(6, 512)
            valid = torch.arange(15) < torch.randint(2, 16, (6, 1))
            masked, chosen = m.corrupt(ids, c, valid)
            loss = F.cross_entropy(m(masked, c, valid).flatten(0, 1), torch.where(chosen, ids, -100).flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            out.append(loss.item())
        return np.array(out)

    fast = losses()
    descriptor, current = MaskTransformer.descriptor, {}

    def remember(self, ids):
        current['phi'], current['seen'] = descriptor(self, ids)
        return current['phi'], current['seen']
    monkeypatch.setattr(MaskTransformer, 'descriptor', remember)
    monkeypatch.setattr(Attention, 'forward', lambda self, x, valid, pad, prior: plain_attention(
        self, x, valid, current['phi'], current['seen'], self.H))
    plain = losses()
    assert np.abs(fast - plain).max() < 1e-4 and fast[0] != fast[1]


def test_initial_weights():
    """Token embeddings start as standardised code vectors, or small and random as in the reference; attention as in torch."""
    torch.manual_seed(0)
    codebook = torch.randn(20, 8) * 3 + 1
    m = MaskTransformer(ModelConfig(**SMALL), codebook)
    assert worst(torch.cdist(m.token_emb.weight[:20], m.token_emb.weight[:20]) * codebook.std(), torch.cdist(codebook, codebook)) < 0.5
    assert abs(m.token_emb.weight[:20].std() - 1) < 1e-3 and m.token_emb.weight[20:].abs().max() < 0.1
    random = MaskTransformer(ModelConfig(**SMALL, token_init='random'), codebook)
    assert random.token_emb.weight.abs().max() < 0.1 and torch.equal(random.G, m.G)
    reference = torch.nn.MultiheadAttention(24, 3)
    for layer in m.trunk.layers:
        assert abs(layer.attn.in_proj.weight.std() / reference.in_proj_weight.std() - 1) < 0.1 and not layer.attn.in_proj.bias.any()
        assert abs(layer.linear1.weight.std() / 0.02 - 1) < 0.15


@torch.no_grad()
def test_all_off_is_a_plain_transformer():
    """With spectral attention off a block is nn.TransformerEncoderLayer with the same weights."""
    torch.manual_seed(0)
    c = ModelConfig(**SMALL, spectral_attn=False)
    m = MaskTransformer(c).eval()
    block, x, valid = m.trunk.layers[0], torch.randn(2, 9, 24), torch.arange(9) < torch.tensor([[9], [5]])
    ref = torch.nn.TransformerEncoderLayer(24, 3, 32, activation='gelu', batch_first=True).eval()
    rename = {k: k.replace('attn.in_proj.', 'self_attn.in_proj_').replace('attn.out_proj', 'self_attn.out_proj') for k in block.state_dict()}
    ref.load_state_dict({rename[k]: v for k, v in block.state_dict().items()})
    pad = torch.zeros(2, 9).masked_fill(~valid, -torch.inf)[:, None, None]
    assert worst(block(x, valid, pad)[valid], ref(x, src_key_padding_mask=~valid)[valid]) < 1e-5


@pytest.mark.parametrize('spectral', [False, True])
@torch.no_grad()
def test_padding_changes_nothing(spectral):
    torch.manual_seed(1)
    m = MaskTransformer(ModelConfig(**SMALL, spectral_attn=spectral, fusion='zscore'), torch.randn(20, 8)).eval()
    r = ResTransformer(ModelConfig(**SMALL, spectral_attn=False)).eval()
    ids, c = torch.randint(21, (3, 12)), torch.randn(3, 512)
    valid = torch.arange(12) < torch.tensor([[12], [5], [8]])
    garbage = torch.where(valid, ids, torch.randint(20, (3, 12)))
    pad = torch.where(valid, ids, m.PAD)
    assert worst(m(pad, c, valid)[valid], m(torch.where(valid, garbage, m.PAD), c, valid)[valid]) < 1e-6
    alone = m(pad[1:2, :5], c[1:2], valid[1:2, :5])
    assert worst(m(pad, c, valid)[1, :5], alone[0]) < 1e-5
    assert worst(m(garbage, c, valid)[valid], m(pad, c, valid)[valid]) < 1e-6   # ids behind an end need not even be [PAD]
    all_ids = torch.randint(20, (3, 12, 4))
    other = torch.where(valid[..., None], all_ids, torch.randint(20, (3, 12, 4)))
    for q in (1, 2, 3):
        assert worst(r(all_ids, c, valid, q)[valid], r(other, c, valid, q)[valid]) < 1e-6


@torch.no_grad()
def test_residual_layers_cycle_over_rows():
    torch.manual_seed(2)
    r = ResTransformer(ModelConfig(**SMALL)).eval()
    ids, c, valid = torch.randint(20, (7, 6, 4)), torch.randn(7, 512), torch.ones(7, 6, dtype=torch.bool)
    for row0 in (0, 2):
        logits = r(ids, c, valid, None, row0)
        for i in range(7):
            q = 1 + (row0 + i) % 3
            assert worst(logits[i], r(ids[i:i + 1], c[i:i + 1], valid[i:i + 1], q)[0]) < 1e-5
    changed = ids.clone()
    changed[..., 2:] = 0                 # layers from q on are never looked at
    assert worst(r(ids, c, valid, 2), r(changed, c, valid, 2)) == 0


def test_dropout_keeps_mean_and_share():
    torch.manual_seed(0)
    x = torch.ones(1001, 997)
    y = dropout(x, 0.2, True)
    assert abs((y == 0).float().mean() - 51 / 256) < 2e-3 and abs(y.mean() - 1) < 2e-3
    assert dropout(x, 0.2, False) is x and dropout(x, 0.0, True) is x


@pytest.mark.parametrize('cfs', [False, True])
def test_corrupt(cfs):
    m = MaskTransformer(ModelConfig(**SMALL), torch.randn(20, 8))
    g = torch.Generator().manual_seed(0)
    ids, c = torch.randint(20, (400, 30)), torch.randn(400, 512)
    valid = torch.arange(30) < torch.randint(1, 31, (400, 1))
    out, chosen = m.corrupt(ids, c, valid, cfs, generator=g)
    assert not (chosen & ~valid).any() and (chosen.sum(1) >= 1).all()
    assert torch.equal(out[~chosen], ids[~chosen])
    share = (out[chosen] == m.MASK).float().mean()
    kept = (out[chosen] == ids[chosen]).float().mean()
    assert abs(share - 0.8) < 0.02 and abs(kept - (0.1 + 0.1 / 20)) < 0.02
    _, chosen = m.corrupt(ids, c, valid, cfs, ratio=0.6, generator=g)
    assert torch.equal(chosen.sum(1), (0.6 * valid.sum(1)).round().clamp(min=1).long())


@pytest.mark.parametrize('das', [False, True])
@pytest.mark.parametrize('msd_decode', ['kept', 'guess'])
def test_generate(das, msd_decode):
    torch.manual_seed(3)
    m, r = MaskTransformer(ModelConfig(**SMALL), torch.randn(20, 8)).eval(), ResTransformer(ModelConfig(**SMALL)).eval()
    c, n = torch.randn(4, 512), torch.tensor([12, 1, 7, 9])
    make = lambda seed: m.generate(c, n, das=das, msd_decode=msd_decode, generator=torch.Generator().manual_seed(seed))
    ids = make(0)
    assert torch.equal(ids, make(0)) and not torch.equal(ids, make(1))
    valid = torch.arange(12) < n[:, None]
    assert (ids[valid] < 20).all() and (ids[~valid] == m.PAD).all()
    full = r.generate(ids, c, n, generator=torch.Generator().manual_seed(0))
    assert full.shape == (4, 12, 4) and torch.equal(full[..., 0][valid], ids[valid]) and (full < 20).all()
    assert (m.generate(c, n, steps=1, das=das)[valid] < 20).all()


def test_one_graph_for_all_steps_and_lengths():
    """Hot paths compile without graph breaks, and a new length within one padded width is no new graph."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward
    m, r = MaskTransformer(ModelConfig(**SMALL), torch.randn(20, 8)).train(), ResTransformer(ModelConfig(**SMALL)).train()
    vq = small_vq()
    compiled = [torch.compile(x, backend=count, fullgraph=True) for x in (m, r, vq)]
    for length in (12, 5, 9):
        valid = torch.arange(12) < torch.tensor([[length], [12], [3]])
        ids, c = torch.randint(20, (3, 12, 4)), torch.randn(3, 512)
        compiled[0](ids[..., 0], c, valid).sum().backward()
        compiled[1](ids, c, valid).sum().backward()
        compiled[2](torch.randn(2, 32, 263), torch.tensor(1 + length % 3))
    assert len(graphs) == 3
    m.eval()
    m.generate(torch.randn(2, 512), torch.tensor([4, 9]), width=12)   # generate itself stays eager; its forward compiles
    step = torch.compile(m, backend=count, fullgraph=True)
    before = len(graphs)
    with torch.no_grad():
        for length in (4, 7, 12):
            ids = torch.where(torch.arange(12) < length, m.MASK, m.PAD).expand(2, 12)
            step(ids, torch.randn(2, 512), ids != m.PAD, m.descriptor(ids))
    assert len(graphs) == before + 1


def test_sample_draws_the_softmax_of_the_top_tenth():
    x, g = torch.randn(512).mul(2), torch.Generator().manual_seed(0)
    ids = sample(x.expand(40000, 1, 512), 0.1, 0.7, g)
    top, code = x.topk(52)
    assert set(ids.unique().tolist()) <= set(code.tolist())
    share = torch.bincount(ids[:, 0], minlength=512)[code] / 40000
    assert worst(share, (top / 0.7).softmax(0)) < 0.01


def test_learned_embedding_feeds_msd_without_gradient():
    m = MaskTransformer(ModelConfig(**SMALL, msd_embed='learned'))
    ids = torch.randint(20, (2, 10))
    phi, seen = m.descriptor(ids)
    assert seen.all() and phi.norm(dim=-1).max() < 1.001 and not phi.requires_grad
    before = phi.clone()
    with torch.no_grad():
        m.token_emb.weight.normal_()
    assert worst(before, m.descriptor(ids)[0]) > 1e-3


# ------------------------------------------------------------------------------------------------------------- text, files

def test_hashed_text_is_stable_and_knows_order():
    a, b, again = text.encode(['a person walks then kicks', 'a person kicks then walks', 'A person walks, then kicks.'], 'hash')
    assert torch.equal(a, again) and worst(a, b) > 0.1 and abs(a.norm() - 512 ** 0.5) < 1e-3
    assert abs(float(a[:3].sum()) - float(text.encode(['a person walks then kicks'], 'hash')[0][:3].sum())) == 0
    with pytest.raises(ValueError, match="expected 'clip' or 'hash'"):
        text.encode(['x'], 'bert')


def test_clip_tower_and_its_cache(tmp_path):
    """The real open_clip path, with a randomly initialised tower: nothing is downloaded."""
    pytest.importorskip('open_clip', reason='open_clip_torch is not installed')
    torch.manual_seed(0)
    tower, calls = text.clip_tower(pretrained=None), []
    counted = lambda captions: calls.append(len(captions)) or tower(captions)
    x = text.encode(['a person walks', 'a person runs', 'a person walks'], 'clip', str(tmp_path), tower=counted)
    assert x.shape == (3, 512) and torch.equal(x[0], x[2]) and worst(x[0], x[1]) > 1e-3
    assert abs(x[0].norm() - 1) > 1e-2                                   # un-normalised, as MoMask uses it
    y = text.encode(['a person walks', 'a person jumps'], 'clip', str(tmp_path), tower=counted)
    assert torch.equal(x[0], y[0]) and calls == [2, 1]                   # only the new caption was encoded
    import open_clip
    torch.manual_seed(0)
    whole = open_clip.create_model('ViT-B-32-quickgelu', pretrained=None).eval()
    captions = ['a person walks', 'a person, having run for a while, sits down on the floor and ' + 'waits and ' * 60, '']
    ids = open_clip.get_tokenizer('ViT-B-32-quickgelu')(captions)
    with torch.no_grad():
        for some in (slice(0, 1), slice(0, 3)):                          # cut at the longest caption, it says the same
            assert worst(tower(captions[some]), whole.encode_text(ids[some])) < 1e-4


def test_files_are_whole_or_absent(tmp_path):
    path = str(tmp_path / 'a.pt')
    save({'x': torch.ones(2)}, path)
    assert load(path, '')['x'].sum() == 2 and os.listdir(tmp_path) == ['a.pt']
    with open(path, 'r+b') as f:
        f.truncate(100)
    with pytest.raises(CheckpointError, match='damaged'):
        load(path, '')
    with pytest.raises(CheckpointError, match='run this first'):
        load(str(tmp_path / 'b.pt'), 'run this first')
