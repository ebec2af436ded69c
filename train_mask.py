"""Train the masked transformer, the residual transformer or the length estimator:

    python train_mask.py config/toy.py                  # base tokens           -> out_dir/mask.pt
    python train_mask.py config/toy.py --stage=res      # residual tokens       -> out_dir/res.pt
    python train_mask.py config/toy.py --stage=len      # text -> length        -> out_dir/len.pt
    python train_mask.py config/toy.py config/dynmask.py --out_dir=out/dynmask --vq=out/toy/vq.pt
    torchrun --nproc_per_node=4 train_mask.py ...       # batch_size stays the global batch

Token ids and text vectors are computed once and live on the device: a step is look-ups and one
transformer.
"""
import math
import os
import random
import time
from dataclasses import asdict

import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import hgm3
from lib.configurator import UserError, configure
from lib.data import (FRAMES_PER_TOKEN, Tokens, by_length, fingerprint, load_meta, load_split,
                  tokenize)
from hgm3 import HardTokenMining, hard_share, show
from model import (LengthEstimator, LossPredictor, MaskTransformer, ModelConfig, ResTransformer,
                   make_optimizers)
from lib.runtime import Losses, count_flops, leave, load_named, lr_at, open_run, save, setup
from lib.text import encode
from vq import load_tokenizer

# -----------------------------------------------------------------------------
data = 'toy'                 # data/<data>/, from prepare_data.py
out_dir = ''                 # '' is out/<data>
vq = ''                      # tokenizer checkpoint, '' is out_dir/vq.pt
stage = 'mask'               # 'mask' | 'res' | 'len'
init_from = 'scratch'        # 'scratch' | 'resume': go on from <stage>_last.pt
overwrite = False            # from scratch also where checkpoints of this stage are
text_encoder = 'clip'        # 'clip' | 'hash', see text.py
text = 'clauses'             # 'sentence' (MoMask, DynMask) | 'clauses' | 'words' | 'graph' (HGM3)
seed = 0
# DynMask: Table 4's switches (the third, das_sampling, belongs to sample.py and eval_t2m.py)
# Off: here they do not pay (RESULTS.md, "What pays"). config/dynmask.py switches both on
spectral_attn = False        # (I)  3.5, motion-aware attention
mask_by = 'random'           # (II) 3.4: 'msd' | 'velocity' | 'random' | 'loss' | 'msd+loss'
window = 8                   # W of Eq 5, tokens
alpha0 = 0.3                 # Eq 14
alpha_schedule = 'decay'     # Eq 14 over the layers: 'decay' | 'constant' | 'reversed'
fusion = 'rescaled'          # 'zscore' (Eq 13 to the letter) | 'rescaled' | 'temperature'
msd_embed = 'codebook'       # x_t of Eq 4: 'codebook' | 'learned'
msd_gap = 'interp'           # velocities over masked tokens: interpolated | 'zero'
omega = 'energy'             # Eq 8: the norm of the spectrum | 'flatness', the letter
msd_attn = 'visible'         # MSD of 'visible' tokens | 'clean' (Alg. 1: leaks) | own 'guess'
cfs_lambda = 0.3             # 3.4's lambda, the semantic quota
cfs_noise = 1.0              # Gumbel noise on the scores; 0 is the letter: one mask for all epochs
cfs_share = 1.0              # share of the clips that (II) masks, the others at random
cfs_ramp = 0.0               # it grows up to that over this share of the steps
r_exp = 0                    # 3.4's expansion radius, tokens
# HGM3 (its equations): --text=graph and --mask_by=loss
hard_first = 0.0             # Eq 8's alpha_0, share of the masked that the teacher chooses
hard_last = 0.5              # alpha_T
teacher_momentum = 0.999     # Eq 6's lambda, unstated in the paper
remask = True                # 80/10/10 as BERT (MoMask Table 2); False: all chosen become [MASK]
res_draw = 'cycle'           # which layer a row of --stage=res learns: in turn | 'release'
# model, MoMask's sizes
rotary = False               # places also turn queries and keys (RoPE): RESULTS.md
neighbours = 0               # tokens on either side that a token's embedding reads as well
token_init = 'codebook'      # token embeddings start as code vectors | 'random' (MoMask)
latent = 384
n_layers = 8
n_heads = 6
ff = 1024
dropout = 0.2
# optimization
optimizer = 'muon'           # for the trunk's matrices, AdamW for the rest | 'adamw' (papers)
mask_iters = 150000
res_iters = 150000
len_iters = 2000
batch_size = 64              # over all ranks
lr = 2e-4
warmup = 2000
weight_decay = 1e-5
grad_clip = 1.0              # MoMask does not clip
cond_drop = 0.1              # share of texts dropped, for classifier-free guidance
res_cond_drop = 0.1          # the same for the residual transformer (0.2 in the release)
eval_every = 2000
log_every = 50
# machine
device = 'auto'              # 'auto' | 'cpu' | 'cuda'
dtype = 'auto'               # 'auto' (bfloat16 where hardware has it) | 'bfloat16' | 'float32'
compile = False              # torch.compile, with batches padded to one length: pays on a GPU
config = configure(globals(), init_from=('scratch', 'resume'))
# -----------------------------------------------------------------------------
out_dir = out_dir or os.path.join('out', data)
vq = vq or os.path.join(out_dir, 'vq.pt')
folder = os.path.join('data', data)
run = setup(device, dtype, seed)
if latent % (2 * n_heads):
    raise UserError(f'latent is {latent} and n_heads {n_heads}: expected a latent that is a '
                    'multiple of 2 x n_heads.')
