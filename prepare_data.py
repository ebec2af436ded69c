"""Turn motion data into data/<name>/, the packed format that training reads (see data.py).

    python prepare_data.py toy                                  generated here, no download
    python prepare_data.py bandai --src=bandai-namco.tar.xz     or the unpacked folder
    python prepare_data.py hml3d  --src=HumanML3D               also: kit --src=KIT-ML
    python prepare_data.py babel  --src=babel_v1.0_release      its json files and features
    python prepare_data.py folder --src=takes --out=data/mine   BVH files or .npy joints of yours

--out=data/NAME says where to write. The folder appears only when everything in it is complete.
Every source hands (name, features (T, D), captions) of its clips to `write_dataset`, with captions
a list of dicts of text and tokens. A clip that cannot be used is a UserError inside `skipping`.
"""
import argparse
import contextlib
import csv
import functools
import hashlib
import json
import lzma
import math
import os
import re
import tarfile
import tempfile
from collections import Counter, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib import toy
from lib.bvh import FASTEST, bvh_to_joints, read_bvh
from lib.configurator import ROOT, NOT_TEXT, UserError, install_error_hook
from lib.data import LARGEST, mean_std, save_meta, save_split
from lib.takes import (JOINT_NAMES, own_joints, place_joints, read_joint_names, unit, unit_and_up,
                     upright)
from lib.motion import SKELETONS, joints_to_features, mirror, resample
from lib.runtime import read, read_array, read_json, read_text

SPLITS = ('train', 'val', 'test')
SMPL = SKELETONS['smpl22']
MAX_FRAMES = 196   # the field's longest motion, 49 tokens
TOO_LONG = 200     # it leaves out files of so many frames

# -------------------------------------------------------------------------- what all have in common


@contextlib.contextmanager
def all_or_nothing(out):
    """A scratch folder beside `out` that takes its place only if the block ends well."""
    out = Path(out).absolute()
    if out.exists() and not (out / 'meta.json').exists():
        raise UserError(f'{out} exists and is not a prepared data set; choose another --out')
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.preparing-', dir=out.parent) as scratch:
        new = Path(scratch, 'new')
        new.mkdir()
        yield new
        if out.exists():
            out.rename(Path(scratch, 'old'))
        new.rename(out)


@contextlib.contextmanager
def skipping(skipped):
    """A UserError ends the block and no more: its sentence is counted in `skipped`."""
    try:
        yield
    except UserError as reason:
        skipped[str(reason)] += 1


def write_dataset(folder, name, skeleton_key, splits, skipped=(), stats=None, **how):
    """Write splits {split: iterable of (name, features, captions)} and print what was written.

    skipped: a Counter of reasons, which may grow while clips are read. stats: the data set's own
    mean and std, by default computed from the training split. how: steady and contact_threshold,
    if joints_to_features was called with them. UserError where there is no training clip.
    """
    skeleton = SKELETONS[skeleton_key]
    counts = {}
    for split, clips in splits.items():
        count = save_split(folder, split, clips)
        if count:
            counts[split] = count
    for reason, n in sorted(Counter(skipped).items()):
        print(f'skipped {n:,}: {reason}')
    if 'train' not in counts:
        raise UserError(f'no usable training clip for {name} in --src; nothing was written')

    if stats is None:
        features = np.load(Path(folder, 'train_motion.npy'), mmap_mode='r')
        stats = mean_std(features, skeleton.n_joints)
    meta = dict(name=name, skeleton=skeleton_key, max_frames=MAX_FRAMES, steady=False,
                contact_threshold=skeleton.contact_threshold, counts=counts, skipped=dict(skipped))
    save_meta(folder, {**meta, **how}, *stats)
    for split, count in counts.items():
        print(f'{split:5s} {count["clips"]:6,} clips  {count["frames"]:9,} frames  '
              f'{count["captions"]:7,} captions')


