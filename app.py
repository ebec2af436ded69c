"""Prompts in, motion out, in the browser: side by side in 3D, a span of one made anew.

    make app                     # installs viser, then the next line
    python app.py config/toy.py
    python app.py --init_from=momask --momask_root=checkpoints

The page is for this machine alone unless --host says otherwise. Same seed, same motion.
"""
import contextlib
import html
import os
import re
import socket
import tempfile
import threading
import time
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch

import msd
from lib.bvh import write_bvh
from lib.configurator import RANGES, UserError, configure
from lib.data import FRAMES_PER_TOKEN
from lib.draw import HEAD, LIMB, SHADOW, SIDE_COLOURS, draw_gif
from generate import decoding_of
from momask import open_pipeline
from lib.motion import SKELETONS, features_to_joints
from lib.runtime import read_text, setup

# -----------------------------------------------------------------------------
host = '127.0.0.1'           # '0.0.0.0' shows the page to the whole network
port = 8080                  # 0 takes one that is free
examples = 'config/demo_prompts.txt'     # a file, one prompt a line
data = 'toy'
out_dir = ''                 # where the checkpoints are, '' is out/<data>
seed = 0                     # where the page begins; so do steps and cond_scale
# machine
device = 'auto'              # 'auto' | 'cpu' | 'cuda'
dtype = 'float32'            # the same motion on every CPU | 'bfloat16' and 'auto' are faster
config = configure(globals(), shared='config/decoding.py', init_from=('checkpoint', 'momask'))
# -----------------------------------------------------------------------------
try:
    import viser
except ImportError:
    raise UserError('app.py needs viser, which is not installed: run `make app`, or `pip install '
                    '-r requirements-app.txt`.') from None

try:
    socket.create_server((host, port)).close()
except OSError as error:
    raise UserError(f'The page cannot be at {host}:{port} ({error}): give another --port, or leave '
                    '--host out.') from None

GAP = 0.6                                # metres between motions
VIEW = np.array([0.45, 0.35, 0.8])       # from what is looked at towards the camera
TEXT_STYLE = 'margin: 0.3em 0.8em; font-size: 0.85em'

out_dir = out_dir or os.path.join('out', data)
run = setup(device, dtype, seed)
pipe = open_pipeline(config, out_dir, run.device)
fps = pipe.meta['fps']
skeleton = SKELETONS[pipe.meta['skeleton']]
lines = read_text(examples, 'expected one prompt a line').splitlines()
example_prompts = [line.partition('#')[0].strip() for line in lines if line.strip()] or ['']

shown = []                   # the motions on the page
poses = []                   # a function for each that moves its body to a frame
busy = threading.Lock()      # one action at a time, whoever clicks
drawing = threading.RLock()  # bodies are either moved or replaced

# ------------------------------------------------------------------------------------------- motion


def decoding():
    """The settings for drawing tokens. UserError where a field was emptied, which reads as 0."""
    for field in (length_slider, seed_box, guidance_slider, steps_slider, variants_slider):
        if not field.min <= field.value <= field.max:
            raise UserError(f'{field.label} is {field.value}, expected {field.min} to {field.max}.')
    return decoding_of({**config, 'steps': steps_slider.value,
                        'cond_scale': guidance_slider.value})


def text_in(box):
    text = box.value.strip()
    if not re.search(r'\w', text):
        raise UserError('The prompt is empty: say what the person shall do, or pick an example.')
    return text


def drawn(text, variants):
    """Tokens [(n_i, Q)] of so many motions for a text, of the length that the page asks for."""
    settings = decoding()
    c, c_valid = pipe.condition([text] * variants)
    n = torch.full((variants,), round(length_slider.value * fps / FRAMES_PER_TOKEN))
    if not n.all():
        n = pipe.lengths(c, c_valid, seed_box.value).cpu()
    ids = pipe.generate(c, c_valid, n, seed_box.value, **settings)
    return [row[:k] for row, k in zip(ids, n.tolist())]


def motion_of(ids, text, caption):
    """Tokens (n, Q), the text of their end and the whole story -> what the page keeps."""
    f, _ = pipe.mask.spectrum(ids[None, :, 0])
    return SimpleNamespace(
        ids=ids, text=text, caption=caption, omega=msd.complexity(f)[0].cpu().numpy(),
        joints=features_to_joints(pipe.decode(ids), pipe.meta['n_joints']))   # in its set's unit


def chosen():
    """Which of the shown motions the menu names."""
    if not shown:
        raise UserError('There is no motion yet: press Generate first.')
    return int(motion_menu.value) - 1


def span():
    """The selected part of the timeline in tokens, (first, end)."""
    first, end = span_slider.value
    return first // FRAMES_PER_TOKEN, end // FRAMES_PER_TOKEN


