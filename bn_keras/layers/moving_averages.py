"""The moving averages that inference normalizes by (Algorithm 2); each mini-batch of training moves them one step."""

import keras
from keras import ops

from bn_keras.layers.groups import Tensor
from bn_keras.layers.moments import Moments
from bn_keras.layers.replicas import replica_count, sum_over_replicas


class MovingAverages:
    """What a `BatchNormalization` does with the Moments of a mini-batch: it moves its averages towards them.

    An object with the same two methods, set as the layer's attribute `statistics`, takes its place.
    """

    @staticmethod
    def by_mini_batch(training: bool) -> bool:
        """Whether a call normalizes by its mini-batch, whose Moments `update` then gets."""
        return training

    @staticmethod
    def update(layer: keras.Layer, moments: Moments) -> None:
        """Moves a layer's averages towards the mean over groups and replicas; all replicas get the same values.

        Args:
            layer: a built BatchNormalization.
            moments: Moments, each [groups, *gamma.shape].
        """
        replicas_differ = not layer.synchronized
        mean, variance, known = average_of_groups(moments, layer.unbiased, replicas_differ)
        step = known * (1.0 - layer.momentum)
        if layer.debias:
            # The moving average, from 0, of the constant 1: 1 - momentum^t after t steps.
            weight = layer.moving_weight * (1.0 - step) + step
            layer.moving_weight.assign(weight)
            step = step / ops.maximum(weight, keras.backend.epsilon())
        _move(layer.moving_mean, mean, step)
        if layer.renorm:
            # Averages the deviation (Ioffe, 2017, Algorithm 1); sqrt(v + epsilon)^2 - epsilon may round below 0.
            _move(layer.moving_stddev, ops.sqrt(variance + layer.epsilon), step)
            variance = ops.relu(ops.square(layer.moving_stddev) - layer.epsilon)
            layer.moving_variance.assign(ops.where(known > 0, variance, layer.moving_variance.value))
            mean, variance, known = average_of_groups(moments, False, replicas_differ)
            step = known * (1.0 - layer.renorm_momentum)
            _move(layer.renorm_mean, mean, step)
            _move(layer.renorm_stddev, ops.sqrt(variance + layer.epsilon), step)
        else:
            _move(layer.moving_variance, variance, step)


def _move(average, value, step):
    """average * (1 - step) + value * step; exactly value where step is 1."""
    step = ops.cast(step, average.dtype)
    average.assign(average * (1.0 - step) + ops.cast(value, average.dtype) * step)


def average_of_groups(moments: Moments, unbiased: bool, across_replicas: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 2's E_B[mean] and m/(m-1) * E_B[variance] over the groups of a batch, and over replicas.

    A group weighs as much as its divisor, m for the mean and m - 1 for the unbiased variance, so that groups of one
    size weigh alike and smaller ones do no harm.

    Args:
        moments: Moments, each [groups, *channels].
        unbiased: whether to average variance * m/(m-1) instead of the variance itself.
        across_replicas: whether replicas have moments of their own; their averages then cost one collective.

    Returns:
        mean, variance, known, each [*channels]; known is 1 where any group had two values, else 0.
    """
    count, mean, variance = moments
    freedom = ops.maximum(count - 1.0, 0.0)
    weight = freedom if unbiased else count
    if unbiased:
        variance = variance * (count / ops.maximum(freedom, 1.0))
    across_replicas = across_replicas and replica_count() > 1
    if across_replicas or count.shape[0] != 1:
        sums = ops.sum(ops.stack([count, count * mean, weight, weight * variance, freedom]), axis=1)
        sums = sum_over_replicas(sums) if across_replicas else sums
        count, mean, weight, variance, freedom = ops.unstack(sums)
        mean, variance = mean / ops.maximum(count, 1.0), variance / ops.maximum(weight, 1.0)
    else:
        mean, variance, freedom = mean[0], variance[0], freedom[0]
    return mean, variance, ops.cast(freedom > 0, mean.dtype)
