"""Motions as pictures: a GIF, a strip of poses, several motions side by side, the MSD of a clip.

Left limbs are blue, right ones red, the way of the root is yellow. Figures have 72 dots per inch,
so that matplotlib's points are pixels.
"""
import textwrap

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from PIL import Image

from motion import SKELETONS, smooth

SIDE_COLOURS = {'left': (38, 116, 190), 'right': (222, 82, 62), 'middle': (62, 66, 82)}
BACKGROUND, FLOOR, SHADOW = (250, 250, 248), (229, 232, 237), (196, 200, 208)
PATH, PATH_AHEAD, INK = (240, 178, 60), (246, 221, 173), (40, 42, 54)
FADES = 3  # steps from a colour to the background; more make smoother edges and larger files

# metres
LIMB, HEAD = 0.055, 0.2  # thickness
RIM = 0.016              # how much wider than a limb the light line below it is
TILE = 0.6
FLOOR_REACH = 2.0        # around the path
MARGIN = 0.5             # what a picture shows beyond the body

# the view is parallel, from 32 degrees beside the Z axis and 16 degrees above the floor
CAMERA = np.array([
    [0.848, 0.000, -0.530],   # to the right
    [-0.146, 0.961, -0.234],  # up
    [0.509, 0.276, 0.815],    # towards the viewer
])
FLOOR_CAMERA = CAMERA[:2, [0, 2]]  # the same for x and z of a place on the floor


def _rgb(colour, fade=0.0):
    """A colour as matplotlib's fractions of 1; fade (...) of 0 to 1 goes to the background."""
    fade = np.asarray(fade)[..., None]
    return ((1 - fade) * np.array(colour) + fade * np.array(BACKGROUND)) / 255


def _skeleton(joints):
    for skeleton in SKELETONS.values():
        if joints.shape[1:] == (skeleton.n_joints, 3) and np.isfinite(joints).all():
            return skeleton
    raise ValueError(f'cannot draw joints of shape {joints.shape}: '
                     'expected finite (T, 22 or 21, 3)')


def _floor(path):
    """A checkerboard along a path (T, 2) of x and z: its dark tiles (n, 4, 2), colours (n, 3)."""
    reach = int(np.ceil(FLOOR_REACH / TILE))
    around = np.mgrid[-reach:reach + 1, -reach:reach + 1].reshape(2, -1).T
    visited = np.unique(path // TILE, axis=0)
    cells = np.unique((visited[:, None] + around).reshape(-1, 2), axis=0)
    cells = cells[cells.sum(axis=1) % 2 == 0]
    tiles = TILE * (cells[:, None] + [(0, 0), (1, 0), (1, 1), (0, 1)])
    away = np.linalg.norm(tiles.mean(axis=1)[:, None] - path, axis=-1).min(axis=1)
    fade = np.round((away / FLOOR_REACH) ** 2 * FADES) / FADES
    return tiles[fade < 1], _rgb(FLOOR, fade[fade < 1])


class _Scene:
    """One motion (T, J, 3) in axes of size pixels; the camera follows the root."""

    def __init__(self, axes, joints, size):
        joints = np.asarray(joints, dtype=np.float64)
        skeleton = _skeleton(joints)
        joints = joints / skeleton.units_per_metre

        # a bone leads to each joint from its parent; two more lead up and through the head
        head = skeleton.names.index('head')
        neck_to_head = joints[:, head] - joints[:, skeleton.parents[head]]
        skull = joints[:, head, None] + neck_to_head[:, None] * [[0.25], [0.35]]
        joints = np.concatenate([joints, skull], axis=1)
        self.parents = np.append(skeleton.parents[1:], [head, skeleton.n_joints])
        self.thickness = np.append(np.full(skeleton.n_joints, LIMB), HEAD)
        sides = [name.split('_')[0] for name in skeleton.names[1:]] + ['middle', 'middle']
        self.colours = np.array([SIDE_COLOURS.get(s, SIDE_COLOURS['middle']) for s in sides]) / 255

        # what the camera sees, in metres
        self.pose = joints @ CAMERA.T
        below = joints[..., [0, 2]]  # on the floor
        self.shade = below @ FLOOR_CAMERA.T
        self.path = self.shade[:, 0]
        tallest = max(1.2, joints[..., 1].max())
        self.centre = smooth(self.path, 4) + CAMERA[:2, 1] * tallest / 2
        reach = np.abs(self.pose[..., :2] - self.centre[:, None]).max(axis=(0, 1))
        self.zoom = np.min(size / (2 * reach + MARGIN))  # pixels per metre
        self.half_view = np.array(size) / self.zoom / 2

        tiles, tile_colours = _floor(below[:, 0])
        self.path_lines = LineCollection([], linewidths=2.5, colors=[_rgb(PATH_AHEAD), _rgb(PATH)])
        self.shadow = LineCollection([], linewidths=LIMB * self.zoom, colors=_rgb(SHADOW),
                                     capstyle='round')
        self.limbs = LineCollection([], capstyle='round')
        # the floor's edges are not smoothed, which keeps files small
        floor = PolyCollection(tiles @ FLOOR_CAMERA.T, facecolors=tile_colours, antialiaseds=False)
        self.artists = [floor, self.path_lines, self.shadow, self.limbs]
        self.axes = axes
        for artist in self.artists:
            axes.add_collection(artist, autolim=False)

    def show(self, t):
        """Draw frame t on the figure's canvas, over what is there."""
        self.path_lines.set_segments([self.path[t:], self.path[:t + 1]])
        self.shadow.set_segments(np.stack([self.shade[t, self.parents], self.shade[t, 1:]], 1))

        # far bones first, the head right after the neck
        bones = np.stack([self.pose[t, self.parents], self.pose[t, 1:]], axis=1)
        near = bones[..., 2].sum(axis=1)
        near[-2:] = near[self.parents[-2] - 1]
        order = np.argsort(near, kind='stable')
        bones = bones[order, :, :2]
        thickness = self.thickness[order]
        colours = self.colours[order]

        # below each bone a light rim, which separates limbs that cross; it ends before the joints
        length = np.linalg.norm(bones[:, 1] - bones[:, 0], axis=-1)
        share = np.maximum(1 - (thickness + RIM) / np.maximum(length, 0.01), 0.01)
        middle = bones.mean(axis=1, keepdims=True)
        rims = middle + share[:, None, None] * (bones - middle)
        rim_colours = np.broadcast_to(_rgb(BACKGROUND), colours.shape)
        self.limbs.set_segments(np.stack([rims, bones], axis=1).reshape(-1, 2, 2))
        widths = np.stack([thickness + RIM, thickness], axis=1) * self.zoom
        self.limbs.set_linewidth(widths.ravel())
        self.limbs.set_color(np.stack([rim_colours, colours], axis=1).reshape(-1, 3))

        left, bottom = self.centre[t] - self.half_view
        right, top = self.centre[t] + self.half_view
        self.axes.set(xlim=(left, right), ylim=(bottom, top))
        for artist in self.artists:
            self.axes.draw_artist(artist)


def _page(rows, columns, size, above, below=0):
    """A figure of rows x columns axes of size pixels, with room above and below each."""
    width, height = size
    total = rows * (above + height + below)
    inches = ((columns * width + 0.01) / 72, (total + 0.01) / 72)  # it rounds pixels down
    figure = Figure(inches, dpi=72, facecolor=_rgb(BACKGROUND))
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=dict(
        left=0, right=1, bottom=below / total, top=1 - above / total,
        wspace=0, hspace=(above + below) / height))
    for one in axes.flat:
        one.set_axis_off()
    return figure, axes.ravel()


