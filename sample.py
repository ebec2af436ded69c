"""Prompts in, motion out:

    python sample.py config/toy.py --prompt="a person walks forward, then kicks with the left leg"
    python sample.py config/bandai.py --prompts=prompts.txt --repeats=3   # lines: text, text#frames
    python sample.py --init_from=momask --momask_root=checkpoints --prompt="a man kicks"
    python sample.py config/bandai.py --msd_of=dataset-1_punch_normal_001   # a clip's MSD, drawn

For every motion, with the prompt in the file name: a GIF to look at (an MP4 too where ffmpeg is
installed), a PNG of its poses, joints (T, J, 3) as .npy, and rotations as .bvh, in centimetres, for
Blender and its like. Same seed, same motion.
"""
import os
import re
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

import momask
import msd
from bvh import fit_rotations, write_bvh
from configurator import UserError, configure
from data import FRAMES_PER_TOKEN, load_meta, load_split
from detect import describe, parse, passes
from draw import draw_gif, draw_grid, draw_msd, draw_strip, gif_to_mp4
from fast import keep_memory
from generate import decoding_of, load_pipeline
from motion import SKELETONS, features_to_joints, lock_feet
from runtime import setup
from vq import load_tokenizer

# -----------------------------------------------------------------------------
data = 'toy'
out_dir = ''                 # where the checkpoints are, '' is out/<data>
mask_file = 'mask.pt'        # which masked transformer there
init_from = 'checkpoint'     # 'checkpoint' | 'momask': the official release under momask_root
momask_root = ''
momask_data = 't2m'          # 't2m' | 'kit'
momask_mask = ''             # checkpoint names there; '' is the only folder t2m_* / tres_*
momask_res = ''
momask_text = 'clip'         # text encoder for the official weights; their own is 'clip' | 'hash'
prompt = ''
prompts = ''                 # a file, one prompt a line: text or text#frames
msd_of = ''                  # draw the MSD of this clip of the data set instead: its name there
length = 0                   # frames; 0 asks the length estimator
repeats = 1                  # motions per prompt
seed = 0
samples_dir = ''             # '' is <out_dir>/samples
footlock = False             # hold standing feet still: post-processing, *_footlock.* says so
# decoding
steps = 10
cond_scale = 4.0             # guidance of the base tokens (KIT 2)
res_scale = 5.0              # guidance of the residual tokens
top_share = 0.1              # base tokens are drawn from this share of the codes
temperature = 1.0            # T_global of Eq 18
anneal = 0.0                 # T_global falls by this share over the steps
res_temperature = 1.0
res_layers = -1              # residual layers to add; -1 is all
das_sampling = False         # (III) of Table 4, 3.6: complexity-aware decoding
lambda_D = 0.5               # Eq 15
beta = 0.5                   # Eq 18
sigma_max = 0.5              # Eq 19
msd_decode = 'kept'          # MSD of the 'kept' tokens | of the full 'guess'
motion_steps = 2             # HGM3 (--text=graph): steps that hear of the motion node alone
action_steps = 5             # and up to this one of actions too
# machine
device = 'auto'              # 'auto' | 'cpu' | 'cuda'
dtype = 'float32'            # the same motion on every CPU | 'bfloat16' and 'auto' are faster
config = configure(
    globals(), init_from=('checkpoint', 'momask'), momask_data=('t2m', 'kit'),
    momask_text=('clip', 'hash'), msd_decode=('kept', 'guess'), device=('auto', 'cpu', 'cuda'),
    dtype=('auto', 'bfloat16', 'float32'))
# -----------------------------------------------------------------------------
out_dir = out_dir or os.path.join('out', data)
if repeats < 1:
    raise UserError(f'repeats is {repeats}, expected at least 1.')
decoding = decoding_of(config)


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


def read_prompts():
    """-> [(text, frames)], frames 0 where the length estimator shall choose."""
    jobs = [(prompt, length)] if prompt else []
    if prompts and not os.path.exists(prompts):
        raise UserError(f'{prompts} does not exist: expected a text file with one prompt a line, '
                        'as text or text#frames.')
    lines = []
    if prompts:
        with open(prompts, encoding='utf-8') as f:
            lines = f.read().splitlines()
    for number, line in enumerate(lines, 1):
        words, mark, frames = line.partition('#')
        if mark and not frames.strip().isdigit():
            raise UserError(f"{prompts}, line {number}: '{frames}' behind # is not a number of "
                            'frames; expected text#frames.')
        if words.strip():
            jobs.append((words.strip(), int(frames) if mark else length))
    if not jobs or not all(re.search(r'\w', words) for words, _ in jobs):
        raise UserError('The prompt is empty: give --prompt="a person walks forward" or '
                        '--prompts=file.txt.')
    return jobs


if msd_of:
    draw_msd_of(msd_of)
    sys.exit()
jobs = read_prompts()
run = setup(device, dtype, seed)
keep_memory()
if init_from == 'momask':
    pipe = momask.pipeline(momask_root, momask_data, momask_text, momask_mask, momask_res,
                           run.device)
else:
    pipe = load_pipeline(out_dir, run.device, mask_file)
longest, fps = pipe.meta['max_frames'], pipe.meta['fps']
for words, frames in jobs:
    if frames and not FRAMES_PER_TOKEN <= frames <= longest:
        raise UserError(f"The length of '{words}' is {frames} frames, expected 4 to {longest} "
                        f'({longest / fps:.1f} s at {fps} fps), or 0 to let the length estimator '
                        'choose.')

# text and lengths
jobs = [job for job in jobs for _ in range(repeats)]
captions = [words for words, _ in jobs]
c, c_valid = pipe.condition(captions, os.path.join(out_dir, 'text'))
n = torch.tensor([frames // FRAMES_PER_TOKEN for _, frames in jobs])
if not n.all():
    n = torch.where(n > 0, n, pipe.lengths(c, c_valid, seed).cpu())

# motion
clock = time.perf_counter()
motions = []
for i in range(0, len(jobs), 64):
    part = slice(i, i + 64)
    with run.autocast():
        ids = pipe.generate(c[part], c_valid[part], n[part], seed + i, **decoding)
    motions += pipe.features(ids, n[part])
print(f'{len(jobs)} motions, {FRAMES_PER_TOKEN * int(n.sum())} frames, generated in '
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
folder = samples_dir or os.path.join(out_dir, 'samples')
os.makedirs(folder, exist_ok=True)
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
