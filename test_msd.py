"""msd.py and the mask selection of masking.py against the formulas of the paper, on random inputs:

    python -m pytest test_msd.py

The oracle is each equation as published, slow and obvious: unfold the window, multiply by the DCT,
sum over D.
"""
import math

import pytest
import torch
import torch.nn.functional as F

import masking
import msd

each_seed = pytest.mark.parametrize('seed', range(20))
V, D = 24, 16
WINDOWS = [2, 3, 4, 5, 8, 8, 12]
KNOWN_SHARES = [1.0, 0.7, 0.3, 0.05]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_case(seed, max_n=40):
    """A random codebook E (V, D), ids (5, n), known (5, n) and W: with repeated tokens (held
    poses), masked tokens, and short and long rows."""
    g = seeded(seed)
    n = 2 + int(torch.randint(max_n - 2, (1,), generator=g))
    W = WINDOWS[seed % len(WINDOWS)]
    E = torch.randn(V, D, generator=g) * (1 + 3 * torch.rand(1, generator=g))
    ids = torch.randint(V, (5, n), generator=g)
    hold = torch.rand(5, n, generator=g) < 0.4
    for t in range(1, n):
        ids[:, t] = torch.where(hold[:, t], ids[:, t - 1], ids[:, t])
    known = torch.rand(5, n, generator=g) < KNOWN_SHARES[seed % len(KNOWN_SHARES)]
    return E, ids, known, W


def random_spectrum(seed):
    """f, seen and W of a random case."""
    E, ids, known, W = random_case(seed)
    return *msd.spectrum(ids, msd.gram(E), known, W), W


def everything(ids):
    return torch.ones_like(ids, dtype=torch.bool)


def velocity_of(x, known, gap):
    """Eq 4 of one row x (n, D), known (n,) -> v (n, D) float64, and whether each is known."""
    n = len(x)
    v = torch.zeros(n, D, dtype=torch.float64)
    v_known = [False] * n
    for t in range(n):
        now = max(t, 1)   # v_0 = v_1
        before = [i for i in range(now) if known[i]]
        after = [i for i in range(now, n) if known[i]]
        if not before or not after:
            continue
        a, b = before[-1], after[0]
        if b == a + 1 or gap == 'interp':   # the slope of the line between the known ends
            v[t] = (x[b].double() - x[a].double()) / (b - a)
            v_known[t] = True
    return v, v_known


def oracle(x, known, W, gap):
    """Eqs 4-6 as published, from vectors x (B, n, D) -> f, seen."""
    B, n, _ = x.shape
    f = torch.zeros(B, n, W, dtype=torch.float64)
    seen = torch.zeros(B, n, dtype=torch.bool)
    place = torch.arange(W, dtype=torch.float64) + 0.5
    for b in range(B):
        v, v_known = velocity_of(x[b], known[b], gap)
        for t in range(n):
            u = torch.zeros(W, D, dtype=torch.float64)
            first = t - (W - 1) // 2
            n_known = 0
            for i in range(W):
                if 0 <= first + i < n:
                    u[i] = v[first + i]
                    n_known += v_known[first + i]
            for k in range(W):
                basis = torch.cos(math.pi / W * place * k)
                f[b, t, k] = (basis[:, None] * u).sum(0).norm()   # Eqs 5, 6
            f[b, t] *= math.sqrt(W / max(n_known, 1))
            seen[b, t] = n_known > 0
    return f, seen


def zscore_of(values):
    return (values - values.mean()) / (values.var(unbiased=False) + msd.EPS).sqrt()


# ----------------------------------------------------------------------------------- the descriptor


@pytest.mark.parametrize('gap', ['interp', 'zero'])
@each_seed
def test_both_forms_of_the_spectrum_equal_the_oracle(seed, gap):
    E, ids, known, W = random_case(seed)
    expected, expected_seen = oracle(E[ids], known, W, gap)
    readable = msd.plain_spectrum(E[ids], known, W, gap)
    assert (readable.double() - expected).abs().max() < 1e-5 * (1 + expected.max())

    f, seen = msd.spectrum(ids, msd.gram(E), known, W, gap)
    assert torch.equal(seen, expected_seen)
    # f is a square root of f^2: where it is nearly 0, rounding by e in f^2 is sqrt(e) in f
    largest = expected.max() + 1
    assert (f.double().square() - expected.square()).abs().max() < 1e-5 * largest.square()
    phi = msd.descriptor(f)
    expected = expected / (expected.norm(dim=-1, keepdim=True) + msd.EPS)   # Eq 7
    assert (phi.double() - expected).abs().max() < 4e-3
    assert (phi.double() - expected).abs().mean() < 1e-5


