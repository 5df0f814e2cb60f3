"""Changes brightness, hue, saturation and contrast at random, by one affine map of each image's colors."""

import math
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from bn_keras.input.preprocessing import COLOR, RGB_TO_YIQ

# Not in the paper: TF-Slim's. Brightness as a fraction of full scale, hue in radians of the YIQ plane (TF-Slim's
# 0.2 of a turn in HSV), saturation and contrast as the half-width of a factor's range around 1.
_FULL_DISTORTION = (32 / 255, 0.2 * 2 * math.pi, 0.5, 0.5)


class Colors(NamedTuple):
    """The affine map of colors of one example or a batch, without the part that depends on the image's mean.

    Attributes:
      matrix: float32 `[..., C, C]`, which multiplies a row of a pixel's channels.
      contrast: float32 `[...]`, a factor.
      brightness: float32 `[...]`, as a fraction of full scale.
    """

    matrix: tf.Tensor
    contrast: tf.Tensor
    brightness: tf.Tensor


def random_colors(draws: tf.Tensor, amount: str, channels: int) -> Colors:
    """Random brightness, hue, saturation and contrast.

    Args:
      draws: float32 `[..., DRAWS]`, the result of `uniform_draws`.
      amount: "full" (TF-Slim's ranges), "reduced" (half of them; the seventh change of Section 4.2.1) or "none".
      channels: with one, hue and saturation change nothing.
    """
    factor = {"full": 1.0, "reduced": 0.5, "none": 0.0}[amount]
    moves = (2.0 * draws[..., COLOR] - 1.0) * (factor * tf.constant(_FULL_DISTORTION))
    brightness, hue, saturation, contrast = tf.unstack(moves, axis=-1)
    if channels == 3:
        matrix = tf.linalg.matrix_transpose(hue_saturation_matrix(hue, 1.0 + saturation))
    else:
        matrix = tf.ones_like(hue)[..., None, None]
    return Colors(matrix, 1.0 + contrast, brightness)


def distort_colors(images: tf.Tensor, colors: Colors) -> tf.Tensor:
    """Changes brightness, hue, saturation and contrast by one affine map of each image's colors.

    With `M` the color matrix of `hue_saturation_matrix`, `b` the brightness offset, `k` the contrast factor and `mean`
    the mean over an image's pixels: `y = k * (M x - M mean) + M mean + b`, scaled to the network's range and clipped
    to it. Compiled by XLA, it is one pass over the pixels.

    Args:
      images: uint8 or float32 `[H, W, C]` or `[N, H, W, C]` in [0, 255].
      colors: the result of `random_colors` for each image.

    Returns:
      float32, of the images' shape, in [-1, 1].
    """
    images = tf.cast(images, tf.float32)
    k, brightness = (part[..., None, None, None] for part in (colors.contrast, colors.brightness))
    rows = tf.unstack(colors.matrix[..., None, None, :, :], axis=-2)

    def turned(pixels):
        return tf.add_n([pixels[..., c, None] * row for c, row in enumerate(rows)])

    offset = ((1.0 - k) * turned(_mean_color(images)) + 255.0 * brightness) / 127.5 - 1.0
    return tf.clip_by_value((k / 127.5) * turned(images) + offset, -1.0, 1.0)


def _mean_color(images):
    """The mean over an image's pixels, `[..., 1, 1, C]`."""
    *_, height, width, channels = images.shape
    several, length = (-1,) * (len(images.shape) - 3), height * width * channels
    sums = tf.reshape(images, (*several, length))
    # XLA makes vector instructions of additions, not of reductions: 30 us instead of 120 for 224 x 224 pixels.
    while length % (4 * channels) == 0:
        length //= 4
        sums = tf.add_n([sums[..., k * length : (k + 1) * length] for k in range(4)])
    sums = tf.reshape(sums, (*several, length // channels, 1, channels))
    return tf.reduce_sum(sums, -3, keepdims=True) / (height * width)


def random_distortion(images: tf.Tensor, draws: tf.Tensor, amount: str) -> tf.Tensor:
    """`distort_colors` by the `random_colors` of each image's draws; see there for arguments and result."""
    return distort_colors(images, random_colors(draws, amount, images.shape[-1]))


@keras.saving.register_keras_serializable("bn_keras")
class PhotometricDistortion(keras.layers.Layer):
    """`random_distortion` as a layer, so that the accelerator computes it and the host sends bytes.

    Takes `(images, draws)`, uint8 `[N, H, W, C]` and float32 `[N, DRAWS]`, as `training_batches(distort_on="device")`
    yields them, and returns float32 in [-1, 1] under any precision policy. The layer itself draws no random numbers.

    Args:
      amount: "full", "reduced" or "none".
    """

    def __init__(self, amount: str, **kwargs: Any):
        super().__init__(autocast=False, **kwargs)  # mixed precision would round the draws
        self.amount = amount

    def call(self, inputs: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        return random_distortion(*inputs, self.amount)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return input_shape[0]

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"amount": self.amount}


def hue_saturation_matrix(delta_hue: tf.Tensor, scale_saturation: tf.Tensor) -> tf.Tensor:
    """Color matrices that turn the IQ plane by `delta_hue` radians and scale it: TensorFlow Addons' `hsv_in_yiq`.

    Args:
      delta_hue: float32 `[...]`, radians.
      scale_saturation: float32 `[...]`, a factor.

    Returns:
      float32 `[..., 3, 3]`; it times a column of RGB values is the distorted color.
    """
    yiq = np.array(RGB_TO_YIQ)
    cosine, sine = scale_saturation * tf.cos(delta_hue), scale_saturation * tf.sin(delta_hue)
    one, zero = tf.ones_like(cosine), tf.zeros_like(cosine)
    turn = tf.stack([one, zero, zero, zero, cosine, -sine, zero, sine, cosine], -1)
    turn = tf.reshape(turn, (*(-1,) * len(turn.shape[:-1]), 3, 3))
    return tf.constant(np.linalg.inv(yiq), tf.float32) @ turn @ tf.constant(yiq, tf.float32)