def in_parallel(work, jobs, title, ahead=64):
    """Yield work(job) of each job, in order, computed on every core this process may use. Jobs are
    read at most `ahead` in advance: an archive is never in memory as a whole."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else None
    waiting = deque()
    try:
        with ProcessPoolExecutor(cores) as pool:
            for job in tqdm(jobs, title, unit='clip', mininterval=1):
                waiting.append(pool.submit(work, job))
                if len(waiting) == ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenExecutor:
        raise UserError('a worker process was killed, most likely because memory ran out; free '
                        'some and run this again') from None


# ---------------------------------------------------------------------------------------------- toy

TOY_SIZES = {'train': 6000, 'val': 200, 'test': 400}
TOY_FIRST_SEED = {'train': 0, 'val': 10_000_000, 'test': 20_000_000}   # no clip is in two splits
TOY_CONTACT = 1e-4   # squared metres: contact 1 means that the foot moved less than 1 cm


def toy_clip(seed):
    clip = toy.make_clip(seed)
    features = joints_to_features(clip['joints'], SMPL, contact_threshold=TOY_CONTACT, steady=True)
    captions = [dict(text=text, tokens=tokens, script=clip['script'])
                for text, tokens in clip['captions']]
    return f'toy-{seed:08d}', features, captions


def prepare_toy(folder, sizes=TOY_SIZES):
    """Procedural motion with captions and scripts, deterministic by seed. sizes: clips a split."""
    splits = {}
    for split, n in sizes.items():
        seeds = range(TOY_FIRST_SEED[split], TOY_FIRST_SEED[split] + n)
        splits[split] = in_parallel(toy_clip, seeds, split)
    write_dataset(folder, 'toy', 'smpl22', splits, steady=True, contact_threshold=TOY_CONTACT)


# ------------------------------------------------------------------------------------------- bandai

PHRASES = json.loads(Path(ROOT, 'config', 'bandai_captions.json').read_text(encoding='utf-8'))

BANDAI_FILE = re.compile(r'dataset-\d_(.+)_([^_]+)_\d+\.bvh')   # its content and its style
BANDAI_JOINTS = JOINT_NAMES['Bandai-Namco']   # spine2 lies midway between its neighbours


def swap_sides(text):
    """Left for right and right for left, word by word."""
    other = {'left': 'right', 'right': 'left'}
    return re.sub(r'\b(left|right)\b', lambda match: other[match[0]], text)


def bandai_captions(content, style):
    """Six paraphrases for the words of a file name, in a fixed order. UserError: unknown words."""
    right = content.replace('left', 'right')   # the file of phrases holds this side only
    if right not in PHRASES['content'] or style not in PHRASES['style']:
        raise UserError(f'no phrase for "{content}" in the style "{style}"')
    does, acts = PHRASES['content'][right]
    if content != right:
        does, acts = swap_sides(does), swap_sides(acts)
    adjective, how, way = PHRASES['style'][style]
    who = f'{adjective or "the/DET"} person/NOUN'
    captions = []
    for phrase in (f'a/DET person/NOUN {does} {how}', f'someone/PRON {acts} {way}',
                   f'{who} {does}', f'{who} {acts}',
                   f'a/DET figure/NOUN {acts} {how}', f'a/DET person/NOUN {does} {way}'):
        text = re.sub(r'(=\S+)?/[A-Z]+', '', phrase)   # 'he/PRON walks=walk/VERB' -> 'he walks'
        tokens = re.sub(r'\S+=', '', phrase)           # -> 'he/PRON walk/VERB'
        captions.append(dict(text=text, tokens=tokens))
    return captions


def bandai_files(src):
    """Yield (name, bytes) of each clip of a folder or of a .tar.xz, which is read as a stream and
    to its end, where its checksum stands. What is named like a clip but is a folder, a link or a
    pipe has no bytes."""
    if Path(src).is_dir():
        for path in sorted(Path(src).rglob('*.bvh')):
            if BANDAI_FILE.fullmatch(path.name):
                yield str(path), path.read_bytes() if path.is_file() else b''
        return
    try:
        with lzma.open(src) as stream, tarfile.open(fileobj=stream, mode='r|') as archive:
            for member in archive:
                if BANDAI_FILE.fullmatch(Path(member.name).name):
                    file = archive.extractfile(member) if member.isfile() else None
                    yield member.name, file.read() if file else b''
            while stream.read(2**20):
                pass
    except (OSError, EOFError, ValueError, tarfile.TarError, lzma.LZMAError) as error:
        raise UserError(f'{src} cannot be read as a .tar.xz ({error}): clone github.com/BandaiNamco'
                        'ResearchInc/Bandai-Namco-Research-Motiondataset and give that folder, or '
                        'get the archive again') from None


def bandai_joints(file):
    """A BVH file of this skeleton, (name, bytes) -> SMPL joints (T, 22, 3), metres, 20 fps."""
    names, parents, offsets, channels, frames, fps = read_bvh(file)
    missing = sorted(set(BANDAI_JOINTS.values()) - set(names))
    if missing:   # where place_joints would put some between their neighbours
        raise UserError(f'{file[0]} has another skeleton ({len(names)} joints, without '
                        f'{", ".join(missing[:3])}): rename its joints to those of Bandai-Namco')
    world = bvh_to_joints(parents, offsets, channels, frames) / 100   # from centimetres
    joints, _ = place_joints(world, names, {'Bandai-Namco': BANDAI_JOINTS})
    return resample(joints, fps, SMPL.fps)


def cut(name, joints, captions):
    """Joints (T, 22, 3) of a motion and its captions -> [(clip, its mirror image)], of long motion
    equal pieces. A mirror image is named 'M' + name; UserError where the motion is too short."""
    frames = len(joints) - 1   # the features use up one
    if frames < SMPL.min_frames:
        raise UserError(f'shorter than {SMPL.min_frames} frames')
    swapped = [{key: swap_sides(text) for key, text in c.items()} for c in captions]
    pairs = []
    edges = np.linspace(0, frames, math.ceil(frames / MAX_FRAMES) + 1).astype(int)
    for number, (first, last) in enumerate(pairwise(edges)):
        suffix = f'-{number}' if frames > MAX_FRAMES else ''
        piece = joints[first:last + 1]   # one frame more, for the last velocity
        pair = []
        for mark, body, texts in ('', piece, captions), ('M', mirror(piece, SMPL), swapped):
            features = joints_to_features(body, SMPL, steady=True).astype(np.float32)
            pair.append((mark + name + suffix, features, texts))
        pairs.append(pair)
    return pairs


def bandai_clips(file):
    """(path, bytes) -> split, [(clip, its mirror image)], Counter of reasons why there are none.
    The split hangs on a hash of the name: the same for everybody, whatever else is there."""
    path = Path(file[0])
    percent = int(hashlib.md5(path.stem.encode()).hexdigest(), 16) % 100
    split = 'train' if percent < 85 else 'val' if percent < 90 else 'test'
    content, style = BANDAI_FILE.fullmatch(path.name).groups()
    pairs, skipped = [], Counter()
    with skipping(skipped):
        pairs = cut(path.stem, bandai_joints(file), bandai_captions(content, style))
    return split, pairs, skipped


def prepare_bandai(folder, src):
    """Bandai-Namco-Research-Motiondataset 1 and 2. Training clips have their mirror images beside
    them."""
    splits = {split: [] for split in SPLITS}
    skipped = Counter()
    for split, pairs, reasons in in_parallel(bandai_clips, bandai_files(src), 'bandai'):
        for clip, mirrored in pairs:
            splits[split] += [clip, mirrored] if split == 'train' else [clip]
        skipped += reasons
    write_dataset(folder, 'bandai', 'smpl22', splits, skipped, steady=True)


# ------------------------------------ hml3d, kit, babel: features in new_joint_vecs/<id>.npy (T, D)


def load_features(path, skeleton):
    """Features (T, D) of one file. UserError where they cannot be used."""
    if not os.path.exists(path):
        raise UserError('features file missing')
    features = np.array(read_array(path, 'get it again'))
    if features.ndim != 2 or features.shape[1] != skeleton.dim:
        raise UserError(f'features not {skeleton.dim} wide (found {features.shape[1:]})')
    if not (np.abs(features) < LARGEST).all():
        raise UserError('NaN, infinity or huge numbers in features')
    return features


def part_of(features, start, end, fps, what):
    """Its frames from start to end (seconds). UserError where they name none."""
    numbers = all(type(t) in (int, float) for t in (start, end))
    if not numbers or not 0 <= start < end < 1e6:
        raise UserError(f'{what} from and to of no frames')
    return features[int(start * fps):int(end * fps)]


def check_length(features, skeleton, what):
    """The field's rule."""
    if len(features) < skeleton.min_frames:
        raise UserError(f'{what} shorter than {skeleton.min_frames} frames')
    if len(features) >= TOO_LONG:
        raise UserError(f'{what} of {TOO_LONG} or more frames')


