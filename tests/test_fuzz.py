"""Over ten thousand mutated inputs: every reader, and `configure`, either gives an answer that is
what it promises or a UserError of one line that names the file.

Hypothesis draws the mutations, always the same ones; of a failure it prints the smallest.
"""
import collections
import io
import os
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_bvh import HEAD, ROWS
from test_damage import CLIP, archive_of, settings_of, vq_file   # noqa: F401
from test_data import FrameNumbers, noise, packed

import momask
from lib import bandai, data, humanml, text
from lib.bvh import bvh_to_joints, read_bvh
from lib.configurator import LIMITS, UserError, configure
from lib.motion import SKELETONS
from vq import load_tokenizer

SMPL = SKELETONS['smpl22']
NASTY = [b'', b'\0', b'\xff', b'"', b'{', b'[', b'}', b'#', b'/', b'-1', b'0', b'1e400',
         b'-Infinity', b'NaN', b'null', b'true', b'[1]', b'99999999999999999999', b'\xc2\xb2',
         b'\\ud800', b'9' * 5000, b'JOINT', b'End', b'CHANNELS', b"'", b'(', b'<f8', b'|O', b'1e300', b'\n']
WORD = re.compile(rb'[\w.+-]+')


def mutations():
    """Lists of one to three edits: kind, place, what is put there."""
    edit = st.tuples(st.sampled_from(['flip', 'cut', 'drop', 'put', 'over', 'number', 'copy']),
                     st.integers(0, 2**31), st.sampled_from(NASTY))
    return st.lists(edit, min_size=1, max_size=3)


def mutate(content, edits):
    """Bytes -> bytes. `number` puts something else in the place of one of its numbers or words."""
    for kind, place, nasty in edits:
        at = place % max(len(content), 1)
        run = 1 + place // 7 % 40
        if kind == 'flip' and content:
            flipped = bytes([content[at] ^ 1 << place % 8])
            content = content[:at] + flipped + content[at + 1:]
        elif kind == 'cut':
            content = content[:at]
        elif kind == 'drop':
            content = content[:at] + content[at + run:]
        elif kind == 'put':
            content = content[:at] + nasty + content[at:]
        elif kind == 'over':
            content = content[:at] + nasty + content[at + len(nasty):]
        elif kind == 'copy':
            content = content[:at] + content[at:at + run] + content[at:]
        else:
            word = WORD.search(content, at)
            if word:
                content = content[:word.start()] + nasty + content[word.end():]
    return content


def fuzz(inputs, strategy=None):
    """A test of so many inputs, the same at every run; the last argument is what is drawn."""
    def decorate(test):
        chosen = settings(max_examples=inputs, derandomize=True, database=None, deadline=None,
                          suppress_health_check=list(HealthCheck))
        return chosen(given(strategy or mutations())(test))

    return decorate


def answer(words, work):
    """work(), or None where it ends in one line that holds the words."""
    try:
        return work()
    except UserError as error:
        said = str(error)
        assert '\n' not in said
        assert str(words) in said, said
        return None


# ------------------------------------------------------------------------------------ configurator

SETTINGS = {**settings_of('train_mask'), **settings_of('train_vq'), **settings_of('sample')}


def in_range(found):
    for key, value in found.items():
        assert type(value) is type(SETTINGS[key])
        if type(value) in (int, float):
            low, high = LIMITS.get(key, (-1e400, 1e400))
            assert low <= value <= high and abs(value) < float('inf')


@fuzz(1200, st.tuples(
    st.sampled_from([*SETTINGS, 'no_such', '']),
    st.one_of(st.text(max_size=20), st.integers().map(str), st.floats().map(str),
              st.sampled_from(NASTY).map(lambda x: x.decode('utf-8', 'surrogateescape')))))
def test_overrides(drawn):
    key, value = drawn
    found = answer(f'--{key}', lambda: configure(dict(SETTINGS), [f'--{key}={value}']))
    in_range(found or {})


