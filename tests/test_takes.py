"""takes.py: whatever a file calls its joints, and in whatever unit and axes, the same body comes
out, or one sentence that names the file and the setting that would help."""
import codecs
import json
import re

import numpy as np
import pytest
import torch
from conftest import sentence
from scipy.spatial.transform import Rotation

from lib import toy
from lib.bvh import local_rotations, read_bvh, write_bvh, write_rotations
from lib.motion import SKELETONS, joints_to_features
from lib.takes import AXES, JOINT_NAMES, MAY_BE_MISSING, read_take, take_settings, upright

SMPL, KIT = SKELETONS['smpl22'], SKELETONS['kit21']
MIXAMO = JOINT_NAMES['Mixamo, LAFAN1, MoMask']
CLIP = toy.make_clip(3)['joints'].astype(float)     # (T, 22, 3) metres, y up
OFFSETS, LOCAL, ROOT = local_rotations(CLIP, SMPL, 20, 20)


def first_name(theirs):
    return theirs if isinstance(theirs, str) else theirs[0]


def rename(text, table):
    """A BVH file's text with our joint names -> with those of a table; others become Bone<n>."""
    for number, ours in enumerate(SMPL.names):
        theirs = first_name(table.get(ours, f'Bone{number}'))
        text = re.sub(rf'(ROOT|JOINT) {ours}\n', rf'\1 {theirs}\n', text)
    return text


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    """The text of CLIP as BVH with our names, and the joints that it holds."""
    path = tmp_path_factory.mktemp('plain') / 'a.bvh'
    write_bvh(path, CLIP, SMPL)
    joints = read_take(path).joints
    assert np.abs(joints - CLIP).max() < 0.002
    return path.read_text(), joints


def taken(folder, text, **settings):
    (folder / 'a.bvh').write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_take(folder / 'a.bvh', take_settings(**settings))


def array_of(folder, joints):
    np.save(folder / 'a.npy', joints)
    return folder / 'a.npy'


def bvh_of(folder, local, root, fps=20, scale=100.0, axes=np.eye(3)):
    """A BVH file of CLIP's bones with these rotations and root positions, in another unit and with
    other axes, OFFSETs too; its path."""
    names = [first_name(MIXAMO[name]) for name in SMPL.names]
    write_rotations(folder / 'a.bvh', names, SMPL.parents, scale * OFFSETS @ axes.T,
                    axes @ local @ axes.T, scale * root @ axes.T, fps)
    return folder / 'a.bvh'


def far(joints, wanted):
    """The largest difference in metres."""
    return np.abs(joints - wanted).max()


def known(joints, table):
    return joints[:, [j for j, name in enumerate(SMPL.names) if name in table]]


# ------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize('whose', JOINT_NAMES)
def test_known_names(plain, tmp_path, whose):
    table = JOINT_NAMES[whose]
    text = rename(plain[0], table)
    for variant in (text, re.sub('(ROOT|JOINT) ', r'\1 Actor_01:', text),
                    re.sub('(?:ROOT|JOINT) .*', lambda m: m[0][:5] + m[0][5:].upper(), text)):
        take = taken(tmp_path, variant)
        assert f'found by {whose}' in take.notes[0]
        assert far(known(take.joints, table), known(plain[1], table)) < 1e-6
        assert far(take.joints, plain[1]) < 0.12   # spine and collars between their neighbours


@pytest.mark.parametrize('ours', SMPL.names)
def test_only_spine_neck_and_collars_may_be_missing(plain, tmp_path, ours):
    text = rename(plain[0], dict(MIXAMO, **{ours: 'Strange'}))
    if ours in MAY_BE_MISSING:
        assert far(taken(tmp_path, text).joints, plain[1]) < 0.12
        return
    if ours.endswith('foot'):   # the end site of an ankle may serve
        text = text.replace('End Site', 'End Site tip')
    sentence(lambda: taken(tmp_path, text), 'a.bvh', ours, '--joints')
    (tmp_path / 'map.json').write_text(json.dumps({ours: 'Strange'}))
    assert far(taken(tmp_path, text, joints=tmp_path / 'map.json').joints, plain[1]) < 1e-6


