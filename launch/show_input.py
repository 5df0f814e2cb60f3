"""Draws a contact sheet of what the network is really fed: crops, mirrors and colors, with labels.

launch/show_input --data_dir=D --variant=bn_x5          32 training images of the first step, in show_input.png
launch/show_input --data_dir=D --split=validation       the single crops of evaluation
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the folder above has the packages, this one would hide others
    sys.path[0] = str(Path(__file__).parents[1])

import os

from absl import flags

from bn_keras.networks.variants import VARIANTS
from bn_keras.runs.run_files import replacing
from bn_keras.training.recipes import recipe_for
from launch import program, records

FLAGS = flags.FLAGS

flags.adopt_module_key_flags(records)
flags.DEFINE_enum("variant", "bn_x5", list(VARIANTS), "Whose shuffling and distortion.")
flags.DEFINE_enum("split", "train", ["train", "validation"], "Training as it distorts, or what evaluation sees.")
flags.DEFINE_integer("images", 32, "How many.", 1, 1024)
flags.DEFINE_integer("step", 0, "Start at this step of so many images each; only of training.", 0)
flags.DEFINE_integer("seed", 0, "Of order and distortion, as launch/train has it.", 0, 2**31 - 1)
flags.DEFINE_integer("image_size", None, "Height and width of the input in pixels. Default: the recipe's.", 1)
flags.DEFINE_enum("augmentation", None, ["imagenet", "shift", "none"], "Of crops and colors. Default: the recipe's.")
flags.DEFINE_string("output", "show_input.png", "Where the sheet goes.")


def main():
    dataset = records.read_records()
    recipe = recipe_for(dataset)
    variant = VARIANTS[FLAGS.variant]
    options = {
        "image_size": FLAGS.image_size or recipe.image_size,
        "augmentation": FLAGS.augmentation or recipe.augmentation,
        "skipped": dataset.skipped,
    }
    with program.loading_tensorflow():
        from bn_keras.input import contact_sheet, pipeline

    if FLAGS.split == "validation":
        count = min(FLAGS.images, dataset.examples("validation"))
        batches = pipeline.validation_batches(dataset, batch_size=count, **options)
    else:
        count = FLAGS.images
        batches = pipeline.training_batches(
            dataset,
            batch_size=count,
            seed=FLAGS.seed,
            start_step=FLAGS.step,
            shuffling=variant.shuffling,
            photometric_distortion=variant.photometric_distortion,
            **options,
        )
    with pipeline.naming_damage(dataset, FLAGS.split):
        images, labels = (part.numpy() for part in next(iter(batches)))
    shown = labels != pipeline.PADDING_LABEL
    captions = [f"{label} {dataset.class_names[label]}" for label in labels[shown]]
    title = (
        f"{dataset.name}, {FLAGS.split}, {variant.title}, {options['augmentation']}, "
        f"{options['image_size']}x{options['image_size']}"
    )
    sheet = contact_sheet.contact_sheet(images[shown], captions, title=title)
    with replacing(FLAGS.output) as temporary:
        sheet.save(temporary)
    print(f"{len(captions)} images: {os.path.abspath(FLAGS.output)}")
    records.say_skipped(dataset)


def run():
    program.run(main, __doc__)


if __name__ == "__main__":
    run()
