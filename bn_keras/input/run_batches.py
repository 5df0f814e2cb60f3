"""What a run's network is fed in training and evaluation: the pipeline with the arguments of its configuration."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from bn_keras.input.bad_records import SkippedRecords
from bn_keras.input.dataset import Dataset
from bn_keras.input.pipeline import naming_damage, training_batches, validation_batches
from bn_keras.runs.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class RunBatches:
    """The mini-batches of one run.

    Attributes:
      config: of the run.
      dataset: that it trains on, or another of the same classes to evaluate it on.
      skipped: takes note of every record that cannot be used and is left out; None: such a record is an error.
      data_service: addresses of `launch/data_service`, separated by commas, that prepare the training batches.
    """

    config: RunConfig
    dataset: Dataset
    skipped: SkippedRecords | None = None
    data_service: str | None = None

    def training(self, examples: int, *, hosts: int = 1, host: int = 0, **changes: Any) -> tf.data.Dataset:
        """A host's share of `training_batches`, from where `examples` examples were seen.

        Args:
          changes: of the run's own arguments of `training_batches`.
        """
        arguments = self.config.training_arguments(examples) | changes
        return training_batches(
            self.dataset, skipped=self.skipped, data_service=self.data_service, hosts=hosts, host=host, **arguments
        )

    def evaluation(
        self, *, hosts: int = 1, host: int = 0, view: Callable | None = None, **changes: Any
    ) -> tf.data.Dataset:
        """A host's share of `validation_batches`; `view` in place of the run's own, `changes` of its arguments."""
        arguments = self.config.evaluation_arguments() | changes
        return validation_batches(self.dataset, skipped=self.skipped, hosts=hosts, host=host, view=view, **arguments)

    @contextlib.contextmanager
    def naming_damage(self, split: str) -> Iterator[None]:
        """Turns TensorFlow's error about a record of a split into one that names the file and the record."""
        with naming_damage(self.dataset, split):
            yield
