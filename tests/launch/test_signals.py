"""SIGINT and SIGTERM end every program in every phase: its status, one line, and nothing half-written."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, start_program

from bn_keras.runs import checkpoint

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
NAME = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
BOTH = pytest.mark.parametrize("number", STATUS, ids=NAME.values())


def until(true, process, seconds=120):
    """Waits for a phase of a program."""
    deadline = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the phase was not seen"
        time.sleep(0.005)


def loads(process, library):
    """Whether a program has begun to load a library."""
    return lambda: library in Path(f"/proc/{process.pid}/maps").read_text()


def ended(process, number):
    """Sends a signal and returns (exit status, what stands on stderr), within 20 seconds."""
    process.send_signal(number)
    try:
        errors = process.communicate(timeout=20)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, errors


def train(data_dir, workdir, *flags):
    return [
        "-m", "launch.train", "--variant=bn_x5", f"--data_dir={data_dir}", f"--workdir={workdir}", "--width=0.1",
        "--image_size=32", "--steps=100000", "--batch_size=16", "--eval_batch_size=16", *flags,
    ]  # fmt: skip


PROGRAMS = {
    "train": lambda data, run, out: train(data, out),
    "evaluate": lambda data, run, out: ["-m", "launch.evaluate", f"--data_dir={data}", f"--workdir={run}"],
    "export": lambda data, run, out: ["-m", "launch.export", f"--workdir={run}", f"--output={out}"],
    "predict": lambda data, run, out: ["-m", "launch.predict", ROOT / "setup.py", f"--workdir={run}"],
    "mnist": lambda data, run, out: ["-m", "launch.mnist", f"--data_dir={data}", f"--workdir={out}"],
    "benchmark_input": lambda data, run, out: ["-m", "launch.benchmark_input", f"--data_dir={data}"],
    "data_service": lambda data, run, out: ["-m", "launch.data_service", "--port=0"],
}


@BOTH
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_loads_tensorflow_ends_at_once(data_dir, trained_runs, tmp_path, name, number):
    process = start_program(*PROGRAMS[name](data_dir, trained_runs[0], tmp_path / "out"))
    until(loads(process, "libtensorflow"), process)
    status, errors = ended(process, number)
    assert status == STATUS[number]
    assert errors.startswith(f"{name}: interrupted by {NAME[number]}") and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


@BOTH
def test_training_ends_at_once_until_there_is_something_to_save_and_then_saves(data_dir, tmp_path, number):
    workdir = tmp_path / "run"
    process = start_program(*train(data_dir, workdir, "--jit_compile", "--log_every=1"), small=True)
    until(lambda: (workdir / "run.json").exists(), process)  # compiling is next
    status, errors = ended(process, number)
    assert status == STATUS[number] and errors.startswith(f"train: interrupted by {NAME[number]}")
    assert not list(workdir.glob("*.npz"))
    workdir = tmp_path / "second"
    process = start_program(*train(data_dir, workdir, "--log_every=1"), small=True)
    until(lambda: (workdir / "curve.jsonl").exists() and (workdir / "curve.jsonl").stat().st_size > 0, process)
    status, errors = ended(process, number)
    assert status == {signal.SIGINT: 130, signal.SIGTERM: 0}[number]
    step = checkpoint.load_newest(str(workdir))[0]
    assert errors.endswith(f"bn_x5: interrupted at step {step}; the same command continues\n")
    assert errors.count("interrupted") == 1 and "Traceback" not in errors


DEAF = """
import ctypes, signal, sys
from data_prep import signals
signals.install("deaf: interrupted by {}")
signals.watch()
if "loop" in sys.argv:
    signal.signal(signal.SIGTERM, lambda number, frame: None)
print("ready", flush=True)
ctypes.CDLL(None).sleep(60)
"""


@BOTH
def test_a_call_into_c_does_not_keep_a_signal_waiting(number):
    process = start_program("-c", DEAF)
    assert process.stdout.readline() == "ready\n"
    assert ended(process, number) == (STATUS[number], f"deaf: interrupted by {NAME[number]}\n")


def test_a_loop_is_told_of_the_first_signal_and_the_second_ends_the_program():
    process = start_program("-c", DEAF, "loop")
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):  # at the same time, as from a terminal and from a parent: they count once
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.5)
    assert ended(process, signal.SIGTERM) == (143, "deaf: interrupted by SIGTERM\n")


TWICE = """
import os, signal, sys
from data_prep import signals
number = int(sys.argv[1])
signals.install("twice: interrupted by {}")
ready = signals.select.select
def again(*arguments):
    signals.select.select = ready
    os.kill(os.getpid(), number)
    return ready(*arguments)
