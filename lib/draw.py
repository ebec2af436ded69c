"""Motions as pictures: a GIF, a strip of poses, and a grid of motions.

Left limbs are blue, right limbs are red, and the path of the root is yellow. Pictures are uint8
(height, width, 3).
"""
import shutil
import subprocess
import textwrap

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from lib.motion import SKELETONS, smooth

SKELETON_OF = {skeleton.n_joints: skeleton for skeleton in SKELETONS.values()}
SIDE_COLOURS = {'left': (38, 116, 190), 'right': (222, 82, 62), 'middle': (62, 66, 82)}
BACKGROUND = (250, 250, 248)
FLOOR = (229, 232, 237)
SHADOW = (196, 200, 208)
PATH = (240, 178, 60)
FADE_STEPS = 3     # shades between a colour and the background; more make larger files
FONT = 13          # pixels
LIMB = 0.055       # metres, the width of a limb
HEAD = 0.19
OUTLINE = 0.016    # how much wider than a limb its light outline is
TILE = 0.6
FLOOR_MARGIN = 2.0

# Parallel projection, seen from 32 degrees beside the Z axis and 16 degrees above the floor.
CAMERA = np.array([
    [0.848, 0.000, -0.530],   # to the right
    [-0.146, 0.961, -0.234],  # up
    [0.509, 0.276, 0.815],    # towards the viewer
])
FLOOR_CAMERA = CAMERA[:2, [0, 2]]  # the same for x and z of a point on the floor


def _rgb(colour, fade=0.0):
    """A colour in matplotlib's range of 0 to 1. fade (...): 0 leaves it, 1 is the background."""
    fade = np.asarray(fade)[..., None]
    return (colour + fade * np.subtract(BACKGROUND, colour)) / 255


def _blank_figure(width, height):
    """An empty figure, size in pixels. At 72 dots per inch, matplotlib's points are pixels."""
    figure = Figure((width / 72, height / 72), dpi=72, facecolor=_rgb(BACKGROUND))
    FigureCanvasAgg(figure)
    return figure


def _pixels(figure):
    figure.canvas.draw()
    return np.array(figure.canvas.buffer_rgba())[..., :3]


def _draw_floor(axes, path):
    """A checkerboard that fades with the distance from a path (T, 2) of x and z."""
    low = path.min(axis=0) - FLOOR_MARGIN
    high = path.max(axis=0) + FLOOR_MARGIN
    x = np.arange(low[0], high[0], TILE)
    z = np.arange(low[1], high[1], TILE)
    corners = np.stack(np.meshgrid(x, z), axis=-1)
    middles = corners[:-1, :-1, None] + TILE / 2
    distance = np.linalg.norm(middles - path, axis=-1).min(axis=-1)
    fade = np.minimum(distance / FLOOR_MARGIN, 1) ** 2
    fade[::2, ::2] = 1   # the light tiles
    fade[1::2, 1::2] = 1
    right, up = np.moveaxis(corners @ FLOOR_CAMERA.T, -1, 0)
    axes.pcolormesh(right, up, _rgb(FLOOR, fade))


def _render(joints, frames, size):
    """Yield pictures (h, w, 3) of a motion (T, J, 3) at some frames; the last pose is repeated for
    frames after the end. The camera follows the root."""
    skeleton = SKELETON_OF[joints.shape[1]]
    joints = joints / skeleton.units_per_metre

    # one bone from its parent to each joint, and one more for the head
    head = skeleton.names.index('head')
    neck = joints[:, head] - joints[:, skeleton.parents[head]]
    top = joints[:, head] + 0.3 * neck
    joints = np.append(joints, top[:, None], axis=1)
    parents = np.append(skeleton.parents, head)
    bones = np.stack([parents, np.arange(len(parents))], axis=1)

    # lines are drawn twice: a light outline below, which separates limbs that cross, and the limb
    n = len(bones)
    width = np.full(2 * n, LIMB)
    width[-1] = HEAD
    width[:n] = width[n:] + OUTLINE
    sides = [name.split('_')[0] for name in (*skeleton.names, 'top')]
    colours = [SIDE_COLOURS.get(side, SIDE_COLOURS['middle']) for side in sides]
    colours = _rgb([BACKGROUND] * n + colours)

    # project to the camera plane, in metres
    pose = joints @ CAMERA.T
    on_floor = joints[..., [0, 2]]
    shadows = on_floor @ FLOOR_CAMERA.T
    path = shadows[:, 0]
    height = max(1.2, joints[..., 1].max())
    centre = smooth(path, 4) + height / 2 * CAMERA[:2, 1]
    reach = np.abs(pose[..., :2] - centre[:, None]).max(axis=(0, 1))
    zoom = np.min(size / (2 * reach + 0.5))  # pixels per metre
    half_view = np.array(size) / zoom / 2

    figure = _blank_figure(*size)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    _draw_floor(axes, on_floor[:, 0])
    axes.plot(*path.T, color=_rgb(PATH, 0.6), linewidth=2.5)
    path_so_far, = axes.plot([], [], color=_rgb(PATH), linewidth=2.5)
    shadow_lines = axes.add_collection(LineCollection([], capstyle='round'))
    shadow_lines.set(linewidth=zoom * LIMB, color=_rgb(SHADOW))
    limb_lines = axes.add_collection(LineCollection([], capstyle='round'))

    for t in frames:
        t = min(t, len(pose) - 1)
        left, bottom = centre[t] - half_view
        right, top = centre[t] + half_view
        axes.set(xlim=(left, right), ylim=(bottom, top))
        path_so_far.set_data(*path[:t + 1].T)
        shadow_lines.set_segments(shadows[t, bones])

        # far limbs first; outlines are shorter than their bones, to leave the joints connected
        limbs = pose[t, bones]
        outlines = 0.6 * limbs + 0.4 * limbs.mean(axis=1, keepdims=True)
        nearness = limbs[..., 2].sum(axis=1)
        order = np.tile(nearness, 2).argsort(kind='stable')
        segments = np.concatenate([outlines, limbs])
        limb_lines.set_segments(segments[order, :, :2])
        limb_lines.set(linewidth=zoom * width[order], color=colours[order])
        yield _pixels(figure)


