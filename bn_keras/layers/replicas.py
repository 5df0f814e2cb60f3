"""Sums over the replicas of a `tf.distribute` strategy; on other backends there is one replica."""

from typing import Any

import keras
from keras import ops

from bn_keras.layers.groups import Tensor

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf


def replica_count() -> int:
    """Replicas of the running `tf.distribute` strategy; 1 on other backends and outside of `strategy.run`."""
    if keras.backend.backend() != "tensorflow":
        return 1
    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def sum_over_replicas(value: Tensor) -> Tensor:
    """One collective sum of a tensor; the same bits on every replica. Its gradient is again one collective sum."""
    if replica_count() == 1:
        return value
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, value)


def combine_replicas(moments: Any) -> Any:
    """The `Moments` of all replicas' values, float64, by one collective; replicas may hold different counts, or none.

    Sums m * mean and m * (variance + mean^2) in float64. There, and only there, a variance is a difference of squares:
    with mean 1000 and deviation 1 it loses 20 of float64's 53 bits; float32 would keep 4 of its 24.
    """
    count, mean, variance = (ops.cast(value, "float64") for value in moments)
    sums = ops.stack([count, count * mean, count * (variance + ops.square(mean))])
    count, mean, square = ops.unstack(sum_over_replicas(sums))
    divisor = ops.maximum(count, 1.0)
    mean, square = mean / divisor, square / divisor
    return moments._replace(count=count, mean=mean, variance=ops.relu(square - ops.square(mean)))
