"""Train the masked transformer, the residual transformer or the length estimator:

    python train_mask.py config/toy.py                 # base tokens, DynMask's core model -> out_dir/mask.pt
    python train_mask.py config/toy.py --stage=res     # residual tokens                   -> out_dir/res.pt
    python train_mask.py config/toy.py --stage=len     # text -> length                    -> out_dir/len.pt
    python train_mask.py config/toy.py --spectral_attn=False --cfs_masking=False           # this is MoMask

Several GPUs or machines: torchrun --nproc_per_node=4 train_mask.py ... (batch_size stays the global batch).
Token ids and text vectors are computed once and live on the device; a step is look-ups and one transformer.
"""
import math
import os
import random
import time
import warnings
from dataclasses import asdict

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import text
from configurator import choose, configure, fail, leave, lr_at, setup
from model import LengthEstimator, MaskTransformer, ModelConfig, ResTransformer
from motion import load_meta, load_split
from vq import RVQVAE, CheckpointError, load, mean_over_ranks, save, tokenize

# -----------------------------------------------------------------------------
data = 'toy'                 # data/<data>/, from prepare_data.py
out_dir = ''                 # '' is out/<data>
vq = ''                      # tokenizer checkpoint, '' is out_dir/vq.pt
stage = 'mask'               # 'mask' | 'res' | 'len'
init_from = 'scratch'        # 'scratch' | 'resume': go on from <stage>_last.pt
text_encoder = 'clip'        # 'clip' | 'hash', see text.py
seed = 0
# DynMask: Table 4's switches (the third, das_sampling, belongs to sample.py and eval_t2m.py)
spectral_attn = True         # (I)  3.5, motion-aware attention
cfs_masking = True           # (II) 3.4, content-focused mask selection
window = 8                   # W of Eq 5, tokens
alpha0 = 0.3                 # Eq 14
fusion = 'rescaled'          # 'zscore' is Eq 13 to the letter; 'rescaled', 'temperature': model.py, Attention.fuse
msd_embed = 'codebook'       # x_t of Eq 4: 'codebook' | 'learned' (the letter)
msd_attn = 'visible'         # attention's MSD while training: of the 'visible' tokens | 'clean' (Algorithm 1's letter, leaks)
cfs_lambda = 0.3             # 3.4's lambda, the semantic quota
r_exp = 0                    # 3.4's expansion radius, tokens
cfs_noise = 1.0              # Gumbel noise on the scores; 0 is the letter: the same tokens of a clip in every epoch
# model, MoMask's sizes
token_init = 'codebook'      # token embeddings start as the tokenizer's base code vectors; 'random' is the reference
latent = 384
n_layers = 8
n_heads = 6
ff = 1024
dropout = 0.2
# optimisation
mask_iters = 150000
res_iters = 150000
len_iters = 2000
batch_size = 64              # over all ranks
lr = 2e-4
warmup = 2000
weight_decay = 1e-5
grad_clip = 1.0
cond_drop = 0.1              # share of texts dropped, for classifier-free guidance (residual: 0.2 in the release)
eval_every = 2000
log_every = 50
# machine
device = 'auto'              # 'auto' | 'cpu' | 'cuda'
dtype = 'auto'               # 'auto' (bfloat16 where the hardware multiplies in it) | 'bfloat16' | 'float32'
compile = False              # torch.compile, with batches padded to one length: pays on a GPU
config = configure(globals())
# -----------------------------------------------------------------------------
out_dir = out_dir or os.path.join('out', data)
vq = vq or os.path.join(out_dir, 'vq.pt')
folder = os.path.join('data', data)
for _key, *_options in (('stage', 'mask', 'res', 'len'), ('init_from', 'scratch', 'resume'), ('text_encoder', 'clip', 'hash'),
                        ('fusion', 'rescaled', 'zscore', 'temperature'), ('msd_embed', 'codebook', 'learned'),
                        ('msd_attn', 'visible', 'clean'), ('token_init', 'codebook', 'random')):
    choose(_key, globals()[_key], *_options)
