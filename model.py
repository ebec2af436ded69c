"""The two transformers of MoMask (3.2, 3.3), with DynMask's motion-aware attention as the few lines
that differ: see Attention.forward, Eq 13.

    MaskTransformer   text + partly masked base tokens     -> the base tokens
    ResTransformer    text + base tokens + layers below q  -> the tokens of layer q
    LengthEstimator   text                                 -> how many tokens

Each one's forward returns logits, or its loss when it is given targets. Decoding is in generate.py.

Shapes: B batch, n motion tokens (padded to the longest), V codes, Q quantizers, d latent, H heads.
Text is c (B, m, 512), m condition tokens, the first of which speaks of the whole sentence; c_valid
(B, m) int8 is 0 where there is none, and above 0 where there is (in a graph a node's role, negative
where it is hidden: hgm3.py). Token ids: 0..V-1 codes, V = [MASK], V+1 = [PAD] (residual
transformer: V = pad).

With spectral_attn, rotary and neighbours off and masks chosen at random this is MoMask: official
weights load (momask.py) and the reference code's outputs match (tests/test_model.py).
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import msd
from lib.fast import (appended_attention, dropout, forms_logits, logit_std, spread_prior, std_over,
                  without_gaps)
from hgm3 import GraphAttention


@dataclass
class ModelConfig:
    n_codes: int = 512            # V
    code_dim: int = 512           # width of the token embeddings
    n_quantizers: int = 6         # Q
    latent: int = 384             # d
    n_layers: int = 8             # the released models have 8, the paper says 6
    n_heads: int = 6              # H
    ff: int = 1024
    dropout: float = 0.2
    text_dim: int = 512
    graph: bool = False           # HGM3 3.3: condition tokens are nodes of a semantic graph
    rotary: bool = False          # queries and keys are turned by their place, in every layer
    neighbours: int = 0           # tokens on either side that a token's embedding reads as well
    token_init: str = 'codebook'  # token embeddings start as code vectors | 'random' (MoMask)
    res_draw: str = 'cycle'       # residual layers are learned in turn | 'release': low ones more
    # DynMask 3.5, motion-aware attention (masked transformer only)
    spectral_attn: bool = True
    window: int = 8               # W, tokens
    alpha0: float = 0.3           # Eq 14
    alpha_schedule: str = 'decay'  # Eq 14 | 'constant' | 'reversed'
    fusion: str = 'rescaled'      # 'zscore' is Eq 13 to the letter | 'rescaled' | 'temperature'
    msd_embed: str = 'codebook'   # x_t of Eq 4: the base code vectors | 'learned' (Embed(z_t))
    msd_gap: str = 'interp'       # velocities over masked tokens: interpolated | 'zero'
    omega: str = 'energy'         # Omega of Eq 8: |f_t| | 'flatness', the letter


# ---------------------------------------------------------------------------------------- the trunk


class Attention(nn.Module):
    """Multi-head self-attention; given a spectral prior, motion-aware attention (DynMask 3.5).

    Eq 13 blends z-scored logits with a z-scored prior. Before the softmax the blend is multiplied
    by a unit, fusion:

        'zscore'       1, the letter. But unit-variance logits over 50 tokens cannot become sharp
        'rescaled'     sigma, the deviation of the layer's own logits: the prior joins at the scale
                       that the layer has learned. sigma is read, not trained through
        'temperature'  one learned factor per head
    """

    def __init__(self, config, layer):
        super().__init__()
        self.n_heads = config.n_heads
        self.scale = (config.latent // config.n_heads) ** -0.5
        self.p = config.dropout
        self.fusion = config.fusion
        self.alpha = msd.alpha(layer, config.alpha0, config.n_layers, config.alpha_schedule)
        self.in_proj = nn.Linear(config.latent, 3 * config.latent)
        self.out_proj = nn.Linear(config.latent, config.latent)
        if config.spectral_attn and config.fusion == 'temperature':
            self.log_temp = nn.Parameter(torch.zeros(config.n_heads, 1, 1))

    def forward(self, x, valid, pad, prior=None, rotary=None):
        """x (B, N, d), valid (B, N) bool, pad (B, 1, 1, N) of 0 or -inf -> (B, N, d).

        prior: None for ordinary attention, or of fast.spread_prior: where logits are formed (z(S)
        (B, 1, N, N), its valid pairs (B, N N, 1)), else (qs, ks) (B, 1, N, .), whose product is
        z(S). rotary: None, or rows of `rotary_table` (2, N, d / 2H), that turn queries and keys.
        """
        B, N, d = x.shape
        a = self.alpha                                                    # Eq 14
        qkv = self.in_proj(x).view(B, N, 3, self.n_heads, d // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous()                 # (B, H, N, d / H)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        q = q * self.scale

        if forms_logits(x):
            A = q @ k.mT                                                  # (B, H, N, N)
            if prior is not None:
                zS, pairs = prior
                sigma, unit = self.units(std_over(A, pairs))
                # Eq 13: (1 - a) z(A) + a z(S). z(A)'s mean is a constant, which the softmax cancels
                A = ((1 - a) / sigma * A + a * zS) * unit
            A = (A + pad).softmax(-1)
            o = dropout(A.to(v.dtype), self.p, self.training) @ v
        else:   # the same through scaled_dot_product_attention: no N x N tensor exists (fast.py)
            a_content, a_prior = 1.0, 0.0
            if prior is not None:
                sigma, unit = self.units(logit_std(q, k, valid))
                a_content, a_prior = (1 - a) / sigma * unit, a * unit     # Eq 13
            p = self.p if self.training else 0.0
            o = appended_attention(q, k, v, a_content, a_prior, prior, pad, p)

        return self.out_proj(o.transpose(1, 2).reshape(B, N, d))

    def units(self, sigma):
        """sigma (B, H, 1, 1) of the logits -> sigma as Eq 13 divides by it, and the unit of its
        result."""
        if self.fusion == 'zscore':
            return sigma, 1.0
        if self.fusion == 'temperature':
            return sigma, self.log_temp.exp()
        return sigma.detach(), sigma.detach()


class Block(nn.Module):
    """A post-norm transformer layer, as nn.TransformerEncoderLayer(activation='gelu')."""

    def __init__(self, config, layer):
        super().__init__()
        self.p = config.dropout
        self.attn = Attention(config, layer)
        self.linear1 = nn.Linear(config.latent, config.ff)
        self.linear2 = nn.Linear(config.ff, config.latent)
        self.norm1 = nn.LayerNorm(config.latent)
        self.norm2 = nn.LayerNorm(config.latent)

    def forward(self, x, valid, pad, prior=None, rotary=None):
        h = self.attn(x, valid, pad, prior, rotary)
        x = self.norm1(x + dropout(h, self.p, self.training))
        h = F.gelu(self.linear1(x))
        h = self.linear2(dropout(h, self.p, self.training))
        return self.norm2(x + dropout(h, self.p, self.training))


class Trunk(nn.Module):
    """Condition tokens and embedded motion tokens through the layers -> hidden states."""

    def __init__(self, config):
        super().__init__()
        self.p = config.dropout
        self.head_width = config.latent // config.n_heads
        self.embed = nn.Linear(config.code_dim, config.latent)
        self.embed_beside = None
        if config.neighbours:
            r = config.neighbours
            self.embed_beside = nn.Conv1d(config.code_dim, config.latent, 2 * r + 1, padding=r,
                                          bias=False)
        self.cond = nn.Linear(config.text_dim, config.latent)
        self.graph = GraphAttention(config.text_dim) if config.graph else None
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.register_buffer('positions', sinusoid(1024, config.latent), persistent=False)
        table = rotary_table(1024, self.head_width) if config.rotary else None
        self.register_buffer('rotary', table, persistent=False)

    def condition(self, c, c_valid):
        """Text c (B, m, 512), c_valid (B, m) -> front (B, m, d), front_valid (B, m) bool. The
        sentence has no position; clauses, words or nodes behind it have theirs, for their order
        matters."""
        if self.graph is not None:
            c = self.graph(c, c_valid)
        front = self.cond(c)
        order = self.positions[:c.shape[1] - 1].to(front.dtype)
        front = torch.cat([front[:, :1], front[:, 1:] + order], 1)
        if self.graph is not None:
            return without_gaps(front, c_valid > 0)
        return front, c_valid > 0

    def forward(self, x, valid, front, front_valid, prior=None):
        """x (B, n, code_dim), valid (B, n); front (B, m, d), front_valid (B, m) bool: tokens that
        go before them; prior: qs, ks (B, n, W + 2) of msd.prior_qk; -> h (B, n, d)."""
        m, n = front.shape[1], x.shape[1]
        embedded = self.embed(x)
        if self.embed_beside is not None:
            x = x * valid[..., None]   # behind a motion's end is nothing
            embedded = embedded + self.embed_beside(x.mT).mT
        x = embedded + self.positions[:n]
        x = dropout(x, self.p, self.training)
        x = torch.cat([front.to(x.dtype), x], 1)
        valid = torch.cat([front_valid, valid], 1)
        pad = torch.zeros(valid.shape, device=x.device).masked_fill(~valid, -torch.inf)
        pad = pad[:, None, None]                                          # (B, 1, 1, m + n)
        if prior is not None:
            prior = spread_prior(*prior, valid, x, self.head_width)
        rotary = None
        if self.rotary is not None:
            place = torch.arange(1 - m, 1 + n, device=x.device).clamp(min=0)   # text has place 0
            rotary = self.rotary[:, place]
        for layer in self.layers:
            x = layer(x, valid, pad, prior, rotary)
        return x[:, m:]


class Head(nn.Module):
    def __init__(self, d, out):
        super().__init__()
        self.dense = nn.Linear(d, d)
        self.norm = nn.LayerNorm(d, eps=1e-12)
        self.out = nn.Linear(d, out)

    def forward(self, x):
        return self.out(self.norm(F.gelu(self.dense(x))))


def angles(n, d, base):
    """Place t times base^(-2i / d), pair i of d dimensions: (n, d / 2)."""
    frequency = torch.exp(torch.arange(0, d, 2) * (-math.log(base) / d))
    return torch.arange(n)[:, None] * frequency


def sinusoid(n, d):
    """Positions (n, d): sin on even, cos on odd dimensions."""
    angle = angles(n, d, 10000.0)
    return torch.stack([angle.sin(), angle.cos()], -1).view(n, d)


def rotary_table(n, d):
    """Rotary positions (RoPE, Su et al. 2021): cos and sin (2, n, d / 2) of the angles by which
    place t turns the pairs of a head's d dimensions. q k^T then knows how far apart two tokens are.
    The base is 100 where theirs is 10,000: over 50 tokens the slowest pair turns by half a radian.
    """
    angle = angles(n, d, 100.0)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x, table):
    """x (B, H, N, d / H), of which the pair (x_i, x_{i + d / 2H}) is turned by the angle i."""
    cos, sin = table.to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def init_weights(module):
    if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, Attention):
        # as nn.MultiheadAttention leaves it: at 0.02 attention starts flat and stays so for long
        nn.init.xavier_uniform_(module.in_proj.weight)


def standardized(codebook):
    """Code vectors (V, D) to start embeddings from: codes that decode alike then start alike."""
    centred = codebook - codebook.mean(0)
    return centred / centred.std()


def cross_entropy(logits, targets, n_targets=None):
    """Eq 3: -log p summed over targets (B, n), of which -100 are not asked for, divided by
    n_targets. That is their number, unless several ranks share a batch: then the whole batch's."""
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction='sum')
    return total / ((targets >= 0).sum() if n_targets is None else n_targets)


