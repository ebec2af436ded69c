"""What the page (app.py) is made of, apart from its fields and buttons: a body in a viser scene, a
timeline as HTML, files to download, and the check of who connects."""
import contextlib
import html
import re
import tempfile
import threading
import traceback
from pathlib import Path
from unittest import mock

import numpy as np

from lib.bvh import write_bvh
from lib.configurator import UserError
from lib.draw import HEAD, LIMB, PATH, SHADOW, SIDE_COLOURS, draw_gif, gif_to_mp4
from lib.gltf import write_glb

LOOPBACK = ('127.0.0.1', 'localhost', '::1', '[::1]')
VIEW = np.array([0.45, 0.35, 0.8])       # direction from the look-at point to the camera
ACROSS = np.array([0.87, 0.0, -0.49])    # from left to right in that view
GAP = 0.6                                # metres between bodies
LIGHT = {'floor': (229, 232, 237), 'shadow': SHADOW, **SIDE_COLOURS}
DARK = {**LIGHT, 'floor': (54, 57, 64), 'shadow': (84, 88, 98), 'middle': (205, 209, 218)}
TEXT_STYLE = 'margin: 0.3em 0.8em; font-size: 0.85em'
busy = threading.Lock()                  # one action at a time, for all visitors


def paragraph(text, style=''):
    return f'<p style="{TEXT_STYLE}; {style}">{html.escape(str(text))}</p>'


# viser has no setting for the title of the browser's tab, and its HTML cannot call back. A click on
# a strip therefore moves the slider with a certain label, as the mouse would.
SCRIPT = html.escape("""
document.title = 'DynMask'
window.slide = (name, value) => {
    const label = [...document.querySelectorAll('label')].find(label => label.textContent == name)
    const root = document.getElementById(label?.htmlFor)
    const thumb = root?.querySelector('[role=slider]')
    if (!thumb) return
    root.focus = () => {}   // which would scroll to the slider
    const {ariaValueMin: low, ariaValueMax: high, parentElement: track} = thumb
    const {left, width} = track.getBoundingClientRect()
    const place = {bubbles: true, clientX: left + width * (value - low) / (high - low)}
    for (const type of ['mousedown', 'mouseup']) track.dispatchEvent(new MouseEvent(type, place))
}""")
INTRODUCTION = (f'<p style="{TEXT_STYLE}">Write what a person does, then <b>Generate</b> (key G).'
                f'<img src="x" style="display: none" onerror="{SCRIPT}"></p>')
LEGEND = paragraph('Click on a strip or a body. Dark: calm, bright: busy (Omega, Eq 8). Blue: the '
                   'span to edit.', 'opacity: 0.7')


def action(place):
    """A decorator for what a button does: the method returns a sentence, which appears in
    page.texts[place]. A UserError appears too, and no other exception ends the server."""
    def decorate(method):
        def press(page, _=None):
            if page.working:
                return
            for name, handle in page.texts.items():
                handle.content = paragraph('Working ...') if name == place else ''
            text = page.texts[place]
            page.enable(working=True)
            with busy, page.autocast():
                try:
                    text.content = paragraph(method(page))
                except Exception as error:
                    if not isinstance(error, UserError):
                        traceback.print_exc()
                        error = f'That failed ({repr(error):.200}).'
                    text.content = paragraph(error, 'color: #e33')
            page.enable(working=False)
        return press
    return decorate


def add_body(scene, name, joints, skeleton, colours):
    """Draw joints (T, J, 3) in metres as thick lines, above a shadow and the path of the root.
    Returns pose(t, label), which moves them to a frame."""
    bones = np.stack([joints[:, skeleton.parents[1:]], joints[:, 1:]], axis=2)
    sides = [joint.split('_')[0] for joint in skeleton.names[1:]]
    sides = np.array([side if side in SIDE_COLOURS else 'middle' for side in sides])
    neck, skull = bones[:, skeleton.names.index('head') - 1].swapaxes(0, 1)
    face = skull[:, None, None] + [[[0.25], [0.35]]] * (skull - neck)[:, None, None]
    parts = [(bones * [1, 0, 1], colours['shadow'], LIMB), (face, colours['middle'], HEAD)]
    parts += [(bones[:, sides == side], colours[side], LIMB) for side in SIDE_COLOURS]
    lines = [scene.add_line_segments(f'{name}/{i}', points[0], colour, thickness=thickness)
             for i, (points, colour, thickness) in enumerate(parts)]
    path = np.stack([joints[:-1, 0], joints[1:, 0]], axis=1) * [1, 0, 1]
    scene.add_line_segments(f'{name}/path', path, PATH, thickness=LIMB / 2)
    sign = scene.add_label(f'{name}/label', '', anchor='bottom-center')

    def pose(t, label):
        for line, (points, _, _) in zip(lines, parts):
            line.points = points[t]
        sign.position = skull[t] + [0, 1.5 * HEAD, 0]
        sign.visible = bool(label)
        sign.text = label
    return pose


