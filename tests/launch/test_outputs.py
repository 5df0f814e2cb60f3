"""What evaluate, export, report and import write is there as a whole or not at all, and a killed one starts again."""

import json
import shutil
import time

import numpy as np
import pytest
from conftest import run_on_a_full_disk, run_program, start_program
from PIL import Image

from bn_keras.evaluation.report import draw_confusion

EXPORT = {"saved_model": "model", "keras": "model.keras"}


def export(run, output, kind):
    return ["-m", "launch.export", f"--workdir={run}", f"--output={output}", f"--format={kind}"]


@pytest.mark.parametrize("kind", EXPORT)
def test_an_export_killed_while_it_writes_succeeds_by_the_same_command(trained_runs, tmp_path, kind):
    output = tmp_path / EXPORT[kind]
    process = start_program(*export(trained_runs[0], output, kind), warm=True)
    while not list(tmp_path.glob(f".{output.name}.unfinished/*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert not output.exists()
    done = run_program(*export(trained_runs[0], output, kind), warm=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


@pytest.mark.parametrize("kind", EXPORT)
def test_an_export_to_a_full_disk_is_one_line_and_leaves_nothing(trained_runs, tmp_path, kind):
    done = run_on_a_full_disk(8192, *export(trained_runs[0], tmp_path / EXPORT[kind], kind))
    assert done.returncode == 1
    assert done.stderr.startswith("export: ") and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())


def test_somebody_elses_folder_is_not_exported_to(trained_runs, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/thesis.tex").write_text("years of work")
    done = run_program(*export(trained_runs[0], tmp_path / "model", "saved_model"), warm=True)
    assert done.returncode == 1 and "exists" in done.stderr
    assert (tmp_path / "model/thesis.tex").read_text() == "years of work"


def test_an_evaluation_on_a_full_disk_is_one_line_and_leaves_the_last_one(data_dir, trained_runs, tmp_path):
    (tmp_path / "evaluation.json").write_text("the last one")
    command = ["-m", "launch.evaluate", f"--data_dir={data_dir}", f"--workdir={trained_runs[0]}"]
    done = run_on_a_full_disk(8192, *command, f"--output_dir={tmp_path}")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("evaluate: [Errno 27] File too large")
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]
    assert (tmp_path / "evaluation.json").read_text() == "the last one"


def test_a_report_on_a_full_disk_is_one_line_and_leaves_the_last_one(trained_runs, tmp_path):
    (tmp_path / "figure2.png").write_text("the last one")
    command = ["-m", "launch.report", f"--workdir={trained_runs[0]}", f"--output_dir={tmp_path}"]
    done = run_on_a_full_disk(8192, *command)
    assert done.returncode == 1 and done.stderr == "report: [Errno 27] File too large\n"
    assert [path.name for path in tmp_path.iterdir()] == ["figure2.png"]


def test_class_names_of_any_kind_are_drawn(tmp_path, recwarn):
    names = ["$x_", r"\frac{", "two\nlines", "\x1b[31m", "猫", "\u202e", "a|b"]
    draw_confusion(np.eye(len(names), dtype=int), names, "$_{", str(tmp_path / "confusion.png"))
    assert Image.open(tmp_path / "confusion.png").size[0] > 100
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_a_report_on_a_run_in_a_folder_of_any_name_is_written(trained_runs, tmp_path):
    for name in ("$x_", "\x1b[31m\u202e", "\udcff"):
        shutil.copytree(trained_runs[0], tmp_path / name, ignore=shutil.ignore_patterns("*.npz", "*.keras"))
        config = json.loads((tmp_path / name / "run.json").read_text())
        config["seed"] = 1 + len(name)
        config["width"] = 0.5 + len(name)
        (tmp_path / name / "run.json").write_text(json.dumps(config))
    done = run_program("-m", "launch.report", f"--workdir={tmp_path}", warm=True, text=False)
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert b"\x1b" not in done.stdout and rb"(\x1b[31m\u202e)" in done.stdout
    assert (tmp_path / "figure2.png").stat().st_size and (tmp_path / "figure3.md").stat().st_size
