"""app.py without a browser: clients connect as browsers do, and tests press their buttons."""
import contextlib
import http.client
import io
import os
import re
import runpy
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PROJECT
from test_train import CONFIG, GOLDEN, folder  # noqa: F401 (a fixture)

from lib import toy
from lib.bvh import read_bvh
from lib.configurator import UserError
from lib.page import body_at, side_by_side


def run_app(folder, *arguments):
    """Run app.py in this process, without its endless loop -> its globals."""
    (folder / 'prompts.txt').write_text('a person walks 3 steps#40\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, 'argv', ['app.py', '--port=0', '--examples=prompts.txt', *arguments])
        patch.setattr(sys, 'excepthook', sys.excepthook)
        return SimpleNamespace(**runpy.run_path(os.path.join(PROJECT, 'app.py')))


@contextlib.contextmanager
def visit(app, kept=None):
    """Connect as a browser does, with what it kept -> its Page, opened and paused."""
    import msgspec
    from viser import __version__, _messages, _viser
    from websockets.sync.client import connect
    address, before, kept = f'ws://127.0.0.1:{app.server.get_port()}', set(app.pages), [kept]
    with (pytest.MonkeyPatch.context() as patch,
          connect(address, max_size=None, max_queue=None,
                  subprotocols=[f'viser-v{__version__}']) as browser):
        patch.setattr(_viser.LocalStorageHandle, 'get_item', lambda *_, **__: kept[-1])
        patch.setattr(_viser.LocalStorageHandle, 'set_item', lambda _, key, text: kept.append(text))

        def send(kind, *fields):
            message = getattr(_messages, kind)(*fields).as_serializable_dict()
            browser.send(msgspec.msgpack.encode(message))
        send('ViewerCameraMessage', (1, 0, 0, 0), (0, 0, 5), 0.7, 0.1, 100, 800, 1280, (0, 0, 0),
             (0, 1, 0))
        page, = wait_for(lambda: [page for key, page in list(app.pages.items())
                                  if key not in before and page.shown and not page.working])
        page.playing, page.send, page.kept = False, send, kept
        yield page


def wait_for(condition):
    deadline = time.time() + 10
    while not (found := condition()):
        assert time.time() < deadline
        time.sleep(0.02)
    return found


def press(page, button):
    getattr(page, button)(None)
    content, = [text.content for text in page.texts.values() if text.content]
    color, sentence = re.fullmatch('<p style="[^"]*; (.*)">(.*)</p>', content).groups()
    return sentence, 'e33' in color


@pytest.fixture(scope='module')
def app(folder):  # noqa: F811
    pytest.importorskip('viser', reason='the page needs viser: pip install -r requirements-app.txt')
    app = run_app(folder, CONFIG)
    threading.Thread(target=app.play, daemon=True).start()
    yield app
    app.server.stop()


@pytest.fixture
def page(app):
    """A page with two variants of 40 frames."""
    with visit(app) as page:
        page.change_box.value, page.length_slider.value = 'a person walks 1 steps', 2.0
        page.seed_box.value, page.lock_box.value = 1, True
        page.steps_slider.value, page.variants_slider.value = 4, 2
        sentence, is_error = press(page, 'generate')
        assert '2.0 s of motion' in sentence and not is_error
        yield page


def test_visitors_do_not_share_anything(app, monkeypatch):
    proceed, generate = threading.Event(), app.pipe.generate
    with visit(app) as one, visit(app) as two, ThreadPoolExecutor(2) as pool:
        mine, = two.shown
        assert mine.caption == 'a person walks 3 steps' and two.texts['generate'].content
        assert one.edit_button.disabled and one.undo_button.disabled and not one.disc.visible
        one.change_box.value = 'a person walks 2 steps'
        assert not one.edit_button.disabled and two.edit_button.disabled
        monkeypatch.setattr(app.pipe, 'generate', lambda *args, **settings: (
            proceed.wait(20) and generate(*args, **settings)))
        one.time_slider.value = two.time_slider.value = 0.0
        presses = [pool.submit(button, None) for button in (one.append, two.generate)]
        one.playing = two.playing = True                          # meanwhile
        wait_for(lambda: one.time_slider.value and two.time_slider.value)
        assert one.working and two.working
        proceed.set()
        assert [press.result() for press in presses] == [None, None]
        assert len(one.shown[0].parts) == 2 and list(two.made.values()) == [[mine], two.shown]
    wait_for(lambda: not app.pages)


def test_seeds_undo_and_what_the_browser_keeps(page, app):
    titles, two = list(page.made), page.shown
    press(page, 'generate')
    assert torch.equal(page.shown[0].ids, two[0].ids) and not torch.equal(two[1].ids, two[0].ids)
    page.undo(None)
    page.undo(None)
    assert page.shown is page.made[titles[0]] and page.undo_button.disabled
    page.lock_box.value, page.length_slider.value = False, 0.0    # the estimator decides
    assert not press(page, 'generate')[1] and not torch.equal(page.shown[0].ids, two[0].ids)
    page.undo(None)
    assert page.shown is page.made[titles[0]]   # not what was undone before
    page.made_menu.value = list(page.made)[-1]
    page.dark_box.value = True
    with visit(app, page.kept[-1]) as again:                      # after a reload
        assert list(again.made) == list(page.made) and again.dark_box.value
        assert torch.equal(again.shown[1].ids, page.shown[1].ids)
    with visit(app, '{"dark": false, "made": [["1: x", [[[[1000000]], [["x", 0, 1]]]]]]}') as other:
        assert list(other.made) == ['1: a person walks 3 steps']   # what was kept is damaged


def test_bodies(page, app):
    """Bodies do not touch. A click selects one and puts the disc below it. Dark is colours only."""
    page.time_slider.value = 1.5
    left = [j for j, name in enumerate(app.skeleton.names) if name.startswith('left')]
    line = page.scene.get_handle_by_name('/world/motions/2/2')
    assert np.allclose(line.points[:, 1], page.bodies[1, 30, left], atol=1e-5)
    one, two, three = side_by_side([toy.make_clip(1)['joints']] * 3)
    for left, right in ((one, two), (two, three)):
        assert np.linalg.norm(left[:, :, None] - right[:, None], axis=-1).min() > 0.5
    roots = page.bodies[:, :, 0] * [1, 0, 1]
    moved = (roots[:, 0] - roots[:, 30]).mean(0)
    assert np.allclose(page.world.position, moved, atol=1e-5) and np.abs(moved).max() > 0.01
    page.follow_box.value, page.time_slider.value = False, 0.5
    assert np.allclose(page.world.position, moved, atol=1e-5)     # the world stands still
    for number in (2, 1):
        hip, chest = page.bodies[number - 1, 10, [0, 9]] + moved
        eye = hip + [0, 0, 4]
        page.send('ScenePointerMessage', 'click', tuple(eye), tuple(chest - eye), ((0, 0),), None)
        wait_for(lambda number=number: page.motion_slider.value == number)
        assert page.disc.visible and np.allclose(page.disc.position, roots[number - 1, 10])
    assert body_at(page.bodies[:, 10], (0, 50, 0), (1, 0, 0)) is None
    names = '/world/floor', '/world/motions/1/1'                  # the floor, a head
    light, head = map(page.scene.get_handle_by_name, names)
    page.dark_box.value = True
    dark, dark_head = map(page.scene.get_handle_by_name, names)
    assert np.mean(light.cell_color) > 200 > 100 > np.mean(dark.cell_color)
    assert np.mean(head.colors) < 100 < np.mean(dark_head.colors) and page.time_slider.value == 0.5


def test_edit_append_and_timeline(page, folder, monkeypatch):  # noqa: F811
    """The rest is unchanged; a motion may become longer than what the model was trained on."""
    monkeypatch.chdir(folder)
    other, before = page.shown
    page.motion_slider.value, page.span_slider.value = 2, (0.6, 0.6)
    assert press(page, 'edit')[1]
    page.span_slider.value = (0.6, 1.2)
    assert press(page, 'edit') == ('Replaced 0.6-1.2 s; the rest is unchanged', False)
    ids = page.shown[1].ids
    same = (ids == before.ids).all(1)
    assert same[:3].all() and same[6:].all() and not same[3:6].all()
    assert [part[1:] for part in page.shown[1].parts] == [(0, 3), (3, 6), (6, 10)]
    assert page.motion_slider.value == 2 and np.allclose(page.span_slider.value, (0.6, 1.2))
    page.change_box.value = 'a person walks a <b>tightrope'
    for n in (20, 30):
        assert press(page, 'append') == ('Added 2.0 s', False)
        assert len(page.shown[1].ids) == n and page.time_slider.max == n / 5
    assert torch.equal(page.shown[1].ids[:8], ids[:8]) and page.shown[0] is other
    page.time_slider.value = 4.5
    one, two, rest = re.split('(?:</div>){4}', page.strips.content)
    assert re.findall('<b>(.*?)</b>', two) == ['a person walks a &lt;b&gt;tightrope']
    assert 'outline: ' not in one and re.search('left: 66.67%; width: 33.33%;.*outline', two)
    assert len(re.findall('#[0-9a-f]{6} ', two)) == 30            # one cell per token
    assert 'tightrope' in rest.partition('never seen in training')[2]
    clicks = dict(re.findall(r"slide\('(.*?)', (.*?)\)", two))    # finds sliders by their labels
    assert clicks[page.motion_slider.label] == '2' and '* 6.0' in clicks[page.time_slider.label]


@pytest.mark.parametrize('field, value, fails', [
    ('prompt_box', ' \n ', 1), ('prompt_box', '?!', 1), ('prompt_box', 'walk ' * 999, 1),
    ('prompt_box', '人走路', 1), ('seed_box', -1, 1), ('length_slider', 1e9, 1),
    ('length_slider', float('nan'), 1), ('guidance_slider', -1.0, 1), ('steps_slider', 10**9, 1),
    ('variants_slider', 0, 1), ('prompt_box', '人 {{a}} ${b} %s #1 | $x$ \0', 0)])
def test_any_text_and_nonsense(page, field, value, fails):
    page.playing, before = True, page.shown
    getattr(page, field).value = value
    sentence, is_error = press(page, 'generate')
    assert sentence and is_error == fails and (page.shown is before) == fails and page.playing


def test_no_exception_ends_the_server(page, app, monkeypatch, capsys):
    page.speed_slider._impl.value, page.playing = 'fast', True    # a client may send any value
    wait_for(lambda: not page.playing)
    assert capsys.readouterr().err.count('TypeError: ') == 1
    page.span_slider._impl.value = 'abc'
    assert press(page, 'edit')[1]
    monkeypatch.setattr(app.pipe, 'encode_text', lambda prompts: 1 / 0)
    sentence, is_error = press(page, 'generate')
    assert is_error and 'ZeroDivisionError' in sentence and not page.generate_button.disabled


@pytest.mark.parametrize('headers, status', [
    ({}, 101), ({'Origin': 'http://{}'}, 101), ({'Origin': 'https://evil.example'}, 403),
    ({'Origin': 'http://127.0.0.1:9'}, 403), ({'Origin': 'null'}, 403),
    ({'Origin': 'http://evil.example', 'Host': 'evil.example'}, 403)])   # resolves to 127.0.0.1
def test_other_pages_cannot_connect(app, headers, status):
    address = f'127.0.0.1:{app.server.get_port()}'
    headers = {name: value.format(address) for name, value in headers.items()}
    connection = http.client.HTTPConnection(address, timeout=5)
    connection.request('GET', '/', headers=headers | {
        'Connection': 'Upgrade', 'Upgrade': 'websocket', 'Sec-WebSocket-Version': '13',
        'Sec-WebSocket-Key': 'dGhlIHNhbXBsZSBub25jZQ=='})
    assert connection.getresponse().status == status
    assert app.server.request_share_url() is None   # the page cannot be published


def test_files(page, app, monkeypatch):
    sent = []
    monkeypatch.setattr(page.client, 'send_file_download', lambda *file, **_: sent.append(file))
    for kind, lock in (('GIF', False), ('BVH', False), ('NPY', False), ('NPY', True)):
        page.kind_menu.value, page.footlock_box.value = kind, lock
        assert not press(page, 'export')[1]
    (name, gif), (_, bvh), (_, npy), (_, locked) = sent
    assert name == 'a-person-walks-3-steps.gif' and gif.startswith(b'GIF8')
    names, *_, fps = read_bvh(('motion', bvh))
    assert len([name for name in names if not name.endswith('_end')]) == 22 and round(fps) == 20
    joints, locked = np.load(io.BytesIO(npy)), np.load(io.BytesIO(locked))
    assert np.array_equal(joints, app.pipe.joints(page.shown[0].ids)) and (joints != locked).any()
    np.save(body := io.BytesIO(), toy.make_clip(1)['joints'][:64])
    for name, content in (('bad.bvh', b'?'), ('bad.npy', b''), ('x.exe', b''),
                          ('me.npy', body.getvalue())):
        page.upload_button._impl.value = SimpleNamespace(name=name, content=content)
        sentence, is_error = press(page, 'upload')
        assert is_error == (name != 'me.npy') and 'tmp' not in sentence
    assert 'Read 3.2 s' in sentence and page.shown[0].caption == 'uploaded'
    assert not page.shown[0].remark and not press(page, 'edit')[1]


@pytest.mark.parametrize('data', ['t2m', 'kit'])
def test_official_weights(tmp_path, data):
    pytest.importorskip('viser', reason='viser is not installed: make app')
    root = os.path.join(GOLDEN, '..', '..', data, 'momask_checkpoints')
    if not os.path.isdir(root):
        pytest.skip('the reference outputs are not here')
    app = run_app(tmp_path, '--init_from=momask', f'--momask_root={root}',
                  f'--data={data.replace("t2m", "hml3d")}', '--text_encoder=hash', '--steps=2')
    with visit(app) as page:
        page.change_box.value = 'a man kicks'
        assert not press(page, 'append')[1] and page.bodies.shape[2] == app.skeleton.n_joints
    app.server.stop()


@pytest.mark.parametrize('argument, fact', [
    ('--host=8.8.8.8', 'port'), ('--host=', 'port'), ('--port=99999', 'port'),
    ('--port=-1', 'port'), ('--port=0', 'make app')])
def test_what_prevents_a_start(folder, monkeypatch, argument, fact):  # noqa: F811
    monkeypatch.setitem(sys.modules, 'viser', None)   # is not installed
    with pytest.raises(UserError, match=fact):
        run_app(folder, CONFIG, argument)
