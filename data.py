"""A data set on disk, and batches of it. `prepare_data.py` writes data/<name>/:

    meta.json              name, skeleton, fps, dim, n_joints, ...; a stamp of each big file
    mean.npy, std.npy      (D,) float32
    <split>_motion.npy     (frames, D) float32: all clips end to end, not normalized, a memory map
    <split>_clips.npz      start, length (clips,) int64; name (clips,) text
    <split>_captions.json  [{"clip": 0, "text": "a person walks", "tokens": "a/DET ..."}, ...]

Later come caches: text_clip.npz (text.py) and tokens_<tokenizer>_<split>.npy (`tokenize`). So
training touches neither CLIP nor the tokenizer's encoder.

D features a frame (motion.py), Q quantizers, B batch, N tokens of the longest clip of a batch.
"""
import hashlib
import json
import os
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from configurator import UserError
from runtime import atomic_write

STD_FLOOR = 1e-3   # a feature that never varies is divided by this; real groups lie above 0.01
FRAMES_PER_TOKEN = 4

# ------------------------------------------------------------------------------------------ writing


def save_split(folder, split, clips, captions):
    """Write one split; returns its counts, {} (and no file) if there are no clips.

    clips: any iterable of (name, features (T, D)), written as it is read, so that a large set never
    has to fit in memory. captions: a list of dicts with clip (index), text and tokens, which may
    still grow while clips are being read. UserError for features that are not finite.
    """
    path = os.path.join(folder, f'{split}_motion.npy')
    names = []
    lengths = []
    dim = 0

    def write_header():   # numpy pads it to one size: the true number of frames goes in at the end
        header = dict(descr='<f4', fortran_order=False, shape=(sum(lengths), dim))
        np.lib.format.write_array_header_1_0(f, header)

    with open(path, 'wb') as f:
        for name, features in clips:
            features = np.ascontiguousarray(features, dtype='<f4')
            if not np.isfinite(features).all():
                raise UserError(f'{name} has NaN or infinite features: leave it out of {split}.')
            dim = features.shape[1]
            if not names:
                write_header()
            f.write(features.data)
            names.append(name)
            lengths.append(len(features))
        f.seek(0)
        write_header()
    if not names:
        os.remove(path)
        return {}

    length = np.array(lengths, dtype=np.int64)
    start = np.cumsum(length) - length
    np.savez(os.path.join(folder, f'{split}_clips.npz'), start=start, length=length, name=names)
    with open(os.path.join(folder, f'{split}_captions.json'), 'w', encoding='utf-8') as f:
        json.dump(captions, f, ensure_ascii=False)
    return dict(clips=len(names), frames=int(length.sum()), captions=len(captions))


def save_meta(folder, meta, mean, std):
    """Write the statistics (std floored at STD_FLOOR), and meta.json with a stamp of each
    <split>_motion.npy, by which `load_split` knows the file that was checked while written."""
    stamps = {}
    for file in sorted(os.listdir(folder)):
        if file.endswith('_motion.npy'):
            stamps[file] = stamp(os.path.join(folder, file))
    np.save(os.path.join(folder, 'mean.npy'), np.asarray(mean, dtype=np.float32))
    np.save(os.path.join(folder, 'std.npy'), np.maximum(std, STD_FLOOR).astype(np.float32))
    with atomic_write(os.path.join(folder, 'meta.json'), 'w') as f:
        json.dump({**meta, 'files': stamps}, f, indent=1)


def mean_std(features, n_joints):
    """Mean and std (D,) of flat features (frames, D). The std is averaged within each group of
    features that share a unit, as HumanML3D does."""
    chunks = [features[i:i + 16384] for i in range(0, len(features), 16384)]
    mean = sum(chunk.sum(0, dtype=np.float64) for chunk in chunks) / len(features)
    centre = mean.astype(np.float32)
    square = sum(np.square(chunk - centre).sum(0, dtype=np.float64) for chunk in chunks)
    std = np.sqrt(square / len(features))
    J = n_joints
    # yaw, xz velocity, height, positions, rotations, velocities; the rest are contacts
    ends = np.cumsum([1, 2, 1, (J - 1) * 3, (J - 1) * 6, J * 3])
    return mean, np.concatenate([np.full(len(g), g.mean()) for g in np.split(std, ends)])


def digest(path):
    """Hash of a file's bytes: a second for each gigabyte."""
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, hashlib.blake2b).hexdigest()[:32]


def stamp(path):
    status = os.stat(path)
    return dict(bytes=status.st_size, modified=status.st_mtime_ns, blake2b=digest(path))


# ------------------------------------------------------------------------------------------ reading


