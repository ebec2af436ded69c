"""Turn motion data into data/<name>/, the one packed format that training reads (described in motion.py).

    python prepare_data.py toy                                    generated here, nothing to download
    python prepare_data.py bandai --src=bandai-namco.tar.xz       or the unpacked folder
    python prepare_data.py hml3d  --src=HumanML3D                 also: kit --src=KIT-ML
    python prepare_data.py babel  --src=babel_v1.0_release        its json files, and HumanML3D-style features

--out=data/NAME says where to write. The folder appears only when everything in it is complete.
"""
import argparse
import contextlib
import hashlib
import json
import lzma
import multiprocessing
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections import Counter

import numpy as np
from tqdm import tqdm

import motion
import toy
from motion import SKELETONS

UNIT_LENGTH = 4   # motion frames per token: the tokenizer's stride
MAX_FRAMES = 196  # the field's longest motion, 49 tokens
MIN_FRAMES = {'smpl22': 40, 'kit21': 24}
SMPL = SKELETONS['smpl22']


def write_dataset(out, name, skeleton_key, splits, stats=None, contact_threshold=None, steady=False, skipped=()):
    """Write splits {split: (clips, captions)} to the folder `out`, all or nothing.

    clips: iterable of (name, features (T, D)); captions: list of {"clip", "text", "tokens"}, which may grow as clips are
    read (motion.save_split). stats: the data set's own (mean, std); computed from the training split if None. steady: how
    joints_to_features was called, for whoever adds motion later. skipped: Counter of reasons. ValueError where `out` is no
    prepared data set, or where no training clip is found.
    """
    skeleton = SKELETONS[skeleton_key]
    out = os.path.normpath(out)
    if os.path.exists(out) and not os.path.exists(os.path.join(out, 'meta.json')):
        raise ValueError(f'{out} exists and is not a prepared data set; choose another --out or remove it')
    with all_or_nothing(out) as folder:
        counts = {split: motion.save_split(folder, split, *content) for split, content in splits.items()}
        for reason, n in sorted(Counter(skipped).items()):
            print(f'skipped {n:,}: {reason}')
        if not counts.get('train'):
            raise ValueError(f'no usable training clip for {name} in --src; nothing was written')
        counts = {split: count for split, count in counts.items() if count}
        if stats is None:
            stats = motion.mean_std(np.load(os.path.join(folder, 'train_motion.npy'), mmap_mode='r'), skeleton.n_joints)
        meta = dict(name=name, skeleton=skeleton_key, fps=skeleton.fps, dim=skeleton.dim, n_joints=skeleton.n_joints,
                    unit_length=UNIT_LENGTH, min_frames=MIN_FRAMES[skeleton_key], max_frames=MAX_FRAMES,
                    contact_threshold=contact_threshold or skeleton.contact_threshold,
                    units_per_metre=skeleton.units_per_metre, steady=steady, counts=counts, skipped=dict(skipped))
        motion.save_meta(folder, meta, *stats)
    for split, count in counts.items():
        print(f'{split:5s} {count["clips"]:6,} clips  {count["frames"]:9,} frames  {count["captions"]:7,} captions')
    print(f'wrote {out}')


@contextlib.contextmanager
def all_or_nothing(out):
    """A scratch folder beside `out` that takes its place only if the block ends well."""
    parent = os.path.dirname(os.path.abspath(out))
    os.makedirs(parent, exist_ok=True)
    scratch = tempfile.mkdtemp(prefix='.preparing-', dir=parent)
    try:
        new, old = os.path.join(scratch, 'new'), os.path.join(scratch, 'old')
        os.mkdir(new)
        yield new
        if os.path.exists(out):
            os.rename(out, old)
        try:
            os.rename(new, out)
        except OSError:
            os.rename(old, out)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def workers():
    """One process per core this process may use; they compute in numpy, one thread each."""
    return multiprocessing.Pool(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())


# ---------------------------------------------------------------------------------------------------------------------
# toy

TOY_SIZES = {'train': 2000, 'val': 200, 'test': 400}
TOY_FIRST_SEED = {'train': 0, 'val': 10_000_000, 'test': 20_000_000}  # far apart: no clip is in two splits
TOY_CONTACT = 1e-4  # squared metres: contact 1 means that the foot moved less than 1 cm


