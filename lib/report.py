"""Results of the evaluation scripts: a JSON file first, then tables on the terminal, so that a
terminal that cannot show them loses nothing."""
import contextlib
import json
import os
import sys

from lib.configurator import UserError
from lib.runtime import atomic_write, must_be_writable


def say(text):
    """Print text, with characters that the terminal cannot show replaced. If the reader of a pipe
    has gone (`| head`), stay silent from then on."""
    encoding = sys.stdout.encoding or 'ascii'
    try:
        print(text.encode(encoding, 'replace').decode(encoding), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def table(header, rows):
    """header, a list of str, and rows, a list of lists of str -> a Markdown table with aligned
    columns."""
    widths = [max(3, *(len(row[i]) for row in [header, *rows])) for i in range(len(header))]
    lines = []
    for name, *cells in [header, ['-' * width for width in widths], *rows]:
        aligned = [f'{cell:>{width}}' for cell, width in zip(cells, widths[1:])]
        lines.append(' | '.join([f'| {name:{widths[0]}}', *aligned]) + ' |')
    return '\n'.join(lines)


def refuse_other_files(path):
    """UserError unless results can be written to path: if a file is there, it must be one of
    `write_results`, never a checkpoint or notes."""
    must_be_writable(path)
    if not os.path.exists(path):
        return
    is_result = False
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if os.path.isfile(path):   # a device may have no end
            with open(path, encoding='utf-8') as f:
                is_result = {'rows', 'per_repeat', 'settings'} <= json.load(f).keys()
    if not is_result:
        raise UserError(f'{path} is there already and holds no results of eval_t2m.py: give '
                        'another --eval_json.')


def write_results(path, **results):
    """Write the results as JSON. NaN becomes null, which every JSON parser understands."""
    text = json.dumps(results, default=lambda number: number.item())   # of NumPy
    with atomic_write(path, 'w') as f:
        json.dump(json.loads(text, parse_constant=lambda _: None), f, indent=1)