def read_captions(path, skipped):
    """Lines 'caption#word/TAG word/TAG#from#to' -> [(caption, from, to)] in seconds; nan is 0."""
    if not os.path.exists(path):
        raise UserError('text file missing')
    captions = []
    text = read(path, 'get it again',
                lambda path: path.read_text(encoding='utf-8-sig', errors='replace'))
    for line in filter(str.strip, text.split('\n')):
        try:
            text, tokens, start, end = (part.strip() for part in line.split('#'))
            start, end = (0.0 if math.isnan(float(t)) else float(t) for t in (start, end))
        except ValueError:
            text = ''
        if text and not NOT_TEXT.search(line) and all('/' in word for word in tokens.split()):
            captions.append((dict(text=text, tokens=tokens), start, end))
        else:
            skipped['caption line without text, tags, from and to'] += 1
    return captions


def field_clips(src, ids, split, skeleton_key, skipped):
    """Yield the clips of a split of HumanML3D or KIT-ML, by the field's rules: a caption with
    from/to other than 0 names a sub-clip of its own."""
    skeleton = SKELETONS[skeleton_key]
    for name in tqdm(ids, split, unit='clip', mininterval=1):
        with skipping(skipped):
            features = load_features(Path(src, 'new_joint_vecs', f'{name}.npy'), skeleton)
            check_length(features, skeleton, 'clip')
            captions = read_captions(Path(src, 'texts', f'{name}.txt'), skipped)
            whole = []
            for k, (caption, start, end) in enumerate(captions):
                if start == end == 0:
                    whole.append(caption)
                    continue
                with skipping(skipped):
                    part = part_of(features, start, end, skeleton.fps, 'sub-clip')
                    check_length(part, skeleton, 'sub-clip')
                    yield f'{name}-{k}', part, [caption]
            if whole:
                yield name, features, whole


