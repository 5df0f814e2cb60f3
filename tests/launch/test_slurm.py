"""launch/slurm/train.sbatch under stubs of SLURM's programs, and the Dockerfile under its linter."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = ROOT / "launch" / "slurm" / "train.sbatch"

# As a job step of four tasks on one node, each of which gets the signal that a job gets whose time is nearly over.
SRUN = """
import glob, json, os, signal, subprocess, sys, time
command = [word for word in sys.argv[1:] if word != "--kill-on-bad-exit=1"]
step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "4"}
step["SLURM_STEP_RESV_PORTS"] = os.environ["PORTS"]
tasks = [subprocess.Popen(command, env={**os.environ, **step, "SLURM_PROCID": str(task)}) for task in range(4)]
if os.environ["SIGNAL_WHEN"]:
    while not glob.glob(os.environ["SIGNAL_WHEN"]) and all(task.poll() is None for task in tasks):
        time.sleep(0.1)
    for task in tasks:
        task.send_signal(signal.SIGTERM)
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.fixture
def submit(tmp_path):
    """Runs the script as a job that has `seconds` left, by a `srun` of some code; returns it and what it asked for."""
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text(
            f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/asked\nexec {sys.executable} {tmp_path}/{name}.py "$@"\n'
        )
        (tmp_path / name).chmod(0o755)
    (tmp_path / "scontrol.py").write_text("")

    def submitted(*flags, seconds, srun, **variables):
        (tmp_path / "srun.py").write_text(srun)
        (tmp_path / "asked").unlink(missing_ok=True)
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(time.time()) + seconds)}
        environment = {**os.environ, **job, **variables, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", SCRIPT, *flags], cwd=ROOT, env=environment, capture_output=True, text=True)
        return done, (tmp_path / "asked").read_text().splitlines()

    return submitted


@pytest.mark.parametrize(
    ("status", "seconds", "requeued"), [(0, 100, True), (0, 10_000, False), (1, 100, False), (3, 10_000, False)]
)
def test_a_job_whose_time_is_over_is_queued_again_and_one_that_ended_or_failed_is_not(
    submit, status, seconds, requeued
):
    done, asked = submit("--variant=bn_x5", "--workdir=a b", seconds=seconds, srun=f"raise SystemExit({status})")
    assert done.returncode == status and done.stderr == ""
    step = "srun --kill-on-bad-exit=1 launch/train --variant=bn_x5 --workdir=a b"
    assert asked == [step, *(["scontrol requeue 7"] if requeued else [])]


def test_the_job_asks_for_a_signal_before_its_end_and_for_another_start_when_a_node_dies():
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", SCRIPT.read_text(), re.M))
    assert directives["signal"] == "TERM@120" and "requeue" in directives
    assert (
        directives["ntasks-per-node"] == "1"
    )  # of which SlurmClusterResolver makes a worker with all GPUs of the node


@pytest.mark.slow
def test_a_job_of_four_processes_whose_time_is_over_goes_on_in_the_next_one(submit, data_dir, tmp_path):
    run = tmp_path / "run"
    flags = [
        "--variant=resnet18", f"--data_dir={data_dir}", f"--workdir={run}", "--width=0.1", "--image_size=32",
        "--batch_size=16", "--eval_batch_size=16", "--steps=60", "--eval_every=60", "--checkpoint_every=2",
    ]  # fmt: skip
    variables = {"PORTS": "23450-23453", "VIRTUAL_ENV": sys.prefix, "TF_CPP_MIN_LOG_LEVEL": "2"}
    first = {"seconds": 100, "SIGNAL_WHEN": f"{run}/checkpoint-*"}
    done, asked = submit(*flags, srun=SRUN, **first, **variables)
    assert done.returncode == 0, done.stderr
    assert asked[-1] == "scontrol requeue 7" and not (run / "model.keras").exists()
    done, asked = submit(*flags, srun=SRUN, seconds=10_000, SIGNAL_WHEN="", **variables)
    assert done.returncode == 0 and len(asked) == 1, done.stderr
    last = json.loads((run / "curve.jsonl").read_text().splitlines()[-1])
    assert (last["kind"], last["step"]) == ("validation", 60) and (run / "model.keras").exists()


@pytest.mark.needs("hadolint")
def test_the_dockerfile_has_nothing_that_hadolint_warns_of():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "launch" / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_dockerfile_copies_all_that_the_package_is_made_of():
    copied = re.findall(r"^COPY (.*) \S+$", (ROOT / "launch" / "Dockerfile").read_text(), re.M)
    needed = {"README.md", "constraints.txt", "pyproject.toml", "setup.py", "bn_keras", "data_prep", "launch"}
    assert set(" ".join(copied).split()) == needed
