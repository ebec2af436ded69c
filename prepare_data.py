"""Convert motion data to data/<name>/, the packed format that training reads (see lib/data.py).

    python prepare_data.py toy                                  generated, no download
    python prepare_data.py bandai --src=bandai-namco.tar.xz     or the unpacked folder
    python prepare_data.py cmu    --src=cmu-mocap --texts=HumanML3D      two plain git clones
    python prepare_data.py hml3d  --src=HumanML3D               also: kit --src=KIT-ML
    python prepare_data.py babel  --src=babel_v1.0_release      its json files and features
    python prepare_data.py folder --src=takes --out=data/mine   your own BVH files or arrays

--out=data/NAME says where to write. The folder appears only when it is complete. Every converter
gives (name, features (T, D), captions) for each clip to `write_dataset`; a caption is a dict with
text and tokens. A UserError about one clip skips and counts it.
"""
import lib.configurator   # first, to catch Ctrl-C during the imports
import argparse
import contextlib
import csv
import hashlib
import math
import os
import re
import signal
import tempfile
from collections import Counter, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib import bandai, humanml, toy
from lib.bvh import decode
from lib.configurator import UserError, install_error_hook
from lib.data import mean_std, save_meta, save_split
from lib.humanml import SPLITS, HumanML3D, skipping
from lib.motion import SKELETONS, joints_to_features
from lib.runtime import read, read_array
from lib.takes import AXES, MAX_FRAMES, SUFFIXES, UNITS, cut, read_take, take_settings

SMPL = SKELETONS['smpl22']
# what a prepared data set consists of: the only files that are ever replaced
OUR_FILES = re.compile(r'meta\.json|(mean|std)\.npy|\w+_(motion\.npy|clips\.npz|captions\.json)|'
                       r'text_\w+\.npz|tokens_\w+\.np[yz]|\..*\.tmp')


def check_out(out, src=None):
    """UserError if writing the data set `out` would replace anything else, or its own source."""
    problem = ''
    if out.name in ('', '..'):
        problem = 'has no name for the data set'
    elif out.is_symlink():
        problem = 'is a link'
    elif src and Path(src).resolve().is_relative_to(out.resolve()):
        problem = f'would replace --src={src}, which is inside'
    elif out.exists():
        files = os.listdir(out) if out.is_dir() else [out.name]
        strange = [name for name in files if not OUR_FILES.fullmatch(name)]
        if strange or 'meta.json' not in files:
            problem = f'is not only a prepared data set (it has {(strange or ["no meta.json"])[0]})'
    if problem:
        raise UserError(f'--out={out} {problem}: choose another --out=data/NAME')


@contextlib.contextmanager
def all_or_nothing(out, src=None):
    """A temporary folder beside `out` that replaces it only if the block succeeds."""
    check_out(out, src)
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.preparing-', dir=out.parent) as scratch:
        new = Path(scratch, 'new')
        new.mkdir()
        yield new
        check_out(out, src)   # hours may have passed
        if out.exists():
            out.rename(Path(scratch, 'old'))
        new.rename(out)


def write_dataset(folder, name, splits, skipped=(), skeleton_key='smpl22', stats=None, **how):
    """Write splits {split: iterable of (name, features, captions)} and print what was written.

    skipped: a Counter of reasons, which may grow while clips are read. stats: the data set's own
    mean and std; by default they are computed from the training split. how: what joints_to_features
    was called with. UserError if there is no training clip.
    """
    skeleton = SKELETONS[skeleton_key]
    counts = {split: save_split(folder, split, clips) for split, clips in splits.items()}
    counts = {split: count for split, count in counts.items() if count}
    for reason, n in sorted(Counter(skipped).items()):
        print(f'skipped {n:,}: {reason}')
    if 'train' not in counts:
        raise UserError(f'no usable training clip for {name} in --src; nothing was written')

    if stats is None:
        features = np.load(Path(folder, 'train_motion.npy'), mmap_mode='r')
        stats = mean_std(features, skeleton.n_joints)
    meta = dict(name=name, skeleton=skeleton_key, max_frames=MAX_FRAMES, steady=False,
                contact_threshold=skeleton.contact_threshold, counts=counts, skipped=dict(skipped))
    save_meta(folder, meta | how, *stats)
    for split, count in counts.items():
        print(f'{split:5s} {count["clips"]:6,} clips  {count["frames"]:9,} frames  '
              f'{count["captions"]:7,} captions')


