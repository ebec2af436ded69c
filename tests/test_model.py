"""Tokenizer, transformers and decoding: the reference's outputs, our own invariants, and fast forms
against plain ones.

The golden arrays and checkpoints of the reference code lie in ../shared/golden; those tests skip
where it is absent.
"""
import math
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import generate
import masking
import model
import momask
import msd
from generate import Pipeline, generate_base, generate_residual, guided, sample
from lib import fast, text
from lib.configurator import UserError
from lib.fast import dropout
from lib.runtime import load, save
from masking import mask_tokens
from model import Attention, LengthEstimator, MaskTransformer, ModelConfig, ResTransformer
from vq import RVQVAE, VQConfig

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.path.join(HERE, '..', '..', 'shared', 'golden')
needs_golden = pytest.mark.skipif(
    not os.path.isdir(GOLDEN),
    reason='the arrays of the reference code (../shared/golden) are not here')
each = pytest.mark.parametrize('data', ['t2m', 'kit'])
SMALL = dict(n_codes=20, code_dim=8, n_quantizers=4, latent=24, n_layers=3, n_heads=3, ff=32)


def golden(data, name):
    with np.load(os.path.join(GOLDEN, data, name + '.npz')) as f:
        return {k: torch.from_numpy(f[k]) for k in f.files}


def root(data):
    return os.path.join(GOLDEN, data, 'momask_checkpoints')


def worst(a, b):
    return float((a - b).detach().abs().max())


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def texts(B, m=1):
    """Random condition tokens c (B, m, 512), all of them valid."""
    return torch.randn(B, m, 512), torch.ones(B, m, dtype=torch.bool)


def first_of(n, lengths):
    """valid (B, n): the first lengths[i] tokens of row i."""
    return torch.arange(n) < torch.as_tensor(lengths)[:, None]


def small_mask(**more):
    return MaskTransformer(ModelConfig(**{**SMALL, 'spectral_attn': True, **more}),
                           torch.randn(20, 8))


def small_res():
    return ResTransformer(ModelConfig(**SMALL))


def small_vq(**more):
    torch.manual_seed(0)
    sizes = dict(dim=263, n_codes=16, code_dim=8, n_quantizers=3, width=16)
    return RVQVAE(VQConfig(**{**sizes, **more}))


# --------------------------------------------------------------------------------- official weights


@needs_golden
@each
@torch.no_grad()
def test_official_tokenizer(data):
    g = golden(data, 'rvq')
    vq = momask.tokenizer(root(data), data, 'rvq_tiny')
    ids = vq.encode(g['motion'])
    assert torch.equal(ids, g['ids'])
    codes = [q.codebook[i].transpose(1, 2) for q, i in zip(vq.quantizers, ids.unbind(-1))]
    assert worst(torch.stack(codes), g['codes']) < 1e-4
    assert worst(vq(g['motion'])[0], g['recon']) < 1e-4
    assert worst(vq.decode(ids), g['from_ids']) < 1e-4
    assert worst(vq.decode(ids[..., :1]), g['from_base']) < 1e-4


def golden_batch(g):
    """ids, c (B, 1, 512), role, valid of the reference's arrays."""
    c = g['cond'][:, None]
    return g['ids'], c, torch.ones(c.shape[:2], dtype=torch.bool), ~g['padding_mask']


@needs_golden
@each
@torch.no_grad()
def test_official_mask_transformer(data):
    g = golden(data, 'mask_transformer')
    m = momask.mask_transformer(root(data), data, 't2m_tiny')
    ids, c, role, valid = golden_batch(g)
    assert worst(m(ids, c, role, valid).mT, g['logits']) < 1e-4
    assert worst(m(ids, c * 0, role, valid).mT, g['logits_uncond']) < 1e-4
    assert worst(guided(m, 4, ids, c, role, valid).mT, g['logits_cfg4']) < 1e-4


@needs_golden
@each
@torch.no_grad()
def test_official_res_transformer(data):
    g = golden(data, 'res_transformer')
    m = momask.res_transformer(root(data), data, 'tres_tiny')
    ids, c, role, valid = golden_batch(g)
    for q in range(1, ids.shape[-1]):
        assert worst(m(ids, c, role, valid, q).mT, g[f'logits_q{q}']) < 1e-4
        assert worst(guided(m, 5, ids, c, role, valid, q=q).mT, g[f'logits_cfg5_q{q}']) < 1e-4


@needs_golden
@each
@torch.no_grad()
def test_official_length_estimator(data):
    g = golden(data, 'length_estimator')
    estimator = momask.length_estimator(root(data), data)
    c = g['text_emb'][:, None]
    role = torch.ones(c.shape[:2], dtype=torch.bool)
    assert worst(estimator(c, role), g['logits']) < 1e-4


@needs_golden
@each
def test_official_pipeline_generates(data):
    pipe = generate.official_pipeline(root(data), data)
    c, role = texts(3)
    n = torch.tensor([10, 4, 7])
    ids = pipe.generate(c, role, n, steps=4)
    assert torch.equal(ids, pipe.generate(c, role, n, steps=4))
    assert ids.shape == (3, 10, 4)
    motions = pipe.features(ids, n)
    assert [len(m) for m in motions] == [40, 16, 28]
    assert all(np.isfinite(m).all() for m in motions)
    lengths = pipe.lengths(c, role)
    assert (lengths >= 1).all()
    assert (lengths <= 49).all()


