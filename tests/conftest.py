"""The project is a flat folder: tests import its files from the folder above, and run its scripts
with `run_script`."""
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PYTHON = [sys.executable]
TORCHRUN = [*PYTHON, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
sys.path.insert(0, PROJECT)

# Most of a short script's time are 4 seconds of imports. This server has made them, once, and has
# computed nothing: no threads, no CUDA. Each script runs in a process forked from it.
os.environ['OMP_NUM_THREADS'] = '1'
server = multiprocessing.get_context('forkserver')
server.set_forkserver_preload(['torch._dynamo', 'matplotlib.figure', 'scipy.signal', 'tqdm'])


def run_script(folder, *command, launcher=None, **env):
    """`python command[0] command[1] ...` in `folder`, a script of the project or another by its
    absolute path, with more environment variables -> exit code, stdout, stderr. launcher: PYTHON or
    TORCHRUN, to start new interpreters for it."""
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
        p.kill()   # if it still runs
        return p.exitcode, out.read(), err.read()


def become(folder, argv, env, out, err):
    """What a new interpreter does with argv, in the process that calls it."""
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
