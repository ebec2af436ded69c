"""app.py without a browser: these tests fill in its fields and press its buttons."""
import io
import os
import re
import runpy
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PROJECT
from PIL import Image
from test_train import CONFIG, GOLDEN, folder  # noqa: F401 (a fixture)

from lib.bvh import read_bvh
from lib.configurator import UserError


def run_app(folder, *arguments):
    """Run app.py in this process, without its endless loop -> its globals."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, 'argv', ['app.py', *arguments])
        patch.setattr(sys, 'excepthook', sys.excepthook)
        return SimpleNamespace(**runpy.run_path(os.path.join(PROJECT, 'app.py')))


def open_page(folder, *arguments):
    pytest.importorskip('viser', reason='the page needs viser: pip install -r requirements-app.txt')
    (folder / 'prompts.txt').write_text('a person walks 3 steps#40\n')
    page = run_app(folder, '--port=0', f'--examples={folder}/prompts.txt', *arguments)
    os.makedirs(folder / page.out_dir, exist_ok=True)
    return page


def press(page, button):
    """Press a button -> the sentence on the page, and whether it reports an error."""
    button(SimpleNamespace(client=None))
    sentence = re.fullmatch('<p style=".*; color: (#...)">(.*)</p>', page.message.content)
    return sentence[2], sentence[1] == '#c22'


@pytest.fixture(scope='module')
def page(folder):  # noqa: F811
    page = open_page(folder, CONFIG)
    yield page
    page.server.stop()


@pytest.fixture(autouse=True)
def two_motions(request):
    """Start every test of the page with two variants of 40 frames."""
    if 'page' not in request.fixturenames:
        return
    page = request.getfixturevalue('page')
    page.prompt_box.value = 'a person walks 3 steps'
    page.change_box.value = 'a person walks 1 steps'
    page.length_slider.value = 2.0
    page.seed_box.value = 1
    page.steps_slider.value = 4
    page.guidance_slider.value = 2.0
    page.variants_slider.value = 2
    sentence, is_error = press(page, page.generate)
    assert '2.0 s of motion' in sentence and not is_error


def test_generate(page):
    first, second = page.shown
    assert first.joints.shape == second.joints.shape == (40, 22, 3)
    assert not np.array_equal(first.joints, second.joints)
    assert first.omega.shape == (10,) and page.span() == (0, 10)

    press(page, page.generate)
    assert np.array_equal(page.shown[0].joints, first.joints)     # same seed, same motion
    page.seed_box.value = 2
    press(page, page.generate)
    assert not np.array_equal(page.shown[0].joints, first.joints)
    page.length_slider.value = 0.0                                # now the estimator decides
    press(page, page.generate)
    assert all(len(motion.joints) % 4 == 0 for motion in page.shown)
    assert page.server.get_host() == '127.0.0.1'


def test_bodies_move_and_stand_side_by_side(page):
    page.frame_slider.value = 17
    left, right = [motion.joints.copy() for motion in page.shown]
    left[..., 0] -= left[..., 0].min()
    right[..., 0] += left[..., 0].max() + page.GAP - right[..., 0].min()
    parents = page.skeleton.parents
    for name, joints in (('1', left), ('2', right)):
        lines = [page.server.scene.get_handle_by_name(f'/motions/{name}/{part}')
                 for part in range(5)]
        colours = [tuple(np.unique(line.colors.reshape(-1, 3), axis=0)[0]) for line in lines]
        for side in ('left', 'right'):
            line = lines[colours.index(page.SIDE_COLOURS[side])]
            bones = [j for j, joint in enumerate(page.skeleton.names) if joint.startswith(side)]
            expected = np.stack([joints[17, parents[bones]], joints[17, bones]], 1)
            assert np.allclose(line.points, expected, atol=1e-5)


def test_timeline(page):
    """One cell per token; the current one is black, those outside the span are pale."""
    page.frame_slider.value = 13
    page.span_slider.value = (8, 20)
    page.motion_menu.value = '2'
    rows = page.timeline.content.split('linear-gradient')[1:]
    cells = [re.findall(r'(#\w+|black) [\d.]+% [\d.]+%', row) for row in rows]
    assert [len(row) for row in cells] == [10, 10]
    assert all(row[3] == 'black' for row in cells)
    assert [len(cell) for cell in cells[1]] == [9, 9, 7, 5, 7, 9, 9, 9, 9, 9]
    assert {len(cell) for cell in cells[0]} == {5, 7}
    page.motion_menu.value = '1'


def test_edit_changes_the_span_alone(page):
    before = page.shown[1]
    page.motion_menu.value = '2'
    page.span_slider.value = (12, 24)
    sentence, is_error = press(page, page.regenerate)
    assert '0.6 s to 1.2 s' in sentence and not is_error
    ids = page.shown[1].ids
    assert torch.equal(ids[:3], before.ids[:3]) and torch.equal(ids[6:], before.ids[6:])
    assert not torch.equal(ids, before.ids)
    assert page.shown[1].caption == f'{before.caption}, 0.6 s to 1.2 s: a person walks 1 steps'
    page.span_slider.value = (12, 12)
    sentence, is_error = press(page, page.regenerate)
    assert is_error and '0.6 s to 0.6 s' in sentence


def test_append(page):
    before = page.shown[0]
    page.motion_menu.value = '1'
    for n in (80, 120):                      # 120 is longer than what the model was trained on
        sentence, is_error = press(page, page.append)
        assert '2.0 s' in sentence and not is_error
        assert len(page.shown[0].joints) == n == page.frame_slider.max
    assert torch.equal(page.shown[0].ids[:8], before.ids[:8])     # the seam uses two tokens
    assert len(page.shown[1].joints) == 40


@pytest.mark.parametrize('field, value', [
    ('prompt_box', ' \n '), ('prompt_box', '?!'), ('seed_box', -1), ('length_slider', 1e9),
    ('length_slider', float('nan')), ('guidance_slider', -1.0), ('steps_slider', 10**9),
    ('variants_slider', 0)])
def test_nonsense_is_a_sentence(page, field, value):
    before = list(page.shown)
    getattr(page, field).value = value
    sentence, is_error = press(page, page.generate)
    assert is_error and sentence and page.shown == before


@pytest.mark.parametrize('text', ['<script>alert(1)</script>', 'a walk 人走路', 'walk ' * 99, 'walk \0',
                                  '{{a}} ${b} %s #1 | $x$', '人走路'])
def test_any_text_is_a_prompt_or_a_sentence(page, text):
    page.prompt_box.value = page.change_box.value = text
    for button in (page.generate, page.append):
        sentence, is_error = press(page, button)
        assert is_error == (text == '人走路')   # the hash encoder reads English letters only
    assert '<script>' not in page.timeline.content
    assert page.file_of(page.shown[1], 'GIF')[:4] == b'GIF8'


def test_playing_while_a_button_works(page):
    """Frames are drawn all the time, also while motions are replaced."""
    with ThreadPoolExecutor(1) as pool:
        frames = pool.submit(lambda: [page.show() for _ in range(300)])
        for variants in (1, 3, 2):
            page.variants_slider.value = variants
            press(page, page.generate)
        frames.result()


def test_nothing_to_change_or_save(page):
    page.shown.clear()
    for button in (page.regenerate, page.append, page.save):
        sentence, is_error = press(page, button)
        assert is_error and 'Generate' in sentence


def test_no_exception_ends_the_server(page, monkeypatch, capsys):
    """A client may send any value of any field, and handlers may fail."""
    page.motion_menu._impl.value = 'abc'
    page.show()
    for button in (page.regenerate, page.append, page.save):
        sentence, is_error = press(page, button)
        assert is_error and 'abc' in sentence
    page.motion_menu.value = '1'

    monkeypatch.setattr(page.pipe, 'encode_text', lambda prompts: 1 / 0)
    sentence, is_error = press(page, page.generate)
    assert is_error and 'ZeroDivisionError' in sentence
    monkeypatch.undo()

    frames = iter(range(3))

    def sleep(_):
        next(frames)   # StopIteration leaves the loop at the fourth frame

    clock = SimpleNamespace(perf_counter=lambda: 0.0, sleep=sleep)
    monkeypatch.setitem(page.play.__globals__, 'time', clock)
    page.frame_slider.max = 0
    with pytest.raises(StopIteration):
        page.play()
    assert capsys.readouterr().err.count('ZeroDivisionError: ') == 2   # the button, and once here


@pytest.mark.parametrize('origin, host, status', [
    (None, None, 101), ('http://{}', None, 101), ('https://evil.example', None, 403),
    ('http://127.0.0.1:9', None, 403), ('null', None, 403),
    ('http://evil.example', 'evil.example', 403)])   # a name that resolves to 127.0.0.1
def test_other_pages_cannot_connect(page, origin, host, status):
    address = f'127.0.0.1:{page.server.get_port()}'
    request = ['GET / HTTP/1.1', f'Host: {host or address}', 'Connection: Upgrade',
               'Upgrade: websocket', 'Sec-WebSocket-Version: 13',
               'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==']
    if origin:
        request.append('Origin: ' + origin.format(address))
    with socket.create_connection(('127.0.0.1', page.server.get_port()), timeout=5) as connection:
        connection.sendall('\r\n'.join([*request, '', '']).encode())
        assert connection.recv(4096).split()[1] == str(status).encode()


def test_a_visitor_cannot_publish_the_page(page):
    assert page.server.request_share_url() is None and page.server._share_tunnel is None


def test_files(page):
    sent = {}
    client = SimpleNamespace(send_file_download=lambda name, content, save_immediately:
                             sent.update({name: content}))
    for kind in ('GIF', 'BVH', 'npy'):
        page.save_buttons._impl.value = kind
        page.save(SimpleNamespace(client=client))
    motion = page.shown[int(page.motion_menu.value) - 1]
    joints = np.load(io.BytesIO(sent['a-person-walks-3-steps.npy']))
    assert np.array_equal(joints, motion.joints)
    names, *_, fps = read_bvh(('motion', sent['a-person-walks-3-steps.bvh']))
    assert len([name for name in names if not name.endswith('_end')]) == 22 and round(fps) == 20
    assert Image.open(io.BytesIO(sent['a-person-walks-3-steps.gif'])).n_frames > 10


@pytest.mark.parametrize('data', ['t2m', 'kit'])
def test_official_weights(tmp_path, data):
    root = os.path.join(GOLDEN, '..', '..', data, 'momask_checkpoints')
    if not os.path.isdir(root):
        pytest.skip('the reference outputs are not here')
    page = open_page(tmp_path, '--init_from=momask', f'--momask_root={root}',
                     f'--data={data.replace("t2m", "hml3d")}', '--text_encoder=hash', '--steps=2')
    for button in (page.generate, page.append):
        page.change_box.value = 'a man kicks'
        assert not press(page, button)[1]
    assert page.shown[0].joints.shape[1:] == (page.skeleton.n_joints, 3)
    page.server.stop()


@pytest.mark.parametrize('argument', ['--host=8.8.8.8', '--host=', '--port=99999', '--port=-1'])
def test_addresses_that_cannot_be_used(folder, argument):  # noqa: F811
    with pytest.raises(UserError, match='port'):
        open_page(folder, CONFIG, argument)


def test_without_viser(folder, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, 'viser', None)
    with pytest.raises(UserError, match='run `make app`'):
        run_app(folder, CONFIG)