@dataclass
class Split:
    """One split of a data set. The captions of clip i are first_caption[i] onwards, n_captions[i]
    of them."""
    features: np.ndarray        # (frames, D) float32, a read-only memory map
    start: np.ndarray           # (clips,) int64, a clip's first frame
    length: np.ndarray          # (clips,) int64, frames
    names: np.ndarray           # (clips,) str
    captions: list              # dicts with clip, text, tokens (toy: script too), in order of clips
    first_caption: np.ndarray   # (clips,) int64
    n_captions: np.ndarray      # (clips,) int64, 0 for a clip that nobody described

    def __len__(self):
        return len(self.start)

    def clip(self, i):
        """Features (T, D) of clip i."""
        return self.features[self.start[i]:self.start[i] + self.length[i]]


def load_meta(folder):
    """-> (meta dict, mean (D,), std (D,)). UserError names the command that makes the data."""
    try:
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
            meta = json.load(f)
        mean, std = (np.load(os.path.join(folder, f'{s}.npy')) for s in ('mean', 'std'))
    except FileNotFoundError:
        name = os.path.basename(os.path.normpath(folder))
        raise UserError(f'{folder} holds no prepared data; run `python prepare_data.py {name}` '
                        'first') from None
    return meta, mean, std


def load_split(folder, name):
    """Open one split. UserError where it is missing, of another width than meta.json's, or not the
    file that was written: features were checked then, and gigabytes are not read again here."""
    meta = load_meta(folder)[0]
    again = f'run `python prepare_data.py {meta["name"]}` again'
    path = os.path.join(folder, f'{name}_motion.npy')
    if not os.path.exists(path):
        raise UserError(f'{folder} has no split "{name}" (it has {", ".join(meta["counts"])}); '
                        f'{again}')
    refuse_changed(path, meta.get('files', {}).get(f'{name}_motion.npy'), again)
    features = np.load(path, mmap_mode='r')
    if features.ndim != 2 or features.shape[1] != meta['dim']:
        raise UserError(f'{path} has shape {features.shape} where meta.json says width '
                        f'{meta["dim"]}; {again}')

    with np.load(os.path.join(folder, f'{name}_clips.npz')) as clips:
        start, length, names = clips['start'], clips['length'], clips['name']
    with open(os.path.join(folder, f'{name}_captions.json'), encoding='utf-8') as f:
        captions = sorted(json.load(f), key=lambda caption: caption['clip'])
    n_captions = np.bincount([c['clip'] for c in captions], minlength=len(start))
    first_caption = np.cumsum(n_captions) - n_captions
    return Split(features, start, length, names, captions, first_caption, n_captions)


def refuse_changed(path, written, again):
    """UserError unless path is the file of the stamp `written`. Size and time settle it at once; a
    copied file has a new time, and its bytes are compared."""
    if written is None:
        raise UserError(f'{path} was prepared by an older version of this project; {again}')
    status = os.stat(path)
    if status.st_size == written['bytes']:
        if status.st_mtime_ns == written['modified'] or digest(path) == written['blake2b']:
            return
    raise UserError(f'{path} is not the file that prepare_data.py wrote and checked; {again}')


# ------------------------------------------------------------------------------- lengths and groups


