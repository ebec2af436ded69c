"""Train the tokenizer (residual VQ-VAE):

    python train_vq.py config/toy.py [--vq_iters=2000 ...]
    torchrun --nproc_per_node=4 train_vq.py config/hml3d.py     # vq_batch stays the global batch

Writes out_dir/vq.pt (best validation loss), vq_last.pt (to resume from), and the token ids of the
training and validation clips, data/<data>/tokens_<hash>_<split>.npz, so that training the
transformers never runs the encoder.
"""
import lib.configurator   # first, to catch Ctrl-C during the imports
import math
import os
import random
import time
import warnings
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from lib.configurator import UserError, configure
from lib.data import FRAMES_PER_TOKEN, Windows, cached_tokens, fingerprint, load_meta, load_split
from lib.motion import SKELETONS, features_to_joints
from lib.runtime import (Losses, check_memory, count_flops, leave, load_weights, lr_at,
                         mean_over_ranks, open_run, save, setup)
from vq import RVQVAE, VQConfig, load_tokenizer

# -----------------------------------------------------------------------------
data = 'toy'                 # data/<data>/, from prepare_data.py
out_dir = ''                 # '' is out/<data>
init_from = 'scratch'        # 'scratch' | 'resume': continue from vq_last.pt
overwrite = False            # replace a tokenizer that is there
seed = 0
# model: MoMask's sizes
n_codes = 512                # V, codes per quantizer
code_dim = 512
n_quantizers = 6             # Q
vq_width = 512               # of the convolutions
vq_depth = 3                 # residual blocks per resolution
vq_reset_below = 1.0         # codes used by fewer vectors per step (EMA) are reset to data
quantize_dropout = 0.2       # share of batches that use only the first layers
# optimization
vq_iters = 50000
vq_batch = 256               # windows, over all ranks (MoMask's paper: 512)
window_frames = 64
vq_lr = 2e-4
vq_warmup = 2000
weight_decay = 0.0
grad_clip = 1.0
w_position = 0.5             # weight of the joint position term
w_rotation = 0.0             # weight of the joint rotation term (not in MoMask)
w_foot = 0.0                 # weight of the foot term, see `foot_steps` (not in MoMask)
w_heading = 0.0              # weight of the heading term, see `heading_error` (not in MoMask)
w_commit = 0.02              # MoMask's beta; here its term is the mean over quantizers
vq_eval_every = 1000
log_every = 50               # steps between fetching the loss from the device
# machine
device = 'auto'              # 'auto' | 'cpu' | 'cuda'
dtype = 'auto'               # 'auto' (bfloat16 where hardware has it) | 'bfloat16' | 'float32'
compile = False              # torch.compile: for GPUs; takes a minute at the start
config = configure(globals())
# -----------------------------------------------------------------------------
out_dir = out_dir or os.path.join('out', data)
folder = os.path.join('data', data)
run = setup(device, dtype, seed)
warnings.filterwarnings('ignore', 'The given NumPy array is not writable')   # we only read it
if window_frames % FRAMES_PER_TOKEN:
    raise UserError(f'window_frames is {window_frames}, expected a multiple of 4, the frames of a '
                    'token.')
if vq_batch % run.world:
    raise UserError(f'vq_batch is {vq_batch}, expected a multiple of the {run.world} ranks.')

# data
meta, mean, std = load_meta(folder)
train, val = load_split(folder, 'train'), load_split(folder, 'val')
data_hash = fingerprint(folder)
last = open_run(run, out_dir, 'vq', config, vq_iters,
                ('best', 'history', 'optimizer', 'generator'), data_hash=data_hash)
train_windows = Windows(train, window_frames, run.device)
val_windows = Windows(val, window_frames, run.device)
D, J = meta['dim'], meta['n_joints']
std = torch.from_numpy(std)
std[:4] /= 5                 # root and contacts weigh five times more, as in MoMask's code
std[-4:] /= 5

# model
shape = VQConfig(dim=D, n_codes=n_codes, code_dim=code_dim, n_quantizers=n_quantizers,
                 width=vq_width, depth=vq_depth, reset_below=vq_reset_below)
