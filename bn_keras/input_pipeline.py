"""TFRecord shards to mini-batches: a training order that can start at any step, and exact once-through evaluation.

Nothing of a running pipeline is ever saved. The order of examples is a function of (seed, epoch), an example's crop
and distortion of (seed, epoch, example); so a resumed run builds the pipeline anew at the step it wants.

The shards of an epoch, in an order drawn for it, are cut into `LANES` lanes with equally many examples. Example `p` of
the epoch is the next of lane `p mod LANES`, so that every mini-batch mixes as many shards. A lane is read shard by
shard and, with shuffling "within_shard", each shard's examples are permuted. Starting at a step passes over whole
shards unread and re-reads at most one in each lane. A host owns every `hosts`-th example, which are whole lanes: it
reads only the shards of its own lanes, and all hosts together see the batches that one alone would.
"""

import functools
import os

import numpy as np
import tensorflow as tf

from bn_keras import preprocessing
from bn_keras.dataset import Dataset
from bn_keras.errors import InputError

LANES = 8
"""Shards that are read at a time. The batches are the same for any count of hosts that divides it."""

PARALLEL_CALLS = os.cpu_count() or 1

PADDING_LABEL = -1
"""Of the rows that fill up the last evaluation batches; they count nowhere."""

_ORDER, _PERMUTATION, _DISTORTION = range(3)  # what a seed is for, so that no two draws share one


def training_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    image_size: int,
    seed: int,
    start_step: int = 0,
    hosts: int = 1,
    host: int = 0,
    augmentation: str = "imagenet",
    shuffling: str = "within_shard",
    photometric_distortion: str = "reduced",
) -> tf.data.Dataset:
    """Endless mini-batches, deterministic from any step.

    Args:
      dataset: of `read_dataset`.
      batch_size: examples of all replicas of all hosts together; a multiple of `hosts`.
      image_size: height and width in pixels of what comes out.
      seed: of the order and of all distortions.
      start_step: the first batch is the one that a run from 0 would see at this step.
      hosts: machines that share every batch.
      host: which of them this is; its part is examples `host`, `host + hosts`, ... of the batch.
      augmentation: "imagenet" (GoogLeNet's crop, mirror, photometric distortion), "shift" (mirror and small shifts) or
        "none" (the whole image).
      shuffling: as in `Variant`.
      photometric_distortion: as in `Variant`; without effect unless augmentation is "imagenet".

    Returns:
      A dataset of (images float32 `[batch_size / hosts, image_size, image_size, channels]` in [-1, 1],
      labels int32 `[batch_size / hosts]` in [0, classes)).

    Raises:
      InputError: `hosts` does not divide `batch_size`.
    """
    share = _share(batch_size, hosts)

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

    records = training_records(dataset, seed, start_step * batch_size, hosts, host, shuffling)
    batches = records.map(prepare, PARALLEL_CALLS).batch(share, drop_remainder=True).map(finish, PARALLEL_CALLS)
    return _with_options(batches.prefetch(2))


def training_records(
    dataset: Dataset, seed: int, start: int, hosts: int = 1, host: int = 0, shuffling: str = "within_shard"
) -> tf.data.Dataset:
    """The endless training order without any decoding.

    Args:
      dataset, seed, hosts, host, shuffling: as for `training_batches`.
      start: examples of all hosts together that come before the first one, a multiple of `hosts`.

    Returns:
      A dataset of (serialized example, int64 number of the example in the split, int64 epoch).
    """
    paths, counts, offsets = _shard_table(dataset, "train")
    total = int(counts.sum())
    lanes = hosts if LANES % hosts else LANES
    first_epoch, first_position = divmod(start, total)

    def read_epoch(epoch):
        position = tf.where(epoch == first_epoch, tf.constant(first_position, tf.int64), 0)
        order = _epoch_order(len(paths), seed, epoch)
        lane = (position + tf.range(lanes, dtype=tf.int64)) % lanes  # in the order of their turns
        own = tf.boolean_mask(lane, (epoch * total + lane) % hosts == host)
        passed = (position - own + lanes - 1) // lanes
        pieces = tf.data.Dataset.from_tensor_slices((own, passed))
        return pieces.interleave(
            lambda lane, passed: read_lane(epoch, order, lane, passed), cycle_length=lanes // hosts, block_length=1
        )

    def read_lane(epoch, order, lane, passed):
        begin, length = _part(total, lanes, lane)
        shards, skips, sizes = _cut(order, counts, begin, length)
        drops = tf.clip_by_value(passed - tf.cumsum(sizes, exclusive=True), 0, sizes)
        first = tf.reduce_sum(tf.cast(drops == sizes, tf.int64))
        pieces = tf.data.Dataset.from_tensor_slices((shards, skips, sizes, drops)).skip(first)
        return pieces.flat_map(lambda *piece: read_piece(epoch, *piece)).prefetch(1).unbatch()

    def read_piece(epoch, shard, skip, size, drop):
        order = tf.range(size)
        if shuffling == "within_shard":
            order = tf.random.experimental.stateless_shuffle(order, _seed(seed, _PERMUTATION, epoch, shard))
        order = order[drop:]
        example = tf.gather(offsets, shard) + skip + order
        records = tf.data.TFRecordDataset(tf.gather(paths, shard)).skip(skip).take(size).batch(size)
        return records.map(lambda serialized: (tf.gather(serialized, order), example, tf.fill(tf.shape(order), epoch)))

    return tf.data.Dataset.range(first_epoch, np.iinfo(np.int64).max).flat_map(read_epoch)


