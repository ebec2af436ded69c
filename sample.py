"""Prompts in, motion out:

    python sample.py config/toy.py --prompt="a person walks forward, then kicks with the left leg"
    python sample.py config/bandai.py --prompts=prompts.txt --repeats=3        # lines of text, or text#frames
    python sample.py --init_from=momask --momask_root=checkpoints --prompt="a man kicks with his left leg"
    python sample.py config/bandai.py --msd_of=dataset-1_punch_normal_001      # a clip's Motion Spectral Descriptor, as a picture

For every motion: a GIF to look at and .npy joints (T, J, 3), with the prompt in the file name. Same seed, same motion.
"""
import os
import re
import sys
import time


import numpy as np
import torch
from tqdm import tqdm

import msd
import text
from configurator import choose, configure, fail, setup
from model import Pipeline
from motion import draw_gif, draw_grid, draw_strip, features_to_joints, load_meta, load_split
from vq import RVQVAE, CheckpointError

# -----------------------------------------------------------------------------
data = 'toy'
out_dir = ''                 # where the checkpoints are, '' is out/<data>
init_from = 'checkpoint'     # 'checkpoint' | 'momask': the official release under momask_root
momask_root = ''
momask_data = 't2m'          # 't2m' | 'kit'
momask_mask = ''             # checkpoint names there; '' is the only folder t2m_* / tres_*
momask_res = ''
momask_text = 'clip'         # text encoder for the official weights; their own is 'clip'
prompt = ''
prompts = ''                 # a file, one prompt a line: text or text#frames
msd_of = ''                  # draw the MSD of this clip of the data set instead: its name, as in prepare_data.py
length = 0                   # frames; 0 asks the length estimator
repeats = 1                  # motions per prompt
seed = 0
samples_dir = ''             # '' is <out_dir>/samples
# decoding
steps = 10
cond_scale = 4.0             # guidance of the base tokens (KIT 2)
res_scale = 5.0              # guidance of the residual tokens
temperature = 1.0            # T_global of Eq 18
das_sampling = True          # (III) of Table 4: complexity-aware decoding, 3.6
lambda_D = 0.5               # Eq 15
beta = 0.5                   # Eq 18
sigma_max = 0.5              # Eq 19
msd_decode = 'kept'          # MSD of the 'kept' tokens or of the full 'guess'
# machine
device = 'auto'
dtype = 'float32'            # the same motion on every CPU; bfloat16 is faster where the hardware has it
configure(globals())
# -----------------------------------------------------------------------------
decoding = dict(steps=steps, cond_scale=cond_scale, temperature=temperature, das=das_sampling, lambda_D=lambda_D, beta=beta,
                sigma_max=sigma_max, msd_decode=msd_decode)


