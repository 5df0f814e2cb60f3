"""Images a second that this machine's input pipeline can feed, by stage, and the stage that holds it back.

launch/benchmark_input --data_dir=D --variant=bn_x5
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the folder above has the packages, this one would hide others
    sys.path[0] = str(Path(__file__).parents[1])

import os

from absl import flags

from bn_keras.networks.variants import VARIANTS
from bn_keras.training.recipes import recipe_for
from launch import program, records

FLAGS = flags.FLAGS

flags.adopt_module_key_flags(records)
flags.DEFINE_enum("variant", "bn_x5", list(VARIANTS), "Whose shuffling and distortion.")
flags.DEFINE_integer("batch_size", 32, "Images of one step.", 1)
flags.DEFINE_integer("image_size", None, "Height and width of the input in pixels. Default: the recipe's.", 1)
flags.DEFINE_enum("augmentation", None, ["imagenet", "shift", "none"], "Of crops and colors. Default: the recipe's.")
flags.DEFINE_float("seconds", 5.0, "To measure each stage for.", 0.1)


def main():
    dataset = records.read_records()
    recipe = recipe_for(dataset)
    variant = VARIANTS[FLAGS.variant]
    with program.loading_tensorflow():
        from bn_keras.input import pipeline, speed

    print(
        f"{dataset.name} for {variant.title}, {os.cpu_count()} cores, {pipeline.PARALLEL_CALLS} parallel calls, "
        f"records in memory: at most {pipeline.memory_bound(dataset) / 1e6:,.0f} MB",
        flush=True,
    )
    with pipeline.naming_damage(dataset, "train"):
        rates = speed.stage_rates(
            dataset,
            batch_size=FLAGS.batch_size,
            seconds=FLAGS.seconds,
            image_size=FLAGS.image_size or recipe.image_size,
            seed=0,
            augmentation=FLAGS.augmentation or recipe.augmentation,
            shuffling=variant.shuffling,
            photometric_distortion=variant.photometric_distortion,
            skipped=dataset.skipped,
        )
    added = speed.seconds_per_image(rates)
    print(f"{'stage':30}{'images/s with it':>18}{'ms an image':>14}")
    for stage, rate in rates.items():
        print(f"{stage:30}{rate:18,.0f}{1e3 * added[stage]:14.3f}")
    slowest = max(added, key=added.get)
    print(f"bottleneck: {slowest}; where the accelerator waits for it: {speed.ADVICE[slowest]}")
    records.say_skipped(dataset)


def run():
    program.run(main, __doc__)


if __name__ == "__main__":
    run()
