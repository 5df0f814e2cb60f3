"""The distribution strategy that a run trains under."""

import tensorflow as tf

from bn_keras.errors import InputError


def make_strategy(name: str, devices: int | None = None) -> tf.distribute.Strategy:
    """Makes a strategy; must come before anything else that touches TensorFlow's devices.

    Args:
      name: "one_device"; "mirrored", over all GPUs or, where there is none, `devices` logical CPUs; or "auto", which is
        mirrored where there is more than one device to use.
      devices: how many GPUs, or logical CPUs, to use; None for all GPUs or one CPU.

    Raises:
      InputError: there are not so many GPUs.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if devices is None:
        devices = max(1, len(gpus)) if name != "one_device" else 1
    if devices < 1 or (name == "one_device" and devices != 1):
        raise InputError(f"--devices={devices} cannot work with --strategy={name}: give another number")
    if gpus and devices > len(gpus):
        raise InputError(f"--devices={devices}, but this machine has {len(gpus)} GPUs: give at most so many")
    if not gpus and devices > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * devices)
    kind = "GPU" if gpus else "CPU"
    if devices == 1 and name != "mirrored":
        return tf.distribute.OneDeviceStrategy(f"{kind}:0")
    return tf.distribute.MirroredStrategy([f"{kind}:{k}" for k in range(devices)])
