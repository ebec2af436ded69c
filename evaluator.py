"""The text-motion evaluator of Guo et al. 2022 and the metrics of the field, in one leaf file.

Everybody's FID and R-precision are distances between the 512-d vectors of this network, so it is rebuilt to the letter:
a movement encoder (4 frames -> one vector), a bidirectional GRU over movements, another over words (word vector plus
embedded part-of-speech tag). Source: Guo et al., "Generating Diverse and Natural 3D Human Motions from Text", CVPR 2022.
`Evaluator.from_t2m` reads the released weights, `train_eval.py` trains the same network on other data; metrics follow.

    B batch, T frames, D features a frame (263 or 251), n = T // 4 movements, L = 22 word positions, d embedding size
"""

import hashlib
import os
import pickle

import numpy as np
import torch
import torch.nn as nn
from torch.nn.utils.rnn import pack_padded_sequence

# ----------------------------------------------------------------------------------------------------------------------
# words: "walk/VERB left/ADJ" -> word vectors and tag one-hots

MAX_WORDS = 20                    # words of a caption that count; with sos and eos there are 22 positions
# The 15 tags in one-hot order, and the word lists that override the tagger (data of Guo et al.'s word vectorizer).
TAGS = 'VERB NOUN DET ADP NUM AUX PRON ADJ ADV Loc_VIP Body_VIP Obj_VIP Act_VIP Desc_VIP OTHER'.split()
VIP_WORDS = {
    'Loc_VIP': 'anticlockwise back backward clockwise counterclockwise curve down forward left right straight up',
    'Body_VIP': 'arm chin eye face feet foot hand knee leg mouth shoulder thigh waist',
    'Obj_VIP': 'ball baseball basketball car chair dumbbell floor handrail stair window',
    'Act_VIP': 'balance bend bring climb dance flap hop jog jump kick kneel lean lift lower pick put raise rotate rub '
               'run shuffle sit spin spread squat stand stop stroll stumble swing throw turn walk wash',
    'Desc_VIP': 'angrily angry careful carefully fast happily happy quickly sad sadly slow slowly'}
