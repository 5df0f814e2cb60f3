"""Mean and variance over a mini-batch, and the transform by them: the kernels behind `BatchNormalization`.

Three kernels compute the same transform (Section 3, Algorithm 1); they differ in what they can do and in their cost:

- `moments_over` and `transform`: any backend, mask, groups, dtype; differentiated by the backend.
- `normalize_centred`: TensorFlow on the CPU, and the moments of all replicas, by one collective each way.
- `normalize_fused`: TensorFlow's fused kernel, on accelerators and for half precision.
"""

import math
from typing import NamedTuple

import keras
from keras import ops

LARGEST_VARIANCE = 1.7e38
"""Half of float32's maximum, in place of a variance beyond it, so that m/(m-1) times it, m > 1, is finite too."""


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
    if synchronized and replica_count() > 1:
        moments = combine_replicas(moments, x.dtype)
    if keras.backend.standardize_dtype(x.dtype) == "float64":
        return moments
    return moments._replace(variance=ops.minimum(moments.variance, LARGEST_VARIANCE))


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
    """Whether TensorFlow's kernels below take x."""
    dtypes = ("float16", "bfloat16", "float32")
    return keras.backend.backend() == "tensorflow" and keras.backend.standardize_dtype(x.dtype) in dtypes


def normalize(x, axis, gamma, beta, epsilon, synchronized):
    """The transform by the moments of x, or of all replicas' x, on TensorFlow, by the best kernel for the device.

    Args:
        x: float32, float16 or bfloat16 of any rank; axis: its channel dimension, >= 0.
        gamma, beta: float32 [channels] or None.
        synchronized: whether the moments are those of all replicas.

    Returns:
        y, like x, and its Moments, float32 [channels].
    """
    synchronized = synchronized and replica_count() > 1
    if synchronized or _composed_kernels_pay(x):
        return normalize_centred(x, axis, gamma, beta, epsilon, synchronized)
    return normalize_fused(x, axis, gamma, beta, epsilon)


def only_cpus():
    """Whether TensorFlow has no accelerator, so that a kernel may be chosen for the CPU."""
    import tensorflow as tf

    return all(device.device_type == "CPU" for device in tf.config.list_logical_devices())


def _composed_kernels_pay(x):
    """Whether kernels put together from several operations are faster here than TensorFlow's fused one."""
    import tensorflow as tf

    return only_cpus() and x.dtype == tf.float32 and not _compiled_by_xla()


def _compiled_by_xla():
    """Whether TensorFlow is tracing for XLA. By a module that is not public: nothing public tells."""
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    if tf.executing_eagerly():
        return False
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def _as_images(x, axis):
    """x as 4 dimensions, examples first, without moving data: (view, data_format)."""
    rank = len(x.shape)
    if rank == 4 and axis in (1, 3):
        return x, "NHWC" if axis == 3 else "NCHW"
    shape = ops.shape(x)
    if axis == rank - 1:
        examples = 1 if rank == 2 else shape[0]
        return ops.reshape(x, (examples, math.prod(shape[rank != 2 : axis - 1]), shape[axis - 1], shape[axis])), "NHWC"
    return ops.reshape(x, (math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]), 1)), "NCHW"


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


def transform_on_tensorflow(x, axis, mean, variance, gamma, beta, epsilon):
    """The transform by given moments, float32 [channels], on TensorFlow by the best kernel. Returns y, like x."""
    import tensorflow as tf

    if _convolution_takes_it_in(x) or not _composed_kernels_pay(x):
        return _fused_batch_norm(x, axis, mean, variance, gamma, beta, epsilon, is_training=False)[0]
    images, data_format = _as_images(x, axis)
    gamma, beta = _parameters(x, axis, gamma, beta)
    scale = gamma * tf.math.rsqrt(variance + epsilon)
    return tf.reshape(_scale_and_shift(images, scale, beta - scale * mean, data_format), tf.shape(x))


def _convolution_takes_it_in(x):
    """Whether TensorFlow's graph optimizer makes a fused inference kernel on x a part of the convolution before it."""
    import tensorflow as tf

    return tf.is_symbolic_tensor(x) and x.op.type == "Conv2D"


