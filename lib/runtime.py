"""What every training script needs around its loop, and no idea of motion: the device, several
ranks under torchrun, seeds, the learning rate, how fast the machine could be, checkpoint files and
whose they are."""
import contextlib
import ctypes
import glob
import json
import math
import os
import random
import re
import socket
import sys
import tempfile
import time
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from lib.configurator import UserError, convert

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

    keep_memory()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed + rank)   # dropout differs between ranks

    autocast = partial(torch.autocast, device.split(':')[0], torch.bfloat16,
                       enabled=dtype == 'bfloat16')
    return SimpleNamespace(
        device=device, dtype=dtype, autocast=autocast, rank=rank, world=world, main=rank == 0,
        generator=torch.Generator(device).manual_seed(seed), peak=peak_flops(device, dtype))


def keep_memory():
    """glibc hands blocks over 32 MB back to the system and faults them in again: 40,000 page faults
    in a training step, 5% of its time. Let it keep them; peak memory stays the same (1.6 GB)."""
    mmap_threshold, trim_threshold = -3, -1
    try:
        for setting in (mmap_threshold, trim_threshold):
            ctypes.CDLL(None).mallopt(setting, 2**31 - 1)
    except (OSError, AttributeError, TypeError):
        pass   # another system's malloc


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


def count_flops(model, loss):
    """FLOPs of the matrix products and convolutions in loss() and its backward pass."""
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    model.zero_grad(set_to_none=True)
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
    """A tensor -> its mean over all ranks, as a float, or a list of them."""
    return gather(x.detach()[None]).mean(0).tolist()


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
    """A file that takes path's place only if the block ends well: nobody ever sees half of one.
    UserError where the system does not write it: the disk is full."""
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
    except BaseException as e:
        os.unlink(f.name)
        # torch.save meets a full disk with a RuntimeError, "unexpected pos"
        if isinstance(e, OSError) or 'unexpected pos' in str(e):
            raise UserError(f'{path} was not written ({e}), and what was there is as it was: is '
                            'the disk full?') from None
        raise


def must_be_writable(path):
    """UserError, before the work, where it could not write a file `path` at its end. Its folder is
    made."""
    try:
        if os.path.isdir(path):
            raise OSError('it is a folder')
        folder = os.path.dirname(os.path.abspath(path))
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as e:
        raise UserError(f'{path} cannot be written ({e}): give another place.') from None


def read(path, hint, open_it):
    """open_it(path), with one sentence (UserError) for whatever it raises on a file that is
    missing, damaged or none: libraries raise nearly anything, and name no file."""
    try:
        if not os.path.isfile(path):
            raise ValueError('there is no such file')
        return open_it(path)
    except Exception as e:
        why = ' '.join(str(e).split()) or type(e).__name__
        if re.search('pickle|weights.only', why, re.IGNORECASE):   # which advise to take the risk
            why = 'damaged, or more than plain data; code in it was not run'
        raise UserError(f'{path} cannot be read ({why:.200}): {hint}.') from None


def read_text(path, hint):
    return read(path, hint, lambda path: Path(path).read_text(encoding='utf-8-sig'))


def read_json(path, hint):
    return read(path, hint, lambda path: json.loads(Path(path).read_text(encoding='utf-8')))


def read_array(path, hint):
    """An .npy file of numbers -> its array, a read-only memory map of exactly this file."""
    def open_it(path):
        array = np.load(path, mmap_mode='r')
        if not isinstance(array, np.ndarray) or array.dtype.kind not in 'fi':
            raise ValueError('it is no array of numbers')
        if array.offset + array.nbytes != os.path.getsize(path):
            raise ValueError('it is longer than its header says')
        return array

    return read(path, hint, open_it)


def read_arrays(path, hint, keys):
    """The arrays of an .npz file, each with the CRC-32 that is kept beside it."""
    def open_it(path):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError('a checksum does not fit')
        with np.load(path) as arrays:
            return [arrays[key] for key in keys]

    return read(path, hint, open_it)


def not_finite(weights):
    """The name of a tensor that holds NaN or infinity, None where all is well."""
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            return name
    return None


def save(checkpoint, path):
    """torch.save, whole or not at all. UserError for NaN or infinity in a network's weights."""
    bad = not_finite(checkpoint.get('model') or checkpoint.get('state') or {})
    if bad:
        raise UserError(f'{path} was not written, and what was there is as it was: {bad} holds NaN '
                        'or infinity; lower the learning rate, or look for broken clips.')
    with atomic_write(path) as f:
        torch.save(checkpoint, f)


def load(path, hint, kind=None, keys=()):
    """Open a checkpoint on the CPU; no code in it can run. hint: what to do when it is not there.
    UserError where it is missing, damaged (torch.save keeps a CRC-32 of each of its records, but
    torch.load does not look), holds more than plain data, is of another kind than `kind`, or lacks
    one of the keys."""
    if not os.path.exists(path):
        raise UserError(f'{path} is missing: {hint}.')
    checkpoint = read(path, 'expected a file written by torch.save; get it again', open_checkpoint)
    if kind and checkpoint.get('kind') != kind:
        raise UserError(f'{path} holds {checkpoint.get("kind", "something else")}, expected '
                        f'{kind}: {hint}.')
    for key in keys:
        if key not in checkpoint:
            raise UserError(f'{path} lacks the entry {key}: was it written by another version?')
    return checkpoint


def open_checkpoint(path):
    with open(path, 'rb') as f:
        if zipfile.is_zipfile(f) and zipfile.ZipFile(f).testzip():
            raise ValueError('a checksum does not fit')
        f.seek(0)
        checkpoint = torch.load(f, map_location='cpu', weights_only=True)
    if not isinstance(checkpoint, dict):
        raise ValueError('it holds no dict')
    return checkpoint


