"""The shape of the project: what imports what, how many files, how many settings."""
import ast
import glob
import os
import re
import subprocess
import sys

from conftest import PROJECT

from lib.configurator import settings_lines

TOP = {os.path.basename(path)[:-3]: path for path in glob.glob(os.path.join(PROJECT, '*.py'))}
LIB = glob.glob(os.path.join(PROJECT, 'lib', '*.py'))


def imports(path):
    """The first parts of all modules that a file imports: {'torch', 'lib', 'msd', ...}"""
    with open(path, encoding='utf-8') as f:
        tree = ast.parse(f.read())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split('.')[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module.split('.')[0])
    return found


def is_script(path):
    with open(path, encoding='utf-8') as f:
        return bool(settings_lines(path)) or "__name__ == '__main__'" in f.read()


def test_nothing_imports_a_script_and_lib_imports_nothing_above_it():
    scripts = {name for name, path in TOP.items() if is_script(path)}
    assert {'train_vq', 'train_mask', 'sample', 'eval_t2m', 'prepare_data'} <= scripts
    for path in LIB:
        assert not imports(path) & set(TOP), path
    for path in TOP.values():
        assert not imports(path) & scripts, path


def test_model_imports_few_files():
    code = 'import sys; import model; print(*sorted(sys.modules))'
    out = subprocess.run([sys.executable, '-c', code], cwd=PROJECT, capture_output=True, text=True,
                         check=True).stdout.split()
    own = {name for name in out if name.split('.')[0] in TOP or name.split('.')[0] == 'lib'}
    assert own == {'model', 'msd', 'hgm3', 'lib', 'lib.fast'}


def test_sizes():
    assert len(TOP) <= 18
    lines = settings_lines(TOP['train_mask'])
    assert sum(bool(re.match(r'\w+ = ', line)) for line in lines) <= 46
    with open(TOP['train_mask'], encoding='utf-8') as f:
        assert len(f.readlines()) <= 310
    for path in (*TOP.values(), *LIB):
        with open(path, encoding='utf-8') as f:
            text = f.read().splitlines()
        assert len(text) <= 450, path
        assert max(map(len, text)) <= 100, path
