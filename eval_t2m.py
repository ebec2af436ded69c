r"""The protocol of Guo et al. 2022 on generated motion, with 95% intervals:

    python eval_t2m.py config/toy.py                                  # train_eval.py comes first
    python eval_t2m.py config/bandai.py --strata=True --repeats=5
    python eval_t2m.py config/toy.py --data=bandai --out_dir=out/toy \
        --evaluator=out/bandai/evaluator.pt                           # on other data (Table 7)
    python eval_t2m.py config/hml3d.py --init_from=momask --momask_root=checkpoints

One repeat: shuffle the test clips, one caption each, drop the last partial batch of 32; embed;
compare. Rows: real motion, tokenizer reconstruction, base tokens only, full. Motions are generated
in batches of similar length; batches of 32 matter only to R-precision. RESULTS.md, "Protocol",
lists every difference from the reference.
"""
import json
import os
import re
import time

import numpy as np
import torch
from scipy.stats import rankdata
from tqdm import tqdm

import momask
from lib.configurator import ROOT, UserError, configure, given, read_argument
from lib.data import FRAMES_PER_TOKEN, Clips, by_length, equal_lengths, load_meta
from lib.detect import passes
from lib.evaluator import (Evaluator, Words, diversity, fid, interval, mm_dist, mpjpe, multimodality,
                       r_precision)
from generate import Pipeline, decoding_of
from lib.motion import SKELETONS, features_to_joints
from lib.runtime import atomic_write, must_be_writable, setup
from vq import load_tokenizer

# -----------------------------------------------------------------------------
data = 'toy'                 # whose test clips
out_dir = ''                 # the model's checkpoints, '' is out/<data>
evaluator = ''               # '' is <out_dir>/evaluator.pt, for momask the official one
glove_dir = ''               # the field's our_vab_* files, '' is <momask_root>/glove
split = 'test'
repeats = 20
max_clips = 0                # evaluate on this many clips; 0 is all
mm_batches = 3               # batches of 32 captions x 30 motions for MModality; 0 leaves it out
sweep = ''                   # try decoding settings: cond_scale:1,2,3 (pick on --split=val)
strata = False               # also Tables 5 and 6 of DynMask, and length strata
seed = 0
eval_json = ''               # '' is <out_dir>/eval_<data>_<split>.json
# machine
device = 'auto'              # 'auto' | 'cpu' | 'cuda'
dtype = 'auto'               # 'auto' (bfloat16 where hardware has it) | 'bfloat16' | 'float32'
gen_batch = 0                # motions generated at a time; 0 is 64 on a CPU, 256 on a GPU
config = configure(globals(), shared='config/decoding.py', init_from=('checkpoint', 'momask'))
# -----------------------------------------------------------------------------
BASE, FULL = 'base tokens only', 'full'
out_dir = out_dir or os.path.join('out', data)
folder = os.path.join('data', data)
decoding = decoding_of(config)
run = setup(device, dtype, seed)
gen_batch = gen_batch or (64 if run.device == 'cpu' else 256)

# clips, model, evaluator
meta, _, _ = load_meta(folder)
skeleton = SKELETONS[meta['skeleton']]
test = Clips(folder, split)
captions = test.split.captions
if len(test) < 32:
    raise UserError(f'data/{data} has {len(test)} {split} clips with captions: the protocol needs '
                    'at least 32.')
vq_path = os.path.join(out_dir, 'vq.pt')
no_mask = not os.path.exists(os.path.join(out_dir, mask_file)) and 'mask_file' not in given
if init_from == 'checkpoint' and no_mask and os.path.exists(vq_path):
    print(f'{out_dir} has no {mask_file}: judging its tokenizer alone.')
    pipe = Pipeline(load_tokenizer(vq_path), None, None, None, 'hash', meta, run.device)
else:
    pipe = momask.open_pipeline(config, out_dir, run.device)
if init_from == 'momask' and not evaluator:
    judge = momask.evaluator(momask_root, momask_data, glove_dir=glove_dir or None)
else:
    path = evaluator or os.path.join(out_dir, 'evaluator.pt')
    if not os.path.exists(path):
        raise UserError(f'{path} is missing: run `python train_eval.py config/{data}.py` first, or '
                        f'give --evaluator=out/{data}/evaluator.pt.')
    judge = Evaluator.load(path, glove_dir or None)
