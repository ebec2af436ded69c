"""Motion Spectral Descriptor: everything in DynMask (arXiv 2603.29655) sections 3.3-3.6 that has no parameters.

    tokens --Eq 4-7--> phi (B, n, W)  what the motion does around each token, as a unit-norm velocity spectrum
           --Eq 8----> Omega (B, n)   one number per token: how dynamically complex it is there

and three uses of it: which tokens to mask (Eqs 9-10), which tokens attend to each other (Eqs 11-14), and how boldly each
token is sampled (Eqs 15-21). The plain formulas stand in test_msd.py as the oracle; here is the form that is fast
enough to be free. Shapes: B batch, n tokens, W window (tokens), V codes, D code dimension.
"""
import math

import torch
import torch.nn.functional as F

EPS = 1e-6  # in every variance and norm below


# ---------------------------------------------------------------------------------------------------- the descriptor

def dct_matrix(W, device=None):
    """Eq 5: the type-II DCT as a matrix C (W, W), C[k, n] = cos(pi/W (n + 1/2) k), in float64."""
    n = torch.arange(W, dtype=torch.float64, device=device)
    return torch.cos(math.pi / W * (n[None, :] + 0.5) * n[:, None])


def band_weights(W, device=None):
    """Eq 12: w_k = exp(-k/3) / sum, (W,). Low bands weigh most."""
    return torch.softmax(-torch.arange(W, dtype=torch.float32, device=device) / 3, 0)


def _spectrum_kernel(W, device):
    """The map from velocity products to power spectra, as a conv1d weight (W bands out, W lags in, W taps).

    Eq 6 says f_k^2 = |row k of C U|^2 = [C (U U^T) C^T]_kk with U (W, D) the velocities in the window. U U^T depends on
    positions only through the products v_a . v_b with |a - b| < W, so f^2 is linear in those products, with the same
    coefficients at every position: a convolution over time. Lag d at tap i meets C[k, i] C[k, i + d], twice for d > 0.
    """
    C, tap = dct_matrix(W, device), torch.arange(W, device=device)
    other = tap + tap[:, None]                                          # [d, i] -> i + d
    K = C[:, None, :] * C[:, other.clamp(max=W - 1)] * (other < W)      # (W, W, W)
    return torch.cat([K[:, :1], 2 * K[:, 1:]], 1).float()


def gram(codebook):
    """G = E E^T (V, V) for code vectors (V, D): the only place where D appears. 1 MB at V = 512, once per codebook. Summed in
    float64, because velocities are small differences of its entries."""
    return (codebook.double() @ codebook.double().T).float()


