"""Mean and variance over a mini-batch, and the transform by them: the kernels behind `BatchNormalization`.

Three kernels compute the same transform (Section 3, Algorithm 1); they differ in what they can do and in their cost:

- `moments_over` and `transform`: any backend, mask, groups, dtype; differentiated by the backend.
- `normalize_fused`: TensorFlow's fused kernel, which keeps no intermediate tensor but x for the gradient.
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
    """Two-pass moments of the unmasked values of x over `axes`, which stay as dimensions of 1."""
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
    return combine_replicas(moments, x.dtype) if synchronized and replica_count() > 1 else moments


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


def combine_replicas(moments, dtype):
    """The moments of all replicas' values, as dtype, by one collective; replicas may hold different counts, or none.

    Sums m * mean and m * (variance + mean^2) in float64. There, and only there, a variance is a difference of squares:
    with mean 1000 and deviation 1 it loses 20 of float64's 53 bits; float32 would keep 4 of its 24.
    """
    count, mean, variance = (ops.cast(value, "float64") for value in moments)
    sums = ops.stack([count, count * mean, count * (variance + ops.square(mean))])
    count, mean, square = ops.unstack(sum_over_replicas(sums))
    divisor = ops.maximum(count, 1.0)
    mean, square = mean / divisor, square / divisor
    return Moments(*(ops.cast(value, dtype) for value in (count, mean, ops.relu(square - ops.square(mean)))))


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


def _fused_batch_norm(x, axis, mean, variance, gamma, beta, epsilon, *, is_training):
    """TensorFlow's fused kernel on x of any rank. Returns y, like x, and the kernel's mean and variance."""
    import tensorflow as tf

    images, data_format = _as_images(x, axis)
    gamma, beta = _parameters(x, axis, gamma, beta)
    y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=images,
        scale=gamma,
        offset=beta,
        mean=mean,
        variance=variance,
        epsilon=epsilon,
        data_format=data_format,
        is_training=is_training,
    )
    return tf.reshape(y, tf.shape(x)), mean, variance


def normalize_fused(x, axis, gamma, beta, epsilon):
    """The transform by the moments of x, on TensorFlow's fused kernel.

    Args:
        x: float32, float16 or bfloat16 of any rank; axis: its channel dimension, >= 0.
        gamma, beta: float32 [channels] or None.

    Returns:
        y, like x, and its Moments, float32 [channels].
    """
    import tensorflow as tf

    unused = tf.constant([], tf.float32)
    y, mean, unbiased = _fused_batch_norm(x, axis, unused, unused, gamma, beta, epsilon, is_training=True)
    # The kernel returns NaN for no values, and infinity where the sum of squares overflows: beyond 1e18 or so.
    count = tf.cast(tf.size(x) // x.shape[axis], tf.float32)
    mean = tf.math.multiply_no_nan(mean, tf.minimum(count, 1.0))
    biased = tf.math.multiply_no_nan(unbiased, tf.maximum(count - 1.0, 0.0) / tf.maximum(count, 1.0))
    moments = Moments(count * tf.ones_like(mean), mean, tf.minimum(biased, unbiased.dtype.max))
    return y, moments


def transform_fused(x, axis, mean, variance, gamma, beta, epsilon):
    """The transform by given moments, float32 [channels], on TensorFlow's fused kernel. Returns y, like x."""
    return _fused_batch_norm(x, axis, mean, variance, gamma, beta, epsilon, is_training=False)[0]


def normalize_synchronized(x, axis, gamma, beta, epsilon):
    """`normalize_fused` by the moments of all replicas' x: one collective forward and one backward.

    With m the count of all replicas and xhat = (x - mean) / sqrt(variance + epsilon), the gradients are Section 3's,

        dbeta = sum(dy)
        dgamma = sum(dy * xhat)
        dx = gamma / sqrt(variance + epsilon) * (dy - dbeta / m - xhat * dgamma / m)

    with the sums over all replicas in dx. The gradients of gamma and beta are those of this replica's examples, as
    every other variable's are: the optimizer adds them up. The gradient is not differentiable again.
    """
    import tensorflow as tf

    images, data_format = _as_images(x, axis)
    gamma, beta = _parameters(x, axis, gamma, beta)
    axes = [0, 1, 2] if data_format == "NHWC" else [0, 2, 3]

    @tf.custom_gradient
    def normalize(images, gamma, beta):
        moments = combine_replicas(_precise_moments(images, axes), "float64")
        # The mean as the sum of two float32: 1000 alone would be off by 3e-5, and so would every output.
        mean = tf.cast(moments.mean, tf.float32)
        rest = tf.cast(moments.mean - tf.cast(mean, tf.float64), tf.float32)
        variance = tf.cast(moments.variance, tf.float32)
        count = tf.cast(moments.count, tf.float32)
        inverse = tf.math.rsqrt(variance + epsilon)
        y = transform_fused(images, axis_of_images, mean, variance, gamma, beta - gamma * inverse * rest, epsilon)

        def gradient(dy, *_):
            local = tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=dy,
                x=images,
                scale=gamma,
                reserve_space_1=mean,
                reserve_space_2=variance,
                reserve_space_3=tf.constant([], tf.float32),
                epsilon=epsilon,
                data_format=data_format,
                is_training=False,
            )
            dbeta = local.offset_backprop
            dgamma = local.scale_backprop - inverse * rest * dbeta
            mean_dy, mean_dy_xhat = tf.unstack(sum_over_replicas(tf.stack([dbeta, dgamma])) / tf.maximum(count, 1.0))
            scale = -gamma * inverse * mean_dy_xhat
            offset = -gamma * inverse * mean_dy - scale * inverse * rest
            through_moments = transform_fused(images, axis_of_images, mean, variance, scale, offset, epsilon)
            return local.x_backprop + through_moments, dgamma, dbeta

        return (y, count, mean, variance), gradient

    axis_of_images = 3 if data_format == "NHWC" else 1
    y, *moments = normalize(images, gamma, beta)
    return tf.reshape(y, tf.shape(x)), Moments(*moments)


def _precise_moments(images, axes):
    """Moments of float32 images; the mean, float64, is corrected by the mean of what is left after subtracting it."""
    import tensorflow as tf

    images = tf.cast(images, tf.float32)
    count = tf.cast(tf.size(images) // math.prod(images.shape[i] for i in range(4) if i not in axes), tf.float32)
    divisor = tf.maximum(count, 1.0)
    mean = tf.reduce_sum(images, axes, keepdims=True) / divisor
    centred = images - mean
    rest = tf.reduce_sum(centred, axes) / divisor
    variance = tf.reduce_sum(tf.square(centred), axes) / divisor - tf.square(rest)
    mean = tf.cast(tf.squeeze(mean, axes), tf.float64) + tf.cast(rest, tf.float64)
    return Moments(count * tf.ones_like(rest), mean, variance)