check_memory(lambda: RVQVAE(shape))
model = RVQVAE(shape, mean, std).to(run.device)
optimizer = torch.optim.AdamW(model.parameters(), lr=vq_lr, betas=(0.9, 0.99),
                              weight_decay=weight_decay, fused=True)
net = torch.compile(model) if compile else model
if run.world > 1:
    # DDP gives all ranks the weights of rank 0; the codebooks then take the same steps everywhere
    net = DDP(net, broadcast_buffers=False)


def get_batch(windows, first):
    """This rank's rows of the global batch, (B / world, window_frames, D) normalized. first (B,):
    the first frame of each window."""
    return model.normalize(windows.batch(first.view(run.world, -1)[run.rank]))


def foot_steps(features):
    """How far each foot joint moves over the ground from one frame to the next: features (B, T, D),
    not normalized -> (B, T - 1, 4, 2) metres, in the body's heading at the second frame.

    Errors of positions do not show this: 5 mm ahead in one frame and 5 mm behind in the next are a
    foot that slides by a centimetre. Between two frames the root turns by feature 0 (half the
    angle) and moves by features 1 and 2, so nothing has to be integrated.
    """
    joint = torch.tensor(SKELETONS[meta['skeleton']].feet, device=features.device) - 1
    x, z = (features[..., 4 + 3 * joint + axis] for axis in (0, 2))       # (B, T, 4)
    half_turn, root_x, root_z = (features[:, :-1, i, None] for i in range(3))
    cos, sin = (2 * half_turn).cos(), (2 * half_turn).sin()
    step_x = x[:, 1:] + root_x - (cos * x[:, :-1] + sin * z[:, :-1])
    step_z = z[:, 1:] + root_z - (cos * z[:, :-1] - sin * x[:, :-1])
    return torch.stack([step_x, step_z], -1) / meta['units_per_metre']


def foot_error(x, y):
    """Mean distance in metres per frame between the foot steps of real motions x and of their
    reconstructions y, where the real foot has contact. Both (B, T, D), normalized."""
    real, ours = model.denormalize(x), model.denormalize(y)
    contact = real[:, :-1, -4:] > 0.5
    error = (foot_steps(ours) - foot_steps(real)).norm(dim=-1)
    return (error * contact).sum() / contact.sum().clamp(min=1)


def heading_error(x, y):
    """Mean angle in radians between the headings of real motions x and reconstructions y. Both
    (B, T, D), normalized. Turning is rare and one feature of 263, so the reconstruction loss hardly
    notices it: without this term toy's tokenizer did not turn after 1,000 steps."""
    half_turn = model.denormalize(y)[..., 0] - model.denormalize(x)[..., 0]
    return 2 * half_turn.cumsum(1).abs().mean()


def compute_loss(net, x, n_active=None):
    """MoMask Eq 2 with smooth L1: x (B, T, D) -> loss, reconstruction (B, T, D), ids, residuals."""
    with run.autocast():
        y, commit, ids, residuals = net(x, n_active)
    y = y.float()
    position = slice(4, 4 + (J - 1) * 3)
    rotation = slice(position.stop, position.stop + (J - 1) * 6)

    loss = F.smooth_l1_loss(y, x)
    loss = loss + w_position * F.smooth_l1_loss(y[..., position], x[..., position])
    if w_rotation:
        loss = loss + w_rotation * F.smooth_l1_loss(y[..., rotation], x[..., rotation])
    if w_foot:
        loss = loss + w_foot * foot_error(x, y)
    if w_heading:
        loss = loss + w_heading * heading_error(x, y)
    return loss + w_commit * commit, y, ids, residuals


@torch.no_grad()
def evaluate(batches=4):
    """On the same validation windows every time: loss; MPJPE in mm with the pelvis at the origin,
    as in the standard evaluation, which cannot see sliding feet; and the foot error in cm per
    frame."""
    model.eval()
    g = torch.Generator(run.device).manual_seed(1)
    figures = torch.zeros(3, device=run.device)
    for _ in range(batches):
        x = get_batch(val_windows, val_windows.draw(vq_batch, g))
        loss, y, _, _ = compute_loss(net, x)
        real, ours = (features_to_joints(model.denormalize(m), J) for m in (x, y))
        error = ours - real
        error = 1000 * (error - error[..., :1, :]).norm(dim=-1).mean() / meta['units_per_metre']
        figures += torch.stack([loss, error, 100 * foot_error(x, y)])
    model.train()
    return mean_over_ranks(figures / batches)