if not pipe.vq.config.dim == meta['dim'] == len(judge.mean):
    raise UserError(f"data/{data} has {meta['dim']} features, the model {pipe.vq.config.dim}, the "
                    f'evaluator {len(judge.mean)}: they must be of one skeleton.')
if judge.words is None:
    print('No GloVe files (--glove_dir): captions are embedded with hashed words, so R-precision '
          'and MM-Dist of this official evaluator mean nothing here; FID and Diversity do.')
    judge.words = Words()
judge = judge.to(run.device)
result_path = eval_json or os.path.join(out_dir, f'eval_{data}_{split}.json')
must_be_writable(result_path)
text_emb = judge.embed_text([caption['tokens'] for caption in captions]).numpy()
rows = ['real motion', 'tokenizer']
if pipe.mask is not None:
    rows.append(BASE)
    c, c_valid = pipe.condition([caption['text'] for caption in captions], folder)
if pipe.res is not None:
    rows.append(FULL)


def draw_clips(repeat):
    """One repeat's clips in shuffled order: captions (N,), first frames (N,), frames (N,), N a
    multiple of 32, by the field's length rule."""
    g = torch.Generator().manual_seed(seed * 100_003 + repeat)
    order = torch.randperm(len(test), generator=g)[:max_clips or None]
    order = order[:len(order) // 32 * 32]
    return test.draw(order, g, longest=pipe.n_max)


def reconstruct(motions):
    """Features through the tokenizer and back; motions of one length share a batch."""
    out = [None] * len(motions)
    for group in equal_lengths([len(motion) for motion in motions]):
        x = torch.from_numpy(np.stack([motions[i] for i in group])).to(run.device)
        y = pipe.vq.decode(pipe.vq.encode(pipe.vq.normalize(x)))
        for i, motion in zip(group, pipe.vq.denormalize(y).cpu().numpy()):
            out[i] = motion
    return out


def generate(chosen, frames, seed):
    """captions (b,), frames (b,) -> {row: list of b features}, of the same base tokens."""
    if pipe.mask is None:
        return {}
    n = frames // FRAMES_PER_TOKEN
    with run.autocast():
        ids = pipe.generate(c[chosen], c_valid[chosen], n, seed, **decoding)
    progress.update(len(n))
    made = {BASE: pipe.features(ids[..., :1], n)}
    if FULL in rows:
        made[FULL] = pipe.features(ids, n)
    return made


def foot_heights():
    """How high the four foot joints are, in metres, while they stand: the 95th percentile over the
    frames that the real clips mark as contact, (4,)."""
    heights = [[], [], [], []]
    every = torch.arange(len(test))
    _, first, frames = test.draw(every, torch.Generator().manual_seed(0), crop=False)
    for motion in test.features(first, frames):
        joints = features_to_joints(motion, meta['n_joints']) / meta['units_per_metre']
        for foot, joint in enumerate(skeleton.feet):
            heights[foot].append(joints[motion[:, foot - 4] > 0.5, joint, 1])
    heights = [np.concatenate(h) for h in heights]
    return np.array([np.percentile(h, 95) if len(h) else 0.0 for h in heights])


def look(joints, caption):
    """What a loss never shows, of one clip's joints (T, J, 3).

    slide: how far (cm a frame) a foot moves that is low and slow as in contacts of real clips; NaN
    where none is. What the motion itself says of its contacts is not asked: one that claims none
    would slide 0. accel: mean acceleration of a joint; jitter when above real motion's, blur when
    below. Toy: does the motion do what the text says?
    """
    joints = joints / meta['units_per_metre']
    feet = joints[:, list(skeleton.feet)]
    step = np.diff(feet, axis=0)                                          # (T - 1, 4, 3)
    # KIT's contact threshold, 0.2 mm a frame, would leave nothing to slide: take HumanML3D's
    threshold = meta['contact_threshold'] if meta['units_per_metre'] == 1 else 0.002
    slow = (step ** 2).sum(-1) < threshold
    stands = slow & (feet[:-1, :, 1] < standing_height)
    slide = np.linalg.norm(step[..., [0, 2]], axis=-1)[stands]
    accel = np.linalg.norm(np.diff(joints, 2, axis=0), axis=-1).mean() * meta['fps'] ** 2
    facts = {'slide cm': 100 * slide.mean() if len(slide) else np.nan, 'accel m/s2': accel}
    if 'script' in caption:
        n_actions = len(caption['script'])
        facts['detectors'] = passes(joints, caption['script'])
        facts['1 action' if n_actions == 1 else f'{n_actions} actions'] = facts['detectors']
    return facts


def strata_of(chosen, joints):
    """Strata of DynMask 4.4 -> {name: clip numbers}; joints: of the real clips.

    Table 5: words of the caption, with their inflections; a clip with words of both kinds counts as
    dynamic, one with neither not at all. '(ours)': with our synonyms besides the paper's words.
    Table 6: terciles of mean joint speed and length together (mean of the ranks), nothing of MSD.
    """
    with open(os.path.join(ROOT, 'config', 'strata_words.json'), encoding='utf-8') as f:
        table = json.load(f)
    words = {kind: {form for verb, forms in verbs.items() for form in (verb, *forms)}
             for kind, verbs in table.items()}
    spoken = [set(re.findall('[a-z]+', captions[i]['text'].lower())) for i in chosen]
    out = {}
    for whose in ('', ' (ours)'):
        static = words['static'] | words['static' + whose]
        dynamic = words['dynamic'] | words['dynamic' + whose]
        is_dynamic = np.array([bool(said & dynamic) for said in spoken])
        is_static = np.array([bool(said & static) for said in spoken]) & ~is_dynamic
        out['static' + whose] = np.flatnonzero(is_static)
        out['dynamic' + whose] = np.flatnonzero(is_dynamic)

    speed = np.array([np.linalg.norm(np.diff(j, axis=0), axis=-1).mean() for j in joints])
    length = np.array([len(j) for j in joints])
    speed_and_length = rankdata(speed, 'ordinal') + rankdata(length, 'ordinal')
    for names, key in ((('simple', 'medium', 'complex'), speed_and_length),
                       (('short', 'middle', 'long'), length)):
        out.update(zip(names, np.array_split(key.argsort(kind='stable'), 3)))
    return out


def one_repeat(repeat):
    """-> {row: {metric: value}}"""
    chosen, first, frames = draw_clips(repeat)
    rng = np.random.default_rng([seed, repeat])
    emb = {row: np.zeros((len(chosen), judge.config['out'])) for row in rows}
    joints = {row: [None] * len(chosen) for row in rows}
    facts = {row: [None] * len(chosen) for row in rows}
    for pick in by_length(frames, gen_batch):
        real = test.features(first[pick], frames[pick])
        motions = {'real motion': real, 'tokenizer': reconstruct(real)}
        batch_seed = (seed + repeat) * 100_003 + int(pick[0])
        motions.update(generate(chosen[pick], frames[pick], batch_seed))
        for row in rows:
            emb[row][pick] = judge.embed_motion(motions[row], frames[pick]).numpy()
            for i, motion in zip(pick.tolist(), motions[row]):
                joints[row][i] = features_to_joints(motion, meta['n_joints'])
                facts[row][i] = look(joints[row][i], captions[chosen[i]])

    result = {}
    texts = text_emb[chosen]
    for row in rows:
        top = r_precision(texts, emb[row])
        result[row] = {
            'R@1': top[0], 'R@2': top[1], 'R@3': top[2], 'FID': fid(emb['real motion'], emb[row]),
            'MM-Dist': mm_dist(texts, emb[row]), 'Diversity': diversity(emb[row], rng=rng)}
        for fact in dict.fromkeys(key for clip in facts[row] for key in clip):
            values = [clip[fact] for clip in facts[row] if fact in clip]
            result[row][fact] = np.nanmean(values)
    error = [mpjpe(ours, real).mean()
             for ours, real in zip(joints['tokenizer'], joints['real motion'])]
    result['tokenizer']['MPJPE mm'] = 1000 * np.mean(error) / meta['units_per_metre']
    if mm_batches and pipe.mask is not None:
        for row, value in measure_multimodality(chosen, frames, repeat, rng).items():
            result[row]['MModality'] = value
    if strata:
        for name, part in strata_of(chosen, joints['real motion']).items():
            for row in rows:
                if len(part) >= 2:
                    value = fid(emb['real motion'][part], emb[row][part])
                    result[row][f'FID {name}'] = value
        for row in rows[1:]:
            if {'FID static', 'FID dynamic'} <= result[row].keys():
                ratio = result[row]['FID dynamic'] / result[row]['FID static']
                result[row]['dynamic / static'] = ratio
    return result


def measure_multimodality(chosen, frames, repeat, rng):
    """30 motions of each of the first 32 x mm_batches captions -> {row: MModality}."""
    many = chosen[:32 * mm_batches].repeat_interleave(30)
    length = frames[:32 * mm_batches].repeat_interleave(30)
    emb = {row: np.zeros((len(many), judge.config['out'])) for row in rows[2:]}
    for pick in by_length(length, gen_batch):
        made = generate(many[pick], length[pick], (seed + repeat + 7919) * 100_003 + int(pick[0]))
        for row, motions in made.items():
            emb[row][pick] = judge.embed_motion(motions, length[pick]).numpy()
    return {row: multimodality(e.reshape(-1, 30, e.shape[1]), rng=rng) for row, e in emb.items()}


def print_table(names):
    wide = [max(16, len(name) + 2) for name in names]
    print(' ' * 18 + ''.join(f'{name:>{w}s}' for name, w in zip(names, wide)))
    for row, metrics in summary.items():
        line = f'{row:18s}'
        for name, w in zip(names, wide):
            cell = ''
            if name in metrics:
                cell = f'{metrics[name][0]:.3f} ±{metrics[name][1]:.3f}'
            line += f'{cell:>{w}s}'
        print(line)


def swept():
    """'cond_scale:1,2,3' -> the setting's name and its values."""
    name, _, values = sweep.partition(':')
    if name not in decoding or not values:
        raise UserError(f"sweep is '{sweep}', expected a decoding setting and values, as in "
                        f'cond_scale:1,2,3; the settings are {", ".join(decoding)}.')
    return name, [read_argument(f'--{name}={value}', decoding)[name]
                  for value in values.split(',')]


def summarize(results):
    """-> {row: {metric: (mean, half the 95% interval)}}, over the repeats that have the metric: few
    clips may hold none of three actions."""
    summary = {}
    for row in results[0]:
        summary[row] = {}
        for metric in dict.fromkeys(key for result in results for key in result[row]):
            values = [result[row][metric] for result in results if metric in result[row]]
            mean, half = interval(values)
            summary[row][metric] = (float(mean), float(half))
    return summary


clock = time.perf_counter()
name, values = swept() if sweep else ('steps', [steps])
n_clips = len(draw_clips(0)[0])
per_repeat = n_clips + 30 * min(32 * mm_batches, n_clips)
progress = tqdm(total=len(values) * repeats * per_repeat, desc='generated', mininterval=1,
                unit=' motions', disable=pipe.mask is None)
standing_height = foot_heights()
summary = {}
for value in values:
    decoding[name] = value
    results = [one_repeat(repeat) for repeat in range(repeats)]
    found = summarize(results)
    if sweep:
        found = {f'{name} {value}': found[rows[-1]]}
    summary.update(found)
progress.close()
seconds = time.perf_counter() - clock

print(f'\n{data} {split}, {n_clips} clips, {repeats} repeats, {steps} steps, guidance '
      f'{cond_scale:g}/{res_scale:g}, {seconds:.0f} s on {run.device}; mean ± 95% interval')
names = ['R@1', 'R@2', 'R@3', 'FID', 'MM-Dist', 'Diversity', 'MModality', 'MPJPE mm', 'slide cm',
         'accel m/s2', 'detectors', '1 action', '2 actions', '3 actions']
print_table([name for name in names if any(name in metrics for metrics in summary.values())])
if strata and not sweep:
    print_table([name for name in summary['tokenizer'] if name.startswith(('FID ', 'dynamic /'))])
with atomic_write(result_path, 'w') as f:
    written = dict(rows=summary, val=pipe.val, settings=config, clips=n_clips, seconds=seconds,
                   device=run.device, per_repeat=results)
    json.dump(written, f, indent=1, default=float)
print(f'written to {result_path}')
