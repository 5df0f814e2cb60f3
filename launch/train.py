"""Trains a classifier, one of the paper's networks or a ResNet, from scratch or from pretrained weights (fine-tuning).

The same command again continues an interrupted run from its last checkpoint.

launch/train --variant=bn_x5                            a small network on the embedded MNIST digits, in minutes
launch/train --variant=bn_x5 --data_dir=imagenet        the paper's network and training on ImageNet
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the folder above has the packages, this one would hide others
    sys.path[0] = str(Path(__file__).parents[1])

import os
from typing import NoReturn

from absl import flags

from bn_keras.errors import InputError
from bn_keras.input.shard_cache import on_this_machine
from bn_keras.runs.run_config import RunConfig
from bn_keras.runs.run_directory import RunDirectory
from bn_keras.storage import is_remote
from bn_keras.training.recipes import make_config
from data_prep.program import require
from launch import config_flags, machines, peers, plan, program, records

DIVERGED = 3
INTERRUPTED = 130  # the exit status of a program that Ctrl-C has ended

FLAGS = flags.FLAGS

flags.adopt_module_key_flags(records)
config_flags.define(RunConfig)
flags.adopt_module_key_flags(machines)
flags.DEFINE_string("workdir", None, "Folder of this run: its checkpoints, curve and model. Default: runs/VARIANT.")
flags.DEFINE_list("allow_change", [], "Settings in run.json that may differ when a run is continued.")
flags.DEFINE_multi_enum(
    "tracker", [], ["wandb", "mlflow"], "An experiment tracker that follows the curve; give the flag twice for both."
)
flags.DEFINE_string("profile", None, "Steps that TensorFlow's profiler records, as FIRST:LAST.")
flags.DEFINE_boolean("dry_run", False, "Print the plan and its cost, measured on a few steps; write nothing.")
flags.DEFINE_enum(
    "on_divergence", "stop", ["stop", "record"], f"Exit status of a run that diverges. stop: {DIVERGED}; record: 0."
)


def main() -> int:
    dataset, skipped = records.read_records(keep=not FLAGS.dry_run)
    directory = RunDirectory(FLAGS.workdir or os.path.join("runs", FLAGS.variant))
    given = config_flags.given(RunConfig)
    config = make_config(dataset, FLAGS.variant, continued=directory.read_config(keep=True), **given)
    config.check()
    profiled = profiled_steps(config)
    require(*FLAGS.tracker)
    directory.check(config, dataset.class_names, FLAGS.allow_change)
    if not FLAGS.dry_run and directory.finished(config):
        return nothing_to_do(config, directory)

    peers.check_services(FLAGS.data_service)
    with machines.loading_tensorflow(FLAGS.dry_run):
        from bn_keras.input.training_order import memory_bound
        from bn_keras.training.trainer import Outcome, train

    strategy, config = machines.strategy_for(config, FLAGS.dry_run)
    directory.check(config, dataset.class_names, FLAGS.allow_change)
    print(plan.describe(config, dataset, strategy), flush=True)
    dataset = on_this_machine(dataset, FLAGS.cache)
    if FLAGS.dry_run:
        print(plan.cost(config, dataset, skipped, strategy))
        return 0
    print(f"at most {memory_bound(dataset) / 1e6:,.0f} MB of records in memory", flush=True)
    peers.watch_services(FLAGS.data_service)
    outcome = train(
        config,
        dataset,
        directory,
        strategy,
        allow_change=FLAGS.allow_change,
        skipped=skipped,
        data_service=FLAGS.data_service,
        profiled_steps=profiled,
        trackers=FLAGS.tracker,
    )
    records.say_skipped(skipped)
    folder = os.path.dirname(directory.path) or "."
    board = (
        "" if is_remote(folder) else f"; see it with: tensorboard --logdir={folder}"
    )  # TensorBoard reads few kinds of buckets
    print(f"{FLAGS.variant}: {outcome.value}{board}")
    return INTERRUPTED if outcome is Outcome.INTERRUPTED else status(outcome is Outcome.DIVERGED)


def nothing_to_do(config: RunConfig, directory: RunDirectory[RunConfig]) -> int:
    """Says why there is nothing to do, and returns the exit status."""
    diverged = directory.curve.diverged()
    state = f"diverged at step {diverged['step']}" if diverged else f"all {config.steps} steps are done"
    step = directory.newest_step() or 0
    if step < config.steps and (stalled := directory.curve.stalled(config.patience, step)):
        state = f"it ended at step {step}, as {stalled} (--patience=0 goes on),"
    print(f"{FLAGS.variant}: nothing to do, {state} in {directory.path}")
    return status(bool(diverged))


def status(diverged: bool) -> int:
    return DIVERGED if diverged and FLAGS.on_divergence == "stop" else 0


def profiled_steps(config: RunConfig) -> range:
    """The range of steps that --profile gives."""
    if FLAGS.profile is None:
        return range(0)
    first, _, last = FLAGS.profile.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise InputError(f"--profile={FLAGS.profile} is not FIRST:LAST, such as 100:110; the first step of a run is 1")
    if int(first) > config.steps:
        raise InputError(f"--profile={FLAGS.profile} begins after the last step: the run has {config.steps:,}")
    return range(int(first), int(last) + 1)


def run() -> NoReturn:
    program.run(main, __doc__, continues=True)


if __name__ == "__main__":
    run()
