"""What a run sets of its process, for as long as it needs it: seeds, names, dtype policy, determinism."""

import contextlib
import random
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf

from bn_keras.evaluation.trained_network import building
from bn_keras.private_names import same_bits_each_time, seeds_put_back
from bn_keras.runs.run_config import RunConfig
from bn_keras.training.distribution import uses_gpus


def enforces_determinism(config: RunConfig, strategy: tf.distribute.Strategy) -> bool:
    """Whether TensorFlow is to be told to give the same bits each time: a CPU's operations do without."""
    return config.deterministic and uses_gpus(strategy)


@contextlib.contextmanager
def process_settings(config: RunConfig, strategy: tf.distribute.Strategy) -> Iterator[None]:
    """`building`, seeds and determinism of a run in a `with` block; after it, the process has back what it had.

    Args:
      config: of the run.
      strategy: that it trains under, whose GPUs are made to give the same bits each time.
    """
    with contextlib.ExitStack() as after:
        after.enter_context(building(config))
        after.enter_context(seeds_put_back())
        after.callback(random.setstate, random.getstate())
        after.callback(np.random.set_state, np.random.get_state())
        keras.utils.set_random_seed(config.seed)
        if enforces_determinism(config, strategy):
            after.enter_context(same_bits_each_time())
        yield