def field_length(length, generator=None, longest=None):
    """The field's length rule, in the one place where it stands (Guo et al. 2022).

    A clip is rounded down to whole tokens, one time in three it is a token shorter than that, and
    it starts wherever it fits. length (N,) frames -> start (N,) frames, tokens (N,), both int64.
    Without a generator: the whole clip from its first frame. longest: at most so many tokens.
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
    """A caption of each of the clips (B,): indices (B,). The field draws a clip, then one of its
    captions; drawing captions would favour the clips that have many. split: a Split or Tokens."""
    u = torch.rand(clips.shape, generator=generator, device=clips.device)
    first = torch.as_tensor(split.first_caption)[clips]
    count = torch.as_tensor(split.n_captions)[clips]
    return first + (u * count).long()


def by_length(lengths, size):
    """Indices of clips (N,) in groups of similar length, at most `size` each, short ones first: a
    batch is padded to its longest."""
    return torch.as_tensor(lengths).argsort(stable=True).split(size)


def equal_lengths(lengths, size=64):
    """Indices of clips (N,) in groups of one length, at most `size` each: nobody sees padding."""
    lengths = torch.as_tensor(lengths)
    groups = []
    for length in lengths.unique():
        groups += (lengths == length).nonzero()[:, 0].split(size)
    return groups


# ------------------------------------------------------------------------------------------ batches


@torch.no_grad()
def tokenize(tokenizer, split, path, device='cpu'):
    """Token ids of a whole split, cached at `path` (.npy): (4, total, Q) int16.

    Row p holds the clips from their frame p on: (length - p) // 4 tokens each, that begin at
    cumsum(length // 4). Four phases, because the field starts a clip at a random frame and a token
    begins every fourth.
    """
    if os.path.exists(path):
        return np.load(path)
    tokenizer = tokenizer.to(device).eval()
    n_tokens = split.length // FRAMES_PER_TOKEN
    start = np.cumsum(n_tokens) - n_tokens
    ids = np.zeros((FRAMES_PER_TOKEN, n_tokens.sum(), tokenizer.config.n_quantizers), np.int16)
    bar = tqdm(total=4 * len(split), desc=os.path.basename(path), mininterval=1, leave=False)
    for phase in range(FRAMES_PER_TOKEN):
        n_phase = (split.length - phase) // FRAMES_PER_TOKEN
        for group in equal_lengths(n_phase):
            group = group.numpy()
            n = n_phase[group[0]]
            first = split.start[group] + phase
            frames = np.stack([split.features[a:a + FRAMES_PER_TOKEN * n] for a in first])
            motion = tokenizer.normalize(torch.from_numpy(frames).to(device))
            codes = tokenizer.encode(motion).cpu().numpy()
            for clip, row in zip(group, codes):
                ids[phase, start[clip]:start[clip] + n] = row
            bar.update(len(group))
    bar.close()
    with atomic_write(path) as f:   # several ranks may come here at once
        np.save(f, ids)
    return ids


class Tokens:
    """A split for the transformers, on the device: token ids of all clips, text of all captions."""

    def __init__(self, split, ids, vectors, index, c_valid, device):
        """ids (4, total, Q) from `tokenize`; vectors (U, 512), index (captions, m) and c_valid
        (captions, m) from `text.encode`."""
        def put(x):
            return torch.as_tensor(x).to(device)

        self.ids = put(ids)
        self.vectors = put(vectors)
        self.index = put(index)
        self.c_valid = put(c_valid)
        self.length = put(split.length)
        self.first_caption = put(split.first_caption)
        self.n_captions = put(split.n_captions)
        self.clip_of = put([caption['clip'] for caption in split.captions])
        self.clips = self.n_captions.nonzero()[:, 0]   # those that somebody described
        self.start = torch.cumsum(self.length // FRAMES_PER_TOKEN, 0)
        self.start -= self.length // FRAMES_PER_TOKEN

    def draw(self, size, generator):
        """Random captions (size,), a clip first, then one of its captions."""
        pick = torch.randint(len(self.clips), (size,), device=self.ids.device, generator=generator)
        return random_captions(self, self.clips[pick], generator)

    def batch(self, captions, generator=None, width=None):
        """captions (B,) -> ids (B, N, Q), c (B, m, 512), c_valid (B, m) int8, valid (B, N) bool.

        generator: crops by the field's length rule; None takes whole clips. N is the longest of the
        batch, or width, and m the most condition tokens of one (a compiled model wants one shape:
        of the whole split). Ids behind a clip's end mean nothing.
        """
        clip = self.clip_of[captions]
        start, n = field_length(self.length[clip], generator)
        phase = start % FRAMES_PER_TOKEN
        first = self.start[clip] + start // FRAMES_PER_TOKEN
        t = torch.arange(width or int(n.max()), device=self.ids.device)
        place = (first[:, None] + t).clamp(max=self.ids.shape[1] - 1)
        ids = self.ids[phase[:, None], place].long()
        c_valid = self.c_valid[captions]
        m = c_valid.shape[1] if width else int(c_valid.any(0).sum())
        c = self.vectors[self.index[captions, :m]]
        return ids, c, c_valid[:, :m], t < n[:, None]


class Windows:
    """Random windows of `size` frames for the tokenizer, straight from the memory map (CPU) or from
    a copy on the device. Shorter clips are left out, as in the field."""

    def __init__(self, split, size, device):
        self.features = torch.from_numpy(split.features).to(device)   # on a CPU nothing is read yet
        places = np.maximum(split.length - size + 1, 0)
        if not places.any():
            raise UserError(f'No clip has {size} frames: set --window_frames lower '
                            '(a multiple of 4).')
        starts = [np.arange(a, a + n) for a, n in zip(split.start, places)]
        self.starts = torch.from_numpy(np.concatenate(starts)).to(device)
        self.frames = torch.arange(size, device=device)

    def __len__(self):
        return len(self.starts)

    def batch(self, size, generator, rank=0, world=1):
        """(size / world, frames, D), not normalized: this rank's rows of the global batch."""
        device = self.starts.device
        pick = torch.randint(len(self.starts), (size,), device=device, generator=generator)
        pick = pick.view(world, -1)[rank]
        return self.features[self.starts[pick][:, None] + self.frames]


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
        """rows (B,) of self.clips -> captions (B,), first frames (B,), frames (B,): one random
        caption of each, and the field's random crop of at most `longest` tokens. crop=False: the
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
