"""What every training script needs around its loop: the device, ranks, seeds, optimizers and the
learning rate; files that are written whole or not at all; checkpoints, and the check that those in
a folder belong to this run."""
import contextlib
import ctypes
import glob
import json
import math
import os
import random
import re
import sys
import tempfile
import time
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from lib.configurator import UserError, convert

# -------------------------------------------------------------------------------------- the machine


def setup(device='auto', dtype='auto', seed=0):
    """Choose device and precision and seed everything. Returns a namespace:

    device     'cpu', or 'cuda:0', 'cuda:1', ... by rank
    dtype      'bfloat16' or 'float32'; 'auto' takes bfloat16 where the hardware multiplies in it
    autocast   a function that returns the context for forward passes
    rank, world, main    of torchrun; main is True on rank 0
    generator  a torch.Generator that draws the same numbers on every rank: data and masks are drawn
               for the global batch
    """
    rank = int(os.environ.get('RANK', 0))
    world = int(os.environ.get('WORLD_SIZE', 1))
    if device == 'cuda' and not torch.cuda.is_available():
        raise UserError('device is cuda, but torch finds no GPU: leave --device out, or check the '
                        'driver.')
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
    return SimpleNamespace(device=device, dtype=dtype, autocast=autocast, rank=rank, world=world,
                           main=rank == 0, generator=torch.Generator(device).manual_seed(seed))


def has_bfloat16(cuda):
    """Does the hardware multiply in bfloat16? Where it is emulated it is slower than float32."""
    if cuda:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def keep_memory():
    """Stop glibc from returning blocks over 32 MB to the system after each use. That cost 40,000
    page faults per training step, 5% of its time; peak memory stays the same (1.6 GB)."""
    mmap_threshold, trim_threshold = -3, -1
    with contextlib.suppress(OSError, AttributeError, TypeError):   # systems without mallopt
        for setting in (mmap_threshold, trim_threshold):
            ctypes.CDLL(None).mallopt(setting, 2**31 - 1)


def synchronize(device):
    """Wait until the GPU has finished; a CPU has nothing to wait for."""
    if device.startswith('cuda'):
        torch.cuda.synchronize()


# ----------------------------------------------------------------------------------------- training


def make_optimizers(learner, name, lr, weight_decay=0.0, fused=True):
    """AdamW for everything, or ('muon') Muon for the matrices of the trunk's layers and AdamW for
    the rest. Muon's updates are scaled to the size of AdamW's (match_rms_adamw), so both take the
    same learning rate."""
    matrices, others = [], []
    for tensor, p in learner.named_parameters():
        if p.requires_grad:
            by_muon = name == 'muon' and 'trunk.layers.' in tensor and p.ndim == 2
            (matrices if by_muon else others).append(p)
    made = [torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=weight_decay,
                              fused=fused)]
    if matrices:
        made.append(torch.optim.Muon(matrices, lr, weight_decay=weight_decay,
                                     adjust_lr_fn='match_rms_adamw'))
    return made


def lr_at(it, lr, warmup, total):
    """Linear warm-up, then cosine decay to a tenth."""
    if it < warmup:
        return lr * (it + 1) / warmup
    share = min(1.0, (it - warmup) / max(1, total - warmup))
    return lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))


def rng_state(run):
    """The state of all random generators, as entries of a checkpoint."""
    state = dict(device=run.device[:4], world=run.world, generator=run.generator.get_state(),
                 rng=torch.get_rng_state())
    if run.device != 'cpu':
        state['cuda_rng'] = torch.cuda.get_rng_state()
    return state


