"""Measures a run: images per second, the share of time spent waiting for input, step times and memory."""

import resource
import sys

import numpy as np
import tensorflow as tf


class StepStatistics:
    """The times of the steps since the last row of the curve.

    Args:
      replicas: how many devices share the work.
    """

    def __init__(self, replicas: int):
        self._replicas = replicas
        self._times = []
        self._images = 0

    def add(self, times: np.ndarray, batch_size: int) -> None:
        """Adds steps of `batch_size` images: float64 `[steps, 2]`, their seconds of waiting for input, and in all."""
        self._times.append(times)
        self._images += batch_size * len(times)

    def take(self) -> dict[str, float]:
        """The statistics of the steps added since the last call."""
        waited, total = np.concatenate(self._times).T
        rate = self._images / total.sum()
        self._times, self._images = [], 0
        return {
            "images_per_second": rate,
            "images_per_second_per_device": rate / self._replicas,
            "input_wait": waited.sum() / total.sum(),
            **{f"step_seconds_p{p}": float(np.percentile(total, p)) for p in (50, 90, 99)},
            **peak_memory(),
        }


def peak_memory() -> dict[str, int]:
    """The most bytes that were in use so far: by this process, and on the GPU that used most."""
    memory = {"peak_host_bytes": _peak_host_bytes()}
    gpus = [f"GPU:{k}" for k in range(len(tf.config.list_logical_devices("GPU")))]
    if gpus:
        memory["peak_gpu_bytes"] = max(tf.config.experimental.get_memory_info(gpu)["peak"] for gpu in gpus)
    return memory


def _peak_host_bytes():
    # Linux's ru_maxrss begins with the peak of the program that started this one: 2.4 GB under the test suite, not 1.0.
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
