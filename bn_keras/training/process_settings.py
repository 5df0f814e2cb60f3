"""What a run sets of its process, for as long as it needs it: seeds, names, dtype policy, determinism."""

import contextlib
import random
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state
from tensorflow.python.eager import context
from tensorflow.python.framework import config as tensorflow_config

from bn_keras.evaluation.trained_network import building
from bn_keras.runs.run_config import RunConfig
from bn_keras.training.distribution import uses_gpus

# No public function says what these are.
_KERAS_STATE = "global_random_seed", "global_seed_generator"
_TF_SEED = "_seed", "_rng"


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
        for name in _KERAS_STATE:
            after.callback(global_state.set_global_attribute, name, global_state.get_global_attribute(name))
        after.callback(random.setstate, random.getstate())
        after.callback(np.random.set_state, np.random.get_state())
        tensorflow = vars(context.context())
        after.callback(tensorflow.update, {name: tensorflow[name] for name in _TF_SEED if name in tensorflow})
        keras.utils.set_random_seed(config.seed)
        if enforces_determinism(config, strategy) and not tensorflow_config.is_op_determinism_enabled():
            after.callback(tensorflow_config.disable_op_determinism)
            tf.config.experimental.enable_op_determinism()
        yield
