"""Speed and memory, the fast path beside the plain one, in one process:

    python bench.py                                # CPU: the README's table; bench_cpu.json
    python bench.py --device=cuda --compile=True   # GPU: also batch 256, compile on and off; bench_cuda.json

`plain` is the recipe of the reference code rebuilt from torch.nn here: float32, the CLIP text tower and the tokenizer run in
every step, nn.TransformerEncoder with nn.Dropout, a gathered (B, V + 1, D) projection, two passes for guidance (tokenizer: the same network in float32). Random
weights and data at the released sizes: time does not depend on them. Every figure is a median of runs taken in turn
(A B C, A B C, ...), because machines are noisy.
"""
import ctypes
import json
import time

import numpy as np
import open_clip
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import msd
import text
from configurator import configure, setup
from model import MaskTransformer, ModelConfig, ResTransformer, fused_attention, sinusoid
from vq import RVQVAE, VQConfig

# -----------------------------------------------------------------------------
what = 'step,generate,attention'   # which tables
rounds = 5                   # runs of each
batch = 64
frames = 196
device = 'auto'
dtype = 'auto'
compile = False              # also time the compiled forms
bench_json = ''              # '' is bench_<device>.json
configure(globals())
# -----------------------------------------------------------------------------
run = setup(device, dtype, 0)
cuda = run.device != 'cpu'
n_tokens = frames // 4
results = {}


def sync():
    if cuda:
        torch.cuda.synchronize()


def in_turn(runs, rounds=rounds, warm=2):
    """{name: function} -> {name: median seconds}, the functions taking turns."""
    seconds = {name: [] for name in runs}
    for i in range(warm + rounds):
        for name, f in runs.items():
            sync()
            t = time.perf_counter()
            f()
            sync()
            seconds[name].append(time.perf_counter() - t)
    return {name: float(np.median(s[warm:])) for name, s in seconds.items()}


def show(title, runs, **how):
    """Time runs {name: function}, print and keep: ms, ratio to `plain`, and what the products of the run named `ours...` (the last
    of them) allow: their count, and the ratio if they ran at a plain product's speed and everything else took no time."""
    seconds = in_turn(runs, **how)
    print(f'\n{title}')
    for name, s in seconds.items():
        print(f"  {name:44s} {1000 * s:10.1f} ms   {seconds['plain'] / s:6.2f}x")
    ours = [name for name in runs if name.startswith('ours')][-1]
    with FlopCounterMode(display=False) as counter:
        runs[ours]()
    flop = counter.get_total_flops()
    bound = seconds['plain'] * run.peak / flop
    print(f'  products: {flop / 1e12:.3f} TFLOP, {flop / seconds[ours] / run.peak:.0%} of the peak; {bound:.2f}x if nothing else took time')
    results[title] = {**{name: {'ms': 1000 * s, 'times plain': seconds['plain'] / s} for name, s in seconds.items()},
                      'products': {'TFLOP': flop / 1e12, 'share of peak': flop / seconds[ours] / run.peak, 'times plain at most': bound}}
    return seconds


# ----------------------------------------------------------------------------------------- the reference's recipe, plainly

class PlainTransformer(nn.Module):
    """Both transformers of the reference code: q is None for the masked one, else a layer per row."""

    def __init__(self, V=512, D=512, Q=6, d=384):
        super().__init__()
        self.token_emb = nn.Embedding(V + 2, D)
        self.tables = nn.Parameter(torch.randn(Q - 1, V + 1, D) * 0.02)
        self.embed, self.cond, self.layer = nn.Linear(D, d), nn.Linear(512, d), nn.Linear(Q, d)
        self.register_buffer('positions', sinusoid(1024, d))
        self.drop = nn.Dropout(0.2)
        layer = nn.TransformerEncoderLayer(d, 6, 1024, 0.2, 'gelu')
        self.encoder = nn.TransformerEncoder(layer, 8, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.LayerNorm(d, eps=1e-12))
        self.out, self.out_code = nn.Linear(d, V), nn.Linear(d, D)

    def forward(self, ids, c, pad, q=None):
        front = [self.cond(c)]
        if q is None:
            x = self.token_emb(ids)
        else:
            history = [F.embedding(ids[..., v], self.tables[v]) for v in range(ids.shape[-1] - 1)]
            x = torch.stack(history, -1).cumsum(-1)[torch.arange(len(q), device=q.device), :, :, q - 1]
            front.append(self.layer(F.one_hot(q, 6).float()))
        x = self.drop(self.embed(x).transpose(0, 1) + self.positions[:ids.shape[1], None])
        x = torch.cat([torch.stack(front), x])
        pad = F.pad(pad, (len(front), 0), value=False)
        h = self.head(self.encoder(x, src_key_padding_mask=pad)[len(front):].transpose(0, 1))
        return self.out(h) if q is None else torch.einsum('bnd,bvd->bnv', self.out_code(h), self.tables[q - 1])


