"""The accuracy curve of a run on disk, and Figure 3's columns read off it; standard library only.

A curve is a file of JSON lines, one row an event, in order of steps:

    {"kind": "training", "step": 50, "examples": 1600, "learning_rate": 0.0075, "loss": 0.91, "accuracy": 0.71, ...}
    {"kind": "validation", "step": 50, "examples": 1600, "top1": 823, "top5": 990, "of": 1000, ...}
    {"kind": "diverged", "step": 61, "examples": 1952, "reason": "the loss is nan", ...}

Rows of kind "ema" and "population" are validations with averaged weights and with population statistics, those of kind
"monitor" are Figure 1's. Every row ends with `wall_time` (seconds since 1970), and training rows hold what is listed in
`MEASURED`; all other fields are a function of the run's configuration, the same however often it was interrupted.
"""

import json
import os

from bn_keras.json_files import COUNT, NUMBER, TEXT, read_json_lines
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
"""Fields that are times, or memory, and so different in every run."""

_COUNTED = ("validation", "ema", "population", "test")  # "test" is Section 4.1's
_COUNTS = ["examples", "top1", "of"]
_THREE = {"minItems": 3, "maxItems": 3}  # Figure 1's percentiles
_LOOKS = {"type": "object", "additionalProperties": {"type": "array", "items": NUMBER, **_THREE}}
_UNITS = {"type": "array", "items": NUMBER, "minItems": 100, "maxItems": 100}
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
        "layers": {"type": "object", "additionalProperties": _LOOKS},
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
"""What a row must have for this project's readers; it may have more."""


class TrainingCurve:
    """Rows of one run, in memory and on disk.

    Args:
      path: of the file; it is made when the first row is appended. A last line that a kill cut short is dropped, and
        a line that is no row is left out and named.
    """

    def __init__(self, path: str):
        self.path = path
        self.rows = []
        if os.path.lexists(path):
            self.rows, damaged = read_json_lines(path, _ROW)
            if damaged:
                others = f", nor are {len(damaged) - 1} others" if len(damaged) > 1 else ""
                note(f"{path}: line {damaged[0]} is no row of a curve{others}: left out")

    def append(self, row: dict) -> None:
        self.rows.append(row)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def sync(self) -> None:
        """Forces the rows to the disk, as must be before a checkpoint that counts on them."""
        if self.rows:
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def forget(self, step: int) -> None:
        """Forgets, in memory, what came after `step`."""
        self.rows = [row for row in self.rows if row["step"] <= step and row["kind"] != "diverged"]

    def truncate(self, step: int) -> None:
        """Forgets what came after `step`, where a run resumes, also on disk."""
        self.forget(step)
        with replacing(self.path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)

    def validation(self) -> list[tuple[float, float]]:
        """Points (steps of 32 images, top-1 accuracy as a fraction), the axes of Figure 2."""
        return [
            (row["examples"] / PAPER_BATCH_SIZE, row["top1"] / row["of"])
            for row in self.rows
            if row["kind"] == "validation"
        ]

    def max_accuracy(self) -> float | None:
        """Figure 3's last column; None before the first evaluation."""
        return max((accuracy for _, accuracy in self.validation()), default=None)

    def best(self, step: int) -> tuple[int, float] | None:
        """(its step, top-1 accuracy) of the best evaluation up to a step; None before the first."""
        rows = [row for row in self.rows if row["kind"] == "validation" and row["step"] <= step]
        best = max(rows, key=lambda row: row["top1"] / row["of"], default=None)
        return None if best is None else (best["step"], best["top1"] / best["of"])

    def steps_to(self, accuracy: float) -> float | None:
        """Figure 3's middle column: steps of 32 images to the first evaluation that reaches `accuracy`, or None."""
        return next((step for step, reached in self.validation() if reached >= accuracy), None)

    def diverged(self) -> dict | None:
        """The row that says where and how the run diverged, or None."""
        return next((row for row in self.rows if row["kind"] == "diverged"), None)
