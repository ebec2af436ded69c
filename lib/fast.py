"""Measured optimizations, each beside what it replaces. None of them changes a result beyond
rounding, and none has to be understood to understand the method: read model.py first.

Figures are from 2 virtual cores of an AMD EPYC (Zen 4: avx512_bf16, no AMX), in bfloat16, at the
released size (64 clips, 6 heads, 50 tokens, width 384).
"""
import torch
import torch.nn.functional as F


def dropout(x, p, training):
    """F.dropout with cheaper random numbers on a CPU: 2.9 ms instead of 25 for 3.3M elements, which
    is as much as four of a layer's matrix products. torch draws them one by one on one core.

    One 64-bit draw serves eight elements, one byte each, so p is rounded to 1/256 (0.2 -> 0.199).
    The steps are on whole int16 tensors because comparisons do not vectorize.
    """
    if not training or p == 0:
        return x
    if x.is_cuda or torch.compiler.is_compiling():   # there the generator is parallel and fused
        return F.dropout(x, p)

    n = x.numel()
    drop = max(1, round(256 * p))
    low = 256 * drop - 32768   # an int16 is below this if its high byte is below `drop`
    draws = torch.empty((n + 7) // 8, dtype=torch.int64)
    draws = draws.random_(-2**63, None).view(torch.int16)
    draws = torch.stack([draws, draws << 8]).view(-1)[:n]   # all high bytes, then all low ones
    survives = draws.clamp_(low - 1, low).sub_(low - 1)     # 0 or 1
    scale = 256 / (256 - drop)
    return x * survives.to(x.dtype).mul_(scale).view(x.shape)


def drop_hidden(cond, shown):
    """Remove the condition tokens that no row of the batch needs.

    cond (B, m, d), shown (B, m) bool -> (B, m', d), (B, m'), where m' is the largest number of
    shown tokens in a row. A batch at HGM3's first level has one shown token per row instead of
    seven.
    """
    if cond.is_cuda or torch.compiler.is_compiling():   # they prefer one shape for all steps
        return cond, shown
    most = int(shown.sum(1).max())
    order = shown.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    row = torch.arange(len(order))[:, None]
    return cond[row, order], shown[row, order]


# ---------------------------------------------------------------------------------------- attention


def forms_logits(x):
    """Should attention over x (B, N, d) form its N x N logits A, as model.py shows it?

    On a CPU and up to 256 tokens that is faster: 4.3 ms a layer against 8.5 of the fused kernel.
    Otherwise scaled_dot_product_attention is used, and neither A nor S ever exists: at 4,096 tokens
    2.5 s and 350 MB instead of 8.4 s and 10 GB (LOG.md).
    """
    return not x.is_cuda and x.shape[1] <= 256


def variance_over(A, pairs):
    """The variance of A (B, H, N, N) over the marked pairs (B, N N, 1), 1.0 or 0.0 -> (B, H, 1, 1).
    Two products take 0.5 ms, where the covariances of `logit_variance` take 41."""
    A = A.flatten(2)
    count = pairs.sum(1, keepdim=True).clamp(min=1)
    centred = A - (A @ pairs) / count
    variance = (centred.square() @ pairs) / count
    return variance[..., None]


def logit_variance(q, k, motion):
    """The variance of A = q k^T over the pairs of motion tokens, without forming A.

    q, k (B, H, N, d), motion (B, N) -> (B, H, 1, 1) float32. With q = q_mean + q', k = k_mean + k'
    the cross terms average to zero:

        var(A) = k_mean^T Cq k_mean + q_mean^T Ck q_mean + <Cq, Ck>,   C = covariance (d, d)

    These are sums of squares: nothing cancels, so bfloat16 products are accurate enough.
    """
    N = motion.sum(-1).clamp(min=1).view(-1, 1, 1, 1)
    ok = motion[:, None, :, None].to(q.dtype)                             # (B, 1, N, 1)

    def mean_and_scatter(x):
        mean = (ok / N).to(x.dtype).mT @ x                                # (B, H, 1, d)
        centred = (x - mean) * ok
        scatter = centred.mT @ centred                                    # N C, (B, H, d, d)
        return mean.float(), scatter.float()

    q_mean, q_scatter = mean_and_scatter(q)
    k_mean, k_scatter = mean_and_scatter(k)
    across = k_mean @ q_scatter @ k_mean.mT + q_mean @ k_scatter @ q_mean.mT
    within = (q_scatter * k_scatter).sum((-2, -1), keepdim=True) / N
    return (across + within) / N


def spread_prior(qs, ks, motion, x, head):
    """Prepare the spectral prior once for all layers.

    qs, ks (B, n, W + 2) of msd.prior_qk describe the motion tokens, the last n of the N tokens
    x (B, N, d), of which motion (B, N) marks the valid ones; head is the width of an attention
    head. The rows and columns of the condition tokens become 0. Returns

        where logits are formed   z(S) (B, 1, N, N) and the pairs of motion tokens (B, N N, 1)
        otherwise                 qs and ks (B, 1, N, wide), to be appended to q and k
    """
    m = x.shape[1] - qs.shape[1]
    if forms_logits(x):
        with torch.autocast(x.device.type, enabled=False):
            S = F.pad(qs @ ks.mT, (m, 0, m, 0))[:, None]
        pairs = motion[:, None] & motion[..., None]
        return S, pairs.flatten(1).float()[..., None]
    fill = -(head + qs.shape[-1]) % 8   # GPU kernels need multiples of 8
    return tuple(F.pad(part, (0, fill, m, 0))[:, None] for part in (qs, ks))


def appended_attention(q, k, v, a_content, a_prior, z_S, pad, p=0.0):
    """softmax(a_content q k^T + a_prior z(S) + pad) v without an N x N tensor: z(S) = qs . ks is
    appended to q and k as extra dimensions.

    q, k, v (B, H, N, d); z_S: qs, ks (B, 1, N, wide) of spread_prior, or None (a_content is then
    1); pad (B, 1, 1, N), 0 or -inf; p: dropout.
    """
    dtype, d = v.dtype, v.shape[-1]
    if z_S is not None:
        qs, ks = (part.expand(*q.shape[:3], -1) for part in z_S)
        q = torch.cat([q * a_content, a_prior * qs], -1)
        k = torch.cat([k, ks.to(k.dtype)], -1)
        v = F.pad(v, (0, q.shape[-1] - d))   # memory-efficient kernels need q, k, v of one width
        a_content = 1.0
    if pad is not None:
        pad = pad.to(dtype)
    q = q.to(dtype)
    o = F.scaled_dot_product_attention(q, k, v, pad, scale=a_content, dropout_p=p)
    return o[..., :d]