VIP_TAG = {word: tag for tag, words in VIP_WORDS.items() for word in words.split()}


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, strings and numbers need no imported name; whatever asks for one is code, and is refused."""
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it asks for {module}.{name}, which is code and not plain data')


def _load_plain_pickle(path, kind):
    try:
        with open(path, 'rb') as f:
            data = _PlainUnpickler(f).load()
    except FileNotFoundError:
        raise FileNotFoundError(f'GloVe file not found: {path}') from None
    except Exception as e:        # a damaged pickle raises nearly anything
        raise ValueError(f'{path} was not loaded: {e or type(e).__name__}') from None
    if not isinstance(data, kind):
        raise ValueError(f'{path} should hold a {kind.__name__}, found a {type(data).__name__}')
    return data


class Words:
    """Caption tokens -> (word vectors, tag one-hots, lengths), by the rules of the field.

    Words()            hashed vectors: every word is a fixed random normal vector, seeded by the word's blake2b hash, so
                       it is the same on every machine and every word has one. Nothing is downloaded.
    Words(glove_dir)   the field's GloVe: our_vab_data.npy (words, 300), our_vab_words.pkl, our_vab_idx.pkl. A word that
                       is not in it takes the vector of 'unk' and the tag OTHER.
    Raises FileNotFoundError or ValueError for a file that is missing, damaged or holds code.
    """

    def __init__(self, glove_dir=None, dim=300):
        self.glove_dir, self.dim, self.vectors = glove_dir, dim, {}
        if glove_dir is None:
            return
        path = os.path.join(glove_dir, 'our_vab_data.npy')
        table = np.asarray(_load_array(path, 'GloVe table'), dtype=np.float32)
        words = _load_plain_pickle(os.path.join(glove_dir, 'our_vab_words.pkl'), list)
        index = _load_plain_pickle(os.path.join(glove_dir, 'our_vab_idx.pkl'), dict)
        if table.ndim != 2:
            raise ValueError(f'{path} should have shape (words, dims), found {table.shape}')
        for word in words:
            row = index.get(word)
            if not isinstance(row, int) or not 0 <= row < len(table):
                raise ValueError(f'our_vab_idx.pkl gives row {row!r} for {word!r}, our_vab_data.npy has {len(table)}')
            self.vectors[word] = table[row]
        missing = {'unk', 'sos', 'eos'} - self.vectors.keys()
        if missing:
            raise ValueError(f'the GloVe words in {glove_dir} lack {sorted(missing)}')
        self.dim = table.shape[1]

    def vector(self, word):     # (dim,) float32, or None when GloVe does not know the word
        if self.glove_dir is None and word not in self.vectors:
            seed = np.frombuffer(hashlib.blake2b(word.encode(), digest_size=16).digest(), dtype='<u4')
            # RandomState's stream is frozen by numpy's promise; 5 is about the length of a GloVe vector
            self.vectors[word] = (np.random.RandomState(seed).randn(self.dim) * 5 / self.dim ** 0.5).astype(np.float32)
        return self.vectors.get(word)

    def encode(self, captions):
        """captions: N strings of "word/TAG word/TAG" -> vectors (N, 22, dim), tags (N, 22, 15), lengths (N,) int64.

        Positions 0 and length-1 are sos and eos, positions after that unk. ValueError: a token without a tag."""
        N, L = len(captions), MAX_WORDS + 2
        vectors, tags = np.empty((N, L, self.dim), np.float32), np.zeros((N, L, len(TAGS)), np.float32)
        lengths = np.empty(N, np.int64)
        for i, caption in enumerate(captions):
            tokens = ['sos/OTHER', *caption.split()[:MAX_WORDS], 'eos/OTHER']
            lengths[i] = len(tokens)
            tokens += ['unk/OTHER'] * (L - len(tokens))
            for j, token in enumerate(tokens):
                word, slash, tag = token.rpartition('/')
                if not slash:
                    raise ValueError(f'token {token!r} of caption {caption!r} has no tag; write word/TAG')
                vector, tag = self.vector(word), VIP_TAG.get(word, tag)
                if vector is None:
                    vector, tag = self.vectors['unk'], 'OTHER'
                vectors[i, j] = vector
                tags[i, j, TAGS.index(tag) if tag in TAGS else -1] = 1    # -1 is OTHER
        return torch.from_numpy(vectors), torch.from_numpy(tags), torch.from_numpy(lengths)


# ----------------------------------------------------------------------------------------------------------------------
# the network; attribute names are the official state dict's

class MovementEncoder(nn.Module):
    """(B, T, D - 4) normalised features without foot contacts -> (B, T // 4, out) movements."""
    def __init__(self, features, hidden, out):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv1d(features, hidden, 4, 2, 1), nn.Dropout(0.2), nn.LeakyReLU(0.2),
            nn.Conv1d(hidden, out, 4, 2, 1), nn.Dropout(0.2), nn.LeakyReLU(0.2))
        self.out_net = nn.Linear(out, out)

    def forward(self, x):
        return self.out_net(self.main(x.transpose(1, 2)).transpose(1, 2))


class BiGRU(nn.Module):
    """(B, L, in) with lengths (B,) in any order -> (B, out): last states forward ++ backward, then a small MLP."""
    def __init__(self, features, hidden, out):
        super().__init__()
        self.input_emb = nn.Linear(features, hidden)
        self.gru = nn.GRU(hidden, hidden, batch_first=True, bidirectional=True)
        self.hidden = nn.Parameter(torch.randn(2, 1, hidden))
        self.output_net = nn.Sequential(
            nn.Linear(2 * hidden, hidden), nn.LayerNorm(hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, out))

    def forward(self, x, lengths):
        packed = pack_padded_sequence(self.input_emb(x), lengths.cpu(), batch_first=True, enforce_sorted=False)
        last = self.gru(packed, self.hidden.expand(-1, len(x), -1).contiguous())[1]    # (2, B, hidden)
        return self.output_net(torch.cat([last[0], last[1]], dim=-1))


