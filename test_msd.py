"""msd.py against the plain formulas of the paper (Eqs 4-17), on random inputs.

    python -m pytest test_msd.py

The oracle is the letter of each equation, slow and obvious: unfold the window, multiply by the DCT,
sum over D.
"""
import math

import pytest
import torch
import torch.nn.functional as F

import msd
from lib.fast import logit_std

SEEDS = range(20)
V, D = 24, 16
WINDOWS = [2, 3, 4, 5, 8, 8, 12]
KNOWN_SHARES = [1.0, 0.7, 0.3, 0.05]


def random_case(seed, max_n=40):
    """Random codebook E, ids, known, W: with repeats (held poses), masked tokens, short and long
    rows."""
    g = torch.Generator().manual_seed(seed)
    B = 5
    n = 2 + int(torch.randint(max_n - 2, (1,), generator=g))
    W = WINDOWS[seed % len(WINDOWS)]
    E = torch.randn(V, D, generator=g) * (1 + 3 * torch.rand(1, generator=g))
    ids = torch.randint(V, (B, n), generator=g)
    hold = torch.rand(B, n, generator=g) < 0.4
    for t in range(1, n):
        ids[:, t] = torch.where(hold[:, t], ids[:, t - 1], ids[:, t])
    known = torch.rand(B, n, generator=g) < KNOWN_SHARES[seed % len(KNOWN_SHARES)]
    return E, ids, known, W


def everything(ids):
    return torch.ones_like(ids, dtype=torch.bool)


def velocity_of(x, known, gap):
    """Eq 4 of one row x (n, D), known (n,) -> v (n, D) float64, and whether it is known."""
    n = len(x)
    v = torch.zeros(n, D, dtype=torch.float64)
    v_known = [False] * n
    for t in range(n):
        now = max(t, 1)   # v_1 = v_2
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
    """Eqs 4-6 to the letter, from vectors x (B, n, D) -> f, seen."""
    B, n, _ = x.shape
    f = torch.zeros(B, n, W, dtype=torch.float64)
    seen = torch.zeros(B, n, dtype=torch.bool)
    place = torch.arange(W, dtype=torch.float64) + 0.5
    for b in range(B):
        v, v_known = velocity_of(x[b], known[b], gap)
        for t in range(n):
            u = torch.zeros(W, D, dtype=torch.float64)
            first = t - W // 2
            for i in range(W):
                if 0 <= first + i < n:
                    u[i] = v[first + i]
                    seen[b, t] |= v_known[first + i]
            for k in range(W):
                basis = torch.cos(math.pi / W * place * k)
                f[b, t, k] = (basis[:, None] * u).sum(0).norm()   # Eqs 5, 6
    return f, seen


def zscore_of(values):
    return (values - values.mean()) / (values.var(unbiased=False) + msd.EPS).sqrt()


# ----------------------------------------------------------------------------------- the descriptor


@pytest.mark.parametrize('gap', ['interp', 'zero'])
@pytest.mark.parametrize('seed', SEEDS)
def test_gram_table_equals_unfold_and_dct(seed, gap):
    E, ids, known, W = random_case(seed)
    f, seen = msd.spectrum(ids, msd.gram(E), known, W, gap)
    plain, plain_seen = oracle(E[ids], known, W, gap)
    assert torch.equal(seen, plain_seen)
    # f is a square root of f^2: where it is nearly 0, rounding by e in f^2 is sqrt(e) in f
    largest = plain.max() + 1
    assert (f.double().square() - plain.square()).abs().max() < 1e-5 * largest.square()
    phi, plain_phi = msd.unit(f), plain / (plain.norm(dim=-1, keepdim=True) + msd.EPS)   # Eq 7
    assert (phi.double() - plain_phi).abs().max() < 4e-3
    assert (phi.double() - plain_phi).abs().mean() < 1e-5


@pytest.mark.parametrize('gap', ['interp', 'zero'])
@pytest.mark.parametrize('seed', SEEDS)
def test_plain_spectrum_equals_oracle(seed, gap):
    E, ids, known, W = random_case(seed)
    readable = msd.plain_spectrum(E[ids], known, W, gap)
    expected, _ = oracle(E[ids], known, W, gap)
    assert (readable.double() - expected).abs().max() < 1e-5 * (1 + expected.max())


