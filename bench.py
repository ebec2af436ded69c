"""Our code timed beside the plain recipe, in one process -> assets/bench_<device>.json:

    python bench.py                                # about ten minutes on two cores
    python bench.py --device=cuda --compile=True --prompts_at_once=256

`plain` is the recipe of MoMask's code: float32, the CLIP text tower and the tokenizer run in every
step, nn.TransformerEncoder with nn.Dropout, two passes for guidance. (For the tokenizer it is our
network in float32.) Weights and data are random, at the official sizes; time does not depend on
their values. Every figure is a median of runs taken in turn (A B C, A B C, ...), because machines
are noisy.
"""
import lib.configurator   # first, to catch Ctrl-C during the imports
import contextlib
import json
import os
import platform
import time
from functools import cache, partial

import numpy as np
import open_clip
import torch
import torch.nn as nn
import torch.nn.functional as F

import msd
from generate import generate_base, generate_residual
from lib.configurator import ROOT, configure
from lib.runtime import atomic_write, make_optimizers, setup, synchronize
from lib.text import clip_tower
from masking import mask_tokens
from model import MaskTransformer, ModelConfig, ResTransformer, Trunk
from vq import RVQVAE, VQConfig

# -----------------------------------------------------------------------------
rounds = 5                   # timed runs of each form, after one that is not timed
batch = 64
frames = 196
prompts_at_once = 32         # generated at a time, beside one alone
compile = False              # also time the compiled forms
bench_json = ''              # '' is assets/bench_<device>.json of the project
# machine
device = 'auto'              # 'auto' | 'cpu' | 'cuda'
dtype = 'auto'               # 'auto' (bfloat16 where hardware has it) | 'bfloat16' | 'float32'
configure(globals())
# -----------------------------------------------------------------------------
run = setup(device, dtype, 0)
n_tokens = frames // 4
motion = torch.randn(batch, frames, 263, device=run.device)
cached_ids = torch.randint(512, (batch, n_tokens, 6), device=run.device)
cached_text = torch.randn(batch, 1, 512, device=run.device)
valid = torch.ones(batch, n_tokens, dtype=torch.bool, device=run.device)
results = {}


def compare(title, make, forms):
    """Time make(form)() of each form, taking turns; print and keep the medians. A form is 'plain',
    'ours' or 'compiled', with an option: 'ours, DynMask'."""
    works = {form: make(form) for form in forms}
    seconds = {form: [] for form in forms}
    for _ in range(1 + rounds):
        for form, work in works.items():
            synchronize(run.device)
            start = time.perf_counter()
            work()
            synchronize(run.device)
            seconds[form].append(time.perf_counter() - start)

    print(f'\n{title}')
    ms = {form: 1000 * float(np.median(times[1:])) for form, times in seconds.items()}
    results[title] = ms
    for form in forms:
        print(f'  {form:18s} {ms[form]:9.1f} ms {ms["plain"] / ms[form]:8.2f}x')


# ------------------------------------------------------------------------------------- the networks


class PlainTrunk(Trunk):
    """The trunk from torch.nn's modules. A batch that guidance has doubled takes two passes."""

    def __init__(self, config):
        super().__init__(config)
        layer = nn.TransformerEncoderLayer(config.latent, config.n_heads, config.ff, config.dropout,
                                           'gelu')
        self.layers = nn.TransformerEncoder(layer, config.n_layers, enable_nested_tensor=False)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, *inputs):
        passes = 1 if self.training else 2
        parts = [x.chunk(passes) for x in inputs[:4]]
        return torch.cat([self.one_pass(*part) for part in zip(*parts)])

    def one_pass(self, x, valid, cond, cond_valid):
        x = self.drop(self.embed(x) + self.positions[:x.shape[1]])
        x = torch.cat([cond, x], 1).transpose(0, 1)
        pad = ~torch.cat([cond_valid, valid], 1)
        h = self.layers(x, src_key_padding_mask=pad)
        return h[cond.shape[1]:].transpose(0, 1)


def build(network, form):
    """A MaskTransformer, ResTransformer or RVQVAE with random weights."""
    config = VQConfig() if network is RVQVAE else ModelConfig(spectral_attn='DynMask' in form)
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
    """CLIP with random weights. Plain: open_clip's own encode_text, which reads all 77 columns."""
    if not plain:
        return clip_tower(pretrained=None, device=run.device)
    model = open_clip.create_model('ViT-B-32-quickgelu', device=run.device).eval()
    tokenizer = open_clip.get_tokenizer('ViT-B-32-quickgelu')
    return lambda captions: model.encode_text(tokenizer(captions).to(run.device))


@torch.no_grad()
def encode_prompts(B, form):
    """-> c (B, 1, 512), role (B, 1)."""
    captions = [f'a person walks {i} steps and then turns around to the left' for i in range(B)]
    c = text_tower(form == 'plain')(captions).to(run.device)[:, None]
    return c, torch.ones(B, 1, dtype=torch.bool, device=run.device)


# ----------------------------------------------------------------------------------- what is timed


def training_step(model, loss, form, after=None):
    """A whole training step as a function: forward, backward, clipping, AdamW or Muon; after() ends
    it."""
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
        ids, c, role = cached_ids, cached_text, valid[:, :1]
        if form == 'plain':
            ids = vq.encode(motion)
            c, role = encode_prompts(batch, form)
        if network is ResTransformer:
            return model(ids, c, role, valid)
        base = ids[..., 0]
        mask_by = 'msd' if 'DynMask' in form else 'random'
        masked, chosen = mask_tokens(model, base, c, valid, mask_by, noise=1.0)
        return model(masked, c, role, valid, torch.where(chosen, base, -100))

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
            c, role = encode_prompts(B, form)
            ids = generate_base(mask, c, role, n, das_sampling='DynMask' in form)
            ids = generate_residual(res, ids, c, role, n)
        return vq.decode(ids)   # in float32: bfloat16 moves joints by 0.4 mm
    return work


cuda = run.device != 'cpu'
name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
results['machine'] = {'name': name, 'threads': torch.get_num_threads(), 'torch': torch.__version__,
                      'dtype': run.dtype}
print(results['machine'])
vq = build(RVQVAE, 'ours').eval()
vq.init_codebooks(motion, run.generator)

forms = ['plain', 'ours'] + ['compiled'] * compile
with_dynmask = ['plain', 'ours', 'ours, DynMask'] + ['compiled, DynMask'] * compile
size = f'training step of {batch} x {n_tokens} tokens'
compare(f'masked transformer, {size}', partial(transformer_step, MaskTransformer),
        [*with_dynmask, 'ours, Muon'])
compare(f'residual transformer, {size}', partial(transformer_step, ResTransformer), forms)
compare(f'tokenizer, training step of {4 * batch} x 64 frames', tokenizer_step, forms)
for B in sorted({1, prompts_at_once}):
    compare(f'generation, prompts: {B}', partial(generation, B), with_dynmask)

path = bench_json or os.path.join(ROOT, 'assets', f'bench_{run.device[:4]}.json')
with atomic_write(path, 'w') as f:
    json.dump(results, f, indent=1)
print(f'\nwritten to {path}')
