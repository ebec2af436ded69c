r"""The evaluation protocol of Guo et al. 2022 on generated motion, with 95% intervals:

    python eval_t2m.py config/toy.py                                  # train_eval.py comes first
    python eval_t2m.py config/toy.py --dynamics=True --split=val      # where the model fails
    python eval_t2m.py config/toy.py --data=bandai --out_dir=out/toy \
        --evaluator=out/bandai/evaluator.pt                           # on other data (Table 7)
    python eval_t2m.py config/hml3d.py --evaluator=official --momask_root=checkpoints
    python eval_t2m.py config/hml3d.py config/momask.py --init_from=momask \
        --momask_root=checkpoints

One repeat: shuffle the test clips, draw one caption of each, drop the last partial batch of 32,
embed, compare. Rows: real motion, tokenizer reconstruction, base tokens only, full. RESULTS.md,
"Protocol", lists every difference from the reference code.
"""
import lib.configurator   # first, to catch Ctrl-C during the imports
import os
import time

import numpy as np
import torch
from tqdm import tqdm

import momask
import msd
from generate import Pipeline, decoding_of, load_pipeline, open_pipeline
from lib.configurator import UserError, configure, read_argument
from lib.data import FRAMES_PER_TOKEN, Clips, by_length, equal_lengths, load_meta
from lib.detect import passes
from lib.evaluator import (Evaluator, diversity, fid, interval, mm_dist, mpjpe, multimodality,
                           r_precision)
from lib.motion import SKELETONS, features_to_joints
from lib.report import refuse_other_files, say, table, write_results
from lib.runtime import setup
from lib.strata import STRATA, clip_strata, error_by_speed, strata_fids, token_speed
from vq import load_tokenizer

# -----------------------------------------------------------------------------
data = 'toy'                 # data set with the test clips
out_dir = ''                 # the model's checkpoints, '' is out/<data>
evaluator = ''               # '' is <out_dir>/evaluator.pt; 'official' is that of momask_root
glove_dir = ''               # Guo et al.'s our_vab_* files, '' is <momask_root>/glove
split = 'test'
repeats = 20
max_clips = 0                # evaluate on this many clips, at least 32; 0 is all
mm_batches = 3               # batches of 32 captions x 30 motions for MModality; 0 leaves it out
sweep = ''                   # try decoding settings: cond_scale:1,2,3 (choose on --split=val)
dynamics = False             # also FID by strata (Tables 5 and 6 of DynMask) and error by speed
pooled = 10                  # dynamics: a stratum's FID is of so many repeats' embeddings
confidence_of = ''           # dynamics: mask.pt of the model that chooses masks, '' is the same
seed = 0
eval_json = ''               # '' is <out_dir>/eval_<data>_<split>.json
# machine
device = 'auto'              # 'auto' | 'cpu' | 'cuda'
dtype = 'auto'               # 'auto' (bfloat16 where hardware has it) | 'bfloat16' | 'float32'
gen_batch = 0                # motions generated at a time; 0 is 64 on a CPU, 256 on a GPU
config = configure(globals(), shared=True)
# -----------------------------------------------------------------------------
REAL, TOKENIZER, BASE, FULL = 'real motion', 'tokenizer', 'base tokens only', 'full'
COLUMNS = ['R@1', 'R@2', 'R@3', 'FID', 'MM-Dist', 'Diversity', 'MModality', 'MPJPE mm', 'slide cm',
           'accel m/s2', 'detectors', '1 action', '2 actions', '3 actions']
out_dir = out_dir or os.path.join('out', data)
folder = os.path.join('data', data)
decoding = decoding_of(config)
run = setup(device, dtype, seed)
gen_batch = gen_batch or (64 if run.device == 'cpu' else 256)
if sweep and dynamics:
    raise UserError('sweep and dynamics cannot be combined: run them one after the other.')
