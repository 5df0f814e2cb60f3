"""Reads any prepared folder as a `Dataset`: one of `data_prep`, of TensorFlow Datasets, or of TF-Slim.

The last two do not say all that training needs. The sizes of their images are sampled from records, and the caller must
say what TF-Slim's shards do not: the labels.
"""

import glob
import hashlib
import json
import os
import re
import statistics
import struct

from bn_keras.errors import InputError
from bn_keras.input.dataset import MANIFEST, RECORD_FRAME, Dataset, Shard, check_shards, read_manifest
from bn_keras.input.image_header import read_header
from bn_keras.json_files import COUNT_TEXT, FILE_NAME, TEXT, list_of, map_of, object_of, read_bytes, read_json
from bn_keras.storage import exists, file_size, is_folder, is_remote

TFDS_INFO, TFDS_FEATURES = "dataset_info.json", "features.json"
SAMPLED_RECORDS = 64
MOST_CLASSES = 1_000_000
"""Most classes that are believed without a list of names; ImageNet-21k has 21,841."""

_SHARD_NAME = re.compile(r"(train|validation)-(\d{1,9})-of-(\d{1,9})")
_TEMPLATE_PARTS = ("DATASET", "SPLIT", "FILEFORMAT", "SHARD_INDEX", "NUM_SHARDS", "SHARD_X_OF_Y")
_TEMPLATE = {
    "type": "string",
    "pattern": rf"\A([\w.-]|\{{({'|'.join(_TEMPLATE_PARTS)})\}})*\Z",
    "description": f"a file's name with {', '.join(_TEMPLATE_PARTS)} in braces",
}
_SPLIT_SCHEMA = object_of({"shardLengths": list_of(COUNT_TEXT), "filepathTemplate": _TEMPLATE}, name=FILE_NAME)
_INFO_SCHEMA = object_of({"fileFormat": TEXT}, name=FILE_NAME, splits=list_of(_SPLIT_SCHEMA))
_FEATURE_NAME = {"pattern": "\\A[^\x00-\x1f\ud800-\udfff]+\\Z", "description": "a feature's name"}
_FEATURE_SCHEMA = object_of({"classLabel": object_of(numClasses=COUNT_TEXT)}, pythonClassName=TEXT)
_FEATURES_SCHEMA = object_of(featuresDict=object_of(features=map_of(_FEATURE_SCHEMA, propertyNames=_FEATURE_NAME)))


def read_dataset(data_dir: str, label_base: int | None = None, classes: int | None = None) -> Dataset:
    """Reads the data set of a folder, and checks that every shard is there and has its recorded size.

    Args:
      data_dir: a folder of `data_prep`, of TensorFlow Datasets, or of TF-Slim's shards. A bucket can hold one of
        `data_prep`, whose records can be read after `cache_shards`.
      label_base, classes: as in `read_tf_slim`; other folders say these themselves.

    Raises:
      InputError: the folder, its metadata or a shard is missing or damaged, or has another `label_base` or other
        `classes`. If folders below it hold data sets, the message names them.
    """
    if not is_folder(data_dir):
        raise InputError(f"no folder {data_dir}: make it with `python -m data_prep --output_dir={data_dir} ...`")
    if exists(os.path.join(data_dir, MANIFEST)):
        return _agreeing(read_manifest(data_dir), data_dir, label_base, classes)
    if is_folder(os.path.join(data_dir, ".data_prep")):
        raise InputError(f"{data_dir} has no {MANIFEST} yet: finish preparing it by the same command of data_prep")
    if is_remote(data_dir):
        raise InputError(f"{data_dir} has no {MANIFEST}: only data_prep's folders are read in a bucket; copy others")
    if os.path.exists(os.path.join(data_dir, TFDS_INFO)):
        return _agreeing(read_tfds(data_dir), data_dir, label_base, classes)
    if _named_as_tf_slims(data_dir):
        return read_tf_slim(data_dir, label_base, classes)
    found = [
        os.path.dirname(path)
        for below in ("*", "*/*", "*/*/*")
        for name in (MANIFEST, TFDS_INFO)
        for path in sorted(glob.glob(os.path.join(glob.escape(data_dir), below, name)))
    ]
    if found:
        raise InputError(f"{data_dir} is no data set but holds some: give `data_dir={' or '.join(found[:5])}`")
    raise InputError(
        f"{data_dir} has no {MANIFEST}, no {TFDS_INFO} and no shards train-00000-of-...: prepare it, or finish "
        f"preparing it, with `python -m data_prep --output_dir={data_dir} ...`"
    )


def _agreeing(dataset, data_dir, label_base, classes):
    for name, given, found in (
        ("label_base", label_base, dataset.label_base),
        ("classes", classes, len(dataset.class_names)),
    ):
        if given not in (None, found):
            raise InputError(f"`{name}={given}`: {data_dir} says itself that it is {found}; leave it out")
    return dataset


