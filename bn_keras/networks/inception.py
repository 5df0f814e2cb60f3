"""The Inception network of Figure 5 as a table, and the functional Keras model built from it."""

from collections.abc import Callable
from typing import NamedTuple

import keras

from bn_keras.layers.dropout import Dropout
from bn_keras.layers.local_response_normalization import LocalResponseNormalization
from bn_keras.networks.variants import Variant


class Module(NamedTuple):
    """One row of Figure 5: the feature maps of each branch; 0 where the figure has a dash."""

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


# The figure contradicts itself: its projections of 4c and 4d, 128, make 608 maps, but its output column says 576. 96
# makes 576, as in TF-Slim; `Variant.projection_4c_4d` of 128 is the other reading (Caffe, CNTK).
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


def classifier_initializer() -> keras.Initializer:
    """Not in the paper: Keras's own."""
    return keras.initializers.GlorotUniform()


def build(
    images: keras.KerasTensor,
    variant: Variant,
    *,
    maps: Callable[[int], int],
    batch_normalization: Callable[..., keras.layers.Layer],
    l2: keras.regularizers.Regularizer | None,
) -> keras.KerasTensor:
    """The network of Figure 5 up to its classifier.

    Convolutions are initialized He-normal (not in the paper: CNTK's) times the variant's `initial_weight_scale`, and
    batch normalizations by the layer's defaults.

    Args:
      images: `[N, size, size, channels]` in [-1, 1].
      variant: a row of `VARIANTS` whose `network` is "inception".
      maps: turns a count of feature maps in the figure into the count at the network's width.
      batch_normalization: makes a normalization layer, of `name=` and, if the variant says so, `per_activation=True`.
      l2: the regularizer of every kernel.

    Returns:
      The classifier's input, `[N, features]`.
    """
    caffe = variant.padding == "caffe"
    per_activation = tuple(
        f"inception_{row.name}_" for row in FIGURE_5[len(FIGURE_5) - variant.per_activation_modules :]
    )

    def initializer():
        """Scaled He-normal; a new initializer for each kernel, as an initializer draws its seed when it is made."""
        return keras.initializers.VarianceScaling(2.0 * variant.initial_weight_scale**2, "fan_in", "truncated_normal")

    def conv(x, count, size, name, stride=1, layer=keras.layers.Conv2D, **initial):
        """Convolution, normalization and nonlinearity: `g(BN(Wu))`, or `g(Wu + b)` without BN (Section 3.2)."""
        initial = initial or {"kernel_initializer": initializer(), "kernel_regularizer": l2}
        padding = "same"
        if caffe and stride > 1:
            x, padding = keras.layers.ZeroPadding2D(size // 2, name=f"{name}_padding")(x), "valid"
        x = layer(
            maps(count),
            size,
            strides=stride,
            padding=padding,
            use_bias=not variant.batch_normalization,
            name=f"{name}_conv",
            **initial,
        )(x)
        if variant.batch_normalization:
            own = {"per_activation": True} if name.startswith(per_activation) else {}
            x = batch_normalization(epsilon=variant.epsilon, name=f"{name}_bn", **own)(x)
        return keras.layers.Activation(variant.activation, name=name)(x)

    def pool(x, kind, stride, name):
        layer = {"average": keras.layers.AveragePooling2D, "max": keras.layers.MaxPooling2D}[kind]
        padding = "same"
        if caffe and kind == "average":  # its averages count the zeros of the padding
            x, padding = keras.layers.ZeroPadding2D(1, name=f"{name}_padding")(x), "valid"
        elif caffe and stride > 1 and x.shape[1] % 2:  # windows stay within the image; of an even size, as SAME's
            padding = "valid"
        return layer(3, stride, padding=padding, name=name)(x)

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

    x = images
    if variant.separable_stem:
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
        x = inception(x, row._replace(projection=variant.projection_4c_4d) if row.name in ("4c", "4d") else row)
    x = keras.layers.GlobalAveragePooling2D(name="average_pool")(x)
    return Dropout(variant.dropout, name="dropout")(x) if variant.dropout else x
