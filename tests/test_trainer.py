"""Runs end to end by the real program on small data: exact resume, replicas, divergence, TensorBoard."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
from conftest import run_program, start_program

from bn_keras import checkpoint
from bn_keras.training_curve import TrainingCurve

STEPS = 15
TIMES = {"wall_time", "images_per_second"}


def train_command(data_dir, workdir, *flags):
    """14 images a step, so that steps and epochs (60) do not align; BN-Baseline has BN, Dropout and LRN."""
    return [
        "-m",
        "launch.train",
        "--variant=bn_baseline",
        f"--data_dir={data_dir}",
        f"--workdir={workdir}",
        "--width=0.1",
        "--image_size=32",
        "--augmentation=imagenet",
        "--batch_size=14",
        "--eval_batch_size=8",
        f"--steps={STEPS}",
        "--log_every=2",
        "--eval_every=5",
        "--checkpoint_every=3",
        *flags,
    ]


def curve_of(workdir):
    return TrainingCurve(str(workdir / "curve.jsonl"))


def reproducible(rows):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def kill_at(step, command, workdir, number=signal.SIGKILL):
    process = start_program(*command)
    deadline = time.monotonic() + 300
    while not any(row["step"] >= step for row in curve_of(workdir).rows) if workdir.exists() else True:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate()
    return process.returncode


def assert_same_run(one, other):
    (step, arrays), (other_step, other_arrays) = (checkpoint.load_newest(str(path)) for path in (one, other))
    assert step == other_step == STEPS
    assert arrays.keys() == other_arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, other_arrays[name], err_msg=name)
    assert reproducible(curve_of(one).rows) == reproducible(curve_of(other).rows)


def scalars(workdir):
    """What TensorBoard's own reader shows of a run: {tag: [(step, value)]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(workdir), size_guidance={"tensors": 0}).Reload()
    tags = [tag for tag in events.Tags()["tensors"] if events.SummaryMetadata(tag).plugin_data.plugin_name == "scalars"]
    return {tag: [(e.step, make_ndarray(e.tensor_proto).item()) for e in events.Tensors(tag)] for tag in tags}


@pytest.fixture(scope="module", params=[1, 2], ids=["one_device", "mirrored"])
def devices(request):
    return request.param


@pytest.fixture(scope="module")
def uninterrupted(data_dir, tmp_path_factory, devices):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = run_program(*train_command(data_dir, workdir, f"--devices={devices}"))
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="module")
def killed(data_dir, tmp_path_factory, devices):
    workdir = tmp_path_factory.mktemp("killed") / "run"
    command = train_command(data_dir, workdir, f"--devices={devices}")
    assert kill_at(8, command, workdir) == -signal.SIGKILL
    torn = checkpoint.load_newest(str(workdir))[0]
    assert 0 < torn < STEPS
    done = run_program(*command)
    assert done.returncode == 0, done.stderr
    return workdir


def test_a_killed_run_continued_is_bit_for_bit_the_uninterrupted_one(uninterrupted, killed):
    assert_same_run(uninterrupted, killed)


def test_tensorboard_shows_one_unbroken_curve(uninterrupted, killed):
    steps = {tag: [step for step, _ in points] for tag, points in scalars(killed).items()}
    assert steps["training/loss"] == [2, 4, 6, 8, 10, 12, 14, 15]
    assert steps["accuracy/validation"] == [5, 10, 15]
    shown, expected = scalars(killed), scalars(uninterrupted)
    for tag in expected.keys() - {"training/images_per_second"}:
        assert shown[tag] == expected[tag]


def test_a_checkpoint_holds_every_variable_that_changes(uninterrupted, devices):
    names = checkpoint.load_newest(str(uninterrupted))[1].keys()
    assert sum(name.endswith("moving_variance") for name in names) == 69
    assert sum(name.endswith("seed_generator_state") for name in names) == 1
    assert {"step", "loss_sum", "correct", "optimizer/sgd/iteration"} <= {name.lower() for name in names}


