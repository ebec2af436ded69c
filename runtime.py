"""What every training script needs around its loop, and no idea of motion: the device, several
ranks under torchrun, seeds, the learning rate, how fast the machine could be, checkpoint files."""
import contextlib
import math
import os
import pickle
import random
import re
import sys
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from configurator import UserError

# -------------------------------------------------------------------------------------- the machine


def setup(device='auto', dtype='auto', seed=0):
    """Choose the machine's best and seed everything. Returns a namespace:

    device     'cpu' or 'cuda:0', 'cuda:1', ... by rank
    dtype      'bfloat16' or 'float32'; 'auto' takes bfloat16 where the hardware multiplies in it
    autocast   a function that gives the context for forward passes
    rank, world, main    of torchrun; main says that this is rank 0
    generator  the same stream on every rank: data and masks are drawn for the global batch
    peak       FLOP/s of a plain matrix product here, measured: what MFU is a share of
    """
    rank = int(os.environ.get('RANK', 0))
    world = int(os.environ.get('WORLD_SIZE', 1))
    if device == 'cuda' and not torch.cuda.is_available():
        raise UserError('device is cuda, but torch sees no GPU here: leave --device out, or check '
                        'the driver.')
    cuda = device != 'cpu' and torch.cuda.is_available()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else 'cpu'
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
    if world > 1 and not dist.is_initialized():
        dist.init_process_group('nccl' if cuda else 'gloo')
    if dtype == 'auto':
        dtype = 'bfloat16' if has_bfloat16(cuda) else 'float32'

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed + rank)   # dropout differs between ranks

    def autocast():
        if dtype == 'float32':
            return contextlib.nullcontext()
        return torch.autocast(device.split(':')[0], torch.bfloat16)

    return SimpleNamespace(
        device=device, dtype=dtype, autocast=autocast, rank=rank, world=world, main=rank == 0,
        generator=torch.Generator(device).manual_seed(seed), peak=peak_flops(device, dtype))


def has_bfloat16(cuda):
    """Does the hardware multiply in bfloat16? Emulated, it is slower than float32."""
    if cuda:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def peak_flops(device, dtype, rounds=15):
    """FLOP/s of a square matrix product. The best of many rounds: noise only ever slows one down,
    and a single round was seen at half of the best."""
    n = 8192 if device.startswith('cuda') else 1024
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    best = math.inf
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def synchronize(device):
    """Wait until a GPU has done what it was given; nothing to wait for on a CPU."""
    if device.startswith('cuda'):
        torch.cuda.synchronize()


def count_flops(work):
    """FLOPs of the matrix products and convolutions in work(), backward passes included."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def lr_at(it, lr, warmup, total):
    """Linear warm-up, then cosine decay to a tenth."""
    if it < warmup:
        return lr * (it + 1) / warmup
    share = min(1.0, (it - warmup) / max(1, total - warmup))
    return lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))


# ------------------------------------------------------------------------------------ several ranks


def gather(x):
    """Rows of all ranks, in rank order; x itself without torch.distributed."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def mean_over_ranks(x):
    """A scalar tensor -> its mean over all ranks, as a float."""
    if not dist.is_initialized():
        return x.item()
    x = x.detach().clone()
    dist.all_reduce(x)
    return x.item() / dist.get_world_size()


def leave(run):
    """The end of a script that torchrun may have started: the ranks go together and at once.
    torch's gloo threads outlive destroy_process_group (something of DDP holds the group), and of
    short runs that went on to a normal end 4% aborted there."""
    if run.world > 1:
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


# -------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_write(path, mode='wb'):
    """A file that takes path's place only if the block ends well: nobody ever sees half of one."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    encoding = None if 'b' in mode else 'utf-8'
    name = os.path.basename(path)
    f = tempfile.NamedTemporaryFile(
        mode, dir=folder, prefix=f'.{name}.', suffix='.tmp', delete=False, encoding=encoding)
    try:
        with f:
            yield f
        os.chmod(f.name, 0o644)
        os.replace(f.name, path)
    except BaseException:
        os.unlink(f.name)
        raise


def save(obj, path):
    """torch.save, whole or not at all."""
    with atomic_write(path) as f:
        torch.save(obj, f)


def load(path, hint):
    """Open a checkpoint on the CPU; no code in it can run. hint: what to do when it is not there.
    UserError where it is missing, damaged, or holds more than plain data."""
    if not os.path.exists(path):
        raise UserError(f'{path} is missing: {hint}.')
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as e:
        # operand 149 begins an ordinary pickle, which torch.save never writes
        if 'GLOBAL' in str(e) or 'operand 149' in str(e):
            why = 'holds something other than plain tensors (code in it was not run)'
        else:
            why = 'is damaged or not a checkpoint'
        raise UserError(f'{path} {why}: expected a file written by torch.save; '
                        'get it again.') from None


def load_named(model, weights, path, missing_ok='$'):
    """load_state_dict whose complaints are one sentence (UserError). missing_ok: a pattern for the
    names of tensors that may keep their initial values."""
    own = model.state_dict()
    for name, tensor in weights.items():
        if name not in own:
            raise UserError(f'{path} has a tensor {name} that this model has no place for: '
                            'is it another architecture?')
        if tensor.shape != own[name].shape:
            raise UserError(f'{path}: tensor {name} is {tuple(tensor.shape)}, '
                            f'expected {tuple(own[name].shape)}.')
    missing = [k for k in own if k not in weights and not re.fullmatch(missing_ok, k)]
    if missing:
        raise UserError(f'{path} lacks {len(missing)} tensors, the first is {missing[0]}.')
    model.load_state_dict(weights, strict=False)
