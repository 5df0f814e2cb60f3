"""`bn_keras.layers.convolution.Conv2D` is `keras.layers.Conv2D`, with another way to the kernel's gradient."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from bn_keras.layers.convolution import Conv2D


def gradients_of(layer, images, direction):
    with tf.GradientTape() as tape:
        tape.watch(images)
        outputs = layer(images, training=True) if isinstance(layer, Conv2D) else layer(images)
        loss = tf.reduce_sum(outputs * direction)
    return outputs, *tape.gradient(loss, [images, *(weight.value for weight in layer.trainable_weights)])


@pytest.mark.parametrize(
    ("shape", "options", "products"),
    [
        ((2, 5, 7, 64), {}, True),
        ((2, 5, 7, 64), {"kernel_size": 1}, True),
        ((2, 5, 7, 64), {"kernel_size": 5}, False),
        ((1, 1, 1, 64), {"use_bias": False}, True),
        ((3, 8, 4, 80), {}, True),
        ((2, 5, 7, 16), {}, False),
        ((2, 6, 6, 64), {"strides": 2}, False),
        ((2, 6, 6, 64), {"padding": "valid"}, False),
        ((2, 6, 6, 64), {"dilation_rate": 2}, False),
    ],
)
def test_outputs_and_gradients_are_those_of_keras(shape, options, products):
    options = {"kernel_size": 3, "padding": "same"} | options
    layer, twin = Conv2D(5, **options), keras.layers.Conv2D(5, **options)
    images = tf.random.stateless_normal(shape, [0, 1])
    for each in (layer, twin):
        each.build(shape)
    twin.set_weights(layer.get_weights())
    assert layer._products_pay(images) is products
    direction = tf.random.stateless_normal(twin(images).shape, [0, 2])
    ours, theirs = gradients_of(layer, images, direction), gradients_of(twin, images, direction)
    assert len(ours) == len(theirs) == 2 + len(layer.trainable_weights)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


def test_the_kernels_gradient_is_the_sum_over_positions():
    random = np.random.default_rng(0)
    images, direction = random.normal(size=(2, 3, 4, 64)), random.normal(size=(2, 3, 4, 2))
    layer = Conv2D(2, 3, padding="same")
    layer.build(images.shape)
    _, _, kernel, _ = gradients_of(layer, tf.constant(images, tf.float32), tf.constant(direction, tf.float32))
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)])
    for row in range(3):
        for column in range(3):
            shifted = padded[:, row : row + 3, column : column + 4]
            expected = np.einsum("nhwc,nhwk->ck", shifted, direction)
            np.testing.assert_allclose(kernel[row, column], expected, rtol=1e-4, atol=1e-4)


def test_the_same_bits_every_time():
    images = tf.random.stateless_normal((8, 14, 14, 96), [0, 1])
    layer = Conv2D(128, 3, padding="same")
    layer.build(images.shape)
    direction = tf.random.stateless_normal((8, 14, 14, 128), [0, 2])
    step = tf.function(lambda: gradients_of(layer, images, direction)[2])
    first = step().numpy()
    for _ in range(5):
        np.testing.assert_array_equal(step().numpy(), first)


def test_a_batch_of_unknown_size_and_a_file(tmp_path):
    model = keras.Sequential([keras.Input((6, 6, 64)), Conv2D(3, 3, padding="same")])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[0]) is Conv2D
    images = tf.random.stateless_normal((2, 6, 6, 64), [0, 1])
    np.testing.assert_array_equal(loaded(images), model(images))
