"""On every replica the same moving averages, and on each its own Dropout mask."""

from conftest import run_program

TWO_DEVICES = """
import numpy as np, tensorflow as tf
from bn_keras.training.distribution import make_strategy
strategy = make_strategy("mirrored", 2)
"""


def run_on_two_devices(code):
    done = run_program("-c", TWO_DEVICES + code, small=True)
    assert done.returncode == 0, done.stderr


def test_moving_averages_are_identical_on_all_replicas():
    run_on_two_devices("""
from bn_keras import build_network
with strategy.scope():
    model = build_network("bn_x5", image_size=32, width=0.1, classes=3)
images = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype("float32")
images[4:] += 3  # the second replica sees brighter images
data = strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensors(images).unbatch().batch(8).repeat(3))
step = tf.function(lambda batch: strategy.run(lambda images: model(images, training=True), args=(batch,)))
for batch in data:
    step(batch)
for variable in model.non_trainable_variables:
    one, other = (value.numpy() for value in strategy.experimental_local_results(variable.value))
    np.testing.assert_array_equal(one, other, err_msg=variable.path)
    assert not np.array_equal(one, np.zeros_like(one)), variable.path
""")


def test_dropout_masks_differ_between_replicas_and_from_step_to_step():
    run_on_two_devices("""
from bn_keras.layers.dropout import Dropout
with strategy.scope():
    layer = Dropout(0.5, seed=1)
ones = tf.ones((4, 64))
step = tf.function(lambda: strategy.run(lambda: layer(ones, training=True)))
masks = [value.numpy() for _ in range(2) for value in strategy.experimental_local_results(step())]
for k in range(4):
    assert 0.3 < (masks[k] > 0).mean() < 0.7 and set(np.unique(masks[k])) == {0, 2}
    for other in masks[:k]:
        assert not np.array_equal(masks[k], other)
states = [value.numpy() for value in strategy.experimental_local_results(layer.seed_generator.state.value)]
np.testing.assert_array_equal(*states)
""")


def test_on_one_device_dropout_is_keras():
    run_on_two_devices("""
import keras
from bn_keras.layers.dropout import Dropout
ones = tf.ones((4, 64))
np.testing.assert_array_equal(
    Dropout(0.5, seed=1)(ones, training=True), keras.layers.Dropout(0.5, seed=1)(ones, training=True)
)
np.testing.assert_array_equal(Dropout(0.5, seed=1)(ones, training=False), ones)
""")
