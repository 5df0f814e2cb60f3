"""Benchmarks the input pipeline on this machine: images per second at each stage, and the bottleneck.

launch/benchmark_input --data_dir=D --variant=bn_x5
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the folder above has the packages, this one would hide others
    sys.path[0] = str(Path(__file__).parents[1])

import os
import re
from typing import NoReturn

from absl import flags

from bn_keras.input.shard_cache import on_this_machine
from bn_keras.networks.variants import VARIANTS
from bn_keras.runs.run_config import RunConfig
from bn_keras.training.recipes import make_config
from launch import config_flags, program, records

FLAGS = flags.FLAGS

flags.adopt_module_key_flags(records)
flags.DEFINE_enum("variant", "bn_x5", list(VARIANTS), "The variant whose shuffling and distortion are measured.")
config_flags.define(RunConfig, ("batch_size", "image_size", "augmentation"))
flags.DEFINE_float("seconds", 5.0, "Seconds to measure each stage.", 0.1)


def main() -> None:
    dataset, skipped = records.read_records()
    config = make_config(dataset, FLAGS.variant, **config_flags.given(RunConfig))
    with program.loading_tensorflow():
        from bn_keras.input import speed
        from bn_keras.input.records import PARALLEL_CALLS
        from bn_keras.input.run_batches import RunBatches
        from bn_keras.input.training_order import memory_bound

    fed = RunBatches(config, on_this_machine(dataset, FLAGS.cache), skipped)
    print(
        f"{dataset.name} for {config.variant.title}, {os.cpu_count()} cores, {PARALLEL_CALLS} parallel calls, "
        f"records in memory: at most {memory_bound(dataset) / 1e6:,.0f} MB",
        flush=True,
    )
    with fed.naming_damage("train"):
        rates = speed.stage_rates(fed, seconds=FLAGS.seconds)
    added = speed.seconds_per_image(rates)
    print(f"{'stage':30}{'images/s with it':>18}{'ms an image':>14}")
    for stage, rate in rates.items():
        print(f"{stage:30}{rate:18,.0f}{1e3 * added[stage]:14.3f}")
    slowest = max(added, key=lambda stage: added[stage])
    advice = re.sub("`(.*?)`", r"--\1", speed.ADVICE[slowest])  # of launch/train
    print(f"bottleneck: {slowest}; where the accelerator waits for it: {advice}")
    records.say_skipped(skipped)


def run() -> NoReturn:
    program.run(main, __doc__)


if __name__ == "__main__":
    run()