def restore_rng(run, checkpoint, seed, path):
    """Restore what `rng_state` put into the checkpoint at `path`."""
    if checkpoint['device'] != run.device[:4]:
        raise UserError(f"{path} was written on {checkpoint['device']}, but this is {run.device}: "
                        'the state of the random generators cannot be carried over.')
    run.generator.set_state(checkpoint['generator'])
    if run.main and checkpoint['world'] != run.world:
        print(f'{path} is of {checkpoint["world"]} ranks: with {run.world} dropout differs.')
    if run.world > 1:   # the file has the dropout state of one rank only: reseed all
        torch.manual_seed(seed + run.rank + 1_000_003 * checkpoint['it'])
        return
    torch.set_rng_state(checkpoint['rng'])
    if run.device != 'cpu':
        torch.cuda.set_rng_state(checkpoint['cuda_rng'])


def count_flops(model, loss):
    """FLOPs of the matrix products and convolutions in loss() and its backward pass."""
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


class Losses:
    """The losses since the last look, kept on the device: to fetch each one would make every step
    wait for the GPU. They are checked before anything is saved.

    names: a function from the batch given to `add` to the names of its clips. hint: what to do
    about a loss that is not finite.
    """

    def __init__(self, names, hint):
        self.names, self.hint = names, hint
        self.waiting = []

    def add(self, step, loss, batch):
        self.waiting.append((step, loss.detach(), batch))

    def look(self):
        """The last loss, averaged over ranks. UserError for the first that is not finite."""
        values = mean_over_ranks(torch.stack([loss for _, loss, _ in self.waiting]))
        for (step, _, batch), value in zip(self.waiting, values):
            self.refuse('loss', value, step, batch)
        self.waiting = []
        return value

    def refuse(self, what, value, step, batch):
        """UserError unless a value measured after a step on this batch is finite."""
        if not math.isfinite(value):
            clips = list(dict.fromkeys(map(str, self.names(batch))))[:64]
            raise UserError(f'The {what} is {value} at step {step}; checkpoints are those of the '
                            f'last evaluation: {self.hint}, or check the clips of that batch, '
                            f'{", ".join(clips)}.')


