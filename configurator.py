"""nanoGPT's override idea, with words. A script's settings are globals with a comment each, then

    from configurator import configure
    config = configure(globals(), fusion=('rescaled', 'zscore', 'temperature'))

so that `python train_mask.py config/toy.py --alpha0=0 --seed=1` runs config/toy.py and then the two
overrides on top of the defaults. One config file serves all scripts: a key in it that this script
does not use is fine as long as some script here does. On the command line a key must be this
script's own. A mistake anywhere in the project is a UserError: one sentence, exit code 2.
"""
import ast
import functools
import glob
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))

given = set()   # keys that a config file or the command line has set


class UserError(ValueError):
    """Something only the user can mend. The message is one sentence: which file or key, what was
    found, what was expected, what to do."""


def install_error_hook():
    """The one place that turns a UserError into its sentence and exit code 2. So does an operating
    system's error that names a file (no permission, disk full); all else keeps its traceback."""
    def hook(kind, error, trace):
        about_file = isinstance(error, OSError) and error.filename is not None
        if not (isinstance(error, UserError) or about_file):
            return sys.__excepthook__(kind, error, trace)
        print(error, file=sys.stderr)
        sys.stdout.flush()
        raise SystemExit(2)
    sys.excepthook = hook


@functools.cache   # a config file asks once for every key that belongs to another script
def keys_of_all_scripts():
    """Names assigned at the top level of any file here."""
    names = set()
    for path in glob.glob(os.path.join(HERE, '*.py')):
        with open(path, encoding='utf-8') as f:
            for node in ast.parse(f.read()).body:
                if isinstance(node, ast.Assign):
                    names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    return names


def convert(key, value, default, where):
    """value, checked against the type of the default. An int may stand for a float."""
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise UserError(f'{where}: {key} is {value!r}, expected {type(default).__name__} '
                        f'as in its default {default!r}.')
    return value


def read_argument(arg, defaults):
    """'--key=value' -> {key: value}, of the type of the key's default."""
    key, equals, text = arg[2:].partition('=')
    if not equals:
        raise UserError(f'{arg}: expected --key=value, for example --{key}=1.')
    if key not in defaults:
        near = [k for k in defaults if key.lower() in k or k in key.lower()]
        hint = f'close: {", ".join(near)}.' if near else '--help lists them.'
        script = os.path.basename(sys.argv[0])
        raise UserError(f'--{key} is not a setting of {script}; {hint}')
    value = text
    if not isinstance(defaults[key], str):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            pass   # still a str, which convert refuses
    return {key: convert(key, value, defaults[key], arg)}


def read_config_file(path, defaults):
    """A config file's assignments to keys of this script -> {key: value}."""
    if not os.path.exists(path):
        raise UserError(f'{path} does not exist: expected a config file (config/*.py) '
                        'or --key=value.')
    assigned = {}
    try:
        with open(path, encoding='utf-8') as f:
            exec(compile(f.read(), path, 'exec'), assigned)
    except Exception as e:
        raise UserError(f'{path} is not a config file: {type(e).__name__}: {e}.') from None
    settings = {}
    for key, value in assigned.items():
        if key.startswith('_') or not isinstance(value, (int, float, str)):
            continue
        if key in defaults:
            settings[key] = convert(key, value, defaults[key], path)
        elif key not in keys_of_all_scripts():
            raise UserError(f'{path} sets {key}, which no script here knows: is it misspelt?')
    return settings


def print_help(g):
    """The script's docstring, and its settings with their comments as they stand in the source."""
    with open(g['__file__'], encoding='utf-8') as f:
        _, settings, _ = f.read().split('\n# ---', 2)
    lines = settings.splitlines()[1:]
    print(g['__doc__'])
    print('Settings, to be given as --key=value:\n')
    print('\n'.join(line for line in lines if not line.startswith(('config', '    '))))


def configure(g, argv=None, **options):
    """Apply config files and --key=value overrides (argv, default the command line) to the globals
    g, and return the final settings as a dict, which checkpoints keep. options: for keys that name
    a choice, the tuple of allowed values. UserError for anything that is not understood."""
    install_error_hook()
    defaults = {}
    for key, value in g.items():
        is_setting = not key.startswith('_') and not key.isupper()   # FRAMES_PER_TOKEN is none
        if is_setting and isinstance(value, (int, float, str)):
            defaults[key] = value

    for arg in sys.argv[1:] if argv is None else argv:
        if arg in ('-h', '--help'):
            print_help(g)
            sys.exit(0)
        read = read_argument if arg.startswith('--') else read_config_file
        changes = read(arg, defaults)
        g.update(changes)
        given.update(changes)

    for key, allowed in options.items():
        if g[key] not in allowed:
            raise UserError(f"{key} is '{g[key]}', expected {', '.join(map(str, allowed))}.")
    return {key: g[key] for key in defaults}
