"""Train a text-motion evaluator (evaluator.py) on prepared data, and show that it is a good judge.

    python train_eval.py config/toy.py                       -> out/toy/evaluator.pt, evaluator.json
    python train_eval.py config/toy.py --ev_test_only=True   only the evidence, of the saved one

Stage 1 is the movement autoencoder of Guo et al. 2022, stage 2 matches text and motion. Its loss is
the symmetric cross-entropy of picking the right partner in the whole batch by Euclidean distance,
the very quantity that R-precision ranks (after 300 steps on bandai a val top-1 of 0.82 to 0.84; the
paper's loss, which pushes one mismatched pair beyond a margin, had 0.65). A motion is a text's
right partner when the text is one of its clip's captions.
"""
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
from lib.data import Clips, load_meta
from lib.evaluator import Evaluator, Words, fid, r_precision
from lib.runtime import Losses, atomic_write, must_be_writable, open_run, setup

# -----------------------------------------------------------------------------
data = 'toy'             # data set under data/
data_dir = ''            # its folder; '' is data/<data>
out_dir = ''             # where evaluator.pt goes; '' is out/<data>
device = 'auto'          # 'auto', 'cpu', 'cuda'
dtype = 'auto'           # of training: 'auto', 'float32', 'bfloat16'; embeddings are float32
seed = 1
glove_dir = ''           # folder with the field's our_vab_* files; '' is hashed word vectors
ev_movement = 256        # channels of the movement encoder (official 512)
ev_code = 256            # size of a movement (official 512)
ev_motion_hidden = 256   # motion GRU (official 1024)
ev_text_hidden = 256     # text GRU (official 512)
ev_out = 512             # size of the embedding (official 512)
ev_batch = 64            # clips a step
ev_ae_steps = 200        # stage 1 steps
ev_steps = 500           # stage 2 steps: toy and bandai are learned after 300
ev_lr = 5e-4             # peak learning rate of both stages: warm-up, then cosine to zero
ev_weight_decay = 1e-2
ev_eval_every = 100      # steps between validations; the best on val is kept
ev_test_only = False     # skip training: load evaluator.pt and print the evidence
overwrite = False        # train although an evaluator.pt is there
config = configure(globals())
# -----------------------------------------------------------------------------
data_dir = data_dir or os.path.join('data', data)
out_dir = out_dir or os.path.join('out', data)
path = os.path.join(out_dir, 'evaluator.pt')
if ev_test_only:
    ev_ae_steps = ev_steps = 0
clock = time.time()
run = setup(device, dtype, seed)   # seeds the weights
must_be_writable(os.path.join(out_dir, 'evaluator.json'))
if not ev_test_only:
    open_run(run, out_dir, 'evaluator', config)
generator = torch.Generator().manual_seed(seed)   # of clips, captions and crops

_, mean, std = load_meta(data_dir)
train, val, test = (Clips(data_dir, name) for name in ('train', 'val', 'test'))
texts_of_clip = [set() for _ in train.split.start]
for caption in train.split.captions:
    texts_of_clip[caption['clip']].add(caption['text'])

words = Words(glove_dir)
model = Evaluator(mean, std, words, ev_movement, ev_code, ev_motion_hidden, ev_text_hidden, ev_out,
                  words.dim).to(run.device)
n_parameters = sum(p.numel() for p in model.parameters())
print(f'{data}: {len(train)} train and {len(val)} val clips, {n_parameters / 1e6:.1f}M parameters')


def draw(clips, size, generator, crop):
    """So many random clips -> motions, a list of (T, D), and a caption of each."""
    rows = torch.randperm(len(clips), generator=generator)[:size]
    picks, first, frames = clips.draw(rows, generator, crop)
    return clips.features(first, frames), [clips.split.captions[i] for i in picks]