def in_parallel(work, jobs, title, ahead=64):
    """Yield work(job) for each job, in order, computed on every core that this process may use. At
    most `ahead` jobs are read in advance, so an archive is never in memory as a whole."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else None
    ignore_ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)   # it is for this process
    waiting = deque()
    try:
        with ProcessPoolExecutor(cores, initializer=ignore_ctrl_c) as pool:
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
    """Procedural motion with captions and scripts, deterministic by seed. sizes: clips per
    split."""
    splits = {split: in_parallel(toy_clip, range(first, first + sizes[split]), split)
              for split, first in TOY_FIRST_SEED.items()}
    write_dataset(folder, 'toy', splits, steady=True, contact_threshold=TOY_CONTACT)


# ------------------------------------------------------------------------------------------- bandai


def add_pairs(splits, split, pairs):
    """Add clips to a split, in training each followed by its mirror image. pairs: of `cut`."""
    for clip, mirrored in pairs:
        splits[split] += [clip, mirrored] if split == 'train' else [clip]


def bandai_clips(file):
    """(path, bytes) -> split, [(clip, its mirror image)], Counter of reasons if there are none."""
    path = Path(file[0])
    content, style = bandai.BANDAI_FILE.fullmatch(path.name).groups()
    pairs, skipped = [], Counter()
    with skipping(skipped):
        captions = bandai.bandai_captions(content, style)
        pairs = cut(path.stem, bandai.bandai_joints(file), captions)
    return bandai.bandai_split(path.stem), pairs, skipped


def prepare_bandai(folder, args):
    """Bandai-Namco-Research-Motiondataset 1 and 2."""
    splits = {split: [] for split in SPLITS}
    skipped = Counter()
    files = bandai.bandai_files(args.src)
    for split, pairs, reasons in in_parallel(bandai_clips, files, 'bandai'):
        add_pairs(splits, split, pairs)
        skipped += reasons
    write_dataset(folder, 'bandai', splits, skipped, steady=True)


# ---------------------------------------------------------- the layouts of HumanML3D, KIT and BABEL


def prepare_hml3d(folder, args):
    """HumanML3D or KIT-ML as everybody has it: new_joint_vecs/<id>.npy (T, D), texts/, train.txt
    val.txt test.txt, Mean.npy Std.npy. The lists and the statistics may be missing."""
    skeleton_key = 'kit21' if args.name == 'kit' else 'smpl22'
    skeleton = SKELETONS[skeleton_key]
    source = HumanML3D(args.src, 'new_joint_vecs')
    vectors = source.find('new_joint_vecs')

    def load(name):
        return humanml.load_features(vectors / f'{name}.npy', skeleton)

    ids = source.ids
    if not ids:
        everything = sorted(path.stem for path in vectors.glob('*.npy'))
        print(f'{args.src} has no train.txt, val.txt or test.txt: all {len(everything)} clips go '
              'into all three splits, to try things out')
        ids = dict.fromkeys(SPLITS, everything)

    paths = [source.find('Mean.npy'), source.find('Std.npy')]
    stats = None
    if None in paths:
        print(f'{args.src} has no Mean.npy and Std.npy: computing them from the training split')
    else:
        stats = [read_array(path, 'remove both, and they are computed') for path in paths]
        if not all(s.shape == (skeleton.dim,) and np.isfinite(s).all() for s in stats):
            raise UserError(f'{paths[0]} and Std.npy should be {skeleton.dim} finite numbers each, '
                            f'found shapes {[s.shape for s in stats]}; hml3d has 263, kit 251')
    skipped = Counter()
    splits = {split: source.clips(names, load, skeleton, skipped) for split, names in ids.items()}
    write_dataset(folder, args.name, splits, skipped, skeleton_key, stats)


def prepare_babel(folder, args):
    """BABEL: --src holds train.json and val.json of its release, and new_joint_vecs/<babel_sid>.npy
    (or named like the last part of feat_p), which are HumanML3D features (T, 263) at 20 fps of the
    whole AMASS sequence. Each frame_ann segment is a clip; without segments, the whole sequence
    (seq_ann) is. BABEL's test labels are not public, so the test split repeats val."""
    skipped = Counter()
    splits = {}
    for split, file in dict(train='train.json', val='val.json', test='val.json').items():
        entries = humanml.babel_entries(Path(args.src, file))
        splits[split] = humanml.babel_clips(args.src, entries, split, skipped)
    write_dataset(folder, 'babel', splits, skipped)


