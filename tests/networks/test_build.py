"""The contract of every network: each row builds at a small size, trains two steps, and goes on bit for bit."""

import numpy as np
import pytest
import tensorflow as tf
from conftest import make_run_config

from bn_keras import VARIANTS, build_network
from bn_keras.training.distribution import make_strategy
from bn_keras.training.training_state import TrainingState, make_train_steps

KINDS = {(row.network, row.depth): row.name for row in reversed(VARIANTS.values())}.values()
"""A row of each network; their others differ in settings of the same module."""


@pytest.mark.parametrize("name", VARIANTS)
def test_every_row_gives_finite_logits_of_its_classes(name):
    model = build_network(name, image_size=32, width=0.1, classes=3, channels=1)
    logits = model(np.random.default_rng(0).normal(size=(2, 32, 32, 1)).astype("float32"), training=False)
    assert logits.shape == (2, 3) and np.isfinite(logits).all() and model.name == name


def test_without_its_top_a_network_ends_with_what_its_classifier_is_given():
    small = {"image_size": 32, "width": 0.1, "classes": 3, "channels": 1}
    whole, body = build_network("resnet18", **small), build_network("resnet18", **small, include_top=False)
    *weights, kernel, bias = whole.get_weights()
    body.set_weights(weights)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 1)).astype("float32")
    np.testing.assert_allclose(body(images) @ kernel + bias, whole(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_every_network_trains_and_goes_on_bit_for_bit(small_networks, name):
    config = make_run_config(variant=VARIANTS[name], image_size=32, width=0.1, batch_size=4)
    strategy = make_strategy("one_device")
    random = np.random.default_rng(0)
    batch = random.normal(size=(4, 32, 32, 1)).astype("float32"), np.array([0, 1, 2, 0], "int32")

    state = TrainingState(config, strategy)
    train_steps = make_train_steps(state, config, strategy)
    batches = iter(tf.data.Dataset.from_tensors(batch).repeat())

    def after(steps, arrays):
        state.restore(arrays)
        train_steps(batches, tf.constant(steps))
        return state.arrays()

    start, made_again = state.arrays(), TrainingState(config, strategy).arrays()
    two, one = after(2, start), after(1, start)
    after(3, start)
    continued = after(1, one)
    assert {key for key in two if not np.array_equal(start[key], two[key])} > {"step", "model/logits/kernel"}
    for key in two:
        np.testing.assert_array_equal(made_again[key], start[key], err_msg=key)
        np.testing.assert_array_equal(continued[key], two[key], err_msg=key)
