"""The machines that training runs on: their flags, and the strategy that comes of them."""

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
    "What to train on. multi_worker: the processes that TF_CONFIG or SLURM names; the others: this machine.",
)
flags.DEFINE_integer("devices", None, "GPUs, or logical CPUs where there is no GPU. Default: all GPUs, or one CPU.", 1)
flags.DEFINE_float("peer_timeout", 600.0, "Seconds to wait for the other processes of a cluster.", lower_bound=1.0)
flags.DEFINE_string("tpu", None, "Name or address of a TPU; local on a TPU VM.")
flags.DEFINE_string("data_service", None, "Machines that prepare batches, ADDRESS:PORT,...: see launch/data_service.")


def _in_cluster():
    chosen = FLAGS.strategy == "multi_worker" or (FLAGS.strategy == "auto" and not FLAGS.tpu)
    return chosen and any(map(os.environ.get, ("TF_CONFIG", "SLURM_STEP_NUM_TASKS")))


@contextlib.contextmanager
def loading_tensorflow(alone: bool) -> Iterator[None]:
    """`program.loading_tensorflow`; in a cluster, unless `alone`, in a child process that the first one watches."""
    if _in_cluster() and not alone:
        peers.watched()
    with program.loading_tensorflow():
        yield


def strategy_for(config: RunConfig, alone: bool) -> tuple[Any, RunConfig]:
    """The strategy of the flags, and the configuration on its devices.

    Args:
      config: of the run.
      alone: whether to wait for nobody else: the strategy is then of this machine, and the configuration is for as many
        devices on each machine of the cluster.
    """
    from bn_keras.training.distribution import addresses, find_cluster, make_strategy, uses_gpus

    cluster = find_cluster(alone=FLAGS.strategy == "multi_worker") if _in_cluster() else None
    if cluster and alone:
        strategy = make_strategy("auto", FLAGS.devices)
        replicas = strategy.num_replicas_in_sync * len(addresses(cluster))
    else:
        with peers.waiting_for(addresses(cluster, others=True) if cluster else [], FLAGS.peer_timeout):
            strategy = make_strategy(FLAGS.strategy, FLAGS.devices, FLAGS.tpu, cluster)
        replicas = strategy.num_replicas_in_sync
    return strategy, config.on_devices(replicas, uses_gpus(strategy))
