"""Bandai-Namco-Research-Motiondataset: its files, its joints, and captions from file names."""
import hashlib
import json
import lzma
import re
import tarfile
from pathlib import Path

from lib.bvh import bvh_to_joints, read_bvh
from lib.configurator import ROOT, UserError
from lib.motion import SKELETONS, resample
from lib.takes import JOINT_NAMES, place_joints, swap_sides

PHRASES = json.loads(Path(ROOT, 'config', 'bandai_captions.json').read_text(encoding='utf-8'))
BANDAI_FILE = re.compile(r'dataset-\d_(.+)_([^_]+)_\d+\.bvh')   # content and style
BANDAI_JOINTS = JOINT_NAMES['Bandai-Namco']   # spine2 is midway between its neighbours


def bandai_captions(content, style):
    """Six paraphrases of the words in a file name, in a fixed order. UserError: unknown words."""
    right = content.replace('left', 'right')   # the table of phrases has this side only
    if right not in PHRASES['content'] or style not in PHRASES['style']:
        raise UserError(f'no phrase for "{content}" in the style "{style}"')
    does, acts = PHRASES['content'][right]
    if content != right:
        does, acts = swap_sides(does), swap_sides(acts)
    adjective, how, way = PHRASES['style'][style]
    who = f'{adjective or "the/DET"} person/NOUN'
    phrases = [f'a/DET person/NOUN {does} {how}', f'someone/PRON {acts} {way}',
               f'{who} {does}', f'{who} {acts}',
               f'a/DET figure/NOUN {acts} {how}', f'a/DET person/NOUN {does} {way}']
    # 'he/PRON walks=walk/VERB' -> 'he walks' and 'he/PRON walk/VERB'
    return [dict(text=re.sub(r'(=\S+)?/[A-Z]+', '', phrase), tokens=re.sub(r'\S+=', '', phrase))
            for phrase in phrases]


def bandai_files(src):
    """Yield (name, bytes) of each clip in a folder or in a .tar.xz. The archive is read as a stream
    and to its end, where its checksum is. What has the name of a clip but is no file is empty."""
    if Path(src).is_dir():
        for path in sorted(Path(src).rglob('*.bvh')):
            if BANDAI_FILE.fullmatch(path.name):
                yield str(path), path.read_bytes() if path.is_file() else b''
        return
    try:
        with lzma.open(src) as stream, tarfile.open(fileobj=stream, mode='r|') as archive:
            for member in archive:
                if BANDAI_FILE.fullmatch(Path(member.name).name):
                    file = archive.extractfile(member) if member.isfile() else None
                    yield member.name, file.read() if file else b''
            while stream.read(2**20):
                pass
    except (OSError, EOFError, ValueError, tarfile.TarError, lzma.LZMAError) as error:
        raise UserError(f'{src} cannot be read as a .tar.xz ({error}): clone github.com/BandaiNamco'
                        'ResearchInc/Bandai-Namco-Research-Motiondataset and give that folder, or '
                        'get the archive again') from None


def bandai_joints(file):
    """A BVH file of this data set, (name, bytes) -> SMPL joints (T, 22, 3), metres, 20 fps."""
    names, parents, offsets, channels, frames, fps = read_bvh(file)
    missing = sorted(set(BANDAI_JOINTS.values()) - set(names))
    if missing:
        raise UserError(f'{file[0]} has another skeleton, without {", ".join(missing[:3])}: rename '
                        'its joints to those of Bandai-Namco')
    world = bvh_to_joints(parents, offsets, channels, frames) / 100   # from centimetres
    found = {ours: names.index(theirs) for ours, theirs in BANDAI_JOINTS.items()}
    return resample(place_joints(world, found), fps, SKELETONS['smpl22'].fps)


def bandai_split(stem):
    """A file name without its suffix -> its split, decided by a hash: the same for everybody,
    whatever other files there are."""
    percent = int(hashlib.md5(stem.encode()).hexdigest(), 16) % 100
    return 'train' if percent < 85 else 'val' if percent < 90 else 'test'