@needs_golden
@each
def test_official_pipeline_sees_motion_through_its_codes(data):
    """The release holds no Gram table: MSD must get it from the tokenizer, not stay at zeros."""
    pipe = generate.official_pipeline(root(data), data)
    assert pipe.mask.G.any()
    assert torch.equal(pipe.mask.G, msd.gram(pipe.vq.quantizers[0].codebook))


class Evil:
    def __reduce__(self):
        return os.system, ('touch /tmp/dynmask_test_evil',)


@needs_golden
def test_official_errors_in_words(tmp_path):
    here = str(tmp_path)
    with pytest.raises(UserError, match='missing'):
        momask.tokenizer(root('t2m'), 't2m', 'no_such_name')
    with pytest.raises(UserError, match='missing'):
        momask.mask_transformer(root('t2m'), 't2m', 'no_such_name')
    with pytest.raises(UserError, match='expected one'):
        generate.official_pipeline(here, 't2m')

    other = tmp_path / 't2m' / 't2m_other'
    os.makedirs(other / 'model')
    tokenizer = os.path.join(root('t2m'), 't2m/rvq_tiny/model/net_best_fid.tar')
    shutil.copy(tokenizer, other / 'model' / 'latest.tar')
    with pytest.raises(UserError, match='expected t2m_transformer'):
        momask.mask_transformer(here, 't2m')
    transformer = os.path.join(root('t2m'), 't2m/t2m_tiny/model/latest.tar')
    shutil.copy(transformer, other / 'model' / 'latest.tar')
    with pytest.raises(UserError, match='opt.txt cannot be read'):
        momask.mask_transformer(here, 't2m')
    (other / 'opt.txt').write_text('n_heads: 5\n')
    with pytest.raises(UserError, match='vq_name'):
        momask.mask_transformer(here, 't2m')
    (other / 'opt.txt').write_text('n_heads: 5\nvq_name: rvq_tiny\n')
    with pytest.raises(UserError, match='5 heads do not divide its width'):
        momask.mask_transformer(here, 't2m')


@needs_golden
def test_official_tensors_must_fit(tmp_path):
    here = str(tmp_path)
    folder = tmp_path / 't2m' / 'len' / 'model'
    os.makedirs(folder)
    finest = os.path.join(root('t2m'), 't2m/length_estimator/model/finest.tar')
    checkpoint = torch.load(finest, weights_only=True)
    checkpoint['estimator']['output.4.weight'] = torch.zeros(3, 3)
    torch.save(checkpoint, folder / 'finest.tar')
    complaint = r'output.4.weight is \(3, 3\), expected \(256, 512\)'
    with pytest.raises(UserError, match=complaint):
        momask.length_estimator(here, 't2m', 'len')
    with open(folder / 'finest.tar', 'wb') as f:
        pickle.dump({'estimator': Evil()}, f)
    with pytest.raises(UserError, match='code in it was not run'):
        momask.length_estimator(here, 't2m', 'len')
    torch.save({'estimator': Evil()}, folder / 'finest.tar')
    with pytest.raises(UserError, match='code in it was not run'):
        momask.length_estimator(here, 't2m', 'len')
    assert not os.path.exists('/tmp/dynmask_test_evil')


# ---------------------------------------------------------------------------------------- tokenizer


def test_vq_shapes_and_straight_through():
    vq = small_vq()
    x = torch.randn(2, 32, 263)
    vq.init_codebooks(x, seeded(0))
    y, commit, ids, seen = vq(x)
    assert y.shape == x.shape
    assert ids.shape == (2, 8, 3)
    assert commit > 0
    assert len(seen) == 3
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vq.parameters())
    assert vq.encode(x).shape == (2, 8, 3)
    assert vq.decode(ids).shape == x.shape
    # quantization dropout: with one active layer the output is the base reconstruction
    assert worst(vq(x, torch.tensor(1))[0], vq.decode(ids[..., :1])) < 1e-5


def test_vq_ema_follows_the_data_and_dead_codes_move():
    vq = small_vq(n_quantizers=1, code_dim=4)
    g = seeded(0)
    centres = torch.randn(8, 4) * 5
    r = centres.repeat(100, 1) + 0.01 * torch.randn(800, 4)
    quantizer = vq.quantizers[0]
    quantizer.init(torch.full((16, 4), 100.0))   # every code is dead
    for _ in range(300):
        pick = r[torch.randint(800, (16,), generator=g)]
        quantizer.update(r, quantizer.nearest(r), pick)
    assert (torch.cdist(centres, quantizer.codebook).min(1).values < 0.05).all()


def test_vq_zero_variance_features_do_not_blow_up():
    std = torch.ones(263)
    std[50:60] = 0
    vq = RVQVAE(small_vq().config, torch.zeros(263), std)
    x = vq.normalize(torch.zeros(2, 32, 263))
    assert x.isfinite().all()
    assert x.abs().max() < 10
    assert vq.denormalize(x).abs().max() < 1e-3


def test_vq_padding_does_not_touch_a_motion():
    vq = small_vq()
    vq.init_codebooks(torch.randn(4, 32, 263), seeded(0))
    ids = torch.randint(16, (3, 10, 3))
    n = torch.tensor([10, 4, 7])
    out = Pipeline(vq, None, None, None, 'hash', dict(max_frames=40)).features(ids, n)
    for row, length in enumerate(n.tolist()):
        alone = vq.denormalize(vq.decode(ids[row:row + 1, :length]))[0]
        assert worst(torch.from_numpy(out[row]), alone) < 1e-5


# --------------------------------------------------------------------------- motion-aware attention


