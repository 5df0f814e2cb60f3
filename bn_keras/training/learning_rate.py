"""The learning rate as a function of the examples seen, the same schedule at any batch size."""

import math

import tensorflow as tf

from bn_keras.runs.run_config import RunConfig
from bn_keras.training.recipes import SCHEDULE_UNITS

DECAY_FACTOR = 0.96
"""Factor of the exponential schedule in each unit of time. Not in the paper: GoogLeNet's 4% every 8 epochs."""

TENTHS = (3, 6, 8)
"""Units of time after which the schedule "steps" falls to a tenth: 30, 60 and 80 epochs in Goyal et al. (2017)."""


def learning_rate(config: RunConfig, examples: tf.Tensor) -> tf.Tensor:
    """The learning rate, float32, of the step that follows after `examples` (int64) examples.

    With u = examples / `decay_examples`, the units of time that have passed, by the variant's schedule:

        exponential   initial * DECAY_FACTOR ^ floor(u)
        steps         initial * 0.1 ^ (how many of TENTHS are at most u)
        cosine        initial * (1 + cos(pi * min(u / SCHEDULE_UNITS, 1))) / 2

    During warm-up it grows on a straight line, from the rate of a mini-batch of `warmup_batch` images to `initial`.
    Units are counted in whole numbers, so that the steps at which the rate falls are exact for any number of examples.
    """
    rate = tf.constant(config.initial_learning_rate)
    if config.warmup_examples:
        done = tf.minimum(tf.cast(examples / config.warmup_examples, tf.float32), 1.0)
        rate = config.warmup_learning_rate * (1.0 - done) + rate * done
    unit = config.decay_examples
    if config.variant.schedule == "exponential":
        return rate * DECAY_FACTOR ** tf.cast(examples // unit, tf.float32)
    if config.variant.schedule == "steps":
        passed = tf.add_n([tf.cast(examples >= units * unit, tf.float32) for units in TENTHS])
        return rate * 0.1**passed
    share = tf.minimum(tf.cast(examples / (SCHEDULE_UNITS * unit), tf.float32), 1.0)
    return rate * (1.0 + tf.cos(math.pi * share)) / 2.0
