"""Runs end to end by the real program on small data: exact resume, replicas, divergence, TensorBoard."""

import json
import re
import shutil
import signal
import time

import numpy as np
import pytest
from conftest import run_plan, run_program, start_program

from bn_keras.runs import checkpoint
from bn_keras.runs.run_directory import RunDirectory
from bn_keras.runs.training_curve import MEASURED, TrainingCurve
from bn_keras.training.trainer import Profiler

STEPS = 15


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
        "--eval_every=8",
        "--checkpoint_every=3",
        *flags,
    ]


SMALL = (
    "import sys; sys.path.append('tests'); import warm_start; warm_start.shrink(); from launch.train import run; run()"
)
EVERYTHING = ("--ema=0.9", "--population_statistics=2", "--monitor=conv2_3x3:1", "--monitor_every=5", "--clip_norm=1")


def curve_of(workdir):
    return TrainingCurve(str(workdir / "curve.jsonl"))


def reproducible(rows):
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def wait_for(step, workdir, *processes):
    """Until the curve has a row of that step; 300 s of looking, in which the time of a stopped machine is left out."""
    for _ in range(30_000):
        if workdir.exists() and any(row["step"] >= step for row in curve_of(workdir).rows):
            return
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


def stop_at(step, command, workdir, number=signal.SIGKILL):
    process = start_program(*command, small=True)
    wait_for(step, workdir, process)
    process.send_signal(number)
    process.communicate()
    return process.returncode


def run(command):
    return run_program(*command, small=True)


def finish(command):
    done = run(command)
    assert done.returncode == 0, done.stderr
    return done


def assert_same_run(one, other):
    assert_same_state(one, other)
    assert curve_of(one).rows[-1]["step"] == checkpoint.load_newest(str(one))[0]
    assert reproducible(curve_of(one).rows) == reproducible(curve_of(other).rows)


def assert_same_state(one, other):
    assert {path.name for path in one.glob("*.npz")} == {path.name for path in other.glob("*.npz")}
    assert RunDirectory(str(one)).model_step() == RunDirectory(str(other)).model_step()
    (step, arrays), (other_step, other_arrays) = (checkpoint.load_newest(str(path)) for path in (one, other))
    assert step == other_step
    assert arrays.keys() == other_arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, other_arrays[name], err_msg=name)


