"""Makes the distribution strategy that a run trains under, and gives each host its share of the input."""

import os
import re
import shutil
from collections.abc import Callable
from typing import TypeAlias

import tensorflow as tf

from bn_keras.errors import InputError, LostWorkerError, first_line
from bn_keras.json_files import ADDRESS, parse_json

ClusterResolver: TypeAlias = tf.distribute.cluster_resolver.ClusterResolver


def make_strategy(
    strategy: str, devices: int | None = None, tpu: str | None = None, cluster: ClusterResolver | None = None
) -> tf.distribute.Strategy:
    """Makes a strategy. It must be called before anything else uses TensorFlow's devices.

    With a cluster it waits, without a limit, until every other process has started.

    Args:
      strategy: "one_device"; "mirrored", over all GPUs or, without GPUs, `devices` logical CPUs; "multi_worker", over
        the processes of `cluster`; "tpu"; or "auto": the TPU if one is given, several workers if a cluster is given,
        mirrored if there is more than one device, else one device.
      devices: how many GPUs, or logical CPUs, of this machine to use; None for all GPUs or one CPU.
      tpu: the name or address of a TPU; "local" for the TPU of this TPU VM.
      cluster: the result of `find_cluster`; None for this process alone, whatever the environment says.

    Raises:
      InputError: there are fewer GPUs, no cluster, or no TPU.
      LostWorkerError: a process of the cluster started and ended.
    """
    if strategy == "auto":
        strategy = "tpu" if tpu else "multi_worker" if cluster else "auto"
    if tpu and strategy != "tpu":
        raise InputError(f"`tpu={tpu}` needs `strategy=tpu`, not {strategy}")
    if devices and strategy == "tpu":
        raise InputError("`devices` cannot work with `strategy=tpu`, which takes all of the TPU's cores")
    if strategy == "tpu":
        return _tpu_strategy(tpu or "local")
    if strategy == "multi_worker" and cluster is None:
        raise InputError(
            "`strategy=multi_worker` finds neither TF_CONFIG nor SLURM's variables: start it with srun, or set "
            f"TF_CONFIG={_TF_CONFIG_EXAMPLE}"
        )
    _configure_devices(strategy, devices)
    if strategy == "multi_worker":
        return _join(cluster)
    local = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    names = [f"{device.device_type}:{k}" for k, device in enumerate(local)][: devices or len(local)]
    if len(names) == 1 or strategy == "one_device":
        return (
            tf.distribute.MirroredStrategy(names)
            if strategy == "mirrored"
            else tf.distribute.OneDeviceStrategy(names[0])
        )
    return tf.distribute.MirroredStrategy(names)


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the one that writes the run's directory."""
    resolver = strategy.cluster_resolver
    if resolver is None or resolver.task_type in (None, "chief"):
        return True
    return resolver.task_type == "worker" and resolver.task_id == 0 and "chief" not in resolver.cluster_spec().jobs


def uses_gpus(strategy: tf.distribute.Strategy) -> bool:
    """Whether any of the strategy's devices is a GPU."""
    return any("GPU" in device for device in strategy.extended.worker_devices)


def distribute(
    strategy: tf.distribute.Strategy, make_batches: Callable[..., tf.data.Dataset]
) -> tf.distribute.DistributedDataset:
    """A distributed dataset, for iteration under the strategy.

    Args:
      make_batches: `make_batches(hosts=h, host=k)` returns the k-th host's share of every mini-batch, in static shapes.
    """

    def share(context):
        batches = make_batches(hosts=context.num_input_pipelines, host=context.input_pipeline_id)
        replicas = context.num_replicas_in_sync // context.num_input_pipelines
        size = tf.nest.flatten(batches.element_spec)[0].shape[0]
        return batches.rebatch(size // replicas, drop_remainder=True) if replicas > 1 else batches

    return strategy.distribute_datasets_from_function(share)


class Agreement:
    """Averages numbers over all worker processes, so that all decide alike, although their clocks differ."""

    def __init__(self, strategy: tf.distribute.Strategy):
        self._strategy = strategy
        self.workers = strategy.num_replicas_in_sync // len(strategy.extended.worker_devices)
        self._sum = tf.function(self._sum_over_replicas)

    def mean(self, *values: float) -> list[float]:
        """The mean of each value over the workers. All of them must call it, as it is a collective."""
        if self.workers == 1:
            return list(values)
        return self._sum(tf.constant(values, tf.float64)).numpy().tolist()

    def _sum_over_replicas(self, values):
        per_replica = self._strategy.run(tf.identity, args=(values,))
        return self._strategy.reduce("MEAN", per_replica, axis=None)


def _configure_devices(strategy, devices):
    gpus = tf.config.list_physical_devices("GPU")
    if devices is not None and (devices < 1 or (strategy == "one_device" and devices != 1)):
        raise InputError(f"`devices={devices}` cannot work with `strategy={strategy}`: give another number")
    if devices and gpus and devices > len(gpus):
        raise InputError(f"`devices={devices}`, but this machine has {len(gpus)} GPUs: give at most {len(gpus)}")
    if gpus:
        if devices:
            tf.config.set_visible_devices(gpus[:devices], "GPU")
    elif devices and devices > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * devices)


