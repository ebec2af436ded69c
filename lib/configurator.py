"""nanoGPT's override idea, with words. A script's settings are globals with a comment each, then

    from configurator import configure
    config = configure(globals())

so that `python train_mask.py config/toy.py --alpha0=0 --seed=1` runs config/toy.py and then the two
overrides on top of the defaults. One config file serves all scripts: a key in it that this script
does not use is fine as long as some script here does. On the command line a key must be this
script's own. A mistake anywhere in the project is a UserError: one sentence, exit code 2.
"""
import errno
import functools
import glob
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))   # the project

NOT_TEXT = re.compile('[\0\ud800-\udfff]')   # what UTF-8 has no bytes for, and the zero byte

given = set()   # keys that a config file or the command line has set

# What a number may be, lowest and highest, in one table, because scripts share settings; others
# need only be finite. A slip of the finger shall not take all memory: --window=1000 did.
RANGES = {key: (low, high) for low, high, keys in (
    (0, 2**32 - 1, 'seed'),   # numpy's
    (0, 2**16 - 1, 'port'),
    (1, 10**9, 'mask_iters res_iters len_iters vq_iters ev_steps steps eval_every vq_eval_every '
               'ev_eval_every repeats seeds rounds clips overlap'),
    (0, 10**9, 'ev_ae_steps warmup vq_warmup motion_steps action_steps max_clips mm_batches warm'),
    (1, 10**4, 'log_every'),
    (1, 2**16, 'batch_size vq_batch ev_batch batch prompts'),
    (0, 2**16, 'gen_batch length'),
    (-1, 64, 'res_layers'),
    (1, 2**14, 'latent ff code_dim vq_width '
               'ev_movement ev_code ev_motion_hidden ev_text_hidden ev_out'),
    (1, 128, 'n_layers n_heads n_quantizers'),
    (0, 6, 'vq_depth'),
    (2, 2**15, 'n_codes'),   # token ids are int16
    (1, 64, 'window'),
    (0, 64, 'r_exp neighbours'),
    (4, 2**16, 'window_frames frames max_tokens'),
    (0, 1, 'alpha0 cfs_lambda cfs_share cfs_ramp hard_first hard_last teacher_momentum cond_drop '
           'res_cond_drop quantize_dropout anneal'),
    (0, 0.99, 'dropout'),
    (1e-6, 1, 'top_share'),
    (0, 10, 'lr vq_lr ev_lr weight_decay ev_weight_decay'),
    (1e-9, 1e12, 'grad_clip'),
    (1e-4, 1e3, 'temperature res_temperature'),
    (-100, 100, 'cond_scale res_scale'),
    (0, 1e6, 'w_position w_rotation w_foot w_heading w_commit vq_reset_below vq_sample '
             'cfs_noise lambda_D beta sigma_max'),
) for key in keys.split()}

# What a text may be, where only some are understood.
CHOICES = dict(
    device=('auto', 'cpu', 'cuda'),
    dtype=('auto', 'bfloat16', 'float32'),
    # training
    stage=('mask', 'res', 'len'),
    text_encoder=('clip', 'hash'),
    text=('sentence', 'clauses', 'words', 'graph'),
    mask_by=('msd', 'velocity', 'random', 'loss', 'msd+loss'),
    alpha_schedule=('decay', 'constant', 'reversed'),
    fusion=('rescaled', 'zscore', 'temperature'),
    msd_embed=('codebook', 'learned'),
    msd_gap=('interp', 'zero'),
    msd_attn=('visible', 'clean', 'guess'),
    omega=('energy', 'flatness'),
    token_init=('codebook', 'random'),
    res_draw=('cycle', 'release'),
    optimizer=('muon', 'adamw'),
    # decoding
    msd_decode=('kept', 'guess'),
    momask_data=('t2m', 'kit'),
    momask_text=('clip', 'hash'))


class UserError(ValueError):
    """Something only the user can mend. The message is one sentence: which file or key, what was
    found, what was expected, what to do."""


def install_error_hook():
    """The one place that turns a UserError into its sentence and exit code 2. So does an operating
    system's error that names a file (no permission) or a full disk; all else keeps its
    traceback."""
    def hook(kind, error, trace):
        system = isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC)
        if not (isinstance(error, UserError) or system):
            return sys.__excepthook__(kind, error, trace)
        print(error, file=sys.stderr)
        sys.stdout.flush()
        raise SystemExit(2)
    sys.excepthook = hook


@functools.cache   # a config file asks once for every key that belongs to another script
def keys_of_all_scripts():
    """Names assigned at the top level of any file here."""
    names = set()
    for path in [*glob.glob(os.path.join(ROOT, '*.py')), os.path.join(ROOT, 'config/decoding.py')]:
        with open(path, encoding='utf-8') as f:
            names.update(re.findall(r'^(\w+) = ', f.read(), re.MULTILINE))
    return names