def clip_towers():
    """Captions through CLIP text towers of random weights, without cache: open_clip's encode_text (plain), and text.py's."""
    plain = open_clip.create_model('ViT-B-32-quickgelu', pretrained=None).eval().requires_grad_(False).to(run.device)
    words = open_clip.get_tokenizer('ViT-B-32-quickgelu')
    return lambda captions: plain.encode_text(words(captions).to(run.device)), text.clip_tower(pretrained=None, device=run.device)


captions = [f'a person walks forward {i} steps and then turns around to the left' for i in range(batch)]
motion = torch.randn(batch, frames, 263, device=run.device)
valid = torch.ones(batch, n_tokens, dtype=torch.bool, device=run.device)
all_ids = torch.randint(512, (batch, n_tokens, 6), device=run.device)
c = torch.randn(batch, 512, device=run.device)


def trained(model, loss, autocast):
    """A whole training step as a function: forward, backward, clip, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), 2e-4, fused=autocast)

    def step():
        if autocast:
            with run.autocast():
                value = loss()
        else:
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def cross_entropy(logits, target, where):
    return F.cross_entropy(logits.flatten(0, 1).float(), torch.where(where, target, -100).flatten())


def dynmask(on, **more):
    torch.manual_seed(0)
    return MaskTransformer(ModelConfig(spectral_attn=on, **more), torch.randn(512, 512)).to(run.device).train()


def tokenizer():
    torch.manual_seed(0)
    vq = RVQVAE(VQConfig()).to(run.device)
    vq.init_codebooks(motion, run.generator)
    return vq


def steps():
    (tower, _), vq, plain = clip_towers(), tokenizer().eval(), PlainTransformer().to(run.device).train()

    def plain_inputs():
        with torch.no_grad():
            return vq.encode(motion), tower(captions)

    def plain_mask():
        ids, c = plain_inputs()
        chosen = torch.rand(ids.shape[:2], device=run.device) < 0.64
        return cross_entropy(plain(torch.where(chosen, 512, ids[..., 0]), c, ~valid), ids[..., 0], chosen)

    def plain_res():
        ids, c = plain_inputs()
        q = torch.randint(1, 6, (batch,), device=run.device)
        return cross_entropy(plain(ids, c, ~valid, q), ids.gather(2, q[:, None, None].expand(-1, n_tokens, 1))[..., 0], valid)

    def ours(on, net=None):
        model = dynmask(on)
        call = torch.compile(model) if net else model

        def loss():
            masked, chosen = model.corrupt(all_ids[..., 0], c, valid, on, noise=1.0)
            return cross_entropy(call(masked, c, valid), all_ids[..., 0], chosen)
        return trained(model, loss, True)

    runs = {'plain': trained(plain, plain_mask, False), 'ours, DynMask off': ours(False), 'ours, DynMask on': ours(True)}
    if compile:
        runs.update({'compiled, DynMask off': ours(False, True), 'compiled, DynMask on': ours(True, True)})
    seconds = show(f'masked transformer, training step, batch {batch} x {n_tokens} tokens', runs)
    results['DynMask on / off, training step'] = seconds['ours, DynMask on'] / seconds['ours, DynMask off']
    print(f"  DynMask on / off: {results['DynMask on / off, training step']:.3f}")

    def ours_res(net):
        res = ResTransformer(ModelConfig()).to(run.device).train()
        call = torch.compile(res) if net else res
        layer = 1 + torch.arange(batch, device=run.device) % 5
        target = all_ids.gather(2, layer[:, None, None].expand(-1, n_tokens, 1))[..., 0]
        return trained(res, lambda: cross_entropy(call(all_ids, c, valid), target, valid), True)

    runs = {'plain': trained(PlainTransformer().to(run.device).train(), plain_res, False), 'ours': ours_res(False)}
    if compile:
        runs['compiled'] = ours_res(True)
    show(f'residual transformer, training step, batch {batch} x {n_tokens} tokens', runs)

    windows = torch.randn(256, 64, 263, device=run.device)

    def rvq(fast, net=False):
        vq = tokenizer().train()
        call = torch.compile(vq) if net else vq

        def loss():
            y, commit, *found = call(windows)
            tokens[:] = found
            return F.smooth_l1_loss(y.float(), windows) + 0.02 * commit
        tokens, step = [], trained(vq, loss, fast)
        return lambda: (step(), vq.update_codebooks(*tokens, 6, run.generator))

    runs = {'plain': rvq(False), 'ours': rvq(True)}
    if compile:
        runs['compiled'] = rvq(True, True)
    show('tokenizer, training step, 256 x 64 frames', runs, rounds=min(rounds, 3), warm=1)


@torch.no_grad()
def generation():
    (plain_tower, tower), vq, plain, plain_r = clip_towers(), tokenizer().eval(), PlainTransformer().to(run.device).eval(), \
        PlainTransformer().to(run.device).eval()

    def sample(logits, keep=52):
        filtered = logits.masked_fill(logits < logits.topk(keep, -1).values[..., -1:], -torch.inf)
        return filtered.softmax(-1).flatten(0, 1).multinomial(1).view(logits.shape[:-1])

    def plain_generate(B):
        text_c, ok = plain_tower((captions * 4)[:B]), torch.ones(B, n_tokens, dtype=torch.bool, device=run.device)
        ids = torch.full((B, n_tokens), 512, device=run.device)
        score = torch.zeros(B, n_tokens, device=run.device)
        for step in range(10):
            n = max(1, round(np.cos(np.pi / 2 * step / 9) * n_tokens))
            masked = score.argsort(1).argsort(1) < n
            ids = torch.where(masked, 512, ids)
            uncond, cond = plain(ids, text_c * 0, ~ok), plain(ids, text_c, ~ok)
            logits = uncond + 4 * (cond - uncond)
            pick = sample(logits)
            ids = torch.where(masked, pick, ids)
            score = logits.softmax(-1).gather(-1, pick[..., None])[..., 0].masked_fill(~masked, 1e5)
        layers = ids[..., None].repeat(1, 1, 6)
        for q in range(1, 6):
            row = torch.full((B,), q, device=run.device)
            uncond, cond = plain_r(layers, text_c * 0, ~ok, row), plain_r(layers, text_c, ~ok, row)
            layers[..., q] = sample((uncond + 5 * (cond - uncond))[..., :512])
        return vq.decode(layers)

    def ours(B, on, net=False):
        model, res = dynmask(on).eval(), ResTransformer(ModelConfig()).to(run.device).eval()
        if net:
            model.compile()
            res.compile()
        n = torch.full((B,), n_tokens, device=run.device)

        def f():
            with run.autocast():
                text_c = tower((captions * 4)[:B]).to(run.device)
                ids = res.generate(model.generate(text_c, n, das=on), text_c, n)
            return vq.decode(ids)   # in float32, as Pipeline.features: bfloat16 moves joints by 0.4 mm
        return f

    for B in (1, 32) + ((256,) if cuda else ()):
        runs = {'plain': lambda: plain_generate(B), 'ours, DynMask off': ours(B, False), 'ours, DynMask on': ours(B, True)}
        if compile:
            runs.update({'compiled, DynMask off': ours(B, False, True), 'compiled, DynMask on': ours(B, True, True)})
        seconds = show(f'generation, {B} prompt(s) of {n_tokens} tokens: text, 10 steps, 5 residual layers, decode', runs)
        results[f'DynMask on / off, generation {B}'] = seconds['ours, DynMask on'] / seconds['ours, DynMask off']
        print(f"  DynMask on / off: {results[f'DynMask on / off, generation {B}']:.3f}")


# ------------------------------------------------------------------------------------------------ long sequences, 3.5

def attention_case(form, n, B=2, H=6, d=64, W=8):
    """Forward and backward of motion-aware attention, one layer's core: 'plain' forms A, z-scores it, adds z(S), softmax;
    'ours' appends W + 2 dimensions."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, n, d, device=run.device, requires_grad=True) for _ in range(3))
    ids = torch.randint(512, (B, n), device=run.device)
    G, ok = msd.gram(torch.randn(512, 512, device=run.device)), torch.ones(B, n, dtype=torch.bool, device=run.device)
    a = 0.3
    if form == 'plain':
        z = lambda x: (x - x.mean((-2, -1), keepdim=True)) / (x.var((-2, -1), keepdim=True, unbiased=False) + msd.EPS).sqrt()
        phi, _ = msd.descriptor(ids, G, ok, W)
        psi = phi * msd.band_weights(W).to(phi.device).sqrt()
        S = z(-torch.cdist(psi, psi).square())
        o = ((1 - a) * z(q @ k.mT / d ** 0.5) + a * S[:, None]).softmax(-1) @ v
    else:
        prior = [F.pad(p, (0, -(d + W + 2) % 8))[:, None] for p in msd.prior_qk(*msd.descriptor(ids, G, ok, W))]
        content = (1 - a) * d ** -0.5 / msd.logit_std(torch.stack([q, k]), ok)
        o = fused_attention(q, k, v, content, a, prior)
    o.square().mean().backward()
    return o.detach()


