"""Motion and captions in the layouts of HumanML3D, KIT-ML and BABEL, by the rules of their standard
preparation, and the trials of the CMU database that HumanML3D has captions for."""
import contextlib
import csv
import json
import math
import os
import re
import zipfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib.bvh import decode
from lib.configurator import NOT_TEXT, ROOT, UserError
from lib.data import LARGEST
from lib.motion import SKELETONS, joints_to_features, mirror
from lib.runtime import read, read_array, read_json, read_text
from lib.takes import read_take

SPLITS = ('train', 'val', 'test')
SMPL = SKELETONS['smpl22']
SMALL_WORDS = json.loads(Path(ROOT, 'config', 'small_words.json').read_text(encoding='utf-8'))
TAG_OF = {word: tag for tag, words in SMALL_WORDS['tags'].items() for word in words.split()}
WHO = SMALL_WORDS['who'].split()
UNREADABLE = 'caption that no text encoder reads: it has no letter a to z and no digit'


@contextlib.contextmanager
def skipping(skipped):
    """A UserError ends the block only; its sentence is counted in `skipped`."""
    try:
        yield
    except UserError as reason:
        skipped[str(reason)] += 1


def is_readable(caption):
    return re.search('[a-z0-9]', caption.lower()) and not NOT_TEXT.search(caption)


def load_features(path, skeleton):
    """Features (T, D) of one file. UserError if they cannot be used."""
    if not os.path.exists(path):
        raise UserError('features file missing')
    features = np.array(read_array(path, 'get it again'))
    if features.ndim != 2 or features.shape[1] != skeleton.dim:
        raise UserError(f'features not {skeleton.dim} wide (found {features.shape[1:]})')
    if not (np.abs(features) < LARGEST).all():
        raise UserError('NaN, infinity or huge numbers in features')
    return features


def part_of(features, start, end, fps, what):
    """Frames from start to end (seconds). UserError if these do not name any."""
    numbers = all(type(t) in (int, float) for t in (start, end))
    if not numbers or not 0 <= start < end < 1e6:
        raise UserError(f'{what} from and to of no frames')
    return features[int(start * fps):int(end * fps)]


def check_length(features, skeleton, what):
    """The rule of the standard data preparation, which drops clips of 200 frames too."""
    if len(features) < skeleton.min_frames:
        raise UserError(f'{what} shorter than {skeleton.min_frames} frames')
    if len(features) >= 200:
        raise UserError(f'{what} of 200 or more frames')


# ------------------------------------------------------------------------- HumanML3D and KIT-ML


def parse_captions(content, skipped):
    """Bytes of lines 'caption#word/TAG word/TAG#from#to' -> [(caption, from, to)] in seconds; nan
    means 0."""
    captions = []
    for line in filter(str.strip, decode(content).split('\n')):
        try:
            text, tokens, start, end = (part.strip() for part in line.split('#'))
            start, end = (0.0 if math.isnan(float(t)) else float(t) for t in (start, end))
        except ValueError:
            text = ''
        if not text or NOT_TEXT.search(line) or not all('/' in word for word in tokens.split()):
            skipped['caption line without text, tags, from and to'] += 1
        elif not is_readable(text):
            skipped[UNREADABLE] += 1
        else:
            captions.append((dict(text=text, tokens=tokens), start, end))
    return captions


def read_captions(path, skipped):
    """A file of such lines -> the same. UserError if it is missing."""
    if not os.path.exists(path):
        raise UserError('text file missing')
    return parse_captions(read(path, 'get it again', Path.read_bytes), skipped)


class HumanML3D:
    """A folder in the layout of HumanML3D: texts/ or texts.zip, train.txt val.txt test.txt, and the
    file or folder `needed`. All may be in HumanML3D/ there, as in a clone of its repository.

    ids: {split: names of its clips}, without the splits that have no list.
    """

    def __init__(self, folder, needed):
        self.places = [Path(folder), Path(folder, 'HumanML3D')]
        for part in (needed, 'texts'):
            if not self.find(part) and not self.find(f'{part}.zip'):
                raise UserError(f'{folder} has no folder or file {part}; expected the layout of '
                                f'HumanML3D, with {needed}, texts and train.txt')
        archive = self.find('texts.zip')
        self.archive = read(archive, 'get it again', zipfile.ZipFile) if archive else None
        self.ids = {}
        for split in SPLITS:
            path = self.find(f'{split}.txt')
            if path:
                self.ids[split] = read_text(path, 'expected names of clips, one a line').split()
            for name in self.ids.get(split, []):
                if not re.fullmatch(r'[\w.-]+', name) or '..' in name:
                    raise UserError(f"{path} has '{name:.80}', expected names of clips, not paths")

    def find(self, name):
        return next((place / name for place in self.places if (place / name).exists()), None)

    def captions(self, name, skipped):
        """As `read_captions`, of a clip's name."""
        member = f'texts/{name}.txt'
        if self.archive and not self.find(member) and member in self.archive.namelist():
            return parse_captions(self.archive.read(member), skipped)
        return read_captions(self.find(member) or Path(member), skipped)

    def clips(self, ids, load, skeleton, skipped):
        """Yield clips by the standard rules: a caption with from/to other than 0 describes a
        sub-clip, which is a clip of its own. load: a function from a name to features (T, D)."""
        for name in tqdm(ids, unit='clip', mininterval=1):
            with skipping(skipped):
                features = load(name)
                check_length(features, skeleton, 'clip')
                whole = []
                for k, (caption, start, end) in enumerate(self.captions(name, skipped)):
                    if start == end == 0:
                        whole.append(caption)
                        continue
                    with skipping(skipped):
                        part = part_of(features, start, end, skeleton.fps, 'sub-clip')
                        check_length(part, skeleton, 'sub-clip')
                        yield f'{name}-{k}', part, [caption]
                if whole:
                    yield name, features, whole


