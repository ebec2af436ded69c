"""nanoGPT's override idea, with words. A script is globals with a comment each, then

    from configurator import configure, setup
    configure(globals())

so that `python train_mask.py config/toy.py --alpha0=0 --seed=1` runs config/toy.py and then the two overrides on top of
the defaults. One config file serves all scripts: a key in it that this script does not use is fine as long as some
script here does; on the command line the key must be this script's own. Mistakes are one sentence and exit code 2.
"""
import ast
import ctypes
import glob
import math
import os
import random
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))


def fail(sentence):
    print(sentence, file=sys.stderr)
    sys.exit(2)


def choose(key, value, *options):
    """Refuse a value that is none of the options."""
    if value not in options:
        fail(f"{key} is '{value}', expected {', '.join(options)}.")


def _keys_of_all_scripts():
    """Names assigned a literal at the top level of any script here."""
    names = set()
    for path in glob.glob(os.path.join(HERE, '*.py')):
        with open(path) as f:
            for node in ast.parse(f.read()).body:
                if isinstance(node, ast.Assign):
                    names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    return names


def _convert(key, value, default, where):
    """value, checked against the type of the default. An int may stand for a float, nothing else is converted."""
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        fail(f'{where}: {key} is {value!r}, expected {type(default).__name__} as in its default {default!r}.')
    return value


def configure(g, argv=None):
    """Apply config files and --key=value overrides (argv, default the command line) to the globals g. Returns the final
    settings as a dict, which checkpoints keep."""
    defaults = {k: v for k, v in g.items() if not k.startswith('_') and isinstance(v, (int, float, str))}
    for arg in sys.argv[1:] if argv is None else argv:
        if arg in ('-h', '--help'):
            print(g.get('__doc__') or '', '\nkeys and defaults:', *[f'  --{k}={v!r}' for k, v in defaults.items()], sep='\n')
            sys.exit(0)
        if arg.startswith('--'):
            key, eq, text = arg[2:].partition('=')
            if not eq:
                fail(f'{arg}: expected --key=value, for example --{key}=1.')
            if key not in defaults:
                near = [k for k in defaults if key.lower() in k or k in key.lower()]
                fail(f'--{key} is not a setting of {os.path.basename(sys.argv[0])}'
                     + (f'; close: {", ".join(near)}.' if near else '; --help lists them.'))
            if isinstance(defaults[key], str):
                value = text
            else:
                try:
                    value = ast.literal_eval(text)
                except (ValueError, SyntaxError):
                    value = text
            g[key] = _convert(key, value, defaults[key], arg)
        else:
            if not os.path.exists(arg):
                fail(f'{arg} does not exist: expected a config file (config/*.py) or --key=value.')
            settings = {}
            try:
                with open(arg) as f:
                    exec(compile(f.read(), arg, 'exec'), settings)
            except Exception as e:
                fail(f'{arg} is not a config file: {type(e).__name__}: {e}.')
            for key, value in settings.items():
                if key.startswith('_') or not isinstance(value, (int, float, str)):
                    continue
                if key in defaults:
                    g[key] = _convert(key, value, defaults[key], arg)
                elif key not in _keys_of_all_scripts():
                    fail(f'{arg} sets {key}, which no script here knows: is it misspelt?')
    return {k: g[k] for k in defaults}


def setup(device='auto', dtype='auto', seed=0):
    """Choose the machine's best and seed everything. Returns a namespace:
    device, autocast (a context for forward passes), rank, world, main (is this rank 0?), generator (the same stream on
    every rank: data order and masks are drawn for the global batch), peak (FLOP/s of a plain matrix product, measured)."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
    choose('device', device, 'auto', 'cpu', 'cuda')
    if device == 'cuda' and not torch.cuda.is_available():
        fail('device is cuda, but torch sees no GPU here: leave --device out, or check the driver.')
    device = 'cpu' if device == 'cpu' or not torch.cuda.is_available() else f'cuda:{local}'
    if world > 1 and not torch.distributed.is_initialized():
        if device.startswith('cuda'):
            torch.cuda.set_device(device)
        torch.distributed.init_process_group('nccl' if device.startswith('cuda') else 'gloo')
    cuda = device.startswith('cuda')
    if dtype == 'auto':  # bfloat16 only where the hardware multiplies in it
        native = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else \
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        dtype = 'bfloat16' if native else 'float32'
    choose('dtype', dtype, 'bfloat16', 'float32')
    if cuda:
        torch.set_float32_matmul_precision('high')
    else:
        _keep_memory()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed + rank)  # dropout differs between ranks ...
    generator = torch.Generator(device).manual_seed(seed)  # ... data and masks do not
    autocast = (lambda: torch.autocast(device.split(':')[0], torch.bfloat16)) if dtype == 'bfloat16' else nullcontext
    return SimpleNamespace(device=device, dtype=dtype, autocast=autocast, rank=rank, world=world, main=rank == 0,
                           generator=generator, peak=_peak_flops(device, dtype))


def _keep_memory():
    """glibc hands blocks over 32 MB back to the system and faults them in again: 40,000 page faults in a training step of the
    released size, 0.08 of its 1.65 processor-seconds. Let it keep them; peak memory stays the same (1.6 GB)."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**31 - 1)   # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)   # M_TRIM_THRESHOLD
    except (OSError, AttributeError, TypeError):
        pass                          # another system's malloc


def _peak_flops(device, dtype):
    """FLOP/s of the best of three square products: what MFU is measured against, on any machine."""
    n = 8192 if device.startswith('cuda') else 1024
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    best = float('inf')
    for _ in range(4):
        if device.startswith('cuda'):
            torch.cuda.synchronize()
        t = time.perf_counter()
        a @ a
        if device.startswith('cuda'):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - t)
    return 2 * n**3 / best


def leave(run):
    """The end of a script that torchrun may have started: the ranks go together and at once. torch's gloo threads outlive
    destroy_process_group (something of DDP holds the group), and of short runs that went on to a normal end 4% aborted there."""
    if run.world > 1:
        torch.distributed.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def lr_at(it, lr, warmup, total):
    """Linear warm-up, then cosine decay to a tenth."""
    if it < warmup:
        return lr * (it + 1) / warmup
    return lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, (it - warmup) / max(1, total - warmup)))))