if batch_size % run.world:
    raise UserError(f'batch_size is {batch_size}, which {run.world} ranks cannot share evenly.')

# the tokenizer and its tokens
meta, _, _ = load_meta(folder)
tokenizer = load_tokenizer(vq)
vq_hash = tokenizer.fingerprint()
V, Q = tokenizer.config.n_codes, tokenizer.config.n_quantizers
if tokenizer.config.dim != meta['dim']:
    raise UserError(f"{vq} codes {tokenizer.config.dim} features, data/{data} has {meta['dim']}: "
                    'it was trained on another data set.')
if Q < 2 and stage == 'res':
    raise UserError(f'{vq} has one quantizer: there are no residual layers to train.')
train_split, val_split = load_split(folder, 'train'), load_split(folder, 'val')
identity = dict(data_hash=fingerprint(folder), vq_hash=vq_hash)
last = open_run(run, out_dir, stage, config, ('best', 'history', 'pending', 'optimizers',
                                              'generator', 'rng', 'device', 'miner'), **identity)


def open_tokens(name, split):
    ids = tokenize(tokenizer, split, os.path.join(folder, f'tokens_{vq_hash}_{name}.npy'),
                   run.device)
    captions = [caption['text'] for caption in split.captions]
    if not captions:
        raise UserError(f'{folder}/{name}_captions.json is empty: text is what this learns from.')
    nodes = None
    if text == 'graph':
        nodes = [hgm3.graph(caption['tokens']) for caption in split.captions]
    written = encode(captions, text_encoder, text, nodes, folder, run.device)
    return Tokens(split, ids, *written, run.device)


train, val = open_tokens('train', train_split), open_tokens('val', val_split)
tags = None
if text == 'graph':   # for prompts, which have no tags
    tags = hgm3.tag_table(caption['tokens'] for caption in train_split.captions)
N = meta['max_frames'] // FRAMES_PER_TOKEN   # longest clip in tokens
TO_LONGEST = run.device == 'cpu' and not compile   # pad a batch to its longest | to one shape
WIDTH = None if TO_LONGEST else N
POOL = 8 if TO_LONGEST else 1   # similar lengths share a batch: on toy 60% of positions are left
some = torch.randperm(len(val.clip_of), generator=torch.Generator().manual_seed(0))[:512]
val_captions = some.to(run.device)

# model
if stage == 'len':
    shape = None
    model = LengthEstimator(n_out=N + 1)
else:
    shape = ModelConfig(
        n_codes=V, code_dim=tokenizer.config.code_dim, n_quantizers=Q, latent=latent,
        n_layers=n_layers, n_heads=n_heads, ff=ff, dropout=dropout, rotary=rotary,
        neighbours=neighbours, token_init=token_init,
        spectral_attn=spectral_attn and stage == 'mask', window=window, alpha0=alpha0,
        alpha_schedule=alpha_schedule, fusion=fusion, msd_embed=msd_embed, msd_gap=msd_gap,
        omega=omega, res_draw=res_draw, graph=text == 'graph')
    codebooks = [quantizer.codebook for quantizer in tokenizer.quantizers]
    if stage == 'mask':
        model = MaskTransformer(shape, codebooks[0])
    else:
        model = ResTransformer(shape, codebooks)
model = model.to(run.device)
miner = None
if stage == 'mask' and 'loss' in mask_by:
    # the masked transformer's random numbers stay what they are without a loss predictor
    with torch.random.fork_rng(devices=[]):
        miner = HardTokenMining(model, LossPredictor(shape), teacher_momentum).to(run.device)
