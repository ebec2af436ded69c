"""The Motion Spectral Descriptor: everything in DynMask (arXiv 2603.29655) that has no parameters.

    tokens --Eqs 4-6--> f (B, n, W)    what the motion does around each token: a spectrum of its
                                       velocity
           --Eq 7-----> phi (B, n, W)  the same at unit norm
           --Eq 8-----> Omega (B, n)   one number a token: how dynamically complex it is there

and three uses of it: which tokens to mask (Eqs 9-10), which tokens attend to each other
(Eqs 11-14), and how boldly a token is sampled (Eqs 15-17).

Shapes: B batch, n tokens, W window in tokens, V codes, D dimensions of a code.
"""
import math

import torch
import torch.nn.functional as F

EPS = 1e-6   # in every variance and norm below

# ------------------------------------------------------------- 3.3 the descriptor, as it is written


def dct_matrix(W, device=None):
    """Eq 5: the type-II DCT as a matrix C (W, W) float64, C[k, n] = cos(pi/W (n + 1/2) k)."""
    n = torch.arange(W, dtype=torch.float64, device=device)
    k = n[:, None]
    return torch.cos(math.pi / W * (n + 0.5) * k)


def velocity_ends(known, gap='interp'):
    """Between which tokens velocity t is taken: before, after (B, n) int, and v_known (B, n) bool.

    known (B, n): False where a token is masked or padding. Eq 4's v_t = x_t - x_{t-1} needs both.
    gap: what it is where one is unknown. 'zero': nothing, v_t = 0; but then the spectrum around a
    masked run describes the mask more than the motion. 'interp': that of the straight line between
    the known tokens around the run, v_t = (x_after - x_before) / (after - before); only before the
    first and behind the last known token is nothing known. Without masks the two are one.
    """
    n = known.shape[1]
    t = torch.arange(n, device=known.device).clamp(min=1).expand(known.shape)   # v_1 = v_2
    before, after = t - 1, t.clamp(max=n - 1)   # of one token alone both are that one
    if gap == 'interp':
        place = torch.arange(n, device=known.device)
        latest = torch.where(known, place, -1).cummax(1).values
        soonest = torch.where(known, place, n).flip(1).cummin(1).values.flip(1)
        before, after = latest.gather(1, before), soonest.gather(1, after)
    inside = (before >= 0) & (before < after) & (after < n)
    before, after = before.clamp(min=0), after.clamp(max=n - 1)
    v_known = inside & known.gather(1, before) & known.gather(1, after)
    return before, after, v_known