def scalars(workdir):
    """What TensorBoard's own reader shows of a run: {tag: [(step, value)]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(workdir), size_guidance={"tensors": 0}).Reload()
    tags = [tag for tag in events.Tags()["tensors"] if events.SummaryMetadata(tag).plugin_data.plugin_name == "scalars"]
    return {tag: [(e.step, make_ndarray(e.tensor_proto).item()) for e in events.Tensors(tag)] for tag in tags}


@pytest.fixture(scope="module")
def uninterrupted(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    finish(train_command(data_dir, workdir, *EVERYTHING))
    return workdir


@pytest.fixture(scope="module")
def battered(data_dir, tmp_path_factory):
    """A run that was preempted, killed, and lost its newest checkpoint to a bad sector; and what was said then."""
    workdir = tmp_path_factory.mktemp("battered") / "run"
    command = train_command(data_dir, workdir, *EVERYTHING)
    assert stop_at(2, command, workdir, signal.SIGTERM) == 0
    saved = checkpoint.load_newest(str(workdir))[0]
    assert 2 <= saved < STEPS
    assert stop_at(max(saved + 1, 7), command, workdir) == -signal.SIGKILL
    damaged = workdir / f"checkpoint-{checkpoint.load_newest(str(workdir))[0]:08d}.npz"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert checkpoint.load_newest(str(workdir))[0] > 0
    done = run_program("-c", SMALL, *command[2:])  # in a process of its own, with another hash seed
    assert done.returncode == 0, done.stderr
    return workdir, damaged, done.stderr


def test_a_killed_preempted_and_damaged_run_ends_bit_for_bit_as_the_uninterrupted_one(uninterrupted, battered):
    assert_same_run(uninterrupted, battered[0])


def test_a_damaged_checkpoint_is_named(battered):
    _, damaged, stderr = battered
    assert f"checkpoint {damaged} is damaged" in stderr


def test_tensorboard_shows_one_unbroken_curve(uninterrupted, battered):
    shown, expected = scalars(battered[0]), scalars(uninterrupted)
    steps = {tag: [step for step, _ in points] for tag, points in shown.items()}
    assert steps["loss/training"] == [2, 4, 6, 8, 10, 12, 14, 15]
    for tag in ("accuracy/validation", "accuracy/validation_ema", "accuracy/validation_population"):
        assert steps[tag] == [8, 15]
    assert steps["conv2_3x3:1/input_50"] == steps["conv2_3x3:1/gamma_85"] == [5, 10, 15]
    assert {"speed/share_waiting_for_input", "speed/step_seconds_p99", "memory/peak_host_bytes"} <= shown.keys()
    for tag in expected:
        if not tag.startswith(("speed/", "memory/")):
            assert shown[tag] == expected[tag], tag


def test_a_checkpoint_holds_every_variable_that_changes(uninterrupted):
    names = checkpoint.load_newest(str(uninterrupted))[1].keys()
    for kind, count in (("moving_variance", 3 * 3), ("seed_generator_state", 1)):
        assert sum(name.endswith(kind) for name in names) == count
    weights, statistics = 4 + 2 * 3 + 2, 2 * 3
    for kind, count in (("velocity", weights), ("average", weights + statistics), ("previous", statistics)):
        assert sum(name.startswith(f"optimizer/{kind}/") for name in names) == count
    assert {"step", "examples", "row_examples", "loss_sum", "correct"} <= names


def test_the_best_and_the_last_two_checkpoints_are_kept(uninterrupted):
    rows = [row for row in curve_of(uninterrupted).rows if row["kind"] == "validation"]
    best = max(rows, key=lambda row: row["top1"])["step"]
    kept = sorted(path.name for path in uninterrupted.glob("*.npz"))
    assert kept == [f"best-{best:08d}.npz", "checkpoint-00000012.npz", "checkpoint-00000015.npz"]


def test_evaluating_averages_and_population_statistics_does_not_disturb_training(data_dir, tmp_path, uninterrupted):
    finish(train_command(data_dir, tmp_path / "run", "--clip_norm=1"))
    arrays, plain = (checkpoint.load_newest(str(path))[1] for path in (uninterrupted, tmp_path / "run"))
    for name, array in plain.items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)


def test_the_saved_model_has_the_last_checkpoints_weights(uninterrupted):
    import keras

    import bn_keras.layers  # noqa: F401 (registers them)

    model = keras.models.load_model(uninterrupted / "model.keras")
    arrays = checkpoint.load_newest(str(uninterrupted))[1]
    for weight in model.weights:
        np.testing.assert_array_equal(weight.numpy(), arrays[f"model/{weight.path}"])


def test_a_finished_run_has_nothing_to_do(data_dir, uninterrupted):
    before = sorted((path.name, path.stat().st_mtime_ns) for path in uninterrupted.iterdir())
    done = finish(train_command(data_dir, uninterrupted, *EVERYTHING))
    assert "nothing to do, all 15 steps are done" in done.stdout
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in uninterrupted.iterdir())


def test_a_run_that_its_patience_ended_has_nothing_to_do_and_says_how_to_go_on(data_dir, tmp_path, uninterrupted):
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    rows = [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]
    worst = [row | {"top1": 0} if row["kind"] == "validation" and row["step"] == 15 else row for row in rows]
    (run / "curve.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in worst))
    done = finish(train_command(data_dir, run, *EVERYTHING, "--steps=30", "--patience=1"))
    ended = r"it ended at step 15, as no evaluation since step \d+ was better \(--patience=0 goes on\), in "
    assert re.search(f"nothing to do, {ended}", done.stdout)


def contents(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.mark.parametrize("flag", ["--seed=1", "--batch_size=28", "--variant=bn_x5", "--learning_rate=0.1"])
def test_another_run_in_the_same_folder_is_refused_by_name(data_dir, uninterrupted, flag):
    done = run(train_command(data_dir, uninterrupted, *EVERYTHING, flag))
    field = flag[2:].partition("=")[0]
    assert done.returncode == 1
    assert f"{uninterrupted} holds a run with" in done.stderr and f"--allow_change={field}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--width=0.2", "--allow_change=width"], "width 0.1 (now 0.2): give another --workdir\n"),
        (["--width=nan"], "--width=nan: must be 0 or from"),
        (["--learning_rate=2e38", "--batch_size=60", "--steps=20"], "is infinite in 32 bits"),
        (["--monitor=conv9", "--steps=20"], "conv9"),
        (["--steps=20", "--ema=0", "--dropout=0.4", "--allow_change=width"], "ema 0.9 (now 0.0)"),
    ],
)
def test_a_start_that_is_refused_leaves_every_byte(data_dir, uninterrupted, flags, reason):
    before = contents(uninterrupted)
    done = run(train_command(data_dir, uninterrupted, *EVERYTHING, *flags))
    assert contents(uninterrupted) == before
    assert done.returncode in (1, 2) and reason in done.stderr and "Traceback" not in done.stderr


def test_section_4_1_does_not_start_in_another_run(data_dir, uninterrupted):
    before = contents(uninterrupted)
    done = run_program("-m", "launch.mnist", f"--data_dir={data_dir}", f"--workdir={uninterrupted}", warm=True)
    assert contents(uninterrupted) == before
    assert done.returncode == 1 and "but no mnist.json" in done.stderr and done.stderr.count("\n") == 1


def test_a_refused_first_start_makes_no_folder(data_dir, tmp_path):
    done = run(train_command(data_dir, tmp_path / "run", "--monitor=conv9"))
    assert done.returncode == 1 and "conv9" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_change_that_is_allowed_goes_on_from_the_examples_seen(data_dir, tmp_path, uninterrupted):
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    flags = (*EVERYTHING[:1], "--batch_size=20", "--clip_norm=1", "--steps=17", "--allow_change=batch_size")
    finish(train_command(data_dir, workdir, *flags))
    assert [row["examples"] for row in curve_of(workdir).rows][-1] == 15 * 14 + 2 * 20
    assert json.loads((workdir / "run.json").read_text())["batch_size"] == 20


KILLED_EVERYWHERE = """
import os, shutil, sys
from bn_keras.runs.training_curve import TrainingCurve
from launch import train
workdir, copies = sys.argv[1:3]
del sys.argv[1:3]
def then_copied(write):
    def wrapped(*arguments):
        write(*arguments)
        if workdir in str(getattr(arguments[0], "path", arguments[0])):
            shutil.copytree(workdir, f"{copies}/{len(os.listdir(copies)):02}")
    return wrapped
