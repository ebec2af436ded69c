"""takes.py: whatever a file calls its joints, and in whatever unit and axes, the same body comes
out, or one sentence that names the file and the setting that would help."""
import codecs
import json
import os
import re

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from test_bvh import tiny

from lib import toy
from lib.bvh import local_rotations, read_bvh, write_bvh, write_rotations
from lib.configurator import UserError
from lib.motion import SKELETONS, joints_to_features
from lib.takes import AXES, JOINT_NAMES, MAY_BE_MISSING, read_take, take_settings

SMPL = SKELETONS['smpl22']
KIT = SKELETONS['kit21']
MIXAMO = JOINT_NAMES['Mixamo, LAFAN1, MoMask']
CLIP = toy.make_clip(3)['joints'].astype(float)     # (T, 22, 3) metres, y up


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
    return path.read_text(), read_take(path).joints


def taken(folder, text, name='a.bvh', **settings):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_take(path, take_settings(**settings))


def refused(folder, text, *words, **settings):
    """One sentence that names the file and holds these words."""
    with pytest.raises(UserError, match='a.bvh') as error:
        taken(folder, text, **settings)
    assert '\n' not in str(error.value)
    for word in words:
        assert word in str(error.value)


def known(table):
    return [j for j, name in enumerate(SMPL.names) if name in table]


def test_round_trip_is_the_clip(plain):
    assert np.abs(plain[1] - CLIP).max() < 0.002


# ------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize('whose', JOINT_NAMES)
def test_known_names(plain, tmp_path, whose):
    table = JOINT_NAMES[whose]
    text = rename(plain[0], table)
    for variant in (text, re.sub('(ROOT|JOINT) ', r'\1 Actor_01:', text),
                    re.sub('(?:ROOT|JOINT) .*', lambda m: m[0][:5] + m[0][5:].upper(), text)):
        take = taken(tmp_path, variant)
        assert f'found by {whose}' in take.notes[0]
        error = np.abs(take.joints - plain[1])
        assert error[:, known(table)].max() < 1e-6
        assert error.max() < 0.12   # spine and collars between their neighbours


@pytest.mark.parametrize('ours', SMPL.names)
def test_only_spine_neck_and_collars_may_be_missing(plain, tmp_path, ours):
    names = dict(MIXAMO, **{ours: 'Strange'})
    text = rename(plain[0], names).replace('LeftFoot', 'left_foot')
    text = re.sub('(JOINT|ROOT) left_foot', r'\1 LeftFoot', text)
    if ours in MAY_BE_MISSING:
        assert np.abs(taken(tmp_path, text).joints - plain[1]).max() < 0.12
    elif ours.endswith('foot'):   # the end site of an ankle may serve
        refused(tmp_path, text.replace('End Site', 'End Site tip'), ours, '--joints')
    else:
        refused(tmp_path, text, ours, '--joints')
        (tmp_path / 'map.json').write_text(json.dumps({ours: 'Strange'}))
        take = taken(tmp_path, text, joints=tmp_path / 'map.json')
        assert np.abs(take.joints - plain[1]).max() < 1e-6


def test_a_joint_under_another_name_is_not_invented(plain, tmp_path):
    """In SOMA's naming LeftLeg is the hip. Here its shins have unknown names."""
    text = rename(plain[0], JOINT_NAMES['SOMA'])
    assert np.abs(taken(tmp_path, text).joints - plain[1]).max() < 1e-6
    refused(tmp_path, text.replace('LeftShin', 'LeftCalf').replace('RightShin', 'RightCalf'),
            'left_', '--joints')


def test_toes_that_are_end_sites(plain, tmp_path):
    """Biovision's feet end in an end site; here with the toe as the end site of the ankle."""
    text = rename(plain[0], JOINT_NAMES['Biovision'])
    for side in ('Left', 'Right'):
        toe = re.search(rf'JOINT {side}Toe\n\s*{{\n\s*(OFFSET .*)\n(.*\n){{6}}', text)
        site = f'End Site\n{{\n{toe[1]}\n}}\n}}\n'
        text = text.replace(toe[0], site.replace('}\n}\n', '}\n'))
    head, rows = text.split('Frame Time: 0.05000000\n')
    names, *_, frames, _ = read_bvh(tiny(rename(plain[0], JOINT_NAMES['Biovision'])))
    columns = np.delete(frames, [15, 16, 17, 27, 28, 29], 1)   # of the two toes
    rows = '\n'.join(' '.join(f'{x:.4f}' for x in row) for row in columns)
    assert [names[4], names[9]] == ['LeftToe', 'RightToe']
    take = taken(tmp_path, f'{head}Frame Time: 0.05000000\n{rows}\n')
    there = known(JOINT_NAMES['Biovision'])
    assert np.abs(take.joints - plain[1])[:, there].max() < 1e-6