def test_the_saved_model_has_the_last_checkpoints_weights(uninterrupted):
    import keras

    import bn_keras.inception  # noqa: F401 (registers the layers)

    model = keras.models.load_model(uninterrupted / "model.keras")
    arrays = checkpoint.load_newest(str(uninterrupted))[1]
    for weight in model.weights:
        np.testing.assert_array_equal(weight.numpy(), arrays[f"model/{weight.path}"])


def test_a_finished_run_has_nothing_to_do(data_dir, uninterrupted, devices):
    before = sorted((path.name, path.stat().st_mtime_ns) for path in uninterrupted.iterdir())
    done = run_program(*train_command(data_dir, uninterrupted, f"--devices={devices}"))
    assert done.returncode == 0 and "nothing to do, all 15 steps are done" in done.stdout
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in uninterrupted.iterdir())


@pytest.mark.parametrize("flag", ["--seed=1", "--batch_size=28", "--variant=bn_x5", "--learning_rate=0.1"])
def test_another_run_in_the_same_folder_is_refused_by_name(data_dir, uninterrupted, flag):
    done = run_program(*train_command(data_dir, uninterrupted, flag))
    field = flag[2:].partition("=")[0]
    assert done.returncode == 1
    assert f"{uninterrupted} holds a run with" in done.stderr and field in done.stderr
    assert "Traceback" not in done.stderr


def test_sigterm_saves_and_exits_with_0_and_the_run_goes_on(data_dir, tmp_path, uninterrupted, devices):
    if devices == 2:
        pytest.skip("one device shows it")
    workdir = tmp_path / "run"
    command = train_command(data_dir, workdir)
    assert kill_at(2, command, workdir, signal.SIGTERM) == 0
    assert 2 <= checkpoint.load_newest(str(workdir))[0] < STEPS
    assert run_program(*command).returncode == 0
    assert_same_run(uninterrupted, workdir)


def test_a_damaged_newest_checkpoint_costs_only_the_way_from_the_one_before(data_dir, tmp_path, uninterrupted, devices):
    if devices == 2:
        pytest.skip("one device shows it")
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    os.remove(workdir / "model.keras")
    newest = workdir / f"checkpoint-{STEPS:08d}.npz"
    newest.write_bytes(newest.read_bytes()[:-1000])
    done = run_program(*train_command(data_dir, workdir))
    assert done.returncode == 0, done.stderr
    assert str(newest) in done.stderr
    assert_same_run(uninterrupted, workdir)


def test_divergence_is_recorded_and_the_last_finite_checkpoint_kept(data_dir, tmp_path):
    workdir = tmp_path / "run"
    command = train_command(data_dir, workdir, "--learning_rate=1e12", "--variant=inception", "--checkpoint_every=1")
    done = run_program(*command)
    assert done.returncode == 3 and "diverged at step" in done.stderr
    row = curve_of(workdir).diverged()
    step, arrays = checkpoint.load_newest(str(workdir))
    assert step < row["step"]
    assert all(np.isfinite(array).all() for name, array in arrays.items() if name.startswith("model/"))
    again = run_program(*command, "--on_divergence=record")
    assert again.returncode == 0 and f"diverged at step {row['step']}" in again.stdout


def test_a_second_process_in_the_same_folder_is_refused(data_dir, tmp_path):
    workdir = tmp_path / "run"
    command = train_command(data_dir, workdir, "--steps=100000")
    first = start_program(*command)
    while not (workdir / "run.json").exists():
        assert first.poll() is None
        time.sleep(0.05)
    second = run_program(*command)
    first.kill()
    first.communicate()
    assert second.returncode == 1 and "another process is training in" in second.stderr


def test_a_label_that_the_manifest_does_not_allow_is_named(data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    manifest = json.loads((copy / "dataset.json").read_text())
    manifest["class_names"].pop()
    (copy / "dataset.json").write_text(json.dumps(manifest))
    done = run_program(*train_command(copy, tmp_path / "run"))
    assert done.returncode == 1
    assert "a label is outside 1..2" in done.stderr and str(copy / "train-") in done.stderr
    assert "Traceback" not in done.stderr
