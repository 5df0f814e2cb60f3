"""Makes mini-batches of TFRecord shards: for training from any step, and for evaluation of each example exactly once.

No state of a running pipeline is ever saved. The order of examples depends only on (seed, epoch), and an example's crop
and distortion on (seed, epoch, example). A resumed run builds a new pipeline that starts at its step.
"""

import functools
from collections.abc import Callable

import tensorflow as tf

from bn_keras.errors import InputError
from bn_keras.input import preprocessing
from bn_keras.input.bad_records import SkippedRecords
from bn_keras.input.dataset import Dataset
from bn_keras.input.options import InputOptions
from bn_keras.input.photometric_distortion import random_distortion
from bn_keras.input.rand_augment import rand_augment
from bn_keras.input.records import (
    PADDING_LABEL,
    PARALLEL_CALLS,
    blank_row,
    parse,
    prepare_or_blank,
    read_shard,
    shard_table,
    without_autotune,
)
from bn_keras.input.training_order import part_of, pieces_of, training_records

_PLANNED = 32  # examples that are parsed, and whose crops and colors are drawn, in one call


@tf.autograph.experimental.do_not_convert  # nothing here branches on tensors, and converting takes a second
def training_batches(
    dataset: Dataset,
    options: InputOptions,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    hosts: int = 1,
    host: int = 0,
    data_service: str | None = None,
    skipped: SkippedRecords | None = None,
) -> tf.data.Dataset:
    """Endless mini-batches, the same ones from whichever step they start.

    Args:
      dataset: the result of `read_dataset`.
      options: the images' size, order and preprocessing.
      batch_size: examples of a step on all replicas of all hosts together; a multiple of `hosts`.
      seed: the random seed of the order and of all distortions.
      start_step: the step, counted from the start of the run, whose batch comes first.
      hosts: how many machines share each batch.
      host: the number of this machine, which gets the examples `host`, `host + hosts`, ... of each batch.
      data_service: addresses of `launch/data_service`, separated by commas, where the same batches are prepared. Each
        service prepares an equal part of this host's share of each batch, as if it were a host.
      skipped: takes note of each example that cannot be used; another example of the batch takes its place. If the
        framing of a record is damaged, the rest of its shard cannot be used either. None: such examples are errors.

    Returns:
      A dataset of (images float32 `[batch_size / hosts, image_size, image_size, channels]` in [-1, 1],
      labels int32 `[batch_size / hosts]` in [0, classes)); with `distort_on="device"`, in place of the images
      (images uint8, draws float32 `[batch_size / hosts, preprocessing.DRAWS]`).

    Raises:
      InputError: `batch_size` is not a multiple of hosts times services.
    """
    skip_bad = skipped is not None

    def prepared_by(hosts, host):
        records = training_records(
            dataset, seed, start_step * batch_size, hosts, host, shuffling=options.shuffling, skip_bad=skip_bad
        )
        return _prepare(records, dataset, options, _share(batch_size, hosts), skip_bad)

    if data_service:
        addresses = data_service.split(",")
        parts = [prepared_by(hosts * len(addresses), host + hosts * k) for k in range(len(addresses))]
        batches = _join([part.apply(_on(address)) for part, address in zip(parts, addresses, strict=True)])
    else:
        batches = prepared_by(hosts, host)
    return _note(batches, skipped, dataset, "train") if skip_bad else batches


def _on(address):
    """The same dataset, prepared by a data service."""
    off = tf.data.experimental.service.ShardingPolicy.OFF
    return tf.data.experimental.service.distribute(processing_mode=off, service=f"grpc://{address}")


def _join(parts):
    """Joins batches of several parts: one example of each part in turn."""

    def join(*batches):
        def turns(*rows):
            shape = (len(rows) * rows[0].shape[0], *rows[0].shape[1:])
            return tf.reshape(tf.stack(rows, 1), shape)

        return tf.nest.map_structure(turns, *batches)

    return without_autotune(tf.data.Dataset.zip(tuple(parts)).map(join).prefetch(2))


def _prepare(records, dataset, options, batch_size, skip_bad):
    """The mini-batches of `training_batches` from its records.

    With `skip_bad` they have a third part, int64 `[batch_size, 2]`: the shard and record of each example that cannot be
    used, and -1 in all other rows.
    """
    size = {"image_size": options.image_size, "channels": dataset.channels}

    def plan(serialized, draws, *_):
        """The part that is computed for many examples at once; it also takes one alone."""
        encoded, label = parse(serialized, dataset)
        if options.augmentation != "imagenet":
            return encoded, label, draws
        return encoded, label, draws, preprocessing.random_crop(draws)

    change = rand_augment(options.rand_augment) if options.rand_augment else None

    def prepare(encoded, label, draws, crop=None):
        if options.augmentation == "none":
            image = preprocessing.whole_image(encoded, **size)
        elif options.augmentation == "shift":
            image = preprocessing.shifted_image(encoded, draws, **size)
        else:
            image = preprocessing.training_crop(encoded, crop, **size, interpolation=options.interpolation)
        if change:
            image = change(image, draws)
        if options.augmentation != "imagenet":
            return preprocessing.to_network_range(image), label
        return (preprocessing.to_bytes(image) if change else image, draws), label

    # XLA makes one pass over the pixels: 100 us for an image of 224 x 224, against 380 by TensorFlow's operations.
    @tf.function(jit_compile=True, autograph=False)
    def distortion(images, draws):
        return random_distortion(images, draws, options.photometric_distortion)

    def distort(inputs, *others):
        return distortion(*inputs), *others

    if skip_bad:
        records = records.map(lambda serialized, draws, shard, record, _: ((serialized, draws), (shard, record)))
        examples = prepare_or_blank(records, lambda *example: prepare(*plan(*example)))
        batches = examples.batch(batch_size, drop_remainder=True).map(_fill_gaps)
    else:
        planned = records.batch(_PLANNED).map(plan, PARALLEL_CALLS).unbatch()
        # Results come out in order, so a finished call blocks a slot until the ones before it finish; hence twice as
        # many calls as cores: with as many, two cores were 92% busy.
        batches = planned.map(prepare, 2 * PARALLEL_CALLS).batch(batch_size, drop_remainder=True)
    if options.augmentation == "imagenet" and options.distort_on == "host":
        batches = batches.map(distort, 2)  # one call does 10,000 images/s
    return without_autotune(batches.prefetch(2))


