"""Training on several devices and by several processes, and how a run ends that cannot go on: by the real program."""

import json
import os
import shutil
import signal
import socket
import time

import numpy as np
import pytest
from conftest import run_on_a_full_disk, start_program
from test_trainer import STEPS, assert_same_run, curve_of, finish, run, stop_at, train_command, wait_for

from bn_keras.runs import checkpoint


def test_two_devices_killed_and_continued_end_bit_for_bit_as_uninterrupted(data_dir, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    flags = ("--devices=2", "--distort_on=device", "--population_statistics=2", "--mixup=0.2")
    finish(train_command(data_dir, one, *flags))
    command = train_command(data_dir, other, *flags)
    assert stop_at(8, command, other) == -signal.SIGKILL
    assert 0 < checkpoint.load_newest(str(other))[0] < STEPS
    finish(command)
    assert_same_run(one, other)


def as_on_gpus(command):
    """The command in a program that takes this machine's CPUs for GPUs."""
    program = (
        "from bn_keras.training import distribution; distribution.uses_gpus = bool; from launch.train import run; run()"
    )
    return ["-c", program, *command[2:]]


def test_what_makes_gpus_exact_runs_on_two_devices(data_dir, tmp_path):
    flags = ("--devices=2", "--steps=3", "--distort_on=device", "--normalization_batch=global", "--ema=0.9")
    finish(as_on_gpus(train_command(data_dir, tmp_path / "run", *flags)))
    assert curve_of(tmp_path / "run").rows[-1]["step"] == 3


def test_gpus_cannot_be_exact_with_xla(data_dir, tmp_path):
    done = run(as_on_gpus(train_command(data_dir, tmp_path / "run", "--jit_compile")))
    assert done.returncode == 1
    assert "fix: --nodeterministic" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_25_random_kills_of_two_devices_end_bit_for_bit_as_uninterrupted(data_dir, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    often = ("--devices=2", "--steps=400", "--log_every=5", "--eval_every=40", "--checkpoint_every=1")
    finish(train_command(data_dir, one, *often))
    command = train_command(data_dir, other, *often)
    draw = np.random.default_rng(0)
    for kill in range(25):
        process = start_program(*command, small=True)
        reached = curve_of(other).rows[-1]["step"] if (other / "curve.jsonl").exists() and kill else 0
        wait_for(min(reached + 5, 390), other, process)
        time.sleep(draw.uniform(0, 0.5))
        assert process.poll() is None, "the run ended before it could be killed 25 times"
        process.kill()
        process.communicate()
    finish(command)
    assert_same_run(one, other)


def worker_environments(count=2):
    """The environments of so many worker processes on this machine."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("localhost", 0))
    cluster = {"worker": [f"localhost:{each.getsockname()[1]}" for each in sockets]}
    for each in sockets:
        each.close()
    configs = [{"cluster": cluster, "task": {"type": "worker", "index": index}} for index in range(count)]
    return [{**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "TF_CONFIG": json.dumps(config)} for config in configs]


def start_workers(command, count=2):
    return [start_program(*command, small=True, env=environment) for environment in worker_environments(count)]


def finish_workers(command, count=2):
    join_workers(start_workers(command, count))


def join_workers(processes):
    results = [process.communicate(timeout=900) for process in processes]
    assert not any(process.returncode for process in processes), results


# Sigmoids, which are smooth: where rounding turns a ReLU on or off, two orders of the same sums drift apart.
SYNCHRONIZED = ("--variant=bn_x5_sigmoid", "--normalization_batch=global", "--steps=20", "--checkpoint_every=4")


@pytest.fixture(scope="module")
def two_workers(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("workers") / "run"
    finish_workers(train_command(data_dir, workdir, *SYNCHRONIZED))
    return workdir


def test_two_workers_killed_and_continued_end_bit_for_bit_as_uninterrupted(data_dir, tmp_path, two_workers):
    workdir = tmp_path / "run"
    command = train_command(data_dir, workdir, *SYNCHRONIZED)
    processes = start_workers(command)
    wait_for(8, workdir, *processes)
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()
    assert 0 < checkpoint.load_newest(str(workdir))[0] < 20
    finish_workers(command)
    assert_same_run(two_workers, workdir)


def lose_one(command, environments, workdir, step, number):
    """Runs workers of which one is killed at a step, with all that it started, and then started anew."""
    processes = [start_program(*command, "--restart_wait=600", small=True, env=each) for each in environments]
    wait_for(step, workdir, *processes)
    processes[number].kill()
    processes[number].communicate()
    processes[number] = start_program(*command, "--restart_wait=600", small=True, env=environments[number])
    join_workers(processes)


def test_a_worker_that_dies_is_waited_for_and_all_end_bit_for_bit_as_undisturbed(data_dir, tmp_path, two_workers):
    workdir = tmp_path / "run"
    lose_one(train_command(data_dir, workdir, *SYNCHRONIZED), worker_environments(), workdir, 8, 1)
    assert_same_run(two_workers, workdir)


def test_without_restart_wait_a_lost_worker_ends_the_others_with_the_status_that_says_try_again(data_dir, tmp_path):
    workdir = tmp_path / "run"
    command = train_command(data_dir, workdir, *SYNCHRONIZED, "--steps=100000")
    processes = start_workers(command)
    wait_for(4, workdir, *processes)
    processes[1].kill()
    errors = processes[0].communicate(timeout=300)[1]
    assert processes[0].returncode == 75 and "train: lost another worker (" in errors and "Traceback" not in errors


@pytest.mark.slow
def test_four_workers_of_which_one_dies_at_random_end_bit_for_bit_as_undisturbed_ten_times(data_dir, tmp_path):
    flags = ("--batch_size=16", "--normalization_batch=replica", "--steps=10", "--checkpoint_every=1", "--log_every=1")
    finish_workers(train_command(data_dir, tmp_path / "undisturbed", *flags), 4)
    draw = np.random.default_rng(0)
    for number in range(10):
        workdir = tmp_path / str(number)
        step, lost = int(draw.integers(1, 9)), int(draw.integers(4))
        lose_one(train_command(data_dir, workdir, *flags), worker_environments(4), workdir, step, lost)
        assert_same_run(tmp_path / "undisturbed", workdir)
        print(f"worker {lost} was killed after step {step}: the same bits")


def test_two_workers_with_synchronized_statistics_learn_what_one_device_learns(data_dir, tmp_path, two_workers):
    """To 1e-5 after 20 steps (seen: 2.4e-7 in the weights); what is left is the order of sums."""
    finish(train_command(data_dir, tmp_path / "run", *SYNCHRONIZED))
    (_, arrays), (_, expected) = (checkpoint.load_newest(str(path)) for path in (two_workers, tmp_path / "run"))
    for name, array in expected.items():
        np.testing.assert_allclose(arrays[name], array, rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_second_process_in_the_same_folder_is_refused(data_dir, tmp_path):
    workdir = tmp_path / "run"
    command = train_command(data_dir, workdir, "--steps=100000")
    first = start_program(*command, small=True)
    while not (workdir / "run.json").exists():
        assert first.poll() is None
        time.sleep(0.05)
    second = run(command)
    first.kill()
    first.communicate()
    assert second.returncode == 1 and "another process is training in" in second.stderr


def test_divergence_is_recorded_and_the_last_finite_checkpoint_kept(data_dir, tmp_path):
    workdir = tmp_path / "run"
    command = train_command(data_dir, workdir, "--learning_rate=1e12", "--variant=inception", "--checkpoint_every=1")
    done = run(command)
    assert done.returncode == 3 and "diverged at step" in done.stderr
    row = curve_of(workdir).diverged()
    step, arrays = checkpoint.load_newest(str(workdir))
    assert step < row["step"]
    assert all(np.isfinite(array).all() for name, array in arrays.items() if name.startswith("model/"))
    again = run([*command, "--on_divergence=record"])
    assert again.returncode == 0 and f"diverged at step {row['step']}" in again.stdout


def test_a_full_disk_stops_the_run_with_a_line_and_a_whole_checkpoint(data_dir, tmp_path):
    """A checkpoint of this width is larger than 20 kB: the write fails in its middle."""
    workdir = tmp_path / "run"
    done = run_on_a_full_disk(20_000, *train_command(data_dir, workdir))
    assert done.returncode == 1
    assert f"cannot write to {workdir} (File too large)" in done.stderr and "no checkpoint was written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(workdir.glob("*.npz*"))


def test_a_label_that_the_manifest_does_not_allow_is_named(data_dir, tmp_path):
    from bn_keras.errors import InputError
    from bn_keras.input.dataset_formats import read_dataset
    from bn_keras.input.options import InputOptions
    from bn_keras.input.pipeline import training_batches
    from bn_keras.input.records import naming_damage

    copy = shutil.copytree(data_dir, tmp_path / "copy")
    manifest = json.loads((copy / "dataset.json").read_text())
    manifest["class_names"].pop()
    (copy / "dataset.json").write_text(json.dumps(manifest))
    dataset = read_dataset(str(copy))
    with pytest.raises(InputError, match=r"a label is outside 1\.\.2") as error, naming_damage(dataset, "train"):
        list(training_batches(dataset, InputOptions(32), batch_size=14, seed=0).take(5))
    assert str(copy / "train-") in str(error.value)
