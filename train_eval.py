"""Train the text-motion evaluator (lib/evaluator.py) on a prepared data set:

    python train_eval.py config/toy.py                        -> out/toy/evaluator.pt
    python train_eval.py config/toy.py --init_from=resume     continue an interrupted run

Stage 1 trains the movement autoencoder of Guo et al. 2022; stage 2 matches text and motion. Its
loss is the symmetric cross-entropy of picking the right partner in the batch by Euclidean distance,
which is what R-precision ranks. (After 300 steps on bandai, top-1 on val is 0.82 to 0.84; with the
paper's margin loss on one mismatched pair it was 0.65.)

Writes evaluator.pt (best R-precision on val), evaluator_last.pt (for resuming) and evaluator.json,
the R-precision of real and of mismatched test pairs.
"""
import lib.configurator   # first, to catch Ctrl-C during the imports
import json
import math
import os
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from lib.configurator import configure
from lib.data import Clips, fingerprint, load_meta
from lib.evaluator import Evaluator, Words, r_precision
from lib.runtime import (Losses, atomic_write, load, load_weights, must_be_writable, open_run,
                         restore_rng, rng_state, save, setup)

# -----------------------------------------------------------------------------
data = 'toy'             # data/<data>/, from prepare_data.py
out_dir = ''             # where evaluator.pt goes; '' is out/<data>
init_from = 'scratch'    # 'scratch' | 'resume': continue from evaluator_last.pt
overwrite = False        # allow 'scratch' to replace an existing evaluator
seed = 1
glove_dir = ''           # folder with Guo et al.'s our_vab_* files; '' is hashed word vectors
ev_movement = 256        # channels of the movement encoder (official 512)
ev_code = 256            # size of a movement (official 512)
ev_motion_hidden = 256   # width of the motion GRU (official 1024)
ev_text_hidden = 256     # width of the text GRU (official 512)
ev_out = 512             # size of the embedding (official 512)
ev_batch = 64            # clips per step
ev_ae_steps = 200        # steps of stage 1
ev_steps = 500           # steps of stage 2; toy and bandai need about 300
ev_lr = 5e-4             # peak learning rate of both stages: warm-up, then cosine to zero
ev_weight_decay = 1e-2
ev_eval_every = 100      # steps between validations and checkpoints
# machine
device = 'auto'          # 'auto' | 'cpu' | 'cuda'
dtype = 'auto'           # of training; embeddings are float32: 'auto' | 'bfloat16' | 'float32'
config = configure(globals())
# -----------------------------------------------------------------------------
folder = os.path.join('data', data)
out_dir = out_dir or os.path.join('out', data)
best_path, last_path, json_path = (os.path.join(out_dir, name) for name in (
    'evaluator.pt', 'evaluator_last.pt', 'evaluator.json'))
clock = time.time()
run = setup(device, dtype, seed)   # also seeds the weights
must_be_writable(json_path)
generator = torch.Generator().manual_seed(seed)   # of clips, captions and crops

# data
_, mean, std = load_meta(folder)
train, val, test = (Clips(folder, name) for name in ('train', 'val', 'test'))
identity = dict(data_hash=fingerprint(folder))
resumed = open_run(run, out_dir, 'evaluator', config, ev_steps,
                   ('ae_it', 'best', 'decoder', 'log_scale', 'optimizer', 'clip_generator', 'rng'),
                   **identity)
texts_of_clip = [set() for _ in train.split.start]
for caption in train.split.captions:
    texts_of_clip[caption['clip']].add(caption['text'])


def draw(clips, size, generator, crop):
    """Draw random clips -> motions, a list of (T, D), and one caption of each."""
    rows = torch.randperm(len(clips), generator=generator)[:size]
    picks, first, frames = clips.draw(rows, generator, crop)
    return clips.features(first, frames), [clips.split.captions[i] for i in picks]


