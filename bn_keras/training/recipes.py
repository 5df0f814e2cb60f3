"""The defaults of a run: the paper's, and three recipes for small data sets; standard library only.

A recipe holds the fields of `RunConfig` in which it differs from the paper. Its `steps` are of 32 images.
"""

import dataclasses
import math
import os
from typing import Any

from bn_keras.errors import InputError
from bn_keras.input.dataset import Dataset
from bn_keras.networks.variants import PAPER_BATCH_SIZE, VARIANTS, Variant
from bn_keras.runs.run_config import RunConfig
from bn_keras.runs.run_directory import RunDirectory
from bn_keras.settings import fields_of
from bn_keras.storage import exists, is_folder

PAPER = "the paper's"

PHOTOS = {
    "image_size": 128,
    "width": 0.5,
    "bn_momentum": 0.9,  # after a first try of 60 steps, 0.99 would be half the initial 0 and 1: accuracy at chance
    "steps": 5_000,  # 160,000 images, at 128x128 and half the width about a tenth of the paper's work for each
    "eval_every": 250,
    "log_every": 10,
    "checkpoint_every": 100,
    "monitor_every": 250,
}

SMALL = {
    "image_size": 64,  # Figure 5 divides its input by 32; 28x28 digits would end as one pixel before module 5
    "width": 0.25,
    "augmentation": "none",  # a mirrored digit is another digit
    "bn_momentum": 0.9,  # 0.99 averages 100 steps, too many to follow the weights in the first 50
    "steps": 500,
    "eval_every": 50,
    "log_every": 10,
    "checkpoint_every": 50,
    "monitor_every": 50,
}

SMALL_COLOR = SMALL | {
    "augmentation": "shift",  # a mirrored cat is a cat; a crop of 8% of 32x32 pixels is 9x9
    "bn_momentum": 0.99,
    "steps": 20_000,  # 12.8 epochs of CIFAR-10
    "eval_every": 1_000,
    "log_every": 50,
    "checkpoint_every": 500,
}

RECIPES: dict[str, dict[str, Any]] = {
    PAPER: {},
    "the small photo set's": PHOTOS,
    "the small network's": SMALL,
    "the small color network's": SMALL_COLOR,
}

SMALL_SET = 100_000
"""A data set of larger images, but with fewer of them than this, gets the recipe of small photo sets."""

SMALL_IMAGE = 64
"""A data set whose median short side is at most this many pixels gets a recipe for small images."""

LARGEST_OF_ONE_THREAD = 16.0
"""Networks of up to this `image_size * width` compute an operation by one thread. At 64 * 0.25 a step takes 84 ms of
CPU time by two threads and 64 by one, at 128 * 0.5 it takes 400 and 354. With one, a run's bits are the same on any
number of cores.
"""

MOST_EPOCHS = 320
"""Most epochs of a run by a recipe for small sets. 500 photos are seen so often in 5,000 steps; a set of fewer images
gets fewer steps in proportion."""

MOST_DECAYS = 112
"""Most decays of the exponential schedule on a small data set: the rate then ends at 1% of its initial value. On
ImageNet, BN-x30's rate decays as often in its 6 million steps."""


SCHEDULE_UNITS = 9
"""Length of the schedules "steps" and "cosine" in units of time: 90 epochs, ten in a unit, in Goyal et al. (2017)."""


def recipe_for(dataset: Dataset) -> str:
    """The name of the recipe that fits a data set's images."""
    if dataset.median_short_side > SMALL_IMAGE:
        return "the small photo set's" if dataset.examples("train") < SMALL_SET else PAPER
    return "the small network's" if dataset.channels == 1 else "the small color network's"


