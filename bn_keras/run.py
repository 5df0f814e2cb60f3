"""A run: its configuration, and the directory that holds everything about it; standard library only.

    run.json               the configuration
    classes.txt            the name of every class, one a line
    curve.jsonl            loss, learning rate and accuracy by step
    checkpoint-*.npz       the last two checkpoints
    model.keras            the trained model
    events.out.tfevents.*  the curve for TensorBoard

Starting a run whose directory exists continues it, provided that the configuration is the same.
"""

import dataclasses
import fcntl
import glob
import json
import os
from collections.abc import Sequence

from bn_keras.errors import InputError
from bn_keras.training_curve import FILE as CURVE_FILE
from bn_keras.training_curve import TrainingCurve
from bn_keras.variants import PAPER_BATCH_SIZE, Variant

CONFIG_FILE = "run.json"
CLASSES_FILE = "classes.txt"
MODEL_FILE = "model.keras"

# What may differ when a run goes on: how far, and what is written how often. Nothing of it changes the weights.
_CADENCE = {
    "steps",
    "eval_every",
    "eval_batch_size",
    "log_every",
    "checkpoint_every",
    "population_statistics",
    "monitor",
    "monitor_every",
}

WARMUP_EPOCHS, WARMUP_ABOVE = 5, 256
"""Not in the paper: Goyal et al. (2017), who warm up a linearly scaled rate for 5 epochs at batches above 256."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a run's weights and curve are a function of.

    Attributes:
      variant: the network and its training, with any field that the person changed.
      dataset: name of the data set.
      dataset_fingerprint: sha256 of its manifest.
      train_examples: examples of one epoch.
      validation_examples: examples of one evaluation.
      classes: outputs of the network.
      channels: of the input, 1 or 3.
      image_size: height and width of the input in pixels.
      width: factor on the network's feature maps.
      augmentation: "imagenet", "shift" or "none".
      distort_on: "host", or "device": the photometric distortion is part of the model's step.
      bn_momentum: weight of the old value in the moving averages.
      normalization_batch: what batch statistics are over: "replica", the examples of one device; "global", those of
        all; or a count such as "32", groups of so many examples on each device.
      batch_size: images of one step, over all replicas.
      scale_learning_rate: "linear", the variant's rate is per mini-batch of 32 and grows with the batch, or "none".
      precision: Keras's dtype policy: "float32", "mixed_bfloat16" or "mixed_float16".
      jit_compile: whether XLA compiles the step.
      deterministic: whether GPUs are made to give the same bits each time; CPUs do.
      ema: weight of the old value in the moving average of the weights; 0 keeps none.
      clip_norm: largest joint norm of the gradients; 0 does not clip.
      replicas: devices that share a batch; with batch statistics per replica, they change what is learned.
      seed: of weights, order, distortion and Dropout.
      steps: of `batch_size` images each.
      eval_every, log_every, checkpoint_every, monitor_every: in steps.
      eval_batch_size: images of one evaluation step, over all replicas.
      population_statistics: mini-batches of Algorithm 2 before each evaluation; 0 for none.
      monitor: names of the layers whose activations are recorded, separated by commas.
    """

    variant: Variant
    dataset: str
    dataset_fingerprint: str
    train_examples: int
    validation_examples: int
    classes: int
    channels: int
    image_size: int
    width: float
    augmentation: str
    bn_momentum: float
    normalization_batch: str
    batch_size: int
    scale_learning_rate: str
    precision: str
    jit_compile: bool
    ema: float
    clip_norm: float
    replicas: int
    seed: int
    steps: int
    eval_every: int
    eval_batch_size: int
    log_every: int
    checkpoint_every: int
    population_statistics: int
    monitor: str
    monitor_every: int
    distort_on: str = "host"
    deterministic: bool = True

    @property
    def initial_learning_rate(self) -> float:
        """The paper's rate is per mini-batch of 32; the run's grows linearly with its batch, or not."""
        scale = self.batch_size / PAPER_BATCH_SIZE if self.scale_learning_rate == "linear" else 1.0
        return self.variant.learning_rate * scale

    @property
    def warmup_examples(self) -> int:
        """Images during which the rate grows to its initial value; 0 without warm-up."""
        warm = self.scale_learning_rate == "linear" and self.batch_size > WARMUP_ABOVE
        return WARMUP_EPOCHS * self.train_examples if warm else 0

    @property
    def decay_examples(self) -> int:
        """Images between two decays of the learning rate."""
        return max(1, round(self.variant.decay_epochs * self.train_examples))

    def flat(self) -> dict:
        """All fields as one flat dictionary of numbers, strings and truth values."""
        fields = dataclasses.asdict(self)
        variant = fields.pop("variant")
        results = {name for name in variant if name.startswith("paper_")} | {"name", "title", "steps"}
        return {"variant": variant["name"], **{k: v for k, v in variant.items() if k not in results}, **fields}