class TextEncoder(BiGRU):
    """A BiGRU over word vectors (B, L, 300) plus embedded tag one-hots (B, L, 15)."""
    def __init__(self, word_dim, tag_dim, hidden, out):
        super().__init__(word_dim, hidden, out)
        self.pos_emb = nn.Linear(tag_dim, word_dim)

    def forward(self, words, tags, lengths):
        return super().forward(words + self.pos_emb(tags), lengths)


class Evaluator(nn.Module):
    """The three encoders, the statistics they were trained with, and the words they read.

    mean, std: (D,) of the evaluator's own training data; features enter un-normalised. words: a `Words`, or None for
    official weights without GloVe (then only motion can be embedded). max_frames: the frame count to which the field
    pads with zeros before the network sees a clip. The size arguments default to the released ones.
    """

    def __init__(self, mean, std, words=None, movement=512, code=512, motion_hidden=1024, text_hidden=512, out=512,
                 word_dim=300, tag_dim=len(TAGS), max_frames=196):
        super().__init__()
        self.config = dict(movement=movement, code=code, motion_hidden=motion_hidden, text_hidden=text_hidden, out=out,
                           word_dim=word_dim, tag_dim=tag_dim, max_frames=max_frames)
        mean, std = (torch.as_tensor(a, dtype=torch.float32) for a in (mean, std))
        if mean.ndim != 1 or mean.shape != std.shape:
            raise ValueError(f'mean and std should both be (D,), found {tuple(mean.shape)} and {tuple(std.shape)}')
        if words is not None and words.dim != word_dim:
            raise ValueError(f'the text encoder reads {word_dim}-d word vectors, the words given are {words.dim}-d')
        self.words = words
        self.register_buffer('mean', mean, persistent=False)
        self.register_buffer('std', std, persistent=False)
        self.movement_encoder = MovementEncoder(len(mean) - 4, movement, code)
        self.motion_encoder = BiGRU(code, motion_hidden, out)
        self.text_encoder = TextEncoder(word_dim, tag_dim, text_hidden, out)

    def encode_text(self, words, tags, lengths):
        """words (B, L, 300), tags (B, L, 15), lengths (B,) in words -> (B, d)."""
        return self.text_encoder(words, tags, lengths)

    def encode_motion(self, motion, lengths):
        """motion (B, T, D) normalised, lengths (B,) in frames -> (B, d). Frames right after a clip's end reach its last
        movement through the convolution; `embed_motion` puts zeros there."""
        return self.motion_encoder(self.movement_encoder(motion[..., :-4]), torch.div(lengths, 4, rounding_mode='floor'))

    def normalise(self, features):
        """(..., D) raw -> normalised; a feature that never varied (std 0) is only centred."""
        return (features - self.mean) / torch.where(self.std < 1e-8, 1.0, self.std)

    @torch.no_grad()
    def embed_text(self, captions, batch=512):
        """captions: N strings "walk/VERB left/ADJ" -> (N, d) float32 on the CPU, in the given order, in eval mode."""
        if self.words is None:
            raise FileNotFoundError('this evaluator has no word vectors: give glove_dir with our_vab_data.npy, '
                                    'our_vab_words.pkl and our_vab_idx.pkl (the official text encoder needs them)')
        self.eval()
        unique = {c: i for i, c in enumerate(dict.fromkeys(captions))}
        rows, texts = [], list(unique)
        for i in range(0, len(texts), batch):
            words, tags, lengths = self.words.encode(texts[i:i + batch])
            rows.append(self.encode_text(words.to(self.mean.device), tags.to(self.mean.device), lengths).cpu())
        return torch.cat(rows)[[unique[c] for c in captions]] if rows else torch.empty(0, self.config['out'])

    @torch.no_grad()
    def embed_motion(self, features, lengths, batch=256):
        """features (B, T, D) un-normalised (array, memmap, tensor, or a list of B arrays (>= length, D)), lengths (B,)
        in frames -> (B, d) float32 on the CPU, in the given order; in eval mode. What lies after a clip's length does
        not matter. ValueError: another width D, a length under 4 or beyond T, a value that is not finite."""
        self.eval()
        lengths, D = [int(n) for n in lengths], len(self.mean)
        if len(lengths) != len(features):
            raise ValueError(f'{len(features)} motions but {len(lengths)} lengths')
        top = self.config['max_frames']
        # Long clips first, so that a batch has about one length. Official evaluation pads every clip with zeros to
        # max_frames; 4 zero frames are all the last movement can see. Only a clip of just max_frames has no padding.
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        n_long = sum(n > top for n in lengths)
        out = torch.empty(len(lengths), self.config['out'])
        for chunk in (part[i:i + batch] for part in (order[:n_long], order[n_long:]) for i in range(0, len(part), batch)):
            longest = lengths[chunk[0]]
            x = torch.zeros(len(chunk), longest if longest == top else longest + 4, D, device=self.mean.device)
            for row, i in enumerate(chunk):
                clip = torch.as_tensor(features[i])
                if clip.ndim != 2 or clip.shape[1] != D or not 4 <= lengths[i] <= len(clip):
                    raise ValueError(f'motion {i}: this evaluator reads (T, {D}) features and lengths 4 .. T, '
                                     f'found {tuple(clip.shape)} and length {lengths[i]}')
                x[row, :lengths[i]] = self.normalise(clip[:lengths[i]].to(self.mean))
            finite = torch.isfinite(x).flatten(1).all(1)
            if not finite.all():
                raise ValueError(f'motion {chunk[int(finite.int().argmin())]} holds NaN or infinite features')
            out[chunk] = self.encode_motion(x, torch.tensor([lengths[i] for i in chunk])).cpu()
        return out

    def save(self, path, **extra):
        """Write config, statistics, kind of word vectors, weights and `extra` (plain values) to path, atomically."""
        glove = self.words.glove_dir if self.words else None
        torch.save({'config': self.config, 'mean': self.mean.cpu(), 'std': self.std.cpu(),
                    'words': None if self.words is None else 'glove' if glove else 'hash', 'glove_dir': glove,
                    'state': self.state_dict(), **extra}, f'{path}.tmp')
        os.replace(f'{path}.tmp', path)

    @classmethod
    def load(cls, path, glove_dir=None):
        """The evaluator written by `save`, in eval mode; glove_dir: where GloVe lies now, if it moved."""
        data = _load_torch(path, ('config', 'mean', 'std', 'words', 'state'))
        glove = glove_dir or data['glove_dir'] if data['words'] == 'glove' else None
        words = data['words'] and Words(glove, data['config']['word_dim'])
        model = cls(data['mean'], data['std'], words, **data['config'])
        _fill(model, data['state'], path)
        return model.eval()

    @classmethod
    def from_t2m(cls, root, name='t2m', glove_dir=None):
        """The official evaluator, in eval mode: <root>/<name>/text_mot_match/model/finest.tar with
        <root>/<name>/Comp_v6_KLD005/meta/{mean,std}.npy. All sizes are read off the tensors. glove_dir (else
        <root>/glove where that exists) adds the words; without them `embed_text` refuses.
        Raises FileNotFoundError or ValueError in one sentence."""
        path = os.path.join(root, name, 'text_mot_match', 'model', 'finest.tar')
        parts = _load_torch(path, ('movement_encoder', 'motion_encoder', 'text_encoder'))
        meta = os.path.join(root, name, 'Comp_v6_KLD005', 'meta')
        mean, std = (_load_array(os.path.join(meta, f), 'evaluator statistics') for f in ('mean.npy', 'std.npy'))
        m, g, t = (parts[k] for k in ('movement_encoder', 'motion_encoder', 'text_encoder'))
        try:
            movement, features, _ = m['main.0.weight'].shape
            word_dim, tag_dim = t['pos_emb.weight'].shape
            sizes = dict(movement=movement, code=m['main.3.weight'].shape[0], motion_hidden=g['hidden'].shape[-1],
                         text_hidden=t['hidden'].shape[-1], out=t['output_net.3.weight'].shape[0],
                         word_dim=word_dim, tag_dim=tag_dim)
        except KeyError as e:
            raise ValueError(f'{path} has no tensor {e.args[0]}') from None
        except (AttributeError, IndexError, TypeError, ValueError):
            raise ValueError(f'{path} does not hold the weights of the three encoders') from None
        if mean.shape != (features + 4,) or std.shape != mean.shape:
            raise ValueError(f'{meta}: mean {mean.shape} and std {std.shape} should be ({features + 4},) as the weights')
        glove = os.path.join(root, 'glove')
        glove_dir = glove_dir or (glove if os.path.isdir(glove) else None)
        model = cls(mean, std, Words(glove_dir) if glove_dir else None, **sizes)
        for key in ('movement_encoder', 'motion_encoder', 'text_encoder'):
            _fill(getattr(model, key), parts[key], f'{path} ({key})')
        return model.eval()


