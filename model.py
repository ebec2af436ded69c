"""The two transformers of MoMask (3.2, 3.3), with DynMask's motion-aware attention as the few lines that differ.

    MaskTransformer   text + partly masked base tokens -> logits of the base tokens; `generate` fills them in `steps` rounds
    ResTransformer    text + base tokens + layers below q -> logits of layer q; `generate` adds layer after layer
    LengthEstimator   text -> how many tokens
    Pipeline          tokenizer + the three above: prompts in, motion features out

Shapes: B batch, n motion tokens (padded to the longest), V codes, Q quantizers, d latent, H heads, c text vectors (B, 512).
Token ids: 0..V-1 codes, V = [MASK], V+1 = [PAD] (residual transformer: V = pad). With spectral_attn, cfs_masking and
das_sampling off this is MoMask exactly: official weights load and golden outputs match (test_model.py).
"""
import math
import os
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import msd
import vq as vq_module
from vq import CheckpointError, RVQVAE, load_momask, load_named, tensor


@dataclass
class ModelConfig:
    n_codes: int = 512           # V
    code_dim: int = 512          # width of the token embeddings
    n_quantizers: int = 6        # Q
    latent: int = 384            # d
    n_layers: int = 8            # the released models have 8, the paper says 6
    n_heads: int = 6             # H
    ff: int = 1024
    dropout: float = 0.2
    text_dim: int = 512
    token_init: str = 'codebook'  # token embeddings start as the tokenizer's base code vectors | 'random' (the reference)
    # DynMask 3.5, motion-aware attention (masked transformer only)
    spectral_attn: bool = True
    window: int = 8              # W, tokens
    alpha0: float = 0.3          # Eq 14
    fusion: str = 'rescaled'     # 'zscore' (Eq 13 to the letter) | 'rescaled' | 'temperature': see Attention.fuse
    msd_embed: str = 'codebook'  # Eq 4's x_t: 'codebook' vectors, or the transformer's 'learned' embedding (the letter)


# ------------------------------------------------------------------------------------------------------------- the trunk