def plain_rotated(x, place):
    """RoPE as its paper writes it: pairs of dimensions as complex numbers, times e^(i t theta)."""
    d = x.shape[-1]
    theta = torch.tensor([100.0 ** (-2 * i / d) for i in range(d // 2)])
    pairs = torch.complex(x[..., :d // 2], x[..., d // 2:])
    pairs = pairs * torch.exp(1j * place[:, None] * theta)
    return torch.cat([pairs.real, pairs.imag], -1)


def plain_attention(layer, x, valid, phi, seen, front=1, place=None):
    """Motion-aware attention as published: logits, z-score, Eq 13, softmax."""
    B, N, d = x.shape
    heads = layer.n_heads
    parts = layer.in_proj(x).chunk(3, -1)
    q, k, v = (part.view(B, N, heads, d // heads).transpose(1, 2) for part in parts)
    if place is not None:
        q, k = plain_rotated(q, place), plain_rotated(k, place)
    A = q @ k.mT / (d // heads) ** 0.5
    w = msd.band_weights(phi.shape[-1])
    alpha = layer.alpha
    out = torch.zeros_like(v)
    for b in range(B):
        ok = valid[b][:, None] & valid[b][None]
        S = torch.zeros(N, N)
        s = -(w * (phi[b][:, None] - phi[b][None]).square()).sum(-1)             # Eq 11
        known = seen[b] & valid[b][front:]
        pair = known[:, None] & known[None]
        if pair.any():
            values = s[pair]
            deviation = (values.var(unbiased=False) + msd.EPS).sqrt()
            S[front:, front:][pair] = (values - values.mean()) / deviation
        for h in range(heads):
            a = A[b, h][ok]
            centred = A[b, h] - a.mean()
            sigma = (a.var(unbiased=False) + msd.EPS).sqrt()
            fused = (1 - alpha) * centred / sigma + alpha * S                    # Eq 13
            if layer.fusion == 'rescaled':
                fused = (1 - alpha) * centred + alpha * sigma.detach() * S
            weights = fused.masked_fill(~valid[b][None], -torch.inf).softmax(-1)
            out[b, h] = weights @ v[b, h]
    return layer.out_proj(out.transpose(1, 2).reshape(B, N, d))


@pytest.mark.parametrize('fusion', ['zscore', 'rescaled'])
@pytest.mark.parametrize('rotary', [False, True])
@pytest.mark.parametrize('seed', range(5))
@torch.no_grad()
def test_motion_aware_attention_equals_plain(fusion, rotary, seed, monkeypatch):
    torch.manual_seed(seed)
    config = ModelConfig(**SMALL, spectral_attn=True, fusion=fusion, dropout=0.0, window=6)
    layer = Attention(config, 1)
    B, n = 4, 21
    valid = first_of(n, torch.randint(2, n + 1, (B,)))
    ids = torch.where(torch.rand(B, n) < 0.3, 20, torch.randint(20, (B, n)))
    f, seen = msd.spectrum(ids, msd.gram(torch.randn(20, 8)), (ids < 20) & valid, 6)
    phi = msd.descriptor(f)
    x = torch.randn(B, n + 1, 24) * 3
    full = F.pad(valid, (1, 0), value=True)
    pad = torch.zeros(B, n + 1).masked_fill(~full, -torch.inf)[:, None, None]
    place = torch.arange(n + 1) if rotary else None
    table = model.rotary_table(n + 1, 8) if rotary else None
    expected = plain_attention(layer, x, full, phi, seen, place=place)
    for short in (True, False):   # logits formed, and dimensions appended for the fused kernel

        def forms_logits(x):
            return short

        monkeypatch.setattr(fast, 'forms_logits', forms_logits)
        monkeypatch.setattr(model, 'forms_logits', forms_logits)
        prior = fast.spread_prior(*msd.prior_qk(phi, seen & valid), full, x, head=8)
        assert prior[0].shape[-1] == (n + 1 if short else 8)   # z(S), or W + 2 dimensions
        assert worst(layer(x, full, pad, prior, table)[full], expected[full]) < 1e-5


def losses_of_six_steps(fusion):
    torch.manual_seed(4)
    m = small_mask(fusion=fusion, dropout=0.0, alpha0=0.5).train()
    optimizer = torch.optim.AdamW(m.parameters(), 1e-3)
    losses = []
    for _ in range(6):
        ids = torch.randint(20, (6, 15))
        c, role = texts(6)
        valid = first_of(15, torch.randint(2, 16, (6,)))
        masked, chosen = mask_tokens(m, ids, c, valid)
        loss = m(masked, c, role, valid, targets=torch.where(chosen, ids, -100))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return np.array(losses)


@pytest.mark.parametrize('fusion', ['zscore', 'rescaled'])
def test_same_losses_as_plain_training(fusion, monkeypatch):
    """Six training steps with the closed forms and six with Eq 13 written out: the same losses,
    to rounding."""
    fast_losses = losses_of_six_steps(fusion)
    spectrum = MaskTransformer.spectrum
    last = {}

    def remember(self, ids):
        last['f'], last['seen'] = spectrum(self, ids)
        return last['f'], last['seen']

    def forward(self, x, valid, pad, prior, rotary):
        return plain_attention(self, x, valid, msd.descriptor(last['f']), last['seen'])

    monkeypatch.setattr(MaskTransformer, 'spectrum', remember)
    monkeypatch.setattr(Attention, 'forward', forward)
    plain_losses = losses_of_six_steps(fusion)
    assert np.abs(fast_losses - plain_losses).max() < 1e-4
    assert fast_losses[0] != fast_losses[1]


@torch.no_grad()
def test_rotary_logits_know_only_distance():
    """What a query makes of a key is the same wherever the two are, as far apart; and another where
    they are further apart. Text, whatever there is of it, has place 0."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    table = model.rotary_table(30, 8)
    qs, ks = model.rotate(q.expand(1, 1, 30, 8), table), model.rotate(k.expand(1, 1, 30, 8), table)
    A = (qs @ ks.mT)[0, 0]
    for apart in range(-5, 6):
        assert A.diagonal(apart).std() < 1e-5
    assert A[0].std() > 0.1
    assert torch.equal(model.rotate(q, table[:, :1]), q)

    m = small_mask(rotary=True, spectral_attn=False).eval()
    seen = []
    for layer in m.trunk.layers:
        layer.attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[-1]))
    for pieces in (1, 4):
        c = torch.randn(2, pieces, 512)
        m(torch.randint(20, (2, 9)), c, torch.ones(2, pieces), first_of(9, torch.tensor([9, 5])))
        assert torch.equal(seen[-1][:, :pieces], table[:, :1].expand(-1, pieces, -1))
        assert torch.equal(seen[-1][:, pieces:], table[:, 1:10])


@torch.no_grad()
def test_embedding_reads_neighbours():
    """Before the layers a token depends on the two on either side and on no others, nor on
    padding."""
    torch.manual_seed(0)
    trunk = small_mask(neighbours=2, spectral_attn=False).trunk.eval()
    trunk.layers = torch.nn.ModuleList()   # what they are given
    x, valid = torch.randn(1, 9, 8), first_of(9, [7])
    text = torch.zeros(1, 1, 24), torch.ones(1, 1, dtype=torch.bool)
    before = trunk(x, valid, *text)
    for place, reached in ((4, [2, 3, 4, 5, 6]), (0, [0, 1, 2]), (7, [])):
        other = x.clone()
        other[:, place] += 1
        changed = (trunk(other, valid, *text) - before).abs().amax(-1)[0, :7]
        assert changed.nonzero()[:, 0].tolist() == reached


# ------------------------------------------------------------------------------------- transformers


def test_initial_weights():
    """Token embeddings start as standardised code vectors, or small and random as in the reference;
    attention as in torch."""
    torch.manual_seed(0)
    codebook = torch.randn(20, 8) * 3 + 1
    m = MaskTransformer(ModelConfig(**SMALL), codebook)
    codes = m.token_emb.weight[:20]
    distances = torch.cdist(codes, codes) * codebook.std()
    assert worst(distances, torch.cdist(codebook, codebook)) < 0.5
    assert abs(codes.std() - 1) < 1e-3
    assert m.token_emb.weight[20:].abs().max() < 0.1
    random = MaskTransformer(ModelConfig(**SMALL, token_init='random'), codebook)
    assert random.token_emb.weight.abs().max() < 0.1
    assert torch.equal(random.G, m.G)
    reference = torch.nn.MultiheadAttention(24, 3)
    for layer in m.trunk.layers:
        ratio = layer.attn.in_proj.weight.std() / reference.in_proj_weight.std()
        assert abs(ratio - 1) < 0.1
        assert not layer.attn.in_proj.bias.any()
        assert abs(layer.linear1.weight.std() / 0.02 - 1) < 0.15


@torch.no_grad()
def test_all_off_is_a_plain_transformer():
    """With spectral attention off a block is nn.TransformerEncoderLayer with the same weights."""
    torch.manual_seed(0)
    block = small_mask(spectral_attn=False).eval().trunk.layers[0]
    x = torch.randn(2, 9, 24)
    valid = first_of(9, [9, 5])
    reference = torch.nn.TransformerEncoderLayer(24, 3, 32, activation='gelu', batch_first=True)
    weights = {}
    for name, tensor in block.state_dict().items():
        name = name.replace('attn.in_proj.', 'self_attn.in_proj_')
        name = name.replace('attn.out_proj', 'self_attn.out_proj')
        weights[name] = tensor
    reference.load_state_dict(weights)
    expected = reference.eval()(x, src_key_padding_mask=~valid)
    pad = torch.zeros(2, 9).masked_fill(~valid, -torch.inf)[:, None, None]
    assert worst(block(x, valid, pad)[valid], expected[valid]) < 1e-5


@pytest.mark.parametrize('spectral', [False, True])
@torch.no_grad()
def test_padding_changes_nothing(spectral):
    torch.manual_seed(1)
    m = small_mask(spectral_attn=spectral, fusion='zscore', rotary=True, neighbours=2).eval()
    ids = torch.randint(21, (3, 12))
    c, role = texts(3)
    valid = first_of(12, [12, 5, 8])
    padded = torch.where(valid, ids, m.PAD)
    garbage = torch.where(valid, ids, torch.randint(20, (3, 12)))
    logits = m(padded, c, role, valid)
    repadded = torch.where(valid, garbage, m.PAD)
    assert worst(logits[valid], m(repadded, c, role, valid)[valid]) < 1e-6
    alone = m(padded[1:2, :5], c[1:2], role[1:2], valid[1:2, :5])
    assert worst(logits[1, :5], alone[0]) < 1e-5
    # ids behind an end need not even be [PAD]
    assert worst(m(garbage, c, role, valid)[valid], logits[valid]) < 1e-6


@torch.no_grad()
def test_residual_padding_changes_nothing():
    torch.manual_seed(1)
    r = small_res().eval()
    c, role = texts(3)
    valid = first_of(12, [12, 5, 8])
    ids = torch.randint(20, (3, 12, 4))
    other = torch.where(valid[..., None], ids, torch.randint(20, (3, 12, 4)))
    for q in (1, 2, 3):
        logits = r(ids, c, role, valid, q)
        assert worst(logits[valid], r(other, c, role, valid, q)[valid]) < 1e-6
    assert worst(r(ids, c, role, valid), r(other, c, role, valid)) < 1e-6


@pytest.mark.parametrize('short', [True, False])
@torch.no_grad()
def test_invalid_condition_tokens_change_nothing(short, monkeypatch):
    torch.manual_seed(1)
    monkeypatch.setattr(fast, 'forms_logits', lambda x: short)
    monkeypatch.setattr(model, 'forms_logits', lambda x: short)
    m = small_mask().eval()
    r = small_res().eval()
    ids = torch.randint(20, (3, 12, 4))
    valid = first_of(12, [12, 5, 8])
    c, role = texts(3, m=3)
    one = c[:, :1], role[:, :1]
    three = c, role & torch.tensor([True, False, False])
    base = torch.where(torch.rand(3, 12) < 0.5, m.MASK, ids[..., 0])
    assert worst(m(base, *one, valid)[valid], m(base, *three, valid)[valid]) < 1e-5
    assert worst(m(base, *one, valid)[valid], m(base, c, role, valid)[valid]) > 1e-4
    for q in (1, 2, 3):
        assert worst(r(ids, *one, valid, q)[valid], r(ids, *three, valid, q)[valid]) < 1e-5
        assert worst(r(ids, *one, valid, q)[valid], r(ids, c, role, valid, q)[valid]) > 1e-4


@torch.no_grad()
def test_residual_layers_cycle_over_rows(monkeypatch):
    torch.manual_seed(2)
    r = small_res().eval()
    ids = torch.randint(20, (7, 6, 4))
    c, role = texts(7)
    valid = first_of(6, [6, 6, 3, 6, 1, 6, 4])
    passed = {}

    def remember(logits, targets, n_targets):
        passed['logits'], passed['targets'] = logits, targets
        return cross_entropy(logits, targets, n_targets)

    cross_entropy = model.cross_entropy
    monkeypatch.setattr(model, 'cross_entropy', remember)
    for row0 in (0, 2):
        loss = r(ids, c, role, valid, None, row0)
        for i in range(7):
            q = 1 + (row0 + i) % 3
            alone = r(ids[i:i + 1], c[i:i + 1], role[i:i + 1], valid[i:i + 1], q)[0]
            assert worst(passed['logits'][i], alone) < 1e-5
            expected = torch.where(valid[i], ids[i, :, q], -100)
            assert torch.equal(passed['targets'][i], expected)
        expected = F.cross_entropy(passed['logits'].flatten(0, 1), passed['targets'].flatten())
        assert worst(loss, expected) < 1e-5
    changed = ids.clone()
    changed[..., 2:] = 0   # layers from q on are never looked at
    assert worst(r(ids, c, role, valid, 2), r(changed, c, role, valid, 2)) == 0


@torch.no_grad()
def test_loss_is_the_cross_entropy_of_the_logits():
    torch.manual_seed(2)
    m = small_mask().eval()
    ids = torch.randint(20, (5, 9))
    c, role = texts(5)
    valid = first_of(9, [9, 2, 5, 9, 7])
    masked, chosen = mask_tokens(m, ids, c, valid)
    targets = torch.where(chosen, ids, -100)
    logits = m(masked, c, role, valid)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert worst(m(masked, c, role, valid, targets), expected) < 1e-5
    # several ranks share a batch: each divides by the number of targets of all of them
    shared = m(masked, c, role, valid, targets, n_targets=2 * chosen.sum())
    assert worst(shared, expected / 2) < 1e-5

    estimator = LengthEstimator().eval()
    lengths = torch.randint(50, (5,))
    expected = F.cross_entropy(estimator(c, role), lengths)
    assert worst(estimator(c, role, lengths), expected) < 1e-6


def test_dropout_keeps_mean_and_share():
    torch.manual_seed(0)
    x = torch.ones(1001, 997)
    y = dropout(x, 0.2, True)
    assert abs((y == 0).float().mean() - 51 / 256) < 2e-3
    assert abs(y.mean() - 1) < 2e-3
    assert dropout(x, 0.2, False) is x
    assert dropout(x, 0.0, True) is x


def test_learned_embedding_feeds_msd_without_gradient():
    m = MaskTransformer(ModelConfig(**SMALL, msd_embed='learned'))
    ids = torch.randint(20, (2, 10))
    f, seen = m.spectrum(ids)
    assert seen.all()
    assert not f.requires_grad
    before = f.clone()
    with torch.no_grad():
        m.token_emb.weight.normal_()
    assert worst(before, m.spectrum(ids)[0]) > 1e-3


# ------------------------------------------------------------------------------------------ masking

mask_by_each = pytest.mark.parametrize('mask_by', ['random', 'msd', 'velocity'])


@mask_by_each
def test_mask_tokens(mask_by):
    m = small_mask()
    g = seeded(0)
    ids = torch.randint(20, (400, 30))
    c, _ = texts(400)
    valid = first_of(30, torch.randint(1, 31, (400,)))
    out, chosen = mask_tokens(m, ids, c, valid, mask_by, generator=g)
    assert not (chosen & ~valid).any()
    assert (chosen.sum(1) >= 1).all()
    assert torch.equal(out[~chosen], ids[~chosen])
    masked = (out[chosen] == m.MASK).float().mean()
    kept = (out[chosen] == ids[chosen]).float().mean()
    assert abs(masked - 0.8) < 0.02
    assert abs(kept - (0.1 + 0.1 / 20)) < 0.02
    _, chosen = mask_tokens(m, ids, c, valid, mask_by, 0.6, g)
    assert torch.equal(chosen.sum(1), (0.6 * valid.sum(1)).round().clamp(min=1).long())


@mask_by_each
@pytest.mark.parametrize('share', [0.0, 0.4, 1.0])
def test_exactly_K_tokens_are_chosen(mask_by, share):
    ids = torch.randint(20, (50, 30))
    c, _ = texts(50)
    valid = first_of(30, torch.randint(1, 31, (50,)))
    K = (share * valid.sum(1)).round().clamp(min=1).long()
    chosen = masking.choose(small_mask(), ids, c, valid, K, mask_by, noise=0.5, cfs_share=0.5,
                            generator=seeded(0))
    assert torch.equal(chosen.sum(1), K)
    assert not (chosen & ~valid).any()


# ----------------------------------------------------------------------------------------- decoding


@pytest.fixture
def small():
    """mask and residual transformer, c, role, n, valid of four prompts."""
    torch.manual_seed(3)
    n = torch.tensor([12, 1, 7, 9])
    return small_mask().eval(), small_res().eval(), *texts(4), n, first_of(12, n)


@pytest.mark.parametrize('das_sampling', [False, True])
@pytest.mark.parametrize('msd_decode', ['kept', 'guess'])
def test_generate(das_sampling, msd_decode, small):
    m, r, c, role, n, valid = small

    def make(seed):
        return generate_base(m, c, role, n, das_sampling=das_sampling, msd_decode=msd_decode,
                             generator=seeded(seed))

    ids = make(0)
    assert torch.equal(ids, make(0))
    assert not torch.equal(ids, make(1))
    assert (ids[valid] < 20).all()
    assert (ids[~valid] == m.PAD).all()
    full = generate_residual(r, ids, c, role, n, generator=seeded(0))
    assert full.shape == (4, 12, 4)
    assert torch.equal(full[..., 0][valid], ids[valid])
    assert (full < 20).all()
    assert (full[~valid] == 0).all()
    assert (generate_base(m, c, role, n, steps=1, das_sampling=das_sampling)[valid] < 20).all()


@pytest.mark.parametrize('das_sampling', [False, True])
@pytest.mark.parametrize('given', [5, 12])
def test_known_tokens_stay(das_sampling, given, small):
    m, _, c, role, n, valid = small
    known = torch.randint(20, (4, 12))
    known[:, given:] = -1   # with 12 everything is given
    ids = generate_base(m, c, role, n, known, das_sampling=das_sampling, generator=seeded(0))
    kept = valid & (known >= 0)
    assert torch.equal(ids[kept], known[kept])
    assert (ids[valid] >= 0).all()
    assert (ids[valid] < 20).all()
    assert (ids[~valid] == m.PAD).all()
    other = generate_base(m, c, role, n, known, das_sampling=das_sampling, generator=seeded(1))
    assert torch.equal(ids, other) == (given == 12)


def test_known_gaps_are_filled(small):
    m, _, c, role, n, valid = small
    known = torch.randint(20, (4, 12))
    known[:, 1::3] = -1
    known[0] = -1   # one row wants everything
    ids = generate_base(m, c, role, n, known, generator=seeded(0))
    kept = valid & (known >= 0)
    assert torch.equal(ids[kept], known[kept])
    assert (ids[valid] < 20).all()
    nothing_known = torch.full_like(known, -1)
    free = generate_base(m, c, role, n, nothing_known, generator=seeded(0))
    assert torch.equal(free, generate_base(m, c, role, n, generator=seeded(0)))


def test_anneal_and_top_share(small):
    m, _, c, role, n, valid = small
    ids = generate_base(m, c, role, n, anneal=1.0, generator=seeded(0))
    assert (ids[valid] < 20).all()
    assert (ids[~valid] == m.PAD).all()

    def greedy(seed):   # one code of 20 can be drawn: nothing is left to chance
        return generate_base(m, c, role, n, das_sampling=False, top_share=0.05,
                             generator=seeded(seed))

    assert torch.equal(greedy(0), greedy(1))


def test_number_of_residual_layers(small):
    m, r, c, role, n, valid = small
    meta = dict(max_frames=48)
    pipe = Pipeline(small_vq(n_codes=20, n_quantizers=4), m, r, None, 'hash', meta)
    base_only = Pipeline(pipe.vq, m, None, None, 'hash', meta).generate(c, role, n)
    full = pipe.generate(c, role, n)
    assert full.shape == (4, 12, 4)
    assert base_only.shape == (4, 12, 1)
    for res_layers in (0, 1, 3):
        ids = pipe.generate(c, role, n, res_layers=res_layers)
        assert torch.equal(ids, full[..., :1 + res_layers])
        assert [len(motion) for motion in pipe.features(ids, n)] == [48, 4, 28, 36]
    assert torch.equal(base_only[valid], full[valid][:, :1])
    with pytest.raises(UserError, match='no length estimator'):
        pipe.lengths(c, role)


class TestEditing:
    @pytest.fixture
    def pipe(self, small):
        m, r, *_ = small
        return Pipeline(small_vq(n_codes=20, n_quantizers=4), m, r, None, 'hash',
                        dict(max_frames=48))

    def test_only_the_span_changes(self, pipe):
        ids = torch.randint(20, (12, 4))
        spans = [(2, 4), (8, 12)]
        inside = torch.tensor([2, 3, 8, 9, 10, 11])
        made = pipe.edit(ids, spans, 'a person jumps', seed=1)
        changed = (made != ids).any(-1).nonzero()[:, 0]
        assert len(changed) and set(changed.tolist()) <= set(inside.tolist())
        assert 0 <= made.min() and made.max() < 20
        assert not torch.equal(made, pipe.edit(ids, spans, 'a person jumps', seed=2))
        base = pipe.edit(ids, spans, 'a person jumps', res_layers=0)
        assert base.shape == (12, 1)

    def test_everything_known_stays(self, pipe, small):
        *_, c, role, n, valid = small
        known = torch.randint(20, (4, 12, 4))
        ids = pipe.generate(c, role, n, known=known)
        assert torch.equal(ids[valid], known[valid])
        nothing = torch.full_like(known, -1)
        assert torch.equal(pipe.generate(c, role, n, known=nothing),
                           pipe.generate(c, role, n))

    def test_the_text_decides(self, pipe):
        ids = torch.randint(20, (12, 4))
        jumps, kicks = (pipe.edit(ids, [(0, 12)], text, top_share=0.05, res_layers=0,
                                  cond_scale=20.0) for text in ('a person jumps', 'he kicks'))
        assert not torch.equal(jumps, kicks)

    def test_longer_than_the_model(self, pipe):
        ids = torch.randint(20, (60, 4))
        made = pipe.edit(ids, [(1, 3), (30, 36), (59, 60)], 'a person jumps')
        outside = [*range(1), *range(3, 30), *range(36, 59)]
        assert torch.equal(made[outside], ids[outside])
        with pytest.raises(UserError, match='48 frames are to be filled in one piece'):
            pipe.edit(ids, [(10, 22)], 'a person jumps')

    def test_join(self, pipe):
        parts = [torch.randint(20, (n, 4)) for n in (9, 1, 30, 12)]
        texts = ['walks', 'jumps', 'sits', 'bows']
        made = pipe.join(parts, texts, overlap=2)
        plain = torch.cat(parts)
        kept = [*range(7), *range(12, 38), *range(42, 52)]
        assert made.shape == plain.shape
        assert torch.equal(made[kept], plain[kept])
        assert not torch.equal(made, plain)
        assert torch.equal(pipe.join(parts[:1], texts[:1]), parts[0])


def test_one_graph_for_all_steps_and_lengths():
    """Hot paths compile without graph breaks, and a new length within one padded width is no new
    graph."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    m = small_mask().train()
    r = small_res().train()
    compiled = [torch.compile(x, backend=count, fullgraph=True) for x in (m, r, small_vq())]
    for length in (12, 5, 9):
        valid = first_of(12, [length, 12, 3])
        ids = torch.randint(20, (3, 12, 4))
        c, role = texts(3)
        compiled[0](ids[..., 0], c, role, valid, ids[..., 0]).backward()
        compiled[1](ids, c, role, valid).backward()
        compiled[2](torch.randn(2, 32, 263), torch.tensor(1 + length % 3))
    assert len(graphs) == 3

    m.eval()
    c, role = texts(2)
    # generate_base itself stays eager; the forward that it calls compiles
    generate_base(m, c, role, torch.tensor([4, 9]))
    step = torch.compile(m, backend=count, fullgraph=True)
    before = len(graphs)
    with torch.no_grad():
        for length in (4, 7, 12):
            valid = first_of(12, [length, length])
            ids = torch.where(valid, m.MASK, m.PAD)
            step(ids, c, role, valid, spectrum=m.spectrum(ids))
    assert len(graphs) == before + 1


def test_sample_draws_the_softmax_of_the_top_tenth():
    g = seeded(0)
    x = torch.randn(512).mul(2)
    ids = sample(x.expand(40000, 1, 512), 0.1, 0.7, g)
    top, code = x.topk(52)
    assert set(ids.unique().tolist()) <= set(code.tolist())
    share = torch.bincount(ids[:, 0], minlength=512)[code] / 40000
    assert worst(share, (top / 0.7).softmax(0)) < 0.01


# -------------------------------------------------------------------------------------- text, files


def test_hashed_text_is_stable_and_knows_order():
    captions = ['a person walks then kicks', 'a person kicks then walks',
                'A person walks, then kicks.']
    c, role = text.caption_vectors(captions, 'hash')
    assert c.shape == (3, 1, 512)
    assert role.shape == (3, 1)
    assert role.all()
    a, b, again = c[:, 0]
    assert torch.equal(a, again)
    assert worst(a, b) > 0.1
    assert abs(a.norm() - 512 ** 0.5) < 1e-3
    alone, _ = text.caption_vectors(captions[:1], 'hash')
    assert torch.equal(alone[0, 0], a)


def test_clauses():
    def clauses(caption):
        return text.clauses(caption)

    assert clauses('a person walks forward, then kicks with the left leg') == [
        'a person walks forward', 'kicks with the left leg']
    assert clauses('he turns around and, after that, sits down before waving.') == [
        'he turns around', 'sits down', 'waving']
    assert clauses('First she runs; finally she stands') == ['she runs', 'she stands']
    assert clauses('a thenar andante') == ['a thenar andante']   # words, not parts of words
    assert clauses(' , and then!') == []
    _, index, _ = text.encode_captions(['walks, ' * 100], 'hash', 'clauses')
    assert index.shape == (1, 1 + text.MOST_TOKENS)


@pytest.mark.parametrize('mode', ['sentence', 'clauses'])
def test_condition_tokens(mode):
    """The sentence comes first whatever follows; what captions share is kept once."""
    captions = ['a man walks, then jumps', 'a man walks', 'jumps']
    vectors, index, role = text.encode_captions(captions, 'hash', mode)
    c, _ = text.caption_vectors(captions, 'hash', mode)
    assert torch.equal(c, vectors[index])
    assert torch.equal(role > 0, index > 0)
    sentences, _ = text.caption_vectors(captions, 'hash')
    assert torch.equal(c[:, :1], sentences)
    assert not vectors[0].any()
    expected = {'sentence': [1, 1, 1], 'clauses': [3, 2, 2]}[mode]
    assert role.sum(1).tolist() == expected
    unique = {'sentence': 3, 'clauses': 3}[mode]
    assert len(vectors) == 1 + unique
    if mode == 'clauses':
        assert index[0, 2] == index[2, 0]   # "jumps" is a clause here, and a sentence there


def test_hashed_words_may_be_inflected():
    def vector(caption):
        return text.caption_vectors([caption], 'hash')[0][0, 0]

    assert torch.equal(vector('a person jogs'), vector('the person is jogging'))
    assert torch.equal(vector('raises arms'), vector('raising his arms'))
    assert worst(vector('a person jogs'), vector('a person jumps')) > 0.1


def test_order_of_clauses_matters_and_padding_does_not(small):
    m, _, _, _, _, valid = small
    ids = torch.randint(20, valid.shape)
    c = torch.randn(4, 4, 512)
    role = torch.tensor([True, True, True, False]).expand(4, 4)
    with torch.no_grad():
        out = m(ids, c, role, valid)
        swapped = m(ids, c[:, [0, 2, 1, 3]], role, valid)
        other = m(ids, torch.cat([c[:, :3], torch.randn(4, 1, 512)], 1), role, valid)
        shorter = m(ids, c[:, :3], role[:, :3], valid)
    assert worst(out[valid], swapped[valid]) > 1e-4
    assert worst(out[valid], other[valid]) < 1e-6
    assert worst(out[valid], shorter[valid]) < 1e-5


@pytest.mark.parametrize('spectral', [False, True])
@torch.no_grad()
def test_guidance_at_scale_1_is_the_conditional_pass(spectral):
    torch.manual_seed(0)
    m = small_mask(spectral_attn=spectral).eval()
    ids, valid = torch.randint(21, (3, 9)), first_of(9, [9, 4, 7])
    c, role = texts(3)
    spectrum = m.spectrum(torch.where(valid, ids, m.PAD)) if spectral else None
    both = guided(m, 1 + 1e-9, ids, c, role, valid, spectrum)
    assert worst(guided(m, 1, ids, c, role, valid, spectrum)[valid], both[valid]) < 1e-5
    assert worst(guided(m, 4, ids, c, role, valid, spectrum)[valid], both[valid]) > 1e-3


def test_guidance_without_text_knows_nothing_of_its_clauses(small):
    """Two prompts with 1 and 3 clauses have one unconditional half."""
    m = small[0]
    n = torch.tensor([8, 8])
    c = torch.randn(2, 4, 512)
    role = torch.tensor([[True, True, False, False], [True, True, True, True]])
    seen = []
    forward = m.forward

    def remember(*arguments, **more):
        seen.append(forward(*arguments, **more))
        return seen[-1]

    m.forward = remember
    generate_base(m, c, role, n, steps=1)
    m.forward = forward
    cond, uncond = seen[0].chunk(2)
    assert worst(uncond[0], uncond[1]) < 1e-5
    assert worst(cond[0], cond[1]) > 1e-3


def test_clip_tower_and_its_cache(tmp_path):
    """The real open_clip path, with a randomly initialised tower: nothing is downloaded."""
    open_clip = pytest.importorskip('open_clip', reason='open_clip_torch is not installed')
    torch.manual_seed(0)
    tower = text.clip_tower(pretrained=None)
    calls = []

    def make_tower(device):
        def encode(captions):
            calls.append(len(captions))
            return tower(captions)
        return encode

    def encode(captions):
        c, role = text.caption_vectors(captions, 'clip', cache=str(tmp_path), tower=make_tower)
        assert role.shape == c.shape[:2]
        assert role.all()
        return c

    x = encode(['a person walks', 'a person runs', 'a person walks'])
    assert x.shape == (3, 1, 512)
    assert torch.equal(x[0], x[2])
    assert worst(x[0], x[1]) > 1e-3
    assert abs(x[0].norm() - 1) > 1e-2   # un-normalised, as MoMask uses it
    y = encode(['a person walks', 'a person jumps'])
    assert torch.equal(x[0], y[0])
    assert calls == [2, 1]               # only the new caption was encoded

    torch.manual_seed(0)
    whole = open_clip.create_model('ViT-B-32-quickgelu', pretrained=None).eval()
    long = 'a person, having run for a while, sits down on the floor and ' + 'waits and ' * 60
    captions = ['a person walks', long, '']
    ids = open_clip.get_tokenizer('ViT-B-32-quickgelu')(captions)
    with torch.no_grad():
        for some in (slice(0, 1), slice(0, 3)):   # cut at the longest caption, it says the same
            assert worst(tower(captions[some]), whole.encode_text(ids[some])) < 1e-4


def test_files_are_whole_or_absent(tmp_path):
    path = str(tmp_path / 'a.pt')
    save({'x': torch.ones(2)}, path)
    assert load(path, '')['x'].sum() == 2
    assert os.listdir(tmp_path) == ['a.pt']
    with open(path, 'r+b') as f:
        f.truncate(100)
    with pytest.raises(UserError, match='cannot be read'):
        load(path, '')
    with pytest.raises(UserError, match='run this first'):
        load(str(tmp_path / 'b.pt'), 'run this first')