def prepare_field(folder, src, name):
    """HumanML3D or KIT-ML as everybody has it: new_joint_vecs/, texts/, train.txt val.txt test.txt,
    Mean.npy Std.npy. Without the lists or the statistics it works too."""
    skeleton_key = 'kit21' if name == 'kit' else 'smpl22'
    for part in ('new_joint_vecs', 'texts'):
        if not Path(src, part).is_dir():
            raise UserError(f'{src} has no folder {part}; --src is the folder that holds '
                            'new_joint_vecs, texts (unpack texts.zip there) and train.txt')
    ids = {}
    for split in SPLITS:
        path = Path(src, f'{split}.txt')
        if path.exists():
            ids[split] = read_text(path, 'expected the names of clips, one a line').split()
    if not ids:
        everything = sorted(path.stem for path in Path(src, 'new_joint_vecs').glob('*.npy'))
        print(f'{src} has no train.txt, val.txt or test.txt: all {len(everything)} clips go into '
              'all three splits, to try things out')
        ids = dict.fromkeys(SPLITS, everything)

    dim = SKELETONS[skeleton_key].dim
    paths = [Path(src, file) for file in ('Mean.npy', 'Std.npy')]
    stats = None
    if all(path.exists() for path in paths):
        stats = [read_array(path, 'take both away, and they are computed') for path in paths]
    else:
        print(f'{src} has no Mean.npy and Std.npy: computing them from the training split')
    if stats and not all(s.shape == (dim,) and np.isfinite(s).all() for s in stats):
        raise UserError(f'{src}/Mean.npy and Std.npy should be {dim} finite numbers each, found '
                        f'shapes {[s.shape for s in stats]}; hml3d has 263, kit 251')

    skipped = Counter()
    splits = {}
    for split, names in ids.items():
        splits[split] = field_clips(src, names, split, skeleton_key, skipped)
    write_dataset(folder, name, skeleton_key, splits, skipped, stats)


SMALL_WORDS = {
    'ADP': 'with to at in on from for of over under into onto by through around towards toward '
           'against across off',
    'ADV': 'forward forwards backward backwards back up down sideways away again straight ahead '
           'clockwise counterclockwise',
    'DET': 'a an the both his her their something', 'CCONJ': 'and then'}
TAG_OF = {word: tag for tag, words in SMALL_WORDS.items() for word in words.split()}
WHO = 'person man woman figure human character dancer someone somebody he she they'.split()