def plain_spectrum(x, known, W=8, gap='interp'):
    """Eqs 4-6 from vectors x (B, n, D), n >= 2 -> f (B, n, W). `spectrum` below, which tests
    hold to it, takes 2.7 ms instead of 46 (B = 64, n = 49, D = 512, two cores).

    Velocity t lies between tokens t - 1 and t. The window of token t covers velocities t - W//2 ..
    t - W//2 + W - 1, zeros beyond the ends.
    """
    before, after, v_known = velocity_ends(known, gap)
    row = torch.arange(len(x), device=x.device)[:, None]
    v = x[row, after] - x[row, before]                            # Eq 4
    v = v / (after - before).clamp(min=1)[..., None] * v_known[..., None]
    v = F.pad(v, (0, 0, W // 2, W - 1 - W // 2))
    U = v.unfold(1, W, 1)                                         # (B, n, D, W)
    C = dct_matrix(W, x.device).to(x.dtype)
    return (U @ C.T).norm(dim=2)                                  # Eqs 5-6, (B, n, W)


def unit(f):
    """Eq 7: phi_t = f_t / |f_t|, (B, n, W), or 0 where nothing moves."""
    return f / (f.norm(dim=-1, keepdim=True) + EPS)


def complexity(f, omega='energy'):
    """Eq 8: Omega(t) (B, n), how complex the motion is around a token; its spectrum f (B, n, W).

    'flatness' is the letter, mean_k phi_{t,k}. In [1/W, 1/sqrt(W)], or 0 where nothing moves: phi
    has unit norm, so it tells held from moving, and beyond that only how flat the spectrum is.
    'energy' is |f_t|, the norm that Eq 7 divides away: it says what moves (RESULTS.md).
    """
    if omega == 'flatness':
        return unit(f).mean(-1)
    return f.norm(dim=-1)


# --------------------------------------------------------- 3.3 the descriptor, straight from tokens


def gram(codebook):
    """G = E E^T (V, V) of code vectors (V, D): the only place where D appears. 1 MB at V = 512,
    once a codebook. Summed in float64, because velocities are small differences of its entries."""
    return (codebook.double() @ codebook.double().T).float()


def velocity_products(ids, G, known, lags, gap='interp'):
    """v_t . v_{t+d} for d = 0 .. lags - 1, from token ids alone.

    v is a difference of code vectors (Eq 4) times a scalar, so a product of two is four look-ups in
    G. ids (B, n) int, G (V, V) from gram(); known (B, n) bool. Returns products
    (B, n, lags), exactly 0 where a pose is held or an end is unknown, and v_known (B, n) bool.
    """
    ids = torch.where(known, ids, 0)
    before, after, v_known = velocity_ends(known, gap)
    scale = v_known / (after - before).clamp(min=1)

    def ahead(x):   # (B, n) -> (B, n, lags): [t, d] is x[t + d]
        return F.pad(x, (0, lags - 1)).unfold(1, lags, 1)

    start, end = ids.gather(1, before), ids.gather(1, after)
    a0, a1 = start[..., None], end[..., None]                            # v_t = s (a1 - a0)
    b0, b1 = ahead(start), ahead(end)                                    # v_{t+d} = s' (b1 - b0)
    products = (G[a1, b1] - G[a0, b1]) - (G[a1, b0] - G[a0, b0])
    return products * (scale[..., None] * ahead(scale)), v_known


def spectrum_kernel(W, device):
    """The map from velocity products to power spectra, a conv1d weight (W bands, W lags, W taps).

    Eq 6 says f_k^2 = |row k of C U|^2 = [C (U U^T) C^T]_kk, where U (W, D) holds the velocities of
    the window. U U^T consists of products v_a . v_b with |a - b| < W, so f^2 is linear in those,
    with the same coefficients at every position: a convolution over time. Lag d at tap i meets
    C[k, i] C[k, i + d], twice for d > 0.
    """
    C = dct_matrix(W, device)
    tap = torch.arange(W, device=device)
    other = tap + tap[:, None]                                           # [d, i] -> i + d
    inside = other < W
    K = C[:, None, :] * C[:, other.clamp(max=W - 1)] * inside            # (W, W, W)
    K[:, 1:] *= 2
    return K.float()


def spectrum(ids, G, known, W=8, gap='interp'):
    """Eqs 4-6 from token ids: `plain_spectrum` of their code vectors, to rounding.

    ids (B, n) int, anything where not known (B, n); G (V, V). Returns f (B, n, W), 0 where nothing
    moves, and seen (B, n) bool: does the window hold a known velocity?
    """
    ends = (W // 2, W - 1 - W // 2)
    products, v_known = velocity_products(ids, G, known, W, gap)
    products = F.pad(products.transpose(1, 2), ends)                     # (B, lags, n + W - 1)
    f2 = F.conv1d(products, spectrum_kernel(W, ids.device))              # Eqs 5-6, (B, bands, n)
    f = f2.transpose(1, 2).clamp(min=0).sqrt()                           # rounding dips below 0
    seen = F.max_pool1d(F.pad(v_known.float(), ends)[:, None], W, 1)[:, 0] > 0
    return f, seen


def speed(ids, G, known):
    """|v_t| of Eq 4 (B, n): the plainer signal of Table 3 that MSD is compared with."""
    products, _ = velocity_products(ids, G, known, lags=1)
    return products[..., 0].clamp(min=0).sqrt()


def zscore(x, valid):
    """Standardize x (B, n) over the valid positions of each row; 0 elsewhere."""
    N = valid.sum(-1, keepdim=True).clamp(min=1)
    x = torch.where(valid, x, 0)
    x = torch.where(valid, x - x.sum(-1, keepdim=True) / N, 0)
    variance = x.square().sum(-1, keepdim=True) / N
    return x / (variance + EPS).sqrt()


# --------------------------------------------------------------- 3.4 content-focused mask selection
# Eq 9 is s_dyn = zscore(complexity(f), valid).


def semantic_score(x, c, valid):
    """Eq 10: s_sem = z-score(cos(x_t, c)), (B, n), for tokens x (B, n, d) and the sentence c (B, d)
    in one space (the transformer's)."""
    return zscore(F.cosine_similarity(x, c[:, None], dim=-1), valid)


def top_k(score, K, among):
    """Mark exactly min(K, available) positions of largest score (B, n) in each row; K (B,) int,
    among (B, n) bool."""
    rank = score.masked_fill(~among, -torch.inf).argsort(-1, descending=True).argsort(-1)
    return (rank < K[:, None]) & among


def select(s_dyn, s_sem, K, valid, lam=0.3, r_exp=0, noise=0.0, generator=None):
    """Content-Focused Selection: which positions to mask, (B, n) bool with exactly K (B,) true in
    each row (K <= its valid count). (1 - lam) K of them by dynamics, lam K by semantics.

    A position that one quota took is not available to the other. r_exp > 0 grows each pick to its
    neighbours within r_exp tokens, in order of score, and stops at K: which, not how many. noise
    adds Gumbel noise of that scale to both scores; without it the same tokens of a clip are masked
    in every epoch.
    """
    if noise > 0:
        s_dyn = s_dyn + noise * gumbel_like(s_dyn, generator)
        s_sem = s_sem + noise * gumbel_like(s_sem, generator)
    if r_exp > 0:
        s_dyn = spread(s_dyn, valid, r_exp)
        s_sem = spread(s_sem, valid, r_exp)
    K_sem = (lam * K).round().to(K.dtype)
    by_dynamics = top_k(s_dyn, K - K_sem, valid)
    by_semantics = top_k(s_sem, K_sem, valid & ~by_dynamics)
    return by_dynamics | by_semantics


def spread(score, valid, r):
    """A token's score becomes the best one within r tokens, its own breaking ties: top-K of this
    takes the peaks together with what surrounds them."""
    outside = -1e9
    padded = F.pad(score.masked_fill(~valid, outside), (r, r), value=outside)
    best = F.max_pool1d(padded[:, None], 2 * r + 1, 1)[:, 0]
    return best + 1e-3 * score


def gumbel_like(x, generator):
    return -torch.empty_like(x).exponential_(generator=generator).log()


# ----------------------------------------------------------------------- 3.5 motion-aware attention


def band_weights(W, device=None):
    """Eq 12: w_k = exp(-k/3) / sum, (W,). Low bands weigh most."""
    k = torch.arange(W, dtype=torch.float32, device=device)
    return torch.softmax(-k / 3, 0)


def similarity(phi):
    """Eq 11: S_ij = -sum_k w_k (phi_ik - phi_jk)^2, (B, n, n). Without tau: S is z-scored next, and
    a positive scale cancels. `prior_qk` gives z(S) without forming S."""
    w = band_weights(phi.shape[-1], phi.device)
    difference = phi[:, :, None] - phi[:, None]
    return -(w * difference.square()).sum(-1)


def prior_qk(phi, seen):
    """Eqs 11-12 with the z-score of Eq 13, as more query and key dimensions: z(S)_ij = qs_i . ks_j.

    phi (B, n, W), seen (B, n) -> qs, ks (B, n, W + 2) float32. With psi = sqrt(w) phi,

        S_ij = -|psi_i - psi_j|^2 = 2 psi_i . psi_j - |psi_i|^2 - |psi_j|^2

    is an inner product, and so is (S - m) / s:

        qs_i = [2 psi_i, 1, -|psi_i|^2 - m] / s        ks_j = [psi_j, -|psi_j|^2, 1]

    No n x n tensor is needed, not even for the mean m and the deviation s. Centre psi over the N
    seen tokens, which S does not notice, and let a_i = |psi_i|^2, M = sum_i psi_i psi_i^T. Then
    m = -2 mean(a) and s^2 = 4 |M|^2 / N^2 + 2 var(a): all cross terms vanish. Rows and columns that
    are not seen give 0, the neutral prior.
    """
    ok = seen[..., None].float()
    N = ok.sum(1, keepdim=True).clamp(min=1)                             # (B, 1, 1)
    psi = phi * band_weights(phi.shape[-1], phi.device).sqrt()
    psi = (psi - (psi * ok).sum(1, keepdim=True) / N) * ok
    a = psi.square().sum(-1, keepdim=True)                               # (B, n, 1)
    a_mean = a.sum(1, keepdim=True) / N
    a_variance = ((a - a_mean) * ok).square().sum(1, keepdim=True) / N
    M = psi.transpose(1, 2) @ psi                                        # (B, W, W)
    variance = 4 * M.square().sum((1, 2), keepdim=True) / N**2 + 2 * a_variance

    m = -2 * a_mean
    s = (variance + EPS).sqrt()
    qs = torch.cat([2 * psi, ok, (-a - m) * ok], -1) / s
    ks = torch.cat([psi, -a, ok], -1)
    return qs, ks


def alpha(layer, alpha0, n_layers, schedule='decay'):
    """Eq 14: alpha_l = alpha_0 exp(-l/3), layers l counted from 0. 'constant' and 'reversed' (late
    layers strongest) are our reading of the layer schedules that 4.3 mentions."""
    if schedule == 'constant':
        return alpha0
    if schedule == 'reversed':
        layer = n_layers - 1 - layer
    return alpha0 * math.exp(-layer / 3)


# -------------------------------------------------------------------- 3.6 complexity-aware decoding


def exploration(omega, seen, p_max, masked, lambda_D=0.5):
    """Eqs 15-17: b_t = sigmoid(lambda_D k_t + (1 - lambda_D) u_t), (B, n) in (0, 1).

    omega (B, n) of Eq 8; seen (B, n): tokens of the motion whose neighbourhood is known, the others
    count as of mean complexity. p_max (B, n): the largest probability of each token. masked (B, n):
    the tokens that are being decoded. Uncertainty is compared among those alone: next to kept
    tokens, of which the model is sure, every masked one would look uncertain, more so step by step.
    """
    k = zscore(omega, seen)                                              # Eq 16
    u = zscore(1 - p_max, masked)                                        # Eq 17
    return torch.sigmoid(lambda_D * k + (1 - lambda_D) * u)              # Eq 15