result_path = eval_json or os.path.join(out_dir, f'eval_{data}_{split}.json')
refuse_other_files(result_path)

# clips
meta, _, _ = load_meta(folder)
skeleton = SKELETONS[meta['skeleton']]
test = Clips(folder, split)
captions = test.split.captions
if min(len(test), max_clips or len(test)) < 32:
    raise UserError(f'{folder} has {len(test)} {split} clips with captions and max_clips is '
                    f'{max_clips}, expected at least 32 clips: R-precision compares 32 motions.')

# model
vq_path, mask_path = (os.path.join(out_dir, name) for name in ('vq.pt', 'mask.pt'))
may_miss = init_from == 'checkpoint' and mask_file == 'mask.pt' and os.path.exists(vq_path)
if may_miss and not os.path.exists(mask_path):
    say(f'{out_dir} has no mask.pt: evaluating its tokenizer alone.')
    pipe = Pipeline(load_tokenizer(vq_path), None, None, None, 'hash', meta, run.device)
else:
    pipe = open_pipeline(config, data, out_dir, run.device)

# evaluator
if evaluator == 'official' or init_from == 'momask' and not evaluator:
    if not momask_root:
        raise UserError('The official evaluator needs --momask_root, the official weights.')
    judge = momask.evaluator(momask_root, 'kit' if data == 'kit' else 't2m', glove_dir or None)
else:
    judge = Evaluator.load(evaluator or os.path.join(out_dir, 'evaluator.pt'), glove_dir or None)
if not pipe.vq.config.dim == meta['dim'] == len(judge.mean):
    raise UserError(f"{folder} has {meta['dim']} features, the model {pipe.vq.config.dim}, the "
                    f'evaluator {len(judge.mean)}: they must be of one skeleton.')
judge = judge.to(run.device)
text_emb = None
if judge.words:
    text_emb = judge.embed_text([caption['tokens'] for caption in captions]).numpy()
else:
    say('R-precision and MM-Dist are left out: they need the GloVe files our_vab_* (--glove_dir, '
        f'by default {os.path.join(momask_root, "glove")}).')

rows = [REAL, TOKENIZER]
if pipe.mask is not None:
    rows.append(BASE)
    c, role = pipe.encode_text([caption['text'] for caption in captions], folder)
if pipe.res is not None:
    rows.append(FULL)
to_pool = []   # embeddings and strata of the repeats whose FID is not computed yet (--dynamics)


