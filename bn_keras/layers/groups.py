"""Groups of consecutive examples (`virtual_batch_size`). Only one value of each example is reshaped, never x."""

import math
from collections.abc import Iterable
from typing import Any, TypeAlias

from keras import ops

Tensor: TypeAlias = Any
"""A tensor of the backend that Keras runs on, or a symbolic one."""


class Groups:
    """The groups of a mini-batch along one of its dimensions; the last is smaller if the batch does not divide evenly.

    Args:
        x: the mini-batch.
        axis: the dimension of the examples; there are n.
        size: examples in a group; None for one group of all.
    """

    def __init__(self, x: Tensor, axis: int, size: int | None):
        self.axis = axis
        self.examples = ops.shape(x)[axis]
        self.single = size is None or (isinstance(self.examples, int) and self.examples <= size)
        self.size: Any = self.examples if self.single else size
        self.count = 1 if self.single else (self.examples + self.size - 1) // self.size

    def fold(self, values: Tensor, padding: float = 0.0) -> Tensor:
        """Reshapes [..., n, ...] to [..., groups, size, ...]; `padding` fills a smaller last group."""
        *before, _ = shape = ops.shape(values)[: self.axis + 1]
        after = ops.shape(values)[len(shape) :]
        missing = self.count * self.size - self.examples
        if not (isinstance(missing, int) and missing == 0):
            filling = ops.full((*before, missing, *after), padding, values.dtype)
            values = ops.concatenate([values, filling], self.axis)
        return ops.reshape(values, (*before, self.count, self.size, *after))

    def spread(self, values: Tensor) -> Tensor:
        """Gives each example its group's value: [..., groups, ...] becomes [..., n, ...], or broadcasts to it."""
        if self.single:
            return values
        values = ops.repeat(values, self.size, self.axis)
        return values[(*[slice(None)] * self.axis, slice(0, self.examples))]

    def first_examples(self, x: Tensor, count: int) -> Tensor:
        """The first k = min(count, size) examples of each group, [..., groups, k, ...]; short groups repeat one."""
        if self.single:
            return ops.expand_dims(x[(*[slice(None)] * self.axis, slice(0, count))], self.axis)
        count = min(count, self.size)
        if count == 1:
            return ops.expand_dims(x[(*[slice(None)] * self.axis, slice(None, None, self.size))], self.axis + 1)
        indices = ops.arange(self.count)[:, None] * self.size + ops.arange(count)
        return ops.take(x, ops.minimum(indices, self.examples - 1), self.axis)


def count_of(x: Tensor, axes: Iterable[int]) -> Any:
    """How many values x has along `axes`; an int if these dimensions are known."""
    return math.prod(ops.shape(x)[axis] for axis in axes)
