"""Reproduces Section 4.1: trains sigmoid networks on binary MNIST with and without Batch Normalization, draws Figure 1.

launch/mnist                                on the embedded 5,000 digits; takes minutes on two cores
launch/mnist --data_dir=D                   on all of MNIST, or other gray images from data_prep

The same command again continues an interrupted run.
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the folder above has the packages, this one would hide others
    sys.path[0] = str(Path(__file__).parents[1])

import os
from typing import NoReturn

from absl import flags

from bn_keras import storage
from bn_keras.input.dataset_formats import read_dataset
from bn_keras.input.shard_cache import on_this_machine
from bn_keras.paper.figure_1 import write_figure_1
from bn_keras.paper.mnist_config import MnistConfig
from bn_keras.runs.run_directory import RunDirectory
from launch import config_flags, program
from launch.embedded import embedded_data

FLAGS = flags.FLAGS

flags.DEFINE_string("data_dir", None, "Folder of gray images that data_prep wrote. Default: the embedded MNIST digits.")
flags.DEFINE_string("workdir", os.path.join("runs", "mnist"), "Folder of this run and of Figure 1.")
config_flags.define(MnistConfig)


def main() -> None:
    dataset = read_dataset(FLAGS.data_dir or embedded_data())

    # TensorFlow is imported only after the flags are known to be good, as that takes seconds.
    with program.loading_tensorflow():
        from bn_keras.paper.section_4_1 import train

    config = MnistConfig(
        dataset=dataset.name,
        dataset_fingerprint=dataset.fingerprint,
        train_examples=dataset.examples("train"),
        test_examples=dataset.examples("validation"),
        **config_flags.given(MnistConfig),
    )
    directory = RunDirectory(FLAGS.workdir, MnistConfig)
    train(config, on_this_machine(dataset), directory)
    figure, table = write_figure_1(directory, FLAGS.workdir)
    print(storage.read(table).decode())
    print(f"Figure 1: {storage.absolute(figure)}")


def run() -> NoReturn:
    program.run(main, __doc__, continues=True)


if __name__ == "__main__":
    run()
