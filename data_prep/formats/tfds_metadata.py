"""Writes the metadata with which TensorFlow Datasets opens a folder of our shards: `tfds.builder_from_directory(D)`.

Features have the names of the records (`image/encoded`, ...). `as_supervised=True` gives (image, label), with the label
of the records. Classes are named by their synset, which is unique (ImageNet has two kinds of "crane").
"""

import json

from data_prep.formats import tfrecord
from data_prep.program import escaped

_CLASS = "tensorflow_datasets.core.features."
_IMAGE, _LABEL = "image/encoded", "image/class/label"


def files(manifest: dict) -> dict[str, bytes]:
    """The metadata files of a manifest: name -> content."""
    base, synsets = manifest["label_base"], manifest["synsets"]
    names = [f"background {i}" if i else "background" for i in range(base)] + synsets
    features = {name: _feature(name, kind) for name, kind in tfrecord.SCHEMA.items()}
    features[_IMAGE] = {
        "pythonClassName": f"{_CLASS}image_feature.Image",
        "image": {"dtype": "uint8", "shape": {"dimensions": ["-1", "-1", str(manifest["channels"])]}},
    }
    features[_LABEL] = {
        "pythonClassName": f"{_CLASS}class_label_feature.ClassLabel",
        "classLabel": {"numClasses": str(len(names))},
    }
    name = "".join(c if c.isascii() and c.isalnum() else "_" for c in manifest["name"]).lower().strip("_")
    info = {
        "name": name or "images",
        "version": "1.0.0",
        "fileFormat": "tfrecord",
        "supervisedKeys": {"tuple": {"items": [{"featureKey": _IMAGE}, {"featureKey": _LABEL}]}},
        "splits": [
            {
                "name": name,
                "filepathTemplate": "{SPLIT}-{SHARD_X_OF_Y}",
                "numBytes": str(sum(shard["bytes"] for shard in split["shards"])),
                "shardLengths": [str(shard["examples"]) for shard in split["shards"]],
            }
            for name, split in manifest["splits"].items()
        ],
    }
    return {
        "features.json": _json(_features_dict(features)),
        "dataset_info.json": _json(info),
        "image.class.label.labels.txt": "".join(f"{escaped(name, line=True)}\n" for name in names).encode(),
    }


def _json(value) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _features_dict(features: dict) -> dict:
    return {
        "pythonClassName": f"{_CLASS}features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }


def _feature(name: str, kind: int) -> dict:
    """The description of one feature of the schema."""
    if kind == tfrecord.BYTES:
        return {"pythonClassName": f"{_CLASS}text_feature.Text", "text": {}}
    dtype = "int64" if kind == tfrecord.INT64 else "float32"
    tensor = {"tensor": {"dtype": dtype, "encoding": "none", "shape": {}}}
    if not name.startswith("image/object/"):
        return {"pythonClassName": f"{_CLASS}scalar.Scalar", **tensor}
    return {
        "pythonClassName": f"{_CLASS}sequence_feature.Sequence",
        "sequence": {"feature": {"pythonClassName": f"{_CLASS}tensor_feature.Tensor", **tensor}, "length": "-1"},
    }
