"""Prompts in, motion out, in the browser: generate, compare, edit a span, go on, export.

    make app                     # installs viser, then runs the next line
    python app.py config/toy.py
    python app.py --init_from=momask --momask_root=checkpoints

Only this machine can open the page, unless --host says otherwise. Every visitor has a page of their
own, and the browser keeps its motions: they outlast a reload and a restart of the server.
"""
import lib.configurator   # first, to catch Ctrl-C during the imports
import contextlib
import json
import random
import re
import shutil
import socket
import tempfile
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch

import msd
from generate import decoding_of, open_pipeline
from lib.configurator import LIMITS, UserError, configure
from lib.data import FRAMES_PER_TOKEN
from lib.motion import SKELETONS
from lib.page import (DARK, INTRODUCTION, LIGHT, VIEW, action, add_body, body_at, file_of,
                      only_own_page, side_by_side, timelines)
from lib.runtime import read_text, setup
from lib.takes import SUFFIXES, read_features, take_settings
from lib.text import check_prompt

# -----------------------------------------------------------------------------
host = '127.0.0.1'           # '0.0.0.0' opens the page to the whole network
port = 8080                  # 0 takes any free port
examples = 'config/demo_prompts.txt'     # a file with one prompt per line
data = 'toy'
out_dir = ''                 # the checkpoints, '' is out/<data>
seed = 0                     # initial value on the page; so are steps and cond_scale
joints = ''                  # how to read uploaded motion: a json file of joint names
unit = ''                    # m, cm, mm, inch or metres; '' is what fits a body
up = ''                      # the axis that points up; '' finds it
root = ''                    # of a BVH file with several roots: a name, or 1, 2 ...
# machine
device = 'auto'              # 'auto' | 'cpu' | 'cuda'
dtype = 'float32'            # the same motion on every CPU; faster: 'float32' | 'bfloat16' | 'auto'
config = configure(globals(), shared=True)
# -----------------------------------------------------------------------------
try:
    socket.create_server((host or 'no address', port)).close()   # '' would be every address
except (OSError, OverflowError) as error:
    raise UserError(f'The page cannot be served at {host}:{port} ({error}): give another --port, '
                    'or leave --host out.') from None

try:
    import viser
except ImportError:
    raise UserError('app.py needs viser, which is not installed: run `make app`, or `pip install '
                    '-r requirements-app.txt`.') from None

EXPORTS = ['GIF', 'BVH', 'GLB', 'NPY'] + ['MP4'] * bool(shutil.which('ffmpeg'))
MOST_MADE = 20                           # entries of the list of what was made

out_dir = out_dir or f'out/{data}'
reading = take_settings(joints, unit, up, root)
run = setup(device, dtype, seed)
pipe = open_pipeline(config, data, out_dir, run.device)
fps = pipe.meta['fps']
token_seconds = FRAMES_PER_TOKEN / fps
skeleton = SKELETONS[pipe.meta['skeleton']]
lines = read_text(examples, 'expected one prompt per line').splitlines()
example_prompts = [line.partition('#')[0].strip() for line in lines if line.strip()] or ['']
storage_key = f'motions-{pipe.vq.fingerprint()}'   # where the browser keeps what was made
pages = {}   # the Page of each visitor, by the number of the client


def complexity(base):
    """Omega (Eq 8) of base tokens (n,) -> (n,)"""
    f, _ = pipe.mask.spectrum(base[None].to(run.device))
    return msd.complexity(f, pipe.mask.config.omega)[0].cpu().numpy()


# the brightest colour of all timelines is the mean for random tokens
random_tokens = np.random.default_rng(0).integers(pipe.mask.config.n_codes, size=1000)
brightest = complexity(torch.from_numpy(random_tokens)).mean()


def motion_of(ids, parts):
    """Tokens (n, Q) of parts [(text, first, end)], '' for uploaded ones -> a motion of the page."""
    texts = [text for text, *_ in parts]
    colours = matplotlib.colormaps['plasma'](complexity(ids[:, 0]) / brightest)
    return SimpleNamespace(ids=ids, parts=parts, remark=pipe.unseen(' '.join(texts)),
                           caption=' | '.join(text or 'uploaded' for text in texts),
                           body=pipe.joints(ids) / skeleton.units_per_metre,
                           colours=[matplotlib.colors.to_hex(colour) for colour in colours])


