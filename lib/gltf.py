"""Motion as a .glb file (binary glTF 2.0): a skinned body of sticks and one animation, for Blender,
Unity, Unreal and the browser. Needs pygltflib."""
import numpy as np
from scipy.spatial.transform import Rotation

from lib.bvh import local_rotations
from lib.configurator import UserError

WIDTH = 0.045        # metres from the axis of a stick to its edges
HEAD = 0.2           # metres from the head joint to the top of the head
FACES = [[0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 1], [5, 2, 1], [5, 3, 2], [5, 4, 3], [5, 1, 4]]


def _sticks(rest, skeleton):
    """Joints (J, 3) of the rest pose -> corners (V, 3) of an octahedron along each bone, the joint
    (V,) that moves each corner, and triangles (F, 3)."""
    head = skeleton.names.index('head')
    bones = [(parent, rest[j]) for j, parent in enumerate(skeleton.parents) if j]
    bones.append((head, rest[head] + [0, HEAD, 0]))
    corners, movers, faces = [], [], []
    for joint, end in bones:
        start, along = rest[joint], end - rest[joint]
        side = np.cross(along, np.eye(3)[np.abs(along).argmin()])
        side *= WIDTH / np.linalg.norm(side)
        other = np.cross(along, side) / max(np.linalg.norm(along), 1e-6)
        faces.append(np.array(FACES) + 6 * len(corners))
        corners.append([start] + [start + 0.15 * along + edge
                                  for edge in (side, other, -side, -other)] + [end])
        movers += [joint] * 6
    return np.concatenate(corners), np.array(movers), np.concatenate(faces)


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

    gltf = gl.GLTF2(asset=gl.Asset(generator='dynmask'))
    blob = bytearray()

    def add(array, component, kind, target=None):
        """Append an array to the file -> the number of its accessor."""
        rows = array.reshape(len(array), -1)
        view = gl.BufferView(buffer=0, byteOffset=len(blob), byteLength=array.nbytes, target=target)
        gltf.bufferViews.append(view)
        gltf.accessors.append(gl.Accessor(
            bufferView=len(gltf.bufferViews) - 1, componentType=component, count=len(array),
            type=kind, min=rows.min(0).tolist(), max=rows.max(0).tolist()))
        blob.extend(array.tobytes() + bytes(-array.nbytes % 4))
        return len(gltf.accessors) - 1

    def add_floats(array, kind, target=None):
        return add(np.ascontiguousarray(array, dtype='<f4'), gl.FLOAT, kind, target)

    # the body: every corner moves with one joint
    binds = np.tile(np.eye(4), (skeleton.n_joints, 1, 1))
    binds[:, :3, 3] = -rest
    skin = gl.Skin(joints=list(range(skeleton.n_joints)), skeleton=0,
                   inverseBindMatrices=add_floats(binds.swapaxes(1, 2), gl.MAT4))
    by_joint = np.zeros((len(corners), 4), dtype=np.uint8)
    by_joint[:, 0] = movers
    attributes = gl.Attributes(
        POSITION=add_floats(corners, gl.VEC3, gl.ARRAY_BUFFER),
        JOINTS_0=add(by_joint, gl.UNSIGNED_BYTE, gl.VEC4, gl.ARRAY_BUFFER),
        WEIGHTS_0=add_floats(np.eye(4)[[0] * len(corners)], gl.VEC4, gl.ARRAY_BUFFER))
    triangles = add(faces.astype('<u2').ravel(), gl.UNSIGNED_SHORT, gl.SCALAR,
                    gl.ELEMENT_ARRAY_BUFFER)
    primitive = gl.Primitive(attributes=attributes, indices=triangles)
    gltf.meshes.append(gl.Mesh(primitives=[primitive], name='body'))
    gltf.skins.append(skin)

    parents = skeleton.parents
    for j, name in enumerate(skeleton.names):
        children = [child for child in np.flatnonzero(parents == j).tolist() if child]
        place = rest[j] - rest[parents[j]] if j else rest[0]
        gltf.nodes.append(gl.Node(name=name, translation=place.tolist(), children=children))
    gltf.nodes.append(gl.Node(name='body', mesh=0, skin=0))
    gltf.scenes.append(gl.Scene(nodes=[0, skeleton.n_joints]))
    gltf.scene = 0

    # the animation
    times = add_floats(np.arange(len(root)) / (new_fps or fps), gl.SCALAR)
    animation = gl.Animation(name='motion')

    def animate(joint, path, values, kind):
        sampler = gl.AnimationSampler(input=times, output=add_floats(values, kind))
        target = gl.AnimationChannelTarget(node=joint, path=path)
        animation.channels.append(gl.AnimationChannel(sampler=len(animation.samplers),
                                                      target=target))
        animation.samplers.append(sampler)

    animate(0, 'translation', root, gl.VEC3)
    for j in range(skeleton.n_joints):
        turns = Rotation.from_matrix(local[:, j]).as_quat()
        flips = np.sign((turns[1:] * turns[:-1]).sum(-1)) < 0   # q and -q are the same rotation
        turns[1:] *= np.where(np.cumsum(flips) % 2, -1, 1)[:, None]
        animate(j, 'rotation', turns, gl.VEC4)
    gltf.animations.append(animation)

    gltf.buffers.append(gl.Buffer(byteLength=len(blob)))
    gltf.set_binary_blob(bytes(blob))
    gltf.save_binary(str(path))
