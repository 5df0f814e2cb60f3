"""The distribution strategy that a run trains under, and each host's share of the input."""

import json
import os
import shutil

import tensorflow as tf

from bn_keras.errors import InputError


def make_strategy(name: str, devices: int | None = None, tpu: str | None = None) -> tf.distribute.Strategy:
    """Makes a strategy; must come before anything else that touches TensorFlow's devices.

    Args:
      name: "one_device"; "mirrored", over all GPUs or, where there is none, `devices` logical CPUs; "multi_worker",
        over the processes that TF_CONFIG or SLURM names; "tpu"; or "auto": the TPU where one is given, several workers
        where the environment names them, mirrored where there is more than one device, else one device.
      devices: how many GPUs, or logical CPUs, of this machine to use; None for all GPUs or one CPU.
      tpu: name or address of a TPU; "local" for that of a TPU VM.

    Raises:
      InputError: there are not so many GPUs, no cluster, or no TPU.
    """
    if name == "auto":
        name = "tpu" if tpu else "multi_worker" if _cluster_size() > 1 else "auto"
    if tpu and name != "tpu":
        raise InputError(f"--tpu={tpu} needs --strategy=tpu, not {name}")
    if devices and name == "tpu":
        raise InputError("--devices cannot work with --strategy=tpu, which takes all of the TPU's cores")
    if name == "tpu":
        return _tpu_strategy(tpu or "local")
    # The cluster first: SLURM's resolver chooses the GPUs that this process may see.
    cluster = _cluster() if name == "multi_worker" else None
    _configure_devices(name, devices)
    if cluster:
        return tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=cluster)
    local = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    names = [f"{device.device_type}:{k}" for k, device in enumerate(local)][: devices or len(local)]
    if len(names) == 1 or name == "one_device":
        return (
            tf.distribute.MirroredStrategy(names) if name == "mirrored" else tf.distribute.OneDeviceStrategy(names[0])
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


def distribute(strategy: tf.distribute.Strategy, make_batches):
    """A distributed dataset, iterable under the strategy.

    Args:
      make_batches: `make_batches(hosts=h, host=k)` is the k-th host's share of every mini-batch, in static shapes.
    """

    def share(context):
        batches = make_batches(hosts=context.num_input_pipelines, host=context.input_pipeline_id)
        replicas = context.num_replicas_in_sync // context.num_input_pipelines
        size = tf.nest.flatten(batches.element_spec)[0].shape[0]
        return batches.rebatch(size // replicas, drop_remainder=True) if replicas > 1 else batches

    return strategy.distribute_datasets_from_function(share)


class Agreement:
    """Numbers of all worker processes added up, so that processes that time themselves still do the same things."""

    def __init__(self, strategy: tf.distribute.Strategy):
        self._strategy = strategy
        self.workers = 1
        if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
            self.workers = strategy.extended._num_workers
        self._sum = tf.function(self._sum_over_replicas)

    def mean(self, *values: float) -> list[float]:
        """The mean of each value over the workers; a collective, so all of them must call it."""
        if self.workers == 1:
            return list(values)
        return self._sum(tf.constant(values, tf.float64)).numpy().tolist()

    def _sum_over_replicas(self, values):
        per_replica = self._strategy.run(tf.identity, args=(values,))
        return self._strategy.reduce("MEAN", per_replica, axis=None)


def _configure_devices(name, devices):
    gpus = tf.config.list_physical_devices("GPU")
    if devices is not None and (devices < 1 or (name == "one_device" and devices != 1)):
        raise InputError(f"--devices={devices} cannot work with --strategy={name}: give another number")
    if devices and gpus and devices > len(gpus):
        raise InputError(f"--devices={devices}, but this machine has {len(gpus)} GPUs: give at most so many")
    if gpus:
        if devices:
            tf.config.set_visible_devices(gpus[:devices], "GPU")
    elif devices and devices > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * devices)


def _cluster_size():
    """Worker processes that the environment names."""
    if "TF_CONFIG" in os.environ:
        cluster = _tf_config().get("cluster", {})
        return sum(len(cluster.get(job, ())) for job in ("chief", "worker"))
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))


def _tf_config():
    try:
        return json.loads(os.environ["TF_CONFIG"])
    except ValueError as error:
        raise InputError(f"TF_CONFIG is no JSON ({error}): it looks like {_TF_CONFIG_EXAMPLE}") from None


_TF_CONFIG_EXAMPLE = (
    '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", "index": 0}}, '
    "with another index on every host"
)


def _cluster():
    if "TF_CONFIG" in os.environ:
        config = _tf_config()
        job, index = (config.get("task", {}).get(key) for key in ("type", "index"))
        if not 0 <= (index if isinstance(index, int) else -1) < len(config.get("cluster", {}).get(job, ())):
            raise InputError(f"TF_CONFIG names no task of its cluster: it looks like {_TF_CONFIG_EXAMPLE}")
        return tf.distribute.cluster_resolver.TFConfigClusterResolver()
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        # `srun --resv-ports` reserves ports of its own; 8888 is TensorFlow's default.
        port = int(os.environ.get("SLURM_STEP_RESV_PORTS", "8888").partition("-")[0])
        gpus = {}
        if not shutil.which("nvidia-smi"):
            # The resolver would ask it, and lists no task of a node that has no GPU for it: so it is told of some.
            gpus = {"gpus_per_node": 1024, "gpus_per_task": 1, "auto_set_gpu": False}
        return tf.distribute.cluster_resolver.SlurmClusterResolver(port_base=port, **gpus)
    raise InputError(
        "--strategy=multi_worker finds neither TF_CONFIG nor SLURM's variables: start it with srun, or set "
        f"TF_CONFIG={_TF_CONFIG_EXAMPLE}"
    )


def _tpu_strategy(address):
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=address)
        if address != "local":
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    except (ValueError, RuntimeError, ImportError, OSError, tf.errors.OpError) as error:
        reason = str(error).splitlines()[0].split(". ")[0][:200]
        raise InputError(
            f"no TPU at --tpu={address} ({reason}): run on a TPU VM with tensorflow-tpu, or give the TPU's name"
        ) from None
