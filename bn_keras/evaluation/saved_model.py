"""Exports a network as a SavedModel that takes image files and needs neither this project nor Keras."""

from collections.abc import Callable

import keras
import tensorflow as tf

from bn_keras.input.preprocessing import to_network_range

TOP = 5


def export_saved_model(
    model: keras.Model, view: Callable[[tf.Tensor], tf.Tensor], class_names: list[str], path: str
) -> None:
    """Writes a SavedModel that takes the bytes of image files and needs only TensorFlow.

    Its function `serve`, also TensorFlow Serving's default signature, takes `encoded`, strings `[N]`, each the bytes of
    an image file that `preprocessing.decode` reads, and returns

        probabilities: float32 [N, classes]
        top_classes, top_probabilities: names, string `[N, 5]`, and float32 `[N, 5]`, the most probable first

    Args:
      model: the network, from images float32 `[N, image_size, image_size, channels]` in [-1, 1] to logits.
      view: the preprocessing, from a file's bytes to one such image in [0, 255].
      class_names: the name of each class, by index.
      path: the folder to make.
    """
    image = tf.TensorSpec(model.input_shape[1:], tf.float32)
    top = min(TOP, len(class_names))

    def serve(encoded):
        images = to_network_range(tf.map_fn(view, encoded, fn_output_signature=image))
        probabilities = tf.nn.softmax(model(images, training=False))
        best = tf.math.top_k(probabilities, top)
        return {
            "probabilities": probabilities,
            "top_classes": tf.gather(tf.constant(class_names), best.indices),
            "top_probabilities": best.values,
        }

    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", serve, [tf.TensorSpec([None], tf.string, "encoded")])
    archive.write_out(path, verbose=False)
