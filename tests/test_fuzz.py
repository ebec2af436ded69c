"""Thousands of mutated inputs: every reader, and `configure`, either returns what it promises or
raises a UserError of one line that names the file.

Hypothesis generates the mutations, the same ones in every run. Of a failure it prints the smallest.
"""
import collections
import math
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
         b'\\ud800', b'9' * 5000, b'JOINT', b'End', b'CHANNELS', b"'", b'(', b'<f8', b'|O',
         b'1e300', b'\n']
WORD = re.compile(rb'[\w.+-]+')


def mutations():
    """Lists of one to three edits (kind, place, what is inserted)."""
    edit = st.tuples(st.sampled_from(['flip', 'cut', 'drop', 'put', 'over', 'number', 'copy']),
                     st.integers(0, 2**31), st.sampled_from(NASTY))
    return st.lists(edit, min_size=1, max_size=3)


def mutate(content, edits):
    """Bytes -> bytes. 'number' replaces one of its numbers or words."""
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


def fuzz(inputs, strategy=mutations()):
    """A decorator: call the test with so many inputs. Its last argument is the input."""
    def decorate(test):
        chosen = settings(max_examples=inputs, derandomize=True, database=None, deadline=None,
                          suppress_health_check=list(HealthCheck))
        return chosen(given(strategy)(test))

    return decorate


def each_mutation(path, inputs):
    """A decorator: call the function, now, with so many mutations of the file at `path`."""
    whole = path.read_bytes()

    def call(check):
        @fuzz(inputs)
        def run(edits):
            path.write_bytes(mutate(whole, edits))
            check()

        run()

    return call


def answer(name, work):
    """work(), or None where it raises a UserError of one line that contains the name."""
    try:
        return work()
    except UserError as error:
        said = str(error)
        assert '\n' not in said
        assert str(name) in said, said
        return None


# ------------------------------------------------------------------------------------ configurator

SETTINGS = {**settings_of('train_mask'), **settings_of('train_vq'), **settings_of('sample')}
CONFIG = b"steps = 10\ntext = 'clauses'\nspectral_attn = True\nlr = 2e-4   # comment\nwindow = 8\n"


def check_settings(found):
    for key, value in found.items():
        assert type(value) is type(SETTINGS[key])
        if type(value) in (int, float):
            low, high = LIMITS.get(key, (-math.inf, math.inf))
            assert low <= value <= high and math.isfinite(value)


@fuzz(1200, st.tuples(
    st.sampled_from([*SETTINGS, 'no_such', '']),
    st.one_of(st.text(max_size=20), st.integers().map(str), st.floats().map(str),
              st.sampled_from(NASTY).map(lambda x: x.decode('utf-8', 'surrogateescape')))))
def test_overrides(override):
    key, value = override
    found = answer(f'--{key}', lambda: configure(dict(SETTINGS), [f'--{key}={value}']))
    check_settings(found or {})


def test_config_files(tmp_path):
    path = tmp_path / 'my.py'
    path.write_bytes(CONFIG)

    @each_mutation(path, 400)
    def check():
        check_settings(answer(path, lambda: configure(dict(SETTINGS), [str(path)])) or {})


# ------------------------------------------------------------------------------------- input files

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

    @each_mutation(path, 300)
    def check():
        found = answer(path, lambda: list(bandai.bandai_files(path)))
        assert found is None or found == members


def test_features(tmp_path):
    path = tmp_path / 'a.npy'
    np.save(path, noise(3).astype(np.float32))

    @each_mutation(path, 800)
    def check():
        # frequent reasons are counted, and name no file
        found = answer('', lambda: humanml.load_features(path, SMPL))
        if found is not None:
            assert found.shape[1:] == (263,)
            assert np.isfinite(found).all()


TEXT = b"""a person walks.#a/DET person/NOUN walk/VERB#0.0#0.0
a man turns left, then kicks#a/DET man/NOUN turn/VERB left/ADV then/ADV kick/VERB#1.5#4.0
waves#wave/VERB#nan#nan
"""


