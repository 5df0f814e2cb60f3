"""Makes a run of public, pretrained weights: TF-Slim's inception_v2, PyTorch's bn_inception, torchvision's ResNets.

launch/import_weights --checkpoint=resnet50.pth --workdir=runs/resnet50 --class_names=names.txt
launch/predict cat.jpg --workdir=runs/resnet50
launch/evaluate --workdir=runs/resnet50 --data_dir=imagenet
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the folder above has the packages, this one would hide others
    sys.path[0] = str(Path(__file__).parents[1])

import dataclasses
from collections.abc import Sequence
from typing import NoReturn

from absl import flags

from bn_keras import storage
from bn_keras.errors import InputError
from bn_keras.networks.variants import PAPER_BATCH_SIZE
from bn_keras.runs.run_config import RunConfig
from bn_keras.runs.run_directory import RunDirectory
from bn_keras.runs.run_files import replacing, seal
from launch import program, records

FLAGS = flags.FLAGS

flags.adopt_module_key_flags(records)
flags.DEFINE_string(
    "checkpoint",
    None,
    "The weights: a file of PyTorch or safetensors, or a TensorFlow checkpoint by its name, inception_v2.ckpt.",
    required=True,
)
flags.DEFINE_string("workdir", None, "Folder of the run to make.", required=True)
flags.DEFINE_integer("image_size", 224, "Height and width of the network's input in pixels.", 1)
flags.DEFINE_string(
    "class_names",
    None,
    "Text file with the name of each class on a line. Default: the names of --data_dir, or numbers.",
)


def main() -> None:
    directory = RunDirectory(FLAGS.workdir)
    if directory.read_config() is not None and storage.exists(directory.model_path):
        raise InputError(f"{FLAGS.workdir} holds a run: give another --workdir")
    dataset = records.read_records()[0] if FLAGS.data_dir else None
    given: dict[str, Sequence[str]] = {}
    if FLAGS.class_names:
        given[FLAGS.class_names] = names_in(FLAGS.class_names)
    if dataset:
        given[dataset.name] = dataset.class_names

    with program.loading_tensorflow():
        from bn_keras.networks.public_weights import read_public_weights

    variant, model = read_public_weights(FLAGS.checkpoint, image_size=FLAGS.image_size)
    channels, classes = model.input_shape[-1], model.output_shape[-1]
    for source, names in given.items():
        if len(names) != classes:
            raise InputError(f"{FLAGS.checkpoint} has {classes} classes, {source} {len(names)}")
    if dataset and dataset.channels != channels:
        raise InputError(f"{FLAGS.checkpoint} has {channels} channels, {dataset.name} {dataset.channels}")
    known = {
        "variant": variant,
        "dataset": dataset and dataset.name,
        "dataset_fingerprint": dataset and dataset.fingerprint,
        "train_examples": dataset and dataset.examples("train"),
        "validation_examples": dataset and dataset.examples("validation"),
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
    # A checkpoint does not say how it was trained, so the fields that only training uses are None.
    config = RunConfig(**{field.name: None for field in dataclasses.fields(RunConfig)} | known)
    names = next(iter(given.values()), [f"class {number}" for number in range(classes)])
    directory.open(config, names)
    with replacing(directory.model_path) as temporary:
        model.save(temporary)
        seal(temporary, 0)
    print(
        f"{FLAGS.checkpoint}: {variant.title}'s network, {model.count_params():,} parameters, {classes} classes, "
        f"in {directory.path}"
    )


def names_in(path: str) -> list[str]:
    """The lines of a text file, of any editor: a name may hold every character but a line end."""
    text = storage.read(path).decode("utf-8-sig", "backslashreplace").removesuffix("\n")
    return [line.removesuffix("\r") for line in text.split("\n")]


def run() -> NoReturn:
    program.run(main, __doc__)


if __name__ == "__main__":
    run()
