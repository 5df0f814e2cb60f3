"""Copies shards to a local folder or into memory, where training reads them."""

import concurrent.futures
import dataclasses
import os
import shutil
import tempfile

from bn_keras import storage
from bn_keras.errors import InputError
from bn_keras.input.dataset import Dataset


def on_this_machine(dataset: Dataset, cache: str | None = None) -> Dataset:
    """The data set, with copies of its shards if a cache is given or if the records lie in a bucket.

    Args:
      dataset: the data set.
      cache: as in `cache_shards`. Records of a bucket are copied also without one: to `bn_keras` in the system's folder
        for temporary files.
    """
    if not cache and not any(storage.is_remote(shard.path) for shard in dataset.splits["train"]):
        return dataset
    return cache_shards(dataset, cache or os.path.join(tempfile.gettempdir(), "bn_keras"))


def cache_shards(dataset: Dataset, cache: str) -> Dataset:
    """Copies every shard to a local folder, or into memory, and returns the data set of the copies.

    A copy that exists in its full size is not made again.

    Args:
      dataset: the data set to copy.
      cache: a folder, or "memory" for one in /dev/shm.

    Raises:
      InputError: there is not enough room.
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
        storage.fetch(shard.path, temporary)
        os.replace(temporary, missing[shard].path)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(copy_one, missing))
    splits = {split: tuple(copies[shard] for shard in shards) for split, shards in dataset.splits.items()}
    return dataclasses.replace(dataset, splits=splits)
