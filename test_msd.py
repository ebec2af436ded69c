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
from fast import logit_std

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


def velocity_of(x, known):
    """Eq 4 of one row x (n, D), known (n,) -> v (n, D) float64, and whether both ends are known."""
    n = len(x)
    v = torch.zeros(n, D, dtype=torch.float64)
    v_known = [False] * n
    for t in range(n):
        now = max(t, 1)   # v_1 = v_2
        if known[now] and known[now - 1]:
            v[t] = x[now].double() - x[now - 1].double()
            v_known[t] = True
    return v, v_known


def oracle(x, known, W):
    """Eqs 4-7 to the letter, from vectors x (B, n, D) -> phi, seen."""
    B, n, _ = x.shape
    phi = torch.zeros(B, n, W, dtype=torch.float64)
    seen = torch.zeros(B, n, dtype=torch.bool)
    place = torch.arange(W, dtype=torch.float64) + 0.5
    for b in range(B):
        v, v_known = velocity_of(x[b], known[b])
        for t in range(n):
            u = torch.zeros(W, D, dtype=torch.float64)
            first = t - W // 2
            for i in range(W):
                if 0 <= first + i < n:
                    u[i] = v[first + i]
                    seen[b, t] |= v_known[first + i]
            f = torch.zeros(W, dtype=torch.float64)
            for k in range(W):
                basis = torch.cos(math.pi / W * place * k)
                f[k] = (basis[:, None] * u).sum(0).norm()   # Eqs 5, 6
            phi[b, t] = f / (f.norm() + msd.EPS)            # Eq 7
    return phi, seen


def zscore_of(values):
    return (values - values.mean()) / (values.var(unbiased=False) + msd.EPS).sqrt()


# ----------------------------------------------------------------------------------- the descriptor


@pytest.mark.parametrize('seed', SEEDS)
def test_gram_table_equals_unfold_and_dct(seed):
    E, ids, known, W = random_case(seed)
    phi, seen = msd.descriptor(ids, msd.gram(E), known, W)
    plain, plain_seen = oracle(E[ids], known, W)
    assert torch.equal(seen, plain_seen)
    # phi is a square root of f^2: where f_k is nearly 0, rounding by e in f^2 is sqrt(e) in f
    assert (phi.double().square() - plain.square()).abs().max() < 1e-5
    assert (phi.double() - plain).abs().max() < 2e-3
    assert (phi.double() - plain).abs().mean() < 1e-5


@pytest.mark.parametrize('seed', SEEDS)
def test_plain_descriptor_equals_oracle(seed):
    E, ids, known, W = random_case(seed)
    readable = msd.plain_descriptor(E[ids], known, W)
    expected, _ = oracle(E[ids], known, W)
    assert (readable.double() - expected).abs().max() < 1e-5
    phi, _ = msd.descriptor(ids, msd.gram(E), known, W)
    assert (phi.square() - readable.square()).abs().max() < 1e-5


@pytest.mark.parametrize('seed', SEEDS)
def test_speed_is_the_norm_of_the_velocities(seed):
    E, ids, known, _ = random_case(seed)
    speed = msd.speed(ids, msd.gram(E), known)
    expected = [velocity_of(E[row], ok)[0].norm(dim=-1) for row, ok in zip(ids, known)]
    assert (speed - torch.stack(expected)).abs().max() < 1e-4
    assert (msd.speed(ids[:, :1], msd.gram(E), known[:, :1]) == 0).all()


def test_one_token_has_no_velocity():
    ids = torch.zeros(3, 1, dtype=torch.long)
    phi, seen = msd.descriptor(ids, torch.eye(4), everything(ids), 8)
    assert phi.shape == (3, 1, 8)
    assert not phi.any()
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
    phi, seen = msd.descriptor(ids, msd.gram(E), everything(ids), W)
    assert seen.all()
    assert phi.abs().max() == 0
    assert msd.complexity(phi).abs().max() == 0


@pytest.mark.parametrize('seed', SEEDS)
def test_omega_is_flatness_not_size(seed):
    E, ids, known, W = random_case(seed)
    omega = msd.complexity(msd.descriptor(ids, msd.gram(E), known, W)[0])
    larger = msd.complexity(msd.descriptor(ids, msd.gram(10 * E), known, W)[0])
    assert (omega - larger).abs().max() < 1e-3   # amplitude cancels
    moving = omega[omega > 0]
    assert (moving > 1 / W - 1e-4).all()
    assert (moving < W ** -0.5 + 1e-4).all()


