"""The Motion Spectral Descriptor: the equations of DynMask (arXiv 2603.29655) without parameters.

    tokens -- Eqs 4-6 --> f (B, n, W)    spectrum of the token velocities in a window of W tokens
           -- Eq 7 -----> phi (B, n, W)  the descriptor: that spectrum at unit norm
           -- Eq 8 -----> Omega (B, n)   how dynamically complex the motion is around each token

The descriptor has three uses: which tokens to mask in training (Eqs 9-10, masking.py), which tokens
attend to each other (Eqs 11-14, below and model.py), and how much to explore when a token is
sampled (Eqs 15-21, below and generate.py).

Shapes: B batch, n tokens, W window in tokens, V codes, D dimensions of a code vector.
"""
import math

import torch
import torch.nn.functional as F

EPS = 1e-6   # added to every variance and norm


# ------------------------------------------------------- 3.3 the descriptor, as the paper writes it


def dct_matrix(W, device=None):
    """Eq 5: the type-II DCT as a matrix C (W, W) float64, C[k, i] = cos(pi/W (i + 1/2) k)."""
    i = torch.arange(W, dtype=torch.float64, device=device)
    k = i[:, None]
    return torch.cos(math.pi / W * (i + 0.5) * k)


def velocity_ends(known, gap='interp'):
    """The two tokens that each velocity is taken between.

    Eq 4 is v_t = x_t - x_{t-1}; here t counts from 0 and v_0 = v_1. known (B, n) bool is False
    where a token is masked or padding. gap says what happens at unknown tokens:

        'zero'    v_t = 0. The spectrum around a masked run then describes the mask more than the
                  motion
        'interp'  the velocity of the straight line between the known tokens on either side of the
                  run, v_t = (x_after - x_before) / (after - before)

    Without masks both are Eq 4. Returns before, after (B, n) int and v_known (B, n) bool: True
    where both ends are known.
    """
    n = known.shape[1]
    t = torch.arange(n, device=known.device).clamp(min=1).expand(known.shape)   # v_0 = v_1
    before, after = t - 1, t.clamp(max=n - 1)   # a motion of one token has no velocity: both are 0
    if gap == 'interp':
        position = torch.arange(n, device=known.device)
        last_known = torch.where(known, position, -1).cummax(1).values
        next_known = torch.where(known, position, n).flip(1).cummin(1).values.flip(1)
        before, after = last_known.gather(1, before), next_known.gather(1, after)

    inside = (before >= 0) & (before < after) & (after < n)
    before, after = before.clamp(min=0), after.clamp(max=n - 1)
    v_known = inside & known.gather(1, before) & known.gather(1, after)
    return before, after, v_known


