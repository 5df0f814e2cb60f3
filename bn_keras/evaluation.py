"""Top-1 and top-5 accuracy as counts: summed over every example once, divided once, whatever the batch size."""

from typing import NamedTuple

import tensorflow as tf


class Counts(NamedTuple):
    """Examples whose class was the network's first, or among its first five, and all examples looked at."""

    top1: int
    top5: int
    of: int


def count_correct(logits, labels):
    """Counts of one batch; rows with a negative label are padding and count nowhere.

    Args:
      logits: float32 `[N, classes]`.
      labels: int32 `[N]`.

    Returns:
      int64 `[3]`: top-1, top-5 (top-1 of fewer than five classes counts all), examples. A class ties as lost, so a
      network whose logits are all equal, or not finite, is right about nothing.
    """
    real = labels >= 0
    own = tf.gather(logits, tf.maximum(labels, 0), batch_dims=1)
    rank = tf.reduce_sum(tf.cast(~(logits < own[:, None]), tf.int32), -1) - 1
    finite = tf.math.is_finite(own)
    counted = [real & finite & (rank < 1), real & finite & (rank < 5), real]
    return tf.stack([tf.reduce_sum(tf.cast(mask, tf.int64)) for mask in counted])


class Evaluator:
    """Runs a model over batches in inference mode under a distribution strategy.

    Args:
      model: from images to logits.
      strategy: the one that the model was made under.
    """

    def __init__(self, model, strategy: tf.distribute.Strategy):
        def replica_step(images, labels):
            return count_correct(model(images, training=False), labels)

        @tf.function
        def step(images, labels):
            return strategy.reduce("SUM", strategy.run(replica_step, args=(images, labels)), axis=None)

        self._step = step
        self._strategy = strategy

    def __call__(self, batches: tf.data.Dataset) -> Counts:
        """Counts over all of `batches`, a dataset of (images, labels) as `validation_batches` makes."""
        total = sum(self._step(*batch) for batch in self._strategy.experimental_distribute_dataset(batches))
        return Counts(*(int(count) for count in total.numpy()))
