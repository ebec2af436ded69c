"""What training hides. For tokens that is one call, `mask_tokens`, and three decisions:

    how many   K = gamma(r) n tokens of each motion, gamma(r) = cos(pi r / 2), r ~ U(0, 1)
    which      `choose`: one branch per signal. Your own signal is one more branch
    how        `corrupt`: 80% become [MASK], 10% a random code, 10% stay, as in BERT

DynMask's content-focused masking (3.4, Eqs 9-10) is the branch 'msd'. HGM3's hard token mining
(its 3.2) is the branch 'loss'. Decoding uses `top_k` to decide which tokens stay masked. Text is
hidden as a whole, from a share of the motions (`drop_text`).

Shapes: B batch, n tokens. Every mask has exactly K tokens in each row, whatever the signal.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F

import msd
from lib.configurator import UserError


def mask_tokens(model, ids, c, valid, mask_by='msd', masked_share=None, generator=None, **how):
    """Choose tokens and hide them (Algorithm 1, lines 1-6).

    model          MaskTransformer: its token embeddings and its Gram table
    ids            (B, n) int, clean tokens
    c              (B, m, 512), text; c[:, 0] is the vector of the whole sentence
    valid          (B, n) bool
    masked_share   hide this share of every row, instead of gamma(r)
    mask_by, how   see `choose`

    Returns the masked ids (B, n) and chosen (B, n) bool, the tokens that the loss is taken over.
    """
    if masked_share is None:
        r = torch.rand(len(ids), device=ids.device, generator=generator)
        masked_share = torch.cos(r * math.pi / 2)
    K = (masked_share * valid.sum(1)).round().clamp(min=1).long()
    chosen = choose(model, ids, c, valid, K, mask_by, generator=generator, **how)
    return corrupt(ids, chosen, model.MASK, generator), chosen


@torch.no_grad()
def choose(model, ids, c, valid, K, mask_by, lam=0.3, r_exp=0, noise=0.0, cfs_share=1.0,
           difficulty=None, hard_share=0.0, generator=None):
    """Which K (B,) tokens of each row to hide -> (B, n) bool.

    mask_by      'random'    uniformly (MoMask)
                 'msd'       by complexity Omega and by semantics (DynMask)
                 'velocity'  by speed and by semantics (DynMask, Table 3)
                 'loss'      `hard_share` of them by `difficulty`, the rest at random (HGM3)
                 'msd+loss'  the same, with the complexity added to the difficulty
    difficulty   (B, n), the loss that HGM3's teacher expects of each token
    cfs_share    share of the rows that 'msd' and 'velocity' mask; the others are masked at random
    lam, r_exp, noise   see `select`
    """
    uniform = partial(torch.rand, device=ids.device, generator=generator)
    if mask_by == 'random':
        return top_k(uniform(ids.shape), K, valid)

    if mask_by in ('loss', 'msd+loss'):
        if mask_by == 'msd+loss':
            difficulty = difficulty + dynamics(model, ids, valid)
        K_hard = (hard_share * K).round().long()
        hard = top_k(difficulty, K_hard, valid)
        return hard | top_k(uniform(ids.shape), K - K_hard, valid & ~hard)

    if mask_by == 'msd':
        score = dynamics(model, ids, valid)                                # Eq 9
    elif mask_by == 'velocity':
        score = msd.zscore(msd.speed(ids, model.gram(), valid), valid)
    else:
        raise UserError(f"mask_by is '{mask_by}', which masking.choose has no branch for.")

    x = model.trunk.embed(model.token_emb(ids)).float()
    sentence = model.trunk.cond(c[:, 0]).float()
    s_sem = semantic_score(x, sentence, valid)                             # Eq 10
    chosen = select(score, s_sem, K, valid, lam, r_exp, noise, generator)
    if cfs_share < 1:
        at_random = top_k(uniform(ids.shape), K, valid)
        by_content = uniform(len(ids), 1) < cfs_share
        chosen = torch.where(by_content, chosen, at_random)
    return chosen


def corrupt(ids, chosen, MASK, generator):
    """BERT's corruption of the chosen tokens (MoMask 3.2): 80% become [MASK], 10% a random
    code, 10% stay as they are."""
    u = torch.rand(ids.shape, device=ids.device, generator=generator)
    code = torch.randint(MASK, ids.shape, device=ids.device, generator=generator)
    hidden = torch.where(u < 0.8, MASK, torch.where(u < 0.9, code, ids))
    return torch.where(chosen, hidden, ids)


def drop_text(c, role, share, generator):
    """For classifier-free guidance, replace a share of the texts c (B, m, 512), role (B, m) by no
    text: a zero vector as the only condition token."""
    stays = torch.rand(len(c), 1, 1, device=c.device, generator=generator) >= share
    role = torch.cat([role[:, :1], role[:, 1:] * stays[..., 0]], 1)
    return c * stays, role


# ------------------------------------------------------------------------------- signals and quotas


def dynamics(model, ids, valid):
    """Eq 9: s_dyn (B, n), the z-scored complexity of clean tokens."""
    f, _ = model.spectrum(torch.where(valid, ids, model.PAD))
    return msd.zscore(msd.complexity(f, model.config.omega), valid)


def semantic_score(x, sentence, valid):
    """Eq 10: s_sem (B, n), the z-scored cosine of tokens x (B, n, d) and their sentence (B, d),
    after the transformer's input projections."""
    return msd.zscore(F.cosine_similarity(x, sentence[:, None], dim=-1), valid)


def select(s_dyn, s_sem, K, valid, lam=0.3, r_exp=0, noise=0.0, generator=None):
    """Content-Focused Selection (3.4) -> (B, n) bool with exactly K (B,) tokens in each row.

    (1 - lam) K tokens of largest s_dyn (B, n), then lam K of largest s_sem (B, n) among the others.
    r_exp    a token is picked together with its neighbours within r_exp tokens; K stays the same
    noise    scale of Gumbel noise on both scores. Without it the ranking by s_dyn never changes
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
    """Replace every score by the best one within r tokens, ties broken by the token's own: top-K of
    the result takes the peaks together with what surrounds them."""
    outside = -1e9
    padded = F.pad(score.masked_fill(~valid, outside), (r, r), value=outside)
    best = F.max_pool1d(padded[:, None], 2 * r + 1, 1)[:, 0]
    return best + 1e-3 * score


def top_k(score, K, among):
    """Mark the min(K, available) positions of largest score (B, n) in each row; K (B,) int, among
    (B, n) bool."""
    rank = score.masked_fill(~among, -torch.inf).argsort(-1, descending=True).argsort(-1)
    return (rank < K[:, None]) & among


def gumbel_like(x, generator):
    """Gumbel noise: the arg-max of logits + noise is a draw from their softmax."""
    return -torch.empty_like(x).exponential_(generator=generator).log()
