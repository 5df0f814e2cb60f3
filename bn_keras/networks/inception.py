"""The Inception network of Figure 5 as a table, and the functional Keras model built from it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras

from bn_keras.layers.batch_normalization import BatchNormalization
from bn_keras.layers.dropout import Dropout
from bn_keras.layers.local_response_normalization import LocalResponseNormalization
from bn_keras.networks.variants import VARIANTS, Variant


class Module(NamedTuple):
    """One row of Figure 5: feature maps of every branch; 0 where the figure has a dash."""

    name: str
    stride: int
    output: int
    conv_1x1: int
    reduce_3x3: int
    conv_3x3: int
    double_reduce_3x3: int
    double_3x3: int
    pool: str
    projection: int


# The projections of 4c and 4d are 128 in the figure, which makes 608 maps where its output column says 576; 96 makes
# 576, as in TF-Slim. `build_network(projection_4c_4d=128)` is the other reading (Caffe, CNTK).
FIGURE_5 = (
    Module("3a", 1, 256, 64, 64, 64, 64, 96, "average", 32),
    Module("3b", 1, 320, 64, 64, 96, 64, 96, "average", 64),
    Module("3c", 2, 576, 0, 128, 160, 64, 96, "max", 0),
    Module("4a", 1, 576, 224, 64, 96, 96, 128, "average", 128),
    Module("4b", 1, 576, 192, 96, 128, 96, 128, "average", 128),
    Module("4c", 1, 576, 160, 128, 160, 128, 160, "average", 96),
    Module("4d", 1, 576, 96, 128, 192, 160, 192, "average", 96),
    Module("4e", 2, 1024, 0, 128, 192, 192, 256, "max", 0),
    Module("5a", 1, 1024, 352, 192, 320, 160, 224, "average", 128),
    Module("5b", 1, 1024, 352, 192, 320, 192, 224, "max", 128),
)

STEM_DEPTH_MULTIPLIER = 8


def build_network(
    variant: str | Variant,
    *,
    image_size: int = 224,
    channels: int = 3,
    classes: int = 1000,
    width: float = 1.0,
    batch_normalization: Callable[..., keras.layers.Layer] = BatchNormalization,
    separable_stem: bool = True,
    projection_4c_4d: int = 96,
    **normalization: Any,
) -> keras.Model:
    """Builds the network of Figure 5 for one row of `VARIANTS`.

    Weights are initialized from Keras's global seed (`keras.utils.set_random_seed`): convolutions He-normal (not in the
    paper: CNTK's) times the variant's `initial_weight_scale`, the classifier Glorot-uniform (Keras's), BN as the layer
    says.

    Args:
      variant: a key of `VARIANTS`, or a row of your own.
      image_size: height and width of the input in pixels. The network's total stride is 32.
      channels: 3 for color, 1 for gray.
      classes: outputs of the classifier.
      width: factor on every count of feature maps, rounded down to a multiple of 8, at least 8.
      batch_normalization: called with `name=`, and `per_activation=True` where the variant says so, for every
        normalization; another layer class changes them all.
      separable_stem: the first 7x7 convolution is depthwise with multiplier 8, then 1x1 (Figure 5); False makes it a
        plain convolution.
      projection_4c_4d: maps of the pool projections of 4c and 4d, 96 (the figure's output column) or 128 (its
        projection column, which makes 608 maps there and 1056 after 4e).
      normalization: more arguments of every normalization, such as `momentum=0.99`.

    Returns:
      A functional model from `images` float32 `[N, image_size, image_size, channels]` in [-1, 1] to `logits` float32
      `[N, classes]`.

    Raises:
      ValueError: an argument is out of its range, `variant` is not in the table, or Keras is set to channels first.
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
    if projection_4c_4d not in (96, 128):
        raise ValueError(f"projection_4c_4d must be 96 or 128. Received: projection_4c_4d={projection_4c_4d}")

    if not 0 <= variant.per_activation_modules <= len(FIGURE_5):
        raise ValueError(
            f"per_activation_modules must be 0 to {len(FIGURE_5)}. Received: {variant.per_activation_modules}"
        )

    # Keras's L2 is the penalty c * sum(w^2), whose gradient is 2c * w; `l2_weight` is Caffe's, the gradient's factor.
    l2 = keras.regularizers.L2(variant.l2_weight / 2) if variant.l2_weight else None
    per_activation = tuple(
        f"inception_{row.name}_" for row in FIGURE_5[len(FIGURE_5) - variant.per_activation_modules :]
    )

    def initializer():
        """He-normal, scaled; a new one for every kernel, because each draws its seed when it is made."""
        return keras.initializers.VarianceScaling(2.0 * variant.initial_weight_scale**2, "fan_in", "truncated_normal")

    def maps(count):
        return count if width == 1.0 else max(8, int(count * width) // 8 * 8)

    def conv(x, count, size, name, stride=1, layer=keras.layers.Conv2D, **initial):
        """Convolution, normalization and nonlinearity: `g(BN(Wu))`, or `g(Wu + b)` without BN (Section 3.2)."""
        initial = initial or {"kernel_initializer": initializer(), "kernel_regularizer": l2}
        x = layer(
            maps(count),
            size,
            strides=stride,
            padding="same",
            use_bias=not variant.batch_normalization,
            name=f"{name}_conv",
            **initial,
        )(x)
        if variant.batch_normalization:
            own = {"per_activation": True} if name.startswith(per_activation) else {}
            x = batch_normalization(name=f"{name}_bn", **normalization, **own)(x)
        return keras.layers.Activation(variant.activation, name=name)(x)

    def pool(x, kind, stride, name):
        layer = {"average": keras.layers.AveragePooling2D, "max": keras.layers.MaxPooling2D}[kind]
        return layer(3, stride, padding="same", name=name)(x)

    def response_norm(x, name):
        return LocalResponseNormalization(name=name)(x) if variant.local_response_normalization else x

    def inception(x, row):
        name = f"inception_{row.name}"
        branches = []
        if row.conv_1x1:
            branches.append(conv(x, row.conv_1x1, 1, f"{name}_1x1"))
        branch = conv(x, row.reduce_3x3, 1, f"{name}_3x3_reduce")
        branches.append(conv(branch, row.conv_3x3, 3, f"{name}_3x3", row.stride))
        branch = conv(x, row.double_reduce_3x3, 1, f"{name}_double_3x3_reduce")
        branch = conv(branch, row.double_3x3, 3, f"{name}_double_3x3_1")
        branches.append(conv(branch, row.double_3x3, 3, f"{name}_double_3x3_2", row.stride))
        branch = pool(x, row.pool, row.stride, f"{name}_pool")
        branches.append(conv(branch, row.projection, 1, f"{name}_projection") if row.projection else branch)
        return keras.layers.Concatenate(name=name)(branches)

    images = x = keras.Input((image_size, image_size, channels), name="images")
    if separable_stem:
        x = conv(
            x,
            64,
            7,
            "conv1_7x7",
            2,
            keras.layers.SeparableConv2D,
            depth_multiplier=STEM_DEPTH_MULTIPLIER,
            depthwise_initializer=initializer(),
            pointwise_initializer=initializer(),
            depthwise_regularizer=l2,
            pointwise_regularizer=l2,
        )
    else:
        x = conv(x, 64, 7, "conv1_7x7", 2)
    x = response_norm(pool(x, "max", 2, "pool1"), "lrn1")
    x = conv(x, 64, 1, "conv2_3x3_reduce")
    x = response_norm(conv(x, 192, 3, "conv2_3x3"), "lrn2")
    x = pool(x, "max", 2, "pool2")
    for row in FIGURE_5:
        x = inception(x, row._replace(projection=projection_4c_4d) if row.name in ("4c", "4d") else row)
    x = keras.layers.GlobalAveragePooling2D(name="average_pool")(x)
    if variant.dropout:
        x = Dropout(variant.dropout, name="dropout")(x)
    # float32 whatever the precision policy: a softmax over float16 logits overflows at 65504.
    logits = keras.layers.Dense(classes, kernel_regularizer=l2, dtype="float32", name="logits")(x)
    return keras.Model(images, logits, name=variant.name)