def test_interpolation_is_the_velocity_of_the_straight_line():
    """Hide the middle of a motion: the spectrum is that of the motion with a line drawn there; and
    where nothing is hidden the two rules are one."""
    E, ids, _, W = random_case(3)
    known = everything(ids)
    hidden = known.clone()
    hidden[:, 4:9] = False
    line = E[ids].clone()
    for t in range(4, 9):
        line[:, t] = E[ids[:, 3]] + (t - 3) / 6 * (E[ids[:, 9]] - E[ids[:, 3]])
    drawn = msd.plain_spectrum(line, known, W)
    f, seen = msd.spectrum(ids, msd.gram(E), hidden, W, 'interp')
    assert seen.all()
    assert (f - drawn).abs().max() < 2e-3 * drawn.max()
    G = msd.gram(E)
    assert torch.equal(msd.spectrum(ids, G, known, W, 'zero')[0], msd.spectrum(ids, G, known, W)[0])
    assert (msd.spectrum(ids, G, hidden, W, 'zero')[0] - f).abs().max() > 0.1


@pytest.mark.parametrize('seed', SEEDS)
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


def test_orthonormal_rows():
    """Eq 5's matrix is the unnormalised DCT-II: C C^T is diagonal with W, W/2, W/2, ..."""
    for W in (2, 5, 8):
        C = msd.dct_matrix(W)
        expected = torch.diag(torch.tensor([W] + [W / 2] * (W - 1), dtype=torch.float64))
        assert (C @ C.T - expected).abs().max() < 1e-12


@pytest.mark.parametrize('seed', SEEDS)
def test_static_tokens_score_zero(seed):
    E, ids, _, W = random_case(seed)
    ids[:] = ids[:, :1]
    f, seen = msd.spectrum(ids, msd.gram(E), everything(ids), W)
    assert seen.all()
    assert f.abs().max() == 0
    assert msd.unit(f).abs().max() == 0
    for omega in ('energy', 'flatness'):
        assert msd.complexity(f, omega).abs().max() == 0


@pytest.mark.parametrize('seed', SEEDS)
def test_omega_is_flatness_or_size(seed):
    E, ids, known, W = random_case(seed)
    f, _ = msd.spectrum(ids, msd.gram(E), known, W)
    larger, _ = msd.spectrum(ids, msd.gram(10 * E), known, W)
    energy = msd.complexity(f)
    assert (energy - f.square().sum(-1).sqrt()).abs().max() < 1e-4
    assert (msd.complexity(larger) - 10 * energy).abs().max() < 1e-3 * (1 + 10 * energy.max())
    omega = msd.complexity(f, 'flatness')        # Eq 8 to the letter
    assert (omega - msd.complexity(larger, 'flatness')).abs().max() < 1e-3   # amplitude cancels
    moving = omega[omega > 0]
    assert (moving > 1 / W - 1e-4).all()
    assert (moving < W ** -0.5 + 1e-4).all()


@pytest.mark.parametrize('seed', SEEDS)
def test_padding_never_leaks(seed):
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
    valid = torch.arange(n) < n // 2 + 1
    x = torch.randn(5, n)
    y = torch.where(valid, x, torch.randn(5, n) * 100)
    assert torch.equal(msd.zscore(x, valid.expand(5, n)), msd.zscore(y, valid.expand(5, n)))


@pytest.mark.parametrize('seed', SEEDS)
def test_shift(seed):
    """Away from the ends, a motion that starts later has the same spectrum, later."""
    E, ids, _, W = random_case(seed)
    tail = torch.randint(V, (5, 30 + 2 * W), generator=torch.Generator().manual_seed(seed))
    G = msd.gram(E)
    a, _ = msd.spectrum(tail, G, everything(tail), W)
    late = torch.cat([ids, tail], 1)
    b, _ = msd.spectrum(late, G, everything(late), W)
    b = b[:, ids.shape[1]:]
    inner = slice(W, -W)
    a, b = msd.unit(a[:, inner]), msd.unit(b[:, inner])
    assert (a.square() - b.square()).abs().max() < 1e-5


