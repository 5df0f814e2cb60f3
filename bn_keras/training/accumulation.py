"""Gradient accumulation: computes a mini-batch in parts, one after another, so that memory holds one part only."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from bn_keras.layers.batch_normalization import BatchNormalization
from bn_keras.layers.moments import Moments
from bn_keras.private_names import graph_of_its_own, layers_within


def sum_over_parts(
    model: keras.Model, compute: Callable[..., list[Moments]], batch: Any, parts: int, shapes: Sequence[Sequence[int]]
) -> list[tf.Tensor]:
    """The sums of what `compute` returns for each part of a mini-batch, in the order of the parts.

    Moving averages take one step, after the last part, by the statistics of all groups of the mini-batch. So they are
    those of the whole mini-batch at once.

    Args:
      model: the model that `compute` calls in training.
      compute: `compute(*part)` returns float32 tensors.
      batch: tensors `[N, ...]`, in any structure; `parts` divides N.
      parts: how many.
      shapes: of what `compute` returns.
    """
    size = tf.nest.flatten(batch)[0].shape[0] // parts
    layers = [layer for layer in layers_within(model) if isinstance(layer, BatchNormalization) and layer.trainable]
    noted: dict[BatchNormalization, list[Moments]] = {layer: [] for layer in layers}

    @graph_of_its_own
    def values_and_moments(*part):
        with _noting(noted):
            values = compute(*part)
        calls = [[tf.stack(list(moments)) for moments in noted[layer]] or tf.zeros(0) for layer in layers]
        return values, [tf.stack(each) for each in calls]

    def add_part(part, sums, arrays):
        def of_part(value):
            return tf.slice(value, [part * size, *[0] * (len(value.shape) - 1)], [size, *value.shape[1:]])

        values, moments = values_and_moments(*tf.nest.map_structure(of_part, batch))
        arrays = [array.write(part, each) for array, each in zip(arrays, moments, strict=True)]
        return part + 1, [total + value for total, value in zip(sums, values, strict=True)], arrays

    start = 0, [tf.zeros(shape) for shape in shapes], [tf.TensorArray(tf.float32, parts) for _ in layers]
    _, sums, arrays = tf.while_loop(lambda part, *_: part < parts, add_part, start, parallel_iterations=1)
    for array, layer in zip(arrays, layers, strict=True):
        of_calls = array.stack()  # [parts, calls, 3, groups of a part, *channels]
        for call, of_part in enumerate(noted[layer]):
            shape = (parts * of_part.mean.shape[0], *layer.moving_mean.shape)
            moments = Moments(*(tf.reshape(of_calls[:, call, k], shape) for k in range(3)))
            layer.statistics.update(layer, moments)
    return sums


class _Noted:
    """The statistics of a layer during one part: the mini-batch's Moments are noted, and the averages stay."""

    def __init__(self, statistics, noted):
        self.by_mini_batch = statistics.by_mini_batch
        self._noted = noted

    def update(self, layer, moments):
        self._noted.append(moments)


@contextlib.contextmanager
def _noting(noted: dict[BatchNormalization, list[Moments]]) -> Iterator[None]:
    for layer, moments in noted.items():
        moments.clear()
        layer.__dict__["statistics"] = _Noted(layer.statistics, moments)
    try:
        yield
    finally:
        for layer in noted:
            del layer.__dict__["statistics"]
