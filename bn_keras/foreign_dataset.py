"""Data sets that others prepared: TF-Slim's shards and the folders of TensorFlow Datasets, as a `Dataset`.

Neither says all that training needs. What TF-Slim's shards do not say, the caller must; the sizes of the images are
sampled from their records.
"""

import glob
import hashlib
import json
import os
import re
import statistics
import struct

from bn_keras.dataset import Dataset, Shard
from bn_keras.errors import InputError

TFDS_INFO, TFDS_FEATURES = "dataset_info.json", "features.json"
SAMPLED_RECORDS = 64
_SHARD_NAME = re.compile(r"(train|validation)-(\d+)-of-(\d+)$")


def is_tfds(data_dir: str) -> bool:
    return all(os.path.exists(os.path.join(data_dir, name)) for name in (TFDS_INFO, TFDS_FEATURES))


def is_tf_slim(data_dir: str) -> bool:
    return any(_SHARD_NAME.search(name) for name in os.listdir(data_dir))


def read_tfds(data_dir: str) -> Dataset:
    """The folder of one version of a TFDS image classification set, for example `imagenet2012/5.1.0`.

    Raises:
      InputError: it has no image or label, or no training or validation split, or a shard is missing.
    """
    try:
        info, features = (_read_json(data_dir, name) for name in (TFDS_INFO, TFDS_FEATURES))
        found = features["featuresDict"]["features"]
        image, label = (_feature_named(data_dir, found, kind) for kind in ("Image", "ClassLabel"))
        splits = {split["name"]: split for split in info["splits"]}
        test = "validation" if "validation" in splits else "test"
        classes = int(found[label]["classLabel"]["numClasses"])
        names = os.path.join(data_dir, f"{label.replace('/', '.')}.labels.txt")
        if os.path.exists(names):
            with open(names, encoding="utf-8") as file:
                class_names = tuple(file.read().splitlines())
        else:
            class_names = tuple(map(str, range(classes)))
        read = {
            ours: _tfds_shards(data_dir, info, splits[theirs])
            for ours, theirs in (("train", "train"), ("validation", test))
        }
        return _dataset(info["name"], class_names, 0, read, image, label)
    except (KeyError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{data_dir} is not a TFDS image classification set with training and validation splits ({error!r})"
        ) from None


def read_tf_slim(data_dir: str, label_base: int | None, classes: int | None) -> Dataset:
    """Shards `train-00000-of-01024` and `validation-00000-of-00128` in TF-Slim's schema, without a manifest.

    Args:
      label_base: the label of the first class: 1 where 0 is background, as in TF-Slim's ImageNet, else 0.
      classes: how many there are.

    Raises:
      InputError: one of those is not given, a shard is missing, or a file is not made of records.
    """
    if label_base is None or classes is None:
        raise InputError(
            f"{data_dir} has shards but no manifest, and they do not say their labels: give --label_base (1 where 0 "
            "is background, as in TF-Slim's ImageNet, else 0) and --classes"
        )
    splits = {}
    for split in ("train", "validation"):
        paths = sorted(glob.glob(os.path.join(glob.escape(data_dir), f"{split}-*-of-*")))
        found = [match for path in paths if (match := _SHARD_NAME.search(path))]
        if not found:
            raise InputError(f"{data_dir} has no shards {split}-00000-of-..., so no {split} examples")
        count = int(found[0][3])
        missing = set(range(count)) - {int(match[2]) for match in found}
        if missing:
            name = f"{split}-{min(missing):05}-of-{count:05}"
            raise InputError(f"shard {os.path.join(data_dir, name)} is missing: copy it again")
        splits[split] = tuple(Shard(m.string, count_records(m.string), os.path.getsize(m.string)) for m in found)
    name = os.path.basename(os.path.abspath(data_dir))
    return _dataset(name, tuple(map(str, range(classes))), label_base, splits, "image/encoded", "image/class/label")


def count_records(path: str) -> int:
    """Counts the records of a TFRecord file by their lengths, without reading them.

    Raises:
      InputError: it ends inside a record.
    """
    size, offset, count = os.path.getsize(path), 0, 0
    with open(path, "rb", buffering=0) as file:
        while offset + 12 <= size:
            (length,) = struct.unpack("<Q", os.pread(file.fileno(), 8, offset))
            offset += 16 + length
            count += 1
    if offset != size:
        raise InputError(f"{path} ends inside record {max(count - 1, 0)}: it is cut off, or no TFRecord file")
    return count


def _dataset(name, class_names, label_base, splits, image_feature, label_feature):
    described = [class_names, label_base, image_feature, label_feature]
    described += [[split, os.path.basename(s.path), s.examples, s.bytes] for split in splits for s in splits[split]]
    shapes = _sample_shapes(splits["train"], image_feature)
    return Dataset(
        name=name,
        class_names=class_names,
        label_base=label_base,
        channels=1 if all(channels == 1 for *_, channels in shapes) else 3,
        median_short_side=int(statistics.median(min(height, width) for height, width, _ in shapes)),
        splits=splits,
        fingerprint=hashlib.sha256(json.dumps(described).encode()).hexdigest(),
        image_feature=image_feature,
        label_feature=label_feature,
    )


def _sample_shapes(shards, image_feature):
    """Height, width and channels of the first images of up to `SAMPLED_RECORDS` shards."""
    import tensorflow as tf

    per_shard = -(-SAMPLED_RECORDS // len(shards))
    shapes = []
    for shard in shards[:SAMPLED_RECORDS]:
        try:
            for record in tf.data.TFRecordDataset(shard.path).take(per_shard):
                spec = {image_feature: tf.io.FixedLenFeature((), tf.string)}
                encoded = tf.io.parse_single_example(record, spec)[image_feature]
                shapes.append(tuple(tf.io.decode_image(encoded, expand_animations=False).shape))
        except tf.errors.OpError as error:
            raise InputError(f"{shard.path} has no images as {image_feature} ({error.message})") from None
    return shapes


def _read_json(data_dir, name):
    with open(os.path.join(data_dir, name), encoding="utf-8") as file:
        return json.load(file)


def _feature_named(data_dir, features, kind):
    """The one feature of a kind."""
    found = [name for name, value in features.items() if value["pythonClassName"].endswith(f".{kind}")]
    if len(found) != 1:
        raise InputError(f"{data_dir} has {len(found)} features of kind {kind}, one is needed")
    return found[0]


def _tfds_shards(data_dir, info, split):
    lengths = [int(length) for length in split["shardLengths"]]
    template = split.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    shards = []
    for number, examples in enumerate(lengths):
        path = os.path.join(
            data_dir,
            template.format(
                DATASET=info["name"],
                SPLIT=split["name"],
                FILEFORMAT=info.get("fileFormat", "tfrecord"),
                SHARD_X_OF_Y=f"{number:05}-of-{len(lengths):05}",
            ),
        )
        if not os.path.exists(path):
            raise InputError(f"shard {path} is missing: prepare the data set again")
        if examples:
            shards.append(Shard(path, examples, os.path.getsize(path)))
    return tuple(shards)