def test_interpolation_is_the_velocity_of_the_straight_line():
    """The spectrum of a motion with a hidden middle is that of the motion with a straight line
    there. Where nothing is hidden, both rules for gaps agree."""
    E, ids, _, W = random_case(3)
    G = msd.gram(E)
    known = everything(ids)
    hidden = known.clone()
    hidden[:, 4:9] = False
    line = E[ids].clone()
    for t in range(4, 9):
        line[:, t] = E[ids[:, 3]] + (t - 3) / 6 * (E[ids[:, 9]] - E[ids[:, 3]])
    expected = msd.plain_spectrum(line, known, W)
    f, seen = msd.spectrum(ids, G, hidden, W, 'interp')
    assert seen.all()
    assert (f - expected).abs().max() < 2e-3 * expected.max()
    assert torch.equal(msd.spectrum(ids, G, known, W, 'zero')[0], msd.spectrum(ids, G, known, W)[0])
    assert (msd.spectrum(ids, G, hidden, W, 'zero')[0] - f).abs().max() > 0.1


@each_seed
def test_speed_is_the_norm_of_the_velocities(seed):
    E, ids, known, _ = random_case(seed)
    speed = msd.speed(ids, msd.gram(E), known)
    expected = [velocity_of(E[row], ok, 'interp')[0].norm(dim=-1) for row, ok in zip(ids, known)]
    assert (speed - torch.stack(expected)).abs().max() < 1e-4
    assert (msd.speed(ids[:, :1], msd.gram(E), known[:, :1]) == 0).all()


def test_one_token_has_no_velocity():
    ids = torch.zeros(3, 1, dtype=torch.long)
    f, seen = msd.spectrum(ids, torch.eye(4), everything(ids), 8)
    assert f.shape == (3, 1, 8)
    assert not f.any()
    assert not seen.any()


@each_seed
def test_static_tokens_score_zero(seed):
    E, ids, _, W = random_case(seed)
    ids[:] = ids[:, :1]
    f, seen = msd.spectrum(ids, msd.gram(E), everything(ids), W)
    assert seen.all()
    assert f.abs().max() == 0
    assert msd.descriptor(f).abs().max() == 0
    for omega in ('energy', 'flatness'):
        assert msd.complexity(f, omega).abs().max() == 0


@each_seed
def test_omega_is_energy_or_flatness(seed):
    E, ids, known, W = random_case(seed)
    f, _ = msd.spectrum(ids, msd.gram(E), known, W)
    larger, _ = msd.spectrum(ids, msd.gram(10 * E), known, W)
    energy = msd.complexity(f)
    assert (energy - f.square().sum(-1).sqrt()).abs().max() < 1e-4
    assert (msd.complexity(larger) - 10 * energy).abs().max() < 1e-3 * (1 + 10 * energy.max())
    omega = msd.complexity(f, 'flatness')        # Eq 8 as published
    assert (omega - msd.complexity(larger, 'flatness')).abs().max() < 1e-3   # amplitude cancels
    moving = omega[omega > 0]
    assert (moving > 1 / W - 1e-4).all()
    assert (moving < W ** -0.5 + 1e-4).all()


@each_seed
def test_unknown_tokens_and_padding_have_no_effect(seed):
    E, ids, known, W = random_case(seed)
    G = msd.gram(E)
    n = ids.shape[1]
    f, seen = msd.spectrum(ids, G, known, W)
    garbage = torch.where(known, ids, (ids + 7) % V)
    f2, seen2 = msd.spectrum(garbage, G, known, W)
    assert torch.equal(f, f2)
    assert torch.equal(seen, seen2)
    longer = F.pad(ids, (0, 9), value=3)
    f3, seen3 = msd.spectrum(longer, G, F.pad(known, (0, 9), value=False), W)
    assert (f - f3[:, :n]).abs().max() < 1e-5 * (1 + f.max())
    assert torch.equal(seen, seen3[:, :n])


@each_seed
def test_a_delayed_motion_has_the_same_spectrum(seed):
    E, ids, _, W = random_case(seed)
    G = msd.gram(E)
    motion = torch.randint(V, (5, 30 + 2 * W), generator=seeded(seed))
    delayed = torch.cat([ids, motion], 1)
    f, _ = msd.spectrum(motion, G, everything(motion), W)
    later, _ = msd.spectrum(delayed, G, everything(delayed), W)
    away_from_the_ends = slice(W, -W)
    a = msd.descriptor(f[:, away_from_the_ends])
    b = msd.descriptor(later[:, ids.shape[1]:][:, away_from_the_ends])
    assert (a.square() - b.square()).abs().max() < 1e-5


@each_seed
def test_zscore_is_over_valid_positions_only(seed):
    g = seeded(seed)
    x = torch.randn(6, 30, generator=g) * 5 + 3
    valid = torch.rand(6, 30, generator=g) < 0.6
    z = msd.zscore(x, valid)
    assert (z[~valid] == 0).all()
    for row, ok in enumerate(valid):
        assert (z[row][ok] - zscore_of(x[row][ok])).abs().max() < 1e-5
    assert torch.equal(msd.zscore(torch.where(valid, x, 1e3), valid), z)
    assert (msd.zscore(x, torch.zeros_like(valid)) == 0).all()


# ----------------------------------------------------------------------------------- mask selection


