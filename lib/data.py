"""A data set on disk, and batches of it. `prepare_data.py` writes data/<name>/:

    meta.json              name, skeleton, counts, ...; a stamp of each big file
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

from lib.configurator import NOT_TEXT, UserError
from lib.motion import SKELETONS
from lib.runtime import atomic_write, read_array, read_arrays, read_json

LARGEST = 1e6      # no feature is larger: a kilometre, in the millimetres of KIT
STD_FLOOR = 1e-3   # a feature that never varies is divided by this; real groups lie above 0.01
FRAMES_PER_TOKEN = 4
META = dict(name=str, skeleton=str, max_frames=int, counts=dict)   # what meta.json must hold

# ------------------------------------------------------------------------------------------ writing


def save_split(folder, split, clips):
    """Write one split; returns its counts, {} (and no file) if there are no clips.

    clips: any iterable of (name, features (T, D), captions: dicts of text and tokens), written as
    it is read, so that a large set never has to fit in memory. UserError for features that are not
    finite.
    """
    path = os.path.join(folder, f'{split}_motion.npy')
    names, lengths, captions = [], [], []
    dim = 0

    def write_header():   # numpy pads it to one size: the true number of frames goes in at the end
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

    length = np.array(lengths, dtype=np.int64)
    start = np.cumsum(length) - length
    with atomic_write(os.path.join(folder, f'{split}_clips.npz')) as f:
        np.savez(f, start=start, length=length, name=names)
    with atomic_write(os.path.join(folder, f'{split}_captions.json'), 'w') as f:
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

    def names_at(self, frames):
        """Frame numbers (B,), a tensor -> the names of the clips that they belong to."""
        return self.names[np.searchsorted(self.start, frames.cpu().numpy(), 'right') - 1]


def how_to_make(name):
    """The command that prepares a data set of this name."""
    if name in ('toy', 'bandai', 'hml3d', 'kit', 'babel'):
        return f'python prepare_data.py {name}'
    return f'python prepare_data.py folder --src=... --out=data/{name}'


def load_meta(folder):
    """-> (meta dict, mean (D,), std (D,)), checked. UserError names the command that makes the
    data."""
    command = how_to_make(os.path.basename(os.path.normpath(folder)))
    again = f'run `{command}` again'
    path = os.path.join(folder, 'meta.json')
    if not os.path.exists(path):
        raise UserError(f'{folder} holds no prepared data; run `{command}` first')
    meta = read_json(path, again)
    for key, kind in META.items():
        value = meta.get(key) if isinstance(meta, dict) else None
        if not isinstance(value, kind) or kind is int and not 0 < value < 1e6:
            raise UserError(f'{path}: {key} is {value!r:.60}; {again}')
    skeleton = SKELETONS.get(meta['skeleton'])
    if not skeleton:
        raise UserError(f'{path}: no skeleton is named {meta["skeleton"]:.60}; {again}')
    meta |= dict(fps=skeleton.fps, dim=skeleton.dim, n_joints=skeleton.n_joints,
                 units_per_metre=skeleton.units_per_metre)
    stats = []
    for name in ('mean', 'std'):
        path = os.path.join(folder, f'{name}.npy')
        values = np.array(read_array(path, again), np.float32)
        lowest = 0 if name == 'std' else -LARGEST
        if values.shape != (meta['dim'],) or not ((lowest < values) & (values < LARGEST)).all():
            raise UserError(f'{path} should be {meta["dim"]} numbers above {lowest:g}; {again}')
        stats.append(values)
    return meta, *stats


def load_split(folder, name):
    """Open one split. UserError where it is missing, damaged, or its features are not the file that
    was written: they were checked then, and gigabytes are not read again here."""
    meta = load_meta(folder)[0]
    again = f'run `{how_to_make(meta["name"])}` again'
    paths = [os.path.join(folder, f'{name}_{part}')
             for part in ('motion.npy', 'clips.npz', 'captions.json')]
    if not os.path.exists(paths[0]):
        raise UserError(f'{folder} has no split "{name}" (it has {", ".join(meta["counts"])}); '
                        f'{again}')
    refuse_changed(paths[0], meta.get('files'), again)
    features = read_array(paths[0], again)
    if features.dtype != np.float32 or features.shape[1:] != (meta['dim'],):
        raise UserError(f'{paths[0]} has shape {features.shape} of {features.dtype}, expected '
                        f'width {meta["dim"]} of float32; {again}')

    start, length, names = read_arrays(paths[1], again, ('start', 'length', 'name'))
    good = start.shape == length.shape == names.shape == (start.size,) and names.dtype.kind == 'U'
    good = good and start.dtype == length.dtype == np.int64 and start.size > 0
    good = good and (0 < length).all() and (length <= len(features)).all()
    ends = np.cumsum(length) if good else [0]
    if not good or (start != ends - length).any() or ends[-1] != len(features):
        raise UserError(f'{paths[1]} does not cut {paths[0]} into clips that lie end to end; '
                        f'{again}')
    if length.max() // FRAMES_PER_TOKEN > meta['max_frames'] // FRAMES_PER_TOKEN:
        raise UserError(f'{paths[1]} has a clip of {length.max()} frames where meta.json says '
                        f'max_frames {meta["max_frames"]}; {again}')

    captions = read_json(paths[2], again)
    if not isinstance(captions, list):
        raise UserError(f'{paths[2]} is no list of captions; {again}')
    for i, caption in enumerate(captions):
        if not is_caption(caption, len(start)):
            raise UserError(f'{paths[2]}, caption {i}: expected the number of a clip (0 to '
                            f'{len(start) - 1}), a text, and tokens word/TAG, found '
                            f'{caption!r:.200}; {again}')
    captions.sort(key=lambda caption: caption['clip'])
    n_captions = np.bincount([c['clip'] for c in captions], minlength=len(start))
    first_caption = np.cumsum(n_captions) - n_captions
    return Split(features, start, length, names, captions, first_caption, n_captions)


def is_caption(caption, n_clips):
    """Is it a dict of what one needs?"""
    if not isinstance(caption, dict):
        return False
    clip, text, tokens = (caption.get(key) for key in ('clip', 'text', 'tokens'))
    return (type(clip) is int and 0 <= clip < n_clips and isinstance(text, str)
            and isinstance(tokens, str) and not NOT_TEXT.search(text + tokens)
            and all('/' in token for token in tokens.split()))


def fingerprint(folder):
    """A short hash of all that training reads of a data set; a checkpoint remembers it. The
    features are known by the stamp that `load_split` compares, the small files by their bytes."""
    meta = load_meta(folder)[0]
    again = f'run `{how_to_make(meta["name"])}` again'
    parts = []
    for split in ('train', 'val'):
        path = os.path.join(folder, f'{split}_motion.npy')
        parts.append(stamp_of(path, meta.get('files'), again)['blake2b'])
    small = 'mean.npy std.npy train_clips.npz train_captions.json val_clips.npz val_captions.json'
    parts += [digest(os.path.join(folder, name)) for name in small.split()]
    return hashlib.blake2b(''.join(parts).encode(), digest_size=8).hexdigest()


def stamp_of(path, stamps, again):
    """What meta.json remembers of a file. UserError where that is nothing."""
    written = stamps.get(os.path.basename(path)) if isinstance(stamps, dict) else None
    if not isinstance(written, dict) or not {'bytes', 'modified', 'blake2b'} <= written.keys():
        raise UserError(f'{path} was prepared by an older version of this project; {again}')
    return written


def refuse_changed(path, stamps, again):
    """UserError unless path is the file of its stamp. Size and time settle it at once; a copied
    file has a new time, and its bytes are compared."""
    written = stamp_of(path, stamps, again)
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

    Row p holds the clips from their frame p on, (length - p) // 4 tokens each. A clip's begin where
    the clips before it would end with length // 4 each. Four phases, because the field starts a
    clip at a random frame and a token begins every fourth.
    """
    n_tokens = split.length // FRAMES_PER_TOKEN
    start = np.cumsum(n_tokens) - n_tokens
    shape = (FRAMES_PER_TOKEN, n_tokens.sum(), tokenizer.config.n_quantizers)
    if os.path.exists(path):
        ids = np.array(read_array(path, 'delete it, it is made again'))
        good = ids.shape == shape and ids.dtype == np.int16
        if not good or ids.min() < 0 or ids.max() >= tokenizer.config.n_codes:
            raise UserError(f'{path} is {ids.shape} of {ids.dtype}, expected {shape} token ids '
                            f'below {tokenizer.config.n_codes}: delete it, it is made again.')
        return ids
    tokenizer = tokenizer.to(device).eval()
    ids = np.zeros(shape, np.int16)
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
