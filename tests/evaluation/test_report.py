"""An evaluation's report: accuracy, and precision, recall and F1 of every class, beside scikit-learn's."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

from bn_keras.evaluation.report import Result, class_scores, draw_confusion, report, wilson_interval
from bn_keras.markdown import table

RUN = Result(networks=("runs/mine",), crops=1, statistics="moving", top1=3, top5=4, of=4, calibration_error=0.031)


@pytest.mark.parametrize("count, of", [(0, 10), (10, 10), (1, 1), (37, 1000), (12_600, 50_000)])
def test_intervals_are_wilsons(count, of):
    expected = binomtest(count, of).proportion_ci(method="wilson")
    assert wilson_interval(count, of) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_scores_are_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    own, answers = random.integers(0, 6, 300), random.integers(1, 7, 300)  # no answer is class 0, no example class 6
    counts = [[(own == k).sum(), (answers == k).sum(), ((own == k) & (answers == k)).sum()] for k in range(7)]
    expected = metrics.precision_recall_fscore_support(own, answers, labels=range(7), zero_division=0)
    found = [(score.precision, score.recall, score.f1, score.examples) for score in class_scores(counts)]
    np.testing.assert_allclose(np.transpose(found), expected, atol=1e-12)


def test_scores_by_hand():
    # Of 4 cats 2 are found, with one dog among the answers "cat"; no bird was asked for or named.
    assert class_scores([[4, 3, 2], [0, 0, 0]]) == [(4, 2 / 3, 0.5, 4 / 7), (0, 0.0, 0.0, 0.0)]


def test_a_report_has_accuracy_and_a_row_for_every_class_and_nothing_of_the_papers():
    text = report([RUN], class_scores([[2, 1, 1], [2, 3, 2]]), ("cat", "dog"), "pets")
    assert "| mine | 1 | 75.00% | 30.06% to 95.44% | 100.00% |" in text
    assert "| cat | 2 | 100.0% | 50.0% | 66.7% |" in text and "| dog | 2 | 66.7% | 100.0% | 80.0% |" in text
    assert "| mean of all classes | 4 | 83.3% | 75.0% | 73.3% |" in text
    assert "Paper" not in text and "error |" not in text.replace("Calibration error", "")


def test_a_class_of_any_name_is_one_row_of_as_many_cells():
    header, _, *rows = table(["Class", "Images"], [["a|b\nc\u2028", "1"], ["", "2"]]).splitlines()
    assert rows == [r"| a\|b c | 1 |", "|  | 2 |"] and header == "| Class | Images |"


def test_of_many_classes_the_worst_are_listed():
    right = [100 - k for k in range(60)]
    text = report([RUN], class_scores([[100, 100, each] for each in right]), [f"c{k:02}" for k in range(60)], "many")
    listed = [line.split()[1] for line in text.splitlines() if line.startswith("| c")]
    assert listed == [f"c{k:02}" for k in range(59, 9, -1)]


def test_errors_and_intervals_are_in_the_json():
    content = dataclasses.replace(RUN, top1=80, top5=95, of=100).as_json()
    assert content["top1_error"] == 0.2 and content["top5_error"] == 0.05
    assert content["top1_error_interval"] == wilson_interval(20, 100)


def test_the_confusion_plot_has_right_answers_in_blue_and_mistakes_in_red(tmp_path):
    draw_confusion([[3, 0], [4, 0]], ["circle", "square"], "single_crop", str(tmp_path / "plot.png"))
    pixels = np.asarray(Image.open(tmp_path / "plot.png").convert("RGB")).astype(int)
    blue, red = (pixels[..., 2] > pixels[..., 0] + 60), (pixels[..., 0] > pixels[..., 2] + 60)
    assert blue.sum() > 500 and red.sum() > 500