def _load_array(path, what):
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f'{what} not found: {path}') from None
    except Exception as e:
        raise ValueError(f'{path} is not a readable .npy array: {e}') from None


def _load_torch(path, keys):
    if not os.path.isfile(path):
        raise FileNotFoundError(f'evaluator weights not found: {path}')
    try:
        data = torch.load(path, map_location='cpu', weights_only=True)
    except Exception:             # zip and pickle damage raise many kinds, code in it is an UnpicklingError
        raise ValueError(f'{path} was not loaded: it is damaged, or holds code (never run) beside tensors') from None
    missing = [k for k in keys if not isinstance(data, dict) or k not in data]
    if missing:
        raise ValueError(f'{path} is no evaluator checkpoint: it has no key {missing[0]!r}')
    return data


def _fill(module, state, path):
    """load_state_dict that names the first tensor that is missing, unknown or of another shape in one sentence."""
    own = module.state_dict()
    for key in [*own, *state]:
        if key not in state or key not in own:
            raise ValueError(f'{path} {"lacks the" if key in own else "has an unknown"} tensor {key}')
        if own[key].shape != state[key].shape:
            raise ValueError(f'{path}: {key} has shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}')
    module.load_state_dict(state)


# ----------------------------------------------------------------------------------------------------------------------
# metrics: arrays or tensors in, float64 inside, floats out (Guo et al. 2022, section 5, unless another source is named)

