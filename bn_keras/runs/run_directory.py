"""A run: its configuration, and the directory that holds everything about it; standard library only.

    run.json               the configuration
    classes.txt            the name of every class, one a line
    curve.jsonl            loss, learning rate and accuracy by step
    checkpoint-*.npz       the last two checkpoints
    best-*.npz             the checkpoint of the best evaluation
    model.keras            the trained model
    events.out.tfevents.*  the curve for TensorBoard

Starting a run whose directory exists continues it, provided that the configuration is the same. The first two files are
for people, and for the time before there is a checkpoint: each checkpoint holds a copy, which is believed before them.
"""

import dataclasses
import errno
import fcntl
import functools
import glob
import io
import json
import os
import re
import zipfile
from collections.abc import Sequence

from bn_keras.errors import InputError
from bn_keras.json_files import COUNT, NUMBER, TEXT, parse_json, read_json
from bn_keras.networks.variants import NAMING, PAPER_BATCH_SIZE, VARIANTS, Variant
from bn_keras.runs.run_files import DamagedError, newest, note, read_sealed, replacing, states
from bn_keras.runs.training_curve import FILE as CURVE_FILE
from bn_keras.runs.training_curve import TrainingCurve

CONFIG_FILE = "run.json"
MNIST_CONFIG_FILE = "mnist.json"  # of a run of Section 4.1
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

# What no run can change: its weights have other shapes then.
_SHAPES = {"width", "classes", "channels", "batch_normalization", "per_activation_modules"}

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

    @classmethod
    def from_flat(cls, flat: dict, path: str) -> "RunConfig":
        """The configuration that `flat` was made of; `path` is where it was found.

        Raises:
          InputError: a field is missing.
        """
        own = {field.name: field for field in dataclasses.fields(cls)}
        variant = {name: value for name, value in flat.items() if name not in own and value is not None}
        fields = {name: value for name, value in flat.items() if name in own}
        fields["variant"] = dataclasses.replace(VARIANTS[flat["variant"]], **variant)
        missing = [n for n, field in own.items() if n not in fields and field.default is dataclasses.MISSING]
        if missing:
            raise InputError(f"{path} lacks {', '.join(missing)}: it was not written by this program, or is damaged")
        return cls(**fields)

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
        return min(max(1, round(self.variant.decay_epochs * self.train_examples)), 2**62)  # within int64

    def network_arguments(self) -> dict:
        """What `build_network` needs beside the variant."""
        arguments = {name: getattr(self, name) for name in ("image_size", "channels", "classes", "width")}
        arguments["momentum"] = self.bn_momentum
        if self.normalization_batch == "global":
            return arguments | {"synchronized": True}
        # One group is the whole batch, which the layer does without groups faster, with the same bits.
        if self.normalization_batch != "replica" and int(self.normalization_batch) < self.batch_size // self.replicas:
            return arguments | {"virtual_batch_size": int(self.normalization_batch)}
        return arguments

    def flat(self) -> dict:
        """All fields as one flat dictionary of numbers, strings and truth values."""
        fields = dataclasses.asdict(self)
        variant = fields.pop("variant")
        return {"variant": variant["name"], **{k: v for k, v in variant.items() if k not in NAMING}, **fields}


def _may_change(name, before, after):
    """Whether a run's checkpoint goes on when a field has another value."""
    if name in ("ema", "dropout"):  # of 0, a checkpoint has no variables for them
        return before != 0 or after == 0
    if name == "precision":  # which has a loss scale
        return after != "mixed_float16"
    return name not in _SHAPES


def _schema(types, required):
    """A JSON Schema of a flat configuration; an imported run has null for what is not known of it."""
    properties = {name: {**kind, "type": [kind["type"], "null"]} for name, kind in types.items()}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


