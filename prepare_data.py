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
import argparse
import contextlib
import csv
import functools
import hashlib
import math
import os
import re
import signal
import tempfile
from collections import Counter, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib import toy
from lib.bandai import BANDAI_FILE, bandai_captions, bandai_files, bandai_joints, bandai_split
from lib.bvh import MAX_FPS
from lib.configurator import NOT_TEXT, UserError, install_error_hook
from lib.data import mean_std, save_meta, save_split
from lib.humanml import (SPLITS, HumanML3D, babel_clips, babel_entries, captioned_clips,
                         check_length, cmu_clips, cmu_trial, decode_text, load_features,
                         read_captions, read_split_lists, simple_tags, skipping)
from lib.motion import SKELETONS, joints_to_features
from lib.runtime import read, read_array
from lib.takes import AXES, MAX_FRAMES, SUFFIXES, UNITS, cut, read_take, take_settings

SMPL = SKELETONS['smpl22']
# what a prepared data set consists of: the only files that are ever replaced
OUR_FILES = re.compile(r'meta\.json|(mean|std)\.npy|\w+_(motion\.npy|clips\.npz|captions\.json)|'
                       r'text_\w+\.npz|tokens_\w+\.np[yz]|\..*\.tmp')

# ------------------------------------------------------------------------- common to all converters


def check_out(out, src=None):
    """UserError if writing the data set `out` would delete what is not one, or its own source."""
    if out.name in ('', '..'):
        raise UserError(f'--out={out} has no name for the data set, expected data/NAME')
    if out.is_symlink():
        raise UserError(f'{out} is a link; give the folder itself as --out')
    if src and Path(src).resolve().is_relative_to(out.resolve()):
        raise UserError(f'--src={src} is inside --out={out}, which would replace it; choose '
                        'another --out')
    if out.exists():
        files = os.listdir(out) if out.is_dir() else [out.name]
        strange = [name for name in files if not OUR_FILES.fullmatch(name)]
        if strange or 'meta.json' not in files:
            raise UserError(f'{out} is not only a prepared data set (it has '
                            f'{strange[0] if strange else "no meta.json"}); choose another --out')


@contextlib.contextmanager
def all_or_nothing(out, src=None):
    """A temporary folder beside `out` that replaces it only if the block succeeds."""
    out = Path(out)
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


def write_dataset(folder, name, skeleton_key, splits, skipped=(), stats=None, **how):
    """Write splits {split: iterable of (name, features, captions)} and print what was written.

    skipped: a Counter of reasons, which may grow while clips are read. stats: the data set's own
    mean and std; by default they are computed from the training split. how: steady and
    contact_threshold, if joints_to_features was called with them. UserError if there is no training
    clip.
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
    """Yield work(job) for each job, in order, computed on every core that this process may use. At
    most `ahead` jobs are read in advance, so an archive is never in memory as a whole."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else None
    waiting = deque()
    quiet = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        with ProcessPoolExecutor(cores, **quiet) as pool:   # Ctrl-C is for this process
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
    splits = {}
    for split, n in sizes.items():
        seeds = range(TOY_FIRST_SEED[split], TOY_FIRST_SEED[split] + n)
        splits[split] = in_parallel(toy_clip, seeds, split)
    write_dataset(folder, 'toy', 'smpl22', splits, steady=True, contact_threshold=TOY_CONTACT)


# ------------------------------------------------------------------------------------------- bandai


def bandai_clips(file):
    """(path, bytes) -> split, [(clip, its mirror image)], Counter of reasons if there are none."""
    path = Path(file[0])
    content, style = BANDAI_FILE.fullmatch(path.name).groups()
    pairs, skipped = [], Counter()
    with skipping(skipped):
        pairs = cut(path.stem, bandai_joints(file), bandai_captions(content, style))
    return bandai_split(path.stem), pairs, skipped


def prepare_bandai(folder, src):
    """Bandai-Namco-Research-Motiondataset 1 and 2. Each training clip is followed by its mirror
    image."""
    splits = {split: [] for split in SPLITS}
    skipped = Counter()
    for split, pairs, reasons in in_parallel(bandai_clips, bandai_files(src), 'bandai'):
        for clip, mirrored in pairs:
            splits[split] += [clip, mirrored] if split == 'train' else [clip]
        skipped += reasons
    write_dataset(folder, 'bandai', 'smpl22', splits, skipped, steady=True)


# ----------------------------------- hml3d, kit, babel: features in new_joint_vecs/<id>.npy (T, D)


def hml3d_clips(src, ids, split, skeleton, skipped):
    """Yield the clips of one split of HumanML3D or KIT-ML."""
    for name in tqdm(ids, split, unit='clip', mininterval=1):
        with skipping(skipped):
            features = load_features(Path(src, 'new_joint_vecs', f'{name}.npy'), skeleton)
            check_length(features, skeleton, 'clip')
            captions = read_captions(Path(src, 'texts', f'{name}.txt'), skipped)
            yield from captioned_clips(name, features, captions, skeleton, skipped)


