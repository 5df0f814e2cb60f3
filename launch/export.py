"""Writes a trained network, its batch normalization folded, for use without this project.

launch/export --workdir=runs/bn_x30 --output=model                              a SavedModel: image files to names
launch/export --workdir=runs/bn_x30 --format=onnx --output=model.onnx           images in [-1, 1] to logits
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the folder above has the packages, this one would hide others
    sys.path[0] = str(Path(__file__).parents[1])

import importlib.util
import os

from absl import flags

from bn_keras.errors import InputError
from bn_keras.run import RunDirectory
from launch import program, records

FLAGS = flags.FLAGS

flags.adopt_module_key_flags(records)
flags.DEFINE_string("workdir", None, "A run, at its newest step.", required=True)
flags.DEFINE_enum(
    "format", "saved_model", ["keras", "saved_model", "onnx"], "saved_model has its preprocessing inside."
)
flags.DEFINE_string("output", None, "The file, or of a SavedModel the folder, to write.", required=True)
flags.DEFINE_enum(
    "statistics",
    "moving",
    ["moving", "population"],
    "Batch normalization by moving averages, or by Algorithm 2 on --data_dir.",
)
flags.DEFINE_integer("statistics_steps", 100, "Training mini-batches that population statistics are taken over.", 1)


def main():
    check_output()
    directory = RunDirectory(FLAGS.workdir)
    config = directory.read_trained()
    class_names = directory.read_class_names()
    population_of = records.read_records() if FLAGS.statistics == "population" else None

    with program.loading_tensorflow():
        import numpy as np

        from bn_keras.export import export_saved_model
        from bn_keras.trained_network import image_view, load_network

    model = load_network(directory, population_of=population_of, population_steps=FLAGS.statistics_steps)
    match FLAGS.format:
        case "keras":
            model.save(FLAGS.output)
        case "saved_model":
            export_saved_model(model, image_view(config), class_names, FLAGS.output)
        case "onnx":
            model(np.zeros((1, *model.input_shape[1:]), "float32"))  # Keras refuses a model that was never called
            model.export(FLAGS.output, format="onnx", verbose=False)
    print(f"{FLAGS.format}: {os.path.abspath(FLAGS.output)}")


def check_output():
    """Whether the format can be written here and to that place."""
    if os.path.exists(FLAGS.output):
        raise InputError(f"{FLAGS.output} exists: give another --output, or remove it")
    if FLAGS.format == "keras" and not FLAGS.output.endswith(".keras"):
        raise InputError(f"--output={FLAGS.output} must end in .keras, by which Keras knows its format")
    missing = [name for name in ("onnx", "tf2onnx") if importlib.util.find_spec(name) is None]
    if FLAGS.format == "onnx" and missing:
        raise InputError(f"ONNX needs {' and '.join(missing)}: pip install onnx tf2onnx")
    os.makedirs(os.path.dirname(FLAGS.output) or ".", exist_ok=True)


def run():
    program.run(main, __doc__)


if __name__ == "__main__":
    run()