def _join(cluster):
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=cluster)
        Agreement(strategy).mean(0.0)  # a process may have connected and gone
    except tf.errors.OpError as error:
        raise LostWorkerError(
            f"the cluster did not come together ({first_line(error)}): start every process of it again"
        ) from error
    return strategy


_TF_CONFIG_EXAMPLE = (
    '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", "index": 0}}, '
    "with another index on every host"
)

_JOBS = "chief", "worker"  # those that train

_TF_CONFIG_SCHEMA = {
    "type": "object",
    "properties": {
        "cluster": {
            "type": "object",
            "properties": {job: {"type": "array", "items": ADDRESS} for job in _JOBS},
            "additionalProperties": False,
            "description": f"addresses of the jobs {' and '.join(_JOBS)}, which train",
        },
        "task": {
            "type": "object",
            "required": ["type", "index"],
            "properties": {
                "type": {"enum": list(_JOBS), "description": " or ".join(_JOBS)},
                "index": {"type": ["integer", "string"], "pattern": r"\A\d{1,6}\Z", "description": "a number"},
            },
        },
    },
}


def find_cluster(alone: bool = False) -> ClusterResolver | None:
    """The processes that train together, from TF_CONFIG or SLURM's variables.

    Args:
      alone: whether a cluster that consists only of this process counts.

    Returns:
      The cluster, which knows this process's place in it, or None.

    Raises:
      InputError: the variables contradict each other.
    """
    if text := os.environ.get("TF_CONFIG"):
        cluster = _tf_config_cluster(text, alone)
    elif os.environ.get("SLURM_STEP_NUM_TASKS", "1") not in ("", "0" if alone else "1"):
        cluster = _slurm_cluster()
    else:
        return None
    return cluster if cluster and (alone or len(addresses(cluster)) > 1) else None


def addresses(cluster: ClusterResolver, others: bool = False) -> list[str]:
    """HOST:PORT of every process, or of all others."""
    jobs = cluster.cluster_spec().as_dict()
    own = jobs[cluster.task_type][cluster.task_id]
    return [address for job in _JOBS for address in jobs.get(job, ()) if not (others and address == own)]


def _tf_config_cluster(text, alone):
    fix = f"it looks like {_TF_CONFIG_EXAMPLE}"
    config = parse_json(text.encode("utf-8", "surrogateescape"), "TF_CONFIG", _TF_CONFIG_SCHEMA, fix)
    jobs = config.get("cluster", {})
    if not any(jobs.values()) and not alone:
        return None
    task = config.get("task", {"type": None, "index": -1})
    if not 0 <= int(task["index"]) < len(jobs.get(task["type"], ())):
        raise InputError(f"TF_CONFIG names no task of its cluster: {fix}")
    every = [address for job in jobs.values() for address in job]
    if twice := [address for address in every if every.count(address) > 1]:
        raise InputError(f"TF_CONFIG names {twice[0]} twice, but no two processes share a port: {fix}")
    if len(jobs.get("chief", ())) > 1:
        raise InputError(f"TF_CONFIG names {len(jobs['chief'])} chiefs, a cluster has one: {fix}")
    return tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec(jobs), task_type=task["type"], task_id=int(task["index"]), rpc_layer="grpc"
    )


_SLURM = (
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_STEP_RESV_PORTS",
)


def _slurm_cluster():
    gpus = {}
    if not shutil.which("nvidia-smi"):
        # TensorFlow counts the GPUs of each node and leaves out tasks without one, so it is told a number.
        gpus = {"gpus_per_node": 1024, "gpus_per_task": 1, "auto_set_gpu": False}
    try:
        # `srun --resv-ports` reserves ports of its own; 8888 is TensorFlow's default.
        port = int(os.environ.get("SLURM_STEP_RESV_PORTS", "8888").partition("-")[0])
        cluster = tf.distribute.cluster_resolver.SlurmClusterResolver(port_base=port, **gpus)
        if not cluster.num_accelerators()["GPU"]:
            raise ValueError("there are more tasks on a node than GPUs")
        cluster.cluster_spec()  # also chooses the GPUs that this process may see
        if cluster.task_id is None:
            raise ValueError("SLURM_PROCID is not below SLURM_STEP_NUM_TASKS")
        if unfit := [address for address in addresses(cluster) if not re.match(ADDRESS["pattern"], address)]:
            raise ValueError(f"{unfit[0]} is not {ADDRESS['description']}")
    except (ValueError, TypeError, LookupError, RuntimeError, OSError) as error:
        given = ", ".join(f"{name}={os.environ.get(name)}" for name in _SLURM)
        raise InputError(
            f"SLURM's variables name no cluster ({first_line(error)}; {given}): start with srun, which sets them, or "
            "ignore them with `strategy=one_device` or `strategy=mirrored`"
        ) from None
    return cluster


def _tpu_strategy(address):
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=address)
        if address != "local":
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    except (ValueError, RuntimeError, ImportError, OSError, tf.errors.OpError) as error:
        reason = first_line(error).split(". ")[0][:200]
        raise InputError(
            f"no TPU at `tpu={address}` ({reason}): run on a TPU VM with tensorflow-tpu, or give the TPU's name"
        ) from None