# -------------------------------------------------------------------------------------- base tokens


class MaskTransformer(nn.Module):
    def __init__(self, config, codebook=None):
        """codebook (V, D): the tokenizer's base codebook, through which MSD sees the motion (kept
        as its Gram table G)."""
        super().__init__()
        self.config = config
        self.MASK = config.n_codes
        self.PAD = config.n_codes + 1
        self.token_emb = nn.Embedding(config.n_codes + 2, config.code_dim)
        self.trunk = Trunk(config)
        self.head = Head(config.latent, config.n_codes)
        self.apply(init_weights)
        self.register_buffer('G', torch.zeros(config.n_codes, config.n_codes))
        if codebook is not None:
            self.G.copy_(msd.gram(codebook))
        if codebook is not None and config.token_init == 'codebook':
            self.token_emb.weight.data[:config.n_codes] = standardized(codebook)

    def forward(self, ids, c, c_valid, valid, targets=None, n_targets=None, described=None):
        """ids (B, n) with [MASK]s, c (B, m, 512), c_valid (B, m), valid (B, n) bool -> logits
        (B, n, V), or the loss (Eq 3) of targets (B, n), -100 where nothing is asked.

        described: (f, seen), what `spectrum` says of the sequence that motion-aware attention shall
        see. By default that is ids themselves: the visible tokens.
        """
        ids = torch.where(valid, ids, self.PAD)
        prior = None
        if self.config.spectral_attn:
            f, seen = described or self.spectrum(ids)
            with torch.autocast(ids.device.type, enabled=False):
                # windows behind the end see the motion too, but are not tokens
                prior = msd.prior_qk(msd.unit(f), seen & valid)
        front, front_valid = self.trunk.condition(c, c_valid)
        h = self.trunk(self.token_emb(ids), valid, front, front_valid, prior)
        logits = self.head(h)
        if targets is None:
            return logits
        return cross_entropy(logits, targets, n_targets)

    @torch.no_grad()
    def spectrum(self, ids):
        """Eqs 4-6 of a token sequence (B, n), in which [MASK] and [PAD] are unknown -> f (B, n, W),
        seen (B, n)."""
        config = self.config
        with torch.autocast(ids.device.type, enabled=False):
            return msd.spectrum(ids, self.gram(), ids < self.MASK, config.window, config.msd_gap)

    def gram(self):
        """The Gram table of the x_t that Eq 4 takes differences of."""
        if self.config.msd_embed == 'codebook':
            return self.G
        codes = self.token_emb.weight[:self.MASK].detach()
        return msd.gram(self.trunk.embed(codes).detach())

    @torch.no_grad()
    def mask_tokens(self, ids, c, valid, mask_by='msd', lam=0.3, r_exp=0, noise=0.0, cfs_share=1.0,
                    remask=True, share=None, difficulty=None, hard_share=0.0, generator=None):
        """Choose what to hide and hide it (3.4; Algorithm 1, lines 1-6).

        ids (B, n) clean, c (B, m, 512), valid (B, n) -> masked ids (B, n), chosen (B, n) bool.
        How many: gamma(r) = cos(pi r / 2) with r ~ U(0, 1), or `share` of each row. Which, mask_by:
        'random', or content-focused, where Eq 9 ranks tokens by 'msd' complexity or by 'velocity'
        (Table 3). cfs_share: the share of rows masked by content, the others at random. 'loss',
        HGM3 3.2: of a row's masked tokens hard_share are those of largest difficulty (B, n), the
        others random; 'msd+loss': with Eq 9's score added to it. lam, r_exp, noise: of msd.select.
        remask (BERT; MoMask Table 2): 80% become [MASK], 10% a random code, 10% stay; without it
        all become [MASK].
        """
        B, n = ids.shape

        def uniform(*shape):
            return torch.rand(shape, device=ids.device, generator=generator)

        if share is None:
            share = torch.cos(uniform(B) * math.pi / 2)
        K = (share * valid.sum(1)).round().clamp(min=1).long()
        if mask_by == 'random':
            chosen = msd.top_k(uniform(B, n), K, valid)
        elif 'loss' in mask_by:
            if mask_by == 'msd+loss':
                difficulty = difficulty + self.dynamics(ids, valid, 'msd')
            K_hard = (hard_share * K).round().long()
            hard = msd.top_k(difficulty, K_hard, valid)
            chosen = hard | msd.top_k(uniform(B, n), K - K_hard, valid & ~hard)
        else:
            s_dyn = self.dynamics(ids, valid, mask_by)                    # Eq 9
            x = self.trunk.embed(self.token_emb(ids)).float()
            sentence = self.trunk.cond(c[:, 0]).float()   # before any graph attention
            s_sem = msd.semantic_score(x, sentence, valid)                # Eq 10
            chosen = msd.select(s_dyn, s_sem, K, valid, lam, r_exp, noise, generator)
            if cfs_share < 1:
                at_random = msd.top_k(uniform(B, n), K, valid)
                chosen = torch.where(uniform(B, 1) < cfs_share, chosen, at_random)
        if not remask:
            return torch.where(chosen, self.MASK, ids), chosen
        u = uniform(B, n)
        code = torch.randint(self.MASK, (B, n), device=ids.device, generator=generator)
        hidden = torch.where(u < 0.8, self.MASK, torch.where(u < 0.9, code, ids))
        return torch.where(chosen, hidden, ids), chosen

    def dynamics(self, ids, valid, mask_by):
        """The signal that ranks clean tokens (B, n) by how much happens there, z-scored."""
        if mask_by == 'velocity':
            return msd.zscore(msd.speed(ids, self.gram(), valid), valid)
        f, _ = self.spectrum(torch.where(valid, ids, self.PAD))
        return msd.zscore(msd.complexity(f, self.config.omega), valid)    # Eqs 8, 9