CONFIG = b"""# a comment
steps = 10
cond_scale = 4.0
text = 'clauses'
spectral_attn = True
lr = 2e-4   # another
window = 8
"""


@fuzz(400)
def test_config_files(tmp_path, edits):
    path = tmp_path / 'my.py'
    path.write_bytes(mutate(CONFIG, edits))
    in_range(answer(path, lambda: configure(dict(SETTINGS), [str(path)])) or {})


# --------------------------------------------------------------------------------- what comes in

BVH = (HEAD + '\n'.join(ROWS)).encode()


@fuzz(1200)
def test_bvh(edits):
    found = answer('x.bvh', lambda: read_bvh(('x.bvh', mutate(BVH, edits))))
    if found:
        names, parents, offsets, channels, frames, fps = found
        joints = bvh_to_joints(parents, offsets, channels, frames)
        assert joints.shape == (len(frames), len(names), 3)
        assert np.isfinite(joints).all()
        assert 1 <= fps <= 2000


def test_archives(tmp_path):
    members = [(CLIP.format(i), bytes(range(48, 58)) * 40) for i in range(4)]
    path = tmp_path / 'a.tar'
    archive_of(path, members)
    whole = path.read_bytes()

    @fuzz(300)
    def run(edits):
        path.write_bytes(mutate(whole, edits))
        found = answer(path, lambda: list(bandai.bandai_files(path)))
        assert found is None or found == members

    run()


FEATURES = io.BytesIO()
np.save(FEATURES, noise(3).astype(np.float32))


@fuzz(800)
def test_features(tmp_path, edits):
    path = tmp_path / 'a.npy'
    path.write_bytes(mutate(FEATURES.getvalue(), edits))
    try:
        found = humanml.load_features(path, SMPL)
    except UserError as error:   # a reason that is counted names no file where it is common
        assert str(path) in str(error) or 'features' in str(error)
    else:
        assert found.shape[1:] == (263,)
        assert np.isfinite(found).all()


TEXT = b"""a person walks.#a/DET person/NOUN walk/VERB#0.0#0.0
a man turns left, then kicks#a/DET man/NOUN turn/VERB left/ADV then/ADV kick/VERB#1.5#4.0
waves#wave/VERB#nan#nan
"""


@fuzz(1200)
def test_captions_of_the_field(tmp_path, edits):
    path = tmp_path / 'a.txt'
    path.write_bytes(mutate(TEXT, edits))
    features = np.arange(100)
    skipped = collections.Counter()
    for caption, start, end in humanml.read_captions(path, skipped):
        assert caption['text'] and all('/' in word for word in caption['tokens'].split())
        if start or end:
            with humanml.skipping(skipped):
                part = humanml.part_of(features, start, end, 20, 'sub-clip')
                assert not len(part) or part[0] == int(start * 20)
    assert sum(skipped.values()) <= 20


BABEL = b"""{"1": {"babel_sid": 1, "feat_p": "CMU/a/walk_poses.npz", "seq_ann": null, "frame_ann":
{"labels": [{"proc_label": "turn left", "start_t": 0.0, "end_t": 3.0}, {"raw_label": "walk",
"start_t": 3, "end_t": 14.5}]}}, "2": {"babel_sid": 1, "seq_ann": {"labels": [{"proc_label":
"jog"}]}}}"""


@fuzz(600)
def test_babel(tmp_path, edits):
    os.makedirs(tmp_path / 'new_joint_vecs', exist_ok=True)
    features = tmp_path / 'new_joint_vecs' / '1.npy'
    if not features.exists():
        np.save(features, noise(190))
    path = tmp_path / 'train.json'
    path.write_bytes(mutate(BABEL, edits))
    entries = answer(path, lambda: humanml.babel_entries(path))
    skipped = collections.Counter()
    for _, part, (caption,) in humanml.babel_clips(tmp_path, entries or {}, 'x', skipped):
        assert 40 <= len(part) < 200
        assert caption['text'].strip()


