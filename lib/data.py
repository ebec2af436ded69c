"""A data set on disk, and batches of it. prepare_data.py writes data/<name>/:

    meta.json              name, skeleton, counts, ...; a digest of each other file
    mean.npy, std.npy      (D,) float32
    <split>_motion.npy     (frames, D) float32: all clips end to end, not normalized, memory-mapped
    <split>_clips.npz      start, length (clips,) int64; name (clips,) text
    <split>_captions.json  [{"clip": 0, "text": "a person walks", "tokens": "a/DET ..."}, ...]

Training adds two caches, text_clip.npz (lib/text.py) and tokens_<tokenizer>_<split>.npz
(`cached_tokens`), so that it runs neither CLIP nor the tokenizer's encoder.

D features per frame (lib/motion.py), Q quantizers, B batch, N tokens of a batch's longest clip.
"""
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lib.configurator import UserError
from lib.motion import SKELETONS
from lib.runtime import atomic_write, read, read_array, read_arrays, read_json
from lib.text import encode_captions

LARGEST = 1e6      # bound of a feature: a kilometre, in the millimetres of KIT
STD_FLOOR = 1e-3   # replaces the std of a constant feature; real groups are above 0.01
FRAMES_PER_TOKEN = 4

# ------------------------------------------------------------------------------------------ writing


def save_split(folder, split, clips):
    """Write one split and return its counts, {} (and no file) if there are no clips.

    clips: an iterable of (name, features (T, D), captions: dicts of text and tokens). Each clip is
    written as soon as it is read, so the set need not fit in memory. UserError for features that
    are not finite.
    """
    path = os.path.join(folder, f'{split}_motion.npy')
    names, lengths, captions = [], [], []
    dim = 0

    def write_header():   # numpy pads headers to one size, so it can be corrected at the end
        header = dict(descr='<f4', fortran_order=False, shape=(sum(lengths), dim))
        np.lib.format.write_array_header_1_0(f, header)

    with atomic_write(path) as f:
        for name, features, of_clip in clips:
            features = np.ascontiguousarray(features, dtype='<f4')
            if not np.isfinite(features).all():
                raise UserError(f'{name} has NaN or infinite features: leave it out of {split}.')
            dim = features.shape[1]
            if not names:
                write_header()
            f.write(features.data)
            captions += [dict(clip=len(names), **caption) for caption in of_clip]
            names.append(name)
            lengths.append(len(features))
        f.seek(0)
        write_header()
    if not names:
        os.remove(path)
        return {}

    length = np.array(lengths)
    with atomic_write(os.path.join(folder, f'{split}_clips.npz')) as f:
        np.savez(f, start=np.cumsum(length) - length, length=length, name=names)
    with atomic_write(os.path.join(folder, f'{split}_captions.json'), 'w') as f:
        json.dump(captions, f, ensure_ascii=False)
    return dict(clips=len(names), frames=int(length.sum()), captions=len(captions))


def save_meta(folder, meta, mean, std):
    """Write the statistics (std floored at STD_FLOOR), and meta.json with a digest of every file of
    the data set, which reading compares."""
    np.save(os.path.join(folder, 'mean.npy'), np.asarray(mean, dtype=np.float32))
    np.save(os.path.join(folder, 'std.npy'), np.maximum(std, STD_FLOOR).astype(np.float32))
    files = {file: digest(os.path.join(folder, file)) for file in sorted(os.listdir(folder))}
    with atomic_write(os.path.join(folder, 'meta.json'), 'w') as f:
        json.dump({**meta, 'files': files}, f, indent=1)


def mean_std(features, n_joints):
    """Mean and std (D,) of flat features (frames, D). The std is averaged within each group of
    features that share a unit, as in HumanML3D."""
    chunks = [features[i:i + 16384] for i in range(0, len(features), 16384)]
    mean = sum(chunk.sum(0, dtype=np.float64) for chunk in chunks) / len(features)
    centre = mean.astype(np.float32)
    square = sum(np.square(chunk - centre).sum(0, dtype=np.float64) for chunk in chunks)
    std = np.sqrt(square / len(features))
    J = n_joints
    # yaw, xz velocity, height, positions, rotations, velocities; contacts are the rest
    ends = np.cumsum([1, 2, 1, (J - 1) * 3, (J - 1) * 6, J * 3])
    return mean, np.concatenate([np.full(len(g), g.mean()) for g in np.split(std, ends)])


def digest(path):
    """Hash of a file's bytes; a second per gigabyte."""
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, hashlib.blake2b).hexdigest()[:32]