learner = miner or model   # all that is trained
iters = {'mask': mask_iters, 'res': res_iters, 'len': len_iters}[stage]

optimizers = make_optimizers(learner, optimizer, lr, weight_decay)

# Draws are made for the global batch, on every rank alike. A rank then takes its `rows` and divides
# by the global count, so that the mean over ranks is the loss of one process.
per_rank = batch_size // run.world
rows = slice(run.rank * per_rank, (run.rank + 1) * per_rank)


@run.autocast()
def compute_loss(net, ids, c, c_valid, valid, rows, share=None, generator=None):
    """This stage's loss on some rows of a batch. With a share (validation) so many tokens are
    hidden, at random."""
    if stage == 'len':
        n = valid[rows].sum(1)
        return net(c[rows], c_valid[rows], n) * len(n) / len(c)
    if stage == 'res':
        c, c_valid = drop_text(c, c_valid, res_cond_drop, generator)
        row0 = rows.start or 0
        return net(ids[rows], c[rows], c_valid[rows], valid[rows], row0=row0,
                   n_targets=valid.sum())

    base = ids[..., 0]
    training = share is None
    signal = mask_by if training else 'random'
    if text == 'graph' and training:
        c_valid = show(c_valid, level_now)
    difficulty = None
    if miner and training:
        difficulty = miner.difficulty(base, c, c_valid, valid)
    masked, chosen = model.mask_tokens(
        base, c, valid, signal, lam=cfs_lambda, r_exp=r_exp, noise=cfs_noise, cfs_share=cfs_now,
        remask=remask, share=share, difficulty=difficulty, hard_share=hard_now, generator=generator)
    targets = torch.where(chosen, base, -100)
    described = None
    if spectral_attn and msd_attn == 'clean' and training:   # validation sees what inference sees
        described = model.spectrum(torch.where(valid, base, model.PAD)[rows])
    c, c_valid = drop_text(c, c_valid, cond_drop, generator)   # after Eq 10 has read it
    inputs = masked[rows], c[rows], c_valid[rows], valid[rows]
    if spectral_attn and msd_attn == 'guess':
        with torch.no_grad():
            guess = model(*inputs).argmax(-1)
        guess = torch.where(masked[rows] == model.MASK, guess, masked[rows])
        described = model.spectrum(torch.where(valid[rows], guess, model.PAD))
    if miner and training:
        return net(*inputs, targets[rows], chosen.sum(), described, base[rows])
    return net(*inputs, targets[rows], chosen.sum(), described)


def drop_text(c, c_valid, probability, generator):
    """A share of texts (B, m, 512) becomes no text: zeros, of which only the sentence's is seen.
    All stay while validating."""
    if not model.training:
        return c, c_valid
    stays = torch.rand(len(c), 1, 1, device=c.device, generator=generator) >= probability
    c_valid = torch.cat([c_valid[:, :1], c_valid[:, 1:] * stays[..., 0]], 1)
    return c * stays, c_valid


@torch.no_grad()
def evaluate():
    """Validation cross-entropy. For base tokens at 30, 60 and 90% hidden: methods compare only
    where the three have parted: before, the model reads text and position alone."""
    model.eval()
    losses = {}
    for share in (0.3, 0.6, 0.9) if stage == 'mask' else (None,):
        g = torch.Generator(run.device).manual_seed(1)
        batches = val_captions.split(batch_size)
        total = 0.0
        for captions in batches:
            batch = val.batch(captions, width=WIDTH)
            total += compute_loss(model if miner else net, *batch, slice(None), share, g)
        losses[f'{share:.0%}' if share else stage] = float(total) / len(batches)
    model.train()
    return losses


def checkpoint(name, **more):
    if run.main:
        saved = dict(kind=stage, config=shape and asdict(shape), model=model.state_dict(),
                     settings=config, meta=meta, vq=os.path.abspath(vq), tags=tags, **identity,
                     teacher=miner and miner.teacher.state_dict(), **more)
        save(saved, os.path.join(out_dir, name))