def toy_clip(seed):
    clip = toy.make_clip(seed)
    features = motion.joints_to_features(clip['joints'], SMPL, contact_threshold=TOY_CONTACT, steady=True)
    return features.astype(np.float32), clip


def prepare_toy(out, sizes=TOY_SIZES):
    """Procedural motion with captions and scripts from toy.py, deterministic by seed. sizes: clips per split."""
    splits = {}
    with workers() as pool:
        for split, n in sizes.items():
            seeds = range(TOY_FIRST_SEED[split], TOY_FIRST_SEED[split] + n)
            clips, captions = [], []
            for i, (features, clip) in enumerate(tqdm(pool.imap(toy_clip, seeds, 16), f'toy {split}', n, unit='clip')):
                clips.append((f'toy-{seeds[i]:08d}', features))
                captions += [dict(clip=i, text=text, tokens=tokens, script=clip['script']) for text, tokens in clip['captions']]
            splits[split] = clips, captions
    write_dataset(out, 'toy', 'smpl22', splits, contact_threshold=TOY_CONTACT, steady=True)


# ---------------------------------------------------------------------------------------------------------------------
# bandai: captions from the two words in the file name

# "word/TAG" or "surface=lemma/TAG", as in the benchmarks' token lists; two ways to say each content, the left-hand ones
# are made from the right-hand ones by swapping the words
CONTENT = {
    'walk': ('walks=walk/VERB forward/ADV', 'is=be/AUX walking=walk/VERB straight/ADV ahead/ADV'),
    'run': ('runs=run/VERB forward/ADV', 'is=be/AUX running=run/VERB straight/ADV ahead/ADV'),
    'dash': ('dashes=dash/VERB forward/ADV', 'sprints=sprint/VERB straight/ADV ahead/ADV'),
    'walk-back': ('walks=walk/VERB backward/ADV', 'takes=take/VERB several/ADJ steps=step/NOUN back/ADV'),
    'walk-right': ('walks=walk/VERB to/ADP the/DET right/NOUN', 'walks=walk/VERB off/ADV towards/ADP the/DET right/ADJ side/NOUN'),
    'walk-turn-right': ('walks=walk/VERB forward/ADV and/CCONJ turns=turn/VERB right/ADV',
                        'makes=make/VERB a/DET turn/NOUN to/ADP the/DET right/NOUN while/SCONJ walking=walk/VERB'),
    'bow': ('bows=bow/VERB', 'bends=bend/VERB forward/ADV at/ADP the/DET waist/NOUN to/PART bow/VERB'),
    'bye': ('waves=wave/VERB goodbye/NOUN with/ADP one/NUM hand/NOUN', 'lifts=lift/VERB one/NUM hand/NOUN to/PART say/VERB goodbye/NOUN'),
    'byebye': ('waves=wave/VERB goodbye/NOUN eagerly/ADV', 'says=say/VERB bye/NOUN by/ADP waving=wave/VERB the/DET hands=hand/NOUN'),
    'guide': ('shows=show/VERB the/DET way/NOUN with/ADP one/NUM hand/NOUN', 'guides=guide/VERB a/DET guest/NOUN with/ADP a/DET gesture/NOUN'),
    'respond': ('raises=raise/VERB one/NUM hand/NOUN to/PART respond/VERB', 'responds=respond/VERB by/ADP lifting=lift/VERB a/DET hand/NOUN'),
    'call': ('calls=call/VERB someone/PRON over/ADV', 'beckons=beckon/VERB with/ADP the/DET hands=hand/NOUN'),
    'dance-short': ('dances=dance/VERB', 'is=be/AUX dancing=dance/VERB to/ADP music/NOUN'),
    'dance-long': ('dances=dance/VERB for/ADP a/DET while/NOUN', 'is=be/AUX dancing=dance/VERB a/DET long/ADJ dance/NOUN'),
    'kick': ('kicks=kick/VERB', 'performs=perform/VERB several/ADJ kicks=kick/NOUN'),
    'punch': ('punches=punch/VERB', 'throws=throw/VERB several/ADJ punches=punch/NOUN'),
    'slash': ('slashes=slash/VERB with/ADP a/DET sword/NOUN', 'swings=swing/VERB a/DET sword/NOUN with/ADP both/DET hands=hand/NOUN'),
    'raise-up-both-hands': ('raises=raise/VERB both/DET hands=hand/NOUN', 'lifts=lift/VERB both/DET arms=arm/NOUN up/ADV'),
    'raise-up-right-hand': ('raises=raise/VERB the/DET right/ADJ hand/NOUN', 'lifts=lift/VERB the/DET right/ADJ arm/NOUN up/ADV'),
    'wave-both-hands': ('waves=wave/VERB both/DET hands=hand/NOUN', 'is=be/AUX waving=wave/VERB with/ADP both/DET hands=hand/NOUN'),
    'wave-right-hand': ('waves=wave/VERB the/DET right/ADJ hand/NOUN', 'is=be/AUX waving=wave/VERB with/ADP the/DET right/ADJ hand/NOUN'),
}
STYLE = {  # an adjective before "person", and two ways to say how
    'normal': ('', 'normally/ADV', 'in/ADP a/DET normal/ADJ way/NOUN'),
    'active': ('an/DET energetic/ADJ', 'actively/ADV', 'with/ADP a/DET lot/NOUN of/ADP energy/NOUN'),
    'elderly': ('an/DET elderly/ADJ', 'like/ADP an/DET old/ADJ person/NOUN', 'with/ADP the/DET stiffness/NOUN of/ADP old/ADJ age/NOUN'),
    'exhausted': ('an/DET exhausted/ADJ', 'as/SCONJ if/SCONJ exhausted/ADJ', 'with/ADP hardly/ADV any/DET strength/NOUN'),
    'feminine': ('a/DET feminine/ADJ', 'in/ADP a/DET feminine/ADJ way/NOUN', 'like/ADP a/DET graceful/ADJ woman/NOUN'),
    'masculine': ('a/DET masculine/ADJ', 'in/ADP a/DET masculine/ADJ way/NOUN', 'like/ADP a/DET tough/ADJ man/NOUN'),
    'youthful': ('a/DET youthful/ADJ', 'like/ADP a/DET young/ADJ person/NOUN', 'with/ADP youthful/ADJ spirit/NOUN'),
    'happy': ('a/DET happy/ADJ', 'happily/ADV', 'in/ADP a/DET cheerful/ADJ mood/NOUN'),
    'sad': ('a/DET sad/ADJ', 'sadly/ADV', 'with/ADP a/DET heavy/ADJ heart/NOUN'),
    'angry': ('an/DET angry/ADJ', 'angrily/ADV', 'in/ADP a/DET bad/ADJ temper/NOUN'),
    'proud': ('a/DET proud/ADJ', 'proudly/ADV', 'with/ADP the/DET chest/NOUN puffed=puff/VERB out/ADV'),
    'not-confident': ('a/DET timid/ADJ', 'without/ADP confidence/NOUN', 'in/ADP a/DET hesitant/ADJ way/NOUN'),
    'childish': ('a/DET childish/ADJ', 'like/ADP a/DET child/NOUN', 'in/ADP a/DET childish/ADJ way/NOUN'),
    'tired': ('a/DET tired/ADJ', 'tiredly/ADV', 'as/SCONJ if/SCONJ worn=wear/VERB out/ADV'),
    'musical': ('a/DET musical/ADJ', 'rhythmically/ADV', 'as/SCONJ if/SCONJ to/ADP music/NOUN'),
    'giant': ('a/DET gigantic/ADJ', 'like/ADP a/DET giant/NOUN', 'with/ADP the/DET weight/NOUN of/ADP a/DET giant/NOUN'),
    'chimpira': ('a/DET swaggering/ADJ', 'like/ADP a/DET street/NOUN thug/NOUN', 'with/ADP a/DET cocky/ADJ swagger/NOUN'),
}
STYLE['masculinity'], STYLE['old'], STYLE['children'] = STYLE['masculine'], STYLE['elderly'], STYLE['childish']