def prepare_cmu(folder, args):
    """The CMU motion capture database as BVH (--src, a clone of una-dinosauria/cmu-mocap) with the
    captions, cuts and splits of HumanML3D (--texts, a clone of it): 2,913 of its 14,616 clips and
    their mirror images. Bodies have CMU's proportions, not SMPL's, so figures do not compare with
    HumanML3D's."""
    if not args.texts:
        raise UserError('cmu needs --texts=PATH, a clone of github.com/EricGuo5513/HumanML3D')
    source = HumanML3D(args.texts, 'index.csv')
    files = {path.stem: path for path in sorted(Path(args.src).rglob('*.bvh'))}
    skipped = Counter()
    trials = {}
    for trial, *part in read(source.find('index.csv'), 'get it again', humanml.cmu_cuts):
        if trial in files:
            trials.setdefault(files[trial], []).append(part)
        elif trial:
            skipped['clip of a trial that is not in --src'] += 1
    clips = {}
    for of_trial, reasons in in_parallel(humanml.cmu_clips, trials.items(), 'cmu'):
        clips.update(of_trial)
        skipped.update(reasons)
    splits = {}
    for split, ids in source.ids.items():
        ids = [name for name in ids if name in clips]
        splits[split] = source.clips(ids, clips.get, SMPL, skipped)
    write_dataset(folder, 'cmu', splits, skipped, steady=True)


# ------------------------------------------------------------ folder: BVH files and arrays of yours


def own_clips(job, settings, fps):
    """(path, name, texts) -> [(clip, its mirror image)], notes and unused names of `read_take`, and
    a Counter of reasons if there are no clips."""
    path, name, texts = job
    pairs, notes, unused, skipped = [], [], set(settings.joints.values()), Counter()
    with skipping(skipped):
        joints, notes, unused = read_take(path, settings, fps)
        captions = [dict(text=text, tokens=humanml.simple_tags(text)) for text in texts]
        pairs = cut(name, joints, captions)
    return pairs, notes, unused, skipped


def read_table(path, skipped):
    """Lines 'file,caption' (or with ; or a tab) -> {file without its suffix: [captions]}."""
    text = decode(read(path, 'expected lines file,caption; --captions says where they are',
                       Path.read_bytes))
    separator = re.search(r'[,;\t]|$', text.lstrip())[0] or ','
    texts = {}
    for file, *cells in filter(any, csv.reader(text.splitlines(), delimiter=separator)):
        file = os.path.normpath(file.strip().replace('\\', '/'))
        caption = ','.join(cells).strip().lower()   # several cells if commas are not quoted
        if (file.lower(), caption) == ('file', 'caption'):
            continue
        if file == '.' or not caption:
            skipped['line of the captions without file and caption'] += 1
        elif not humanml.is_readable(caption):
            skipped[humanml.UNREADABLE] += 1
        else:
            stem = file[:-4] if file.lower().endswith(SUFFIXES) else file
            texts.setdefault(stem, []).append(caption)
    return texts


