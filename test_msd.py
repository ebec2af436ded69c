"""msd.py against the plain formulas of the paper (Eqs 4-21), on random inputs.   python -m pytest test_msd.py

The oracle is the letter of each equation, slow and obvious: unfold the window, multiply by the DCT, sum over D.
"""
import math

import pytest
import torch
import torch.nn.functional as F

import msd

SEEDS = range(20)
V, D = 24, 16


def random_case(seed, max_n=40):
    """Random codebook, ids, known, W: with repeats (held poses), masked tokens, short and long rows."""
    g = torch.Generator().manual_seed(seed)
    r = lambda high, *shape: torch.randint(high, shape or (1,), generator=g)
    B, n, W = 5, 2 + int(r(max_n - 2)), [2, 3, 4, 5, 8, 8, 12][seed % 7]
    E = torch.randn(V, D, generator=g) * (1 + 3 * torch.rand(1, generator=g))
    ids = r(V, B, n)
    hold = torch.rand(B, n, generator=g) < 0.4
    for t in range(1, n):
        ids[:, t] = torch.where(hold[:, t], ids[:, t - 1], ids[:, t])
    known = torch.rand(B, n, generator=g) < [1.0, 0.7, 0.3, 0.05][seed % 4]
    return E, ids, known, W


def plain_descriptor(x, known, W):
    """Eqs 4-7 to the letter, from vectors x (B, n, D)."""
    B, n, _ = x.shape
    phi, seen = torch.zeros(B, n, W, dtype=torch.float64), torch.zeros(B, n, dtype=torch.bool)
    for b in range(B):
        v, ok = torch.zeros(n, D, dtype=torch.float64), [False] * n
        for t in range(n):
            t1 = max(t, 1)                                             # Eq 4, v_1 = v_2
            if known[b, t1] and known[b, t1 - 1]:
                v[t], ok[t] = x[b, t1].double() - x[b, t1 - 1].double(), True
        for t in range(n):
            u, first = torch.zeros(W, D, dtype=torch.float64), t - W // 2
            for i in range(W):
                if 0 <= first + i < n:
                    u[i] = v[first + i]
                    seen[b, t] |= ok[first + i]
            f = torch.zeros(W, dtype=torch.float64)
            for k in range(W):
                basis = torch.cos(math.pi / W * (torch.arange(W, dtype=torch.float64) + 0.5) * k)
                f[k] = (basis[:, None] * u).sum(0).norm()               # Eqs 5, 6
            phi[b, t] = f / (f.norm() + msd.EPS)                        # Eq 7
    return phi, seen


@pytest.mark.parametrize('seed', SEEDS)
def test_gram_table_equals_unfold_and_dct(seed):
    E, ids, known, W = random_case(seed)
    phi, seen = msd.descriptor(ids, msd.gram(E), known, W)
    plain, plain_seen = plain_descriptor(E[ids], known, W)
    assert torch.equal(seen, plain_seen)
    # phi takes a square root of f^2: where f_k is nearly 0, rounding of size e in f^2 is sqrt(e) in f
    assert (phi.double().square() - plain.square()).abs().max() < 1e-5
    assert (phi.double() - plain).abs().max() < 2e-3
    assert (phi.double() - plain).abs().mean() < 1e-5


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
    phi, seen = msd.descriptor(ids, msd.gram(E), torch.ones_like(ids, dtype=torch.bool), W)
    assert seen.all() and phi.abs().max() == 0 and msd.complexity(phi).abs().max() == 0


@pytest.mark.parametrize('seed', SEEDS)
def test_omega_is_flatness_not_size(seed):
    E, ids, known, W = random_case(seed)
    omega = [msd.complexity(msd.descriptor(ids, msd.gram(s * E), known, W)[0]) for s in (1.0, 10.0)]
    assert (omega[0] - omega[1]).abs().max() < 1e-3                     # amplitude cancels
    moving = omega[0][omega[0] > 0]
    assert (moving > 1 / W - 1e-4).all() and (moving < W ** -0.5 + 1e-4).all()