def test_maps(plain, tmp_path):
    text = rename(plain[0], dict(MIXAMO, left_foot='LTip', right_foot='RTip'))
    text = text.replace('End Site', 'End Site tip')

    def with_map(content, *words):
        (tmp_path / 'map.json').write_text(content)
        if words:
            refused(tmp_path, text, *words, joints=tmp_path / 'map.json')
        else:
            return taken(tmp_path, text, joints=tmp_path / 'map.json')

    assert np.abs(with_map('{"left_foot": "LTip", "right_foot": "RTip"}').joints
                  - plain[1]).max() < 1e-6   # two names are enough
    with_map('{"left_foot": "LTip"}', 'right_foot')
    with_map('{"left_foot": "LTip", "right_foot": "Rtipp"}', 'right_foot', 'Rtipp')
    assert with_map('{"left_foot": "LTip", "right_foot": "RTip", "neck": "Nek"}').unused == {'Nek'}
    # a wrong joint makes an impossible body
    for wrong in ('{"left_foot": "LTip", "right_foot": "RTip", "left_knee": "LeftFoot"}',
                  '{"left_foot": "LTip", "right_foot": "RTip", "left_elbow": "Head"}',
                  '{"left_foot": "tip", "right_foot": "RTip", "right_knee": "Spine"}'):
        with_map(wrong, '--joints')
    for bad in ('{"tail": "Tail"}', '["LTip"]', '{"left_foot": 2.5}'):
        (tmp_path / 'map.json').write_text(bad)
        with pytest.raises(UserError, match='map.json'):
            take_settings(joints=tmp_path / 'map.json')


# ---------------------------------------------------------------------------------- unit and axes


def bvh_of(folder, scale=100.0, axes=None, fps=20, joints=CLIP):
    """A BVH file of these joints in another unit and with other axes, OFFSETs too; its path."""
    axes = np.eye(3) if axes is None else axes
    offsets, local, root = local_rotations(joints, SMPL, 20, fps)
    write_rotations(folder / 'a.bvh', [first_name(MIXAMO[name]) for name in SMPL.names],
                    SMPL.parents, scale * offsets @ axes.T, axes @ local @ axes.T,
                    scale * root @ axes.T, fps)
    return folder / 'a.bvh'


def axes_of(up):
    """The matrix from y up to `up` up, without a change of handedness."""
    rows = np.zeros((3, 3))
    for row, axis in zip(rows, AXES[up].split()):
        row['xyz'.index(axis[-1])] = -1 if axis[0] == '-' else 1
    return rows.T


@pytest.mark.parametrize('unit, per_metre', [
    ('m', 1), ('cm', 100), ('mm', 1000), ('inch', 1 / 0.0254)])
@pytest.mark.parametrize('size', [0.65, 1, 1.5])   # legs of 0.53 m to 1.22 m
def test_units(plain, tmp_path, unit, per_metre, size):
    np.save(tmp_path / 'a.npy', size * per_metre * CLIP)
    for path in (bvh_of(tmp_path, size * per_metre), tmp_path / 'a.npy'):
        take = read_take(path, fps=20)
        assert f'{unit}, y up' in take.notes
        assert np.abs(take.joints - size * plain[1]).max() < (0.02 if unit == 'm' else 0.003)


