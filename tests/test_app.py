"""app.py without a browser: clients connect as browsers do, and tests press their buttons."""
import contextlib
import http.client
import io
import json
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
from PIL import Image
from test_train import CONFIG, GOLDEN, folder  # noqa: F401 (a fixture)

from lib import toy
from lib.bvh import read_bvh
from lib.configurator import UserError
from lib.page import side_by_side


def run_app(folder, *arguments):
    """Run app.py in this process, without its endless loop -> its globals."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, 'argv', ['app.py', *arguments])
        patch.setattr(sys, 'excepthook', sys.excepthook)
        return SimpleNamespace(**runpy.run_path(os.path.join(PROJECT, 'app.py')))


def open_app(folder, *arguments):
    pytest.importorskip('viser', reason='the page needs viser: pip install -r requirements-app.txt')
    (folder / 'prompts.txt').write_text('a person walks 3 steps#40\n')
    return run_app(folder, '--port=0', f'--examples={folder}/prompts.txt', *arguments)


@contextlib.contextmanager
def visit(app, kept=None):
    """Connect as a browser does, with what it kept -> its Page, opened and paused."""
    msgspec, viser = pytest.importorskip('msgspec'), pytest.importorskip('viser')
    from websockets.sync.client import connect
    camera = viser._messages.ViewerCameraMessage(
        (1, 0, 0, 0), (0, 0, 5), 0.7, 0.1, 100, 800, 1280, (0, 0, 0), (0, 1, 0))
    before = set(app.pages)
    storage = viser._viser.LocalStorageHandle
    address = f'ws://127.0.0.1:{app.server.get_port()}'
    with (pytest.MonkeyPatch.context() as patch,
          connect(address, max_size=None, subprotocols=[f'viser-v{viser.__version__}']) as browser):
        patch.setattr(storage, 'get_item', lambda *_, **__: json.dumps(kept))
        threading.Thread(target=read_all, args=[browser], daemon=True).start()
        browser.send(msgspec.msgpack.encode(camera.as_serializable_dict()))
        page = wait_for(lambda: [page for key, page in list(app.pages.items())
                                 if key not in before and page.shown and not page.working])[0]
        page.playing = False
        yield page


def read_all(browser):
    with contextlib.suppress(Exception):   # the connection ends
        for _ in browser:
            pass


def wait_for(condition):
    for _ in range(500):
        if found := condition():
            return found
        time.sleep(0.02)
    raise TimeoutError


def press(button, place):
    """Press a button -> the sentence on the page, and whether it reports an error."""
    button(None)
    color, sentence = re.fullmatch('<p style="[^"]*; (.*)">(.*)</p>', place.content).groups()
    return sentence, 'd33' in color


@pytest.fixture(scope='module')
def app(folder):  # noqa: F811
    app = open_app(folder, CONFIG)
    yield app
    app.server.stop()


@pytest.fixture
def page(app):
    """A page with two variants of 40 frames."""
    with visit(app) as page:
        for field, value in dict(change_box='a person walks 1 steps', length_slider=2.0, seed_box=1,
                                 lock_box=True, steps_slider=4, variants_slider=2).items():
            getattr(page, field).value = value
        sentence, is_error = press(page.generate, page.generate_text)
        assert '2.0 s of motion' in sentence and not is_error
        yield page


def test_the_page_opens_alive(app):
    with visit(app) as page:
        assert [motion.caption for motion in page.shown] == ['a person walks 3 steps']
        assert 'Done in' in page.generate_text.content
        assert page.edit_button.disabled and page.undo_button.disabled
        assert not page.export_button.disabled
        page.change_box.value = 'a person walks'
        assert not page.edit_button.disabled
        before = page.time_slider.value
        page.playing = True
        page.tick()
        assert page.time_slider.value > before


def test_visitors_do_not_share_anything(app):
    with visit(app) as one, visit(app) as two:
        one.prompt_box.value = 'a person walks'
        one.change_box.value = 'a person walks 2 steps'
        mine = two.shown
        with ThreadPoolExecutor(2) as pool:      # at the same time
            list(pool.map(lambda button: button(None), [one.append, two.generate]))
        assert len(one.shown[0].parts) == 2 and len(two.shown[0].parts) == 1
        assert one.made.keys() != two.made.keys() and two.made['1: a person walks 3 steps'] is mine
        assert two.prompt_box.value == 'a person walks 3 steps'
        assert one.scene is not two.scene
    wait_for(lambda: not app.pages)


def test_seeds(page):
    first = page.shown
    assert len(first) == 2 and not torch.equal(first[0].ids, first[1].ids)
    press(page.generate, page.generate_text)
    assert torch.equal(page.shown[0].ids, first[0].ids)           # same seed, same motion
    page.lock_box.value = False
    page.length_slider.value = 0.0                                # the estimator decides
    assert not press(page.generate, page.generate_text)[1]
    assert page.seed_box.value != 1 and not torch.equal(page.shown[0].ids, first[0].ids)


def test_undo_and_what_the_browser_keeps(page, app):
    titles = list(page.made)
    two, first = page.shown, page.made[titles[0]]
    page.undo(None)
    assert page.shown is first and page.made_menu.value == titles[0] and page.undo_button.disabled
    kept = [(title, [(motion.ids.tolist(), motion.parts) for motion in motions])
            for title, motions in page.made.items()]
    with visit(app, kept) as again:                               # after a reload
        assert list(again.made) == titles and torch.equal(again.shown[1].ids, two[1].ids)
    with visit(app, [('1: x', [([[10**6] * 4], [('x', 0, 1)])])]) as other:   # damaged
        assert other.shown[0].caption == 'a person walks 3 steps'


def test_bodies_move_and_do_not_touch(page, app):
    page.time_slider.value = 0.85
    left = [j for j, name in enumerate(app.skeleton.names) if name.startswith('left')]
    line = page.scene.get_handle_by_name('/world/motions/2/2')
    assert np.allclose(line.points[:, 1], page.bodies[1, 17, left], atol=1e-5)
    one, two, three = side_by_side([toy.make_clip(1)['joints']] * 3)
    for left, right in ((one, two), (two, three)):
        assert np.linalg.norm(left[:, :, None] - right[:, None], axis=-1).min() > 0.5


def test_timeline(page, folder, monkeypatch):  # noqa: F811
    """The current part is bold, the span of the selected motion has an outline, and words that
    training never had are named."""
    monkeypatch.chdir(folder)
    page.motion_menu.value = '2'
    page.change_box.value = 'a person walks a <b>tightrope'
    press(page.append, page.edit_text)
    page.time_slider.value = 2.5
    one, two = page.strips.content.split('2 (selected): ')
    assert re.findall('<b>(.*?)</b>', two) == ['a person walks a &lt;b&gt;tightrope']
    assert 'outline: ' not in one and 'left: 50.00%; width: 50.00%; outline' in two
    assert len(re.findall('#[0-9a-f]{6} ', two)) == 20            # one cell per token
    assert 'tightrope' in two.split('<i>')[1] and 'tightrope' not in one


def test_edit_and_append(page):
    """The rest is unchanged; a motion may become longer than what the model was trained on."""
    other, before = page.shown
    page.motion_menu.value = '2'
    page.span_slider.value = (0.6, 0.6)
    assert press(page.edit, page.edit_text)[1]
    page.span_slider.value = (0.6, 1.2)
    assert press(page.edit, page.edit_text) == ('Replaced 0.6-1.2 s; the rest is unchanged', False)
    ids = page.shown[1].ids
    assert torch.equal(ids[:3], before.ids[:3]) and torch.equal(ids[6:], before.ids[6:])
    assert not torch.equal(ids, before.ids)
    assert [part[1:] for part in page.shown[1].parts] == [(0, 3), (3, 6), (6, 10)]
    assert page.motion_menu.value == '2' and np.allclose(page.span_slider.value, (0.6, 1.2))
    for n in (20, 30):
        assert press(page.append, page.edit_text) == ('Added 2.0 s', False)
        assert len(page.shown[1].ids) == n and page.time_slider.max == n / 5
    assert torch.equal(page.shown[1].ids[:8], ids[:8]) and page.shown[0] is other


@pytest.mark.parametrize('field, value', [
    ('prompt_box', ' \n '), ('prompt_box', '?!'), ('prompt_box', 'walk ' * 999),
    ('prompt_box', '人走路'), ('seed_box', -1), ('length_slider', 1e9),
    ('length_slider', float('nan')), ('guidance_slider', -1.0), ('steps_slider', 10**9),
    ('variants_slider', 0)])
def test_nonsense_is_a_sentence(page, field, value):
    before = page.shown
    getattr(page, field).value = value
    sentence, is_error = press(page.generate, page.generate_text)
    assert is_error and sentence and page.shown is before


def test_playing_while_a_button_works(page):
    """Frames are drawn also while motions are replaced. Any text is a prompt."""
    with ThreadPoolExecutor(1) as pool:
        frames = pool.submit(lambda: [page.show() for _ in range(100)])
        for variants, text in ((1, 'a walk 人走路'), (3, 'walk \0'), (2, '{{a}} ${b} %s #1 | $x$')):
            page.variants_slider.value = variants
            page.prompt_box.value = text
            assert not press(page.generate, page.generate_text)[1]
        frames.result()


def test_no_exception_ends_the_server(page, app, monkeypatch, capsys):
    """A client may send any value of any field, and handlers may fail."""
    page.motion_menu._impl.value = 'abc'
    for button in (page.edit, page.append):
        assert press(button, page.edit_text)[1]
    monkeypatch.setattr(app.pipe, 'encode_text', lambda prompts: 1 / 0)
    sentence, is_error = press(page.generate, page.generate_text)
    assert is_error and 'ZeroDivisionError' in sentence and not page.generate_button.disabled
    monkeypatch.undo()

    frames = iter(range(3))

    def sleep(_):
        next(frames)   # StopIteration leaves the loop at the fourth frame

    clock = SimpleNamespace(perf_counter=lambda: 0.0, sleep=sleep)
    monkeypatch.setitem(app.play.__globals__, 'time', clock)
    page.playing = True
    page.speed_slider._impl.value = 'fast'
    with pytest.raises(StopIteration):
        app.play()
    assert capsys.readouterr().err.count('TypeError: ') == 1 and not page.playing


@pytest.mark.parametrize('origin, host, status', [
    (None, None, 101), ('http://{}', None, 101), ('https://evil.example', None, 403),
    ('http://127.0.0.1:9', None, 403), ('null', None, 403),
    ('http://evil.example', 'evil.example', 403)])   # a name that resolves to 127.0.0.1
def test_other_pages_cannot_connect(app, origin, host, status):
    address = f'127.0.0.1:{app.server.get_port()}'
    connection = http.client.HTTPConnection(address, timeout=5)
    connection.putrequest('GET', '/', skip_host=True)
    headers = {'Host': host or address, 'Connection': 'Upgrade', 'Upgrade': 'websocket',
               'Sec-WebSocket-Version': 13, 'Sec-WebSocket-Key': 'dGhlIHNhbXBsZSBub25jZQ==',
               **({'Origin': origin.format(address)} if origin else {})}
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().status == status
    assert app.server.request_share_url() is None   # the page cannot be published
    connection.close()


def test_files(page, app, monkeypatch):
    """What is exported, and what is uploaded and can be edited."""
    sent = {}
    monkeypatch.setattr(page.client, 'send_file_download',
                        lambda name, content, save_immediately: sent.update({name: content}))
    name = 'a-person-walks-3-steps'
    for kind in ('GIF', 'BVH', 'NPY'):
        page.kind_menu.value = kind
        assert not press(page.export, page.files_text)[1]
    joints = app.pipe.joints(page.shown[0].ids)
    assert np.array_equal(np.load(io.BytesIO(sent[f'{name}.npy'])), joints)
    names, *_, fps = read_bvh(('motion', sent[f'{name}.bvh']))
    assert len([name for name in names if not name.endswith('_end')]) == 22 and round(fps) == 20
    assert Image.open(io.BytesIO(sent[f'{name}.gif'])).n_frames > 10
    page.footlock_box.value = True
    press(page.export, page.files_text)
    assert not np.array_equal(np.load(io.BytesIO(sent[f'{name}.npy'])), joints)

    body = io.BytesIO()
    np.save(body, toy.make_clip(1)['joints'][:64])
    for name, content in (('bad.bvh', b'?'), ('bad.npy', b''), ('x.exe', b''),
                          ('me.npy', body.getvalue())):
        page.upload_button._impl.value = SimpleNamespace(name=name, content=content)
        sentence, is_error = press(page.upload, page.files_text)
        assert is_error == (name != 'me.npy') and 'tmp' not in sentence
    assert 'Read 3.2 s' in sentence and page.shown[0].caption == 'uploaded'
    assert not page.shown[0].remark and not press(page.edit, page.edit_text)[1]


@pytest.mark.parametrize('data', ['t2m', 'kit'])
def test_official_weights(tmp_path, data):
    root = os.path.join(GOLDEN, '..', '..', data, 'momask_checkpoints')
    if not os.path.isdir(root):
        pytest.skip('the reference outputs are not here')
    app = open_app(tmp_path, '--init_from=momask', f'--momask_root={root}',
                   f'--data={data.replace("t2m", "hml3d")}', '--text_encoder=hash', '--steps=2')
    with visit(app) as page:
        page.change_box.value = 'a man kicks'
        assert not press(page.append, page.edit_text)[1]
        assert page.bodies.shape[2] == app.skeleton.n_joints
    app.server.stop()


@pytest.mark.parametrize('argument', ['--host=8.8.8.8', '--host=', '--port=99999', '--port=-1'])
def test_addresses_that_cannot_be_used(folder, argument):  # noqa: F811
    with pytest.raises(UserError, match='port'):
        open_app(folder, CONFIG, argument)


def test_without_viser(folder, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, 'viser', None)
    with pytest.raises(UserError, match='run `make app`'):
        run_app(folder, CONFIG)
