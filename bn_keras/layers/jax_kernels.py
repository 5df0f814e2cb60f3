"""What XLA is told on JAX in the place of being left to find it."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax


def sum_and_sum_of_squares(x: Any, axes: Sequence[int]) -> list[Any]:
    """The sums of x and of x^2 over `axes`, kept as dimensions of 1, in one pass over x by construction.

    Two sums are one pass on a GPU, where XLA merges them, but not on a CPU, where it also writes an x - pivot that both
    share: 9 times x instead of 3 were read or written in a forward pass.
    """
    kept = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    return [total.reshape(kept) for total in _sums(x, tuple(axes))]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _sums(x, axes):
    zero = x.dtype.type(0)
    return lax.reduce((x, x * x), (zero, zero), lambda one, other: (one[0] + other[0], one[1] + other[1]), axes)


@_sums.defjvp
def _change_of_sums(axes, primals, tangents):
    (x,), (dx,) = primals, tangents
    return _sums(x, axes), (dx.sum(axes), (2 * x * dx).sum(axes))