@pytest.mark.parametrize('per_metre', [20, 0.1, 300, 1e5])
def test_a_size_that_is_nobodys(tmp_path, per_metre):
    np.save(tmp_path / 'a.npy', per_metre * CLIP)
    for path in (bvh_of(tmp_path, per_metre), tmp_path / 'a.npy'):
        with pytest.raises(UserError, match=f'{path.name} .*--unit'):
            read_take(path, fps=20)
        with pytest.raises(UserError, match=f'{path.name} .*--unit'):
            read_take(path, take_settings(unit='cm'), fps=20)
    take = read_take(tmp_path / 'a.npy', take_settings(unit=str(1 / per_metre)), fps=20)
    assert np.abs(take.joints - CLIP).max() < 1e-6


@pytest.mark.parametrize('flip', ([1, 1, 1], [-1, 1, 1], [1, 1, -1]))
@pytest.mark.parametrize('up', AXES)
def test_axes(plain, tmp_path, up, flip):
    """Of BVH any axis may be up, because OFFSETs tell; of arrays y, z or -y. Left-handed axes are
    mirrored back and that is said."""
    axes = axes_of(up) @ np.diag(flip)
    np.save(tmp_path / 'a.npy', CLIP @ axes.T)
    for path in (bvh_of(tmp_path, axes=axes), tmp_path / 'a.npy'):
        if path.suffix == '.npy' and up not in ('y', 'z', '-y'):
            with pytest.raises(UserError, match='a.npy .*--up'):
                read_take(path, fps=20)
            take = read_take(path, take_settings(up=up), fps=20)
        else:
            take = read_take(path, fps=20)
        assert any('mirrored' in note for note in take.notes) == (np.prod(flip) < 0)
        turned = joints_to_features(take.joints, SMPL, steady=True)
        wanted = joints_to_features(plain[1], SMPL, steady=True)
        assert np.abs(turned - wanted)[:, :67].max() < 0.01   # the same but for its heading


def test_a_lying_body_stays_lying(tmp_path):
    """With its head in any direction, although z would be up if it stood."""
    lying = CLIP @ axes_of('z').T
    for turn in (np.eye(3), axes_of('-z') @ axes_of('z'), axes_of('x')):
        offsets, local, root = local_rotations(CLIP, SMPL, 20, 20)
        fall = turn @ axes_of('z')
        local[:, 0] = fall @ local[:, 0]
        write_rotations(tmp_path / 'a.bvh', [first_name(MIXAMO[name]) for name in SMPL.names],
                        SMPL.parents, 100 * offsets, local, 100 * root @ fall.T, 20)
        take = read_take(tmp_path / 'a.bvh')
        assert 'cm, y up' in take.notes
        assert np.abs(take.joints - CLIP @ fall.T).max() < 0.003
    # arrays: stands first, then lies
    falls = np.where(np.arange(len(CLIP))[:, None, None] < 20, CLIP, lying)
    for axes in (np.eye(3), axes_of('z')):
        np.save(tmp_path / 'a.npy', falls @ axes.T)
        assert np.abs(read_take(tmp_path / 'a.npy', fps=20).joints - falls).max() < 1e-6
    np.save(tmp_path / 'a.npy', lying)
    take = read_take(tmp_path / 'a.npy', take_settings(up='y'), fps=20)
    assert np.abs(take.joints - lying).max() < 1e-6


def test_upside_down_is_refused(tmp_path):
    np.save(tmp_path / 'a.npy', CLIP)
    with pytest.raises(UserError, match='a.npy .*--up'):
        read_take(tmp_path / 'a.npy', take_settings(up='-y'), fps=20)
    for settings in (dict(up='w'), dict(unit='foot'), dict(unit='-1'), dict(unit='nan')):
        with pytest.raises(UserError, match=f'--{list(settings)[0]}'):
            take_settings(**settings)


# ---------------------------------------------------------------------------------- the T-pose