@pytest.mark.parametrize('seed', SEEDS)
def test_zscore_over_valid_positions_only(seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 30, generator=g) * 5 + 3
    valid = torch.rand(6, 30, generator=g) < 0.6
    z = msd.zscore(x, valid)
    assert (z[~valid] == 0).all()
    for row, ok in enumerate(valid):
        assert (z[row][ok] - zscore_of(x[row][ok])).abs().max() < 1e-5
    assert (msd.zscore(x, torch.zeros_like(valid)) == 0).all()


# ----------------------------------------------------------------------------------- mask selection

@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('r_exp,noise', [(0, 0.0), (0, 1.0), (1, 0.0), (3, 0.5)])
def test_quota_counts_exactly_K(seed, r_exp, noise):
    g = torch.Generator().manual_seed(seed)
    n_valid = torch.randint(1, 50, (32,), generator=g)
    valid = torch.arange(49) < n_valid[:, None]
    K = (torch.rand(32, generator=g) * n_valid).round().clamp(min=1).long()
    K = torch.minimum(K, valid.sum(1))
    dyn = torch.randn(32, 49, generator=g)
    sem = torch.randn(32, 49, generator=g)
    for lam in (0.0, 0.3, 1.0):
        chosen = msd.select(dyn, sem, K, valid, lam, r_exp, noise, g)
        assert torch.equal(chosen.sum(1), K)
        assert not (chosen & ~valid).any()


@pytest.mark.parametrize('seed', SEEDS)
def test_quotas_do_not_double_count(seed):
    """With one score for both, the two quotas together must take the top K, none of them twice."""
    g = torch.Generator().manual_seed(seed)
    s = torch.randn(8, 40, generator=g)
    valid = everything(s)
    K = torch.randint(1, 41, (8,), generator=g)
    assert torch.equal(msd.select(s, s, K, valid, 0.4), msd.top_k(s, K, valid))
    # and the first quota is really the dynamic one
    dyn = torch.randn(8, 40, generator=g)
    sem = torch.randn(8, 40, generator=g)
    chosen = msd.select(dyn, sem, K, valid, 0.3)
    K_dyn = K - (0.3 * K).round().long()
    assert (chosen | ~msd.top_k(dyn, K_dyn, valid)).all()
    assert torch.equal(msd.select(dyn, sem, K, valid, 0.0), msd.top_k(dyn, K, valid))
    assert torch.equal(msd.select(dyn, sem, K, valid, 1.0), msd.top_k(sem, K, valid))


def test_expansion_takes_neighbours():
    s = torch.full((1, 20), -1.0) + torch.linspace(0, 0.01, 20)
    s[0, 10] = 5.0
    chosen = msd.select(s, s, torch.tensor([3]), everything(s), 0.0, r_exp=1)
    assert chosen[0].nonzero()[:, 0].tolist() == [9, 10, 11]


def test_semantic_score_is_a_cosine():
    x = torch.randn(3, 10, 8)
    c = torch.randn(3, 8)
    cosine = torch.zeros(3, 10)
    for b in range(3):
        for t in range(10):
            cosine[b, t] = x[b, t] @ c[b] / x[b, t].norm() / c[b].norm()
    valid = everything(cosine)
    s_sem = msd.semantic_score(x, c, valid)   # Eq 10
    assert (s_sem - msd.zscore(cosine, valid)).abs().max() < 1e-5


# ---------------------------------------------------------------------------------------- attention

@pytest.mark.parametrize('seed', SEEDS)
def test_prior_equals_plain_similarity(seed):
    E, ids, known, W = random_case(seed)
    f, seen = msd.spectrum(ids, msd.gram(E), known, W)
    phi = msd.unit(f)
    w = torch.exp(-torch.arange(W) / 3)
    w = w / w.sum()                                               # Eq 12
    difference = phi[:, :, None] - phi[:, None]
    S = -(w * difference.square()).sum(-1)                        # Eq 11, tau = 1
    assert (msd.similarity(phi) - S).abs().max() < 1e-6
    qs, ks = msd.prior_qk(phi, seen)
    assert qs.shape[-1] == W + 2
    for b in range(len(ids)):
        pair = seen[b][:, None] & seen[b][None]
        expected = torch.zeros_like(S[b])
        if pair.any():
            expected[pair] = zscore_of(S[b][pair].double()).float()
        assert (qs[b] @ ks[b].T - expected).abs().max() < 2e-4    # z of Eq 13


