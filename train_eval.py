"""Train a text-motion evaluator (evaluator.py) on a prepared data set, and show that it is a good judge.

    python train_eval.py config/toy.py                        -> out/toy/evaluator.pt, out/toy/evaluator.json
    python train_eval.py config/toy.py --ev_test_only=True    only the evidence, of the evaluator saved before

Stage 1 is the movement autoencoder of Guo et al. 2022 (smooth-L1 reconstruction, latents small and smooth). Stage 2
matches text and motion. Two losses: 'margin' is the paper's (a pair's distance squared; a mismatched pair, made by
shifting the batch by one, is pushed beyond a margin of 10); 'infonce' is the symmetric cross-entropy of picking the
right partner in the whole batch by Euclidean distance, the very quantity that R-precision ranks (default: after 300
steps on bandai a val top-1 of 0.82 to 0.84 against 0.65). A motion is a text's right partner when the text is one of its
clip's captions. Guo et al. freeze stage 1's encoder in stage 2 (`ev_freeze`); here it is trained on. The defaults are
small sizes that learn toy and bandai in minutes; the official ones are named beside them.
"""

import json
import math
import os
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from configurator import configure, fail, setup
from evaluator import Evaluator, Words, fid, mm_dist, r_precision
from motion import load_meta, load_split

# ----------------------------------------------------------------------------------------------------------------------
data = 'toy'                # data set under data/
data_dir = ''               # its folder; '' is data/<data>
out_dir = ''                # where evaluator.pt goes; '' is out/<data>
device = 'auto'             # 'auto', 'cpu', 'cuda'
dtype = 'auto'              # of the training steps' products: 'auto', 'float32', 'bfloat16'; embeddings are float32
seed = 1
glove_dir = ''              # folder with the field's our_vab_* files; '' is hashed word vectors
ev_movement = 256           # channels of the movement encoder (official 512)
ev_code = 256               # size of a movement (official 512)
ev_motion_hidden = 256      # motion GRU (official 1024)
ev_text_hidden = 256        # text GRU (official 512)
ev_out = 512                # size of the embedding (official 512)
ev_batch = 64               # clips a step
ev_ae_steps = 200           # stage 1 steps
ev_steps = 500              # stage 2 steps: toy and bandai are learned after 300
ev_lr = 5e-4                # peak learning rate of both stages: warm-up, then cosine to zero
ev_weight_decay = 1e-2
ev_loss = 'infonce'         # 'infonce' or 'margin' (see above)
ev_freeze = False           # stage 2 leaves the movement encoder as stage 1 made it (Guo et al. do)
ev_eval_every = 100         # steps between validations; the best on val is kept
ev_test_only = False        # skip training: load evaluator.pt and print the evidence
config = configure(globals())
# ----------------------------------------------------------------------------------------------------------------------
data_dir = data_dir or os.path.join('data', data)
out_dir = out_dir or os.path.join('out', data)
path = os.path.join(out_dir, 'evaluator.pt')
if ev_loss not in ('infonce', 'margin'):
    fail(f"ev_loss is 'infonce' or 'margin', not {ev_loss!r}")
machine = setup(device, dtype, seed)      # seeds the weights
try:
    _, mean, std = load_meta(data_dir)
    words = Words(glove_dir or None)
    model = Evaluator.load(path, glove_dir or None) if ev_test_only else Evaluator(
        mean, std, words, ev_movement, ev_code, ev_motion_hidden, ev_text_hidden, ev_out, words.dim)
except (FileNotFoundError, ValueError) as e:
    fail(str(e))
model = model.to(machine.device)
rng = np.random.default_rng(seed)


