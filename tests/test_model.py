"""Networks, masking and decoding: against the outputs of MoMask's code, against plain formulas, and
for invariances such as that padding changes nothing.

MoMask's outputs and small checkpoints in its format are in ../shared/golden. Tests that need them
are skipped where that folder does not exist.
"""
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import generate
import model
import momask
import msd
from generate import Pipeline, generate_base, generate_residual, guided, sample
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
    torch.manual_seed(0)
    sizes = dict(dim=263, n_codes=16, code_dim=8, n_quantizers=3, width=16)
    return RVQVAE(VQConfig(**{**sizes, **more}))


@pytest.fixture
def small():
    """Masked and residual transformer, c, role, n, valid of four prompts."""
    torch.manual_seed(3)
    n = torch.tensor([12, 1, 7, 9])
    return small_mask().eval(), small_res().eval(), *texts(4), n, first_of(12, n)


@pytest.fixture
def pipe(small):
    """A Pipeline for motions of at most 12 tokens, with 4 quantizers of 20 codes."""
    mask, res, *_ = small
    vq = small_vq(n_codes=20, n_quantizers=4)
    return Pipeline(vq, mask, res, None, 'hash', dict(max_frames=48))


@pytest.fixture(params=[True, False], ids=['logits', 'fused'])
def forms_logits(request, monkeypatch):
    """Run a test with both forms of attention: with logits, and with the fused kernel."""
    for module in (fast, model):
        monkeypatch.setattr(module, 'forms_logits', lambda x: request.param)
    return request.param


# --------------------------------------------------------------------------------- official weights


def official_tokenizer(data, g):
    vq = momask.tokenizer(root(data), data, 'rvq_tiny')
    ids = vq.encode(g['motion'])
    codes = [q.codebook[i].mT for q, i in zip(vq.quantizers, ids.unbind(-1))]
    return dict(ids=ids, codes=torch.stack(codes), recon=vq(g['motion'])[0],
                from_ids=vq.decode(ids), from_base=vq.decode(ids[..., :1]))


def golden_batch(g):
    """ids, c (B, 1, 512), role, valid that MoMask's code was given."""
    c = g['cond'][:, None]
    return g['ids'], c, torch.ones(c.shape[:2], dtype=torch.bool), ~g['padding_mask']


def official_mask_transformer(data, g):
    m = momask.mask_transformer(root(data), data, 't2m_tiny')
    ids, c, role, valid = golden_batch(g)
    return dict(logits=m(ids, c, role, valid).mT,
                logits_uncond=m(ids, c * 0, role, valid).mT,
                logits_cfg4=guided(m, 4, ids, c, role, valid).mT)


def official_res_transformer(data, g):
    m = momask.res_transformer(root(data), data, 'tres_tiny')
    batch = golden_batch(g)
    outputs = {}
    for q in range(1, m.config.n_quantizers):
        outputs[f'logits_q{q}'] = m(*batch, q).mT
        outputs[f'logits_cfg5_q{q}'] = guided(m, 5, *batch, q=q).mT
    return outputs


def official_length_estimator(data, g):
    c = g['text_emb'][:, None]
    role = torch.ones(c.shape[:2], dtype=torch.bool)
    return dict(logits=momask.length_estimator(root(data), data)(c, role))


@needs_golden
@each_dataset
@pytest.mark.parametrize('name, outputs_of', [
    ('rvq', official_tokenizer),
    ('mask_transformer', official_mask_transformer),
    ('res_transformer', official_res_transformer),
    ('length_estimator', official_length_estimator)])
@torch.no_grad()
def test_official_networks_give_the_outputs_of_momask(data, name, outputs_of):
    with np.load(os.path.join(GOLDEN, data, name + '.npz')) as f:
        arrays = {key: torch.from_numpy(f[key]) for key in f.files}
    for key, output in outputs_of(data, arrays).items():
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
    assert torch.equal(ids, pipe.generate(c, role, n, steps=4))
    assert ids.shape == (3, 10, 4)
    motions = pipe.features(ids, n)
    assert [len(motion) for motion in motions] == [40, 16, 28]
    assert all(np.isfinite(motion).all() for motion in motions)
    lengths = pipe.lengths(c, role)
    assert 1 <= lengths.min() and lengths.max() <= 49


