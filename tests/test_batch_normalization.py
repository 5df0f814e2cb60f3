"""The layer is Algorithm 1, its gradient Section 3's six formulas, its moving variance unbiased."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from bn_keras import BatchNormalization

EPSILON = 1e-3
X = np.random.default_rng(0).normal(3, 2, (4, 5, 6, 3)).astype("float32")
DY = np.random.default_rng(1).normal(size=X.shape).astype("float32")
AXES = (0, 1, 2)


def algorithm_1(x):
    mean, variance = x.mean(AXES), x.var(AXES)
    return (x - mean) / np.sqrt(variance + EPSILON)


def test_training_is_algorithm_1():
    np.testing.assert_allclose(BatchNormalization()(X, training=True), algorithm_1(X.astype("float64")), atol=1e-5)


def test_gradients_are_the_papers_six_formulas():
    layer = BatchNormalization(gamma_initializer=keras.initializers.Constant(1.5))
    layer.build(X.shape)
    x = tf.constant(X)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(layer(x, training=True) * DY)
    dx, dgamma, dbeta = tape.gradient(loss, [x, layer.gamma.value, layer.beta.value])
    x64, dy, m = X.astype("float64"), DY.astype("float64"), X[..., 0].size
    mean, variance = x64.mean(AXES), x64.var(AXES)
    dxhat = dy * 1.5
    dvariance = (dxhat * (x64 - mean)).sum(AXES) * -0.5 * (variance + EPSILON) ** -1.5
    dmean = (-dxhat / np.sqrt(variance + EPSILON)).sum(AXES) + dvariance * (-2 * (x64 - mean)).sum(AXES) / m
    expected = dxhat / np.sqrt(variance + EPSILON) + dvariance * 2 * (x64 - mean) / m + dmean / m
    np.testing.assert_allclose(dx, expected, atol=1e-5)
    np.testing.assert_allclose(dgamma, (dy * algorithm_1(x64)).sum(AXES), rtol=1e-4)
    np.testing.assert_allclose(dbeta, dy.sum(AXES), rtol=1e-4)


@pytest.mark.parametrize("unbiased", [True, False])
def test_moving_averages_take_the_unbiased_variance_of_algorithm_2(unbiased):
    layer = BatchNormalization(momentum=0.9, unbiased=unbiased)
    layer(X, training=True)
    np.testing.assert_allclose(layer.moving_mean, 0.1 * X.mean(AXES), rtol=1e-5)
    variance = X.var(AXES, ddof=1 if unbiased else 0)
    np.testing.assert_allclose(layer.moving_variance, 0.9 + 0.1 * variance, rtol=1e-5)


def test_inference_after_training_with_momentum_0_agrees_with_training():
    layer = BatchNormalization(momentum=0.0, unbiased=False)
    before = layer(X, training=False).numpy()
    trained = layer(X, training=True).numpy()
    assert not np.allclose(before, trained, atol=0.1)
    np.testing.assert_allclose(layer(X, training=False), trained, atol=1e-5)


def test_a_frozen_layer_neither_uses_nor_changes_batch_statistics():
    layer = BatchNormalization()
    layer.build(X.shape)
    layer.trainable = False
    np.testing.assert_allclose(layer(X, training=True), X / np.sqrt(1 + EPSILON), rtol=1e-5)
    np.testing.assert_array_equal(layer.moving_mean, np.zeros(3))


def test_scaling_the_input_changes_nothing_and_divides_the_gradient():
    """Section 3.3: BN((aW)u) = BN(Wu), exact with epsilon 0."""
    layer = BatchNormalization(epsilon=0.0)
    layer.build((20, 4))
    u, w = tf.constant(X.reshape(20, 18)), tf.constant(DY.reshape(-1)[:72].reshape(18, 4))
    results = []
    for a in (1.0, 8.0):
        with tf.GradientTape() as tape:
            weights = a * w
            tape.watch([u, weights])
            y = layer(u @ weights, training=True)
            loss = tf.reduce_sum(y * tf.sin(tf.range(4.0)) * u[:, :4])
        results.append((y, *tape.gradient(loss, [u, weights])))
    (y, du, dw), (scaled_y, scaled_du, scaled_dw) = results
    np.testing.assert_allclose(scaled_y, y, atol=1e-5)
    np.testing.assert_allclose(scaled_du, du, atol=1e-4)
    np.testing.assert_allclose(scaled_dw * 8, dw, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape, axis", [((6, 4), -1), ((3, 5, 4), 1), ((2, 3, 5, 4), -1), ((2, 3, 5, 4), 1)])
@pytest.mark.parametrize("training", [True, False])
def test_keras_weights_load_and_give_keras_results(shape, axis, training):
    x = np.random.default_rng(2).normal(1, 3, shape).astype("float32")
    theirs = keras.layers.BatchNormalization(axis=axis)
    theirs.build(shape)
    theirs.set_weights([np.random.default_rng(k).uniform(0.5, 2, w.shape) for k, w in enumerate(theirs.get_weights())])
    ours = BatchNormalization(axis=axis, unbiased=False)
    ours.build(shape)
    ours.set_weights(theirs.get_weights())
    np.testing.assert_allclose(ours(x, training=training), theirs(x, training=training), atol=2e-5)
    for our, their in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(our, their, rtol=1e-5)


def test_the_config_round_trips():
    layer = BatchNormalization(momentum=0.5, epsilon=1e-5, unbiased=False, center=False, virtual_batch_size=4)
    assert BatchNormalization.from_config(layer.get_config()).get_config() == layer.get_config()
