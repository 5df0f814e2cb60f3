"""The curve of a run on disk, its loss and accuracy by step, and the columns of Figure 3; standard library only.

A curve is a file of JSON lines, one row for each event, in the order of steps:

    {"kind": "training", "step": 50, "examples": 1600, "learning_rate": 0.0075, "loss": 0.91, "accuracy": 0.71, ...}
    {"kind": "validation", "step": 50, "examples": 1600, "top1": 823, "top5": 990, "of": 1000, ...}
    {"kind": "diverged", "step": 61, "examples": 1952, "reason": "the loss is nan", ...}

Rows of the kinds "ema" and "population" are validations with averaged weights and with population statistics; rows of
the kind "monitor" are for Figure 1. Every row ends with `wall_time`, in seconds since 1970, and training rows have the
fields of `MEASURED`. All other fields depend only on the run's configuration, however often it was interrupted.
"""

import json
import os

from bn_keras import storage
from bn_keras.json_files import COUNT, NUMBER, TEXT, list_of, map_of, read_json_lines
from bn_keras.networks.variants import PAPER_BATCH_SIZE
from bn_keras.runs.run_files import note, replacing

FILE = "curve.jsonl"

MEASURED = (
    "images_per_second",
    "images_per_second_per_device",
    "input_wait",
    "step_seconds_p50",
    "step_seconds_p90",
    "step_seconds_p99",
    "peak_host_bytes",
    "peak_gpu_bytes",
    "wall_time",
)
"""Fields that are times or memory, and so differ from run to run."""

_COUNTED = ("validation", "ema", "population", "test")  # "test" is Section 4.1's
_COUNTS = ["examples", "top1", "of"]
_THREE = {"minItems": 3, "maxItems": 3}  # Figure 1's percentiles
_LOOKS = map_of(list_of(NUMBER, **_THREE))
_UNITS = list_of(NUMBER, minItems=100, maxItems=100)
_ROW = {
    "type": "object",
    "required": ["kind", "step"],
    "properties": {
        "kind": {"enum": ["training", "monitor", "diverged", *_COUNTED]},
        **dict.fromkeys(("step", "examples", "top1", "top5"), COUNT),
        "of": {**COUNT, "minimum": 1},
        **dict.fromkeys(("learning_rate", "loss", "accuracy", *MEASURED), NUMBER),
        "reason": TEXT,
        "network": {"enum": ["without_bn", "with_bn"]},
        "percentiles": {"type": "array", **_THREE},
        "layers": map_of(_LOOKS),
    },
    "allOf": [
        {"if": {"properties": {"kind": {"const": kind}}}, "then": fields}
        for kind, fields in {
            **{counted: {"required": _COUNTS} for counted in _COUNTED[:-1]},
            "test": {
                "required": [*_COUNTS, "network", "percentiles"],
                "properties": {"percentiles": {"items": _UNITS}},
            },
            "monitor": {"required": ["percentiles", "layers"]},
        }.items()
    ],
}
"""The fields that this project needs in a row; it may have more."""


class TrainingCurve:
    """Rows of one run, in memory and on disk.

    Args:
      path: the path of the file, which the first appended row creates. A last line that a kill cut short is ignored;
        any other line that is no row is left out and named.
    """

    def __init__(self, path: str):
        self.path = path
        self.rows = []
        if storage.exists(path):
            self.rows, damaged = read_json_lines(path, _ROW)
            if damaged:
                others = f", nor are {len(damaged) - 1} others" if len(damaged) > 1 else ""
                note(f"{path}: line {damaged[0]} is no row of a curve{others}: left out")

    def append(self, row: dict) -> None:
        """Adds a row. In a bucket, where files cannot grow, it appears with the next `sync`."""
        self.rows.append(row)
        if not storage.is_remote(self.path):
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def sync(self) -> None:
        """Forces the rows to the disk, or into the bucket, before a checkpoint of the same step is written."""
        if storage.is_remote(self.path):
            self._write()
        elif self.rows:
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def forget(self, step: int) -> None:
        """Removes the rows after `step`, in memory only."""
        self.rows = [row for row in self.rows if row["step"] <= step and row["kind"] != "diverged"]

    def truncate(self, step: int) -> None:
        """Removes the rows after `step`, from which a run resumes, also on disk."""
        self.forget(step)
        self._write()

    def _write(self):
        with replacing(self.path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)

    def last_step(self) -> int:
        """The step of the latest row; 0 without rows."""
        return max((row["step"] for row in self.rows), default=0)

    def validation(self) -> list[tuple[float, float]]:
        """The points of Figure 2: (steps of 32 images, top-1 accuracy as a fraction)."""
        return [
            (row["examples"] / PAPER_BATCH_SIZE, row["top1"] / row["of"])
            for row in self.rows
            if row["kind"] == "validation"
        ]

    def max_accuracy(self) -> float | None:
        """The best top-1 accuracy, Figure 3's last column; None before the first evaluation."""
        return max((accuracy for _, accuracy in self.validation()), default=None)

    def best(self, step: int) -> tuple[int, float] | None:
        """(step, top-1 accuracy) of the best evaluation up to a step; None before the first."""
        rows = [row for row in self.rows if row["kind"] == "validation" and row["step"] <= step]
        best = max(rows, key=lambda row: row["top1"] / row["of"], default=None)
        return None if best is None else (best["step"], best["top1"] / best["of"])

    def stalled(self, patience: int, step: int) -> str:
        """Why a run ends at a step, after `patience` evaluations in a row without a better one, in words.

        "" where it does not end, and never by a patience of 0.
        """
        if (best := self.best(step)) is None:
            return ""
        since = [row for row in self.rows if row["kind"] == "validation" and best[0] < row["step"] <= step]
        if not 0 < patience <= len(since):
            return ""
        return f"no evaluation since step {best[0]} was better"

    def steps_to(self, accuracy: float) -> float | None:
        """Figure 3's middle column: steps of 32 images to the first evaluation that reaches `accuracy`, or None."""
        return next((step for step, reached in self.validation() if reached >= accuracy), None)

    def diverged(self) -> dict | None:
        """The row that says where and how the run diverged, or None."""
        return next((row for row in self.rows if row["kind"] == "diverged"), None)