def _wrap(text, width, font_size):
    """The text in lines, and the height that they take."""
    lines = textwrap.wrap(text, max(8, int(width / (0.56 * font_size))))
    return '\n'.join(lines), round(1.3 * font_size * len(lines))


def _write(axes, place, offset, text, font_size):
    """Centred text, its upper edge offset pixels above a place in fractions of the axes."""
    axes.annotate(text, place, (0, offset), 'axes fraction', 'offset points', fontsize=font_size,
                  color=_rgb(INK), linespacing=1.4, ha='center', va='top', parse_math=False)


def _palette():
    """Each colour and its steps to the background, the same for all frames: no flicker."""
    colours = [*SIDE_COLOURS.values(), FLOOR, SHADOW, PATH, PATH_AHEAD, INK]
    steps = [_rgb(colour, np.arange(FADES + 1) / FADES) for colour in colours]
    palette = Image.new('P', (1, 1))
    palette.putpalette((255 * np.concatenate(steps)).round().astype(int).ravel().tolist())
    return palette


def _animate(motions, path, columns, motion_fps, fps, size, font_size):
    """[(caption, joints at motion_fps)] side by side -> a GIF of fps frames a second."""
    captions = [_wrap(caption, size[0] - 10, font_size) for caption, _ in motions]
    above = max(height for _, height in captions) + 16
    rows = -(-len(motions) // columns)
    figure, all_axes = _page(rows, columns, size, above)
    for axes, (text, _) in zip(all_axes, captions):
        _write(axes, (0.5, 1), above - 8, text, font_size)
    figure.canvas.draw()
    captions_only = figure.canvas.copy_from_bbox(figure.bbox)
    scenes = [_Scene(axes, joints, size) for axes, (_, joints) in zip(all_axes, motions)]

    longest = max(len(joints) for _, joints in motions)
    n_frames = int(np.ceil(longest * fps / motion_fps))
    palette = _palette()
    frames = []
    for i in range(n_frames):
        figure.canvas.restore_region(captions_only)
        for scene in scenes:
            last = len(scene.pose) - 1  # which a short motion holds
            scene.show(min(round(i * motion_fps / fps), last))
        pixels = np.array(figure.canvas.buffer_rgba())[..., :3]
        done = pixels.shape[1] * (i + 1) // n_frames
        pixels[-3:, :done] = PATH
        frame = Image.fromarray(pixels)
        frames.append(frame.quantize(palette=palette, dither=Image.Dither.NONE))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / fps),
                   loop=0, optimize=True)