def test_a_t_pose_before_the_motion(tmp_path):
    offsets, local, root = local_rotations(CLIP, SMPL, 20, 60)
    names = [first_name(MIXAMO[name]) for name in SMPL.names]
    for n in (1, 5):
        local_t = np.concatenate([np.tile(np.eye(3), (n, 22, 1, 1)), local])
        root_t = np.concatenate([np.tile(0.0 * root[:1], (n, 1)), root])
        write_rotations(tmp_path / 'a.bvh', names, SMPL.parents, 100 * offsets, local_t,
                        100 * root_t, 60)
        take = read_take(tmp_path / 'a.bvh')
        assert any('T-pose' in note for note in take.notes)
        assert np.abs(take.joints - CLIP).max() < 0.003
    # a motion that begins with the arms held out, and lowers them within a second, is not cut
    lowered = np.tile(np.eye(3), (60, 22, 1, 1))
    for side, sign in ('left', -1), ('right', 1):
        angles = sign * np.linspace(0, 80, 60)[:, None]
        turns = Rotation.from_euler('z', angles, degrees=True).as_matrix()
        lowered[:, SMPL.names.index(f'{side}_shoulder')] = turns
    write_rotations(tmp_path / 'a.bvh', names, SMPL.parents, 100 * offsets, lowered,
                    np.tile(100 * root[:1], (60, 1)), 60)
    take = read_take(tmp_path / 'a.bvh')
    assert not any('T-pose' in note for note in take.notes)
    assert len(take.joints) == 20


# ------------------------------------------------------------------------------------------ syntax

SYNTAX = {
    'byte order mark': lambda text: codecs.BOM_UTF8 + text.encode(),
    'utf-16': lambda text: text.encode('utf-16'),
    'crlf': lambda text: text.replace('\n', '\r\n'),
    'old mac': lambda text: text.replace('\n', '\r'),
    'capitals': lambda text: text.upper(),
    'small': lambda text: text.lower(),
    'spaces in names': lambda text: re.sub('(ROOT|JOINT) ', r'\1 Bip01 ', text),
    'comments': lambda text: '# made by hand\n' + re.sub('(OFFSET .*)', r'\1  // cm', text),
    'space before colon': lambda text: re.sub('(Frames|Time):', r'\1 :', text),
    'tabs': lambda text: text.replace('  ', '\t').replace('MOTION', '\tMOTION  '),
    'braces in line': lambda text: re.sub(r'\n\s*{', ' {', text).replace('JOINT', '\nJOINT'),
    'no spaces at braces': lambda text: re.sub(r'\s*{\s*', '{', text),
    'named end sites': lambda text: text.replace('End Site', 'End Site tip'),
    'one frame too many': lambda text: re.sub('Frames: .*', f'Frames: {len(CLIP) + 1}', text),
    'one frame too few': lambda text: re.sub('Frames: .*', f'Frames: {len(CLIP) - 1}', text),
    'no newline at the end': str.strip,
    'empty lines': lambda text: text.replace('\n', '\n\n') + '\n \n',
    'scientific': lambda text: text.replace(' 0.0000 ', ' -1.5e-9 '),
    'channels at end sites': lambda text: re.sub(r'(End Site\s*{\s*OFFSET .*)', r'\1\nCHANNELS 0',
                                                 text),
    'channels without values': lambda text: re.sub(
        r'(End Site\s*{\s*OFFSET .*)', r'\1\nCHANNELS 3 Zrotation Xrotation Yrotation', text),
    'a joint without channels': lambda text: text.replace(
        'JOINT Spine\n', 'JOINT Fixed\n{\nOFFSET 0 1 0\nEnd Site\n{\nOFFSET 0 1 0\n}\n}\n'
                         'JOINT Spine\n')}


@pytest.mark.parametrize('kind', SYNTAX)
def test_syntax_that_blender_reads(plain, tmp_path, kind):
    changed = SYNTAX[kind](rename(plain[0], MIXAMO))
    take = taken(tmp_path, changed)
    assert np.abs(take.joints - plain[1]).max() < 1e-6
    assert any('header' in note for note in take.notes) == ('one frame' in kind)


@pytest.mark.parametrize('change', [
    lambda text: re.sub('Frames: .*', f'Frames: {len(CLIP) + 2}', text),
    lambda text: text[:-300], lambda text: text.replace('}', '', 1),
    lambda text: text.replace('Zrotation', 'Wrotation', 1),
    lambda text: text.replace('MOTION', 'NOTHING')])
def test_syntax_that_nothing_reads(plain, tmp_path, change):
    refused(tmp_path, change(rename(plain[0], MIXAMO)))


