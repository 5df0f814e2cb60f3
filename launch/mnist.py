"""Section 4.1: three layers of sigmoids on binary MNIST, with and without Batch Normalization; draws Figure 1.

launch/mnist                                the embedded 5,000 digits, minutes on two cores
launch/mnist --data_dir=D                   full MNIST, or other gray images, as data_prep wrote them

The same command again continues where it stands.
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the folder above has the packages, this one would hide others
    sys.path[0] = str(Path(__file__).parents[1])

import os

from absl import flags

from bn_keras.input.dataset_formats import read_dataset
from bn_keras.paper.figure_1 import write_figure_1
from bn_keras.runs.run_directory import MNIST_CONFIG_FILE, RunDirectory
from launch import program
from launch.embedded import embedded_data

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "data_dir", None, "Folder that data_prep wrote, of gray images. Default: the embedded MNIST digits."
)
flags.DEFINE_string("workdir", os.path.join("runs", "mnist"), "Folder of this run and of Figure 1.")
flags.DEFINE_integer("steps", 50_000, "Steps to train both networks.", lower_bound=1)
flags.DEFINE_integer("batch_size", 60, "Images of one step.", lower_bound=2)
flags.DEFINE_float("learning_rate", 0.1, "Of plain SGD.", lower_bound=0.0)
flags.DEFINE_float("weight_deviation", 0.1, "Standard deviation of the Gaussian initial weights.", lower_bound=0.0)
flags.DEFINE_integer("seed", 0, "Of weights and order of examples.", 0, 2**31 - 1)
flags.DEFINE_integer("eval_every", 250, "Steps between points of the figure.", lower_bound=1)


def main():
    dataset = read_dataset(FLAGS.data_dir or embedded_data())

    # TensorFlow only now that the flags are known to be good: its import takes seconds.
    with program.loading_tensorflow():
        from bn_keras.paper.section_4_1 import MnistConfig, train

    config = MnistConfig(
        dataset=dataset.name,
        dataset_fingerprint=dataset.fingerprint,
        train_examples=dataset.examples("train"),
        test_examples=dataset.examples("validation"),
        **{
            name: FLAGS[name].value
            for name in ("steps", "batch_size", "learning_rate", "weight_deviation", "seed", "eval_every")
        },
    )
    directory = RunDirectory(FLAGS.workdir, MNIST_CONFIG_FILE)
    train(config, dataset, directory)
    figure, table = write_figure_1(directory, FLAGS.workdir)
    with open(table, encoding="utf-8") as file:
        print(file.read())
    print(f"Figure 1: {os.path.abspath(figure)}")


def run():
    program.run(main, __doc__, continues=True)


if __name__ == "__main__":
    run()