def validation_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    image_size: int,
    hosts: int = 1,
    host: int = 0,
    augmentation: str = "imagenet",
    view=None,
) -> tf.data.Dataset:
    """Every validation example exactly once, in order; the last batches are filled up with `PADDING_LABEL` rows.

    Args:
      dataset: of `read_dataset`.
      batch_size: examples of all replicas of all hosts together; a multiple of `hosts`.
      image_size: height and width in pixels of what comes out.
      hosts: machines that share the examples; all get equally many batches.
      host: which of them this is; the examples of host 0 come first.
      augmentation: what training uses: "imagenet" evaluates a single central crop, the others the whole image.
      view: called with an image's bytes in place of that; returns one tensor or several, float32 of known shapes in
        [0, 255].

    Returns:
      A dataset of (images float32 `[batch_size / hosts, image_size, image_size, channels]` in [-1, 1], or what `view`
      returns, in [-1, 1] and batched; labels int32 `[batch_size / hosts]` in [0, classes), or `PADDING_LABEL`).

    Raises:
      InputError: `hosts` does not divide `batch_size`.
    """
    share = _share(batch_size, hosts)
    paths, counts, _ = _shard_table(dataset, "validation")
    total = int(counts.sum())
    if view is None:
        crop = preprocessing.single_crop if augmentation == "imagenet" else preprocessing.whole_image
        view = functools.partial(crop, image_size=image_size, channels=dataset.channels)

    def prepare(serialized):
        encoded, label = _parse(serialized, dataset)
        return tf.nest.map_structure(preprocessing.to_network_range, view(encoded)), label

    def read_piece(shard, skip, size):
        return tf.data.TFRecordDataset(tf.gather(paths, shard)).skip(skip).take(size)

    begin, length = _part(total, hosts, host)
    pieces = tf.data.Dataset.from_tensor_slices(_cut(tf.range(len(paths), dtype=tf.int64), counts, begin, length))
    examples = pieces.flat_map(read_piece).map(prepare, PARALLEL_CALLS)
    black = tf.nest.map_structure(lambda spec: tf.zeros(spec.shape), examples.element_spec[0])
    blank = (black, tf.constant(PADDING_LABEL, tf.int32))
    batches = -(-total // batch_size)
    examples = examples.concatenate(tf.data.Dataset.from_tensors(blank).repeat(batches * share - length))
    return _with_options(examples.batch(share, drop_remainder=True).prefetch(2))


def _share(batch_size, hosts):
    if batch_size % hosts:
        raise InputError(f"a batch of {batch_size} cannot be shared by {hosts} hosts: give a multiple of that")
    return batch_size // hosts


def _part(total, parts, part):
    """Begin and length of one of `parts` parts of `total` examples, as equal as can be, the longer ones first."""
    part = tf.cast(part, tf.int64)
    whole, rest = divmod(total, parts)
    return part * whole + tf.minimum(part, rest), (total - part + parts - 1) // parts


def _cut(order, counts, begin, length):
    """The pieces of shards that hold examples `begin` to `begin + length` of the shards in an order.

    Returns:
      int64 `[pieces]` each: shard, records to skip in it, records to take from it.
    """
    ends = tf.cumsum(tf.gather(counts, order))
    starts = ends - tf.gather(counts, order)
    heads, tails = tf.maximum(starts, begin), tf.minimum(ends, begin + length)
    used = heads < tails
    return tuple(tf.boolean_mask(values, used) for values in (order, heads - starts, tails - heads))


def _shard_table(dataset, split):
    """Paths, record counts, and the number of the first example of every shard of a split."""
    shards = dataset.splits[split]
    counts = np.array([shard.examples for shard in shards], np.int64)
    return np.array([shard.path for shard in shards]), counts, np.cumsum(counts) - counts


def _epoch_order(shards, seed, epoch):
    return tf.random.experimental.stateless_shuffle(tf.range(shards, dtype=tf.int64), _seed(seed, _ORDER, epoch))


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
