"""The text-motion evaluator of Guo et al. 2022, the words it reads, and the standard metrics.

Published FID and R-precision values are distances between vectors of this network, so it follows
the code of "Generating Diverse and Natural 3D Human Motions from Text" (CVPR 2022) exactly.

    B batch, T frames, D features per frame (263 or 251), L = 22 word positions, d embedding size
"""
import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from lib import runtime
from lib.configurator import ROOT, UserError
from lib.data import equal_lengths

# -------------------------------------------------------------------------------------------- words

MAX_WORDS, POSITIONS = 20, 22   # later words are ignored; the words, sos and eos
# Guo et al.'s word vectorizer: tags in one-hot order, and words with a tag that overrides others
WORD_TAGS = json.loads(Path(ROOT, 'config', 'word_tags.json').read_text())
TAGS, VIP_WORDS = WORD_TAGS['tags'], WORD_TAGS['vip_words']
VIP_TAG = {word: tag for tag, words in VIP_WORDS.items() for word in words.split()}
GLOVE_FILES = 'our_vab_data.npy, our_vab_words.pkl, our_vab_idx.pkl'


class PlainUnpickler(pickle.Unpickler):
    """Unpickles lists, dicts, strings and numbers, which need no imports, and nothing else."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'{module}.{name} is code')


def read_plain(path):
    """A pickle of plain data."""
    with open(path, 'rb') as f:
        return PlainUnpickler(f).load()


def read_glove(folder):
    """Guo et al.'s three files of GloVe vectors -> {word: (dim,) float32}, or a UserError."""
    hint = f'its folder must hold {GLOVE_FILES}'
    data, words, index = (os.path.join(folder, name) for name in GLOVE_FILES.split(', '))
    table = runtime.read_array(data, hint)
    words, index = (runtime.read(path, hint, read_plain) for path in (words, index))
    try:
        return {word: table[index[word], :].astype(np.float32)
                for word in [*words, 'eos', 'sos', 'unk']}
    except (KeyError, IndexError, TypeError, ValueError) as e:
        raise UserError(f'the our_vab_* files in {folder} do not fit together '
                        f'({type(e).__name__}: {e}): get them again.') from None


class Words:
    """Caption tokens -> (word vectors, tag one-hots, lengths), by Guo et al.'s rules.

    Words(glove_dir) reads GloVe vectors; a word that is not among them takes the vector of 'unk'
    and the tag OTHER. Without glove_dir every word has a fixed random normal vector, seeded by a
    hash of the word.
    """

    def __init__(self, glove_dir=None, dim=300):
        self.glove_dir = glove_dir or None
        self.vectors = read_glove(glove_dir) if glove_dir else {}
        self.dim = len(self.vectors['unk']) if glove_dir else dim

    def vector(self, word):
        if word not in self.vectors:
            digest = hashlib.blake2b(word.encode(), digest_size=16).digest()
            # RandomState, because NumPy guarantees that its stream never changes
            normal = np.random.RandomState(np.frombuffer(digest, '<u4')).randn(self.dim)
            self.vectors[word] = (normal * 5 / self.dim ** 0.5).astype(np.float32)   # GloVe's norm
        return self.vectors[word]

    def read_token(self, token):
        """'walk/VERB' -> vector (dim,) float32 and the position of its tag in TAGS."""
        word, slash, tag = token.rpartition('/')
        if not slash:
            raise UserError(f'the caption token {token!r} has no tag: write word/TAG.')
        tag = VIP_TAG.get(word, tag)
        if self.glove_dir and word not in self.vectors:
            word, tag = 'unk', 'OTHER'
        return self.vector(word), TAGS.index(tag if tag in TAGS else 'OTHER')

    def embed_captions(self, captions):
        """captions: N strings "word/TAG word/TAG" -> vectors (N, 22, dim), tags (N, 22, 15),
        lengths (N,) int64. Positions 0 and length - 1 hold sos and eos, later ones unk. UserError
        for a token without a tag."""
        vectors = np.empty((len(captions), POSITIONS, self.dim), np.float32)
        tags = np.zeros((len(captions), POSITIONS, len(TAGS)), np.float32)
        lengths = np.empty(len(captions), np.int64)
        for i, caption in enumerate(captions):
            tokens = ['sos/OTHER', *caption.split()[:MAX_WORDS], 'eos/OTHER']
            lengths[i] = len(tokens)
            tokens += ['unk/OTHER'] * (POSITIONS - len(tokens))
            for j, token in enumerate(tokens):
                vectors[i, j], tag = self.read_token(token)
                tags[i, j, tag] = 1
        return torch.from_numpy(vectors), torch.from_numpy(tags), torch.from_numpy(lengths)


