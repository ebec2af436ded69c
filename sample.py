"""Prompts in, motion out:

    python sample.py config/toy.py --prompt="a person walks forward, then kicks with the left leg"
    python sample.py config/bandai.py --prompts=prompts.txt --repeats=3   # lines: text, text#frames
    python sample.py config/toy.py --prompt="a person walks | turns left#60 | sits down"   # in one
    python sample.py config/toy.py --prompt="a person jumps" --source=walk.npy --edit=0.4:0.7
    python sample.py config/toy.py --prompt="a person turns" --source=walk.npy --then=sit.npy
    python sample.py --init_from=momask --momask_root=checkpoints --prompt="a man kicks"
    python sample.py config/toy.py --prompt="a person jumps" --explain=True   # how it came about
    python sample.py config/bandai.py --msd_of=dataset-1_punch_normal_001   # a picture of its MSD

For every motion, named after its prompt, seed and edit: a GIF to look at (an MP4 too if ffmpeg is
installed), a PNG of its poses, joints (T, J, 3) as .npy, and rotations of a body with constant bone
lengths as .bvh, in centimetres, and as .glb if pygltflib is installed. Same seed, same motion.
Lines of a prompt file that cannot be used are reported, and the exit code is then 1.
"""
import lib.configurator   # first, to catch Ctrl-C during the imports
import glob
import hashlib
import importlib.util
import itertools
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
from generate import Pipeline, decoding_of, open_pipeline
from lib import text
from lib.bvh import MAX_FPS, write_bvh
from lib.configurator import UserError, configure
from lib.data import FRAMES_PER_TOKEN, load_meta, load_split
from lib.detect import describe, parse, passes
from lib.draw import draw_gif, draw_grid, draw_strip, gif_to_mp4
from lib.explain import draw_attention, draw_clips, draw_explained
from lib.gltf import write_glb
from lib.motion import SKELETONS, features_to_joints
from lib.report import say
from lib.runtime import must_be_writable, read_text, setup
from lib.takes import read_features, take_settings
from masking import dynamics
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
msd_of = ''                  # draw the MSD of these clips of the data set instead: a,b,c
reconstruct = ''             # draw this clip beside its reconstruction by the tokenizer instead
explain = False              # also draw how the motion was filled in, attention, what is complex
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
if edit and (then or length):
    raise UserError('--edit regenerates a span: leave --then and --length out.')
if fps and not 1 <= fps <= MAX_FPS:
    raise UserError(f'--fps is {fps:g}, expected 1 to {MAX_FPS} frames per second.')

MOST_PARTS = 100       # of one motion
MOST_MOTIONS = 10_000
SEAM = 10              # frames before and after a part in which what it asks for may happen


# ------------------------------------------------------------------------------------- explanations


def real_clips(names):
    """Clips of the data set -> [(name and caption, features (T, D), joints (T, J, 3))]"""
    folder = os.path.join('data', data)
    meta, _, _ = load_meta(folder)
    splits = [load_split(folder, split) for split in meta['counts']]
    clips = []
    for name in names:
        split = next((split for split in splits if name in split.names), None)
        if split is None:
            raise UserError(f'data/{data} has no clip named {name}; names look like '
                            f'{splits[0].names[0]} ("{splits[0].captions[0]["text"]}").')
        i = split.names.tolist().index(name)
        title = name
        if split.n_captions[i]:
            title += f': "{split.captions[split.first_caption[i]]["text"]}"'
        features = np.array(split.clip(i))
        clips.append((title, features, features_to_joints(features, meta['n_joints'])))
    return clips


def draw_msd_of(names):
    """Real clips, with phi_t (Eq 7) and Omega(t) (Eq 8) of their base tokens
    -> out_dir/msd_<names>.png"""
    clips = []
    for title, features, joints in real_clips(names):
        f, _ = pipe.mask.spectrum(pipe.tokenize(features)[None, :, 0])
        omega = msd.complexity(f, pipe.mask.config.omega)
        clips.append((title, joints, msd.descriptor(f)[0].numpy(), omega[0].numpy()))
    path = os.path.join(out_dir, f'msd_{"_".join(names)[:100]}.png')
    draw_clips(path, clips, data_fps)
    say(f'written to {path}')


