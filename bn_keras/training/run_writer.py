"""What a run leaves behind while it trains: its curve, TensorBoard's events, checkpoints, progress, the model."""

import time
from typing import Any

import keras

from bn_keras.input.bad_records import SkippedRecords
from bn_keras.progress import Progress
from bn_keras.runs import checkpoint
from bn_keras.runs.run_config import RunConfig
from bn_keras.runs.run_directory import RunDirectory
from bn_keras.runs.run_files import replacing, seal
from bn_keras.training.tensorboard import TensorBoardWriter


class RunRecord:
    """Writes the directory of a run.

    Of several worker processes all keep the rows, so that they agree, and one writes.

    Args:
      config: of the run.
      directory: of the run; `open` was called where this process writes.
      step: where the run starts or goes on; what the directory holds of later steps is forgotten.
      writes: whether this process is the one that writes.
      skipped: records left out, for the progress.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory[RunConfig],
        step: int,
        writes: bool = True,
        skipped: SkippedRecords | None = None,
    ):
        self._directory = directory
        self._curve = directory.curve
        self._writes = writes
        if writes:
            self._curve.truncate(step)
            self._board = TensorBoardWriter(directory.path, config.flat(), self._curve.rows)
            self._progress = Progress(config.builder or config.variant.name, config.steps, skipped)
        else:
            self._curve.forget(step)

    def add(self, kind: str, step: int, examples: int, **fields: Any) -> None:
        """Adds a row to the curve and to TensorBoard."""
        row = {"kind": kind, "step": step, "examples": examples, **fields, "wall_time": time.time()}
        if self._writes:
            self._curve.append(row)
            self._board.add(row)
        else:
            self._curve.rows.append(row)

    def steps_of(self, kind: str) -> list[int]:
        """The steps that have a row of a kind."""
        return [row["step"] for row in self._curve.rows if row["kind"] == kind]

    def save(self, step: int, arrays: dict, best: int) -> None:
        """Writes a checkpoint, after what it counts on; a run keeps the last two, and that of the step `best`.

        One best is dropped only when a checkpoint knows of the next, as a kill between the two goes on from before.
        """
        if self._writes:
            self._curve.sync()
            checkpoint.save(self._directory.path, step, arrays, self._directory.texts, best)
            self._board.flush()

    def save_best(self, step: int, arrays: dict) -> None:
        """Writes the checkpoint of the best evaluation, after its row."""
        if self._writes:
            self._curve.sync()
            checkpoint.save_best(self._directory.path, step, arrays, self._directory.texts)

    def progressed(self, step: int) -> None:
        if self._writes:
            self._progress.update(step)

    def evaluated(self, step: int, accuracy: float) -> None:
        if self._writes:
            self._progress.evaluated(step, accuracy)

    def save_model(self, step: int, model: keras.Model, best: int) -> None:
        """Writes the model that the run ended with, after a last look at what is kept: a kill may have left more."""
        if self._writes:
            checkpoint.keep(self._directory.path, step, best)
            with replacing(self._directory.model_path) as temporary:
                model.save(temporary)
                seal(temporary, step)

    def close(self, message: str) -> None:
        """Says how the run ended."""
        if self._writes:
            self._board.close()
            self._progress.close(message)
