"""Prompts in, motion out:

    python sample.py config/toy.py --prompt="a person walks forward, then kicks with the left leg"
    python sample.py config/bandai.py --prompts=prompts.txt --repeats=3   # lines: text, text#frames
    python sample.py config/toy.py --prompt="a person walks | turns left#60 | sits down"   # in one
    python sample.py config/toy.py --prompt="a person jumps" --source=walk.npy --edit=0.4:0.7
    python sample.py config/toy.py --prompt="a person turns" --source=walk.npy --then=sit.npy
    python sample.py --init_from=momask --momask_root=checkpoints --prompt="a man kicks"
    python sample.py config/toy.py --prompt="a person jumps" --explain=True   # HGM3's graph, MSD
    python sample.py config/bandai.py --msd_of=dataset-1_punch_normal_001   # a picture of its MSD

For every motion, named after its prompt, seed and edit: a GIF to look at (an MP4 too if ffmpeg is
installed), a PNG of its poses, joints (T, J, 3) as .npy, and rotations of a body with constant bone
lengths as .bvh, in centimetres, and as .glb if pygltflib is installed. Same seed, same motion.
"""
import glob
import hashlib
import importlib.util
import math
import os
import re
import sys
import time
import unicodedata
import warnings

import numpy as np
import torch
from tqdm import tqdm

import msd
from generate import decoding_of, open_pipeline
from lib import text
from lib.bvh import MAX_FPS, fit_rotations, write_bvh
from lib.configurator import UserError, configure
from lib.data import FRAMES_PER_TOKEN, load_meta, load_split
from lib.detect import describe, parse, passes
from lib.draw import draw_explained, draw_gif, draw_grid, draw_msd, draw_strip, gif_to_mp4
from lib.gltf import write_glb
from lib.motion import SKELETONS, features_to_joints, joints_to_features, lock_feet
from lib.runtime import must_be_writable, read_text, setup
from lib.takes import read_take, take_settings
from vq import load_tokenizer

# -----------------------------------------------------------------------------
data = 'toy'
out_dir = ''                 # where the checkpoints are; '' is out/<data>
prompt = ''
prompts = ''                 # a file with one prompt a line: text, text#frames, text#NA
source = ''                  # edit this motion: .bvh, or .npy and .npz of joints or features
edit = ''                    # what to regenerate, in shares or frames: 0.4:0.7 or 40:80,120:140
then = ''                    # or continue source up to this motion, in length frames
joints = ''                  # how to read source and then: a json file of joint names
unit = ''                    # m, cm, mm, inch or metres; '' is what fits a body
up = ''                      # the axis that points up; '' finds it
root = ''                    # of a BVH file with several roots: a name, or 1, 2 ...
msd_of = ''                  # draw the MSD of this clip of the data set instead
explain = False              # also draw the prompt's graph, and what is hard and complex
length = 0                   # frames; 0 asks the length estimator
repeats = 1                  # motions per prompt
seed = 0
samples_dir = ''             # '' is <out_dir>/samples
footlock = False             # hold standing feet still: post-processing, named *_footlock.*
fps = 0.0                    # frames per second of .bvh and .glb; 0 is the data set's
# machine
device = 'auto'              # 'auto' | 'cpu' | 'cuda'
dtype = 'float32'            # 'float32', the same on every CPU | 'bfloat16' and 'auto' are faster
config = configure(globals(), shared=True)
# -----------------------------------------------------------------------------
out_dir = out_dir or os.path.join('out', data)
decoding = decoding_of(config)
reading = take_settings(joints, unit, up, root)
if bool(source) != bool(edit or then):
    raise UserError('Editing needs --source=motion.npy together with --edit=0.4:0.7 or '
                    '--then=motion.npy.')
if fps and not 1 <= fps <= MAX_FPS:
    raise UserError(f'--fps is {fps:g}, expected 1 to {MAX_FPS} frames per second.')


