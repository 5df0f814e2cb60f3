"""Data sets of TensorFlow Datasets by name: a builder that is defined here stands for those that must be downloaded."""

import hashlib
import io
import os
import subprocess
import sys

import numpy as np
import pytest
from miniature_release import jpeg
from PIL import Image
from test_ilsvrc2012 import records

from bn_keras import read_dataset
from data_prep import convert
from data_prep.errors import InputError
from data_prep.sources import tfds as source

tfds = pytest.importorskip("tensorflow_datasets")
pytestmark = pytest.mark.needs("tensorflow_datasets")
CLASSES = "zebra", "ant", "cow"


class Animals(tfds.core.GeneratorBasedBuilder):
    """12 images to train and, as `test`, 6; arrays, which are stored as PNG, or files, which are stored as they are."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("arrays", "files", "unsplit")]  # noqa: RUF012

    def _info(self):
        kind = "png" if self.builder_config.name == "arrays" else "jpeg"
        features = {
            "image": tfds.features.Image(encoding_format=kind),
            "coarse_label": tfds.features.ClassLabel(names=["animal"]),  # as CIFAR-100 has
            "label": tfds.features.ClassLabel(names=CLASSES),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
        counts = {"train": 12} if self.builder_config.name == "unsplit" else {"train": 12, "test": 6}
        return {split: self._generate_examples(split, count) for split, count in counts.items()}

    def _generate_examples(self, split, count):
        for number in range(count):
            image = self.made(split, number)
            yield number, {"image": image, "coarse_label": 0, "label": number % 3}

    def made(self, split, number):
        """An array or a JPEG file of a split."""
        rng = np.random.default_rng([number, split == "test"])
        if self.builder_config.name == "arrays":
            return rng.integers(0, 256, (8, 9, 3), np.uint8)
        return io.BytesIO(jpeg(rng))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tensorflow_datasets"))


def run(asked, data_dir, output, **arguments):
    data = source.dataset(asked, unpacked=str(output / ".data_prep/unpacked"), data_dir=data_dir, **arguments)
    manifest = convert.convert(data, str(output), log=lambda line: None)
    return manifest, records(output, "train"), records(output, "validation")


def digests(contents):
    return sorted(hashlib.sha256(content).hexdigest() for content in contents)


def test_files_are_stored_byte_for_byte_with_their_classes(data_dir, tmp_path):
    manifest, *splits = run("animals/files", data_dir, tmp_path)
    assert manifest["name"] == "animals" and manifest["class_names"] == list(CLASSES)
    assert not (tmp_path / ".data_prep/unpacked").exists()
    builder = tfds.builder("animals/files", data_dir=data_dir)
    assert list(map(len, splits)) == [12, 6]
    for split, found in zip(("train", "test"), splits, strict=True):
        truth = {builder.made(split, number).getvalue(): CLASSES[number % 3] for number in range(len(found))}
        assert truth == {e["image/encoded"][0]: e["image/class/synset"][0].decode() for e in found.values()}


def test_arrays_keep_their_pixels(data_dir, tmp_path):
    _, train, _ = run("animals/arrays", data_dir, tmp_path)
    builder = tfds.builder("animals/arrays", data_dir=data_dir)
    stored = (np.asarray(Image.open(io.BytesIO(e["image/encoded"][0]))).tobytes() for e in train.values())
    assert digests(stored) == digests(builder.made("train", number).tobytes() for number in range(12))


def test_a_set_that_is_not_split_gives_a_share_of_each_class(data_dir, tmp_path):
    _, train, validation = run("animals/unsplit", data_dir, tmp_path, validation_share=0.25)
    assert len(train) == 9 and {e["image/class/synset"][0].decode() for e in validation.values()} == set(CLASSES)
    with pytest.raises(InputError, match="is split already and needs no --validation_share"):
        run("animals/files", data_dir, tmp_path / "other", validation_share=0.25)


def test_the_folder_that_tfds_leaves_is_read_as_it_is(data_dir):
    builder = tfds.builder("animals/arrays", data_dir=data_dir)
    builder.download_and_prepare()
    data = read_dataset(str(builder.data_dir))
    assert data.class_names == CLASSES and data.label_feature == "label"
    assert (data.examples("train"), data.examples("validation")) == (12, 6)


def test_an_unknown_name_and_a_failed_download_are_one_line(data_dir, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"--tfds=cifra10: .*; fix: give a name of www\.tensorflow\.org") as refused:
        source.dataset("cifra10", data_dir=data_dir)
    assert "\n" not in str(refused.value)

    def fail(self, *_, **__):
        raise ConnectionError("no route to host\nmore of it")

    monkeypatch.setattr(Animals, "_split_generators", fail)
    with pytest.raises(InputError, match="cannot be prepared: no route to host; fix: look at the network"):
        run("animals/files", str(tmp_path / "empty"), tmp_path / "out")


def test_the_program_says_in_one_line_that_there_is_no_such_data_set(tmp_path):
    command = [sys.executable, "-m", "data_prep", "--tfds=cifra10", f"--output_dir={tmp_path}/out"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TFDS_DATA_DIR": str(tmp_path)})
    assert result.returncode == 1 and result.stderr.strip().split("\n")[-1].startswith("data_prep: --tfds=cifra10: ")
    assert not (tmp_path / "out").exists()