class LossPredictor(nn.Module):
    """HGM3's G: clean tokens and text -> what loss MaskTransformer will have on each, up to a
    monotone function (hgm3.py). The paper gives it six layers of its own; with one, a training step
    costs 1.17 of MoMask's (SPEED.md). No dropout: it must not move the masked transformer's random
    numbers."""

    def __init__(self, config):
        super().__init__()
        small = replace(config, n_layers=1, dropout=0.0, spectral_attn=False)
        self.PAD = config.n_codes + 1
        self.token_emb = nn.Embedding(config.n_codes + 2, config.code_dim)
        self.trunk = Trunk(small)
        self.head = Head(config.latent, 1)
        self.apply(init_weights)

    def forward(self, ids, c, c_valid, valid):
        """ids (B, n), c (B, m, 512), c_valid (B, m), valid (B, n) -> (B, n)."""
        ids = torch.where(valid, ids, self.PAD)
        front, front_valid = self.trunk.condition(c, c_valid)
        return self.head(self.trunk(self.token_emb(ids), valid, front, front_valid))[..., 0]


# ---------------------------------------------------------------------------------- residual tokens


class ResTransformer(nn.Module):
    """One network for all layers q = 1..Q-1 above the base. It reads the sum of the embeddings of
    the layers below q, and a token that says q. A table of codes serves twice: table j projects the
    output of layer j, and embeds it as the input of layer j + 1."""

    def __init__(self, config, codebooks=None):
        """codebooks (Q, V, D): of the tokenizer, for token_init 'codebook'."""
        super().__init__()
        self.config = config

        def codes(count):   # (count, V + 1, code_dim); the last code is padding
            return nn.Parameter(torch.randn(count, config.n_codes + 1, config.code_dim) * 0.02)

        self.first = codes(1)                           # embeds the base layer
        self.shared = codes(config.n_quantizers - 2)    # project and embed layers 1..Q-2
        self.last = codes(1)                            # projects layer Q-1
        self.layer_emb = nn.Linear(config.n_quantizers, config.latent)   # of the one-hot layer
        self.trunk = Trunk(config)
        self.head = Head(config.latent, config.code_dim)
        self.apply(init_weights)
        if codebooks is not None and config.token_init == 'codebook':
            tables = (*self.first, *self.shared, *self.last)
            for table, codebook in zip(tables, codebooks):
                table.data[:config.n_codes] = 0.1 * standardized(codebook)

    def forward(self, ids, c, c_valid, valid, q=None, row0=0, n_targets=None):
        """ids (B, n, Q), c (B, m, 512), c_valid (B, m), valid (B, n).

        q given: logits (B, n, V + 1) of layer q; ids of layers from q on are not looked at.
        q None: the loss (MoMask Eq 4), where the targets are ids of the layers that rows learn.
        Row i learns layer pattern[(row0 + i) mod P], where row0 is this rank's first row of the
        global batch: in turn, so that rows of one layer are a slice and share a plain product.
        """
        n_layers = self.config.n_quantizers - 1
        pattern = layer_pattern(n_layers, self.config.res_draw)
        P = len(pattern)
        row = torch.arange(len(ids), device=ids.device)
        if q is None:
            layer = torch.tensor(pattern, device=ids.device)[(row0 + row) % P]   # (B,)
        else:
            layer = torch.full_like(row, q)
        ids = torch.where(valid[..., None], ids, self.config.n_codes)
        tables = (*self.first, *self.shared, *self.last)

        x = 0
        for j in range(n_layers if q is None else q):
            below = (j < layer).to(self.first.dtype)
            x = x + F.embedding(ids[..., j], tables[j]) * below[:, None, None]
        which = F.one_hot(layer, self.config.n_quantizers).to(self.first.dtype)
        front, front_valid = self.trunk.condition(c, c_valid)
        front = torch.cat([front, self.layer_emb(which)[:, None]], 1)
        front_valid = F.pad(front_valid, (0, 1), value=True)
        h = self.head(self.trunk(x, valid, front, front_valid))           # (B, n, code_dim)
        if q is not None:
            return h @ tables[q].T.to(h.dtype)

        logits = torch.empty(*h.shape[:2], len(tables[0]), dtype=h.dtype, device=h.device)
        for j in range(P):
            projection = tables[pattern[(row0 + j) % P]].T.to(h.dtype)
            logits[j::P] = h[j::P] @ projection
        own_layer = layer[:, None, None].expand(-1, ids.shape[1], 1)
        targets = ids.gather(2, own_layer)[..., 0].masked_fill(~valid, -100)
        return cross_entropy(logits, targets, n_targets)


