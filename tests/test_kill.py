"""A run that is killed five times ends like one that is not. tests/kill_all.py kills each stage 20
times."""
from kill_all import kill_and_resume
from test_train import folder   # noqa: F401


def test_five_kills_of_the_masked_stage(folder):   # noqa: F811
    done = kill_and_resume(folder, 'mask', kills=5, steps=80)
    assert len(done) == 5
    assert done == sorted(done)
