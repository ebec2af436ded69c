"""The commands of USAGE.md for the tables of the papers, each run once: HumanML3D in miniature, a
few steps, and an official evaluator with random weights."""
import json
import os
import shutil

import numpy as np
import torch
from conftest import PROJECT, run_script
from test_eval import write_glove
from test_readme import commands, split

from lib.evaluator import Evaluator

MINIATURE = '''
text_encoder = 'hash'
vq_width, code_dim, n_codes, n_quantizers, window_frames = 16, 16, 32, 3, 32
vq_iters, vq_batch = 2, 8
latent, n_layers, n_heads, ff, batch_size = 24, 1, 2, 32, 8
mask_iters = res_iters = len_iters = 2
repeats, mm_batches, pooled = 2, 0, 2
'''


def write_humanml3d(root):
    """40 clips of noise, in the layout that HumanML3D's own scripts produce."""
    rng = np.random.default_rng(0)
    for folder in ('new_joint_vecs', 'texts'):
        (root / folder).mkdir(parents=True)
    names = [f'{i:06d}' for i in range(40)]
    for i, name in enumerate(names):
        features = rng.standard_normal((44 + 2 * i, 263)).astype(np.float32)
        np.save(root / 'new_joint_vecs' / f'{name}.npy', features)
        words = ['a man walks#a/DET man/NOUN walk/VERB', 'a man kicks#a/DET man/NOUN kick/VERB']
        (root / 'texts' / f'{name}.txt').write_text(f'{words[i % 2]}#0.0#0.0\n')
    for split_name in ('train', 'val', 'test'):
        (root / f'{split_name}.txt').write_text('\n'.join(names))


def write_official_evaluator(root):
    sizes = dict(movement=8, code=8, motion_hidden=8, text_hidden=8, out=8)
    model = Evaluator(np.zeros(263), np.ones(263), **sizes)
    parts = {name: getattr(model, name).state_dict()
             for name in ('movement_encoder', 'text_encoder', 'motion_encoder')}
    for folder in ('t2m/text_mot_match/model', 't2m/Comp_v6_KLD005/meta', 'glove'):
        (root / folder).mkdir(parents=True)
    torch.save(parts, root / 't2m/text_mot_match/model/finest.tar')
    np.save(root / 't2m/Comp_v6_KLD005/meta/mean.npy', np.zeros(263))
    np.save(root / 't2m/Comp_v6_KLD005/meta/std.npy', np.ones(263))
    write_glove(root / 'glove')


def papers_tables():
    """The commands from DynMask's Table 1 to HGM3's Table D, as lists of words."""
    ours = [words for words, _ in commands('USAGE.md') if 'config/hml3d.py' in words]
    first = next(i for i, words in enumerate(ours) if '--out_dir=out/dynmask' in words)
    last = max(i for i, words in enumerate(ours) if '--out_dir=out/graph' in words)
    return ours[first:last + 1]


def test_every_table_of_the_papers(tmp_path):
    shutil.copytree(os.path.join(PROJECT, 'config'), tmp_path / 'config')
    with open(tmp_path / 'config' / 'hml3d.py', 'a') as f:
        f.write(MINIATURE)
    write_humanml3d(tmp_path / 'HumanML3D')
    write_official_evaluator(tmp_path / 'checkpoints')
    prepared = [['prepare_data.py', 'hml3d', '--src=HumanML3D', *out]
                for out in ([], ['--out=data/babel'])]
    tables = [split(words) for words in papers_tables()]
    assert len(tables) > 25
    for script, *arguments in prepared + [[script, *more] for script, more in tables]:
        code, out, err = run_script(tmp_path, script, *arguments)
        assert code == 0, f'{script} {" ".join(arguments)}\n{out}{err}'
        for path in (word.partition('=')[2] for word in arguments if '--eval_json=' in word):
            result = json.loads((tmp_path / path).read_text())
            assert {'tokenizer', 'base tokens only', 'full'} <= set(result['rows']), path