@pytest.mark.parametrize('r_exp, noise', [(0, 0.0), (0, 1.0), (1, 0.0), (3, 0.5)])
@each_seed
def test_exactly_K_tokens_are_selected(seed, r_exp, noise):
    g = seeded(seed)
    n_valid = torch.randint(1, 50, (32,), generator=g)
    valid = torch.arange(49) < n_valid[:, None]
    K = (torch.rand(32, generator=g) * n_valid).round().clamp(min=1).long()
    dyn = torch.randn(32, 49, generator=g)
    sem = torch.randn(32, 49, generator=g)
    for lam in (0.0, 0.3, 1.0):
        chosen = masking.select(dyn, sem, K, valid, lam, r_exp, noise, g)
        assert torch.equal(chosen.sum(1), K)
        assert not (chosen & ~valid).any()


@each_seed
def test_the_two_quotas_do_not_overlap(seed):
    """With one score for both quotas they select the top K, none of them twice."""
    g = seeded(seed)
    dyn = torch.randn(8, 40, generator=g)
    sem = torch.randn(8, 40, generator=g)
    valid = everything(dyn)
    K = torch.randint(1, 41, (8,), generator=g)
    top_dyn = masking.top_k(dyn, K, valid)
    assert torch.equal(masking.select(dyn, dyn, K, valid, 0.4), top_dyn)
    assert torch.equal(masking.select(dyn, sem, K, valid, 0.0), top_dyn)
    assert torch.equal(masking.select(dyn, sem, K, valid, 1.0), masking.top_k(sem, K, valid))
    K_dyn = K - (0.3 * K).round().long()
    chosen = masking.select(dyn, sem, K, valid, 0.3)
    assert (chosen | ~masking.top_k(dyn, K_dyn, valid)).all()   # the first quota is the dynamic one


def test_expansion_selects_neighbours():
    s = torch.full((1, 20), -1.0) + torch.linspace(0, 0.01, 20)
    s[0, 10] = 5.0
    chosen = masking.select(s, s, torch.tensor([3]), everything(s), 0.0, r_exp=1)
    assert chosen[0].nonzero()[:, 0].tolist() == [9, 10, 11]


def test_semantic_score_is_a_zscored_cosine():
    x = torch.randn(3, 10, 8)
    c = torch.randn(3, 8)
    cosine = (x * c[:, None]).sum(-1) / x.norm(dim=-1) / c.norm(dim=-1)[:, None]
    valid = everything(cosine)
    s_sem = masking.semantic_score(x, c, valid)   # Eq 10
    assert (s_sem - msd.zscore(cosine, valid)).abs().max() < 1e-5


# ---------------------------------------------------------------------------------------- attention


@each_seed
def test_prior_equals_plain_similarity(seed):
    f, seen, W = random_spectrum(seed)
    phi = msd.descriptor(f)
    w = torch.exp(-torch.arange(W) / 3)
    w = w / w.sum()                                               # Eq 12
    difference = phi[:, :, None] - phi[:, None]
    S = -(w * difference.square()).sum(-1)                        # Eq 11, tau = 1
    assert (msd.similarity(phi) - S).abs().max() < 1e-6
    qs, ks = msd.prior_qk(phi, seen)
    assert qs.shape[-1] == W + 2
    for b in range(len(phi)):
        pair = seen[b][:, None] & seen[b][None]
        expected = torch.zeros_like(S[b])
        if pair.any():
            expected[pair] = zscore_of(S[b][pair].double()).float()
        assert (qs[b] @ ks[b].T - expected).abs().max() < 2e-4    # z of Eq 13


def test_weights_of_layers_and_bands():
    assert msd.alpha(0, 0.3) == 0.3
    assert abs(msd.alpha(3, 0.3) - 0.3 / math.e) < 1e-9                   # Eq 14
    w = msd.band_weights(8)
    assert abs(w.sum() - 1) < 1e-6
    assert (w[1:] / w[:-1] - math.exp(-1 / 3)).abs().max() < 1e-5         # Eq 12


# ----------------------------------------------------------------------------------------- decoding


@each_seed
def test_exploration_score(seed):
    """How certain the model is of tokens that are not being decoded does not matter. Less certain
    tokens explore more, and so do more complex ones."""
    f, seen, _ = random_spectrum(seed)
    omega = msd.complexity(f)
    g = seeded(seed)
    masked = torch.rand(omega.shape, generator=g) < 0.5
    p = torch.rand(omega.shape, generator=g)
    b = msd.exploration(omega, seen, p, masked, 0.4)
    k = msd.zscore(omega, seen)
    u = msd.zscore(1 - p, masked)
    assert (b - torch.sigmoid(0.4 * k + 0.6 * u)).abs().max() < 1e-6      # Eqs 15-17
    others_are_certain = torch.where(masked, p, 1.0)
    other = msd.exploration(omega, seen, others_are_certain, masked, 0.4)
    assert torch.equal(other[masked], b[masked])

    only_u = msd.exploration(omega, seen, p, masked, 0.0)
    only_k = msd.exploration(omega, seen, p, masked, 1.0)
    for row in range(len(omega)):
        order = p[row][masked[row]].argsort()
        assert (only_u[row][masked[row]][order].diff() <= 1e-6).all()
        order = omega[row][seen[row]].argsort()
        assert (only_k[row][seen[row]][order].diff() >= -1e-6).all()