def simple_tags(text):
    """'turn left with the left arm' -> 'turn/VERB left/ADV with/ADP the/DET left/ADJ arm/NOUN':
    BABEL's labels are short and start with a verb, so a table of small words will do. In a sentence
    the verb follows its subject: 'a person walks'."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    tags = []
    for i, word in enumerate(words):
        if word in ('left', 'right'):
            noun_follows = i + 1 < len(words) and TAG_OF.get(words[i + 1]) in (None, 'DET')
            tag = 'ADJ' if noun_follows and i > 0 else 'ADV'
        elif word in TAG_OF:
            tag = TAG_OF[word]
        elif word.endswith('ly'):
            tag = 'ADV'
        else:
            verb = i == 0 or tags[-1] == 'CCONJ' or words[i - 1] in WHO or word.endswith('ing')
            tag = 'VERB' if verb and word not in WHO else 'NOUN'
        tags.append(tag)
    return ' '.join(f'{word}/{tag}' for word, tag in zip(words, tags))


def babel_entries(path):
    """A json file of BABEL -> {key: entry}."""
    hint = "--src is the folder with BABEL's train.json, val.json and new_joint_vecs/"
    entries = read_json(path, hint)
    if not isinstance(entries, dict):
        raise UserError(f'{path} holds no dict of entries: {hint}.')
    return entries


def babel_clips(src, entries, split, skipped):
    """Yield each labelled segment of BABEL's {key: entry}; its label is the caption."""
    for key, entry in tqdm(entries.items(), split, unit='clip', mininterval=1):
        with skipping(skipped):
            try:
                sid = str(entry.get('babel_sid', key))
                file = Path(entry.get('feat_p') or '').stem
                segments = (entry.get('frame_ann') or {}).get('labels')
                whole = (entry.get('seq_ann') or {}).get('labels')
                labels = [(label.get('proc_label') or label.get('raw_label') or '',
                           label.get('start_t'), label.get('end_t'))
                          for label in segments or whole or []]
            except (AttributeError, TypeError):
                raise UserError('entry of another form than BABEL has') from None
            path = Path(src, 'new_joint_vecs', f'{sid}.npy')
            if not os.path.exists(path):
                path = Path(src, 'new_joint_vecs', f'{file}.npy')
            features = load_features(path, SMPL)
            for k, (text, start, end) in enumerate(labels):
                with skipping(skipped):
                    text = text.strip() if isinstance(text, str) else ''
                    if text in ('', 'transition') or NOT_TEXT.search(text):
                        raise UserError('segment without a label, or a transition')
                    part = features
                    if start is not None and end is not None:
                        part = part_of(features, start, end, SMPL.fps, 'segment')
                    check_length(part, SMPL, 'segment')
                    yield f'{sid}-{k}', part, [dict(text=text, tokens=simple_tags(text))]


def prepare_babel(folder, src):
    """BABEL: src holds train.json and val.json of its release, and new_joint_vecs/<babel_sid>.npy
    (or named like the last part of feat_p): HumanML3D features (T, 263) at 20 fps of the whole
    AMASS sequence. Each frame_ann segment is a clip, or the whole sequence (seq_ann) where there is
    none. BABEL's test labels are not public: the test split repeats val."""
    skipped = Counter()
    splits = {}
    for split, file in dict(train='train.json', val='val.json', test='val.json').items():
        splits[split] = babel_clips(src, babel_entries(Path(src, file)), split, skipped)
    write_dataset(folder, 'babel', 'smpl22', splits, skipped)


# --------------------------------------------- folder: BVH files or .npy joints that are one's own


def own_clips(job, maps, fps, metres, up):
    """(path, name, captions) -> [(clip, its mirror image)], how the joints were found, and a
    Counter of reasons why there are none."""
    path, name, texts = job
    pairs, how, skipped = [], '', Counter()
    with skipping(skipped):
        joints, fps, how = own_joints(path, maps, fps)
        joints = resample(upright(joints, up) * metres, fps, SMPL.fps)
        pairs = cut(name, joints, [dict(text=text, tokens=simple_tags(text)) for text in texts])
    return pairs, how, skipped


def read_table(path, skipped):
    """Lines 'file,caption' of a csv file -> {file without its suffix: [captions]}."""
    hint = 'expected lines file,caption; --captions says where they are'
    lines = read_text(path, hint).splitlines()
    rows = read(path, hint, lambda path: list(csv.reader(lines)))
    texts = {}
    for file, *cells in filter(any, rows):
        file = file.strip()
        text = ','.join(cells).strip().lower()   # several where nobody quoted a caption's commas
        if (file.lower(), text) == ('file', 'caption'):
            continue
        if file and re.search(r'\w', text) and not NOT_TEXT.search(text):
            file = re.sub(r'\.(bvh|npy)$', '', file, flags=re.IGNORECASE)
            texts.setdefault(file.replace('\\', '/'), []).append(text)
        else:
            skipped['line of the captions without file and caption'] += 1
    return texts


