"""The commands in README.md, RESULTS.md, SPEED.md, USAGE.md and at the top of each script belong to
this code: the README's toy commands run on a tiny set, in order, and every word of all others is
understood by its script. The README's fork works. --help shows all settings. The commands for the
tables of the papers run on HumanML3D in miniature."""
import glob
import json
import os
import re
import shlex
import shutil
import subprocess
from functools import partial

import pytest
from conftest import PROJECT, PYTHON, run_script
from rehearse_hml3d import write_source
from test_eval import write_glove, write_official
from test_train import CONFIG, TINY, write_folder

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


SCRIPTS = [script for script in sorted(glob.glob('*.py', root_dir=PROJECT)) if settings_of(script)]


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


FEW = '''
vq_iters = mask_iters = res_iters = len_iters = ev_steps = steps = 2
clips = repeats = pooled = 2
max_clips = 32
mm_batches = 0
length = 16
'''


def write_configs(folder, name):
    """A copy of config/ in which config/<name>.py has tiny networks and few steps."""
    shutil.copytree(os.path.join(PROJECT, 'config'), folder / 'config')
    with open(folder / 'config' / f'{name}.py', 'a') as f:
        f.write(TINY.replace("'tiny'", f"'{name}'") + FEW)


def test_the_commands_of_the_readme(tmp_path, monkeypatch):
    """From make demo to the last command on toy, in order, with few clips and few steps. The files
    that the README says they make must exist."""
    write_configs(tmp_path, 'toy')
    monkeypatch.chdir(tmp_path)
    sizes = dict(train=40, val=32, test=32)
    monkeypatch.setattr(prepare_data, 'prepare_toy', partial(prepare_data.prepare_toy, sizes=sizes))

    demo, readme = [words[1:] for words in recipe('demo')], commands('README.md')
    assert readme[0][0] == ['make', 'demo']
    done = []
    for words, made in [(['python', *words], []) for words in demo] + readme[1:]:
        if words[0] == 'make' or words[1:] in done:
            continue
        done.append(words[1:])
        script, arguments = split(words)
        endless = script in ('study.py', 'app.py') or '/mine' in str(words)   # or the fork's
        if arguments == ['toy']:
            prepare_data.main(arguments)
        elif 'config/toy.py' in arguments and not endless:
            once = ['--repeats=1'] if script == 'eval_t2m.py' else []
            code, out, err = run_script(tmp_path, script, *arguments, *once)
            assert code == 0, f'{" ".join(words)}\n{out}{err}'
            assert all(os.path.exists(path) for path in made), words
        for motion in glob.glob('out/toy/samples/*.npy')[:1]:   # for later commands
            for name in ('walk.npy', 'a.npy', 'b.npy'):
                shutil.copy(motion, name)
    shared = [words[1:] for words, _ in readme if words[1:] in demo]
    assert [words for words in demo if words in shared] == shared[:6]


def test_the_fork_of_the_readme(tmp_path):
    """The patch applies, has at most ten new lines, and trains."""
    patch, = re.findall(r'```diff\n(.*?)```', text_of('README.md'), re.DOTALL)
    assert len(re.findall(r'^\+(?!\+)', patch, re.MULTILINE)) <= 10
    for path in glob.glob(f'{PROJECT}/*.py'):
        shutil.copy(path, tmp_path)
    for folder in ('lib', 'config'):
        shutil.copytree(os.path.join(PROJECT, folder), tmp_path / folder)
    subprocess.run(['patch', '-p1'], cwd=tmp_path, input=patch, text=True, check=True)
    write_folder(tmp_path)
    for name, *arguments in (['train_vq.py', '--vq_iters=2'],
                             ['train_mask.py', '--mask_by=mine', '--mask_iters=5']):
        script = str(tmp_path / name)
        code, out, err = run_script(tmp_path, script, CONFIG, *arguments, launcher=PYTHON)
        assert code == 0, out + err
    assert 'step 5: val cross-entropy' in out + err
    code, _, err = run_script(tmp_path, script, CONFIG, '--mask_by=nonsense')
    assert code == 2 and 'mask_by' in err and err.count('\n') == 1


def papers_tables():
    """The commands from DynMask's Table 1 to HGM3's Table D: scripts and arguments."""
    ours = [words for words, _ in commands('USAGE.md') if 'config/hml3d.py' in words]
    first = next(i for i, words in enumerate(ours) if '--out_dir=out/dynmask' in words)
    last = max(i for i, words in enumerate(ours) if '--out_dir=out/graph' in words)
    return [split(words) for words in ours[first:last + 1]]


def test_every_table_of_the_papers(tmp_path):
    write_configs(tmp_path, 'hml3d')
    source = tmp_path / 'HumanML3D'
    write_source(source, 40)
    for name in ('train', 'val', 'test'):   # all clips, because R-precision needs 32
        (source / f'{name}.txt').write_text('\n'.join(f'{i:06d}' for i in range(40)))
    write_official(tmp_path / 'checkpoints', dim=263)
    write_glove(tmp_path / 'checkpoints' / 'glove')

    prepare = ['hml3d', '--src=HumanML3D']
    tables = papers_tables()
    assert len(tables) > 25
    for script, arguments in [('prepare_data.py', prepare),
                              ('prepare_data.py', [*prepare, '--out=data/babel']), *tables]:
        code, out, err = run_script(tmp_path, script, *arguments)
        assert code == 0, f'{script} {" ".join(arguments)}\n{out}{err}'
        for path in (word.partition('=')[2] for word in arguments if '--eval_json=' in word):
            result = json.loads((tmp_path / path).read_text())
            assert {'tokenizer', 'base tokens only', 'full'} <= set(result['rows']), path


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