# ----------------------------------------------------------------------------------------- cmu

# the two people of a trial, as AMASS names them: 18_19_Justin, 18_19_rory
PAIR = re.compile(r'(\d+)_(\d+)_(justin|rory)\d?', re.IGNORECASE)


def cmu_trial(source_path):
    """A path of HumanML3D's index.csv -> the name of a trial of the CMU database, '' if it is of
    another: './pose_data/CMU/12/12_01_poses.npy' -> '12_01'. Other people's code for AMASS takes
    Justin for the first subject of a pair and Rory for the second, and so does this."""
    *_, database, subject, file = ('', '', *Path(source_path).parts)
    if database != 'CMU':
        return ''
    trial = file.removesuffix('_poses.npy')
    pair = PAIR.fullmatch(subject)
    if pair:
        own = pair[1] if pair[3].lower() == 'justin' else pair[2]
        trial = f'{own}_{trial.partition("_")[2]}'
    return trial


def cmu_clips(job):
    """(trial's BVH file, [(clip, first and end frame at 20 fps)]) -> [(clip, features)], each with
    its mirror image 'M' + clip, and reasons why there are none."""
    path, cuts = job
    clips, reasons = [], []
    try:
        joints = read_take(path).joints
    except UserError as reason:
        return [], [str(reason)] * len(cuts)
    for name, first, end in cuts:
        if len(joints) < end - 1:
            reasons.append('clip that ends after its trial')
            continue
        for name, body in (name, joints), ('M' + name, mirror(joints, SMPL)):
            features = joints_to_features(body[first:end], SMPL, steady=True)
            clips.append((name, features.astype(np.float32)))
    return clips, reasons


def cmu_cuts(path):
    """HumanML3D's index.csv -> [(trial of the CMU database or '', clip, its first and end frame at
    20 fps)]"""
    rows = csv.DictReader(path.read_text(encoding='utf-8-sig').splitlines())
    return [(cmu_trial(row['source_path']), Path(row['new_name']).stem, int(row['start_frame']),
             int(row['end_frame'])) for row in rows]


# --------------------------------------------------------------------------------------- babel

def simple_tags(text):
    """'turn left with the left arm' -> 'turn/VERB left/ADV with/ADP the/DET left/ADJ arm/NOUN'.
    BABEL's labels are short and begin with a verb, so a table of small words is enough. In a
    sentence the verb follows its subject: 'a person walks'."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    tags = []
    for i, word in enumerate(words):
        if word in ('left', 'right'):
            noun_follows = i + 1 < len(words) and TAG_OF.get(words[i + 1]) in (None, 'DET')
            tag = 'ADJ' if noun_follows and i > 0 else 'ADV'
        elif word in TAG_OF or word.endswith('ly'):
            tag = TAG_OF.get(word, 'ADV')
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
    vectors = Path(src, 'new_joint_vecs')
    for key, entry in tqdm(entries.items(), split, unit='clip', mininterval=1):
        with skipping(skipped):
            try:
                sid = Path(str(entry.get('babel_sid', key))).name
                file = Path(entry.get('feat_p') or '').stem
                segments = (entry.get('frame_ann') or {}).get('labels')
                whole = (entry.get('seq_ann') or {}).get('labels')
                labels = [(label.get('proc_label') or label.get('raw_label'), label.get('start_t'),
                           label.get('end_t')) for label in segments or whole or []]
            except (AttributeError, TypeError):
                raise UserError('entry of another form than BABEL has') from None
            path = vectors / f'{sid}.npy'
            features = load_features(path if path.exists() else vectors / f'{file}.npy', SMPL)
            for k, (text, start, end) in enumerate(labels):
                with skipping(skipped):
                    text = text.strip() if isinstance(text, str) else ''
                    if text == 'transition' or not is_readable(text):
                        raise UserError('segment without a label, or a transition')
                    part = features
                    if start is not None and end is not None:
                        part = part_of(features, start, end, SMPL.fps, 'segment')
                    check_length(part, SMPL, 'segment')
                    yield f'{sid}-{k}', part, [dict(text=text, tokens=simple_tags(text))]
