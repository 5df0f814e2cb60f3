"""The experiments behind docs/results.md as a table of runs; standard library only.

Every run is a launcher with flags, so that each can be started alone. `launch/results --dry_run` lists all of them with
their cost.
"""

import dataclasses
import itertools
import math
import os
import statistics
from collections.abc import Iterator
from typing import Any

from bn_keras.networks.variants import PAPER_BATCH_SIZE, VARIANTS
from bn_keras.paper.mnist_config import MnistConfig
from bn_keras.runs.run_config import RunConfig
from bn_keras.runs.run_directory import RunDirectory
from bn_keras.runs.training_curve import TrainingCurve

FIGURE_2_VARIANTS = (
    "inception",
    "bn_baseline",
    "bn_x5",
    "bn_x30",
    "bn_x5_sigmoid",
    "inception_x5",
    "inception_sigmoid",
)

CHANGES = {
    "learning_rate": "1. Learning rate x5",
    "dropout": "2. No Dropout",
    "l2_weight": "3. L2 weight / 5",
    "decay_epochs": "4. Decay 6 times faster",
    "local_response_normalization": "5. No local response normalization",
    "shuffling": "6. More thorough shuffling",
    "photometric_distortion": "7. Weaker photometric distortion",
}
"""The seven changes of Section 4.2.1: the field of `Variant` that each one changes between BN-Baseline and BN-x5."""

BATCH_SIZES = (2, 4, 8, 16, 32, 64, 128, 256)

STATISTICS: dict[str, tuple[str, dict[str, Any]]] = {
    "replica": ("One device, its whole batch", {"normalization_batch": "replica"}),
    "virtual": ("One device, groups of 32", {"normalization_batch": "32"}),
    "two_replicas": (
        "Two devices, each its half",
        {"normalization_batch": "replica", "strategy": "mirrored", "devices": 2},
    ),
    "synchronized": (
        "Two devices, synchronized",
        {"normalization_batch": "global", "strategy": "mirrored", "devices": 2},
    ),
}
"""What batch statistics are taken over: a title and flags for each choice."""

RATE_FACTORS = (5, 10, 20, 50, 100, 200)
"""Factors on the learning rate of BN-Baseline and Inception, to find which of the two diverges first."""

