"""Blender opens what we write, and makes a BVH of the FBX files that it is given."""
import json
import re
from pathlib import Path

import numpy as np
import pytest

from lib import toy
from lib.bvh import bvh_to_joints, read_bvh, write_bvh
from lib.gltf import write_glb
from lib.motion import SKELETONS
from lib.takes import read_take

bpy = pytest.importorskip('bpy', reason='Blender is not installed: pip install bpy')
SMPL = SKELETONS['smpl22']
ROOT = Path(__file__).parent.parent


@pytest.fixture
def written(tmp_path):
    """A BVH file, and its joints (T, 22, 3) in metres with Blender's z up."""
    path = str(tmp_path / 'walk.bvh')
    write_bvh(path, toy.make_clip(1)['joints'], SMPL)
    names, parents, offsets, channels, frames, _ = read_bvh(path)
    x, y, z = np.moveaxis(bvh_to_joints(parents, offsets, channels, frames) / 100, -1, 0)
    keep = [names.index(name) for name in SMPL.names]
    bpy.ops.wm.read_factory_settings(use_empty=True)
    return path, np.stack([x, -z, y], -1)[:, keep]


def armature():
    return next(thing for thing in bpy.data.objects if thing.type == 'ARMATURE')


def joints_in_blender():
    rig = armature()
    first, last = map(int, rig.animation_data.action.frame_range)
    poses = []
    for frame in range(first, last + 1):
        bpy.context.scene.frame_set(frame)
        poses.append([rig.matrix_world @ rig.pose.bones[name].head for name in SMPL.names])
    return np.array(poses)


def import_bvh(path, scale):
    bpy.ops.import_anim.bvh(filepath=path, global_scale=scale, update_scene_fps=True)


def test_bvh(written):
    path, expected = written
    import_bvh(path, 0.01)   # as USAGE.md says
    assert bpy.context.scene.render.fps == SMPL.fps
    assert np.abs(joints_in_blender() - expected).max() < 1e-4


def test_glb(written, tmp_path):
    pytest.importorskip('pygltflib')
    path = str(tmp_path / 'walk.glb')
    write_glb(path, toy.make_clip(1)['joints'], SMPL)
    bpy.context.scene.render.fps = int(SMPL.fps)
    bpy.ops.import_scene.gltf(filepath=path)
    assert np.abs(joints_in_blender() - written[1]).max() < 1e-4


def test_fbx_with_mixamos_names_comes_in_by_the_line_of_usage(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bvh = Path('walk.bvh')
    before = read_take(bvh).joints
    import_bvh(str(bvh), 1.0)
    names = json.loads((ROOT / 'config' / 'joint_names.json').read_text())
    for ours, theirs in names['Mixamo, LAFAN1, MoMask'].items():
        theirs = theirs if isinstance(theirs, str) else theirs[0]
        armature().data.bones[ours].name = f'mixamorig:{theirs}'
    armature().scale = [0.01] * 3   # Mixamo's are in centimetres too
    bpy.ops.export_scene.fbx(filepath='walk.fbx', bake_anim_simplify_factor=0)
    bvh.unlink()

    bpy.ops.wm.read_factory_settings(use_empty=True)
    line = re.search(r'--python-expr "(.*?)"\n', (ROOT / 'USAGE.md').read_text(), re.DOTALL)[1]
    exec(line.replace('\\\n', ''))
    after = read_take(bvh).joints
    n = min(len(before), len(after))
    assert n > len(before) - 2
    assert np.abs(after[:n] - before[:n]).max() < 0.01