def test_a_joint_under_another_name_is_not_invented(plain, tmp_path):
    """In SOMA's naming LeftLeg is the hip. Here its shins have unknown names."""
    text = rename(plain[0], JOINT_NAMES['SOMA']).replace('Shin', 'Calf')
    sentence(lambda: taken(tmp_path, text), 'a.bvh', 'left_', '--joints')


def test_toes_that_are_end_sites(plain, tmp_path):
    """Biovision's feet end in an end site; here with the toe as the end site of the ankle."""
    table = JOINT_NAMES['Biovision']
    text = rename(plain[0], table)
    frames = read_bvh(('a.bvh', text.encode()))[4]
    text = re.sub(r'JOINT \w+Toe\n\s*{\n\s*(OFFSET .*)\n(.*\n){6}', r'End Site\n{\n\1\n}\n', text)
    columns = np.delete(frames, [15, 16, 17, 27, 28, 29], 1)   # of the two toes
    head, time, _ = text.partition('Frame Time: 0.05000000\n')
    rows = '\n'.join(' '.join(f'{x:.4f}' for x in row) for row in columns)
    take = taken(tmp_path, head + time + rows)
    assert far(known(take.joints, table), known(plain[1], table)) < 1e-6


TWO = {'left_foot': 'LTip', 'right_foot': 'RTip'}


@pytest.mark.parametrize('names, words', [
    (TWO, ()),
    (TWO | {'neck': 'Nek'}, ()),
    ({'left_foot': 'LTip'}, ('right_foot',)),
    ({'left_foot': 'LTip', 'right_foot': 'Rtipp'}, ('right_foot', 'Rtipp')),
    # a wrong joint makes an impossible body
    (TWO | {'left_knee': 'LeftFoot'}, ('--joints',)),
    (TWO | {'left_elbow': 'Head'}, ('--joints',)),
    (TWO | {'right_knee': 'Spine'}, ('--joints',)),
    ({'tail': 'Tail'}, ('map.json',)), (['LTip'], ('map.json',)),
    ({'left_foot': 2.5}, ('map.json',))])
def test_maps_add_to_known_names(plain, tmp_path, names, words):
    text = rename(plain[0], MIXAMO | TWO).replace('End Site', 'End Site tip')
    path = tmp_path / 'map.json'
    path.write_text(json.dumps(names))
    if words:
        sentence(lambda: taken(tmp_path, text, joints=path), *words)
    else:
        take = taken(tmp_path, text, joints=path)
        assert far(take.joints, plain[1]) < 1e-6
        assert take.unused == set(names.values()) - set(TWO.values())


# ---------------------------------------------------------------------------------- unit and axes


@pytest.mark.parametrize('unit, per_metre', [
    ('m', 1), ('cm', 100), ('mm', 1000), ('inch', 1 / 0.0254)])
@pytest.mark.parametrize('size', [0.65, 1, 1.5])   # legs of 0.53 m to 1.22 m
def test_units(plain, tmp_path, unit, per_metre, size):
    scale = size * per_metre
    for path in (bvh_of(tmp_path, LOCAL, ROOT, scale=scale), array_of(tmp_path, scale * CLIP)):
        take = read_take(path, fps=20)
        assert f'{unit}, y up' in take.notes
        assert far(take.joints, size * plain[1]) < (0.02 if unit == 'm' else 0.003)


@pytest.mark.parametrize('per_metre', [20, 0.1, 300, 1e5])
def test_a_size_that_is_nobodys(tmp_path, per_metre):
    for path in (bvh_of(tmp_path, LOCAL, ROOT, scale=per_metre),
                 array_of(tmp_path, per_metre * CLIP)):
        for unit in ('', 'cm'):
            sentence(lambda: read_take(path, take_settings(unit=unit), 20), path.name, '--unit')
    take = read_take(tmp_path / 'a.npy', take_settings(unit=str(1 / per_metre)), fps=20)
    assert far(take.joints, CLIP) < 1e-6


