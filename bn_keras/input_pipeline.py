"""TFRecord shards to mini-batches: a training order that can start at any step, and exact once-through evaluation.

Nothing of a running pipeline is ever saved. The order of examples is a function of (seed, epoch), an example's crop
and distortion of (seed, epoch, example); so a resumed run builds the pipeline anew at the step it wants.

One epoch is cut into windows of `WINDOW_SHARDS` whole shards, drawn anew for every epoch. A window's records are read
together and, with shuffling "within_shard", permuted together. Starting at a step passes over whole windows unread and
re-reads at most one.
"""

import functools
import os

import numpy as np
import tensorflow as tf

from bn_keras import preprocessing
from bn_keras.dataset import Dataset

WINDOW_SHARDS = 4
"""ImageNet in 1,024 shards has 140 MB in each; the window in use and the one read ahead are 1.1 GB together."""

PARALLEL_CALLS = os.cpu_count() or 1

PADDING_LABEL = -1
"""Of the rows that fill up the last evaluation batch; they count nowhere."""

_ORDER, _PERMUTATION, _DISTORTION = range(3)  # what a seed is for, so that no two draws share one


def training_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    image_size: int,
    seed: int,
    start_step: int = 0,
    augmentation: str = "imagenet",
    shuffling: str = "within_shard",
    photometric_distortion: str = "reduced",
) -> tf.data.Dataset:
    """Endless mini-batches, deterministic from any step.

    Args:
      dataset: of `read_dataset`.
      batch_size: examples of all replicas together.
      image_size: height and width in pixels of what comes out.
      seed: of the order and of all distortions.
      start_step: the first batch is the one that a run from 0 would see at this step.
      augmentation: "imagenet" (GoogLeNet's crop, mirror, photometric distortion), "shift" (mirror and small shifts) or
        "none" (the whole image).
      shuffling: as in `Variant`.
      photometric_distortion: as in `Variant`; without effect unless augmentation is "imagenet".

    Returns:
      A dataset of (images float32 `[batch_size, image_size, image_size, channels]` in [-1, 1],
      labels int32 `[batch_size]` in [0, classes)).
    """
    paths, counts, offsets = _shard_table(dataset, "train")
    total = int(counts.sum())
    epoch, position = divmod(start_step * batch_size, total)
    window_sizes = counts[_epoch_order(len(paths), seed, epoch)]
    ends = np.cumsum([sizes.sum() for sizes in _chunks(window_sizes, WINDOW_SHARDS)])
    first_window = int(np.searchsorted(ends, position, side="right"))
    passed = int(ends[first_window - 1]) if first_window else 0

    def windows(epoch):
        order = _epoch_order(len(paths), seed, epoch)
        return tf.data.Dataset.from_tensor_slices(order).batch(WINDOW_SHARDS).map(lambda shards: (epoch, shards))

    def read(epoch, shards):
        size = tf.reduce_sum(tf.gather(counts, shards))
        begin = tf.gather(offsets, shards)
        examples = tf.ragged.range(begin, begin + tf.gather(counts, shards)).flat_values
        records = tf.data.TFRecordDataset(tf.gather(paths, shards)).batch(size)
        if shuffling == "within_shard":
            permutation = tf.random.experimental.stateless_shuffle(
                tf.range(size), _seed(seed, _PERMUTATION, epoch, shards[0])
            )
        else:
            permutation = tf.range(size)
        return records.map(
            lambda serialized: (
                tf.gather(serialized, permutation),
                tf.gather(examples, permutation),
                tf.fill((size,), epoch),
            )
        )

    def prepare(serialized, example, epoch):
        encoded, label = _parse(serialized, dataset)
        if augmentation == "none":
            return preprocessing.whole_image(encoded, image_size=image_size, channels=dataset.channels), label
        seeds = tf.random.split(_seed(seed, _DISTORTION, epoch, example), 2)
        if augmentation == "shift":
            image = preprocessing.shifted_image(encoded, seeds[0], image_size=image_size, channels=dataset.channels)
            return image, label
        image = preprocessing.training_crop(encoded, seeds[0], image_size=image_size, channels=dataset.channels)
        return image, preprocessing.distortion_draws(seeds[1]), label

    def finish(images, *rest):
        if augmentation == "imagenet":
            images = preprocessing.photometric_distortion(images, rest[0], photometric_distortion)
        return preprocessing.to_network_range(images), rest[-1]

    records = (
        tf.data.Dataset.range(epoch, np.iinfo(np.int64).max)
        .flat_map(windows)
        .skip(first_window)
        .flat_map(read)
        .prefetch(1)
        .unbatch()
        .skip(position - passed)
    )
    batches = records.map(prepare, PARALLEL_CALLS).batch(batch_size, drop_remainder=True).map(finish, PARALLEL_CALLS)
    return _with_options(batches.prefetch(2))