@needs_golden
def test_official_files_that_are_missing_or_do_not_belong_together(tmp_path):
    here = str(tmp_path)
    for load_network in (momask.tokenizer, momask.mask_transformer):
        with pytest.raises(UserError, match='no_such_name.*missing'):
            load_network(root('t2m'), 't2m', 'no_such_name')
    with pytest.raises(UserError, match='0 folders'):
        generate.official_pipeline(here, 't2m')

    folder = tmp_path / 't2m' / 't2m_other'
    os.makedirs(folder / 'model')
    for source, opt, fact in (
            ('rvq_tiny/model/net_best_fid.tar', None, 'latest.tar.*t2m_transformer'),
            ('t2m_tiny/model/latest.tar', None, 'opt.txt'),
            ('t2m_tiny/model/latest.tar', 'n_heads: 5\nvq_name: rvq_tiny\n',
             'latest.tar.*width 36.*5 heads')):
        shutil.copy(os.path.join(root('t2m'), 't2m', source), folder / 'model' / 'latest.tar')
        if opt:
            (folder / 'opt.txt').write_text(opt)
        with pytest.raises(UserError, match=fact):
            momask.mask_transformer(here, 't2m')


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


@needs_golden
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_official_tensors_must_fit_and_no_code_is_run(tmp_path):
    folder = tmp_path / 't2m' / 'len' / 'model'
    os.makedirs(folder)
    path = folder / 'finest.tar'
    finest = os.path.join(root('t2m'), 't2m/length_estimator/model/finest.tar')
    checkpoint = torch.load(finest, weights_only=True)
    checkpoint['estimator']['output.4.weight'] = torch.zeros(3, 3)
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=r'output.4.weight.*\(3, 3\).*\(256, 512\)'):
        momask.length_estimator(str(tmp_path), 't2m', 'len')

    created = tmp_path / 'created'
    entries = {'estimator': Malicious(created)}
    for write in (torch.save, lambda entries, path: path.write_bytes(pickle.dumps(entries))):
        write(entries, path)
        with pytest.raises(UserError, match='finest.tar cannot be read'):
            momask.length_estimator(str(tmp_path), 't2m', 'len')
        assert not created.exists()


# ---------------------------------------------------------------------------------------- tokenizer


def test_vq_shapes_and_straight_through():
    vq = small_vq()
    x = torch.randn(2, 32, 263)
    vq.init_codebooks(x, seeded(0))
    y, commit, ids, seen = vq(x)
    assert y.shape == x.shape and ids.shape == (2, 8, 3)
    assert commit > 0 and len(seen) == 3
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vq.parameters())
    assert vq.encode(x).shape == (2, 8, 3)
    assert vq.decode(ids).shape == x.shape
    # quantization dropout: with one active layer the output is the base reconstruction
    assert worst(vq(x, torch.tensor(1))[0], vq.decode(ids[..., :1])) < 1e-5


def test_dead_codes_move_to_the_data():
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


def test_features_of_zero_variance_stay_small():
    std = torch.ones(263)
    std[50:60] = 0
    vq = RVQVAE(small_vq().config, torch.zeros(263), std)
    assert vq.normalize(1e-4 * torch.ones(2, 32, 263)).abs().max() < 10
    assert vq.denormalize(torch.zeros(2, 32, 263)).abs().max() < 1e-3


