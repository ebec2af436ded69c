"""draw.py: the pictures have the frames, colours and order of depth that they should."""
import os

import numpy as np
import pytest
from PIL import Image

from lib import draw
from test_motion import KIT, SMPL, body


def colours_of(picture):
    return {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()}


def test_gif_has_one_frame_per_pose(tmp_path):
    path = str(tmp_path / 'a.gif')
    draw.draw_gif(body(30), path, 'a person with a rather long caption ' * 3)
    with Image.open(path) as gif:
        assert gif.n_frames == 30
        assert gif.info['duration'] == 50
    draw.draw_gif(np.repeat(body(1, KIT) * 1000, 12, 0), path, 'pays $5 or $6')
    with Image.open(path) as gif:  # equal frames are not merged
        assert gif.n_frames == 12
        assert gif.info['duration'] == 80


def test_strip(tmp_path):
    path = tmp_path / 'strip.png'
    strip = draw.draw_strip(body(40), str(path), 'walks', n_poses=5, size=(100, 150))
    assert strip.dtype == np.uint8
    assert strip.shape[1:] == (500, 3)
    assert set(draw.SIDE_COLOURS.values()) <= colours_of(strip)
    with Image.open(path) as saved:
        assert np.array_equal(np.array(saved), strip)


def test_near_limbs_hide_far_ones():
    left = [j for j, name in enumerate(SMPL.names) if name.startswith('left_')]
    for metres, seen, hidden in ((0.3, 'left', 'right'), (-0.3, 'right', 'left')):
        joints = body(1)
        joints[:, left] = joints[:, SMPL.swap[left]] + metres * draw.CAMERA[2]
        colours = colours_of(draw.draw_strip(joints, None, '', n_poses=1))
        assert draw.SIDE_COLOURS[seen] in colours
        assert draw.SIDE_COLOURS[hidden] not in colours


def test_grid(tmp_path):
    motions = [('walks', body(40)), ('runs', body(30, seed=1)), ('waves', body(20, seed=2))]
    draw.draw_grid(motions, str(tmp_path / 'grid.gif'), columns=2, size=(100, 120))
    with Image.open(tmp_path / 'grid.gif') as gif:
        assert gif.width == 200
        assert gif.n_frames == 20  # 2 s at 10 fps
        gif.seek(10)
        held = np.array(gif.convert('RGB'))
        gif.seek(19)
        last = np.array(gif.convert('RGB'))
    lower = held.shape[0] // 2
    assert np.array_equal(held[lower:-3, :100], last[lower:-3, :100])  # 'waves' is over
    assert not np.array_equal(held[:lower, :100], last[:lower, :100])


def test_what_cannot_be_drawn_leaves_no_file(tmp_path):
    path = str(tmp_path / 'b.gif')
    for joints in (np.full((5, 22, 3), np.nan), np.zeros((5, 7, 3))):
        with pytest.raises(ValueError, match='cannot draw'):
            draw.draw_gif(joints, path, 'nothing')
    assert not os.path.exists(path)


def test_msd_figure(tmp_path):
    path = tmp_path / 'msd.png'
    rng = np.random.default_rng(0)
    draw.draw_msd(str(path), 'clip: "walks"', body(40), rng.random((10, 8)), rng.random(10), 20)
    with Image.open(path) as figure:
        assert figure.size == (1210, 572)


def test_mp4_where_there_is_ffmpeg(tmp_path, monkeypatch):
    path = str(tmp_path / 'a.gif')
    draw.draw_gif(body(3), path, 'stands')
    monkeypatch.setenv('PATH', str(tmp_path))
    assert not draw.gif_to_mp4(path)
    stand_in = tmp_path / 'ffmpeg'
    stand_in.write_text('#!/bin/sh\nfor last; do :; done\necho "$@" > "$last"\n')
    stand_in.chmod(0o755)
    assert draw.gif_to_mp4(path)
    assert path in (tmp_path / 'a.mp4').read_text()
    stand_in.write_text('#!/bin/sh\nexit 1\n')   # one without the codec
    assert not draw.gif_to_mp4(path)
