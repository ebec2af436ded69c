"""Networks, masking and decoding: against the outputs of MoMask's code, against plain formulas, and
for invariances such as that padding changes nothing.

MoMask's outputs and small checkpoints in its format are in ../shared/golden. Tests that need them
are skipped where that folder does not exist.
"""
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import generate
import model
import momask
import msd
from generate import Pipeline, generate_base, guided, sample
from lib import fast
from lib.configurator import UserError
from lib.fast import dropout
from masking import mask_tokens
from model import Attention, LengthEstimator, MaskTransformer, ModelConfig, ResTransformer
from vq import RVQVAE, VQConfig

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.path.join(HERE, '..', '..', 'shared', 'golden')
needs_golden = pytest.mark.skipif(not os.path.isdir(GOLDEN), reason='../shared/golden is missing')
each_dataset = pytest.mark.parametrize('data', ['t2m', 'kit'])
SMALL = dict(n_codes=20, code_dim=8, n_quantizers=4, latent=24, n_layers=3, n_heads=3, ff=32)


def root(data):
    return os.path.join(GOLDEN, data, 'momask_checkpoints')


def worst(a, b):
    return float((a - b).detach().abs().max())


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def texts(B, m=1):
    """Random condition tokens c (B, m, 512) and role (B, m), all of them valid."""
    return torch.randn(B, m, 512), torch.ones(B, m, dtype=torch.bool)


def first_of(n, lengths):
    """valid (B, n): the first lengths[i] tokens of row i."""
    return torch.arange(n) < torch.as_tensor(lengths)[:, None]


def small_mask(**more):
    config = ModelConfig(**{**SMALL, 'spectral_attn': True, **more})
    return MaskTransformer(config, torch.randn(20, 8))


def small_res():
    return ResTransformer(ModelConfig(**SMALL))


def small_vq(**more):
    """A tokenizer whose codebooks have been initialized."""
    sizes = dict(dim=263, n_codes=20, code_dim=8, n_quantizers=4, width=16)
    vq = RVQVAE(VQConfig(**{**sizes, **more}))
    vq.init_codebooks(torch.randn(4, 32, 263), seeded(0))
    return vq


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(3)


@pytest.fixture
def small():
    """Masked and residual transformer, c, role, n, valid of four prompts."""
    n = torch.tensor([12, 1, 7, 9])
    return small_mask().eval(), small_res().eval(), *texts(4), n, first_of(12, n)


@pytest.fixture
def pipe(small):
    """A Pipeline for motions of at most 12 tokens, with 4 quantizers of 20 codes."""
    return Pipeline(small_vq(), *small[:2], None, 'hash', dict(max_frames=48))


@pytest.fixture(params=[True, False], ids=['logits', 'fused'])
def forms_logits(request, monkeypatch):
    """Run a test with both forms of attention: with logits, and with the fused kernel."""
    for module in (fast, model):
        monkeypatch.setattr(module, 'forms_logits', lambda x: request.param)
    return request.param


# --------------------------------------------------------------------------------- official weights


def official_outputs(data, name, g):
    """What our network with official weights makes of MoMask's inputs g: {array: tensor}"""
    place = root(data), data
    if name == 'rvq':
        vq = momask.tokenizer(*place, 'rvq_tiny')
        ids = vq.encode(g['motion'])
        codes = [q.codebook[i].mT for q, i in zip(vq.quantizers, ids.unbind(-1))]
        return dict(ids=ids, codes=torch.stack(codes), recon=vq(g['motion'])[0],
                    from_ids=vq.decode(ids), from_base=vq.decode(ids[..., :1]))

    c = g['text_emb' if name == 'length_estimator' else 'cond'][:, None]
    role = torch.ones(c.shape[:2], dtype=torch.bool)
    if name == 'length_estimator':
        return dict(logits=momask.length_estimator(*place)(c, role))

    ids, valid = g['ids'], ~g['padding_mask']
    if name == 'mask_transformer':
        m = momask.mask_transformer(*place, 't2m_tiny')
        return dict(logits=m(ids, c, role, valid).mT,
                    logits_uncond=m(ids, c * 0, role, valid).mT,
                    logits_cfg4=guided(m, 4, ids, c, role, valid).mT)

    m = momask.res_transformer(*place, 'tres_tiny')
    outputs = {}
    for q in range(1, m.config.n_quantizers):
        outputs[f'logits_q{q}'] = m(ids, c, role, valid, q).mT
        outputs[f'logits_cfg5_q{q}'] = guided(m, 5, ids, c, role, valid, q=q).mT
    return outputs


