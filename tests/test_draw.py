"""draw.py: pictures have the expected frames, colours and depth order."""
import numpy as np
import pytest
from PIL import Image, ImageSequence
from test_motion import KIT, SMPL, body

from lib import draw, explain

DARK = draw.SIDE_COLOURS['middle']


def colours_of(picture):
    return {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()}


def frames_of(path):
    """A GIF -> its pictures (frames, h, w, 3), milliseconds per frame."""
    with Image.open(path) as gif:
        frames = [np.array(frame.convert('RGB')) for frame in ImageSequence.Iterator(gif)]
        return np.stack(frames), gif.info['duration']


@pytest.mark.parametrize('joints, caption, milliseconds', [
    (body(30), 'a person with a rather long caption ' * 3, 50),
    (np.repeat(body(1, KIT) * 1000, 12, 0), r'pays $\x or $6', 80)])   # equal frames, no formula
def test_gif_has_one_frame_per_pose(tmp_path, joints, caption, milliseconds):
    draw.draw_gif(joints, tmp_path / 'a.gif', caption)
    frames, duration = frames_of(tmp_path / 'a.gif')
    assert (len(frames), duration) == (len(joints), milliseconds)


@pytest.mark.parametrize('skeleton', [SMPL, KIT])
def test_strip_of_any_skeleton(tmp_path, skeleton):
    path = tmp_path / 'strip.png'
    joints = body(40, skeleton) * skeleton.units_per_metre
    strip = draw.draw_strip(joints, path, 'walks', n_poses=5, size=(100, 150))
    assert strip.shape[1] == 500
    assert set(draw.SIDE_COLOURS.values()) <= colours_of(strip)
    assert np.array_equal(Image.open(path), strip)


@pytest.mark.parametrize('metres, near, far', [(0.3, 'left', 'right'), (-0.3, 'right', 'left')])
def test_near_limbs_hide_far_ones(metres, near, far):
    left = [j for j, name in enumerate(SMPL.names) if name.startswith('left_')]
    joints = body(1)
    joints[:, left] = joints[:, SMPL.swap[left]] + metres * draw.CAMERA[2]
    colours = colours_of(draw.draw_strip(joints, None, '', n_poses=1))
    assert draw.SIDE_COLOURS[near] in colours
    assert draw.SIDE_COLOURS[far] not in colours


def test_grid_holds_the_last_pose_of_a_short_motion(tmp_path):
    motions = [('walks', body(40)), ('runs', body(30, seed=1)), ('waves', body(20, seed=2))]
    draw.draw_grid(motions, tmp_path / 'grid.gif', columns=2, size=(100, 120))
    frames, _ = frames_of(tmp_path / 'grid.gif')
    n, height, width, _ = frames.shape
    assert (n, width) == (20, 200)   # 2 s at 10 fps
    row = height // 2   # where 'waves' begins, below 'walks'; the last 3 rows show progress
    halfway, last = frames[[10, 19], :, :100]
    assert np.array_equal(halfway[row:-3], last[row:-3])
    assert not np.array_equal(halfway[:row], last[:row])


def test_invalid_joints_leave_no_file(tmp_path):
    with pytest.raises(ValueError):
        draw.draw_gif(np.full((5, 22, 3), np.nan), tmp_path / 'b.gif', 'nothing')
    assert not list(tmp_path.iterdir())


def test_the_part_that_plays_is_highlighted_and_an_edit_is_marked(tmp_path):
    draw.draw_gif(body(40), tmp_path / 'a.gif', [('walks', 0, 20), ('jumps', 20, 40)])
    frames, _ = frames_of(tmp_path / 'a.gif')
    for t, bright, grey in ((5, 0, 1), (30, 1, 0)):
        lines = frames[t, 8:26], frames[t, 26:44]
        assert DARK in colours_of(lines[bright])
        assert DARK not in colours_of(lines[grey])
        halves = frames[t, -5, 5:155], frames[t, -5, 165:315]   # the spans
        assert (halves[bright] == DARK).all()
        assert (halves[grey] == draw.SHADOW).all()


@pytest.mark.parametrize('caption', ['walks and turns ' * 40, [('walks ' * 40, 0, 30)] * 9])
def test_captions_take_at_most_a_quarter(tmp_path, caption):
    draw.draw_gif(body(3), tmp_path / 'a.gif', caption)
    assert 340 < frames_of(tmp_path / 'a.gif')[0].shape[1] <= 340 * 4 / 3


@pytest.mark.parametrize('n, width', [(1, 1210), (6, 2244)])
def test_msd_figure(tmp_path, n, width):
    rng = np.random.default_rng(0)
    clip = ('clip: "walks"', body(40), rng.random((10, 8)), rng.random(10))
    explain.draw_clips(tmp_path / 'msd.png', [clip] * n, 20)
    assert Image.open(tmp_path / 'msd.png').size == (width, 572)


def test_mp4_needs_a_working_ffmpeg(tmp_path, monkeypatch):
    path = str(tmp_path / 'a.gif')
    draw.draw_gif(body(3), path, 'stands')
    monkeypatch.setenv('PATH', str(tmp_path))
    assert not draw.gif_to_mp4(path)   # ffmpeg is missing
    ffmpeg = tmp_path / 'ffmpeg'
    ffmpeg.touch(0o755)
    ffmpeg.write_text('#!/bin/sh\nfor last; do :; done\necho "$@" > "$last"\n')
    assert draw.gif_to_mp4(path)
    assert path in (tmp_path / 'a.mp4').read_text()
    ffmpeg.write_text('#!/bin/sh\nexit 1\n')   # it has no encoder, for example
    assert not draw.gif_to_mp4(path)
