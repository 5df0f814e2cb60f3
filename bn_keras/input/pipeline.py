"""TFRecord shards to mini-batches: a training order that can start at any step, and exact once-through evaluation.

Nothing of a running pipeline is ever saved. The order of examples is a function of (seed, epoch), an example's crop
and distortion of (seed, epoch, example); so a resumed run builds the pipeline anew at the step it wants.

The shards of an epoch, in an order drawn for it, are cut into `LANES` lanes with equally many examples. Example `p` of
the epoch is the next of lane `p mod LANES`, so that every mini-batch mixes as many shards. A lane is read shard by
shard and, with shuffling "within_shard", each shard's examples are permuted. Starting at a step passes over whole
shards unread and re-reads at most one in each lane. A host owns every `hosts`-th example, which are whole lanes: it
reads only the shards of its own lanes, and all hosts together see the batches that one alone would.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import shutil

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError

from bn_keras.errors import InputError, first_line
from bn_keras.input import preprocessing
from bn_keras.input.bad_records import SkippedRecords
from bn_keras.input.dataset import RECORD_FRAME, Dataset
from bn_keras.input.image_header import why_unreadable

LANES = 8
"""Shards that are read at a time. The batches are the same for any count of hosts that divides it."""

PARALLEL_CALLS = os.cpu_count() or 1

PADDING_LABEL = -1
"""Of the rows that fill up the last evaluation batches; they count nowhere."""

_PLANNED = 32  # examples that are parsed, and whose crops and colors are drawn, at once

_NAME_FEATURES = "image/filename", "file_name", "filename"  # of TF-Slim and us; of TFDS

_ORDER, _PERMUTATION, _DISTORTION = range(3)  # what a seed is for, so that no two draws share one


def training_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    hosts: int = 1,
    host: int = 0,
    data_service: str | None = None,
    skipped: SkippedRecords | None = None,
    **options,
) -> tf.data.Dataset:
    """`local_training_batches`, prepared by other machines if `data_service` says so; the batches are the same.

    Args:
      data_service: addresses of `launch/data_service`, separated by commas. Each prepares an equal part of this host's
        share of every batch, as a host of its own would.
      skipped: takes note of every example that cannot be used, and whose place in the batch another one of it gets.
        Where a record's framing is damaged, the rest of its shard cannot be used either. None: they are errors.

    Raises:
      InputError: hosts times services do not divide `batch_size`.
    """
    options |= {"batch_size": batch_size, "skip_bad": skipped is not None}
    if data_service:
        batches = _served_batches(dataset, data_service.split(","), hosts=hosts, host=host, **options)
    else:
        batches = local_training_batches(dataset, hosts=hosts, host=host, **options)
    return batches if skipped is None else _note(batches, skipped, dataset, "train")


def _served_batches(dataset, addresses, *, batch_size, hosts, host, **options):
    parts = [
        local_training_batches(
            dataset, batch_size=batch_size, hosts=hosts * len(addresses), host=host + hosts * k, **options
        ).apply(
            tf.data.experimental.service.distribute(
                processing_mode=tf.data.experimental.service.ShardingPolicy.OFF, service=f"grpc://{address}"
            )
        )
        for k, address in enumerate(addresses)
    ]

    def join(*parts):
        def turns(*rows):  # the example of each part in turn
            together = tf.stack(rows, 1)
            return tf.reshape(together, (-1, *together.shape[2:]))

        joined = tf.nest.map_structure(turns, *parts)
        return tf.nest.map_structure(lambda part: tf.ensure_shape(part, (batch_size // hosts, *part.shape[1:])), joined)

    return _with_options(tf.data.Dataset.zip(tuple(parts)).map(join).prefetch(2))


def local_training_batches(
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
    distort_on: str = "host",
    interpolation: str = "bilinear",
    skip_bad: bool = False,
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
      distort_on: "host", or "device", which leaves the photometric distortion to `preprocessing.PhotometricDistortion`
        in the model; without effect unless augmentation is "imagenet".
      interpolation: of the crop, one of `preprocessing.INTERPOLATIONS`.
      skip_bad: whether an example that cannot be used gives its place to another of its batch.

    Returns:
      A dataset of (images float32 `[batch_size / hosts, image_size, image_size, channels]` in [-1, 1],
      labels int32 `[batch_size / hosts]` in [0, classes)); with `distort_on="device"`, in place of the images
      (images uint8, draws float32 `[batch_size / hosts, preprocessing.DRAWS]`); with `skip_bad`, third, int64
      `[batch_size / hosts, 2]`: shard and record of what cannot be used, of other rows -1.

    Raises:
      InputError: `hosts` does not divide `batch_size`.
    """
    share = _share(batch_size, hosts)

    size = {"image_size": image_size, "channels": dataset.channels}

    def plan(serialized, draws, *_):
        """What can be computed for many examples at once; of one alone too."""
        encoded, label = _parse(serialized, dataset)
        if augmentation != "imagenet":
            return encoded, label, draws
        return encoded, label, draws, preprocessing.random_crop(draws)

    def prepare(encoded, label, draws, crop=None):
        if augmentation == "none":
            return preprocessing.to_network_range(preprocessing.whole_image(encoded, **size)), label
        if augmentation == "shift":
            return preprocessing.to_network_range(preprocessing.shifted_image(encoded, draws, **size)), label
        image = preprocessing.training_crop(encoded, crop, **size, interpolation=interpolation)
        return (image, draws), label

    # By XLA, one pass over the pixels: 100 us an image of 224 x 224, where TensorFlow's operations take 380.
    @tf.function(jit_compile=True)
    def distortion(images, draws):
        return preprocessing.random_distortion(images, draws, photometric_distortion)

    def distort(inputs, *others):
        return distortion(*inputs), *others

    records = training_records(dataset, seed, start_step * batch_size, hosts, host, shuffling, skip_bad)
    if skip_bad:
        records = records.map(lambda serialized, draws, shard, record, _: ((serialized, draws), (shard, record)))
        examples = _blank_bad(records, lambda *example: prepare(*plan(*example)))
        examples = examples.batch(share, drop_remainder=True).map(_fill_gaps)
    else:
        planned = records.batch(_PLANNED).map(plan, PARALLEL_CALLS).unbatch()
        # Twice, as a call that is done keeps its place until those before it are: two cores were 92% busy with two.
        examples = planned.map(prepare, 2 * PARALLEL_CALLS).batch(share, drop_remainder=True)
    if augmentation == "imagenet" and distort_on == "host":
        examples = examples.map(distort, 2)  # 10,000 images/s a call
    return _with_options(examples.prefetch(2))