for owner, name in ((os, "replace"), (os, "remove"), (TrainingCurve, "append")):
    setattr(owner, name, then_copied(getattr(owner, name)))
train.run()
"""
"""Trains, and after every write leaves a copy of the folder: what a kill at that moment leaves."""

CONTINUED = """
import keras, sys
from absl import flags
from launch import train
for workdir in sys.argv[1].split(","):
    keras.utils.clear_session()  # so that variables have the names that they have in a process of their own
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["train", *sys.argv[2:], f"--workdir={workdir}"])
    assert not train.main()
"""
"""Trains in several folders, one after another."""


@pytest.fixture(scope="module")
def extended(data_dir, uninterrupted, tmp_path_factory):
    """The run of 15 steps after 18, and what a kill after each write on the way would have left, in order."""
    folder = tmp_path_factory.mktemp("extended")
    workdir, copies = shutil.copytree(uninterrupted, folder / "run"), folder / "copies"
    copies.mkdir()
    command = train_command(data_dir, workdir, *EVERYTHING, "--steps=18")
    finish(["-c", KILLED_EVERYWHERE, workdir, copies, *command[2:]])
    return workdir, sorted(copies.iterdir())


def test_a_lost_curve_changes_neither_the_rows_that_follow_nor_the_best(data_dir, tmp_path, uninterrupted, extended):
    """Step 16's row is of one step, as the checkpoint of step 15 knows; from the last row left it would be of more."""
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    lines = (workdir / "curve.jsonl").read_text().splitlines(keepends=True)
    (workdir / "curve.jsonl").write_text("".join([*lines[:3], "garbage\n"]))
    done = finish(train_command(data_dir, workdir, *EVERYTHING, "--steps=18"))
    assert done.stderr.count("curve.jsonl: line 4 is no row of a curve") == 1
    rows = reproducible(curve_of(extended[0]).rows)
    seen_again = [row for row in rows if row["step"] == 15 and row["kind"] == "monitor"]  # due, and not there
    later = [row for row in rows if row["step"] > 15]
    assert reproducible(curve_of(workdir).rows) == [*rows[:3], *seen_again, *later]
    assert_same_state(workdir, extended[0])


@pytest.mark.parametrize(
    "chosen", [slice(-8, None, 3), *(pytest.param(slice(k, None, 4), marks=pytest.mark.slow) for k in range(4))]
)
def test_an_extended_run_killed_between_any_two_writes_goes_on_bit_for_bit(data_dir, tmp_path, extended, chosen):
    workdir, copies = extended
    assert len(copies) > 12 and RunDirectory(str(workdir)).model_step() == 18
    killed = [shutil.copytree(copy, tmp_path / copy.name) for copy in copies[chosen]]
    command = train_command(data_dir, "", *EVERYTHING, "--steps=18")
    finish(["-c", CONTINUED, ",".join(map(str, killed)), *command[2:]])
    for copy in killed:
        assert_same_run(workdir, copy)