def peak_memory(form, n):
    """Peak bytes above the start. On CPU that is the process's resident peak, which Linux resets on request, after malloc has
    handed back what earlier runs left; NaN elsewhere."""
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        attention_case(form, n)
        return torch.cuda.max_memory_allocated() - start
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open('/proc/self/clear_refs', 'w') as f:
            f.write('5')
    except (OSError, AttributeError):
        return float('nan')

    def status(key):
        with open('/proc/self/status') as f:
            return next(1024 * int(line.split()[1]) for line in f if line.startswith(key))
    start = status('VmRSS')
    attention_case(form, n)
    return status('VmHWM') - start


def attention():
    print(f"\nmotion-aware attention, forward + backward, batch 2, 6 heads of 64, float32\n{'tokens':>8} {'plain ms':>10} {'ours ms':>10} "
          f"{'plain MB':>10} {'ours MB':>10}  max difference")
    table = results['attention'] = []
    for n in (49, 128, 256, 512, 1024, 2048, 4096):
        seconds = in_turn({f: (lambda f=f: attention_case(f, n)) for f in ('plain', 'ours')}, rounds=3, warm=1)
        memory = {f: peak_memory(f, n) / 1e6 for f in seconds}
        error = float((attention_case('plain', n) - attention_case('ours', n)).abs().max())
        print(f"{n:8d} {1000 * seconds['plain']:10.1f} {1000 * seconds['ours']:10.1f} {memory['plain']:10.1f} {memory['ours']:10.1f}  {error:.1e}")
        table.append({'tokens': n, **{f'{f} ms': 1000 * s for f, s in seconds.items()}, **{f'{f} MB': m for f, m in memory.items()}, 'max difference': error})


name = torch.cuda.get_device_name() if cuda else f'{torch.get_num_threads()} CPU cores'
print(f'{name}, torch {torch.__version__}, {run.dtype}, {run.peak / 1e12:.2f} TFLOP/s in a plain product')
results['machine'] = {'name': name, 'torch': torch.__version__, 'dtype': run.dtype, 'TFLOP/s of a plain product': run.peak / 1e12,
                      'amx': bool(torch.cpu._is_amx_tile_supported()), 'avx512_bf16': bool(torch.cpu._is_avx512_bf16_supported())}
for part, f in (('step', steps), ('generate', generation), ('attention', attention)):
    if part in what.split(','):
        f()
path = bench_json or f"bench_{'cuda' if cuda else 'cpu'}.json"
with open(path, 'w') as f:
    json.dump(results, f, indent=1)
print(f'\nwritten to {path}')