def read_tfds(data_dir: str) -> Dataset:
    """Reads the folder of one version of a TFDS image classification set, such as `imagenet2012/5.1.0`.

    Raises:
      InputError: it lacks an image, a label, or a training or validation split; a shard is missing or no TFRecord.
    """
    again = "prepare the data set again with `tfds build`"
    info_path, features_path = (os.path.join(data_dir, name) for name in (TFDS_INFO, TFDS_FEATURES))
    if not os.path.exists(features_path):
        raise InputError(f"{data_dir} has {TFDS_INFO} but no {TFDS_FEATURES}, so no features are known: {again}")
    info = read_json(info_path, _INFO_SCHEMA, again)
    features = read_json(features_path, _FEATURES_SCHEMA, again)["featuresDict"]["features"]
    if (found := info.get("fileFormat") or "tfrecord") != "tfrecord":
        raise InputError(
            f"{info_path}: the shards are {found} files, only TFRecord is read: prepare the data set again with "
            "`tfds build --file_format=tfrecord`"
        )
    image, label = (_feature_named(features_path, features, kind) for kind in ("Image", "ClassLabel"))
    splits = {split["name"]: split for split in info["splits"]}
    test = "validation" if "validation" in splits else "test"
    if missing := {"train", test} - splits.keys():
        raise InputError(f"{info_path} has the splits {', '.join(splits)}, no {missing.pop()}: {again}")
    read = {
        "train": _tfds_shards(data_dir, info, splits["train"]),
        "validation": _tfds_shards(data_dir, info, splits[test]),
    }
    check_shards(read, info_path)
    read = {split: tuple(shard for shard in shards if shard.examples) for split, shards in read.items()}
    class_names = _tfds_classes(data_dir, label, features[label], again)
    return _dataset(info["name"], class_names, 0, read, image, label, fix=again)


def read_tf_slim(data_dir: str, label_base: int | None, classes: int | None) -> Dataset:
    """Reads shards in TF-Slim's schema, `train-00000-of-01024` and `validation-00000-of-00128`, without a manifest.

    They lie in the folder, or in its folders `train` and `validation`, as tf-models' imagenet_to_gcs.py leaves them.

    Args:
      label_base: the label of the first class: 1 if 0 means background, as in TF-Slim's ImageNet, else 0.
      classes: the number of classes.

    Raises:
      InputError: one of these two is not given; a shard is missing, empty or of another conversion; or a file does not
        consist of records.
    """
    if label_base is None or classes is None:
        raise InputError(
            f"{data_dir} has shards but no manifest, and they do not say their labels: give `label_base` (1 where 0 "
            "is background, as in TF-Slim's ImageNet, else 0) and `classes`"
        )
    if not 2 <= classes <= MOST_CLASSES:
        raise InputError(f"`classes={classes}` must be from 2 to {MOST_CLASSES:,}")
    splits = {split: _tf_slim_shards(data_dir, split) for split in ("train", "validation")}
    check_shards(splits, data_dir)
    name = os.path.basename(os.path.abspath(data_dir))
    features = "image/encoded", "image/class/label"
    fix = "give the `label_base` and the `classes` of these shards"
    return _dataset(name, tuple(map(str, range(classes))), label_base, splits, *features, fix=fix)


def count_records(path: str) -> int:
    """Counts the records of a TFRecord file by jumping from one length to the next.

    Raises:
      InputError: the file is empty or not regular, ends inside a record, or has a length with a wrong checksum.
    """
    import google_crc32c  # here, so that a program that lacks it can say so

    size, offset, count = file_size(path), 0, 0
    if not size:
        raise InputError(f"{path} is empty: copy it again, or convert into fewer shards")
    with open(path, "rb", buffering=0) as file:
        while offset + 12 <= size:
            length, checksum = struct.unpack("<8sI", os.pread(file.fileno(), 12, offset))
            crc = google_crc32c.value(length)
            if checksum != ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF:  # masked as in TFRecord's definition
                raise InputError(f"{path} has no record at byte {offset:,}: it is damaged, or no TFRecord file")
            offset += RECORD_FRAME + int.from_bytes(length, "little")
            count += 1
    if offset != size:
        raise InputError(f"{path} ends inside record {max(count - 1, 0)}: it is cut off, or no TFRecord file")
    return count


def _named_as_tf_slims(data_dir):
    """Path and matched name of every shard, in the folder and in its folders `train` and `validation`."""
    folders = [data_dir, *(os.path.join(data_dir, split) for split in ("train", "validation"))]
    return [
        (os.path.join(folder, name), match)
        for folder in filter(os.path.isdir, folders)
        for name in sorted(os.listdir(folder))
        if (match := _SHARD_NAME.fullmatch(name))
    ]