def draw_reconstruction(name):
    """A real clip beside what the tokenizer makes of it -> out_dir/reconstruction_<name>.gif. Needs
    no transformer."""
    (title, features, joints), = real_clips([name])
    meta, _, _ = load_meta(os.path.join('data', data))
    tokenizer = load_tokenizer(os.path.join(out_dir, 'vq.pt'))
    pipe = Pipeline(tokenizer, None, None, None, '', meta)
    path = os.path.join(out_dir, f'reconstruction_{name}.gif')
    draw_grid([(title, joints), ('from its tokens', pipe.joints(pipe.tokenize(features)))], path)
    say(f'written to {path}')


def draw_explanation(name, caption, ids, filled, positions):
    """How a motion (T, J, 3) of tokens ids (n, Q) came about -> <name>_explained.png: the prompt's
    graph (HGM3 Fig 5), the step that filled in each token, filled (steps, n) or None, what MSD
    calls complex and HGM3's teacher hard (HGM3 Fig 4); <name>_attention.png (DynMask Fig 5)."""
    nodes = [('the sentence', text.MOTION, 'motion')]
    for words, role in text.caption_graph(text.tagged(caption, pipe.read_tags())):
        edge = 'action' if role == text.ACTION else text.EDGES[role - text.FIRST_EDGE]
        nodes.append((words, min(role, 3), edge))

    base = ids[None, :, 0]
    everything = torch.ones_like(base, dtype=torch.bool)
    f, seen = pipe.mask.spectrum(base)
    omega = dynamics(pipe.mask, base, everything)[0].cpu()
    c, role = (x.to(pipe.device) for x in pipe.encode_text([caption]))
    hard = None
    if pipe.teacher:
        hard = msd.zscore(pipe.teacher(base, c, role, everything), everything)[0].cpu()
    draw_explained(f'{name}_explained.png', caption, nodes, positions, filled, omega, hard,
                   data_fps)

    maps = []
    hooks = [layer.attn.weights.register_forward_hook(lambda _, inputs, A: maps.append(A[0]))
             for layer in pipe.mask.trunk.layers]
    pipe.mask(base, c, role, everything, spectrum=(f, seen))
    for hook in hooks:
        hook.remove()
    qs, ks = msd.prior_qk(msd.descriptor(f), seen)
    used = '' if pipe.mask.config.spectral_attn else ' (not used by this model)'
    shown = [(f'z(S) of Eq 13{used}', (qs @ ks.mT)[0].cpu())]
    if maps:   # on a GPU attention never forms its matrix
        A = torch.stack(maps).mean((0, 1))[-len(ids):, -len(ids):]
        shown.insert(0, ('attention, mean of layers and heads', A))
    draw_attention(f'{name}_attention.png', caption, shown)


# --------------------------------------------------------------------------- reading what is asked


def read_parts(line):
    """'text | text#frames' -> [(text, frames)], the parts of one motion. 0 frames, also for #NA,
    asks the length estimator."""
    parts = []
    for part in line.split('|'):
        words, mark, frames = (field.strip() for field in part.partition('#'))
        if mark and not re.fullmatch('[0-9]{1,5}|NA', frames, re.IGNORECASE):
            raise UserError(f"'{frames:.60}' behind # is not a number of frames; expected "
                            'text#frames or text#NA.')
        if mark:
            frames = int(frames) if frames.isdecimal() else 0
        else:
            frames = length
        if frames and not FRAMES_PER_TOKEN <= frames <= longest:
            raise UserError(f"the length of '{words:.60}' is {frames} frames, expected 4 to "
                            f'{longest} ({longest / data_fps:.1f} s at {data_fps} fps), or 0 to '
                            'let the length estimator choose; longer motion is made of parts: '
                            '--prompt="walk | turn | sit".')
        text.check_prompt(words, pipe.text_encoder)
        parts.append((words, frames))
    most = 1 if source else MOST_PARTS
    if len(parts) > most:
        raise UserError(f'{len(parts)} parts, expected at most {most} (an edit takes one).')
    return parts


