"""Draw the README's figure of the architecture: `python assets/architecture.py`."""
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle
from PIL import Image   # comes with matplotlib

INK, GREY, NETWORK, DYNMASK, LEGEND = '#252a34', '#5d6675', '#f1f4f8', '#c2402b', '#fdf3f0'
BASE, RESIDUAL, MASK, TEXT = '#86b6de', '#d8e6f3', '#d5d7dc', '#f3cf7a'
ROUNDED = 'round,pad=0,rounding_size=0.2'

canvas = FigureCanvasAgg(Figure(figsize=(9, 6.5), dpi=200, facecolor='white'))
axes = canvas.figure.add_axes((0, 0, 1, 1), xlim=(0, 18), ylim=(0, 13))
axes.set_axis_off()


def write(x, y, text, size=8.5, colour=INK, ha='center', **style):
    axes.text(x, y, text, fontsize=size, color=colour, ha=ha, va='center', **style)


def network(x, y, width, name, file):
    axes.add_patch(FancyBboxPatch((x, y), width, 1.6, ROUNDED, fc=NETWORK, ec=INK))
    write(x + width / 2, y + 1.05, name, 9.5, weight='bold')
    write(x + width / 2, y + 0.48, file, colour=GREY, family='monospace')


def arrow(*points, line='-'):
    """A line through points (x, y) with a head at the last one."""
    axes.plot(*np.transpose(points[:-1]), color=INK, lw=1.1, ls=line)
    last = dict(arrowstyle='-|>', color=INK, lw=1.1, ls=line, shrinkA=0, shrinkB=0)
    axes.annotate('', points[-1], points[-2], arrowprops=last)


def tokens(x, y, labels, size=0.7, colour=BASE):
    for i, label in enumerate(labels):
        fill = {'M': MASK, 'text': TEXT}.get(label, colour)
        axes.add_patch(Rectangle((x + i * size, y), size, size, fc=fill, ec='white', lw=1.4))
        write(x + (i + 0.5) * size, y + size / 2 - 0.02, label, 8)


def badge(x, y, number):
    axes.add_patch(Circle((x, y), 0.36, fc=DYNMASK, ec='white', lw=1.5, zorder=4))
    write(x, y - 0.03, number, 9.5, 'white', weight='bold', zorder=5)


def walker(x, y, swing):
    """A stick figure with its hip at (x, y). swing, -1 to 1: how far one leg is ahead."""
    axes.add_patch(Circle((x + 0.07, y + 0.86), 0.16, fc='white', ec=INK, lw=1.5))
    for s, colour in ((-swing, GREY), (swing, INK)):
        leg = (0, 0), (0.08 + 0.14 * s, -0.37), (0.3 * s, -0.75)
        arm = (0.04, 0.56), (-0.16 * s, 0.31), (0.14 - 0.24 * s, 0.11)
        for part in (leg, arm, [(0, 0), (0.05, 0.7)]):
            axes.plot(*np.transpose(np.add(part, (x, y))), color=colour, lw=1.6)


# frames -> base and residual tokens -> frames
for x, swing in ((0.75, 0.9), (1.65, 0.3), (2.55, -0.9), (16.55, 0.9), (17.4, 0.3)):
    walker(x, 11.25, swing)
write(1.65, 10.05, 'motion, T frames')
network(3.7, 10.5, 2.2, 'encoder', 'vq.py')
network(6.5, 10.5, 2.7, 'Q codebooks', 'vq.py')
network(13.6, 10.5, 2.0, 'decoder', 'vq.py')
for x, y in ((9.8, 10.5), (13.0, 7.3)):
    for row in range(4):
        tokens(x, y + 0.4 * row, [''] * 8, 0.4, RESIDUAL if row else BASE)
write(11.4, 12.42, 'residual tokens, Q − 1 rows')
write(11.2, 10.07, 'base tokens, n = T / 4', ha='right')
for start, end in ((3.1, 3.7), (5.9, 6.5), (9.2, 9.8), (13.0, 13.6), (15.6, 16.2)):
    arrow((start, 11.3), (end, 11.3))

# text and partly masked base tokens -> base tokens -> residual tokens -> frames
write(1.6, 9.2, '“a person walks”', style='italic')
network(0.3, 6.95, 2.6, 'text encoder', 'lib/text.py')
network(4.4, 5.0, 5.6, 'masked transformer', 'model.py')
network(11.7, 5.0, 5.8, 'residual transformer', 'model.py')
base = ['17', '33', '4', '4', '61', '92', '8', '8']
tokens(3.7, 7.4, ['text', '17', 'M', '4', 'M', 'M', '92', '8', 'M'])
tokens(4.4, 3.5, base)
tokens(11.7, 3.53, ['text', *base], 0.645)
arrow((2.9, 7.75), (3.7, 7.75))
arrow((10.0, 3.85), (11.7, 3.85))
for x, start, end in ((1.6, 8.95, 8.55), (7.2, 7.4, 6.6), (7.2, 5.0, 4.2),
                      (14.6, 4.18, 5.0), (14.6, 6.6, 7.3), (14.6, 8.9, 10.5)):
    arrow((x, start), (x, end))
arrow((11.4, 10.5), (11.4, 8.85), (7.2, 8.85), (7.2, 8.12), line='--')
arrow((4.4, 3.85), (3.1, 3.85), (3.1, 6.98), (4.75, 6.98), (4.75, 7.4))
write(10.9, 9.2, 'training: mask some (masking.py)', ha='right')
write(2.6, 5.3, 'decoding: keep\nconfident tokens,\nmask the rest\n(generate.py)', ha='right')
write(16.35, 8.1, 'layers\n1 … Q − 1,\none by one', ha='left')

# DynMask
axes.add_patch(FancyBboxPatch((0.3, 0.3), 17.4, 2.6, ROUNDED, fc=LEGEND, ec=DYNMASK))
write(9, 2.45, 'DynMask gives each token a spectrum φ and a complexity Ω (msd.py, Eqs 4–8)')
for x, place, number, name, text in (
        (1.0, (4.4, 5.8), 'I', 'motion-aware attention',
         'attends to tokens of similar φ\nEqs 11–14, model.py, msd.py'),
        (6.4, (11.4, 8.85), 'II', 'content-focused masks',
         'hides complex, text-relevant tokens\nEqs 9–10, masking.py'),
        (12.2, (3.1, 5.3), 'III', 'complexity-aware decoding',
         'samples complex tokens hotter\nEqs 15–21, generate.py')):
    badge(*place, number)
    badge(x, 1.25, number)
    write(x + 0.6, 1.75, name, 9, weight='bold', ha='left')
    write(x + 0.6, 1.0, text, ha='left', linespacing=1.5)

canvas.draw()
picture = Image.fromarray(np.array(canvas.buffer_rgba())[..., :3])
picture.quantize(64).save(Path(__file__).with_suffix('.png'), optimize=True)
