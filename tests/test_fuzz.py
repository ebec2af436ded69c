"""Thousands of mutated inputs: every reader, and `configure`, either returns what it promises or
raises a UserError of one line that names the file.

Hypothesis generates the mutations, the same ones in every run. Of a failure it prints the smallest.
"""
import math
import os
import re
from collections import Counter

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

NASTY = [b'', b'\0', b'\xff', b'"', b'{', b'[', b'}', b'#', b'/', b'-1', b'0', b'1e400',
         b'-Infinity', b'NaN', b'null', b'true', b'[1]', b'99999999999999999999', b'\xc2\xb2',
         b'\\ud800', b'9' * 5000, b'JOINT', b'End', b'CHANNELS', b"'", b'(', b'<f8', b'|O',
         b'1e300', b'\n']
WORD = re.compile(rb'[\w.+-]+')
# what to do at a place (flip a bit, cut the rest off, replace the next word, replace so many bytes)
# and what to put there, -1 for a copy of what follows
EDIT = st.tuples(st.sampled_from(['flip', 'cut', 'word', 0, 0, 2, 20]), st.integers(0, 2**31),
                 st.sampled_from([*NASTY, -1]))


def mutate(content, edits):
    for kind, place, new in edits:
        at = place % max(len(content), 1)
        if new == -1:
            new = content[at:at + 1 + place // 7 % 40]
        if kind == 'flip':
            end = at + 1
            new = bytes(byte ^ 1 << place % 8 for byte in content[at:end])
        elif kind == 'cut':
            new, end = b'', len(content)
        elif kind == 'word':
            word = WORD.search(content, at)
            at, end = word.span() if word else (at, at)
        else:
            end = at + kind
        content = content[:at] + new + content[end:]
    return content


def fuzz(inputs, strategy):
    """A decorator: call the test with so many inputs. Its last argument is the input."""
    def decorate(test):
        chosen = settings(max_examples=inputs, derandomize=True, database=None, deadline=None,
                          suppress_health_check=list(HealthCheck))
        return chosen(given(strategy)(test))

    return decorate


def survive(path, inputs, read, check, said=None):
    """`sensible` for so many mutations of the file at `path`, which is what must be said."""
    whole = path.read_bytes()

    @fuzz(inputs, st.lists(EDIT, min_size=1, max_size=3))
    def run(edits):
        path.write_bytes(mutate(whole, edits))
        os.utime(path, (0, 0))   # a change of the bytes is all that there is to see
        sensible(said or path, read, check)

    run()


def sensible(said, read, check):
    """read() must raise a UserError of one line that contains `said`, or check(what it returns)
    must be true."""
    try:
        found = read()
    except UserError as error:
        assert '\n' not in str(error)
        assert str(said) in str(error)
    else:
        assert check(found)


# ------------------------------------------------------------------------------------ configurator

SETTINGS = {**settings_of('train_mask'), **settings_of('train_vq'), **settings_of('sample')}
CONFIG = b"steps = 10\ntext = 'clauses'\nspectral_attn = True\nlr = 2e-4   # comment\nwindow = 8\n"


def check_settings(found):
    for key, value in found.items():
        assert type(value) is type(SETTINGS[key])
        if type(value) in (int, float):
            low, high = LIMITS.get(key, (-math.inf, math.inf))
            assert low <= value <= high and math.isfinite(value)
    return True


@fuzz(1200, st.tuples(
    st.sampled_from([*SETTINGS, 'no_such', '']),
    st.one_of(st.text(max_size=20), st.integers().map(str), st.floats().map(str),
              st.sampled_from(NASTY).map(lambda x: x.decode('utf-8', 'surrogateescape')))))
def test_overrides(override):
    key, value = override
    sensible(f'--{key}', lambda: configure(dict(SETTINGS), [f'--{key}={value}']), check_settings)


def test_config_files(tmp_path):
    path = tmp_path / 'my.py'
    path.write_bytes(CONFIG)
    survive(path, 400, lambda: configure(dict(SETTINGS), [str(path)]), check_settings)


# ------------------------------------------------------------------------------------- input files


def test_bvh(tmp_path):
    path = tmp_path / 'x.bvh'
    path.write_text(HEAD + '\n'.join(ROWS))

    def check(found):
        names, parents, offsets, channels, frames, fps = found
        joints = bvh_to_joints(parents, offsets, channels, frames)
        assert joints.shape == (len(frames), len(names), 3)
        return np.isfinite(joints).all() and 1 <= fps <= 2000

    survive(path, 1200, lambda: read_bvh(path), check)


def test_features(tmp_path):
    path = tmp_path / 'a.npy'
    np.save(path, noise(3).astype(np.float32))
    survive(path, 800, lambda: humanml.load_features(path, SKELETONS['smpl22']),
            lambda found: found.shape[1:] == (263,) and np.isfinite(found).all(),
            said=' ')   # frequent reasons are counted, and name no file


TEXT = b"""a person walks.#a/DET person/NOUN walk/VERB#0.0#0.0
a man turns left, then kicks#a/DET man/NOUN turn/VERB left/ADV then/ADV kick/VERB#1.5#4.0
waves#wave/VERB#nan#nan
"""


def test_captions_of_humanml3d(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_bytes(TEXT)
    skipped = Counter()

    def check(found):
        for caption, start, end in found:
            assert caption['text']
            assert all('/' in word for word in caption['tokens'].split())
            if start or end:
                with humanml.skipping(skipped):
                    part = humanml.part_of(np.arange(100), start, end, 20, 'sub-clip')
                    assert not len(part) or part[0] == int(start * 20)
        return True

    survive(path, 1200, lambda: humanml.read_captions(path, skipped), check)
    assert len(skipped) <= 3   # reasons are counted, so they are few


BABEL = b"""{"1": {"babel_sid": 1, "feat_p": "CMU/a/walk_poses.npz", "seq_ann": null, "frame_ann":
{"labels": [{"proc_label": "turn left", "start_t": 0.0, "end_t": 3.0}, {"raw_label": "walk",
"start_t": 3, "end_t": 14.5}]}}, "2": {"babel_sid": 1, "seq_ann": {"labels": [{"proc_label":
"jog"}]}}}"""


def test_babel(tmp_path):
    os.makedirs(tmp_path / 'new_joint_vecs')
    np.save(tmp_path / 'new_joint_vecs' / '1.npy', noise(190))
    path = tmp_path / 'train.json'
    path.write_bytes(BABEL)

    def check(entries):
        clips = list(humanml.babel_clips(tmp_path, entries, 'x', Counter()))
        return all(40 <= len(part) < 200 and caption['text'].strip()
                   for _, part, (caption,) in clips)

    survive(path, 600, lambda: humanml.babel_entries(path), check)


def test_official_options(tmp_path):
    path = tmp_path / 't2m' / 'x' / 'opt.txt'
    path.parent.mkdir(parents=True)
    path.write_bytes(b'batch_size: 64\nn_heads: 6\nname: t2m\nvq_name: rvq_nq6\nlr: 0.0002\n')
    survive(path, 400, lambda: momask.read_opt(tmp_path, 't2m', 'x'),
            lambda opt: int(opt['n_heads']) > 0 and opt['vq_name'])


# -------------------------------------------- files of our own, where any damage has to be noticed


def survive_unchanged(path, inputs, read, said=None):
    """Also, what is read (arrays, or lists of anything) must be what it was before."""
    right = read()
    survive(path, inputs, read, lambda found: all(map(np.array_equal, found, right)), said)


@pytest.mark.parametrize('file, inputs', [
    ('meta.json', 600), ('train_captions.json', 200), ('train_clips.npz', 200), ('mean.npy', 100),
    ('std.npy', 100), ('train_motion.npy', 100)])
def test_data_sets(tmp_path, file, inputs):
    folder = tmp_path / 'toy'
    packed(folder)

    def read():
        split = data.load_split(folder, 'train')
        return split.features, split.start, split.captions, *data.load_meta(folder)[1:]

    survive_unchanged(folder / file, inputs, read, folder)


def test_archives(tmp_path):
    path = tmp_path / 'a.tar'
    archive_of(path, [(CLIP.format(i), bytes(range(48, 58)) * 40) for i in range(4)])
    survive_unchanged(path, 300, lambda: [list(bandai.bandai_files(path))])


def test_cached_tokens(tmp_path):
    split = packed(tmp_path)
    path = tmp_path / 'ids.npz'
    survive_unchanged(path, 500, lambda: data.cached_tokens(FrameNumbers(), split, path))


def test_cached_text(tmp_path):
    path = tmp_path / 'text_clip.npz'
    survive_unchanged(path, 500, lambda: text.caption_vectors(
        ['a', 'b'], 'clip', cache=str(tmp_path),
        tower=lambda device: lambda new: torch.ones(len(new), 512)))


def test_checkpoints(tmp_path, vq_file):   # noqa: F811
    path = tmp_path / 'vq.pt'
    path.write_bytes(vq_file.read_bytes())
    survive_unchanged(path, 800, lambda: load_tokenizer(path).state_dict().values())
