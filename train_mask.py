"""Train the masked transformer, the residual transformer or the length estimator:

    python train_mask.py config/toy.py                  # base tokens           -> out_dir/mask.pt
    python train_mask.py config/toy.py --stage=res      # residual tokens       -> out_dir/res.pt
    python train_mask.py config/toy.py --stage=len      # text -> length        -> out_dir/len.pt
    python train_mask.py config/toy.py config/dynmask.py --out_dir=out/dynmask --vq=out/toy/vq.pt
    torchrun --nproc_per_node=4 train_mask.py ...       # batch_size stays the global batch

Token ids and text vectors are computed once and stay on the device, so a training step consists of
look-ups and one transformer.
"""
import lib.configurator   # first, to catch Ctrl-C during the imports
import math
import os
import random
import time
from dataclasses import asdict, fields

import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from hgm3 import HardTokenMining, hard_share, training_level, visible_nodes
from lib.configurator import UserError, configure
from lib.data import FRAMES_PER_TOKEN, by_length, fingerprint, load_meta, load_split, open_tokens
from lib.runtime import (Losses, check_memory, count_flops, leave, load_weights, lr_at,
                         make_optimizers, open_run, restore_rng, rng_state, save, setup)
from lib.text import tag_table
from masking import drop_text, mask_tokens
from model import LengthEstimator, LossPredictor, MaskTransformer, ModelConfig, ResTransformer
from vq import load_tokenizer

# -----------------------------------------------------------------------------
data = 'toy'                 # data/<data>/, from prepare_data.py
out_dir = ''                 # '' is out/<data>
vq = ''                      # tokenizer checkpoint, '' is out_dir/vq.pt
stage = 'mask'               # 'mask' | 'res' | 'len'
init_from = 'scratch'        # 'scratch' | 'resume': continue from <stage>_last.pt
overwrite = False            # replace checkpoints of this stage that are there
text_encoder = 'clip'        # 'clip' | 'hash', see lib/text.py
text = 'clauses'             # 'sentence' (MoMask, DynMask) | 'clauses' | 'graph' (HGM3)
seed = 0
# DynMask: two of Table 4's switches (the third, das_sampling, is a setting of decoding)
spectral_attn = False        # (I)  3.5, motion-aware attention
mask_by = 'random'           # (II) 3.4: 'random' | 'msd' | 'velocity' | 'loss' | 'msd+loss'
window = 8                   # W of Eq 5, tokens
alpha0 = 0.3                 # Eq 14
fusion = 'rescaled'          # 'rescaled' | 'zscore', Eq 13 as published: see model.Attention
msd_embed = 'codebook'       # x_t of Eq 4: 'codebook' vectors | 'learned', the model's embeddings
msd_gap = 'interp'           # velocities at masked tokens: 'interp'olated | 'zero'
omega = 'energy'             # Eq 8: 'energy', the norm of the spectrum | 'flatness', as published
msd_attn = 'visible'         # MSD of 'visible' tokens | 'clean' (Alg. 1; leaks) | own 'guess'
cfs_lambda = 0.3             # 3.4's lambda, the semantic quota
cfs_noise = 1.0              # Gumbel noise on the scores; published 0: the same ranking every epoch
cfs_share = 1.0              # share of the clips masked by (II); the others are masked at random
cfs_ramp = 0.0               # that share grows from 0 over this part of the training
r_exp = 0                    # 3.4's expansion radius, tokens
# model: MoMask's sizes
rotary = False               # rotary positions in every layer (LOG.md)
neighbours = 0               # a token's embedding also reads so many tokens on either side
token_init = 'codebook'      # token embeddings start as 'codebook' vectors | 'random' (MoMask)
latent = 384
n_layers = 8                 # as in the official weights; MoMask's paper says 6
n_heads = 6
ff = 1024
dropout = 0.2
# optimization
optimizer = 'muon'           # 'muon' for the layers' matrices | 'adamw' for everything (papers)
mask_iters = 150000
res_iters = 150000
len_iters = 2000
batch_size = 64              # over all ranks
lr = 2e-4
warmup = 2000
weight_decay = 1e-5
grad_clip = 1.0              # MoMask does not clip
cond_drop = 0.1              # share of texts dropped, for classifier-free guidance
eval_every = 2000
log_every = 50
# machine
device = 'auto'              # 'auto' | 'cpu' | 'cuda'
dtype = 'auto'               # 'auto' (bfloat16 where hardware has it) | 'bfloat16' | 'float32'
compile = False              # torch.compile, with batches padded to one length: for GPUs
config = configure(globals())
# -----------------------------------------------------------------------------
if text == 'graph' and stage != 'mask':   # HGM3: only the masked transformer reads the graph
    text = config['text'] = 'sentence'
