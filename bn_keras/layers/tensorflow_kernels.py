"""The transform and its moments on TensorFlow without XLA, by the kernels that are fast on its devices.

- `normalize_centred` is for the CPU, and for the moments of all replicas, with one collective each way.
- `normalize_fused` is TensorFlow's fused kernel, for accelerators.
- `transform_fused` normalizes by given moments, with the fused kernel that exporters know.

Other backends may import this module; for them `fit` is false.
"""

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from bn_keras.layers.groups import Tensor
from bn_keras.layers.moments import LARGEST_VARIANCE, LONGEST_ROW, Moments
from bn_keras.layers.replicas import combine_replicas, replica_count, sum_over_replicas
from bn_keras.private_names import compiled_by_xla

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf


def fit(x: Tensor) -> bool:
    """Whether the kernels below take x. Not under XLA: it fuses operations by itself, and expands these inexactly."""
    dtypes = ("float16", "bfloat16", "float32")
    if keras.backend.backend() != "tensorflow" or keras.backend.standardize_dtype(x.dtype) not in dtypes:
        return False
    return not compiled_by_xla()


def normalize(
    x: Tensor, axis: int, gamma: Tensor | None, beta: Tensor | None, epsilon: float, synchronized: bool
) -> tuple[Tensor, Moments]:
    """The transform by the moments of x, or of all replicas' x, on TensorFlow, by the best kernel for the device.

    Args:
        x: float32, float16 or bfloat16 of any rank; axis: its channel dimension, >= 0.
        gamma, beta: float32 [channels] or None.
        synchronized: whether the moments are those of all replicas.

    Returns:
        y, like x, and its Moments, float32 [channels].
    """
    synchronized = synchronized and replica_count() > 1
    images, data_format = _as_images(tf.cast(x, tf.float32), axis)
    gamma, beta = _parameters(x, axis, gamma, beta)
    if synchronized or only_cpus():
        y, moments = normalize_centred(images, data_format, gamma, beta, epsilon, synchronized)
    else:
        y, moments = normalize_fused(images, data_format, gamma, beta, epsilon)
    return tf.cast(tf.reshape(y, tf.shape(x)), x.dtype), moments


def only_cpus() -> bool:
    """Whether TensorFlow has no accelerator, so that a kernel may be chosen for the CPU."""
    return all(device.device_type == "CPU" for device in tf.config.list_logical_devices())


def when_one(count: Any, act: Callable[[], object]) -> None:
    """Calls `act` if count is 1: at once, or when TensorFlow's graph runs, unless XLA compiles that graph."""
    if isinstance(count, int):
        if count == 1:
            act()
    elif not compiled_by_xla():
        tf.cond(count == 1, lambda: tf.numpy_function(lambda: act() or False, [], tf.bool), lambda: False)


def is_from_linear_operation(x: Tensor) -> bool:
    """Whether x is, in a graph of TensorFlow, the output of a matrix product or a convolution."""
    if not fit(x) or not tf.is_symbolic_tensor(x):
        return False
    operation = x.op
    while operation.type in ("Reshape", "Squeeze", "BiasAdd"):
        operation = operation.inputs[0].op
    return "Conv" in operation.type or "MatMul" in operation.type


