"""The machines that training runs on: the flags for them, and the strategy that follows from these."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from absl import flags

from bn_keras.runs.run_config import RunConfig
from launch import peers, program

FLAGS = flags.FLAGS

flags.DEFINE_enum(
    "strategy",
    "auto",
    ["auto", "one_device", "mirrored", "multi_worker", "tpu"],
    "Devices to train on. multi_worker: the processes that TF_CONFIG or SLURM names; mirrored: all of this machine.",
)
flags.DEFINE_integer(
    "devices", None, "How many GPUs to use or, without a GPU, logical CPUs. Default: all GPUs, or one CPU.", 1
)
flags.DEFINE_float(
    "peer_timeout", 600.0, "How many seconds to wait for the other processes of a cluster.", lower_bound=1.0
)
flags.DEFINE_float(
    "restart_wait",
    0.0,
    "How many seconds to wait for a process of a cluster that was lost: training starts again, and continues from the "
    "last checkpoint once it is back. 0: it ends.",
    lower_bound=0.0,
)
flags.DEFINE_string("tpu", None, "Name or address of a TPU; local on a TPU VM.")
flags.DEFINE_string(
    "data_service", None, "Machines that run launch/data_service and prepare batches, as ADDRESS:PORT,ADDRESS:PORT,..."
)


def _in_cluster():
    chosen = FLAGS.strategy == "multi_worker" or (FLAGS.strategy == "auto" and not FLAGS.tpu)
    return chosen and any(map(os.environ.get, ("TF_CONFIG", "SLURM_STEP_NUM_TASKS")))


@contextlib.contextmanager
def loading_tensorflow(alone: bool) -> Iterator[None]:
    """`program.loading_tensorflow`. In a cluster, unless `alone`, it continues in a child process, which is watched."""
    if _in_cluster() and not alone:
        peers.watched(FLAGS.restart_wait)
    with program.loading_tensorflow():
        yield


def strategy_for(config: RunConfig, alone: bool) -> tuple[Any, RunConfig]:
    """The strategy that the flags ask for, and the configuration on its devices.

    Args:
      config: the run's configuration.
      alone: whether to use only this machine and wait for no other. The configuration is nevertheless for the whole
        cluster, each machine of which is assumed to have as many devices as this one.
    """
    from bn_keras.training.distribution import addresses, find_cluster, make_strategy, uses_gpus
    from bn_keras.training.process_settings import limit_threads

    limit_threads(config.threads)
    cluster = find_cluster(alone=FLAGS.strategy == "multi_worker") if _in_cluster() else None
    if cluster and alone:
        strategy = make_strategy("auto", FLAGS.devices)
        replicas = strategy.num_replicas_in_sync * len(addresses(cluster))
    else:
        with peers.waiting_for(addresses(cluster, others=True) if cluster else [], FLAGS.peer_timeout):
            strategy = make_strategy(FLAGS.strategy, FLAGS.devices, FLAGS.tpu, cluster)
        replicas = strategy.num_replicas_in_sync
    return strategy, config.on_devices(replicas, uses_gpus(strategy))
