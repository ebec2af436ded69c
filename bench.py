"""Speed and memory, the fast path beside the plain one, in one process:

    python bench.py                                # CPU: SPEED.md's tables -> bench_cpu.json
    python bench.py --device=cuda --compile=True --prompts=256   # GPU, and the compiled forms

`plain` is the recipe of the reference code: float32, the CLIP text tower and the tokenizer run in
every step, nn.TransformerEncoder with nn.Dropout, two passes for guidance (tokenizer: the same
network in float32). Random weights and data at the released sizes: time does not depend on them.
Every figure is a median of runs taken in turn (A B C, A B C, ...), because machines are noisy.
"""
import contextlib
import ctypes
import json
import math
import platform
import re
import time
from functools import cache, partial
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn as nn
import torch.nn.functional as F

import fast
import msd
import text
from configurator import configure
from generate import generate_base, generate_residual
from model import MaskTransformer, ModelConfig, ResTransformer, Trunk
from runtime import atomic_write, setup, synchronize
from vq import RVQVAE, VQConfig

# -----------------------------------------------------------------------------
what = 'step,generate,attention'   # which tables
rounds = 5                   # runs of each
warm = 2                     # and before them, not counted
batch = 64
frames = 196
prompts = 32                 # generated at a time, beside one alone
max_tokens = 4096            # the longest sequence of the attention table
device = 'auto'              # 'auto' | 'cpu' | 'cuda'
dtype = 'auto'               # 'auto' (bfloat16 where hardware has it) | 'bfloat16' | 'float32'
compile = False              # also time the compiled form
bench_json = ''              # '' is bench_<device>.json
configure(globals(), device=('auto', 'cpu', 'cuda'), dtype=('auto', 'bfloat16', 'float32'))
# -----------------------------------------------------------------------------
run = setup(device, dtype, 0)
fast.keep_memory()
cuda = run.device != 'cpu'
n_tokens = frames // 4
results = {}

motion = torch.randn(batch, frames, 263, device=run.device)
cached_ids = torch.randint(512, (batch, n_tokens, 6), device=run.device)
cached_text = torch.randn(batch, 1, 512, device=run.device)
valid = torch.ones(batch, n_tokens, dtype=torch.bool, device=run.device)


def forms(make, dynmask=False):
    """-> {name: function} to be compared, of make(plain=, on=, compiled=); on: DynMask."""
    runs = {'plain': make(plain=True), 'ours': make()}
    if dynmask:
        make = partial(make, on=True)
        runs['ours, DynMask'] = make()
    if compile:
        runs['compiled'] = make(compiled=True)
    return runs


def show(title, runs):
    """Time {name: function}, the functions taking turns. Print and keep medians, peak memory, the
    ratio to plain, DynMask's price."""
    seconds = {name: [] for name in runs}
    for _ in range(warm + rounds):
        for name, work in runs.items():
            synchronize(run.device)
            start = time.perf_counter()
            work()
            synchronize(run.device)
            seconds[name].append(time.perf_counter() - start)

    print(f'\n{title}')
    table = results[title] = {}
    for name, work in runs.items():
        ms = 1000 * float(np.median(seconds[name][warm:]))
        table[name] = row = {'ms': ms, 'MB': peak_memory(work) / 1e6}
        row['times plain'] = table['plain']['ms'] / ms
        print(f'  {name:16s} {ms:9.1f} ms {row["MB"]:9.1f} MB {row["times plain"]:8.2f}x')
    if 'ours, DynMask' in runs:
        table['on / off'] = table['ours, DynMask']['ms'] / table['ours']['ms']
        print(f'  DynMask on / off {table["on / off"]:.3f}')
    return table


def peak_memory(work):
    """Peak bytes above the start. On a CPU (Linux, else NaN) they are the process's, after malloc
    has handed back what earlier runs left."""
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - start
    clear, status = Path('/proc/self/clear_refs'), Path('/proc/self/status')
    if not clear.exists():
        return math.nan
    ctypes.CDLL(None).malloc_trim(0)
    clear.write_text('5')
    start = int(re.search(r'VmRSS:\s+(\d+)', status.read_text())[1])
    work()
    return 1024 * (int(re.search(r'VmHWM:\s+(\d+)', status.read_text())[1]) - start)


