"""draw.py: pictures have the expected frames, colours and depth order."""
import os

import numpy as np
import pytest
from PIL import Image

from lib import draw, explain
from test_motion import KIT, SMPL, body


def colours_of(picture):
    return {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()}


def test_gif_has_one_frame_per_pose(tmp_path):
    path = str(tmp_path / 'a.gif')
    draw.draw_gif(body(30), path, 'a person with a rather long caption ' * 3)
    with Image.open(path) as gif:
        assert (gif.n_frames, gif.info['duration']) == (30, 50)
    draw.draw_gif(np.repeat(body(1, KIT) * 1000, 12, 0), path, r'pays $\x or $6')   # no formula
    with Image.open(path) as gif:  # equal frames are not merged
        assert (gif.n_frames, gif.info['duration']) == (12, 80)


@pytest.mark.parametrize('skeleton', [SMPL, KIT])
def test_strip_of_any_skeleton(tmp_path, skeleton):
    path = tmp_path / 'strip.png'
    joints = body(40, skeleton) * skeleton.units_per_metre
    strip = draw.draw_strip(joints, str(path), 'walks', n_poses=5, size=(100, 150))
    assert strip.dtype == np.uint8
    assert strip.shape[1:] == (500, 3)
    assert set(draw.SIDE_COLOURS.values()) <= colours_of(strip)
    with Image.open(path) as saved:
        assert np.array_equal(np.array(saved), strip)


@pytest.mark.parametrize('metres,near,far', [(0.3, 'left', 'right'), (-0.3, 'right', 'left')])
def test_near_limbs_hide_far_ones(metres, near, far):
    left = [j for j, name in enumerate(SMPL.names) if name.startswith('left_')]
    joints = body(1)
    joints[:, left] = joints[:, SMPL.swap[left]] + metres * draw.CAMERA[2]
    colours = colours_of(draw.draw_strip(joints, None, '', n_poses=1))
    assert draw.SIDE_COLOURS[near] in colours
    assert draw.SIDE_COLOURS[far] not in colours


def test_grid_holds_the_last_pose_of_a_short_motion(tmp_path):
    motions = [('walks', body(40)), ('runs', body(30, seed=1)), ('waves', body(20, seed=2))]
    draw.draw_grid(motions, str(tmp_path / 'grid.gif'), columns=2, size=(100, 120))
    with Image.open(tmp_path / 'grid.gif') as gif:
        assert gif.width == 200
        assert gif.n_frames == 20  # 2 s at 10 fps
        frames = []
        for t in (10, 19):
            gif.seek(t)
            frames.append(np.array(gif.convert('RGB'))[:, :100])
    halfway, last = frames
    row = len(last) // 2   # where 'waves' begins, below 'walks'; the last 3 rows show progress
    assert np.array_equal(halfway[row:-3], last[row:-3])
    assert not np.array_equal(halfway[:row], last[:row])


def test_invalid_joints_leave_no_file(tmp_path):
    path = str(tmp_path / 'b.gif')
    with pytest.raises(ValueError):
        draw.draw_gif(np.full((5, 22, 3), np.nan), path, 'nothing')
    assert not os.path.exists(path)


def test_the_part_that_plays_is_highlighted_and_an_edit_is_marked(tmp_path):
    path = tmp_path / 'a.gif'
    draw.draw_gif(body(40), str(path), [('walks', 0, 20), ('jumps', 20, 40)])
    dark = draw.SIDE_COLOURS['middle']
    with Image.open(path) as gif:
        for t, bright, grey in ((5, 0, 1), (30, 1, 0)):
            gif.seek(t)
            pixels = np.array(gif.convert('RGB'))
            lines = pixels[8:26], pixels[26:44]
            assert dark in colours_of(lines[bright]) and dark not in colours_of(lines[grey])
            halves = pixels[-5, 5:155], pixels[-5, 165:315]   # the spans
            assert (halves[bright] == dark).all() and (halves[grey] == draw.SHADOW).all()


@pytest.mark.parametrize('caption', ['walks and turns ' * 40, [('walks ' * 40, 0, 30)] * 9])
def test_captions_take_at_most_a_quarter(tmp_path, caption):
    draw.draw_gif(body(3), str(tmp_path / 'a.gif'), caption)
    with Image.open(tmp_path / 'a.gif') as gif:
        assert 340 < gif.height <= 340 * 4 / 3


def test_msd_figure(tmp_path):
    path = tmp_path / 'msd.png'
    rng = np.random.default_rng(0)
    clip = ('clip: "walks"', body(40), rng.random((10, 8)), rng.random(10))
    explain.draw_clips(str(path), [clip], 20)
    with Image.open(path) as figure:
        assert figure.size == (1210, 572)
    explain.draw_clips(str(path), [clip] * 6, 20)
    with Image.open(path) as figure:
        assert figure.size[0] > 2000


def test_mp4_needs_a_working_ffmpeg(tmp_path, monkeypatch):
    path = str(tmp_path / 'a.gif')
    draw.draw_gif(body(3), path, 'stands')
    monkeypatch.setenv('PATH', str(tmp_path))
    assert not draw.gif_to_mp4(path)   # ffmpeg is missing
    ffmpeg = tmp_path / 'ffmpeg'
    ffmpeg.write_text('#!/bin/sh\nfor last; do :; done\necho "$@" > "$last"\n')
    ffmpeg.chmod(0o755)
    assert draw.gif_to_mp4(path)
    assert path in (tmp_path / 'a.mp4').read_text()
    ffmpeg.write_text('#!/bin/sh\nexit 1\n')   # it has no encoder, for example
    assert not draw.gif_to_mp4(path)