def side_by_side(bodies):
    """Joints of bodies [(T, J, 3)] in metres -> the same, moved apart so that they never touch."""
    moved = bodies[:1]
    for joints in bodies[1:]:
        gap = (joints @ ACROSS).min(1) - (moved[-1] @ ACROSS).max(1)
        moved.append(joints + max(0, GAP - gap.min()) * ACROSS)
    return moved


def body_at(bodies, origin, direction):
    """Which of the bodies (N, J, 3), in metres, a ray passes through: its index or None."""
    away = np.cross(bodies - origin, direction / np.linalg.norm(direction))
    distance = np.linalg.norm(away, axis=2).min(axis=1)
    return int(distance.argmin()) if distance.min() < 0.3 else None


def timelines(motions, selected, now, span, token_seconds):
    """The texts of each motion, the current part in bold, above a strip in the colours of its
    tokens, with a mark at the time `now`. The motion with the number `selected` has an outline
    around `span`, (first, end) in seconds. A click on a strip goes to that motion and time."""
    rows, captions = [], set()
    now, *span = np.array([now, *span]) / token_seconds
    longest = max(len(motion.colours) for motion in motions)
    for number, motion in enumerate(motions, 1):
        texts = [html.escape(text or 'uploaded') for text, _, _ in motion.parts]
        texts = [f'<b>{text}</b>' if first <= now < end else text
                 for text, (_, first, end) in zip(texts, motion.parts)]
        if motion.caption in captions:   # variants have the same
            texts = []
        captions.add(motion.caption)
        n = len(motion.colours)
        marks = [(now, now, 'width: 3px; background: currentColor; margin: -3px 0')]
        if number == selected:
            marks.append((*span, 'outline: 2px solid #28c'))
        marks = [f'<div style="position: absolute; inset: 0 auto; left: {a / n:.2%}; width: '
                 f'{(min(b, n) - a) / n:.2%}; pointer-events: none; {style}"></div>'
                 for a, b, style in marks if a < n]
        stops = [f'{colour} {t / n:.2%} {(t + 1) / n:.2%}'
                 for t, colour in enumerate(motion.colours)]
        click = (f"slide('Selected', {number}); "
                 f"slide('Time (s)', event.offsetX / this.offsetWidth * {n * token_seconds})")
        rows.append(f"""
            <div style="{TEXT_STYLE}">{' | '.join(texts)}
            <div style="display: flex; gap: 0.5em">{number if len(motions) > 1 else ''}
            <div style="flex: 1"><div onpointerdown="{click}" onpointermove="if (event.buttons)
                {{ {click} }}" style="position: relative; height: 16px; width: {n / longest:.2%};
                margin: 4px 0; cursor: pointer; user-select: none; touch-action: none;
                background: linear-gradient(90deg, {', '.join(stops)})">{''.join(marks)}
            </div></div></div></div>""")
    remarks = dict.fromkeys(motion.remark for motion in motions if motion.remark)
    return ''.join([*rows, *map(paragraph, remarks), LEGEND])


def file_of(kind, joints, caption, skeleton, fps):
    """Joints (T, J, 3) in the skeleton's unit -> the bytes of a file: 'GIF', 'MP4', 'BVH', 'GLB' or
    'NPY'. UserError where a program or package for it is missing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f'motion.{kind.lower()}')
        if kind == 'NPY':
            np.save(path, joints)
        elif kind == 'BVH':
            write_bvh(path, joints, skeleton, fps)
        elif kind == 'GLB':
            write_glb(path, joints, skeleton, fps)
        else:
            gif = f'{folder}/motion.gif'
            draw_gif(joints, gif, caption, fps)
            if kind == 'MP4' and not gif_to_mp4(gif):
                raise UserError('MP4 needs ffmpeg, which is not installed or failed.')
        return path.read_bytes()


@contextlib.contextmanager
def only_own_page(host):
    """A server that viser starts in this context refuses the pages of other web sites: a browser on
    this machine could have one open. An attacker's host name may resolve to 127.0.0.1, so a
    loopback server also accepts its own names only. Programs other than browsers may connect."""
    from websockets.asyncio import server   # comes with viser
    serve = server.serve

    def serve_own_page(handler, *args, process_request, **more):
        def check(connection, request):
            address = request.headers.get('Host', '')
            origin = request.headers.get('Origin', f'http://{address}')
            is_own = host not in LOOPBACK or re.sub(r':\d+$', '', address) in LOOPBACK
            if is_own and origin.partition('://')[2] == address:
                return process_request(connection, request)
            return connection.respond(403, 'This address serves its own page only.\n')
        return serve(handler, *args, process_request=check, **more)

    with mock.patch.object(server, 'serve', serve_own_page):
        yield