out_dir = out_dir or os.path.join('out', data)
vq = vq or os.path.join(out_dir, 'vq.pt')
folder = os.path.join('data', data)
run = setup(device, dtype, seed)
if latent % (2 * n_heads):
    raise UserError(f'latent is {latent} and n_heads {n_heads}, expected a latent that is a '
                    'multiple of 2 x n_heads.')
if batch_size % run.world:
    raise UserError(f'batch_size is {batch_size}, expected a multiple of the {run.world} ranks.')

# the tokenizer, token ids and text
meta, _, _ = load_meta(folder)
tokenizer = load_tokenizer(vq)
vq_hash = tokenizer.fingerprint()
if tokenizer.config.dim != meta['dim']:
    raise UserError(f"{vq} codes {tokenizer.config.dim} features, but data/{data} has "
                    f"{meta['dim']}: it was trained on another data set.")
if tokenizer.config.n_quantizers < 2 and stage == 'res':
    raise UserError(f'{vq} has one quantizer, so there are no residual layers to train.')
train_split, val_split = load_split(folder, 'train'), load_split(folder, 'val')
identity = dict(data_hash=fingerprint(folder), vq_hash=vq_hash)
iters = {'mask': mask_iters, 'res': res_iters, 'len': len_iters}[stage]
last = open_run(run, out_dir, stage, config, iters,
                ('best', 'history', 'pending', 'optimizers', 'generator', 'rng', 'device', 'world',
                 'miner'), **identity)
train, val = (open_tokens(folder, name, split, tokenizer, text_encoder, text, run.device)
              for name, split in (('train', train_split), ('val', val_split)))
tagged = (caption['tokens'] for caption in train_split.captions)
tags = tag_table(tagged) if text == 'graph' else None   # for prompts, which have no tags
N = meta['max_frames'] // FRAMES_PER_TOKEN   # longest clip in tokens
TO_LONGEST = run.device == 'cpu' and not compile   # pad a batch to its longest clip, or to N
WIDTH = None if TO_LONGEST else N
POOL = 8 if TO_LONGEST else 1   # batches sorted by length together: 40% fewer positions on toy
shuffled = torch.randperm(len(val.clip_of), generator=torch.Generator().manual_seed(0))
val_captions = shuffled[:512].to(run.device)

# model
if stage == 'len':
    shape = None
    model = LengthEstimator(n_out=N + 1)
else:
    given = dict(n_codes=tokenizer.config.n_codes, code_dim=tokenizer.config.code_dim,
                 n_quantizers=tokenizer.config.n_quantizers, graph=text == 'graph')
    settings = {field.name: config[field.name] for field in fields(ModelConfig)
                if field.name in config}
    shape = ModelConfig(**settings, **given)
    codebooks = [quantizer.codebook for quantizer in tokenizer.quantizers]
    Network = MaskTransformer if stage == 'mask' else ResTransformer
    check_memory(lambda: Network(shape))
    model = Network(shape, codebooks[0] if stage == 'mask' else codebooks)
model = model.to(run.device)
miner = None
if stage == 'mask' and mask_by in ('loss', 'msd+loss'):
    # the same random numbers for the masked transformer as without a loss predictor
    with torch.random.fork_rng(devices=[]):
        miner = HardTokenMining(model, LossPredictor(shape)).to(run.device)
learner = miner or model   # everything that is trained
optimizers = make_optimizers(learner, optimizer, lr, weight_decay)

# Random numbers are drawn for the global batch, the same on every rank. A rank then takes its
# `rows`, and divides by the global count, so that the mean over ranks is the loss of one process.
per_rank = batch_size // run.world
rows = slice(run.rank * per_rank, (run.rank + 1) * per_rank)


