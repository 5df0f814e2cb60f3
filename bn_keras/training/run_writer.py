"""Writes a run's files while it trains: its curve, TensorBoard's events, checkpoints and model; shows its progress."""

import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import keras
from PIL import Image

from bn_keras import storage
from bn_keras.input.bad_records import SkippedRecords
from bn_keras.progress import Progress
from bn_keras.runs import checkpoint
from bn_keras.runs.run_config import RunConfig
from bn_keras.runs.run_directory import RunDirectory
from bn_keras.runs.run_files import note, replacing, seal
from bn_keras.training.tensorboard import TensorBoardWriter
from bn_keras.training.trackers import Trackers


class RunRecord:
    """Writes the directory of a run.

    All worker processes keep the rows, so that they agree on what is due; only one writes.

    Args:
      config: the run's configuration.
      directory: the run's directory; if this process writes, its `open` has been called.
      step: the step at which the run starts or continues; rows of later steps are removed.
      writes: whether this process is the one that writes.
      skipped: the records that were left out, for the progress line.
      trackers: the names of the experiment trackers that are told the rows.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory[RunConfig],
        step: int,
        writes: bool = True,
        skipped: SkippedRecords | None = None,
        trackers: Collection[str] = (),
    ):
        self._directory = directory
        self._curve = directory.curve
        self._writes = writes
        self._picture_folder = os.path.join(directory.path, "pictures")
        if writes:
            self._curve.truncate(step)
            self._board = TensorBoardWriter(directory.path, config.flat(), self._curve.rows)
            self._restore_pictures(step)
            self._trackers = Trackers(directory.path, config.flat(), trackers)
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

    def add_pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        """Saves pictures as `pictures/NAME-STEP.png`, and adds them to TensorBoard."""
        if self._writes:
            storage.make_folder(self._picture_folder)
            for name, picture in pictures.items():
                with replacing(os.path.join(self._picture_folder, f"{name}-{step:08d}.png")) as temporary:
                    picture.save(temporary)
                    png = Path(temporary).read_bytes()
                self._board.add_picture(name, step, png, time.time())

    def _restore_pictures(self, step):
        """Adds the saved pictures to TensorBoard's new event file; removes those of later steps."""
        times = {row["step"]: row.get("wall_time", 0.0) for row in self._curve.rows if row["kind"] == "validation"}
        for file in sorted(storage.files(self._picture_folder)):
            name, _, number = file.removesuffix(".png").rpartition("-")
            path = os.path.join(self._picture_folder, file)
            if number.isdecimal() and int(number) > step:
                storage.remove(path)
            elif number.isdecimal():
                try:
                    self._board.add_picture(name, int(number), storage.read(path), times.get(int(number), 0.0))
                except Exception as error:  # whatever Pillow raises for damaged bytes
                    note(f"{path} is damaged ({error}): left out")

    def steps_of(self, kind: str) -> list[int]:
        """The steps that have a row of this kind."""
        return [row["step"] for row in self._curve.rows if row["kind"] == kind]

    def save(self, step: int, arrays: dict, best: int) -> None:
        """Writes a checkpoint, after the rows before it; the last two are kept, and the best one, of the step `best`.

        A best one is removed only after a checkpoint that knows the next: a run killed in between restarts before it.
        """
        if self._writes:
            self._curve.sync()
            checkpoint.save(self._directory.path, step, arrays, self._directory.texts, best)
            self._board.flush()
            self._trackers.tell(self._curve.rows)

    def save_best(self, step: int, arrays: dict) -> None:
        """Writes the checkpoint of the best evaluation."""
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
        """Writes the trained model; first removes checkpoints that a kill may have left over."""
        if self._writes:
            checkpoint.keep(self._directory.path, step, best)
            with replacing(self._directory.model_path) as temporary:
                model.save(temporary)
                seal(temporary, step)

    def close(self, message: str) -> None:
        """Says how the run ended."""
        if self._writes:
            self._curve.sync()
            self._board.close()
            self._trackers.close()
            self._progress.close(message)
