"""A run that is killed five times ends like one that is not. tests/kill_all.py kills each stage 20
times."""
import pytest
from kill_all import kill_and_resume
from test_train import folder   # noqa: F401


@pytest.mark.parametrize('stage', ['mask', 'eval'])
def test_five_kills(folder, stage):   # noqa: F811
    done = kill_and_resume(folder, stage, kills=5, steps=80)
    assert len(done) == 5
    assert done == sorted(done)