def dropout(x, p, training):
    """nn.Dropout with cheap random numbers on CPU, where torch draws them one by one on one core: 25 ms for 3.3M bfloat16
    elements, as much as four of the layer's matrix products; this takes 2.9 ms. One 64-bit draw serves eight elements, a
    byte each, so p is rounded to 1/256 (0.2 -> 0.199). Whole-tensor int16 steps, because comparisons do not vectorise."""
    if not training or p == 0:
        return x
    if x.is_cuda or torch.compiler.is_compiling():  # there the generator is parallel and fused: nothing to gain
        return F.dropout(x, p)
    n, drop = x.numel(), max(1, round(256 * p))
    low = 256 * drop - 32768                          # a high byte below `drop` makes an int16 smaller than this
    r = torch.empty((n + 7) // 8, dtype=torch.int64).random_(-2**63, None).view(torch.int16)
    r = torch.stack([r, r << 8]).view(-1)[:n]         # each int16 is used for its high byte, then for its low one
    keep = r.clamp_(low - 1, low).sub_(low - 1)       # 0 or 1
    return x * keep.to(x.dtype).mul_(256 / (256 - drop)).view(x.shape)


def forms_logits(x):
    """Does attention over x (B, N, d) write down its N x N logits? On CPU and in short sequences it is faster: for 64 x 6 heads of
    50 tokens in bfloat16 4.3 ms against the fused kernel's 8.5. bench.py --what=attention shows what long sequences gain."""
    return not x.is_cuda and x.shape[1] <= 256


def fused_attention(q, k, v, content, strength=0.0, prior=None, pad=None, p=0.0):
    """softmax(content q k^T + strength z(S) + pad) v through scaled_dot_product_attention: no N x N tensor exists, because
    z(S) = qs . ks (Trunk.spread_prior, (B, 1, N, wide) each) is as many more dimensions of q and k. q, k, v (B, H, N, d)."""
    dtype, d = v.dtype, v.shape[-1]
    if prior:
        qs, ks = (x.expand(*q.shape[:3], -1) for x in prior)
        q, k = torch.cat([q * content, strength * qs], -1), torch.cat([k, ks.to(k.dtype)], -1)
        v, content = F.pad(v, (0, q.shape[-1] - d)), 1.0   # the kernels of linear memory want one width for all three
    pad = None if pad is None else pad.to(dtype)
    return F.scaled_dot_product_attention(q.to(dtype), k, v, pad, scale=content, dropout_p=p)[..., :d]


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.H, self.head, self.p, self.fusion = c.n_heads, c.latent // c.n_heads, c.dropout, c.fusion
        self.alpha = msd.alpha(layer, c.alpha0)                                     # Eq 14
        self.in_proj = nn.Linear(c.latent, 3 * c.latent)
        self.out_proj = nn.Linear(c.latent, c.latent)
        if c.spectral_attn and c.fusion == 'temperature':
            self.log_temp = nn.Parameter(torch.zeros(c.n_heads, 1, 1))

    def forward(self, x, valid, pad, prior=None):
        """x (B, N, d), valid (B, N) bool, pad (B, 1, 1, N): 0 or -inf, prior from Trunk.spread_prior -> (B, N, d)."""
        B, N, d = x.shape
        qkv = self.in_proj(x).view(B, N, 3, self.H, self.head).permute(2, 0, 3, 1, 4).contiguous()
        (q, k, v), content = qkv, self.head ** -0.5                                     # (B, H, N, d/H) each
        if forms_logits(x):
            A = q @ k.mT
            if prior:   # motion-aware
                S, pairs = prior
                content, strength = self.fuse(msd.std_over(pairs, A) * content)
                pad = strength * S + pad
            A = (content * A + pad).softmax(-1)
            o = dropout(A.to(v.dtype), self.p, self.training) @ v
        else:
            strength = 0.0
            if prior:   # motion-aware
                content, strength = self.fuse(msd.logit_std(qkv[:2], valid))
            o = fused_attention(q, k, v, content, strength, prior, pad, self.p if self.training else 0.0)
        return self.out_proj(o.transpose(1, 2).reshape(B, N, d))

    def fuse(self, sigma):
        """Eq 13, A' = (1 - a) z(A) + a z(S), as two factors: of the raw products q k^T, and of z(S). The mean in z(A) is a
        constant that the softmax cancels. sigma (B, H, 1, 1) of the logits q k^T / sqrt(d).

        'zscore'      the equation to the letter
        'rescaled'    sigma x the equation: (1 - a) A + a sigma z(S). The prior joins at the scale the layer has learned,
                      and attention can still become sharp, which unit-variance logits over 50 positions cannot.
                      sigma is read, not trained through: it is the layer's scale, not a way to turn the prior up
        'temperature' the equation times one learned factor per head
        """
        a, scale = self.alpha, self.head ** -0.5
        if self.fusion == 'rescaled':
            return (1 - a) * scale, a * sigma.detach()
        gain = self.log_temp.exp() if self.fusion == 'temperature' else 1.0
        return gain * (1 - a) * scale / sigma, gain * a


class Block(nn.Module):
    """Post-norm transformer layer, as nn.TransformerEncoderLayer(activation='gelu')."""

    def __init__(self, c, layer):
        super().__init__()
        self.p = c.dropout
        self.attn = Attention(c, layer)
        self.linear1, self.linear2 = nn.Linear(c.latent, c.ff), nn.Linear(c.ff, c.latent)
        self.norm1, self.norm2 = nn.LayerNorm(c.latent), nn.LayerNorm(c.latent)

    def forward(self, x, valid, pad, prior=None):
        x = self.norm1(x + dropout(self.attn(x, valid, pad, prior), self.p, self.training))
        h = self.linear2(dropout(F.gelu(self.linear1(x)), self.p, self.training))
        return self.norm2(x + dropout(h, self.p, self.training))


def sinusoid(n, d):
    """Positions (n, d): sin on even, cos on odd dimensions."""
    t = torch.arange(n)[:, None] * torch.exp(torch.arange(0, d, 2) * (-math.log(10000.0) / d))
    return torch.stack([t.sin(), t.cos()], -1).view(n, d)


class Trunk(nn.Module):
    """Embedded tokens (B, n, code_dim) and a text vector -> hidden states (B, n, d)."""

    def __init__(self, c):
        super().__init__()
        self.p = c.dropout
        self.embed = nn.Linear(c.code_dim, c.latent)
        self.cond = nn.Linear(c.text_dim, c.latent)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.n_layers))
        self.register_buffer('positions', sinusoid(1024, c.latent), persistent=False)

    def forward(self, x, c, valid, extra=(), prior=None):
        """x (B, n, code_dim), c (B, 512), valid (B, n); extra: more prepended tokens (B, d). prior: qs, ks (B, n, W + 2)."""
        n = x.shape[1]
        x = self.embed(x)
        x = dropout(x + self.positions[:n], self.p, self.training)
        front = [self.cond(c), *extra]                       # prepended without a position
        x = torch.cat([torch.stack(front, 1).to(x.dtype), x], 1)
        valid = F.pad(valid, (len(front), 0), value=True)
        pad = torch.zeros(valid.shape, device=x.device).masked_fill(~valid, -torch.inf)[:, None, None]
        prior = self.spread_prior(x, valid, *prior) if prior else None
        for layer in self.layers:
            x = layer(x, valid, pad, prior)
        return x[:, len(front):]

    def spread_prior(self, x, valid, qs, ks):
        """qs, ks (B, n, W + 2) of the motion tokens -> what every layer needs, with 0 on rows and columns of the extra tokens:
        where attention forms its logits z(S) (B, 1, N, N) and its valid pairs, once for all layers; else qs and ks (B, 1, N, wide)
        to be appended to q and k, z(S) = qs . ks, and no N x N tensor exists."""
        B, N, _ = x.shape
        wide = 0 if forms_logits(x) else -(self.layers[0].attn.head + qs.shape[-1]) % 8   # GPU kernels want multiples of 8
        qs, ks = (F.pad(p, (0, wide, N - p.shape[1], 0))[:, None] for p in (qs, ks))
        if not forms_logits(x):
            return qs, ks
        with torch.autocast(x.device.type, enabled=False):
            return qs @ ks.mT, (valid[:, None] & valid[..., None]).flatten(1).float()[..., None]