@needs_golden
@each_dataset
@pytest.mark.parametrize('name', ['rvq', 'mask_transformer', 'res_transformer',
                                  'length_estimator'])
@torch.no_grad()
def test_official_networks_give_the_outputs_of_momask(data, name):
    with np.load(os.path.join(GOLDEN, data, name + '.npz')) as f:
        arrays = {key: torch.from_numpy(f[key]) for key in f.files}
    for key, output in official_outputs(data, name, arrays).items():
        assert output.shape == arrays[key].shape
        assert worst(output, arrays[key]) < 1e-4


@needs_golden
@each_dataset
def test_official_pipeline(data):
    pipe = generate.official_pipeline(root(data), data)
    # the checkpoints have no Gram table: it must come from the tokenizer
    assert pipe.mask.G.any()
    assert torch.equal(pipe.mask.G, msd.gram(pipe.vq.quantizers[0].codebook))
    c, role = texts(3)
    n = torch.tensor([10, 4, 7])
    ids = pipe.generate(c, role, n, steps=4)
    assert ids.shape == (3, 10, 4)
    assert [len(motion) for motion in pipe.features(ids, n)] == [40, 16, 28]
    lengths = pipe.lengths(c, role)
    assert 1 <= lengths.min() and lengths.max() <= 49


@needs_golden
def test_official_files_that_do_not_belong_together(tmp_path):
    with pytest.raises(UserError, match='momask_root'):
        generate.official_pipeline(str(tmp_path), 't2m')
    folder = tmp_path / 't2m' / 't2m_other'
    shutil.copytree(os.path.join(root('t2m'), 't2m', 't2m_tiny'), folder)
    (folder / 'opt.txt').write_text('n_heads: 5\nvq_name: rvq_tiny\n')
    with pytest.raises(UserError, match='latest.tar.*width 36.*5 heads'):
        momask.mask_transformer(str(tmp_path), 't2m')


# ---------------------------------------------------------------------------------------- tokenizer


def test_vq_shapes_and_straight_through():
    vq = small_vq()
    x = torch.randn(2, 32, 263)
    y, commit, ids, residuals = vq(x)
    assert y.shape == x.shape and ids.shape == (2, 8, 4) and len(residuals) == 4
    assert commit > 0
    assert torch.equal(vq.encode(x), ids)
    assert worst(vq.decode(ids), y) < 1e-5
    # quantization dropout: with one active layer the output is the base reconstruction
    assert worst(vq(x, torch.tensor(1))[0], vq.decode(ids[..., :1])) < 1e-5
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vq.parameters())


def test_dead_codes_move_to_the_data():
    quantizer = small_vq(n_codes=16, code_dim=4).quantizers[0]
    centres = torch.randn(8, 4) * 5
    r = centres.repeat(100, 1) + 0.01 * torch.randn(800, 4)
    quantizer.init(torch.full((16, 4), 100.0))   # every code is dead
    for _ in range(300):
        quantizer.update(r, quantizer.nearest(r), r[torch.randint(800, (16,))])
    assert (torch.cdist(centres, quantizer.codebook).min(1).values < 0.05).all()


def test_features_of_zero_variance_stay_small():
    std = torch.ones(263)
    std[50:60] = 0
    vq = RVQVAE(small_vq().config, torch.zeros(263), std)
    assert vq.normalize(1e-4 * torch.ones(2, 32, 263)).abs().max() < 10
    assert vq.denormalize(torch.zeros(2, 32, 263)).abs().max() < 1e-3


def test_features_do_not_depend_on_padding(pipe):
    ids = torch.randint(20, (3, 10, 4))
    n = torch.tensor([10, 4, 7])
    for row, features in enumerate(pipe.features(ids, n)):
        alone = pipe.vq.decode(ids[row:row + 1, :n[row]])[0]
        assert worst(torch.from_numpy(features), alone) < 1e-5


# --------------------------------------------------------------------------- motion-aware attention