def draw_clips(repeat):
    """One repeat's clips in shuffled order: captions (N,), first frames (N,), frames (N,), with N a
    multiple of 32, cropped by the standard length rule."""
    g = torch.Generator().manual_seed(seed * 100_003 + repeat)
    order = torch.randperm(len(test), generator=g)[:max_clips or None]
    order = order[:len(order) // 32 * 32]
    return test.draw(order, g, longest=pipe.n_max)


def reconstruct(motions):
    """Features through the tokenizer and back; motions of the same length share a batch."""
    out = {}
    for group in equal_lengths([len(motion) for motion in motions]):
        x = torch.from_numpy(np.stack([motions[i] for i in group])).to(run.device)
        y = pipe.vq.decode(pipe.vq.encode(pipe.vq.normalize(x)))
        out.update(zip(group.tolist(), pipe.vq.denormalize(y).cpu().numpy()))
    return [out[i] for i in range(len(motions))]


def generate(chosen, frames, seed):
    """captions (b,), frames (b,) -> {row: b features}, all rows with the same base tokens."""
    if pipe.mask is None:
        return {}
    n = frames // FRAMES_PER_TOKEN
    with run.autocast():
        ids = pipe.generate(c[chosen], role[chosen], n, seed, **decoding)
    progress.update(len(n))
    tokens = {BASE: ids[..., :1], FULL: ids}
    return {row: pipe.features(tokens[row], n) for row in rows[2:]}


def foot_heights():
    """Heights of the four foot joints in contact with the floor, in metres: the 95th percentile
    over all contact frames of the real clips, (4,)."""
    every = torch.arange(len(test))
    _, first, frames = test.draw(every, torch.Generator().manual_seed(0), crop=False)
    motions = test.features(first, frames)
    joints = np.concatenate([features_to_joints(x, meta['n_joints']) for x in motions])
    heights = joints[:, list(skeleton.feet), 1] / meta['units_per_metre']
    contact = np.concatenate(motions)[:, -4:] > 0.5
    return np.array([np.percentile(height[down], 95) if down.any() else 0.0
                     for height, down in zip(heights.T, contact.T)])


def look(joints, caption):
    """Measure what no embedding shows, on one clip's joints (T, J, 3).

    slide: how far (cm per frame) a foot moves while it is as low and as slow as in contacts of real
    clips; NaN if it never is. Contacts predicted by the motion itself are ignored, because a motion
    without any would slide 0. accel: mean joint acceleration; above real motion's it is jitter,
    below it is blur. Toy: does the motion do what the text says?
    """
    joints = joints / meta['units_per_metre']
    feet = joints[:, list(skeleton.feet)]
    step = np.diff(feet, axis=0)                                          # (T - 1, 4, 3)
    # KIT's contact threshold, 0.2 mm a frame, would leave nothing to slide: use HumanML3D's
    threshold = meta['contact_threshold'] if meta['units_per_metre'] == 1 else 0.002
    slow = (step ** 2).sum(-1) < threshold
    planted = slow & (feet[:-1, :, 1] < standing_height)
    slide = np.linalg.norm(step[..., [0, 2]], axis=-1)[planted]
    accel = np.linalg.norm(np.diff(joints, 2, axis=0), axis=-1).mean() * meta['fps'] ** 2
    facts = {'slide cm': 100 * slide.mean() if len(slide) else np.nan, 'accel m/s2': accel}
    if 'script' in caption:
        n_actions = len(caption['script'])
        facts['detectors'] = passes(joints, caption['script'])
        facts['1 action' if n_actions == 1 else f'{n_actions} actions'] = facts['detectors']
    return facts


def one_repeat(repeat):
    """-> {row: {metric: value}}"""
    chosen, first, frames = draw_clips(repeat)
    rng = np.random.default_rng([seed, repeat])
    emb = {row: np.empty((len(chosen), judge.config['out'])) for row in rows}
    joints = {row: [None] * len(chosen) for row in rows}
    for pick in by_length(frames, gen_batch):
        real = test.features(first[pick], frames[pick])
        motions = {REAL: real, TOKENIZER: reconstruct(real)}
        batch_seed = (seed + repeat) * 100_003 + int(pick[0])
        motions |= generate(chosen[pick], frames[pick], batch_seed)
        for row in rows:
            emb[row][pick] = judge.embed_motion(motions[row], frames[pick]).numpy()
            for i, motion in zip(pick.tolist(), motions[row]):
                joints[row][i] = features_to_joints(motion, meta['n_joints'])

    result = {row: {} for row in rows}
    for row, figures in result.items():
        if text_emb is not None:
            texts = text_emb[chosen]
            figures.update(zip(('R@1', 'R@2', 'R@3'), r_precision(texts, emb[row])))
            figures['MM-Dist'] = mm_dist(texts, emb[row])
        figures['FID'] = fid(emb[REAL], emb[row])
        figures['Diversity'] = diversity(emb[row], rng=rng)
        facts = [look(clip, captions[i]) for clip, i in zip(joints[row], chosen)]
        for fact in dict.fromkeys(key for clip in facts for key in clip):
            values = [clip[fact] for clip in facts if fact in clip]
            figures[fact] = np.nan if np.isnan(values).all() else np.nanmean(values)
    error = [mpjpe(ours, real).mean() for ours, real in zip(joints[TOKENIZER], joints[REAL])]
    result[TOKENIZER]['MPJPE mm'] = 1000 * np.mean(error) / meta['units_per_metre']
    if mm_batches and pipe.mask is not None:
        for row, value in measure_multimodality(chosen, frames, repeat, rng).items():
            result[row]['MModality'] = value
    if dynamics:
        texts = [captions[i]['text'] for i in chosen]
        to_pool.append((emb, clip_strata(texts, joints[REAL])))
    return result


def measure_multimodality(chosen, frames, repeat, rng):
    """30 motions of each of the first 32 x mm_batches captions -> {row: MModality}."""
    many = chosen[:32 * mm_batches].repeat_interleave(30)
    length = frames[:32 * mm_batches].repeat_interleave(30)
    emb = {row: np.zeros((len(many), judge.config['out'])) for row in rows[2:]}
    for pick in by_length(length, gen_batch):
        batch_seed = (seed + repeat + 7919) * 100_003 + int(pick[0])
        for row, motions in generate(many[pick], length[pick], batch_seed).items():
            emb[row][pick] = judge.embed_motion(motions, length[pick]).numpy()
    return {row: multimodality(e.reshape(-1, 30, e.shape[1]), rng=rng) for row, e in emb.items()}


# -------------------------------------------------------------------- where errors are (--dynamics)


def conditional(model, ids, c, role, valid):
    """Log-probabilities (b, n, V) of the conditional pass, without guidance: ids (b, n) with
    [MASK]s. Motion-aware attention reads the MSD that msd_decode asks for."""
    with torch.no_grad(), run.autocast():
        logits = model(ids, c, role, valid)
        if model.config.spectral_attn and msd_decode == 'guess':
            guess = torch.where(ids == model.MASK, logits.argmax(-1), ids)
            spectrum = model.spectrum(torch.where(valid, guess, model.PAD))
            logits = model(ids, c, role, valid, spectrum=spectrum)
    return logits.float().log_softmax(-1)


def token_errors():
    """`error_by_speed` of the masked transformer, on the clips of the first repeat."""
    model, text = pipe.mask, (c, role)
    judged_by, its_text = model, text   # the model that decides which tokens are masked
    if confidence_of:
        place, name = os.path.split(confidence_of)
        other = load_pipeline(place or '.', run.device, name)
        if other.vq.fingerprint() != pipe.vq.fingerprint():
            raise UserError(f'{confidence_of} was trained on another tokenizer than the model.')
        judged_by = other.mask
        its_text = other.encode_text([caption['text'] for caption in captions], folder)

    chosen, first, frames = draw_clips(0)
    batches = []
    for pick in by_length(frames, gen_batch):
        n = frames[pick] // FRAMES_PER_TOKEN
        ids = torch.zeros(len(pick), int(n.max()), dtype=torch.long)
        speed = torch.zeros(ids.shape)
        for i, motion in enumerate(test.features(first[pick], frames[pick])):
            joints = features_to_joints(motion, meta['n_joints']) / meta['units_per_metre']
            speed[i, :n[i]] = torch.from_numpy(token_speed(joints, meta['fps'])).float()
            ids[i, :n[i]] = pipe.tokenize(motion)[:, 0].cpu()
        ids, speed = ids.to(run.device), speed.to(run.device)
        valid = torch.arange(ids.shape[1], device=run.device) < n.to(run.device)[:, None]
        f, _ = model.spectrum(torch.where(valid, ids, model.PAD))
        own, others = ([part[chosen[pick]].to(run.device) for part in x] for x in (text, its_text))
        all_masked = torch.full_like(ids, model.MASK)
        batches.append(dict(
            ids=ids, valid=valid, speed=speed, text=own,
            omega=msd.complexity(f, model.config.omega),
            velocity=msd.speed(ids, model.gram(), valid),
            confidence=conditional(judged_by, all_masked, *others, valid).amax(-1)))
    return error_by_speed(
        batches, lambda batch, ids: conditional(model, ids, *batch['text'], batch['valid']),
        model.MASK, seed)


# ------------------------------------------------------------------------------------------- tables


def swept():
    """'cond_scale:1,2,3' -> the setting's name and its values."""
    name, _, values = sweep.partition(':')
    if name not in decoding or not values:
        raise UserError(f"sweep is '{sweep}', expected a decoding setting and values, as in "
                        f'cond_scale:1,2,3; the settings are {", ".join(decoding)}.')
    return name, [read_argument(f'--{name}={value}', decoding)[name]
                  for value in values.split(',')]


def summarize(results):
    """-> {row: {metric: (mean, half the 95% interval)}}, over the repeats that have the metric: a
    small set may have no clip with three actions."""
    summary = {row: {} for row in results[0]}
    for row, figures in summary.items():
        for metric in dict.fromkeys(key for result in results for key in result[row]):
            values = [result[row][metric] for result in results if metric in result[row]]
            figures[metric] = interval(values)
    return summary


def show(summary, columns, repeats):
    """Print columns of a summary, without intervals if it is of one repeat."""
    columns = [name for name in columns if any(name in figures for figures in summary.values())]
    form = '{:.3f} ±{:.3f}' if repeats > 1 else '{:.3f}'
    body = [[row, *(form.format(*figures[name]) if name in figures else '' for name in columns)]
            for row, figures in summary.items()]
    say(table(['', *columns], body) + '\n')


clock = time.perf_counter()
name, values = swept() if sweep else ('steps', [steps])
n_clips = len(draw_clips(0)[0])
per_repeat = n_clips + 30 * min(32 * mm_batches, n_clips)
progress = tqdm(total=len(values) * repeats * per_repeat, desc='generated', mininterval=1,
                unit=' motions', disable=pipe.mask is None)
standing_height = foot_heights()
summary, pooled_fids, pooled = {}, [], min(max(1, pooled), repeats)
for value in values:
    decoding[name] = value
    results = []
    for repeat in range(repeats):
        results.append(one_repeat(repeat))
        if dynamics and len(to_pool) == pooled:
            pooled_fids.append(strata_fids(to_pool))
            to_pool.clear()
    found = summarize(results)
    summary |= {f'{name} {value}': found[rows[-1]]} if sweep else found
progress.close()

extra = {}
if dynamics:
    extra = dict(pooled=summarize(pooled_fids), repeats_pooled=pooled)
    if pipe.mask is not None:
        extra['tokens'] = token_errors()
seconds = time.perf_counter() - clock
write_results(result_path, rows=summary, **extra, val=pipe.val, settings=config, clips=n_clips,
              seconds=seconds, device=run.device, per_repeat=results)

note = f'{repeats} repeats, mean ± 95% interval' if repeats > 1 else '1 repeat'
if pipe.mask is not None and pipe.res is None:
    say(f'no row "{FULL}", because {out_dir} has no res.pt (train_mask.py --stage=res)')
say(f'\n{data} {split}, {n_clips} clips, {note}; {steps} steps, guidance '
    f'{cond_scale:g}/{res_scale:g}, {seconds:.0f} s on {run.device}\n')
show(summary, COLUMNS, repeats)
if dynamics:
    say(f'FID of strata, {pooled} x {n_clips} embeddings pooled:')
    columns = [f'FID {name}' for name in STRATA] + ['dynamic / static']
    show(extra['pooled'], columns, len(pooled_fids))
if 'tokens' in extra:
    say('Cross-entropy of masked base tokens by joint speed, and rank correlations (rho) with it:')
    columns = list(next(iter(extra['tokens'].values())))
    say(table(['masks', *columns], [[mask, *(f'{row[name]:.3f}' for name in columns)]
                                    for mask, row in extra['tokens'].items()]) + '\n')
say(f'written to {result_path}')
