"""Prompts in, motion out, in the browser: generate, compare side by side, regenerate a span.

    make app                     # installs viser, then runs the next line
    python app.py config/toy.py
    python app.py --init_from=momask --momask_root=checkpoints

Only this machine can open the page, unless --host says otherwise. The same seed gives the same
motion.
"""
import contextlib
import html
import os
import re
import socket
import tempfile
import threading
import time
import traceback
from types import SimpleNamespace
from unittest import mock

import matplotlib
import numpy as np
import torch

import msd
from generate import decoding_of, open_pipeline
from lib.bvh import write_bvh
from lib.configurator import LIMITS, UserError, configure
from lib.data import FRAMES_PER_TOKEN
from lib.detect import parse
from lib.draw import HEAD, LIMB, SHADOW, SIDE_COLOURS, draw_gif
from lib.motion import SKELETONS, features_to_joints
from lib.runtime import read_text, setup

# -----------------------------------------------------------------------------
host = '127.0.0.1'           # '0.0.0.0' opens the page to the whole network
port = 8080                  # 0 takes any free port
examples = 'config/demo_prompts.txt'     # a file with one prompt per line
data = 'toy'
out_dir = ''                 # the checkpoints, '' is out/<data>
seed = 0                     # initial value on the page; so are steps and cond_scale
# machine
device = 'auto'              # 'auto' | 'cpu' | 'cuda'
dtype = 'float32'            # the same motion on every CPU; faster: 'float32' | 'bfloat16' | 'auto'
config = configure(globals(), shared=True)
# -----------------------------------------------------------------------------
try:
    import viser
    import websockets.asyncio.server
except ImportError:
    raise UserError('app.py needs viser, which is not installed: run `make app`, or `pip install '
                    '-r requirements-app.txt`.') from None

try:
    if not host:   # for sockets '' is every address of the machine
        raise OSError('there is no address')
    socket.create_server((host, port)).close()
except (OSError, OverflowError) as error:
    raise UserError(f'The page cannot be served at {host}:{port} ({error}): give another --port, '
                    'or leave --host out.') from None

GAP = 0.6                                # metres between motions
VIEW = np.array([0.45, 0.35, 0.8])       # direction from the look-at point to the camera
LOOPBACK = ('127.0.0.1', 'localhost', '::1', '[::1]')
TEXT_STYLE = 'margin: 0.3em 0.8em; font-size: 0.85em'

out_dir = out_dir or os.path.join('out', data)
run = setup(device, dtype, seed)
pipe = open_pipeline(config, data, out_dir, run.device)
fps = pipe.meta['fps']
skeleton = SKELETONS[pipe.meta['skeleton']]
lines = read_text(examples, 'expected one prompt per line').splitlines()
example_prompts = [line.partition('#')[0].strip() for line in lines if line.strip()] or ['']

shown = []                   # the motions on the page
poses = []                   # for each of them, a function that moves its body to a frame
busy = threading.Lock()      # one action at a time, for all visitors
drawing = threading.RLock()  # bodies are either moved or replaced

# ------------------------------------------------------------------------------------------- motion


def decoding():
    """The settings for generating tokens. UserError for a value outside its field's range; an
    emptied field reads as 0."""
    for field in (length_slider, seed_box, guidance_slider, steps_slider, variants_slider):
        if not field.min <= field.value <= field.max:
            raise UserError(f'{field.label} is {field.value}, expected {field.min} to {field.max}.')
    return decoding_of({**config, 'steps': steps_slider.value,
                        'cond_scale': guidance_slider.value})


def text_in(box):
    text = box.value.strip()
    if not re.search(r'\w', text):
        raise UserError('The prompt is empty: write what the person does, or choose an example.')
    return text


def generate_tokens(text, variants):
    """Generate motions for a text, of the length that the page asks for -> tokens [(n_i, Q)]."""
    settings = decoding()
    c, role = pipe.encode_text([text] * variants)
    n = torch.full((variants,), round(length_slider.value * fps / FRAMES_PER_TOKEN))
    if not n.all():
        n = pipe.lengths(c, role, seed_box.value).cpu()
    ids = pipe.generate(c, role, n, seed_box.value, **settings)
    return [row[:k] for row, k in zip(ids, n.tolist())]


def motion_of(ids, text, caption):
    """Tokens (n, Q), the text of their last part, and the caption of the whole -> a motion of the
    page; its joints have the data set's unit."""
    f, _ = pipe.mask.spectrum(ids[None, :, 0])
    return SimpleNamespace(
        ids=ids, text=text, caption=caption, omega=msd.complexity(f)[0].cpu().numpy(),
        joints=features_to_joints(pipe.decode(ids), pipe.meta['n_joints']))


def selected():
    """The position in `shown` of the motion that the menu names."""
    if not shown:
        raise UserError('There is no motion yet: press Generate first.')
    if motion_menu.value not in motion_menu.options:
        raise UserError(f'There is no motion {motion_menu.value!r:.40}: choose one in the menu.')
    return int(motion_menu.value) - 1


