"""`build_network` builds the network that a row of `VARIANTS` describes, by the module of this folder that it names."""

import importlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from bn_keras.layers.batch_normalization import BatchNormalization
from bn_keras.networks.variants import VARIANTS, Variant
from bn_keras.settings import fields_of

_COLORS = {
    "torch": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "caffe": ((128.0, 117.0, 104.0), (1.0, 1.0, 1.0)),
}
"""Mean and deviation of red, green and blue, from 0 to 255, for each `input_convention`."""


def build_network(
    variant: str | Variant,
    *,
    image_size: int = 224,
    channels: int = 3,
    classes: int = 1000,
    width: float = 1.0,
    include_top: bool = True,
    batch_normalization: Callable[..., keras.layers.Layer] = BatchNormalization,
    **normalization: Any,
) -> keras.Model:
    """Builds the network of one row of `VARIANTS`, with the function `build` of the row's module.

    Weights are initialized from Keras's global seed (`keras.utils.set_random_seed`).

    Args:
      variant: a key of `VARIANTS`, or a row of your own, such as `replace(VARIANTS["bn_x5"], projection_4c_4d=128)`.
      image_size: height and width of the input in pixels. The networks' total stride is 32.
      channels: 3 for color, 1 for gray.
      classes: outputs of the classifier.
      width: factor on every count of feature maps, rounded down to a multiple of 8, at least 8.
      include_top: whether the network ends with its classifier.
      batch_normalization: makes each normalization layer. It is called with `name=`, and with `per_activation=True`
        for the layers for which the variant says so.
      normalization: more arguments for each normalization layer, such as `momentum=0.99`.

    Returns:
      A functional model from `images` float32 `[N, image_size, image_size, channels]` in [-1, 1] to `logits` float32
      `[N, classes]`; without its top to what the classifier is given, `[N, 1024]` of Inception at width 1.

    Raises:
      ValueError: an argument is out of its range, `variant` is not in the table or has a setting of another network, or
        Keras is set to channels first.
    """
    if keras.config.image_data_format() != "channels_last":
        raise ValueError(
            "The network has its channels last: call keras.config.set_image_data_format('channels_last') before. "
            f"Received: image_data_format={keras.config.image_data_format()!r}"
        )
    if isinstance(variant, str):
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}. Received: variant={variant!r}")
        variant = VARIANTS[variant]
    for name, value in (("image_size", image_size), ("channels", channels), ("classes", classes)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1. Received: {name}={value}")
    if not 0 < width <= 16:
        raise ValueError(f"width must be greater than 0 and at most 16. Received: width={width}")
    for name, field in fields_of(Variant).items():
        if not field.setting.allows(value := getattr(variant, name)):
            raise ValueError(f"{name} must be {field.setting.range()}. Received: {name}={value}")
    if foreign := foreign_settings(variant):
        raise ValueError(f"{foreign[0]} is no setting of {variant.network}. Received: {variant}")

    def maps(count: int) -> int:
        return count if width == 1.0 else max(8, int(count * width) // 8 * 8)

    def normalized(**own: Any) -> keras.layers.Layer:
        return batch_normalization(**normalization, **own)

    # Keras's L2 is the penalty c * sum(w^2), whose gradient is 2c * w; `l2_weight` is Caffe's, the gradient's factor.
    l2 = keras.regularizers.L2(variant.l2_weight / 2) if variant.l2_weight else None
    images = keras.Input((image_size, image_size, channels), name="images")
    network = importlib.import_module(f"bn_keras.networks.{variant.network}")
    pixels = _by_convention(images, variant.input_convention)
    features = network.build(pixels, variant, maps=maps, batch_normalization=normalized, l2=l2)
    if not include_top:
        return keras.Model(images, features, name=variant.name)
    logits = keras.layers.Dense(
        classes,
        kernel_initializer=network.classifier_initializer(),
        kernel_regularizer=l2,
        dtype="float32",  # whatever the precision policy: a softmax over float16 logits overflows at 65504
        name="logits",
    )(features)
    return keras.Model(images, logits, name=variant.name)


def _by_convention(images, convention):
    """Turns images in [-1, 1] into pixels of an `input_convention`. Gray ones take its mean over the colors."""
    if convention not in _COLORS:
        return images
    mean, deviation = np.array(_COLORS[convention])
    scale, offset = 127.5 / deviation, (127.5 - mean) / deviation
    if images.shape[-1] == 1:
        scale, offset = scale.mean(keepdims=True), offset.mean(keepdims=True)
    # In float32 whatever the precision policy: bfloat16 has 8 significant bits, no more than a pixel.
    layer = keras.layers.Rescaling(scale.tolist(), offset.tolist(), dtype="float32", name="input_convention")
    return layer(images)


def foreign_settings(variant: Variant) -> list[str]:
    """The settings that a row changes from their default although its network does not have them."""
    return [
        name
        for name, field in fields_of(Variant).items()
        if field.setting.network not in (None, variant.network) and getattr(variant, name) != field.default
    ]
