"""TF-Slim's and TFDS's folders give the batches that the same records under our manifest give."""

import json
import shutil

import numpy as np
import pytest
import tensorflow as tf

from bn_keras import InputError, read_dataset
from bn_keras.foreign_dataset import count_records
from bn_keras.input_pipeline import training_batches, validation_batches


@pytest.fixture
def tf_slim_dir(data_dir, tmp_path):
    """Our shards have TF-Slim's schema; without manifest and metadata the folder is TF-Slim's."""
    folder = tmp_path / "slim"
    folder.mkdir()
    for path in [*data_dir.glob("train-*"), *data_dir.glob("validation-*")]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def tfds_dir(data_dir, tmp_path):
    """The same records in the schema and the file names of TFDS, labels from 0."""
    folder = tmp_path / "shapes" / "1.0.0"
    folder.mkdir(parents=True)
    splits = []
    for split in ("train", "validation"):
        lengths = []
        for path in sorted(data_dir.glob(f"{split}-*")):
            with tf.io.TFRecordWriter(
                str(folder / f"shapes-{path.name.replace(split, f'{split}.tfrecord')}")
            ) as writer:
                records = list(tf.data.TFRecordDataset(str(path)))
                for record in records:
                    features = tf.train.Example.FromString(record.numpy()).features.feature
                    label = features["image/class/label"].int64_list.value[0] - 1
                    example = tf.train.Example()
                    example.features.feature["image"].CopyFrom(features["image/encoded"])
                    example.features.feature["label"].int64_list.value.append(label)
                    writer.write(example.SerializeToString())
            lengths.append(str(len(records)))
        splits.append({"name": split, "shardLengths": lengths})
    features = {
        "image": {"pythonClassName": "tensorflow_datasets.core.features.image_feature.Image"},
        "label": {
            "pythonClassName": "tensorflow_datasets.core.features.class_label_feature.ClassLabel",
            "classLabel": {"numClasses": "3"},
        },
    }
    (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": features}}))
    info = {"name": "shapes", "fileFormat": "tfrecord", "splits": splits}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "label.labels.txt").write_text("circle\nsquare\nstripe\n")
    return folder


def batches_of(dataset):
    options = {"batch_size": 7, "image_size": 16}
    training = training_batches(dataset, seed=3, **options).take(3)
    validation = validation_batches(dataset, **options, augmentation="none")
    return [part.numpy() for batches in (training, validation) for batch in batches for part in batch]


def assert_same_batches(found, data_dir):
    for one, other in zip(batches_of(found), batches_of(read_dataset(str(data_dir))), strict=True):
        np.testing.assert_array_equal(one, other)


def test_tf_slims_shards_are_read_once_their_labels_are_known(tf_slim_dir, data_dir):
    found = read_dataset(str(tf_slim_dir), label_base=1, classes=3)
    assert (found.channels, found.median_short_side, found.label_base, len(found.class_names)) == (1, 20, 1, 3)
    assert (found.examples("train"), found.examples("validation")) == (60, 21)
    assert_same_batches(found, data_dir)
    assert found.fingerprint != read_dataset(str(tf_slim_dir), label_base=0, classes=4).fingerprint


@pytest.mark.parametrize("given", [{}, {"label_base": 1}, {"classes": 3}])
def test_tf_slims_labels_are_not_guessed(tf_slim_dir, given):
    with pytest.raises(InputError, match=r"give --label_base .* and --classes"):
        read_dataset(str(tf_slim_dir), **given)


def test_a_missing_shard_and_a_cut_off_one_are_named(tf_slim_dir):
    shard = tf_slim_dir / "train-00002-of-00006"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(InputError, match=f"{shard.name} ends inside record 9"):
        read_dataset(str(tf_slim_dir), 1, 3)
    shard.unlink()
    with pytest.raises(InputError, match=f"shard .*{shard.name} is missing"):
        read_dataset(str(tf_slim_dir), 1, 3)


def test_records_are_counted_without_reading_them(data_dir):
    assert [count_records(str(path)) for path in sorted(data_dir.glob("train-*"))] == [10] * 6


def test_a_tfds_folder_is_read(tfds_dir, data_dir):
    found = read_dataset(str(tfds_dir))
    assert found.class_names == ("circle", "square", "stripe") and found.label_base == 0 and found.channels == 1
    assert_same_batches(found, data_dir)


def test_a_tfds_set_without_labels_or_with_a_missing_shard_is_refused(tfds_dir):
    (tfds_dir / "shapes-train.tfrecord-00003-of-00006").unlink()
    with pytest.raises(InputError, match=r"shapes-train\.tfrecord-00003-of-00006 is missing"):
        read_dataset(str(tfds_dir))
    features = json.loads((tfds_dir / "features.json").read_text())
    del features["featuresDict"]["features"]["label"]
    (tfds_dir / "features.json").write_text(json.dumps(features))
    with pytest.raises(InputError, match="0 features of kind ClassLabel"):
        read_dataset(str(tfds_dir))


def test_our_own_folder_that_is_not_finished_is_not_taken_for_tf_slims(data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    (copy / "dataset.json").unlink()
    with pytest.raises(InputError, match=r"has no dataset\.json"):
        read_dataset(str(copy))
