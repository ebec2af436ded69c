"""Prompts in, motion out:

    python sample.py config/toy.py --prompt="a person walks forward, then kicks with the left leg"
    python sample.py config/bandai.py --prompts=prompts.txt --repeats=3   # lines: text, text#frames
    python sample.py config/toy.py --prompt="a person walks | turns left#60 | sits down"   # in one
    python sample.py config/toy.py --prompt="a person jumps" --source=walk.npy --edit=0.4:0.7
    python sample.py config/toy.py --prompt="a person turns" --source=walk.npy --then=sit.npy
    python sample.py --init_from=momask --momask_root=checkpoints --prompt="a man kicks"
    python sample.py config/toy.py --prompt="a person jumps" --explain=True   # HGM3's graph, MSD
    python sample.py config/bandai.py --msd_of=dataset-1_punch_normal_001   # a clip's MSD, drawn

For every motion, with the prompt in the file name: a GIF to look at (an MP4 too where ffmpeg is
installed), a PNG of its poses, joints (T, J, 3) as .npy, and rotations as .bvh, in centimetres, for
Blender and its like. Same seed, same motion.
"""
import math
import os
import re
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from lib import takes
import hgm3
import msd
from lib.bvh import fit_rotations, write_bvh
from lib.configurator import UserError, configure
from lib.data import FRAMES_PER_TOKEN, load_meta, load_split
from lib.detect import describe, parse, passes
from lib.draw import draw_explained, draw_gif, draw_grid, draw_msd, draw_strip, gif_to_mp4
from generate import decoding_of
from momask import open_pipeline
from lib.motion import SKELETONS, features_to_joints, joints_to_features, lock_feet
from lib.runtime import must_be_writable, read_array, read_text, setup
from vq import load_tokenizer

# -----------------------------------------------------------------------------
data = 'toy'
out_dir = ''                 # where the checkpoints are, '' is out/<data>
prompt = ''
prompts = ''                 # a file, one prompt a line: text or text#frames, | between parts
source = ''                  # a .bvh, or an .npy of this script: change that motion instead
edit = ''                    # there, by shares or frames: 0.4:0.7 or 40:80,120:140
then = ''                    # or go from source's end to this motion's beginning, in length frames
msd_of = ''                  # draw the MSD of this clip of the data set instead: its name there
explain = False              # also a picture of the prompt's graph, and of what is hard and complex
length = 0                   # frames; 0 asks the length estimator
repeats = 1                  # motions per prompt
seed = 0
samples_dir = ''             # '' is <out_dir>/samples
footlock = False             # hold standing feet still: post-processing, *_footlock.* says so
# machine
device = 'auto'              # 'auto' | 'cpu' | 'cuda'
dtype = 'float32'            # the same motion on every CPU | 'bfloat16' and 'auto' are faster
config = configure(globals(), shared='config/decoding.py', init_from=('checkpoint', 'momask'))
# -----------------------------------------------------------------------------
out_dir = out_dir or os.path.join('out', data)
decoding = decoding_of(config)
if bool(source) != bool(edit or then):
    raise UserError('Editing needs --source=motion.npy and with it --edit=0.4:0.7 or '
                    '--then=motion.npy.')