def draw_msd(name):
    """A real clip as a strip of poses, under it phi_t (Eq 7) and Omega(t) (Eq 8) of its base tokens -> out_dir/msd_<name>.png"""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    tokenizer = RVQVAE.from_file(os.path.join(out_dir, 'vq.pt'))
    for split in (load_split(os.path.join('data', data), s) for s in ('test', 'val', 'train')):
        where = np.flatnonzero(split.names == name)
        if len(where):
            break
    else:
        fail(f'data/{data} has no clip named {name}; names look like {split.names[0]}.')
    meta = load_meta(os.path.join('data', data))[0]
    features = torch.from_numpy(np.array(split.clip(where[0]))[:split.length[where[0]] // 4 * 4])
    ids = tokenizer.encode(tokenizer.normalize(features)[None])[..., 0]
    phi, _ = msd.descriptor(ids, msd.gram(tokenizer.quantizers[0].codebook), torch.ones_like(ids, dtype=torch.bool))
    strip = draw_strip(features_to_joints(features, meta['n_joints']).numpy(), None, '', 10)
    fig, (top, heat, line) = plt.subplots(3, 1, figsize=(11, 5.2), height_ratios=(2.0, 1.3, 1.0), layout='constrained')
    top.imshow(strip)
    top.axis('off')
    caption = next((c['text'] for c in split.captions if c['clip'] == where[0]), '')
    top.set_title(f'{name}: "{caption}"', fontsize=10)
    seconds = 4 / meta['fps'] * ids.shape[1]
    heat.imshow(phi[0].T, aspect='auto', origin='lower', extent=(0, seconds, -0.5, phi.shape[-1] - 0.5), cmap='magma')
    heat.set_ylabel('band k\n$\\phi_{t,k}$, Eq 7')
    t = (np.arange(ids.shape[1]) + 0.5) * 4 / meta['fps']
    line.fill_between(t, msd.complexity(phi)[0], step='mid', alpha=0.3)
    line.step(t, msd.complexity(phi)[0], where='mid')
    line.set(xlim=(0, seconds), ylim=(0, None), ylabel='$\\Omega(t)$, Eq 8', xlabel='seconds')
    path = os.path.join(out_dir, f'msd_{name}.png')
    fig.savefig(path, dpi=110)
    print(f'written to {path}')


out_dir = out_dir or os.path.join('out', data)
if msd_of:
    try:
        draw_msd(msd_of)
    except (CheckpointError, ValueError, FileNotFoundError) as e:
        fail(str(e))
    sys.exit()
jobs = [(prompt, length)] if prompt else []
if prompts:
    if not os.path.exists(prompts):
        fail(f'{prompts} does not exist: expected a text file with one prompt a line, as text or text#frames.')
    with open(prompts, encoding='utf-8') as f:
        for number, line in enumerate(f.read().splitlines(), 1):
            words, mark, frames = line.partition('#')
            if mark and not frames.strip().isdigit():
                fail(f"{prompts}, line {number}: '{frames}' behind # is not a number of frames; expected text#frames.")
            if words.strip():
                jobs.append((words.strip(), int(frames) if mark else length))
if not jobs or not all(re.search(r'\w', words) for words, _ in jobs):
    fail('The prompt is empty: give --prompt="a person walks forward" or --prompts=file.txt.')
choose('init_from', init_from, 'checkpoint', 'momask')
choose('msd_decode', msd_decode, 'kept', 'guess')
if min(steps, repeats) < 1 or temperature <= 0:
    fail(f'steps is {steps}, repeats {repeats}, temperature {temperature}: expected at least 1, 1, and above 0.')
run = setup(device, dtype, seed)
try:
    if init_from == 'momask':
        pipe = Pipeline.from_momask(momask_root, momask_data, momask_mask, momask_res, momask_text, run.device)
    else:
        pipe = Pipeline.from_dir(out_dir, run.device)
    longest = pipe.meta['max_frames']
    for words, frames in jobs:
        if frames and not 4 <= frames <= longest:
            fail(f"The length of '{words}' is {frames} frames, expected 4 to {longest} ({longest / pipe.meta['fps']:.1f} s at "
                 f"{pipe.meta['fps']} fps), or 0 to let the length estimator choose.")
    jobs = [job for job in jobs for _ in range(repeats)]
    c = text.encode([words for words, _ in jobs], pipe.text_encoder, os.path.join(out_dir, 'text'), run.device)
    n = np.array([frames // 4 for _, frames in jobs])
    if not n.all():
        n = np.where(n > 0, n, pipe.lengths(c, seed).cpu().numpy())
except (CheckpointError, ValueError, FileNotFoundError, RuntimeError) as e:
    fail(str(e))
n = torch.from_numpy(n)
folder = samples_dir or os.path.join(out_dir, 'samples')
os.makedirs(folder, exist_ok=True)
clock, motions, drawn = time.perf_counter(), [], []
for i in range(0, len(jobs), 64):
    part = slice(i, i + 64)
    with run.autocast():
        ids = pipe.generate(c[part], n[part], seed=seed + i, res_scale=res_scale, **decoding)
    motions += pipe.features(ids, n[part])
print(f'{len(jobs)} motions, {int(4 * n.sum())} frames, generated in {time.perf_counter() - clock:.1f} s on {run.device}')
for i, ((words, _), features) in enumerate(tqdm(list(zip(jobs, motions)), desc='drawing', mininterval=1)):
    joints = features_to_joints(features, pipe.meta['n_joints']).numpy()   # in the data set's unit
    name = os.path.join(folder, f'{i:03d}_' + re.sub(r'\W+', '-', words.lower()).strip('-')[:80])
    np.save(name + '.npy', joints)
    draw_gif(joints, name + '.gif', words, pipe.meta['fps'])
    drawn.append((words, joints))
if len(drawn) > 1:
    draw_grid(drawn[:9], os.path.join(folder, 'grid.gif'))   # the first nine side by side
print(f'written to {folder}/: {os.path.basename(name)}.gif' + (' and others, side by side in grid.gif' if len(jobs) > 1 else ''))