def validation_batches(
    dataset: Dataset, *, batch_size: int, image_size: int, augmentation: str = "imagenet", view=None
) -> tf.data.Dataset:
    """Every validation example exactly once, in order; the last batch is filled up with `PADDING_LABEL` rows.

    Args:
      dataset: of `read_dataset`.
      batch_size: examples of all replicas together.
      image_size: height and width in pixels of what comes out.
      augmentation: what training uses: "imagenet" evaluates a single central crop, the others the whole image.
      view: called with an image's bytes in place of that; returns one tensor or several, float32 of known shapes in
        [0, 255].

    Returns:
      A dataset of (images float32 `[batch_size, image_size, image_size, channels]` in [-1, 1], or what `view` returns,
      in [-1, 1] and batched; labels int32 `[batch_size]` in [0, classes), or `PADDING_LABEL`).
    """
    paths, counts, _ = _shard_table(dataset, "validation")
    if view is None:
        crop = preprocessing.single_crop if augmentation == "imagenet" else preprocessing.whole_image
        view = functools.partial(crop, image_size=image_size, channels=dataset.channels)

    def prepare(serialized):
        encoded, label = _parse(serialized, dataset)
        return tf.nest.map_structure(preprocessing.to_network_range, view(encoded)), label

    examples = tf.data.TFRecordDataset(paths).map(prepare, PARALLEL_CALLS)
    black = tf.nest.map_structure(lambda spec: tf.zeros(spec.shape), examples.element_spec[0])
    blank = (black, tf.constant(PADDING_LABEL, tf.int32))
    missing = -int(counts.sum()) % batch_size
    examples = examples.concatenate(tf.data.Dataset.from_tensors(blank).repeat(missing))
    return _with_options(examples.batch(batch_size, drop_remainder=True).prefetch(2))


def _shard_table(dataset, split):
    """Paths, record counts, and the number of the first example of every shard of a split."""
    shards = dataset.splits[split]
    counts = np.array([shard.examples for shard in shards], np.int64)
    return np.array([shard.path for shard in shards]), counts, np.cumsum(counts) - counts


def _epoch_order(shards, seed, epoch):
    return tf.random.experimental.stateless_shuffle(tf.range(shards, dtype=tf.int64), _seed(seed, _ORDER, epoch))


def _chunks(values, size):
    return [values[k : k + size] for k in range(0, len(values), size)]


def _seed(seed, *parts):
    """An int32 `[2]` seed that is a function of all its parts."""
    key = tf.constant([seed, 0], tf.int32)
    for part in parts:
        key = tf.random.fold_in(key, part)
    return key


def _parse(serialized, dataset):
    features = tf.io.parse_single_example(
        serialized,
        {
            "image/encoded": tf.io.FixedLenFeature((), tf.string),
            "image/class/label": tf.io.FixedLenFeature((), tf.int64),
        },
    )
    classes = len(dataset.class_names)
    label = tf.cast(features["image/class/label"], tf.int32) - dataset.label_base
    tf.debugging.assert_less(
        tf.bitcast(label, tf.uint32),  # negative labels become large
        tf.constant(classes, tf.uint32),
        f"a label is outside {dataset.label_base}..{dataset.label_base + classes - 1}",
    )
    return features["image/encoded"], label


def _with_options(dataset):
    options = tf.data.Options()
    # Autotune's thread blocks for seconds when an iterator is destroyed, and its parallelism drifts; ours is explicit.
    options.autotune.enabled = False
    options.deterministic = True
    # Distribution splits the batches of this one pipeline; nothing is to be re-read per worker.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return dataset.with_options(options)


def find_damage(dataset: Dataset, split: str) -> str | None:
    """Reads a split record by record until one cannot be used.

    Returns:
      A sentence that names the shard, the record's number in it and what is wrong; None if every record is good.
    """
    for shard in dataset.splits[split]:
        good = 0
        try:
            for serialized in tf.data.TFRecordDataset(shard.path):
                encoded, _ = _parse(serialized, dataset)
                preprocessing.decode(encoded, dataset.channels)
                good += 1
        except tf.errors.OpError as error:
            return f"record {good} of {shard.path} cannot be used ({_first_line(error)}): prepare the data again"
        if good != shard.examples:
            return f"{shard.path} has {good} records, the manifest says {shard.examples}: prepare the data again"
    return None


def _first_line(error):
    return str(error.message).splitlines()[0]