def swap_sides(text):
    """Left for right and right for left, word by word."""
    return re.sub(r'\b(left|right)\b', lambda m: 'right' if m[0] == 'left' else 'left', text)


def bandai_captions(content, style):
    """Six (text, tokens) paraphrases for the words of a file name, in a fixed order. ValueError for unknown words."""
    left = 'left' in content
    if (swap_sides(content) if left else content) not in CONTENT or style not in STYLE:
        raise ValueError(f'"{content}" in the style "{style}" is not a content and style of the Bandai-Namco sets')
    does, acts = (swap_sides(c) for c in CONTENT[swap_sides(content)]) if left else CONTENT[content]
    adjective, how, way = STYLE[style]
    person, someone, figure = 'a/DET person/NOUN', 'someone/PRON', 'a/DET figure/NOUN'
    somebody = f'{adjective} person/NOUN' if adjective else 'the/DET person/NOUN'
    tagged = [f'{person} {does} {how}', f'{someone} {acts} {way}', f'{somebody} {does}', f'{somebody} {acts}',
              f'{figure} {acts} {how}', f'{person} {does} {way}']
    return [caption(t) for t in tagged]


def caption(tagged):
    """'a/DET person/NOUN walks=walk/VERB' -> ('a person walks', 'a/DET person/NOUN walk/VERB')"""
    words = [word.rsplit('/', 1) for word in tagged.split()]
    return (' '.join(word.split('=')[0] for word, _ in words), ' '.join(f'{word.split("=")[-1]}/{tag}' for word, tag in words))


