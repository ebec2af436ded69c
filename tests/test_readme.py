"""The commands in README.md, RESULTS.md, SPEED.md and at the top of each script are those of this
code: the README's toy commands run on a tiny set, in its order; of all others every word is
understood by its script. --help shows every setting as it stands in the source."""
import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial

import pytest
from conftest import PROJECT, run_script
from test_train import TINY

from lib import configurator
import prepare_data
from lib.configurator import UserError, configure

PAGES = ('README.md', 'RESULTS.md', 'SPEED.md')
COMMAND = re.compile(r'^ *((?:python|torchrun|make|\$\w) .*|\w="python .*")$', re.MULTILINE)
INLINE = re.compile(r'`((?:python|torchrun) [^`]*)`')


def text_of(path):
    with open(os.path.join(PROJECT, path), encoding='utf-8') as f:
        return f.read()


def settings_of(script):
    """The lines between a script's two rules, as a program; '' where it has none."""
    parts = text_of(script).split('\n# ---', 2)
    if len(parts) < 3 or 'configure(' not in parts[1]:
        return ''
    shared = text_of('config/decoding.py') if 'config/decoding.py' in parts[1] else ''
    return shared + parts[1].partition('\n')[2]


SCRIPTS = [name for name in sorted(os.listdir(PROJECT)) if name.endswith('.py') and settings_of(name)]


def commands(path):
    """The command lines of a text, each as a list of words, and what it says to make (-> file)."""
    text = text_of(path)
    if path.endswith('.py'):
        text = text.split('"""')[1]
    text = text.replace('\\\n', ' ')
    variables = {}
    found = []
    for line in COMMAND.findall(text) + INLINE.findall(text):
        line = re.sub(r'\$(\w)', lambda match: variables[match[1]], line)
        words = shlex.split(re.split('   +', line)[0], comments=True)   # a remark begins there
        name, equals, value = words[0].partition('=')
        if equals:
            variables[name] = value
        elif '...' not in line:
            found.append((words, re.findall(r'# .*-> (\S+)', line)))
    return found


def split(words):
    """Words of a command -> its script and the arguments."""
    i = next(i for i, word in enumerate(words) if re.fullmatch(r'[\w/]+\.py', word))
    return words[i], words[i + 1:]


ALL = {' '.join(words): words for path in (*PAGES, *SCRIPTS, 'prepare_data.py')
       for words, _ in commands(path)}


def test_all_are_found():
    assert len(ALL) > 40
    assert len(SCRIPTS) >= 9 and {'app.py', 'sample.py', 'train_mask.py'} <= set(SCRIPTS)


@pytest.mark.parametrize('command', ALL)
def test_every_word_is_understood(command, tmp_path, monkeypatch):
    words = ALL[command]
    if words[0] == 'make':
        subprocess.run(['make', '--dry-run', *words[1:]], cwd=PROJECT, check=True)
        return
    script, arguments = split(words)
    assert os.path.exists(os.path.join(PROJECT, script))
    if script == 'prepare_data.py':
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(prepare_data, 'prepare_toy', os.makedirs)
        if arguments[0] != 'toy':
            with pytest.raises(UserError):   # its data is not here; a wrong word is a SystemExit
                prepare_data.main(arguments)
    elif script in SCRIPTS:
        monkeypatch.chdir(PROJECT)
        monkeypatch.setattr(sys, 'argv', [script, *arguments])
        monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
        monkeypatch.setattr(configurator, 'given', set())
        exec(settings_of(script), dict(configure=configure))


def recipe(target):
    """The commands that make would run, each as a list of words."""
    lines = subprocess.run(
        ['make', '--dry-run', '--old-file=.venv/ready', f'--makefile={PROJECT}/Makefile', target],
        capture_output=True, text=True, check=True).stdout.splitlines()
    return [shlex.split(line) for line in lines if line.startswith('.venv/bin/python')]


def test_the_commands_of_the_readme(tmp_path, monkeypatch):
    """From make demo to the last one on toy, in their order: a few clips, a few steps. What they
    say they make is there."""
    shutil.copytree(os.path.join(PROJECT, 'config'), tmp_path / 'config')
    few = ('length = 16\nmax_clips = 32\nclips = 2\nsteps = 2\nmm_batches = 0\n'
           'vq_iters = 2\nmask_iters = 2\nres_iters = 2\nlen_iters = 2\nev_steps = 2\n')
    with open(tmp_path / 'config' / 'toy.py', 'a') as f:
        f.write(TINY.replace("'tiny'", "'toy'") + few)
    monkeypatch.chdir(tmp_path)
    sizes = dict(train=40, val=32, test=32)
    monkeypatch.setattr(prepare_data, 'prepare_toy', partial(prepare_data.prepare_toy, sizes=sizes))

    readme = commands('README.md')
    assert readme[0][0] == ['make', 'demo']
    done = []
    for words, made in [(words, []) for words in recipe('demo')] + readme:
        if words[0] == 'make':
            continue
        script, arguments = split(words)
        if script == 'prepare_data.py' and arguments == ['toy'] and not done:
            prepare_data.main(arguments)
        elif ('config/toy.py' in arguments and script not in ('study.py', 'app.py')
              and words[1:] not in done):   # one is hours, the other has no end
            once = ['--repeats=1'] if script == 'eval_t2m.py' else []
            code, out, err = run_script(tmp_path, script, *arguments, *once)
            assert code == 0, f'{" ".join(words)}\n{out}{err}'
            assert all(os.path.exists(path) for path in made), words
        done.append(words[1:])
        if script == 'sample.py':            # three motions that a user has by now
            motion = sorted(glob.glob('out/toy/samples/*.npy'))[0]
            for name in ('walk.npy', 'a.npy', 'b.npy'):
                shutil.copy(motion, name)
    assert done[:6] == [words[1:] for words, _ in readme if words[1:] in done[:6]][:6]


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_shows_every_setting(script, monkeypatch, capsys):
    """With its default and its comment, from the one place where they are written."""
    monkeypatch.setattr(sys, 'argv', [script])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    doc = text_of(script).split('"""')[1]
    settings = settings_of(script)
    defaults = dict(__file__=os.path.join(PROJECT, script), __doc__=doc, configure=configure)
    exec(settings, defaults)
    keys = [key for key, value in defaults.items()
            if not key.startswith('_') and isinstance(value, (int, float, str))]

    monkeypatch.setattr(sys, 'argv', [script, '--help'])
    with pytest.raises(SystemExit, match='0'):
        exec(settings, defaults)
    beginning, shown = capsys.readouterr().out.split('Settings, to be given as --key=value:')
    assert doc in beginning
    for key in keys:
        line, = [line for line in shown.splitlines() if line.startswith(f'{key} = ')]
        assert line in settings.splitlines()
        assert eval(line.partition('=')[2]) == defaults[key]


def test_help_of_the_data_script():
    code, out, _ = run_script(PROJECT, 'prepare_data.py', '--help')
    assert code == 0 and '--src' in out and '--out' in out and 'default data/NAME' in out
