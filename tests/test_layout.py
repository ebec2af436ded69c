"""The shape of the project: what imports what, how many files, how many settings. The presets of
the three papers fix every setting of the method: a new one must be put into one of the lists
below."""
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

from lib.configurator import SHARED, settings_lines

TOP = {path.stem: path.read_text(encoding='utf-8') for path in Path(PROJECT).glob('*.py')}
LIB = {path: path.read_text(encoding='utf-8') for path in Path(PROJECT, 'lib').glob('*.py')}


def imports(text):
    """The first parts of all modules that a file imports: {'torch', 'lib', 'msd', ...}"""
    return set(re.findall(r'^ *(?:import|from) (\w+)', text, re.MULTILINE))


def test_nothing_imports_a_script_and_lib_imports_nothing_above_it():
    scripts = {name for name, text in TOP.items()
               if 'configure(globals()' in text or "__name__ == '__main__'" in text}
    assert {'train_vq', 'train_mask', 'sample', 'eval_t2m', 'prepare_data'} <= scripts
    for path, text in LIB.items():
        assert not imports(text) & set(TOP), path
    for name, text in TOP.items():
        assert not imports(text) & scripts, name


def test_model_imports_few_files():
    code = 'import sys; import model; print(*sorted(sys.modules))'
    out = subprocess.run([sys.executable, '-c', code], cwd=PROJECT, capture_output=True, text=True,
                         check=True).stdout.split()
    own = {name for name in out if name.split('.')[0] in {*TOP, 'lib'}}
    assert own == {'model', 'msd', 'hgm3', 'lib', 'lib.fast'}


def test_sizes():
    assert len(TOP) <= 18
    settings = settings_lines(f'{PROJECT}/train_mask.py')
    assert 30 < sum(bool(re.match(r'\w+ = ', line)) for line in settings) <= 46
    assert len(TOP['train_mask'].splitlines()) <= 310
    for name, text in (TOP | LIB).items():
        assert len(text.splitlines()) <= 450, name
        assert max(map(len, text.splitlines())) <= 100, name


# ----------------------------------------------------------------------------------------- presets

# what a paper says, or what its code does where it is silent
METHOD = '''quantize_dropout vq_reset_below vq_batch vq_lr vq_warmup w_position w_commit
    w_rotation w_foot w_heading text spectral_attn mask_by rotary neighbours token_init dropout
    optimizer lr warmup grad_clip cond_drop steps cond_scale res_scale top_share temperature anneal
    res_temperature res_layers das_sampling'''.split()
# without effect unless a part of DynMask is on
DYNMASK = '''window alpha0 fusion msd_embed msd_gap omega msd_attn cfs_lambda cfs_noise
    cfs_share cfs_ramp r_exp lambda_D beta sigma_max msd_decode'''.split()
# of the data, the size, the length of training and the machine; weight decay is 0 for the tokenizer
# and 1e-5 for the transformers by default, as in MoMask's code
NOT_IN_A_PRESET = '''data out_dir vq stage init_from overwrite seed text_encoder n_codes
    code_dim n_quantizers vq_width vq_depth latent n_layers n_heads ff vq_iters mask_iters res_iters
    len_iters window_frames batch_size weight_decay vq_eval_every eval_every log_every device dtype
    compile mask_file momask_root momask_mask momask_res'''.split()
PRESETS = {name: runpy.run_path(f'{PROJECT}/config/{name}.py')
           for name in ('momask', 'hgm3', 'dynmask', 'hml3d', 'kit')}


def test_every_setting_is_in_one_list():
    paths = [f'{PROJECT}/train_vq.py', f'{PROJECT}/train_mask.py', SHARED]
    lines = [line for path in paths for line in settings_lines(path)]
    settings = {line.split(' = ')[0] for line in lines if re.match(r'\w+ = ', line)}
    assert sorted(settings) == sorted(METHOD + DYNMASK + NOT_IN_A_PRESET)


@pytest.mark.parametrize('name', PRESETS)
def test_presets_fix_the_method(name):
    assert set(METHOD) <= set(PRESETS[name])
    if name not in ('momask', 'hgm3'):
        assert set(DYNMASK) <= set(PRESETS[name])


@pytest.mark.parametrize('name, base, differing', [
    ('hgm3', 'momask', {'text', 'mask_by'}),
    ('dynmask', 'momask', {'spectral_attn', 'mask_by', 'das_sampling', 'anneal'}),
    ('hml3d', 'dynmask', {'vq_batch'})])
def test_what_sets_the_papers_apart(name, base, differing):
    ours, theirs = PRESETS[name], PRESETS[base]
    assert differing == {key for key in theirs if key[0] != '_' and ours[key] != theirs[key]}
    assert not PRESETS['momask']['spectral_attn'] and not PRESETS['momask']['das_sampling']
