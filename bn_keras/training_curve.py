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

from bn_keras.variants import PAPER_BATCH_SIZE

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


class TrainingCurve:
    """Rows of one run, in memory and on disk.

    Args:
      path: of the file; it is made when the first row is appended. A last line that a kill cut short is dropped.
    """

    def __init__(self, path: str):
        self.path = path
        self.rows = []
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                self.rows = [json.loads(line) for line in file if line.endswith("\n")]

    def append(self, row: dict):
        self.rows.append(row)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def sync(self):
        """Forces the rows to the disk, as must be before a checkpoint that counts on them."""
        if self.rows:
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def forget(self, step: int):
        """Forgets, in memory, what came after `step`."""
        self.rows = [row for row in self.rows if row["step"] <= step and row["kind"] != "diverged"]

    def truncate(self, step: int):
        """Forgets what came after `step`, where a run resumes, also on disk."""
        self.forget(step)
        temporary = self.path + ".tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)
        os.replace(temporary, self.path)

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

    def steps_to(self, accuracy: float) -> float | None:
        """Figure 3's middle column: steps of 32 images to the first evaluation that reaches `accuracy`, or None."""
        return next((step for step, reached in self.validation() if reached >= accuracy), None)

    def diverged(self) -> dict | None:
        """The row that says where and how the run diverged, or None."""
        return next((row for row in self.rows if row["kind"] == "diverged"), None)