def checkpoint(name, **more):
    if run.main:
        saved = dict(kind='vq', config=asdict(model.config), model=model.state_dict(),
                     settings=config, meta=meta, data_hash=data_hash, **more)
        save(saved, os.path.join(out_dir, name))


# start or resume
it0 = 0
best = math.inf
history = []
zeros = torch.zeros(1, window_frames, D, device=run.device)
flops = count_flops(model, lambda: compute_loss(model, zeros)[0])   # of one window
if last:
    load_weights(model, last['model'], os.path.join(out_dir, 'vq_last.pt'))
    optimizer.load_state_dict(last['optimizer'])
    run.generator.set_state(last['generator'])
    it0, best, history = last['it'], last['best'], last['history']
else:
    per_batch = vq_batch * window_frames // FRAMES_PER_TOKEN
    enough = vq_batch * math.ceil(n_codes / per_batch)   # windows with a token for every code
    first = train_windows.draw(enough, run.generator)
    model.init_codebooks(get_batch(train_windows, first), run.generator)
if run.main:
    n_params = sum(p.numel() for p in model.parameters())
    print(f'{data}: {len(train)} clips, {len(train_windows)} windows; tokenizer '
          f'{n_params / 1e6:.1f}M weights; {run.device} {run.dtype}')

# train
losses = Losses(train.names_at, 'lower --vq_lr')
layer_count = torch.arange(n_quantizers + 1, device=run.device)   # a tensor: one compiled graph
clock, since = time.perf_counter(), it0
bar = tqdm(range(it0, vq_iters), initial=it0, total=vq_iters, disable=not run.main,
           desc='tokenizer', mininterval=1)
for it in bar:
    for group in optimizer.param_groups:
        group['lr'] = lr_at(it, vq_lr, vq_warmup, vq_iters)

    # quantization dropout: some batches use only the first layers
    rng = random.Random(seed * 1_000_003 + it)
    n_active = n_quantizers
    if rng.random() < quantize_dropout:
        n_active = rng.randint(1, n_quantizers)

    first = train_windows.draw(vq_batch, run.generator)
    x = get_batch(train_windows, first)
    loss, _, ids, residuals = compute_loss(net, x, layer_count[n_active])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.update_codebooks(ids, residuals, n_active, run.generator)

    losses.add(it + 1, loss, first)
    logs = (it + 1) % log_every == 0
    saves = (it + 1) % vq_eval_every == 0 or it + 1 == vq_iters
    if logs or saves:
        loss = losses.look()
    if logs:
        history.append((it + 1, loss))
        rate = (it + 1 - since) * vq_batch / (time.perf_counter() - clock)
        bar.set_postfix_str(f'loss {loss:.4f}, {rate:.0f} windows/s, '
                            f'{rate * flops / 1e12:.2f} TFLOP/s')
        clock, since = time.perf_counter(), it + 1

    if saves:
        val_loss, mm, foot = evaluate()
        losses.refuse('validation error', val_loss + mm + foot, it + 1, first)
        if val_loss < best:
            best = val_loss
            checkpoint('vq.pt', it=it + 1, mpjpe=mm, foot=foot)
        checkpoint('vq_last.pt', it=it + 1, best=best, history=history,
                   optimizer=optimizer.state_dict(), generator=run.generator.get_state())
        if run.main:
            used = ids[..., 0].unique().numel()
            tqdm.write(f'step {it + 1}: val loss {val_loss:.4f}, MPJPE {mm:.1f} mm, feet '
                       f'{foot:.2f} cm/frame, {used} of {n_codes} base codes in the last batch')
        clock, since = time.perf_counter(), it + 1

if run.main:
    tokenizer = load_tokenizer(os.path.join(out_dir, 'vq.pt'))
    for name, split in (('train', train), ('val', val)):
        path = os.path.join(folder, f'tokens_{tokenizer.fingerprint()}_{name}.npz')
        cached_tokens(tokenizer, split, path, run.device)
    print(f'{out_dir}/vq.pt: val loss {best:.4f} on windows of {window_frames} frames. '
          'Next: python train_mask.py with the same config.')
leave(run)
