"""Mean and variance over a mini-batch, and the transform by them (Section 3, Algorithm 1), on any backend.

This module serves every backend under XLA, masks, groups and float64; `tensorflow_kernels` does the same for
TensorFlow without XLA. Both subtract a pivot near the mean before they square, so that a large mean costs no digits.
The pivot of a constant channel is its value, so that its y is exactly beta.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from bn_keras.layers.groups import Groups, Tensor, count_of
from bn_keras.layers.replicas import combine_replicas, replica_count
from bn_keras.private_names import compiled_by_xla

if keras.backend.backend() == "jax":
    from bn_keras.layers import jax_kernels

LARGEST_VARIANCE = 1.7e38
"""Half of float32's maximum: the largest variance, so that m/(m-1) times it is finite too, for m > 1."""


class Moments(NamedTuple):
    """Mean and variance of m values, for each of the channels; float32 (float64 for float64 inputs).

    count: m. mean: sum(x) / m. variance: sum((x - mean)^2) / m, the biased one that normalizes.
    The three broadcast against each other. Where count is 0, mean and variance are 0.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor


def at_least_float32(dtype: Any) -> str:
    """The dtype of statistics: float64 for float64, else float32. Keras's `result_type` has no float64 on PyTorch."""
    return "float64" if keras.backend.standardize_dtype(dtype) == "float64" else "float32"


def moments_over(
    x: Tensor,
    axes: Sequence[int],
    group_size: int | None = None,
    mask: Tensor | None = None,
    synchronized: bool = False,
) -> tuple[Groups, Tensor, Moments]:
    """The moments of each group's unmasked values, after a pivot is subtracted.

    The pivot is near the mean, so that E[(x - pivot)^2] - E[x - pivot]^2 loses few digits: both are one pass over x.
    Without a mask it is the mean of a group's first examples, which costs no pass.

    Args:
        x: float32 or float64, of any rank.
        axes: the dimensions to take moments over, of which the first counts examples; each becomes 1.
        group_size: examples in a group; None for one group of all.
        mask: bool, like x, or None.
        synchronized: whether a group has the examples of all replicas.

    Returns:
        groups: Groups, which spread a group's values over its examples.
        pivot: [..., groups, ...], within sqrt(N - 1) deviations of the mean of N examples. It has no gradient.
        moments: Moments of x - pivot. So x has the mean pivot + moments.mean, which may round where the two do not.
    """
    example, *positions = axes
    groups = Groups(x, example, group_size)
    constant = ops.stop_gradient(x)
    if mask is None:
        first = groups.first_examples(constant, _examples_of_32_positions(x, positions))
        inner = [example + 1, *(axis + 1 for axis in positions)]
        corner = tuple(slice(0, 1) if axis in inner else slice(None) for axis in range(len(first.shape)))
        one_value = ops.sum(first[corner], inner, keepdims=True)  # a sum, which is 0 of no values
        pivot = ops.squeeze(one_value + ops.cast(_mean(first - one_value, inner), x.dtype), example + 1)
        values = ops.ones([groups.examples if axis == example else 1 for axis in range(len(x.shape))], x.dtype)
        values *= ops.cast(count_of(x, positions), x.dtype)
    else:
        one_value = ops.max(ops.where(mask, constant, -math.inf), positions, keepdims=True, initial=-math.inf)
        one_value = ops.max(groups.fold(one_value, -math.inf), example + 1, initial=-math.inf)
        values = ops.sum(ops.cast(mask, x.dtype), positions, keepdims=True)
    count = ops.sum(groups.fold(values), example + 1)

    def of_group(mean):
        """The mean of a group's unmasked values, from each example's mean, in which masked values count as 0."""
        mean = ops.squeeze(_mean(groups.fold(mean), [example + 1], LONGEST_SUM_OF_SUMS), example + 1)
        all_values = ops.cast(groups.size * count_of(x, positions), mean.dtype)
        return ops.cast(mean * (all_values / ops.cast(ops.maximum(count, 1.0), mean.dtype)), x.dtype)

    if mask is not None:
        one_value = ops.where(count > 0, one_value, 0)
        pivot = one_value + of_group(_mean(ops.where(mask, constant - groups.spread(one_value), 0), positions))
    centred = x - groups.spread(pivot)
    means = _mean_and_mean_square(centred if mask is None else ops.where(mask, centred, 0), positions)
    mean, square = map(of_group, means)
    largest = math.inf if keras.backend.standardize_dtype(x.dtype) == "float64" else LARGEST_VARIANCE
    variance = ops.where(square < largest, ops.relu(square - ops.square(mean)), largest)
    moments = Moments(count * ops.ones_like(mean), mean, variance)
    if synchronized and replica_count() > 1:
        wide = ops.cast(pivot, "float64")
        moments = combine_replicas(moments._replace(mean=wide + ops.cast(mean, "float64")))
        moments = moments._replace(mean=moments.mean - wide, variance=ops.minimum(moments.variance, largest))
        moments = Moments(*(ops.cast(value, x.dtype) for value in moments))
    return groups, pivot, moments