# ---------------------------------------------------------------------------------------------------------------------
# bandai: BVH files

# SMPL-22 joints as BVH joints; spine2 lies midway between the two named (motion.py has the order of the 22)
BANDAI_JOINTS = {'pelvis': 'Hips', 'spine1': 'Spine', 'spine3': 'Chest', 'neck': 'Neck', 'head': 'Head'}
for _side in ('left', 'right'):
    for _smpl, _bvh in dict(hip='UpperLeg', knee='LowerLeg', ankle='Foot', foot='Toes', collar='Shoulder', shoulder='UpperArm',
                            elbow='LowerArm', wrist='Hand').items():
        BANDAI_JOINTS[f'{_side}_{_smpl}'] = f'{_bvh}_{_side[0].upper()}'
BANDAI_FILE = re.compile(r'dataset-\d_(.+)_([^_]+)_\d+\.bvh$')


def bandai_joints(file):
    """A BVH file of this skeleton (path, or (name, bytes)) -> SMPL-22 world positions (T, 22, 3), metres, 20 fps."""
    names, parents, offsets, channels, frames, fps = motion.read_bvh(file)
    missing = set(BANDAI_JOINTS.values()) - set(names)
    if missing:
        where = file[0] if isinstance(file, tuple) else file
        raise ValueError(f'{where} has another skeleton ({len(names)} joints, without {", ".join(sorted(missing)[:3])}); '
                         f'expected the {len(BANDAI_JOINTS)} joints of the Bandai-Namco sets: convert it to their joint names')
    if len(frames) < 2:
        raise ValueError(f'{file[0] if isinstance(file, tuple) else file} holds {len(frames)} frames; a motion needs two')
    world = motion.bvh_to_joints(parents, offsets, channels, frames) / 100  # centimetres
    joints = np.zeros((len(world), 22, 3))
    for j, name in enumerate(SMPL.names):
        if name != 'spine2':
            joints[:, j] = world[:, names.index(BANDAI_JOINTS[name])]
    joints[:, 6] = (joints[:, 3] + joints[:, 9]) / 2
    return motion.resample(joints, fps, SMPL.fps)


def split_of(name):
    """85% train, 5% val, 10% test by a hash of the clip's name: the same for everybody, whatever else is there."""
    share = int(hashlib.md5(name.encode()).hexdigest(), 16) % 100
    return 'train' if share < 85 else 'val' if share < 90 else 'test'