def test_features_do_not_depend_on_padding():
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
    """RoPE as published: pairs of dimensions as complex numbers, multiplied by e^(i t theta)."""
    d = x.shape[-1]
    theta = torch.tensor([100.0 ** (-2 * i / d) for i in range(d // 2)])
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
    out = torch.zeros_like(v)
    for b in range(B):
        ok = motion[b][:, None] & motion[b][None]
        S = torch.zeros(N, N)
        s = -(w * (phi[b][:, None] - phi[b][None]).square()).sum(-1)             # Eq 11
        known = seen[b] & motion[b][1:]
        pair = known[:, None] & known[None]
        if pair.any():
            values = s[pair]
            deviation = (values.var(unbiased=False) + msd.EPS).sqrt()
            S[1:, 1:][pair] = (values - values.mean()) / deviation
        for h in range(heads):
            a = A[b, h][ok]   # of motion tokens: condition tokens have no part in sigma
            centred = A[b, h] - a.mean()
            sigma = (a.var(unbiased=False) + msd.EPS).sqrt()
            fused = (1 - alpha) * centred / sigma + alpha * S                    # Eq 13
            if layer.fusion == 'rescaled':
                fused = (1 - alpha) * centred + alpha * sigma.detach() * S
            weights = (fused + pad[b, 0]).softmax(-1)
            out[b, h] = weights @ v[b, h]
    return layer.out_proj(out.transpose(1, 2).reshape(B, N, d))


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
        return logits, {name: p.grad.clone() for name, p in m.named_parameters()}

    logits, gradients = logits_and_gradients()
    assert widths == {n + 1 if forms_logits else 8}   # z(S), or W + 2 dimensions

    f, seen = m.spectrum(ids)
    phi = msd.descriptor(f)
    place = torch.arange(n + 1) if rotary else None

    def plain_forward(layer, x, motion, pad, z_S, rotary):
        assert not motion[:, 0].any()
        assert torch.equal(motion[:, 1:], valid)
        return plain_attention(layer, x, motion, pad, phi, seen, place)

    monkeypatch.setattr(Attention, 'forward', plain_forward)
    plain_logits, plain_gradients = logits_and_gradients()
    assert worst(logits, plain_logits) < 1e-5
    for name, gradient in gradients.items():
        assert worst(gradient, plain_gradients[name]) < 1e-5


@torch.no_grad()
def test_rotary_places():
    """All text tokens have place 0, however many there are, and motion tokens have 1, 2, ..."""
    table = model.rotary_table(30, 8)
    m = small_mask(rotary=True, spectral_attn=False).eval()
    seen = []
    for layer in m.trunk.layers:
        layer.attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[-1]))
    for pieces in (1, 4):
        m(torch.randint(20, (2, 9)), *texts(2, pieces), first_of(9, [9, 5]))
        assert torch.equal(seen[-1][:, :pieces], table[:, :1].expand(-1, pieces, -1))
        assert torch.equal(seen[-1][:, pieces:], table[:, 1:10])


@torch.no_grad()
def test_embedding_reads_neighbours():
    """With neighbours=2 the input of the layers at a token depends on the two tokens on either
    side, and never on padding."""
    torch.manual_seed(0)
    trunk = small_mask(neighbours=2, spectral_attn=False).trunk.eval()
    trunk.layers = torch.nn.ModuleList()   # so that the trunk returns their input
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
    """Token embeddings start as standardized code vectors, or small and random as in MoMask, and
    attention as nn.MultiheadAttention."""
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
def test_block_without_a_prior_is_a_torch_layer():
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


def network_logits(kind):
    """-> a function of ids (B, n, 4), c, role, valid that returns logits (B, n, ...)."""
    if kind == 'residual':
        r = small_res().eval()

        def residual(ids, *rest):
            return torch.cat([r(ids, *rest, q) for q in (1, 2, 3)], -1)

        return residual

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
    torch.manual_seed(1)
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
        other = torch.where(valid[..., None], ids, torch.randint(20, ids.shape))
        assert worst(r(other, c, role, valid, None, row0), loss) < 1e-6
    changed = ids.clone()
    changed[..., 2:] = 0   # layers from q on are not used
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
    # ranks that share a batch divide by the number of targets of the whole batch
    shared = m(masked, c, role, valid, targets, n_targets=2 * chosen.sum())
    assert worst(shared, expected / 2) < 1e-5

    estimator = LengthEstimator().eval()
    lengths = torch.randint(50, (5,))
    expected = F.cross_entropy(estimator(c, role), lengths)
    assert worst(estimator(c, role, lengths), expected) < 1e-6


def test_dropout_keeps_the_mean():
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


@pytest.mark.parametrize('das_sampling', [False, True])
@pytest.mark.parametrize('msd_decode', ['kept', 'guess'])
def test_generate(das_sampling, msd_decode, small):
    m, r, c, role, n, valid = small

    def make(seed, **more):
        ids = generate_base(m, c, role, n, das_sampling=das_sampling, msd_decode=msd_decode,
                            generator=seeded(seed), **more)
        assert 0 <= ids[valid].min() and ids[valid].max() < 20
        assert (ids[~valid] == m.PAD).all()
        return ids

    ids = make(0)
    assert torch.equal(ids, make(0))
    assert not torch.equal(ids, make(1))
    make(0, steps=1)
    make(0, anneal=1.0)
    if not das_sampling:   # with one code of 20 to sample from, the seed has no effect
        assert torch.equal(make(0, top_share=0.05), make(1, top_share=0.05))

    full = generate_residual(r, ids, c, role, n, generator=seeded(0))
    assert full.shape == (4, 12, 4)
    assert torch.equal(full[..., 0][valid], ids[valid])
    assert (full < 20).all()
    assert (full[~valid] == 0).all()


@pytest.mark.parametrize('das_sampling', [False, True])
@pytest.mark.parametrize('given', ['all', 'the start', 'all but gaps', 'nothing'])
def test_known_tokens_stay(das_sampling, given, pipe, small):
    *_, c, role, n, valid = small
    known = torch.randint(20, (4, 12, 4))
    if given == 'the start':
        known[:, 5:] = -1
    if given == 'all but gaps':
        known[:, 1::3] = -1
        known[0] = -1
    if given == 'nothing':
        known[:] = -1

    def make(seed, known=known):
        return pipe.generate(c, role, n, seed, known, das_sampling=das_sampling)

    ids = make(0)
    kept = valid[..., None] & (known >= 0)
    assert torch.equal(ids[kept], known[kept])
    assert 0 <= ids[valid].min() and ids[valid].max() < 20
    assert (ids[~valid] == 0).all()
    assert torch.equal(ids, make(1)) == (given == 'all')
    assert torch.equal(ids, make(0, None)) == (given == 'nothing')


def test_number_of_residual_layers(pipe, small):
    *_, c, role, n, valid = small
    base_only = Pipeline(pipe.vq, pipe.mask, None, None, 'hash', pipe.meta).generate(c, role, n)
    full = pipe.generate(c, role, n)
    assert full.shape == (4, 12, 4)
    assert base_only.shape == (4, 12, 1)
    assert torch.equal(base_only[valid], full[valid][:, :1])
    for res_layers in (0, 1, 3):
        ids = pipe.generate(c, role, n, res_layers=res_layers)
        assert torch.equal(ids, full[..., :1 + res_layers])
        assert [len(motion) for motion in pipe.features(ids, n)] == [48, 4, 28, 36]
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

    def make(seed, **more):
        return pipe.edit(ids, spans, 'a person jumps', seed, **more)

    edited = make(1)
    assert torch.equal(edited[~inside], ids[~inside])
    assert not torch.equal(edited, ids)
    assert 0 <= edited.min() and edited.max() < 20
    assert not torch.equal(edited, make(2))
    assert make(1, res_layers=0).shape == (n, 1)


def test_edit_follows_the_text_and_refuses_long_spans(pipe):
    def edit(n, span, text):
        return pipe.edit(torch.zeros(n, 4, dtype=torch.long), [span], text, top_share=0.05,
                         res_layers=0, cond_scale=20.0)

    assert not torch.equal(edit(12, (0, 12), 'a person jumps'), edit(12, (0, 12), 'he kicks'))
    with pytest.raises(UserError, match='48 frames'):
        edit(60, (10, 22), 'a person jumps')


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
    step = torch.compile(m, backend=count, fullgraph=True)
    before = len(graphs)
    with torch.no_grad():
        for length in (4, 7, 12):
            valid = first_of(12, [length, length])
            ids = torch.where(valid, m.MASK, m.PAD)
            step(ids, c, role, valid, spectrum=m.spectrum(ids))
    assert len(graphs) == before + 1


def test_sample_is_the_softmax_of_the_top_tenth():
    g = seeded(0)
    x = torch.randn(512).mul(2)
    ids = sample(x.expand(40000, 1, 512), 0.1, 0.7, g)
    top, code = x.topk(52)
    assert set(ids.unique().tolist()) <= set(code.tolist())
    share = torch.bincount(ids[:, 0], minlength=512)[code] / 40000
    assert worst(share, (top / 0.7).softmax(0)) < 0.01


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


@torch.no_grad()
def test_unconditional_logits_do_not_depend_on_the_text():
    """At scale 0 guidance is the unconditional pass, whatever the text and its clauses."""
    torch.manual_seed(0)
    m = small_mask().eval()
    ids = torch.full((2, 8), m.MASK)
    c = torch.randn(2, 4, 512)
    role = torch.tensor([[True, True, False, False], [True, True, True, True]])
    no_text, text = (guided(m, scale, ids, c, role, first_of(8, [8, 8])) for scale in (0, 1))
    assert worst(no_text[0], no_text[1]) < 1e-5
    assert worst(text[0], text[1]) > 1e-3
