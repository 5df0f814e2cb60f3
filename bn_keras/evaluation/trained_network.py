"""Loads the trained network of a run for inference, with its batch normalization folded away."""

import contextlib
import functools
from collections.abc import Callable, Iterator

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
) -> keras.Model:
    """Loads the network of a run's newest step, with every batch normalization folded into its convolution.

    Args:
      directory: the run's directory.
      strategy: the strategy under which the network's variables are made.
      population_of: the run's data, to replace the moving averages by the population statistics (Algorithm 2) of the
        mini-batches with which training would have continued. None keeps the moving averages.
      population_steps: how many mini-batches to take for that.
      network: the function that built the network in training, if it is not the variant's.

    Returns:
      A model from images float32 `[N, image_size, image_size, channels]` in [-1, 1] to logits float32 `[N, classes]`.

    Raises:
      InputError: there is no run, or it has neither a whole checkpoint nor a model.
    """
    directory = RunDirectory(directory) if isinstance(directory, str) else directory
    config = directory.read_trained()
    model = read_network(directory, config, network)
    if population_of and any(layer.trainable for layer in batch_normalizations(model)):
        batches = population_of.training(_examples_seen(directory, config), distort_on="host")
        population_statistics(model, batches, steps=population_steps)
    with (strategy or tf.distribute.get_strategy()).scope():
        return fold_batch_normalization(model)


def read_network(directory: RunDirectory[RunConfig], config: RunConfig, network: Network | None = None) -> keras.Model:
    """The network of `model.keras`, or of the newest whole checkpoint if that is of a later step; not folded."""
    state = directory.newest_state()
    directory.forget_state()
    if state is None or (network is None and (directory.model_step() or 0) >= state[0]):
        try:
            with storage.local(directory.model_path) as path:
                return keras.models.load_model(path, compile=False)
        except Exception as error:  # whatever zipfile, h5py and Keras raise for damaged bytes
            reason = first_line(error)
            raise InputError(f"{directory.model_path} is damaged ({reason}): put a copy of it back") from None
    step, content = state
    if step < config.steps:
        note(f"{directory.path} is at step {step} of {config.steps}")
    if config.builder and network is None:
        raise InputError(
            f"{directory.path} has no model of its step {step} yet, and its network is of the function "
            f"{config.builder}: train it to its end, or give that function as `network`"
        )
    with building(config):
        model = (network or network_of)(config)
    arrays = checkpoint.arrays_of(content)
    for weight in model.weights:
        weight.assign(arrays[f"model/{weight.path}"])
    return model


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


def _examples_seen(directory, config):
    """How many images training saw. The checkpoint counts them, as the batch size may have been changed on the way."""
    saved = checkpoint.load_newest(directory.path)
    return int(saved[1]["examples"]) if saved else config.steps * config.batch_size
