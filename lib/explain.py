"""Figures that explain: what MSD sees in clips, and how one motion came about."""
import textwrap

import numpy as np
from matplotlib.figure import Figure

from lib.draw import draw_strip

DPI = 110


def _show_poses(axes, joints, n_poses):
    axes.imshow(draw_strip(joints, None, '', n_poses))
    axes.axis('off')


def _show_tokens(axes, values, seconds_per_token, **colours):
    """Values (rows, n) over the time of n tokens, NaN left white -> what a colour bar needs."""
    rows, n = values.shape
    seconds = np.arange(n + 1) * seconds_per_token
    return axes.pcolormesh(seconds, np.arange(rows + 1) - 0.5, values, **colours)


def draw_clips(path, clips, fps):
    """The Motion Spectral Descriptor of clips side by side (DynMask Fig 3).

    clips: [(title, joints (T, J, 3), phi (n, W) of Eq 7, Omega (n,) of Eq 8)].
    """
    width = max(11, 3.4 * len(clips))
    figure = Figure(figsize=(width, 5.2), dpi=DPI, layout='constrained')
    axes = figure.subplots(3, len(clips), height_ratios=(2.0, 1.3, 1.0), squeeze=False)
    largest = max(omega.max() for _, _, _, omega in clips)
    for (poses, heat, curve), (title, joints, phi, omega) in zip(axes.T, clips):
        _show_poses(poses, joints, max(3, 10 // len(clips)))
        poses.set_title(textwrap.fill(title, 110 // len(clips)), fontsize=10, parse_math=False)
        mesh = _show_tokens(heat, phi.T, 4 / fps, cmap='magma', vmin=0, vmax=1)
        seconds = np.arange(len(omega) + 1) * 4 / fps
        curve.stairs(omega, seconds, fill=True, alpha=0.5)
        curve.set(xlim=(0, seconds[-1]), ylim=(0, 1.05 * largest), xlabel='seconds')
    axes[1, 0].set_ylabel('band k, slow to fast')
    figure.colorbar(mesh, ax=axes[1], label='$\\phi_{t,k}$, Eq 7', pad=0.01)
    axes[2, 0].set_ylabel('$\\Omega(t)$, Eq 8')
    figure.savefig(path)


def _draw_graph(axes, nodes):
    """nodes: a caption's semantic graph, [(text, level, edge)]; children follow their parent."""
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis('off')
    box = dict(boxstyle='round', facecolor='white', edgecolor='grey')
    latest = {}   # the last node so far of each level
    for i, (text, level, edge) in enumerate(nodes):
        x = 0.5 if level == 1 else i / len(nodes)
        y = 1.2 - level / 3
        if level > 1:
            parent = latest[level - 1]
            axes.plot([parent[0], x], [parent[1], y], color='grey', zorder=1)
        latest[level] = (x, y)
        axes.text(x, y, f'{textwrap.fill(text, 16)}\n{edge}', fontsize=9, ha='center', va='center',
                  bbox=box, parse_math=False)


def draw_explained(path, caption, nodes, joints, filled, omega, hard, fps):
    """How one motion (T, J, 3) came about: the graph of its caption, its poses, the decoding step
    in which each token was filled in, and what DynMask and HGM3 make of the result.

    nodes         [(text, level, edge)], see `_draw_graph`
    filled        (steps, n), the model's confidence where a step wrote a token, otherwise NaN;
                  None leaves the panel out
    omega, hard   (n,), z-scores: MSD's complexity, and the loss that HGM3's teacher predicts (or
                  None)
    """
    figure = Figure(figsize=(11, 8.6), dpi=DPI, layout='constrained')
    tree, poses, order, curve = figure.subplots(4, 1, height_ratios=(1.6, 2.0, 1.6, 1.3))
    tree.set_title(caption, fontsize=10, parse_math=False)
    _draw_graph(tree, nodes)
    _show_poses(poses, joints, 10)

    if filled is None:
        order.axis('off')
    else:
        mesh = _show_tokens(order, filled, 4 / fps, cmap='viridis', vmin=0, vmax=1)
        order.set(ylabel='decoding step', ylim=(len(filled) - 0.5, -0.5))
        order.set_title('tokens that each step fills in; after noise (Eq 19), the most confident '
                        'stay', fontsize=9)
        figure.colorbar(mesh, ax=[order, curve], label='confidence', pad=0.01)

    seconds = np.arange(len(omega) + 1) * 4 / fps
    curve.stairs(omega, seconds, baseline=None, label='complex: $\\Omega(t)$ of DynMask')
    if hard is not None:
        curve.stairs(hard, seconds, baseline=None, label='hard: the teacher of HGM3')
    curve.set(xlim=(0, seconds[-1]), xlabel='seconds', ylabel='z-score')
    curve.legend()
    figure.savefig(path)


def draw_attention(path, title, maps):
    """Matrices of pairs of tokens side by side (DynMask Fig 5). maps: [(title, (n, n))]."""
    figure = Figure(figsize=(5 * len(maps), 5), dpi=DPI, layout='constrained')
    figure.suptitle(title, fontsize=10, parse_math=False)
    for axes, (name, matrix) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps):
        image = axes.imshow(matrix, cmap='magma', vmax=np.quantile(matrix, 0.99))
        figure.colorbar(image, ax=axes, shrink=0.7)
        axes.set(title=name, xlabel='token attended to', ylabel='token')
    figure.savefig(path)
