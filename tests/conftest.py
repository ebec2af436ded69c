"""Tests import the project's files from the folder above, and run its scripts with `run_script`."""
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings

import pytest

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PYTHON = [sys.executable]
TORCHRUN = [*PYTHON, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
sys.path.insert(0, PROJECT)

# A short script spends most of its time, four seconds, on imports. This server has imported the
# slow modules once and has computed nothing (no threads, no CUDA). Scripts run in forks of it.
os.environ['OMP_NUM_THREADS'] = '1'
server = multiprocessing.get_context('forkserver')
server.set_forkserver_preload(['torch._dynamo', 'matplotlib.figure', 'scipy.signal', 'tqdm',
                               'pytest'])


def in_shared(*parts):
    """A place in ../shared, and a decorator that skips a test where that is missing."""
    path = os.path.join(PROJECT, '..', 'shared', *parts)
    reason = f'{"/".join(("../shared", *parts))} is not here'
    return path, pytest.mark.skipif(not os.path.exists(path), reason=reason)


def sentence(work, *words):
    """work() must end in a UserError of one line that contains all the words."""
    from lib.configurator import UserError   # the forks above have to import it themselves
    with pytest.raises(UserError) as error:
        work()
    said = str(error.value)
    assert '\n' not in said
    assert len(said) < 1500
    for word in words:
        assert str(word) in said, said


def run_script(folder, *command, launcher=None, **env):
    """Run `python command[0] command[1] ...` in `folder` with additional environment variables ->
    exit code, stdout, stderr. command[0] is a script of the project or an absolute path. launcher:
    PYTHON or TORCHRUN, to start new interpreters for it."""
    script = os.path.join(PROJECT, command[0])
    argv = [script, *command[1:]]
    if launcher:
        env = {**os.environ, 'PYTHONWARNINGS': 'ignore', **env}
        p = subprocess.run([*launcher, *argv], cwd=folder, env=env, capture_output=True, text=True,
                           timeout=300)
        return p.returncode, p.stdout, p.stderr

    with tempfile.NamedTemporaryFile('r') as out, tempfile.NamedTemporaryFile('r') as err:
        p = server.Process(target=become, args=(folder, argv, env, out.name, err.name))
        p.start()
        p.join(300)
        p.kill()   # if it is still running
        return p.exitcode, out.read(), err.read()


def heed_ctrl_c():
    """For preexec_fn: a shell starts what runs in its background with Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def become(folder, argv, env, out, err):
    """Do in this process what a new interpreter does with argv."""
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    os.environ.update(env)
    os.chdir(folder)
    warnings.simplefilter('ignore')
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name='__main__')
    except Exception as e:
        sys.excepthook(type(e), e, e.__traceback__)
        sys.exit(1)