def draw_msd_of(name):
    """A real clip as a strip of poses, with phi_t (Eq 7) and Omega(t) (Eq 8) of its base tokens
    -> out_dir/msd_<name>.png"""
    tokenizer = load_tokenizer(os.path.join(out_dir, 'vq.pt'))
    folder = os.path.join('data', data)
    meta, _, _ = load_meta(folder)
    for split_name in meta['counts']:
        split = load_split(folder, split_name)
        where = np.flatnonzero(split.names == name)
        if len(where):
            break
    else:
        raise UserError(f'data/{data} has no clip named {name}; names look like '
                        f'{split.names[0]}.')
    clip = where[0]
    frames = split.length[clip] // FRAMES_PER_TOKEN * FRAMES_PER_TOKEN
    features = torch.from_numpy(np.array(split.clip(clip)[:frames]))
    ids = tokenizer.encode(tokenizer.normalize(features)[None])[..., 0]
    G = msd.gram(tokenizer.quantizers[0].codebook)
    f, _ = msd.spectrum(ids, G, torch.ones_like(ids, dtype=torch.bool))
    phi, omega = msd.descriptor(f), msd.complexity(f)
    title = name
    if split.n_captions[clip]:
        title += f': "{split.captions[split.first_caption[clip]]["text"]}"'
    positions = features_to_joints(features, meta['n_joints']).numpy()
    path = os.path.join(out_dir, f'msd_{name}.png')
    draw_msd(path, title, positions, phi[0].numpy(), omega[0].numpy(), meta['fps'])
    print(f'written to {path}')


def draw_explanation(path, caption, ids, positions):
    """The prompt's graph, and over time what MSD calls complex in the motion's tokens (n, Q) and
    what the teacher of hard token mining calls hard (HGM3 Figs 4, 5; DynMask Fig 3)."""
    if pipe.tags is None:   # not trained on graphs: take the tags of the training captions, once
        captions = load_split(os.path.join('data', pipe.meta['name']), 'train').captions
        pipe.tags = text.tag_table(one['tokens'] for one in captions)
    nodes = [('the sentence', text.MOTION, 'motion')]
    for words, role in text.caption_graph(text.tagged(caption, pipe.tags)):
        edge = 'action' if role == text.ACTION else text.EDGES[role - text.FIRST_EDGE]
        nodes.append((words, min(role, 3), edge))

    base = ids[None, :, 0]
    everything = torch.ones_like(base, dtype=torch.bool)
    f, _ = msd.spectrum(base, msd.gram(pipe.vq.quantizers[0].codebook), everything)
    omega = msd.zscore(msd.complexity(f), everything)[0].cpu()
    hard = None
    if pipe.teacher:
        c, role = pipe.encode_text([caption])
        hard = pipe.teacher(base, c.to(pipe.device), role.to(pipe.device), everything)
        hard = msd.zscore(hard, everything)[0].detach().cpu()
    draw_explained(path, caption, nodes, positions, omega, hard, data_fps)


# --------------------------------------------------------------------------- reading what is asked


def read_parts(line, where):
    """'text | text#frames' -> [(text, frames)], the parts of one motion. 0 frames, also for #NA,
    asks the length estimator."""
    parts = []
    for part in line.split('|'):
        words, mark, frames = (field.strip() for field in part.partition('#'))
        if mark and not re.fullmatch('[0-9]{1,5}|NA', frames, re.IGNORECASE):
            raise UserError(f"{where}: '{frames:.60}' behind # is not a number of frames; expected "
                            'text#frames or text#NA.')
        if not re.search(r'\w', words):
            raise UserError(f'{where}: the prompt is empty: give --prompt="a person walks forward" '
                            'or --prompts=file.txt.')
        if mark:
            frames = int(frames) if frames.isdecimal() else 0
        parts.append((words, frames if mark else length))
    return parts


def read_prompts():
    """-> a list of motions, each a list of parts."""
    jobs = [read_parts(prompt, '--prompt')] if prompt or not prompts else []
    if prompts:
        lines = read_text(prompts, 'expected a text file with one prompt a line, as text or '
                                   'text#frames').splitlines()
        jobs += [read_parts(line, f'{prompts}, line {number}')
                 for number, line in enumerate(lines, 1) if line.strip()]
    if not jobs:
        raise UserError(f'{prompts} holds no prompt: expected one a line.')
    return jobs