def draw_msd_of(name):
    """A real clip as a strip of poses, under it phi_t (Eq 7) and Omega(t) (Eq 8) of its base tokens
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
    phi, omega = msd.unit(f), msd.complexity(f)
    title = name
    if split.n_captions[clip]:
        title += f': "{split.captions[split.first_caption[clip]]["text"]}"'
    joints = features_to_joints(features, meta['n_joints']).numpy()
    path = os.path.join(out_dir, f'msd_{name}.png')
    draw_msd(path, title, joints, phi[0].numpy(), omega[0].numpy(), meta['fps'])
    print(f'written to {path}')


def draw_explanation(path, caption, ids, joints):
    """The prompt's graph, and over time what MSD calls complex in its motion's tokens (n, Q) and
    the teacher of hard token mining calls hard (HGM3 Figs 4, 5; DynMask Fig 3)."""
    if pipe.tags is None:   # not trained on graphs: tags of the training captions, once
        written = load_split(os.path.join('data', pipe.meta['name']), 'train').captions
        pipe.tags = hgm3.tag_table(one['tokens'] for one in written)
    nodes = [('the sentence', hgm3.MOTION, 'motion')]
    for text, role in hgm3.graph(hgm3.tagged(caption, pipe.tags)):
        edge = 'action' if role == hgm3.ACTION else hgm3.EDGES[role - hgm3.FIRST_EDGE]
        nodes.append((text, min(role, 3), edge))

    base = ids[None, :, 0]
    everything = torch.ones_like(base, dtype=torch.bool)
    f, _ = msd.spectrum(base, msd.gram(pipe.vq.quantizers[0].codebook), everything)
    omega = msd.zscore(msd.complexity(f), everything)[0].cpu()
    hard = None
    if pipe.teacher:
        c, c_valid = pipe.condition([caption])
        hard = pipe.teacher(base, c.to(pipe.device), c_valid.to(pipe.device), everything)
        hard = msd.zscore(hard, everything)[0].detach().cpu()
    draw_explained(path, caption, nodes, joints, omega, hard, fps)


def read_parts(line, where):
    """'text | text#frames' -> [(text, frames)], the parts of one motion; frames 0 where the length
    estimator shall choose."""
    parts = []
    for part in line.split('|'):
        words, mark, frames = part.partition('#')
        if mark and not re.fullmatch(r'\s*[0-9]{1,5}\s*', frames):
            raise UserError(f"{where}: '{frames:.60}' behind # is not a number of frames; expected "
                            'text#frames.')
        if not re.search(r'\w', words):
            raise UserError(f'{where}: the prompt is empty: give --prompt="a person walks forward" '
                            'or --prompts=file.txt.')
        parts.append((words.strip(), int(frames) if mark else length))
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


def read_motion(path):
    """Joints (T, J, 3) of this data set's skeleton, unit and fps, or a BVH file -> tokens
    (T // 4, Q)."""
    if path.lower().endswith('.bvh'):
        joints = takes.read_motion(path, pipe.meta['fps']).astype(np.float32)
    else:
        joints = read_array(path, 'expected joints (T, J, 3) as .npy, or a .bvh file')
    expected = (pipe.meta['n_joints'], 3)
    good = joints.shape[1:] == expected and np.isfinite(joints).all()
    if not good or len(joints) <= FRAMES_PER_TOKEN:
        raise UserError(f'{path} has shape {joints.shape}, expected finite (T, {expected[0]}, 3) '
                        f'with more than {FRAMES_PER_TOKEN} frames.')
    joints = np.concatenate([joints, 2 * joints[-1:] - joints[-2:-1]])   # features use up a frame
    features = joints_to_features(joints, SKELETONS[pipe.meta['skeleton']],
                                  contact_threshold=pipe.meta.get('contact_threshold'),
                                  steady=pipe.meta.get('steady', False))
    return pipe.encode(features.astype(np.float32))


def read_spans(text, n):
    """'0.4:0.7' or '40:80,120:140' of a motion of n tokens -> [(first, end)] in tokens."""
    spans = []
    for span in text.split(','):
        match = re.fullmatch(r'(\d*\.?\d+):(\d*\.?\d+)', span.strip())
        if not match:
            raise UserError(f"edit is '{text}', expected shares or frames like 0.4:0.7 or 40:80.")
        shares = '.' in span
        ends = [float(x) * (n if shares else 1 / FRAMES_PER_TOKEN) for x in match.groups()]
        first, end = math.floor(ends[0]), math.ceil(ends[1])
        if not 0 <= first < end <= n:
            raise UserError(f"edit is '{span}', which is no part of {n * FRAMES_PER_TOKEN} frames.")
        spans.append((first, end))
    return spans


def edited(text, frames, seed):
    """Tokens (n, Q) of `source`, changed where `edit` says or led over to `then`."""
    ids = read_motion(source)
    spans = read_spans(edit, len(ids)) if edit else []
    if then:
        following = read_motion(then)
        wanted = frames // FRAMES_PER_TOKEN or 10
        spans.append((len(ids), len(ids) + wanted))
        ids = torch.cat([ids, ids[-1:].expand(wanted, -1), following])
    return pipe.edit(ids, spans, text, seed, **decoding)


if msd_of:
    draw_msd_of(msd_of)
    sys.exit()
jobs = read_prompts()
run = setup(device, dtype, seed)
pipe = open_pipeline(config, out_dir, run.device)
folder = samples_dir or os.path.join(out_dir, 'samples')
must_be_writable(os.path.join(folder, 'grid.gif'))
longest, fps = pipe.meta['max_frames'], pipe.meta['fps']
for words, frames in (part for job in jobs for part in job):
    if frames and not FRAMES_PER_TOKEN <= frames <= longest:
        raise UserError(f"The length of '{words}' is {frames} frames, expected 4 to {longest} "
                        f'({longest / fps:.1f} s at {fps} fps), or 0 to let the length estimator '
                        'choose; longer motion is made of parts: --prompt="walk | turn | sit".')


def generated(jobs):
    """Motions in parts -> their tokens, a list of (n, Q): all parts at once, then joined."""
    parts = [part for job in jobs for part in job]
    texts = [words for words, _ in parts]
    c, c_valid = pipe.condition(texts)
    n = torch.tensor([frames // FRAMES_PER_TOKEN for _, frames in parts])
    if not n.all():
        n = torch.where(n > 0, n, pipe.lengths(c, c_valid, seed).cpu())
    tokens = []
    for i in range(0, len(parts), 64):
        part = slice(i, i + 64)
        ids = pipe.generate(c[part], c_valid[part], n[part], seed + i, **decoding)
        tokens += [row[:k] for row, k in zip(ids, n[part].tolist())]
    motions = []
    for job in jobs:
        own, tokens = tokens[:len(job)], tokens[len(job):]
        motions.append(pipe.join(own, [words for words, _ in job], seed, **decoding))
    return motions


# motion
clock = time.perf_counter()
jobs = [job for job in jobs for _ in range(repeats)]
captions = [' | '.join(words for words, _ in job) for job in jobs]
with run.autocast():
    if source:
        tokens = [edited(*job[0], seed + i) for i, job in enumerate(jobs)]
    else:
        tokens = generated(jobs)
motions = [pipe.decode(ids) for ids in tokens]
print(f'{len(motions)} motions, {sum(map(len, motions))} frames, generated in '
      f'{time.perf_counter() - clock:.1f} s on {run.device}')


def report(caption, joints):
    """What a toy prompt asks for, what the detectors see in the motion, and whether that is it."""
    script = parse(caption)
    saw = ', '.join(describe(joints)) or 'nothing'
    if script is None:
        print(f"not counted '{caption}': outside the toy set's grammar; seen: {saw}")
        return None
    done = passes(joints, script)
    print(f"{'as asked   ' if done else 'NOT AS ASKED'} '{caption}'; seen: {saw}")
    return done


# files
skeleton = SKELETONS[pipe.meta['skeleton']]
mark = '_footlock' if footlock else ''
drawn = []
for i, features in enumerate(tqdm(motions, desc='drawing', mininterval=1)):
    joints = features_to_joints(features, pipe.meta['n_joints'])   # in the data set's unit
    slug = re.sub(r'\W+', '-', captions[i].lower()).strip('-')[:80]
    name = os.path.join(folder, f'{i:03d}_{slug}{mark}')
    if footlock:
        _, _, joints = fit_rotations(joints, skeleton)   # bones of constant length
        joints = lock_feet(joints, skeleton, fps).astype(np.float32)
    np.save(name + '.npy', joints)
    write_bvh(name + '.bvh', joints, skeleton, fps)
    draw_strip(joints, name + '.png', captions[i])
    draw_gif(joints, name + '.gif', captions[i], fps)
    suffixes = 'gif, bvh, npy, png'
    if gif_to_mp4(name + '.gif'):
        suffixes += ', mp4'
    if explain:
        draw_explanation(name + '_explained.png', captions[i], tokens[i], joints)
    drawn.append((captions[i], joints))
if pipe.meta['name'] == 'toy':
    verdicts = [report(caption, joints) for caption, joints in drawn]
    counted = [verdict for verdict in verdicts if verdict is not None]
    print(f'{sum(counted)} of {len(counted)} motions do what their prompts say')
others = ''
if len(drawn) > 1:
    draw_grid(drawn[:9], os.path.join(folder, f'grid{mark}.gif'))
    others = f' and others, the first nine side by side in grid{mark}.gif'
print(f'written to {folder}/: {os.path.basename(name)} ({suffixes}){others}')