@pytest.mark.parametrize('seed', SEEDS)
def test_padding_never_leaks(seed):
    E, ids, known, W = random_case(seed)
    G = msd.gram(E)
    n = ids.shape[1]
    phi, seen = msd.descriptor(ids, G, known, W)
    garbage = torch.where(known, ids, (ids + 7) % V)
    phi2, seen2 = msd.descriptor(garbage, G, known, W)
    assert torch.equal(phi, phi2)
    assert torch.equal(seen, seen2)
    longer = F.pad(ids, (0, 9), value=3)
    phi3, seen3 = msd.descriptor(longer, G, F.pad(known, (0, 9), value=False), W)
    assert (phi - phi3[:, :n]).abs().max() < 1e-6
    assert torch.equal(seen, seen3[:, :n])
    valid = torch.arange(n) < n // 2 + 1
    x = torch.randn(5, n)
    y = torch.where(valid, x, torch.randn(5, n) * 100)
    assert torch.equal(msd.zscore(x, valid.expand(5, n)), msd.zscore(y, valid.expand(5, n)))


@pytest.mark.parametrize('seed', SEEDS)
def test_shift(seed):
    """Away from the ends, a motion that starts later has the same descriptor, later."""
    E, ids, _, W = random_case(seed)
    tail = torch.randint(V, (5, 30 + 2 * W), generator=torch.Generator().manual_seed(seed))
    G = msd.gram(E)
    a, _ = msd.descriptor(tail, G, everything(tail), W)
    late = torch.cat([ids, tail], 1)
    b, _ = msd.descriptor(late, G, everything(late), W)
    b = b[:, ids.shape[1]:]
    inner = slice(W, -W)
    assert (a[:, inner].square() - b[:, inner].square()).abs().max() < 1e-5


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


def test_dynamic_score_is_complexity():
    phi = torch.rand(3, 10, 8)
    valid = torch.rand(3, 10) < 0.7
    omega = phi.sum(-1) / 8
    s_dyn = msd.dynamic_score(phi, valid)   # Eqs 8, 9
    assert (s_dyn - msd.zscore(omega, valid)).abs().max() < 1e-5


# ---------------------------------------------------------------------------------------- attention

@pytest.mark.parametrize('seed', SEEDS)
def test_prior_equals_plain_similarity(seed):
    E, ids, known, W = random_case(seed)
    phi, seen = msd.descriptor(ids, msd.gram(E), known, W)
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
    phi, seen = msd.descriptor(ids, msd.gram(E), known, W)
    omega = msd.complexity(phi)
    masked = everything(ids)
    p = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed))
    b = msd.exploration(phi, seen, p, masked, 0.4)
    k = msd.zscore(omega, seen)
    u = msd.zscore(1 - p, masked)
    assert (b - torch.sigmoid(0.4 * k + 0.6 * u)).abs().max() < 1e-6      # Eqs 15-17
    assert (b > 0).all()
    assert (b < 1).all()
    # monotone: among tokens, less certain ones explore more; more complex ones too
    only_u = msd.exploration(phi, seen, p, masked, 0.0)
    only_k = msd.exploration(phi, seen, p, masked, 1.0)
    for row in range(len(ids)):
        assert (only_u[row][p[row].argsort()].diff() <= 1e-6).all()
        order = omega[row][seen[row]].argsort()
        assert (only_k[row][seen[row]][order].diff() >= -1e-6).all()


@pytest.mark.parametrize('seed', SEEDS)
def test_uncertainty_is_compared_among_masked_tokens(seed):
    """Eq 17 is z-scored over what is being decoded: how sure the model is of kept tokens is
    nothing to it."""
    E, ids, known, W = random_case(seed)
    phi, seen = msd.descriptor(ids, msd.gram(E), known, W)
    g = torch.Generator().manual_seed(seed)
    masked = torch.rand(ids.shape, generator=g) < 0.5
    p = torch.rand(ids.shape, generator=g)
    b = msd.exploration(phi, seen, p, masked, 0.4)
    surer = torch.where(masked, p, 1.0)
    assert torch.equal(msd.exploration(phi, seen, surer, masked, 0.4)[masked], b[masked])
    only_u = msd.exploration(phi, seen, p, masked, 0.0)
    for row, hidden in enumerate(masked):
        if hidden.any():
            expected = torch.sigmoid(zscore_of(1 - p[row][hidden]))
            assert (only_u[row][hidden] - expected).abs().max() < 1e-5
