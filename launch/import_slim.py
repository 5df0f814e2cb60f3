"""Makes a run of the public BN-Inception weights: TF-Slim's inception_v2 checkpoint.

launch/import_slim --checkpoint=inception_v2.ckpt --data_dir=imagenet --workdir=runs/inception_v2
launch/evaluate --workdir=runs/inception_v2 --data_dir=imagenet
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the folder above has the packages, this one would hide others
    sys.path[0] = str(Path(__file__).parents[1])

import dataclasses
import os

from absl import flags

from bn_keras.errors import InputError
from bn_keras.networks.variants import PAPER_BATCH_SIZE
from bn_keras.runs.run_config import RunConfig
from bn_keras.runs.run_directory import RunDirectory
from bn_keras.runs.run_files import replacing, seal
from launch import program, records

FLAGS = flags.FLAGS

flags.adopt_module_key_flags(records)
flags.mark_flag_as_required("data_dir")
flags.DEFINE_string("checkpoint", None, "The checkpoint, as TensorFlow names it: inception_v2.ckpt.", required=True)
flags.DEFINE_string("workdir", None, "Folder of the run to make.", required=True)
flags.DEFINE_integer("image_size", 224, "Height and width of the input in pixels.", 1)


def main():
    dataset, _ = records.read_records()
    directory = RunDirectory(FLAGS.workdir)
    if directory.read_config() is not None and os.path.exists(directory.model_path):
        raise InputError(f"{FLAGS.workdir} holds a run: give another --workdir")

    with program.loading_tensorflow():
        from bn_keras.networks.public_weights import VARIANT, read_slim_checkpoint

    model = read_slim_checkpoint(FLAGS.checkpoint, image_size=FLAGS.image_size)
    channels, classes = model.input_shape[-1], model.output_shape[-1]
    for name, found, wanted in (
        ("classes", classes, len(dataset.class_names)),
        ("channels", channels, dataset.channels),
    ):
        if found != wanted:
            raise InputError(f"{FLAGS.checkpoint} is of {found} {name}, {dataset.name} has {wanted}")
    known = {
        "variant": VARIANT,
        "dataset": dataset.name,
        "dataset_fingerprint": dataset.fingerprint,
        "train_examples": dataset.examples("train"),
        "validation_examples": dataset.examples("validation"),
        "classes": classes,
        "channels": channels,
        "image_size": FLAGS.image_size,
        "width": 1.0,
        "augmentation": "imagenet",
        "precision": "float32",
        "batch_size": PAPER_BATCH_SIZE,
        "seed": 0,
        "steps": 0,
    }
    # How it was trained is not in a checkpoint: what only training uses is None.
    config = RunConfig(**{field.name: None for field in dataclasses.fields(RunConfig)} | known)
    directory.open(config, dataset.class_names)
    with replacing(directory.model_path) as temporary:
        model.save(temporary)
        seal(temporary, 0)
    print(f"{FLAGS.checkpoint}: {model.count_params():,} parameters, {classes} classes, in {directory.path}")


def run():
    program.run(main, __doc__)


if __name__ == "__main__":
    run()