def span():
    """The selected span of the timeline in tokens, (first, end)."""
    first, end = span_slider.value
    return first // FRAMES_PER_TOKEN, end // FRAMES_PER_TOKEN


def seconds_of(tokens):
    return f'{tokens * FRAMES_PER_TOKEN / fps:.1f} s'


def unknown_actions(text):
    """A sentence about a prompt that the toy model was not trained on; '' for all others."""
    if pipe.meta['name'] != 'toy' or parse(text):
        return ''
    return ' The toy model does not know all of these actions: see the examples for those it does.'


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
    """Draw joints (T, J, 3) in metres as thick lines in the GIFs' colours, above a shadow ->
    pose(t), a function that moves them to a frame."""
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
        t = min(t, len(joints) - 1)      # a shorter motion holds its last pose
        for line, (points, _, _) in zip(lines, parts):
            line.points = points[t]
        label.position = skull[t] + [0, HEAD, 0]
    return pose


def show(_=None):
    """Draw all bodies at the frame of the slider, and the timeline."""
    with drawing, server.atomic():
        for pose in poses:
            pose(frame_slider.value)
        timeline.content = ''.join(strip(i, motion) for i, motion in enumerate(shown, 1))


def strip(number, motion):
    """A motion's caption and, below it, its complexity Omega(t) (Eq 8) token by token, from dark to
    bright. The current frame is black; tokens outside the selected span are pale."""
    first, end = span()
    n = len(motion.colours)
    stops = []
    for t, colour in enumerate(motion.colours):
        if t == frame_slider.value // FRAMES_PER_TOKEN:
            colour = 'black'
        elif str(number) == motion_menu.value and not first <= t < end:
            colour += '40'               # a quarter of the opacity
        stops.append(f'{colour} {t / n:.2%} {(t + 1) / n:.2%}')
    width = len(motion.joints) / frame_slider.max
    return (f'<div style="{TEXT_STYLE}">{number}: {html.escape(motion.caption)}'
            f'<div style="height: 14px; width: {width:.2%}; '
            f'background: linear-gradient(90deg, {", ".join(stops)})"></div></div>')


def stage(motions):
    """Show these motions side by side, from their first frame. Returns the paths of their roots
    (n, 3), in metres."""
    with drawing, server.atomic():
        shown[:] = motions
        server.scene.remove_by_name('/motions')
        server.scene.add_frame('/motions', show_axes=False)
        poses.clear()
        most = max(1e-6, *(motion.omega.max() for motion in shown))
        paths = []
        edge = 0
        for i, motion in enumerate(shown, 1):
            colours = matplotlib.colormaps['plasma'](motion.omega / most)
            motion.colours = [matplotlib.colors.to_hex(colour) for colour in colours]
            joints = motion.joints / skeleton.units_per_metre
            joints[..., 0] += edge - joints[..., 0].min()
            edge = joints[..., 0].max() + GAP
            poses.append(add_body(str(i), joints))
            paths.append(joints[:, 0])
        motion_menu.options = [str(i + 1) for i in range(len(shown))]
        frame_slider.max = span_slider.max = max(len(motion.joints) for motion in shown)
        frame_slider.value = 0
        show()
    return np.concatenate(paths)


def aim(places):
    """Point every browser's camera at all of the places (n, 3)."""
    middle = (places.min(0) + places.max(0)) / 2
    distance = 4 + 1.3 * np.ptp(places, axis=0).max()
    cameras = [client.camera for client in server.get_clients().values()]
    for camera in [server.initial_camera, *cameras]:
        camera.position = middle + distance * VIEW
        camera.look_at = middle


# ------------------------------------------------------------------------------------------- server


def is_own_page(headers):
    """Does a request come from this page, or from a program that is no browser? Otherwise any web
    site that is open in a browser on this machine could connect and press buttons. An attacker's
    host name may resolve to 127.0.0.1, so a loopback server also accepts its own names only."""
    address = headers.get('Host', '')
    if host in LOOPBACK and re.sub(r':\d+$', '', address) not in LOOPBACK:
        return False
    return headers.get('Origin', f'http://{address}').partition('://')[2] == address


def serve_own_page(handler, *args, process_request, **more):
    """The `serve` of websockets with a check of the Origin, which viser does not ask for."""
    def check(connection, request):
        if not is_own_page(request.headers):
            return connection.respond(403, 'This address serves its own page only.\n')
        return process_request(connection, request)
    return serve(handler, *args, process_request=check, **more)


serve = websockets.asyncio.server.serve
with mock.patch.object(websockets.asyncio.server, 'serve', serve_own_page):
    server = viser.ViserServer(host, port, 'DynMask', verbose=False)
server.request_share_url = lambda *_, **__: None   # a visitor's request would publish the page
server.scene.set_up_direction('+y')
server.scene.add_grid('/floor', plane='xz', infinite_grid=True, cell_color=(229, 232, 237),
                      section_color=(196, 200, 208), fade_distance=30)
