"""Reads data sets of TensorFlow Datasets by their name, such as `cifar10` or `imagenette/320px-v2`.

TensorFlow Datasets downloads and prepares them in its own folder (`TFDS_DATA_DIR`, by default ~/tensorflow_datasets).
The encoded images in its records are copied out once, in order and unchanged.
"""

import os
from collections.abc import Iterator

from data_prep import storage
from data_prep.errors import InputError
from data_prep.program import require
from data_prep.sources import share
from data_prep.sources.dataset import SPLITS, Contents, Dataset, Found, Image, check_classes
from data_prep.sources.parquet import Copies

_CATALOG = "www.tensorflow.org/datasets/catalog"


def dataset(
    asked: str,
    name: str = "",
    validation_share: float | None = None,
    seed: int = 0,
    unpacked: str = "",
    data_dir: str | None = None,
) -> Dataset:
    """A data set of images with one class each.

    Its splits are `train` and `validation`, or else `test`. If it has only `train`, a share of that is for validation.

    Args:
      asked: the data set's name, with configuration and version if these matter.
      name: the name for the manifest; by default the first part of `asked`.
      validation_share: the share of validation, between 0 and 1; None for 0.2, if it is needed. `seed` decides which.
      unpacked: local folder to copy the images to.
      data_dir: the folder of TensorFlow Datasets; None for its default.
    Raises:
      ModuleNotFoundError: tensorflow-datasets or TensorFlow is not installed.
      InputError: there is no such data set. `scan` may raise more.
    """
    require("tensorflow_datasets", "tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow_datasets

    try:
        builder = tensorflow_datasets.builder(asked, data_dir=data_dir)
    except Exception as error:  # of several classes, depending on what is wrong with the name
        raise InputError(f"--tfds={asked}: {_line(error)}; fix: give a name of {_CATALOG}") from None

    def scan() -> Contents:
        try:
            builder.download_and_prepare()
        except Exception as error:  # whatever the data set's own code and the network raise
            fix = f"fix: look at the network, the disk and {_CATALOG}/{builder.name}, and give the same command again"
            raise InputError(f"--tfds={asked}: cannot be prepared: {_line(error)}; {fix}") from None
        held, found = builder.info.splits, Found()
        places = {"train": "train", "validation": "validation" if "validation" in held else "test"}
        if "train" not in held:
            raise InputError(f"--tfds={asked}: has no split train, but {', '.join(held)}")
        if places["validation"] in held and validation_share is not None:
            raise InputError(f"--tfds={asked}: is split already and needs no --validation_share")
        storage.make_folder(unpacked)
        images = {
            split: list(_copied(builder, place, unpacked, found)) for split, place in places.items() if place in held
        }
        if "validation" not in images:
            of_all = 0.2 if validation_share is None else validation_share
            images = share.split(unpacked, images["train"], of_all, seed, found)
        synsets = check_classes(images, dict.fromkeys(SPLITS, builder.info.full_name), found)
        return Contents(images, synsets, synsets, notes=found.notes, rejected=found.rejected)

    full_name = builder.info.full_name
    sources = dict.fromkeys(SPLITS, unpacked)
    named = dict.fromkeys(SPLITS, full_name)
    stamp = [full_name, validation_share]
    return Dataset(name or builder.name, f"{full_name} of TensorFlow Datasets", sources, stamp, scan, unpacked, named)


def _copied(builder, split: str, unpacked: str, found: Found) -> Iterator[Image]:
    """Copies the images of a split to a file of the split's name in the folder `unpacked`."""
    import google_crc32c
    import tensorflow_datasets as tfds

    features = builder.info.features
    image = _feature(builder, "image", tfds.features.Image)
    label = _feature(builder, "label", tfds.features.ClassLabel)
    names = features[label].names
    found.classes = {number: (name, name) for number, name in enumerate(names)}
    decoders = tfds.decode.PartialDecoding({image: True, label: True}, decoders={image: tfds.decode.SkipDecoding()})
    in_order = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    examples = builder.as_dataset(split=split, decoders=decoders, read_config=in_order)
    with storage.written_aside(storage.join(unpacked, split)) as output:
        copies = Copies(output)
        for number, example in enumerate(tfds.as_numpy(examples)):
            path, value = f"{split}/{builder.name}-{split}-{number:07}", int(example[label])
            if value < 0:
                found.rejected.append((f"{builder.info.full_name}/{path}", "has no class"))
            else:
                content = example[image]
                where = copies.add(content), f"{google_crc32c.value(content):08x}", split
                yield Image(names[value], path, len(content), *where)


def _feature(builder, usual: str, kind: type) -> str:
    """The name of the feature of a kind: the usual one or, if there is none, the only one."""
    names = [name for name, feature in builder.info.features.items() if isinstance(feature, kind)]
    if usual not in names and len(names) != 1:
        raise InputError(
            f"--tfds={builder.info.full_name}: has {len(names)} features of kind {kind.__name__} among "
            f"{', '.join(builder.info.features)}; fix: give a data set of images with one class each"
        )
    return usual if usual in names else names[0]


def _line(error: Exception) -> str:
    """The message of an error in one line."""
    return next(filter(None, map(str.strip, str(error).split("\n"))), type(error).__name__)