# ------------------------------------------------------------------------------------------ reading


@dataclass
class Split:
    """One split of a data set. Clip i has n_captions[i] captions, from first_caption[i] on."""
    features: np.ndarray        # (frames, D) float32, a read-only memory map
    start: np.ndarray           # (clips,) int64, a clip's first frame
    length: np.ndarray          # (clips,) int64, frames
    names: np.ndarray           # (clips,) str
    captions: list              # dicts with clip, text, tokens (toy: script too), in order of clips
    first_caption: np.ndarray   # (clips,) int64
    n_captions: np.ndarray      # (clips,) int64, may be 0

    def __len__(self):
        return len(self.start)

    def clip(self, i):
        """Features (T, D) of clip i."""
        return self.features[self.start[i]:self.start[i] + self.length[i]]

    def names_at(self, frames):
        """Frame numbers (B,), a tensor -> the names of the clips they are in."""
        return self.names[np.searchsorted(self.start, frames.cpu().numpy(), 'right') - 1]


def how_to_make(name):
    """The command that prepares a data set of this name."""
    if name == 'toy':
        return 'python prepare_data.py toy'
    if name in ('bandai', 'cmu', 'hml3d', 'kit', 'babel'):
        return f'python prepare_data.py {name} --src=...'
    return f'python prepare_data.py folder --src=... --out=data/{name}'


def load_meta(folder):
    """Returns meta (dict), mean (D,) and std (D,), checked. UserError names the command that
    prepares the data."""
    command = how_to_make(os.path.basename(os.path.normpath(folder)))
    path = os.path.join(folder, 'meta.json')
    if not os.path.exists(path):
        raise UserError(f'{folder} has no prepared data; run `{command}` first')

    def open_it(path):
        meta = json.loads(Path(path).read_text(encoding='utf-8'))
        for key, kind in dict(name=str, max_frames=int, counts=dict, files=dict).items():
            if not isinstance(meta[key], kind):
                raise ValueError(f'{key} is {meta[key]!r:.60}')
        if not 0 < meta['max_frames'] < 1e6:
            raise ValueError('max_frames makes no sense')
        skeleton = SKELETONS[meta['skeleton']]
        return meta | dict(fps=skeleton.fps, dim=skeleton.dim, n_joints=skeleton.n_joints,
                           units_per_metre=skeleton.units_per_metre)

    meta = read(path, f'run `{command}` again', open_it)
    mean, std = (np.array(read_array(unchanged(folder, meta, file), f'run `{command}` again'))
                 for file in ('mean.npy', 'std.npy'))
    return meta, mean, std


def load_split(folder, name):
    """Open one split. UserError where it is missing, or where a file is not what prepare_data.py
    wrote and checked: a flipped bit is found, a copy is accepted."""
    meta = load_meta(folder)[0]
    again = f'run `{how_to_make(meta["name"])}` again'
    if f'{name}_motion.npy' not in meta['files']:
        raise UserError(f'{folder} has no split "{name}" (it has {", ".join(meta["counts"])}); '
                        f'{again}')
    motion, clips, captions = (unchanged(folder, meta, f'{name}_{part}')
                               for part in ('motion.npy', 'clips.npz', 'captions.json'))
    features = read_array(motion, again)
    start, length, names = read_arrays(clips, again, ('start', 'length', 'name'))
    captions = sorted(read_json(captions, again), key=lambda caption: caption['clip'])
    n_captions = np.bincount([c['clip'] for c in captions], minlength=len(start))
    first_caption = np.cumsum(n_captions) - n_captions
    return Split(features, start, length, names, captions, first_caption, n_captions)


def unchanged(folder, meta, file):
    """The path of a file of a data set. UserError unless its bytes are those that were written,
    which takes a second per gigabyte."""
    path = os.path.join(folder, file)
    if not os.path.isfile(path) or digest(path) != meta['files'].get(file):
        raise UserError(f'{path} is missing, or not the file that prepare_data.py wrote; run '
                        f'`{how_to_make(meta["name"])}` again')
    return path


