"""Reruns the paper's experiments and writes docs/results.md with its plots and tables.

launch/results                                      everything, on the embedded digits; hours on two cores
launch/results --only=figure1,figure2 --steps=1500  a part, longer
launch/results --only=report                        the document alone, from the runs there are

The same command again continues where it stands; what is done is not done again.
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the folder above has the packages, this one would hide others
    sys.path[0] = str(Path(__file__).parents[1])

import importlib.metadata
import json
import os
import time

from absl import flags

from bn_keras.errors import InputError
from bn_keras.paper.experiments import plan
from bn_keras.paper.provenance import commit, cpu_name
from bn_keras.paper.results import LOG, write_results
from bn_keras.progress import clock
from data_prep.program import as_started, run_another
from launch import program
from launch.embedded import embedded_data

SECTIONS = ("figure1", "figure2", "changes", "divergence", "early", "batch_size", "report")

TENSORFLOW = ("tensorflow", "tensorflow_cpu", "tensorflow_tpu")  # its distributions; one of them is installed

FLAGS = flags.FLAGS

flags.DEFINE_string("workdir", "results", "Folder of all runs; not in runs, so that a report on that leaves them out.")
flags.DEFINE_string("ensemble_dir", "ensemble", "Where `make ensemble` left figure4.md.")
flags.DEFINE_string("output_dir", "docs", "Folder of results.md; its plots go to results in it.")
flags.DEFINE_string("data_dir", None, "Folder that data_prep wrote, gray for Figure 1. Default: the embedded digits.")
flags.DEFINE_list("only", list(SECTIONS), f"Of {', '.join(SECTIONS)}; the report is always written.")
flags.DEFINE_list("seeds", ["0", "1", "2"], "Of Figure 2 and the seven changes; the other sections take the first.")
flags.DEFINE_integer("steps", 500, "Of 32 images each, of a run of Figure 2.", lower_bound=1)
flags.DEFINE_integer("mnist_steps", 50_000, "Of 60 images each, of Figure 1.", lower_bound=1)
flags.DEFINE_boolean("dry_run", False, "List the runs and whether they are done; run nothing.")


def main():
    if unknown := sorted(set(FLAGS.only) - set(SECTIONS)):
        raise InputError(f"--only={unknown[0]}: the sections are {', '.join(SECTIONS)}")
    if not FLAGS.seeds or not all(seed.isdecimal() for seed in FLAGS.seeds):
        raise InputError(f"--seeds={','.join(FLAGS.seeds)}: give numbers, such as 0,1,2")
    seeds = [int(seed) for seed in FLAGS.seeds]
    chosen = [run for run in plan(seeds, FLAGS.steps, FLAGS.mnist_steps, FLAGS.data_dir) if run.section in FLAGS.only]
    if FLAGS.dry_run:
        for run in chosen:
            state = "done" if run.done(FLAGS.workdir) else "to do"
            command = as_started(f"launch/{run.program}")
            print(f"{state:5}  {command} {' '.join(run.arguments(FLAGS.workdir))}")
        return 0
    if chosen and not FLAGS.data_dir:
        embedded_data()
    if status := run_all([run for run in chosen if not run.done(FLAGS.workdir)]):
        return status
    with program.loading_tensorflow():
        import keras  # noqa: F401 (for Figure 5)
    print(write_results(FLAGS.workdir, FLAGS.ensemble_dir, FLAGS.output_dir))
    return 0


def run_all(runs):
    """Runs what is to do, one after another; the exit status of the first that fails, or 0."""
    total = sum(run.work for run in runs)
    started, behind = time.monotonic(), 0.0
    for number, run in enumerate(runs, 1):
        elapsed = time.monotonic() - started
        left = f", {clock(elapsed / behind * (total - behind))} left in all" if behind else ""
        print(f"\n[{number}/{len(runs)}] {run.section} {run.name}{left}", file=sys.stderr, flush=True)
        command = [f"launch.{run.program}", *run.arguments(FLAGS.workdir)]
        note(run, command)
        if status := run_another(*command):
            return status  # the program has said why
        behind += run.work
    return 0


def note(run, command):
    """Adds what is about to be run, by which code and where, to the working directory's log."""
    os.makedirs(FLAGS.workdir, exist_ok=True)
    entry = {"section": run.section, "name": run.name, "command": command, **where(), "wall_time": time.time()}
    with open(os.path.join(FLAGS.workdir, LOG), "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def where():
    """This code and this machine."""
    return {
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "tensorflow": next(
            (d.version for d in importlib.metadata.distributions() if d.name.replace("-", "_") in TENSORFLOW), "unknown"
        ),
    }


def run():
    program.run(main, __doc__, continues=True)


if __name__ == "__main__":
    run()
