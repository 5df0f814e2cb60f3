"""The training order, a function of (seed, epoch), which can start at any step and be shared by any number of hosts.

The shards of an epoch, in an order drawn for it, are cut into `LANES` lanes with the same number of examples. Example
`p` of the epoch is the next one of lane `p mod LANES`, so that every mini-batch mixes as many shards. A lane is read
shard by shard; with shuffling "within_shard" each shard's examples are permuted. A start at any step passes over whole
shards unread, and reads at most one shard of each lane from its beginning. A host owns every `hosts`-th example, which
is a number of whole lanes: it reads only their shards, and all hosts together see the batches that one alone would see.
"""

import numpy as np
import tensorflow as tf

from bn_keras.input import preprocessing
from bn_keras.input.dataset import Dataset
from bn_keras.input.records import read_shard, shard_table

LANES = 8
"""Shards that are read at a time. The batches are the same for any number of hosts that divides this."""

_ORDER, _PERMUTATION, _DISTORTION = range(3)  # purposes of seeds, so that no two draws share one


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
      start: how many examples of all hosts together come before the first one, a multiple of `hosts`.
      skip_bad: whether an empty record takes the place of one that cannot be read.

    Returns:
      A dataset of (serialized example, float32 `[preprocessing.DRAWS]` in [0, 1), int64 number of the shard,
      int64 number of the record in it, int64 epoch).
    """
    paths, counts = shard_table(dataset, "train")
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
        begin, length = part_of(total, lanes, lane)
        shards, skips, sizes = pieces_of(order, counts, begin, length)
        drops = tf.clip_by_value(passed - tf.cumsum(sizes, exclusive=True), 0, sizes)
        first = tf.reduce_sum(tf.cast(drops == sizes, tf.int64))
        pieces = tf.data.Dataset.from_tensor_slices((shards, skips, sizes, drops)).skip(first)
        return pieces.flat_map(lambda *piece: read_piece(epoch, *piece)).prefetch(int(counts.max()))

    def read_piece(epoch, shard, skip, size, drop):
        # Drawn for the whole shard, so that an example's draws do not depend on the piece that is read.
        draws = preprocessing.uniform_draws(_seed(seed, _DISTORTION, epoch, shard), tf.gather(counts, shard))
        record = tf.range(skip, skip + size)
        places = (draws[skip : skip + size], tf.fill([size], shard), record, tf.fill([size], epoch))
        records = read_shard(tf.gather(paths, shard), skip_bad).skip(skip).take(size)
        records = tf.data.Dataset.zip(records, *map(tf.data.Dataset.from_tensor_slices, places))
        records = records.apply(tf.data.experimental.assert_cardinality(size))
        if shuffling == "within_shard":
            records = _permute(records, size, _seed(seed, _PERMUTATION, epoch, shard))
        return records.skip(drop)

    return tf.data.Dataset.range(first_epoch, np.iinfo(np.int64).max).flat_map(read_epoch)


def memory_bound(dataset: Dataset, hosts: int = 1) -> int:
    """Most bytes of records that one host's training pipeline holds, besides the batches that are ready.

    Each lane may hold all records of the largest shard, and the shard that is being read.
    """
    lanes = hosts if LANES % hosts else LANES
    return 2 * lanes // hosts * max(shard.bytes for shard in dataset.splits["train"])


def part_of(total: int, parts: int, part: int | tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The begin and length of one of `parts` parts of `total` examples; lengths differ by at most 1."""
    part = tf.cast(part, tf.int64)
    whole, rest = divmod(total, parts)
    return part * whole + tf.minimum(part, rest), (total - part + parts - 1) // parts


def pieces_of(order: tf.Tensor, counts: np.ndarray, begin: tf.Tensor, length: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """The pieces of shards that hold the examples `begin` to `begin + length`, counted over the shards in their order.

    Returns:
      int64 `[pieces]` each: shard, records to skip in it, records to take from it.
    """
    ends = tf.cumsum(tf.gather(counts, order))
    starts = ends - tf.gather(counts, order)
    heads, tails = tf.maximum(starts, begin), tf.minimum(ends, begin + length)
    used = heads < tails
    return tuple(tf.boolean_mask(values, used) for values in (order, heads - starts, tails - heads))


def _permute(dataset, size, seed):
    """All `size` elements, in an order that depends only on an int32 `[2]` seed.

    The strings are moved. `tf.gather` would copy them, which takes 7% of the time of an ImageNet image.
    """
    seed = tf.cast(seed, tf.int64) | 1  # TensorFlow takes a seed of two zeros as none
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


def _epoch_order(shards, seed, epoch):
    return tf.random.experimental.stateless_shuffle(tf.range(shards, dtype=tf.int64), _seed(seed, _ORDER, epoch))


def _seed(seed, *parts):
    """An int32 `[2]` seed that depends on all parts."""
    key = tf.constant([seed, 0], tf.int32)
    for part in parts:
        key = tf.random.fold_in(key, part)
    return key
