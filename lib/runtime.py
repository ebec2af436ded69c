"""What a training script needs around its loop: the device, ranks and seeds; optimizers and the
learning rate; files that are written whole or not at all; checkpoints, and the check that those in
a folder belong to this run."""
import contextlib
import ctypes
import glob
import io
import json
import math
import os
import random
import re
import sys
import tempfile
import time
import zipfile
from dataclasses import fields
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
    dtype      'bfloat16' or 'float32'; 'auto' is bfloat16 where the hardware multiplies in it
    autocast   a function that returns the context for forward passes
    rank, world, main    of torchrun; main is True on rank 0
    generator  draws the same numbers on every rank, because data and masks are drawn for the global
               batch
    """
    rank, world, local = (int(os.environ.get(name, default)) for name, default in (
        ('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
    if device == 'cuda' and not torch.cuda.is_available():
        raise UserError('device is cuda, but torch finds no GPU: leave --device out, or check the '
                        'driver.')
    if device != 'cpu' and torch.cuda.is_available():
        device, backend = f'cuda:{local}', 'nccl'
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        device, backend = 'cpu', 'gloo'
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if dtype == 'auto':
        dtype = 'bfloat16' if native else 'float32'
    if world > 1 and not dist.is_initialized():
        dist.init_process_group(backend)

    keep_memory()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed + rank)   # dropout differs between ranks
    autocast = partial(torch.autocast, device.split(':')[0], torch.bfloat16,
                       enabled=dtype == 'bfloat16')
    return SimpleNamespace(device=device, dtype=dtype, autocast=autocast, rank=rank, world=world,
                           main=rank == 0, generator=torch.Generator(device).manual_seed(seed))


def keep_memory():
    """Stop glibc from returning blocks over 32 MB to the system after each use. That cost 40,000
    page faults per training step, 5% of its time; peak memory stays the same (1.6 GB)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):   # systems without mallopt
        for setting in (-3, -1):   # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(setting, 2**31 - 1)


def synchronize(device):
    """Wait until the GPU has finished; a CPU has nothing to wait for."""
    if device.startswith('cuda'):
        torch.cuda.synchronize()


# ----------------------------------------------------------------------------------------- training


def make_optimizers(learner, name, lr, weight_decay=0.0, fused=True):
    """AdamW for everything, or ('muon') Muon for the matrices of the trunk's layers and AdamW for
    the rest. Muon's updates have the size of AdamW's, so both take the same learning rate."""
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
    cuda = run.device != 'cpu'
    return dict(device=run.device[:4], world=run.world, generator=run.generator.get_state(),
                rng=torch.get_rng_state(), cuda_rng=torch.cuda.get_rng_state() if cuda else None)


def restore_rng(run, checkpoint, seed, path):
    """Restore what `rng_state` put into the checkpoint at `path`."""
    if checkpoint['device'] != run.device[:4]:
        raise UserError(f'{path} has random states of {checkpoint["device"]}: resume it with '
                        f'--device={checkpoint["device"]}.')
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
    """The losses since the last look, kept on the device, because fetching each one would make
    every step wait for the GPU. names: a function from the batch given to `add` to the names of its
    clips. hint: what to do about a loss that is not finite."""

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
            clips = ', '.join(sorted(set(self.names(batch)))[:64])
            raise UserError(f'The {what} is {value} at step {step}, so nothing more was saved: '
                            f'{self.hint}, or check the clips of that batch, {clips}.')


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
    f = tempfile.NamedTemporaryFile(mode, dir=folder, prefix=f'.{name}.', suffix='.tmp',
                                    delete=False, encoding=None if 'b' in mode else 'utf-8')
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
    """Create the folder of a file that is written later. UserError if it cannot be written."""
    try:
        if os.path.isdir(path):
            raise OSError('it is a folder')
        folder = os.path.dirname(os.path.abspath(path))
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as e:
        raise UserError(f'{path} cannot be written ({e}): give another place.') from None


def read(path, hint, open_it):
    """open_it(path), where anything it raises becomes one sentence (UserError): on damaged files
    libraries raise nearly anything, and they do not name the file."""
    try:
        if not os.path.isfile(path):
            raise ValueError('missing, or not a file')
        return open_it(path)
    except Exception as e:
        why = ' '.join(str(e).split())
        why = why if re.search('[a-z]', why) else f'damaged, {type(e).__name__}'
        why = re.sub(r'torch\.Size\(\[(.*?)\]\)', r'(\1)', why)
        if re.search('pickle|weights.only', why, re.IGNORECASE):   # it would advise to run the code
            why = 'damaged, or more than plain data; code in it was not run'
        raise UserError(f'{path} cannot be read ({why:.250}): {hint}.') from None


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
    """Some arrays of an .npz file. `ZipFile.read` compares the checksum of each."""
    def open_it(path):
        with zipfile.ZipFile(path) as members:
            files = [io.BytesIO(members.read(f'{key}.npy')) for key in keys]
        return [np.lib.format.read_array(file) for file in files]

    return read(path, hint, open_it)


