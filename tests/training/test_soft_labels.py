"""Label smoothing and MixUp beside Keras's loss and the formulas in NumPy; draws that are a function of the step."""

import keras
import numpy as np
import tensorflow as tf
from conftest import make_run_config

from bn_keras.training.distribution import make_strategy
from bn_keras.training.soft_labels import SoftLabels, mixture_of
from bn_keras.training.training_state import TrainingState, make_replica_step

LABELS = np.array([0, 2, 1, 1, 2, 0], "int32")
IMAGES = np.random.default_rng(0).normal(size=(6, 5, 5, 1)).astype("float32")


def config_of(**changes):
    return make_run_config(batch_size=6, **changes)


def linear(config):
    """Logits that a layer without bias and batch normalization makes of the pixels."""
    inputs = keras.Input((5, 5, 1))
    return keras.Model(inputs, keras.layers.Dense(config.classes, use_bias=False)(keras.layers.Flatten()(inputs)))


def step_of(config):
    """(logits of the images before a step, its loss)."""
    keras.utils.set_random_seed(0)
    state = TrainingState(config, make_strategy("one_device"), linear)
    logits = state.model(IMAGES).numpy()
    step = make_replica_step(state, config)
    loss, _, _ = step(tf.constant(IMAGES), tf.constant(LABELS), 0.1, tf.constant(0, tf.int64), mixture_of(config, 0))
    return logits, float(loss)


def test_the_loss_with_smoothed_labels_is_kerass():
    logits, loss = step_of(config_of(image_size=5, label_smoothing=0.2))
    keras_loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.2)
    np.testing.assert_allclose(loss, float(keras_loss(np.eye(3)[LABELS], logits)), rtol=1e-6)


def test_a_mixture_is_a_weighted_mean_of_an_example_and_its_neighbor_and_of_their_labels():
    config = config_of(mixup=0.4, label_smoothing=0.1)
    weights = np.random.default_rng(1).uniform(size=6).astype("float32")
    images, targets = SoftLabels(config)(tf.constant(IMAGES), tf.constant(LABELS), tf.constant(weights))
    smoothed, neighbors = np.eye(3)[LABELS] * 0.9 + 0.1 / 3, [1, 0, 3, 2, 5, 4]
    for found, plain in ((images, IMAGES), (targets, smoothed)):
        own = weights.reshape((6,) + (1,) * (plain.ndim - 1))
        np.testing.assert_allclose(found, own * plain + (1 - own) * plain[neighbors], rtol=1e-5, atol=1e-6)


def test_replicas_mix_the_pairs_that_one_device_mixes():
    config = config_of(mixup=0.4)
    mix, weights = SoftLabels(config), mixture_of(config, tf.constant(7, tf.int64))
    whole = mix(tf.constant(IMAGES[:4]), tf.constant(LABELS[:4]), weights)
    halves = [mix(tf.constant(IMAGES[k : k + 2]), tf.constant(LABELS[k : k + 2]), weights, k // 2) for k in (0, 2)]
    for one, parts in zip(whole, zip(*halves, strict=True), strict=True):
        np.testing.assert_array_equal(one, np.concatenate(parts))


def test_the_last_example_of_an_odd_share_stays_as_it_is():
    config = config_of(mixup=0.4)
    weights = mixture_of(config, tf.constant(0, tf.int64))
    images, targets = SoftLabels(config)(tf.constant(IMAGES[:3]), tf.constant(LABELS[:3]), weights)
    np.testing.assert_allclose(images[2], IMAGES[2], rtol=1e-6)
    np.testing.assert_allclose(targets[2], np.eye(3)[LABELS[2]], rtol=1e-6)


def test_weights_are_of_the_beta_distribution_and_a_function_of_seed_and_step():
    """Beta(a, a) has the mean 1/2 and the variance 1 / (4 * (2a + 1)); 20,000 draws, so four deviations are 0.01."""
    config = make_run_config(batch_size=20_000, mixup=0.2)
    draw = {step: mixture_of(config, tf.constant(step, tf.int64)).numpy() for step in (3, 4)}
    np.testing.assert_allclose(draw[3].mean(), 0.5, atol=0.015)
    np.testing.assert_allclose(draw[3].var(), 1 / (4 * 1.4), atol=0.01)
    np.testing.assert_array_equal(draw[3], mixture_of(config, tf.constant(3, tf.int64)))
    assert (draw[3] != draw[4]).mean() > 0.99
    other = make_run_config(batch_size=20_000, mixup=0.2, seed=1)
    assert (draw[3] != mixture_of(other, tf.constant(3, tf.int64)).numpy()).mean() > 0.99


def test_a_tiny_exponent_leaves_finite_weights():
    weights = mixture_of(make_run_config(batch_size=10_000, mixup=0.01), tf.constant(0, tf.int64)).numpy()
    assert np.isfinite(weights).all() and weights.min() >= 0 and weights.max() <= 1
