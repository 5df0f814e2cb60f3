"""Transfer learning: starts from pretrained weights, freezes layers, or lets the body learn more slowly."""

import keras
import numpy as np

from bn_keras import storage
from bn_keras.errors import InputError, first_line
from bn_keras.evaluation.trained_network import head_of, read_network
from bn_keras.inference.population_statistics import batch_normalizations
from bn_keras.runs.run_config import RunConfig
from bn_keras.runs.run_directory import RunDirectory

Weights = dict[str, np.ndarray]
"""Values by the path of a variable, such as "conv1_7x7_conv/kernel"."""


def read_weights(source: str) -> Weights:
    """The weights of a run's newest step, or of a `.keras` model.

    Raises:
      InputError: none of these can be read at `source`.
    """
    if storage.is_folder(source):
        directory = RunDirectory(source)
        model = read_network(directory, directory.read_trained())
    else:
        try:
            with storage.local(source) as path:
                model = keras.models.load_model(path, compile=False)
        except Exception as error:  # whatever zipfile, h5py and Keras raise for a file that is no model
            raise InputError(f"`initial_weights={source}` cannot be read ({first_line(error)})") from None
    return {weight.path: weight.numpy() for weight in model.weights}


def take_over(model: keras.Model, weights: Weights, source: str) -> str:
    """Sets the weights of each layer for which all weights are given, by name and shape.

    Returns:
      A sentence that says which layers keep their initial weights.

    Raises:
      InputError: the given weights fit no layer.
    """
    left, layers = [], [layer for layer in model.layers if layer.weights]
    for layer in layers:
        if all(weight.path in weights and weights[weight.path].shape == weight.shape for weight in layer.weights):
            for weight in layer.weights:
                weight.assign(weights[weight.path])
        else:
            left.append(layer.name)
    if len(left) == len(layers):
        raise InputError(f"`initial_weights={source}`: no layer fits this network by name and shape: give others")
    others = f", not {', '.join(left[:5])}{', ...' if len(left) > 5 else ''}" if left else ""
    return f"{len(layers) - len(left)} of {len(layers)} layers begin with the weights of {source}{others}"


def freeze(model: keras.Model, config: RunConfig) -> None:
    """Freezes the layers that `config.freeze` names.

    A frozen batch normalization is in inference mode: it normalizes by its averages, which do not change. Without
    `config.frozen_statistics` it normalizes by the mini-batch and updates its averages; gamma and beta do not change.

    Raises:
      InputError: the network has no such layer, or no layer would be left to train.
    """
    if not config.freeze:
        return
    names = [layer.name for layer in model.layers]
    last = names.index(head_of(model).name) - 1 if config.freeze == "body" else _index(names, config.freeze)
    normalizations = {id(layer) for layer in batch_normalizations(model)}
    for layer in model.layers[: last + 1]:
        if id(layer) in normalizations and not config.frozen_statistics:
            for weight in layer.trainable_weights:
                weight.trainable = False
        else:
            layer.trainable = False
    if not model.trainable_variables:
        raise InputError(f"`freeze={config.freeze}` leaves nothing to train: give an earlier layer, or `body`")


def _index(names, name):
    if name not in names:
        raise InputError(
            f"`freeze={name}` is no layer of the network: give `body`, or one such as {names[len(names) // 2]}"
        )
    return names.index(name)


def rate_factors(model: keras.Model, config: RunConfig) -> list[float]:
    """The factor on the learning rate of each trainable variable of the model."""
    body = config.body_learning_rate / config.variant.learning_rate if config.body_learning_rate else 1.0
    head = {weight.path for weight in head_of(model).weights}
    return [1.0 if weight.path in head else body for weight in model.trainable_variables]