def read_source(path):
    """A file of motion (see lib/takes.py) -> its tokens (T // 4, Q)."""
    take = read_take(path, reading, data_fps, data_fps, skeleton)
    if take.unused:
        raise UserError(f'{joints} has {", ".join(sorted(take.unused))}, which {path} has not: '
                        'correct these names.')
    print(f'{path}: {"; ".join(take.notes)}')
    if len(take.joints) <= FRAMES_PER_TOKEN:
        raise UserError(f'{path} has {len(take.joints)} frames, expected more than '
                        f'{FRAMES_PER_TOKEN}.')
    positions = take.joints * skeleton.units_per_metre
    last_step = positions[-1:] - positions[-2:-1]
    positions = np.concatenate([positions, positions[-1:] + last_step])   # features use up a frame
    features = joints_to_features(positions, skeleton, steady=pipe.meta.get('steady', False),
                                  contact_threshold=pipe.meta.get('contact_threshold'))
    return pipe.tokenize(features.astype(np.float32))


def read_spans(spans, n):
    """'0.4:0.7' or '40:80,120:140' of a motion of n tokens -> [(first, end)] in tokens."""
    pairs = []
    for span in spans.split(','):
        match = re.fullmatch(r'(\d*\.?\d+):(\d*\.?\d+)', span.strip())
        if not match:
            raise UserError(f"edit is '{spans}', expected shares or frames like 0.4:0.7 or 40:80.")
        shares = '.' in span
        ends = [float(x) * (n if shares else 1 / FRAMES_PER_TOKEN) for x in match.groups()]
        first, end = math.floor(ends[0]), math.ceil(ends[1])
        if not 0 <= first < end <= n:
            raise UserError(f"edit is '{span}', which is no part of {n * FRAMES_PER_TOKEN} frames.")
        pairs.append((first, end))
    return pairs


# -------------------------------------------------------------------------------------- generating


def edited(jobs):
    """Motions of one part each -> tokens, a list of (n, Q): those of `source`, regenerated where
    `edit` says, or continued up to `then`."""
    ids = read_source(source)
    following = read_source(then) if then else ids[:0]
    results = []
    for i, [(words, frames), *_] in enumerate(jobs):
        spans = read_spans(edit, len(ids)) if edit else []
        wanted = frames // FRAMES_PER_TOKEN or 10 if then else 0
        if then:
            spans.append((len(ids), len(ids) + wanted))
        whole = torch.cat([ids, ids[-1:].expand(wanted, -1), following])
        results.append(pipe.edit(whole, spans, words, seed + i, **decoding))
    return results


