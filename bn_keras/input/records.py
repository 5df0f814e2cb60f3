"""Reads and parses the records of a shard, names those that cannot be used, and can leave them out."""

import contextlib
import os
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError

from bn_keras.errors import InputError, first_line
from bn_keras.input import preprocessing
from bn_keras.input.dataset import RECORD_FRAME, Dataset
from bn_keras.input.image_header import why_unreadable

PARALLEL_CALLS = os.cpu_count() or 1

PADDING_LABEL = -1
"""Label of the rows that fill up the last evaluation batches; they are not counted."""

_NAME_FEATURES = ("image/filename", "file_name", "filename")  # the first is TF-Slim's and ours, the others TFDS's


def shard_table(dataset: Dataset, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Path and record count, int64, of every shard of a split."""
    shards = dataset.splits[split]
    counts = np.array([shard.examples for shard in shards], np.int64)
    return np.array([shard.path for shard in shards]), counts


def read_shard(path: tf.Tensor, skip_bad: bool) -> tf.data.Dataset:
    """The serialized records of a shard. With `skip_bad`, endless empty records follow a place that cannot be read."""
    records = tf.data.TFRecordDataset(path)
    if skip_bad:  # no image can be made of an empty record
        records = records.ignore_errors().concatenate(tf.data.Dataset.from_tensors("").repeat())
    return records


def parse(serialized: tf.Tensor, dataset: Dataset) -> tuple[tf.Tensor, tf.Tensor]:
    """The encoded image and the label, int32 in [0, classes), of one serialized example, or of several, `[N]`."""
    features = tf.io.parse_example(
        serialized,
        {
            dataset.image_feature: tf.io.FixedLenFeature((), tf.string),
            dataset.label_feature: tf.io.FixedLenFeature((), tf.int64),
        },
    )
    classes = len(dataset.class_names)
    label = features[dataset.label_feature] - dataset.label_base
    tf.debugging.assert_less(
        tf.bitcast(label, tf.uint64),  # a negative label becomes a large number
        tf.constant(classes, tf.uint64),
        f"a label is outside {dataset.label_base}..{dataset.label_base + classes - 1}",
    )
    return features[dataset.image_feature], tf.cast(label, tf.int32)


def prepare_or_blank(records: tf.data.Dataset, prepare: Callable) -> tf.data.Dataset:
    """Prepares every record; a `blank_row` takes the place of one that cannot be prepared.

    Args:
      records: a dataset of (arguments of `prepare`, (int64 number of the shard, int64 number of the record in it)).
      prepare: a function that makes (inputs, label) of a record.

    Returns:
      A dataset of (inputs, label, place): int64 `[2]`, shard and record of a blank row, -1 for every other.
    """

    def attempt(arguments, place):
        prepared = tf.data.Dataset.from_tensors(arguments).map(prepare).map(lambda *example: (*example, nowhere))

        def blank(_):
            return *blank_row(prepared.element_spec)[:2], tf.stack(place)

        return prepared.ignore_errors().concatenate(tf.data.Dataset.range(1).map(blank)).take(1)

    nowhere = tf.fill([2], tf.constant(-1, tf.int64))
    return records.interleave(attempt, PARALLEL_CALLS, num_parallel_calls=PARALLEL_CALLS, deterministic=True)


def blank_row(element_spec: tuple) -> tuple:
    """A row without an example: black inputs, `PADDING_LABEL` and, if rows have a place, -1."""
    inputs, *others = element_spec
    black = tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), inputs)
    return black, *(tf.fill(spec.shape, tf.constant(PADDING_LABEL, spec.dtype)) for spec in others)


@contextlib.contextmanager
def naming_damage(dataset: Dataset, split: str) -> Iterator[None]:
    """Turns TensorFlow's error about a record into one that names the file and the record."""
    try:
        yield
    except (
        tf.errors.DataLossError,
        tf.errors.FailedPreconditionError,
        tf.errors.InvalidArgumentError,
        tf.errors.NotFoundError,
    ) as error:
        if damage := find_damage(dataset, split):
            raise InputError(damage) from error
        raise


def find_damage(dataset: Dataset, split: str) -> str | None:
    """Reads a split, on all cores, until a record cannot be used.

    Returns:
      A sentence that names the shard, the record's number in it, its first byte, its image and what is wrong; None if
      every record is good.
    """
    paths, counts = shard_table(dataset, split)

    def read(shard, count):
        places = tf.data.Dataset.range(count).map(lambda record: (shard, record))
        return tf.data.Dataset.zip(((read_shard(tf.gather(paths, shard), True).take(count),), places))

    def use(serialized):
        encoded, label = parse(serialized, dataset)
        return preprocessing.decode(encoded, dataset.channels)[0, 0, 0], label

    records = tf.data.Dataset.from_tensor_slices((tf.range(len(paths), dtype=tf.int64), counts)).flat_map(read)
    bad = prepare_or_blank(records, use).filter(lambda pixel, label, place: place[0] >= 0)
    for *_, (shard, record) in without_autotune(bad).take(1):
        return _describe_damage(dataset, dataset.splits[split][shard], int(record))
    return None


def _describe_damage(dataset, shard, bad):
    """Says what is wrong with record number `bad` of a shard."""
    offset, read, name, encoded = 0, 0, "", None
    fix = "prepare the data again into an empty folder, or leave it out with `skipped`"
    try:
        for serialized in tf.data.TFRecordDataset(shard.path):
            if read == bad:
                name = _image_name(serialized.numpy())
                encoded, _ = parse(serialized, dataset)
                preprocessing.decode(encoded, dataset.channels)
            offset += RECORD_FRAME + len(serialized.numpy())
            read += 1
    except tf.errors.NotFoundError:
        return f"shard {shard.path} is missing: prepare the data again"
    except tf.errors.OpError as error:
        reason = first_line(error)
        if encoded is not None:
            reason = f"its image is {why_unreadable(encoded.numpy())}"
            fix = "leave it out with `skipped`, or mend or remove the image and prepare the data again"
        return f"record {read} of {shard.path}, at byte {offset},{name} cannot be used ({reason}): {fix}"
    return (
        f"{shard.path} has {read} records, {shard.examples} are expected: prepare the data again into an empty folder"
    )


def _image_name(serialized):
    """The file's name that a record holds, as a part of a sentence; "" if it holds none."""
    try:
        features = tf.train.Example.FromString(serialized).features.feature
    except DecodeError:
        return ""
    names = [value for feature in _NAME_FEATURES for value in features[feature].bytes_list.value]
    return f" image {names[0].decode('utf-8', 'backslashreplace')}," if names else ""


def without_autotune(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """The dataset with only the threads that it sets itself, and its elements in order."""
    options = tf.data.Options()
    # Autotune's thread blocks for seconds when an iterator is destroyed, and its parallelism drifts; ours is explicit.
    options.autotune.enabled = False
    options.deterministic = True
    options.threading.max_intra_op_parallelism = (
        1  # several images are processed at once, not several operations on one
    )
    # The strategy splits the batches of this pipeline among workers; it must not read the files again for each.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return dataset.with_options(options)
