"""How far a run is, beside a clock of the test's own."""

import pytest

from bn_keras import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds, as a list of one number, that pass when the test says so."""
    seconds = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    return seconds


def test_what_is_left_of_a_resumed_run_follows_from_its_own_steps(clock, capsys):
    run = progress.Progress("run", 900)
    run.update(510)
    clock[0] += 40  # of 20 steps, so 2 s a step
    run.update(530)
    assert capsys.readouterr().err == f"run 530/900  {(900 - 530) * 2 // 60}:{(900 - 530) * 2 % 60:02} left\n"


def test_an_evaluation_before_the_first_step_of_a_resumed_run_is_shown(capsys):
    progress.Progress("run", 900).evaluated(500, 0.5)
    assert capsys.readouterr().err == "run 500/900  validation accuracy 0.500 at step 500\n"