def prepare_hml3d(folder, src, name):
    """HumanML3D or KIT-ML as everybody has it: new_joint_vecs/, texts/, train.txt val.txt test.txt,
    Mean.npy Std.npy. The lists and the statistics may be missing."""
    skeleton_key = 'kit21' if name == 'kit' else 'smpl22'
    skeleton = SKELETONS[skeleton_key]
    for part in ('new_joint_vecs', 'texts'):
        if not Path(src, part).is_dir():
            raise UserError(f'{src} has no folder {part}; --src is the folder that holds '
                            'new_joint_vecs, texts (unpack texts.zip there) and train.txt')
    ids = read_split_lists(src)
    if not ids:
        everything = sorted(path.stem for path in Path(src, 'new_joint_vecs').glob('*.npy'))
        print(f'{src} has no train.txt, val.txt or test.txt: all {len(everything)} clips go into '
              'all three splits, to try things out')
        ids = dict.fromkeys(SPLITS, everything)

    paths = [Path(src, file) for file in ('Mean.npy', 'Std.npy')]
    stats = None
    if all(path.exists() for path in paths):
        stats = [read_array(path, 'remove both, and they are computed') for path in paths]
    else:
        print(f'{src} has no Mean.npy and Std.npy: computing them from the training split')
    if stats and not all(s.shape == (skeleton.dim,) and np.isfinite(s).all() for s in stats):
        raise UserError(f'{src}/Mean.npy and Std.npy should be {skeleton.dim} finite numbers each, '
                        f'found shapes {[s.shape for s in stats]}; hml3d has 263, kit 251')

    skipped = Counter()
    splits = {split: hml3d_clips(src, names, split, skeleton, skipped)
              for split, names in ids.items()}
    write_dataset(folder, name, skeleton_key, splits, skipped, stats)


# ------------------------------------------- cmu: motion of the CMU database, captions of HumanML3D


def cmu_split(ids, clips, source, skipped):
    """Yield the clips of one split. clips: {name: features}. source: a HumanML3D."""
    for name in ids:
        if name in clips:
            with skipping(skipped):
                captions = source.captions(name, skipped)
                yield from captioned_clips(name, clips[name], captions, SMPL, skipped)


def prepare_cmu(folder, src, texts):
    """The CMU motion capture database as BVH (src, a clone of una-dinosauria/cmu-mocap) with the
    captions, cuts and splits of HumanML3D (texts, a clone of it): 2,913 of its 14,616 clips and
    their mirror images. Bodies have CMU's proportions, not SMPL's, so figures do not compare with
    HumanML3D's."""
    source = HumanML3D(texts)
    files = {path.stem: path for path in sorted(Path(src).rglob('*.bvh'))}
    skipped = Counter()
    trials = {}
    for row in source.rows:
        trial = cmu_trial(row['source_path'])
        if trial in files:
            cut_at = Path(row['new_name']).stem, int(row['start_frame']), int(row['end_frame'])
            trials.setdefault(files[trial], []).append(cut_at)
        elif trial:
            skipped['clip of a trial that is not in --src'] += 1
    clips = {}
    for of_trial, reasons in in_parallel(cmu_clips, trials.items(), 'cmu'):
        clips.update(of_trial)
        skipped.update(reasons)
    splits = {split: cmu_split(ids, clips, source, skipped) for split, ids in source.ids.items()}
    write_dataset(folder, 'cmu', 'smpl22', splits, skipped, steady=True)


# -------------------------------------------------------------------------------------------- babel


def prepare_babel(folder, src):
    """BABEL: src holds train.json and val.json of its release, and new_joint_vecs/<babel_sid>.npy
    (or named like the last part of feat_p), which are HumanML3D features (T, 263) at 20 fps of the
    whole AMASS sequence. Each frame_ann segment is a clip; without segments, the whole sequence
    (seq_ann) is. BABEL's test labels are not public, so the test split repeats val."""
    skipped = Counter()
    splits = {}
    for split, file in dict(train='train.json', val='val.json', test='val.json').items():
        splits[split] = babel_clips(src, babel_entries(Path(src, file)), split, skipped)
    write_dataset(folder, 'babel', 'smpl22', splits, skipped)


# ------------------------------------------------------------ folder: BVH files and arrays of yours


def own_clips(job, settings, fps):
    """(path, name, texts) -> [(clip, its mirror image)], notes and unused names of `read_take`, and
    a Counter of reasons if there are no clips."""
    path, name, texts = job
    pairs, notes, unused, skipped = [], [], None, Counter()
    with skipping(skipped):
        take = read_take(path, settings, fps)
        notes, unused = take.notes, take.unused
        captions = [dict(text=text, tokens=simple_tags(text)) for text in texts]
        pairs = cut(name, take.joints, captions)
    return pairs, notes, unused, skipped