def training_batch():
    """Cropped clips -> normalized motion (B, T, D) with zeros after each end, lengths (B,), and
    captions (B dicts)."""
    motions, captions = draw(train, ev_batch, generator, crop=True)
    x = [model.normalize(torch.from_numpy(motion).to(run.device)) for motion in motions]
    x = F.pad(pad_sequence(x, batch_first=True), (0, 0, 0, 4))
    return x, torch.tensor([len(motion) for motion in motions]), captions


def embed(model, clips):
    """Every clip once, uncropped, in a fixed shuffled order -> embeddings of captions and motion,
    each (N, d), and the captions (N str)."""
    motions, captions = draw(clips, len(clips), torch.Generator().manual_seed(0), crop=False)
    text = model.embed_text([caption['tokens'] for caption in captions]).numpy()
    motion = model.embed_motion(motions, [len(x) for x in motions]).numpy()
    return text, motion, [caption['text'] for caption in captions]


def matching_loss(text, motion, captions):
    """text, motion (B, d), captions (B dicts) -> scalar: cross-entropy in both directions. A text
    is right for all motions whose clips have it as a caption, with equal probability."""
    match = [[caption['text'] in texts_of_clip[other['clip']] for other in captions]
             for caption in captions]
    match = torch.tensor(match).to(text)
    logits = -torch.cdist(text, motion) * log_scale.exp()
    to_motion = (logits.log_softmax(1) * match).sum(1) / match.sum(1)
    to_text = (logits.log_softmax(0) * match).sum(0) / match.sum(0)
    return -0.5 * (to_motion + to_text).mean()