def plain_rotated(x, place):
    """RoPE as published: pairs of dimensions as complex numbers, multiplied by e^(i t theta)."""
    d = x.shape[-1]
    theta = 100.0 ** (-2 * torch.arange(d // 2) / d)
    pairs = torch.complex(x[..., :d // 2], x[..., d // 2:])
    pairs = pairs * torch.exp(1j * place[:, None] * theta)
    return torch.cat([pairs.real, pairs.imag], -1)


def plain_attention(layer, x, motion, pad, phi, seen, place):
    """Motion-aware attention as published: logits, z-score, Eq 13, softmax. One condition token."""
    B, N, d = x.shape
    heads = layer.n_heads
    parts = layer.in_proj(x).chunk(3, -1)
    q, k, v = (part.view(B, N, heads, d // heads).transpose(1, 2) for part in parts)
    if place is not None:
        q, k = plain_rotated(q, place), plain_rotated(k, place)
    A = q @ k.mT / (d // heads) ** 0.5
    w = msd.band_weights(phi.shape[-1])
    alpha = layer.alpha
    out = []
    for b in range(B):
        s = -(w * (phi[b][:, None] - phi[b][None]).square()).sum(-1)             # Eq 11
        known = seen[b] & motion[b][1:]
        pairs = known[:, None] & known[None]
        S = torch.zeros(N, N)
        if pairs.any():
            deviation = (s[pairs].var(unbiased=False) + msd.EPS).sqrt()
            S[1:, 1:][pairs] = (s[pairs] - s[pairs].mean()) / deviation
        # of motion tokens, by head: condition tokens have no part in sigma
        a = A[b][:, motion[b][:, None] & motion[b][None]]
        centred = A[b] - a.mean(1)[:, None, None]
        sigma = (a.var(1, unbiased=False) + msd.EPS).sqrt()[:, None, None]
        fused = (1 - alpha) * centred / sigma + alpha * S                        # Eq 13
        if layer.fusion == 'rescaled':
            fused = (1 - alpha) * centred + alpha * sigma.detach() * S
        out.append((fused + pad[b, 0]).softmax(-1) @ v[b])
    return layer.out_proj(torch.stack(out).transpose(1, 2).reshape(B, N, d))


@pytest.mark.parametrize('fusion', ['zscore', 'rescaled'])
@pytest.mark.parametrize('rotary', [False, True])
@pytest.mark.parametrize('seed', range(5))
def test_motion_aware_attention_equals_plain(fusion, rotary, seed, forms_logits, monkeypatch):
    """The whole masked transformer, with either form of attention, has the logits and gradients
    that it has with `plain_attention`."""
    torch.manual_seed(seed)
    m = small_mask(fusion=fusion, rotary=rotary, dropout=0.0, window=6, alpha0=0.5)
    B, n = 4, 21
    valid = first_of(n, torch.randint(2, n + 1, (B,)))
    ids = torch.where(torch.rand(B, n) < 0.3, m.MASK, torch.randint(20, (B, n)))
    ids = torch.where(valid, ids, m.PAD)
    c, role = texts(B)
    widths = set()
    for layer in m.trunk.layers:
        layer.attn.in_proj.weight.data *= 3   # as sharp as after training
        layer.attn.register_forward_pre_hook(
            lambda _, inputs: widths.add(inputs[3][0].shape[-1]))

    def logits_and_gradients():
        m.zero_grad()
        logits = m(ids, c, role, valid)[valid]
        F.cross_entropy(logits, ids[valid] % 20).backward()
        return logits, *(p.grad.clone() for p in m.parameters())

    ours = logits_and_gradients()
    assert widths == {n + 1 if forms_logits else 8}   # z(S), or W + 2 dimensions

    f, seen = m.spectrum(ids)
    phi = msd.descriptor(f)
    place = torch.arange(n + 1) if rotary else None

    def plain_forward(layer, x, motion, pad, z_S, rotary):
        assert not motion[:, 0].any()
        assert torch.equal(motion[:, 1:], valid)
        return plain_attention(layer, x, motion, pad, phi, seen, place)

    monkeypatch.setattr(Attention, 'forward', plain_forward)
    for tensor, plain in zip(ours, logits_and_gradients()):
        assert worst(tensor, plain) < 1e-5


@pytest.mark.parametrize('place, reached', [(4, [2, 3, 4, 5, 6]), (0, [0, 1, 2]), (7, [])])
@torch.no_grad()
def test_embedding_reads_neighbours(place, reached):
    """With neighbours=2 the input of the layers at a token depends on the two tokens on either
    side, and never on padding (here from token 7 on)."""
    trunk = small_mask(neighbours=2, spectral_attn=False).trunk.eval()
    trunk.layers = torch.nn.ModuleList()   # so that the trunk returns their input
    x, valid = torch.randn(1, 9, 8), first_of(9, [7])
    other = x.clone()
    other[:, place] += 1
    text = torch.zeros(1, 1, 24), torch.ones(1, 1, dtype=torch.bool)
    changed = trunk(x, valid, *text) != trunk(other, valid, *text)
    assert changed[0, :7].any(-1).nonzero()[:, 0].tolist() == reached


# ------------------------------------------------------------------------------------- transformers


def test_initial_weights():
    """Token embeddings start as standardized code vectors, or small and random as in MoMask, and
    attention as nn.MultiheadAttention."""
    codebook = torch.randn(20, 8) * 3 + 1
    m = MaskTransformer(ModelConfig(**SMALL), codebook)
    codes = m.token_emb.weight[:20]
    distances = torch.cdist(codes, codes) * codebook.std()
    assert worst(distances, torch.cdist(codebook, codebook)) < 0.5
    assert abs(codes.std() - 1) < 1e-3
    random = MaskTransformer(ModelConfig(**SMALL, token_init='random'), codebook)
    assert max(m.token_emb.weight[20:].abs().max(), random.token_emb.weight.abs().max()) < 0.1
    assert torch.equal(random.G, m.G)
    reference = torch.nn.MultiheadAttention(24, 3)
    for layer in m.trunk.layers:
        ratio = layer.attn.in_proj.weight.std() / reference.in_proj_weight.std()
        assert abs(ratio - 1) < 0.1
        assert not layer.attn.in_proj.bias.any()
        assert abs(layer.linear1.weight.std() / 0.02 - 1) < 0.15


def network_logits(kind):
    """-> a function of ids (B, n, 4), c, role, valid that returns logits (B, n, ...)."""
    if kind == 'residual':
        r = small_res().eval()
        return lambda *batch: torch.cat([r(*batch, q) for q in (1, 2, 3)], -1)

    more = dict(spectral_attn=False) if kind == 'plain' else dict(fusion=kind)
    m = small_mask(rotary=True, neighbours=2, **more).eval()

    def masked(ids, *rest):
        base = ids[..., 0].clone()
        base[:, ::3] = m.MASK
        return m(base, *rest)

    return masked


@pytest.mark.parametrize('kind', ['plain', 'zscore', 'rescaled', 'residual'])
@torch.no_grad()
def test_padding_changes_nothing(kind, forms_logits):
    """Neither tokens behind the end of a motion nor condition tokens with role 0 have an effect.
    The order of the condition tokens has."""
    logits = network_logits(kind)
    valid = first_of(12, [12, 5, 8])
    ids = torch.randint(20, (3, 12, 4))
    c, role = texts(3, m=4)
    role[:, 3] = False
    expected = logits(ids, c, role, valid)
    other_ids = torch.where(valid[..., None], ids, torch.randint(20, (3, 12, 4)))
    assert worst(logits(other_ids, c, role, valid)[valid], expected[valid]) < 1e-6
    alone = logits(ids[1:2, :5], c[1:2], role[1:2], valid[1:2, :5])
    assert worst(alone[0], expected[1, :5]) < 1e-5

    other_c = torch.cat([c[:, :3], torch.randn(3, 1, 512)], 1)
    assert worst(logits(ids, other_c, role, valid)[valid], expected[valid]) < 1e-6
    for m in (1, 3):   # fewer condition tokens are the same as invalid ones
        shorter = logits(ids, c[:, :m], role[:, :m], valid)
        hidden = logits(ids, c, role & (torch.arange(4) < m), valid)
        assert worst(shorter[valid], hidden[valid]) < 1e-5
    for changed in (logits(ids, c, torch.ones_like(role), valid),
                    logits(ids, c[:, [0, 2, 1, 3]], role, valid)):
        assert worst(changed[valid], expected[valid]) > 3e-5


@pytest.mark.parametrize('row0', [0, 2])
@torch.no_grad()
def test_residual_layers_cycle_over_rows(row0):
    """The loss is that of one layer per row, each row by itself. Layers from q on are not used."""
    r = small_res().eval()
    ids = torch.randint(20, (7, 6, 4))
    c, role = texts(7)
    valid = first_of(6, [6, 6, 3, 6, 1, 6, 4])
    logits, targets = [], []
    for i in range(7):
        q = 1 + (row0 + i) % 3
        below = ids[i:i + 1].clone()
        below[..., q:] = 0
        row = slice(i, i + 1)
        logits.append(r(below, c[row], role[row], valid[row], q)[0])
        targets.append(torch.where(valid[i], ids[i, :, q], -100))
    expected = F.cross_entropy(torch.cat(logits), torch.cat(targets))
    assert worst(r(ids, c, role, valid, None, row0), expected) < 1e-6


@torch.no_grad()
def test_the_length_estimator_sums_the_valid_vectors():
    estimator = LengthEstimator().eval()
    c, role = texts(4, m=3)
    role[:, 2] = False
    n = torch.tensor([12, 1, 7, 9])
    expected = estimator(c[:, :1] + c[:, 1:2], role[:, :1])
    assert worst(estimator(c, role), expected) < 1e-5
    assert worst(estimator(c, role, n), F.cross_entropy(expected, n)) < 1e-5


def test_dropout_keeps_the_mean():
    x = torch.ones(1001, 997)
    y = dropout(x, 0.2, True)
    assert abs((y == 0).float().mean() - 51 / 256) < 2e-3
    assert abs(y.mean() - 1) < 2e-3
    assert dropout(x, 0.2, False) is dropout(x, 0.0, True) is x


def test_learned_embedding_feeds_msd_without_gradient():
    m = small_mask(msd_embed='learned')
    ids = torch.randint(20, (2, 10))
    f, _ = m.spectrum(ids)
    assert not f.requires_grad
    torch.nn.init.normal_(m.token_emb.weight)
    assert worst(f, m.spectrum(ids)[0]) > 1e-3


# ------------------------------------------------------------------------------------------ masking


@pytest.mark.parametrize('mask_by', ['random', 'msd', 'velocity'])
def test_mask_tokens(mask_by):
    """As many tokens are chosen as asked for, and 80% of them become [MASK], 10% a random code."""
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
    for share in (0.0, 0.4, 0.6, 1.0):
        K = (share * valid.sum(1)).round().clamp(min=1).long()
        for how in ({}, dict(noise=0.5, cfs_share=0.5)):
            _, chosen = mask_tokens(m, ids, c, valid, mask_by, share, g, **how)
            assert torch.equal(chosen.sum(1), K)
            assert not (chosen & ~valid).any()


# ----------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize('more', [
    {}, dict(steps=1), dict(anneal=1.0), dict(msd_decode='guess'), dict(top_share=0.05),
    dict(das_sampling=True), dict(das_sampling=True, anneal=1.0, msd_decode='guess')])
def test_generate(more, small):
    """The seed decides, except where there is one code of 20 to sample from."""
    m, _, c, role, n, valid = small
    ids, same, other = (generate_base(m, c, role, n, generator=seeded(seed), **more)
                        for seed in (0, 0, 1))
    assert 0 <= ids[valid].min() and ids[valid].max() < 20
    assert (ids[~valid] == m.PAD).all()
    assert torch.equal(ids, same)
    assert torch.equal(ids, other) == ('top_share' in more)


@pytest.mark.parametrize('das_sampling', [False, True])
@pytest.mark.parametrize('wanted', [
    slice(0), slice(5, None), slice(1, None, 3), slice(None)], ids=['none', 'end', 'gaps', 'all'])
def test_known_tokens_stay(das_sampling, wanted, pipe, small):
    *_, c, role, n, valid = small
    known = torch.randint(20, (4, 12, 4))
    known[:, wanted] = -1

    def make(seed, known=known):
        return pipe.generate(c, role, n, seed, known, das_sampling=das_sampling)

    ids = make(0)
    kept = valid[..., None] & (known >= 0)
    assert torch.equal(ids[kept], known[kept])
    assert 0 <= ids[valid].min() and ids[valid].max() < 20
    assert (ids[~valid] == 0).all()
    assert torch.equal(ids, make(1)) == (wanted == slice(0))
    assert torch.equal(ids, make(0, None)) == (wanted == slice(None))


def test_number_of_residual_layers(pipe, small):
    *_, c, role, n, valid = small
    full = pipe.generate(c, role, n)
    for layers in (0, 1, 3):
        ids = pipe.generate(c, role, n, res_layers=layers)
        assert torch.equal(ids, full[..., :1 + layers])
        assert [len(motion) for motion in pipe.features(ids, n)] == [48, 4, 28, 36]
    pipe.res = None
    base_only = pipe.generate(c, role, n)
    assert base_only.shape == (4, 12, 1)
    assert torch.equal(base_only[valid], full[valid][:, :1])
    with pytest.raises(UserError, match='no length estimator'):
        pipe.lengths(c, role)


@pytest.mark.parametrize('n, spans', [
    (12, [(2, 4), (8, 12)]),
    (60, [(1, 3), (30, 36), (59, 60)])])   # longer than the model's 12 tokens
def test_edit_changes_the_spans_only(n, spans, pipe):
    ids = torch.randint(20, (n, 4))
    inside = torch.zeros(n, dtype=torch.bool)
    for first, end in spans:
        inside[first:end] = True
    edited, other = (pipe.edit(ids, spans, 'a person jumps', seed) for seed in (1, 2))
    assert torch.equal(edited[~inside], ids[~inside])
    assert not torch.equal(edited, ids) and not torch.equal(edited, other)
    assert 0 <= edited.min() and edited.max() < 20


def test_edit_follows_the_text_and_refuses_long_spans(pipe):
    ids = torch.zeros(60, 4, dtype=torch.long)
    jump, kick = (pipe.edit(ids[:12], [(0, 12)], text, top_share=0.05, res_layers=0)
                  for text in ('a person jumps', 'he kicks'))
    assert jump.shape == (12, 1) and not torch.equal(jump, kick)
    with pytest.raises(UserError, match='48 frames'):
        pipe.edit(ids, [(10, 22)], 'a person jumps')


def test_join(pipe):
    parts = [torch.randint(20, (n, 4)) for n in (9, 1, 30, 12)]
    texts = ['walks', 'jumps', 'sits', 'bows']
    joined = pipe.join(parts, texts, overlap=2)
    plain = torch.cat(parts)
    kept = [*range(7), *range(12, 38), *range(42, 52)]
    assert joined.shape == plain.shape
    assert torch.equal(joined[kept], plain[kept])
    assert not torch.equal(joined, plain)
    assert torch.equal(pipe.join(parts[:1], texts[:1]), parts[0])


def test_one_graph_for_all_steps_and_lengths():
    """Networks compile without graph breaks, and motions of other lengths, padded to the same
    width, do not compile again."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compiled(network):
        return torch.compile(network, backend=count, fullgraph=True)

    m = small_mask()
    mask, res, vq = compiled(m), compiled(small_res()), compiled(small_vq())
    ids = torch.randint(20, (3, 12, 4))
    c, role = texts(3)
    for length in (12, 5, 9):
        valid = first_of(12, [length, 12, 3])
        mask(ids[..., 0], c, role, valid, ids[..., 0]).backward()
        res(ids, c, role, valid).backward()
        vq(torch.randn(2, 32, 263), torch.tensor(1 + length % 3))
    assert len(graphs) == 3

    step = compiled(m.eval())
    with torch.no_grad():
        for length in (4, 7, 12):
            valid = first_of(12, 3 * [length])
            ids = torch.where(valid, m.MASK, m.PAD)
            step(ids, c, role, valid, spectrum=m.spectrum(ids))
    assert len(graphs) == 4


def test_sample_is_the_softmax_of_the_top_tenth():
    x = torch.randn(512).mul(2)
    ids = sample(x.expand(40000, 1, 512), 0.1, 0.7, seeded(0))
    top, code = x.topk(52)
    assert set(ids.unique().tolist()) <= set(code.tolist())
    share = torch.bincount(ids[:, 0], minlength=512)[code] / 40000
    assert worst(share, (top / 0.7).softmax(0)) < 0.01


@pytest.mark.parametrize('spectral', [False, True])
@torch.no_grad()
def test_guidance(spectral):
    """uncond + scale (cond - uncond), where the unconditional pass sees no text at all."""
    m = small_mask(spectral_attn=spectral).eval()
    ids, valid = torch.randint(21, (3, 9)), first_of(9, [9, 4, 7])
    c, role = texts(3, m=4)
    role[0, 2:] = False
    spectrum = m.spectrum(torch.where(valid, ids, m.PAD)) if spectral else None
    cond = m(ids, c, role, valid, spectrum=spectrum)
    uncond = m(ids, torch.zeros(3, 1, 512), role[:, :1], valid, spectrum=spectrum)
    assert worst(cond[valid], uncond[valid]) > 1e-3
    for scale in (0, 1, 4):
        logits = guided(m, scale, ids, c, role, valid, spectrum)
        assert worst(logits[valid], (uncond + scale * (cond - uncond))[valid]) < 1e-5