_TYPES = {int: COUNT, float: NUMBER, str: TEXT, bool: {"type": "boolean"}}
_RUN_TYPES = {field.name: _TYPES.get(field.type) for cls in (Variant, RunConfig) for field in dataclasses.fields(cls)}
_SHOWN = ["dataset", "train_examples", "steps", "batch_size", "seed"]  # in reports
_SCHEMAS = {
    CONFIG_FILE: _schema(
        {name: kind for name, kind in _RUN_TYPES.items() if kind} | {"variant": {**TEXT, "enum": list(VARIANTS)}},
        [*_SHOWN, "variant", "validation_examples", "image_size", "width"],
    ),
    MNIST_CONFIG_FILE: _schema(
        dict.fromkeys(("dataset", "dataset_fingerprint"), TEXT)
        | dict.fromkeys(("train_examples", "test_examples", "steps", "batch_size", "seed", "eval_every"), COUNT)
        | dict.fromkeys(("learning_rate", "weight_deviation"), NUMBER),
        [*_SHOWN, "test_examples", "learning_rate", "weight_deviation"],
    ),
}


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
        self.texts = {}
        self._config_file = config_file
        self._allowed = None

    @functools.cached_property
    def curve(self) -> TrainingCurve:
        return TrainingCurve(os.path.join(self.path, CURVE_FILE))

    def newest_step(self) -> int | None:
        """The step of the newest checkpoint that is whole; None where there is none."""
        state = self._newest()
        return state and state[0]

    def _newest(self):
        """(step, {name: text as bytes}) of the newest checkpoint that is whole, or None."""
        return newest(self.path, self._read_texts)

    def _read_texts(self, content):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = {self._config_file, CLASSES_FILE} & set(archive.namelist())
            return {name: archive.read(name) for name in names}

    def model_step(self) -> int | None:
        """The step that `model.keras` is of; None where there is none, or it is damaged, or does not say it."""
        try:
            return read_sealed(self.model_path)[0]
        except FileNotFoundError:
            return None
        except DamagedError as error:
            note(f"{self.model_path} is damaged ({error})")
            return None

    def read_config(self) -> dict | None:
        """The flat configuration of the newest checkpoint, or that which the directory was made with; None where there
        is no run.

        Raises:
          InputError: the file is damaged, and no checkpoint is whole that holds a copy.
        """
        return self._read_config(self._newest())

    def _read_config(self, state):
        schema, fix = _SCHEMAS[self._config_file], "put a copy of it back, or give another --workdir"
        copy = state and state[1].get(self._config_file)
        kept = parse_json(copy, self.config_path, schema, fix) if copy else None
        try:
            written = read_json(self.config_path, schema, fix)
        except FileNotFoundError:
            if kept:
                note(f"no {self.config_path}: the copy in the checkpoint of step {state[0]} is taken")
            return kept
        except InputError as error:
            if not kept:
                raise
            note(f"{str(error).removesuffix(fix)}the copy in the checkpoint of step {state[0]} is taken")
            return kept
        if not kept:
            return written
        if changed := [name for name in kept if name not in _CADENCE and written.get(name) != kept[name]]:
            values = ", ".join(f"{name} {written.get(name)} (there {kept[name]})" for name in changed)
            note(f"{self.config_path} is not of the checkpoint of step {state[0]}, which is believed: {values}")
        return kept | {name: written[name] for name in _CADENCE & written.keys()}

    def read_trained(self) -> dict:
        """The flat configuration of a run that has a checkpoint or a trained model.

        Raises:
          InputError: there is no run, or nothing of it is whole.
        """
        state = self._newest()
        config = self._read_config(state)
        if config is None:
            raise InputError(f"no run in {self.path}: train one with `launch/train --workdir={self.path}`")
        if state is None and not os.path.exists(self.model_path):
            raise InputError(
                f"no whole checkpoint and no {self.model_path}: it is written when training ends; "
                "continue it with `launch/train`"
            )
        RunConfig.from_flat(config, self.config_path)
        return config

    def read_class_names(self) -> list[str]:
        """The name of every class, by index.

        Raises:
          InputError: no file, whole or as a copy, names as many classes as the network has.
        """
        path = os.path.join(self.path, CLASSES_FILE)
        state = self._newest()
        try:
            if state and CLASSES_FILE in state[1]:
                content = state[1][CLASSES_FILE]
            else:
                with open(path, "rb") as file:
                    content = file.read()
            names = _split_names(content.decode("utf-8"))
        except FileNotFoundError:
            raise InputError(f"no {path}: put a copy of it back, the name of every class, one a line") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is damaged ({error}): put a copy of it back") from None
        if len(names) != (classes := self._read_config(state)["classes"]):
            raise InputError(f"{path} names {len(names)} classes, the network has {classes}: put a copy of it back")
        return names

    def check(self, config: RunConfig, class_names: Sequence[str], allowed: frozenset[str] | None = None):
        """Refuses what cannot start or go on in the directory; a field that is None is not known yet and agrees.

        Args:
          config: of the run that is to be.
          class_names: of its data set.
          allowed: fields that may change nevertheless; None where the program has no --allow_change.

        Raises:
          InputError: the run there is another, names every field that differs and both of its values; or it is not of
            this program, or has nothing whole to go on from.
        """
        self._allowed = allowed
        state = self._newest()
        found = self._read_config(state)
        if (state is None or found is None) and (lost := self._would_be_lost(found is None)):
            lacking = "no whole checkpoint to go on from" if found else f"no {os.path.basename(self.config_path)}"
            raise InputError(f"{self.path} holds {lost} but {lacking}: put a copy back, or give another --workdir")
        if found is None:
            return
        changed = {name: (found.get(name), now) for name, now in self._changes(found, config).items()}
        refused = [name for name in changed if name not in (allowed or ()) or not _may_change(name, *changed[name])]
        if refused:
            differences = ", ".join(f"{name} {changed[name][0]} (now {changed[name][1]})" for name in refused)
            fix = "give another --workdir"
            if allowed is not None and all(_may_change(name, *changed[name]) for name in refused):
                fix += f", or continue it all the same with --allow_change={','.join([*sorted(allowed), *refused])}"
            raise InputError(f"{self.path} holds a run with {differences}: {fix}")
        if state and CLASSES_FILE in state[1]:
            known = _split_names(state[1][CLASSES_FILE].decode("utf-8"))
            if differing := [pair for pair in zip(known, class_names, strict=True) if pair[0] != pair[1]]:
                before, now = differing[0]
                raise InputError(
                    f"{self.path} holds a run with a class {before!r} (now {now!r}): give another --workdir"
                )

    def _would_be_lost(self, foreign):
        """The first file there that a new run would write over, or None."""
        names = [os.path.basename(path) for _, path in states(self.path)] + [MODEL_FILE]
        if foreign:
            names += [CONFIG_FILE, MNIST_CONFIG_FILE, CURVE_FILE, CLASSES_FILE]
        return next((name for name in names if os.path.lexists(os.path.join(self.path, name))), None)

    @staticmethod
    def _changes(found, config):
        """The fields that tell one run from another and differ, with their new values."""
        wanted = config.flat()
        return {k: v for k, v in wanted.items() if k not in _CADENCE and v is not None and v != found.get(k)}

    def finished(self, config: RunConfig) -> bool:
        """Whether the run has all its steps and the model of the last, or has diverged as it would again."""
        state = self._newest()
        found = self._read_config(state)
        if found is None:
            return False
        if self.curve.diverged():
            return not self._changes(found, config)
        return state is not None and state[0] >= config.steps and self.model_step() == state[0]

    def open(self, config: RunConfig, class_names: Sequence[str]):
        """Makes the directory, locks it for this process and writes the configuration and the names of the classes.

        Raises:
          InputError: another process is training in it, or has while this one was starting; it cannot be locked.
        """
        self.check(config, class_names, self._allowed)
        os.makedirs(self.path, exist_ok=True)
        self._lock_directory()
        self.check(config, class_names, self._allowed)  # another process may have trained here until now
        self.__dict__.pop("curve", None)
        self.texts = {
            os.path.basename(self.config_path): json.dumps(config.flat(), indent=1),
            CLASSES_FILE: "".join(f"{_escape(name)}\n" for name in class_names),
        }
        for name, text in self.texts.items():  # the configuration first: without it, the others are not a run's
            with (
                replacing(os.path.join(self.path, name)) as temporary,
                open(temporary, "w", encoding="utf-8", newline="\n") as file,
            ):
                file.write(text)

    def _lock_directory(self):
        path = os.path.join(self.path, ".lock")
        new = not os.path.exists(path)
        self._lock = open(path, "a")  # noqa: SIM115 (held until the process ends)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise InputError(
                    f"another process is training in {self.path}: wait for it, or give another --workdir"
                ) from None
            if new:
                os.remove(path)
            raise InputError(
                f"{self.path} cannot be locked ({error.strerror}), so two programs could train there at once: "
                "give a --workdir on a file system that has locks"
            ) from None


_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}


def _escape(name):
    """A name on one line; only the ends of lines and the mark of an escape are written otherwise."""
    return re.sub(r"[\\\n\r]", lambda found: _ESCAPES[found[0]], name)


def _split_names(text):
    unescaped = {escape: name for name, escape in _ESCAPES.items()}
    return [re.sub(r"\\[\\nr]", lambda found: unescaped[found[0]], line) for line in text.split("\n")[:-1]]


def find_runs(root: str) -> list[RunDirectory]:
    """Every run in `root` or below it, by path.

    Raises:
      InputError: there is none.
    """
    found = {
        os.path.dirname(path)
        for name in (CONFIG_FILE, "checkpoint-*.npz")
        for path in glob.glob(os.path.join(glob.escape(root), "**", name), recursive=True)
    }
    runs = [run for run in map(RunDirectory, sorted(found)) if run.read_config() is not None]
    if not runs:
        raise InputError(f"no runs in {root}: train one with `launch/train --variant=bn_x5 --workdir={root}/bn_x5`")
    return runs
