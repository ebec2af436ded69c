"""The two transformers of MoMask (3.2, 3.3), with DynMask's motion-aware attention as the few lines
that differ: Eq 13 in Attention.forward.

    MaskTransformer   text + partly masked base tokens     -> logits of the base tokens
    ResTransformer    text + base tokens + layers below q  -> logits of the tokens of layer q
    LengthEstimator   text                                 -> logits of the number of tokens

Given targets, each returns its loss instead. Masks are chosen in masking.py, decoding is in
generate.py.

Shapes: B batch, n motion tokens (padded to the longest), V codes, Q quantizers, d latent, H heads.
Text is c (B, m, 512), m condition tokens, the first of which is the vector of the whole sentence.
role (B, m) int8 says what each of them is: 0 nothing (padding), 1 the sentence or a clause, in a
graph the role of a node, negative if it is hidden (hgm3.py). Token ids: 0..V-1 codes, V = [MASK],
V+1 = [PAD] (residual transformer: V = [PAD]).

Masks (B, n) bool, the same words in all files: valid, no padding; known, neither [MASK] nor [PAD]
(in generate.py the given ids themselves); seen, with a known velocity in its window (msd.py);
chosen, hidden by training (masking.py); masked, hidden in this step of decoding, and wanted, to be
generated (generate.py).

With spectral_attn, rotary and neighbours off and random masks this is MoMask: official weights load
(momask.py), and the reference code's outputs are reproduced (tests/test_model.py).
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import msd
from hgm3 import GraphAttention
from lib.fast import (appended_attention, drop_hidden, dropout, forms_logits, logit_variance,
                      spread_prior, variance_over)


@dataclass
class ModelConfig:
    """Sizes and switches of both transformers. Fields with the name of a setting of train_mask.py
    are filled from it, which is also where they are explained."""
    n_codes: int = 512              # V, of the tokenizer
    code_dim: int = 512             # of the tokenizer: width of the token embeddings
    n_quantizers: int = 6           # Q, of the tokenizer
    text_dim: int = 512
    graph: bool = False             # HGM3 3.3: condition tokens are the nodes of a graph
    latent: int = 384               # d
    n_layers: int = 8
    n_heads: int = 6                # H
    ff: int = 1024
    dropout: float = 0.2
    rotary: bool = False
    neighbours: int = 0
    token_init: str = 'codebook'
    # DynMask 3.5, motion-aware attention (masked transformer only)
    spectral_attn: bool = False
    window: int = 8                 # W
    alpha0: float = 0.3             # Eq 14
    fusion: str = 'rescaled'        # Eq 13
    msd_embed: str = 'codebook'     # Eq 4
    msd_gap: str = 'interp'         # Eq 4
    omega: str = 'energy'           # Eq 8


# ---------------------------------------------------------------------------------------- the trunk


class Attention(nn.Module):
    """Multi-head self-attention; given a spectral prior, motion-aware attention (DynMask 3.5).

    Eq 13 blends z-scored logits with a z-scored prior, and `fusion` says at which scale:

        'zscore'    as published. Logits of unit variance over 50 tokens cannot become sharp
        'rescaled'  the same blend multiplied by sigma, the standard deviation of the layer's own
                    logits: the prior joins at the scale that the layer has learned. No gradient
                    flows through this sigma
    """

    def __init__(self, config, layer):
        super().__init__()
        self.n_heads = config.n_heads
        self.scale = (config.latent // config.n_heads) ** -0.5
        self.p = config.dropout
        self.fusion = config.fusion
        self.alpha = msd.alpha(layer, config.alpha0)                      # Eq 14
        self.in_proj = nn.Linear(config.latent, 3 * config.latent)
        self.out_proj = nn.Linear(config.latent, config.latent)
        self.weights = nn.Identity()   # a place to look at A from (sample.py --explain)

    def forward(self, x, motion, pad, z_S=None, rotary=None):
        """x (B, N, d), pad (B, 1, 1, N) of 0 or -inf -> (B, N, d).

        motion   (B, N) bool, the motion tokens: sigma of Eq 13 is taken over their pairs
        z_S      z(S) in one of the two forms of lib.fast.spread_prior; None is ordinary attention
        rotary   rows of `rotary_table` (2, N, d / 2H) that rotate queries and keys, or None
        """
        B, N, d = x.shape
        qkv = self.in_proj(x).view(B, N, 3, self.n_heads, d // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous()                 # (B, H, N, d / H)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        q = q * self.scale

        if forms_logits(x):
            A = q @ k.mT                                                  # (B, H, N, N)
            if z_S is not None:
                S, pairs = z_S
                a_content, a_prior = self.blend(variance_over(A, pairs))
                A = a_content * A + a_prior * S                           # Eq 13
            A = self.weights((A + pad).softmax(-1))
            o = dropout(A.to(v.dtype), self.p, self.training) @ v
        else:   # the same through scaled_dot_product_attention, without an N x N tensor
            a_content, a_prior = 1.0, 0.0
            if z_S is not None:
                a_content, a_prior = self.blend(logit_variance(q, k, motion))
            p = self.p if self.training else 0.0
            o = appended_attention(q, k, v, a_content, a_prior, z_S, pad, p)

        return self.out_proj(o.transpose(1, 2).reshape(B, N, d))

    def blend(self, variance):
        """The factors of A and of z(S) in (1 - alpha) z(A) + alpha z(S), from the variance of A
        (B, H, 1, 1). The mean of A is left out: the softmax cancels it."""
        sigma = (variance + msd.EPS).sqrt()
        if self.fusion == 'zscore':
            return (1 - self.alpha) / sigma, self.alpha
        return 1 - self.alpha, self.alpha * sigma.detach()


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

    def forward(self, x, motion, pad, z_S=None, rotary=None):
        h = self.attn(x, motion, pad, z_S, rotary)
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
        self.embed_neighbours = None
        if config.neighbours:
            r = config.neighbours
            self.embed_neighbours = nn.Conv1d(config.code_dim, config.latent, 2 * r + 1, padding=r,
                                              bias=False)
        self.cond = nn.Linear(config.text_dim, config.latent)
        self.graph = GraphAttention(config.text_dim) if config.graph else None
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.register_buffer('positions', sinusoid(1024, config.latent), persistent=False)
        table = rotary_table(1024, self.head_width) if config.rotary else None
        self.register_buffer('rotary', table, persistent=False)

    def condition_tokens(self, c, role):
        """Text c (B, m, 512), role (B, m) -> cond (B, m, d), cond_valid (B, m) bool. The sentence
        has no position. The clauses or nodes behind it do, because their order matters."""
        if self.graph is not None:
            c = self.graph(c, role)
        cond = self.cond(c)
        order = self.positions[:c.shape[1] - 1].to(cond.dtype)
        cond = torch.cat([cond[:, :1], cond[:, 1:] + order], 1)
        if self.graph is not None:
            return drop_hidden(cond, role > 0)
        return cond, role > 0

    def forward(self, x, valid, cond, cond_valid, prior=None):
        """x (B, n, code_dim), valid (B, n) bool; cond (B, m, d), cond_valid (B, m) bool: the
        tokens that precede them; prior: qs, ks (B, n, W + 2) of msd.prior_qk -> h (B, n, d)."""
        m, n = cond.shape[1], x.shape[1]
        embedded = self.embed(x)
        if self.embed_neighbours is not None:
            x = x * valid[..., None]   # padding must not reach the last tokens
            embedded = embedded + self.embed_neighbours(x.mT).mT
        x = embedded + self.positions[:n]
        x = dropout(x, self.p, self.training)

        x = torch.cat([cond.to(x.dtype), x], 1)
        motion = F.pad(valid, (m, 0))                                     # (B, m + n)
        valid = torch.cat([cond_valid, valid], 1)
        pad = torch.zeros(valid.shape, device=x.device).masked_fill(~valid, -torch.inf)
        pad = pad[:, None, None]                                          # (B, 1, 1, m + n)
        z_S = None
        if prior is not None:
            z_S = spread_prior(*prior, motion, x, self.head_width)
        rotary = None
        if self.rotary is not None:   # all text tokens have place 0
            place = torch.arange(1 - m, 1 + n, device=x.device).clamp(min=0)
            rotary = self.rotary[:, place]

        for layer in self.layers:
            x = layer(x, motion, pad, z_S, rotary)
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
    """Position t times base^(-2i / d) for pair i of d dimensions: (n, d / 2)."""
    frequency = torch.exp(torch.arange(0, d, 2) * (-math.log(base) / d))
    return torch.arange(n)[:, None] * frequency


def sinusoid(n, d):
    """Sinusoidal positions (n, d): sin on even, cos on odd dimensions."""
    angle = angles(n, d, 10000.0)
    return torch.stack([angle.sin(), angle.cos()], -1).view(n, d)


def rotary_table(n, d):
    """Rotary positions (RoPE, Su et al. 2021): cos and sin (2, n, d / 2) of the angles by which
    position t rotates the pairs of a head's d dimensions, so that q k^T depends on the distance of
    two tokens. The base is 100 instead of 10,000, because motions have 50 tokens: with 100 the
    slowest pair rotates by half a radian over them (measured in LOG.md)."""
    angle = angles(n, d, 100.0)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x, table):
    """Rotate the pairs (x_i, x_{i + d / 2H}) of x (B, H, N, d / H) by the angles of the table."""
    cos, sin = table.to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def init_weights(module):
    if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, Attention):
        # as in nn.MultiheadAttention; with a std of 0.02 attention starts flat and stays so
        nn.init.xavier_uniform_(module.in_proj.weight)


def standardized(codebook):
    """Code vectors (V, D) as initial embeddings: codes that decode alike then start alike."""
    centred = codebook - codebook.mean(0)
    return centred / centred.std()


def cross_entropy(logits, targets, n_targets=None):
    """Eq 3: -log p summed over targets (B, n), -100 where the loss is not taken, and divided by
    n_targets: by default their number, for several ranks that of the whole batch."""
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction='sum')
    return total / ((targets >= 0).sum() if n_targets is None else n_targets)


# -------------------------------------------------------------------------------------- base tokens


class MaskTransformer(nn.Module):
    def __init__(self, config, codebook=None):
        """codebook (V, D): the tokenizer's base codebook, through which MSD describes the motion.
        It is kept as its Gram table G."""
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

    def forward(self, ids, c, role, valid, targets=None, n_targets=None, spectrum=None):
        """ids (B, n) with [MASK]s, c (B, m, 512), role (B, m), valid (B, n) bool -> logits
        (B, n, V), or the loss (Eq 3) of targets (B, n), -100 where it is not taken.

        spectrum: (f, seen) of the token sequence that motion-aware attention is based on, by
        default of ids themselves, whose masked tokens are unknown.
        """
        ids = torch.where(valid, ids, self.PAD)
        prior = None
        if self.config.spectral_attn:
            f, seen = spectrum or self.spectrum(ids)
            with torch.autocast(ids.device.type, enabled=False):
                # the windows of padding overlap the motion, but padding is not part of it
                prior = msd.prior_qk(msd.descriptor(f), seen & valid)
        cond, cond_valid = self.trunk.condition_tokens(c, role)
        h = self.trunk(self.token_emb(ids), valid, cond, cond_valid, prior)
        logits = self.head(h)
        if targets is None:
            return logits
        return cross_entropy(logits, targets, n_targets)

    @torch.no_grad()
    def spectrum(self, ids):
        """Eqs 4-6 of tokens (B, n), of which [MASK] and [PAD] are unknown -> f (B, n, W), seen
        (B, n)."""
        config = self.config
        with torch.autocast(ids.device.type, enabled=False):
            return msd.spectrum(ids, self.gram(), ids < self.MASK, config.window, config.msd_gap)

    def gram(self):
        """The Gram table of x_t, the vectors that Eq 4 takes differences of."""
        if self.config.msd_embed == 'codebook':
            return self.G
        codes = self.token_emb.weight[:self.MASK].detach()
        return msd.gram(self.trunk.embed(codes).detach())


class LossPredictor(nn.Module):
    """HGM3's G: from clean tokens and text, the loss that MaskTransformer will have on each token,
    up to a monotone function (hgm3.py). The paper gives it six layers; with one, a training step
    costs 1.17 of MoMask's (SPEED.md). It has no dropout, so that it draws no random numbers."""

    def __init__(self, config):
        super().__init__()
        small = replace(config, n_layers=1, dropout=0.0, spectral_attn=False)
        self.PAD = config.n_codes + 1
        self.token_emb = nn.Embedding(config.n_codes + 2, config.code_dim)
        self.trunk = Trunk(small)
        self.head = Head(config.latent, 1)
        self.apply(init_weights)

    def forward(self, ids, c, role, valid):
        """ids (B, n), c (B, m, 512), role (B, m), valid (B, n) -> (B, n)."""
        ids = torch.where(valid, ids, self.PAD)
        cond, cond_valid = self.trunk.condition_tokens(c, role)
        return self.head(self.trunk(self.token_emb(ids), valid, cond, cond_valid))[..., 0]