# ------------------------------------------------------------------------------------- checkpoints


def save(checkpoint, path):
    """torch.save, whole or not at all. UserError where a weight is NaN or infinite, and where the
    lock of this run is gone, because another run may then write the same files."""
    for held in locks:
        if not os.path.exists(held.lock_file):
            raise UserError(f'{path} was not written: {held.lock_file} was removed, so another run '
                            'may write there; resume this one.')
    bad = not_finite(checkpoint.get('model') or checkpoint.get('state') or {})
    if bad:
        raise UserError(f'{path} was not written, because {bad} has NaN or infinity: lower the '
                        'learning rate, or look for broken clips.')
    with atomic_write(path) as f:
        torch.save(checkpoint, f)


def load(path, hint, kind=None, keys=()):
    """Open a checkpoint on the CPU without running any code in it. UserError where it is missing or
    damaged, has another kind, or lacks one of the keys; hint: what to do about it."""
    def open_it(path):
        with open(path, 'rb') as f:
            # torch writes checksums of tensors and never compares them
            if zipfile.is_zipfile(f) and zipfile.ZipFile(f).testzip():
                raise ValueError('a checksum is wrong')
            f.seek(0)
            checkpoint = torch.load(f, map_location='cpu', weights_only=True)
        if not isinstance(checkpoint, dict):
            raise ValueError('it is not a checkpoint')
        found = checkpoint.get('kind', 'something else')
        if kind and found != kind:
            raise ValueError(f'it holds {found}, expected {kind}')
        lacking = [key for key in keys if key not in checkpoint]
        if lacking:
            raise ValueError(f'it lacks {lacking[0]}: was it written by another version?')
        return checkpoint

    return read(path, hint, open_it)


def load_weights(model, weights, path, missing_ok=''):
    """load_state_dict, where anything wrong is one sentence (UserError), NaN too. missing_ok: a
    pattern for the names of tensors that may keep their initial values."""
    def open_it(path):
        missing, wrong = model.load_state_dict(weights, strict=False)
        wrong += [name for name in missing if not re.fullmatch(missing_ok, name)]
        if wrong:
            raise ValueError(f'tensor {wrong[0]} is missing or unknown')
        if not_finite(weights):
            raise ValueError(f'tensor {not_finite(weights)} holds NaN or infinity')

    read(path, 'expected the weights of this network', open_it)


def not_finite(weights):
    """The name of the first tensor that holds NaN or infinity, or None."""
    return next((name for name, x in weights.items() if not torch.isfinite(x).all()), None)


def config_from(cls, settings, path):
    """The dataclass cls from a dict that a checkpoint holds. UserError where it does not fit."""
    try:
        config = cls(**settings)
    except TypeError:
        raise UserError(f'{path} does not hold the settings of a {cls.__name__}: was it written by '
                        'another version?') from None
    for field in fields(cls):
        convert(field.name, getattr(config, field.name), field.default, path)
    return config


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


# ------------------------------------------------------------------------------ one run in a folder

# Settings that may differ when a run resumes: paths (hashes identify data and tokenizer), the
# length of the run, what it prints, the machine.
MAY_CHANGE = set('data out_dir vq glove_dir init_from overwrite mask_iters res_iters len_iters '
                 'vq_iters ev_steps eval_every vq_eval_every ev_eval_every log_every device dtype '
                 'compile'.split())
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

    config: the settings. iters: steps of the whole run. keys: other entries that the checkpoint
    must have. identity: hashes of data and tokenizer. UserError where the checkpoint belongs to
    another run, and where a run from scratch would replace one without --overwrite=True.
    """
    if run.main:
        lock(folder, kind)
    path = os.path.join(folder, f'{kind}_last.pt')
    resumes = config['init_from'] == 'resume'
    if resumes and not os.path.exists(path):
        raise UserError(f'There is no {path}, so nothing can be resumed: leave --init_from=resume '
                        'out.')
    if not os.path.exists(path):
        path = os.path.join(folder, f'{kind}.pt')
    if not os.path.exists(path):
        return None

    keys = ('it', 'model', 'settings', *keys) if resumes else ()
    checkpoint = load(path, 'move it away, or give another --out_dir', kind, keys)
    if config['overwrite'] and not resumes:
        return None
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
    resume = ''
    if path.endswith('_last.pt'):
        resume = 'resume it with its settings and --init_from=resume, '
    raise UserError(f'{path} exists, step {checkpoint.get("it", "unknown")} of {date}, and '
                    f'{changed or "its settings are the same"}; {resume}give another --out_dir, or '
                    'replace it: --overwrite=True without --init_from.')
