"""What is left of a batch normalization that cannot be folded into a linear layer (Section 3.1)."""

from typing import Any

import keras
from keras import ops

from bn_keras.layers.groups import Tensor
from bn_keras.layers.moments import at_least_float32


@keras.saving.register_keras_serializable(package="bn_keras")
class ScaleAndShift(keras.layers.Layer):
    """y = scale * (x - center) + shift for each channel: a batch normalization at inference.

    The center is subtracted first, and not made a part of the shift, so that a large mean costs no digits.

    Args:
        axis: the channel dimension; None for a scale, center and shift of every activation.
    """

    def __init__(self, axis: int | None = -1, **kwargs: Any):
        super().__init__(**kwargs)
        self.axis = axis
        self.supports_masking = True

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        rank = len(input_shape)
        own = range(1, rank) if self.axis is None else (self.axis % rank,)
        self._broadcast_shape = tuple(input_shape[i] if i in own else 1 for i in range(rank))
        shape = tuple(input_shape[i] for i in own)
        kind = {"dtype": at_least_float32(self.variable_dtype), "autocast": False}
        self.center = self.add_weight(shape=shape, name="center", initializer="zeros", **kind)
        self.scale = self.add_weight(shape=shape, name="scale", initializer="ones", **kind)
        self.shift = self.add_weight(shape=shape, name="shift", initializer="zeros", **kind)

    def call(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        dtype = at_least_float32(inputs.dtype)
        variables = (self.center, self.scale, self.shift)
        center, scale, shift = (ops.reshape(ops.cast(each, dtype), self._broadcast_shape) for each in variables)
        return ops.cast((ops.cast(inputs, dtype) - center) * scale + shift, self.compute_dtype)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "axis": self.axis}
