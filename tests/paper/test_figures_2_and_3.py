"""Figures 2 and 3 are read off the runs' own files, and off nothing else."""

import dataclasses
import json

import pytest
from PIL import Image

from bn_keras.networks.variants import VARIANTS
from bn_keras.paper.figures_2_and_3 import Row, write_report
from bn_keras.runs.run_directory import find_runs

CONDITIONS = {
    "dataset": "shapes",
    "train_examples": 1000,
    "validation_examples": 200,
    "image_size": 64,
    "width": 0.25,
    "batch_size": 64,
    "steps": 20,
    "seed": 0,
}


def write_run(folder, variant, accuracies, diverged_at=None, **changes):
    """A run of 64 images a step, evaluated every 10 steps, which are 20 of the paper's."""
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"variant": variant, **CONDITIONS, **changes}))
    rows = [
        {"kind": "validation", "step": 10 * k, "examples": 640 * k, "top1": round(200 * a), "top5": 200, "of": 200}
        for k, a in enumerate(accuracies, 1)
    ]
    if diverged_at:
        rows.append(
            {"kind": "diverged", "step": diverged_at, "examples": 64 * diverged_at, "reason": "the loss is nan"}
        )
    (folder / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def table(tmp_path):
    """{first cell: the other cells} of Figure 3 for three runs, and the text after it."""
    write_run(tmp_path / "a", "bn_x5", [0.5, 0.82, 0.9])
    write_run(tmp_path / "b", "inception", [0.3, 0.5, 0.7, 0.8, 0.75])
    write_run(tmp_path / "c", "inception_x5", [0.3], diverged_at=13)
    figure, path = write_report(find_runs(str(tmp_path)), str(tmp_path / "report"))
    assert Image.open(figure).size[0] > 1000
    with open(path, encoding="utf-8") as file:
        lines, _, caption = file.read().partition("\n\n")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()]
    return {row[0]: row[1:] for row in cells}, caption


def test_steps_are_of_32_images_to_inceptions_best(table):
    rows, _ = table
    assert rows["Model"][0] == "Steps to 80.0%"
    assert rows["Inception"][:3] == ["80", "1.0x", "80.0%"]
    assert rows["BN-x5"][:3] == ["40", "2.0x", "90.0%"]


def test_the_papers_columns_stand_beside_ours(table):
    rows, _ = table
    assert rows["Inception"][3:] == ["31.0e6", "1.0x", "72.2%"]
    assert rows["BN-x5"][3:] == ["2.1e6", "14.8x", "73.0%"]


def test_a_run_that_diverged_says_where_and_never_reached_anything(table):
    rows, _ = table
    assert rows["Inception at 5x the rate (diverged at step 13)"][:3] == ["-", "", "30.0%"]


def test_the_caption_states_what_was_measured(table):
    _, caption = table
    for part in ("shapes", "1,000 training", "200 validation", "64x64", "width 0.25", "batch 64", "seed 0"):
        assert part in caption


def test_without_inception_there_is_no_accuracy_to_reach(tmp_path):
    write_run(tmp_path / "a", "bn_x5", [0.5], classes=1000)
    with open(write_report(find_runs(str(tmp_path)), str(tmp_path))[1], encoding="utf-8") as file:
        text = file.read()
    assert "| BN-x5 |  |  | 50.0% |" in text and "No finished run of inception" in text


def test_ones_own_classes_stand_beside_nothing_of_the_papers(tmp_path):
    write_run(tmp_path / "a", "bn_x5", [0.5, 0.9, 0.8])
    with open(write_report(find_runs(str(tmp_path)), str(tmp_path))[1], encoding="utf-8") as file:
        text = file.read()
    assert "| BN-x5 | 90.0% | 20 | 80.0% |" in text and "shapes (1,000 training, 200 validation images)" in text
    assert "Paper" not in text and "Inception" not in text


@pytest.mark.parametrize("change", [{"learning_rate": 0.015}, {"decay_epochs": 8.5}, {"dropout": 0.1}])
def test_a_network_that_was_trained_otherwise_claims_no_number_of_the_paper(tmp_path, change):
    write_run(tmp_path / "a", "bn_x5", [0.5], classes=1000, **change)
    with open(write_report(find_runs(str(tmp_path)), str(tmp_path))[1], encoding="utf-8") as file:
        assert "| BN-x5 |  |  | 50.0% | - |  | - |" in file.read()


def test_a_row_made_from_another_claims_no_number_of_the_paper(monkeypatch):
    row = dataclasses.replace(VARIANTS["bn_x5"], name="bn_x10", learning_rate=0.015)
    monkeypatch.setitem(VARIANTS, row.name, row)
    assert Row("bn_x5", []).published == (2.1e6, 0.730)
    assert Row("bn_x10", []).published is None