def file_of(motion, kind):
    """The bytes of a motion as 'GIF', 'BVH' or 'npy'."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f'motion.{kind.lower()}')
        if kind == 'GIF':
            draw_gif(motion.joints, path, motion.caption, fps)
        elif kind == 'BVH':
            write_bvh(path, motion.joints, skeleton, fps)
        else:
            np.save(path, motion.joints)
        with open(path, 'rb') as f:
            return f.read()


# -------------------------------------------------------------------------------------------- scene


def add_body(name, joints):
    """Joints (T, J, 3) in metres as thick lines in the GIFs' colours, over a shadow -> pose(t),
    which moves them to a frame."""
    bones = np.stack([joints[:, skeleton.parents[1:]], joints[:, 1:]], axis=2)
    sides = [joint.split('_')[0] for joint in skeleton.names[1:]]
    sides = np.array([side if side in SIDE_COLOURS else 'middle' for side in sides])
    neck, skull = bones[:, skeleton.names.index('head') - 1].swapaxes(0, 1)
    face = skull[:, None, None] + [[[0.25], [0.35]]] * (skull - neck)[:, None, None]
    parts = [(bones * [1, 0, 1] - [0, LIMB, 0], SHADOW, LIMB), (face, SIDE_COLOURS['middle'], HEAD)]
    parts += [(bones[:, sides == side], colour, LIMB) for side, colour in SIDE_COLOURS.items()]
    lines = [server.scene.add_line_segments(f'/motions/{name}/{i}', points[0], colour,
                                            thickness=thickness)
             for i, (points, colour, thickness) in enumerate(parts)]
    label = server.scene.add_label(f'/motions/{name}/label', name, anchor='bottom-center')

    def pose(t):
        t = min(t, len(joints) - 1)      # a short motion holds its last pose
        for line, (points, _, _) in zip(lines, parts):
            line.points = points[t]
        label.position = skull[t] + [0, HEAD, 0]
    return pose


def show(_=None):
    """All bodies at the frame of the slider, and the timeline."""
    with drawing, server.atomic():
        for pose in poses:
            pose(frame_slider.value)
        timeline.content = ''.join(strip(i, motion) for i, motion in enumerate(shown, 1))


def strip(number, motion):
    """A motion's caption, below it its complexity Omega(t) (Eq 8) token by token, dark to bright.
    The shown frame is black; what a selected span leaves out is pale."""
    first, end = span()
    n = len(motion.colours)
    stops = []
    for t, colour in enumerate(motion.colours):
        if t == frame_slider.value // FRAMES_PER_TOKEN:
            colour = 'black'
        elif number == int(motion_menu.value) and not first <= t < end:
            colour += '40'               # a quarter of its opacity
        stops.append(f'{colour} {t / n:.2%} {(t + 1) / n:.2%}')
    width = len(motion.joints) / frame_slider.max
    return (f'<div style="{TEXT_STYLE}">{number}: {html.escape(motion.caption)}'
            f'<div style="height: 14px; width: {width:.2%}; '
            f'background: linear-gradient(90deg, {", ".join(stops)})"></div></div>')


def stage(motions):
    """Show these side by side, from their first frame on. Returns the ways of their roots (n, 3),
    in metres."""
    with drawing, server.atomic():
        shown[:] = motions
        server.scene.remove_by_name('/motions')
        server.scene.add_frame('/motions', show_axes=False)
        poses.clear()
        most = max(1e-6, *(motion.omega.max() for motion in shown))
        ways = []
        edge = 0
        for i, motion in enumerate(shown, 1):
            colours = matplotlib.colormaps['plasma'](motion.omega / most)
            motion.colours = [matplotlib.colors.to_hex(colour) for colour in colours]
            joints = motion.joints / skeleton.units_per_metre
            joints[..., 0] += edge - joints[..., 0].min()
            edge = joints[..., 0].max() + GAP
            poses.append(add_body(str(i), joints))
            ways.append(joints[:, 0])
        motion_menu.options = [str(i + 1) for i in range(len(shown))]
        frame_slider.max = span_slider.max = max(len(motion.joints) for motion in shown)
        frame_slider.value = 0
        show()
    return np.concatenate(ways)


def aim(places):
    """Every browser's camera at all of the places (n, 3)."""
    middle = (places.min(0) + places.max(0)) / 2
    distance = 4 + 1.3 * np.ptp(places, axis=0).max()
    cameras = [client.camera for client in server.get_clients().values()]
    for camera in [server.initial_camera, *cameras]:
        camera.position = middle + distance * VIEW
        camera.look_at = middle


# --------------------------------------------------------------------------------------------- page

server = viser.ViserServer(host, port, 'DynMask', verbose=False)
server.scene.set_up_direction('+y')
server.scene.add_grid('/floor', plane='xz', infinite_grid=True, cell_color=(229, 232, 237),
                      section_color=(196, 200, 208), fade_distance=30)
server.gui.configure_theme(control_width='large', show_logo=False, show_share_button=False)
server.gui.main_panel.dock_right()
server.initial_camera.fov = 0.7
aim(np.array([[0.0, 0.9, 0.0]]))