class Page:
    """What one visitor sees, and has made."""
    def __init__(self, client):
        self.client, self.scene, self.autocast = client, client.scene, run.autocast
        self.drawing = threading.RLock()   # bodies are either moved or replaced
        self.working = False               # an action is at work
        self.playing = True
        self.made = {}     # every list of motions so far, by title
        self.before = {}   # what was shown before each of them was made, for Undo
        self.shown = []    # one of these lists
        self.bodies = []   # their joints in metres (motions, T, J, 3)
        self.world = self.scene.add_frame('/world', show_axes=False)
        self.disc = self.scene.add_cylinder('/world/disc', 0.45, 0.01, (34, 136, 204),
                                            wxyz=(0.7071, 0.7071, 0, 0), visible=False)
        client.camera.fov = 0.7
        self.add_panel(client.gui)
        self.paint()

    def add_panel(self, gui):
        gui.main_panel.dock_right()
        gui.add_html(INTRODUCTION)
        self.prompt_box = gui.add_text('Prompt', example_prompts[0], multiline=True)
        self.example_menu = gui.add_dropdown('Examples', example_prompts)
        self.generate_button = self.add_button('Generate', self.generate, 'G', 'blue')
        self.texts = {'generate': gui.add_html('')}
        with gui.add_folder('Options', expand_by_default=False):
            self.length_slider = gui.add_slider('Seconds (0: auto)', 0.0,
                                                pipe.n_max * token_seconds, token_seconds, 0.0)
            self.variants_slider = gui.add_slider('Variants', 1, 6, 1, 1)
            self.seed_box = gui.add_number('Seed', seed, min=0, max=LIMITS['seed'][1], step=1)
            self.lock_box = gui.add_checkbox('Lock seed', False, hint='Same seed, same motion')
            self.guidance_slider = gui.add_slider('Guidance', 0.0, max(10.0, cond_scale), 0.5,
                                                  cond_scale)
            self.steps_slider = gui.add_slider('Steps', 1, max(30, steps), 1, steps)
            self.speed_slider = gui.add_slider('Speed', 0.1, 3.0, 0.1, 1.0)
            self.follow_box = gui.add_checkbox('Follow', True, hint='The camera stays near')
            self.dark_box = gui.add_checkbox('Dark', False)
        with gui.add_folder('Timeline'):
            self.strips = gui.add_html('')
            self.time_slider = gui.add_slider('Time (s)', 0.0, 1.0, 1 / fps, 0.0)
            self.motion_slider = gui.add_slider('Selected', 1, 6, 1, 1, visible=False)
            self.play_button = self.add_button('Pause', self.play_or_pause, 'space')
            self.made_menu = gui.add_dropdown('Made so far', ['nothing'])
            self.undo_button = self.add_button('Undo', self.undo, 'Z')
        with gui.add_folder('Edit'):
            self.span_slider = gui.add_multi_slider('Span (s)', 0.0, 1.0, token_seconds, (0.0, 1.0))
            self.change_box = gui.add_text('New prompt', '', hint='For the span, or the end')
            self.edit_button = self.add_button('Edit the span', self.edit, 'E')
            self.append_button = self.add_button('Append at the end', self.append, 'A')
            self.texts['edit'] = gui.add_html('')
        with gui.add_folder('Export and upload', expand_by_default=False):
            self.upload_button = gui.add_upload_button('Upload BVH, npy or npz', color='gray',
                                                       mime_type=','.join(SUFFIXES))
            self.kind_menu = gui.add_dropdown('Format', EXPORTS)
            self.footlock_box = gui.add_checkbox('Lock feet', False, hint='Feet do not slide')
            self.export_button = self.add_button('Export', self.export, 'X')
            self.texts['files'] = gui.add_html('')
        for handle in (self.time_slider, self.span_slider, self.motion_slider, self.follow_box):
            handle.on_update(self.show)
        self.dark_box.on_update(self.paint)
        self.made_menu.on_update(self.draw)
        self.change_box.on_update(lambda _: self.enable(self.working))
        self.example_menu.on_update(self.take_example)
        self.upload_button.on_upload(self.upload)

    def add_button(self, label, press, hotkey, color='gray'):
        button = self.client.gui.add_button(label, color=color, hint=f'Key: {hotkey}')
        self.client.gui.add_command(label, hotkey=hotkey).on_trigger(press)
        button.on_click(press)
        return button

    def take_example(self, _):
        self.prompt_box.value = self.example_menu.value

    def enable(self, working):
        """Disable buttons while one of them works, and until they can do something."""
        idle = bool(self.shown) and not working
        self.generate_button.disabled = self.upload_button.disabled = working
        self.edit_button.disabled = not (idle and self.change_box.value.strip())
        self.append_button.disabled = self.edit_button.disabled
        self.export_button.disabled = self.made_menu.disabled = not idle
        self.undo_button.disabled = not idle or self.made_menu.value == list(self.made)[0]
        self.working = working

    def draw(self, _=None):
        """Show the motions that the menu of those made so far names, side by side."""
        with self.drawing, self.client.atomic():
            self.shown, self.poses = self.made[self.made_menu.value], []
            longest = max(len(motion.body) for motion in self.shown)
            bodies = [motion.body[np.minimum(np.arange(longest), len(motion.body) - 1)]
                      for motion in self.shown]   # a short one holds its last pose
            self.bodies = np.stack(side_by_side(bodies))
            self.motion_slider.value = min(self.motion_slider.value, len(bodies))
            self.motion_slider.max = len(bodies)
            self.motion_slider.visible = self.disc.visible = len(bodies) > 1
            self.scene.remove_click_callback()
            if len(bodies) > 1:
                self.scene.on_click()(self.select_clicked)
            self.time_slider.max = self.span_slider.max = longest / fps
            self.time_slider.value = 0.0
            third = longest // FRAMES_PER_TOKEN // 3 * token_seconds
            self.span_slider.value = (third, longest / fps - third)
            self.paint()
        self.enable(self.working)

    def paint(self, _=None):
        """Draw the scene in the colours of light or dark mode, and let the browser keep all."""
        with self.drawing, self.client.atomic():
            colours = DARK if self.dark_box.value else LIGHT
            self.client.gui.configure_theme(control_width='large', dark_mode=self.dark_box.value,
                                            show_logo=False, show_share_button=False)
            self.scene.add_grid('/world/floor', 60, 60, plane='xz', cell_color=colours['floor'],
                                section_color=colours['shadow'], fade_distance=30)
            self.scene.remove_by_name('/world/motions')
            self.poses = [add_body(self.scene, f'/world/motions/{i}', body, skeleton, colours)
                          for i, body in enumerate(self.bodies, 1)]
            self.show()
            if self.made:
                kept = [(title, [(motion.ids.tolist(), motion.parts) for motion in motions])
                        for title, motions in self.made.items()]
                kept = json.dumps({'made': kept, 'dark': self.dark_box.value})
                self.client.local_storage.set_item(storage_key, kept)

    def show(self, _=None):
        """Draw all at the time of the slider. The camera follows, because the world moves."""
        with self.drawing, self.client.atomic():
            if not self.shown:
                return
            self.frame = min(int(self.time_slider.value * fps + 1e-6), self.bodies.shape[1] - 1)
            selected = self.motion_slider.value
            self.selected = self.shown[selected - 1]
            for number, pose in enumerate(self.poses, 1):
                label = f'{number} (selected)' if number == selected else str(number)
                pose(self.frame, label if len(self.poses) > 1 else '')
            roots = self.bodies[:, :, 0] * [1, 0, 1]
            self.disc.position = roots[selected - 1, self.frame]
            if self.follow_box.value:
                self.world.position = (roots[:, 0] - roots[:, self.frame]).mean(0)
            self.strips.content = timelines(self.shown, selected, self.time_slider.value,
                                            self.span_slider.value, token_seconds)

    def select_clicked(self, event):
        bodies = self.bodies[:, self.frame] + self.world.position
        hit = body_at(bodies, event.ray_origin, event.ray_direction)
        if hit is not None:
            self.motion_slider.value = hit + 1

    def tick(self):
        if self.playing and self.shown:
            later = self.time_slider.value + max(0.1, self.speed_slider.value) / fps
            self.time_slider.value = later % self.time_slider.max

    def play_or_pause(self, _):
        self.playing = not self.playing
        self.play_button.label = 'Pause' if self.playing else 'Play'

    def aim(self):
        """Point the camera at the first poses. A phone has the panel in the lower half."""
        roots = self.bodies[:, 0, 0] + self.world.position
        middle = (roots.min(0) + roots.max(0)) / 2
        distance = 3.5 + 1.2 * np.ptp(roots, axis=0).max()
        if self.client.camera.aspect < 1:
            distance *= 2.1
            middle = middle - [0, 0.22 * distance, 0]
        self.client.camera.position = middle + distance * VIEW
        self.client.camera.look_at = middle

    def add(self, title, motions):
        """Show motions, a new entry of the list of what was made, which the browser keeps."""
        number = 1 + max((int(old.partition(':')[0]) for old in self.made), default=0)
        title = f'{number}: {title:.60}'
        self.before[title] = self.made_menu.value
        self.choose([*self.made.items(), (title, motions)][-MOST_MADE:])

    def choose(self, made):
        """Show the last of the lists of motions, made: [(title, motions)]."""
        self.made = dict(made)
        self.made_menu.value = made[-1][0]   # draws
        self.made_menu.options = list(self.made)

    def undo(self, _):
        if not self.working:
            titles = list(self.made)
            earlier = titles[max(0, titles.index(self.made_menu.value) - 1)]
            before = self.before.get(self.made_menu.value)
            self.made_menu.value = before if before in titles else earlier
            for handle in self.texts.values():
                handle.content = ''

    def decoding(self):
        """The settings for generating tokens, with a new seed unless it is locked."""
        for field in (self.length_slider, self.seed_box, self.guidance_slider, self.steps_slider,
                      self.variants_slider):   # an emptied field reads as 0
            if not field.min <= field.value <= field.max:
                raise UserError(f'{field.label} is {field.value}, expected {field.min} to '
                                f'{field.max}.')
        if self.made and not self.lock_box.value:
            self.seed_box.value = random.randrange(10**6)
        return dict(decoding_of(config), seed=self.seed_box.value, steps=self.steps_slider.value,
                    cond_scale=self.guidance_slider.value)

    def new_tokens(self, text, variants, settings):
        """Motions for a text, of the length that the page asks for -> tokens [(n_i, Q)]."""
        c, role = pipe.encode_text([text] * variants)
        n = torch.full((variants,), round(self.length_slider.value / token_seconds))
        if not n.all():
            n = pipe.lengths(c, role, settings['seed']).cpu()
        ids = pipe.generate(c, role, n, **settings)
        return [row[:k] for row, k in zip(ids, n.tolist())]

    def replace(self, ids, parts, first, end):
        """Show a motion in the place of the selected one, and select what is new, (first, end)."""
        number = self.motion_slider.value
        motions = list(self.shown)
        motions[number - 1] = motion_of(ids, parts)
        self.add(f'{self.change_box.value}, from {first * token_seconds:.1f} s', motions)
        self.time_slider.value = first * token_seconds
        self.span_slider.value = (first * token_seconds, end * token_seconds)

    @action('generate')
    def generate(self):
        start = time.perf_counter()
        text = self.prompt_box.value.strip()
        check_prompt(text, pipe.text_encoder)
        tokens = self.new_tokens(text, self.variants_slider.value, self.decoding())
        self.motion_slider.value = 1
        self.add(text, [motion_of(ids, [(text, 0, len(ids))]) for ids in tokens])
        self.aim()
        longest = max(map(len, tokens)) * token_seconds
        return f'Done in {time.perf_counter() - start:.1f} s: {longest:.1f} s of motion'

    @action('edit')
    def edit(self):
        motion = self.selected
        text = self.change_box.value.strip()
        check_prompt(text, pipe.text_encoder)
        first, end = (round(edge / token_seconds) for edge in self.span_slider.value)
        end = min(end, len(motion.ids))
        where = f'{first * token_seconds:.1f}-{end * token_seconds:.1f} s'
        if not 0 <= first < end:
            raise UserError(f'The span is {where}: drag the ends of its slider around the part to '
                            'change.')
        ids = pipe.edit(motion.ids, [(first, end)], text, **self.decoding())
        before = [(old, a, min(b, first)) for old, a, b in motion.parts if a < first]
        after = [(old, max(a, end), b) for old, a, b in motion.parts if b > end]
        self.replace(ids, [*before, (text, first, end), *after], first, end)
        return f'Replaced {where}; the rest is unchanged'

    @action('edit')
    def append(self):
        motion = self.selected
        text = self.change_box.value.strip()
        check_prompt(text, pipe.text_encoder)
        settings = self.decoding()
        new, = self.new_tokens(text, 1, settings)
        ids = pipe.join([motion.ids, new], [motion.parts[-1][0], text], **settings)
        first, end = len(motion.ids), len(ids)
        self.replace(ids, [*motion.parts, (text, first, end)], first, end)
        return f'Added {len(new) * token_seconds:.1f} s'

    @action('files')
    def upload(self):
        file = self.upload_button.value
        name = Path(file.name).name
        if len(file.content) > 50e6:
            raise UserError(f'{name} has {len(file.content) / 1e6:.0f} MB, expected at most 50.')
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f'motion{Path(name).suffix.lower()}')
            path.write_bytes(file.content)
            try:
                features, notes = read_features(path, reading, pipe.meta)
            except UserError as error:
                raise UserError(str(error).replace(str(path), name)) from None
        ids = pipe.tokenize(features)
        self.motion_slider.value = 1
        self.add(name, [motion_of(ids, [('', 0, len(ids))])])
        self.aim()
        return f'Read {len(ids) * token_seconds:.1f} s: {"; ".join(notes)}'

    @action('files')
    def export(self):
        motion = self.selected
        slug = re.sub(r'\W+', '-', motion.caption.lower()).strip('-')
        name = f'{slug[:40]}.{self.kind_menu.value.lower()}'
        positions = pipe.joints(motion.ids, self.footlock_box.value)
        content = file_of(self.kind_menu.value, positions, motion.caption, skeleton, fps)
        self.client.send_file_download(name, content, save_immediately=True)
        return f'{name} is in your downloads'


