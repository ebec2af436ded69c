"""The presets of the three papers fix every setting of the method. A new setting must be put into
one of the lists below, or this fails."""
import os
import re
import runpy

import pytest
from conftest import PROJECT

from lib.configurator import SHARED, settings_lines

# what a paper says, or what its code does where it is silent
METHOD = set('''quantize_dropout vq_reset_below vq_batch vq_lr vq_warmup w_position w_commit
    w_rotation w_foot w_heading text spectral_attn mask_by rotary neighbours token_init dropout
    optimizer lr warmup grad_clip cond_drop steps cond_scale res_scale top_share temperature anneal
    res_temperature res_layers das_sampling'''.split())
# without effect unless a part of DynMask is on
DYNMASK = set('''window alpha0 fusion msd_embed msd_gap omega msd_attn cfs_lambda cfs_noise
    cfs_share cfs_ramp r_exp lambda_D beta sigma_max msd_decode'''.split())
# of the data, the size, the length of training and the machine; weight decay is 0 for the tokenizer
# and 1e-5 for the transformers by default, as in MoMask's code
NOT_IN_A_PRESET = set('''data out_dir vq stage init_from overwrite seed text_encoder n_codes
    code_dim n_quantizers vq_width vq_depth latent n_layers n_heads ff vq_iters mask_iters res_iters
    len_iters window_frames batch_size weight_decay vq_eval_every eval_every log_every device dtype
    compile mask_file momask_root momask_mask momask_res'''.split())


def preset(name):
    found = runpy.run_path(os.path.join(PROJECT, 'config', f'{name}.py'))
    return {key: value for key, value in found.items() if not key.startswith('_')}


def settings():
    paths = [os.path.join(PROJECT, script) for script in ('train_vq.py', 'train_mask.py')]
    lines = [line for path in (*paths, SHARED) for line in settings_lines(path)]
    return {line.split(' = ')[0] for line in lines if re.match(r'\w+ = ', line)}


def test_every_setting_is_in_one_list():
    lists = (METHOD, DYNMASK, NOT_IN_A_PRESET)
    assert settings() == set().union(*lists)
    assert sum(map(len, lists)) == len(settings())


@pytest.mark.parametrize('name', ['momask', 'hgm3', 'dynmask', 'hml3d', 'kit'])
def test_presets_fix_the_method(name):
    fixed = set(preset(name))
    assert METHOD <= fixed
    if name not in ('momask', 'hgm3'):
        assert DYNMASK <= fixed


def test_what_sets_the_papers_apart():
    momask, hgm3, dynmask = map(preset, ('momask', 'hgm3', 'dynmask'))
    differing = {key for key in momask if hgm3[key] != momask[key]}
    assert differing == {'text', 'mask_by'}
    differing = {key for key in momask if dynmask[key] != momask[key]}
    assert differing == {'spectral_attn', 'mask_by', 'das_sampling', 'anneal'}
    assert not momask['spectral_attn'] and not momask['das_sampling']
    hml3d = preset('hml3d')
    assert {key for key in dynmask if hml3d[key] != dynmask[key]} == {'vq_batch'}