def test_several_roots(plain, tmp_path):
    text = rename(plain[0], MIXAMO)
    hierarchy, motion = text.split('MOTION')
    rows = motion.strip().split('\n')
    body = hierarchy.removeprefix('HIERARCHY\n')
    other = body.replace('ROOT Hips', 'ROOT B:Hips')
    both = '\n'.join(rows[:2] + [f'{row} {row}' for row in rows[2:]])
    two = f'{hierarchy}{other}MOTION\n{both}\n'
    refused(tmp_path, two, 'Hips', '--root')
    for root in ('1', '2', 'B:Hips'):
        assert np.abs(taken(tmp_path, two, root=root).joints - plain[1]).max() < 1e-6
    refused(tmp_path, two, '--root', root='Nobody')

    prop = 'ROOT Sword\n{\nOFFSET 0 0 0\nCHANNELS 3 Xposition Yposition Zposition\n}\n'
    both = '\n'.join(rows[:2] + [f'7 8 9 {row}' for row in rows[2:]])
    take = taken(tmp_path, f'HIERARCHY\n{prop}{body}MOTION\n{both}\n')   # one of them is a person
    assert np.abs(take.joints - plain[1]).max() < 1e-6


# ------------------------------------------------------------------------------------------ arrays


def test_arrays(tmp_path):
    more = np.concatenate([CLIP, np.zeros((len(CLIP), 30, 3))], 1)   # SMPL-H has hands after these
    features = joints_to_features(CLIP, SMPL)
    files = {'a.npy': CLIP.astype(np.float32), 'h.npy': more, 'f.npy': features}
    for name, array in files.items():
        np.save(tmp_path / name, array)
    np.savez(tmp_path / 'a.npz', joints=CLIP, poses=np.zeros((5, 156)), fps=20)
    np.savez(tmp_path / 'only.npz', positions=CLIP, mocap_framerate=np.array([20.0]))
    for name in (*files, 'a.npz', 'only.npz'):
        joints = read_take(tmp_path / name, fps=None if name in ('f.npy', 'a.npz') else 20).joints
        again = joints_to_features(joints[:len(features)], SMPL)
        assert np.abs(again - features[:len(again)])[:, :67].max() < 0.01

    np.savez(tmp_path / 'amass.npz', poses=np.zeros((50, 156)), trans=np.zeros((50, 3)))
    np.save(tmp_path / 'flat.npy', CLIP[:, 0])
    np.save(tmp_path / 'nan.npy', CLIP * np.nan)
    np.save(tmp_path / 'one.npy', CLIP[:1])
    np.save(tmp_path / 'few.npy', CLIP[:, :15])
    for name in ('amass.npz', 'flat.npy', 'nan.npy', 'one.npy', 'few.npy', 'none.npy'):
        with pytest.raises(UserError, match=name):
            read_take(tmp_path / name, fps=20)
    with pytest.raises(UserError, match='a.npy .*--fps'):
        read_take(tmp_path / 'a.npy')


def test_kit_is_its_own_skeleton(tmp_path):
    """21 joints in millimetres stay those of KIT-ML for its networks."""
    at = {name: CLIP[:, SMPL.names.index(name)] for name in SMPL.names}
    at.update({f'{side}_heel': at[f'{side}_ankle'] * [1, 0.2, 1] for side in ('left', 'right')})
    joints = 1000 * np.stack([at[name] for name in KIT.names], 1)
    np.save(tmp_path / 'a.npy', joints)
    take = read_take(tmp_path / 'a.npy', fps=12.5, new_fps=12.5, skeleton=KIT)
    assert np.abs(1000 * take.joints - joints).max() < 1e-6
    as_smpl = read_take(tmp_path / 'a.npy', fps=20).joints   # collars between their neighbours
    assert np.abs(as_smpl - CLIP)[:, [4, 5, 7, 8, 15, 20, 21]].max() < 1e-6


def test_our_own_files_come_back(tmp_path):
    """What sample.py writes can be a --source, from KIT-ML too."""
    os.makedirs(tmp_path, exist_ok=True)
    np.save(tmp_path / 'a.npy', CLIP)
    write_bvh(tmp_path / 'a.bvh', CLIP, SMPL)
    assert np.array_equal(read_take(tmp_path / 'a.npy', fps=20).joints, CLIP)
    assert np.abs(read_take(tmp_path / 'a.bvh').joints - CLIP).max() < 0.002
