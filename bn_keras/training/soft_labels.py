"""Labels that are more than one class: label smoothing and MixUp. Neither is in the paper, whose rows have them off.

    target = (1 - label_smoothing) * one_hot(label) + label_smoothing / classes          (Szegedy et al., 2016)
    image, target = w * (image, target) + (1 - w) * those of the example beside it       (Zhang et al., 2018)

with w of Beta(mixup, mixup), drawn for each example.
"""

import keras
import tensorflow as tf

from bn_keras.runs.run_config import RunConfig


def mixture_of(config: RunConfig, step: tf.Tensor) -> tf.Tensor | None:
    """The weights of a step's own images in their mixtures, float32 `[batch_size]`; None without MixUp."""
    if not config.mixup:
        return None
    seed = tf.stack([tf.constant(config.seed, tf.int64), step])
    # In float32, of a Beta of 0.05, both gammas are 0 in one of a hundred draws.
    own, other = tf.unstack(tf.random.stateless_gamma((2, config.batch_size), seed, config.mixup, dtype=tf.float64))
    return tf.cast(tf.math.divide_no_nan(own, own + other), tf.float32)


class SoftLabels:
    """What a step makes of its labels, and by MixUp of its images.

    Pairs are neighbors in the mini-batch, whose order is random. So the replicas of a machine, which have an even share
    of it each, mix the pairs that one device would; of an odd share the last example stays as it is.
    """

    def __init__(self, config: RunConfig):
        self._smoothing, self._classes = config.label_smoothing, config.network_arguments()["classes"]
        self._mix_up = keras.layers.MixUp(seed=0, dtype="float32")  # its own draws do not know the step: `mixture_of`

    def __call__(
        self, images: tf.Tensor, labels: tf.Tensor, mixture: tf.Tensor | None, replica: int | tf.Tensor = 0
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Images and targets of one replica.

        Args:
          images: float32 `[n, height, width, channels]`, the n examples of the replica.
          labels: int32 `[n]` in [0, classes).
          mixture: of `mixture_of`, for the examples of all replicas.
          replica: its number; its examples are the n that begin with the one of number n * replica.

        Returns:
          The images, float32 of the same shape, and the targets, float32 `[n, classes]`; a row's sum is 1.
        """
        targets = tf.one_hot(labels, self._classes) * (1.0 - self._smoothing) + self._smoothing / self._classes
        if mixture is None:
            return images, targets
        count = labels.shape[0]
        neighbors = tf.minimum(tf.bitwise.bitwise_xor(tf.range(count), 1), count - 1)
        mix = {"mix_weight": tf.slice(mixture, [count * replica], [count]), "permutation_order": neighbors}
        return self._mix_up.transform_images(images, mix), self._mix_up.transform_labels(targets, mix)