# ------------------------------------------------------------------------- networks, fast and plain


class PlainTrunk(Trunk):
    """Of torch.nn's parts. A batch that guidance has doubled goes through in two passes."""

    def __init__(self, config):
        super().__init__(config)
        layer = nn.TransformerEncoderLayer(config.latent, config.n_heads, config.ff, config.dropout,
                                           'gelu')
        self.layers = nn.TransformerEncoder(layer, config.n_layers, enable_nested_tensor=False)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, *inputs):
        if self.training:
            return self.one_pass(*inputs)
        halves = zip(*(x.chunk(2) for x in inputs[:4]))
        return torch.cat([self.one_pass(*half) for half in halves])

    def one_pass(self, x, valid, front, front_valid, prior=None):
        x = self.drop(self.embed(x) + self.positions[:x.shape[1]])
        x = torch.cat([front, x], 1).transpose(0, 1)
        pad = ~torch.cat([front_valid, valid], 1)
        h = self.layers(x, src_key_padding_mask=pad)
        return h[front.shape[1]:].transpose(0, 1)


def transformer(residual, plain, on, compiled):
    config = ModelConfig(spectral_attn=on)
    model = ResTransformer(config) if residual else MaskTransformer(config, torch.randn(512, 512))
    if plain:
        model.trunk = PlainTrunk(config)
    if compiled:
        model.compile()
    return model.to(run.device)


def tokenizer(compiled=False):
    model = RVQVAE(VQConfig()).to(run.device)
    model.init_codebooks(motion, run.generator)
    if compiled:
        model.compile()
    return model


@cache
def text_tower(plain):
    """Of random weights. plain: open_clip's own encode_text, which reads all 77 columns."""
    if not plain:
        return text.clip_tower(pretrained=None, device=run.device)
    model = open_clip.create_model('ViT-B-32-quickgelu', pretrained=None).eval()
    model = model.to(run.device).requires_grad_(False)
    words = open_clip.get_tokenizer('ViT-B-32-quickgelu')
    return lambda captions: model.encode_text(words(captions).to(run.device))


def encode_prompts(B, plain):
    """-> c (B, 1, 512), c_valid (B, 1)."""
    captions = [f'a person walks {i} steps and then turns around to the left' for i in range(B)]
    c = text_tower(plain)(captions).to(run.device)[:, None]
    return c, torch.ones(B, 1, dtype=torch.bool, device=run.device)


# ----------------------------------------------------------------------------------- what is timed


def training_step(model, loss, plain):
    """A whole step as a function: forward, backward, clip, AdamW; with autocast if not plain."""
    optimizer = torch.optim.AdamW(model.parameters(), 2e-4, fused=not plain)
    context = contextlib.nullcontext if plain else run.autocast

    def step():
        with context():
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def transformer_step(residual, plain=False, on=False, compiled=False):
    model = transformer(residual, plain, on, compiled)

    def loss():
        ids, c, c_valid = cached_ids, cached_text, valid[:, :1]
        if plain:
            ids = vq.encode(motion)
            c, c_valid = encode_prompts(batch, plain)
        if residual:
            return model(ids, c, c_valid, valid)
        base = ids[..., 0]
        mask_by = 'msd' if on else 'random'
        masked, chosen = model.mask_tokens(base, c, valid, mask_by, noise=1.0)
        return model(masked, c, c_valid, valid, torch.where(chosen, base, -100))
    return training_step(model, loss, plain)


def tokenizer_step(plain=False, compiled=False):
    model = tokenizer(compiled)
    windows = torch.randn(4 * batch, 64, 263, device=run.device)
    found = []   # ids and residuals, for the codebooks

    def loss():
        y, commit, *found[:] = model(windows)
        return F.smooth_l1_loss(y.float(), windows) + 0.02 * commit

    step = training_step(model, loss, plain)

    def whole():
        step()
        model.update_codebooks(*found, 6, run.generator)
    return whole


