"""Measures how fast each stage of the input pipeline is on this machine, and which one holds it back."""

import time
from typing import Literal

from bn_keras.input.run_batches import RunBatches
from bn_keras.input.training_order import training_records

ADVICE = {
    "reading": "copy the records to a faster disk with `cache=FOLDER`, or into memory with `cache=memory`",
    "decoding, cropping, resizing": "more cores, or other machines with `data_service=ADDRESS`",
    "distortion": "leave it to the accelerator with `distort_on=device`",
}
"""What to do if a stage is the slowest, in terms of arguments."""


def stage_rates(batches: RunBatches, *, seconds: float) -> dict[str, float]:
    """Images per second of a run's pipeline that ends after each stage.

    Args:
      batches: the run's batches.
      seconds: how long to measure each stage.
    """
    config = batches.config
    skip_bad = batches.skipped is not None
    records = training_records(batches.dataset, config.seed, 0, shuffling=config.variant.shuffling, skip_bad=skip_bad)
    stages = {"reading": records.batch(config.batch_size).prefetch(2)}
    pipelines: dict[str, Literal["host", "device"]]
    pipelines = {"decoding, cropping, resizing": "device", "distortion": "host"}
    if config.augmentation != "imagenet":
        pipelines = {"decoding, cropping, resizing": "host"}
    for stage, distort_on in pipelines.items():
        stages[stage] = batches.training(0, distort_on=distort_on)
    return {stage: _rate(batches, config.batch_size, seconds) for stage, batches in stages.items()}


def seconds_per_image(rates: dict[str, float]) -> dict[str, float]:
    """The time that each stage adds to an image, from the rates of `stage_rates`."""
    times = [0.0, *(1 / rate for rate in rates.values())]
    return {stage: max(0.0, after - before) for stage, before, after in zip(rates, times, times[1:], strict=False)}


def _rate(batches, batch_size, seconds):
    iterator = iter(batches)
    for _ in range(3):  # these have started the pipeline and emptied its buffers
        next(iterator)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        next(iterator)
        count += batch_size
    return count / (time.perf_counter() - started)
