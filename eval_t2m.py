"""The protocol of Guo et al. 2022 on generated motion, with 95% intervals:

    python eval_t2m.py config/toy.py                                    # needs train_eval.py's evaluator.pt
    python eval_t2m.py config/bandai.py --strata=True --repeats=5
    python eval_t2m.py config/toy.py --data=bandai --out_dir=out/toy    # a model on data it was not trained on (Table 7)
    python eval_t2m.py config/hml3d.py --init_from=momask --momask_root=checkpoints

One repeat: shuffle the test clips, one caption each, drop the last partial batch of 32; embed; compare. Rows: real motion,
tokenizer reconstruction, base tokens only, full. Whole sets are generated in large batches sorted by length; batches of 32
matter only to R-precision. README, "Protocol", lists every difference from the reference.
"""
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

import text
from configurator import choose, configure, fail, setup
from evaluator import Evaluator, Words, diversity, fid, interval, mm_dist, mpjpe, multimodality, r_precision
from model import Pipeline
from motion import SKELETONS, features_to_joints, load_meta, load_split
from toy import passes
from vq import CheckpointError

# -----------------------------------------------------------------------------
data = 'toy'                 # whose test clips
out_dir = ''                 # the model's checkpoints, '' is out/<data>
mask_file = 'mask.pt'        # which masked transformer there
init_from = 'checkpoint'     # 'checkpoint' | 'momask'
momask_root = ''
momask_data = 't2m'          # 't2m' | 'kit'
momask_mask = ''             # checkpoint names there; '' is the only folder t2m_* / tres_*
momask_res = ''
momask_text = 'clip'         # text encoder for the official weights; their own is 'clip'
evaluator = ''               # '' is <out_dir>/evaluator.pt, for momask the official one under momask_root
glove_dir = ''               # the field's our_vab_* files, '' is <momask_root>/glove
split = 'test'
repeats = 20
max_clips = 0                # evaluate on this many clips; 0 is all
mm_batches = 3               # batches of 32 captions, 30 motions each, for MModality; 0 leaves it out
strata = False               # also Tables 5 and 6 of DynMask, and length strata
seed = 0
eval_json = ''               # '' is <out_dir>/eval_<data>_<split>.json
# decoding, as in sample.py
steps = 10
cond_scale = 4.0
res_scale = 5.0
temperature = 1.0
das_sampling = True
lambda_D = 0.5
beta = 0.5
sigma_max = 0.5
msd_decode = 'kept'
# machine
device = 'auto'
dtype = 'auto'
gen_batch = 0                # motions generated at a time; 0 is 64 on a CPU, 256 on a GPU
config = configure(globals())
# -----------------------------------------------------------------------------
decoding = dict(steps=steps, cond_scale=cond_scale, temperature=temperature, das=das_sampling, lambda_D=lambda_D, beta=beta,
                sigma_max=sigma_max, msd_decode=msd_decode)
DYNAMIC = ('kick', 'spin', 'jump', 'danc', 'run', 'punch', 'hop', 'turn', 'throw', 'cartwheel', 'slash', 'dash')
ROWS = ('base tokens only', 'full')
out_dir = out_dir or os.path.join('out', data)
choose('init_from', init_from, 'checkpoint', 'momask')
choose('msd_decode', msd_decode, 'kept', 'guess')
if min(steps, repeats) < 1 or temperature <= 0:
    fail(f'steps is {steps}, repeats {repeats}, temperature {temperature}: expected at least 1, 1, and above 0.')
run = setup(device, dtype, seed)
try:
    folder = os.path.join('data', data)
    meta, test = load_meta(folder)[0], load_split(folder, split)
    if init_from == 'momask':
        pipe = Pipeline.from_momask(momask_root, momask_data, momask_mask, momask_res, momask_text, run.device)
        judge = Evaluator.load(evaluator, glove_dir or None) if evaluator else Evaluator.from_t2m(momask_root, momask_data, glove_dir or None)
    else:
        pipe = Pipeline.from_dir(out_dir, run.device, mask_file)
        path = evaluator or os.path.join(out_dir, 'evaluator.pt')
        if not os.path.exists(path):
            fail(f'{path} is missing: run `python train_eval.py config/{data}.py` first, or give --evaluator=out/{data}/evaluator.pt.')
        judge = Evaluator.load(path, glove_dir or None)
    if pipe.vq.config.dim != meta['dim'] or len(judge.mean) != meta['dim']:
        fail(f"data/{data} has {meta['dim']} features, the model {pipe.vq.config.dim}, the evaluator {len(judge.mean)}: "
             'they must be of one skeleton.')
    texts = [c['text'] for c in test.captions]
    vectors = text.encode(texts, pipe.text_encoder, folder, run.device)
    if judge.words is None:
        print('No GloVe files (--glove_dir): captions are embedded with hashed words, so R-precision and MM-Dist of this '
              'official evaluator mean nothing here; FID and Diversity do.')
        judge.words = Words()
    judge = judge.to(run.device)
    text_emb = judge.embed_text([c['tokens'] for c in test.captions]).numpy()   # of every caption, once