def bandai_clip(file):
    """One file -> (name, [(features, mirrored)], reason): its pieces, or why there are none."""
    name = os.path.basename(file[0] if isinstance(file, tuple) else file)[:-len('.bvh')]
    try:
        content, style = BANDAI_FILE.match(name + '.bvh').groups()
        bandai_captions(content, style)
        joints = bandai_joints(file)
    except ValueError as e:
        return name, [], str(e)
    frames = len(joints) - 1  # the features use up one
    if frames < MIN_FRAMES['smpl22']:
        return name, [], f'shorter than {MIN_FRAMES["smpl22"]} frames'
    # a clip over the maximum is cut into equal consecutive pieces; one frame more in each for its last velocity
    pieces = -(-frames // MAX_FRAMES)
    edges = np.linspace(0, frames, pieces + 1).astype(int)
    result = []
    for a, b in zip(edges, edges[1:]):
        piece = joints[a:b + 1]
        bodies = [piece, motion.mirror(piece, SMPL)] if split_of(name) == 'train' else [piece]
        result.append([motion.joints_to_features(j, SMPL, steady=True).astype(np.float32) for j in bodies])
    return name, result, None


def bandai_files(src):
    """Yield each clip of a folder as its path, of a .tar.xz as (name, bytes): the archive streams, nothing is unpacked."""
    if os.path.isdir(src):
        for folder, _, files in sorted(os.walk(src)):
            yield from (os.path.join(folder, f) for f in sorted(files) if BANDAI_FILE.match(f))
        return
    try:
        with tarfile.open(src, 'r|*') as archive:
            for member in archive:
                if BANDAI_FILE.match(os.path.basename(member.name)):
                    yield member.name, archive.extractfile(member).read()
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f'{src} cannot be read as a .tar.xz ({error}); it is damaged, truncated or something else: '
                         'download it again') from None


def prepare_bandai(out, src):
    """Bandai-Namco-Research-Motiondataset 1 and 2; the training split also holds every clip's mirror image, 'M' + name."""
    if not os.path.exists(src):
        raise FileNotFoundError(f'{src} is not there; clone github.com/BandaiNamcoResearchInc/Bandai-Namco-Research-Motiondataset '
                                'and give the folder, or a .tar.xz of it, with --src')
    splits = {split: ([], []) for split in ('train', 'val', 'test')}
    skipped = Counter()
    with workers() as pool:
        for name, pieces, reason in tqdm(pool.imap(bandai_clip, bandai_files(src)), 'bandai', unit='clip'):
            if reason:
                skipped[reason] += 1
            clips, captions = splits[split_of(name)]
            for number, bodies in enumerate(pieces):
                for sign, features in zip(('', 'M'), bodies):
                    content, style = BANDAI_FILE.match(name + '.bvh').groups()
                    for text, tokens in bandai_captions(swap_sides(content) if sign else content, style):
                        captions.append(dict(clip=len(clips), text=text, tokens=tokens))
                    clips.append((sign + name + (f'-{number}' if len(pieces) > 1 else ''), features))
    write_dataset(out, 'bandai', 'smpl22', splits, steady=True, skipped=skipped)


# ---------------------------------------------------------------------------------------------------------------------
# hml3d, kit, babel: folders of ready features, new_joint_vecs/<id>.npy (T, D) at the skeleton's frame rate


def load_features(path, skeleton, skipped):
    """Features (T, D) float32 of one file; None where they cannot be used, with the reason counted in skipped."""
    try:
        features = np.load(path)
    except FileNotFoundError:
        skipped['features file missing'] += 1
    except (ValueError, EOFError, OSError):
        skipped['features file unreadable'] += 1
    else:
        if features.ndim != 2 or features.shape[1] != skeleton.dim:
            skipped[f'features not {skeleton.dim} wide (found shape (T, {"x".join(map(str, features.shape[1:]))}))'] += 1
        elif not np.isfinite(features).all():
            skipped['NaN or infinity in features'] += 1
        else:
            return features.astype(np.float32)


def right_length(features, skeleton_key, skipped, what='clip'):
    """The field's rule, min <= frames < 200, counted in skipped where it fails."""
    shortest = MIN_FRAMES[skeleton_key]
    if len(features) < shortest:
        skipped[f'{what} shorter than {shortest} frames'] += 1
    elif len(features) >= 200:
        skipped[f'{what} of 200 frames or more'] += 1
    else:
        return True