def _examples_of_32_positions(x, positions):
    sizes = [x.shape[axis] for axis in positions]
    return 1 if None in sizes or 0 in sizes else max(1, 32 // math.prod(sizes))


LONGEST_ROW = 128
"""How many values TensorFlow sums one after another in float32, before float64 takes over: they lose less than 1e-7."""

LONGEST_SUM = 1024
"""How many values XLA may sum one after another in float32: sums of squares lose 6e-7, the mean of 32 of them 1e-7."""

LONGEST_SUM_OF_SUMS = 32
"""How many such sums XLA may add one after another in float32: they lose 1e-7."""


def _mean(x, axes, longest=LONGEST_SUM):
    """The mean over `axes`, kept as dimensions of 1; 0 of no values. float64 on TensorFlow without XLA.

    TensorFlow sums one value after another, as XLA does if no dimension is above 31: 27,000 values then lose 1e-5.
    So TensorFlow sums in float64, after rows of up to LONGEST_ROW; XLA takes means of means, which it cannot merge.
    """
    if not axes:
        return x
    known = all(x.shape[axis] is not None for axis in axes)
    if keras.backend.backend() != "tensorflow" or (known and compiled_by_xla()):
        while axes:
            axes, last = _last_axes(x, axes, longest)
            size = count_of(x, last)
            row = max(k for k in range(1, longest + 1) if size % k == 0)
            if 1 < row < size > longest:
                (axis,) = last
                rows = ops.reshape(x, (*x.shape[:axis], size // row, row, *x.shape[axis + 1 :]))
                x, axes = _mean_in_float32(rows, [axis + 1], row, keepdims=False), [*axes, axis]
            else:
                x = _mean_in_float32(x, last, max(size, 1), keepdims=True)
            longest = LONGEST_SUM_OF_SUMS
        return x
    count = count_of(x, axes)
    *outer, row = axes
    if outer and x.shape[row] is not None and x.shape[row] <= LONGEST_ROW:
        x, axes = ops.sum(x, row, keepdims=True), outer
    total = ops.sum(ops.cast(x, "float64"), axes, keepdims=True)
    return total / ops.cast(ops.maximum(count, 1), "float64")


def _mean_in_float32(x, axes, count, keepdims):
    """The sum over `axes` divided by `count`.

    x is first multiplied by a power of two, which loses nothing: on a CPU, XLA computes x - pivot inside a sum of
    products, but would store it for a bare sum.
    """
    power = 2.0 ** -math.ceil(math.log2(count))
    return ops.sum(x * power, axes, keepdims=keepdims) / (count * power)


def _mean_and_mean_square(x, axes):
    """The means of x and of x^2 as `_mean` takes them."""
    if keras.backend.backend() == "jax" and axes:
        outer, last = _last_axes(x, axes, LONGEST_SUM)
        if 0 < count_of(x, last) <= LONGEST_SUM:
            sums = jax_kernels.sum_and_sum_of_squares(x, last)
            return [_mean(total / count_of(x, last), outer, LONGEST_SUM_OF_SUMS) for total in sums]
    return _mean(x, axes), _mean(ops.square(x), axes)


def _last_axes(x, axes, longest):
    """Splits axes in two: the others, and the last ones (at least one) that together have up to `longest` values."""
    start = len(axes) - 1
    while start > 0 and count_of(x, axes[start - 1 :]) <= longest:
        start -= 1
    return axes[:start], axes[start:]


def transform(
    x: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor | None, beta: Tensor | None, epsilon: float
) -> Tensor:
    """gamma * (x - mean) / sqrt(variance + epsilon) + beta; x is centred first, so a large mean costs no digits."""
    scale = ops.rsqrt(variance + epsilon)
    y = ops.add(x, -mean) * (scale if gamma is None else scale * gamma)
    return y if beta is None else ops.add(y, beta)


def scale_and_shift(
    mean: Tensor, variance: Tensor, gamma: Tensor | None, beta: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """(scale, shift): scale * x + shift is the transform of x. x needs a mean near 0, or to be rounded already."""
    scale = ops.rsqrt(variance + epsilon)
    scale = scale if gamma is None else scale * gamma
    return scale, -mean * scale if beta is None else beta - mean * scale
