"""Speed and memory, the fast path beside the plain one, in one process:

    python bench.py                                # CPU: the README's table; bench_cpu.json
    python bench.py --device=cuda --compile=True   # GPU: also batch 256, compile on and off

`plain` is the recipe of the reference code, rebuilt from torch.nn here: float32, the CLIP text
tower and the tokenizer run in every step, nn.TransformerEncoder with nn.Dropout, a gathered
(B, V + 1, D) projection, two passes for guidance (tokenizer: the same network in float32). Random
weights and data at the released sizes: time does not depend on them. Every figure is a median of
runs taken in turn (A B C, A B C, ...), because machines are noisy.
"""
import contextlib
import ctypes
import functools
import json
import math
import re
import time
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
from model import MaskTransformer, ModelConfig, ResTransformer, sinusoid
from runtime import atomic_write, count_flops, setup, synchronize
from vq import RVQVAE, VQConfig

# -----------------------------------------------------------------------------
what = 'step,generate,attention'   # which tables
rounds = 5                   # runs of each
batch = 64
frames = 196
max_tokens = 4096            # the longest sequence of the attention table
device = 'auto'              # 'auto' | 'cpu' | 'cuda'
dtype = 'auto'               # 'auto' (bfloat16 where hardware has it) | 'bfloat16' | 'float32'
compile = False              # also time the compiled forms
bench_json = ''              # '' is bench_<device>.json
configure(globals(), device=('auto', 'cpu', 'cuda'), dtype=('auto', 'bfloat16', 'float32'))
# -----------------------------------------------------------------------------
run = setup(device, dtype, 0)
fast.keep_memory()
cuda = run.device != 'cpu'
name = torch.cuda.get_device_name() if cuda else f'{torch.get_num_threads()} CPU cores'
n_tokens = frames // 4
results = {}

motion = torch.randn(batch, frames, 263, device=run.device)
all_ids = torch.randint(512, (batch, n_tokens, 6), device=run.device)
valid = torch.ones(batch, n_tokens, dtype=torch.bool, device=run.device)
c = torch.randn(batch, 1, 512, device=run.device)
c_valid = valid[:, :1]


def in_turn(runs, rounds=rounds, warm=2):
    """{name: function} -> {name: median seconds}, the functions taking turns."""
    seconds = {name: [] for name in runs}
    for _ in range(warm + rounds):
        for name, work in runs.items():
            synchronize(run.device)
            start = time.perf_counter()
            work()
            synchronize(run.device)
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(s[warm:])) for name, s in seconds.items()}


def show(title, plain, **forms):
    """Time plain() beside forms[name](compiled)(), print and keep: milliseconds, the ratio to
    plain, and what the matrix products of the last form allow: their count, and the ratio if they
    ran at the speed of a plain product and everything else took no time."""
    runs = {'plain': plain}
    for kind in ('ours', 'compiled') if compile else ('ours',):
        for form, make in forms.items():
            runs[f'{kind}, {form}'] = make(kind == 'compiled')
    seconds = in_turn(runs)
    table = results[title] = {}
    print(f'\n{title}')
    for name, s in seconds.items():
        table[name] = {'ms': 1000 * s, 'times plain': seconds['plain'] / s}
        print(f'  {name:24s} {1000 * s:10.1f} ms   {seconds["plain"] / s:6.2f}x')

    ours = f'ours, {list(forms)[-1]}'
    flops = count_flops(runs[ours])
    share = flops / seconds[ours] / run.peak
    bound = seconds['plain'] * run.peak / flops
    table['products'] = {'TFLOP': flops / 1e12, 'share of peak': share,
                         'times plain at most': bound}
    print(f'  products: {flops / 1e12:.3f} TFLOP, {share:.0%} of the peak; {bound:.2f}x if nothing '
          'else took time')
    if 'MoMask' in forms:
        ratio = table['DynMask / MoMask'] = seconds[ours] / seconds['ours, MoMask']
        print(f'  DynMask / MoMask: {ratio:.3f}')


# ------------------------------------------------------------------ the reference's recipe, plainly


