"""Figure 3's columns read off a curve, and a curve that survives a kill."""

import json

from bn_keras.runs.training_curve import TrainingCurve


def validation(step, top1, batch_size=32):
    return {"kind": "validation", "step": step, "examples": step * batch_size, "top1": top1, "top5": 90, "of": 100}


def curve_of(tmp_path, *rows):
    curve = TrainingCurve(str(tmp_path / "curve.jsonl"))
    for row in rows:
        curve.append(row)
    return curve


def test_steps_to_an_accuracy_is_the_first_evaluation_that_reaches_it(tmp_path):
    curve = curve_of(tmp_path, validation(10, 50), validation(20, 80), validation(30, 70), validation(40, 80))
    assert curve.steps_to(0.8) == 20
    assert curve.steps_to(0.81) is None
    assert curve.max_accuracy() == 0.8


def test_steps_are_of_32_images_at_any_batch_size(tmp_path):
    assert curve_of(tmp_path, validation(10, 80, batch_size=256)).steps_to(0.8) == 80


def test_a_curve_without_evaluations_has_no_maximum(tmp_path):
    assert curve_of(tmp_path).max_accuracy() is None


def test_patience_counts_the_evaluations_since_the_first_of_the_best(tmp_path):
    curve = curve_of(tmp_path, *(validation(10 * k, top1) for k, top1 in enumerate((50, 60, 55, 60, 61), 1)))
    assert [curve.stalled(2, step) for step in (10, 20, 30, 40, 50)] == [
        *[""] * 3,
        "no evaluation since step 20 was better",
        "",
    ]
    assert not curve.stalled(0, 40) and not curve.stalled(3, 40)
    assert not curve_of(tmp_path / "none").stalled(1, 40)


def test_rows_come_back_without_the_line_that_a_kill_cut_short(tmp_path):
    curve = curve_of(tmp_path, validation(10, 50))
    with open(curve.path, "a") as file:
        file.write(json.dumps(validation(20, 60))[:-5])
    assert TrainingCurve(curve.path).rows == curve.rows


def test_truncating_forgets_later_rows_also_on_disk(tmp_path):
    curve = curve_of(tmp_path, validation(10, 50), validation(20, 60), {"kind": "diverged", "step": 15})
    curve.truncate(10)
    assert TrainingCurve(curve.path).rows == [validation(10, 50)]


def test_divergence_is_found(tmp_path):
    row = {"kind": "diverged", "step": 15, "reason": "the loss is not finite"}
    assert curve_of(tmp_path, row).diverged() == row
    assert curve_of(tmp_path / "other").diverged() is None
