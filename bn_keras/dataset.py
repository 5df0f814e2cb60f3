"""A prepared data set as its manifest `dataset.json` describes it; standard library only.

`data_prep` writes the manifest beside the TFRecord shards; its fields are listed in BUILD.md.
"""

import dataclasses
import hashlib
import itertools
import json
import os

from bn_keras.errors import InputError
from bn_keras.skipped_records import SkippedRecords

MANIFEST = "dataset.json"
FORMAT = "bn_keras.dataset"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Shard:
    """One TFRecord file: its path, how many records it holds, and its size in bytes."""

    path: str
    examples: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What training and evaluation need to know before they read a record.

    Attributes:
      name: short name, for logs.
      class_names: text per class index; `len(class_names)` is the number of classes.
      label_base: what the records add to the class index: 1 where 0 is background, else 0.
      channels: 1 where every image is gray, else 3.
      median_short_side: of the images, in pixels.
      splits: "train" and "validation", each a tuple of shards.
      image_feature, label_feature: their names in a record.
      skipped, data_service: how this process reads it, as in `input_pipeline.training_batches`.
      fingerprint: sha256 of the manifest, hexadecimal; equal data sets have equal fingerprints.
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
    skipped: SkippedRecords | None = None
    data_service: str | None = None

    def examples(self, split: str) -> int:
        return sum(shard.examples for shard in self.splits[split])


def read_dataset(data_dir: str, label_base: int | None = None, classes: int | None = None) -> Dataset:
    """Reads the manifest in `data_dir` and checks that every shard is there in its recorded size.

    A folder of TensorFlow Datasets and one of TF-Slim's shards are read too.

    Args:
      label_base, classes: as in `foreign_dataset.read_tf_slim`; only for a folder without any metadata.

    Raises:
      InputError: the folder, its manifest or a shard is missing or not what it should be.
    """
    path = os.path.join(data_dir, MANIFEST)
    if not os.path.isdir(data_dir):
        raise InputError(f"no folder {data_dir}: make it with `python -m data_prep --output_dir={data_dir} ...`")
    if not os.path.exists(path):
        from bn_keras import foreign_dataset

        unfinished = os.path.isdir(os.path.join(data_dir, ".data_prep"))  # a conversion of ours
        if not unfinished and foreign_dataset.is_tfds(data_dir):
            return foreign_dataset.read_tfds(data_dir)
        if not unfinished and foreign_dataset.is_tf_slim(data_dir):
            return foreign_dataset.read_tf_slim(data_dir, label_base, classes)
    try:
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        raise InputError(
            f"{data_dir} has no {MANIFEST}: prepare it, or finish preparing it, "
            f"with `python -m data_prep --output_dir={data_dir} ...`"
        ) from None
    try:
        manifest = json.loads(content)
        if (found := (manifest["format"], manifest["version"])) != (FORMAT, VERSION):
            raise InputError(f"{path} is of format {found[0]} {found[1]}, this program reads {FORMAT} {VERSION}")
        dataset = Dataset(
            name=manifest["name"],
            class_names=tuple(manifest["class_names"]),
            label_base=manifest["label_base"],
            channels=manifest["channels"],
            median_short_side=manifest["short_side"]["median"],
            splits={
                split: tuple(
                    Shard(os.path.join(data_dir, s["file"]), s["examples"], s["bytes"]) for s in part["shards"]
                )
                for split, part in manifest["splits"].items()
            },
            fingerprint=hashlib.sha256(content).hexdigest(),
        )
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a manifest of data_prep ({error!r}): prepare the data again") from None
    for shard in itertools.chain(*dataset.splits.values()):
        found = os.path.getsize(shard.path) if os.path.exists(shard.path) else None
        if found != shard.bytes:
            state = "is missing" if found is None else f"has {found} bytes, the manifest says {shard.bytes}"
            raise InputError(f"shard {shard.path} {state}: prepare the data again into an empty folder")
    for split in ("train", "validation"):
        if split not in dataset.splits or not dataset.examples(split):
            raise InputError(f"{path} lists no {split} examples: prepare the data with both splits")
    return dataset