def read_prompts():
    """-> the motions to make, each a list of parts, and what is wrong with the other lines."""
    lines = {'--prompt': prompt} if prompt or not prompts else {}
    if prompts:
        content = read_text(prompts, 'expected one prompt a line, as text or text#frames')
        lines |= {f'{prompts}, line {number}': line
                  for number, line in enumerate(content.splitlines(), 1) if line.strip()}
    jobs, problems = [], []
    for where, line in lines.items():
        try:
            jobs.append(read_parts(line))
        except UserError as error:
            problems.append(f'{where}: {error}')
    n = sum(map(len, jobs)) * repeats
    if not 0 < n <= MOST_MOTIONS:
        raise UserError(problems[0] if problems and not n else f'{prompts or "--prompt"} asks for '
                        f'{n} motions, expected 1 to {MOST_MOTIONS}.')
    return jobs, problems


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
    """Motions of one part each -> for each its tokens (n, Q), those of `source`, regenerated where
    `edit` says or continued up to `then`; the tokens [(first, end)] that its prompt is for; None.
    """
    def read_tokens(path):
        features, notes = read_features(path, reading, pipe.meta)
        say(f'{path}: {"; ".join(notes)}')
        return pipe.tokenize(features)

    ids = read_tokens(source)
    following = read_tokens(then) if then else ids[:0]
    results = []
    for i, [(words, frames)] in enumerate(jobs):
        spans = read_spans(edit, len(ids)) if edit else []
        wanted = frames // FRAMES_PER_TOKEN or 10 if then else 0
        if then:
            spans.append((len(ids), len(ids) + wanted))
        whole = torch.cat([ids, ids[-1:].expand(wanted, -1), following])
        results.append((pipe.edit(whole, spans, words, seed + i, **decoding), spans, None))
    return results