def read_table(path, skipped):
    """Lines 'file,caption' (or with ; or a tab) -> {file without its suffix: [captions]}."""
    hint = 'expected lines file,caption; --captions says where they are'
    text = read(path, hint, decode_text)
    separator = re.search(r'[,;\t]', text.lstrip())
    rows = read(path, hint, lambda path: list(csv.reader(
        text.splitlines(), delimiter=separator[0] if separator else ',')))
    texts = {}
    for file, *cells in filter(any, rows):
        file = file.strip()
        text = ','.join(cells).strip().lower()   # several cells if commas are not quoted
        if (file.lower(), text) == ('file', 'caption'):
            continue
        if not file or not re.search(r'\w', text) or NOT_TEXT.search(text):
            skipped['line of the captions without file and caption'] += 1
        elif not re.search('[a-z0-9]', text):
            skipped['caption without a letter a to z or a digit, which no text encoder reads'] += 1
        else:
            file = os.path.normpath(file.replace('\\', '/'))
            if file.lower().endswith(SUFFIXES):
                file = file[:-4]
            texts.setdefault(file, []).append(text)
    return texts


def prepare_folder(folder, name, args):
    """All BVH files, and .npy and .npz files of joints or features, under args.src, with the
    settings of the command line. The split of a file is decided by a hash of its name. Each
    training clip is followed by its mirror image."""
    src, fps = args.src, args.fps
    files = [path for path in sorted(Path(src).rglob('*'))
             if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not files:
        raise UserError(f'{src} holds no {", ".join(SUFFIXES)} file')
    if fps and not 1 <= fps <= MAX_FPS:
        raise UserError(f'--fps is {fps:g}, expected 1 to {MAX_FPS} frames per second')
    settings = take_settings(args.joints, args.unit, args.up, args.root)

    skipped = Counter()
    texts = read_table(Path(args.captions or Path(src, 'captions.csv')), skipped)
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

    usable, notes, unused = [], Counter(), set(settings.joints.values())
    refused = Counter()
    work = functools.partial(own_clips, settings=settings, fps=fps)
    for pairs, of_file, unused_here, reasons in in_parallel(work, jobs, name):
        refused += reasons
        if unused_here is not None:
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
        raise UserError(f'{src} has {len(usable)} usable files, {silent} of them without a '
                        f'caption, expected 3 or more, with captions{often}')

    skipped += refused
    usable.sort(key=lambda pairs: hashlib.md5(pairs[0][0][0].encode()).hexdigest())
    first_val = math.ceil(0.1 * len(usable))
    first_train = first_val + math.ceil(0.05 * len(usable))
    splits = {
        'train': [clip for pairs in usable[first_train:] for pair in pairs for clip in pair],
        'val': [clip for pairs in usable[first_val:first_train] for clip, _ in pairs],
        'test': [clip for pairs in usable[:first_val] for clip, _ in pairs]}
    write_dataset(folder, name, 'smpl22', splits, skipped, steady=True)


# ------------------------------------------------------------------------------------- command line


def main(argv=None):
    """Prepare one data set. UserError if that is impossible; then nothing was written."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument('name', choices=['toy', 'bandai', 'cmu', 'hml3d', 'kit', 'babel', 'folder'])
    parser.add_argument('--src', help='where the data is (all but toy)')
    parser.add_argument('--out', help='default data/NAME')
    parser.add_argument('--texts', help='cmu: the clone of HumanML3D')
    own = parser.add_argument_group('folder')
    own.add_argument('--captions', help='csv of lines file,caption; default SRC/captions.csv')
    own.add_argument('--joints', default='', help='json: names of joints that are not known, as in '
                                                  'config/joint_names.json')
    own.add_argument('--unit', default='', help=f'{", ".join(UNITS)} or metres; default: what fits '
                                                'a body, for each file')
    own.add_argument('--up', default='', help=f'axis ({", ".join(AXES)}); default: from the body')
    own.add_argument('--root', default='', help='of a BVH file with several: its name, or 1, 2 ...')
    own.add_argument('--fps', type=float, default=0, help='frames per second of arrays')
    args = parser.parse_args(argv)
    if args.name != 'toy' and not args.src:
        raise UserError(f'{args.name} needs --src=PATH, the place of its data; see --help')
    if args.name == 'cmu' and not args.texts:
        raise UserError('cmu needs --texts=PATH, a clone of github.com/EricGuo5513/HumanML3D')

    out = args.out or f'data/{args.name}'
    with all_or_nothing(out, args.src) as folder:
        if args.name == 'toy':
            prepare_toy(folder)
        elif args.name == 'bandai':
            prepare_bandai(folder, args.src)
        elif args.name == 'cmu':
            prepare_cmu(folder, args.src, args.texts)
        elif args.name == 'babel':
            prepare_babel(folder, args.src)
        elif args.name == 'folder':
            prepare_folder(folder, Path(out).name, args)
        else:
            prepare_hml3d(folder, args.src, args.name)
    print(f'wrote {out}')


if __name__ == '__main__':
    install_error_hook()
    main()
