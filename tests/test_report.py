"""Tests of lib/report.py and lib/strata.py: what the evaluation scripts write and print."""
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import PROJECT, PYTHON
from test_eval import rand

from lib import report, strata
from lib.configurator import UserError
from lib.evaluator import fid


def test_results_are_written_and_shown(tmp_path, monkeypatch):
    path = tmp_path / 'eval.json'
    report.refuse_other_files(path)
    rows = {'full': {'FID': (np.float64(1.5), np.nan)}}
    report.write_results(path, rows=rows, per_repeat=[], settings={})
    assert json.loads(path.read_text())['rows'] == {'full': {'FID': [1.5, None]}}
    report.refuse_other_files(path)   # its own file may be replaced
    for name, content in (('vq.pt', b'PK\3\4'), ('notes.json', b'{"title": 1}'), ('l.json', b'[]')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            report.refuse_other_files(tmp_path / name)
    with pytest.raises(UserError, match='/dev/full'):   # reading it would never end
        report.refuse_other_files('/dev/full')

    out = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    monkeypatch.setattr(sys, 'stdout', out)
    report.say('1.5 ±0.1')
    assert out.buffer.getvalue() == b'1.5 ?0.1\n'


def test_a_closed_pipe_is_no_error(tmp_path):
    code = ('from lib.report import say\n'
            'for i in range(20_000): say("a line that nothing reads")\n'
            'import sys; print("done", file=sys.stderr)\n')
    writer = subprocess.Popen([*PYTHON, '-c', code], cwd=PROJECT, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)
    writer.stdout.readline()
    writer.stdout.close()
    assert writer.stderr.read() == 'done\n' and writer.wait() == 0


def test_strata():
    texts = ['a person walks', 'someone jumps and stands', 'a person stands'] * 10
    joints = [rand(20 + i, 22, 3, seed=i) * (1 + i) for i in range(30)]
    parts = strata.clip_strata(texts, joints)
    assert [parts[name].min() for name in ('simple', 'medium', 'complex')] == [0, 10, 20]
    assert set(parts['dynamic']) == set(range(1, 30, 3))   # also where both kinds are mentioned
    emb = {'real motion': rand(30, 4), 'full': rand(30, 4, seed=1)}
    one, two = (strata.strata_fids([(emb, parts)] * n)['full'] for n in (1, 2))
    assert one['FID complex'] == pytest.approx(fid(emb['real motion'][20:], emb['full'][20:]))
    assert two['FID complex'] != one['FID complex']


def test_errors_by_speed():
    """The error of this model is the speed: quarters and correlations show it, and masks of low
    confidence hide the fast tokens."""
    valid = torch.arange(40) < torch.tensor([40, 24])[:, None]
    speed = torch.from_numpy(rand(2, 40)).exp().float()
    batch = dict(ids=torch.zeros(2, 40, dtype=torch.long), valid=valid, speed=speed, omega=-speed,
                 velocity=speed ** 2, confidence=-speed)

    def log_probabilities(batch, masked):
        assert ((masked == 8) <= valid).all()
        return -speed[..., None].expand(2, 40, 8)

    rows = strata.error_by_speed([batch], log_probabilities, MASK=8)
    assert [*rows] == [f'{kind} {share}%' for kind in ('uniform', 'confidence')
                       for share in (30, 60, 90)]
    uniform = rows['uniform 90%']
    quarters = [uniform[name] for name in strata.QUARTERS]
    assert quarters == sorted(quarters) and quarters[0] < uniform['all'] < quarters[3]
    assert uniform['rho speed'] == pytest.approx(1) and uniform['rho omega'] == pytest.approx(-1)
    assert rows['confidence 30%']['all'] > rows['uniform 30%']['all'] + 0.1
    assert strata.hide_lowest(-speed, 0.3, valid).sum(1).tolist() == [12, 7]
    walk = np.zeros((9, 22, 3))
    walk[..., 0] = 0.05 * np.arange(9)[:, None]
    assert strata.token_speed(walk, fps=20) == pytest.approx([1, 1])
