"""Records Figure 1 in any run: percentiles of the inputs of nonlinearities, and of their normalization's state."""

import keras
import numpy as np
import tensorflow as tf

from bn_keras.errors import InputError
from bn_keras.layers.batch_normalization import BatchNormalization
from bn_keras.private_names import operation_before

PERCENTILES = (15, 50, 85)
"""The percentiles of Figure 1 (b, c)."""


class Monitor:
    """Observes chosen nonlinearities of a model on one fixed mini-batch, in inference mode.

    Args:
      model: a functional model with `keras.layers.Activation` layers.
      names: the activation layers, separated by commas, each as `NAME` or `NAME:MAP`; the feature map is 0 by default.
      images: the mini-batch, in the form that the model takes.

    Raises:
      InputError: the model has no such layer, or the layer has no such map.
    """

    def __init__(self, model: keras.Model, names: str, images: tf.Tensor):
        self._images = images
        self._chosen = [_find(model, name) for name in names.split(",")]
        inputs = keras.Model(model.input, [layer.input[..., feature_map] for _, layer, feature_map in self._chosen])
        self._inputs = tf.function(lambda images: keras.tree.flatten(inputs(images, training=False)))

    def look(self) -> dict[str, dict[str, list[float]]]:
        """{name: {quantity: its three percentiles}}.

        The quantities are the nonlinearity's "input", over the examples and positions of its feature map, and the
        "gamma", "beta", "moving_mean" and "moving_variance" of the normalization before it, over feature maps."""
        looks = {}
        for (name, layer, _), values in zip(self._chosen, self._inputs(self._images), strict=True):
            looks[name] = {"input": _percentiles(values)}
            before = operation_before(layer.input)
            if isinstance(before, BatchNormalization):
                for what in ("gamma", "beta", "moving_mean", "moving_variance"):
                    looks[name][what] = _percentiles(getattr(before, what))
        return looks


def _find(model, name):
    layer_name, _, feature_map = name.partition(":")
    layers = {layer.name: layer for layer in model.layers if isinstance(layer, keras.layers.Activation)}
    if layer_name not in layers:
        raise InputError(f"`monitor={name}` is none of the network's nonlinearities, which are {', '.join(layers)}")
    maps = layers[layer_name].input.shape[-1]
    if not (feature_map or "0").isdecimal() or int(feature_map or 0) >= maps:
        raise InputError(f"`monitor={name}`: {layer_name} has the feature maps 0 to {maps - 1}")
    return name, layers[layer_name], int(feature_map or 0)


def _percentiles(values):
    return np.percentile(np.asarray(values, np.float64), PERCENTILES).tolist()