@run.autocast()
def compute_loss(net, ids, c, role, valid, rows, masked_share=None, generator=None):
    """This stage's loss on some rows of a batch. masked_share (validation): mask that share of the
    tokens, at random."""
    if stage == 'len':
        n = valid[rows].sum(1)
        return net(c[rows], role[rows], n) * len(n) / len(c)
    if stage == 'res':
        if model.training:
            c, role = drop_text(c, role, cond_drop, generator)
        return net(ids[rows], c[rows], role[rows], valid[rows], row0=rows.start or 0,
                   n_targets=valid.sum())

    base = ids[..., 0]
    signal, difficulty = 'random', None
    if model.training:
        signal = mask_by
        role = visible_nodes(role, level_now) if text == 'graph' else role
        difficulty = miner and miner.difficulty(base, c, role, valid)
    masked, chosen = mask_tokens(model, base, c, valid, signal, masked_share, generator,
                                 lam=cfs_lambda, r_exp=r_exp, noise=cfs_noise, cfs_share=cfs_now,
                                 difficulty=difficulty, hard_share=hard_now)
    targets = torch.where(chosen, base, -100)
    if model.training:   # after Eq 10 has read the text
        c, role = drop_text(c, role, cond_drop, generator)
    inputs = masked[rows], c[rows], role[rows], valid[rows]

    # the sequence whose MSD motion-aware attention uses; without one it is that of `masked`
    spectrum = None
    sequence = None
    if spectral_attn and msd_attn == 'clean' and model.training:   # decoding has no clean tokens
        sequence = base[rows]
    if spectral_attn and msd_attn == 'guess':
        with torch.no_grad():
            guess = model(*inputs).argmax(-1)
        sequence = torch.where(masked[rows] == model.MASK, guess, masked[rows])
    if sequence is not None:
        spectrum = model.spectrum(torch.where(valid[rows], sequence, model.PAD))

    if miner and model.training:
        return net(*inputs, targets[rows], chosen.sum(), spectrum, base[rows])
    return net(*inputs, targets[rows], chosen.sum(), spectrum)


@torch.no_grad()
def evaluate():
    """Validation cross-entropy, of base tokens with 30, 60 and 90% masked. As long as the three are
    about equal the model does not use its context yet, and comparing methods says nothing."""
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


# start or resume
it0, best = 0, math.inf
cfs_now, hard_now, level_now = cfs_share, hard_share(0, 1), 3
history, pending = [], []   # pending: batches of captions that are drawn but not yet used
batch = val.batch(val_captions[:8], width=WIDTH)
g = torch.Generator(run.device)   # not run.generator, whose draws must not depend on this
flops = count_flops(learner, lambda: compute_loss(learner, *batch, slice(None), generator=g))
flops_per_token = flops / batch[-1].numel()
if last:
    path = os.path.join(out_dir, f'{stage}_last.pt')
    load_weights(model, last['model'], path)
    if miner:
        load_weights(miner, last['miner'], path)
    for optim, state in zip(optimizers, last['optimizers'], strict=True):
        optim.load_state_dict(state)
    restore_rng(run, last, seed, path)
    it0, best, history, pending = (last[key] for key in ('it', 'best', 'history', 'pending'))
net = torch.compile(learner) if compile else learner
if run.world > 1:
    net = DDP(net)
if run.main:
    n_params = sum(p.numel() for p in model.parameters())
    print(f'{data}: {len(train.clip_of)} captions of {len(train.length)} clips; {stage}, '
          f'{n_params / 1e6:.1f}M weights; {run.device} {run.dtype}')

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
    hard_now = hard_share(it, iters)
    level_now = training_level(it)

    if not pending:   # draw POOL batches, sort their clips by length, deal them in random order
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
        bar.set_postfix_str(f'loss {loss:.3f}, {(it + 1 - since) * batch_size / seconds:.0f} '
                            f'samples/s, {tokens * flops_per_token / seconds / 1e12:.2f} TFLOP/s')
        clock, since, tokens = time.perf_counter(), it + 1, 0

    if saves:
        val_losses = evaluate()
        mean = sum(val_losses.values()) / len(val_losses)
        losses.refuse('validation error', mean, it + 1, captions)
        if mean < best:
            best = mean
            checkpoint(f'{stage}.pt', it=it + 1, val=val_losses)
        checkpoint(f'{stage}_last.pt', it=it + 1, best=best, history=history, pending=pending,
                   optimizers=[optim.state_dict() for optim in optimizers],
                   miner=miner and miner.state_dict(), **rng_state(run))
        if run.main:
            figures = ', '.join(f'{name} {loss:.3f}' for name, loss in val_losses.items())
            tqdm.write(f'step {it + 1}: val cross-entropy {figures}')
        clock, since, tokens = time.perf_counter(), it + 1, 0

if run.main:
    print(f'{out_dir}/{stage}.pt: val cross-entropy {best:.3f}.')
leave(run)
