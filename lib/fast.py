"""The measured tricks, each beside what it replaces. Nothing here changes a result beyond rounding,
and nothing here has to be understood to understand the method: read model.py first.

Figures are of 2 virtual cores of an AMD EPYC (Zen 4: avx512_bf16, no AMX), in bfloat16, at the
released size (64 clips, 6 heads, 50 tokens, width 384).
"""
import torch
import torch.nn.functional as F

import msd


def dropout(x, p, training):
    """nn.Dropout with cheap random numbers on a CPU, where torch draws them one by one on one core:
    2.9 ms instead of 25 for 3.3M elements, which is as much as four of the layer's products.

    One 64-bit draw serves eight elements, a byte each, so p is rounded to 1/256 (0.2 -> 0.199).
    Whole-tensor int16 steps, because comparisons do not vectorize.
    """
    if not training or p == 0:
        return x
    if x.is_cuda or torch.compiler.is_compiling():   # there the generator is parallel and fused
        return F.dropout(x, p)
    n = x.numel()
    drop = max(1, round(256 * p))
    low = 256 * drop - 32768   # a high byte below `drop` makes an int16 smaller than this
    draws = torch.empty((n + 7) // 8, dtype=torch.int64)
    draws = draws.random_(-2**63, None).view(torch.int16)
    draws = torch.stack([draws, draws << 8]).view(-1)[:n]   # high bytes, then low ones
    survives = draws.clamp_(low - 1, low).sub_(low - 1)     # 0 or 1
    scale = 256 / (256 - drop)
    return x * survives.to(x.dtype).mul_(scale).view(x.shape)


def without_gaps(front, shown):
    """Condition tokens front (B, m, d), of which those are shown (B, m) bool, without the others as
    far as rows allow: (B, m', d), (B, m'), where m' is the most that a row is shown. A batch of
    HGM3 that hears of the motion alone has one such token, not seven."""
    if front.is_cuda or torch.compiler.is_compiling():   # one shape for all steps
        return front, shown
    most = int(shown.sum(1).max())
    order = shown.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    row = torch.arange(len(order))[:, None]
    return front[row, order], shown[row, order]


def forms_logits(x):
    """Does attention over x (B, N, d) write its N x N logits A down, as model.py shows it? On a CPU
    and up to 256 tokens it is faster so: 4.3 ms a layer against the fused kernel's 8.5. Else it
    goes through scaled_dot_product_attention, and neither A nor S ever exists: at 4,096 tokens
    2.5 s and 350 MB instead of 8.4 s and 10 GB (`bench.py --what=attention`)."""
    return not x.is_cuda and x.shape[1] <= 256


def std_over(A, pairs):
    """sigma of A (B, H, N, N) over the marked pairs (B, N N, 1), 1.0 or 0.0 -> (B, H, 1, 1): 0.5 ms
    in two products, where logit_std's covariances take 41."""
    A = A.flatten(2)
    count = pairs.sum(1, keepdim=True).clamp(min=1)
    centred = A - (A @ pairs) / count
    variance = (centred.square() @ pairs) / count
    return (variance + msd.EPS).sqrt()[..., None]


def logit_std(q, k, valid):
    """sigma of A = q k^T over the valid pairs, without forming A.

    q, k (B, H, N, d), valid (B, N) -> (B, H, 1, 1) float32. With q = q_mean + q', k = k_mean + k'
    the cross terms average to zero:

        var(A) = k_mean^T Cq k_mean + q_mean^T Ck q_mean + <Cq, Ck>,   C = covariance (d, d)

    Sums of squares: nothing cancels, and bfloat16 products are good enough.
    """
    N = valid.sum(-1).clamp(min=1).view(-1, 1, 1, 1)
    ok = valid[:, None, :, None].to(q.dtype)                              # (B, 1, N, 1)

    def mean_and_scatter(x):
        mean = (ok / N).to(x.dtype).mT @ x                                # (B, H, 1, d)
        centred = (x - mean) * ok
        scatter = centred.mT @ centred                                    # N C, (B, H, d, d)
        return mean.float(), scatter.float()

    q_mean, q_scatter = mean_and_scatter(q)
    k_mean, k_scatter = mean_and_scatter(k)
    across = k_mean @ q_scatter @ k_mean.mT + q_mean @ k_scatter @ q_mean.mT
    within = (q_scatter * k_scatter).sum((-2, -1), keepdim=True) / N
    return ((across + within) / N + msd.EPS).sqrt()


def spread_prior(qs, ks, valid, x, head):
    """What every layer needs of the spectral prior, once for all of them.

    qs, ks (B, n, W + 2) from msd.prior_qk, of the motion tokens, which are the last n of the N
    tokens x (B, N, d); valid (B, N); head: the width of an attention head. Rows and columns of the
    tokens in front of them become 0. Returns, where logits are formed, z(S) (B, 1, N, N) and the
    valid pairs (B, N N, 1); else qs and ks (B, 1, N, wide), to be appended to q and k.
    """
    front = x.shape[1] - qs.shape[1]
    if forms_logits(x):
        with torch.autocast(x.device.type, enabled=False):
            S = F.pad(qs @ ks.mT, (front, 0, front, 0))[:, None]
        pairs = valid[:, None] & valid[..., None]
        return S, pairs.flatten(1).float()[..., None]
    fill = -(head + qs.shape[-1]) % 8   # GPU kernels want multiples of 8
    return tuple(F.pad(part, (0, fill, front, 0))[:, None] for part in (qs, ks))


def appended_attention(q, k, v, a_content, a_prior, prior, pad, p=0.0):
    """softmax(a_content q k^T + a_prior z(S) + pad) v without an N x N tensor: z(S) = qs . ks is as
    many more dimensions of q and k.

    q, k, v (B, H, N, d); prior: qs, ks (B, 1, N, wide) from spread_prior, or None (then a_content
    is the usual 1); pad (B, 1, 1, N), 0 or -inf.
    """
    dtype, d = v.dtype, v.shape[-1]
    if prior is not None:
        qs, ks = (part.expand(*q.shape[:3], -1) for part in prior)
        q = torch.cat([q * a_content, a_prior * qs], -1)
        k = torch.cat([k, ks.to(k.dtype)], -1)
        v = F.pad(v, (0, q.shape[-1] - d))   # kernels of linear memory want one width for all three
        a_content = 1.0
    if pad is not None:
        pad = pad.to(dtype)
    q = q.to(dtype)
    o = F.scaled_dot_product_attention(q, k, v, pad, scale=a_content, dropout_p=p)
    return o[..., :d]