def update(loss, step, steps):
    """One optimizer step. The learning rate warms up linearly, then falls to zero as a cosine."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    optimizer.param_groups[0]['lr'] = ev_lr * min((step + 1) / min(100, steps), cosine)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]['params'], 1.0)
    optimizer.step()


def save_last(ae_it, it):
    """Save what resuming needs; ae_it and it are the finished steps of the two stages."""
    save(dict(kind='evaluator', ae_it=ae_it, it=it, best=best, settings=config,
              model=model.state_dict(), decoder=decoder.state_dict(), log_scale=log_scale.detach(),
              optimizer=optimizer.state_dict(), clip_generator=generator.get_state(),
              **rng_state(run), **identity), last_path)


# the model, the decoder that only stage 1 needs, and the learned sharpness of distances in stage 2
words = Words(glove_dir)
model = Evaluator(mean, std, words, ev_movement, ev_code, ev_motion_hidden, ev_text_hidden, ev_out,
                  words.dim).to(run.device)
decoder = nn.Sequential(
    nn.Conv1d(ev_code, ev_movement, 3, 1, 1), nn.LeakyReLU(0.2),
    nn.ConvTranspose1d(ev_movement, ev_movement, 4, 2, 1), nn.LeakyReLU(0.2),
    nn.ConvTranspose1d(ev_movement, len(mean) - 4, 4, 2, 1)).to(run.device)
log_scale = nn.Parameter(torch.zeros((), device=run.device))
n_parameters = sum(p.numel() for p in model.parameters())
print(f'{data}: {len(train)} train and {len(val)} val clips, {n_parameters / 1e6:.1f}M parameters')
ae_it, it, best = 0, 0, -1.0
if resumed:
    ae_it, it, best = (resumed[key] for key in ('ae_it', 'it', 'best'))
    load_weights(model, resumed['model'], last_path)
    load_weights(decoder, resumed['decoder'], last_path)
    log_scale.data.copy_(resumed['log_scale'])
    generator.set_state(resumed['clip_generator'])
    restore_rng(run, resumed, seed, last_path)
losses = Losses(lambda captions: [train.split.names[caption['clip']] for caption in captions],
                'lower --ev_lr')

# stage 1: the movement encoder learns to be decodable; the decoder is then discarded
params = [*model.movement_encoder.parameters(), *decoder.parameters()]
optimizer = torch.optim.AdamW(params, weight_decay=ev_weight_decay)
if resumed and ae_it < ev_ae_steps:
    optimizer.load_state_dict(resumed['optimizer'])
for step in tqdm(range(ae_it, ev_ae_steps), initial=ae_it, total=ev_ae_steps,
                 desc='1 autoencoder', mininterval=1):
    x, lengths, captions = training_batch()
    with run.autocast():
        z = model.movement_encoder(x[..., :-4])   # (B, T // 4, code)
        decoded = decoder(z.transpose(1, 2)).transpose(1, 2).float()
    valid = (torch.arange(x.shape[1]) < lengths[:, None])[..., None].to(x)
    error = F.smooth_l1_loss(decoded, x[..., :-4], reduction='none') * valid
    reconstruction = error.sum() / (valid.sum() * error.shape[2])
    jumps = (z[:, 1:] - z[:, :-1]).abs().mean()
    loss = reconstruction + 1e-3 * z.abs().mean() + 1e-3 * jumps   # Guo et al.'s weights
    update(loss, step, ev_ae_steps)
    losses.add(step + 1, loss, captions)
    if (step + 1) % ev_eval_every == 0 or step + 1 == ev_ae_steps:
        losses.look()
        tqdm.write(f'autoencoder, step {step + 1}: reconstruction {reconstruction.item():.4f}')
        save_last(step + 1, 0)

# stage 2: text and motion meet; the weights of the best R-precision on val are kept
optimizer = torch.optim.AdamW([*model.parameters(), log_scale], weight_decay=ev_weight_decay,
                              betas=(0.9, 0.99))
if resumed and it > 0:
    optimizer.load_state_dict(resumed['optimizer'])
for step in tqdm(range(it, ev_steps), initial=it, total=ev_steps, desc='2 matching', mininterval=1):
    model.train()
    x, lengths, captions = training_batch()
    word, tag, n_words = words.embed_captions([caption['tokens'] for caption in captions])
    with run.autocast():
        text = model.text_encoder(word.to(run.device), tag.to(run.device), n_words)
        motion = model.encode_motion(x, lengths)
    loss = matching_loss(text.float(), motion.float(), captions)
    update(loss, step, ev_steps)
    losses.add(step + 1, loss, captions)
    if (step + 1) % ev_eval_every == 0 or step + 1 == ev_steps:
        losses.look()
        text, motion, captions = embed(model, val)
        top = r_precision(text, motion, min(32, len(val)), captions)
        tqdm.write(f'step {step + 1}: loss {loss.item():.3f}, '
                   f'val top-1 {top[0]:.3f} top-2 {top[1]:.3f} top-3 {top[2]:.3f}')
        if top.mean() >= best:
            best = float(top.mean())
            model.save(best_path, step + 1, config, **identity)
        save_last(ev_ae_steps, step + 1)

# mark the best weights as those of a finished training; Evaluator.load refuses any others
finished = load(best_path, 'train again with --overwrite=True', 'evaluator')
save({**finished, 'it': ev_steps, 'settings': config}, best_path)

# does it tell right from wrong captions of clips that it has never seen?
model = Evaluator.load(best_path, glove_dir).to(run.device)
text, motion, captions = embed(model, test)
N, n_texts, batch = len(test), len(set(captions)), min(32, len(test))
wrong = (np.arange(N) + np.random.default_rng(0).integers(1, N, size=N)) % N
r_real = r_precision(text, motion, batch, captions)
r_wrong = r_precision(text[wrong], motion, batch)
seconds = round(time.time() - clock, 1)
with atomic_write(json_path, 'w') as f:
    json.dump(dict(data=data, clips=N, texts=n_texts, batch=batch, r_precision=r_real.tolist(),
                   r_precision_shuffled=r_wrong.tolist(), seconds=seconds), f, indent=1)
print(f'{N} test clips, {n_texts} different captions, batches of {batch}\n'
      f'R-precision top-1/2/3: real pairs {r_real.round(3)}, wrong captions {r_wrong.round(3)}\n'
      f'{seconds:.0f} s; written to {best_path}')