def training_records(
    dataset: Dataset,
    seed: int,
    start: int,
    hosts: int = 1,
    host: int = 0,
    shuffling: str = "within_shard",
    skip_bad: bool = False,
) -> tf.data.Dataset:
    """The endless training order without any decoding.

    Args:
      dataset, seed, hosts, host, shuffling: as for `training_batches`.
      start: examples of all hosts together that come before the first one, a multiple of `hosts`.
      skip_bad: whether a record that cannot be read is an empty one.

    Returns:
      A dataset of (serialized example, float32 `[preprocessing.DRAWS]` in [0, 1), int64 number of the shard,
      int64 number of the record in it, int64 epoch).
    """
    paths, counts = _shard_table(dataset, "train")
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
        return pieces.flat_map(lambda *piece: read_piece(epoch, *piece)).prefetch(int(counts.max()))

    def read_piece(epoch, shard, skip, size, drop):
        # Drawn for all of the shard, so that an example's are the same whatever piece of it is read.
        draws = preprocessing.uniform_draws(_seed(seed, _DISTORTION, epoch, shard), tf.gather(counts, shard))
        record = tf.range(skip, skip + size)
        places = (draws[skip : skip + size], tf.fill([size], shard), record, tf.fill([size], epoch))
        records = _read_shard(tf.gather(paths, shard), skip_bad).skip(skip).take(size)
        records = tf.data.Dataset.zip(records, *map(tf.data.Dataset.from_tensor_slices, places))
        records = records.apply(tf.data.experimental.assert_cardinality(size))
        if shuffling == "within_shard":
            records = _permute(records, size, _seed(seed, _PERMUTATION, epoch, shard))
        return records.skip(drop)

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
    skipped: SkippedRecords | None = None,
) -> tf.data.Dataset:
    """Every validation example exactly once, in order; the last batches are filled up with `PADDING_LABEL` rows.

    Args:
      dataset: of `read_dataset`.
      batch_size: examples of all replicas of all hosts together; a multiple of `hosts`.
      image_size: height and width in pixels of what comes out.
      hosts: machines that share the examples; all get equally many batches.
      host: which of them this is; the examples of host 0 come first.
      augmentation: what training uses, which says what is evaluated: `preprocessing.evaluated_view`.
      view: called with an image's bytes in place of that; returns one tensor or several, float32 of known shapes in
        [0, 255].
      skipped: takes note of every example that cannot be used, whose row becomes padding. None: they are errors.

    Returns:
      A dataset of (images float32 `[batch_size / hosts, image_size, image_size, channels]` in [-1, 1], or what `view`
      returns, in [-1, 1] and batched; labels int32 `[batch_size / hosts]` in [0, classes), or `PADDING_LABEL`).

    Raises:
      InputError: `hosts` does not divide `batch_size`.
    """
    share = _share(batch_size, hosts)
    paths, counts = _shard_table(dataset, "validation")
    total = int(counts.sum())
    if view is None:
        view = preprocessing.evaluated_view(augmentation)
        view = functools.partial(view, image_size=image_size, channels=dataset.channels)

    def prepare(serialized):
        encoded, label = _parse(serialized, dataset)
        return tf.nest.map_structure(preprocessing.to_network_range, view(encoded)), label

    def read_piece(shard, skip, size):
        records = _read_shard(tf.gather(paths, shard), skipped is not None).skip(skip).take(size)
        if skipped is None:
            return records
        places = tf.data.Dataset.range(skip, skip + size).map(lambda record: (shard, record))
        return tf.data.Dataset.zip(((records,), places))

    begin, length = _part(total, hosts, host)
    pieces = tf.data.Dataset.from_tensor_slices(_cut(tf.range(len(paths), dtype=tf.int64), counts, begin, length))
    records = pieces.flat_map(read_piece)
    examples = records.map(prepare, PARALLEL_CALLS) if skipped is None else _blank_bad(records, prepare)
    batches = -(-total // batch_size)
    padding = tf.data.Dataset.from_tensors(_blanks(examples.element_spec)).repeat(batches * share - length)
    examples = _with_options(examples.concatenate(padding).batch(share, drop_remainder=True).prefetch(2))
    return examples if skipped is None else _note(examples, skipped, dataset, "validation")


def cache_shards(dataset: Dataset, cache: str) -> Dataset:
    """Copies every shard to a local folder, or into memory, and returns the data set that reads them there.

    A copy that is there in its full size is not made again.

    Args:
      cache: a folder, or "memory", which is one in /dev/shm.

    Raises:
      InputError: there is not so much room.
    """
    folder = "/dev/shm/bn_keras" if cache == "memory" else cache
    folder = os.path.join(folder, dataset.fingerprint[:16])
    os.makedirs(folder, exist_ok=True)
    copies = {
        shard: dataclasses.replace(shard, path=os.path.join(folder, os.path.basename(shard.path)))
        for shards in dataset.splits.values()
        for shard in shards
    }
    missing = {
        shard: copy
        for shard, copy in copies.items()
        if not os.path.exists(copy.path) or os.path.getsize(copy.path) != copy.bytes
    }
    needed, free = sum(shard.bytes for shard in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"`cache={cache}` needs {needed:,} bytes, {folder} has {free:,} free: give another folder")

    def copy_one(shard):
        temporary = f"{missing[shard].path}.{os.getpid()}"
        shutil.copyfile(shard.path, temporary)
        os.replace(temporary, missing[shard].path)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(copy_one, missing))
    splits = {split: tuple(copies[shard] for shard in shards) for split, shards in dataset.splits.items()}
    return dataclasses.replace(dataset, splits=splits)


