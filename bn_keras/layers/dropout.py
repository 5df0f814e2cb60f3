"""Dropout whose masks differ between the replicas of a distribution strategy and survive a resume."""

import keras

from bn_keras.layers.groups import Tensor


@keras.saving.register_keras_serializable(package="bn_keras")
class Dropout(keras.layers.Dropout):
    """`keras.layers.Dropout` with one mask per replica.

    Keras draws the same mask on every replica: two replicas of 16 examples both drop what one device drops of its first
    16. Here the replica's number is folded into the seed, and one device draws the same masks as Keras. The seed and
    the count of masks are in `model.variables`, so a run that resumes from a checkpoint of them draws the next mask.
    """

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        if not training or self.rate == 0 or keras.backend.backend() != "tensorflow":
            return super().call(inputs, training=training)
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        if context is None or context.num_replicas_in_sync == 1:
            return super().call(inputs, training=training)
        seed = tf.cast(self.seed_generator.next() % tf.int32.max, tf.int32)
        seed = tf.random.fold_in(seed, context.replica_id_in_sync_group)
        return tf.nn.experimental.stateless_dropout(inputs, self.rate, seed, noise_shape=self.noise_shape)
