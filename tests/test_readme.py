"""The commands in README.md, RESULTS.md, SPEED.md, USAGE.md and at the top of each script belong to
this code: the README's toy commands run on a tiny set, in order, and every word of all others is
understood by its script. The README's fork works. --help shows all settings."""
import glob
import os
import re
import shlex
import shutil
import subprocess
from functools import partial

import pytest
from conftest import PROJECT, PYTHON, run_script
from test_train import TINY, write_data

import prepare_data
from lib.configurator import SHARED, UserError, configure, settings_lines

PAGES = ('README.md', 'RESULTS.md', 'SPEED.md', 'USAGE.md')
COMMAND = re.compile(r'^ *((?:python|torchrun|make|\$\w) .*|\w="python .*")$', re.MULTILINE)
INLINE = re.compile(r'`((?:python|torchrun) [^`]*)`')


def text_of(path):
    with open(os.path.join(PROJECT, path), encoding='utf-8') as f:
        return f.read()


def settings_of(script):
    """The settings of a script as a program, [] where it has none."""
    lines = settings_lines(os.path.join(PROJECT, script))
    if lines and 'shared=True' in text_of(script):
        lines = settings_lines(SHARED) + lines
    return [line for line in lines if re.match(r'\w+ = ', line)]


SCRIPTS = [os.path.basename(path) for path in sorted(glob.glob(os.path.join(PROJECT, '*.py')))
           if settings_of(path)]


def commands(path):
    """The command lines of a page or a docstring -> [(words, files that it says it makes)]."""
    text = text_of(path)
    if path.endswith('.py'):
        text = text.split('"""')[1]
    text = re.sub(r' *\\\n *', ' ', text)
    variables = {}
    found = []
    for line in COMMAND.findall(text) + INLINE.findall(text):
        line = re.sub(r'\$(\w)', lambda match: variables.get(match[1], match[0]), line)
        words = shlex.split(re.split('   +', line)[0], comments=True)   # a comment begins there
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
    elif script in SCRIPTS and '--mask_by=mine' not in arguments:   # the fork's
        monkeypatch.chdir(PROJECT)
        settings = {'__file__': os.path.join(PROJECT, script)}
        exec('\n'.join(settings_of(script)), settings)
        configure(settings, arguments, shared='shared=True' in text_of(script))


def recipe(target):
    """The commands that make would run, each as a list of words."""
    lines = subprocess.run(
        ['make', '--dry-run', '--old-file=.venv/ready', f'--makefile={PROJECT}/Makefile', target],
        capture_output=True, text=True, check=True).stdout.splitlines()
    return [shlex.split(line) for line in lines if line.startswith('.venv/bin/python')]


def test_the_commands_of_the_readme(tmp_path, monkeypatch):
    """From make demo to the last command on toy, in order, with few clips and few steps. The files
    that the README says they make must exist."""
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
        left_out = (script in ('study.py', 'app.py') or 'out/mine' in str(words)   # hours, endless,
                    or words[1:] in done)                                         # the fork's, done
        if script == 'prepare_data.py' and arguments == ['toy'] and not done:
            prepare_data.main(arguments)
        elif 'config/toy.py' in arguments and not left_out:
            once = ['--repeats=1'] if script == 'eval_t2m.py' else []
            code, out, err = run_script(tmp_path, script, *arguments, *once)
            assert code == 0, f'{" ".join(words)}\n{out}{err}'
            assert all(os.path.exists(path) for path in made), words
        done.append(words[1:])
        for motion in sorted(glob.glob('out/toy/samples/*.npy'))[:1]:   # for later commands
            for name in ('walk.npy', 'a.npy', 'b.npy'):
                shutil.copy(motion, name)
    demo = [words[1:] for words in recipe('demo')]
    shared = [words[1:] for words, _ in readme if words[1:] in demo]
    assert [words for words in demo if words in shared] == shared[:6]


def test_the_fork_of_the_readme(tmp_path):
    """The patch applies, has at most ten new lines, and trains."""
    patch, = re.findall(r'```diff\n(.*?)```', text_of('README.md'), re.DOTALL)
    assert len(re.findall(r'^\+(?!\+)', patch, re.MULTILINE)) <= 10
    for path in glob.glob(os.path.join(PROJECT, '*.py')):
        shutil.copy(path, tmp_path)
    for folder in ('lib', 'config'):
        shutil.copytree(os.path.join(PROJECT, folder), tmp_path / folder)
    subprocess.run(['patch', '-p1'], cwd=tmp_path, input=patch, text=True, check=True)
    (tmp_path / 'config' / 'tiny.py').write_text(TINY)
    write_data(str(tmp_path / 'data' / 'tiny'))
    for name, *arguments in (['train_vq.py', '--vq_iters=2'],
                             ['train_mask.py', '--mask_by=mine', '--mask_iters=5']):
        script = str(tmp_path / name)
        code, out, err = run_script(tmp_path, script, 'config/tiny.py', *arguments,
                                    launcher=PYTHON)
        assert code == 0, out + err
    assert 'step 5: val cross-entropy' in out + err
    code, _, err = run_script(tmp_path, script, 'config/tiny.py', '--mask_by=nonsense')
    assert code == 2 and 'mask_by' in err and err.count('\n') == 1


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_shows_every_setting(script):
    """With its default and its comment, as in the source."""
    code, shown, _ = run_script(PROJECT, script, '--help')
    assert code == 0
    assert text_of(script).split('"""')[1].strip() in shown
    assert set(settings_of(script)) <= set(shown.splitlines())


def test_help_of_the_data_script():
    code, out, _ = run_script(PROJECT, 'prepare_data.py', '--help')
    assert code == 0 and '--src' in out and '--out' in out and 'default data/NAME' in out