except (CheckpointError, ValueError, FileNotFoundError, RuntimeError) as e:
    fail(str(e))
ROWS = ROWS if pipe.res is not None else ROWS[:1]
of_clip = [[] for _ in test.start]
for i, c in enumerate(test.captions):
    of_clip[c['clip']].append(i)


def draw(rng):
    """One repeat's clips in shuffled order: caption index, first frame, frames (each (N,)), N a multiple of 32. The field's
    variation: lengths are rounded down to whole tokens, one time in three one token shorter, with a random start."""
    order = rng.permutation([i for i, captions in enumerate(of_clip) if captions])[:max_clips or None]
    order = order[:len(order) // 32 * 32]
    if len(order) == 0:
        fail(f'data/{data} has {len(test)} {split} clips with captions: the protocol needs at least 32.')
    frames = np.minimum(test.length[order] // 4, pipe.meta['max_frames'] // 4)
    frames = 4 * np.maximum(frames - (rng.integers(3, size=len(order)) == 2), 1)
    first = test.start[order] + rng.integers(test.length[order] - frames + 1)
    return np.array([rng.choice(of_clip[i]) for i in order]), first, frames


def in_batches(work, frames):
    """Run work(pick) on batches of similar length, pick (b,) indices into frames (N,), and put the parts together: work's
    {row: (list of b, ...)} -> {row: (list of N, ...)} in the given order. On CPU every core works on a batch of its own:
    small tensors share a core's cache and wait for nobody, 10% faster than all cores on one batch."""
    order = np.argsort(frames, kind='stable')
    size = gen_batch or (64 if run.device == 'cpu' else 256)
    batches = [order[i:i + size] for i in range(0, len(order), size)]
    cores = torch.get_num_threads()
    workers = min(cores, len(batches)) if run.device == 'cpu' else 1
    with ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(cores // workers)) as pool:
        parts = list(pool.map(work, batches))
    torch.set_num_threads(cores)
    back = np.argsort(order)
    join = lambda lists: [x for part in lists for x in part]
    return {row: tuple([joined[i] for i in back] for joined in map(join, zip(*(p[row] for p in parts)))) for row in parts[0]}


def generate(captions, frames, seed):
    """One batch -> {'base tokens only': features, 'full': features}, each a list of un-normalised (T_i, D), of the same base tokens."""
    n = torch.from_numpy(frames // 4)
    with run.autocast():
        ids = pipe.generate(vectors[captions], n, seed, res_scale, **decoding)
    progress.update(len(frames))
    return {row: [m.numpy() for m in pipe.features(ids[..., :1] if row == ROWS[0] else ids, n)] for row in ROWS}


def reconstruct(motions):
    """Through the tokenizer and back; motions of one length share a batch."""
    out, lengths = [None] * len(motions), np.array([len(m) for m in motions])
    for T in np.unique(lengths):
        pick = np.flatnonzero(lengths == T)
        x = pipe.vq.normalize(torch.from_numpy(np.stack([motions[j] for j in pick])).to(run.device))
        for j, y in zip(pick, pipe.vq.denormalize(pipe.vq.decode(pipe.vq.encode(x)))):
            out[j] = y.cpu().numpy()
    return out


def measure(captions, emb, real_emb, rng):
    """The field's metrics of one row."""
    top = r_precision(text_emb[captions], emb)
    return {'R@1': top[0], 'R@2': top[1], 'R@3': top[2], 'FID': fid(real_emb, emb), 'MM-Dist': mm_dist(text_emb[captions], emb),
            'Diversity': diversity(emb, rng=rng)}


def facts(motion, joints, caption):
    """What a loss never shows, of one clip: how far feet move in frames whose contact feature says they stand (cm per frame), and
    the mean acceleration of a joint (m/s^2; jitter when it is above real motion's, blur when below). Toy: does the motion do what
    the text says?"""
    joints = joints / meta['units_per_metre']
    feet = joints[:, list(SKELETONS[meta['skeleton']].feet)][..., [0, 2]]
    stands = motion[:-1, -4:] > 0.5          # a contact feature speaks of the step to the next frame
    slide = (np.linalg.norm(np.diff(feet, axis=0), axis=-1) * stands).sum() / max(stands.sum(), 1)
    accel = np.linalg.norm(np.diff(joints, 2, axis=0), axis=-1).mean() * meta['fps'] ** 2
    detected = {'detectors': passes(joints, caption['script'])} if 'script' in caption else {}
    return {'slide cm': 100 * slide, 'accel m/s2': accel, **detected}


def groups(captions, joints):
    """Strata of DynMask 4.4 -> {name: row indices}. Table 5: keywords in the caption. Table 6: terciles of mean joint speed
    and length together (mean of the two ranks), nothing of MSD. Length: terciles. joints: of real motion."""
    speed = [np.linalg.norm(np.diff(j, axis=0), axis=-1).mean() for j in joints]
    rank = lambda x: np.argsort(np.argsort(x, kind='stable'), kind='stable')
    length = np.array([len(j) for j in joints])
    dynamic = np.array([any(w in texts[i].lower() for w in DYNAMIC) for i in captions])
    out = {'static (keywords)': np.flatnonzero(~dynamic), 'dynamic (keywords)': np.flatnonzero(dynamic)}
    for names, key in ((('simple', 'medium', 'complex'), rank(speed) + rank(length)), (('short', 'middle', 'long'), length)):
        out.update(zip(names, np.array_split(np.argsort(key, kind='stable'), 3)))
    return out


def one_repeat(r):
    """-> {row: {metric: value}}"""
    rng = np.random.default_rng([seed, r])
    captions, first, frames = draw(rng)

    def clips(pick):
        """A batch, all the way: row -> embeddings, joints, facts of each clip."""
        real = [np.array(test.features[a:a + T]) for a, T in zip(first[pick], frames[pick])]
        motions = {'real motion': real, 'tokenizer': reconstruct(real),
                   **generate(captions[pick], frames[pick], (seed + r) * 100_003 + int(pick[0]))}
        joints = {row: [features_to_joints(torch.as_tensor(x), meta['n_joints']).numpy() for x in m] for row, m in motions.items()}
        return {row: (judge.embed_motion(m, frames[pick]).numpy(), joints[row],
                      [facts(*clip) for clip in zip(m, joints[row], (test.captions[i] for i in captions[pick]))])
                for row, m in motions.items()}

    found = in_batches(clips, frames)
    emb = {row: np.stack(e) for row, (e, _, _) in found.items()}
    joints = {row: j for row, (_, j, _) in found.items()}
    rows = {row: {**measure(captions, emb[row], emb['real motion'], rng),
                  **{k: float(np.mean([clip[k] for clip in f])) for k in f[0]}} for row, (_, _, f) in found.items()}
    error = [mpjpe(a, b).mean() for a, b in zip(joints['tokenizer'], joints['real motion'])]
    rows['tokenizer']['MPJPE mm'] = 1000 * float(np.mean(error)) / meta['units_per_metre']
    if mm_batches:
        many, length = (np.repeat(x[:32 * mm_batches], 30) for x in (captions, frames))

        def again(pick):
            made = generate(many[pick], length[pick], (seed + r + 7919) * 100_003 + int(pick[0]))
            return {row: (judge.embed_motion(m, length[pick]).numpy(),) for row, m in made.items()}

        for row, (e,) in in_batches(again, length).items():
            rows[row]['MModality'] = multimodality(np.stack(e).reshape(-1, 30, len(e[0])), rng=rng)
    if strata:
        for name, pick in groups(captions, joints['real motion']).items():
            if len(pick) >= 2:
                for row in rows:
                    rows[row][f'FID {name}'] = fid(emb['real motion'][pick], emb[row][pick])
    return rows


def table(names):
    wide = [max(16, len(n) + 2) for n in names]
    print(f"{'':18s}" + ''.join(f'{n:>{w}s}' for n, w in zip(names, wide)))
    for row, metrics in summary.items():
        cells = [f'{metrics[n][0]:.3f} ±{metrics[n][1]:.3f}' if n in metrics else '' for n in names]
        print(f'{row:18s}' + ''.join(f'{c:>{w}s}' for c, w in zip(cells, wide)))


clock = time.perf_counter()
count = len(draw(np.random.default_rng(0))[0]) + 32 * 30 * mm_batches
progress = tqdm(total=repeats * count, desc='generated', mininterval=1, unit=' motions')
results = [one_repeat(r) for r in range(repeats)]
progress.close()
seconds = time.perf_counter() - clock
summary = {row: {m: interval([r[row][m] for r in results]) for m in results[0][row]} for row in results[0]}
summary = {row: {m: (float(mean), float(half)) for m, (mean, half) in metrics.items()} for row, metrics in summary.items()}
plain = ['R@1', 'R@2', 'R@3', 'FID', 'MM-Dist', 'Diversity', 'MModality', 'MPJPE mm', 'slide cm', 'accel m/s2'] + \
    (['detectors'] if 'detectors' in summary['real motion'] else [])
print(f'\n{data} {split}, {len(draw(np.random.default_rng(0))[0])} clips, {repeats} repeats, {steps} steps, '
      f'guidance {cond_scale:g}/{res_scale:g}, {seconds:.0f} s on {run.device}; mean ± 95% interval')
table(plain)
if strata:
    table([m for m in summary['real motion'] if m.startswith('FID ')])
path = eval_json or os.path.join(out_dir, f'eval_{data}_{split}.json')
os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
with open(path + '.tmp', 'w') as f:
    json.dump({'rows': summary, 'settings': config, 'clips': len(draw(np.random.default_rng(0))[0]), 'seconds': seconds,
               'device': torch.cuda.get_device_name() if run.device != 'cpu' else 'cpu', 'per_repeat': results}, f, indent=1, default=float)
os.replace(path + '.tmp', path)
print(f'written to {path}')
