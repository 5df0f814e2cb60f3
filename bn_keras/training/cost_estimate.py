"""Estimates what a run costs before it starts: its memory, and its time, measured on a few of its steps."""

import functools
import math

import keras
import tensorflow as tf

from bn_keras.input.run_batches import RunBatches
from bn_keras.progress import clock
from bn_keras.runs.run_config import RunConfig
from bn_keras.training.distribution import distribute
from bn_keras.training.process_settings import process_settings
from bn_keras.training.step_statistics import StepStatistics
from bn_keras.training.training_state import TrainingState, make_train_steps

STEPS = 3
"""How many steps are timed."""

WARM_UP = 6
"""How many steps come before the timed ones: the first one compiles, while the input pipeline gets up to five batches
ahead."""


def describe_cost(batches: RunBatches, strategy: tf.distribute.Strategy) -> str:
    """Describes a run's network, memory and time, measured on a few steps in memory; writes nothing."""
    config = batches.config
    with process_settings(config, strategy):
        state = TrainingState(config, strategy)
        train_steps = make_train_steps(state, config, strategy)
        iterator = iter(distribute(strategy, functools.partial(batches.training, 0)))
        train_steps(iterator, tf.constant(WARM_UP))
        statistics = StepStatistics(strategy.num_replicas_in_sync)
        statistics.add(train_steps(iterator, tf.constant(STEPS)).numpy(), config.batch_size)
    measured = statistics.take()
    seconds = config.batch_size / measured["images_per_second"]
    peak = "".join(
        f", measured at most {_gigabytes(measured[name])} {what}"
        for name, what in (("peak_host_bytes", "by this process"), ("peak_gpu_bytes", "on a GPU"))
        if name in measured
    )
    return "\n".join(
        (
            f"{state.model.count_params():,} parameters, {trainable_count(state.model):,} of them trainable",
            f"memory of a device: about {_gigabytes(bytes_of_device(state.model, config))}{peak}",
            f"a step takes {seconds:.3g} s, {measured['images_per_second']:.3g} images a second, "
            f"{measured['input_wait']:.0%} of it waiting for input",
            f"{config.steps:,} steps take about {clock(config.steps * seconds)}, evaluations not counted",
        )
    )


def bytes_of_device(model: keras.Model, config: RunConfig) -> int:
    """The bytes that a device needs: weights, velocities, gradients, averages, and the outputs of all layers.

    Of a mini-batch that is computed in parts, it holds the outputs of one part, and the sum of the parts' gradients.
    """
    copies = 3 + bool(config.ema) + (config.accumulate > 1)
    weights = model.count_params() + (copies - 1) * trainable_count(model)
    size = 4 if config.precision == "float32" else 2
    outputs = sum(math.prod(layer.output.shape[1:]) for layer in model.layers)
    return 4 * weights + size * outputs * config.batch_size // (config.replicas or 1) // config.accumulate


def trainable_count(model: keras.Model) -> int:
    """How many of a model's parameters are trained."""
    return sum(math.prod(weight.shape) for weight in model.trainable_variables)


def _gigabytes(count):
    return f"{count / 1e9:.2f} GB"