@pytest.mark.parametrize('flip', ([1, 1, 1], [-1, 1, 1], [1, 1, -1]))
@pytest.mark.parametrize('up', AXES)
def test_axes(plain, tmp_path, up, flip):
    """Of BVH any axis may be up, because OFFSETs tell; of arrays y, z or -y. Left-handed axes are
    mirrored back and that is said."""
    axes = upright(np.eye(3), up) @ np.diag(flip)
    for path in (bvh_of(tmp_path, LOCAL, ROOT, axes=axes), array_of(tmp_path, CLIP @ axes.T)):
        settings = take_settings()
        if path.suffix == '.npy' and up not in ('y', 'z', '-y'):
            sentence(lambda: read_take(path, fps=20), 'a.npy', '--up')
            settings = take_settings(up=up)
        take = read_take(path, settings, fps=20)
        assert any('mirrored' in note for note in take.notes) == (np.prod(flip) < 0)
        features = [joints_to_features(x, SMPL, steady=True) for x in (take.joints, plain[1])]
        assert np.abs(np.subtract(*features))[:, :67].max() < 0.01   # the same but for its heading


def test_a_lying_body_stays_lying(tmp_path):
    """With its head in any direction, although z would be up if it stood."""
    z_up = upright(np.eye(3), 'z')
    for turn in (np.eye(3), upright(np.eye(3), '-z') @ z_up, upright(np.eye(3), 'x')):
        fall = turn @ z_up
        fallen = LOCAL.copy()
        fallen[:, 0] = fall @ LOCAL[:, 0]
        take = read_take(bvh_of(tmp_path, fallen, ROOT @ fall.T))
        assert 'cm, y up' in take.notes
        assert far(take.joints, CLIP @ fall.T) < 0.003
    lying = CLIP @ z_up.T
    falls = np.where(np.arange(len(CLIP))[:, None, None] < 20, CLIP, lying)   # stands first
    for joints, wanted, up in (
            (falls, falls, ''), (falls @ z_up.T, falls, ''), (lying, lying, 'y')):
        take = read_take(array_of(tmp_path, joints), take_settings(up=up), fps=20)
        assert far(take.joints, wanted) < 1e-6


def test_upside_down_is_refused(tmp_path):
    for path in (bvh_of(tmp_path, LOCAL, ROOT), array_of(tmp_path, CLIP)):
        sentence(lambda: read_take(path, take_settings(up='-y'), 20), path.name, '--up')


@pytest.mark.parametrize('key, text', [('up', 'w'), ('unit', 'foot'), ('unit', '-1'),
                                       ('unit', 'nan')])
def test_settings_that_nothing_means(key, text):
    sentence(lambda: take_settings(**{key: text}), f'--{key}')


# ----------------------------------------------------------------- what is no human body, T-poses

WAVE = 1 + 0.5 * np.sin(np.arange(len(CLIP)))[:, None, None]
SHIN, FOREARM = ('left_knee', 'left_ankle', 'left_foot'), ('left_elbow', 'left_wrist')


@pytest.mark.parametrize('limb, factor, problem', [
    (SHIN, 1.08, ''), (SHIN, 1.12, 'shin'), (SHIN, 0.88, 'shin'), (SHIN, WAVE, 'shin'),
    (FOREARM, 1.2, ''), (FOREARM, 1.3, 'forearm'), (FOREARM, WAVE, 'forearm')])
def test_limbs(tmp_path, limb, factor, problem):
    """One bone of CLIP is longer, and what is beyond it is moved along."""
    start, end, *_ = moved = [SMPL.names.index(name) for name in limb]
    joints = CLIP.copy()
    joints[:, moved[1:]] += (factor - 1) * (CLIP[:, [end]] - CLIP[:, [start]])
    path = array_of(tmp_path, joints)
    if problem:
        sentence(lambda: read_take(path, fps=20), 'a.npy', problem, '--joints')
    else:
        read_take(path, fps=20)