_FLAT_EVALUATIONS = 3
_MOST_EXTENSIONS = 10
_DIVERGENCE_STEPS = 150
_EARLY_STEPS, _EARLY_EVALUATION, _EARLY_BATCHES = 100, 10, 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """One run of an experiment.

    Attributes:
      section: the section of the document, also a folder in the working directory.
      name: the run's folder in the section's folder.
      program: "train" or "mnist".
      flags: the program's flags.
      steps: how many of its own mini-batches the run takes.
      until_flat: whether the run is extended, each time by as many steps again, until its curve is `flat`.
    """

    section: str
    name: str
    program: str
    flags: dict
    steps: int
    until_flat: bool = False

    def directory(self, workdir: str) -> RunDirectory:
        configuration = MnistConfig if self.program == "mnist" else RunConfig
        return RunDirectory(os.path.join(workdir, self.section, self.name), configuration)

    def to_do(self, workdir: str) -> range:
        """The steps with which the run starts or continues; an empty range if it is done or has diverged."""
        directory = self.directory(workdir)
        # Checkpoints come first: a kill may leave a row without its checkpoint. Someone may have removed those of a
        # finished run; its curve then says what was done.
        curve, done = directory.curve, directory.newest_step()
        if done is None:
            done = curve.last_step()
        if curve.diverged():
            return range(done, done)
        if done < self.steps:
            return range(done, self.steps)
        if not self.until_flat or flat(curve, self.steps) or done >= _MOST_EXTENSIONS * self.steps:
            return range(done, done)
        return range(done, (done // self.steps + 1) * self.steps)

    def work(self, steps: range) -> float:
        """The work of some steps, in training images of the small Inception; evaluations are not counted."""
        # A step of Section 4.1's small networks costs about as much as 0.2 of those images.
        return len(steps) * (0.2 if self.program == "mnist" else self.flags["batch_size"])

    def arguments(self, workdir: str, steps: int) -> list[str]:
        """The flags on the program's command line."""
        flags = {**self.flags, "steps": steps, "workdir": self.directory(workdir).path}
        return [_flag(name, value) for name, value in flags.items()]

    def step_seconds(self, workdir: str) -> float | None:
        """The median seconds of a step so far, evaluations included; None if there are fewer than two rows."""
        rows = self.directory(workdir).curve.rows
        rows = [row for row in rows if row["kind"] in ("training", "test") and "wall_time" in row]
        pairs = [(one, two) for one, two in itertools.pairwise(rows) if two["step"] > one["step"]]
        seconds = [(two["wall_time"] - one["wall_time"]) / (two["step"] - one["step"]) for one, two in pairs]
        return statistics.median(seconds) if seconds else None


def flat(curve: TrainingCurve, steps: int) -> bool:
    """Whether a curve has become flat: three evaluations in a row without a gain beyond noise.

    An evaluation here is the best of a quarter of `steps`; noise is one standard error of a share of the validation
    images, sqrt(p (1 - p) / n).
    """
    best = {}
    for row in curve.rows:
        if row["kind"] == "validation":
            quarter = math.ceil(4 * row["step"] / steps)
            best[quarter] = max(best.get(quarter, 0.0), row["top1"] / row["of"])
            images = row["of"]
    points = [best[quarter] for quarter in sorted(best)]
    if len(points) <= _FLAT_EVALUATIONS:
        return False
    before = max(points[:-_FLAT_EVALUATIONS])
    return max(points[-_FLAT_EVALUATIONS:]) <= before + math.sqrt(before * (1 - before) / images)


def _flag(name, value):
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no{name}"
    return f"--{name}={value}"


def _training(section, name, variant, steps, *, batch_size=PAPER_BATCH_SIZE, until_flat=False, **flags):
    """A run of `launch/train` over `steps * 32` images, at any batch size."""
    flags = {"variant": variant, "batch_size": batch_size, "on_divergence": "record", **flags}
    steps = steps * PAPER_BATCH_SIZE // batch_size
    return Experiment(section=section, name=name, program="train", flags=flags, steps=steps, until_flat=until_flat)


def plan(
    seeds: list[int],
    steps: int,
    eval_every: int,
    mnist_steps: int,
    *,
    gray: bool,
    data_dir: str | None = None,
    **training: str,
) -> list[Experiment]:
    """All runs, the most important ones first.

    Args:
      seeds: the seeds of Figures 1 and 2, the seven changes and the batch sizes; other sections take the first seed.
      steps: the steps, of 32 images each, of a run; those of Figure 2 are then extended until their curves are flat.
      eval_every: steps of 32 images between evaluations.
      mnist_steps: the steps, of 60 images each, of a run of Figure 1.
      gray: whether the images are gray; Section 4.1 needs gray ones.
      data_dir: the records for all runs; None for the embedded digits.
      training: flags for every run of `launch/train`, such as `width="0.5"`.
    """
    data = {"data_dir": data_dir} if data_dir else {}
    shared = {"mnist": data, "train": {**training, **data}}
    runs = _runs(seeds, steps, eval_every, mnist_steps, gray)
    return [dataclasses.replace(run, flags={**shared[run.program], **run.flags}) for run in runs]


def _runs(seeds, steps, eval_every, mnist_steps, gray) -> Iterator[Experiment]:
    """The runs of `plan`, without the flags that they share."""
    flags: dict[str, Any]
    first, every = {"seed": seeds[0]}, {"eval_every": eval_every}
    for seed in seeds if gray else ():
        name = f"mnist-{seed}"
        yield Experiment(section="figure1", name=name, program="mnist", flags={"seed": seed}, steps=mnist_steps)
    for seed in seeds:
        for name in FIGURE_2_VARIANTS:
            yield _training("figure2", f"{name}-{seed}", name, steps, until_flat=True, seed=seed, **every)
    for seed in seeds:
        for field in CHANGES:
            change = {field: getattr(VARIANTS["bn_x5"], field)}
            yield _training("changes", f"{field}-{seed}", "bn_baseline", steps, **change, seed=seed, **every)
    for factor in RATE_FACTORS:
        for name in ("inception", "bn_baseline"):
            flags = {"learning_rate": VARIANTS[name].learning_rate * factor, **first}
            flags["eval_every"] = min(_DIVERGENCE_STEPS, eval_every)
            yield _training("divergence", f"{name}-x{factor}", name, _DIVERGENCE_STEPS, **flags)
    flags = {**first, "eval_every": _EARLY_EVALUATION, "population_statistics": _EARLY_BATCHES}
    yield _training("early", f"bn_x5-{seeds[0]}", "bn_x5", _EARLY_STEPS, **flags)
    for seed in seeds:
        for kind, (_, over) in STATISTICS.items():
            for batch in BATCH_SIZES:
                # Groups of 32 differ from the batch only above 32; a device needs two images.
                if (kind == "virtual" and batch <= PAPER_BATCH_SIZE) or (batch < 4 and "devices" in over):
                    continue
                flags = {"seed": seed, "eval_every": max(1, eval_every * PAPER_BATCH_SIZE // batch), **over}
                yield _training("batch_size", f"{kind}-{batch}-{seed}", "bn_x5", steps, batch_size=batch, **flags)