def _as_images(x, axis):
    """x viewed in 4 dimensions: (view, data_format). In NHWC, W is so short that float32 may sum over it."""
    shape, channels = ops.shape(x), x.shape[axis]
    if axis != len(x.shape) - 1:
        return ops.reshape(x, (math.prod(shape[:axis]), channels, math.prod(shape[axis + 1 :]), 1)), "NCHW"
    row = _row_length(x)
    if len(x.shape) == 4 and row is shape[2]:
        return x, "NHWC"
    return ops.reshape(x, (shape[0], math.prod(shape[1:axis]) // row, row, channels)), "NHWC"


def _row_length(x):
    """How many values to sum in float32, a divisor of an example's positions; 1 if that number is not known."""
    if len(x.shape) == 2:
        return 1
    width = ops.shape(x)[-2]
    if isinstance(width, int):
        return width if width <= LONGEST_ROW else max(k for k in range(1, LONGEST_ROW + 1) if width % k == 0)
    return 1 if len(x.shape) == 3 else width


def _parameters(x, axis, gamma, beta):
    """gamma and beta as float32 [channels]; 1 and 0 if the layer has none."""
    channels = (x.shape[axis],)
    return (
        ops.ones(channels, "float32") if gamma is None else gamma,
        ops.zeros(channels, "float32") if beta is None else beta,
    )


def takes_fused_inference(x: Tensor, axis: int) -> bool:
    """Whether `transform_fused` takes x: it needs 4 or 5 dimensions, and the channels first or last among them."""
    rank = len(x.shape)
    # ONNX exporters can merge a scale and a shift into a Conv3D, but cannot merge this kernel.
    takes_rank = rank == 4 or (rank == 5 and not is_from_linear_operation(x))
    return fit(x) and takes_rank and axis in (1, rank - 1)


def transform_fused(
    x: Tensor, axis: int, mean: Tensor, variance: Tensor, gamma: Tensor | None, beta: Tensor | None, epsilon: float
) -> Tensor:
    """y, the transform of x by given moments, float32 [channels], by the TensorFlow kernel that exporters know."""
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


def normalize_fused(
    images: Tensor, data_format: str, gamma: Tensor, beta: Tensor, epsilon: float
) -> tuple[Tensor, Moments]:
    """The transform by the moments of float32 images, on TensorFlow's fused kernel: (y, Moments)."""
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


def normalize_centred(
    images: Tensor, data_format: str, gamma: Tensor, beta: Tensor, epsilon: float, synchronized: bool
) -> tuple[Tensor, Moments]:
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
            else:  # synchronized; GPUs have no deterministic form of the fused kernel for given moments
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
"""x is centred if its mean is more deviations from 0 than this. Uncentred, y errs by 8e-7 at 2 of them, 1.1e-6 at 4."""


def _centre_where_far(images, data_format):
    """images - pivot, the pivot, float64 [channels], and the Moments of images - pivot.

    If every mean is near 0, as most are after a convolution, the pivot is 0 and nothing is copied, which makes the
    layer's step 1.25x faster. An accelerator would have to wait for the answer, so there the images are always centred.
    """

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
    first = _first_examples(images)
    count, total, squares = _sums(first, data_format)
    # The variance errs by 2e-8 sqrt(row / rows), the error of the sums of rows, times 1 + (mean / deviation)^2.
    row = tf.cast(tf.shape(images)[2] if data_format == "NHWC" else 1, tf.float64)
    all_examples = tf.cast(tf.size(images) // tf.size(total), tf.float64)
    far = tf.minimum(tf.constant(FAR**2, tf.float64), 3.0 * tf.sqrt(all_examples) / row)
    is_near = tf.square(total) * (1.0 + far) <= count * squares * far
    return tf.logical_not(tf.reduce_all(is_near & tf.math.is_finite(squares)))


def _first_examples(images):
    """The first example, or the first few if one has fewer than 32 positions."""
    _, height, width, _ = images.shape
    return images[: max(1, 32 // (height * width)) if height and width else 1]


def _mean_of_first_examples(images, data_format):
    """The mean, float32 [channels]: exactly a constant channel's value, so that x - pivot is 0; 0 of no values."""
    first = _first_examples(images)
    corner = first[:1, :1, :1] if data_format == "NHWC" else first[:1, :, :1, :1]
    corner = tf.reduce_sum(corner, _all_but_channels(data_format))
    count, difference, _ = _sums(tf.nn.bias_add(first, -corner, data_format), data_format)
    return corner + tf.cast(difference / tf.maximum(count, 1.0), tf.float32)


def _moments_of_images(images, data_format):
    """Moments, float64 [channels], of float32 images."""
    count, total, squares = _sums(images, data_format)
    mean, square = total / tf.maximum(count, 1.0), squares / tf.maximum(count, 1.0)
    variance = tf.where(square < LARGEST_VARIANCE, tf.nn.relu(square - tf.square(mean)), LARGEST_VARIANCE)
    return Moments(count * tf.ones_like(mean), mean, variance)


def _sums(images, data_format):
    """How many values a channel has, their sum and the sum of their squares, float64 [], [channels], [channels].

    Rows are summed in float32, being short enough to lose nothing that matters, and their sums in float64. That is as
    fast as one float32 sum, which over 100,352 values loses 20 times as much.
    """
    row, rest = (2, [0, 1]) if data_format == "NHWC" else (3, [0, 2])
    total = tf.reduce_sum(tf.cast(tf.reduce_sum(images, row), tf.float64), rest)
    squares = tf.reduce_sum(tf.square(tf.cast(tf.math.reduce_euclidean_norm(images, row), tf.float64)), rest)
    return tf.cast(tf.size(images) // tf.size(total), tf.float64), total, squares


def _scale_and_shift(images, scale, shift, data_format):
    """scale * images + shift for each channel, by a depthwise 1x1 convolution in one pass over the images."""
    if data_format == "NHWC":
        scaled = tf.nn.depthwise_conv2d(images, tf.reshape(scale, (1, 1, -1, 1)), [1, 1, 1, 1], "VALID")
        return tf.nn.bias_add(scaled, shift)
    return images * _for_each_channel(scale, data_format) + _for_each_channel(shift, data_format)


def _all_but_channels(data_format):
    """The dimensions of images that moments are taken over."""
    return [0, 1, 2] if data_format == "NHWC" else [0, 2, 3]


def _for_each_channel(value, data_format):
    """Reshapes [channels] so that it broadcasts against images."""
    return value if data_format == "NHWC" else tf.reshape(value, (-1, 1, 1))