def read_captions(path, skipped):
    """Lines `caption#word/TAG word/TAG#from#to` -> [(text, tokens, from, to)] in seconds; nan means 0."""
    try:
        with open(path, encoding='utf-8-sig', errors='replace') as f:  # text mode reads Windows line ends too
            lines = [line.strip() for line in f if line.strip()]
    except FileNotFoundError:
        skipped['text file missing'] += 1
        return []
    captions = []
    for line in lines:
        try:
            text, tokens, start, end = line.split('#')
            start, end = (0.0 if np.isnan(float(x)) else float(x) for x in (start, end))
        except ValueError:
            text = ''
        if text.strip():
            captions.append((text.strip(), tokens.strip(), start, end))
        else:
            skipped['caption line without text, tags, from and to'] += 1
    return captions


def field_clips(src, ids, split, skeleton_key, captions, skipped):
    """Yield (name, features) of one split of a HumanML3D/KIT-ML folder and append its captions, by the field's rules: a
    caption with from/to other than 0 names a sub-clip of its own."""
    skeleton, n = SKELETONS[skeleton_key], 0
    for name in tqdm(ids, split, unit='clip'):
        features = load_features(os.path.join(src, 'new_joint_vecs', f'{name}.npy'), skeleton, skipped)
        if features is None or not right_length(features, skeleton_key, skipped):
            continue
        whole = []
        for k, (text, tokens, start, end) in enumerate(read_captions(os.path.join(src, 'texts', f'{name}.txt'), skipped)):
            if start == end == 0:
                whole.append(dict(text=text, tokens=tokens))
                continue
            part = features[int(start * skeleton.fps):int(end * skeleton.fps)]
            if right_length(part, skeleton_key, skipped, 'sub-clip'):
                captions.append(dict(clip=n, text=text, tokens=tokens))
                yield f'{name}-{k}', part
                n += 1
        if whole:
            captions += [dict(clip=n, **c) for c in whole]
            yield name, features
            n += 1


def prepare_field(out, src, name, skeleton_key):
    """HumanML3D or KIT-ML as everybody has it: new_joint_vecs/, texts/, train.txt val.txt test.txt, Mean.npy Std.npy."""
    for folder in ('new_joint_vecs', 'texts'):
        if not os.path.isdir(os.path.join(src, folder)):
            raise FileNotFoundError(f'{src} has no folder {folder}; --src is the folder that holds new_joint_vecs, texts (unpack '
                                    'texts.zip there) and train.txt')
    ids = {}
    for split in ('train', 'val', 'test'):
        path = os.path.join(src, f'{split}.txt')
        if os.path.exists(path):
            with open(path, encoding='utf-8-sig') as f:
                ids[split] = f.read().split()
    if not ids:
        everything = sorted(f[:-4] for f in os.listdir(os.path.join(src, 'new_joint_vecs')) if f.endswith('.npy'))
        print(f'{src} has no train.txt, val.txt or test.txt: all {len(everything)} clips go into all three splits, to try things out')
        ids = dict.fromkeys(('train', 'val', 'test'), everything)
    try:
        stats = [np.load(os.path.join(src, f)) for f in ('Mean.npy', 'Std.npy')]
    except FileNotFoundError:
        print(f'{src} has no Mean.npy and Std.npy: computing them from the training split')
        stats = None
    if stats and any(s.shape != (SKELETONS[skeleton_key].dim,) or not np.isfinite(s).all() for s in stats):
        raise ValueError(f'{src}/Mean.npy and Std.npy should be {SKELETONS[skeleton_key].dim} finite numbers each, found shapes '
                         f'{[s.shape for s in stats]}; hml3d has 263, kit 251')
    skipped = Counter()
    splits = {}
    for split, names in ids.items():
        captions = []
        splits[split] = field_clips(src, names, split, skeleton_key, captions, skipped), captions
    write_dataset(out, name, skeleton_key, splits, stats, skipped=skipped)


ADPOSITIONS = set('with to at in on from for of over under into onto by through around towards toward against across off'.split())
ADVERBS = set('forward forwards backward backwards back up down sideways away again straight ahead clockwise counterclockwise'.split())
DETERMINERS = set('a an the both his her their something'.split())


