"""The learning rate as a function of the examples seen, the same schedule at any batch size."""

import tensorflow as tf

from bn_keras.networks.variants import DECAY_FACTOR
from bn_keras.runs.run_config import RunConfig


def learning_rate(config: RunConfig, examples: tf.Tensor) -> tf.Tensor:
    """The rate of the step that follows `examples` (int64) examples, float32.

        rate = initial * DECAY_FACTOR ^ floor(examples / decay_examples)

    and during warm-up, on a straight line from the rate of a mini-batch of 32 to `initial`. The count of decays is
    taken in whole numbers, so that the steps at which the rate falls are exact at any count of examples.
    """
    decays = tf.cast(examples // config.decay_examples, tf.float32)
    rate = tf.constant(config.initial_learning_rate)
    if config.warmup_examples:
        done = tf.minimum(tf.cast(examples / config.warmup_examples, tf.float32), 1.0)
        rate = config.variant.learning_rate * (1.0 - done) + rate * done
    return rate * DECAY_FACTOR**decays