def gather(x):
    """Rows of all ranks, in rank order; x itself without torch.distributed."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def mean_over_ranks(x):
    """A tensor -> its mean over all ranks, as a float or a list of floats."""
    return gather(x.detach()[None]).mean(0).tolist()


def leave(run):
    """End a script that torchrun may have started. All ranks exit together and at once: gloo's
    threads outlive destroy_process_group, and 4% of short runs aborted when they ended normally."""
    if run.world > 1:
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


# -------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_write(path, mode='wb'):
    """Open a file that replaces `path` only if the block succeeds, so that no reader ever finds
    half of it. UserError where the system cannot write it, for example on a full disk."""
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    encoding = None if 'b' in mode else 'utf-8'
    f = tempfile.NamedTemporaryFile(mode, dir=folder, prefix=f'.{name}.', suffix='.tmp',
                                    delete=False, encoding=encoding)
    try:
        with f:
            yield f
        os.chmod(f.name, 0o644)
        os.replace(f.name, path)
    except BaseException as e:
        os.unlink(f.name)
        # torch.save reports a full disk as RuntimeError "unexpected pos"
        if isinstance(e, OSError) or 'unexpected pos' in str(e):
            raise UserError(f'{path} was not written ({e}), and an older file there is unchanged: '
                            'is the disk full?') from None
        raise


def must_be_writable(path):
    """UserError where a file `path` could not be written, to be called before the work that it
    would hold. Creates the folder."""
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
    """open_it(path), where anything it raises becomes one sentence (UserError): on damaged files
    libraries raise nearly anything, and they do not name the file."""
    try:
        if not os.path.isfile(path):
            raise ValueError('it is not a file')
        return open_it(path)
    except Exception as e:
        why = ' '.join(str(e).split()) or type(e).__name__
        if re.search('pickle|weights.only', why, re.IGNORECASE):   # it would advise to run the code
            why = 'damaged, or more than plain data; code in it was not run'
        raise UserError(f'{path} cannot be read ({why:.200}): {hint}.') from None


def read_text(path, hint):
    return read(path, hint, lambda path: Path(path).read_text(encoding='utf-8-sig'))


def read_json(path, hint):
    return read(path, hint, lambda path: json.loads(Path(path).read_text(encoding='utf-8')))


def read_array(path, hint):
    """The array of numbers in an .npy file, as a read-only memory map."""
    def open_it(path):
        array = np.load(path, mmap_mode='r')
        if not isinstance(array, np.ndarray) or array.dtype.kind not in 'fi':
            raise ValueError('it is not an array of numbers')
        if array.offset + array.nbytes != os.path.getsize(path):
            raise ValueError('its length does not agree with its header')
        return array
    return read(path, hint, open_it)


def read_arrays(path, hint, keys):
    """Some arrays of an .npz file, after a check of its CRCs."""
    def open_it(path):
        check_crc(path)
        with np.load(path) as arrays:
            return [arrays[key] for key in keys]
    return read(path, hint, open_it)


def check_crc(file):
    """ValueError where a record of a zip file differs from its CRC-32. numpy and torch write them
    but torch.load does not compare them."""
    if zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip():
        raise ValueError('a checksum is wrong')


# ------------------------------------------------------------------------------------- checkpoints


def save(checkpoint, path):
    """torch.save, whole or not at all. UserError where a weight is NaN or infinite, and where the
    lock of this run is gone, because another run may then write the same files."""
    for held in locks:
        if not os.path.exists(held.lock_file):
            raise UserError(f'{path} was not written: {held.lock_file} was removed during the run, '
                            'so another run may write there; resume it.')
    bad = not_finite(checkpoint.get('model') or checkpoint.get('state') or {})
    if bad:
        raise UserError(f'{path} was not written, and an older file there is unchanged: {bad} has '
                        'NaN or infinity; lower the learning rate, or look for broken clips.')
    with atomic_write(path) as f:
        torch.save(checkpoint, f)


def load(path, hint, kind=None, keys=()):
    """Open a checkpoint on the CPU without running any code in it. hint: what to do if it is
    missing. UserError where it is missing or damaged, has another kind, or lacks one of the keys.
    """
    def open_it(path):
        with open(path, 'rb') as f:
            check_crc(f)
            f.seek(0)
            checkpoint = torch.load(f, map_location='cpu', weights_only=True)
        if not isinstance(checkpoint, dict):
            raise ValueError('it is not a checkpoint')
        return checkpoint

    if not os.path.exists(path):
        raise UserError(f'{path} is missing: {hint}.')
    checkpoint = read(path, 'expected a file that torch.save has written; get it again', open_it)
    if kind and checkpoint.get('kind') != kind:
        raise UserError(f'{path} holds {checkpoint.get("kind", "something else")}, expected '
                        f'{kind}: {hint}.')
    for key in keys:
        if key not in checkpoint:
            raise UserError(f'{path} lacks the entry {key}: was it written by another version?')
    return checkpoint


def check_memory(make_network):
    """UserError where training the network that make_network() builds takes more memory than the
    machine has: weights, gradients and two moments of AdamW, 4 bytes each. On torch's meta device
    nothing is allocated."""
    with torch.device('meta'):
        needed = 16 * sum(p.numel() for p in make_network().parameters())
    available = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    if needed > available:
        raise UserError(f'A network of these sizes needs {needed / 1e9:.0f} GB in training, this '
                        f'machine has {available / 1e9:.0f}: choose smaller ones.')


def not_finite(weights):
    """The name of the first tensor that holds NaN or infinity, or None."""
    return next((name for name, x in weights.items() if not torch.isfinite(x).all()), None)


def config_from(cls, settings, path):
    """The dataclass cls from a dict that a checkpoint holds. UserError where it does not fit."""
    try:
        config = cls(**settings)
        for key, default in cls().__dict__.items():
            convert(key, getattr(config, key), default, path)
    except TypeError:
        raise UserError(f'{path} does not hold the settings of a {cls.__name__}: was it written by '
                        'another version?') from None
    return config


def load_weights(model, weights, path, missing_ok=''):
    """load_state_dict that turns all complaints into one sentence (UserError), also about NaN.
    missing_ok: a pattern for the names of tensors that may keep their initial values."""
    expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    found = {}
    if isinstance(weights, dict):
        found = {name: tuple(getattr(x, 'shape', ())) for name, x in weights.items()}
    for name in {**found, **expected}:
        may_miss = name not in found and re.fullmatch(missing_ok, name)
        if found.get(name) != expected.get(name) and not may_miss:
            raise UserError(f'{path} is not of this network: tensor {name} is '
                            f'{found.get(name, "missing")}, expected '
                            f'{expected.get(name, "no such tensor")}.')
    bad = not_finite(weights)
    if bad:
        raise UserError(f'{path}: tensor {bad} holds NaN or infinity: train it again.')
    model.load_state_dict(weights, strict=False)


# ------------------------------------------------------------------------------ one run in a folder

# Settings that may differ when a run resumes: paths (data and tokenizer are identified by their
# hashes), the length of the run, what it prints, the machine.
MAY_CHANGE = set('data out_dir vq init_from overwrite mask_iters res_iters len_iters vq_iters '
                 'eval_every vq_eval_every log_every device dtype compile'.split())
locks = []   # held until the process ends, however it ends


def lock(folder, name):
    """Keep all other runs that write <name>*.pt out of the folder until this process ends."""
    path = os.path.join(folder, f'.{name}.lock')
    must_be_writable(path)
    held = filelock.FileLock(path)
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f'{folder} is in use: another process writes {name}.pt there; wait for it, '
                        'or give another --out_dir.') from None
    except NotImplementedError:
        return   # a file system without locks
    locks.append(held)
    for unfinished in glob.glob(os.path.join(glob.escape(folder), f'.{name}*.pt.*.tmp')):
        os.unlink(unfinished)   # of a run that was killed while it saved


def open_run(run, folder, kind, config, iters, keys=(), **identity):
    """Begin a run that writes <kind>.pt and <kind>_last.pt into a folder: lock it and check what is
    there. Returns the checkpoint to resume from if init_from is 'resume', otherwise None.

    config: the settings, and identity: hashes of data and tokenizer; checkpoints keep both. iters:
    steps of the whole run. keys: other entries that the checkpoint must have. UserError where it
    belongs to another run, and where a run from scratch would replace a checkpoint without
    --overwrite=True.
    """
    if run.main:
        lock(folder, kind)
    last, best = (os.path.join(folder, f'{kind}{end}.pt') for end in ('_last', ''))
    resumes = config.get('init_from') == 'resume'
    path = last if resumes or os.path.exists(last) else best
    if not resumes and (config['overwrite'] or not os.path.exists(path)):
        return None

    keys = ('it', 'model', 'settings', *keys) if resumes else ()
    checkpoint = load(path, 'leave out --init_from, or give --overwrite=True', kind, keys)
    was = {**checkpoint, **checkpoint.get('settings', {})}
    changed = ', '.join(f'{key} was {was[key]}, now {value}'
                        for key, value in {**config, **identity}.items()
                        if key in was and key not in MAY_CHANGE and was[key] != value)
    if resumes and not changed:
        if checkpoint['it'] > iters:
            raise UserError(f'{path} has {checkpoint["it"]} steps, more than the {iters} asked '
                            'for: nothing is left to do.')
        return checkpoint
    date = time.strftime('%Y-%m-%d %H:%M', time.localtime(os.path.getmtime(path)))
    resume = 'resume it with --init_from=resume and its settings, ' if path == last else ''
    difference = f'its settings differ: {changed}' if changed else 'it has the same settings'
    raise UserError(f'{path} exists, step {checkpoint.get("it", "unknown")} of {date}, and '
                    f'{difference}; {resume}give another --out_dir, or replace it: '
                    '--overwrite=True without --init_from.')