def test_a_row_over_two_batch_sizes_is_over_the_examples_counted(data_dir, tmp_path):
    """Interrupted between two rows, with answers that were all right so far, and continued with a smaller batch."""
    flags = ("--log_every=1000", "--eval_every=2")
    assert stop_at(2, train_command(data_dir, tmp_path, *flags), tmp_path, signal.SIGTERM) == 0
    step, arrays = checkpoint.load_newest(str(tmp_path))
    seen, right = 14 * step, arrays["correct"]
    assert step < STEPS and 0 <= right <= seen and arrays["row_examples"] == seen
    checkpoint.save(str(tmp_path), step, arrays | {"correct": np.int64(seen)})
    finish(train_command(data_dir, tmp_path, *flags, "--batch_size=6", "--allow_change=batch_size"))
    (row,) = (row for row in curve_of(tmp_path).rows if row["kind"] == "training")
    new = 6 * (STEPS - step)
    assert row["examples"] == seen + new
    assert seen <= round(row["accuracy"] * row["examples"], 6) <= row["examples"]


def test_images_a_second_are_those_of_all_steps_of_a_row(uninterrupted):
    rows = [row for row in curve_of(uninterrupted).rows if row["kind"] == "training"]
    assert len(rows) == 8
    for row in rows[:-1]:  # of two steps, whose median is their mean
        assert row["images_per_second"] == pytest.approx(14 / row["step_seconds_p50"])


@pytest.mark.parametrize("steps", ["2:2", "3:9"], ids=["one step", "a run that ends inside the range"])
def test_the_profiler_leaves_a_trace(data_dir, tmp_path, steps):
    finish(train_command(data_dir, tmp_path, "--steps=3", f"--profile={steps}"))
    assert [path.stat().st_size > 1000 for path in tmp_path.glob("plugins/profile/*/*.xplane.pb")] == [True]


@pytest.mark.parametrize("steps", ["16:20", "0:3", "3:2", "3"])
def test_a_range_that_cannot_be_profiled_is_refused_before_anything_is_written(data_dir, tmp_path, steps):
    done = run(train_command(data_dir, tmp_path / "run", f"--profile={steps}"))
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and f"--profile={steps}" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_profiler_whose_steps_were_not_taken_says_so(tmp_path, caplog):
    """As in a run that goes on behind them, or diverges before them."""
    profiler = Profiler(str(tmp_path), range(5, 8))
    profiler.at(20)
    profiler.close()
    assert caplog.messages == ["the profiler recorded nothing: none of the steps 5 to 7 was taken"]


OPENED = """
import collections, json, os, sys
opened = collections.Counter()
sys.addaudithook(lambda event, args: event == "open" and args[1] == "r" and opened.update([str(args[0])]))
from bn_keras.training import run_writer
from launch import train
def started(self, *arguments, **options):
    print("opened", json.dumps({name: count for name, count in opened.items() if name.endswith(".npz")}))
    sys.exit()
run_writer.RunRecord.__init__ = started
train.run()
"""
"""Starts to train, says how often each checkpoint was opened until rows can be written, and ends."""


def test_a_start_reads_the_newest_checkpoint_once(data_dir, tmp_path, uninterrupted):
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    command = train_command(data_dir, workdir, *EVERYTHING, "--steps=16")
    done = finish(["-c", OPENED, *command[2:]])
    (opened,) = (line for line in done.stdout.splitlines() if line.startswith("opened "))
    assert json.loads(opened.removeprefix("opened ")) == {str(workdir / "checkpoint-00000015.npz"): 1}


def test_a_finished_run_of_a_small_set_is_extended_on_its_own_schedule(data_dir, tmp_path):
    finish(train_command(data_dir, tmp_path, "--steps=2"))
    before = json.loads((tmp_path / "run.json").read_text())
    for steps in (4000, 4001):  # 933 epochs, for which the default would be 8.3, not 8
        done = run_plan(*train_command(data_dir, tmp_path, f"--steps={steps}")[2:])
        assert done.returncode == 0 and "falls below 1%" in done.stdout, done.stderr
        assert "goes on with the schedule that it began with, --decay_epochs=8: " in done.stdout
    assert json.loads((tmp_path / "run.json").read_text()) == before
