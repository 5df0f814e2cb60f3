"""Loads the trained network of a run for inference, with its batch normalization folded away."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Literal

import keras
import tensorflow as tf

from bn_keras import storage
from bn_keras.errors import InputError, first_line
from bn_keras.evaluation import multicrop
from bn_keras.inference.folding import fold_batch_normalization
from bn_keras.inference.population_statistics import batch_normalizations, population_statistics
from bn_keras.input import preprocessing
from bn_keras.input.run_batches import RunBatches
from bn_keras.networks.build import build_network
from bn_keras.private_names import new_layer_names
from bn_keras.runs import checkpoint
from bn_keras.runs.run_config import RunConfig
from bn_keras.runs.run_directory import RunDirectory
from bn_keras.runs.run_files import note

Weights = Literal["last", "best", "ema"]
"""Of the newest step, of the best evaluation, or the averages at the newest step."""

Network = Callable[[RunConfig], keras.Model]
"""A function that builds an untrained model, from images to logits, for a run's configuration."""


def network_of(config: RunConfig) -> keras.Model:
    """The untrained network of the configuration's variant."""
    return build_network(config.variant, **config.network_arguments())


@contextlib.contextmanager
def building(config: RunConfig) -> Iterator[None]:
    """In a `with` block that builds a run's network, sets the run's dtype policy and numbers layers from 1 again.

    A network that is built twice in a process thus has the same names of variables each time.
    """
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(config.precision)
    try:
        with new_layer_names():
            yield
    finally:
        keras.config.set_dtype_policy(policy)


def load_network(
    directory: str | RunDirectory[RunConfig],
    strategy: tf.distribute.Strategy | None = None,
    *,
    population_of: RunBatches | None = None,
    population_steps: int = 100,
    network: Network | None = None,
    weights: Weights = "last",
) -> keras.Model:
    """Loads the network of a run with every batch normalization folded into its convolution.

    Args:
      directory: the run's directory.
      strategy: the strategy under which the network's variables are made.
      population_of: the run's data, to replace the moving averages by the population statistics (Algorithm 2) of the
        mini-batches with which training would have continued. None keeps the moving averages.
      population_steps: how many mini-batches to take for that.
      network: the function that built the network in training, if it is not the variant's.
      weights: which of the run's weights it has.

    Returns:
      A model from images float32 `[N, image_size, image_size, channels]` in [-1, 1] to logits float32 `[N, classes]`.

    Raises:
      InputError: there is no run, it has neither a whole checkpoint nor a model, or it has no such weights.
    """
    directory = RunDirectory(directory) if isinstance(directory, str) else directory
    config = directory.read_trained()
    model = read_network(directory, config, network, weights)
    if population_of and any(layer.trainable for layer in batch_normalizations(model)):
        saved = _saved(directory, weights)  # it counts the images, as the batch may have been changed on the way
        examples = int(saved[1]["examples"]) if saved else config.steps * config.batch_size
        batches = population_of.training(examples, distort_on="host")
        population_statistics(model, batches, steps=population_steps)
    with (strategy or tf.distribute.get_strategy()).scope():
        return fold_batch_normalization(model)


def read_network(
    directory: RunDirectory[RunConfig], config: RunConfig, network: Network | None = None, weights: Weights = "last"
) -> keras.Model:
    """The network of `model.keras`, or of the best checkpoint, or of the newest if its step is later; not folded."""
    newest = directory.newest_step()
    if weights == "last" and (newest is None or (network is None and (directory.model_step() or 0) >= newest)):
        try:
            with storage.local(directory.model_path) as path:
                return keras.models.load_model(path, compile=False)
        except Exception as error:  # whatever zipfile, h5py and Keras raise for damaged bytes
            reason = first_line(error)
            raise InputError(f"{directory.model_path} is damaged ({reason}): put a copy of it back") from None
    if weights == "ema" and not config.ema:
        raise InputError(f"`weights=ema`: {directory.path} was trained without `ema`: take `weights=last`")
    if (saved := _saved(directory, weights)) is None:
        raise InputError(f"`weights={weights}`: {directory.path} has no whole checkpoint of them: take `weights=last`")
    step, arrays = saved
    if step < config.steps and weights != "best":
        note(f"{directory.path} is at step {step} of {config.steps}")
    if config.builder and network is None:
        raise InputError(
            f"{directory.path} has no model of its step {step}, and its network is built by the function "
            f"{config.builder}: train it to its end and take `weights=last`, or give that function as `network`"
        )
    with building(config):
        model = (network or network_of)(config)
    for weight in model.weights:
        plain = arrays[f"model/{weight.path}"]
        weight.assign(arrays.get(f"optimizer/average/{weight.path}", plain) if weights == "ema" else plain)
    return model


def head_of(model: keras.Model) -> keras.layers.Layer:
    """The classifier: the last layer that has weights."""
    return [layer for layer in model.layers if layer.weights][-1]


def image_view(config: RunConfig, crops: int = 1) -> Callable[[tf.Tensor], tf.Tensor | tuple[tf.Tensor, ...]]:
    """The preprocessing of an image for a run's network.

    Args:
      config: the run's configuration.
      crops: 1, for the view of the run's own evaluation, or 144.

    Returns:
      A function from the bytes of an image file to one image, float32 `[image_size, image_size, channels]` in
      [0, 255], or to the `multicrop.squares` that 144 crops are cut from.
    """
    view: Callable = preprocessing.evaluated_view(config.augmentation) if crops == 1 else multicrop.squares
    return functools.partial(view, image_size=config.image_size, channels=config.channels)


def _saved(directory, weights):
    """(step, arrays) of the checkpoint that has these weights, or None."""
    if weights == "best":
        return checkpoint.load_best(directory.path)
    state = directory.newest_state()
    directory.forget_state()
    return state and (state[0], checkpoint.arrays_of(state[1]))
