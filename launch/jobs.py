"""Runs several of our programs side by side. A small network keeps one core busy, so two cores train two of them."""

import concurrent.futures
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping

from absl import flags

from bn_keras.errors import InputError
from bn_keras.input.dataset import Dataset
from bn_keras.runs.run_config import RunConfig
from bn_keras.training.recipes import make_config
from data_prep import signals
from data_prep.program import start_another
from launch import config_flags

FLAGS = flags.FLAGS

flags.DEFINE_integer(
    "jobs",
    None,
    "How many runs to train side by side, 1.2 GB each. Default: one for each core if networks are small, else 1.",
    1,
)
flags.DEFINE_list("train_flags", [], "Flags for every run of launch/train, such as augmentation=imagenet,width=0.5.")


def train_flags() -> dict[str, str]:
    """The values of --train_flags by the names of launch/train's flags.

    Raises:
      InputError: a part of it is not NAME=VALUE.
    """
    if wrong := [flag for flag in FLAGS.train_flags if not re.fullmatch(r"\w+=[^=]+", flag)]:
        raise InputError(f"--train_flags={wrong[0]}: give NAME=VALUE,... of launch/train, such as width=0.5")
    return dict(flag.split("=") for flag in FLAGS.train_flags)


def config_of(dataset: Dataset, variant: str, training: Mapping[str, str]) -> RunConfig:
    """The configuration that `launch/train` would make from the values of its flags."""
    values = flags.FlagValues()
    config_flags.define(RunConfig, flag_values=values)
    given = [f"--{name}={value}" for name, value in training.items()]
    values(["train", f"--variant={variant}", *given], known_only=True)
    return make_config(dataset, variant, **config_flags.given(RunConfig, flag_values=values))


def jobs_of(config: RunConfig) -> int:
    """The number of runs with this configuration that are to be trained side by side."""
    alone = config.threads != 1 or shutil.which("nvidia-smi")
    return FLAGS.jobs or (1 if alone else len(os.sched_getaffinity(0)))


def run_side_by_side(jobs: Iterable[tuple[str, Iterator[list[str]]]], at_once: int) -> int:
    """Runs several jobs side by side, and the programs of each job one after another.

    A signal is passed on to all programs that run, so that they save their state; this one ends when they have ended.
    When a program fails, the others are told to save and end, and no other begins.

    Args:
      jobs: the name of each job, and the arguments of `python -m` for each of its programs.
      at_once: the number of jobs side by side. If it is above 1, every line of a program begins with its job's name.

    Returns:
      0, or the exit status of the first program that failed; it has printed why.
    """
    lock, running, failed = threading.RLock(), set(), []
    received: list[signal.Signals] = []
    joined = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if at_once > 1 else {}

    def stop(number: int, frame: object = None) -> None:
        with lock:
            received.append(signal.Signals(number))
            for process in running:
                process.send_signal(number)

    def run(name: str, programs: Iterator[list[str]]) -> None:
        while True:
            with lock:
                if received or (arguments := next(programs, None)) is None:
                    return
                process = start_another(*arguments, **joined)
                running.add(process)
            with process:
                for line in process.stdout or ():
                    print(f"{name} | {line.decode(errors='replace')}", end="", file=sys.stderr, flush=True)
            with lock:
                running.remove(process)
                if process.returncode and not received:
                    failed.append(process.returncode)
                    stop(signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in signals.STATUS}
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        ends = [pool.submit(run, *job) for job in jobs]
        for end in concurrent.futures.as_completed(ends):
            if error := end.exception():
                stop(signal.SIGTERM)
                raise error
    for number, handler in before.items():
        signal.signal(number, handler)
    if received and not failed:
        signals.leave(signals.STATUS[received[0]])  # the programs have printed it
    return failed[0] if failed else 0