class Clips:
    """One split: clips of at least 4 frames that have captions, each with its (text, tokens) list."""

    def __init__(self, split):
        try:
            self.split = load_split(data_dir, split)
        except (FileNotFoundError, ValueError) as e:
            fail(str(e))
        captions = [[] for _ in self.split.start]
        for c in self.split.captions:
            captions[c['clip']].append((c['text'], c['tokens']))
        self.clips = [i for i, c in enumerate(captions) if c and self.split.length[i] >= 4]
        self.captions = [captions[i] for i in self.clips]
        self.texts = [{text for text, _ in c} for c in self.captions]
        if not self.clips:
            fail(f'the {split} split of {data_dir} has no clip with a caption')

    def motion(self, i, crop=None):
        """Features of clip i, length a multiple of 4 as in the field. crop, a generator: one time in three a unit
        shorter, and a random start."""
        start, length = (int(a[self.clips[i]]) for a in (self.split.start, self.split.length))
        n = length // 4 * 4
        if crop is not None:
            n = max(n - 4 * (crop.random() < 1 / 3), 4)
            start += int(crop.integers(length - n + 1))
        return np.array(self.split.features[start:start + n], dtype=np.float32)

    def pairs(self, seed):
        """Every clip once, in a shuffled order, with one random caption: (motions, texts, tokens, clip numbers)."""
        r = np.random.default_rng(seed)
        order = r.permutation(len(self.clips))
        chosen = [self.captions[i][r.integers(len(self.captions[i]))] for i in order]
        return [self.motion(i) for i in order], [c[0] for c in chosen], [c[1] for c in chosen], order


def embed(model, motions):
    return model.embed_motion(motions, [len(m) for m in motions])


def batch(model, clips):
    """ev_batch random clips -> normalised zero-padded motion (B, T, D), lengths (B,), tokens, match (B, B) of
    [text i is a caption of clip j]."""
    rows = rng.choice(len(clips.clips), min(ev_batch, len(clips.clips)), replace=False)
    motions = [clips.motion(i, rng) for i in rows]
    lengths = torch.tensor([len(m) for m in motions])
    x = torch.zeros(len(rows), int(lengths.max()) + 4, motions[0].shape[1])
    for b, m in enumerate(motions):
        x[b, :len(m)] = model.normalise(torch.from_numpy(m).to(model.mean)).cpu()
    chosen = [clips.captions[i][rng.integers(len(clips.captions[i]))] for i in rows]
    match = torch.tensor([[text in clips.texts[j] for j in rows] for text, _ in chosen])
    return x.to(machine.device), lengths, [tokens for _, tokens in chosen], match.to(machine.device)


def learning_rate(step, steps):
    return ev_lr * min((step + 1) / min(100, steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))


# ----------------------------------------------------------------------------------------------------------------------
# training