@pytest.mark.parametrize('seed', SEEDS)
def test_logit_std_equals_plain(seed):
    g = torch.Generator().manual_seed(seed)

    def vectors():   # (B, H, N, d), with a mean that is not 0
        return torch.randn(4, 3, 30, 16, generator=g) * 2 + torch.randn(4, 3, 1, 16, generator=g)

    q = vectors() / 4   # the caller has scaled q by 1 / sqrt(d)
    k = vectors()
    valid = torch.arange(30) < torch.randint(1, 31, (4, 1), generator=g)
    sigma = logit_std(q, k, valid)
    A = q.double() @ k.double().mT
    for b in range(4):
        m = int(valid[b].sum())
        expected = (A[b, :, :m, :m].flatten(1).var(-1, unbiased=False) + msd.EPS).sqrt()
        assert (sigma[b, :, 0, 0] - expected).abs().max() < 1e-5 * (1 + expected.max())


def test_layer_schedule():
    assert msd.alpha(0, 0.3, 8) == 0.3
    assert abs(msd.alpha(3, 0.3, 8) - 0.3 / math.e) < 1e-9                # Eq 14
    w = msd.band_weights(8)
    assert abs(w.sum() - 1) < 1e-6
    assert (w[1:] / w[:-1] - math.exp(-1 / 3)).abs().max() < 1e-5         # Eq 12


def test_layer_schedules_of_the_ablation():
    decay = [msd.alpha(layer, 0.3, 6) for layer in range(6)]
    reverse = [msd.alpha(layer, 0.3, 6, 'reversed') for layer in range(6)]
    constant = [msd.alpha(layer, 0.3, 6, 'constant') for layer in range(6)]
    assert decay == sorted(decay, reverse=True)
    assert reverse == decay[::-1]
    assert constant == [0.3] * 6


# ----------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize('seed', SEEDS)
def test_exploration_score(seed):
    E, ids, known, W = random_case(seed)
    f, seen = msd.spectrum(ids, msd.gram(E), known, W)
    omega = msd.complexity(f)
    masked = everything(ids)
    p = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed))
    b = msd.exploration(omega, seen, p, masked, 0.4)
    k = msd.zscore(omega, seen)
    u = msd.zscore(1 - p, masked)
    assert (b - torch.sigmoid(0.4 * k + 0.6 * u)).abs().max() < 1e-6      # Eqs 15-17
    assert (b > 0).all()
    assert (b < 1).all()
    # monotone: among tokens, less certain ones explore more; more complex ones too
    only_u = msd.exploration(omega, seen, p, masked, 0.0)
    only_k = msd.exploration(omega, seen, p, masked, 1.0)
    for row in range(len(ids)):
        assert (only_u[row][p[row].argsort()].diff() <= 1e-6).all()
        order = omega[row][seen[row]].argsort()
        assert (only_k[row][seen[row]][order].diff() >= -1e-6).all()


@pytest.mark.parametrize('seed', SEEDS)
def test_uncertainty_is_compared_among_masked_tokens(seed):
    """Eq 17 is z-scored over what is being decoded: how sure the model is of kept tokens is
    nothing to it."""
    E, ids, known, W = random_case(seed)
    f, seen = msd.spectrum(ids, msd.gram(E), known, W)
    omega = msd.complexity(f)
    g = torch.Generator().manual_seed(seed)
    masked = torch.rand(ids.shape, generator=g) < 0.5
    p = torch.rand(ids.shape, generator=g)
    b = msd.exploration(omega, seen, p, masked, 0.4)
    surer = torch.where(masked, p, 1.0)
    assert torch.equal(msd.exploration(omega, seen, surer, masked, 0.4)[masked], b[masked])
    only_u = msd.exploration(omega, seen, p, masked, 0.0)
    for row, hidden in enumerate(masked):
        if hidden.any():
            expected = torch.sigmoid(zscore_of(1 - p[row][hidden]))
            assert (only_u[row][hidden] - expected).abs().max() < 1e-5