def _f64(x, ndim):
    x = np.asarray(x.detach().cpu() if isinstance(x, torch.Tensor) else x)
    if x.ndim != ndim:
        raise ValueError(f'this metric needs an array of {ndim} dimensions, found shape {x.shape}')
    if not np.isfinite(x).all():
        raise ValueError('a metric was given NaN or infinite values')
    return x.astype(np.float64)


def fid(real, gen):
    """Frechet distance of the normal distributions fitted to real (N, d) and gen (M, d); N, M >= 2.

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^1/2 (Heusel et al. 2017). The trace of the root is the sum of the
    singular values of C1^1/2 C2^1/2, and both roots are of symmetric matrices (eigh): nothing can turn complex, also
    when N < d and the covariances are singular."""
    real, gen = _f64(real, 2), _f64(gen, 2)
    if min(len(real), len(gen)) < 2:
        raise ValueError(f'FID needs at least 2 vectors on each side, found {len(real)} and {len(gen)}')
    covs = [np.atleast_2d(np.cov(x, rowvar=False)) for x in (real, gen)]
    roots = [vectors * np.sqrt(values.clip(min=0)) @ vectors.T for values, vectors in map(np.linalg.eigh, covs)]
    cross = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    return float(max(((real.mean(0) - gen.mean(0)) ** 2).sum() + np.trace(covs[0]) + np.trace(covs[1]) - 2 * cross, 0))


