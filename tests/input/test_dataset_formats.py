"""TF-Slim's and TFDS's folders give the batches that the same records under our manifest give."""

import json
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf
from conftest import run_program

from bn_keras import InputError, read_dataset
from bn_keras.input.dataset_formats import count_records
from bn_keras.input.options import InputOptions
from bn_keras.input.pipeline import training_batches, validation_batches


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
    training = training_batches(dataset, InputOptions(16), batch_size=7, seed=3).take(3)
    validation = validation_batches(dataset, InputOptions(16, augmentation="none"), batch_size=7)
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
    with pytest.raises(InputError, match=r"give `label_base` .* and `classes`"):
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


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_shards_in_folders_of_their_splits_are_read_as_imagenet_to_gcs_writes_them(tf_slim_dir, data_dir):
    for split in ("train", "validation"):
        (tf_slim_dir / split).mkdir()
        for path in tf_slim_dir.glob(f"{split}-*"):
            path.rename(tf_slim_dir / split / path.name)
    assert_same_batches(read_dataset(str(tf_slim_dir), label_base=1, classes=3), data_dir)


@pytest.mark.parametrize("other", ["train-00000-of-00008", "train/train-00000-of-00006", "train-00006-of-00006"])
def test_shards_of_two_conversions_are_refused_by_name(tf_slim_dir, other):
    (tf_slim_dir / "train").mkdir()
    shutil.copy(tf_slim_dir / "train-00000-of-00006", tf_slim_dir / other)
    with pytest.raises(InputError, match=f"train-0000.-of-00006 and .*{other} are of two conversions"):
        read_dataset(str(tf_slim_dir), 1, 3)


def test_a_count_of_shards_that_no_disk_holds_is_answered_at_once(tf_slim_dir):
    for path in tf_slim_dir.glob("train-*"):
        path.rename(tf_slim_dir / f"{path.name[:11]}-of-999999999")
    with pytest.raises(InputError, match="train-00006-of-999999999 is missing"):
        read_dataset(str(tf_slim_dir), 1, 3)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda path: path.touch(), "is empty"),
        (os.mkfifo, "is no regular file"),
        (lambda path: path.mkdir(), "is no regular file"),
        (lambda path: path.write_bytes(bytes(1000)), "has no record at byte 0"),
        (lambda path: path.write_bytes(b"\xff" * 1000), "has no record at byte 0"),
    ],
)
def test_what_is_named_like_a_shard_and_is_none_is_named(tf_slim_dir, make, said):
    shard = tf_slim_dir / "train-00002-of-00006"
    shard.unlink()
    make(shard)
    with pytest.raises(InputError, match=f"{shard.name} {said}"):
        read_dataset(str(tf_slim_dir), 1, 3)


@pytest.mark.parametrize("label_base, classes, label", [(0, 2, 2), (0, 3, 3), (1, 2, 3)])
def test_labels_outside_of_what_was_said_of_them_are_named_before_training(tf_slim_dir, label_base, classes, label):
    with pytest.raises(InputError, match=f"has a record with label {label}, legal are .*give the `label_base`"):
        read_dataset(str(tf_slim_dir), label_base, classes)


def test_records_with_other_features_are_named_with_those_that_they_have(tf_slim_dir, tfds_dir):
    for path in tf_slim_dir.glob("*-of-*"):
        shutil.copy(tfds_dir / f"shapes-{path.name.replace('-0', '.tfrecord-0', 1)}", path)
    with pytest.raises(InputError, match=r"without one image/encoded, its features are image, .*label"):
        read_dataset(str(tf_slim_dir), 1, 3)


def test_a_folder_above_a_data_set_names_the_folders_below(tfds_dir, data_dir):
    with pytest.raises(InputError, match=f"give `data_dir={tfds_dir}`$"):
        read_dataset(str(tfds_dir.parent))
    with pytest.raises(InputError, match=f"give `data_dir=.*{data_dir}"):
        read_dataset(str(data_dir.parent))
    assert read_dataset(str(tfds_dir)).examples("train") == 60


@pytest.mark.parametrize("format", ["array_record", "riegeli"])
def test_shards_of_another_format_of_tfds_are_refused_by_its_name(tfds_dir, format):
    edit_json(tfds_dir / "dataset_info.json", lambda info: info.update(fileFormat=format))
    with pytest.raises(InputError, match=f"{format} files, only TFRecord is read: .*--file_format=tfrecord"):
        read_dataset(str(tfds_dir))


@pytest.mark.parametrize(
    "template",
    [
        "{DATASET.__class__}", "{DATASET!r}", "{SPLIT:>999999999}", "../../x", "/etc/passwd", "{0}", "{", "{NAME}",
        "a/b", "\n", 5,
    ],
)  # fmt: skip
def test_a_template_that_no_version_of_tfds_writes_is_refused(tfds_dir, template):
    edit_json(tfds_dir / "dataset_info.json", lambda info: info["splits"][0].update(filepathTemplate=template))
    with pytest.raises(InputError, match=r"\$\.splits\[0\]\.filepathTemplate is .*, not a file's name with DATASET"):
        read_dataset(str(tfds_dir))