def _tf_slim_shards(data_dir, split):
    found = [(int(m[3]), int(m[2]), path) for path, m in _named_as_tf_slims(data_dir) if m[1] == split]
    if not found:
        raise InputError(f"{data_dir} has no shards {split}-00000-of-..., so no {split} examples")
    found.sort()
    count, _, first = found[0]
    missing = set(range(min(count, len(found) + 1))) - {number for _, number, _ in found}
    if found[-1][0] == count and missing:
        path = os.path.join(os.path.dirname(first), f"{split}-{min(missing):05}-of-{count:05}")
        raise InputError(f"shard {path} is missing: copy it again")
    if len(found) > count:
        other = next(path for k, (of, number, path) in enumerate(found) if k == count or (of, number) != (count, k))
        raise InputError(f"{first} and {other} are of two conversions: leave the shards of one in {data_dir}")
    return tuple(Shard(path, count_records(path), file_size(path) or 0) for *_, path in found)


def _tfds_shards(data_dir, info, split):
    lengths = [int(length) for length in split.get("shardLengths", [])]
    template = split.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    shards = []
    for number, examples in enumerate(lengths):
        index, count = f"{number:05}", f"{len(lengths):05}"
        values = (info["name"], split["name"], "tfrecord", index, count, f"{index}-of-{count}")
        path = os.path.join(data_dir, template.format(**dict(zip(_TEMPLATE_PARTS, values, strict=True))))
        shards.append(Shard(path, examples, file_size(path) or 0))
    return tuple(shards)


def _tfds_classes(data_dir, label, feature, fix):
    """The classes' names by label, from a file with one on each line; numbers if there is no such file."""
    classes = int(feature.get("classLabel", {}).get("numClasses", 0))
    path = os.path.join(data_dir, f"{label.replace('/', '.')}.labels.txt")
    if not 2 <= classes <= MOST_CLASSES:
        raise InputError(f"{data_dir} says that {label} has {classes:,} classes, not 2 to {MOST_CLASSES:,}: {fix}")
    if not os.path.exists(path):
        return tuple(map(str, range(classes)))
    lines = read_bytes(path, fix).decode("utf-8", "backslashreplace").split("\n")  # a name may hold other line breaks
    names = tuple(line.removesuffix("\r") for line in lines if line.strip())
    if len(names) != classes:
        raise InputError(f"{path} names {len(names):,} classes, {TFDS_FEATURES} says {classes:,}: {fix}")
    return names


def _feature_named(path, features, kind):
    """The name of the feature of a kind: the one of the usual name, or else the only one: CIFAR-100 has two labels."""
    found = [name for name, value in features.items() if value["pythonClassName"].endswith(f".{kind}")]
    usual = {"Image": "image", "ClassLabel": "label"}[kind]
    if usual not in found and len(found) != 1:
        raise InputError(f"{path} has {len(found)} features of kind {kind}, none called {usual}: one is needed")
    return usual if usual in found else found[0]


def _dataset(name, class_names, label_base, splits, image_feature, label_feature, *, fix):
    described = [class_names, label_base, image_feature, label_feature]
    described += [[split, os.path.basename(s.path), s.examples, s.bytes] for split in splits for s in splits[split]]
    labels = range(label_base, label_base + len(class_names))
    sampled = {split: _sample(splits[split], image_feature, label_feature, labels, fix) for split in splits}
    return Dataset(
        name=name,
        class_names=class_names,
        label_base=label_base,
        channels=1 if all(header.gray for header in sampled["train"]) else 3,
        median_short_side=int(statistics.median(min(header.width, header.height) for header in sampled["train"])),
        splits=splits,
        fingerprint=hashlib.sha256(json.dumps(described).encode()).hexdigest(),
        image_feature=image_feature,
        label_feature=label_feature,
    )


def _sample(shards, image_feature, label_feature, labels, fix):
    """The headers of the first readable images of up to `SAMPLED_RECORDS` shards; checks their labels."""
    import tensorflow as tf
    from google.protobuf.message import DecodeError

    per_shard = -(-SAMPLED_RECORDS // len(shards))
    headers = []
    for shard in shards[:SAMPLED_RECORDS]:
        for record in tf.data.TFRecordDataset(shard.path).take(per_shard).ignore_errors().as_numpy_iterator():
            try:
                features = tf.train.Example.FromString(record).features.feature
            except DecodeError:
                continue
            found = ", ".join(sorted(features))
            image, label = features[image_feature].bytes_list.value, features[label_feature].int64_list.value
            for feature, values in ((image_feature, image), (label_feature, label)):
                if len(values) != 1:
                    raise InputError(f"{shard.path} has a record without one {feature}, its features are {found}")
            if label[0] not in labels:
                legal = f"{labels[0]} to {labels[-1]}"
                raise InputError(f"{shard.path} has a record with label {label[0]}, legal are {legal}: {fix}")
            if header := read_header(image[0]):
                headers.append(header)
    if not headers:
        raise InputError(f"{shards[0].path} has no image as {image_feature} that can be read")
    return headers