@tf.autograph.experimental.do_not_convert
def validation_batches(
    dataset: Dataset,
    options: InputOptions,
    *,
    batch_size: int,
    hosts: int = 1,
    host: int = 0,
    view: Callable | None = None,
    skipped: SkippedRecords | None = None,
) -> tf.data.Dataset:
    """Each validation example exactly once, in order; rows with `PADDING_LABEL` fill up the last batches.

    Args:
      dataset: the result of `read_dataset`.
      options: the options of training; `image_size` and `augmentation` decide `preprocessing.evaluated_view`.
      batch_size: examples of a step on all replicas of all hosts together; a multiple of `hosts`.
      hosts: how many machines share the examples; each gets the same number of batches.
      host: the number of this machine; the examples of host 0 come first.
      view: takes the place of the evaluated view: a function from an image's bytes to one tensor or several, float32
        of known shapes in [0, 255].
      skipped: takes note of each example that cannot be used; its row becomes padding. None: such examples are errors.

    Returns:
      A dataset of (images float32 `[batch_size / hosts, image_size, image_size, channels]` in [-1, 1], or what `view`
      returns, in [-1, 1] and batched; labels int32 `[batch_size / hosts]` in [0, classes), or `PADDING_LABEL`).

    Raises:
      InputError: `hosts` does not divide `batch_size`.
    """
    share = _share(batch_size, hosts)
    paths, counts = shard_table(dataset, "validation")
    total = int(counts.sum())
    if view is None:
        view = preprocessing.evaluated_view(options.augmentation)
        view = functools.partial(view, image_size=options.image_size, channels=dataset.channels)

    def prepare(serialized):
        encoded, label = parse(serialized, dataset)
        return tf.nest.map_structure(preprocessing.to_network_range, view(encoded)), label

    def read_piece(shard, skip, size):
        records = read_shard(tf.gather(paths, shard), skipped is not None).skip(skip).take(size)
        if skipped is None:
            return records
        places = tf.data.Dataset.range(skip, skip + size).map(lambda record: (shard, record))
        return tf.data.Dataset.zip(((records,), places))

    begin, length = part_of(total, hosts, host)
    pieces = tf.data.Dataset.from_tensor_slices(pieces_of(tf.range(len(paths), dtype=tf.int64), counts, begin, length))
    records = pieces.flat_map(read_piece)
    examples = records.map(prepare, PARALLEL_CALLS) if skipped is None else prepare_or_blank(records, prepare)
    batches = -(-total // batch_size)
    padding = tf.data.Dataset.from_tensors(blank_row(examples.element_spec)).repeat(batches * share - length)
    examples = without_autotune(examples.concatenate(padding).batch(share, drop_remainder=True).prefetch(2))
    return examples if skipped is None else _note(examples, skipped, dataset, "validation")


def _share(batch_size, hosts):
    if batch_size % hosts:
        raise InputError(f"a batch of {batch_size} cannot be shared by {hosts} hosts: give a multiple of that")
    return batch_size // hosts


def _note(batches, skipped, dataset, split):
    """Tells `skipped` which records were left out, and removes their places from the batches."""

    def add(places):
        for shard, record in places:
            skipped.add(dataset.splits[split][shard].path, int(record))

    def note(inputs, labels, places):
        bad = tf.boolean_mask(places, places[:, 0] >= 0)
        noted = tf.cond(tf.size(bad) > 0, lambda: tf.numpy_function(add, [bad], []), tf.no_op)
        with tf.control_dependencies([noted]):
            return inputs, tf.identity(labels)

    return without_autotune(batches.map(note))


def _fill_gaps(inputs, labels, places):
    """Replaces the rows labelled `PADDING_LABEL` by the batch's good rows, in turn."""
    good = tf.where(labels != PADDING_LABEL)[:, 0]
    tf.debugging.assert_positive(tf.size(good), "no example of a batch can be used")
    row = tf.range(tf.size(labels, tf.int64), dtype=tf.int64)
    row = tf.where(labels != PADDING_LABEL, row, tf.gather(good, row % tf.size(good, tf.int64)))
    filled = tf.nest.map_structure(lambda part: tf.ensure_shape(tf.gather(part, row), part.shape), (inputs, labels))
    return *filled, places