if latent % (2 * n_heads):
    fail(f'latent is {latent} and n_heads {n_heads}: expected a latent that is a multiple of 2 x n_heads.')
run = setup(device, dtype, seed)
warnings.filterwarnings('ignore', 'The given NumPy array is not writable')
try:
    meta = load_meta(folder)[0]
    splits = {s: load_split(folder, s) for s in ('train', 'val')}
    tokenizer = RVQVAE.from_file(vq)
    last = load(os.path.join(out_dir, f'{stage}_last.pt'), 'nothing to resume, leave out --init_from') \
        if init_from == 'resume' else None
    vq_hash = tokenizer.fingerprint()
    if tokenizer.config.dim != meta['dim']:
        fail(f"{vq} codes {tokenizer.config.dim} features, data/{data} has {meta['dim']}: it was trained on another data set.")
    if last and last['device'] != run.device[:4]:
        fail(f"{out_dir}/{stage}_last.pt was written on {last['device']}, this is {run.device}: random states do not carry over.")
    if tokenizer.config.n_quantizers < 2 and stage == 'res':
        fail(f'{vq} has one quantizer: there are no residual layers to train.')
    if last and last['vq_hash'] != vq_hash:
        fail(f'{out_dir}/{stage}_last.pt was trained on the tokens of another tokenizer than {vq}: train it from scratch.')
    vectors = {s: text.encode([c['text'] for c in splits[s].captions], text_encoder, folder, run.device) for s in splits}
except (CheckpointError, ValueError, FileNotFoundError, RuntimeError) as e:
    fail(str(e))
N = meta['max_frames'] // 4  # longest clip in tokens
CROP = run.device == 'cpu' and not compile   # crop a batch to its longest; a GPU or a compiled graph prefers one static shape
POOL = 8 if CROP else 1      # similar lengths share a batch: on toy that leaves 60% of the positions to compute
V, Q = tokenizer.config.n_codes, tokenizer.config.n_quantizers