def generated(jobs):
    """Motions in parts -> for each its tokens (n, Q); those of each part [(first, end)]; and the
    confidence of each step in the tokens that it filled in (steps, n). All parts are generated at
    once, then joined."""
    parts = [part for job in jobs for part in job]
    c, role = pipe.encode_text([words for words, _ in parts])
    n = torch.tensor([frames // FRAMES_PER_TOKEN for _, frames in parts])
    if not n.all():
        n = torch.where(n > 0, n, pipe.lengths(c, role, seed).cpu())
    tokens, filled = [], []
    for i in range(0, len(parts), 64):
        part = slice(i, i + 64)
        trace = []
        ids = pipe.generate(c[part], role[part], n[part], seed + i, trace=trace, **decoding)
        confidence = torch.stack(trace, 1).cpu()   # (B, steps, N)
        for row, steps, k in zip(ids, confidence, n[part].tolist()):
            tokens.append(row[:k])
            filled.append(steps[:, :k])
    results = []
    first = 0
    for job in jobs:
        own = slice(first, first + len(job))
        ends = np.cumsum([0, *map(len, tokens[own])]).tolist()
        ids = pipe.join(tokens[own], [words for words, _ in job], seed, **decoding)
        results.append((ids, list(zip(ends, ends[1:])), torch.cat(filled[own], 1)))
        first += len(job)
    return results


def gif_caption(job, spans):
    """The text of a motion of one part; otherwise [(text, first, end)] in frames, for draw_gif."""
    if len(job) == 1 and not source:
        return job[0][0]
    pairs = itertools.zip_longest(job, spans, fillvalue=job[0])
    return [(words, FRAMES_PER_TOKEN * first, FRAMES_PER_TOKEN * end)
            for (words, _), (first, end) in pairs]


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


def report(job, spans, positions):
    """Print what a toy motion was asked for and what the detectors see in it -> whether every part
    [(text, frames)] is seen in its span of tokens (first, end), None if a part is outside the toy
    grammar."""
    caption = ' | '.join(words for words, _ in job)
    seen = f'seen: {", ".join(describe(positions)) or "nothing"}'
    scripts = [parse(words) for words, _ in job]
    if None in scripts:
        outside = job[scripts.index(None)][0]
        about = 'it' if outside == caption else f"'{outside}'"
        say(f"not counted '{caption}': {about} has words that the detectors do not read; {seen}")
        return None
    wrong = []
    for (first, end), script in itertools.zip_longest(spans, scripts, fillvalue=scripts[0]):
        around = slice(max(0, FRAMES_PER_TOKEN * first - SEAM), FRAMES_PER_TOKEN * end + SEAM)
        if not passes(positions[around], script):
            wrong.append(f'{first * FRAMES_PER_TOKEN}:{end * FRAMES_PER_TOKEN}')
    where = f' (frames {", ".join(wrong)})' if wrong and len(spans) > 1 else ''
    say(f"{'NOT AS ASKED' if wrong else 'as asked   '} '{caption}'{where}; {seen}")
    return not wrong


torch.set_grad_enabled(False)
if reconstruct:
    draw_reconstruction(reconstruct)
    sys.exit()
run = setup(device, dtype, seed)
pipe = open_pipeline(config, data, out_dir, run.device)
skeleton = SKELETONS[pipe.meta['skeleton']]
longest, data_fps = pipe.meta['max_frames'], pipe.meta['fps']
if msd_of:
    draw_msd_of(msd_of.split(','))
    sys.exit()
jobs, problems = read_prompts()
folder = samples_dir or os.path.join(out_dir, 'samples')
must_be_writable(os.path.join(folder, 'grid.gif'))

# motion
clock = time.perf_counter()
jobs = [job for job in jobs for _ in range(repeats)]
captions = [' | '.join(words for words, _ in job) for job in jobs]
with run.autocast():
    results = edited(jobs) if source else generated(jobs)
motions = [pipe.joints(ids, footlock) for ids, *_ in results]   # in the data set's unit
say(f'{len(motions)} motions, {sum(map(len, motions))} frames, generated in '
    f'{time.perf_counter() - clock:.1f} s on {run.device}')

# files
warnings.filterwarnings('ignore', 'Glyph .* missing')   # captions in scripts that a font lacks
with_glb = importlib.util.find_spec('pygltflib')
gif_captions = [gif_caption(job, spans) for job, (_, spans, _) in zip(jobs, results)]
for i, positions in enumerate(tqdm(motions, desc='drawing', mininterval=1)):
    name = file_name(i, captions[i], positions)
    np.save(name + '.npy', positions)
    write_bvh(name + '.bvh', positions, skeleton, data_fps, fps)
    draw_strip(positions, name + '.png', captions[i])
    draw_gif(positions, name + '.gif', gif_captions[i], data_fps)
    suffixes = 'gif, bvh, npy, png'
    if with_glb:
        write_glb(name + '.glb', positions, skeleton, data_fps, fps)
        suffixes += ', glb'
    if gif_to_mp4(name + '.gif'):
        suffixes += ', mp4'
    if explain:
        suffixes += ', _explained.png, _attention.png'
        ids, _, filled = results[i]
        draw_explanation(name, captions[i], ids, filled, positions)
    if i == 0:
        grid = os.path.join(folder, f'grid_{os.path.basename(name)}.gif')
others = ''
if len(motions) > 1:
    draw_grid(list(zip(gif_captions, motions))[:9], grid)
    others = f' and others, the first nine side by side in {os.path.basename(grid)}'

# what came of it
if pipe.meta['name'] == 'toy':
    verdicts = [report(job, spans, positions)
                for job, (_, spans, _), positions in zip(jobs, results, motions)]
    counted = [verdict for verdict in verdicts if verdict is not None]
    if counted:
        say(f'{sum(counted)} of {len(counted)} motions do what their prompts say')
for caption in dict.fromkeys(captions):
    if pipe.unseen(caption):
        say(f"'{caption}': {pipe.unseen(caption)}")
if pipe.res is None:
    say('without residual layers, because there is no res.pt: train it with --stage=res')
if explain and not pipe.teacher:
    say("no curve of what is 'hard': this model was trained without HGM3's teacher "
        '(--mask_by=loss)')
say(f'written to {folder}/: {os.path.basename(name)} ({suffixes}){others}')
if problems:
    sys.exit('\n'.join(f'{problem} (left out)' for problem in problems))
