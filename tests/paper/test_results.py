"""docs/results.md: mean and range over seeds, claims judged by the numbers, blanks for what was not run."""

import dataclasses
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_program, start_program
from matplotlib import pyplot

from bn_keras.markdown import mean_and_range
from bn_keras.networks.variants import VARIANTS
from bn_keras.paper.experiments import CHANGES, FIGURE_2_VARIANTS, flat, plan
from bn_keras.paper.figures_2_and_3 import Row, compared_with_reference, figure_3, rows_of, write_report
from bn_keras.paper.results import LOG, write_results
from bn_keras.runs.run_directory import RunDirectory, find_runs

CONFIG = {"dataset": "digits", "train_examples": 4000, "validation_examples": 1000, "classes": 10, "image_size": 64}
CONFIG |= {"width": 0.25, "batch_size": 32, "steps": 150}


def write_run(folder, variant, accuracies, seed=0, diverged_at=None, **config):
    """A run with an evaluation every 50 steps of 32."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({**CONFIG, "variant": variant, "seed": seed, **config}))
    rows = [
        {"kind": "validation", "step": s, "examples": s * 32, "top1": round(1000 * a), "top5": 1000, "of": 1000}
        for s, a in zip(range(50, 1000, 50), accuracies, strict=False)
    ]
    if diverged_at:
        rows.append({"kind": "diverged", "step": diverged_at, "examples": diverged_at * 32, "reason": "not finite"})
    (folder / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunDirectory(str(folder))


@pytest.fixture
def two_seeds(tmp_path):
    """Inception reaches its best, 0.8 and 0.7, at steps 150 and 100; BN-x5 passes these at 50 and 50."""
    return [
        write_run(tmp_path / "a0", "inception", (0.2, 0.6, 0.8), seed=0),
        write_run(tmp_path / "a1", "inception", (0.2, 0.7, 0.6), seed=1),
        write_run(tmp_path / "b0", "bn_x5", (0.85, 0.9, 0.9), seed=0),
        write_run(tmp_path / "b1", "bn_x5", (0.75, 0.94, 0.9), seed=1),
    ]


def test_runs_that_differ_in_the_seed_alone_are_one_row(two_seeds, tmp_path):
    other = write_run(tmp_path / "wide", "bn_x5", (0.9, 0.9, 0.9), width=0.5)
    assert [(row.variant.name, [run.seed for run in row.runs]) for row in rows_of([*two_seeds, other])] == [
        ("inception", [0, 1]),
        ("bn_x5", [0, 1]),
        ("bn_x5", [0]),
    ]


def test_seeds_that_went_on_for_longer_are_in_the_same_row_and_all_of_them_count(tmp_path):
    """As `launch/results` extends each run of Figure 2 until its curve is flat."""
    runs = tmp_path / "figure2"
    write_run(runs / "bn_x5-0", "bn_x5", (0.2, 0.6, 0.8), seed=0)
    write_run(runs / "bn_x5-1", "bn_x5", (0.4, 0.6, 0.7, 0.9), seed=1, steps=200)
    (row,) = rows_of(find_runs(str(runs)))
    assert row.max_accuracies() == [0.8, 0.9]
    assert [(at, mean) for at, mean, *_ in row.band()] == [(50, pytest.approx(0.3)), (100, 0.6), (150, 0.75)]
    page, _ = write_results(str(tmp_path), str(tmp_path / "docs"), "digits", "launch/results")
    text = Path(page).read_text()
    assert "85.0% (80.0% to 90.0%)" in text and "150 to 200 steps, seeds 0, 1" in text


def test_runs_of_one_seed_and_different_lengths_are_rows_of_their_own(tmp_path):
    runs = [write_run(tmp_path / str(steps), "bn_x5", (0.2, 0.6), steps=steps) for steps in (100, 200)]
    assert [len(row.runs) for row in rows_of(runs)] == [1, 1]


def test_the_band_is_the_mean_and_the_extremes_at_every_evaluation(two_seeds):
    mean_low_high = [(step, round(mean, 6), low, high) for step, mean, low, high in rows_of(two_seeds)[1].band()]
    assert mean_low_high == [(50, 0.8, 0.75, 0.85), (100, 0.92, 0.9, 0.94), (150, 0.9, 0.9, 0.9)]


def test_a_run_is_compared_with_inceptions_run_of_its_seed(two_seeds):
    inception, accelerated = rows_of(two_seeds)
    assert compared_with_reference(accelerated, inception) == [(50, 3.0), (50, 2.0)]
    line = figure_3([inception, accelerated]).splitlines()[3]
    assert line.startswith("| BN-x5 | 50 (50 to 50) | 2.5x (2.0x to 3.0x) | 92.0% (90.0% to 94.0%) |")


def test_a_seed_that_never_reaches_it_is_counted(two_seeds, tmp_path):
    slow = write_run(tmp_path / "s0", "bn_baseline", (0.1, 0.1, 0.1), seed=0)
    fast = write_run(tmp_path / "s1", "bn_baseline", (0.1, 0.7, 0.7), seed=1)
    assert "| BN-Baseline | 100 in 1 of 2 | 1.0x | 40.0% (10.0% to 70.0%) |" in figure_3(
        rows_of([*two_seeds, slow, fast])
    )


def test_a_row_that_was_not_run_is_blank(two_seeds):
    table = figure_3([*rows_of(two_seeds), Row("bn_x30", [])])
    assert "| BN-x30 |  |  |  | 2.7e6 | 11.5x | 74.8% |" in table


def test_runs_on_other_data_are_told_apart_and_not_compared(two_seeds, tmp_path):
    other = write_run(tmp_path / "photos", "bn_x5", (0.9, 0.9, 0.9), dataset="photos")
    table = figure_3(rows_of([*two_seeds, other]))
    assert "| BN-x5 (b0) | 50 (50 to 50) | 2.5x" in table
    assert "| BN-x5 (photos) |  |  | 90.0% |" in table


def test_one_value_has_no_range():
    assert mean_and_range([0.5], "{:.1f}".format) == "0.5"
    assert mean_and_range([], "{:.1f}".format) == ""


def test_claims_hold_or_not_by_the_numbers_of_the_runs(tmp_path):
    folder = tmp_path / "runs" / "figure2"
    write_run(folder / "inception-0", "inception", (0.2, 0.6, 0.8))
    write_run(folder / "bn_x5-0", "bn_x5", (0.9, 0.9, 0.9))
    write_run(folder / "bn_x30-0", "bn_x30", (0.9, 0.9, 0.95))
    write_run(folder / "bn_baseline-0", "bn_baseline", (0.6, 0.7, 0.7))
    write_run(folder / "inception_x5-0", "inception_x5", (0.1,), diverged_at=61)
    write_run(folder / "inception_sigmoid-0", "inception_sigmoid", (0.1, 0.12, 0.1))
    (tmp_path / "runs" / "ensemble").mkdir()
    (tmp_path / "runs" / "ensemble" / "figure4.md").write_text("| ensemble of 6 | 144 |\n")
    page, document = write_results(str(tmp_path / "runs"), str(tmp_path / "docs"), "digits", "launch/results")
    text = Path(page).read_text()
    assert "| BN-x5 matches Inception in fewer steps | 14.8x | 3.0x | holds |" in text
    assert "| BN-x5 is at least 14 times faster than Inception | 14.8x | 3.0x | does not hold |" in text
    assert "| BN-x30 starts more slowly than BN-x5 and ends higher | +1.8 points | +5.0 points | holds |" in text
    assert "| Inception at 5x the rate diverges | machine infinity | 1 of 1 runs diverged | holds |" in text
    assert "| Inception with sigmoid stays at chance | 1/1000 | 12.0% of 1/10 | holds |" in text
    assert "| ensemble of 6 | 144 |" in text
    assert "| BN-Baseline matches Inception in fewer steps | 2.3x | reached in 0 of 1 runs | does not hold |" in text
    assert "| BN-x5-Sigmoid learns, below the networks with ReLU | -3.2 points |  |  |" in text
    assert (tmp_path / "docs" / "results" / "digits" / "figure2.png").stat().st_size > 10_000
    assert text.startswith("# digits, 4,000 images, 64x64, width 0.25\n")
    assert "| BN-x5 matches Inception in fewer steps | 14.8x | 3.0x: holds |" in Path(document).read_text()


def test_the_document_has_a_column_for_every_data_set_and_blanks_for_what_was_not_run(tmp_path):
    docs = str(tmp_path / "docs")
    write_run(tmp_path / "a" / "figure2" / "inception-0", "inception", (0.2, 0.6, 0.8))
    write_run(tmp_path / "b" / "figure2" / "inception-0", "inception", (0.2, 0.6, 0.8), dataset="photos")
    write_run(tmp_path / "b" / "figure2" / "bn_x5-0", "bn_x5", (0.9, 0.9, 0.9), dataset="photos")
    write_results(str(tmp_path / "a"), docs, "digits", "launch/results")
    _, document = write_results(str(tmp_path / "b"), docs, "photos", "launch/results")
    text = Path(document).read_text()
    assert "| [digits, 4,000 images, 64x64, width 0.25](results/digits.md) | [photos, 4,000 images" in text
    assert "| BN-x5 matches Inception in fewer steps | 14.8x |  | 3.0x: holds |" in text


def test_a_run_that_is_not_over_is_blank_and_said(tmp_path, caplog):
    write_run(tmp_path / "a" / "figure2" / "inception-0", "inception", (0.2, 0.6, 0.8))
    write_run(tmp_path / "a" / "figure2" / "bn_x5-0", "bn_x5", (0.5, 0.6))
    page, _ = write_results(str(tmp_path / "a"), str(tmp_path / "docs"), "digits", "launch/results")
    assert "| BN-x5 matches Inception in fewer steps | 14.8x |  |  |" in Path(page).read_text()
    assert "bn_x5-0: at step 100 of 150, so it is left out of the results" in caplog.text


def test_figure_2_says_its_data_and_networks_whatever_names_are_in_them(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    for width in (0.25, 0.5):  # what stands between dollars is a formula to Matplotlib
        write_run(tmp_path / rf"$\frac{width}$", "inception", (0.2, 0.6, 0.8), dataset=r"$\a$", width=width)
    write_report(find_runs(str(tmp_path)), str(tmp_path / "report"))
    title = drawn[0].axes[0].get_title().replace(r"\$", "$")
    assert title == "; ".join(rf"$\a$, 4,000 images, 64x64, width {width}" for width in (0.25, 0.5))


def test_a_damaged_log_of_what_was_run_does_not_stop_the_document(tmp_path):
    entry = {"cpu": "a CPU", "cores": 2, "tensorflow": "2.21.0", "commit": "abc"}
    (tmp_path / LOG).write_text(f"{json.dumps(entry)}\n\n{{}}\n[1]\n\x00\n")
    page, _ = write_results(str(tmp_path), str(tmp_path / "docs"), "digits", "launch/results")
    assert "Runs made on a CPU, 2 cores, TensorFlow 2.21.0; at commit abc." in Path(page).read_text()


def test_a_run_goes_on_until_three_evaluations_gain_no_more_than_a_standard_error(tmp_path):
    climbing, ended, short = (
        write_run(tmp_path / str(k), "inception", accuracies).curve
        for k, accuracies in enumerate([(0.5, 0.6, 0.7, 0.8), (0.80, 0.81, 0.80, 0.81), (0.8, 0.8, 0.8)])
    )
    assert [flat(curve, 200) for curve in (climbing, ended, short)] == [False, True, False]
    run = dataclasses.replace(plan([0], 200, 50, 0, gray=False)[0], name="0", section="")
    assert run.to_do(str(tmp_path)) == range(200, 400)  # climbs still: as many steps again
    assert dataclasses.replace(run, name="1").to_do(str(tmp_path)) == range(200, 200)
    assert dataclasses.replace(run, name="2").to_do(str(tmp_path)) == range(150, 200)
    # 0.80 of 1,000 images is known to 0.0126 only: a gain of 0.012 is noise, one of 0.013 is not.
    noise, gain = (write_run(tmp_path / f"by {g}", "inception", (0.8, 0.8, 0.8, 0.8 + g)).curve for g in (0.012, 0.013))
    assert flat(noise, 200) and not flat(gain, 200)


def test_the_seven_changes_are_all_that_bn_x5_has_and_bn_baseline_lacks():
    baseline, accelerated = (dataclasses.asdict(VARIANTS[name]) for name in ("bn_baseline", "bn_x5"))
    results = {"name", "title", "steps"}
    assert {name for name in baseline if baseline[name] != accelerated[name]} - results == set(CHANGES)


def test_every_run_is_over_the_same_images_at_any_batch_size():
    runs = plan([0, 1, 2], 500, 50, 50_000, gray=True)
    assert len({(run.section, run.name) for run in runs}) == len(runs)
    assert sum(run.section == "figure2" for run in runs) == 3 * len(FIGURE_2_VARIANTS) == 21
    for run in runs:
        if run.section in ("batch_size", "figure2"):
            assert run.steps * run.flags["batch_size"] <= 500 * 32 < (run.steps + 1) * run.flags["batch_size"]


@pytest.mark.parametrize("section", ["figure1", "figure2", "changes", "divergence", "early", "batch_size"])
def test_every_run_of_the_plan_is_a_command_that_the_launchers_accept(section, tmp_path):
    by_flags = {
        tuple(sorted(run.flags)): run for run in plan([0], 500, 50, 50_000, gray=True) if run.section == section
    }
    for run in by_flags.values():
        # One flag too many ends the program after it has read those before it, and before any work.
        done = run_program("-m", f"launch.{run.program}", *run.arguments(str(tmp_path), run.steps), "--nonsense")
        assert "Unknown command line flag 'nonsense'" in done.stderr, done.stderr


def test_dry_run_prints_the_steps_and_hours_of_what_is_to_do(data_dir, tmp_path):
    steps = ("--steps=200", "--seeds=7", "--jobs=2", "--only=figure2", f"--data_dir={data_dir}", "--eval_every=50")
    done = write_run(tmp_path / "figure2" / "bn_x5-7", "bn_x5", (0.9,) * 4, seed=7)
    with open(done.curve.path, "a") as file:
        rows = [{"kind": "training", "step": 10 * k, "loss": 1.0, "wall_time": 36.0 * k} for k in range(1, 21)]
        file.writelines(json.dumps(row) + "\n" for row in rows)
    for name in set(FIGURE_2_VARIANTS) - {"bn_x5"}:  # all have been begun, so that none is measured here
        run = write_run(tmp_path / "figure2" / f"{name}-7", name, (0.1,), seed=7)
        with open(run.curve.path, "a") as file:
            file.writelines(json.dumps({**row, "step": row["step"] // 10}) + "\n" for row in rows[::10])
    found = run_program("-m", "launch.results", f"--workdir={tmp_path}", *steps, "--dry_run")
    lines = {line.split("--variant=")[1].split()[0]: line.split()[:5] for line in found.stdout.splitlines()[1:-1]}
    assert lines["bn_x5"][:4] == ["done", "200", "3.6", "0.00"]
    assert lines["inception"] == ["to", "do", "200", "36", "1.50"]  # 150 steps of 36 s
    assert found.stdout.splitlines()[-1].startswith("4.5 hours in all on this machine, 2 at once")


def test_every_training_gets_the_flags_that_are_given_for_all():
    runs = plan([0], 500, 50, 50_000, gray=True, data_dir="D", width="0.5")
    assert {tuple(run.flags.get(name) for name in ("width", "data_dir")) for run in runs} == {("0.5", "D"), (None, "D")}
    assert all(("width" in run.flags) == (run.program == "train") for run in runs)


@pytest.mark.parametrize("flag", ["--only=figure9", "--seeds=a", "--train_flags=width"])
def test_what_cannot_be_is_refused_in_one_line(flag):
    done = run_program("-m", "launch.results", flag, "--dry_run")
    assert done.returncode == 1 and flag in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to_all", [True, False], ids=["of_a_terminal", "to_it_alone"])
def test_a_signal_ends_the_run_and_the_program_in_one_line(data_dir, tmp_path, number, to_all):
    command = ["-m", "launch.results", f"--workdir={tmp_path}", f"--output_dir={tmp_path}", f"--data_dir={data_dir}"]
    command += ["--only=figure1", "--mnist_steps=1000000"]
    process = start_program(*command, start_new_session=True)
    while not list((tmp_path / "figure1").glob("checkpoint-*.npz")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    (os.killpg if to_all else os.kill)(process.pid, number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and "Traceback" not in errors
    name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[number]
    assert errors.endswith(f"mnist: interrupted by {name}; the same command continues\n")
    assert errors.count("interrupted") == 1


def test_the_program_runs_what_is_to_do_once_and_writes_the_document(data_dir, tmp_path):
    command = ["-m", "launch.results", f"--workdir={tmp_path / 'runs'}", f"--output_dir={tmp_path / 'docs'}"]
    command += [f"--data_dir={data_dir}", "--only=figure1", "--mnist_steps=300", "--seeds=0"]
    first = run_program(*command)
    assert first.returncode == 0, first.stderr
    assert "[1/1] figure1" in first.stderr
    again = run_program(*command)
    assert again.returncode == 0 and "figure1" not in again.stderr
    text = (tmp_path / "docs" / "results" / f"{data_dir.name}.md").read_text()
    assert "| Training is faster with BN |" in text and "cores, TensorFlow 2." in text
    assert len((tmp_path / "runs" / "log.jsonl").read_text().splitlines()) == 1


def test_a_listed_command_run_alone_is_found_by_the_report_and_not_listed_again(data_dir, tmp_path):
    command = ["-m", "launch.results", f"--workdir={tmp_path / 'a b'}", f"--output_dir={tmp_path / 'docs'}"]
    command += [f"--data_dir={data_dir}"]
    listing = [*command, "--only=figure1", "--mnist_steps=300", "--seeds=0", "--list"]
    (line,) = run_program(*listing).stdout.splitlines()
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert run_program(*listing).stdout == ""
    assert run_program(*command, "--only=report").returncode == 0
    assert "| Training is faster with BN |" in (tmp_path / "docs" / "results" / f"{data_dir.name}.md").read_text()
