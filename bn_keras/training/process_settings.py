"""Sets a process up for a run: threads for good; seeds, names of layers, dtype policy, determinism while it lasts."""

import contextlib
import random
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf

from bn_keras.evaluation.trained_network import building
from bn_keras.private_names import same_bits_each_time, seeds_put_back
from bn_keras.runs.run_config import RunConfig
from bn_keras.runs.run_files import note
from bn_keras.training.distribution import uses_gpus


def limit_threads(threads: int | None) -> None:
    """Sets how many threads an operation on the CPU takes, 0 for one on each core; says so if it is too late for that.

    None leaves the number as it is.

    An operation divides its sums among its threads, so their number decides its last bits: with one thread, a run has
    the same bits on any number of cores of the same kind. Independent operations still run side by side.
    """
    begun = tf.config.threading.get_intra_op_parallelism_threads()
    if threads in (None, begun):
        return
    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
    except RuntimeError:
        note(
            f"`threads={threads}` has no effect in this process, where TensorFlow has begun with {begun}: on CPUs the "
            "last bits will be those of another run"
        )


def enforces_determinism(config: RunConfig, strategy: tf.distribute.Strategy) -> bool:
    """Whether TensorFlow must be told to compute the same bits each time. On CPUs it does so anyway."""
    return config.deterministic and uses_gpus(strategy)


@contextlib.contextmanager
def process_settings(config: RunConfig, strategy: tf.distribute.Strategy) -> Iterator[None]:
    """In a `with` block, the process has the run's dtype policy, names of layers, seeds and determinism.

    Args:
      config: the run's configuration.
      strategy: the strategy that the run trains under.
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