# -------------------------------------------------------------------------------------- the network
# Attribute names are those of the official state dict.


class MovementEncoder(nn.Module):
    """Normalized features without foot contacts (B, T, D - 4) -> (B, T // 4, out): one vector per
    four frames, which Guo et al. call a movement."""

    def __init__(self, features, hidden, out):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv1d(features, hidden, 4, 2, 1), nn.Dropout(0.2), nn.LeakyReLU(0.2),
            nn.Conv1d(hidden, out, 4, 2, 1), nn.Dropout(0.2), nn.LeakyReLU(0.2))
        self.out_net = nn.Linear(out, out)

    def forward(self, x):
        x = self.main(x.transpose(1, 2))
        return self.out_net(x.transpose(1, 2))


class BiGRU(nn.Module):
    """(B, L, in), lengths (B,) -> (B, out): the last states of both directions, then an MLP."""

    def __init__(self, features, hidden, out):
        super().__init__()
        self.input_emb = nn.Linear(features, hidden)
        self.gru = nn.GRU(hidden, hidden, batch_first=True, bidirectional=True)
        self.hidden = nn.Parameter(torch.randn(2, 1, hidden))
        self.output_net = nn.Sequential(
            nn.Linear(2 * hidden, hidden), nn.LayerNorm(hidden), nn.LeakyReLU(0.2),
            nn.Linear(hidden, out))

    def forward(self, x, lengths):
        first = self.hidden.expand(-1, len(x), -1).contiguous()
        x = self.input_emb(x)
        x = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, last = self.gru(x, first)   # (2, B, hidden)
        return self.output_net(torch.cat([*last], dim=-1))


class TextEncoder(BiGRU):
    """A BiGRU over word vectors (B, L, 300) plus embedded tag one-hots (B, L, 15)."""

    def __init__(self, word_dim, tag_dim, hidden, out):
        super().__init__(word_dim, hidden, out)
        self.pos_emb = nn.Linear(tag_dim, word_dim)

    def forward(self, words, tags, lengths):
        return super().forward(words + self.pos_emb(tags), lengths)


