"""Mean and variance over a mini-batch, and the transform by them: the kernels behind `BatchNormalization`.

Three kernels compute the same transform (Section 3, Algorithm 1); they differ in what they can do and in their cost:

- `normalize_by_moments`: any backend, mask, groups, dtype; differentiated by the backend.
- `normalize_fused`: TensorFlow's fused kernel; two passes over memory instead of the five of separate operations.
- `normalize_synchronized`: the fused kernel with the moments of all replicas, one collective each way.
"""

import math
from typing import NamedTuple

import keras
from keras import ops


class Moments(NamedTuple):
    """Mean and variance of m values, for each of the channels; float32 (float64 for float64 inputs).

    count: m. mean: sum(x) / m. variance: sum((x - mean)^2) / m, the biased one that normalizes.
    All have shapes that broadcast against each other; where count is 0 mean and variance are 0.
    """

    count: object
    mean: object
    variance: object


def average_of_groups(moments, unbiased, across_replicas):
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


def moments_over(x, axes, mask=None, synchronized=False):
    """Two-pass moments of the unmasked values of x over `axes`, which stay as dimensions of 1.

    Replicas are combined by counts and sums in float64: sum(x) = m * mean and sum(x^2) = m * (variance + mean^2).
    There, and only there, the variance is a difference of squares: with mean 1000 and deviation 1 it loses 20 of
    float64's 53 bits, where float32 would keep 4 of its 24.
    """
    if mask is None:
        kept, count = x, ops.cast(math.prod(ops.shape(x)[axis] for axis in axes), x.dtype)
    else:
        kept, count = ops.where(mask, x, 0), ops.sum(ops.cast(mask, x.dtype), axes, keepdims=True)
    divisor = ops.maximum(count, 1.0)
    mean = ops.sum(kept, axes, keepdims=True) / divisor
    squares = ops.square(x - mean)
    squares = squares if mask is None else ops.where(mask, squares, 0)
    variance = ops.sum(squares, axes, keepdims=True) / divisor
    moments = Moments(count * ops.ones_like(mean), mean, variance)
    return combine_replicas(moments) if synchronized else moments


def replica_count():
    """Replicas of the running `tf.distribute` strategy; 1 on other backends and outside of `strategy.run`."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def sum_over_replicas(value):
    """One collective sum of a tensor; the same bits on every replica. Its gradient is again one collective sum."""
    if replica_count() == 1:
        return value
    import tensorflow as tf

    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, value)


def combine_replicas(moments):
    """The moments of all replicas' values, by one collective; replicas may hold different counts, or none."""
    if replica_count() == 1:
        return moments
    dtype = moments.mean.dtype
    count, mean, variance = (ops.cast(value, "float64") for value in moments)
    sums = sum_over_replicas(ops.stack([count, count * mean, count * (variance + ops.square(mean))]))
    divisor = ops.maximum(sums[0], 1.0)
    mean = sums[1] / divisor
    variance = ops.maximum(sums[2] / divisor - ops.square(mean), 0.0)
    return Moments(ops.cast(sums[0], dtype), ops.cast(mean, dtype), ops.cast(variance, dtype))


def transform(x, mean, variance, gamma, beta, epsilon):
    """gamma * (x - mean) / sqrt(variance + epsilon) + beta; x is centred first, so a large mean costs no digits."""
    scale = ops.rsqrt(variance + epsilon)
    y = (x - mean) * (scale if gamma is None else scale * gamma)
    return y if beta is None else y + beta


def fused_kernel_fits(x):
    """Whether TensorFlow's fused kernel takes x."""
    dtypes = ("float16", "bfloat16", "float32")
    return keras.backend.backend() == "tensorflow" and keras.backend.standardize_dtype(x.dtype) in dtypes


def _as_images(x, axis):
    """x as the fused kernel's 4 dimensions, without moving data: (view, data_format)."""
    if len(x.shape) == 4 and axis in (1, 3):
        return x, "NHWC" if axis == 3 else "NCHW"
    shape = ops.shape(x)
    outer, channels, inner = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
    if axis == len(shape) - 1:
        return ops.reshape(x, (outer, 1, 1, channels)), "NHWC"
    return ops.reshape(x, (outer, channels, inner, 1)), "NCHW"


def _parameters(x, axis, gamma, beta):
    """gamma and beta as float32 [channels], 1 and 0 where there are none."""
    channels = (x.shape[axis],)
    return (
        ops.ones(channels, "float32") if gamma is None else gamma,
        ops.zeros(channels, "float32") if beta is None else beta,
    )


def _fused_moments(x, axis, mean, unbiased):
    """Moments from what the fused kernel returns: NaN for no values, infinity where the squares overflow."""
    import tensorflow as tf

    shape = ops.shape(x)
    count = ops.cast(math.prod(shape[:axis]) * math.prod(shape[axis + 1 :]), "float32")
    mean = tf.math.multiply_no_nan(mean, tf.minimum(count, 1.0))
    biased = tf.math.multiply_no_nan(unbiased, tf.maximum(count - 1.0, 0.0) / tf.maximum(count, 1.0))
    return Moments(count * tf.ones_like(mean), mean, tf.minimum(biased, unbiased.dtype.max))


def normalize_fused(x, axis, gamma, beta, epsilon):
    """The transform by the moments of x, on TensorFlow's fused kernel.

    Args:
        x: float32, float16 or bfloat16 of any rank; axis: its channel dimension, >= 0.
        gamma, beta: float32 [channels] or None.

    Returns:
        y, like x, and its Moments, float32 [channels].
    """
    import tensorflow as tf

    images, data_format = _as_images(x, axis)
    gamma, beta = _parameters(x, axis, gamma, beta)
    unused = tf.constant([], tf.float32)
    y, mean, unbiased, *_ = tf.raw_ops.FusedBatchNormV3(
        x=images,
        scale=gamma,
        offset=beta,
        mean=unused,
        variance=unused,
        epsilon=epsilon,
        data_format=data_format,
        is_training=True,
    )
    return ops.reshape(y, ops.shape(x)), _fused_moments(x, axis, mean, unbiased)


def transform_fused(x, axis, mean, variance, gamma, beta, epsilon):
    """The transform by given moments, float32 [channels], on TensorFlow's fused kernel. Returns y, like x."""
    import tensorflow as tf

    images, data_format = _as_images(x, axis)
    gamma, beta = _parameters(x, axis, gamma, beta)
    y, *_ = tf.raw_ops.FusedBatchNormV3(
        x=images,
        scale=gamma,
        offset=beta,
        mean=mean,
        variance=variance,
        epsilon=epsilon,
        data_format=data_format,
        is_training=False,
    )
    return ops.reshape(y, ops.shape(x))