def test_captions_of_humanml3d(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_bytes(TEXT)
    features = np.arange(100)

    @each_mutation(path, 1200)
    def check():
        skipped = collections.Counter()
        for caption, start, end in humanml.read_captions(path, skipped):
            assert caption['text']
            assert all('/' in word for word in caption['tokens'].split())
            if start or end:
                with humanml.skipping(skipped):
                    part = humanml.part_of(features, start, end, 20, 'sub-clip')
                    assert not len(part) or part[0] == int(start * 20)
        assert sum(skipped.values()) <= 20


BABEL = b"""{"1": {"babel_sid": 1, "feat_p": "CMU/a/walk_poses.npz", "seq_ann": null, "frame_ann":
{"labels": [{"proc_label": "turn left", "start_t": 0.0, "end_t": 3.0}, {"raw_label": "walk",
"start_t": 3, "end_t": 14.5}]}}, "2": {"babel_sid": 1, "seq_ann": {"labels": [{"proc_label":
"jog"}]}}}"""


def test_babel(tmp_path):
    os.makedirs(tmp_path / 'new_joint_vecs')
    np.save(tmp_path / 'new_joint_vecs' / '1.npy', noise(190))
    path = tmp_path / 'train.json'
    path.write_bytes(BABEL)

    @each_mutation(path, 600)
    def check():
        entries = answer(path, lambda: humanml.babel_entries(path))
        skipped = collections.Counter()
        for _, part, (caption,) in humanml.babel_clips(tmp_path, entries or {}, 'x', skipped):
            assert 40 <= len(part) < 200
            assert caption['text'].strip()


def test_official_options(tmp_path):
    path = tmp_path / 't2m' / 'x' / 'opt.txt'
    os.makedirs(path.parent)
    path.write_bytes(b'batch_size: 64\nn_heads: 6\nname: t2m\nvq_name: rvq_nq6\nlr: 0.0002\n')

    @each_mutation(path, 400)
    def check():
        opt = answer(path, lambda: momask.read_opt(tmp_path, 't2m', 'x'))
        assert opt is None or int(opt['n_heads']) > 0 and opt['vq_name']


# ------------------------------------------------------------- data sets, caches, and checkpoints


@pytest.mark.parametrize('file, inputs', [
    ('meta.json', 600), ('train_captions.json', 200), ('train_clips.npz', 200), ('mean.npy', 100),
    ('train_motion.npy', 100)])
def test_data_sets(tmp_path, file, inputs):
    folder = tmp_path / 'toy'
    packed(folder)
    right = data.load_split(folder, 'train')

    @each_mutation(folder / file, inputs)
    def check():
        split = answer(folder, lambda: data.load_split(folder, 'train'))
        if split is not None:
            assert np.array_equal(split.features, right.features)
            assert np.array_equal(split.start, right.start)
            assert split.captions == right.captions


def test_cached_tokens(tmp_path):
    split = packed(tmp_path)
    path = tmp_path / 'ids.npz'
    right = data.cached_tokens(FrameNumbers(), split, path)

    @each_mutation(path, 500)
    def check():
        ids = answer(path, lambda: data.cached_tokens(FrameNumbers(), split, path))
        assert ids is None or np.array_equal(ids, right)


def test_cached_text(tmp_path):
    def vectors():
        return text.caption_vectors(['a', 'b'], 'clip', cache=str(tmp_path),
                                    tower=lambda device: lambda new: torch.ones(len(new), 512))

    vectors()
    path = tmp_path / 'text_clip.npz'

    @each_mutation(path, 500)
    def check():
        found = answer(path, vectors)
        assert found is None or (found[0] == 1).all()


def test_checkpoints(tmp_path, vq_file):   # noqa: F811
    right = load_tokenizer(vq_file).state_dict()
    path = tmp_path / 'vq.pt'
    path.write_bytes(vq_file.read_bytes())

    @each_mutation(path, 800)
    def check():
        model = answer(path, lambda: load_tokenizer(path))
        if model:
            weights = model.state_dict()
            assert all(torch.equal(weights[name], right[name]) for name in right)