OPTIONS = b'batch_size: 64\nn_heads: 6\nname: t2m\nvq_name: rvq_nq6\nlr: 0.0002\n'


@fuzz(400)
def test_official_options(tmp_path, edits):
    os.makedirs(tmp_path / 't2m' / 'x', exist_ok=True)
    path = tmp_path / 't2m' / 'x' / 'opt.txt'
    path.write_bytes(mutate(OPTIONS, edits))
    opt = answer(path, lambda: momask.read_opt(tmp_path, 't2m', 'x'))
    assert opt is None or int(opt['n_heads']) > 0 and opt['vq_name']


# -------------------------------------------------------------------------------- the packed format


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A packed set, and the bytes of its files."""
    folder = tmp_path_factory.mktemp('packed') / 'toy'
    packed(folder)
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


def open_damaged(whole, file, edits):
    """The set with one file mutated: a split that keeps its promises, or a sentence."""
    folder, content = whole
    (folder / file).write_bytes(mutate(content[file], edits))
    try:
        split = answer(folder, lambda: data.load_split(folder, 'train'))
    finally:
        (folder / file).write_bytes(content[file])
    if split is None:
        return
    assert split.features.dtype == np.float32 and split.features.shape == (111, 263)
    assert sum(len(split.clip(i)) for i in range(len(split))) == 111
    assert sum(split.n_captions) == len(split.captions)
    for i, caption in enumerate(split.captions):
        first = split.first_caption[caption['clip']]
        assert first <= i < first + split.n_captions[caption['clip']]
        assert isinstance(caption['text'].encode(), bytes)


@fuzz(600)
def test_meta(whole, edits):
    open_damaged(whole, 'meta.json', edits)


@fuzz(600)
def test_caption_file(whole, edits):
    open_damaged(whole, 'train_captions.json', edits)


@fuzz(500)
def test_clips(whole, edits):
    open_damaged(whole, 'train_clips.npz', edits)


@fuzz(200)
def test_mean(whole, edits):
    open_damaged(whole, 'mean.npy', edits)


@fuzz(200)
def test_std(whole, edits):
    open_damaged(whole, 'std.npy', edits)


@fuzz(200)
def test_motion(whole, edits):
    open_damaged(whole, 'train_motion.npy', edits)


# --------------------------------------------------------------------------- caches and checkpoints


def test_cached_tokens(tmp_path):
    split = packed(tmp_path)
    path = tmp_path / 'ids.npz'
    right = data.cached_tokens(FrameNumbers(), split, path)
    whole = path.read_bytes()

    @fuzz(500)
    def run(edits):
        path.write_bytes(mutate(whole, edits))
        ids = answer(path, lambda: data.cached_tokens(FrameNumbers(), split, path))
        if ids is not None:
            assert ids.shape == right.shape and ids.dtype == np.int16
            assert 0 <= ids.min() and ids.max() < 200

    run()


def test_cached_text(tmp_path):
    def tower(device):
        return lambda captions: torch.ones(len(captions), 512)

    def condition():
        return text.caption_vectors(['a', 'b'], 'clip', cache=str(tmp_path), tower=tower)

    condition()
    path = tmp_path / 'text_clip.npz'
    whole = path.read_bytes()

    @fuzz(500)
    def run(edits):
        path.write_bytes(mutate(whole, edits))
        found = answer(path, condition)
        assert found is None or (found[0] == 1).all()

    run()


def test_checkpoints(tmp_path, vq_file):   # noqa: F811
    right = load_tokenizer(vq_file).state_dict()
    whole = vq_file.read_bytes()
    path = tmp_path / 'vq.pt'

    @fuzz(800)
    def run(edits):
        path.write_bytes(mutate(whole, edits))
        model = answer(path, lambda: load_tokenizer(path))
        if model:
            weights = model.state_dict()
            assert all(torch.equal(weights[name], right[name]) for name in right)

    run()
