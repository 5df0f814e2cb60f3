"""The trained network of a run, for inference: batch normalization by moving or population statistics, then folded."""

import functools
import zipfile

import keras
import tensorflow as tf

from bn_keras import (
    layers,  # noqa: F401 (registers what the file names)
    multicrop,
    preprocessing,
)
from bn_keras.dataset import Dataset
from bn_keras.errors import InputError
from bn_keras.inference.folding import fold_batch_normalization
from bn_keras.inference.population_statistics import batch_normalizations, population_statistics
from bn_keras.input_pipeline import training_batches
from bn_keras.run import RunDirectory


def load_network(
    directory: RunDirectory,
    strategy: tf.distribute.Strategy | None = None,
    *,
    population_of: Dataset | None = None,
    population_steps: int = 100,
) -> keras.Model:
    """Loads a run's network with every batch normalization folded into its convolution.

    Args:
      directory: of a finished run.
      strategy: under which the network's variables are made.
      population_of: the data set that the run was trained on, to replace the moving averages by the population
        statistics of Algorithm 2 over its training mini-batches, of the run's own size, crops and distortion, where
        training would have gone on. None keeps the moving averages.
      population_steps: mini-batches to take for that.

    Returns:
      A model from images float32 `[N, image_size, image_size, channels]` in [-1, 1] to logits float32 `[N, classes]`.

    Raises:
      InputError: there is no run, or it is not finished or damaged.
    """
    config = directory.read_trained()
    try:
        model = keras.models.load_model(directory.model_path, compile=False)
    except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{directory.model_path} is damaged ({error}): train it again") from None
    if population_of and batch_normalizations(model):
        _measure(model, config, population_of, population_steps)
    with (strategy or tf.distribute.get_strategy()).scope():
        return fold_batch_normalization(model)


def image_view(config: dict, crops: int = 1):
    """What a run's network is shown of an image.

    Args:
      config: of `RunDirectory.read_config`.
      crops: 1, the view that the run's own evaluation takes; or 144.

    Returns:
      A function from the bytes of an image file to one image, float32 `[image_size, image_size, channels]` in
      [0, 255], or to the `multicrop.squares` that 144 crops are cut from.
    """
    one = preprocessing.whole_image if config["augmentation"] == "none" else preprocessing.single_crop
    view = one if crops == 1 else multicrop.squares
    return functools.partial(view, image_size=config["image_size"], channels=config["channels"])


def _measure(model, config, dataset, steps):
    batches = training_batches(
        dataset,
        batch_size=config["batch_size"],
        image_size=config["image_size"],
        seed=config["seed"],
        start_step=config["steps"],
        augmentation=config["augmentation"],
        shuffling=config["shuffling"],
        photometric_distortion=config["photometric_distortion"],
        skipped=dataset.skipped,
    )
    population_statistics(model, batches, steps=steps)
