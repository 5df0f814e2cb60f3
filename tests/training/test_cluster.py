"""Programs on machines that TF_CONFIG or SLURM names: who waits, for whom, how long, and who does not."""

import json
import os
import signal
import socket
import time

import pytest
from conftest import run_program, start_program
from test_evaluate import COUNTS, final_counts

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("localhost", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def named(index, ports):
    """The environment of one of two processes."""
    cluster = {"worker": [f"localhost:{port}" for port in ports]}
    task = {"type": "worker", "index": index}
    return {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "TF_CONFIG": json.dumps({"cluster": cluster, "task": task})}


SLURM = {
    "SLURM_PROCID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "node[7-8]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}


def train(data_dir, workdir, *flags):
    return [
        "-m", "launch.train", "--variant=bn_x5", f"--data_dir={data_dir}", f"--workdir={workdir}", "--width=0.1",
        "--image_size=32", "--steps=100000", "--batch_size=16", "--eval_batch_size=16", *flags,
    ]  # fmt: skip


@pytest.mark.parametrize("index", [0, 1])
def test_training_names_the_peers_that_it_waits_for_and_gives_up_after_peer_timeout(data_dir, tmp_path, index):
    ports = free_ports(2)
    absent = f"localhost:{ports[1 - index]}"
    started = time.monotonic()
    done = run_program(
        *train(data_dir, tmp_path / "run", "--peer_timeout=8"), small=True, env=named(index, ports), timeout=120
    )
    assert time.monotonic() - started > 8
    assert done.returncode == 1
    waiting, end = [line for line in done.stderr.splitlines() if "localhost" in line]
    assert waiting == f"waiting for {absent} (Connection refused)"
    assert end.startswith(f"train: gave up after 8 s (--peer_timeout) without {absent} (Connection refused): ")
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


@SIGNALS
@pytest.mark.parametrize("index", [0, 1])
def test_a_signal_ends_the_wait_for_peers(data_dir, tmp_path, index, number):
    process = start_program(*train(data_dir, tmp_path / "run"), small=True, env=named(index, free_ports(2)))
    line = process.stderr.readline()
    while "waiting for" not in line:
        assert line, process.communicate()
        line = process.stderr.readline()
    process.send_signal(number)
    errors = process.communicate(timeout=20)[1]
    assert process.returncode == 128 + number
    assert errors.startswith("train: interrupted by ") and "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def test_a_peer_that_answers_and_never_joins_is_named(data_dir, tmp_path):
    with socket.socket() as stranger:
        stranger.bind(("localhost", 0))
        stranger.listen()
        ports = [*free_ports(1), stranger.getsockname()[1]]
        done = run_program(
            *train(data_dir, tmp_path / "run", "--peer_timeout=8"), small=True, env=named(0, ports), timeout=120
        )
    assert done.returncode == 1
    assert f"waiting for localhost:{ports[1]} (answers, has not joined)" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_port_that_another_program_holds_is_one_line(data_dir, tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        ports = [other.getsockname()[1], *free_ports(1)]
        done = run_program(
            *train(data_dir, tmp_path / "run", "--peer_timeout=60"), small=True, env=named(0, ports), timeout=120
        )
    assert done.returncode == 75  # another try may find the port free
    assert "train: the cluster did not come together (" in done.stderr and "Traceback" not in done.stderr


def test_a_dry_run_plans_for_the_cluster_and_needs_nobody_else(data_dir, tmp_path):
    for environment in (named(1, free_ports(2)), {**os.environ, **SLURM}):
        command = train(data_dir, tmp_path / "run", "--dry_run")
        done = run_program(*command, small=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "batch 16 = 2 x 8" in done.stdout
        assert "measured on this process's 8 images of a step, without the exchange" in done.stdout
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "environment", [named(0, free_ports(2)), named(1, free_ports(2)), SLURM], ids=["first", "second", "slurm"]
)
def test_evaluation_in_a_cluster_is_of_this_machine_alone_and_counts_each_image_once(
    data_dir, trained_runs, tmp_path, environment
):
    command = ["-m", "launch.evaluate", f"--data_dir={data_dir}", f"--workdir={trained_runs[0]}"]
    done = run_program(*command, f"--output_dir={tmp_path}", small=True, env={**os.environ, **environment}, timeout=120)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert tuple(result[name] for name in COUNTS) == final_counts(trained_runs[0])


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "{image}", "--workdir={run}"],
        ["export", "--workdir={run}", "--output={out}", "--data_dir={data}", "--statistics=population"],
        ["show_input", "--data_dir={data}", "--output={out}.png"],
        ["benchmark_input", "--data_dir={data}", "--seconds=0.1"],
        ["mnist", "--data_dir={data}", "--workdir={out}", "--steps=2"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_other_programs_work_alone_in_a_cluster(image_folders, data_dir, trained_runs, tmp_path, arguments):
    places = {"run": trained_runs[0], "out": tmp_path / "out", "data": data_dir}
    places["image"] = next(image_folders.glob("train/circle/*.png"))
    name, *flags = [argument.format(**places) for argument in arguments]
    for environment in (named(0, free_ports(2)), {**os.environ, "TF_CONFIG": "[]", "SLURM_STEP_NUM_TASKS": "x"}):
        done = run_program("-m", f"launch.{name}", *flags, small=True, env=environment, timeout=200)
        assert done.returncode == 0, done.stderr
        if name == "export":
            break  # its output is there now


def test_killing_the_process_that_was_started_ends_training_too(data_dir, tmp_path):
    process = start_program(*train(data_dir, tmp_path / "run"), small=True, env=named(0, free_ports(2)))
    while "waiting for" not in (line := process.stderr.readline()):
        assert line
    process.kill()
    process.communicate(timeout=20)  # until nobody holds its streams
    assert process.returncode == -signal.SIGKILL