prompt_box = server.gui.add_text('Prompt', example_prompts[0], multiline=True)
example_menu = server.gui.add_dropdown('Examples', example_prompts)
length_slider = server.gui.add_slider(
    'Seconds', 0.0, pipe.n_max * FRAMES_PER_TOKEN / fps, FRAMES_PER_TOKEN / fps, 0.0,
    hint='0: as long as the length estimator thinks that it takes')
lowest, highest = RANGES['seed']
seed_box = server.gui.add_number('Seed', seed, min=lowest, max=highest, step=1)
guidance_slider = server.gui.add_slider(
    'Guidance', min(0.0, cond_scale), max(10.0, cond_scale), 0.5, cond_scale)
steps_slider = server.gui.add_slider('Steps', 1, max(30, steps), 1, steps)
variants_slider = server.gui.add_slider('Variants', 1, 6, 1, 1)
generate_button = server.gui.add_button('Generate', color='blue')
message = server.gui.add_html('')
with server.gui.add_folder('Timeline'):
    play_box = server.gui.add_checkbox('Play', True)
    speed_slider = server.gui.add_slider('Speed', 0.1, 3.0, 0.1, 1.0)
    frame_slider = server.gui.add_slider('Frame', 0, 1, 1, 0, hint=f'{fps:g} a second')
    timeline = server.gui.add_html('')
    span_slider = server.gui.add_multi_slider('Span', 0, 1, FRAMES_PER_TOKEN, (0, 0))
with server.gui.add_folder('Change and save'):
    motion_menu = server.gui.add_dropdown('Motion', ['1'])
    change_box = server.gui.add_text('New prompt', '')
    edit_button = server.gui.add_button('Regenerate the span')
    append_button = server.gui.add_button('Append')
    save_buttons = server.gui.add_button_group('Save', ['GIF', 'BVH', 'npy'])


def action(act):
    """What a button does: act(event) -> a sentence for the page. So is a UserError."""
    def press(event):
        with busy, run.autocast():
            try:
                colour, sentence = '#444', act(event)
            except UserError as error:
                colour, sentence = '#c22', error
        sentence = html.escape(str(sentence))
        message.content = f'<p style="{TEXT_STYLE}; color: {colour}">{sentence}</p>'
    return press


@generate_button.on_click
@action
def generate(_):
    start = time.perf_counter()
    text = text_in(prompt_box)
    tokens = drawn(text, variants_slider.value)
    aim(stage([motion_of(ids, text, text) for ids in tokens]))
    span_slider.value = (0, span_slider.max)
    return f'First frame after {time.perf_counter() - start:.2f} s.'


@edit_button.on_click
@action
def regenerate(_):
    i = chosen()
    motion = shown[i]
    text = text_in(change_box)
    first, end = span()
    end = min(end, len(motion.ids))
    frames = f'frames {first * FRAMES_PER_TOKEN} to {end * FRAMES_PER_TOKEN}'
    if first >= end:
        raise UserError(f'The span is {frames} of {len(motion.joints)}: drag the ends of its '
                        'slider around what shall change.')
    ids = pipe.edit(motion.ids, [(first, end)], text, seed_box.value, **decoding())
    changed = motion_of(ids, motion.text, f'{motion.caption}, {frames}: {text}')
    stage([*shown[:i], changed, *shown[i + 1:]])
    return f'Only {frames} are new.'


@append_button.on_click
@action
def append(_):
    i = chosen()
    motion = shown[i]
    text = text_in(change_box)
    new, = drawn(text, 1)
    ids = pipe.join([motion.ids, new], [motion.text, text], seed_box.value, **decoding())
    longer = motion_of(ids, text, f'{motion.caption} | {text}')
    aim(stage([*shown[:i], longer, *shown[i + 1:]]))
    return f'{len(new) * FRAMES_PER_TOKEN} frames more.'


@save_buttons.on_click
@action
def save(event):
    motion = shown[chosen()]
    kind = save_buttons.value
    slug = re.sub(r'\W+', '-', motion.caption.lower()).strip('-')
    name = f'{slug[:80]}.{kind.lower()}'
    event.client.send_file_download(name, file_of(motion, kind), save_immediately=True)
    return f'{name} is in your downloads.'


@example_menu.on_update
def take_example(_):
    prompt_box.value = example_menu.value


def play():
    """Frame after frame, for ever."""
    while True:
        start = time.perf_counter()
        if play_box.value and shown:
            frame_slider.value = (frame_slider.value + 1) % frame_slider.max
        speed = max(speed_slider.value, speed_slider.min)
        rest = 1 / (fps * speed) - (time.perf_counter() - start)
        time.sleep(max(0, rest))


for handle in (frame_slider, span_slider, motion_menu):
    handle.on_update(show)
if __name__ == '__main__':
    with contextlib.suppress(KeyboardInterrupt):
        play()
