"""Exports a trained network for inference without this project, with its batch normalization folded away.

launch/export --workdir=runs/bn_x30 --output=model                         a SavedModel, from image files to classes
launch/export --workdir=runs/bn_x30 --format=onnx --output=model.onnx      ONNX, from images in [-1, 1] to logits
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the folder above has the packages, this one would hide others
    sys.path[0] = str(Path(__file__).parents[1])

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import NoReturn

from absl import flags

from bn_keras.errors import InputError, first_line
from bn_keras.input.shard_cache import on_this_machine
from bn_keras.runs.run_directory import RunDirectory
from data_prep.program import require
from launch import normalization, program, records, weights

FLAGS = flags.FLAGS

flags.adopt_module_key_flags(records)
flags.adopt_module_key_flags(weights)
flags.adopt_module_key_flags(normalization)
flags.DEFINE_string("workdir", None, "Folder of the run that is exported.", required=True)
flags.DEFINE_enum(
    "format",
    "saved_model",
    ["keras", "saved_model", "onnx"],
    "Format to write. saved_model includes the preprocessing of image files.",
)
flags.DEFINE_string("output", None, "The file to write; a SavedModel is a folder.", required=True)


def main() -> None:
    check_output()
    directory = RunDirectory(FLAGS.workdir)
    config = directory.read_trained()
    class_names = directory.read_class_names()
    dataset, skipped = records.read_records() if FLAGS.statistics == "population" else (None, None)

    with program.loading_tensorflow():
        import numpy as np
        import tensorflow as tf

        from bn_keras.evaluation.saved_model import export_saved_model
        from bn_keras.evaluation.trained_network import image_view, load_network
        from bn_keras.input.run_batches import RunBatches

    population_of = RunBatches(config, on_this_machine(dataset, FLAGS.cache), skipped) if dataset else None
    model = load_network(
        directory, population_of=population_of, population_steps=FLAGS.statistics_steps, weights=FLAGS.weights
    )
    with written_aside(os.path.normpath(FLAGS.output)) as output:
        try:
            match FLAGS.format:
                case "keras":
                    model.save(output)
                case "saved_model":
                    export_saved_model(model, image_view(config), class_names, output)
                case "onnx":
                    model(np.zeros((1, *model.input_shape[1:]), "float32"))  # Keras refuses one never called
                    model.export(output, format="onnx", verbose=False)
        except tf.errors.OpError as error:  # of a full disk, in TensorFlow's words
            raise InputError(f"cannot write {FLAGS.output} ({first_line(error)})") from error
    print(f"{FLAGS.format}: {os.path.abspath(FLAGS.output)}")


@contextlib.contextmanager
def written_aside(path: str) -> Iterator[str]:
    """Gives a name to write to, which is renamed to `path` when it is whole; removes what a killed export left."""
    folder, name = os.path.split(path)
    aside = os.path.join(folder, f".{name}.unfinished")
    if os.path.isdir(aside) and not set(os.listdir(aside)) - {name}:
        shutil.rmtree(aside)
    os.mkdir(aside)
    try:
        yield os.path.join(aside, name)
        os.rename(os.path.join(aside, name), path)
    finally:
        shutil.rmtree(aside)


def check_output() -> None:
    """Refuses a format or a place that cannot be written."""
    if os.path.lexists(FLAGS.output):
        raise InputError(f"{FLAGS.output} exists: give another --output, or remove it")
    if FLAGS.format == "keras" and not FLAGS.output.endswith(".keras"):
        raise InputError(f"--output={FLAGS.output} must end in .keras, by which Keras knows its format")
    if FLAGS.format == "onnx":
        require("onnx", "tf2onnx")
    os.makedirs(os.path.dirname(FLAGS.output) or ".", exist_ok=True)


def run() -> NoReturn:
    program.run(main, __doc__)


if __name__ == "__main__":
    run()
