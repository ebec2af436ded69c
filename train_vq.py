"""Train the tokenizer (residual VQ-VAE):   python train_vq.py config/toy.py [--vq_iters=2000 ...]

On several GPUs or machines:   torchrun --nproc_per_node=4 train_vq.py config/hml3d.py   (vq_batch stays the global batch)
Writes out_dir/vq.pt (best validation error), vq_last.pt (to resume), and data/<data>/tokens_<hash>_<split>.npy: the token
ids of the whole data set, so that nothing downstream runs the encoder again.
"""
import os
import random
import sys
import time
import warnings
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from configurator import choose, configure, fail, leave, lr_at, setup
from motion import features_to_joints, load_meta, load_split
from vq import RVQVAE, CheckpointError, VQConfig, load, mean_over_ranks, save, tokenize

# -----------------------------------------------------------------------------
data = 'toy'                 # data/<data>/, from prepare_data.py
out_dir = ''                 # '' is out/<data>
init_from = 'scratch'        # 'scratch' | 'resume': go on from vq_last.pt
seed = 0
# model, MoMask's sizes
n_codes = 512                # V, codes per quantizer
code_dim = 512
n_quantizers = 6             # Q
vq_width = 512               # of the convolutions
vq_depth = 3                 # residual blocks per resolution
quantize_dropout = 0.2       # share of batches that use only the first layers
# optimisation
vq_iters = 50000
vq_batch = 256               # windows, over all ranks
window_frames = 64
vq_lr = 2e-4
vq_warmup = 2000
weight_decay = 0.0
grad_clip = 1.0
w_position = 0.5             # weight of the joint position term
w_commit = 0.02              # MoMask's beta
vq_eval_every = 1000
log_every = 50               # the loss is fetched from the device only then
# machine
device = 'auto'              # 'auto' | 'cpu' | 'cuda'
dtype = 'auto'               # 'auto' (bfloat16 where the hardware multiplies in it) | 'bfloat16' | 'float32'
compile = False              # torch.compile: pays on a GPU, costs a minute at the start
config = configure(globals())
# -----------------------------------------------------------------------------
out_dir = out_dir or os.path.join('out', data)
try:
    meta, mean, std = load_meta(os.path.join('data', data))
    train, val = (load_split(os.path.join('data', data), split) for split in ('train', 'val'))
    last = load(os.path.join(out_dir, 'vq_last.pt'), 'nothing to resume, leave out --init_from') if init_from == 'resume' else None
except (CheckpointError, ValueError, FileNotFoundError) as e:
    fail(str(e))
warnings.filterwarnings('ignore', 'The given NumPy array is not writable')  # the memory map is only read
choose('init_from', init_from, 'scratch', 'resume')
if window_frames % 4 or window_frames < 4:
    fail(f'window_frames is {window_frames}, expected a multiple of 4: a token is 4 frames.')
run = setup(device, dtype, seed)
D, J = meta['dim'], meta['n_joints']

std = torch.from_numpy(std)
std[:4] /= 5                 # root and contacts weigh five times more, as in the reference
std[-4:] /= 5
model = RVQVAE(VQConfig(dim=D, n_codes=n_codes, code_dim=code_dim, n_quantizers=n_quantizers, width=vq_width,
                        depth=vq_depth), mean, std).to(run.device)
if last and last['config'] != asdict(model.config):
    fail(f"{out_dir}/vq_last.pt was trained with {last['config']}, this run asks for {asdict(model.config)}.")


class Windows:
    """Random windows of window_frames frames, straight from the memory map (CPU) or from a copy on the device."""

    def __init__(self, split):
        self.data = torch.from_numpy(split.features).to(run.device)   # on CPU still the memory map: nothing is read yet
        n = torch.from_numpy(split.length) - window_frames + 1
        n, start = n[n > 0], torch.from_numpy(split.start)[n > 0]     # shorter clips are left out, as in the reference
        if not len(n):
            fail(f'No clip of {data} has {window_frames} frames: set --window_frames lower (a multiple of 4).')
        self.starts = torch.cat([torch.arange(int(s), int(s + k)) for s, k in zip(start, n)]).to(run.device)
        self.frames = torch.arange(window_frames, device=run.device)

    def batch(self, size, generator):
        """(size / world, window_frames, D) normalised: this rank's rows of the global batch."""
        i = torch.randint(len(self.starts), (size,), device=run.device, generator=generator)
        i = i.view(run.world, -1)[run.rank]
        return model.normalize(self.data[self.starts[i][:, None] + self.frames])


def losses(x, n_active=None):
    """MoMask Eq 2 with smooth L1: x (B, T, D) -> loss, reconstruction (B, T, D), ids, residuals."""
    with run.autocast():
        y, commit, ids, seen = net(x, n_active)
    y = y.float()
    position = slice(4, 4 + (J - 1) * 3)
    loss = F.smooth_l1_loss(y, x) + w_position * F.smooth_l1_loss(y[..., position], x[..., position]) + w_commit * commit
    return loss, y, ids, seen


