"""Motion as a .glb file (binary glTF 2.0): a skinned body of sticks and one animation, for Blender,
Unity, Unreal and the browser. Needs pygltflib."""
import numpy as np
from scipy.spatial.transform import Rotation

from lib.bvh import local_rotations
from lib.configurator import UserError

WIDTH = 0.045        # metres from the axis of a stick to its edges
HEAD = 0.2           # metres from the head joint to the top of the head
# a stick along the third axis, an octahedron: corners in units of its width and length, triangles
CORNERS = [[0, 0, 0], [1, 0, .15], [0, 1, .15], [-1, 0, .15], [0, -1, .15], [0, 0, 1]]
FACES = [[0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 1], [5, 2, 1], [5, 3, 2], [5, 4, 3], [5, 1, 4]]


def _sticks(rest, skeleton):
    """Joints (J, 3) of the rest pose -> corners (V, 3) of a stick along each bone, the joint (V,)
    that moves each corner, and triangles (F, 3)."""
    bones = [(parent, rest[j]) for j, parent in enumerate(skeleton.parents) if j]
    head = skeleton.names.index('head')
    bones.append((head, rest[head] + [0, HEAD, 0]))
    corners = []
    for joint, end in bones:
        along = end - rest[joint]
        side = np.cross(along, np.eye(3)[np.abs(along).argmin()])
        side *= WIDTH / np.linalg.norm(side)
        other = np.cross(along, side) / np.linalg.norm(along)
        corners.append(rest[joint] + CORNERS @ np.stack([side, other, along]))
    movers = np.repeat([joint for joint, _ in bones], len(CORNERS))
    faces = np.add.outer(len(CORNERS) * np.arange(len(bones)), FACES)
    return np.concatenate(corners), movers, faces


def write_glb(path, joints, skeleton, fps=None, new_fps=None):
    """Write joints (T, J, 3), in the skeleton's unit and at fps (default the skeleton's), as a .glb
    file in metres at new_fps (default fps). UserError if pygltflib is not installed."""
    try:
        import pygltflib as gl
    except ImportError:
        raise UserError(f'{path} needs pygltflib, which is not installed: run `pip install '
                        'pygltflib`') from None
    fps = fps or skeleton.fps
    offsets, local, root = local_rotations(np.asarray(joints) / skeleton.units_per_metre, skeleton,
                                           fps, new_fps or fps)
    rest = np.zeros_like(offsets)
    for chain in skeleton.chains:
        for parent, j in zip(chain, chain[1:]):
            rest[j] = rest[parent] + offsets[j]
    rest[:, 1] -= rest[:, 1].min()   # on the floor
    corners, movers, faces = _sticks(rest, skeleton)
    blob = bytearray()
    views, accessors = [], []

    def add(array, kind, dtype='<f4', component=gl.FLOAT, **target):
        """Append an array to the file -> the number of its accessor."""
        array = np.ascontiguousarray(array, dtype)
        rows = array.reshape(len(array), -1)
        accessors.append(dict(bufferView=len(views), componentType=component, count=len(array),
                              type=kind, min=rows.min(0).tolist(), max=rows.max(0).tolist()))
        views.append(dict(buffer=0, byteOffset=len(blob), byteLength=array.nbytes, **target))
        blob.extend(array.tobytes() + bytes(-array.nbytes % 4))
        return len(accessors) - 1

    # the body: every corner moves with one joint
    J = skeleton.n_joints
    binds = np.tile(np.eye(4), (J, 1, 1))
    binds[:, 3, :3] = -rest   # glTF stores matrices by columns
    skin = dict(joints=list(range(J)), skeleton=0, inverseBindMatrices=add(binds, gl.MAT4))
    one, none = np.ones(len(corners)), np.zeros((3, len(corners)))
    attributes = dict(
        POSITION=add(corners, gl.VEC3, target=gl.ARRAY_BUFFER),
        JOINTS_0=add(np.stack([movers, *none], 1), gl.VEC4, 'u1', gl.UNSIGNED_BYTE,
                     target=gl.ARRAY_BUFFER),
        WEIGHTS_0=add(np.stack([one, *none], 1), gl.VEC4, target=gl.ARRAY_BUFFER))
    triangles = add(faces.ravel(), gl.SCALAR, '<u2', gl.UNSIGNED_SHORT,
                    target=gl.ELEMENT_ARRAY_BUFFER)
    parents = skeleton.parents
    nodes = [dict(name=name, translation=(rest[j] - rest[parents[j]] if j else rest[0]).tolist(),
                  children=[child for child in np.flatnonzero(parents == j).tolist() if child])
             for j, name in enumerate(skeleton.names)]
    nodes.append(dict(name='body', mesh=0, skin=0))

    # the animation
    times = add(np.arange(len(root)) / (new_fps or fps), gl.SCALAR)
    curves = [(0, 'translation', add(root, gl.VEC3))]
    for j in range(J):
        turns = Rotation.from_matrix(local[:, j]).as_quat()
        flips = np.sign((turns[1:] * turns[:-1]).sum(-1)) < 0   # q and -q are the same rotation
        turns[1:] *= np.where(np.cumsum(flips) % 2, -1, 1)[:, None]
        curves.append((j, 'rotation', add(turns, gl.VEC4)))
    animation = dict(
        name='motion', samplers=[dict(input=times, output=values) for *_, values in curves],
        channels=[dict(sampler=i, target=dict(node=j, path=what))
                  for i, (j, what, _) in enumerate(curves)])

    gltf = gl.GLTF2.from_dict(dict(
        asset=dict(version='2.0', generator='dynmask'), scene=0, scenes=[dict(nodes=[0, J])],
        nodes=nodes, skins=[skin], animations=[animation], bufferViews=views, accessors=accessors,
        meshes=[dict(name='body', primitives=[dict(attributes=attributes, indices=triangles)])],
        buffers=[dict(byteLength=len(blob))]))
    gltf.set_binary_blob(bytes(blob))
    gltf.save_binary(str(path))
