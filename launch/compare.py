"""Compares variants: trains them side by side, draws their training curves (Figure 2) and writes Figure 3.

launch/compare                                          the paper's seven, on the embedded digits
launch/compare --variants=inception,bn_x5 --data_dir=D  two, on your own records
launch/compare --train_flags=steps=100,seed=1           the seven, for fewer steps and from another seed

The same command again continues; finished runs are not repeated.
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the folder above has the packages, this one would hide others
    sys.path[0] = str(Path(__file__).parents[1])

import os
from typing import NoReturn

from absl import flags

from bn_keras.errors import InputError
from bn_keras.input.dataset_formats import read_dataset
from bn_keras.networks.variants import VARIANTS
from bn_keras.paper.experiments import FIGURE_2_VARIANTS
from launch import jobs, program, report
from launch.embedded import embedded_data

FLAGS = flags.FLAGS

flags.DEFINE_list("variants", list(FIGURE_2_VARIANTS), "Variants to train.")
flags.register_validator("variants", bool, "must name at least one variant")
flags.DEFINE_string("data_dir", None, "Folder of records. Default: the embedded digits.")
flags.adopt_module_key_flags(jobs)
flags.adopt_module_key_flags(report)


def main() -> int:
    if unknown := [name for name in FLAGS.variants if name not in VARIANTS]:
        raise InputError(f"--variants={unknown[0]}: the variants are {', '.join(VARIANTS)}")
    data_dir = FLAGS.data_dir or embedded_data()
    training = jobs.train_flags()
    config = jobs.config_of(read_dataset(data_dir), FLAGS.variants[0], training)
    shared = {"data_dir": data_dir, "on_divergence": "record", **training}

    def command(variant: str) -> list[str]:
        own = {"variant": variant, "workdir": os.path.join(FLAGS.workdir, variant)}
        return ["launch.train", *(f"--{name}={value}" for name, value in (own | shared).items())]

    all_jobs = [(variant, iter([command(variant)])) for variant in dict.fromkeys(FLAGS.variants)]
    if status := jobs.run_side_by_side(all_jobs, jobs.jobs_of(config)):
        return status
    report.main()
    return 0


def run() -> NoReturn:
    program.run(main, __doc__, continues=True)


if __name__ == "__main__":
    run()