server.gui.configure_theme(control_width='large', show_logo=False, show_share_button=False)
server.gui.main_panel.dock_right()
server.initial_camera.fov = 0.7
aim(np.array([[0.0, 0.9, 0.0]]))

# --------------------------------------------------------------------------------------------- page

prompt_box = server.gui.add_text('Prompt', example_prompts[0], multiline=True)
example_menu = server.gui.add_dropdown('Examples', example_prompts)
length_slider = server.gui.add_slider(
    'Seconds', 0.0, pipe.n_max * FRAMES_PER_TOKEN / fps, FRAMES_PER_TOKEN / fps, 0.0,
    hint='0: as long as the length estimator expects')
lowest, highest = LIMITS['seed']
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
    frame_slider = server.gui.add_slider('Frame', 0, 1, 1, 0, hint=f'{fps:g} per second')
    timeline = server.gui.add_html('')
    server.gui.add_html(f'<p style="{TEXT_STYLE}">Dark: calm. Bright: busy (Omega, Eq 8).</p>')
    span_slider = server.gui.add_multi_slider('Span', 0, 1, FRAMES_PER_TOKEN, (0, 0))
with server.gui.add_folder('Edit and export'):
    motion_menu = server.gui.add_dropdown('Motion', ['1'])
    change_box = server.gui.add_text('New prompt', '')
    edit_button = server.gui.add_button('Regenerate the span')
    append_button = server.gui.add_button('Append')
    save_buttons = server.gui.add_button_group('Export', ['GIF', 'BVH', 'npy'])


def action(act):
    """What a button does: act(event) returns a sentence, which appears on the page. A UserError
    appears too, and no other exception ends the server."""
    def press(event):
        with busy, run.autocast():
            try:
                colour, sentence = '#444', act(event)
            except UserError as error:
                colour, sentence = '#c22', error
            except Exception as error:
                traceback.print_exc()
                colour, sentence = '#c22', f'That failed ({repr(error):.200}).'
        sentence = html.escape(str(sentence))
        message.content = f'<p style="{TEXT_STYLE}; color: {colour}">{sentence}</p>'
    return press


@generate_button.on_click
@action
def generate(_):
    start = time.perf_counter()
    text = text_in(prompt_box)
    tokens = generate_tokens(text, variants_slider.value)
    aim(stage([motion_of(ids, text, text) for ids in tokens]))
    span_slider.value = (0, span_slider.max)
    longest = seconds_of(max(len(ids) for ids in tokens))
    took = time.perf_counter() - start
    return f'Done in {took:.2f} s: {longest} of motion.{unknown_actions(text)}'


@edit_button.on_click
@action
def regenerate(_):
    i = selected()
    motion = shown[i]
    text = text_in(change_box)
    first, end = span()
    end = min(end, len(motion.ids))
    where = f'{seconds_of(first)} to {seconds_of(end)}'
    if first >= end:
        raise UserError(f'The span is {where}: drag the ends of its slider around the part to '
                        'change.')
    ids = pipe.edit(motion.ids, [(first, end)], text, seed_box.value, **decoding())
    changed = motion_of(ids, motion.text, f'{motion.caption}, {where}: {text}')
    stage([*shown[:i], changed, *shown[i + 1:]])
    return f'Replaced {where}; the rest is unchanged.{unknown_actions(text)}'


@append_button.on_click
@action
def append(_):
    i = selected()
    motion = shown[i]
    text = text_in(change_box)
    new, = generate_tokens(text, 1)
    ids = pipe.join([motion.ids, new], [motion.text, text], seed_box.value, **decoding())
    longer = motion_of(ids, text, f'{motion.caption} | {text}')
    aim(stage([*shown[:i], longer, *shown[i + 1:]]))
    return f'Added {seconds_of(len(new))}.{unknown_actions(text)}'


@save_buttons.on_click
@action
def save(event):
    motion = shown[selected()]
    kind = save_buttons.value
    slug = re.sub(r'\W+', '-', motion.caption.lower()).strip('-')
    name = f'{slug[:40]}.{kind.lower()}'
    event.client.send_file_download(name, file_of(motion, kind), save_immediately=True)
    return f'{name} is in your downloads.'


@example_menu.on_update
def take_example(_):
    prompt_box.value = example_menu.value


def play():
    """Show frame after frame, forever. A value that no field can have (a client may send any) stops
    the motion until the next one is generated, not the server."""
    problem = ''
    while True:
        start = time.perf_counter()
        try:
            if play_box.value and shown:
                frame_slider.value = (frame_slider.value + 1) % frame_slider.max
            speed = max(speed_slider.min, speed_slider.value)
            rest = 1 / (fps * speed) - (time.perf_counter() - start)
        except Exception as error:
            if problem != repr(error):
                traceback.print_exc()
            problem, rest = repr(error), 0.5
        time.sleep(min(max(0, rest), 1))


for handle in (frame_slider, span_slider, motion_menu):
    handle.on_update(show)
if __name__ == '__main__':
    generate(None)           # the page opens with the first example playing
    with contextlib.suppress(KeyboardInterrupt):
        play()