def training_batch():
    """Clips cropped as in the field -> normalized motion (B, T, D) with zeros behind each end,
    lengths (B,), tokens (B strings), match (B, B), 1 where text i is one of clip j's, and the
    clips' numbers."""
    motions, captions = draw(train, ev_batch, generator, crop=True)
    x = [model.normalize(torch.from_numpy(motion).to(run.device)) for motion in motions]
    x = F.pad(pad_sequence(x, batch_first=True), (0, 0, 0, 4))
    lengths = torch.tensor([len(motion) for motion in motions])
    clip = [caption['clip'] for caption in captions]
    match = [[caption['text'] in texts_of_clip[j] for j in clip] for caption in captions]
    tokens = [caption['tokens'] for caption in captions]
    return x, lengths, tokens, torch.tensor(match).to(x), clip


def all_pairs(clips):
    """Every clip once, whole, in an order shuffled always alike -> motions, texts, tokens."""
    fixed = torch.Generator().manual_seed(0)
    motions, captions = draw(clips, len(clips), fixed, crop=False)
    return motions, [c['text'] for c in captions], [c['tokens'] for c in captions]


def embed(motions):
    return model.embed_motion(motions, [len(motion) for motion in motions]).numpy()


def update(opt, loss, step, steps):
    """One step of the optimizer; the learning rate warms up, then falls to zero as a cosine."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    opt.param_groups[0]['lr'] = ev_lr * min((step + 1) / min(100, steps), cosine)
    opt.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(opt.param_groups[0]['params'], 1.0)
    opt.step()


losses = Losses(lambda clip: train.split.names[clip], 'lower --ev_lr')

# stage 1: the movement encoder learns to be decodable; the decoder is thrown away
decoder = nn.Sequential(
    nn.Conv1d(ev_code, ev_movement, 3, 1, 1), nn.LeakyReLU(0.2),
    nn.ConvTranspose1d(ev_movement, ev_movement, 4, 2, 1), nn.LeakyReLU(0.2),
    nn.ConvTranspose1d(ev_movement, len(mean) - 4, 4, 2, 1)).to(run.device)
params = [*model.movement_encoder.parameters(), *decoder.parameters()]
opt = torch.optim.AdamW(params, weight_decay=ev_weight_decay)
for step in tqdm(range(ev_ae_steps), desc='1 autoencoder', mininterval=1):
    x, lengths, _, _, clip = training_batch()
    with run.autocast():
        z = model.movement_encoder(x[..., :-4])   # (B, T // 4, code)
        decoded = decoder(z.transpose(1, 2)).transpose(1, 2).float()
    valid = (torch.arange(x.shape[1]) < lengths[:, None])[..., None].to(x)
    error = F.smooth_l1_loss(decoded, x[..., :-4], reduction='none') * valid
    reconstruction = error.sum() / (valid.sum() * error.shape[2])
    jumps = (z[:, 1:] - z[:, :-1]).abs().mean()
    loss = reconstruction + 1e-3 * z.abs().mean() + 1e-3 * jumps   # Guo et al.'s weights
    update(opt, loss, step, ev_ae_steps)
    losses.add(step + 1, loss, clip)
    if step % 20 == 0:
        losses.look()
    if step + 1 == ev_ae_steps:
        tqdm.write(f'autoencoder: reconstruction {reconstruction.item():.4f}')


def matching_loss(text, motion, match):
    """text, motion (B, d), match (B, B) -> scalar. All right partners of one share the
    probability: cross-entropy against their even mixture."""
    logits = -torch.cdist(text, motion) * log_scale.exp()
    to_motion = (logits.log_softmax(1) * match).sum(1) / match.sum(1)
    to_text = (logits.log_softmax(0) * match).sum(0) / match.sum(0)
    return -0.5 * (to_motion + to_text).mean()


# stage 2: text and motion meet; the weights of the best R-precision on val are kept
log_scale = nn.Parameter(torch.zeros((), device=run.device))   # how sharp distances are, learned
params = [*model.parameters(), log_scale]
opt = torch.optim.AdamW(params, weight_decay=ev_weight_decay, betas=(0.9, 0.99))
motions, texts, tokens = all_pairs(val)
best = -1.0
for step in tqdm(range(ev_steps), desc='2 matching', mininterval=1):
    model.train()
    x, lengths, captions, match, clip = training_batch()
    word, tag, n_words = words.encode(captions)
    with run.autocast():
        text = model.text_encoder(word.to(run.device), tag.to(run.device), n_words)
        motion = model.encode_motion(x, lengths)
    loss = matching_loss(text.float(), motion.float(), match)
    update(opt, loss, step, ev_steps)
    losses.add(step + 1, loss, clip)
    if (step + 1) % ev_eval_every == 0 or step + 1 == ev_steps:
        losses.look()
        top = r_precision(model.embed_text(tokens), embed(motions), min(32, len(val)), texts)
        tqdm.write(f'step {step + 1}: loss {loss.item():.3f}, '
                   f'val top-1 {top[0]:.3f} top-2 {top[1]:.3f} top-3 {top[2]:.3f}')
        if top.mean() >= best:
            best = top.mean()
            model.save(path, settings=config, it=step + 1)


def warp(x, strength, phase):
    """x (T, D) played at a speed of 1 + strength * cos(one turn over the clip), which scales the
    velocities too. The duration stays."""
    T, D = x.shape
    u = np.linspace(0, 2 * np.pi, T)
    played = u + strength * (np.sin(u + phase) - np.sin(phase))
    t = played / (2 * np.pi) * (T - 1)
    low = t.astype(int).clip(0, T - 2)
    share = np.float32(t - low)[:, None]
    y = x[low] * (1 - share) + x[low + 1] * share
    speed = np.float32(1 + strength * np.cos(u + phase))[:, None]
    y[:, :3] *= speed                      # root yaw and ground velocity
    y[:, -4 - (D + 1) // 4:-4] *= speed    # joint velocities, 3 J of them
    return y


# evidence: does the judge see what it should see? FID between the test clips and themselves damaged
model = Evaluator.load(path, glove_dir).to(run.device)   # the best on val
motions, texts, tokens = all_pairs(test)
text = model.embed_text(tokens).numpy()
real = embed(motions)
N, batch = len(test), min(32, len(test))
rng = np.random.default_rng(0)
wrong = (np.arange(N) + rng.integers(1, N, size=N)) % N
noise = [rng.standard_normal(motion.shape).astype(np.float32) * std for motion in motions]
phases = rng.uniform(0, 2 * np.pi, N)
order = rng.permutation(N)
favourites = rng.choice(N, min(8, N), replace=False)


def damaged(kind, level):
    """Embeddings (N, d) of the test clips, damaged."""
    if kind == 'noise':   # level: in std of the features
        return embed([motion + level * n for motion, n in zip(motions, noise)])
    if kind == 'time_warp':
        return embed([warp(motion, level, phase) for motion, phase in zip(motions, phases)])
    some = order[:int(level * N)]   # a share of prompts is answered with one of 8 other motions
    out = real.copy()
    out[some] = real[np.resize(favourites, len(some))]
    return out


r_real = r_precision(text, real, batch, texts)
r_wrong = r_precision(text[wrong], real, batch)
print(f'\n{N} test clips, {len(set(texts))} different captions, batches of {batch}')
print('R-precision top-1/2/3: real pairs', r_real.round(3), 'wrong captions', r_wrong.round(3))
curves, rises = {}, {}
for kind, levels in (('noise', (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)),
                     ('time_warp', (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9)),
                     ('wrong_motions', (0.0, 0.1, 0.25, 0.5, 0.75, 1.0))):
    fids = [fid(real, damaged(kind, level)) for level in levels]
    curves[kind] = dict(zip(levels, fids))
    rises[kind] = bool((np.diff(fids) > 0).all())
    row = '  '.join(f'{level:g}: {value:.4f}' for level, value in zip(levels, fids))
    print(f'FID, {kind:15s} {row}  {"rises" if rises[kind] else "DOES NOT RISE"}')
seconds = round(time.time() - clock, 1)
result = {'data': data, 'clips': N, 'texts': len(set(texts)), 'batch': batch,
          'r_precision': r_real.tolist(), 'r_precision_shuffled': r_wrong.tolist(),
          **curves, 'fid_monotonic': rises, 'seconds': seconds}
with atomic_write(os.path.join(out_dir, 'evaluator.json'), 'w') as f:
    json.dump(result, f, indent=1)
print(f'{seconds:.0f} s; {path} and evaluator.json beside it')