def config_from(cls, saved, path):
    """A checkpoint's config (dict) -> an instance of the dataclass cls. UserError where it is
    none."""
    try:
        config = cls(**saved)
        for key, default in cls().__dict__.items():
            convert(key, getattr(config, key), default, path)
    except TypeError:
        raise UserError(f'{path} holds other sizes than a {cls.__name__}: was it written by '
                        'another version?') from None
    return config


def load_named(model, weights, path, missing_ok=''):
    """load_state_dict whose complaints are one sentence (UserError), also about NaN and infinity.
    missing_ok: a pattern for the names of tensors that may keep their initial values; '' none."""
    own = model.state_dict()
    if not isinstance(weights, dict):
        raise UserError(f'{path} holds no dict of tensors, expected that of a network.')
    for name, tensor in weights.items():
        if name not in own:
            raise UserError(f'{path} has a tensor {name} that this model has no place for: '
                            'is it another architecture?')
        shape = tuple(getattr(tensor, 'shape', ()))
        if shape != own[name].shape or not isinstance(tensor, torch.Tensor):
            raise UserError(f'{path}: tensor {name} is {shape}, expected {tuple(own[name].shape)}.')
    missing = [k for k in own if k not in weights and not re.fullmatch(missing_ok, k)]
    if missing:
        raise UserError(f'{path} lacks {len(missing)} tensors, the first is {missing[0]}.')
    bad = not_finite(weights)
    if bad:
        raise UserError(f'{path}: tensor {bad} holds NaN or infinity: train it again.')
    model.load_state_dict(weights, strict=False)


# -------------------------------------------------------------------------------- a run, and whose


# what may differ when a run goes on: where things lie (data and tokenizer are known by their
# hashes), how long it lasts, what it prints, the machine
MAY_CHANGE = set('data out_dir vq init_from overwrite mask_iters res_iters len_iters vq_iters '
                 'eval_every vq_eval_every log_every device dtype compile'.split())
held = []   # open lock files: the system frees them when this process ends, however it ends


def hold(folder, name):
    """Keep every other run that writes <name>*.pt out of the folder, until this process ends.
    UserError says who is there already."""
    path = os.path.join(folder, f'.{name}.lock')
    must_be_writable(path)
    lock = open(path, 'a+', encoding='utf-8')
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise UserError(f'{folder} is in use, {lock.read()} writes {name}.pt there: wait for it, '
                        'or give another --out_dir.') from None
    except (ImportError, OSError):
        pass   # Windows, or a file system without locks
    lock.truncate(0)
    print(f'process {os.getpid()} on {socket.gethostname()}', end='', file=lock, flush=True)
    held.append(lock)
    for left in glob.glob(os.path.join(glob.escape(folder), f'.{name}*.pt.*.tmp')):
        os.unlink(left)   # of a run that was killed while it saved


def open_run(run, folder, kind, config, keys=(), **identity):
    """The start of a run that writes <kind>.pt and <kind>_last.pt into a folder: hold it, and look
    at what is there. Returns the checkpoint to go on from with init_from 'resume', None otherwise.

    config: the settings, and identity: hashes of data and tokenizer; checkpoints keep both. keys:
    what else the one to go on from must have. UserError where it is of another run, and where a run
    from scratch would replace a checkpoint without --overwrite=True.
    """
    if run.main:
        hold(folder, kind)
    last, best = (os.path.join(folder, f'{kind}{end}.pt') for end in ('_last', ''))
    resumes = config.get('init_from') == 'resume'
    there = last if resumes or os.path.exists(last) else best
    if not resumes and (config['overwrite'] or not os.path.exists(there)):
        return None

    keys = ('it', 'model', 'settings', *keys) if resumes else ()
    checkpoint = load(there, 'leave out --init_from, or give --overwrite=True', kind, keys)
    was = {**checkpoint, **checkpoint.get('settings', {})}
    other = ', '.join(f'{key} was {was[key]}, now {value}'
                      for key, value in {**config, **identity}.items()
                      if key in was and key not in MAY_CHANGE and was[key] != value)
    if resumes and not other:
        return checkpoint
    date = time.strftime('%Y-%m-%d %H:%M', time.localtime(os.path.getmtime(there)))
    go_on = 'go on with --init_from=resume and its settings, ' if there == last else ''
    raise UserError(f'{there} is there already, step {checkpoint.get("it", "unknown")} of {date}, '
                    f'{"of another run: " if other else "of this very run"}{other}; {go_on}give '
                    'another --out_dir, or replace it: --overwrite=True without --init_from.')


class Losses:
    """The losses of the last steps, on the device: to look at each at once would be to wait for a
    GPU at each step. They are looked at before anything is saved.

    names: a function from what `add` was given of a batch to its clips' names. hint: what to do
    about a loss that is not finite.
    """

    def __init__(self, names, hint):
        self.names = names
        self.hint = hint
        self.waiting = []

    def add(self, step, loss, batch):
        self.waiting.append((step, loss.detach(), batch))

    def look(self):
        """The last loss, a mean over ranks. UserError for the first that is not finite."""
        values = mean_over_ranks(torch.stack([loss for _, loss, _ in self.waiting]))
        for (step, _, batch), value in zip(self.waiting, values):
            self.refuse('loss', value, step, batch)
        self.waiting = []
        return value

    def refuse(self, what, value, step, batch):
        """UserError for a value that is not finite, after a step on this batch."""
        if not math.isfinite(value):
            names = list(dict.fromkeys(map(str, self.names(batch))))
            raise UserError(f'The {what} is {value} at step {step}, and nothing was saved since: '
                            f'{self.hint}, or look at the clips of that batch, '
                            f'{", ".join(names[:64])}.')