def normalize_fused(x, axis, gamma, beta, epsilon):
    """The transform by the moments of x, on TensorFlow's fused kernel."""
    import tensorflow as tf

    unused = tf.constant([], tf.float32)
    y, mean, unbiased = _fused_batch_norm(x, axis, unused, unused, gamma, beta, epsilon, is_training=True)
    # The kernel returns NaN for no values, and infinity where the sum of squares overflows: beyond 1e17 or so.
    count = tf.cast(tf.size(x) // x.shape[axis], tf.float32)
    mean = tf.math.multiply_no_nan(mean, tf.minimum(count, 1.0))
    biased = tf.math.multiply_no_nan(unbiased, tf.maximum(count - 1.0, 0.0) / tf.maximum(count, 1.0))
    moments = Moments(count * tf.ones_like(mean), mean, tf.minimum(biased, LARGEST_VARIANCE))
    return y, moments


def normalize_centred(x, axis, gamma, beta, epsilon, synchronized=False):
    """The transform by the moments of x, or of all replicas' x, with float64's digits in the moments.

    Where a channel's mean is beyond FAR deviations, x is centred first, on the mean of the first example: its distance
    to the mean is at most sqrt(N - 1) deviations of N examples. So with deviation 1 y is within 1.2e-6 of float64's at
    mean 0, 3 and 1000, on [32,56,56,64], where Keras's layer errs by 9e-6, 1.6e-5 and 2.4e-3.

    With m the count and xhat = (x - mean) / sqrt(variance + epsilon), the gradients are Section 3's,

        dbeta = sum(dy)
        dgamma = sum(dy * xhat)
        dx = gamma / sqrt(variance + epsilon) * (dy - dbeta / m - xhat * dgamma / m)

    with the sums over all replicas in dx: one collective forward and one backward. The gradients of gamma and beta are
    those of this replica's examples, as every other variable's are: the optimizer adds them up. The synchronized
    gradient cannot be differentiated again: asking for it is an error.
    """
    import tensorflow as tf

    images, data_format = _as_images(tf.cast(x, tf.float32), axis)
    gamma, beta = _parameters(x, axis, gamma, beta)

    @tf.custom_gradient
    def normalize(images, gamma, beta):
        centred, pivot, moments = _centre_where_far(images, data_format)
        true = moments._replace(mean=pivot + moments.mean)
        if synchronized:
            true = combine_replicas(true, tf.float64)
        mean = tf.cast(true.mean - pivot, tf.float32)
        count, true_mean, variance = (tf.cast(value, tf.float32) for value in true)
        variance = tf.minimum(variance, LARGEST_VARIANCE)
        inverse = tf.math.rsqrt(variance + epsilon)
        y = _scale_and_shift(centred, gamma * inverse, beta - gamma * inverse * mean, data_format)

        def gradient(dy, *_):
            if only_cpus():
                local = tf.raw_ops.FusedBatchNormGradV3(
                    y_backprop=dy,
                    x=centred,
                    scale=gamma,
                    reserve_space_1=mean,
                    reserve_space_2=variance,
                    reserve_space_3=tf.constant([], tf.float32),
                    epsilon=epsilon,
                    data_format=data_format,
                    is_training=not synchronized,
                )
                dx, dgamma, dbeta = local[:3]
            else:  # synchronized; of that kernel, GPUs have no deterministic form for given moments
                xhat = (centred - _for_each_channel(mean, data_format)) * _for_each_channel(inverse, data_format)
                axes = _all_but_channels(data_format)
                dx = dy * _for_each_channel(gamma * inverse, data_format)
                dgamma, dbeta = tf.reduce_sum(dy * xhat, axes), tf.reduce_sum(dy, axes)
            if synchronized:
                sums = sum_over_replicas(tf.stack([dbeta, dgamma]))
                mean_dy, mean_dy_xhat = tf.unstack(gamma * inverse * sums / tf.maximum(count, 1.0))
                slope = -mean_dy_xhat * inverse
                shift = _for_each_channel(-mean_dy - slope * mean, data_format)
                dx += _for_each_channel(slope, data_format) * centred + shift
                message = "The gradient of synchronized batch normalization cannot be differentiated again."
                dx, dgamma, dbeta = (tf.raw_ops.PreventGradient(input=g, message=message) for g in (dx, dgamma, dbeta))
            return dx, dgamma, dbeta

        return (y, count, true_mean, variance), gradient

    y, *moments = normalize(images, gamma, beta)
    return tf.cast(tf.reshape(y, tf.shape(x)), x.dtype), Moments(*map(tf.stop_gradient, moments))


FAR = 4.0
"""Deviations between 0 and the mean, from which on x is centred before its moments count: to here y stays as exact."""


def _centre_where_far(images, data_format):
    """images - pivot, the pivot, float64 [channels], and the Moments of images - pivot.

    The pivot is 0 and nothing is copied where every mean is near 0, as after a convolution most are: a layer's step is
    1.2x faster for it. An accelerator would have to wait for the answer, so there the images are always centred.
    """
    import tensorflow as tf

    def centred():
        pivot = _mean_of_first_example(images, data_format)
        moved = tf.nn.bias_add(images, -pivot, data_format)
        return moved, tf.cast(pivot, tf.float64), _moments_of_images(moved, data_format)

    if not only_cpus():
        return centred()
    moments = _moments_of_images(images, data_format)
    is_far = tf.reduce_any(tf.square(moments.mean) > FAR**2 * moments.variance)
    return tf.cond(is_far, centred, lambda: (images, tf.zeros_like(moments.mean), moments))


def _mean_of_first_example(images, data_format):
    """float32 [channels]; exactly the value of a constant channel, which x - pivot then makes 0; 0 of no values."""
    import tensorflow as tf

    first = images[:1]
    corner = first[:, :1, :1] if data_format == "NHWC" else first[:, :, :1, :1]
    difference = _moments_of_images(first - corner, data_format).mean
    corner = tf.reduce_sum(corner, _all_but_channels(data_format))
    return corner + tf.cast(difference, tf.float32)


def _moments_of_images(images, data_format):
    """Moments, float64 [channels], of float32 images.

    Sums in float32 over rows, of so few values that they lose nothing that matters, then in float64 over the rows: as
    fast as one float32 sum over all, whose 100,352 values lose 20 times as much.
    """
    import tensorflow as tf

    row, rest = (2, (0, 1)) if data_format == "NHWC" else ((2, 3), 0)
    channels = images.shape[-1 if data_format == "NHWC" else 1]
    count = tf.cast(tf.size(images) // channels, tf.float64)
    if _compiled_by_xla():  # which fuses these two, and has no kernel for the norm
        squares = tf.cast(tf.reduce_sum(tf.square(images), row), tf.float64)
    else:
        squares = tf.square(tf.cast(tf.math.reduce_euclidean_norm(images, row), tf.float64))
    sums = tf.cast(tf.reduce_sum(images, row), tf.float64)
    mean, square = (tf.reduce_sum(rows, rest) / tf.maximum(count, 1.0) for rows in (sums, squares))
    variance = tf.where(square < LARGEST_VARIANCE, tf.nn.relu(square - tf.square(mean)), LARGEST_VARIANCE)
    return Moments(count * tf.ones_like(mean), mean, variance)


def _scale_and_shift(images, scale, shift, data_format):
    """scale * images + shift for each channel, by a depthwise 1x1 convolution in one pass over the images."""
    import tensorflow as tf

    if data_format == "NHWC":
        scaled = tf.nn.depthwise_conv2d(images, tf.reshape(scale, (1, 1, -1, 1)), [1, 1, 1, 1], "VALID")
        return tf.nn.bias_add(scaled, shift)
    return images * _for_each_channel(scale, data_format) + _for_each_channel(shift, data_format)


def _all_but_channels(data_format):
    """The dimensions of images that moments are over."""
    return [0, 1, 2] if data_format == "NHWC" else [0, 2, 3]


def _for_each_channel(value, data_format):
    """[channels] in a shape that broadcasts against images."""
    import tensorflow as tf

    return value if data_format == "NHWC" else tf.reshape(value, (-1, 1, 1))
