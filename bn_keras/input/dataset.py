"""A prepared data set as its manifest `dataset.json` describes it; standard library only.

`data_prep` writes the manifest beside the TFRecord shards; its fields are listed in BUILD.md.
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import os

from bn_keras.errors import InputError
from bn_keras.json_files import COUNT, FILE_NAME, list_of, map_of, object_of, parse_json, read_bytes
from bn_keras.storage import file_size

MANIFEST = "dataset.json"
FORMAT = "bn_keras.dataset"
VERSION = 1
RECORD_FRAME = 16
"""Bytes that a TFRecord file adds to each record: its length and two checksums."""

_SHARD_SCHEMA = object_of(file=FILE_NAME, examples=COUNT, bytes=COUNT)
_SCHEMA = object_of(
    format={"const": FORMAT},
    version={"const": VERSION},
    name={"type": "string"},
    class_names=list_of({"type": "string"}, minItems=2),
    label_base={"type": "integer", "enum": [0, 1]},
    channels={"type": "integer", "enum": [1, 3]},
    short_side=object_of(median=COUNT),
    splits=map_of(object_of(shards=list_of(_SHARD_SCHEMA)), required=["train", "validation"]),
)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One TFRecord file: its path, how many records it holds, and its size in bytes."""

    path: str
    examples: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What training and evaluation need to know of a data set before they read a record.

    Attributes:
      name: a short name, for logs.
      class_names: the name of each class, by index.
      label_base: what a record's label adds to the class index: 1 if label 0 means background, else 0.
      channels: 1 if every image is gray, else 3.
      median_short_side: the median of the images' shorter sides, in pixels.
      splits: the shards of "train" and "validation".
      image_feature, label_feature: the names of image and label in a record.
      fingerprint: SHA-256 of the manifest, hexadecimal; equal data sets have equal fingerprints.
    """

    name: str
    class_names: tuple[str, ...]
    label_base: int
    channels: int
    median_short_side: int
    splits: dict[str, tuple[Shard, ...]]
    fingerprint: str
    image_feature: str = "image/encoded"
    label_feature: str = "image/class/label"

    def examples(self, split: str) -> int:
        return sum(shard.examples for shard in self.splits[split])


def read_manifest(data_dir: str) -> Dataset:
    """Reads the manifest in `data_dir`, and checks that every shard is there and has its recorded size.

    Raises:
      InputError: the manifest or a shard is missing or damaged.
    """
    path = os.path.join(data_dir, MANIFEST)
    again = "prepare the data again into an empty folder"
    content = read_bytes(path, again)
    manifest = parse_json(content, path, _SCHEMA, again)
    dataset = Dataset(
        name=_text(manifest["name"]),
        class_names=tuple(map(_text, manifest["class_names"])),
        label_base=manifest["label_base"],
        channels=manifest["channels"],
        median_short_side=manifest["short_side"]["median"],
        splits={
            split: tuple(Shard(os.path.join(data_dir, s["file"]), s["examples"], s["bytes"]) for s in part["shards"])
            for split, part in manifest["splits"].items()
        },
        fingerprint=hashlib.sha256(content).hexdigest(),
    )
    check_shards(dataset.splits, path)
    return dataset


def _text(name):
    """A name in UTF-8: what has none, such as a folder's name in Latin-1, is written as an escape sequence."""
    return name.encode("utf-8", "backslashreplace").decode()


def check_shards(splits: dict[str, tuple[Shard, ...]], origin: str) -> None:
    """Checks the shards of a data set against their files.

    Args:
      splits: as in `Dataset`.
      origin: the file or folder that lists them, for messages.

    Raises:
      InputError: a shard is missing, is no regular file, has another size, is too small for its examples, or is listed
        twice; or there are no training or no validation examples.
    """
    seen, shards = set(), [*itertools.chain(*splits.values())]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:  # a bucket takes 50 ms to answer
        sizes = pool.map(file_size, [shard.path for shard in shards])
    for shard, found in zip(shards, sizes, strict=True):
        if shard.path in seen:
            state = f"is listed twice by {origin}"
        elif found is None:
            state = "is missing"
        elif found != shard.bytes:
            state = f"has {found} bytes, the manifest says {shard.bytes}"
        elif found < RECORD_FRAME * shard.examples:
            state = f"has {found:,} bytes, too few for the {shard.examples:,} examples that {origin} says"
        else:
            seen.add(shard.path)
            continue
        raise InputError(f"shard {shard.path} {state}: prepare the data again into an empty folder")
    for split in ("train", "validation"):
        if not any(shard.examples for shard in splits[split]):
            raise InputError(f"{origin} lists no {split} examples: prepare the data with both splits")
