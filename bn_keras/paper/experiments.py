"""The experiments behind docs/results.md as a table of runs; standard library only.

Every run is a launcher with flags, so that any of them can be had alone; `launch/results --dry_run` lists them.
"""

import dataclasses
import os

from bn_keras.networks.variants import PAPER_BATCH_SIZE, VARIANTS
from bn_keras.runs.run_directory import CONFIG_FILE, MNIST_CONFIG_FILE, RunDirectory

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

STATISTICS = {
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
"""What batch statistics are over: its title and its flags."""

RATE_FACTORS = (5, 10, 20, 50, 100, 200)
"""Of the rate of BN-Baseline and Inception, where the one that diverges first is sought."""

_EVALUATION_EVERY = 50  # steps of 32 images
_DIVERGENCE_STEPS = 150
_EARLY_STEPS, _EARLY_EVALUATION, _EARLY_BATCHES = 100, 10, 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """One run.

    Attributes:
      section: of the document, and folder below the working directory.
      name: folder below the section's.
      program: "train" or "mnist".
      flags: of the program.
      steps: of the run, as it counts them.
      work: what the run costs, in training images; an evaluation is not counted.
    """

    section: str
    name: str
    program: str
    flags: dict
    steps: int
    work: float

    def directory(self, workdir: str) -> RunDirectory:
        config_file = MNIST_CONFIG_FILE if self.program == "mnist" else CONFIG_FILE
        return RunDirectory(os.path.join(workdir, self.section, self.name), config_file)

    def done(self, workdir: str) -> bool:
        """Whether the run has all of its steps, or has diverged; a last row alone may lack its neighbours."""
        directory = self.directory(workdir)
        step = directory.newest_step()
        if step is None:  # the checkpoints of what is done may have been removed
            step = max((row["step"] for row in directory.curve.rows), default=0)
        return step >= self.steps or bool(directory.curve.diverged())

    def arguments(self, workdir: str) -> list[str]:
        """What follows the program's name on the command line."""
        flags = {**self.flags, "steps": self.steps, "workdir": self.directory(workdir).path}
        return [_flag(name, value) for name, value in flags.items()]


def _flag(name, value):
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no{name}"
    return f"--{name}={value}"


def _training(section, name, variant, steps, *, batch_size=PAPER_BATCH_SIZE, **flags):
    """A run of `launch/train` over `steps * 32` images, whatever its batch size."""
    evaluation = max(1, _EVALUATION_EVERY * PAPER_BATCH_SIZE // batch_size)
    flags = {"variant": variant, "batch_size": batch_size, "eval_every": evaluation, "on_divergence": "record", **flags}
    steps = steps * PAPER_BATCH_SIZE // batch_size
    return Experiment(
        section=section, name=name, program="train", flags=flags, steps=steps, work=float(steps * batch_size)
    )


def plan(seeds: list[int], steps: int, mnist_steps: int, data_dir: str | None = None) -> list[Experiment]:
    """All runs, those that matter most first.

    Args:
      seeds: of Figure 2 and of the seven changes; the other sections take the first.
      steps: of 32 images each, of a run of Figure 2.
      mnist_steps: of 60 images each, of Figure 1.
      data_dir: records for all of them; None for the embedded digits.
    """
    first = seeds[0]
    # A step of the small sigmoid networks costs about as much as 0.2 images of the small Inception.
    runs = [
        Experiment(
            section="figure1",
            name="",
            program="mnist",
            flags={"seed": first},
            steps=mnist_steps,
            work=0.2 * mnist_steps,
        )
    ]
    for seed in seeds:
        runs += [_training("figure2", f"{name}-{seed}", name, steps, seed=seed) for name in FIGURE_2_VARIANTS]
    accelerated = VARIANTS["bn_x5"]
    for seed in seeds:
        for field in CHANGES:
            flags = {field: getattr(accelerated, field), "seed": seed}
            runs.append(_training("changes", f"{field}-{seed}", "bn_baseline", steps, **flags))
    for factor in RATE_FACTORS:
        for name in ("inception", "bn_baseline"):
            rate = VARIANTS[name].learning_rate * factor
            runs.append(
                _training("divergence", f"{name}-x{factor}", name, _DIVERGENCE_STEPS, learning_rate=rate, seed=first)
            )
    runs.append(
        _training(
            "early",
            f"bn_x5-{first}",
            "bn_x5",
            _EARLY_STEPS,
            seed=first,
            eval_every=_EARLY_EVALUATION,
            population_statistics=_EARLY_BATCHES,
        )
    )
    for kind, (_, flags) in STATISTICS.items():
        for batch in BATCH_SIZES:
            # Groups of 32 are something else than the batch only above 32; a device needs two images.
            if (kind == "virtual" and batch <= PAPER_BATCH_SIZE) or (batch < 4 and "devices" in flags):
                continue
            runs.append(
                _training("batch_size", f"{kind}-{batch}", "bn_x5", steps, batch_size=batch, seed=first, **flags)
            )
    if data_dir:
        runs = [dataclasses.replace(run, flags={**run.flags, "data_dir": data_dir}) for run in runs]
    return runs