# ---------------------------------------------------------------------------------- residual tokens


class ResTransformer(nn.Module):
    """One network for all layers q = 1..Q-1 above the base. Its input is the sum of the embeddings
    of the layers below q, and a token that says q. Code tables are shared: table j projects the
    output of layer j, and embeds it as part of the input of layer j + 1."""

    def __init__(self, config, codebooks=None):
        """codebooks (Q, V, D): the tokenizer's, for token_init 'codebook'."""
        super().__init__()
        self.config = config

        def code_tables(count):   # (count, V + 1, code_dim); the last code is padding
            return nn.Parameter(torch.randn(count, config.n_codes + 1, config.code_dim) * 0.02)

        self.first = code_tables(1)                           # embeds the base layer
        self.shared = code_tables(config.n_quantizers - 2)    # project and embed layers 1..Q-2
        self.last = code_tables(1)                            # projects layer Q-1
        self.layer_emb = nn.Linear(config.n_quantizers, config.latent)   # of the one-hot layer
        self.trunk = Trunk(config)
        self.head = Head(config.latent, config.code_dim)
        self.apply(init_weights)
        if codebooks is not None and config.token_init == 'codebook':
            for table, codebook in zip(self.tables(), codebooks):
                table.data[:config.n_codes] = 0.1 * standardized(codebook)

    def tables(self):
        return *self.first, *self.shared, *self.last

    def forward(self, ids, c, role, valid, q=None, row0=0, n_targets=None):
        """ids (B, n, Q), c (B, m, 512), role (B, m), valid (B, n) bool.

        q given: logits (B, n, V + 1) of layer q; ids of layers from q on are ignored.
        q None: the loss (MoMask Eq 4). Row i of the global batch learns layer 1 + i mod (Q - 1), so
        the rows of one layer are a slice and share one product. row0 is this rank's first row.
        """
        n_layers = self.config.n_quantizers - 1
        row = torch.arange(len(ids), device=ids.device)
        layer = 1 + (row0 + row) % n_layers if q is None else torch.full_like(row, q)   # (B,)
        ids = torch.where(valid[..., None], ids, self.config.n_codes)
        tables = self.tables()

        x = 0
        for j in range(n_layers if q is None else q):
            below = (j < layer).to(self.first.dtype)
            x = x + F.embedding(ids[..., j], tables[j]) * below[:, None, None]
        which = F.one_hot(layer, self.config.n_quantizers).to(self.first.dtype)
        cond, cond_valid = self.trunk.condition_tokens(c, role)
        cond = torch.cat([cond, self.layer_emb(which)[:, None]], 1)
        cond_valid = F.pad(cond_valid, (0, 1), value=True)
        h = self.head(self.trunk(x, valid, cond, cond_valid))             # (B, n, code_dim)
        if q is not None:
            return h @ tables[q].T.to(h.dtype)

        logits = torch.empty(*h.shape[:2], len(tables[0]), dtype=h.dtype, device=h.device)
        for j in range(n_layers):
            projection = tables[1 + (row0 + j) % n_layers].T.to(h.dtype)
            logits[j::n_layers] = h[j::n_layers] @ projection
        own_layer = layer[:, None, None].expand(-1, ids.shape[1], 1)
        targets = ids.gather(2, own_layer)[..., 0].masked_fill(~valid, -100)
        return cross_entropy(logits, targets, n_targets)


# ------------------------------------------------------------------------------------------- length


class LengthEstimator(nn.Module):
    """MoMask's: text c (B, m, 512), role (B, m), whose vectors are summed -> logits (B, n_out) over
    the number of tokens, or the loss of targets (B,)."""

    def __init__(self, text_dim=512, n_out=50):
        super().__init__()

        def part(i, o):
            return [nn.Linear(i, o), nn.LayerNorm(o), nn.LeakyReLU(0.2)]

        self.output = nn.Sequential(
            *part(text_dim, 512), nn.Dropout(0.2),
            *part(512, 256), nn.Dropout(0.2),
            *part(256, 128), nn.Linear(128, n_out))
        self.apply(init_weights)

    def forward(self, c, role, targets=None):
        logits = self.output((c * (role > 0)[..., None]).sum(1))
        if targets is None:
            return logits
        return F.cross_entropy(logits, targets)