def test_feet_behind_a_runner(tmp_path):
    """Knees that are bent by 110 degrees turn the toes backwards, but nothing is mirrored."""
    bent = LOCAL.copy()
    bent[:, 4:6] = Rotation.from_euler('x', 110, degrees=True).as_matrix()
    assert not any('mirrored' in note for note in read_take(bvh_of(tmp_path, bent, ROOT)).notes)


@pytest.mark.parametrize('n', [1, 5])
def test_a_t_pose_before_the_motion(tmp_path, n):
    local = np.concatenate([np.tile(np.eye(3), (n, 22, 1, 1)), LOCAL])
    take = read_take(bvh_of(tmp_path, local, np.concatenate([np.zeros((n, 3)), ROOT])))
    assert any('T-pose' in note for note in take.notes)
    assert far(take.joints, CLIP) < 0.003


def test_arms_that_are_lowered_are_motion(tmp_path):
    """From a T-pose, within a second."""
    lowered = np.tile(np.eye(3), (60, 22, 1, 1))
    for joint, degrees in (16, -80), (17, 80):   # the shoulders
        angles = np.linspace(0, degrees, 60)[:, None]
        lowered[:, joint] = Rotation.from_euler('z', angles, degrees=True).as_matrix()
    take = read_take(bvh_of(tmp_path, lowered, np.tile(ROOT[:1], (60, 1)), fps=60))
    assert not any('T-pose' in note for note in take.notes)
    assert len(take.joints) == 20


# ------------------------------------------------------------------------------------------ syntax

SITE = r'(End Site\s*{\s*OFFSET .*)'
SYNTAX = {   # beyond what is in test_bvh.py
    'byte order mark': lambda text: codecs.BOM_UTF8 + text.encode(),
    'utf-16': lambda text: text.encode('utf-16'),
    'old mac': lambda text: text.replace('\n', '\r'),
    'small': str.lower,
    'spaces in names': lambda text: re.sub('(ROOT|JOINT) ', r'\1 Bip01 ', text),
    'comments': lambda text: '# made by hand\n' + re.sub('(OFFSET .*)', r'\1  // cm', text),
    'space before colon': lambda text: re.sub('(Frames|Time):', r'\1 :', text),
    'tabs': lambda text: text.replace('  ', '\t').replace('MOTION', '\tMOTION  '),
    'no spaces at braces': lambda text: re.sub(r'\s*{\s*', '{', text),
    'named end sites': lambda text: text.replace('End Site', 'End Site tip'),
    'one frame too many': lambda text: re.sub('Frames: .*', f'Frames: {len(CLIP) + 1}', text),
    'one frame too few': lambda text: re.sub('Frames: .*', f'Frames: {len(CLIP) - 1}', text),
    'channels at end sites': lambda text: re.sub(SITE, r'\1\nCHANNELS 0', text),
    'channels without values': lambda text: re.sub(
        SITE, r'\1\nCHANNELS 3 Zrotation Xrotation Yrotation', text),
    'a joint without channels': lambda text: text.replace(
        'JOINT Spine\n', 'JOINT Fixed\n{\nOFFSET 0 1 0\nEnd Site\n{\nOFFSET 0 1 0\n}\n}\n'
                         'JOINT Spine\n')}


@pytest.mark.parametrize('kind', SYNTAX)
def test_syntax_that_blender_reads(plain, tmp_path, kind):
    take = taken(tmp_path, SYNTAX[kind](rename(plain[0], MIXAMO)))
    assert far(take.joints, plain[1]) < 1e-6
    assert any('header' in note for note in take.notes) == ('one frame' in kind)