def prepare_folder(folder, name, args):
    """All BVH files and .npy joints (T, J, 3) under args.src, with the settings of the command
    line. Files are split by a hash of their names; training clips have their mirror images beside
    them."""
    src, fps = args.src, args.fps
    files = [path for path in sorted(Path(src).rglob('*'))
             if path.suffix.lower() in ('.bvh', '.npy') and path.is_file()]
    if not files:
        raise UserError(f'{src} holds no .bvh or .npy file')
    if not 1 <= fps <= FASTEST and any(path.suffix.lower() == '.npy' for path in files):
        raise UserError(f'{src} holds .npy files, which do not tell their frame rate: give --fps')
    maps = {args.joints: read_joint_names(args.joints)} if args.joints else None
    leg, metres, up = unit_and_up(files, maps, fps)
    metres = args.unit or metres
    up = args.up or up
    if not metres or not up:
        raise UserError(f'{src}: legs are {leg:.3g} units long and {up or "no axis"} points up, '
                        'expected a body in m, cm or mm with y or z up: give --unit and --up')
    print(f'legs are {leg:.3g} units long, {leg * metres:.2f} m, and {up} points up; where that is '
          'wrong, give --unit and --up')

    skipped = Counter()
    texts = read_table(args.captions or Path(src, 'captions.csv'), skipped)
    jobs, named = [], set()
    for path in files:
        place = path.relative_to(src).with_suffix('').as_posix()
        keys = dict.fromkeys([place, path.stem])
        of_file = [text for key in keys for text in texts.get(key, [])]
        jobs.append((path, place.replace('/', '-'), of_file))
        named.update(keys)
    strays = sum(len(texts[key]) for key in texts.keys() - named)
    if strays:
        skipped['caption of a file that is not there'] = strays

    usable, hows = [], Counter()
    work = functools.partial(own_clips, maps=maps, fps=fps, metres=metres, up=up)
    for pairs, how, reasons in in_parallel(work, jobs, name):
        skipped += reasons
        if pairs:
            usable.append(pairs)
            hows[how] += 1
    for how, n in hows.items():
        print(f'{n:,} files: {how}')
    silent = sum(not pairs[0][0][2] for pairs in usable)
    if silent:
        print(f'{silent:,} files have no caption: only the tokenizer learns from them')
    if len(usable) < len(SPLITS) or silent == len(usable):
        often = f', most often because: {max(skipped, key=skipped.get)}' if skipped else ''
        raise UserError(f'{src} has {len(usable)} usable files, {silent} of them without a '
                        f'caption, expected 3 or more, with captions{often}')

    usable.sort(key=lambda pairs: hashlib.md5(pairs[0][0][0].encode()).hexdigest())
    first_val = math.ceil(0.1 * len(usable))
    first_train = first_val + math.ceil(0.05 * len(usable))
    splits = {
        'train': [clip for pairs in usable[first_train:] for pair in pairs for clip in pair],
        'val': [clip for pairs in usable[first_val:first_train] for clip, _ in pairs],
        'test': [clip for pairs in usable[:first_val] for clip, _ in pairs]}
    write_dataset(folder, name, 'smpl22', splits, skipped, steady=True)


# -------------------------------------------------------------------------------- the command line


def main(argv=None):
    """Prepare one data set. UserError says why it cannot be, and then nothing was written."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument('name', choices=['toy', 'bandai', 'hml3d', 'kit', 'babel', 'folder'])
    parser.add_argument('--src', help='where the data lies (all but toy)')
    parser.add_argument('--out', help='default data/NAME')
    own = parser.add_argument_group('folder')
    own.add_argument('--captions', help='csv of lines file,caption; default SRC/captions.csv')
    own.add_argument('--joints', help='json, which of your joints is which; see '
                                      'config/joint_names.json for the names that are known')
    own.add_argument('--unit', type=unit, help='m, cm, mm or metres; default: what fits a body')
    own.add_argument('--up', choices=['y', 'z'], help='axis; default: where heads are above feet')
    own.add_argument('--fps', type=float, default=0, help='frames a second of .npy files')
    args = parser.parse_args(argv)
    if args.name != 'toy' and not args.src:
        raise UserError(f'{args.name} needs --src=PATH, the place where its data lies; see --help')

    out = args.out or f'data/{args.name}'
    with all_or_nothing(out) as folder:
        if args.name == 'toy':
            prepare_toy(folder)
        elif args.name == 'bandai':
            prepare_bandai(folder, args.src)
        elif args.name == 'babel':
            prepare_babel(folder, args.src)
        elif args.name == 'folder':
            prepare_folder(folder, Path(out).name, args)
        else:
            prepare_field(folder, args.src, args.name)
    print(f'wrote {out}')


if __name__ == '__main__':
    install_error_hook()
    main()