with only_own_page(host):
    server = viser.ViserServer(host, port, 'DynMask', verbose=False)
server.request_share_url = lambda *_, **__: None   # a visitor's request would publish the page
server.scene.set_up_direction('+y')
server.on_client_disconnect(lambda client: pages.pop(client.client_id, None))


@server.on_client_connect
def open_page(client):
    """The page opens with what its visitor made before, or with the first example."""
    page = pages[client.client_id] = Page(client)
    try:   # the browser may have kept nothing, or damaged data
        kept = json.loads(client.local_storage.get_item(storage_key, timeout=5))
        page.dark_box.value = kept['dark']
        page.choose([(title, [motion_of(torch.tensor(ids, device=run.device), parts)
                              for ids, parts in motions]) for title, motions in kept['made']])
        page.aim()
    except Exception:
        page.made = {}
        page.generate()


def play():
    """Show frame after frame on all pages, forever. A value that no field can have (a client may
    send any) pauses that client's page."""
    while True:
        start = time.perf_counter()
        for page in list(pages.values()):
            try:
                page.tick()
            except Exception:
                traceback.print_exc()
                page.playing = False
        time.sleep(max(0.005, 1 / fps - (time.perf_counter() - start)))


if __name__ == '__main__':
    with contextlib.suppress(KeyboardInterrupt):
        play()
