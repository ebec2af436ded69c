"""Files as other people have them (../shared/cases), trials of the CMU database, and what goes out:
BVH and GLB at other frame rates, under file names that every system takes."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from conftest import PROJECT, heed_ctrl_c, in_shared, sentence
from scipy.spatial.transform import Rotation
from test_train import CONFIG, folder, run   # noqa: F401

import prepare_data
from lib import toy
from lib.bvh import bvh_to_joints, fit_rotations, read_bvh, write_bvh
from lib.data import load_meta, load_split
from lib.humanml import cmu_trial, parse_captions
from lib.motion import SKELETONS, features_to_joints
from lib.takes import read_take, take_settings

CASES, needs_cases = in_shared('cases')
CMU, needs_cmu = in_shared('data', 'cmu')
SMPL = SKELETONS['smpl22']


def prepare_folder(src, out):
    prepare_data.main(['folder', f'--src={src}', '--fps=20', f'--out={out}'])


def leg(joints):
    """Median lengths of the left thigh and shin, metres."""
    hip, knee, ankle = (joints[:, SMPL.names.index(f'left_{x}')] for x in ('hip', 'knee', 'ankle'))
    bones = np.stack([hip - knee, knee - ankle])
    return np.median(np.linalg.norm(bones, axis=-1), axis=1)


@needs_cases
@pytest.mark.parametrize('name, joints', [
    ('leg_means_hip', ''), ('named_end_site', ''), ('spaces_in_names', ''), ('t_pose_first', ''),
    ('toe_without_base', ''), ('toe_without_base', 'map_two_joints.json')])
def test_bvh_cases(name, joints):
    """All are the same 60 frames, which leg_means_hip once read with thighs of 7 cm."""
    settings = take_settings(joints=joints and f'{CASES}/{joints}')
    take = read_take(f'{CASES}/{name}.bvh', settings)
    assert take.joints.shape == (60, 22, 3)
    assert np.abs(take.joints - read_take(f'{CASES}/capitals.bvh').joints).max() < 1e-3
    thigh, shin = leg(take.joints)
    assert abs(thigh / shin - 1) < 0.15
    assert any('T-pose' in note for note in take.notes) == (name == 't_pose_first')


@needs_cases
@pytest.mark.parametrize('name, note', [
    ('mixed_units', '2 files: cm'), ('left_handed', 'mirrored')])
def test_folders_of_arrays(tmp_path, capsys, name, note):
    prepare_folder(f'{CASES}/{name}', tmp_path / 'data')
    assert note in capsys.readouterr().out
    for split in load_meta(tmp_path / 'data')[0]['counts']:
        clips = load_split(tmp_path / 'data', split)
        for i in range(len(clips)):
            joints = features_to_joints(np.array(clips.clip(i)), 22)
            assert 0.7 < leg(joints).sum() < 0.9
            assert joints[-1, 0, 2] > 0.5   # they walk to where they face, Z+


@needs_cases
def test_sample_takes_the_cases(folder):   # noqa: F811
    sample = ['sample.py', CONFIG, '--prompt=a person walks 2 steps', '--edit=16:28']
    for name in ('source_cm.npy', 'toe_without_base.bvh'):
        said = run(folder, *sample, f'--source={CASES}/{name}', '--samples_dir=cases')
        assert name in said and ' cm, y up' in said
    said = run(folder, *sample, f'--source={CASES}/two_people.bvh', ok=False)
    assert 'two_people.bvh' in said and '--root' in said
    run(folder, 'sample.py', CONFIG, f'--prompts={CASES}/prompts_na.txt', '--samples_dir=na')
    first, second = sorted((folder / 'na').glob('*.npy'))
    assert (first.name[:3], second.name[:3]) == ('000', '001')
    assert len(np.load(first)) == 60   # the other is as long as estimated


@needs_cmu
@pytest.mark.parametrize('name, frames', [('01_01', 459), ('12_01', 88)])
def test_trials_of_cmu(name, frames):
    """Human size, on their feet, faces forward, and no T-pose; 12_01 fits its clip to the frame."""
    take = read_take(f'{CMU}/{name}.bvh')
    assert any('T-pose' in note for note in take.notes)
    assert len(take.joints) == frames
    assert 0.75 < leg(take.joints).sum() < 0.85
    assert -0.05 < take.joints[:, [7, 8, 10, 11], 1].min() < 0.1   # the floor
    assert 1.2 < np.median(take.joints[:, 15, 1]) < 1.7            # the head


@needs_cmu
@pytest.mark.parametrize('zipped', [False, True])
def test_cmu_with_captions_of_humanml3d(tmp_path, zipped, capsys):
    clone, out = tmp_path / 'HumanML3D', tmp_path / 'data' / 'cmu'
    inner = clone / 'HumanML3D' if zipped else clone
    (inner / 'texts').mkdir(parents=True)
    shutil.copy(f'{CMU}/index.csv', clone)
    walks = 'a man walks left.#a/DET man/NOUN walk/VERB left/ADV#0.0#0.0\n'
    texts = {'000801': walks + 'he walks on#he/PRON walk/VERB on/ADV#1.0#3.5\n',
             'M000801': walks.replace('left', 'right'), '002510': walks.replace('man', 'man\xe9')}
    for name, text in texts.items():
        (inner / 'texts' / f'{name}.txt').write_bytes(text.encode('cp1252'))
    if zipped:
        shutil.make_archive(inner / 'texts', 'zip', inner, 'texts')
        shutil.rmtree(inner / 'texts')
    for split, names in dict(train='000801 M000801 000002', val='002510', test='004041').items():
        (inner / f'{split}.txt').write_text(names.replace(' ', '\n'))

    command = ['cmu', f'--src={CMU}', f'--texts={clone}', f'--out={out}']
    prepare_data.main(command)
    assert 'skipped 2,910' in capsys.readouterr().out   # clips of trials that are not there
    train, val = load_split(out, 'train'), load_split(out, 'val')
    assert train.names.tolist() == ['000801-1', '000801', 'M000801']
    assert train.length.tolist() == [50, 87, 87]
    assert val.length.tolist() == [199]
    assert 'test' not in load_meta(out)[0]['counts']   # 004041 has no text
    assert val.captions[0]['text'] == 'a man\xe9 walks left.'
    one, mirrored = (features_to_joints(np.array(train.clip(i)), 22) for i in (1, 2))
    assert np.abs(one[:, SMPL.swap] * [-1, 1, 1] - mirrored).max() < 0.02
    assert one[-1, 0, 2] > 3   # walks forward

    os.remove(clone / 'index.csv')
    sentence(lambda: prepare_data.main(command), 'HumanML3D', 'index.csv')


@pytest.mark.parametrize('path, trial', [
    ('CMU/12/12_01_poses.npy', '12_01'), ('CMU/18_19_Justin/18_08_poses.npy', '18_08'),
    ('CMU/18_19_rory/18_08_poses.npy', '19_08'), ('CMU/20_21_Justin1/20_11_poses.npy', '20_11'),
    ('KIT/3/kick_high_left02_poses.npy', '')])
def test_names_of_trials(path, trial):
    assert cmu_trial(f'./pose_data/{path}') == trial


# -------------------------------------------------------------------------------------------- out


@pytest.mark.parametrize('fps', [30, 60])
def test_other_frame_rates_keep_the_bones(tmp_path, fps):
    joints = toy.make_clip(4)['joints']
    write_bvh(tmp_path / 'a.bvh', joints, SMPL, 20, fps)
    names, parents, offsets, channels, frames, found = read_bvh(tmp_path / 'a.bvh')
    assert round(found, 3) == fps
    order = [names.index(name) for name in SMPL.names]
    back = bvh_to_joints(parents, offsets, channels, frames)[:, order]
    assert len(back) == (len(joints) - 1) * fps // 20 + 1
    bones = np.linalg.norm(back - back[:, SMPL.parents], axis=-1)
    assert np.ptp(bones, axis=0).max() < 1e-2   # centimetres
    common = back[::fps // 10][:len(joints[::2])]   # every other frame is in all rates
    assert np.abs(common / 100 - joints[::2]).max() < 0.002


def test_glb(tmp_path):
    """The nodes and the animation, played by this test, give the fitted body."""
    gl = pytest.importorskip('pygltflib', reason='pygltflib is not installed')
    from lib.gltf import write_glb
    joints = toy.make_clip(4)['joints'].astype(float)
    path = tmp_path / 'a.glb'
    write_glb(path, joints, SMPL, 20, 60)
    gltf = gl.GLTF2().load(str(path))

    def array(number):
        accessor = gltf.accessors[number]
        view = gltf.bufferViews[accessor.bufferView]
        width = dict(SCALAR=1, VEC3=3, VEC4=4, MAT4=16)[accessor.type]
        kind = {gl.FLOAT: '<f4', gl.UNSIGNED_BYTE: 'u1', gl.UNSIGNED_SHORT: '<u2'}
        return np.frombuffer(gltf.binary_blob(), kind[accessor.componentType],
                             accessor.count * width, view.byteOffset).reshape(-1, width)

    animation, = gltf.animations
    times = array(animation.samplers[0].input)[:, 0]
    assert np.allclose(times, np.arange(3 * (len(joints) - 1) + 1) / 60)
    values = {(channel.target.node, channel.target.path):
              array(animation.samplers[channel.sampler].output) for channel in animation.channels}
    assert [node.name for node in gltf.nodes[:22]] == list(SMPL.names)
    world = {0: (Rotation.from_quat(values[0, 'rotation']), values[0, 'translation'])}
    for j in range(22):
        turn, place = world[j]
        for child in gltf.nodes[j].children or []:
            local = Rotation.from_quat(values[child, 'rotation'])
            world[child] = turn * local, place + turn.apply(gltf.nodes[child].translation)
    played = np.stack([world[j][1] for j in range(22)], 1)
    assert np.abs(played[::3] - fit_rotations(joints, SMPL)[2]).max() < 1e-4
    binds = array(gltf.skins[0].inverseBindMatrices).reshape(-1, 4, 4)
    assert np.allclose(binds[:, 3, 1].min(), -1.6, atol=0.3)   # the head, above the floor
    body = gltf.meshes[0].primitives[0].attributes
    assert array(body.JOINTS_0).max() < 22
    assert abs(array(body.POSITION)[:, 1].min()) < 0.1   # at human size
    assert 1.5 < array(body.POSITION)[:, 1].max() < 2


def test_names_of_samples(folder):   # noqa: F811
    """ASCII, at most 100 bytes, and no file of another motion or of the source is overwritten."""
    prompts = ['a person walks 走る', 'sie läuft ' + 'very ' * 60, 'a person walks']
    (folder / 'names.txt').write_text('\n'.join(f'{p}#40' for p in prompts), encoding='utf-8')

    def sampled(*settings):
        said = run(folder, 'sample.py', CONFIG, '--samples_dir=names', '--prompts=names.txt',
                   *settings)
        assert 'Glyph' not in said
        return {path.name: path.read_bytes() for path in (folder / 'names').iterdir()}

    first = sampled()
    assert all(re.fullmatch(r'[\w.-]{1,100}', name, re.ASCII) for name in first)
    assert len([name for name in first if name.endswith('.npy')]) == 3
    assert sampled().keys() == first.keys()   # the same motions
    before = sampled('--temperature=0.3')
    after = sampled('--seed=7')
    assert first.items() <= before.items() <= after.items()
    assert any('_s7.' in name for name in after)


# ------------------------------------------------------------------------------- what is left alone


def toy_folder(path, *captions):
    path.mkdir(parents=True)
    for i in range(4):
        np.save(path / f't{i}.npy', toy.make_clip(i)['joints'])
    (path / 'captions.csv').write_bytes(b'\n'.join(captions))


@pytest.mark.parametrize('mark', [b',', b';', b'\t'])
def test_forms_of_captions(tmp_path, mark, capsys):
    toy_folder(tmp_path / 'src', b'file' + mark + b'caption', b't0.npy' + mark + b'\x8f!', *[
        f'./t{i}.npy'.encode() + mark + b'a man\xe9 waves' for i in range(4)])   # cp1252
    prepare_folder(tmp_path / 'src', tmp_path / 'mine')
    train = load_split(tmp_path / 'mine', 'train')
    assert {caption['text'] for caption in train.captions} == {'a man\xe9 waves'}
    assert 'skipped 1: caption that no text encoder reads' in capsys.readouterr().out


def test_captions_that_no_encoder_reads(tmp_path):
    toy_folder(tmp_path / 'src', 't0,человек идёт'.encode(), 't1,человек идёт'.encode())
    sentence(lambda: prepare_folder(tmp_path / 'src', tmp_path / 'mine'),
             '4 of them without a caption', 'letter a to z')
    skipped = Counter()
    assert parse_captions('человек идёт#человек/NOUN#0.0#0.0'.encode(), skipped) == []
    assert 'letter a to z' in next(iter(skipped))


@pytest.mark.parametrize('name', ['../../x', '/etc/passwd', '..', r'..\x'])
def test_split_lists_hold_names_not_paths(tmp_path, name):
    for part in ('new_joint_vecs', 'texts'):
        (tmp_path / 'src' / part).mkdir(parents=True)
    (tmp_path / 'src' / 'train.txt').write_text(f'000001\n{name}\n')
    command = ['hml3d', f'--src={tmp_path}/src', f'--out={tmp_path}/out']
    sentence(lambda: prepare_data.main(command), 'train.txt')


def test_only_our_own_files_are_replaced(tmp_path):
    src, out, link = tmp_path / 'src', tmp_path / 'mine', tmp_path / 'link'
    toy_folder(src, b't0,a man waves')
    prepare_folder(src, out)
    np.save(out / 'tokens_abc_train.npy', np.zeros(3))   # a cache of training
    prepare_folder(src, out)
    assert not (out / 'tokens_abc_train.npy').exists()

    (out / 'thesis.txt').write_text('years of work')
    sentence(lambda: prepare_folder(src, out), 'mine', 'thesis.txt')
    os.remove(out / 'thesis.txt')
    link.symlink_to(out)
    inside = out / 'tokens_src.npy'   # a folder with a name like ours
    shutil.move(src, inside)
    for source, target in ((inside, link), (inside, tmp_path / '..'), (inside, out), (out, out)):
        sentence(lambda: prepare_folder(source, target), '--out')
    assert (inside / 't0.npy').exists()


def test_an_interruption_leaves_nothing(tmp_path):
    command = [sys.executable, os.path.join(PROJECT, 'prepare_data.py'), 'toy',
               f'--out={tmp_path}/data/toy']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=heed_ctrl_c)
    while not list(tmp_path.glob('data/.preparing-*/new/*')) and process.poll() is None:
        time.sleep(0.1)
    time.sleep(1)   # workers are being forked, where Python ignores exceptions
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b'Traceback' not in said
    assert os.listdir(tmp_path / 'data') == []