class Tokens:
    """A split as tensors on the device: ids of all clips in 4 phases (vq.tokenize), and one text vector per caption."""

    def __init__(self, name):
        split = splits[name]
        ids = tokenize(tokenizer, split, os.path.join(folder, f'tokens_{vq_hash}_{name}.npy'), run.device)
        put = lambda x: torch.as_tensor(x).to(run.device)
        self.ids, self.text = put(ids), put(vectors[name])
        self.length = put(split.length)
        self.start = torch.cumsum(self.length // 4, 0) - self.length // 4
        self.clip = put(np.array([c['clip'] for c in split.captions]))

    def batch(self, caption, generator=None):
        """caption (B,) indices -> ids (B, N, Q) long, c (B, 512), valid (B, N). With a generator the field's variation:
        a random phase, and one time in three one token less at either end."""
        clip, B = self.clip[caption], len(caption)
        draw = lambda high: torch.randint(high, (B,), device=run.device, generator=generator) if generator \
            else torch.zeros(B, dtype=torch.long, device=run.device)
        phase = draw(4)
        n = (self.length[clip] - phase) // 4
        shorter = ((draw(3) == 2) & (n > 1)).long()
        offset, n = shorter * draw(2), n - shorter
        t = torch.arange(N, device=run.device)
        if CROP:
            t = t[:int(n.max())]
        place = (self.start[clip] + offset)[:, None] + t
        ids = self.ids[phase[:, None], place.clamp(max=self.ids.shape[1] - 1)].long()
        return ids, self.text[caption], t < n[:, None]


# A stage's loss. Draws are made for the global batch, on every rank alike; a rank then takes its `rows` and divides by the
# global count, so that the sum over ranks is the loss of one process.

def mask_loss(ids, c, valid, rows=slice(None), generator=None, ratio=None):
    """Algorithm 1. With a ratio (validation) that share is masked, uniformly."""
    clean = ids[..., 0]
    masked, chosen = model.corrupt(clean, c, valid, cfs_masking and ratio is None, cfs_lambda, r_exp, cfs_noise, ratio, generator)
    described = model.descriptor(torch.where(valid, clean, V + 1)[rows]) if spectral_attn and msd_attn == 'clean' else None
    return cross_entropy(net(masked[rows], c[rows], valid[rows], described), clean[rows], chosen[rows]) / chosen.sum()


def res_loss(ids, c, valid, rows=slice(None), generator=None, ratio=None):
    """MoMask Eq 4, each row for one layer."""
    layer = 1 + torch.arange(len(ids), device=run.device) % (Q - 1)
    target = ids.gather(2, layer[:, None, None].expand(-1, ids.shape[1], 1))[..., 0]
    return cross_entropy(net(ids[rows], c[rows], valid[rows], None, rows.start or 0), target[rows], valid[rows]) / valid.sum()


def len_loss(ids, c, valid, rows=slice(None), generator=None, ratio=None):
    """Cross-entropy of the number of tokens."""
    return F.cross_entropy(net(c[rows]), valid[rows].sum(1), reduction='sum') / len(c)


stage_loss = {'mask': mask_loss, 'res': res_loss, 'len': len_loss}[stage]


def cross_entropy(logits, target, where):
    """Eq 3: sum of -log p over the marked positions."""
    return F.cross_entropy(logits.flatten(0, 1).float(), torch.where(where, target, -100).flatten(), reduction='sum')


@torch.no_grad()
def evaluate():
    """Validation cross-entropy. For base tokens at 30, 60 and 90% uniformly masked: methods compare only where the loss
    falls with the share, because only there does the model read its context (README, "What to look at")."""
    model.eval()
    out = {}
    for ratio in (0.3, 0.6, 0.9) if stage == 'mask' else (None,):
        g, total, picks = torch.Generator(run.device).manual_seed(1), 0.0, val_captions.split(batch_size)
        for pick in picks:
            batch = val.batch(pick)
            with run.autocast():
                total += stage_loss(*batch, generator=g, ratio=ratio)
        out[f'{ratio:.0%}' if ratio else stage] = float(total) / len(picks)
    model.train()
    return out


train, val = Tokens('train'), Tokens('val')
val_captions = torch.randperm(len(val.clip), generator=torch.Generator().manual_seed(0))[:512].to(run.device)
if stage == 'len':
    model = LengthEstimator(n_out=N + 1)
else:
    shape = ModelConfig(n_codes=V, code_dim=tokenizer.config.code_dim, n_quantizers=Q, latent=latent, n_layers=n_layers,
                        n_heads=n_heads, ff=ff, dropout=dropout, window=window, alpha0=alpha0, fusion=fusion, msd_embed=msd_embed,
                        token_init=token_init,
                        spectral_attn=spectral_attn and stage == 'mask')
    model = MaskTransformer(shape, tokenizer.quantizers[0].codebook) if stage == 'mask' else ResTransformer(shape)
model = model.to(run.device)
iters = {'mask': mask_iters, 'res': res_iters, 'len': len_iters}[stage]
optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
it0, best, history, pending = 0, float('inf'), [], []
if last:
    if last.get('config') != (None if stage == 'len' else asdict(shape)):
        fail(f'{out_dir}/{stage}_last.pt is a model of another config ({last["config"]}), this run asks for {asdict(shape)}.')
    model.load_state_dict(last['model'])
    optimizer.load_state_dict(last['optimizer'])
    run.generator.set_state(last['generator'])
    if run.world > 1:   # only one rank's dropout stream is in the file: go on with fresh ones
        torch.manual_seed(seed + run.rank + 1_000_003 * last['it'])
    else:
        torch.set_rng_state(last['rng'])
        if run.device != 'cpu':
            torch.cuda.set_rng_state(last['cuda_rng'])
    it0, best, history, pending = last['it'], last['best'], last['history'], last['pending']
net = torch.compile(model) if compile else model
net = DDP(net) if run.world > 1 else net
if batch_size % run.world:
    fail(f'batch_size is {batch_size}, which {run.world} ranks cannot share evenly.')
rows = slice(run.rank * batch_size // run.world, (run.rank + 1) * batch_size // run.world)
n_params = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and 'token_emb' not in n)   # those that multiply
if stage == 'res':
    n_params += (V + 1) * tokenizer.config.code_dim   # and one layer's projection
flops = 6 * n_params + (0 if stage == 'len' else 12 * n_layers * latent * N)    # per token: products, and attention's two


def checkpoint(name, **more):
    if run.main:
        save({'kind': stage, 'config': None if stage == 'len' else asdict(model.config), 'model': model.state_dict(),
              'settings': config, 'meta': meta, 'vq': os.path.abspath(vq), 'vq_hash': vq_hash, **more}, os.path.join(out_dir, name))


if run.main:
    print(f'{data}: {len(train.clip)} captions of {len(train.length)} clips, {train.ids.shape[1]} tokens; {stage} '
          f'{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M weights; {run.device} {run.dtype}, '
          f'{run.peak / 1e12:.2f} TFLOP/s in a plain product')
clock, since, tokens = time.perf_counter(), it0, 0
bar = tqdm(range(it0, iters), initial=it0, total=iters, disable=not run.main, desc=stage, mininterval=1)
for it in bar:
    for group in optimizer.param_groups:
        group['lr'] = lr_at(it, lr, warmup, iters)
    if not pending:   # draw POOL batches at once; where padding is cropped, deal them out by length, in random order
        pool = torch.randint(len(train.clip), (POOL * batch_size,), device=run.device, generator=run.generator)
        pool = pool[train.length[train.clip[pool]].argsort()] if POOL > 1 else pool
        pending = [pool.view(POOL, -1)[i] for i in random.Random(seed * 1_000_003 + it).sample(range(POOL), POOL)]
    ids, c, valid = train.batch(pending.pop(), run.generator)
    if stage != 'len':
        c = c * (torch.rand(len(c), 1, device=run.device, generator=run.generator) >= cond_drop)
    with run.autocast():
        loss = stage_loss(ids, c, valid, rows, run.generator) * run.world   # DDP averages over ranks
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    tokens += len(ids) * (1 if stage == 'len' else ids.shape[1])
    if (it + 1) % log_every == 0:
        loss = mean_over_ranks(loss)
        history.append((it + 1, loss))
        if not math.isfinite(loss):
            fail(f'The loss is {loss} at step {it}: lower --lr, or look for broken clips.')
        seconds = time.perf_counter() - clock
        bar.set_postfix_str(f'loss {loss:.3f}, {(it + 1 - since) * batch_size / seconds:.0f} samples/s, '
                            f'MFU {tokens / seconds * flops / run.world / run.peak:.0%}')
        clock, since, tokens = time.perf_counter(), it + 1, 0
    if (it + 1) % eval_every == 0 or it + 1 == iters:
        ce = evaluate()
        mean = sum(ce.values()) / len(ce)
        if mean < best:
            best = mean
            checkpoint(f'{stage}.pt', it=it + 1, val=ce)
        checkpoint(f'{stage}_last.pt', it=it + 1, best=best, history=history, pending=pending, optimizer=optimizer.state_dict(),
                   generator=run.generator.get_state(), rng=torch.get_rng_state(), device=run.device[:4],
                   **({} if run.device == 'cpu' else {'cuda_rng': torch.cuda.get_rng_state()}))
        if run.main:
            tqdm.write(f'step {it + 1}: val cross-entropy ' + ', '.join(f'{k} {v:.3f}' for k, v in ce.items()))
        clock, since, tokens = time.perf_counter(), it + 1, 0
if run.main:
    print(f'{out_dir}/{stage}.pt: val cross-entropy {best:.3f}.')
leave(run)
