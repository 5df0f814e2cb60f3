"""Classifies your pictures with a trained network, or an ensemble of several: prints the five most probable classes.

launch/predict cat.jpg dog.png --workdir=runs/bn_x30
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the folder above has the packages, this one would hide others
    sys.path[0] = str(Path(__file__).parents[1])

from typing import NoReturn

from absl import flags

from bn_keras.errors import InputError
from bn_keras.json_files import read_bytes
from bn_keras.runs.run_directory import RunDirectory
from data_prep.program import escaped
from launch import program

FLAGS = flags.FLAGS

flags.DEFINE_list(
    "workdir",
    None,
    "Folder of a run, whose newest step is used; several, separated by commas, are an ensemble.",
    required=True,
)
flags.DEFINE_enum(
    "protocol",
    "single_crop",
    ["single_crop", "multicrop144"],
    "Crops of each image: one, or the mean over 144.",
)

SHOWN = 5


def main(paths: list[str]) -> None:
    images = {path: read_bytes(path, "give a smaller picture") for path in paths}
    directories = [RunDirectory(path) for path in FLAGS.workdir]
    configs = [directory.read_trained() for directory in directories]
    class_names = directories[0].read_class_names()
    for directory in directories[1:]:
        if directory.read_class_names() != class_names:
            raise InputError(f"{directory.path} and {directories[0].path} know different classes")

    with program.loading_tensorflow():
        import tensorflow as tf

        from bn_keras.evaluation.accuracy import class_probabilities
        from bn_keras.evaluation.trained_network import image_view, load_network
        from bn_keras.input.image_header import why_unreadable
        from bn_keras.input.preprocessing import to_network_range

    crops = 144 if FLAGS.protocol == "multicrop144" else 1

    def views(path, encoded):
        """A picture's view for each network, as a batch of one."""
        try:
            pixels = [image_view(config, crops)(encoded) for config in configs]
        except tf.errors.InvalidArgumentError:
            raise InputError(f"{path} is {why_unreadable(encoded)}") from None
        return tf.nest.map_structure(lambda values: to_network_range(values)[None], pixels)

    shown = {path: views(path, encoded) for path, encoded in images.items()}
    models = [load_network(directory) for directory in directories]
    for path, batches in shown.items():
        each = [class_probabilities([model], batch)[0, 0] for model, batch in zip(models, batches, strict=True)]
        best = tf.math.top_k(tf.reduce_mean(tf.stack(each), 0), min(SHOWN, len(class_names)))
        print(escaped(path, line=True))
        for probability, index in zip(best.values.numpy(), best.indices.numpy(), strict=True):
            print(f"  {probability:6.2%}  {class_names[index]}")


def run() -> NoReturn:
    program.run(main, __doc__, takes_arguments=True)


if __name__ == "__main__":
    run()