signals.select.select = again
os.kill(os.getpid(), number)
"""


@BOTH
def test_a_second_signal_during_the_answer_to_the_first_does_not_end_the_program_without_its_line(number):
    """A terminal and a parent both send one."""
    process = start_program("-c", TWICE, int(number))
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (STATUS[number], f"twice: interrupted by {NAME[number]}\n")


@pytest.fixture(scope="module")
def many_images(image_folders, tmp_path_factory):
    """20,000 images, by links to one: converting them takes a second or two."""
    folder = tmp_path_factory.mktemp("many")
    for split, count in (("train", 9000), ("validation", 1000)):
        for name in ("circle", "square"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                os.link(image_folders / "train" / name / "0.png", folder / split / name / f"{number}.png")
    return folder


def group_of(process):
    """The living processes of a program that was started in a session of its own."""
    states = [path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat")]
    return [state for state in states if int(state[2]) == process.pid and state[0] != "Z"]


@BOTH
@pytest.mark.parametrize("phase", ["planning", "converting"])
def test_a_conversion_ends_with_its_workers_and_goes_on(many_images, tmp_path, phase, number):
    command = [
        "-m", "data_prep", f"--train={many_images}/train", f"--validation={many_images}/validation",
        f"--output_dir={tmp_path}", "--workers=2", "--train_shards=8", "--name=many",
    ]  # fmt: skip
    process = start_program(*command, start_new_session=True)
    if phase == "planning":
        assert "planning many" in process.stdout.readline()
    else:
        until(lambda: list(tmp_path.glob("train-*.tmp")), process)
    status, errors = ended(process, number)
    assert status == STATUS[number]
    assert errors == f"data_prep: interrupted by {NAME[number]}; the same command continues\n"
    until_gone = time.monotonic() + 20
    while group_of(process):
        assert time.monotonic() < until_gone
        time.sleep(0.05)
    done = start_program(*command)
    done.communicate()
    assert done.returncode == 0
    assert json.loads((tmp_path / "dataset.json").read_text())["splits"]["train"]["examples"] == 18000
    assert not list(tmp_path.rglob("*.tmp"))


@BOTH
def test_verifying_ends_at_once(data_dir, tmp_path, number):
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    shard = copy / "train-00000-of-00006"
    content = shard.read_bytes()
    (tmp_path / "big").write_bytes(content * 4000)
    shard.unlink()
    os.symlink(tmp_path / "big", shard)
    command = ["-m", "data_prep", "verify", copy, "--verify=decode", "--workers=2"]
    process = start_program(*command, start_new_session=True)
    until(lambda: len(group_of(process)) == 4, process)  # with two workers, that start, and multiprocessing's own
    os.killpg(process.pid, number)  # as a terminal does
    assert (
        process.communicate(timeout=20)[1] == f"data_prep: interrupted by {NAME[number]}; the same command continues\n"
    )
    assert process.returncode == STATUS[number]


@pytest.mark.parametrize("module", ["data_prep", "launch.train"])
def test_ctrl_c_while_a_program_starts_is_no_traceback_of_ours(module):
    """Python has one of its own as long as it has not loaded a program's first lines."""
    for delay in np.linspace(0.06, 0.3, 9):
        process = start_program("-m", module)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        assert str(ROOT) not in process.communicate(timeout=20)[1]


@pytest.mark.parametrize("module", ["data_prep", "launch.train"])
def test_sigterm_while_a_program_starts_ends_it(module):
    """Silently, 143 in a shell, as long as Python has not loaded a program's first lines: no handler can be there."""
    for delay in np.linspace(0.03, 0.3, 9):
        process = start_program("-m", module)
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=20)[1]
        ended_before = process.returncode in (1, 2)  # as a flag is missing
        assert ended_before or process.returncode in (-signal.SIGTERM, 143), (delay, errors)
        assert "Traceback" not in errors
