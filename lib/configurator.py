"""Poor man's configurator, after nanoGPT's. The settings of a script are globals with a comment
each, between two rules, followed by

    from lib.configurator import configure
    config = configure(globals())

`python train_mask.py config/toy.py --alpha0=0 --seed=1` then runs config/toy.py, and the two
overrides after it, on top of the defaults. One config file serves all scripts: it may set a key of
another script. On the command line a key must be one of the script's own.

The comment of a setting also says which strings are allowed: where it contains ' | ', the words in
quotes. Any mistake of the user, anywhere in the project, is a UserError: one sentence, exit code 2.
"""
import errno
import functools
import math
import os
import re
import signal
import sys
import threading
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))   # the project's folder
SHARED = os.path.join(ROOT, 'config', 'decoding.py')   # settings that several scripts have
NOT_TEXT = re.compile('[\0\ud800-\udfff]')   # characters that UTF-8 or a file name cannot hold

# Bounds of the numbers that could otherwise take all memory or never end (--window=1000 once did).
# Other numbers must be finite and, unless their default is negative, not negative.
LIMITS = {key: (low, high) for low, high, keys in (
    (0, 2**32 - 1, 'seed'),
    (1, 10**9, 'mask_iters res_iters len_iters vq_iters eval_every vq_eval_every ev_eval_every '
               'log_every ev_steps'),
    (0, 10**9, 'ev_ae_steps'),
    (1, 10**6, 'steps clips'),
    (1, 10**4, 'repeats rounds seeds pooled'),
    (0, 10**4, 'mm_batches length gen_batch'),
    (1, 2**14, 'batch_size vq_batch ev_batch batch prompts_at_once window_frames frames latent '
               'ff text_dim dim width vq_width code_dim ev_movement ev_code ev_motion_hidden '
               'ev_text_hidden ev_out'),
    (1, 128, 'n_layers n_heads n_quantizers window'),
    (2, 2**15, 'n_codes'),   # token ids are int16
    (0, 64, 'r_exp neighbours overlap'),
    (0, 6, 'vq_depth depth down'),
    (-1, 64, 'res_layers'),
    (0, 2**16 - 1, 'port'),
    (0, 1, 'alpha0 cfs_lambda cfs_share cfs_ramp cond_drop quantize_dropout anneal'),
    (0, 0.99, 'dropout'),
    (1e-6, 1, 'top_share'),
    (1e-4, 1e12, 'temperature res_temperature grad_clip'),
) for key in keys.split()}


class UserError(ValueError):
    """A mistake that the user can mend. The message is one sentence: which file or setting, what
    was found, what was expected, what to do."""


def install_error_hook():
    """Print a UserError as its sentence and exit with code 2. The same goes for an error of the
    operating system that names a file, and for a full disk. Ctrl-C exits with 130, SIGTERM with
    143. All other errors keep their traceback."""
    def hook(kind, error, trace):
        system = isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC)
        if issubclass(kind, KeyboardInterrupt):
            error, code = 'Interrupted.', 130
        elif isinstance(error, UserError) or system:
            code = 2
        else:
            return sys.__excepthook__(kind, error, trace)
        print(error, file=sys.stderr)
        sys.stdout.flush()
        raise SystemExit(code)

    def terminated(*_):   # unwinds the stack, so that temporary files are removed
        print('Terminated.', file=sys.stderr)
        raise SystemExit(143)

    sys.excepthook = hook
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminated)
        if signal.getsignal(signal.SIGINT) is stop_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def settings_lines(path):
    """The lines of a script between its two rules, or of config/decoding.py; [] without rules."""
    source = Path(path).read_text(encoding='utf-8')
    if path == SHARED:
        return source.splitlines()
    parts = re.split(r'\n# -+\n', source, maxsplit=2)   # headings of sections have words in them
    lines = parts[1].splitlines() if len(parts) == 3 else []
    return [line for line in lines if not line.startswith(('config = ', 'configure('))]


@functools.cache
def keys_of_all_scripts():
    """The settings of all scripts. (A config file asks for every key of another script.)"""
    lines = settings_lines(SHARED)
    for path in Path(ROOT).glob('*.py'):
        lines += settings_lines(path)
    return {line.split(' = ')[0] for line in lines if re.match(r'\w+ = ', line)}


def allowed_words(lines):
    """Settings with their comments -> {key: the words that its comment allows}."""
    found = re.findall(r"^(\w+) = '[^']*' *#(.* \| .*)", '\n'.join(lines), re.MULTILINE)
    return {key: re.findall(r"'([\w+]*)'", comment) for key, comment in found}


