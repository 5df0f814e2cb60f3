"""ResNet (He et al., 2015) as trained by Goyal et al. (2017): version 1.5, which strides in a bottleneck's 3x3."""

from collections.abc import Callable

import keras

from bn_keras.layers.dropout import Dropout
from bn_keras.networks.variants import Variant

STAGES = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
"""The number of blocks in each stage, for each depth. The first stage has 64 maps, each later one twice as many."""

EXPANSION = {18: 1, 50: 4}
"""How many times more maps a block ends with than its 3x3 convolution has; above 1 the block is a bottleneck."""

EPSILON = 1e-5
"""Batch normalization's epsilon, the value of Goyal et al.'s code and of torchvision."""


def classifier_initializer() -> keras.Initializer:
    """Goyal et al., Section 5.1."""
    return keras.initializers.RandomNormal(stddev=0.01)


def build(
    images: keras.KerasTensor,
    variant: Variant,
    *,
    maps: Callable[[int], int],
    batch_normalization: Callable[..., keras.layers.Layer],
    l2: keras.regularizers.Regularizer | None,
) -> keras.KerasTensor:
    """The ResNet of a row's `depth`, up to its classifier.

    As in Goyal et al., Section 5.1, convolutions are initialized He-normal over their outputs. The gamma of a block's
    last normalization begins at 0, so that the block begins as the identity. Strided convolutions and the pooling have
    the same padding on all sides, as in PyTorch; TensorFlow's SAME would shift the image by a pixel. L2 is only on
    kernels, not on gamma, beta and bias.

    The arguments and the result are those of `inception.build`.
    """

    def padded(x, size, name):
        return keras.layers.ZeroPadding2D(size // 2, name=f"{name}_padding")(x)

    def conv(x, count, size, name, stride=1, activation=True, gamma="ones"):
        """relu(BN(Wu)), or BN(Wu) before an addition."""
        padding = "same"
        if stride > 1:
            x, padding = padded(x, size, name) if size > 1 else x, "valid"
        x = keras.layers.Conv2D(
            count,
            size,
            stride,
            padding,
            use_bias=False,
            kernel_initializer=keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal"),
            kernel_regularizer=l2,
            name=f"{name}_conv",
        )(x)
        x = batch_normalization(epsilon=EPSILON, gamma_initializer=gamma, name=f"{name}_bn")(x)
        return keras.layers.Activation("relu", name=name)(x) if activation else x

    def block(x, count, stride, name):
        outputs = maps(count * EXPANSION[variant.depth])
        shortcut = x
        if stride > 1 or x.shape[-1] != outputs:
            shortcut = conv(x, outputs, 1, f"{name}_shortcut", stride, activation=False)
        if EXPANSION[variant.depth] > 1:
            x = conv(x, maps(count), 1, f"{name}_1x1_reduce")
            x = conv(x, maps(count), 3, f"{name}_3x3", stride)
            x = conv(x, outputs, 1, f"{name}_1x1", activation=False, gamma="zeros")
        else:
            x = conv(x, maps(count), 3, f"{name}_3x3_1", stride)
            x = conv(x, outputs, 3, f"{name}_3x3_2", activation=False, gamma="zeros")
        x = keras.layers.Add(name=f"{name}_sum")([x, shortcut])
        return keras.layers.Activation("relu", name=name)(x)

    x = conv(images, maps(64), 7, "conv1", 2)
    x = keras.layers.MaxPooling2D(3, 2, name="pool1")(padded(x, 3, "pool1"))
    for stage, blocks in enumerate(STAGES[variant.depth]):
        for number in range(blocks):
            stride = 2 if stage and not number else 1
            x = block(x, 64 << stage, stride, f"stage{stage + 1}_block{number + 1}")
    x = keras.layers.GlobalAveragePooling2D(name="average_pool")(x)
    return Dropout(variant.dropout, name="dropout")(x) if variant.dropout else x
