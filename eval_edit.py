"""Do edits show? Joint speed and acceleration at the seams of edited and of joined motion:

    python eval_edit.py config/toy.py
    python eval_edit.py config/bandai.py --edit=0.3:0.6 --overlap=3

Editing: a part of each real clip is drawn anew for its own caption, and held against pasting, which
puts a motion made for the caption by itself into the same frames. Joining: two generated
motions in a row, their seam filled in or not. A seam that nobody sees has the speed and the
acceleration of the frames inside.
"""
import os

import numpy as np
import torch
from tqdm import tqdm

from lib.configurator import UserError, configure
from lib.data import FRAMES_PER_TOKEN, Clips, load_meta
from lib.evaluator import mpjpe
from generate import decoding_of
from momask import open_pipeline
from lib.motion import features_to_joints
from lib.runtime import setup

# -----------------------------------------------------------------------------
data = 'toy'
out_dir = ''                 # the model's checkpoints, '' is out/<data>
split = 'test'
clips = 100
edit = '0.4:0.7'             # what is drawn anew, by shares of a clip
overlap = 2                  # tokens on either side of a seam that joining draws anew
seed = 0
# machine
device = 'auto'              # 'auto' | 'cpu' | 'cuda'
dtype = 'float32'            # 'auto' | 'bfloat16' | 'float32'
config = configure(globals(), shared='config/decoding.py', init_from=('checkpoint', 'momask'))
# -----------------------------------------------------------------------------
out_dir = out_dir or os.path.join('out', data)
decoding = decoding_of(config)
run = setup(device, dtype, seed)
meta, _, _ = load_meta(os.path.join('data', data))
test = Clips(os.path.join('data', data), split)
pipe = open_pipeline(config, out_dir, run.device)
try:
    begin, end = (float(share) for share in edit.split(':'))
except ValueError:
    begin = end = 0.0
if not 0 < begin < end < 1:
    raise UserError(f"edit is '{edit}', expected two shares of a clip between 0 and 1, as 0.4:0.7.")


def to_joints(features):
    """Features (T, D) -> joints (T, J, 3) in metres."""
    return features_to_joints(features, meta['n_joints']) / meta['units_per_metre']


def seam_figures(joints, seams, inside):
    """joints (T, J, 3), seams: frames that begin something new, inside: a slice of frames away from
    them -> mean joint speed (m/s) and the largest acceleration (m/s2) at the seams, and inside."""
    fps = meta['fps']
    speed = fps * np.linalg.norm(np.diff(joints, axis=0), axis=-1).mean(-1)               # (T - 1,)
    accel = fps ** 2 * np.linalg.norm(np.diff(joints, 2, axis=0), axis=-1).mean(-1)       # (T - 2,)
    return {
        'speed at seam': np.mean([speed[s - 1] for s in seams]),
        'speed inside': speed[inside].mean(),
        'accel at seam': np.mean([accel[s - 2:s].max() for s in seams]),
        'accel inside': np.maximum(accel[inside][1:], accel[inside][:-1]).mean(),
    }


def generated(text, n, seed):
    c, c_valid = pipe.condition([text])
    return pipe.generate(c, c_valid, torch.tensor([n]), seed, **decoding)[0]


def edited(features, text, seed):
    """One clip's features (T, D), four ways -> {row: figures}."""
    ids = pipe.encode(features)
    n = len(ids)
    first, last = round(begin * n), max(round(begin * n) + 1, round(end * n))
    a, b = FRAMES_PER_TOKEN * first, FRAMES_PER_TOKEN * last
    reconstruction = pipe.decode(ids)
    pasted = reconstruction.copy()
    pasted[a:b] = pipe.decode(generated(text, last - first, seed))
    ours = pipe.decode(pipe.edit(ids, [(first, last)], text, seed, **decoding))
    motions = {'real clip': features, 'tokenizer': reconstruction, 'edited': ours, 'pasted': pasted}

    figures = {}
    kept = np.r_[0:a, b:len(reconstruction)]
    for row, motion in motions.items():
        joints = to_joints(motion)
        figures[row] = seam_figures(joints, [a, b], slice(a + 2, b - 2))
        error = mpjpe(joints[kept], to_joints(features)[kept]).mean()
        figures[row]['kept frames, mm'] = 1000 * error
    return figures


def joined(texts, lengths, seed):
    """Two texts, numbers of tokens -> {row: figures} of the two motions in a row."""
    parts = [generated(text, n, seed) for text, n in zip(texts, lengths)]
    motions = {
        'joined': pipe.decode(pipe.join(parts, texts, seed, overlap, **decoding)),
        'tokens in a row': pipe.decode(torch.cat(parts)),
        'features in a row': np.concatenate([pipe.decode(part) for part in parts]),
    }
    # the seam, and where drawn tokens meet kept ones
    middle = FRAMES_PER_TOKEN * lengths[0]
    reach = FRAMES_PER_TOKEN * overlap
    seams = {'joined': [middle - reach, middle, middle + reach]}
    return {row: seam_figures(to_joints(motion), seams.get(row, [middle]), slice(8, middle - 12))
            for row, motion in motions.items()}


g = torch.Generator().manual_seed(seed)
order = torch.randperm(len(test), generator=g)[:clips + 1]
captions, first, frames = test.draw(order, g, crop=False, longest=pipe.n_max)
results = []
for i in tqdm(range(len(order) - 1), mininterval=1):
    here, following = (test.split.captions[captions[j]]['text'] for j in (i, i + 1))
    n, n_following = (int(frames[j]) // FRAMES_PER_TOKEN for j in (i, i + 1))
    features, = test.features(first[i:i + 1], frames[i:i + 1])
    with run.autocast():
        result = edited(features, here, seed + i)
        result |= joined((here, following), (n, n_following), seed + i)
    results.append(result)

print(f'\n{data} {split}, {len(results)} clips, {edit} drawn anew, seed {seed}')
columns = list(results[0]['edited'])
print('| | ' + ' | '.join(columns) + ' |\n' + '| --- ' * (len(columns) + 1) + '|')
for row in results[0]:
    cells = []
    for column in columns:
        values = [result[row].get(column, np.nan) for result in results]
        cells.append(f'{np.nanmean(values):.2f}' if column in results[0][row] else '')
    print(f'| {row} | ' + ' | '.join(cells) + ' |')
