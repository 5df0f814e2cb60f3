"""Mean and variance over a mini-batch, and the transform by them: the kernels behind `BatchNormalization`.

Three kernels compute the same transform (Section 3, Algorithm 1); they differ in what they can do and in their cost:

- `moments_over` and `transform`: any backend, XLA, mask, groups, dtype; differentiated by the backend.
- `normalize_centred`: TensorFlow on the CPU, and the moments of all replicas, by one collective each way.
- `normalize_fused`: TensorFlow's fused kernel, on accelerators where XLA does not compile.

All three subtract a pivot near the mean before they square, so that a large mean costs no digits. The pivot of a
constant channel is its very value: its y is beta exactly.
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
    """x less a pivot, and the moments of the unmasked values over `axes`, which stay as dimensions of 1.

    Returns:
        centred: x - pivot. pivot: the mean of x but for rounding; no gradient flows through it.
        moments: Moments of centred. So x has the mean pivot + moments.mean, which may round where the two do not.
    """
    constant = ops.stop_gradient(x)
    positions = ops.cast(math.prod(ops.shape(x)[axis] for axis in axes), x.dtype)
    if mask is None:
        count = positions
        first = tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(len(x.shape)))
        one_value = ops.sum(constant[first], axes, keepdims=True)  # a sum, which is 0 of no values
    else:
        count = ops.sum(ops.cast(mask, x.dtype), axes, keepdims=True)
        one_value = ops.max(ops.where(mask, constant, -math.inf), axes, keepdims=True, initial=-math.inf)
        one_value = ops.where(count > 0, one_value, 0)

    def mean_of(values):
        if mask is None:
            return ops.cast(_mean(values, axes), x.dtype)
        mean = _mean(ops.where(mask, values, 0), axes)
        return ops.cast(mean * ops.cast(positions / ops.maximum(count, 1.0), mean.dtype), x.dtype)

    pivot = one_value + mean_of(constant - one_value)
    centred = x - pivot
    mean = mean_of(centred)
    variance = ops.relu(mean_of(ops.square(centred)) - ops.square(mean))
    moments = Moments(count * ops.ones_like(mean), mean, variance)
    if synchronized and replica_count() > 1:
        wide = ops.cast(pivot, "float64")
        moments = combine_replicas(moments._replace(mean=wide + ops.cast(mean, "float64")))
        moments = Moments(*(ops.cast(v, x.dtype) for v in moments._replace(mean=moments.mean - wide)))
    if keras.backend.standardize_dtype(x.dtype) != "float64":
        moments = moments._replace(variance=ops.minimum(moments.variance, LARGEST_VARIANCE))
    return centred, pivot, moments


LONGEST_ROW = 128
"""Values that TensorFlow sums one after another in float32 before float64 takes over: they lose less than 1e-7."""


def _mean(x, axes):
    """The mean over `axes`, kept as dimensions of 1; 0 of no values. float64 on TensorFlow.

    TensorFlow sums one value after another, and XLA too where no dimension is above 31: 27,000 values then lose 1e-5.
    Hence means of means, which XLA cannot merge into one sum, or float64, which JAX does not have.
    """
    if keras.backend.backend() != "tensorflow":
        for axis in reversed(axes):
            x = ops.sum(x, axis, keepdims=True) / max(x.shape[axis], 1)
        return x
    count = math.prod(ops.shape(x)[axis] for axis in axes)
    *outer, row = axes
    if outer and x.shape[row] is not None and x.shape[row] <= LONGEST_ROW:
        x, axes = ops.sum(x, row, keepdims=True), outer
    total = ops.sum(ops.cast(x, "float64"), axes, keepdims=True)
    return total / ops.cast(ops.maximum(count, 1), "float64")


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
    """The moments of all replicas' values, float64, by one collective; replicas may hold different counts, or none.

    Sums m * mean and m * (variance + mean^2) in float64. There, and only there, a variance is a difference of squares:
    with mean 1000 and deviation 1 it loses 20 of float64's 53 bits; float32 would keep 4 of its 24.
    """
    count, mean, variance = (ops.cast(value, "float64") for value in moments)
    sums = ops.stack([count, count * mean, count * (variance + ops.square(mean))])
    count, mean, square = ops.unstack(sum_over_replicas(sums))
    divisor = ops.maximum(count, 1.0)
    mean, square = mean / divisor, square / divisor
    return Moments(count, mean, ops.relu(square - ops.square(mean)))


def transform(x, mean, variance, gamma, beta, epsilon):
    """gamma * (x - mean) / sqrt(variance + epsilon) + beta; x is centred first, so a large mean costs no digits."""
    scale = ops.rsqrt(variance + epsilon)
    y = ops.add(x, -mean) * (scale if gamma is None else scale * gamma)
    return y if beta is None else ops.add(y, beta)


def scale_and_shift(x, mean, variance, gamma, beta, epsilon):
    """The same of x that a matrix product has rounded already: one operation less, which exporters make part of it."""
    scale = ops.rsqrt(variance + epsilon)
    scale = scale if gamma is None else scale * gamma
    return ops.add(x * scale, -mean * scale if beta is None else beta - mean * scale)


def is_from_linear_operation(x):
    """Whether x is known to be what a matrix product or a convolution computes, in a graph of TensorFlow's."""
    if not tensorflow_kernels_fit(x):
        return False
    import tensorflow as tf

    if not tf.is_symbolic_tensor(x):
        return False
    operation = x.op
    while operation.type in ("Reshape", "Squeeze", "BiasAdd"):
        operation = operation.inputs[0].op
    return "Conv" in operation.type or "MatMul" in operation.type