class Head(nn.Module):
    def __init__(self, d, out):
        super().__init__()
        self.dense, self.norm, self.out = nn.Linear(d, d), nn.LayerNorm(d, eps=1e-12), nn.Linear(d, out)

    def forward(self, x):
        return self.out(self.norm(F.gelu(self.dense(x))))


def init_weights(m):
    if isinstance(m, (nn.Linear, nn.Embedding)):
        nn.init.normal_(m.weight, std=0.02)
        if getattr(m, 'bias', None) is not None:
            nn.init.zeros_(m.bias)
    if isinstance(m, Attention):   # as nn.MultiheadAttention leaves it: at 0.02 attention starts flat and stays so for long
        nn.init.xavier_uniform_(m.in_proj.weight)


# ------------------------------------------------------------------------------------------------------------- sampling

def gumbel_like(x, generator):
    return -torch.empty_like(x).exponential_(generator=generator).log()


def sample(log_p, keep, temperature, generator):
    """Draw ids (B, n) from softmax(log_p / temperature) over the largest `keep` share of log_p (B, n, V). The arg-max of logits
    plus Gumbel noise is such a draw; noise is only made for those that are kept: 52 of 512."""
    top, code = log_p.topk(max(1, math.ceil(keep * log_p.shape[-1])), -1)
    best = (top / temperature + gumbel_like(top, generator)).argmax(-1, keepdim=True)
    return code.gather(-1, best)[..., 0]


def guided(forward, c, scale):
    """Classifier-free guidance, one batched pass: forward(c of 2B) -> uncond + s (cond - uncond). MoMask Eq 5 with s + 1
    written s, as its code does."""
    cond, uncond = forward(torch.cat([c, torch.zeros_like(c)])).float().chunk(2)
    return uncond + scale * (cond - uncond)


