"""Speed and memory, the fast path beside the plain one, in one process:

    python bench.py                                # CPU: all tables -> bench_cpu.json
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

from lib import fast
import msd
from lib import text
from lib.configurator import configure
from generate import generate_base, generate_residual
from hgm3 import HardTokenMining
from hgm3 import show as show_nodes
from model import (LossPredictor, MaskTransformer, ModelConfig, ResTransformer, Trunk,
                   make_optimizers)
from lib.runtime import atomic_write, setup, synchronize
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
configure(globals())
# -----------------------------------------------------------------------------
run = setup(device, dtype, 0)
cuda = run.device != 'cpu'
n_tokens = frames // 4
results = {}

motion = torch.randn(batch, frames, 263, device=run.device)
cached_ids = torch.randint(512, (batch, n_tokens, 6), device=run.device)
cached_text = torch.randn(batch, 1, 512, device=run.device)
valid = torch.ones(batch, n_tokens, dtype=torch.bool, device=run.device)
# a sentence with two actions and two specifics of each, as captions of HumanML3D have
graph_role = torch.tensor([1, 2, 3, 11, 2, 5, 9], device=run.device).repeat(batch, 1)
cached_nodes = torch.randn(batch, 7, 512, device=run.device)


def show(title, make, forms):
    """Time make(form)() of each form, the forms taking turns. Print and keep medians, peak memory,
    the ratio to plain, and what each switch costs."""
    runs = {form: make(form) for form in forms}
    seconds = {form: [] for form in forms}
    for _ in range(warm + rounds):
        for form, work in runs.items():
            synchronize(run.device)
            start = time.perf_counter()
            work()
            synchronize(run.device)
            seconds[form].append(time.perf_counter() - start)

    print(f'\n{title}')
    table = results[title] = {}
    for form, work in runs.items():
        ms = 1000 * float(np.median(seconds[form][warm:]))
        table[form] = row = {'ms': ms, 'MB': peak_memory(work) / 1e6}
        row['times plain'] = table['plain']['ms'] / ms
        print(f'  {form:18s} {ms:9.1f} ms {row["MB"]:9.1f} MB {row["times plain"]:8.2f}x')
    for form in forms:
        if form.startswith('ours, '):
            ratio = table[form]['times ours'] = table[form]['ms'] / table['ours']['ms']
            print(f'  {form} / ours {ratio:.3f}')
    return table


def peak_memory(work):
    """Peak bytes above the start. On a CPU (Linux, else NaN) they are the process's, after malloc
    has handed back what earlier runs left."""
    if cuda:
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
# A form is 'plain', 'ours' or 'compiled', and what is switched on besides: 'ours, DynMask'.


class PlainTrunk(Trunk):
    """Of torch.nn's parts. A batch that guidance has doubled goes through in two passes."""

    def __init__(self, config):
        super().__init__(config)
        layer = nn.TransformerEncoderLayer(config.latent, config.n_heads, config.ff, config.dropout,
                                           'gelu')
        self.layers = nn.TransformerEncoder(layer, config.n_layers, enable_nested_tensor=False)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, *inputs):
        parts = [x.chunk(1 if self.training else 2) for x in inputs[:4]]
        return torch.cat([self.one_pass(*part) for part in zip(*parts)])

    def one_pass(self, x, valid, front, front_valid):
        x = self.drop(self.embed(x) + self.positions[:x.shape[1]])
        x = torch.cat([front, x], 1).transpose(0, 1)
        pad = ~torch.cat([front_valid, valid], 1)
        h = self.layers(x, src_key_padding_mask=pad)
        return h[front.shape[1]:].transpose(0, 1)


def build(network, form):
    """A MaskTransformer, ResTransformer or RVQVAE of random weights."""
    config = ModelConfig(spectral_attn='DynMask' in form, graph='graph' in form)
    if network is RVQVAE:
        config = VQConfig()
    model = network(config)
    if network is MaskTransformer:
        model.G.copy_(msd.gram(torch.randn(512, 512)))
    if form == 'plain' and network is not RVQVAE:
        model.trunk = PlainTrunk(config)
    if 'compiled' in form:
        model.compile()
    return model.to(run.device)


