"""The mini-batches of a run, for training and evaluation: the input pipeline with the run's configuration."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal

import tensorflow as tf

from bn_keras.input.bad_records import SkippedRecords
from bn_keras.input.dataset import Dataset
from bn_keras.input.options import InputOptions
from bn_keras.input.pipeline import training_batches, validation_batches
from bn_keras.input.records import naming_damage
from bn_keras.runs.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class RunBatches:
    """The mini-batches of one run.

    Attributes:
      config: the run's configuration.
      dataset: the data set that the run trains on, or another one of the same classes to evaluate it on.
      skipped: takes note of each record that cannot be used, which is then left out; None: such a record is an error.
      data_service: addresses of `launch/data_service`, separated by commas, that prepare the training batches.
    """

    config: RunConfig
    dataset: Dataset
    skipped: SkippedRecords | None = None
    data_service: str | None = None

    def training(
        self, examples: int, *, hosts: int = 1, host: int = 0, distort_on: Literal["host", "device"] | None = None
    ) -> tf.data.Dataset:
        """A host's share of `training_batches`, as they follow after `examples` examples.

        Args:
          examples: how many examples the run has seen.
          hosts, host: as in `training_batches`.
          distort_on: takes the place of the run's setting.
        """
        return training_batches(
            self.dataset,
            self._options(distort_on or self.config.distort_on),
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start_step=self.config.start_step(examples),
            hosts=hosts,
            host=host,
            data_service=self.data_service,
            skipped=self.skipped,
        )

    def evaluation(
        self, *, hosts: int = 1, host: int = 0, batch_size: int | None = None, view: Callable | None = None
    ) -> tf.data.Dataset:
        """A host's share of `validation_batches`; `batch_size` and `view` take the place of the run's own."""
        return validation_batches(
            self.dataset,
            self._options("host"),
            batch_size=batch_size or self.config.eval_batch_size,
            hosts=hosts,
            host=host,
            view=view,
            skipped=self.skipped,
        )

    def _options(self, distort_on):
        config, variant = self.config, self.config.variant
        return InputOptions(
            image_size=config.image_size,
            augmentation=config.augmentation,
            shuffling=variant.shuffling,
            photometric_distortion=variant.photometric_distortion,
            distort_on=distort_on,
            rand_augment=config.rand_augment,
        )

    @contextlib.contextmanager
    def naming_damage(self, split: str) -> Iterator[None]:
        """Turns TensorFlow's error about a record of a split into one that names the file and the record."""
        with naming_damage(self.dataset, split):
            yield