def twice(*tensors):
    return [torch.cat([t, t]) for t in tensors]


# ------------------------------------------------------------------------------------------------------------ base tokens

class MaskTransformer(nn.Module):
    def __init__(self, config, codebook=None):
        """codebook (V, D): the tokenizer's base codebook, from which MSD sees the motion (kept as its Gram table)."""
        super().__init__()
        self.config = c = config
        self.token_emb = nn.Embedding(c.n_codes + 2, c.code_dim)
        self.trunk, self.head = Trunk(c), Head(c.latent, c.n_codes)
        self.apply(init_weights)
        if codebook is not None and c.token_init == 'codebook':   # codes that decode alike start alike
            centred = codebook - codebook.mean(0)
            self.token_emb.weight.data[:c.n_codes] = centred / centred.std()
        self.register_buffer('G', torch.zeros(c.n_codes, c.n_codes) if codebook is None else msd.gram(codebook))

    @property
    def MASK(self):
        return self.config.n_codes

    @property
    def PAD(self):
        return self.config.n_codes + 1

    @torch.no_grad()
    def descriptor(self, ids):
        """MSD of a token sequence (B, n); [MASK] and [PAD] are unknown. Returns phi (B, n, W), seen (B, n)."""
        with torch.autocast(ids.device.type, enabled=False):
            G = self.G
            if self.config.msd_embed == 'learned':
                G = msd.gram(self.trunk.embed(self.token_emb.weight[:self.MASK]).detach())
            return msd.descriptor(ids, G, ids < self.MASK, self.config.window)

    def forward(self, ids, c, valid, described=None):
        """ids (B, n) with [MASK]s, c (B, 512), valid (B, n) bool -> logits (B, n, V). described: what `descriptor` says of the
        sequence that motion-aware attention is to see, by default of ids themselves: the visible tokens."""
        ids, prior = torch.where(valid, ids, self.PAD), None
        if self.config.spectral_attn:
            phi, seen = described or self.descriptor(ids)
            with torch.autocast(ids.device.type, enabled=False):
                prior = msd.prior_qk(phi, seen & valid)   # windows behind the end see the motion too, but are not tokens
        return self.head(self.trunk(self.token_emb(ids), c, valid, prior=prior))

    @torch.no_grad()
    def corrupt(self, ids, c, valid, cfs=True, lam=0.3, r_exp=0, noise=0.0, ratio=None, generator=None):
        """3.4 and Algorithm 1, lines 1-6: choose what to mask and mask it. ids (B, n) clean, c (B, 512), valid (B, n) ->
        masked ids (B, n), chosen (B, n) bool. The share is gamma(r) = cos(pi r / 2), r ~ U(0, 1), or `ratio` for all rows;
        which positions: uniform, or content-focused with cfs. 80% become [MASK], 10% a random code, 10% stay."""
        B, n = ids.shape
        uniform = lambda: torch.rand(B, n, device=ids.device, generator=generator)
        share = torch.cos(torch.rand(B, device=ids.device, generator=generator) * math.pi / 2) if ratio is None \
            else torch.full((B,), ratio, device=ids.device)
        K = (share * valid.sum(1)).round().clamp(min=1).long()
        if cfs:
            phi, _ = self.descriptor(torch.where(valid, ids, self.PAD))
            x = self.trunk.embed(self.token_emb(ids)).float()
            s_dyn = msd.dynamic_score(phi, valid)                                     # Eq 9
            s_sem = msd.semantic_score(x, self.trunk.cond(c).float(), valid)           # Eq 10
            chosen = msd.select(s_dyn, s_sem, K, valid, lam, r_exp, noise, generator)
        else:
            chosen = msd.top_k(uniform(), K, valid)
        u = uniform()
        code = torch.randint(self.MASK, (B, n), device=ids.device, generator=generator)
        out = torch.where(chosen & (u < 0.8), self.MASK, torch.where(chosen & (u < 0.9), code, ids))
        return out, chosen

    @torch.no_grad()
    def generate(self, c, n, steps=10, cond_scale=4.0, keep=0.1, temperature=1.0, das=True, lambda_D=0.5, beta=0.5,
                 sigma_max=0.5, msd_decode='kept', width=None, generator=None):
        """Algorithm 2. c (B, 512), n (B,) tokens wanted -> ids (B, width), [PAD] behind each end; width None is the longest
        n (a fixed width spares a compiled model a new graph per length).

        Every step predicts all masked tokens, then masks again the least confident, cosine-scheduled. das: complexity-aware
        decoding, Eqs 15-21; off, it is MoMask's loop. msd_decode: MSD of the 'kept' tokens, or of the current full 'guess'
        (kept + the last step's predictions). Nothing waits for the GPU inside the loop."""
        valid = torch.arange(width or int(n.max()), device=c.device) < n[:, None]
        ids = torch.where(valid, self.MASK, self.PAD)
        guess = ids
        score = torch.zeros(valid.shape, device=c.device).masked_fill(~valid, torch.inf)
        valid2, = twice(valid)
        for step in range(steps):
            share = math.cos(math.pi / 2 * step / max(steps - 1, 1))                  # 1 -> 0
            n_masked = (share * n).round().clamp(min=1).long()
            masked = msd.top_k(-score, n_masked, valid)
            ids = torch.where(masked, self.MASK, ids)
            if das or self.config.spectral_attn:
                phi, seen = self.descriptor(guess if msd_decode == 'guess' else ids)
            ids2, = twice(ids)
            described = twice(phi, seen) if self.config.spectral_attn else None
            log_p = guided(lambda c2: self(ids2, c2, valid2, described), c, cond_scale).log_softmax(-1)   # (B, N, V)
            T = temperature
            if das:
                b = msd.exploration(phi, seen, log_p.amax(-1).exp(), valid, lambda_D)     # Eqs 15-17
                T = msd.temperature(b, beta, temperature)[..., None]                  # Eqs 18, 20
                sigma = msd.noise_scale(b, sigma_max)                                 # Eqs 19, 21
            pick = sample(log_p, keep, T, generator)
            ids = torch.where(masked, pick, ids)
            confidence = log_p.gather(-1, pick[..., None])[..., 0]
            if das:
                confidence = confidence + sigma * gumbel_like(confidence, generator)
            score = torch.where(masked, confidence, torch.inf)                        # kept tokens stay kept
            guess = torch.where(valid, ids, self.PAD)
        return guess

    @classmethod
    def from_momask(cls, root, dataset, name, n_heads=None, checkpoint='latest.tar'):
        """Build from the official release: <root>/<dataset>/<name>/{opt.txt, model/latest.tar}."""
        path = os.path.join(root, dataset, name, 'model', checkpoint)
        w = load_momask(path, 't2m_transformer', 'trans')
        emb = tensor(w, 'token_emb.weight', path)
        config = momask_config(w, path, n_codes=emb.shape[0] - 2, code_dim=emb.shape[1],
                               n_heads=n_heads or int(read_opt(root, dataset, name)['n_heads']))
        model = cls(config)
        load_named(model, momask_names(w), path, missing_ok='G')
        return model.eval()