@pytest.mark.parametrize('seed', SEEDS)
def test_padding_never_leaks(seed):
    E, ids, known, W = random_case(seed)
    G, n = msd.gram(E), ids.shape[1]
    other = torch.where(known, ids, (ids + 7) % V)                      # other garbage where nothing is known
    a, b = msd.descriptor(ids, G, known, W), msd.descriptor(other, G, known, W)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    longer = F.pad(ids, (0, 9), value=3), F.pad(known, (0, 9), value=False)
    c = msd.descriptor(longer[0], G, longer[1], W)
    assert (a[0] - c[0][:, :n]).abs().max() < 1e-6 and torch.equal(a[1], c[1][:, :n])
    valid = torch.arange(n) < n // 2 + 1
    x = torch.randn(5, n)
    y = torch.where(valid, x, torch.randn(5, n) * 100)
    assert torch.equal(msd.zscore(x, valid.expand(5, n)), msd.zscore(y, valid.expand(5, n)))


@pytest.mark.parametrize('seed', SEEDS)
def test_shift(seed):
    """Away from the ends, a motion that starts later has the same descriptor, later."""
    E, ids, _, W = random_case(seed)
    tail = torch.randint(V, (5, 30 + 2 * W), generator=torch.Generator().manual_seed(seed))
    G, known = msd.gram(E), lambda x: torch.ones_like(x, dtype=torch.bool)
    a = msd.descriptor(tail, G, known(tail), W)[0]
    late = torch.cat([ids, tail], 1)
    b = msd.descriptor(late, G, known(late), W)[0][:, ids.shape[1]:]
    inner = slice(W, -W)
    assert (a[:, inner].square() - b[:, inner].square()).abs().max() < 1e-5


@pytest.mark.parametrize('seed', SEEDS)
def test_zscore_over_valid_positions_only(seed):
    g = torch.Generator().manual_seed(seed)
    x, valid = torch.randn(6, 30, generator=g) * 5 + 3, torch.rand(6, 30, generator=g) < 0.6
    z = msd.zscore(x, valid)
    assert (z[~valid] == 0).all()
    for row, ok in zip(range(6), valid):
        values = x[row][ok]
        expected = (values - values.mean()) / (values.var(unbiased=False) + msd.EPS).sqrt()
        assert (z[row][ok] - expected).abs().max() < 1e-5
    assert (msd.zscore(x, torch.zeros_like(valid)) == 0).all()


# ---------------------------------------------------------------------------------------------------- mask selection

@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('r_exp,noise', [(0, 0.0), (0, 1.0), (1, 0.0), (3, 0.5)])
def test_quota_counts_exactly_K(seed, r_exp, noise):
    g = torch.Generator().manual_seed(seed)
    n_valid = torch.randint(1, 50, (32,), generator=g)
    valid = torch.arange(49) < n_valid[:, None]
    K = (torch.rand(32, generator=g) * n_valid).round().clamp(min=1).long()
    K = torch.minimum(K, valid.sum(1))
    dyn, sem = torch.randn(32, 49, generator=g), torch.randn(32, 49, generator=g)
    for lam in (0.0, 0.3, 1.0):
        chosen = msd.select(dyn, sem, K, valid, lam, r_exp, noise, g)
        assert torch.equal(chosen.sum(1), K) and not (chosen & ~valid).any()


@pytest.mark.parametrize('seed', SEEDS)
def test_quotas_do_not_double_count(seed):
    """With one score for both, the two quotas together must take the top K, none of them twice."""
    g = torch.Generator().manual_seed(seed)
    s, valid = torch.randn(8, 40, generator=g), torch.ones(8, 40, dtype=torch.bool)
    K = torch.randint(1, 41, (8,), generator=g)
    assert torch.equal(msd.select(s, s, K, valid, 0.4), msd.top_k(s, K, valid))
    # and the first quota is really the dynamic one
    dyn, sem = torch.randn(8, 40, generator=g), torch.randn(8, 40, generator=g)
    chosen, K_dyn = msd.select(dyn, sem, K, valid, 0.3), K - (0.3 * K).round().long()
    assert (chosen | ~msd.top_k(dyn, K_dyn, valid)).all()
    assert torch.equal(msd.select(dyn, sem, K, valid, 0.0), msd.top_k(dyn, K, valid))
    assert torch.equal(msd.select(dyn, sem, K, valid, 1.0), msd.top_k(sem, K, valid))


def test_expansion_takes_neighbours():
    s = torch.full((1, 20), -1.0) + torch.linspace(0, 0.01, 20)
    s[0, 10] = 5.0
    chosen = msd.select(s, s, torch.tensor([3]), torch.ones(1, 20, dtype=torch.bool), 0.0, r_exp=1)
    assert chosen[0].nonzero()[:, 0].tolist() == [9, 10, 11]