def simple_tags(text):
    """'turn left with the left arm' -> 'turn/VERB left/ADV with/ADP the/DET left/ADJ arm/NOUN': labels are short and start
    with a verb, so a table of small words will do."""
    words, tags = re.findall(r"[a-z0-9']+", text.lower()), []
    for i, word in enumerate(words):
        noun_follows = i + 1 < len(words) and words[i + 1] not in ADPOSITIONS | ADVERBS | {'and', 'then'}
        tags.append('ADP' if word in ADPOSITIONS else 'DET' if word in DETERMINERS else 'CCONJ' if word in ('and', 'then')
                    else ('ADJ' if noun_follows and i else 'ADV') if word in ('left', 'right')
                    else 'ADV' if word in ADVERBS or word.endswith('ly')
                    else 'VERB' if i == 0 or tags[-1] == 'CCONJ' or word.endswith('ing') else 'NOUN')
    return ' '.join(f'{w}/{t}' for w, t in zip(words, tags))


def babel_clips(src, entries, split, captions, skipped):
    """Yield (name, features) for every labelled segment of BABEL's entries; its label becomes the caption."""
    n = 0
    for key, entry in tqdm(entries.items(), split, unit='clip'):
        stems = [str(entry.get('babel_sid', key)), os.path.splitext(os.path.basename(entry.get('feat_p') or ''))[0]]
        paths = [os.path.join(src, 'new_joint_vecs', f'{stem}.npy') for stem in stems if stem]
        features = load_features(next(filter(os.path.exists, paths), paths[0]), SMPL, skipped)
        if features is None:
            continue
        frame_ann, seq_ann = entry.get('frame_ann') or {}, entry.get('seq_ann') or {}
        for k, label in enumerate(frame_ann.get('labels') or seq_ann.get('labels') or []):
            text = (label.get('proc_label') or label.get('raw_label') or '').strip()
            if text in ('', 'transition'):
                skipped['segment without a label, or a transition'] += 1
                continue
            start, end = label.get('start_t'), label.get('end_t')
            part = features if start is None or end is None else features[int(start * SMPL.fps):int(end * SMPL.fps)]
            if right_length(part, 'smpl22', skipped, 'segment'):
                captions.append(dict(clip=n, text=text, tokens=simple_tags(text)))
                yield f'{stems[0]}-{k}', part
                n += 1


def prepare_babel(out, src):
    """BABEL: src holds train.json and val.json of its release, and new_joint_vecs/<babel_sid>.npy (or named like feat_p's
    last part), HumanML3D features (T, 263) at 20 fps of the whole AMASS sequence. Each frame_ann segment is a clip, or the
    whole sequence (seq_ann) where there is none. BABEL's test labels are not public: the test split repeats val."""
    splits, skipped = {}, Counter()
    for split, file in dict(train='train.json', val='val.json', test='val.json').items():
        path = os.path.join(src, file)
        try:
            with open(path, encoding='utf-8') as f:
                entries = json.load(f)
        except FileNotFoundError:
            raise FileNotFoundError(f'{path} is not there; --src is the folder with BABEL\'s train.json and val.json and with '
                                    'new_joint_vecs/<babel_sid>.npy') from None
        except json.JSONDecodeError as e:
            raise ValueError(f'{path} is not JSON (line {e.lineno}); download it again') from None
        captions = []
        splits[split] = babel_clips(src, entries, split, captions, skipped), captions
    write_dataset(out, 'babel', 'smpl22', splits, skipped=skipped)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', choices=['toy', 'bandai', 'hml3d', 'kit', 'babel'])
    parser.add_argument('--src', help='where the data lies (all but toy)')
    parser.add_argument('--out', help='default data/NAME')
    args = parser.parse_args(argv)
    out = args.out or os.path.join('data', args.name)
    try:
        if args.name == 'toy':
            prepare_toy(out)
        elif not args.src:
            raise ValueError(f'{args.name} needs --src=PATH, the place where its data lies; see --help')
        elif args.name == 'bandai':
            prepare_bandai(out, args.src)
        elif args.name == 'babel':
            prepare_babel(out, args.src)
        else:
            prepare_field(out, args.src, args.name, 'kit21' if args.name == 'kit' else 'smpl22')
    except (ValueError, OSError) as error:
        print(f'prepare_data.py: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