def make_config(
    dataset: Dataset, variant: str | Variant, *, continued: RunConfig | None = None, **changes: Any
) -> RunConfig:
    """The configuration of a run: `changes` come first, then the data set's recipe, then the variant and the paper.

    Args:
      dataset: the data set to train on.
      variant: a key of `VARIANTS`, or a row of your own.
      continued: the configuration of the run that is continued; None for a new run. Its threads and its schedule are
        kept unless `changes` has others, because the default schedule depends on the length of the run.
      changes: fields of `RunConfig` and of `Variant`.

    Raises:
      InputError: there is no such field, or no run and no model of these initial weights. `RunConfig.check` then checks
        the values.
    """
    variant = VARIANTS[variant] if isinstance(variant, str) else variant
    fields = fields_of(RunConfig)
    if unknown := [name for name in changes if name not in fields or not fields[name].setting.given]:
        raise InputError(f"`{unknown[0]}={changes[unknown[0]]}` is no setting of a run")
    of_row = {name: value for name, value in changes.items() if fields[name].of_row}
    recipe = recipe_for(dataset)
    inherited = {"threads": continued.threads} if continued else {}
    if source := _source_of(changes.get("initial_weights"), variant, continued):
        of_row = {name: getattr(source.variant, name) for name in _OF_WEIGHTS} | of_row
        inherited["width"] = source.width
    train_examples = dataset.examples("train")
    of_recipe = _shortened(RECIPES[recipe], train_examples)
    chosen = of_recipe | inherited | {name: value for name, value in changes.items() if not fields[name].of_row}
    batch_size = chosen.get("batch_size", PAPER_BATCH_SIZE)
    begun = continued if continued and continued.variant.name == variant.name else None
    if "steps" not in changes:
        steps = chosen.get("steps", variant.steps) * PAPER_BATCH_SIZE // max(1, batch_size) or 1
        earlier = begun.steps * begun.batch_size // max(1, batch_size) if begun else 0  # which had more for few images
        chosen["steps"] = max(steps, earlier)
    row = dataclasses.replace(variant, **of_row)
    if "decay_epochs" not in changes and (recipe != PAPER or row.schedule != variant.schedule):
        decay_epochs = (
            begun.variant.decay_epochs
            if begun
            else fitting_decay_epochs(row, chosen["steps"] * batch_size, train_examples)
        )
        row = dataclasses.replace(row, decay_epochs=decay_epochs)
    config = RunConfig(
        variant=row,
        dataset=dataset.name,
        dataset_fingerprint=dataset.fingerprint,
        train_examples=train_examples,
        validation_examples=dataset.examples("validation"),
        classes=len(dataset.class_names),
        channels=dataset.channels,
        **chosen,
    )
    if "threads" not in chosen and config.image_size * config.width <= LARGEST_OF_ONE_THREAD:
        config = dataclasses.replace(config, threads=1)
    return config


def _shortened(recipe, train_examples):
    """A recipe of at most `MOST_EPOCHS`, in which everything happens as often as in the whole one."""
    most = math.ceil(MOST_EPOCHS * train_examples / PAPER_BATCH_SIZE)
    if recipe.get("steps", 0) <= most:
        return recipe
    cadences = "steps", "eval_every", "log_every", "checkpoint_every", "monitor_every"
    return recipe | {name: max(1, recipe[name] * most // recipe["steps"]) for name in cadences}


_OF_WEIGHTS = "input_convention", "padding", "epsilon", "separable_stem", "projection_4c_4d"
"""Settings that belong to a network's weights. A run that starts from another run's weights also takes these settings
and the width from it."""


def _source_of(initial_weights, variant, continued):
    """The configuration of the run that initial weights are from; None if they are a model that is in no run.

    Raises:
      InputError: they are neither a run nor a Keras model.
    """
    if not initial_weights:
        return None
    if continued and continued.initial_weights == initial_weights:  # they may be gone
        found = continued
    elif is_folder(initial_weights):
        found = RunDirectory(initial_weights).read_config()
    elif initial_weights.endswith(".keras") and exists(initial_weights):
        found = RunDirectory(os.path.dirname(initial_weights)).read_config()
    else:
        raise InputError(
            f"`initial_weights={initial_weights}` is no run and no .keras model. A file of public weights does not say "
            "which pixels and borders they need; fix: make a run of it by "
            f"`launch/import_weights --checkpoint={initial_weights} --workdir=RUN`, and give RUN"
        )
    return found if found and found.variant.network == variant.network else None


def fitting_decay_epochs(variant: Variant, examples: int, train_examples: int) -> float:
    """The schedule's unit of time, in epochs, that fits a run which sees `examples` images.

    The variants' schedules are made for ImageNet's epochs, but 167 photos are seen 320 times in 1,670 steps. The
    schedules "steps" and "cosine" become as long as the run. The exponential one keeps the variant's unit, unless the
    rate would fall more than `MOST_DECAYS` times.
    """
    if variant.schedule == "exponential":
        return max(variant.decay_epochs, spanning_decay_epochs(variant.schedule, examples, train_examples))
    return spanning_decay_epochs(variant.schedule, examples, train_examples)


def spanning_decay_epochs(schedule: str, examples: int, train_examples: int) -> float:
    """The fewest epochs in a unit of time with which the schedule spans a run of `examples` images."""
    units = MOST_DECAYS + 1 if schedule == "exponential" else SCHEDULE_UNITS
    return math.ceil(examples / units) / train_examples
