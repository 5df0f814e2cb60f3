"""Mistakes, one in each line that says so, which mypy and pyright refuse. Never run."""

# ruff: noqa

import bn_keras
from bn_keras import BatchNormalization, build_network, population_statistics, read_dataset
from bn_keras import bulid_network  # mistake

bn_keras.batch_normalisation  # mistake
BatchNormalization(momentum="high")  # mistake
BatchNormalization(momentun=0.9)  # mistake
build_network(5)  # mistake
population_statistics(build_network("bn_x5"), [], estimator="polled")  # mistake
read_dataset("data", classes="ten")  # mistake
read_dataset("data").examples("train").lower()  # mistake