def prepare_folder(folder, args):
    """All BVH files, and .npy and .npz files of joints or features, under --src. The split of a
    file is decided by a hash of its name."""
    name = Path(args.out).name
    settings = take_settings(args.joints, args.unit, args.up, args.root)
    skipped, refused, notes = Counter(), Counter(), Counter()
    files = [path for path in sorted(Path(args.src).rglob('*'))
             if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not files:
        raise UserError(f'{args.src} holds no {", ".join(SUFFIXES)} file')
    texts = read_table(Path(args.captions or Path(args.src, 'captions.csv')), skipped)
    jobs, named = [], set()
    for path in files:
        place = path.relative_to(args.src).with_suffix('').as_posix()
        keys = dict.fromkeys([place, path.stem])
        of_file = [text for key in keys for text in texts.get(key, [])]
        jobs.append((path, place.replace('/', '-'), of_file))
        named.update(keys)
    strays = sum(len(texts[key]) for key in texts.keys() - named)
    if strays:
        skipped['caption of a file that is not there'] = strays

    usable, unused = [], set(settings.joints.values())
    work = partial(own_clips, settings=settings, fps=args.fps)
    for pairs, of_file, unused_here, reasons in in_parallel(work, jobs, name):
        refused += reasons
        unused &= unused_here
        if pairs:
            usable.append(pairs)
            notes.update(of_file)
    for note, n in notes.items():
        print(f'{n:,} files: {note}')
    silent = sum(not pairs[0][0][2] for pairs in usable)
    if silent:
        print(f'{silent:,} files have no caption: only the tokenizer learns from them')
    if unused and usable:
        raise UserError(f'{args.joints} has {", ".join(sorted(unused))}, which no file has: '
                        'correct these names')
    if len(usable) < len(SPLITS) or silent == len(usable):
        reasons = refused if len(usable) < len(SPLITS) else skipped
        often = f', most often because: {max(reasons, key=reasons.get)}' if reasons else ''
        raise UserError(f'{args.src} has {len(usable)} usable files, {silent} of them without a '
                        f'caption, expected 3 or more, with captions{often}')

    usable.sort(key=lambda pairs: hashlib.md5(pairs[0][0][0].encode()).hexdigest())
    n_test, n_val = math.ceil(0.1 * len(usable)), math.ceil(0.05 * len(usable))
    splits = {split: [] for split in SPLITS}
    for i, pairs in enumerate(usable):
        split = 'test' if i < n_test else 'val' if i < n_test + n_val else 'train'
        add_pairs(splits, split, pairs)
    write_dataset(folder, name, splits, skipped + refused, steady=True)


# ------------------------------------------------------------------------------------- command line

CONVERTERS = dict(bandai=prepare_bandai, cmu=prepare_cmu, hml3d=prepare_hml3d, kit=prepare_hml3d,
                  babel=prepare_babel, folder=prepare_folder)


def main(argv=None):
    """Prepare one data set. UserError if that is impossible; then nothing was written."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument('name', choices=['toy', *CONVERTERS])
    parser.add_argument('--src', help='where the data is (all but toy)')
    parser.add_argument('--out', help='default data/NAME')
    parser.add_argument('--texts', help='cmu: the clone of HumanML3D')
    own = parser.add_argument_group('folder')
    own.add_argument('--captions', help='csv of lines file,caption; default SRC/captions.csv')
    for key, meaning in {
            'joints': 'json: names of joints that are not known, as in config/joint_names.json',
            'unit': f'{", ".join(UNITS)} or metres; default: what fits a body, for each file',
            'up': f'axis ({", ".join(AXES)}); default: from the body',
            'root': 'of a BVH file with several: its name, or 1, 2 ...'}.items():
        own.add_argument(f'--{key}', default='', help=meaning)
    own.add_argument('--fps', type=float, default=0, help='frames per second of arrays')
    args = parser.parse_args(argv)
    args.out = args.out or f'data/{args.name}'
    if args.name != 'toy' and not args.src:
        raise UserError(f'{args.name} needs --src=PATH, the place of its data; see --help')
    with all_or_nothing(Path(args.out), args.src) as folder:
        if args.name == 'toy':
            prepare_toy(folder)
        else:
            CONVERTERS[args.name](folder, args)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    install_error_hook()
    main()