class RunDirectory:
    """The directory of one run. Nothing is written before `open`.

    Args:
      path: of the directory.
      config_file: name of the configuration in it; `find_runs` finds the default's only.
    """

    def __init__(self, path: str, config_file: str = CONFIG_FILE):
        self.path = path
        self.config_path = os.path.join(path, config_file)
        self.model_path = os.path.join(path, MODEL_FILE)
        self.curve = TrainingCurve(os.path.join(path, CURVE_FILE))

    def read_config(self) -> dict | None:
        """The flat configuration that the directory was made with; None where there is no run."""
        try:
            with open(self.config_path, encoding="utf-8") as file:
                return json.load(file)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise InputError(f"{self.config_path} is damaged ({error}): remove {self.path}") from None

    def read_trained(self) -> dict:
        """The configuration of a run that has its trained model.

        Raises:
          InputError: there is no run, or its training has not ended.
        """
        config = self.read_config()
        if config is None:
            raise InputError(f"no run in {self.path}: train one with `launch/train --workdir={self.path}`")
        if not os.path.exists(self.model_path):
            raise InputError(f"no {self.model_path}: it is written when training ends; continue it with `launch/train`")
        return config

    def read_class_names(self) -> list[str]:
        """The name of every class, by index.

        Raises:
          InputError: there is no such file.
        """
        path = os.path.join(self.path, CLASSES_FILE)
        try:
            with open(path, encoding="utf-8") as file:
                return file.read().splitlines()
        except FileNotFoundError:
            raise InputError(f"no {path}: it holds the name of every class, one a line") from None

    def check(self, config: RunConfig, allowed: frozenset[str] | None = None):
        """Refuses to continue a run of another configuration; a field that is None is not known yet and agrees.

        Args:
          config: of the run that is to be.
          allowed: fields that may change nevertheless; None where the program has no --allow_change.

        Raises:
          InputError: names every field that differs and both of its values.
        """
        found = self.read_config()
        if found is None:
            return
        wanted = config.flat()
        free = _CADENCE | (allowed or frozenset())
        changed = [k for k in wanted if k not in free and wanted[k] not in (None, found.get(k))]
        if changed:
            differences = ", ".join(f"{k} {found.get(k)} (now {wanted[k]})" for k in changed)
            fix = "give another --workdir, or remove that one"
            if allowed is not None:
                fix += f", or continue it all the same with --allow_change={','.join([*sorted(allowed), *changed])}"
            raise InputError(f"{self.path} holds a run with {differences}: {fix}")

    def finished(self, config: RunConfig) -> bool:
        """Whether the run has all its steps, its last evaluation and its model, or has diverged."""
        if self.read_config() is None:
            return False
        if self.curve.diverged():
            return True
        done = any(row["kind"] == "validation" and row["step"] >= config.steps for row in self.curve.rows)
        return done and os.path.exists(self.model_path)

    def open(self, config: RunConfig, class_names: Sequence[str]):
        """Makes the directory, locks it for this process and writes the configuration and the names of the classes.

        Raises:
          InputError: another process is training in it.
        """
        os.makedirs(self.path, exist_ok=True)
        self._lock = open(os.path.join(self.path, ".lock"), "w")  # noqa: SIM115 (held until the process ends)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"another process is training in {self.path}: wait for it, or give another --workdir"
            ) from None
        with open(self.config_path + ".tmp", "w", encoding="utf-8") as file:
            json.dump(config.flat(), file, indent=1)
        os.replace(self.config_path + ".tmp", self.config_path)
        with open(os.path.join(self.path, CLASSES_FILE), "w", encoding="utf-8") as file:
            file.writelines(f"{name}\n" for name in class_names)


def find_runs(root: str) -> list[RunDirectory]:
    """Every run in `root` or below it, by path.

    Raises:
      InputError: there is none.
    """
    pattern = os.path.join(glob.escape(root), "**", CONFIG_FILE)
    runs = [RunDirectory(os.path.dirname(path)) for path in sorted(glob.glob(pattern, recursive=True))]
    if not runs:
        raise InputError(f"no runs in {root}: train one with `launch/train --variant=bn_x5 --workdir={root}/bn_x5`")
    return runs
