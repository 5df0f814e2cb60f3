"""How fast the input pipeline is on this machine, stage by stage, and which stage holds it back."""

import time

from bn_keras.input import pipeline
from bn_keras.input.dataset import Dataset

ADVICE = {
    "reading": "copy the records to a faster disk with --cache=PATH, or into memory with --cache=memory",
    "decoding, cropping, resizing": "more cores, or other machines with --data_service=ADDRESS",
    "distortion": "leave it to the accelerator with --distort_on=device",
}


def stage_rates(
    dataset: Dataset, *, batch_size: int, seconds: float, augmentation: str = "imagenet", **options
) -> dict[str, float]:
    """Images a second of the pipeline up to and with each stage.

    Args:
      seconds: to measure each for.
      augmentation, options: of `training_batches`.
    """
    options |= {"batch_size": batch_size, "augmentation": augmentation}
    order = {"shuffling": options["shuffling"], "skip_bad": options.get("skipped") is not None}
    records = pipeline.training_records(dataset, options["seed"], 0, **order)
    stages = {"reading": records.batch(batch_size).prefetch(2)}
    if augmentation == "imagenet":
        pipelines = {"decoding, cropping, resizing": "device", "distortion": "host"}
    else:
        pipelines = {"decoding, cropping, resizing": "host"}
    for stage, distort_on in pipelines.items():
        stages[stage] = pipeline.training_batches(dataset, distort_on=distort_on, **options)
    return {stage: _rate(batches, batch_size, seconds) for stage, batches in stages.items()}


def seconds_per_image(rates: dict[str, float]) -> dict[str, float]:
    """What each stage adds to the time of an image, from the rates up to each."""
    times = [0.0, *(1 / rate for rate in rates.values())]
    return {stage: max(0.0, after - before) for stage, before, after in zip(rates, times, times[1:], strict=False)}


def _rate(batches, batch_size, seconds):
    iterator = iter(batches)
    for _ in range(3):  # starts, and what was ready
        next(iterator)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        next(iterator)
        count += batch_size
    return count / (time.perf_counter() - started)