def test_several_roots(plain, tmp_path):
    hierarchy, motion = rename(plain[0], MIXAMO).split('MOTION')
    body = hierarchy.removeprefix('HIERARCHY\n')
    frames, time, *rows = motion.strip().split('\n')

    def file_of(first, second, row):
        values = '\n'.join(row.format(values) for values in rows)
        return f'HIERARCHY\n{first}{second}MOTION\n{frames}\n{time}\n{values}\n'

    two = file_of(body, body.replace('ROOT Hips', 'ROOT B:Hips'), '{0} {0}')
    for root in ('', 'Nobody'):
        sentence(lambda: taken(tmp_path, two, root=root), 'a.bvh', 'B:Hips', '--root')
    for root in ('1', '2', 'B:Hips'):
        assert far(taken(tmp_path, two, root=root).joints, plain[1]) < 1e-6
    sword = 'ROOT Sword\n{\nOFFSET 0 0 0\nCHANNELS 3 Xposition Yposition Zposition\n}\n'
    take = taken(tmp_path, file_of(sword, body, '7 8 9 {}'))   # one of them is a person
    assert far(take.joints, plain[1]) < 1e-6


# ------------------------------------------------------------------------------------------ arrays


def test_arrays(tmp_path):
    more = np.concatenate([CLIP, np.zeros((len(CLIP), 30, 3))], 1)   # SMPL-H has hands after these
    features = joints_to_features(CLIP, SMPL)
    for array, fps in ((CLIP.astype(np.float32), 20), (more, 20), (features, None)):
        joints = read_take(array_of(tmp_path, array), fps=fps).joints
        again = joints_to_features(joints[:len(features)], SMPL)
        assert far(again[:, :67], features[:len(again), :67]) < 0.01

    np.savez(tmp_path / 'a.npz', joints=CLIP, poses=np.zeros((5, 156)), fps=20, gender='neutral')
    np.savez(tmp_path / 'only.npz', positions=CLIP, mocap_framerate=np.array([20.0]))
    for name in ('a.npz', 'only.npz'):
        assert np.array_equal(read_take(tmp_path / name).joints, CLIP)

    (tmp_path / 'map.json').write_text(json.dumps({n: 21 - j for j, n in enumerate(SMPL.names)}))
    numbers = take_settings(joints=tmp_path / 'map.json')
    assert np.array_equal(read_take(array_of(tmp_path, CLIP[:, ::-1]), numbers, 20).joints, CLIP)


@pytest.mark.parametrize('array, fps, words', [
    (CLIP[:, 0], 20, ''), (CLIP * np.nan, 20, ''), (CLIP[:1], 20, ''), (CLIP[:, :15], 20, ''),
    (CLIP, None, '--fps'), (CLIP, 1e5, '--fps')])
def test_arrays_that_are_no_motion(tmp_path, array, fps, words):
    sentence(lambda: read_take(array_of(tmp_path, array), fps=fps), 'a.npy', words)


def test_archives_that_are_no_motion(tmp_path):
    np.savez(tmp_path / 'a.npz', poses=np.zeros((50, 156)), trans=np.zeros((50, 3)))
    sentence(lambda: read_take(tmp_path / 'a.npz', fps=20), 'a.npz', 'joints')
    torch.save({'model': torch.zeros(3)}, tmp_path / 'net.npz')
    sentence(lambda: read_take(tmp_path / 'net.npz', fps=20), 'net.npz')


def test_kit_is_its_own_skeleton(tmp_path):
    """21 joints in millimetres stay those of KIT-ML for its networks."""
    at = {name: CLIP[:, SMPL.names.index(name)] for name in SMPL.names}
    at.update({f'{side}_heel': at[f'{side}_ankle'] * [1, 0.2, 1] for side in ('left', 'right')})
    joints = 1000 * np.stack([at[name] for name in KIT.names], 1)
    take = read_take(array_of(tmp_path, joints), fps=12.5, new_fps=12.5, skeleton=KIT)
    assert far(1000 * take.joints, joints) < 1e-6
    as_smpl = read_take(tmp_path / 'a.npy', fps=20).joints   # collars between their neighbours
    assert np.abs(as_smpl - CLIP)[:, [4, 5, 7, 8, 15, 20, 21]].max() < 1e-6