class PlainTransformer(nn.Module):
    """Both transformers of the reference code: q is None for the masked one, else a layer per
    row."""

    def __init__(self, V=512, D=512, Q=6, d=384):
        super().__init__()
        self.Q = Q
        self.token_emb = nn.Embedding(V + 2, D)
        self.tables = nn.Parameter(torch.randn(Q - 1, V + 1, D) * 0.02)
        self.embed = nn.Linear(D, d)
        self.cond = nn.Linear(512, d)
        self.layer = nn.Linear(Q, d)
        self.register_buffer('positions', sinusoid(1024, d))
        self.drop = nn.Dropout(0.2)
        layer = nn.TransformerEncoderLayer(d, 6, 1024, 0.2, 'gelu')
        self.encoder = nn.TransformerEncoder(layer, 8, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.LayerNorm(d, eps=1e-12))
        self.out = nn.Linear(d, V)
        self.out_code = nn.Linear(d, D)

    def forward(self, ids, c, pad, q=None):
        front = [self.cond(c)]
        if q is None:
            x = self.token_emb(ids)
        else:
            below = [F.embedding(ids[..., v], self.tables[v]) for v in range(self.Q - 1)]
            sums = torch.stack(below, -1).cumsum(-1)
            x = sums[torch.arange(len(q), device=q.device), :, :, q - 1]
            front.append(self.layer(F.one_hot(q, self.Q).float()))
        x = self.drop(self.embed(x).transpose(0, 1) + self.positions[:ids.shape[1], None])
        x = torch.cat([torch.stack(front), x])
        pad = F.pad(pad, (len(front), 0), value=False)
        h = self.encoder(x, src_key_padding_mask=pad)[len(front):]
        h = self.head(h.transpose(0, 1))
        if q is None:
            return self.out(h)
        return torch.einsum('bnd,bvd->bnv', self.out_code(h), self.tables[q - 1])


def plain_tower():
    """open_clip's own encode_text, of random weights: all 77 columns."""
    name = 'ViT-B-32-quickgelu'
    model = open_clip.create_model(name, pretrained=None).eval().requires_grad_(False)
    model = model.to(run.device)
    words = open_clip.get_tokenizer(name)
    return lambda captions: model.encode_text(words(captions).to(run.device))


# ----------------------------------------------------------------------------------- training steps


def prompts(B):
    return [f'a person walks forward {i} steps and then turns around to the left' for i in range(B)]


def network(model, compiled=False):
    model = model.to(run.device)
    if compiled:
        model.compile()
    return model


def masked_transformer(on, compiled):
    config = ModelConfig(spectral_attn=on)
    return network(MaskTransformer(config, torch.randn(512, 512)), compiled)


def tokenizer(compiled=False):
    vq = network(RVQVAE(VQConfig()), compiled)
    vq.init_codebooks(motion, run.generator)
    return vq


def training_step(model, loss, fast_form=True):
    """A whole step as a function: forward, backward, clip, AdamW; the fast form with autocast."""
    optimizer = torch.optim.AdamW(model.parameters(), 2e-4, fused=fast_form)
    context = run.autocast if fast_form else contextlib.nullcontext

    def step():
        with context():
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def plain_step(residual):
    model, vq, tower = network(PlainTransformer()), tokenizer().eval(), plain_tower()

    def loss():
        with torch.no_grad():
            ids = vq.encode(motion)
            text_c = tower(prompts(batch))
        if residual:
            q = torch.randint(1, 6, (batch,), device=run.device)
            logits = model(ids, text_c, ~valid, q)
            target = ids.gather(2, q[:, None, None].expand(-1, n_tokens, 1))[..., 0]
        else:
            chosen = torch.rand(valid.shape, device=run.device) < 0.64   # the mean of gamma
            logits = model(torch.where(chosen, 512, ids[..., 0]), text_c, ~valid)
            target = torch.where(chosen, ids[..., 0], -100)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())
    return training_step(model, loss, fast_form=False)


def mask_step(on, compiled):
    model = masked_transformer(on, compiled)
    base = all_ids[..., 0]

    def loss():
        mask_by = 'msd' if on else 'random'
        masked, chosen = model.mask_tokens(base, c, valid, mask_by, noise=1.0)
        return model(masked, c, c_valid, valid, torch.where(chosen, base, -100))
    return training_step(model, loss)


