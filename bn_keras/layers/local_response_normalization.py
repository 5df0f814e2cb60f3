"""Local response normalization: Inception has it, the accelerated networks do without it (Section 4.2.1)."""

from typing import Any

import keras
import numpy as np

from bn_keras.layers.groups import Tensor


@keras.saving.register_keras_serializable(package="bn_keras")
class LocalResponseNormalization(keras.layers.Layer):
    """`y = x / (1 + alpha * mean(x^2 over `size` neighbouring channels))^0.75`, channels last.

    Not in the paper: the constants are GoogLeNet's in Caffe (size 5, alpha 1e-4, beta 0.75, k 1). As there, a
    window beyond the first or last channel counts zeros, and the mean still divides by 5.

    Args:
      size: width of the window over channels, an odd number.
      alpha: weight of the mean square.
    """

    def __init__(self, size: int = 5, alpha: float = 1e-4, **kwargs: Any):
        super().__init__(**kwargs)
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size must be odd and positive, so that the window has a centre. Received: size={size}")
        self.size = size
        self.alpha = alpha

    def build(self, input_shape: tuple) -> None:
        channels = np.arange(input_shape[-1])
        window = np.abs(channels[:, None] - channels[None, :]) <= self.size // 2
        self.window = window[None, None].astype("float32")

    def call(self, inputs: Tensor) -> Tensor:
        # The sum over neighbouring channels is a 1x1 convolution with a band matrix, and s^-0.75 is two square roots:
        # five shifted sums cost six times as much in training on a CPU, pow costs five times as much as the roots.
        window = keras.ops.cast(self.window, inputs.dtype)
        total = keras.ops.conv(keras.ops.square(inputs), window, padding="same", data_format="channels_last")
        inverse_root = keras.ops.rsqrt(1.0 + (self.alpha / self.size) * total)
        return inputs * inverse_root * keras.ops.sqrt(inverse_root)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "size": self.size, "alpha": self.alpha}