# start, or go on
it0 = 0
best = math.inf
cfs_now, hard_now, level_now = cfs_share, hard_first, 3
history = []
pending = []   # batches of captions that are drawn, and not yet used
batch = val.batch(val_captions[:8], width=WIDTH)
g = torch.Generator(run.device)   # not run's: what it draws changes nothing
flops = count_flops(learner, lambda: compute_loss(learner, *batch, slice(None), generator=g))
flops /= batch[-1].numel()   # of a token
if last:
    path = os.path.join(out_dir, f'{stage}_last.pt')
    if last['device'] != run.device[:4]:
        raise UserError(f"{path} was written on {last['device']}, this is {run.device}: random "
                        'states do not carry over.')
    load_named(model, last['model'], path)
    if miner:
        load_named(miner, last['miner'], path)
    for optim, state in zip(optimizers, last['optimizers'], strict=True):
        optim.load_state_dict(state)
    run.generator.set_state(last['generator'])
    it0, best = last['it'], last['best']
    history, pending = last['history'], last['pending']
    if run.world > 1:   # only one rank's dropout stream is in the file: go on with fresh ones
        torch.manual_seed(seed + run.rank + 1_000_003 * it0)
    else:
        torch.set_rng_state(last['rng'])
        if run.device != 'cpu':
            torch.cuda.set_rng_state(last['cuda_rng'])
net = torch.compile(learner) if compile else learner
if run.world > 1:
    net = DDP(net)
if run.main:
    n_params = sum(p.numel() for p in model.parameters())
    print(f'{data}: {len(train.clip_of)} captions of {len(train.length)} clips, '
          f'{train.ids.shape[1]} tokens; {stage} {n_params / 1e6:.1f}M weights; {run.device} '
          f'{run.dtype}, {run.peak / 1e12:.2f} TFLOP/s in a plain product')

# train
losses = Losses(lambda captions: train_split.names[train.clip_of[captions].cpu()], 'lower --lr')
clock, since, tokens = time.perf_counter(), it0, 0
bar = tqdm(range(it0, iters), initial=it0, total=iters, disable=not run.main, desc=stage,
           mininterval=1)
for it in bar:
    for optim in optimizers:
        for group in optim.param_groups:
            group['lr'] = lr_at(it, lr, warmup, iters)
    cfs_now = cfs_share * min(1.0, (it + 1) / max(1.0, cfs_ramp * iters))
    hard_now = hard_share(it, iters, hard_first, hard_last)
    level_now = 1 + it % 3   # HGM3 Eq 13: its three levels in turn

    if not pending:   # draw POOL batches at once, and deal them out by length in random order
        pool = train.draw(POOL * batch_size, run.generator)
        groups = by_length(train.length[train.clip_of[pool]], batch_size)
        order = random.Random(seed * 1_000_003 + it).sample(range(POOL), POOL)
        pending = [pool[groups[i]] for i in order]
    captions = pending.pop()
    batch = train.batch(captions, run.generator, WIDTH)

    loss = compute_loss(net, *batch, rows, generator=run.generator)
    loss = loss * run.world   # DDP averages over ranks
    loss.backward()
    for part in (model, miner.student) if miner else (model,):
        torch.nn.utils.clip_grad_norm_(part.parameters(), grad_clip)
    for optim in optimizers:
        optim.step()
    learner.zero_grad(set_to_none=True)
    if miner:
        miner.update_teacher()

    tokens += batch[-1].numel()
    losses.add(it + 1, loss, captions)
    logs = (it + 1) % log_every == 0
    saves = (it + 1) % eval_every == 0 or it + 1 == iters
    if logs or saves:
        loss = losses.look()
    if logs:
        history.append((it + 1, loss))
        seconds = time.perf_counter() - clock
        rate = (it + 1 - since) * batch_size / seconds
        mfu = tokens / seconds * flops / run.world / run.peak
        bar.set_postfix_str(f'loss {loss:.3f}, {rate:.0f} samples/s, MFU {mfu:.0%}')
        clock, since, tokens = time.perf_counter(), it + 1, 0

    if saves:
        val_losses = evaluate()
        mean = sum(val_losses.values()) / len(val_losses)
        losses.refuse('validation error', mean, it + 1, captions)
        if mean < best:
            best = mean
            checkpoint(f'{stage}.pt', it=it + 1, val=val_losses)
        cuda_rng = {} if run.device == 'cpu' else {'cuda_rng': torch.cuda.get_rng_state()}
        checkpoint(f'{stage}_last.pt', it=it + 1, best=best, history=history, pending=pending,
                   optimizers=[optim.state_dict() for optim in optimizers],
                   generator=run.generator.get_state(), rng=torch.get_rng_state(),
                   device=run.device[:4], miner=miner and miner.state_dict(), **cuda_rng)
        if run.main:
            figures = ', '.join(f'{name} {loss:.3f}' for name, loss in val_losses.items())
            tqdm.write(f'step {it + 1}: val cross-entropy {figures}')
        clock, since, tokens = time.perf_counter(), it + 1, 0

if run.main:
    print(f'{out_dir}/{stage}.pt: val cross-entropy {best:.3f}.')
leave(run)