def convert(key, value, default, where, allowed=()):
    """Check a value against the type of its default, the limits and the allowed words, and return
    it. An int may be given for a float. where: the file or argument that UserError names."""
    huge = type(value) is int and abs(value) > 1e60   # beyond a float, and too long to print
    shown = 'a huge number' if huge else f'{value!r:.60}'
    where = str(where) if str(where).isprintable() else ascii(where)
    problem = f'{where[:80]}: {key} is {shown}, expected'
    if isinstance(default, float) and type(value) is int and not huge:
        value = float(value)
    if type(value) is not type(default):
        raise UserError(f'{problem} {type(default).__name__} as in its default {default!r}.')
    if isinstance(value, str) and NOT_TEXT.search(value):
        raise UserError(f'{problem} text that UTF-8 can hold.')
    if allowed and value not in allowed:
        raise UserError(f'{problem} {", ".join(allowed)}.')
    if type(value) in (int, float):
        low, high = LIMITS.get(key, (0 if default >= 0 else -math.inf, math.inf))
        if not low <= value <= high or math.isinf(value):   # nor is NaN within them
            raise UserError(f'{problem} a finite number from {low:.10g} to {high:.10g}.')
    return value


def read_argument(arg, defaults, allowed={}):
    """'--key=value' -> {key: value}, of the type of the key's default."""
    key, equals, text = arg[2:].partition('=')
    if not equals:
        raise UserError(f'{arg!a:.80}: expected --key=value, as in --seed=1.')
    if key not in defaults:
        near = [k for k in defaults if key.lower() in k or k in key.lower()]
        hint = f'close: {", ".join(near)}.' if near else '--help lists them.'
        script = os.path.basename(sys.argv[0])
        raise UserError(f'{arg!a:.80} is not a setting of {script}; {hint}')
    kind = type(defaults[key])
    try:
        value = {'True': True, 'False': False}[text] if kind is bool else kind(text)
    except (ValueError, KeyError):
        value = text   # still a str, which `convert` refuses
    return {key: convert(key, value, defaults[key], arg, allowed.get(key))}


def read_config_file(path, defaults, allowed={}):
    """A config file's assignments to settings of this script -> {key: value}."""
    if not os.path.isfile(path):
        raise UserError(f'{path} is not a file: expected a config file (config/*.py) or '
                        '--key=value.')
    assigned = {}
    try:
        exec(compile(Path(path).read_text(encoding='utf-8-sig'), path, 'exec'), assigned)
    except (Exception, SystemExit) as e:
        why = ' '.join(str(e).split())
        raise UserError(f'{path} is not a config file: {type(e).__name__}: {why:.200}.') from None
    settings = {}
    for key, value in assigned.items():
        if key in defaults:
            settings[key] = convert(key, value, defaults[key], path, allowed.get(key))
        elif (isinstance(value, (int, float, str)) and not key.startswith('_')
              and key not in keys_of_all_scripts()):
            raise UserError(f'{path} sets {key}, which no script has: is it misspelt?')
    return settings


def configure(g, argv=None, shared=False):
    """Apply config files and --key=value overrides (argv, by default the command line) to the
    globals g of a script, and return all settings as a dict, which checkpoints keep. shared: the
    script also has the settings of config/decoding.py. UserError for anything that is wrong."""
    install_error_hook()
    lines = settings_lines(g['__file__']) if '__file__' in g else []
    if shared:
        lines += settings_lines(SHARED)
        exec('\n'.join(settings_lines(SHARED)), g)
    allowed = allowed_words(lines)
    defaults = {key: value for key, value in g.items()
                if isinstance(value, (int, float, str)) and not key.startswith('_')
                and not key.isupper()}   # FRAMES_PER_TOKEN is imported, not a setting

    for arg in sys.argv[1:] if argv is None else argv:
        if arg in ('-h', '--help'):
            print(g['__doc__'] or '', '\nSettings, to be given as --key=value:\n', sep='')
            for line in lines:
                key = line.split(' = ')[0]
                if key in defaults and g[key] != defaults[key]:   # a config file set it
                    line = re.sub(r"= ('[^']*'|\S+)", lambda _: f'= {g[key]!r}', line, count=1)
                print(line)
            sys.exit(0)
        read = read_argument if arg.startswith('--') else read_config_file
        g.update(read(arg, defaults, allowed))
    return {key: g[key] for key in defaults}


def stop_at_once(number, _):
    """End a script during its imports, where nothing needs to be cleaned up. (An exception in the
    middle of importing numpy or torch becomes another error.)"""
    word = 'Interrupted.' if number == signal.SIGINT else 'Terminated.'
    print(word, file=sys.stderr, flush=True)
    os._exit(128 + number)


if os.path.isfile(sys.argv[0]) and os.path.dirname(os.path.abspath(sys.argv[0])) == ROOT:
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop_at_once)