def draw_gif(joints, path, caption, fps=None, size=(320, 340)):
    """Animate joints (T, J, 3), one frame a pose, caption above. fps: the skeleton's."""
    fps = fps or _skeleton(np.asarray(joints)).fps
    _animate([(caption, joints)], path, 1, fps, fps, size, font_size=14)


def draw_strip(joints, path, caption, n_poses=8, size=(150, 200)):
    """Poses of joints (T, J, 3) at n_poses equal steps of time, side by side, seconds below.

    Writes a PNG unless path is None; returns its pixels (h, w, 3) uint8.
    """
    fps = _skeleton(np.asarray(joints)).fps
    text, above = _wrap(caption, n_poses * size[0] - 20, 15)
    if caption:
        above += 14
    figure, all_axes = _page(1, n_poses, size, above, below=20)
    frames = np.linspace(0, len(joints) - 1, n_poses).round().astype(int)
    _write(all_axes[0], (n_poses / 2, 1), above - 8, text, 15)
    for axes, t in zip(all_axes, frames):
        _write(axes, (0.5, 0), -4, f'{t / fps:.1f} s', 11)
    figure.canvas.draw()
    for axes, t in zip(all_axes, frames):
        _Scene(axes, joints, size).show(t)
    pixels = np.array(figure.canvas.buffer_rgba())[..., :3]
    if path is not None:
        Image.fromarray(pixels).save(path)
    return pixels


def draw_grid(motions, path, columns=3, fps=10, size=(210, 230)):
    """[(caption, joints (T, J, 3))] in one picture.

    path .gif animates them side by side at fps, where a short one holds its last pose; any other
    suffix gives each a strip of poses, one below the other.
    """
    if path.endswith('.gif'):
        motion_fps = _skeleton(np.asarray(motions[0][1])).fps
        _animate(motions, path, columns, motion_fps, fps, size, font_size=12)
        return
    small = (size[0] * 3 // 5, size[1] * 3 // 4)
    strips = [draw_strip(joints, None, caption, size=small) for caption, joints in motions]
    Image.fromarray(np.concatenate(strips)).save(path)


def draw_msd(path, title, joints, phi, omega, fps):
    """A clip (T, J, 3) as poses, under it phi (n, W) of Eq 7 and Omega (n,) of Eq 8, by token."""
    figure = Figure(figsize=(11, 5.2), dpi=110, layout='constrained')
    poses, heat, curve = figure.subplots(3, 1, height_ratios=(2.0, 1.3, 1.0))
    poses.imshow(draw_strip(joints, None, '', 10))
    poses.axis('off')
    poses.set_title(title, fontsize=10, parse_math=False)

    n, bands = phi.shape
    seconds = 4 / fps  # of a token
    heat.imshow(phi.T, cmap='magma', aspect='auto', origin='lower',
                extent=(0, n * seconds, -0.5, bands - 0.5))
    heat.set_ylabel('band k\n$\\phi_{t,k}$, Eq 7')
    middle = (np.arange(n) + 0.5) * seconds
    curve.fill_between(middle, omega, step='mid', alpha=0.3)
    curve.step(middle, omega, where='mid')
    curve.set(xlim=(0, n * seconds), ylim=(0, None), ylabel='$\\Omega(t)$, Eq 8', xlabel='seconds')
    figure.savefig(path)


def draw_explained(path, caption, nodes, joints, omega, hard, fps):
    """What HGM3 and DynMask make of one prompt and its motion (T, J, 3): the caption's graph, nodes
    [(text, level, edge)]; poses; below them, token by token, MSD's complexity omega (n,) and what
    the teacher finds hard (n,), z-scored, or None."""
    figure = Figure(figsize=(11, 7), dpi=110, layout='constrained')
    tree, poses, curve = figure.subplots(3, 1, height_ratios=(1.6, 2.0, 1.3))
    tree.set_title(caption, fontsize=10, parse_math=False)
    tree.set(xlim=(0, 1), ylim=(0, 1))
    tree.axis('off')
    box = dict(boxstyle='round', facecolor='white', edgecolor='grey')
    latest = {}   # the last node of each level: what hangs below it follows it
    for i, (text, level, edge) in enumerate(nodes):
        x = 0.5 if level == 1 else i / len(nodes)
        y = 1.2 - level / 3
        if level > 1:
            parent = latest[level - 1]
            tree.plot([parent[0], x], [parent[1], y], color='grey', zorder=1)
        latest[level] = (x, y)
        tree.text(x, y, f'{textwrap.fill(text, 16)}\n{edge}', fontsize=9, ha='center',
                  va='center', bbox=box, parse_math=False)

    poses.imshow(draw_strip(joints, None, '', 10))
    poses.axis('off')
    seconds = 4 / fps  # of a token
    middle = (np.arange(len(omega)) + 0.5) * seconds
    curve.step(middle, omega, where='mid', label='complex: $\\Omega(t)$ of DynMask')
    if hard is not None:
        curve.step(middle, hard, where='mid', label='hard: the teacher of HGM3')
    curve.set(xlim=(0, len(omega) * seconds), xlabel='seconds', ylabel='z-score')
    curve.legend()
    figure.savefig(path)
