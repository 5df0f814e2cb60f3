"""Mean and variance over a mini-batch, and the transform by them (Section 3, Algorithm 1), on any backend.

XLA, masks, groups and float64 are computed here; `tensorflow_kernels` has the same for TensorFlow without XLA. Both
subtract a pivot near the mean before they square, so that a large mean costs no digits. The pivot of a constant channel
is its very value: its y is beta exactly.
"""

import math
from typing import NamedTuple

import keras
from keras import ops

from bn_keras.layers.replicas import combine_replicas, replica_count

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