def tensorflow_kernels_fit(x):
    """Whether TensorFlow's kernels below take x. XLA fuses operations by itself, and would expand them inexactly."""
    dtypes = ("float16", "bfloat16", "float32")
    if keras.backend.backend() != "tensorflow" or keras.backend.standardize_dtype(x.dtype) not in dtypes:
        return False
    return not _compiled_by_xla()


def normalize(x, axis, gamma, beta, epsilon, synchronized):
    """The transform by the moments of x, or of all replicas' x, on TensorFlow, by the best kernel for the device.

    Args:
        x: float32, float16 or bfloat16 of any rank; axis: its channel dimension, >= 0.
        gamma, beta: float32 [channels] or None.
        synchronized: whether the moments are those of all replicas.

    Returns:
        y, like x, and its Moments, float32 [channels].
    """
    import tensorflow as tf

    synchronized = synchronized and replica_count() > 1
    images, data_format = _as_images(tf.cast(x, tf.float32), axis)
    gamma, beta = _parameters(x, axis, gamma, beta)
    if synchronized or only_cpus():
        y, moments = normalize_centred(images, data_format, gamma, beta, epsilon, synchronized)
    else:
        y, moments = normalize_fused(images, data_format, gamma, beta, epsilon)
    return tf.cast(tf.reshape(y, tf.shape(x)), x.dtype), moments


def only_cpus():
    """Whether TensorFlow has no accelerator, so that a kernel may be chosen for the CPU."""
    import tensorflow as tf

    return all(device.device_type == "CPU" for device in tf.config.list_logical_devices())


def when_one(count, act):
    """Calls `act` if count is 1: now, or when TensorFlow's graph runs, unless XLA compiles it, which cannot call it."""
    if isinstance(count, int):
        if count == 1:
            act()
    elif not _compiled_by_xla():
        import tensorflow as tf

        tf.cond(count == 1, lambda: tf.numpy_function(lambda: act() or False, [], tf.bool), lambda: False)


