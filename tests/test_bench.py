"""bench.py runs at the smallest size and writes every table."""
import json

from conftest import run_script


def test_bench(tmp_path):
    code, out, err = run_script(tmp_path, 'bench.py', '--batch=1', '--frames=16', '--rounds=1',
                                '--prompts_at_once=1', f'--bench_json={tmp_path}/bench.json')
    assert code == 0, out + err
    tables = json.loads((tmp_path / 'bench.json').read_text())
    assert tables.pop('machine')['name']
    masked, residual, tokenizer, generation = tables.values()
    for table in (masked, residual, tokenizer, generation):
        assert table['plain'] > 0 and table['ours'] > 0
    assert {'ours, DynMask', 'ours, Muon'} < set(masked)
    assert 'ours, DynMask' in generation