def memory_bound(dataset: Dataset, hosts: int = 1) -> int:
    """Bytes of records that one host's training pipeline holds at most, besides the batches that it has ready.

    Every lane holds as many records as the largest shard has, and the shard that these are being read from.
    """
    lanes = hosts if LANES % hosts else LANES
    return 2 * lanes // hosts * max(shard.bytes for shard in dataset.splits["train"])


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
    """Path and record count of every shard of a split."""
    shards = dataset.splits[split]
    counts = np.array([shard.examples for shard in shards], np.int64)
    return np.array([shard.path for shard in shards]), counts


def _permute(dataset, size, seed):
    """All `size` elements in an order that is a function of an int32 `[2]` seed.

    Moved, where gathering the strings of a shard would copy them: 7% of the time of an ImageNet image.
    """
    seed = tf.cast(seed, tf.int64) | 1  # twice 0 would be a random seed
    permuted = tf.raw_ops.ShuffleDataset(  # Dataset.shuffle's order depends on the global seed too
        input_dataset=tf.data.experimental.to_variant(dataset),
        buffer_size=size,
        seed=seed[0],
        seed2=seed[1],
        output_types=[part.dtype for part in dataset.element_spec],
        output_shapes=[part.shape for part in dataset.element_spec],
        reshuffle_each_iteration=False,
    )
    return tf.data.experimental.from_variant(permuted, dataset.element_spec)


def _read_shard(path, skip_bad):
    records = tf.data.TFRecordDataset(path)
    if skip_bad:  # what cannot be read becomes empty records, which no image can be made of
        records = records.ignore_errors().concatenate(tf.data.Dataset.from_tensors("").repeat())
    return records


def _blank_bad(records, prepare):
    """Every record prepared to (inputs, label, place), where one that cannot be is blank and has its place, not -1.

    Args:
      records: dataset of (arguments of `prepare`, (int64 number of the shard, int64 number of the record in it)).
    """

    def attempt(arguments, place):
        prepared = tf.data.Dataset.from_tensors(arguments).map(prepare).map(lambda *example: (*example, nowhere))

        def blank(_):
            return *_blanks(prepared.element_spec)[:2], tf.stack(place)

        return prepared.ignore_errors().concatenate(tf.data.Dataset.range(1).map(blank)).take(1)

    nowhere = tf.fill([2], tf.constant(-1, tf.int64))
    return records.interleave(attempt, PARALLEL_CALLS, num_parallel_calls=PARALLEL_CALLS, deterministic=True)


