"""Residual VQ-VAE (MoMask 3.1): motion features <-> layers of discrete tokens, one per 4 frames.

    motion (B, T, D) -> conv encoder -> latents (B, T/4, code_dim)
                     -> Q codebooks, each coding the residual of the ones before it
                     -> ids (B, T/4, Q) -> sum of code vectors -> conv decoder -> motion

"Motion" in this file is normalized, (features - mean) / std, with the model's own mean and std.
They are buffers, so a checkpoint carries them; `normalize` and `denormalize` convert.
"""
import hashlib
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.runtime import config_from, gather, load, load_weights


@dataclass
class VQConfig:
    dim: int = 263               # D, feature width
    n_codes: int = 512           # V, codes per quantizer
    code_dim: int = 512
    n_quantizers: int = 6        # Q: one base + 5 residual
    width: int = 512             # of the convolutions
    depth: int = 3               # residual blocks per resolution
    dilation: int = 3            # dilation growth within them
    down: int = 2                # stride-2 stages: 2**down frames per token
    mu: float = 0.99             # EMA decay of the codebooks
    reset_below: float = 1.0     # codes with a lower EMA count are reset; 1 as in T2M-GPT


# ------------------------------------------------------------------------------ encoder and decoder


class ResBlock(nn.Module):
    def __init__(self, width, dilation):
        super().__init__()
        self.conv1 = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.conv2 = nn.Conv1d(width, width, 1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def res_stack(config):   # dilations 9, 3, 1: wide context first
    dilations = [config.dilation ** i for i in reversed(range(config.depth))]
    return nn.Sequential(*[ResBlock(config.width, d) for d in dilations])


def make_encoder(config):
    stages = []
    for _ in range(config.down):
        halve = nn.Conv1d(config.width, config.width, 4, stride=2, padding=1)
        stages.append(nn.Sequential(halve, res_stack(config)))
    return nn.Sequential(
        nn.Conv1d(config.dim, config.width, 3, padding=1), nn.ReLU(), *stages,
        nn.Conv1d(config.width, config.code_dim, 3, padding=1))


def make_decoder(config):
    stages = []
    for _ in range(config.down):
        stages.append(nn.Sequential(
            res_stack(config), nn.Upsample(scale_factor=2, mode='nearest'),
            nn.Conv1d(config.width, config.width, 3, padding=1)))
    return nn.Sequential(
        nn.Conv1d(config.code_dim, config.width, 3, padding=1), nn.ReLU(), *stages,
        nn.Conv1d(config.width, config.width, 3, padding=1), nn.ReLU(),
        nn.Conv1d(config.width, config.dim, 3, padding=1))


# ---------------------------------------------------------------------------------------- codebooks


class Quantizer(nn.Module):
    """One codebook (V, code_dim), learned by exponential moving average (EMA). Rarely used codes
    are reset to vectors of the batch."""

    def __init__(self, config):
        super().__init__()
        self.mu = config.mu
        self.reset_below = config.reset_below
        self.register_buffer('codebook', torch.zeros(config.n_codes, config.code_dim))
        self.register_buffer('code_sum', torch.zeros(config.n_codes, config.code_dim))
        self.register_buffer('code_count', torch.zeros(config.n_codes))

    def nearest(self, r):
        """DynMask Eq 1: ids (N,) of the codes nearest to r (N, code_dim)."""
        # the squared distance without |r|^2, which is the same for all codes
        distance = self.codebook.square().sum(1) - 2 * r @ self.codebook.T
        return distance.argmin(1)

    @torch.no_grad()
    def init(self, vectors):
        """Start from vectors (V, code_dim) of the first batch."""
        self.codebook.copy_(vectors)
        self.code_sum.copy_(vectors)
        self.code_count.fill_(1.0)

    @torch.no_grad()
    def update(self, r, ids, spare):
        """An EMA step from vectors r (N, code_dim), their ids (N,), and spare vectors (V, code_dim)
        for codes that are reset. All three cover the global batch, so all ranks take the same step.
        torch.where instead of if: the host never waits for the device."""
        one_hot = F.one_hot(ids, len(self.codebook)).to(r.dtype)
        self.code_count.lerp_(one_hot.sum(0), 1 - self.mu)
        self.code_sum.lerp_(one_hot.T @ r, 1 - self.mu)
        used = self.code_count >= self.reset_below
        mean = self.code_sum / self.code_count.clamp(min=1e-5)[:, None]
        self.codebook.copy_(torch.where(used[:, None], mean, spare))
        self.code_sum.copy_(torch.where(used[:, None], self.code_sum, spare))
        self.code_count.copy_(torch.where(used, self.code_count, 1.0))


# ------------------------------------------------------------------------------------ the tokenizer


class RVQVAE(nn.Module):
    def __init__(self, config, mean=None, std=None):
        super().__init__()
        self.config = config
        mean = torch.zeros(config.dim) if mean is None else mean
        std = torch.ones(config.dim) if std is None else std
        self.register_buffer('mean', torch.as_tensor(mean, dtype=torch.float32))
        self.register_buffer('std', torch.as_tensor(std, dtype=torch.float32))
        self.encoder = make_encoder(config)
        self.decoder = make_decoder(config)
        self.quantizers = nn.ModuleList(Quantizer(config) for _ in range(config.n_quantizers))

    def normalize(self, features):
        # a constant feature has std ~ 0, and must not be blown up to 1e8
        return (features - self.mean) / self.std.clamp(min=1e-4)

    def denormalize(self, motion):
        return motion * self.std.clamp(min=1e-4) + self.mean

    def encode_latent(self, motion):
        """motion (B, T, D) -> latents (B, T / 4, code_dim)."""
        return self.encoder(motion.transpose(1, 2)).transpose(1, 2)

    def decode_latent(self, b):
        """Code vectors (B, n, code_dim) -> motion (B, 4 n, D)."""
        return self.decoder(b.transpose(1, 2)).transpose(1, 2)

    def quantize(self, z, n_active=None):
        """MoMask Eq 1: b^v = Q(r^v), r^{v+1} = r^v - b^v.

        z (B, n, code_dim); n_active: use the first so many quantizers only (an int or a tensor).
        Returns ids (B, n, Q), the sum of code vectors (B, n, code_dim), the sum of all layers'
        commitment losses, and the input of each quantizer, [(B n, code_dim)] * Q.
        """
        B, n, _ = z.shape
        ids = []
        residuals = []
        total = 0
        commit = 0.0
        with torch.autocast(z.device.type, enabled=False):   # bfloat16 would pick other codes
            r = z.float().reshape(B * n, -1)
            for v, quantizer in enumerate(self.quantizers):
                i = quantizer.nearest(r.detach())
                b = quantizer.codebook[i]
                on = 1.0
                if n_active is not None:
                    on = (torch.as_tensor(n_active, device=z.device) > v).float()
                commit = commit + on * F.mse_loss(r, b)
                total = total + on * b
                ids.append(i)
                residuals.append(r.detach())
                r = r - b
        return torch.stack(ids, -1).view(B, n, -1), total.view(z.shape), commit, residuals

    def forward(self, motion, n_active=None):
        """motion (B, T, D) -> reconstruction (B, T, D), commitment loss (mean over layers), ids
        (B, n, Q), residuals for `update_codebooks`."""
        z = self.encode_latent(motion)
        ids, b, commit, residuals = self.quantize(z, n_active)
        b = z + (b - z).detach()   # straight-through: pass the decoder's gradient to the encoder
        y = self.decode_latent(b.to(z.dtype))
        return y, commit / len(self.quantizers), ids, residuals

    @torch.no_grad()
    def init_codebooks(self, motion, generator):
        """Fill the codebooks from the first batch, layer by layer, each from the residuals of the
        layers before it."""
        r = gather(self.encode_latent(motion).float().reshape(-1, self.config.code_dim))
        for quantizer in self.quantizers:
            quantizer.init(self.pick(r, generator))
            r = r - quantizer.codebook[quantizer.nearest(r)]

    @torch.no_grad()
    def update_codebooks(self, ids, residuals, n_active, generator):
        """EMA and resets after a training step, for the layers that quantization dropout kept. With
        torch.distributed every rank gathers the global batch and takes the same step (8 MB per step
        at the released size)."""
        for v, quantizer in enumerate(self.quantizers[:n_active]):
            r = gather(residuals[v])
            i = gather(ids[..., v].reshape(-1))
            quantizer.update(r, i, self.pick(r, generator))

    def pick(self, r, generator):
        """V random rows of r."""
        V = self.config.n_codes
        return r[torch.randint(len(r), (V,), generator=generator, device=r.device)]

    @torch.no_grad()
    def encode(self, motion):
        """motion (B, T, D), T a multiple of 4 -> ids (B, T / 4, Q)."""
        return self.quantize(self.encode_latent(motion))[0]

    @torch.no_grad()
    def decode(self, ids):
        """DynMask Eq 2: ids (B, n, q) of the first q <= Q quantizers -> motion (B, 4 n, D)."""
        layers = zip(self.quantizers, ids.unbind(-1))
        return self.decode_latent(sum(quantizer.codebook[i] for quantizer, i in layers))

    def fingerprint(self):
        """A short hash of everything that decides what an id means; checkpoints keep it."""
        h = hashlib.blake2b(digest_size=8)
        codebooks = [quantizer.codebook for quantizer in self.quantizers]
        for x in (*self.encoder.state_dict().values(), *codebooks, self.mean, self.std):
            h.update(x.detach().cpu().numpy().tobytes())
        return h.hexdigest()


def load_tokenizer(path):
    """Open what train_vq.py wrote."""
    checkpoint = load(path, 'run `python train_vq.py` with this config first', 'vq',
                      ('config', 'model'))
    model = RVQVAE(config_from(VQConfig, checkpoint['config'], path))
    load_weights(model, checkpoint['model'], path)
    return model.eval()