def precision(form):
    return contextlib.nullcontext() if form == 'plain' else run.autocast()


@cache
def text_tower(plain):
    """Of random weights. Plain: open_clip's own encode_text, which reads all 77 columns."""
    if not plain:
        return text.clip_tower(pretrained=None, device=run.device)
    model = open_clip.create_model('ViT-B-32-quickgelu', device=run.device).eval()
    words = open_clip.get_tokenizer('ViT-B-32-quickgelu')
    return lambda captions: model.encode_text(words(captions).to(run.device))


@torch.no_grad()
def encode_prompts(B, form):
    """-> c (B, 1, 512), c_valid (B, 1)."""
    captions = [f'a person walks {i} steps and then turns around to the left' for i in range(B)]
    c = text_tower(form == 'plain')(captions).to(run.device)[:, None]
    return c, torch.ones(B, 1, dtype=torch.bool, device=run.device)


# ----------------------------------------------------------------------------------- what is timed


def training_step(model, loss, form, after=None):
    """A whole step as a function: forward, backward, clip, AdamW (or Muon); after() ends it."""
    name = 'muon' if 'Muon' in form else 'adamw'
    optimizers = make_optimizers(model, name, 2e-4, fused=form != 'plain')

    def step():
        with precision(form):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if after:
            after()
    return step


def transformer_step(network, form):
    model = build(network, form)

    def loss():
        ids, c, c_valid = cached_ids, cached_text, valid[:, :1]
        if form == 'plain':
            ids = vq.encode(motion)
            c, c_valid = encode_prompts(batch, form)
        if network is ResTransformer:
            return model(ids, c, c_valid, valid)
        if 'graph' in form:
            c, c_valid = cached_nodes, show_nodes(graph_role, int(form[-1]))
        base = ids[..., 0]
        if 'mining' in form:
            hard = miner.difficulty(base, c, c_valid, valid)
            masked, chosen = model.mask_tokens(base, c, valid, 'loss', difficulty=hard,
                                               hard_share=0.25)
            targets = torch.where(chosen, base, -100)
            return miner(masked, c, c_valid, valid, targets, chosen.sum(), None, base)
        mask_by = 'msd' if 'DynMask' in form else 'random'
        masked, chosen = model.mask_tokens(base, c, valid, mask_by, noise=1.0)
        return model(masked, c, c_valid, valid, torch.where(chosen, base, -100))

    if 'mining' in form:
        miner = HardTokenMining(model, LossPredictor(model.config)).to(run.device)
        return training_step(miner, loss, form, miner.update_teacher)
    return training_step(model, loss, form)


def tokenizer_step(form):
    model = build(RVQVAE, form)
    windows = torch.randn(4 * batch, 64, 263, device=run.device)
    model.init_codebooks(windows, run.generator)
    found = []   # ids and residuals, for the codebooks

    def loss():
        y, commit, *found[:] = model(windows)
        return F.smooth_l1_loss(y.float(), windows) + 0.02 * commit

    return training_step(model, loss, form,
                         lambda: model.update_codebooks(*found, 6, run.generator))


def generation(B, form):
    """A function from B prompts to motion."""
    mask = build(MaskTransformer, form).eval()
    res = build(ResTransformer, form).eval()
    n = torch.full((B,), n_tokens, device=run.device)

    def work():
        with torch.no_grad(), precision(form):
            c, c_valid = encode_prompts(B, form)
            ids = generate_base(mask, c, c_valid, n, das_sampling='DynMask' in form)
            ids = generate_residual(res, ids, c, c_valid, n)
        return vq.decode(ids)   # in float32: bfloat16 moves joints by 0.4 mm
    return work


def zscore_pairs(A):
    """z of Eq 13, over all pairs of A (..., n, n)."""
    centred = A - A.mean((-2, -1), keepdim=True)
    return centred / (centred.square().mean((-2, -1), keepdim=True) + msd.EPS).sqrt()