def plain_spectrum(x, known, W=8, gap='interp'):
    """Eqs 4-6 from code vectors x (B, n, D), n >= 2 -> f (B, n, W).

    The readable form. The tests hold `spectrum` below to it, which takes 2.7 ms instead of 46
    (B = 64, n = 49, D = 512, two cores). Velocity t lies between tokens t - 1 and t, so a window of
    even W is centred on token t if it covers velocities t - W/2 + 1 .. t + W/2. Unknown velocities,
    and those beyond the ends, are zeros; f^2 is divided by the share of the window that is known,
    or Omega would fall at both ends (to .85 of mid-clip on bandai, where motions begin midway).
    """
    before, after, v_known = velocity_ends(known, gap)
    row = torch.arange(len(x), device=x.device)[:, None]
    v = x[row, after] - x[row, before]                            # Eq 4
    v = v / (after - before).clamp(min=1)[..., None] * v_known[..., None]

    v = F.pad(v, (0, 0, (W - 1) // 2, W // 2))
    U = v.unfold(1, W, 1)                                         # (B, n, D, W)
    C = dct_matrix(W, x.device).to(x.dtype)
    f = (U @ C.T).norm(dim=2)                                     # Eq 5, Eq 6: (B, n, W)
    return f / known_share(v_known, W).clamp(min=1 / W).sqrt()[..., None]


def known_share(v_known, W):
    """The share of each token's window (B, n) whose velocities are known (B, n) bool."""
    padded = F.pad(v_known.float(), ((W - 1) // 2, W // 2))
    return F.avg_pool1d(padded[:, None], W, 1)[:, 0]


def descriptor(f):
    """Eq 7: phi_t = f_t / |f_t|, (B, n, W), and 0 where nothing moves."""
    return f / (f.norm(dim=-1, keepdim=True) + EPS)


def complexity(f, omega='energy'):
    """Eq 8: Omega(t) (B, n) from the spectrum f (B, n, W).

        'flatness'  mean_k phi_{t,k}, as published. phi has unit norm, so this lies in
                    [1/W, 1/sqrt(W)], or is 0 where nothing moves: it tells held from moving, and
                    beyond that only how flat the spectrum is
        'energy'    |f_t|, the norm that Eq 7 divides away. It follows how fast the body moves
                    (RESULTS.md)
    """
    if omega == 'flatness':
        return descriptor(f).mean(-1)
    return f.norm(dim=-1)


# ------------------------------------------------------ 3.3 the descriptor, straight from token ids


def gram(codebook):
    """G = E E^T (V, V) of the code vectors E (V, D): the only place where D appears. It takes 1 MB
    at V = 512, and is computed in float64 because velocities are small differences of its entries.
    Once per codebook; with msd_embed 'learned', whose vectors change, in every step."""
    return (codebook.double() @ codebook.double().T).float()


def velocity_products(ids, G, known, lags, gap='interp'):
    """The inner products v_t . v_{t+d}, d = 0 .. lags - 1, from token ids alone.

    A velocity is a scaled difference of two code vectors (Eq 4), so a product of two velocities is
    four look-ups in G. ids (B, n) int, G (V, V) from `gram`, known (B, n) bool. Returns products
    (B, n, lags), exactly 0 where a pose is held or an end is unknown, and v_known (B, n) bool.
    """
    ids = torch.where(known, ids, 0)
    before, after, v_known = velocity_ends(known, gap)
    scale = v_known / (after - before).clamp(min=1)

    def ahead(x):   # (B, n) -> (B, n, lags): [t, d] is x[t + d]
        return F.pad(x, (0, lags - 1)).unfold(1, lags, 1)

    start, end = ids.gather(1, before), ids.gather(1, after)
    a0, a1 = start[..., None], end[..., None]                     # v_t = s (a1 - a0)
    b0, b1 = ahead(start), ahead(end)                             # v_{t+d} = s' (b1 - b0)
    products = (G[a1, b1] - G[a0, b1]) - (G[a1, b0] - G[a0, b0])
    return products * (scale[..., None] * ahead(scale)), v_known


def spectrum_kernel(W, device):
    """The linear map from velocity products to power spectra, a conv1d weight (W bands, W lags,
    W taps).

    Eq 6 says f_k^2 = |row k of C U|^2 = [C (U U^T) C^T]_kk, where U (W, D) holds the velocities of
    the window. U U^T consists of products v_a . v_b with |a - b| < W, so f^2 is linear in those
    products, with the same coefficients at every position: a convolution over time. The product of
    lag d at tap i has the coefficient C[k, i] C[k, i + d], counted twice for d > 0.
    """
    C = dct_matrix(W, device)
    tap = torch.arange(W, device=device)
    other = tap + tap[:, None]                                    # [d, i] -> i + d
    inside = other < W
    K = C[:, None, :] * C[:, other.clamp(max=W - 1)] * inside     # (W, W, W)
    K[:, 1:] *= 2
    return K


def spectrum(ids, G, known, W=8, gap='interp'):
    """Eqs 4-6 from token ids: equals `plain_spectrum` of their code vectors to rounding.

    ids (B, n) int, arbitrary where not known (B, n); G (V, V). Returns f (B, n, W), 0 where nothing
    moves, and seen (B, n) bool, True where the window holds at least one known velocity.
    """
    products, v_known = velocity_products(ids, G, known, W, gap)
    products = F.pad(products.mT, ((W - 1) // 2, W // 2))         # (B, lags, n + W - 1)
    kernel = spectrum_kernel(W, ids.device)                       # float64, or GPUs use TF32
    f2 = F.conv1d(products.double(), kernel).mT.float()           # Eq 5, Eq 6: (B, n, bands)
    share = known_share(v_known, W)
    f2 = f2 / share.clamp(min=1 / W)[..., None]
    return f2.clamp(min=0).sqrt(), share > 0                      # rounding can go below 0


def speed(ids, G, known):
    """|v_t| of Eq 4 (B, n): the simpler signal that the paper's Table 3 compares MSD with."""
    products, _ = velocity_products(ids, G, known, lags=1)
    return products[..., 0].clamp(min=0).sqrt()


def zscore(x, valid):
    """Standardize x (B, n) over the valid positions of each row; 0 elsewhere."""
    N = valid.sum(-1, keepdim=True).clamp(min=1)
    x = torch.where(valid, x, 0)
    x = torch.where(valid, x - x.sum(-1, keepdim=True) / N, 0)
    variance = x.square().sum(-1, keepdim=True) / N
    return x / (variance + EPS).sqrt()


# ----------------------------------------------------------------------- 3.5 motion-aware attention


def band_weights(W, device=None):
    """Eq 12: w_k = exp(-k/3) / sum, (W,). Low frequencies weigh most."""
    k = torch.arange(W, dtype=torch.float32, device=device)
    return torch.softmax(-k / 3, 0)


def similarity(phi):
    """Eq 11: S_ij = -sum_k w_k (phi_ik - phi_jk)^2, (B, n, n).

    The paper divides S by a temperature tau, which is left out here: S is z-scored next, and a
    positive scale cancels. The readable form; `prior_qk` gives z(S) without forming S.
    """
    w = band_weights(phi.shape[-1], phi.device)
    difference = phi[:, :, None] - phi[:, None]
    return -(w * difference.square()).sum(-1)


def prior_qk(phi, seen):
    """Eqs 11-12 and the z-score of Eq 13 as extra query and key dimensions, z(S)_ij = qs_i . ks_j.

    phi (B, n, W), seen (B, n) bool -> qs, ks (B, n, W + 2) float32. With psi = sqrt(w) phi,

        S_ij = -|psi_i - psi_j|^2 = 2 psi_i . psi_j - |psi_i|^2 - |psi_j|^2

    is an inner product, and so is (S - m) / s:

        qs_i = [2 psi_i, 1, -|psi_i|^2 - m] / s        ks_j = [psi_j, -|psi_j|^2, 1]

    No n x n tensor is needed, not even for the mean m and the standard deviation s. Centre psi over
    the N seen tokens, which does not change S, and let a_i = |psi_i|^2, M = sum_i psi_i psi_i^T.
    Then m = -2 mean(a) and s^2 = 4 |M|^2 / N^2 + 2 var(a), because all cross terms vanish. Rows and
    columns that are not seen give 0, the neutral prior.
    """
    ok = seen[..., None].float()
    N = ok.sum(1, keepdim=True).clamp(min=1)                      # (B, 1, 1)
    psi = phi * band_weights(phi.shape[-1], phi.device).sqrt()
    psi = (psi - (psi * ok).sum(1, keepdim=True) / N) * ok

    a = psi.square().sum(-1, keepdim=True)                        # (B, n, 1)
    a_mean = a.sum(1, keepdim=True) / N
    a_variance = ((a - a_mean) * ok).square().sum(1, keepdim=True) / N
    M = psi.transpose(1, 2) @ psi                                 # (B, W, W)
    variance = 4 * M.square().sum((1, 2), keepdim=True) / N**2 + 2 * a_variance

    m = -2 * a_mean
    s = (variance + EPS).sqrt()
    qs = torch.cat([2 * psi, ok, (-a - m) * ok], -1) / s
    ks = torch.cat([psi, -a, ok], -1)
    return qs, ks


def alpha(layer, alpha0):
    """Eq 14: alpha_l = alpha_0 exp(-l/3), with layers l counted from 0."""
    return alpha0 * math.exp(-layer / 3)


# -------------------------------------------------------------------- 3.6 complexity-aware decoding


def exploration(omega, seen, p_max, masked, lambda_D=0.5):
    """Eqs 15-17: b_t = sigmoid(lambda_D k_t + (1 - lambda_D) u_t), (B, n) in (0, 1).

    omega    (B, n), Omega of Eq 8
    seen     (B, n) bool: motion tokens whose complexity is known. The others count as average
    p_max    (B, n), the largest probability of each token
    masked   (B, n) bool: the tokens that are being decoded. Eq 17 z-scores uncertainty over these
             alone: beside kept tokens, of which the model is sure, every masked token would look
             uncertain, and more so with every step
    """
    k = zscore(omega, seen)                                       # Eq 16
    u = zscore(1 - p_max, masked)                                 # Eq 17
    return torch.sigmoid(lambda_D * k + (1 - lambda_D) * u)       # Eq 15
