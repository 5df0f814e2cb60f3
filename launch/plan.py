"""Describes what a run is about to do, before it starts."""

import dataclasses
import math
from typing import Any

from absl import flags

from bn_keras.input.bad_records import SkippedRecords
from bn_keras.input.dataset import Dataset
from bn_keras.networks.variants import PAPER_BATCH_SIZE
from bn_keras.runs.run_config import WARMUP_EPOCHS, RunConfig
from bn_keras.training.recipes import make_config, recipe_for, spanning_decay_epochs
from launch import config_flags

FLAGS = flags.FLAGS

SMALL_RATE = 0.01  # of the initial rate: training at less hardly changes the weights


def describe(config: RunConfig, dataset: Dataset, strategy: Any) -> str:
    """Describes a run's data, network, batch and learning rate, and warns of what a person may not expect of them."""
    from bn_keras.training.distribution import uses_gpus
    from bn_keras.training.learning_rate import learning_rate

    replicas = config.replicas or strategy.num_replicas_in_sync
    last_rate = float(learning_rate(config, (config.steps - 1) * config.batch_size))
    images = config.steps * config.batch_size
    embedded = "" if FLAGS.data_dir else "no --data_dir, so the embedded data: "
    warm_up = f", grown to over {WARMUP_EPOCHS} epochs" if config.warmup_examples else ""
    lines = [
        f"{embedded}{config.dataset}, {config.train_examples:,} training and {config.validation_examples:,} "
        f"validation images, {config.classes} classes",
        f"{config.variant.title} at {config.image_size}x{config.image_size}, width {config.width:g} "
        f"({recipe_for(dataset)} recipe)",
        f"batch {config.batch_size} = {replicas} x {config.batch_size // replicas}, learning rate "
        f"{config.initial_learning_rate:g} ({config.variant.learning_rate:g} per {PAPER_BATCH_SIZE}{warm_up}) to "
        f"{last_rate:.3g}, {config.steps:,} steps = {images // PAPER_BATCH_SIZE:,} of {PAPER_BATCH_SIZE} images = "
        f"{images / config.train_examples:.1f} epochs",
    ]
    if config.variant.schedule == "exponential" and last_rate < SMALL_RATE * config.initial_learning_rate:
        epochs = math.ceil(100 * spanning_decay_epochs(config.variant.schedule, images, config.train_examples)) / 100
        lines.append(
            f"the learning rate falls below {SMALL_RATE:.0%} of its start: --decay_epochs={epochs} spans the run"
        )
    if uses_gpus(strategy) and not config.deterministic:
        lines.append("GPUs give other bits each time, so a continued run ends with other weights: see --deterministic")
    given = config_flags.given(RunConfig)
    given.pop("initial_weights", None)  # a continued run no longer needs them, and they have no schedule
    fresh = make_config(dataset, FLAGS.variant, **given).variant.decay_epochs
    if fresh != (own := config.variant.decay_epochs):
        lines.append(
            f"goes on with the schedule that it began with, --decay_epochs={own:g}: a new run of as many steps has "
            f"--decay_epochs={fresh:g}, and other weights"
        )
    return "\n".join(lines)


def cost(config: RunConfig, dataset: Dataset, skipped: SkippedRecords | None, strategy: Any) -> str:
    """What a run would cost in time and memory, measured on this process's share of a step."""
    from bn_keras.input.run_batches import RunBatches
    from bn_keras.training.cost_estimate import describe_cost

    own = strategy.num_replicas_in_sync
    share = dataclasses.replace(config, replicas=own, batch_size=config.batch_size * own // config.replicas)
    described = describe_cost(RunBatches(share, dataset, skipped), strategy)
    if own < config.replicas:
        described += f"\nmeasured on this process's {share.batch_size} images of a step, without the exchange"
    return described