def attention(n, form, H=6, d=64, W=8, a=0.3):
    """Forward and backward of motion-aware attention, one layer's core -> (2, H, n, d). 'plain'
    writes Eq 13 down with its n x n tensors; 'ours' appends W + 2 dimensions to queries and keys,
    as fast.spread_prior, which below 256 tokens on a CPU prefers to form z(S)."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, H, n, d, device=run.device)
    for x in (q, k, v):
        x.requires_grad_()
    ids = torch.randint(512, (2, n), device=run.device)
    everything = torch.ones(2, n, dtype=torch.bool, device=run.device)
    G = msd.gram(torch.randn(512, 512, device=run.device))
    f, seen = msd.spectrum(ids, G, everything, W)
    phi = msd.unit(f)
    scaled = q * d ** -0.5
    if form == 'plain':
        psi = phi * msd.band_weights(W, phi.device).sqrt()
        S = zscore_pairs(-torch.cdist(psi, psi).square())
        A = (1 - a) * zscore_pairs(scaled @ k.mT) + a * S[:, None]
        o = A.softmax(-1) @ v
    else:
        wide = -(d + W + 2) % 8
        prior = [F.pad(part, (0, wide))[:, None] for part in msd.prior_qk(phi, seen)]
        a_content = (1 - a) / fast.logit_std(scaled, k, everything)
        o = fast.appended_attention(scaled, k, v, a_content, a, prior, None)
    o.square().mean().backward()
    return o.detach()


# ------------------------------------------------------------------------------------------- tables

name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
results['machine'] = {'name': name, 'threads': torch.get_num_threads(), 'torch': torch.__version__,
                      'dtype': run.dtype, 'TFLOP/s of a plain product': run.peak / 1e12}
print(results['machine'])
vq = build(RVQVAE, 'ours').eval()
vq.init_codebooks(motion, run.generator)
forms = ['plain', 'ours'] + ['compiled'] * compile
with_dynmask = ['plain', 'ours', 'ours, DynMask'] + ['compiled, DynMask'] * compile
parts = what.split(',')

if 'step' in parts:
    size = f'training step, batch {batch} x {n_tokens} tokens'
    masked = partial(transformer_step, MaskTransformer)
    # HGM3's levels, which training takes in turn
    levels = {name: [f'{name} {level}' for level in (1, 2, 3)]
              for name in ('ours, graph', 'ours, hard mining, graph')}
    others = ['ours, Muon', 'ours, hard mining', *sum(levels.values(), [])]
    table = show(f'masked transformer, {size}', masked, with_dynmask + others)
    for name, its_levels in levels.items():
        ratio = float(np.mean([table[level]['times ours'] for level in its_levels]))
        table[name] = {'times ours': ratio}
        print(f'  {name}, the mean of its levels / ours {ratio:.3f}')
    residual = partial(transformer_step, ResTransformer)
    show(f'residual transformer, {size}', residual, forms)
    show(f'tokenizer, training step, {4 * batch} x 64 frames', tokenizer_step, forms)

if 'generate' in parts:
    for B in sorted({1, prompts}):
        title = f'generation, {B} prompt(s) of {n_tokens} tokens, 10 steps and 5 layers'
        show(title, partial(generation, B), with_dynmask)

if 'attention' in parts:
    for n in (49, 256, 1024, 4096):
        if n <= max_tokens:
            title = f'attention, forward and backward, float32, {n} tokens'
            table = show(title, lambda form: partial(attention, n, form), ['plain', 'ours'])
            apart = attention(n, 'plain') - attention(n, 'ours')
            table['largest difference'] = float(apart.abs().max())
            print(f'  largest difference {table["largest difference"]:.1g}')

path = bench_json or f"bench_{'cuda' if cuda else 'cpu'}.json"
with atomic_write(path, 'w') as f:
    json.dump(results, f, indent=1)
print(f'\nwritten to {path}')
