"""What the page (app.py) is made of, apart from its fields and buttons: a body in a viser scene, a
timeline as HTML, files to download, and the check of who connects."""
import contextlib
import html
import os
import re
import tempfile
import threading
import traceback
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
TEXT_STYLE = 'margin: 0.3em 0.8em; font-size: 0.85em'
busy = threading.Lock()                  # one action at a time, for all visitors


def paragraph(text, style=''):
    return f'<p style="{TEXT_STYLE}; {style}">{html.escape(str(text))}</p>'


# viser has no setting for the title of the browser's tab
INTRODUCTION = (f'<p style="{TEXT_STYLE}">Write what a person does, then <b>Generate</b> (key G).'
                '<img src="x" style="display: none" onerror="document.title = \'DynMask\'"></p>')
LEGEND = paragraph('Dark: calm. Bright: busy (Omega, Eq 8). Blue outline: the span to edit.',
                   'opacity: 0.7')


def action(place):
    """A decorator for what a button does: the method returns a sentence, which appears in the
    page's text `place`. A UserError appears too, and no other exception ends the server."""
    def decorate(method):
        def press(page, _=None):
            if page.working:
                return
            text = getattr(page, place)
            text.content = paragraph('Working ...')
            page.enable(working=True)
            with busy, page.autocast():
                try:
                    text.content = paragraph(method(page))
                except UserError as error:
                    text.content = paragraph(error, 'color: #d33')
                except Exception as error:
                    traceback.print_exc()
                    text.content = paragraph(f'That failed ({repr(error):.200}).', 'color: #d33')
            page.enable(working=False)
        return press
    return decorate


def add_body(scene, name, joints, skeleton):
    """Draw joints (T, J, 3) in metres as thick lines in the GIFs' colours, above a shadow and the
    path of the root. Returns pose(t, label), which moves them to a frame."""
    bones = np.stack([joints[:, skeleton.parents[1:]], joints[:, 1:]], axis=2)
    sides = [joint.split('_')[0] for joint in skeleton.names[1:]]
    sides = np.array([side if side in SIDE_COLOURS else 'middle' for side in sides])
    neck, skull = bones[:, skeleton.names.index('head') - 1].swapaxes(0, 1)
    face = skull[:, None, None] + [[[0.25], [0.35]]] * (skull - neck)[:, None, None]
    parts = [(bones * [1, 0, 1], SHADOW, LIMB), (face, SIDE_COLOURS['middle'], HEAD)]
    parts += [(bones[:, sides == side], colour, LIMB) for side, colour in SIDE_COLOURS.items()]
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
    """Joints of several bodies [(T, J, 3)] in metres -> the same, moved apart from left to right,
    so that they never touch."""
    moved = []
    edge = -np.inf
    for joints in bodies:
        places = joints @ ACROSS
        shift = max(0, (edge - places.min(1)).max() + GAP)
        edge = places.max(1) + shift
        moved.append(joints + shift * ACROSS)
    return moved


def timeline(label, parts, remark, colours, now, span, width):
    """A motion's texts, parts [(text, first, end)], with that of the current part in bold; below
    them the colours of its tokens, a mark at the token `now`, and an outline around `span`, a pair
    (first, end) or None. width: a share of the page."""
    n = len(colours)
    texts = [html.escape(text or 'uploaded') for text, _, _ in parts]
    texts = [f'<b>{text}</b>' if first <= now < end else text
             for text, (_, first, end) in zip(texts, parts)]
    stops = [f'{colour} {t / n:.2%} {(t + 1) / n:.2%}' for t, colour in enumerate(colours)]
    marks = [(now, now + 0.3, 'background: #e33; margin: -3px 0')]
    if span:
        marks.append((span[0], min(span[1], n), 'outline: 2px solid #28c'))
    marks = [f'<div style="position: absolute; inset: 0; left: {first / n:.2%}; '
             f'width: {(end - first) / n:.2%}; {style}"></div>'
             for first, end, style in marks if first < min(n, end)]
    return (f'<div style="{TEXT_STYLE}">{label and f"{label}: "}{" | ".join(texts)}'
            f'<div style="position: relative; height: 16px; margin: 4px 0; width: {width:.2%}; '
            f'background: linear-gradient(90deg, {", ".join(stops)})">{"".join(marks)}</div>'
            f'<i>{html.escape(remark)}</i></div>')


def file_of(kind, joints, caption, skeleton, fps):
    """Joints (T, J, 3) in the skeleton's unit -> the bytes of a file: 'GIF', 'MP4', 'BVH', 'GLB' or
    'NPY'. UserError where a program or package for it is missing."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f'motion.{kind.lower()}')
        if kind == 'NPY':
            np.save(path, joints)
        elif kind == 'BVH':
            write_bvh(path, joints, skeleton, fps)
        elif kind == 'GLB':
            write_glb(path, joints, skeleton, fps)
        else:
            gif = os.path.join(folder, 'motion.gif')
            draw_gif(joints, gif, caption, fps)
            if kind == 'MP4' and not gif_to_mp4(gif):
                raise UserError('MP4 needs ffmpeg, which is not installed or failed.')
        with open(path, 'rb') as f:
            return f.read()


def is_own_page(headers, host):
    """Does a request come from this page, or from a program that is no browser? Otherwise any web
    site that is open in a browser on this machine could connect and press buttons. An attacker's
    host name may resolve to 127.0.0.1, so a loopback server also accepts its own names only."""
    address = headers.get('Host', '')
    if host in LOOPBACK and re.sub(r':\d+$', '', address) not in LOOPBACK:
        return False
    return headers.get('Origin', f'http://{address}').partition('://')[2] == address


@contextlib.contextmanager
def only_own_page(host):
    """A server that viser starts in this context checks the Origin, which viser does not ask for.
    """
    from websockets.asyncio import server   # comes with viser
    serve = server.serve

    def serve_own_page(handler, *args, process_request, **more):
        def check(connection, request):
            if not is_own_page(request.headers, host):
                return connection.respond(403, 'This address serves its own page only.\n')
            return process_request(connection, request)
        return serve(handler, *args, process_request=check, **more)

    with mock.patch.object(server, 'serve', serve_own_page):
        yield