def _compiled_by_xla():
    """Whether TensorFlow is tracing for XLA. By a module that is not public: nothing public tells."""
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    if tf.executing_eagerly():
        return False
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def _as_images(x, axis):
    """x as 4 dimensions, without moving data: (view, data_format). Of NHWC, W is a row that float32 may sum."""
    shape, channels = ops.shape(x), x.shape[axis]
    if axis != len(x.shape) - 1:
        return ops.reshape(x, (math.prod(shape[:axis]), channels, math.prod(shape[axis + 1 :]), 1)), "NCHW"
    row = _row_length(x)
    if len(x.shape) == 4 and row is shape[2]:
        return x, "NHWC"
    return ops.reshape(x, (shape[0], math.prod(shape[1:axis]) // row, row, channels)), "NHWC"


def _row_length(x):
    """Values to sum in float32, a divisor of the positions of an example: 1, so none, where that could be many."""
    if len(x.shape) == 2:
        return 1
    width = ops.shape(x)[-2]
    if isinstance(width, int):
        return width if width <= LONGEST_ROW else max(k for k in range(1, LONGEST_ROW + 1) if width % k == 0)
    return 1 if len(x.shape) == 3 else width


def _parameters(x, axis, gamma, beta):
    """gamma and beta as float32 [channels], 1 and 0 where there are none."""
    channels = (x.shape[axis],)
    return (
        ops.ones(channels, "float32") if gamma is None else gamma,
        ops.zeros(channels, "float32") if beta is None else beta,
    )


def takes_fused_inference(x, axis):
    """Whether `transform_fused` takes x: it does not take 2 or 3 dimensions, nor a channel in the middle."""
    rank = len(x.shape)
    # Exporters to ONNX make a scale and a shift part of a Conv3D before it, but not this kernel.
    takes_rank = rank == 4 or (rank == 5 and not is_from_linear_operation(x))
    return tensorflow_kernels_fit(x) and takes_rank and axis in (1, rank - 1)


def transform_fused(x, axis, mean, variance, gamma, beta, epsilon):
    """The transform by given moments, float32 [channels], by TensorFlow's kernel, which exporters know. Returns y."""
    import tensorflow as tf

    spatial = "DHW"[5 - len(x.shape) :]
    gamma, beta = _parameters(x, axis, gamma, beta)
    return tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=gamma,
        offset=beta,
        mean=mean,
        variance=variance,
        epsilon=epsilon,
        data_format=f"NC{spatial}" if axis == 1 else f"N{spatial}C",
        is_training=False,
    )[0]


def normalize_fused(images, data_format, gamma, beta, epsilon):
    """The transform by the moments of float32 images, on TensorFlow's fused kernel: (y, Moments)."""
    import tensorflow as tf

    pivot = tf.stop_gradient(_mean_of_first_examples(images, data_format))
    unused = tf.constant([], tf.float32)
    y, mean, unbiased, *_ = tf.raw_ops.FusedBatchNormV3(
        x=tf.nn.bias_add(images, -pivot, data_format),
        scale=gamma,
        offset=beta,
        mean=unused,
        variance=unused,
        epsilon=epsilon,
        data_format=data_format,
        is_training=True,
    )
    # The kernel returns NaN for no values, and infinity where the sum of squares overflows: beyond 1e17 or so.
    count = tf.cast(tf.size(images) // tf.size(pivot), tf.float32)
    mean = tf.math.multiply_no_nan(mean, tf.minimum(count, 1.0))
    biased = tf.math.multiply_no_nan(unbiased, tf.maximum(count - 1.0, 0.0) / tf.maximum(count, 1.0))
    return y, Moments(count * tf.ones_like(mean), pivot + mean, tf.minimum(biased, LARGEST_VARIANCE))


def normalize_centred(images, data_format, gamma, beta, epsilon, synchronized):
    """The transform by the moments of float32 images, or of all replicas' images: (y, Moments).

    Where a channel's mean is beyond FAR deviations, x is centred first, on the mean of the first example: its distance
    to the mean is at most sqrt(N - 1) deviations of N examples. So with deviation 1 y is within 9e-7 of float64's at
    mean 0, 3, 1000 and 1e5, on [32,56,56,64], where Keras's layer errs by 1.0e-5, 1.5e-5, 2.4e-3 and 0.35.

    With m the count and xhat = (x - mean) / sqrt(variance + epsilon), the gradients are Section 3's,

        dbeta = sum(dy)
        dgamma = sum(dy * xhat)
        dx = gamma / sqrt(variance + epsilon) * (dy - dbeta / m - xhat * dgamma / m)

    with the sums over all replicas in dx: one collective forward and one backward. The gradients of gamma and beta are
    those of this replica's examples, as every other variable's are: the optimizer adds them up. The synchronized
    gradient cannot be differentiated again: asking for it is an error.
    """
    import tensorflow as tf

    @tf.custom_gradient
    def normalize(images, gamma, beta):
        centred, pivot, moments = _centre_where_far(images, data_format)
        true = moments._replace(mean=pivot + moments.mean)
        if synchronized:
            true = combine_replicas(true)
        true = true._replace(variance=tf.minimum(true.variance, LARGEST_VARIANCE))
        inverse = tf.math.rsqrt(true.variance + epsilon)
        shift = tf.cast(beta, tf.float64) - tf.cast(gamma, tf.float64) * inverse * (true.mean - pivot)
        mean, inverse, shift = (tf.cast(value, tf.float32) for value in (true.mean - pivot, inverse, shift))
        count, true_mean, variance = (tf.cast(value, tf.float32) for value in true)
        y = _scale_and_shift(centred, gamma * inverse, shift, data_format)

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
    return y, Moments(*map(tf.stop_gradient, moments))


FAR = 2.0
"""Deviations between 0 and the mean, from which on x is centred. Without, y errs by 8e-7 at 2, by 1.1e-6 at 4."""


def _centre_where_far(images, data_format):
    """images - pivot, the pivot, float64 [channels], and the Moments of images - pivot.

    The pivot is 0 and nothing is copied where every mean is near 0, as after a convolution most are: a layer's step is
    1.25x faster for it. An accelerator would have to wait for the answer, so there the images are always centred.
    """
    import tensorflow as tf

    def centred():
        pivot = _mean_of_first_examples(images, data_format)
        return tf.nn.bias_add(images, -pivot, data_format), pivot

    if only_cpus():
        no_pivot = tf.zeros(images.shape[-1 if data_format == "NHWC" else 1])
        images, pivot = tf.cond(_is_far(images, data_format), centred, lambda: (images, no_pivot))
    else:
        images, pivot = centred()
    return images, tf.cast(pivot, tf.float64), _moments_of_images(images, data_format)


def _is_far(images, data_format):
    """Whether the first examples' mean is beyond FAR deviations in any channel, or their squares beyond float32."""
    import tensorflow as tf

    first = _first_examples(images)
    count, total, squares = _sums(first, data_format)
    # The variance errs as the sums of rows do, by 2e-8 sqrt(row / rows), but 1 + (mean / deviation)^2 times as much.
    row = tf.cast(tf.shape(images)[2] if data_format == "NHWC" else 1, tf.float64)
    all_examples = tf.cast(tf.size(images) // tf.size(total), tf.float64)
    far = tf.minimum(tf.constant(FAR**2, tf.float64), 3.0 * tf.sqrt(all_examples) / row)
    is_near = tf.square(total) * (1.0 + far) <= count * squares * far
    return tf.logical_not(tf.reduce_all(is_near & tf.math.is_finite(squares)))


def _first_examples(images):
    """The first example, or as many as have 32 positions."""
    _, height, width, _ = images.shape
    return images[: max(1, 32 // (height * width)) if height and width else 1]


def _mean_of_first_examples(images, data_format):
    """float32 [channels]; exactly the value of a constant channel, which x - pivot then makes 0; 0 of no values."""
    import tensorflow as tf

    first = _first_examples(images)
    corner = first[:1, :1, :1] if data_format == "NHWC" else first[:1, :, :1, :1]
    corner = tf.reduce_sum(corner, _all_but_channels(data_format))
    count, difference, _ = _sums(tf.nn.bias_add(first, -corner, data_format), data_format)
    return corner + tf.cast(difference / tf.maximum(count, 1.0), tf.float32)


def _moments_of_images(images, data_format):
    """Moments, float64 [channels], of float32 images."""
    import tensorflow as tf

    count, total, squares = _sums(images, data_format)
    mean, square = total / tf.maximum(count, 1.0), squares / tf.maximum(count, 1.0)
    variance = tf.where(square < LARGEST_VARIANCE, tf.nn.relu(square - tf.square(mean)), LARGEST_VARIANCE)
    return Moments(count * tf.ones_like(mean), mean, variance)


def _sums(images, data_format):
    """How many values a channel has, their sum and the sum of their squares, float64 [], [channels], [channels].

    Sums in float32 over rows, of so few values that they lose nothing that matters, then in float64 over the rows: as
    fast as one float32 sum over all, whose 100,352 values lose 20 times as much.
    """
    import tensorflow as tf

    row, rest = (2, [0, 1]) if data_format == "NHWC" else (3, [0, 2])
    total = tf.reduce_sum(tf.cast(tf.reduce_sum(images, row), tf.float64), rest)
    squares = tf.reduce_sum(tf.square(tf.cast(tf.math.reduce_euclidean_norm(images, row), tf.float64)), rest)
    return tf.cast(tf.size(images) // tf.size(total), tf.float64), total, squares


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
