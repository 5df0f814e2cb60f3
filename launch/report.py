"""Draws Figure 2 of the paper, and writes Figure 3, from the runs in a folder.

launch/report --workdir=runs
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the folder above has the packages, this one would hide others
    sys.path[0] = str(Path(__file__).parents[1])

from typing import NoReturn

from absl import flags

from bn_keras import storage
from bn_keras.paper.figures_2_and_3 import write_report
from bn_keras.runs.run_directory import find_runs
from launch import program

FLAGS = flags.FLAGS

flags.DEFINE_string("workdir", "runs", "A run, or a folder with runs in it at any depth.")
flags.DEFINE_string("output_dir", None, "Folder of the report. Default: --workdir.")


def main() -> None:
    figure, table = write_report(find_runs(FLAGS.workdir), FLAGS.output_dir or FLAGS.workdir)
    print(storage.read(table).decode())
    print(f"Figure 2: {storage.absolute(figure)}")
    print(f"Figure 3: {storage.absolute(table)}")
    if not storage.is_remote(FLAGS.workdir):  # TensorBoard reads few kinds of buckets
        print(f"All curves: tensorboard --logdir={FLAGS.workdir}")


def run() -> NoReturn:
    program.run(main, __doc__)


if __name__ == "__main__":
    run()