def r_precision(text, motion, top_k=3, batch=32, same=None):
    """How often a text's own motion is among the k nearest of its batch -> (top_k,) array for k = 1 .. top_k.

    text, motion: (N, d) paired, in the (shuffled) order that makes the batches; a last partial batch is dropped.
    same: N caption strings; then any motion of the same caption counts as the text's own. A wrong motion at exactly the
    right one's distance counts as nearer, so that a collapsed network scores 0 and not 1."""
    text, motion, n = _f64(text, 2), _f64(motion, 2), len(text) // batch
    if n == 0 or text.shape != motion.shape:
        raise ValueError(f'R-precision needs paired vectors, at least {batch}: found {text.shape} and {motion.shape}')
    label = np.arange(len(text)) if same is None else np.unique(list(same), return_inverse=True)[1]
    text, motion, label = (x[:n * batch].reshape(n, batch, *x.shape[1:]) for x in (text, motion, label))
    d = np.stack([np.linalg.norm(t[:, None] - m, axis=-1) for t, m in zip(text, motion)])      # (n, 32, 32)
    match = label[:, :, None] == label[:, None, :]
    own = np.where(match, d, np.inf).min(-1, keepdims=True)
    rank = (~match & (d <= own)).sum(-1)                     # wrong motions that come first
    return np.array([(rank < k).mean() for k in range(1, top_k + 1)])


def mm_dist(text, motion):
    """Mean Euclidean distance of paired (N, d) text and motion vectors."""
    return float(np.linalg.norm(_f64(text, 2) - _f64(motion, 2), axis=-1).mean())


def diversity(emb, pairs=300, rng=None):
    """Mean distance of two random subsets of emb (N, d), `pairs` vectors each (all N when there are fewer).
    rng: a numpy Generator; None draws a fresh one."""
    emb, rng = _f64(emb, 2), rng or np.random.default_rng()
    pairs = min(pairs, len(emb))
    a, b = (rng.choice(len(emb), pairs, replace=False) for _ in range(2))
    return float(np.linalg.norm(emb[a] - emb[b], axis=-1).mean())


def multimodality(emb, pairs=10, rng=None):
    """emb (n_texts, n_gens, d): mean distance of `pairs` random pairs of one text's generations. ValueError when there
    are fewer generations than pairs (the subsets are drawn without replacement)."""
    emb, rng = _f64(emb, 3), rng or np.random.default_rng()
    if emb.shape[1] < pairs:
        raise ValueError(f'multimodality draws {pairs} of each text\'s generations, there are only {emb.shape[1]}')
    a, b = (rng.choice(emb.shape[1], pairs, replace=False) for _ in range(2))
    return float(np.linalg.norm(emb[:, a] - emb[:, b], axis=-1).mean())


def mpjpe(pred, gt):
    """Mean joint error per frame with both pelvises (joint 0) at the origin: (T, J, 3) twice -> (T,), in the joints'
    unit (metres here: times 1000 for the mm of the tables). Source: momask's evaluation."""
    pred, gt = _f64(pred, 3), _f64(gt, 3)
    return np.linalg.norm((pred - pred[:, :1]) - (gt - gt[:, :1]), axis=-1).mean(-1)


def interval(values):
    """Repeats (n,) or (n, k) -> mean and half-width of the 95% interval 1.96 std / sqrt(n), over the repeats."""
    values = np.asarray(values, dtype=np.float64)
    return values.mean(0), 1.96 * values.std(0) / np.sqrt(len(values))
