"""Which settings help? Train the same network with a list of overrides and several seeds, and print
one table:

    python study.py config/toy.py config/momask.py --what=table4       # on the published recipe
    python study.py config/bandai.py --what=table4 --dynamics=True --repeats=6

Every variant runs train_mask.py and then eval_t2m.py on the validation split, base tokens only (so
that residual layers hide nothing), with the data set's own tokenizer and evaluator, which must
exist. Variants that differ only in decoding share a network. Finished runs are not repeated. A cell
is the mean over seeds ± half the range of the seeds.
"""
import lib.configurator   # first, to catch Ctrl-C during the imports
import json
import os
import runpy
import subprocess
import sys

import numpy as np

from lib.configurator import ROOT, SHARED, UserError, configure
from lib.report import say, table

# -----------------------------------------------------------------------------
data = 'toy'                 # data set; out/<data> has its tokenizer and evaluator
what = 'dynmask'             # a list of STUDIES
seeds = 2
steps = 1000                 # of the masked transformer
repeats = 2                  # of the evaluation
dynamics = False             # also FID by complexity, 6 repeats pooled, and error where bodies move
out_dir = ''                 # '' is out/study_<names of the config files>
configure(globals())
# -----------------------------------------------------------------------------
# A variant: settings of train_mask.py and of config/decoding.py
OFF = dict(spectral_attn=False, mask_by='random', das_sampling=False, msd_decode='kept',
           temperature=1.0)
ATTENTION = OFF | dict(spectral_attn=True)
CFS = OFF | dict(mask_by='msd')
BOTH = CFS | dict(spectral_attn=True)
BASE = OFF | dict(window=4)
# the paper's three parts, in the form that helps most at this size (LOG.md)
I = dict(spectral_attn=True, alpha0=0.1, msd_attn='clean', msd_decode='guess')
II = dict(mask_by='msd', cfs_lambda=0.0, cfs_share=0.5, cfs_ramp=1.0)
III = dict(das_sampling=True, msd_decode='guess', temperature=0.8)
STUDIES = {
    'dynmask': {'baseline': OFF, 'attention': ATTENTION, 'CFS': CFS, 'both': BOTH},
    'table3': {'none': BASE} | {signal: BASE | II | dict(mask_by=signal)
                                for signal in ('velocity', 'loss', 'msd', 'msd+loss')},
    'table4': {'baseline': BASE, 'I': BASE | I, 'II': BASE | II, 'III': BASE | III,
               'I, II': BASE | I | II, 'I, III': BASE | I | III, 'II, III': BASE | II | III,
               'I, II, III': BASE | I | II | III},
    # each departure from the papers, undone by itself
    'departures': {'ours': OFF, 'sentence': OFF | dict(text='sentence'),
                   'AdamW': OFF | dict(optimizer='adamw'),
                   'gap zero': ATTENTION | dict(msd_gap='zero'),
                   'gap interpolated': ATTENTION | dict(msd_gap='interp')},
    # the three papers and what each adds, on the same tokens
    'papers': {'MoMask': OFF | dict(text='sentence'), 'clauses': OFF | dict(text='clauses'),
               'graph': OFF | dict(text='graph'),
               'hard mining': OFF | dict(text='sentence', mask_by='loss'),
               'HGM3': OFF | dict(text='graph', mask_by='loss'),
               'DynMask': BOTH | dict(das_sampling=True, text='sentence'),
               'DynMask + graph': BOTH | dict(das_sampling=True, text='graph')},
    'attention': {'off': OFF, 'alpha0 .1': ATTENTION | dict(alpha0=0.1), 'alpha0 .3': ATTENTION,
                  'alpha0 .5': ATTENTION | dict(alpha0=0.5), 'W = 8': ATTENTION | dict(window=8),
                  'Eq 13': ATTENTION | dict(fusion='zscore'),
                  'own guess': ATTENTION | dict(msd_attn='guess', msd_decode='guess')},
    'cfs': {'random': OFF, 'energy': CFS | dict(omega='energy'),
            'flatness': CFS | dict(omega='flatness'), 'half': CFS | dict(cfs_share=0.5),
            'half, ramp': CFS | dict(cfs_share=0.5, cfs_ramp=1.0)},
}
if what not in STUDIES:
    raise UserError(f'what is {what}, expected {", ".join(STUDIES)}.')