def layer_pattern(n_layers, draw):
    """Which of the layers 1 .. n_layers the rows of a batch learn, in turn. 'release': the shares
    of MoMask's code, which draws 1 + round((1 - cos(pi u / 2)) (n_layers - 1)), u ~ U(0, 1)."""
    if draw == 'cycle':
        return [1 + i for i in range(n_layers)]
    # quantiles of u in a scrambled order, so that small batches meet all layers
    quantiles = [(7 * i % 16 + 0.5) / 16 for i in range(16)]
    return [1 + round((1 - math.cos(math.pi * u / 2)) * (n_layers - 1)) for u in quantiles]


# ------------------------------------------------------------------------------------------- length


class LengthEstimator(nn.Module):
    """text c (B, m, 512), c_valid (B, m), whose vectors it sums -> logits (B, n_out) over the
    number of tokens, or the loss of targets (B,). MoMask's: one vector, 50 outputs."""

    def __init__(self, text_dim=512, n_out=50):
        super().__init__()

        def part(i, o):
            return [nn.Linear(i, o), nn.LayerNorm(o), nn.LeakyReLU(0.2)]

        self.output = nn.Sequential(
            *part(text_dim, 512), nn.Dropout(0.2),
            *part(512, 256), nn.Dropout(0.2),
            *part(256, 128), nn.Linear(128, n_out))
        self.apply(init_weights)

    def forward(self, c, c_valid, targets=None):
        logits = self.output((c * (c_valid > 0)[..., None]).sum(1))
        if targets is None:
            return logits
        return F.cross_entropy(logits, targets)


# --------------------------------------------------------------------------------------- optimizers


def make_optimizers(learner, name, lr, weight_decay=0.0, fused=True):
    """AdamW for everything, or ('muon') Muon for the matrices of the trunk's layers, whose step has
    AdamW's size (match_rms_adamw), so that both take the same learning rate."""
    matrices, others = [], []
    for tensor, p in learner.named_parameters():
        if p.requires_grad:
            by_muon = name == 'muon' and 'trunk.layers.' in tensor and p.ndim == 2
            (matrices if by_muon else others).append(p)
    made = [torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=weight_decay,
                              fused=fused)]
    if matrices:
        made.append(torch.optim.Muon(matrices, lr, weight_decay=weight_decay,
                                     adjust_lr_fn='match_rms_adamw'))
    return made