def test_a_template_in_tfds_own_words_is_read(tfds_dir, data_dir):
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}-of-{NUM_SHARDS}"
    edit_json(tfds_dir / "dataset_info.json", lambda info: info["splits"][0].update(filepathTemplate=template))
    assert_same_batches(read_dataset(str(tfds_dir)), data_dir)


@pytest.mark.parametrize(
    "file, change, said",
    [
        ("dataset_info.json", lambda c: c.update(name="../x"), r"\$\.name is '../x'"),
        ("dataset_info.json", lambda c: c.update(splits={}), r"\$\.splits is {}"),
        ("dataset_info.json", lambda c: c["splits"].pop(), "no validation|no test"),
        ("dataset_info.json", lambda c: c["splits"][0].update(name=".."), r"\$\.splits\[0\]\.name"),
        ("dataset_info.json", lambda c: c["splits"][0].update(shardLengths=["1e3"]), r"shardLengths\[0\] is '1e3'"),
        ("dataset_info.json", lambda c: c["splits"][0]["shardLengths"].__setitem__(0, str(10**17)), "too few for the"),
        ("dataset_info.json", lambda c: c["splits"][0].update(filepathTemplate="{DATASET}"), "is missing|listed twice"),
        ("dataset_info.json", lambda c: c["splits"][0].update(shardLengths=[]), "lists no train examples"),
        ("features.json", lambda c: c.update(featuresDict=[]), r"\$\.featuresDict is \[\]"),
        ("features.json", lambda c: c["featuresDict"]["features"].update(image=7), r"features\.image is 7"),
        ("features.json", lambda c: c["featuresDict"]["features"]["label"].pop("classLabel"), "label has 0 classes"),
        (
            "features.json",
            lambda c: c["featuresDict"]["features"]["label"]["classLabel"].update(numClasses=10**17),
            "label has 100,000,000,000,000,000 classes",
        ),
    ],
)
def test_metadata_of_tfds_that_cannot_be_are_named_by_file_and_place(tfds_dir, file, change, said):
    edit_json(tfds_dir / file, change)
    with pytest.raises(InputError, match=said) as caught:
        read_dataset(str(tfds_dir))
    assert str(tfds_dir) in str(caught.value)


def test_names_of_classes_end_at_line_feeds_alone(tfds_dir):
    names = "cir\u2028cle", "squ\x0b\x0c\x1c\x85are", "caf\\xe9"
    (tfds_dir / "label.labels.txt").write_bytes("".join(f"{n}\r\n" for n in names).encode().replace(b"\\xe9", b"\xe9"))
    assert read_dataset(str(tfds_dir)).class_names == names
    (tfds_dir / "label.labels.txt").write_text("circle\nsquare\n")
    with pytest.raises(InputError, match=r"names 2 classes, features\.json says 3"):
        read_dataset(str(tfds_dir))


def test_verify_names_shards_that_are_empty_missing_or_of_another_conversion(tf_slim_dir):
    def verify():
        return run_program("-m", "data_prep", "verify", tf_slim_dir, "--workers=1")

    assert "81 records, all whole" in verify().stdout
    shard = tf_slim_dir / "train-00002-of-00006"
    content = shard.read_bytes()
    for change, said in (
        (lambda: shard.write_bytes(b""), f"{shard}: holds no records"),
        (shard.unlink, f"{tf_slim_dir}: lacks shard {shard.name}"),
        (lambda: shutil.copy(tf_slim_dir / "train-00000-of-00006", f"{shard}8"), "is of another conversion"),
    ):
        change()
        done = verify()
        assert done.returncode == 1 and said in done.stdout + done.stderr, done.stdout + done.stderr
        shard.write_bytes(content)
    (tf_slim_dir / f"{shard.name}8").unlink()
    for split in ("train", "validation"):
        (tf_slim_dir / split).mkdir()
        for path in tf_slim_dir.glob(f"{split}-*"):
            path.rename(tf_slim_dir / split / path.name)
    assert "81 records, all whole" in verify().stdout


@pytest.mark.parametrize("given, said", [({"label_base": 0}, "label_base=0"), ({"classes": 4}, "classes=4")])
def test_labels_that_a_manifest_says_otherwise_are_refused(data_dir, given, said):
    """data_prep's labels of the three classes begin with 1."""
    with pytest.raises(InputError, match=f"`{said}`: {data_dir} says itself that it is [13]; leave it out"):
        read_dataset(str(data_dir), **given)
    assert read_dataset(str(data_dir), label_base=1, classes=3) == read_dataset(str(data_dir))