files = [arg for arg in sys.argv[1:] if not arg.startswith('--')]
stems = [os.path.splitext(os.path.basename(file))[0] for file in files]
out_dir = out_dir or 'out/study_' + '_'.join(stems or [data])
trained = os.path.join('out', data)
for file in ('vq.pt', 'evaluator.pt'):
    if not os.path.exists(os.path.join(trained, file)):
        raise UserError(f'{trained}/{file} is missing: run train_vq.py and train_eval.py first.')
DECODING = runpy.run_path(SHARED).keys()


def script(name, **settings):
    """Run one of the project's scripts; its output goes to a log file."""
    arguments = [f'--{key}={value}' for key, value in settings.items()]
    with open(os.path.join(settings['out_dir'], name + '.log'), 'w') as log:
        code = subprocess.run([sys.executable, os.path.join(ROOT, name), *files, *arguments],
                              stdout=log, stderr=log).returncode
    if code:
        raise UserError(f'{name} failed, see {log.name}.')


def file_name(settings):
    return '_'.join(f'{key}={value}' for key, value in sorted(settings.items()))


def network(variant, seed):
    """Train the network of a variant, unless it is there -> its folder."""
    training = {key: value for key, value in variant.items() if key not in DECODING}
    folder = os.path.join(out_dir, f'{file_name(training)}_{steps}_{seed}')
    if not os.path.exists(os.path.join(folder, 'mask.pt')):
        os.makedirs(folder, exist_ok=True)
        script('train_mask.py', out_dir=folder, vq=os.path.join(trained, 'vq.pt'), seed=seed,
               overwrite=True, mask_iters=steps, eval_every=steps, **training)
    return folder


def measure(variant, seed):
    """Train and evaluate one variant -> its figures, {name: value}."""
    folder = network(variant, seed)
    decoding = {key: value for key, value in variant.items() if key in DECODING}
    result = os.path.join(folder, f'val_{file_name(decoding)}_{repeats}_{dynamics}.json')
    if not os.path.exists(result):
        if dynamics:   # all variants are compared at masks of the first one's confidence
            first = next(iter(STUDIES[what].values()))
            judge = os.path.join(network(first, seed), 'mask.pt')
            decoding |= dict(dynamics=True, pooled=6, confidence_of=judge)
        script('eval_t2m.py', out_dir=folder, evaluator=os.path.join(trained, 'evaluator.pt'),
               split='val', repeats=repeats, mm_batches=0, eval_json=result, **decoding)
    with open(result, encoding='utf-8') as f:
        judged = json.load(f)
    figures = {f'CE {share}': loss for share, loss in judged['val'].items()}
    figures |= {name: cell[0] for name, cell in judged['rows']['base tokens only'].items()}
    if dynamics:
        hard = judged['tokens']['confidence 90%']
        figures |= {'CE hard': hard['all'], 'CE hard, fast': hard['fastest quarter']}
        figures |= {name: cell[0] for name, cell in judged['pooled']['base tokens only'].items()}
    return {name: np.nan if value is None else value for name, value in figures.items()}


columns = ['CE 30%', 'CE 60%', 'CE 90%', 'R@3', 'FID', 'slide cm']
if dynamics:
    columns += ['FID simple', 'FID medium', 'FID complex', 'CE hard', 'CE hard, fast']
if data == 'toy':
    columns += ['detectors', '1 action', '2 actions', '3 actions']
rows = []
for name, variant in STUDIES[what].items():
    runs = [measure(variant, seed) for seed in range(seeds)]
    values = [[figures.get(column, np.nan) for figures in runs] for column in columns]
    half_range = ' ±{:.3f}' if seeds > 1 else ''
    rows.append([name, *(f'{np.mean(x):.3f}' + half_range.format(np.ptp(x) / 2) for x in values)])
    say(' | '.join(rows[-1]))

text = f'\n{data}, {steps} steps, {seeds} seeds\n\n{table([what, *columns], rows)}\n'
with open(os.path.join(out_dir, f'{what}_{steps}.md'), 'w', encoding='utf-8') as f:
    f.write(text)
say(text)