def _captions(texts, size):
    """Captions above a motion of this size -> {the text that plays, or None: picture (h, w, 3)}.

    The text that plays is dark, the others are grey. They take at most a quarter of the page: all
    of them if they fit, otherwise the one that plays, shortened.
    """
    columns = int((size[0] - 10) / (0.56 * FONT))
    most = max(1, int((size[1] / 3 - 12) / (1.4 * FONT)))
    pictures = {}
    for playing in (*texts, None):
        lines = [(line, text) for text in dict.fromkeys(texts)
                 for line in textwrap.wrap(text, columns)]
        if len(lines) > most:
            text = playing or texts[0]
            lines = [(line, text) for line in textwrap.wrap(text, columns, max_lines=most,
                                                            placeholder=' …')]
        height = round(1.4 * FONT * len(lines)) + 12
        figure = _blank_figure(size[0], height)
        for i, (line, text) in enumerate(lines):
            colour = _rgb(SIDE_COLOURS['middle'], 0 if text == playing else 0.5)
            figure.text(0.5, 1 - (8 + 1.4 * FONT * i) / height, line, color=colour, fontsize=FONT,
                        ha='center', va='top', parse_math=False)
        pictures[playing] = _pixels(figure)
    return pictures


def _palette():
    """All colours and their shades. GIF frames that share a palette do not flicker."""
    fades = np.arange(FADE_STEPS + 1) / FADE_STEPS
    colours = [*SIDE_COLOURS.values(), FLOOR, SHADOW, PATH]
    shades = np.ravel([_rgb(colour, fades) for colour in colours])
    palette = Image.new('P', (1, 1))
    palette.putpalette((255 * shades).round().astype(int).tolist())
    return palette


def draw_strip(joints, path, caption, n_poses=8, size=(150, 200)):
    """Poses of joints (T, J, 3) at n_poses equally spaced times, side by side, seconds below.

    Writes a PNG unless path is None. Returns its pixels (h, w, 3) uint8.
    """
    frames = np.linspace(0, len(joints) - 1, n_poses).round().astype(int)
    poses = np.hstack(list(_render(joints, frames, size)))
    times = [f'{t / SKELETON_OF[joints.shape[1]].fps:.1f} s' for t in frames]
    seconds = np.hstack([_captions([time], size)[time] for time in times])
    title = _captions([caption], (poses.shape[1], size[1]))[caption]
    pixels = np.vstack([title, poses, seconds])
    if path is not None:
        Image.fromarray(pixels).save(path)
    return pixels


def draw_gif(joints, path, caption, fps=None):
    """Animate joints (T, J, 3) below their caption, as in `draw_grid`. fps: of the GIF, by default
    the skeleton's."""
    fps = fps or SKELETON_OF[joints.shape[1]].fps
    draw_grid([(caption, joints)], path, 1, fps, size=(320, 340))


def draw_grid(motions, path, columns=3, fps=10, size=(210, 230)):
    """Animate [(caption, joints (T, J, 3))] side by side in one GIF of so many frames per second.
    Short motions hold their last pose.

    A caption is a text, or [(text, first, end)] for a motion of several parts or edited spans: the
    text is highlighted, and so is its line at the bottom, from frame `first` to before `end`.
    """
    longest = max(len(joints) for _, joints in motions)
    captions = [caption if isinstance(caption, list) else [(caption, 0, longest)]
                for caption, _ in motions]
    texts = [_captions([text for text, _, _ in spans], size) for spans in captions]
    text_height = max(len(picture) for pictures in texts for picture in pictures.values())
    columns = min(columns, len(motions))
    rows = -(-len(motions) // columns)
    page = np.empty((rows * (text_height + size[1]), columns * size[0], 3), np.uint8)
    cells = [cell for row in np.split(page, rows) for cell in np.split(row, columns, axis=1)]

    motion_fps = SKELETON_OF[motions[0][1].shape[1]].fps
    frames = np.arange(0, longest, motion_fps / fps).round().astype(int)
    width = size[0] / longest   # pixels per frame
    palette = _palette()
    images = []
    for t, *poses in zip(frames, *[_render(joints, frames, size) for _, joints in motions]):
        page[:] = BACKGROUND
        for cell, pose, spans, pictures in zip(cells, poses, captions, texts):
            cell[text_height:] = pose
            cell[-3:, :round((t + 1) * width)] = PATH
            playing = None
            for text, first, end in spans:
                now = first <= t < end
                playing = text if now else playing
                line = slice(round(first * width) + 1, round(end * width) - 1)
                cell[-6:-3, line] = SIDE_COLOURS['middle'] if now else SHADOW
            cell[:len(pictures[playing])] = pictures[playing]
        image = Image.fromarray(page)
        images.append(image.quantize(palette=palette, dither=Image.Dither.NONE))
    images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / fps),
                   loop=0, optimize=True)


def gif_to_mp4(path):
    """Convert x.gif to x.mp4 beside it. Returns False if ffmpeg is missing or fails."""
    if not shutil.which('ffmpeg'):
        return False
    even = 'crop=trunc(iw/2)*2:trunc(ih/2)*2'   # most players need an even width and height
    command = ['ffmpeg', '-y', '-i', path, '-vf', even, '-pix_fmt', 'yuv420p',
               path.removesuffix('.gif') + '.mp4']
    return not subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL).returncode
