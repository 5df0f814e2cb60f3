"""Draws a contact sheet of the images that the network is fed, with their labels: crops, mirror images and colors.

launch/show_input --data_dir=D --variant=bn_x5          32 training images of the first step, in show_input.png
launch/show_input --data_dir=D --split=validation       the single crops of evaluation
launch/show_input --data_dir=D --page                   the data set itself: images a class, sizes, formats
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the folder above has the packages, this one would hide others
    sys.path[0] = str(Path(__file__).parents[1])

import dataclasses
from typing import NoReturn

from absl import flags

from bn_keras import storage
from bn_keras.input.dataset import Dataset
from bn_keras.input.shard_cache import on_this_machine
from bn_keras.networks.variants import VARIANTS
from bn_keras.runs.run_config import RunConfig
from bn_keras.runs.run_files import replacing
from bn_keras.training.recipes import make_config
from data_prep.program import require
from launch import config_flags, program, records

FLAGS = flags.FLAGS

flags.adopt_module_key_flags(records)
flags.DEFINE_enum("variant", "bn_x5", list(VARIANTS), "The variant whose shuffling and distortion are shown.")
flags.DEFINE_enum(
    "split",
    "train",
    ["train", "validation"],
    "train: images after augmentation; validation: images as evaluation sees them.",
)
flags.DEFINE_bool(
    "page", False, "Instead draw images a class, sizes, formats and what was re-encoded or bad; print them as a table."
)
flags.DEFINE_integer("images", 32, "How many images the sheet has.", 1, 1024)
flags.DEFINE_integer("step", 0, "The training step whose images are shown; a step takes --images images.", 0)
config_flags.define(RunConfig, ("seed", "image_size", "augmentation", "rand_augment"))
flags.DEFINE_string("output", "show_input.png", "The file that the sheet is written to.")


def main() -> None:
    dataset, skipped = records.read_records()
    program.check_output(FLAGS.output, ".png", ".jpg", ".jpeg", ".webp")
    if FLAGS.page:
        return draw_page(on_this_machine(dataset, FLAGS.cache))
    config = make_config(dataset, FLAGS.variant, **config_flags.given(RunConfig))
    with program.loading_tensorflow():
        from bn_keras.input import contact_sheet
        from bn_keras.input.records import PADDING_LABEL
        from bn_keras.input.run_batches import RunBatches

    dataset = on_this_machine(dataset, FLAGS.cache)
    fed = RunBatches(dataclasses.replace(config, batch_size=FLAGS.images), dataset, skipped)
    if FLAGS.split == "validation":
        batches = fed.evaluation(batch_size=min(FLAGS.images, dataset.examples("validation")))
    else:
        batches = fed.training(FLAGS.step * FLAGS.images)
    with fed.naming_damage(FLAGS.split):
        images, labels = (part.numpy() for part in next(iter(batches)))
    shown = labels != PADDING_LABEL
    captions = [f"{label} {dataset.class_names[label]}" for label in labels[shown]]
    title = (
        f"{dataset.name}, {FLAGS.split}, {config.variant.title}, {config.augmentation}, "
        f"{config.image_size}x{config.image_size}"
    )
    sheet = contact_sheet.contact_sheet(images[shown], captions, title=title)
    with replacing(FLAGS.output) as temporary:
        sheet.save(temporary)
    print(f"{len(captions)} images: {storage.absolute(FLAGS.output)}")
    records.say_skipped(skipped)


def draw_page(dataset: Dataset) -> None:
    require("matplotlib")  # before all records are read
    with program.loading_tensorflow():
        from bn_keras.input import dataset_page

    pages = {split: dataset_page.read(dataset, split) for split in dataset.splits}
    lists = dataset_page.listed(FLAGS.data_dir)
    with replacing(FLAGS.output) as temporary:
        dataset_page.draw(temporary, dataset, pages, lists)
    print(dataset_page.page_table(pages, lists))
    print(storage.absolute(FLAGS.output))


def run() -> NoReturn:
    program.run(main, __doc__)


if __name__ == "__main__":
    run()