def generation(B, plain=False, on=False, compiled=False):
    """A function from B prompts to motion."""
    mask = transformer(False, plain, on, compiled).eval()
    res = transformer(True, plain, False, compiled).eval()
    n = torch.full((B,), n_tokens, device=run.device)
    context = contextlib.nullcontext if plain else run.autocast

    def work():
        with torch.no_grad(), context():
            c, c_valid = encode_prompts(B, plain)
            ids = generate_base(mask, c, c_valid, n, das_sampling=on)
            ids = generate_residual(res, ids, c, c_valid, n)
        return vq.decode(ids)   # in float32: bfloat16 moves joints by 0.4 mm
    return work


def zscore_pairs(A):
    """z of Eq 13, over all pairs of A (..., n, n)."""
    centred = A - A.mean((-2, -1), keepdim=True)
    return centred / (centred.square().mean((-2, -1), keepdim=True) + msd.EPS).sqrt()


def attention(form, n, B=2, H=6, d=64, W=8, a=0.3):
    """Forward and backward of motion-aware attention, one layer's core -> (B, H, n, d). 'plain'
    writes Eq 13 down with its n x n tensors; 'ours' appends W + 2 dimensions to queries and keys,
    as fast.spread_prior, which below 256 tokens on a CPU prefers to form z(S)."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, B, H, n, d, device=run.device)
    for x in (q, k, v):
        x.requires_grad_()
    ids = torch.randint(512, (B, n), device=run.device)
    valid = torch.ones(B, n, dtype=torch.bool, device=run.device)
    G = msd.gram(torch.randn(512, 512, device=run.device))
    f, seen = msd.spectrum(ids, G, valid, W)
    phi = msd.unit(f)
    scaled = q * d ** -0.5
    if form == 'plain':
        psi = phi * msd.band_weights(W, phi.device).sqrt()
        S = zscore_pairs(-torch.cdist(psi, psi).square())
        o = ((1 - a) * zscore_pairs(scaled @ k.mT) + a * S[:, None]).softmax(-1) @ v
    else:
        wide = -(d + W + 2) % 8
        prior = [F.pad(part, (0, wide))[:, None] for part in msd.prior_qk(phi, seen)]
        a_content = (1 - a) / fast.logit_std(scaled, k, valid)
        o = fast.appended_attention(scaled, k, v, a_content, a, prior, None)
    o.square().mean().backward()
    return o.detach()


# ------------------------------------------------------------------------------------------- tables

chip = torch.cuda.get_device_name() if cuda else platform.machine()
cpuinfo = Path('/proc/cpuinfo')
if not cuda and cpuinfo.exists():
    chip = re.search(r'model name\s*: (.*)|$', cpuinfo.read_text())[1] or chip
results['machine'] = {'name': chip, 'threads': torch.get_num_threads(), 'torch': torch.__version__,
                      'dtype': run.dtype, 'TFLOP/s of a plain product': run.peak / 1e12}
print(results['machine'])
vq = tokenizer().eval()
parts = what.split(',')

if 'step' in parts:
    size = f'training step, batch {batch} x {n_tokens} tokens'
    masked, residual = (partial(transformer_step, residual) for residual in (False, True))
    show(f'masked transformer, {size}', forms(masked, dynmask=True))
    show(f'residual transformer, {size}', forms(residual))
    show(f'tokenizer, training step, {4 * batch} x 64 frames', forms(tokenizer_step))

if 'generate' in parts:
    for B in sorted({1, prompts}):
        title = f'generation, {B} prompt(s) of {n_tokens} tokens, 10 steps and 5 layers'
        show(title, forms(partial(generation, B), dynmask=True))

if 'attention' in parts:
    for n in [n for n in (49, 256, 1024, 4096) if n <= max_tokens]:
        runs = {form: partial(attention, form, n) for form in ('plain', 'ours')}
        table = show(f'attention, forward and backward, float32, {n} tokens', runs)
        table['largest difference'] = float((runs['plain']() - runs['ours']()).abs().max())
        print(f'  largest difference {table["largest difference"]:.1g}')

path = bench_json or f"bench_{'cuda' if cuda else 'cpu'}.json"
with atomic_write(path, 'w') as f:
    json.dump(results, f, indent=1)
print(f'\nwritten to {path}')