def res_step(compiled):
    model = network(ResTransformer(ModelConfig()), compiled)
    return training_step(model, lambda: model(all_ids, c, c_valid, valid))


def tokenizer_step(compiled=False, fast_form=True):
    vq = tokenizer(compiled)
    windows = torch.randn(4 * batch, 64, 263, device=run.device)
    found = []   # ids and residuals, for the codebooks

    def loss():
        y, commit, *found[:] = vq(windows)
        return F.smooth_l1_loss(y.float(), windows) + 0.02 * commit

    step = training_step(vq, loss, fast_form)

    def whole():
        step()
        vq.update_codebooks(*found, 6, run.generator)
    return whole


def step_tables():
    size = f'training step, batch {batch} x {n_tokens} tokens'
    show(f'masked transformer, {size}', plain_step(residual=False),
         MoMask=functools.partial(mask_step, False), DynMask=functools.partial(mask_step, True))
    show(f'residual transformer, {size}', plain_step(residual=True), fast=res_step)
    show(f'tokenizer, training step, {4 * batch} x 64 frames', tokenizer_step(fast_form=False),
         fast=tokenizer_step)


# --------------------------------------------------------------------------------------- generation


def plain_sample(logits, keep=52):
    weakest = logits.topk(keep, -1).values[..., -1:]
    share = logits.masked_fill(logits < weakest, -torch.inf).softmax(-1)
    return share.flatten(0, 1).multinomial(1).view(logits.shape[:-1])


def plain_guided(model, ids, c, pad, scale, *layer):
    uncond = model(ids, c * 0, pad, *layer)
    cond = model(ids, c, pad, *layer)
    return uncond + scale * (cond - uncond)


def plain_generate(mask, res, c):
    """MoMask's decoding of n_tokens each for texts c (B, 512) -> ids (B, n, 6)."""
    B = len(c)
    pad = torch.zeros(B, n_tokens, dtype=torch.bool, device=run.device)
    ids = torch.full((B, n_tokens), 512, device=run.device)
    score = torch.zeros(B, n_tokens, device=run.device)
    for step in range(10):
        n_masked = max(1, round(math.cos(math.pi / 2 * step / 9) * n_tokens))
        masked = score.argsort(1).argsort(1) < n_masked
        ids = torch.where(masked, 512, ids)
        logits = plain_guided(mask, ids, c, pad, 4)
        drawn = plain_sample(logits)
        ids = torch.where(masked, drawn, ids)
        score = logits.softmax(-1).gather(-1, drawn[..., None])[..., 0].masked_fill(~masked, 1e5)
    layers = ids[..., None].repeat(1, 1, 6)
    for q in range(1, 6):
        row = torch.full((B,), q, device=run.device)
        layers[..., q] = plain_sample(plain_guided(res, layers, c, pad, 5, row)[..., :512])
    return layers


@torch.no_grad()
def generate_tables():
    vq = tokenizer().eval()
    slow_tower, tower = plain_tower(), text.clip_tower(pretrained=None, device=run.device)
    plain_mask, plain_res = (network(PlainTransformer()).eval() for _ in range(2))

    for B in (1, 32, 256) if cuda else (1, 32):
        n = torch.full((B,), n_tokens, device=run.device)
        c_valid = torch.ones(B, 1, dtype=torch.bool, device=run.device)

        def plain():
            return vq.decode(plain_generate(plain_mask, plain_res, slow_tower(prompts(B))))

        def ours(on, compiled):
            model = masked_transformer(on, compiled).eval()
            res = network(ResTransformer(ModelConfig()), compiled).eval()

            def work():
                with run.autocast():
                    c = tower(prompts(B)).to(run.device)[:, None]
                    ids = generate_base(model, c, c_valid, n, das=on)
                    ids = generate_residual(res, ids, c, c_valid, n)
                return vq.decode(ids)   # in float32: bfloat16 moves joints by 0.4 mm
            return work

        show(f'generation, {B} prompt(s) of {n_tokens} tokens, 10 steps and 5 layers', plain,
             MoMask=functools.partial(ours, False), DynMask=functools.partial(ours, True))