class Evaluator(nn.Module):
    """The three encoders, the statistics they were trained with, and the words they read.

    mean, std   (D,) statistics of the evaluator's own training data; it takes raw features
    words       a Words, or None for official weights without GloVe (then only motion is embedded)
    max_frames  length to which the standard evaluation pads clips with zeros
    The defaults are the official sizes.
    """

    def __init__(self, mean, std, words=None, movement=512, code=512, motion_hidden=1024,
                 text_hidden=512, out=512, word_dim=300, tag_dim=len(TAGS), max_frames=196):
        super().__init__()
        self.config = dict(
            movement=movement, code=code, motion_hidden=motion_hidden, text_hidden=text_hidden,
            out=out, word_dim=word_dim, tag_dim=tag_dim, max_frames=max_frames)
        if words is not None and words.dim != word_dim:
            raise UserError(f'the text encoder reads {word_dim}-d word vectors, '
                            f'the word vectors given have {words.dim} dimensions.')
        self.words = words
        self.register_buffer('mean', torch.as_tensor(mean).float(), persistent=False)
        self.register_buffer('std', torch.as_tensor(std).float(), persistent=False)
        self.movement_encoder = MovementEncoder(len(mean) - 4, movement, code)
        self.motion_encoder = BiGRU(code, motion_hidden, out)
        self.text_encoder = TextEncoder(word_dim, tag_dim, text_hidden, out)

    def encode_motion(self, motion, lengths):
        """Normalized motion (B, T, D), zeros after each end, lengths (B,) in frames -> (B, d)."""
        movements = self.movement_encoder(motion[..., :-4])
        return self.motion_encoder(movements, lengths // 4)

    def normalize(self, features):
        """(..., D) raw -> normalized; a feature that never varied (std 0) is only centred."""
        return (features - self.mean) / torch.where(self.std < 1e-8, 1.0, self.std)

    @torch.no_grad()
    def embed_text(self, captions, batch=512):
        """captions: N strings "walk/VERB left/ADJ" -> (N, d) float32 on the CPU, in eval mode.
        UserError if the evaluator has no word vectors."""
        if self.words is None:
            raise UserError('this evaluator has no word vectors: give glove_dir, a folder with '
                            f'{GLOVE_FILES}.')
        self.eval()
        unique, row = np.unique(captions, return_inverse=True)
        out = []
        for i in range(0, len(unique), batch):
            words, tags, lengths = self.words.embed_captions(unique[i:i + batch])
            out.append(self.text_encoder(words.to(self.mean), tags.to(self.mean), lengths).cpu())
        return torch.cat(out)[torch.from_numpy(row)]

    @torch.no_grad()
    def embed_motion(self, features, lengths, batch=256):
        """Raw features (B, T, D), as an array, a tensor or a list of B arrays (>= length, D), and
        lengths (B,) in frames -> (B, d) float32 on the CPU, in eval mode. ValueError for a length
        below 4 or above T, or a value before the end that is not finite."""
        if len(lengths) != len(features):
            raise ValueError(f'{len(features)} motions but {len(lengths)} lengths')
        self.eval()
        lengths = torch.as_tensor(lengths).long().cpu()
        out = torch.empty(len(lengths), self.config['out'])
        for group in equal_lengths(lengths, batch):
            n = lengths[group]
            x = torch.stack([torch.as_tensor(features[i])[:n[0]] for i in group.tolist()])
            x = self.normalize(x.to(self.mean))
            if x.shape[1] != n[0] or n[0] < 4 or not torch.isfinite(x).all():
                raise ValueError(f'motions {group.tolist()} of length {n[0]}: one is shorter, or '
                                 'has a value that is not finite, or the length is below 4')
            # Guo et al. pad clips with zeros to max_frames; the last movement reads at most 4
            if n[0] != self.config['max_frames']:
                x = F.pad(x, (0, 0, 0, 4))
            out[group] = self.encode_motion(x, n).cpu()
        return out

    def save(self, path, it, settings, **extra):
        """Write everything that `load` needs, and `extra` (plain data). it: training steps done, of
        settings['ev_steps']; a complete evaluator has done them all."""
        runtime.save({'kind': 'evaluator', 'config': self.config, 'mean': self.mean.cpu(),
                      'std': self.std.cpu(), 'glove_dir': self.words.glove_dir,
                      'model': self.state_dict(), 'it': it, 'settings': settings, **extra}, path)

    @classmethod
    def load(cls, path, glove_dir=None):
        """The evaluator written by `save`, in eval mode. glove_dir: the folder of the GloVe files,
        if they have moved. UserError for a file that is missing, damaged, of another kind, or of an
        evaluator that is not fully trained."""
        data = runtime.load(path, 'run train_eval.py first, or give --evaluator', 'evaluator',
                            ('config', 'mean', 'std', 'glove_dir', 'model', 'it', 'settings'))
        steps = data['settings']['ev_steps']
        if data['it'] < steps:
            raise UserError(f'{path} has been trained for {data["it"]} of {steps} steps: finish it '
                            'by running train_eval.py with --init_from=resume.')
        glove_dir = data['glove_dir'] and (glove_dir or data['glove_dir'])
        words = Words(glove_dir, data['config']['word_dim'])
        model = cls(data['mean'], data['std'], words, **data['config'])
        runtime.load_weights(model, data['model'], path)
        return model.eval()


# ------------------------------------------------------------------------------------------ metrics
# Arrays or CPU tensors in, floats out, computed in float64. Source: Guo et al. 2022 unless stated.


def float64(x):
    x = np.asarray(x, dtype=np.float64)
    if not np.isfinite(x).all():
        raise UserError('a metric was given NaN or infinite values: the model or the evaluator '
                        'has diverged.')
    return x


def fid(real, gen):
    """Frechet distance of the normal distributions fitted to real (N, d) and gen (M, d); N, M >= 2.

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^1/2 (Heusel et al. 2017). The last trace is the sum
    of the singular values of C1^1/2 C2^1/2, a product of roots of symmetric matrices (eigh). No
    intermediate result can become complex, even if N < d and the covariances are singular."""
    means, roots, traces = [], [], []
    for x in (float64(real), float64(gen)):
        if len(x) < 2:
            raise ValueError(f'FID needs at least 2 vectors on each side, found {len(x)}')
        covariance = np.atleast_2d(np.cov(x, rowvar=False))
        values, vectors = np.linalg.eigh(covariance)
        means.append(x.mean(0))
        roots.append(vectors * np.sqrt(values.clip(min=0)) @ vectors.T)
        traces.append(np.trace(covariance))
    cross = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    distance = ((means[0] - means[1]) ** 2).sum() + sum(traces) - 2 * cross
    return float(max(distance, 0))


def r_precision(text, motion, batch=32, same=None):
    """How often a text's own motion is among the k nearest of its batch -> (3,) for k = 1, 2, 3.

    text, motion: (N, d) paired, in the (shuffled) order that makes the batches; a last partial
    batch is dropped. same: N caption strings; if given, every motion of the same caption counts as
    the text's own. A wrong motion at exactly the distance of the right one counts as nearer, so
    that a collapsed network scores 0 and not 1."""
    text, motion = float64(text), float64(motion)
    if len(text) < batch or text.shape != motion.shape:
        raise ValueError(f'R-precision needs paired vectors, at least {batch}: '
                         f'found {text.shape} and {motion.shape}')
    label = np.arange(len(text))
    if same is not None:
        label = np.unique(list(same), return_inverse=True)[1]
    ranks = []
    for start in range(0, len(text) - batch + 1, batch):
        rows = slice(start, start + batch)
        distance = np.linalg.norm(text[rows, None] - motion[None, rows], axis=-1)
        right = label[rows, None] == label[None, rows]
        own = np.where(right, distance, np.inf).min(1, keepdims=True)
        ranks.append((~right & (distance <= own)).sum(1))   # wrong motions that are nearer
    ranks = np.concatenate(ranks)
    return np.array([(ranks < k).mean() for k in (1, 2, 3)])


def mm_dist(text, motion):
    """Mean Euclidean distance of paired (..., d) text and motion vectors."""
    return float(np.linalg.norm(float64(text) - float64(motion), axis=-1).mean())


def diversity(emb, rng, pairs=None):
    """Mean distance of random pairs, by default min(300, N), of emb (..., N, d). rng: a NumPy
    Generator."""
    N = emb.shape[-2]
    a, b = (rng.choice(N, pairs or min(300, N), replace=False) for _ in range(2))
    return mm_dist(emb[..., a, :], emb[..., b, :])


def multimodality(emb, rng):
    """Mean distance of 10 random pairs of generations of one text, for emb (texts, gens, d)."""
    return diversity(emb, rng, pairs=10)


def mpjpe(pred, gt):
    """Mean joint error per frame with both pelvises (joint 0) at the origin: (T, J, 3) twice ->
    (T,), in the unit of the joints. Source: MoMask's evaluation."""
    error = float64(pred) - float64(gt)
    return np.linalg.norm(error - error[:, :1], axis=-1).mean(-1)


def interval(values):
    """Values of n repeats (n,) or (n, k) -> their mean, and half the width of its 95% interval,
    1.96 std / sqrt(n)."""
    values = np.asarray(values, dtype=np.float64)
    return values.mean(0), 1.96 * values.std(0) / np.sqrt(len(values))
