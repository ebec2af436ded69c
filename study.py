"""Which settings help? Train the same network with a list of overrides and several seeds, and print
one table:

    python study.py config/toy.py --what=dynmask --seeds=2 --steps=1000
    python study.py config/toy.py --what=departures                    # one departure at a time
    python study.py config/bandai.py --what=dynmask --steps=3000

Every variant runs train_mask.py and then eval_t2m.py on the validation split, base tokens only (so
that residual layers hide nothing), with the config's own tokenizer and evaluator, which must exist.
Finished runs are not repeated. A cell is the mean over seeds ± half the range of the seeds.
"""
import json
import os
import subprocess
import sys

import numpy as np

from lib.configurator import ROOT, UserError, configure
from lib.report import say, table

# -----------------------------------------------------------------------------
data = 'toy'                 # data set; out/<data> has its tokenizer and evaluator
what = 'dynmask'             # a list of STUDIES
seeds = 2
steps = 1000                 # of the masked transformer
repeats = 2                  # of the evaluation
out_dir = ''                 # '' is out/study_<data>
configure(globals())
# -----------------------------------------------------------------------------
OFF = dict(spectral_attn=False, mask_by='random')
DYNMASK = dict(spectral_attn=True, mask_by='msd', das_sampling=True)
STUDIES = {
    # Table 4's I and II, and II alone: does the method beat its own baseline, all else equal?
    'dynmask': {
        'baseline': OFF,
        'attention': dict(spectral_attn=True, mask_by='random'),
        'CFS': dict(spectral_attn=False, mask_by='msd'),
        'both': dict(spectral_attn=True, mask_by='msd'),
    },
    # each departure from the papers, undone by itself
    'departures': {
        'ours': {},
        'sentence': dict(text='sentence'),
        'AdamW': dict(optimizer='adamw'),
        'gap zero': dict(msd_gap='zero', mask_by='random', spectral_attn=True),
        'gap interpolated': dict(msd_gap='interp', mask_by='random', spectral_attn=True),
    },
    # why the attention helps or hurts
    'attention': {
        'off': OFF,
        'alpha0 .1': dict(mask_by='random', spectral_attn=True, alpha0=0.1),
        'alpha0 .3': dict(mask_by='random', spectral_attn=True),
        'alpha0 .5': dict(mask_by='random', spectral_attn=True, alpha0=0.5),
        'W = 4': dict(mask_by='random', spectral_attn=True, window=4),
        'Eq 13': dict(mask_by='random', spectral_attn=True, fusion='zscore'),
        'own guess': dict(mask_by='random', spectral_attn=True, msd_attn='guess',
                          msd_decode='guess'),
    },
    # how a token learns about its neighbours
    'positions': {
        'added': dict(rotary=False, neighbours=0),
        'and rotary': dict(rotary=True, neighbours=0),
        'and neighbours': dict(rotary=False, neighbours=2),
        'both': dict(rotary=True, neighbours=2),
    },
    # the three papers and what each adds, on the same tokens
    'papers': {
        'MoMask': OFF | dict(text='sentence'),
        'clauses': OFF | dict(text='clauses'),
        'graph': OFF | dict(text='graph'),
        'hard mining': OFF | dict(text='sentence', mask_by='loss'),
        'HGM3': OFF | dict(text='graph', mask_by='loss'),
        'DynMask': DYNMASK | dict(text='sentence'),
        'DynMask + graph': DYNMASK | dict(text='graph'),
    },
    # how to mask by content
    'cfs': {
        'random': dict(mask_by='random'),
        'flatness': dict(mask_by='msd', omega='flatness'),
        'energy': dict(mask_by='msd', omega='energy'),
        'velocity': dict(mask_by='velocity'),
        'half': dict(mask_by='msd', cfs_share=0.5),
        'half, ramp': dict(mask_by='msd', cfs_share=0.5, cfs_ramp=1.0),
    },
}
if what not in STUDIES:
    raise UserError(f'what is {what}, expected {", ".join(STUDIES)}.')
files = [arg for arg in sys.argv[1:] if not arg.startswith('--')]
trained = os.path.join('out', data)
out_dir = out_dir or f'out/study_{data}'
for file in ('vq.pt', 'evaluator.pt'):
    if not os.path.exists(os.path.join(trained, file)):
        raise UserError(f'{trained}/{file} is missing: run train_vq.py and train_eval.py first.')


def script(name, **settings):
    """Run one of the project's scripts; its output goes to a log file."""
    arguments = [f'--{key}={value}' for key, value in settings.items()]
    with open(os.path.join(settings['out_dir'], name + '.log'), 'w') as log:
        code = subprocess.run([sys.executable, os.path.join(ROOT, name), *files, *arguments],
                              stdout=log, stderr=log).returncode
    if code:
        raise UserError(f'{name} failed, see {log.name}.')


def measure(overrides, seed, folder):
    """Train and evaluate one variant -> its figures, {name: value}."""
    result = os.path.join(folder, 'val.json')
    if not os.path.exists(result):
        os.makedirs(folder, exist_ok=True)
        overrides = dict(overrides)
        decoding = {'das_sampling': overrides.pop('das_sampling', False),
                    'msd_decode': overrides.pop('msd_decode', 'kept')}
        script('train_mask.py', out_dir=folder, vq=os.path.join(trained, 'vq.pt'), seed=seed,
               overwrite=True, mask_iters=steps, eval_every=steps, **overrides)
        script('eval_t2m.py', out_dir=folder, evaluator=os.path.join(trained, 'evaluator.pt'),
               split='val', repeats=repeats, mm_batches=0, eval_json=result, **decoding)
    with open(result, encoding='utf-8') as f:
        judged = json.load(f)
    figures = {f'CE {share}': loss for share, loss in judged['val'].items()}
    figures |= {name: cell[0] for name, cell in judged['rows']['base tokens only'].items()}
    return {name: np.nan if value is None else value for name, value in figures.items()}


names = ['CE 30%', 'CE 60%', 'CE 90%', 'R@3', 'FID', 'slide cm']
if data == 'toy':
    names += ['detectors', '1 action', '2 actions', '3 actions']
rows = []
for variant, overrides in STUDIES[what].items():
    runs = []
    for seed in range(seeds):
        slug = ''.join(c if c.isalnum() else '-' for c in variant)
        folder = os.path.join(out_dir, f'{what}_{slug}_{steps}_{seed}')
        runs.append(measure(overrides, seed, folder))
    values = [[figures.get(name, np.nan) for figures in runs] for name in names]
    rows.append([variant, *(f'{np.mean(x):.3f} ±{np.ptp(x) / 2:.3f}' for x in values)])
    say(' | '.join(rows[-1]))

text = f'\n{data}, {steps} steps, {seeds} seeds\n\n{table([what, *names], rows)}\n'
with open(os.path.join(out_dir, f'{what}_{steps}.md'), 'w', encoding='utf-8') as f:
    f.write(text)
say(text)
