"""Figure 4 says what was counted, how sure that is, and plainly whether an ensemble was worth it."""

import pytest

from bn_keras.evaluation.report import Result
from bn_keras.paper.figure_4 import figure_4


def result(networks, top1, crops=144):
    return Result(
        networks=networks, crops=crops, statistics="moving", top1=top1, top5=95, of=100, calibration_error=0.031
    )


def test_rows_stand_beside_the_papers():
    rows = [result(("runs/a",), 80, crops=1), result(("runs/a",), 82), result(("runs/a", "runs/b"), 90)]
    table = figure_4(rows, "shapes")
    assert "| a | 1 | 1 | 20.00% | 13.34% to 28.88% | 5.00% | 2.15% to 11.18% | 3.10% | 25.2 | 7.82 |" in table
    assert "| a | 144 | 1 | 18.00% | 11.70% to 26.67% | 5.00% | 2.15% to 11.18% | 3.10% | 21.99 | 5.82 |" in table
    assert "| ensemble of 2 | 144 | 2 | 10.00% | 5.52% to 17.44% | 5.00% |" in table and "| 20.1 | 4.9 |" in table
    assert "shapes, 100 validation images; batch normalization by moving statistics" in table


@pytest.mark.parametrize("ensemble, outcome", [(91, "beat"), (90, "did not beat"), (89, "did not beat")])
def test_it_says_whether_the_ensemble_beat_its_best_member(ensemble, outcome):
    rows = [result(("a",), 80), result(("b",), 90), result(("c",), 99, crops=1), result(("a", "b"), ensemble)]
    table = figure_4(rows, "shapes")
    assert f"the ensemble of 2 {outcome} its best member, b: {100 - ensemble} against 10 wrong of 100." in table


def test_an_ensemble_by_one_crop_has_no_row_in_the_paper():
    assert "| - | - |" in figure_4([result(("a", "b"), 90, crops=1)], "shapes")
