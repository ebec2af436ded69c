"""Where do the models err? Token cross-entropy by quarter of joint speed, from the results of
`eval_t2m.py --dynamics=True`, one curve per file -> assets/error_by_speed.png:

    python assets/error_by_speed.py baseline=a.json DynMask=b.json
"""
import json
import os
import sys

from matplotlib.figure import Figure

QUARTERS = ('slowest quarter', 'second', 'third', 'fastest quarter')
results = {}
for argument in sys.argv[1:]:
    name, _, path = argument.partition('=')
    with open(path, encoding='utf-8') as f:
        results[name] = json.load(f)['tokens']

figure = Figure(figsize=(9, 3.6), dpi=110, layout='constrained')
for axes, masks in zip(figure.subplots(1, 2, sharey=True), ('uniform', 'confidence')):
    for (name, tokens), line in zip(results.items(), ('-', '--', ':', '-.')):
        for share, colour in (('30%', 'C0'), ('60%', 'C1'), ('90%', 'C3')):
            errors = [tokens[f'{masks} {share}'][quarter] for quarter in QUARTERS]
            axes.plot(QUARTERS, errors, line, color=colour, label=f'{name}, {share} masked')
    axes.set_title({'uniform': 'masks at random',
                    'confidence': 'masks where the baseline is unsure'}[masks])
    axes.tick_params('x', labelrotation=20)
    axes.grid(alpha=0.3)
figure.axes[0].set_ylabel('cross-entropy of masked tokens')
figure.axes[0].legend(fontsize=8, ncols=len(results), loc='upper left')
figure.savefig(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'error_by_speed.png'))
