"""RandAugment beside Keras's own layer, and its draws, which are a function of the example's."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from bn_keras.input import rand_augment
from bn_keras.input.preprocessing import uniform_draws
from bn_keras.input.rand_augment import OPERATIONS, Draws

STRENGTH = 0.4


def image_of(channels):
    return np.random.default_rng(0).integers(0, 256, (16, 12, channels)).astype("uint8")


def test_an_image_gets_one_of_kerass_operations_as_keras_computes_it_and_each_in_its_turn(monkeypatch):
    monkeypatch.setattr(rand_augment, "COUNT", 1)
    change, image = tf.function(rand_augment.rand_augment(STRENGTH)), image_of(3)
    layer = keras.layers.RandAugment((0, 255), 1, STRENGTH, seed=0)
    images, seen = tf.constant(image[None], tf.float32), set()
    for example in range(60):
        draws = uniform_draws((0, example))
        found = change(image, draws)
        seed = tf.random.experimental.stateless_fold_in(tf.bitcast(draws[:2], tf.int32), 0)
        for name in OPERATIONS:
            operation = getattr(layer, name)
            drawn = operation.get_random_transformation(images, seed=Draws(seed))
            if np.allclose(found, operation.transform_images(images, drawn)[0], atol=1e-3):
                seen.add(name)
                break
        else:
            raise AssertionError(f"example {example} is what none of Keras's operations makes")
    assert seen == set(OPERATIONS)


def test_the_operations_are_those_that_kerass_layer_has():
    layer = keras.layers.RandAugment(seed=0)
    assert tuple(layer.get_random_transformation(np.zeros((1, 4, 4, 3), "float32"))["transforms"]) == OPERATIONS


@pytest.mark.parametrize("channels", [1, 3])
def test_an_images_change_is_a_function_of_its_draws_alone(channels):
    image, draws = image_of(channels), [uniform_draws((0, example)) for example in range(20)]
    one, other = (tf.function(rand_augment.rand_augment(STRENGTH)) for _ in range(2))
    forwards = [one(image, own).numpy() for own in draws]
    backwards = [other(image, own).numpy() for own in reversed(draws)][::-1]
    np.testing.assert_array_equal(forwards, backwards)
    assert len({found.tobytes() for found in forwards}) > 15  # some operations leave some images as they are
    assert np.shape(forwards) == (20, *image.shape) and np.min(forwards) >= 0 and np.max(forwards) <= 255