def test_semantic_score_is_a_cosine():
    x, c = torch.randn(3, 10, 8), torch.randn(3, 8)
    cos = torch.stack([torch.stack([x[b, t] @ c[b] / x[b, t].norm() / c[b].norm() for t in range(10)]) for b in range(3)])
    valid = torch.ones(3, 10, dtype=torch.bool)
    assert (msd.semantic_score(x, c, valid) - msd.zscore(cos, valid)).abs().max() < 1e-5           # Eq 10


# ----------------------------------------------------------------------------------------------------------- attention

@pytest.mark.parametrize('seed', SEEDS)
def test_prior_equals_plain_similarity(seed):
    E, ids, known, W = random_case(seed)
    phi, seen = msd.descriptor(ids, msd.gram(E), known, W)
    w = torch.exp(-torch.arange(W) / 3)
    w = w / w.sum()                                                                                  # Eq 12
    S = -(w * (phi[:, :, None] - phi[:, None]).square()).sum(-1)                                     # Eq 11, tau = 1
    qs, ks = msd.prior_qk(phi, seen)
    assert qs.shape[-1] == W + 2
    for b in range(len(ids)):
        pair = seen[b][:, None] & seen[b][None]
        expected = torch.zeros_like(S[b])
        if pair.any():
            s = S[b][pair].double()
            expected[pair] = ((s - s.mean()) / (s.var(unbiased=False) + msd.EPS).sqrt()).float()
        assert (qs[b] @ ks[b].T - expected).abs().max() < 2e-4                                       # z of Eq 13


@pytest.mark.parametrize('seed', SEEDS)
def test_logit_std_equals_plain(seed):
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(4, 3, 30, 16, generator=g) * 2 + torch.randn(4, 3, 1, 16, generator=g) for _ in range(2))
    valid = torch.arange(30) < torch.randint(1, 31, (4, 1), generator=g)
    sigma = msd.logit_std(torch.stack([q, k]), valid)
    A = q.double() @ k.double().mT / 4
    for b in range(4):
        m = int(valid[b].sum())
        expected = (A[b, :, :m, :m].flatten(1).var(-1, unbiased=False) + msd.EPS).sqrt()
        assert (sigma[b, :, 0, 0] - expected).abs().max() < 1e-5 * (1 + expected.max())


def test_layer_schedule():
    assert msd.alpha(0, 0.3) == 0.3 and abs(msd.alpha(3, 0.3) - 0.3 / math.e) < 1e-9                 # Eq 14
    w = msd.band_weights(8)
    assert abs(w.sum() - 1) < 1e-6 and (w[1:] / w[:-1] - math.exp(-1 / 3)).abs().max() < 1e-5        # Eq 12


# ------------------------------------------------------------------------------------------------------------ decoding

@pytest.mark.parametrize('seed', SEEDS)
def test_exploration_score(seed):
    E, ids, known, W = random_case(seed)
    phi, seen = msd.descriptor(ids, msd.gram(E), known, W)
    valid = torch.ones_like(known)
    p = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed))
    b = msd.exploration(phi, seen, p, valid, 0.4)
    k, u = msd.zscore(msd.complexity(phi), seen), msd.zscore(1 - p, valid)
    assert (b - torch.sigmoid(0.4 * k + 0.6 * u)).abs().max() < 1e-6                                 # Eqs 15-17
    assert (b > 0).all() and (b < 1).all()
    # monotone: among tokens, less certain ones explore more; more complex ones too
    only_u, only_k = msd.exploration(phi, seen, p, valid, 0.0), msd.exploration(phi, seen, p, valid, 1.0)
    for row in range(len(ids)):
        assert (only_u[row][p[row].argsort()].diff() <= 1e-6).all()
        order = msd.complexity(phi)[row][seen[row]].argsort()
        assert (only_k[row][seen[row]][order].diff() >= -1e-6).all()
    assert torch.equal(msd.temperature(b, 0.5, 2.0), 2.0 * (1 + 0.5 * b)) and (msd.temperature(b) >= 1).all()   # Eqs 18, 20
    assert torch.equal(msd.noise_scale(b, 0.5), 0.5 * b)                                             # Eqs 19, 21