def fingerprint(folder):
    """A short hash of everything in a data set that training reads, which checkpoints keep."""
    files = load_meta(folder)[0]['files']
    read_in_training = {file: files[file] for file in files if not file.startswith('test_')}
    text = json.dumps(read_in_training, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


# ------------------------------------------------------------------------------- lengths and groups


def field_length(length, generator=None, longest=None):
    """The length rule of the standard evaluation (Guo et al. 2022).

    A clip is rounded down to whole tokens, one time in three it is a token shorter, and it starts
    at a random frame where it fits. length (N,) frames -> start (N,) frames, tokens (N,), both
    int64. Without a generator: the whole clip from its first frame. longest: at most so many
    tokens.
    """
    length = torch.as_tensor(length)
    tokens = length // FRAMES_PER_TOKEN
    if longest is not None:
        tokens = tokens.clamp(max=longest)
    if generator is None:
        return torch.zeros_like(length), tokens

    def draw(high):
        u = torch.rand(length.shape, generator=generator, device=length.device)
        return (u * high).long()

    shorter = (draw(3) == 2).long()
    tokens = (tokens - shorter).clamp(min=1)
    start = draw(length - FRAMES_PER_TOKEN * tokens + 1)
    return start, tokens


def random_captions(split, clips, generator):
    """A random caption of each of the clips (B,): indices (B,). The standard training draws a clip,
    then one of its captions; to draw captions would favour clips that have many. split: a Split or
    Tokens."""
    u = torch.rand(clips.shape, generator=generator, device=clips.device)
    first = torch.as_tensor(split.first_caption)[clips]
    count = torch.as_tensor(split.n_captions)[clips]
    return first + (u * count).long()


def by_length(lengths, size):
    """Indices of clips (N,) in groups of similar length, at most `size` each, short ones first, to
    save padding."""
    return torch.as_tensor(lengths).argsort(stable=True).split(size)


def equal_lengths(lengths, size=64):
    """Indices of clips (N,) in groups of the same length, at most `size` each: no padding."""
    lengths = torch.as_tensor(lengths)
    groups = []
    for length in lengths.unique():
        groups += (lengths == length).nonzero()[:, 0].split(size)
    return groups


# ------------------------------------------------------------------------------------------ batches


@torch.no_grad()
def cached_tokens(tokenizer, split, path, device='cpu'):
    """Token ids of a whole split, cached at `path` (.npz): (4, total, Q) int16.

    Row p holds the tokens of all clips from their frame p on, (length - p) // 4 of each clip, at
    the place of its length // 4 tokens. There are four rows because a training clip starts at a
    random frame and a token covers four.
    """
    n_tokens = split.length // FRAMES_PER_TOKEN
    start = np.cumsum(n_tokens) - n_tokens
    shape = (FRAMES_PER_TOKEN, n_tokens.sum(), tokenizer.config.n_quantizers)
    if os.path.exists(path):
        hint = 'delete it, and it is computed again'
        ids, = read_arrays(path, hint, ('ids',))
        if ids.shape != shape or ids.dtype != np.int16:
            raise UserError(f'{path} has {ids.shape} of {ids.dtype}, expected {shape} of int16: '
                            f'{hint}.')
        return ids

    tokenizer = tokenizer.to(device).eval()
    ids = np.zeros(shape, np.int16)
    bar = tqdm(total=4 * len(split), desc=os.path.basename(path), mininterval=1, leave=False)
    for phase in range(FRAMES_PER_TOKEN):
        n_phase = (split.length - phase) // FRAMES_PER_TOKEN
        for group in equal_lengths(n_phase):
            n = n_phase[group[0]]
            frames = [split.clip(clip)[phase:phase + FRAMES_PER_TOKEN * n] for clip in group]
            motion = tokenizer.normalize(torch.from_numpy(np.stack(frames)).to(device))
            codes = tokenizer.encode(motion).cpu().numpy()
            for clip, row in zip(group, codes):
                ids[phase, start[clip]:start[clip] + n] = row
            bar.update(len(group))
    bar.close()
    with atomic_write(path) as f:   # several ranks may write it at once
        np.savez(f, ids=ids)
    return ids


def open_tokens(folder, name, split, tokenizer, text_encoder, text, device):
    """The Tokens of a split, named 'train' or 'val' in a data folder: ids and text, each from its
    cache where there is one. UserError for a split without captions."""
    if not split.captions:
        raise UserError(f'{folder}/{name}_captions.json is empty: transformers learn from text.')
    path = os.path.join(folder, f'tokens_{tokenizer.fingerprint()}_{name}.npz')
    ids = cached_tokens(tokenizer, split, path, device)
    captions = [caption['text'] for caption in split.captions]
    tagged = [caption['tokens'] for caption in split.captions]
    encoded = encode_captions(captions, text_encoder, text, tagged, folder, device)
    return Tokens(split, ids, *encoded, device)


class Tokens:
    """A split for the transformers, on the device: token ids of all clips, text of all captions."""

    def __init__(self, split, ids, vectors, index, role, device):
        """ids (4, total, Q) from `cached_tokens`; vectors (U, 512), index (captions, m) and role
        (captions, m) from `text.encode_captions`."""
        arrays = dict(ids=ids, vectors=vectors, index=index, role=role, length=split.length,
                      first_caption=split.first_caption, n_captions=split.n_captions,
                      clip_of=[caption['clip'] for caption in split.captions])
        for name, array in arrays.items():
            setattr(self, name, torch.as_tensor(array).to(device))
        self.clips = self.n_captions.nonzero()[:, 0]   # those with captions
        self.start = torch.cumsum(self.length // FRAMES_PER_TOKEN, 0)
        self.start -= self.length // FRAMES_PER_TOKEN

    def draw(self, size, generator):
        """Random captions (size,), a clip first, then one of its captions."""
        pick = torch.randint(len(self.clips), (size,), device=self.ids.device, generator=generator)
        return random_captions(self, self.clips[pick], generator)

    def batch(self, captions, generator=None, width=None):
        """captions (B,) -> ids (B, N, Q), c (B, m, 512), role (B, m) int8, valid (B, N) bool.

        generator: crop by `field_length`; None takes whole clips. N is the longest of the batch, or
        width, and m the largest number of condition tokens (with a width, for compiled models, of
        the whole split). Ids behind the end of a clip are arbitrary.
        """
        clip = self.clip_of[captions]
        start, n = field_length(self.length[clip], generator)
        phase = start % FRAMES_PER_TOKEN
        first = self.start[clip] + start // FRAMES_PER_TOKEN
        t = torch.arange(width or int(n.max()), device=self.ids.device)
        place = (first[:, None] + t).clamp(max=self.ids.shape[1] - 1)
        ids = self.ids[phase[:, None], place].long()
        role = self.role[captions]
        m = role.shape[1] if width else int(role.any(0).sum())
        c = self.vectors[self.index[captions, :m]]
        return ids, c, role[:, :m], t < n[:, None]


class Windows:
    """Random windows of `size` frames for the tokenizer, from the memory map (CPU) or a copy on the
    device. Shorter clips are left out, as in MoMask's code."""

    def __init__(self, split, size, device):
        self.features = torch.from_numpy(split.features).to(device)   # a CPU reads nothing yet
        places = np.maximum(split.length - size + 1, 0)
        if not places.any():
            raise UserError(f'No clip has {size} frames: give a smaller --window_frames.')
        starts = [np.arange(a, a + n) for a, n in zip(split.start, places)]
        self.starts = torch.from_numpy(np.concatenate(starts)).to(device)
        self.frames = torch.arange(size, device=device)

    def __len__(self):
        return len(self.starts)

    def draw(self, count, generator):
        """The first frames (count,) of random windows."""
        device = self.starts.device
        pick = torch.randint(len(self.starts), (count,), device=device, generator=generator)
        return self.starts[pick]

    def batch(self, first):
        """First frames (B,) -> (B, frames, D), not normalized."""
        return self.features[first[:, None] + self.frames]


class Clips:
    """A split for the evaluator: the clips of at least one token that have captions."""

    def __init__(self, folder, name):
        self.split = load_split(folder, name)
        usable = (self.split.n_captions > 0) & (self.split.length >= FRAMES_PER_TOKEN)
        self.clips = torch.from_numpy(np.flatnonzero(usable))
        if not len(self.clips):
            raise UserError(f'the {name} split of {folder} has no clip with a caption')

    def __len__(self):
        return len(self.clips)

    def draw(self, rows, generator, crop=True, longest=None):
        """rows (B,) of self.clips -> captions (B,), first frames (B,), frames (B,): a random
        caption of each, and a crop of at most `longest` tokens by `field_length`. crop=False: the
        whole clip, rounded down to tokens."""
        clips = self.clips[rows]
        captions = random_captions(self.split, clips, generator)
        length = torch.from_numpy(self.split.length)[clips]
        start, tokens = field_length(length, generator if crop else None, longest)
        first = torch.from_numpy(self.split.start)[clips] + start
        return captions, first, FRAMES_PER_TOKEN * tokens

    def features(self, first, frames):
        """first frames (B,), frames (B,) -> list of B arrays (frames_i, D)."""
        spans = zip(first.tolist(), frames.tolist())
        return [np.array(self.split.features[a:a + n]) for a, n in spans]