@torch.no_grad()
def evaluate():
    """Loss, and MPJPE in mm as in the field (pelvis at the origin), on the same validation windows every time."""
    model.eval()
    g = torch.Generator(run.device).manual_seed(1)
    total, error, batches = 0.0, 0.0, 4
    for _ in range(batches):
        x = val_windows.batch(vq_batch, g)
        loss, y, _, _ = losses(x)
        joints = [features_to_joints(model.denormalize(m).cpu(), J) for m in (x, y)]
        total += mean_over_ranks(loss) / batches
        a, b = (j - j[..., :1, :] for j in joints)
        error += mean_over_ranks((a - b).norm(dim=-1).mean().to(run.device)) / batches
    model.train()
    return total, 1000 * error / meta['units_per_metre']


if vq_batch % run.world:
    fail(f'vq_batch is {vq_batch}, which {run.world} ranks cannot share evenly.')
train_windows, val_windows = Windows(train), Windows(val)
optimizer = torch.optim.AdamW(model.parameters(), lr=vq_lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
layer_count = torch.arange(n_quantizers + 1, device=run.device)   # the count as a tensor: one graph for all of them
net = torch.compile(model) if compile else model
net = DDP(net, broadcast_buffers=False) if run.world > 1 else net   # from here on all ranks have rank 0's weights; codebooks
                                                                    # then start and step alike on every rank by themselves
it0, best, history = 0, float('inf'), []
if last:
    model.load_state_dict(last['model'])
    optimizer.load_state_dict(last['optimizer'])
    run.generator.set_state(last['generator'])
    it0, best, history = last['it'], last['best'], last['history']
else:
    enough = vq_batch * -(-n_codes // (vq_batch * window_frames // 4))   # at least a token per code
    model.init_codebooks(train_windows.batch(enough, run.generator), run.generator)
if run.main:
    n_params = sum(p.numel() for p in model.parameters())
    print(f'{data}: {len(train.start)} clips, {len(train_windows.starts)} windows; tokenizer {n_params / 1e6:.1f}M weights; '
          f'{run.device} {run.dtype}, {run.peak / 1e12:.2f} TFLOP/s in a plain product')


def flops_per_window():
    """Forward 2 and backward 4 per multiply-add; the convolutions' own output lengths give the multiply-adds."""
    macs = []
    count = lambda m, i, o: macs.append(m.weight.numel() * o.shape[-1])
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, torch.nn.Conv1d)]
    with torch.no_grad():
        model(torch.zeros(1, window_frames, D, device=run.device))
    for hook in hooks:
        hook.remove()
    return 6 * sum(macs)


def checkpoint(name, **more):
    if run.main:
        save({'kind': 'vq', 'config': asdict(model.config), 'model': model.state_dict(), 'settings': config, 'meta': meta, **more}, os.path.join(out_dir, name))


flops, clock, since = flops_per_window(), time.perf_counter(), it0
bar = tqdm(range(it0, vq_iters), initial=it0, total=vq_iters, disable=not run.main, desc='tokenizer', mininterval=1)
for it in bar:
    for group in optimizer.param_groups:
        group['lr'] = lr_at(it, vq_lr, vq_warmup, vq_iters)
    rng = random.Random(seed * 1_000_003 + it)           # quantization dropout: this batch may use only the first layers
    n_active = rng.randint(1, n_quantizers) if rng.random() < quantize_dropout else n_quantizers
    loss, _, ids, seen = losses(train_windows.batch(vq_batch, run.generator), layer_count[n_active])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.update_codebooks(ids, seen, n_active, run.generator)

    if (it + 1) % log_every == 0:
        loss = mean_over_ranks(loss)
        history.append((it + 1, loss))
        if not loss < float('inf'):
            fail(f'The loss is {loss} at step {it}: look for broken clips, or lower --vq_lr.')
        rate = (it + 1 - since) * vq_batch / (time.perf_counter() - clock)
        clock, since = time.perf_counter(), it + 1
        bar.set_postfix_str(f'loss {loss:.4f}, {rate:.0f} windows/s, MFU {rate * flops / run.world / run.peak:.0%}, best {best:.1f} mm')
    if (it + 1) % vq_eval_every == 0 or it + 1 == vq_iters:
        val_loss, mm = evaluate()
        if mm < best:
            best = mm
            checkpoint('vq.pt', it=it + 1, mpjpe=mm)
        checkpoint('vq_last.pt', it=it + 1, best=best, history=history, optimizer=optimizer.state_dict(), generator=run.generator.get_state())
        if run.main:
            used = ids[..., 0].unique().numel()
            tqdm.write(f'step {it + 1}: val loss {val_loss:.4f}, val MPJPE {mm:.1f} mm, {used} of {n_codes} base codes in the last batch')
        clock, since = time.perf_counter(), it + 1
if run.main:
    best_model = RVQVAE.from_file(os.path.join(out_dir, 'vq.pt'))
    for name, split in (('train', train), ('val', val)):
        tokenize(best_model, split, os.path.join('data', data, f'tokens_{best_model.fingerprint()}_{name}.npy'), run.device)
    print(f'{out_dir}/vq.pt: val MPJPE {best:.1f} mm on windows of {window_frames} frames. '
          f'Next: python train_mask.py {" ".join(sys.argv[1:])}')
leave(run)