def plain(text):
    """What can stand in a sentence: one line, not too long."""
    return (text if text.isprintable() else ascii(text))[:80]


def convert(key, value, default, where):
    """value, checked against the type of the default and the key's range. An int may stand for a
    float."""
    try:
        shown = f'{value!r:.60}'
        if isinstance(default, float) and type(value) is int:
            value = float(value)
    except (ValueError, OverflowError):
        shown = 'a number of hundreds of digits'
    if type(value) is not type(default):
        raise UserError(f'{plain(where)}: {key} is {shown}, expected {type(default).__name__} '
                        f'as in its default {default!r}.')
    if isinstance(value, str) and NOT_TEXT.search(value):
        raise UserError(f'{plain(where)}: {key} holds bytes that are no text, expected UTF-8.')
    if value not in CHOICES.get(key, [value]):
        raise UserError(f'{plain(where)}: {key} is {shown}, expected {", ".join(CHOICES[key])}.')
    if isinstance(value, (int, float)):
        low, high = RANGES.get(key, (-sys.float_info.max, sys.float_info.max))
        if not low <= value <= high:   # nor is NaN
            raise UserError(f'{plain(where)}: {key} is {shown}, expected {low:.10g} to '
                            f'{high:.10g}.')
    return value


def read_argument(arg, defaults):
    """'--key=value' -> {key: value}, of the type of the key's default."""
    key, equals, text = arg[2:].partition('=')
    if not equals:
        raise UserError(f'{plain(arg)}: expected --key=value, as in --seed=1.')
    if key not in defaults:
        near = [k for k in defaults if key.lower() in k or k in key.lower()]
        hint = f'close: {", ".join(near)}.' if near else '--help lists them.'
        script = os.path.basename(sys.argv[0])
        raise UserError(f'{plain(arg)} is not a setting of {script}; {hint}')
    kind = type(defaults[key])
    try:
        value = {'True': True, 'False': False}[text] if kind is bool else kind(text)
    except (ValueError, KeyError):
        value = text   # still a str, which convert refuses
    return {key: convert(key, value, defaults[key], arg)}


def read_config_file(path, defaults):
    """A config file's assignments to keys of this script -> {key: value}."""
    if not os.path.isfile(path):
        raise UserError(f'{path} does not exist or is no file: expected a config file '
                        '(config/*.py) or --key=value.')
    assigned = {}
    try:
        with open(path, encoding='utf-8') as f:
            exec(compile(f.read(), path, 'exec'), assigned)
    except Exception as e:
        why = ' '.join(str(e).split())
        raise UserError(f'{path} is not a config file: {type(e).__name__}: {why:.200}.') from None
    settings = {}
    for key, value in assigned.items():
        if key in defaults:
            settings[key] = convert(key, value, defaults[key], path)
        elif key.startswith('_') or not isinstance(value, (int, float, str)):
            continue
        elif key not in keys_of_all_scripts():
            raise UserError(f'{path} sets {key}, which no script here knows: is it misspelt?')
    return settings


def print_help(g, shared):
    """The script's docstring, and its settings with their comments as they stand in the source."""
    with open(g['__file__'], encoding='utf-8') as f:
        _, settings, _ = f.read().split('\n# ---', 2)
    lines = settings.splitlines()[1:]
    if shared:
        with open(os.path.join(ROOT, shared), encoding='utf-8') as f:
            lines += f.read().splitlines()
    print(g['__doc__'])
    print('Settings, to be given as --key=value:\n')
    print('\n'.join(line for line in lines if not line.startswith(('config', '    '))))


def configure(g, argv=None, shared='', **choices):
    """Apply config files and --key=value overrides (argv, default the command line) to the globals
    g, and return the final settings as a dict, which checkpoints keep. shared: a file of settings
    that several scripts have. choices: as in CHOICES, for a key of which each script has its own.
    UserError for anything that is not understood."""
    install_error_hook()
    if shared:
        with open(os.path.join(ROOT, shared), encoding='utf-8') as f:
            exec(f.read(), g)
    defaults = {}
    for key, value in g.items():
        is_setting = not key.startswith('_') and not key.isupper()   # FRAMES_PER_TOKEN is none
        if is_setting and isinstance(value, (int, float, str)):
            defaults[key] = value

    for arg in sys.argv[1:] if argv is None else argv:
        if arg in ('-h', '--help'):
            print_help(g, shared)
            sys.exit(0)
        read = read_argument if arg.startswith('--') else read_config_file
        changes = read(arg, defaults)
        g.update(changes)
        given.update(changes)

    for key, allowed in choices.items():
        if g[key] not in allowed:
            raise UserError(f"{key} is '{g[key]}', expected {', '.join(map(str, allowed))}.")
    return {key: g[key] for key in defaults}