# -------------------------------------------------------------------------------------------------------- residual tokens

class ResTransformer(nn.Module):
    """One network for all layers q = 1..Q-1 above the base. The projection of layer j is the embedding of layer j + 1's
    input: E = [first, shared...], P = [shared..., last], each (Q - 1, V + 1, code_dim)."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        table = lambda m: nn.Parameter(torch.randn(m, c.n_codes + 1, c.code_dim) * 0.02)
        self.first, self.shared, self.last = table(1), table(c.n_quantizers - 2), table(1)
        self.layer_emb = nn.Linear(c.n_quantizers, c.latent)      # of the one-hot layer index
        self.trunk, self.head = Trunk(c), Head(c.latent, c.code_dim)
        self.apply(init_weights)

    def forward(self, ids, c, valid, q=None, row0=0):
        """ids (B, n, Q) (layers from q on are not looked at), c (B, 512), valid (B, n) -> logits (B, n, V + 1) of layer q.
        q: an int for the whole batch; None cycles, row i learns layer 1 + (row0 + i) mod (Q - 1). Cycling instead of drawing
        turns the gather of a (B, V + 1, code_dim) projection into Q - 1 plain products."""
        c_, V, B = self.config, self.config.n_codes, len(ids)
        S = c_.n_quantizers - 1   # layers to learn
        tables = (*self.first, *self.shared, *self.last)   # E_v = tables[v], P_q = tables[q]: each (V + 1, code_dim)
        ids = torch.where(valid[..., None], ids, V)
        rows = torch.arange(B, device=ids.device)
        layer = 1 + (row0 + rows) % S if q is None else torch.full_like(rows, q)       # (B,)
        used = S if q is None else q
        below = (torch.arange(used, device=ids.device) < layer[:, None]).to(self.first.dtype)   # (B, used)
        x = sum(F.embedding(ids[..., v], tables[v]) * below[:, v, None, None] for v in range(used))
        extra = self.layer_emb(F.one_hot(layer, c_.n_quantizers).to(self.first.dtype))
        h = self.head(self.trunk(x, c, valid, extra=[extra]))                          # (B, n, code_dim)
        if q is not None:
            return h @ tables[q].T.to(h.dtype)
        logits = torch.empty(*h.shape[:2], V + 1, dtype=h.dtype, device=h.device)
        for j in range(S):
            logits[j::S] = h[j::S] @ tables[1 + (row0 + j) % S].T.to(h.dtype)
        return logits

    @torch.no_grad()
    def generate(self, ids, c, n, cond_scale=5.0, keep=0.1, temperature=1.0, generator=None):
        """MoMask 3.4: base ids (B, N) -> all layers (B, N, Q), one guided pass a layer, sampled with Gumbel noise."""
        c_ = self.config
        valid = torch.arange(ids.shape[1], device=ids.device) < n[:, None]
        valid2, = twice(valid)
        all_ids = ids[..., None].clamp(max=c_.n_codes).repeat(1, 1, c_.n_quantizers)
        for q in range(1, c_.n_quantizers):
            ids2, = twice(all_ids)
            logits = guided(lambda c2: self(ids2, c2, valid2, q), c, cond_scale)[..., :c_.n_codes]   # never [PAD]
            all_ids[..., q] = sample(logits, keep, temperature, generator)
        return torch.where(valid[..., None], all_ids, 0)

    @classmethod
    def from_momask(cls, root, dataset, name, n_heads=None, checkpoint='net_best_fid.tar'):
        """Build from the official release: <root>/<dataset>/<name>/{opt.txt, model/net_best_fid.tar}."""
        path = os.path.join(root, dataset, name, 'model', checkpoint)
        w = load_momask(path, 'res_transformer', 'trans')
        shared = tensor(w, 'embed_proj_shared_weight', path)
        config = momask_config(w, path, n_codes=shared.shape[1] - 1, code_dim=shared.shape[2],
                               n_quantizers=shared.shape[0] + 2,
                               n_heads=n_heads or int(read_opt(root, dataset, name)['n_heads']))
        model = cls(config)
        rename = {'embed_proj_shared_weight': 'shared', 'token_embed_weight_': 'first', 'output_proj_weight_': 'last'}
        load_named(model, momask_names({rename.get(k, k): t for k, t in w.items()}), path)
        return model.eval()


# ----------------------------------------------------------------------------------------------------------------- length

class LengthEstimator(nn.Module):
    """text (B, 512) -> logits (B, 50) over the number of tokens (MoMask's; 4 frames a token)."""

    def __init__(self, text_dim=512, n_out=50):
        super().__init__()
        part = lambda i, o: [nn.Linear(i, o), nn.LayerNorm(o), nn.LeakyReLU(0.2)]
        self.output = nn.Sequential(*part(text_dim, 512), nn.Dropout(0.2), *part(512, 256), nn.Dropout(0.2),
                                    *part(256, 128), nn.Linear(128, n_out))
        self.apply(init_weights)

    def forward(self, c):
        return self.output(c)

    @torch.no_grad()
    def sample(self, c, n_max, generator=None):
        """A plausible number of tokens (B,), 1 <= n <= n_max."""
        logits = self(c)
        logits[:, 0], logits[:, n_max + 1:] = float('-inf'), float('-inf')
        return (logits + gumbel_like(logits, generator)).argmax(-1)

    @classmethod
    def from_momask(cls, root, dataset, name='length_estimator', checkpoint='finest.tar'):
        path = os.path.join(root, dataset, name, 'model', checkpoint)
        w = load_momask(path, 'estimator')
        last = tensor(w, 'output.11.weight', path)
        model = cls(tensor(w, 'output.0.weight', path).shape[1], last.shape[0])
        load_named(model, w, path)
        return model.eval()


# ------------------------------------------------------------------------------------------------------- official weights

def read_opt(root, dataset, name):
    """opt.txt of an official checkpoint, 'key: value' lines -> dict of str."""
    path = os.path.join(root, dataset, name, 'opt.txt')
    if not os.path.exists(path):
        raise CheckpointError(f'{path} is missing: expected <root>/<t2m|kit>/<name>/opt.txt of the official release; '
                              f'check the root and the name.')
    with open(path) as f:
        return dict(line.strip().split(': ', 1) for line in f if ': ' in line)


def momask_config(w, path, **known):
    """Sizes from the tensors. An official model is MoMask: no spectral attention."""
    d, ff = tensor(w, 'input_process.poseEmbedding.weight', path).shape[0], tensor(w, 'seqTransEncoder.layers.0.linear1.weight', path).shape[0]
    if d % known['n_heads']:
        raise CheckpointError(f"{path}: {known['n_heads']} heads do not divide its width {d}: opt.txt is of another model.")
    return ModelConfig(latent=d, ff=ff, text_dim=w['cond_emb.weight'].shape[1], spectral_attn=False,
                       n_layers=len({k.split('.')[2] for k in w if k.startswith('seqTransEncoder.layers.')}), **known)


def momask_names(w):
    """Official tensor names -> ours."""
    table = [('input_process.poseEmbedding', 'trunk.embed'), ('cond_emb', 'trunk.cond'), ('seqTransEncoder.', 'trunk.'),
             ('self_attn.in_proj_', 'attn.in_proj.'), ('self_attn', 'attn'), ('quant_emb', 'layer_emb'),
             ('output_process.LayerNorm', 'head.norm'), ('output_process.poseFinal', 'head.out'), ('output_process', 'head')]
    out = {}
    for k, t in w.items():
        for old, new in table:
            k = k.replace(old, new)
        if k != 'position_enc.pe' and not k.startswith('clip_model.'):
            out[k] = t
    return out


def only_folder(root, dataset, prefix, given):
    """The checkpoint folder to use: the given name, or the only one under <root>/<dataset> that starts with prefix."""
    if given:
        return given
    folder = os.path.join(root, dataset)
    found = sorted(d for d in os.listdir(folder) if d.startswith(prefix)) if os.path.isdir(folder) else []
    if len(found) != 1:
        raise CheckpointError(f'{folder} has {len(found)} folders that start with {prefix} ({", ".join(found) or "none"}), '
                              f'expected one: name it.')
    return found[0]


# --------------------------------------------------------------------------------------------------------------- pipeline

class Pipeline:
    """Everything between a prompt and motion features. meta: name, fps, n_joints, units_per_metre, max_frames of the data."""

    def __init__(self, tokenizer, mask, res, length, text_encoder, meta, device='cpu'):
        self.vq, self.mask, self.res, self.length = (m and m.to(device).eval() for m in (tokenizer, mask, res, length))
        self.text_encoder, self.meta, self.device = text_encoder, meta, device

    @classmethod
    def from_dir(cls, out_dir, device='cpu', mask_file='mask.pt'):
        """From what the training scripts wrote. res.pt and len.pt may be missing (base tokens only; lengths must be given).
        A transformer is used with the tokenizer it was trained on, or not at all."""
        config_hint = f'config/{os.path.basename(os.path.normpath(out_dir))}.py'
        parts, models = {}, {}
        for kind, name, make in (('mask', mask_file, MaskTransformer), ('res', 'res.pt', ResTransformer), ('len', 'len.pt', None)):
            path = os.path.join(out_dir, name)
            if kind != 'mask' and not os.path.exists(path):
                continue
            stage = '' if kind == 'mask' else f' --stage={kind}'
            d = parts[kind] = vq_module.load(path, f'run `python train_mask.py {config_hint}{stage}` first')
            if d.get('kind') != kind:
                raise CheckpointError(f"{path} holds {d.get('kind', 'something else')}, expected {kind}.")
            models[kind] = make(ModelConfig(**d['config'])) if make else LengthEstimator(n_out=d['meta']['max_frames'] // 4 + 1)
            load_named(models[kind], d['model'], path)
        path = parts['mask']['vq']
        if not os.path.exists(path):   # the folder was moved
            path = os.path.join(out_dir, 'vq.pt')
        tokenizer = RVQVAE.from_file(path)
        for kind, d in parts.items():
            if d['vq_hash'] != tokenizer.fingerprint():
                raise CheckpointError(f"{out_dir}: {kind}.pt was trained on tokenizer {d['vq_hash']}, but {path} is "
                                      f'{tokenizer.fingerprint()}: train the transformer again, or put its tokenizer back.')
        return cls(tokenizer, models['mask'], models.get('res'), models.get('len'), parts['mask']['settings']['text_encoder'],
                   parts['mask']['meta'], device)

    @classmethod
    def from_momask(cls, root, dataset='t2m', mask_name='', res_name='', text_encoder='clip', device='cpu'):
        """From the official release (DESIGN: <root>/<t2m|kit>/<name>/...); opt.txt of the transformer names its tokenizer."""
        mask_name = only_folder(root, dataset, 't2m_', mask_name)
        res_name = only_folder(root, dataset, 'tres_', res_name)
        names = {read_opt(root, dataset, name).get('vq_name') for name in (mask_name, res_name)}
        if len(names) != 1:
            raise CheckpointError(f'{mask_name} and {res_name} were trained on different tokenizers ({names}): name a pair that fits.')
        kit = dataset == 'kit'
        meta = {'name': dataset, 'skeleton': 'kit21' if kit else 'smpl22', 'fps': 12.5 if kit else 20, 'n_joints': 21 if kit else 22,
                'dim': 251 if kit else 263, 'units_per_metre': 1000 if kit else 1, 'max_frames': 196}
        return cls(RVQVAE.from_momask(root, dataset, names.pop()), MaskTransformer.from_momask(root, dataset, mask_name),
                   ResTransformer.from_momask(root, dataset, res_name), LengthEstimator.from_momask(root, dataset),
                   text_encoder, meta, device)

    def lengths(self, c, seed=0):
        """Token counts (B,) that the length estimator finds plausible for c (B, 512)."""
        if self.length is None:
            raise CheckpointError('No length was given and there is no length estimator: give --length, or train one with '
                                  '`python train_mask.py ... --stage=len`.')
        return self.length.sample(c.to(self.device), self.meta['max_frames'] // 4, self.generator(seed))

    def generator(self, seed):
        return torch.Generator(self.device).manual_seed(seed)

    @torch.no_grad()
    def generate(self, c, n, seed=0, res_scale=5.0, **decoding):
        """c (B, 512), n (B,) tokens -> ids (B, N, Q), or (B, N, 1) without a residual transformer. decoding: see MaskTransformer.generate."""
        c, n, g = c.to(self.device), n.to(self.device), self.generator(seed)
        width = self.meta['max_frames'] // 4 if c.is_cuda else None
        ids = self.mask.generate(c, n, width=width, generator=g, **decoding)
        if self.res is None:
            return ids.clamp(max=self.mask.MASK - 1)[..., None]
        return self.res.generate(ids, c, n, res_scale, generator=g)

    @torch.no_grad()
    def features(self, ids, n):
        """ids (B, N, q), n (B,) -> un-normalised features, a list of (4 n_i, D) on the CPU."""
        motion = self.vq.denormalize(self.vq.decode_padded(ids, n.to(self.device))).cpu()
        return [m[:4 * int(k)] for m, k in zip(motion, n)]