def train_autoencoder(model, clips):
    """Stage 1: the movement encoder learns to be decodable; the decoder is thrown away."""
    c, hidden = model.config['code'], model.config['movement']
    decoder = nn.Sequential(nn.Conv1d(c, hidden, 3, 1, 1), nn.LeakyReLU(0.2),
                            nn.ConvTranspose1d(hidden, hidden, 4, 2, 1), nn.LeakyReLU(0.2),
                            nn.ConvTranspose1d(hidden, len(model.mean) - 4, 4, 2, 1)).to(machine.device)
    params = [*model.movement_encoder.parameters(), *decoder.parameters()]
    opt = torch.optim.AdamW(params, lr=ev_lr, weight_decay=ev_weight_decay)
    bar = tqdm(range(ev_ae_steps), desc='1 autoencoder', mininterval=1)
    for step in bar:
        opt.param_groups[0]['lr'] = learning_rate(step, ev_ae_steps)
        x, lengths, _, _ = batch(model, clips)
        x = x[:, :x.shape[1] // 4 * 4]
        with machine.autocast():
            z = model.movement_encoder(x[..., :-4])                                       # (B, T // 4, code)
            decoded = decoder(z.transpose(1, 2)).transpose(1, 2).float()
        valid = (torch.arange(x.shape[1]) < lengths[:, None])[..., None].to(x)
        error = F.smooth_l1_loss(decoded, x[..., :-4], reduction='none') * valid
        rec = error.sum() / (valid.sum() * error.shape[2])
        loss = rec + 1e-3 * z.abs().mean() + 1e-3 * (z[:, 1:] - z[:, :-1]).abs().mean()   # Guo et al.'s weights
        opt.zero_grad(), loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        if step % 20 == 0:
            bar.set_postfix(reconstruction=f'{rec.item():.4f}')


def matching_loss(text, motion, match, log_scale):
    """text, motion (B, d), match (B, B) -> scalar."""
    if ev_loss == 'margin':
        near, far = (text - motion).norm(dim=-1), (text - motion.roll(1, 0)).norm(dim=-1)
        i = torch.arange(len(match))
        wrong = ~match[i, i - 1]
        return (near ** 2).mean() + (F.relu(10 - far) ** 2 * wrong).mean()
    logits = -torch.cdist(text, motion) * log_scale.exp()
    right = match.float()
    # all right partners share the probability: cross-entropy against their even mixture, text -> motion and back
    return -0.5 * ((logits.log_softmax(1) * right).sum(1) / right.sum(1)
                   + (logits.log_softmax(0) * right).sum(0) / right.sum(0)).mean()


def train_matching(model, clips, val):
    """Stage 2. Keeps the weights with the best R-precision (mean of top-1/2/3) on val; of equals the later."""
    if ev_freeze:
        model.movement_encoder.requires_grad_(False)
    log_scale = nn.Parameter(torch.zeros((), device=machine.device))      # how sharp distances are, learned
    params = [p for p in model.parameters() if p.requires_grad] + [log_scale]
    opt = torch.optim.AdamW(params, lr=ev_lr, weight_decay=ev_weight_decay, betas=(0.9, 0.99))
    best, losses = -1.0, []
    bar = tqdm(range(ev_steps), desc='2 matching', mininterval=1)
    val_motions, val_texts, val_tokens, _ = val.pairs(0)
    for step in bar:
        model.train()
        opt.param_groups[0]['lr'] = learning_rate(step, ev_steps)
        x, lengths, tokens, match = batch(model, clips)
        words, tags, n_words = model.words.encode(tokens)
        with machine.autocast():
            text = model.encode_text(words.to(machine.device), tags.to(machine.device), n_words)
            motion = model.encode_motion(x, lengths)
        loss = matching_loss(text.float(), motion.float(), match, log_scale)
        opt.zero_grad(), loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        losses.append(loss.detach())
        if (step + 1) % ev_eval_every == 0 or step + 1 == ev_steps:
            r = r_precision(model.embed_text(val_tokens), embed(model, val_motions),
                            batch=min(32, len(val_texts)), same=val_texts)
            tqdm.write(f'step {step + 1}: loss {torch.stack(losses[-100:]).mean():.3f}, '
                       f'val top-1 {r[0]:.3f} top-2 {r[1]:.3f} top-3 {r[2]:.3f}')
            if r.mean() >= best:
                best = r.mean()
                model.save(path, trained=dict(config, step=step + 1))


# ----------------------------------------------------------------------------------------------------------------------
# evidence: does the judge see what it should see?

def warp(x, strength, r):
    """x (T, D) played unevenly: speed 1 + strength * cos(one turn over the clip, random phase), velocities scaled by it.
    The duration stays. strength < 1, so time never runs backwards."""
    T, D = x.shape
    phase, u = r.uniform(0, 2 * np.pi), np.linspace(0, 1, T)
    t = (u + strength * (np.sin(2 * np.pi * u + phase) - np.sin(phase)) / (2 * np.pi)).clip(0, 1) * (T - 1)
    low = np.minimum(t.astype(int), T - 2)
    y = x[low] + (t - low)[:, None].astype(np.float32) * (x[low + 1] - x[low])
    speed = (1 + strength * np.cos(2 * np.pi * u + phase))[:, None].astype(np.float32)
    joints = (D + 1) // 12                                  # D = 4 + 3(J-1) + 6(J-1) + 3J + 4
    y[:, :3] *= speed                                       # root yaw and ground velocity
    y[:, 4 + 9 * (joints - 1):-4] *= speed                  # joint velocities
    return y


def evidence(model, test):
    """R-precision of real pairs and three damage curves -> dict of plain numbers.

    FID is between the embeddings of the test set and of the same test set damaged, 0 at no damage. Motion FID never
    sees a caption, so 'wrong captions' are measured twice. 'wrong_captions' is the FID of (text, motion) vectors side by
    side (the Frechet joint distance of DeVries et al. 2019): a growing share of the captions changes places, both
    marginals stay, only the pairing breaks. 'wrong_motions' is the ordinary motion FID of a model that answers a growing
    share of the prompts with the motion of one of 8 other captions: what wrong captions do to FID in practice."""
    motions, texts, tokens, order = test.pairs(0)
    text, real = model.embed_text(tokens).numpy(), embed(model, motions).numpy()
    N, r = len(texts), np.random.default_rng(0)
    size = min(32, N)
    groups = [' | '.join(sorted(test.texts[i])) for i in order]
    wrong = [(i + 1 + int(r.integers(N - 1))) % N for i in range(N)]
    out = {'clips': N, 'texts': len(set(texts)), 'batch': size,
           'r_precision': r_precision(text, real, batch=size, same=texts).tolist(),
           'r_precision_strict': r_precision(text, real, batch=size).tolist(),
           'r_precision_same_caption_set': r_precision(text, real, batch=size, same=groups).tolist(),
           'r_precision_shuffled': r_precision(text[wrong], real, batch=size).tolist(),
           'matched': mm_dist(text, real), 'mismatched': mm_dist(text[wrong], real),
           'fid_two_halves': fid(real[::2], real[1::2])}

    levels = [0.0, 0.05, 0.1, 0.2, 0.4, 0.8]
    draws = [r.standard_normal(m.shape).astype(np.float32) * std for m in motions]     # the same noise, growing
    out['noise'] = {a: fid(real, embed(model, [m + a * d for m, d in zip(motions, draws)])) for a in levels}
    levels = [0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9]
    out['time_warp'] = {a: fid(real, embed(model, [warp(m, a, np.random.default_rng(i)) for i, m in enumerate(motions)]))
                        for a in levels}
    shuffled, favourites = r.permutation(N), r.choice(N, min(8, N), replace=False)
    for name in ('wrong_captions', 'wrong_motions', 'wrong_captions_top3', 'wrong_captions_mm_dist'):
        out[name] = {}
    for share in [0.0, 0.1, 0.25, 0.5, 0.75, 1.0]:
        chosen = shuffled[:int(share * N)]
        text2, motion2 = text.copy(), real.copy()
        text2[chosen] = text[np.roll(chosen, 1)]
        motion2[chosen] = real[favourites[np.arange(len(chosen)) % len(favourites)]]
        out['wrong_captions'][share] = fid(np.concatenate([text, real], 1), np.concatenate([text2, real], 1))
        out['wrong_motions'][share] = fid(real, motion2)
        out['wrong_captions_top3'][share] = float(r_precision(text2, real, batch=size)[2])
        out['wrong_captions_mm_dist'][share] = mm_dist(text2, real)
    out['fid_monotonic'] = {name: bool((np.diff(list(out[name].values())) > 0).all())
                            for name in ('noise', 'time_warp', 'wrong_captions', 'wrong_motions')}
    return out


def report(e):
    print(f"\n{e['clips']} test clips, {e['texts']} different captions; batches of {e['batch']}")
    for name, words in (('r_precision', 'same text counts'), ('r_precision_strict', 'only the own clip'),
                        ('r_precision_same_caption_set', 'same set of paraphrases counts'),
                        ('r_precision_shuffled', 'wrong captions: chance')):
        print(f"R-precision top-1/2/3 {' '.join(f'{v:.3f}' for v in e[name])}   {words}")
    print(f"distance of pairs: matched {e['matched']:.3f}, mismatched {e['mismatched']:.3f}; "
          f"FID of two halves of the test set {e['fid_two_halves']:.4f}")
    for name, words in (('noise', 'FID, noise (feature std)'), ('time_warp', 'FID, time-warp'),
                        ('wrong_captions', 'FID of pairs, wrong captions'),
                        ('wrong_motions', 'FID, motions of wrong captions'),
                        ('wrong_captions_top3', 'top-3, wrong captions'),
                        ('wrong_captions_mm_dist', 'MM-Dist, wrong captions')):
        flag = {True: 'rises', False: 'DOES NOT RISE', None: ''}[e['fid_monotonic'].get(name)]
        print(f"{words:32s}" + '  '.join(f'{a:g}: {v:.4f}' for a, v in e[name].items()) + '  ' + flag)


# ----------------------------------------------------------------------------------------------------------------------
start_time = time.time()
if not ev_test_only:
    train, val = Clips('train'), Clips('val')
    print(f'{data}: {len(train.clips)} train and {len(val.clips)} val clips, '
          f'{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters')
    os.makedirs(out_dir, exist_ok=True)
    train_autoencoder(model, train)
    train_matching(model, train, val)
    model = Evaluator.load(path, glove_dir or None).to(machine.device)      # the best on val
result = evidence(model, Clips('test'))
report(result)
with open(os.path.join(out_dir, 'evaluator.json.tmp'), 'w') as f:
    json.dump(dict(result, data=data, seconds=round(time.time() - start_time, 1)), f, indent=1)
os.replace(os.path.join(out_dir, 'evaluator.json.tmp'), os.path.join(out_dir, 'evaluator.json'))
print(f'{time.time() - start_time:.0f} s; {path}, {os.path.join(out_dir, "evaluator.json")}')
