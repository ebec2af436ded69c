"""Residual VQ-VAE (MoMask 3.1): motion features <-> a few layers of discrete tokens, one token per 4 frames.

    motion (B, T, D) -> conv encoder -> latents (B, T/4, code_dim) -> Q codebooks in turn, each coding what the ones
    before it left over -> ids (B, T/4, Q) -> sum of code vectors -> conv decoder -> motion (B, T, D)

Motion here is normalised: (features - mean) / std, with the model's own mean and std (buffers, so a checkpoint carries
them). `normalize` and `denormalize` convert.
"""
import hashlib
import os
import pickle
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


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


class ResBlock(nn.Module):
    def __init__(self, width, dilation):
        super().__init__()
        self.conv1 = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.conv2 = nn.Conv1d(width, width, 1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def res_stack(c):  # dilations 9, 3, 1: wide context first
    return nn.Sequential(*[ResBlock(c.width, c.dilation ** i) for i in reversed(range(c.depth))])


def make_encoder(c):
    stages = [nn.Sequential(nn.Conv1d(c.width, c.width, 4, stride=2, padding=1), res_stack(c)) for _ in range(c.down)]
    return nn.Sequential(nn.Conv1d(c.dim, c.width, 3, padding=1), nn.ReLU(), *stages,
                         nn.Conv1d(c.width, c.code_dim, 3, padding=1))


def make_decoder(c):
    stages = [nn.Sequential(res_stack(c), nn.Upsample(scale_factor=2, mode='nearest'),
                            nn.Conv1d(c.width, c.width, 3, padding=1)) for _ in range(c.down)]
    return nn.Sequential(nn.Conv1d(c.code_dim, c.width, 3, padding=1), nn.ReLU(), *stages,
                         nn.Conv1d(c.width, c.width, 3, padding=1), nn.ReLU(), nn.Conv1d(c.width, c.dim, 3, padding=1))


class Quantizer(nn.Module):
    """One codebook (V, code_dim), learned by exponential moving average; codes that nothing uses are moved onto data."""

    def __init__(self, c):
        super().__init__()
        self.mu = c.mu
        self.register_buffer('codebook', torch.zeros(c.n_codes, c.code_dim))
        self.register_buffer('code_sum', torch.zeros(c.n_codes, c.code_dim))
        self.register_buffer('code_count', torch.zeros(c.n_codes))

    def nearest(self, r):
        """Eq 1 of DynMask: ids (N,) of the codes nearest to r (N, code_dim)."""
        return (self.codebook.square().sum(1) - 2 * r @ self.codebook.T).argmin(1)

    @torch.no_grad()
    def update(self, r, ids, pick):
        """EMA step from vectors r (N, code_dim), their ids (N,), and spare vectors pick (V, code_dim) for unused codes.
        All three cover the global batch, so every rank takes the same step. No branch on data: nothing waits for a GPU."""
        one_hot = F.one_hot(ids, len(self.codebook)).to(r.dtype)
        self.code_count.lerp_(one_hot.sum(0), 1 - self.mu)
        self.code_sum.lerp_(one_hot.T @ r, 1 - self.mu)
        used = (self.code_count >= 1)[:, None]   # on average at least one vector a step, as in T2M-GPT
        self.codebook.copy_(torch.where(used, self.code_sum / self.code_count.clamp(min=1e-5)[:, None], pick))
        self.code_sum.copy_(torch.where(used, self.code_sum, pick))
        self.code_count.copy_(torch.where(used[:, 0], self.code_count, 1.0))

    @torch.no_grad()
    def init(self, pick):
        """First batch: every code becomes a data vector."""
        self.codebook.copy_(pick)
        self.code_sum.copy_(pick)
        self.code_count.fill_(1.0)


class RVQVAE(nn.Module):
    def __init__(self, config, mean=None, std=None):
        super().__init__()
        self.config = c = config
        self.register_buffer('mean', torch.zeros(c.dim) if mean is None else torch.as_tensor(mean, dtype=torch.float32))
        self.register_buffer('std', torch.ones(c.dim) if std is None else torch.as_tensor(std, dtype=torch.float32))
        self.encoder, self.decoder = make_encoder(c), make_decoder(c)
        self.quantizers = nn.ModuleList(Quantizer(c) for _ in range(c.n_quantizers))

    def normalize(self, features):
        # a feature that never varies has std ~ 0: it carries nothing, and must not become 1e8 (NaN losses on new data)
        return (features - self.mean) / self.std.clamp(min=1e-4)

    def denormalize(self, motion):
        return motion * self.std.clamp(min=1e-4) + self.mean

    def encode_latent(self, motion):
        """motion (B, T, D) normalised -> latents (B, T / 4, code_dim)."""
        return self.encoder(motion.transpose(1, 2)).transpose(1, 2)

    def quantize(self, z, n_active=None):
        """MoMask Eq 1: b^v = Q(r^v), r^{v+1} = r^v - b^v. z (B, n, code_dim), using the first n_active quantizers (all
        when None; a tensor is fine). Returns ids (B, n, Q), the sum of codes (B, n, code_dim), the per-layer commitment
        losses summed (scalar), and the residuals each quantizer saw, [(B n, code_dim)] * Q."""
        B, n, D = z.shape
        z = z.float()                       # nearest codes outside autocast: bfloat16 would pick others
        with torch.autocast(z.device.type, enabled=False):
            r, total, commit, ids, seen = z.reshape(B * n, D), 0, 0.0, [], []
            for v, quantizer in enumerate(self.quantizers):
                i = quantizer.nearest(r.detach())
                b = quantizer.codebook[i]
                on = 1.0 if n_active is None else (torch.as_tensor(n_active, device=z.device) > v).float()
                commit = commit + on * F.mse_loss(r, b)
                ids.append(i)
                seen.append(r.detach())
                total = total + on * b
                r = r - b
        return torch.stack(ids, -1).view(B, n, -1), total.view(B, n, D), commit, seen

    def forward(self, motion, n_active=None):
        """motion (B, T, D) normalised -> reconstruction (B, T, D), commitment loss, ids (B, n, Q), residuals for `update`."""
        z = self.encode_latent(motion)
        ids, b, commit, seen = self.quantize(z, n_active)
        b = z + (b - z).detach()            # straight-through: the decoder's gradient goes to the encoder as it is
        return self.decode_latent(b.to(z.dtype)), commit / len(self.quantizers), ids, seen

    @torch.no_grad()
    def update_codebooks(self, ids, seen, n_active, generator):
        """EMA and resets after a training step; the layers that quantization dropout switched off learn nothing.
        With torch.distributed every rank gathers the global batch and steps alike (8 MB a step at the released size)."""
        for v, quantizer in enumerate(self.quantizers[:n_active]):
            r, i = gather(seen[v]), gather(ids[..., v].reshape(-1))
            pick = r[torch.randint(len(r), (len(quantizer.codebook),), generator=generator, device=r.device)]
            quantizer.update(r, i, pick)

    @torch.no_grad()
    def init_codebooks(self, motion, generator):
        """Fill the codebooks from a first batch, layer by layer, so that each starts on what the last left over."""
        r = gather(self.encode_latent(motion).float().reshape(-1, self.config.code_dim))
        for quantizer in self.quantizers:
            quantizer.init(r[torch.randint(len(r), (len(quantizer.codebook),), generator=generator, device=r.device)])
            r = r - quantizer.codebook[quantizer.nearest(r)]

    def decode_latent(self, b):
        """code vectors (B, n, code_dim) -> motion (B, 4 n, D), normalised."""
        return self.decoder(b.transpose(1, 2)).transpose(1, 2)

    @torch.no_grad()
    def encode(self, motion):
        """motion (B, T, D) normalised, T a multiple of 4 -> ids (B, T / 4, Q)."""
        return self.quantize(self.encode_latent(motion))[0]

    @torch.no_grad()
    def decode(self, ids):
        """ids (B, n, q) of the first q <= Q quantizers -> motion (B, 4 n, D), normalised."""
        return self.decode_latent(sum(q.codebook[ids[..., v]] for v, q in zip(range(ids.shape[-1]), self.quantizers)))

    @torch.no_grad()
    def decode_padded(self, ids, n):
        """The same for a padded batch: ids (B, N, q) of which row i has n[i] tokens -> (B, 4 N, D), zeros behind each end.
        Rows of one length are decoded together, so that no motion is touched by what stands behind it."""
        n = n.cpu()
        out = torch.zeros(ids.shape[0], 4 * ids.shape[1], self.config.dim, device=ids.device)
        for length in n.unique().tolist():
            rows = (n == length).nonzero()[:, 0]
            out[rows, :4 * length] = self.decode(ids[rows, :length]).float()
        return out

    def fingerprint(self):
        """A short hash of everything that decides which id means what. Transformers remember it."""
        h = hashlib.blake2b(digest_size=8)
        for tensor in (*self.encoder.state_dict().values(), *(q.codebook for q in self.quantizers), self.mean, self.std):
            h.update(tensor.detach().cpu().numpy().tobytes())
        return h.hexdigest()

    @classmethod
    def from_file(cls, path):
        """Open what train_vq.py wrote."""
        d = load(path, 'run `python train_vq.py` with this config first')
        if not isinstance(d, dict) or d.get('kind') != 'vq':
            raise CheckpointError(f'{path} is not a tokenizer of train_vq.py: expected its vq.pt.')
        model = cls(VQConfig(**d['config']))
        load_named(model, d['model'], path)
        return model.eval()

    @classmethod
    def from_momask(cls, root, dataset, name, checkpoint='net_best_fid.tar'):
        """Build from the official release: <root>/<dataset>/<name>/{model/net_best_fid.tar, meta/mean.npy, meta/std.npy}.
        Every size comes from the tensors' shapes. Errors: CheckpointError, one sentence naming the file."""
        path = os.path.join(root, dataset, name, 'model', checkpoint)
        w = load_momask(path, 'vq_model', 'net')
        width, dim, _ = tensor(w, 'encoder.model.0.weight', path).shape
        V, code_dim = tensor(w, 'quantizer.layers.0.codebook', path).shape
        count = lambda pattern: len({m.group(1) for m in map(re.compile(pattern).match, w) if m})
        config = VQConfig(dim=dim, n_codes=V, code_dim=code_dim, width=width,
                          down=count(r'encoder\.model\.(\d+)\.0\.weight'), n_quantizers=count(r'quantizer\.layers\.(\d+)\.'),
                          depth=count(r'encoder\.model\.2\.1\.model\.(\d+)\.'))
        mean, std = (load_stat(os.path.join(root, dataset, name, 'meta', f'{s}.npy'), dim) for s in ('mean', 'std'))
        model = cls(config, mean, std)
        ours = {k.replace('quantizer.layers', 'quantizers').replace('model.', ''): t for k, t in w.items()}
        load_named(model, ours, path, missing_ok=r'mean|std|.*code_(sum|count)')
        return model.eval()


@torch.no_grad()
def tokenize(model, split, path, device='cpu'):
    """Token ids of a whole split, cached at `path` (.npy): (4, total, Q) int16, where row p holds the clips from frame p on,
    each at its place start = cumsum(length // 4), (length - p) // 4 tokens long. Four phases, because the field starts a
    clip at a random frame and a token begins every fourth. Clips of one length share a batch: no clip sees padding."""
    if os.path.exists(path):
        return np.load(path)
    model = model.to(device).eval()
    n = split.length // 4
    start = np.cumsum(n) - n
    ids = np.zeros((4, int(n.sum()), model.config.n_quantizers), np.int16)
    bar = tqdm(total=4 * len(n), desc=f'tokens of {os.path.basename(path)}', mininterval=1, leave=False)
    for phase in range(4):
        tokens = (split.length - phase) // 4
        for length in np.unique(tokens):
            group = np.flatnonzero(tokens == length)
            for clips in np.array_split(group, -(-len(group) // 64)):
                frames = np.stack([split.features[s + phase:s + phase + 4 * length] for s in split.start[clips]])
                out = model.encode(model.normalize(torch.from_numpy(frames).to(device))).cpu().numpy()
                for clip, row in zip(clips, out):
                    ids[phase, start[clip]:start[clip] + length] = row
                bar.update(len(clips))
    bar.close()
    with open(f'{path}.{os.getpid()}.tmp', 'wb') as f:   # several ranks may come here at once
        np.save(f, ids)
    os.replace(f.name, path)
    return ids


# ------------------------------------------------------------------------------------------------------ checkpoint files

class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one sentence for the user."""


def save(obj, path):
    """torch.save that never leaves half a file: written beside, then renamed."""
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    torch.save(obj, path + '.tmp')
    os.replace(path + '.tmp', path)


def load(path, hint):
    """Open a checkpoint with weights_only (no code in it can run). `hint` says what to do when it is not there."""
    if not os.path.exists(path):
        raise CheckpointError(f'{path} is missing: {hint}.')
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as e:
        why = 'holds something other than plain tensors (code in it was not run)' if 'weights_only' in str(e).lower() \
            or 'Unsupported' in str(e) else 'is damaged or not a checkpoint'
        raise CheckpointError(f'{path} {why}: expected a file written by torch.save; get it again.') from None


def load_momask(path, *keys):
    """The state dict under the first of `keys` in an official checkpoint."""
    d = load(path, 'expected the layout <root>/<t2m|kit>/<name>/model/ of the official release; check the root and the name')
    for key in keys:
        if isinstance(d, dict) and isinstance(d.get(key), dict):
            return d[key]
    raise CheckpointError(f'{path} has the entries {sorted(map(str, d))}, expected {" or ".join(keys)}: is it another model?')


def tensor(w, key, path):
    if key not in w:
        raise CheckpointError(f'{path} has no tensor {key}: is it the checkpoint of another model?')
    return w[key]


def load_named(model, weights, path, missing_ok='$'):
    """load_state_dict whose complaints are one sentence."""
    own = model.state_dict()
    for k, t in weights.items():
        if k not in own:
            raise CheckpointError(f'{path} has a tensor {k} that this model has no place for: is it another architecture?')
        if t.shape != own[k].shape:
            raise CheckpointError(f'{path}: tensor {k} is {tuple(t.shape)}, expected {tuple(own[k].shape)}.')
    missing = [k for k in own if k not in weights and not re.fullmatch(missing_ok, k)]
    if missing:
        raise CheckpointError(f'{path} lacks {len(missing)} tensors, the first is {missing[0]}.')
    model.load_state_dict(weights, strict=False)


def load_stat(path, dim):
    """mean.npy or std.npy (dim,)."""
    if not os.path.exists(path):
        raise CheckpointError(f'{path} is missing: the official tokenizer comes with meta/mean.npy and meta/std.npy.')
    x = np.load(path)
    if x.shape != (dim,):
        raise CheckpointError(f'{path} is {x.shape}, expected ({dim},): it belongs to another data set.')
    return x


def gather(x):
    """Rows of all ranks, in rank order; x itself without torch.distributed."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def mean_over_ranks(x):
    """A scalar tensor -> its mean over all ranks, as a float."""
    if dist.is_initialized():
        x = x.detach().clone()
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x.item()