def descriptor(ids, G, known, W=8):
    """Eqs 4-7 straight from token ids.

    ids (B, n) int; G (V, V) from gram(); known (B, n) bool: False where the token is masked or padding (ids there may be
    anything). A velocity with an unknown end contributes 0.
    Returns phi (B, n, W) with |phi| = 1 or 0, and seen (B, n) bool: does the window hold at least one known velocity?
    The window of token t covers velocities t - W//2 .. t - W//2 + W - 1, zeros beyond the ends.
    """
    B, n = ids.shape
    if n < 2:  # no velocity exists
        return torch.zeros(B, n, W, device=ids.device), torch.zeros_like(known)
    ids = torch.where(known, ids, 0)
    cur = torch.arange(n, device=ids.device).clamp(min=1)                # Eq 4, v_t = x_t - x_{t-1}; v_1 := v_2
    a1, a0, vknown = ids[:, cur], ids[:, cur - 1], known[:, cur] & known[:, cur - 1]
    # products c[:, d, t] = v_t . v_{t+d} for d = 0..W-1: four look-ups each, because v is a difference of code vectors
    shift = lambda x: F.pad(x, (0, W - 1)).unfold(1, W, 1)               # (B, n, W): [t, d] -> x[t + d]
    b1, b0, known_pair = shift(a1), shift(a0), shift(vknown) & vknown[..., None]
    a1, a0 = a1[..., None], a0[..., None]
    c = (G[a1, b1] - G[a1, b0] - G[a0, b1] + G[a0, b0]) * known_pair     # exactly 0 where a pose is held
    c = F.pad(c.transpose(1, 2), (W // 2, W - 1 - W // 2))
    f2 = F.conv1d(c, _spectrum_kernel(W, ids.device)).clamp(min=0)       # Eqs 5-6, (B, W, n); rounding can dip below 0
    f = f2.transpose(1, 2).sqrt()
    phi = f / (f.norm(dim=-1, keepdim=True) + EPS)                       # Eq 7; still or unseen: f is exactly 0
    seen = F.max_pool1d(F.pad(vknown.float(), (W // 2, W - 1 - W // 2))[:, None], W, 1)[:, 0] > 0
    return phi, seen


def complexity(phi):
    """Eq 8: Omega(t) = mean_k phi_{t,k}, (B, n). In [1/W, 1/sqrt(W)], or 0 where nothing moves: it measures how flat
    the spectrum is, not how large (phi has unit norm)."""
    return phi.mean(-1)


def zscore(x, valid):
    """Standardise x (B, n) over the valid positions of each row; 0 elsewhere."""
    N = valid.sum(-1, keepdim=True).clamp(min=1)
    x = torch.where(valid, x, 0)
    x = torch.where(valid, x - x.sum(-1, keepdim=True) / N, 0)
    return x / (x.square().sum(-1, keepdim=True) / N + EPS).sqrt()


# ------------------------------------------------------------------------------- 3.4 content-focused mask selection

def dynamic_score(phi, valid):
    """Eq 9: s_dyn = z-score(Omega), (B, n)."""
    return zscore(complexity(phi), valid)


def semantic_score(x, c, valid):
    """Eq 10: s_sem = z-score(cos(x_t, c)) for tokens x (B, n, d) and text c (B, d) in one space (the transformer's)."""
    return zscore(F.cosine_similarity(x, c[:, None], dim=-1), valid)


def top_k(score, K, among):
    """Mark exactly min(K, available) positions of largest score (B, n) in each row; K (B,) int, among (B, n) bool."""
    rank = score.masked_fill(~among, -torch.inf).argsort(-1, descending=True).argsort(-1)
    return (rank < K[:, None]) & among


def select(s_dyn, s_sem, K, valid, lam=0.3, r_exp=0, noise=0.0, generator=None):
    """Content-Focused Selection: K positions to mask, (1 - lam) K by dynamics and lam K by semantics. Returns (B, n) bool
    with exactly K (B,) true per row (K <= valid count): *which*, not how many.

    A position that one quota took is not available to the other. r_exp > 0 grows each pick to its neighbours within
    r_exp tokens, in order of score, and stops at K. noise adds Gumbel noise of that scale to both scores: without it the
    same frames of a clip are masked in every epoch.
    """
    perturb = lambda s: s - noise * torch.empty_like(s).exponential_(generator=generator).log() if noise > 0 else s
    s_dyn, s_sem = perturb(s_dyn), perturb(s_sem)
    K_sem = (lam * K).round().to(K.dtype)
    if r_exp > 0:  # a token's score becomes the best pick within reach, so top-K takes peaks and what surrounds them
        spread = lambda s: F.max_pool1d(F.pad(s.masked_fill(~valid, -1e9)[:, None], (r_exp, r_exp), value=-1e9),
                                        2 * r_exp + 1, 1)[:, 0] + 1e-3 * s
        s_dyn, s_sem = spread(s_dyn), spread(s_sem)
    by_dyn = top_k(s_dyn, K - K_sem, valid)
    return by_dyn | top_k(s_sem, K_sem, valid & ~by_dyn)


# --------------------------------------------------------------------------------------- 3.5 motion-aware attention

def alpha(layer, alpha0):
    """Eq 14: alpha_l = alpha_0 exp(-l/3), layers counted from 0."""
    return alpha0 * math.exp(-layer / 3)


def prior_qk(phi, seen):
    """Eqs 11-12 with the z-score of Eq 13, as W + 2 extra query and key dimensions: z(S)_ij = qs_i . ks_j.

    phi (B, n, W), seen (B, n) -> qs, ks (B, n, W + 2), float32. With psi = sqrt(w) phi,
    S_ij = -|psi_i - psi_j|^2 = 2 psi_i.psi_j - |psi_i|^2 - |psi_j|^2, and (S - m)/s is linear in each side:
        qs_i = [2 psi_i, 1, -|psi_i|^2 - m]/s,   ks_j = [psi_j, -|psi_j|^2, 1].
    No n x n tensor is needed, not even for m and s: with psi centred over the N seen tokens (S does not notice),
    a_i = |psi_i|^2, M = sum_i psi_i psi_i^T:  m = -2 mean(a),
    var = 4 |M|_F^2/N^2 + 2 var(a), because the cross terms vanish. Rows and columns that are not seen give 0, the
    neutral prior. tau of Eq 11 is a positive scale: the z-score cancels it.
    """
    psi = phi * band_weights(phi.shape[-1], phi.device).sqrt()
    ok = seen[..., None].float()
    N = ok.sum(1, keepdim=True).clamp(min=1)                                            # (B, 1, 1)
    psi = (psi - (psi * ok).sum(1, keepdim=True) / N) * ok
    a = psi.square().sum(-1, keepdim=True)                                              # (B, n, 1)
    a_mean = a.sum(1, keepdim=True) / N
    M = psi.transpose(1, 2) @ psi                                                       # (B, W, W)
    var = 4 * M.square().sum((1, 2), keepdim=True) / N**2 + 2 * ((a - a_mean) * ok).square().sum(1, keepdim=True) / N
    qs = torch.cat([2 * psi, ok, (2 * a_mean - a) * ok], -1) / (var + EPS).sqrt()
    return qs, torch.cat([psi, -a, ok], -1)


def std_over(pairs, A):
    """sigma of A (B, H, n, n) over the marked pairs (B, n n, 1), 1.0 or 0.0 -> (B, H, 1, 1)."""
    A, N = A.flatten(2), pairs.sum(1, keepdim=True).clamp(min=1)
    x = A - (A @ pairs) / N
    return ((x.square() @ pairs) / N + EPS).sqrt()[..., None]


def logit_std(qk, valid):
    """sigma of the attention logits A = q k^T / sqrt(d) over the valid pairs, per sample and head, without forming A.

    qk (2, B, H, n, d) queries and keys, valid (B, n) -> (B, H, 1, 1) float32. With q = q_mean + q', k = k_mean + k' the cross
    terms average to zero and  d var(A) = k_mean^T Sq k_mean + q_mean^T Sk q_mean + <Sq, Sk>,  S = covariance (d, d): sums of
    squares, so nothing cancels, and bfloat16 products are good enough.
    """
    N = valid.sum(-1).clamp(min=1).view(-1, 1, 1, 1)
    ok = valid[:, None, :, None].to(qk.dtype)                                            # (B, 1, n, 1)
    mean = (ok / N).to(qk.dtype).mT @ qk                                                 # (2, B, H, 1, d)
    x = (qk - mean) * ok
    S = (x.mT @ x).float()                                                               # N Sq, N Sk: (2, B, H, d, d)
    m = mean.float().flip(0)
    var = (S[0] * S[1]).sum((-2, -1), keepdim=True) / N + ((m @ S) * m).sum((0, -1)).unsqueeze(-1)
    return (var / (N * qk.shape[-1]) + EPS).sqrt()


# ------------------------------------------------------------------------------------- 3.6 complexity-aware decoding

def exploration(phi, seen, p_max, valid, lambda_D=0.5):
    """Eqs 15-17: b_t = sigmoid(lambda_D z(Omega_t) + (1 - lambda_D) z(1 - max_v p_t)), (B, n) in (0, 1)."""
    k = zscore(complexity(phi), seen & valid)                           # Eq 16; unknown neighbourhoods stay neutral
    u = zscore(1 - p_max, valid)                                        # Eq 17
    return torch.sigmoid(lambda_D * k + (1 - lambda_D) * u)             # Eq 15


def temperature(b, beta=0.5, T_global=1.0):
    """Eqs 18, 20: T_t = T_global (1 + beta b_t); divides the logits that token t is sampled from."""
    return T_global * (1 + beta * b)


def noise_scale(b, sigma_max=0.5):
    """Eqs 19, 21: sigma_t = sigma_max b_t; scale of the Gumbel noise on the confidence that decides what is re-masked."""
    return sigma_max * b