def generated(jobs):
    """Motions in parts -> their tokens, a list of (n, Q): all parts at once, then joined."""
    parts = [part for job in jobs for part in job]
    c, role = pipe.encode_text([words for words, _ in parts])
    n = torch.tensor([frames // FRAMES_PER_TOKEN for _, frames in parts])
    if not n.all():
        n = torch.where(n > 0, n, pipe.lengths(c, role, seed).cpu())
    tokens = []
    for i in range(0, len(parts), 64):
        part = slice(i, i + 64)
        ids = pipe.generate(c[part], role[part], n[part], seed + i, **decoding)
        tokens += [row[:k] for row, k in zip(ids, n[part].tolist())]
    motions = []
    for job in jobs:
        own, tokens = tokens[:len(job)], tokens[len(job):]
        motions.append(pipe.join(own, [words for words, _ in job], seed, **decoding))
    return motions


def file_name(number, caption, positions):
    """A path without suffix for a motion: its number, prompt, seed and edit, in at most 80 ASCII
    characters. A prompt that does not fit, or is not in Latin script, has a hash in it. Files of
    another motion are never overwritten: -2, -3 ... tell them apart."""
    latin = unicodedata.normalize('NFKD', caption.lower())
    slug = re.sub('[^a-z0-9]+', '-', latin.encode('ascii', 'ignore').decode()).strip('-')
    marks = f'_s{seed}'
    if source:
        marks += '_edit-' + re.sub('[^0-9.]+', '-', edit)[:20] if edit else '_then'
    marks += '_footlock' if footlock else ''
    room = 75 - len(marks)
    if len(slug) > room or re.search(r'[^\W\d_]', re.sub('[a-z]', '', latin)):
        slug = f'{slug[:room - 7]}-{hashlib.md5(caption.encode()).hexdigest()[:6]}'
    path = os.path.join(folder, f'{number:03d}_{slug.strip("-")}{marks}')
    candidate, k = path, 1
    while there := glob.glob(f'{glob.escape(candidate)}.*'):
        array = f'{candidate}.npy'
        if array in there and np.array_equal(np.load(array), positions):
            break   # the same motion, written before
        k += 1
        candidate = f'{path}-{k}'
    return candidate


def report(caption, positions):
    """Print what a toy prompt asks for and what the detectors see in the motion -> whether they
    agree, None if the prompt is outside the toy grammar."""
    script = parse(caption)
    saw = ', '.join(describe(positions)) or 'nothing'
    if script is None:
        print(f"not counted '{caption}': outside the toy set's grammar; seen: {saw}")
        return None
    done = passes(positions, script)
    print(f"{'as asked   ' if done else 'NOT AS ASKED'} '{caption}'; seen: {saw}")
    return done


if msd_of:
    draw_msd_of(msd_of)
    sys.exit()
jobs = read_prompts()
run = setup(device, dtype, seed)
pipe = open_pipeline(config, data, out_dir, run.device)
skeleton = SKELETONS[pipe.meta['skeleton']]
folder = samples_dir or os.path.join(out_dir, 'samples')
must_be_writable(os.path.join(folder, 'grid.gif'))
longest, data_fps = pipe.meta['max_frames'], pipe.meta['fps']
for words, frames in (part for job in jobs for part in job):
    if frames and not FRAMES_PER_TOKEN <= frames <= longest:
        raise UserError(f"The length of '{words}' is {frames} frames, expected 4 to {longest} "
                        f'({longest / data_fps:.1f} s at {data_fps} fps), or 0 to let the length '
                        'estimator choose; longer motion is made of parts: '
                        '--prompt="walk | turn | sit".')

# motion
clock = time.perf_counter()
jobs = [job for job in jobs for _ in range(repeats)]
captions = [' | '.join(words for words, _ in job) for job in jobs]
with run.autocast():
    tokens = edited(jobs) if source else generated(jobs)
motions = [pipe.decode(ids) for ids in tokens]
print(f'{len(motions)} motions, {sum(map(len, motions))} frames, generated in '
      f'{time.perf_counter() - clock:.1f} s on {run.device}')

# files
warnings.filterwarnings('ignore', 'Glyph .* missing')   # captions in scripts that a font lacks
with_glb = importlib.util.find_spec('pygltflib')
drawn = []
for i, features in enumerate(tqdm(motions, desc='drawing', mininterval=1)):
    positions = features_to_joints(features, pipe.meta['n_joints'])   # in the data set's unit
    if footlock:
        _, _, positions = fit_rotations(positions, skeleton)   # bones of constant length
        positions = lock_feet(positions, skeleton, data_fps).astype(np.float32)
    name = file_name(i, captions[i], positions)
    np.save(name + '.npy', positions)
    write_bvh(name + '.bvh', positions, skeleton, data_fps, fps)
    draw_strip(positions, name + '.png', captions[i])
    draw_gif(positions, name + '.gif', captions[i], data_fps)
    suffixes = 'gif, bvh, npy, png'
    if with_glb:
        write_glb(name + '.glb', positions, skeleton, data_fps, fps)
        suffixes += ', glb'
    if gif_to_mp4(name + '.gif'):
        suffixes += ', mp4'
    if explain:
        draw_explanation(name + '_explained.png', captions[i], tokens[i], positions)
    drawn.append((captions[i], positions))
    if i == 0:
        grid = os.path.join(folder, f'grid_{os.path.basename(name)}.gif')
if pipe.meta['name'] == 'toy':
    verdicts = [report(*motion) for motion in drawn]
    counted = [verdict for verdict in verdicts if verdict is not None]
    print(f'{sum(counted)} of {len(counted)} motions do what their prompts say')
others = ''
if len(drawn) > 1:
    draw_grid(drawn[:9], grid)
    others = f' and others, the first nine side by side in {os.path.basename(grid)}'
print(f'written to {folder}/: {os.path.basename(name)} ({suffixes}){others}')
