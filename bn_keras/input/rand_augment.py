"""RandAugment (Cubuk et al., 2020) by Keras's own layers; not in the paper, whose rows have it off.

Keras's layer draws one pair of operations for all images that it is given at once, from a generator of its own, whose
state no checkpoint holds. Here each image has its own pair, drawn from the random numbers that travel with the example,
and only these two operations are computed. The operations and their strengths are Keras's.
"""

from collections.abc import Callable

import keras
import tensorflow as tf

OPERATIONS = (
    *("random_shear", "random_translation", "random_rotation", "random_brightness", "random_color_degeneration"),
    *("random_contrast", "random_sharpness", "random_posterization", "solarization", "auto_contrast", "equalization"),
)
"""The layers that `keras.layers.RandAugment` chooses from, by the names of its attributes."""

COUNT = 2
"""How many operations an image gets, one after another; an operation may come twice. Keras's default."""


class Draws(keras.random.SeedGenerator):
    """Seeds that depend on a given one alone, where Keras's generator counts its calls in a variable.

    Args:
      seed: int32 `[2]`.
    """

    def __init__(self, seed: tf.Tensor):  # without `super().__init__()`, which would make the variable
        self._seed, self._count = seed, 0

    def next(self, ordered: bool = True) -> tf.Tensor:
        self._count += 1
        return tf.random.experimental.stateless_fold_in(self._seed, self._count)


def rand_augment(strength: float) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """A function that changes an image by `COUNT` random operations.

    Args:
      strength: Keras's `factor`, in (0, 1]: the largest amount of each operation.

    Returns:
      A function of an image, `[height, width, channels]` in [0, 255], and its draws, the result of
      `preprocessing.uniform_draws`. It returns the changed image, float32 of the same shape in [0, 255].
    """
    layer = keras.layers.RandAugment((0, 255), COUNT, strength, seed=0, dtype="float32")

    def changed(image, draws):
        seed = tf.bitcast(draws[:2], tf.int32)
        images = tf.cast(image, tf.float32)[None]
        for k in range(COUNT):
            own = tf.random.experimental.stateless_fold_in(seed, k)
            chosen = keras.random.randint((), 0, len(OPERATIONS), seed=Draws(own))
            images = tf.switch_case(chosen, [_operation(getattr(layer, name), images, own) for name in OPERATIONS])
        return images[0]

    return changed


def _operation(layer, images, seed):
    """A function that calls one of Keras's layers, whose own draws come from `seed`."""

    def call():
        drawn = layer.get_random_transformation(images, seed=Draws(seed))
        return tf.ensure_shape(layer.transform_images(images, drawn), images.shape)

    return call
