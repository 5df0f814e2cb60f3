"""Reruns the paper's experiments and writes docs/results.md with a page, plots and tables for each data set.

launch/results                                    all experiments on the embedded digits; takes hours on two cores
launch/results --data_dir=data/cifar10            the same on your own records; runs go to results/cifar10
launch/results --only=figure1,figure2 --dry_run   only prints some of the runs, with their steps and hours
launch/results --list                             only prints the commands of unfinished runs, for a queue
launch/results --only=report                      only writes the documents, from existing runs

The same command again continues; finished runs are not repeated.
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the folder above has the packages, this one would hide others
    sys.path[0] = str(Path(__file__).parents[1])

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from absl import flags

from bn_keras import storage
from bn_keras.errors import InputError
from bn_keras.input.dataset_formats import read_dataset
from bn_keras.paper.experiments import Experiment, plan
from bn_keras.paper.provenance import commit, cpu_name
from bn_keras.paper.results import LOG, write_results
from bn_keras.progress import clock
from bn_keras.runs.run_files import write_text
from data_prep.program import as_started
from launch import jobs, program
from launch.embedded import embedded_data

SECTIONS = ("figure1", "figure2", "changes", "divergence", "early", "batch_size", "report")

EMBEDDED = "digits"
"""Name of the page of the embedded digits."""

TENSORFLOW = ("tensorflow", "tensorflow_cpu", "tensorflow_tpu")  # TensorFlow's distributions, of which one is installed

FLAGS = flags.FLAGS

flags.adopt_module_key_flags(jobs)
flags.DEFINE_string("workdir", None, "Folder of all runs. Default: NAME in results.")
flags.DEFINE_string(
    "name", None, "Name of the page and of its column. Default: the last part of --data_dir, or digits without it."
)
flags.DEFINE_string("output_dir", "docs", "Folder of results.md; a page for each data set goes to results in it.")
flags.DEFINE_string("data_dir", None, "Folder of records; Figure 1 needs gray ones. Default: the embedded digits.")
flags.DEFINE_list("only", list(SECTIONS), f"Sections to run, from {', '.join(SECTIONS)}; the report is always written.")
flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the runs; the sections divergence and early take only the first.")
flags.DEFINE_integer(
    "steps",
    None,
    "Steps of a run, of 32 images; Figure 2's are then extended until their curves are flat. Default: the recipe's.",
    1,
)
flags.DEFINE_integer("eval_every", None, "Steps of 32 images between evaluations. Default: the recipe's.", 1)
flags.DEFINE_integer("mnist_steps", 50_000, "Steps of Figure 1's runs, of 60 images each.", lower_bound=1)
flags.DEFINE_boolean(
    "list", False, "Print the command of each unfinished run, one a line, for a queue or a SLURM array; run nothing."
)
flags.DEFINE_boolean("dry_run", False, "Print the plan with its cost, measured on a few steps; write nothing.")


def main() -> int:
    if unknown := sorted(set(FLAGS.only) - set(SECTIONS)):
        raise InputError(f"--only={unknown[0]}: the sections are {', '.join(SECTIONS)}")
    if not FLAGS.seeds or not all(seed.isdecimal() for seed in FLAGS.seeds):
        raise InputError(f"--seeds={','.join(FLAGS.seeds)}: give numbers, such as 0,1,2")
    seeds = list(dict.fromkeys(map(int, FLAGS.seeds)))
    training = jobs.train_flags()
    name = FLAGS.name or (os.path.basename(os.path.normpath(FLAGS.data_dir)) if FLAGS.data_dir else EMBEDDED)
    workdir = FLAGS.workdir or os.path.join("results", name)
    chosen, at_once = [], 1
    if sections := set(FLAGS.only) - {"report"}:
        dataset = read_dataset(FLAGS.data_dir or embedded_data(keep=not FLAGS.dry_run))
        config = jobs.config_of(dataset, "bn_x5", training)
        at_once = jobs.jobs_of(config)
        runs = plan(
            seeds,
            FLAGS.steps or config.steps,
            FLAGS.eval_every or config.eval_every,
            FLAGS.mnist_steps,
            gray=dataset.channels == 1,
            data_dir=FLAGS.data_dir,
            **training,
        )
        chosen = [run for run in runs if run.section in sections]
    if FLAGS.dry_run:
        print_plan(chosen, workdir, at_once)
        return 0
    if FLAGS.list:
        for run in chosen:
            if steps := run.to_do(workdir):
                print(command_of(run, workdir, steps.stop))
        return 0
    if status := run_all(chosen, workdir, at_once):
        return status
    with program.loading_tensorflow():
        import keras  # noqa: F401 (for Figure 5)
    shared = {"data_dir": FLAGS.data_dir, "train_flags": ",".join(FLAGS.train_flags)}
    command = " ".join(["launch/results", *(f"--{flag}={value}" for flag, value in shared.items() if value)])
    print("\n".join(write_results(workdir, FLAGS.output_dir, name, command)))
    return 0


def print_plan(runs: list[Experiment], workdir: str, at_once: int) -> None:
    """The runs as a table, and their hours in all, with `at_once` of them side by side."""
    rates, total = {}, 0.0
    print(f"{'state':5} {'steps':>9} {'s/step':>8} {'hours':>7}  run")
    for run in runs:
        steps = run.to_do(workdir)
        seconds = run.step_seconds(workdir) or measured_seconds(run, workdir, rates)
        hours = len(steps) * seconds / 3600 if seconds else 0.0
        total += hours
        cost = f"{seconds:8.3g} {hours:7.2f}" if seconds else " " * 16
        state = f"{'to do' if steps else 'done':5} {steps.stop:9,} {cost}"
        print(f"{state}  {command_of(run, workdir, steps.stop)}", flush=True)
    print(
        f"{total / at_once:.1f} hours in all on this machine, {at_once} at once; each run of Figure 2 is then extended "
        "until its curve is flat"
    )


def command_of(run: Experiment, workdir: str, steps: int) -> str:
    """A run as a line for a shell."""
    return shlex.join([as_started(f"launch/{run.program}"), *run.arguments(workdir, steps)])


def measured_seconds(run: Experiment, workdir: str, rates: dict[str, float | None]) -> float | None:
    """Seconds of a step, as a --dry_run of the launcher measures them; None if it cannot.

    Args:
      run: a run of the plan; `launch/mnist`, whose 50,000 steps take minutes, measures nothing.
      workdir: the folder of all runs.
      rates: the known images per second of each variant; a measurement is added.
    """
    if run.program != "train":
        return None
    variant = run.flags["variant"]
    if variant not in rates:
        command = [sys.executable, "-m", "launch.train", "--dry_run", *run.arguments(workdir, run.steps)]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout
        found = re.search(r"([\d.e+]+) images a second", output)
        rates[variant] = float(found.group(1)) if found else None
    return rates[variant] and run.flags["batch_size"] / rates[variant]


def run_all(runs: list[Experiment], workdir: str, at_once: int) -> int:
    """Runs what is to do, `at_once` side by side; the exit status of the first that fails, or 0."""
    to_do = [(run, steps) for run in runs if (steps := run.to_do(workdir))]
    left, behind, started = sum(run.work(steps) for run, steps in to_do), 0.0, time.monotonic()

    def programs(number: int, run: Experiment, steps: range) -> Iterator[list[str]]:
        nonlocal left, behind
        while steps:
            eta = f", {clock((time.monotonic() - started) / behind * left)} left in all" if behind else ""
            print(f"\n[{number}/{len(to_do)}] {run.section} {run.name}{eta}", file=sys.stderr, flush=True)
            work, command = run.work(steps), [f"launch.{run.program}", *run.arguments(workdir, steps.stop)]
            note(run, command, workdir)
            yield command
            behind, left = behind + work, max(0.0, left - work)
            steps = run.to_do(workdir)

    all_jobs = [(f"{run.section}/{run.name}", programs(k, run, steps)) for k, (run, steps) in enumerate(to_do, 1)]
    return jobs.run_side_by_side(all_jobs, at_once)


def note(run: Experiment, command: list[str], workdir: str) -> None:
    """Adds a line to the working directory's log: which run is about to start, with which code and where."""
    storage.make_folder(workdir)
    entry = {"section": run.section, "name": run.name, "command": command, **where(), "wall_time": time.time()}
    path = os.path.join(workdir, LOG)
    before = storage.read(path).decode(errors="backslashreplace") if storage.exists(path) else ""
    write_text(path, f"{before}{json.dumps(entry)}\n")


def where() -> dict[str, Any]:
    """The code and the machine of this run."""
    return {
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "tensorflow": next(
            (d.version for d in importlib.metadata.distributions() if d.name.replace("-", "_") in TENSORFLOW), "unknown"
        ),
    }


def run() -> NoReturn:
    program.run(main, __doc__, continues=True)


if __name__ == "__main__":
    run()