def _blanks(element_spec):
    """Black inputs, `PADDING_LABEL` and, where there is a place, -1: what fills a row that holds no example."""
    inputs, *others = element_spec
    black = tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), inputs)
    return black, *(tf.fill(spec.shape, tf.constant(PADDING_LABEL, spec.dtype)) for spec in others)


def _note(batches, skipped, dataset, split):
    """Batches without the places of what was left out of them, which `skipped` takes note of."""

    def add(places):
        for shard, record in places:
            skipped.add(dataset.splits[split][shard].path, int(record))

    def note(inputs, labels, places):
        bad = tf.boolean_mask(places, places[:, 0] >= 0)
        noted = tf.cond(tf.size(bad) > 0, lambda: tf.numpy_function(add, [bad], []), tf.no_op)
        with tf.control_dependencies([noted]):
            return inputs, tf.identity(labels)

    return _with_options(batches.map(note))


def _fill_gaps(inputs, labels, places):
    """Puts the batch's good rows, over and over, in place of those labelled `PADDING_LABEL`."""
    good = tf.where(labels != PADDING_LABEL)[:, 0]
    tf.debugging.assert_positive(tf.size(good), "no example of a batch can be used")
    row = tf.range(tf.size(labels, tf.int64), dtype=tf.int64)
    row = tf.where(labels != PADDING_LABEL, row, tf.gather(good, row % tf.size(good, tf.int64)))
    filled = tf.nest.map_structure(lambda part: tf.ensure_shape(tf.gather(part, row), part.shape), (inputs, labels))
    return *filled, places


def _epoch_order(shards, seed, epoch):
    return tf.random.experimental.stateless_shuffle(tf.range(shards, dtype=tf.int64), _seed(seed, _ORDER, epoch))


def _seed(seed, *parts):
    """An int32 `[2]` seed that is a function of all its parts."""
    key = tf.constant([seed, 0], tf.int32)
    for part in parts:
        key = tf.random.fold_in(key, part)
    return key


def _parse(serialized, dataset):
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
        tf.bitcast(label, tf.uint64),  # negative labels become large
        tf.constant(classes, tf.uint64),
        f"a label is outside {dataset.label_base}..{dataset.label_base + classes - 1}",
    )
    return features[dataset.image_feature], tf.cast(label, tf.int32)


def _with_options(dataset):
    options = tf.data.Options()
    # Autotune's thread blocks for seconds when an iterator is destroyed, and its parallelism drifts; ours is explicit.
    options.autotune.enabled = False
    options.deterministic = True
    options.threading.max_intra_op_parallelism = 1  # images are parallel, not the operations on one
    # Distribution splits the batches of this one pipeline; nothing is to be re-read per worker.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return dataset.with_options(options)


@contextlib.contextmanager
def naming_damage(dataset: Dataset, split: str):
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
    paths, counts = _shard_table(dataset, split)

    def read(shard, count):
        places = tf.data.Dataset.range(count).map(lambda record: (shard, record))
        return tf.data.Dataset.zip(((_read_shard(tf.gather(paths, shard), True).take(count),), places))

    def use(serialized):
        encoded, label = _parse(serialized, dataset)
        return preprocessing.decode(encoded, dataset.channels)[0, 0, 0], label

    records = tf.data.Dataset.from_tensor_slices((tf.range(len(paths), dtype=tf.int64), counts)).flat_map(read)
    bad = _blank_bad(records, use).filter(lambda pixel, label, place: place[0] >= 0)
    for *_, (shard, record) in _with_options(bad).take(1):
        return _describe_damage(dataset, dataset.splits[split][shard], int(record))
    return None


def _describe_damage(dataset, shard, bad):
    """What is wrong with the record of number `bad` of a shard."""
    offset, read, name, encoded = 0, 0, "", None
    fix = "prepare the data again into an empty folder, or leave it out with `skipped`"
    try:
        for serialized in tf.data.TFRecordDataset(shard.path):
            if read == bad:
                name = _image_name(serialized.numpy())
                encoded, _ = _parse(serialized, dataset)
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
    """The file's name in a record, where it has one, to stand in a sentence."""
    try:
        features = tf.train.Example.FromString(serialized).features.feature
    except DecodeError:
        return ""
    names = [value for feature in _NAME_FEATURES for value in features[feature].bytes_list.value]
    return f" image {names[0].decode('utf-8', 'backslashreplace')}," if names else ""