# ------------------------------------------------------------------------------ long sequences, 3.5


def zscore_pairs(A):
    """z of Eq 13, over all pairs of A (..., n, n)."""
    centred = A - A.mean((-2, -1), keepdim=True)
    return centred / (centred.square().mean((-2, -1), keepdim=True) + msd.EPS).sqrt()


def attention_case(form, n, B=2, H=6, d=64, W=8):
    """Forward and backward of motion-aware attention, one layer's core. 'plain' writes Eq 13 down
    with its n x n tensors; 'ours' appends W + 2 dimensions to queries and keys. -> (B, H, n, d)."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, B, H, n, d, device=run.device)
    for x in (q, k, v):
        x.requires_grad_()
    ids = torch.randint(512, (B, n), device=run.device)
    valid = torch.ones(B, n, dtype=torch.bool, device=run.device)
    G = msd.gram(torch.randn(512, 512, device=run.device))
    phi, seen = msd.descriptor(ids, G, valid, W)
    a = 0.3
    scaled = q * d ** -0.5
    if form == 'plain':
        psi = phi * msd.band_weights(W, phi.device).sqrt()
        S = zscore_pairs(-torch.cdist(psi, psi).square())
        o = ((1 - a) * zscore_pairs(scaled @ k.mT) + a * S[:, None]).softmax(-1) @ v
    else:
        # as fast.spread_prior, which below 256 tokens on a CPU prefers to form z(S)
        wide = -(d + W + 2) % 8
        prior = [F.pad(part, (0, wide))[:, None] for part in msd.prior_qk(phi, seen)]
        a_content = (1 - a) / fast.logit_std(scaled, k, valid)
        o = fast.appended_attention(scaled, k, v, a_content, a, prior, None)
    o.square().mean().backward()
    return o.detach()


def peak_memory(form, n):
    """Peak bytes above the start. On a CPU (Linux) that is the process's resident peak, which is
    reset on request, after malloc has handed back what earlier runs left."""
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        attention_case(form, n)
        return torch.cuda.max_memory_allocated() - start
    clear, status = Path('/proc/self/clear_refs'), Path('/proc/self/status')
    if not clear.exists():
        return math.nan
    ctypes.CDLL(None).malloc_trim(0)
    clear.write_text('5')
    start = int(re.search(r'VmRSS:\s+(\d+)', status.read_text())[1])
    attention_case(form, n)
    return 1024 * (int(re.search(r'VmHWM:\s+(\d+)', status.read_text())[1]) - start)


def attention_table():
    print('\nmotion-aware attention, forward + backward, batch 2, 6 heads of 64, float32')
    table = results['attention'] = []
    for n in (49, 128, 256, 512, 1024, 2048, 4096):
        if n > max_tokens:
            break
        runs = {form: functools.partial(attention_case, form, n) for form in ('plain', 'ours')}
        seconds = in_turn(runs, min(rounds, 3), warm=1)
        row = {'tokens': n}
        for form in runs:
            row[f'{form} ms'] = 1000 * seconds[form]
            row[f'{form} MB'] = peak_memory(form, n) / 1e6
        row['max difference'] = float((runs['plain']() - runs['ours']()).abs().max())
        table.append(row)
        print('  ' + ', '.join(f'{key} {value:.4g}' for key, value in row.items()))


print(f'{name}, torch {torch.__version__}, {run.dtype}, {run.peak / 1e12:.2f} TFLOP/s in a plain '
      'product')
results['machine'] = {
    'name': name, 'torch': torch.__version__, 'dtype': run.dtype,
    'TFLOP/s of a plain product': run.peak / 1e12, 'amx': torch.cpu._is_amx_tile_supported(),
    'avx512_bf16': torch.cpu._is_avx512_bf16_supported()}
tables = {'step': step_tables, 'generate': generate_tables, 'attention': attention_table}
for part, make_table in tables.items():
    if part in what.split(','):
        make_table()
path = bench_json or f"bench_{'cuda' if cuda else 'cpu'}.json"
with atomic_write(path, 'w') as f:
    json.dump(results, f, indent=1)
print(f'\nwritten to {path}')
