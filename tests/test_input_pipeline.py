"""The order of examples is a function of (seed, epoch), evaluation sees every example once."""

import shutil

import numpy as np
import pytest
import tensorflow as tf

from bn_keras import InputError, input_pipeline, preprocessing, read_dataset
from bn_keras.input_pipeline import PADDING_LABEL, find_damage, training_batches, training_records, validation_batches

TRAIN, VALIDATION = 60, 21


@pytest.fixture(scope="module")
def dataset(data_dir):
    return read_dataset(str(data_dir))


def batches(dataset, count, **options):
    options = {"batch_size": 7, "image_size": 16, "seed": 3, "augmentation": "imagenet", **options}
    return [(images.numpy(), labels.numpy()) for images, labels in training_batches(dataset, **options).take(count)]


def assert_equal_batches(one, other):
    assert len(one) == len(other)
    for (images, labels), (other_images, other_labels) in zip(one, other, strict=True):
        np.testing.assert_array_equal(images, other_images)
        np.testing.assert_array_equal(labels, other_labels)


@pytest.mark.parametrize("shuffling", ["within_shard", "shard_order"])
def test_a_pipeline_started_at_any_step_continues_the_one_from_0(dataset, shuffling):
    whole = batches(dataset, 26, shuffling=shuffling)  # three epochs: 182 of 180 examples
    for start in (1, 5, 8, 9, 17, 25):
        assert_equal_batches(batches(dataset, 26 - start, start_step=start, shuffling=shuffling), whole[start:])


def test_batches_do_not_depend_on_parallelism(dataset, monkeypatch):
    one_by_one = []
    for calls in (1, 2, 8):
        monkeypatch.setattr(input_pipeline, "PARALLEL_CALLS", calls)
        one_by_one.append(batches(dataset, 10))
    assert_equal_batches(one_by_one[0], one_by_one[1])
    assert_equal_batches(one_by_one[0], one_by_one[2])


@pytest.mark.parametrize("shuffling", ["within_shard", "shard_order"])
def test_an_epoch_holds_every_example_once_in_a_new_order(dataset, shuffling):
    options = {"batch_size": TRAIN, "augmentation": "none", "shuffling": shuffling}
    first, second = (images.reshape(TRAIN, -1) for images, _ in batches(dataset, 2, **options))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(np.unique(first, axis=0), np.unique(second, axis=0))


def order(dataset, start, count, **options):
    """Numbers and epochs of `count` examples in training order, `[2, count]`."""
    records = training_records(dataset, 3, start, **options).take(count)
    return np.array([(int(example), int(epoch)) for _, example, epoch in records]).T


def test_shard_order_keeps_the_order_inside_a_shard(dataset):
    def breaks(epoch, shuffling):
        """Where one of the 8 lanes does not go on with the next example of its shard of 10."""
        examples, _ = order(dataset, epoch * TRAIN, TRAIN, shuffling=shuffling)
        lanes = [examples[lane::8] for lane in range(8)]
        return np.concatenate([lane[1:][np.diff(lane) != 1] for lane in lanes])

    assert all((breaks(epoch, "shard_order") % 10 == 0).all() for epoch in range(3))
    assert (breaks(0, "within_shard") % 10 != 0).any()


def test_a_batch_mixes_many_shards(dataset):
    examples, _ = order(dataset, 0, 8)
    assert len(set(examples // 10)) >= 5


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_batches_that_one_alone_would_see(dataset, hosts):
    for start, count in ((0, 3 * TRAIN), (TRAIN + 28, 56)):
        alone = order(dataset, start, count)
        for host in range(hosts):
            own = order(dataset, start, count // hosts, hosts=hosts, host=host)
            np.testing.assert_array_equal(own, alone[:, host::hosts])


@pytest.mark.parametrize("hosts", [3, 12])
def test_any_count_of_hosts_reads_exactly_one_epoch(dataset, hosts):
    count = TRAIN * hosts  # whole epochs, also where hosts do not divide one
    parts = [order(dataset, 0, TRAIN, hosts=hosts, host=host) for host in range(hosts)]
    merged = np.stack(parts, -1).reshape(2, count)
    for epoch in range(hosts):
        examples, epochs = merged[:, epoch * TRAIN : (epoch + 1) * TRAIN]
        assert sorted(examples) == list(range(TRAIN)) and set(epochs) == {epoch}


def test_hosts_share_the_images_too(dataset):
    whole = batches(dataset, 4, batch_size=8)
    for host in range(4):
        expected = [(images[host::4], labels[host::4]) for images, labels in whole]
        assert_equal_batches(batches(dataset, 4, batch_size=8, hosts=4, host=host), expected)


def test_a_batch_that_hosts_cannot_share_is_refused(dataset):
    with pytest.raises(InputError, match="batch of 7 cannot be shared by 2 hosts"):
        batches(dataset, 1, hosts=2)
    with pytest.raises(InputError, match="batch of 7 cannot be shared by 2 hosts"):
        validation_batches(dataset, batch_size=7, image_size=16, hosts=2)


def test_another_seed_is_another_order_and_another_crop(dataset):
    (one, labels), (other, other_labels) = (batches(dataset, 1, seed=seed, batch_size=TRAIN)[0] for seed in (0, 1))
    assert not np.array_equal(labels, other_labels)
    assert not {image.tobytes() for image in one} & {image.tobytes() for image in other}


def test_an_example_is_cropped_anew_in_every_epoch(dataset):
    (one, _), (other, _) = batches(dataset, 2, batch_size=TRAIN)
    assert not {image.tobytes() for image in one} & {image.tobytes() for image in other}


def test_images_are_in_the_networks_range(dataset):
    images, labels = batches(dataset, 1, batch_size=TRAIN, photometric_distortion="full")[0]
    assert images.dtype == np.float32 and images.shape == (TRAIN, 16, 16, 1)
    assert images.min() >= -1 and images.max() <= 1
    assert set(labels) == {0, 1, 2}


@pytest.mark.parametrize("batch_size", [1, 4, 7, 21, 32])
def test_evaluation_sees_every_example_once_at_any_batch_size(dataset, batch_size):
    found = list(validation_batches(dataset, batch_size=batch_size, image_size=20, augmentation="none"))
    assert all(images.shape[0] == batch_size for images, _ in found)
    labels = np.concatenate([labels for _, labels in found])
    assert np.bincount(labels[labels != PADDING_LABEL]).tolist() == [7, 7, 7]
    images = np.concatenate([images for images, _ in found])[labels != PADDING_LABEL]
    assert len(np.unique(images.reshape(VALIDATION, -1), axis=0)) == VALIDATION


@pytest.mark.parametrize(("hosts", "batch_size"), [(2, 2), (2, 8), (3, 9), (4, 32)])
def test_hosts_evaluate_every_example_once_in_equally_many_batches(dataset, hosts, batch_size):
    def evaluated(**options):
        found = list(validation_batches(dataset, image_size=20, augmentation="none", **options))
        images, labels = (np.concatenate(part) for part in zip(*found, strict=True))
        return len(found), images[labels != PADDING_LABEL]

    parts = [evaluated(batch_size=batch_size, hosts=hosts, host=host) for host in range(hosts)]
    assert {count for count, _ in parts} == {-(-VALIDATION // batch_size)}
    np.testing.assert_array_equal(np.concatenate([images for _, images in parts]), evaluated(batch_size=1)[1])


def test_the_whole_image_is_the_stored_pixels(dataset, image_folders):
    from PIL import Image

    stored = {
        np.asarray(Image.open(path)).astype("float32").tobytes()
        for path in (image_folders / "validation").rglob("*.png")
    }
    (images, _), *_ = validation_batches(dataset, batch_size=VALIDATION, image_size=20, augmentation="none")
    read = {np.round((image.numpy() + 1) * 127.5).astype("float32").tobytes() for image in images}
    assert read == stored


class TestDamage:
    @pytest.fixture
    def copy(self, data_dir, tmp_path):
        return shutil.copytree(data_dir, tmp_path / "copy")

    def test_whole_data_has_none(self, dataset):
        assert find_damage(dataset, "train") is None

    def test_a_flipped_byte_is_named_by_shard_and_record(self, copy):
        shard = sorted(copy.glob("train-*"))[2]
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        damage = find_damage(read_dataset(str(copy)), "train")
        assert damage.startswith("record ") and str(shard) in damage and "prepare the data again" in damage

    @pytest.mark.parametrize("name", ["dataset.json", "train-00001-of-00006"])
    def test_a_missing_file_is_named(self, copy, name):
        (copy / name).unlink()
        with pytest.raises(InputError, match=name):
            read_dataset(str(copy))

    def test_a_truncated_shard_is_named_with_its_sizes(self, copy):
        shard = copy / "validation-00000-of-00002"
        size = shard.stat().st_size
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(InputError, match=f"{shard.name} has {size - 1} bytes, the manifest says {size}"):
            read_dataset(str(copy))

    @pytest.mark.parametrize(
        "content", ["", "{", "[]", '{"format": "bn_keras.dataset"}', '{"format": "x", "version": 9}']
    )
    def test_another_json_is_refused(self, copy, content):
        (copy / "dataset.json").write_text(content)
        with pytest.raises(InputError, match=r"dataset\.json"):
            read_dataset(str(copy))


class TestPhotometricDistortion:
    images = np.random.default_rng(0).uniform(60, 190, (5, 4, 3, 3)).astype("float32")

    def test_no_move_is_no_change(self):
        same = preprocessing.photometric_distortion(tf.constant(self.images), tf.zeros((5, 4)), "full")
        np.testing.assert_allclose(same, self.images, atol=1e-3)

    def test_brightness_adds_up_to_32(self):
        draws = tf.constant([[1.0, 0, 0, 0]] * 5)
        np.testing.assert_allclose(
            preprocessing.photometric_distortion(tf.constant(self.images), draws, "full"), self.images + 32, atol=1e-3
        )
        np.testing.assert_allclose(
            preprocessing.photometric_distortion(tf.constant(self.images), draws, "reduced"),
            self.images + 16,
            atol=1e-3,
        )

    def test_contrast_is_tensorflows(self):
        draws = tf.constant([[0, 0, 0, 0.5]] * 5)
        expected = tf.image.adjust_contrast(self.images, 1.25)
        gray = self.images.mean(-1, keepdims=True)
        # tf.image takes a mean per channel, and so does the matrix form.
        np.testing.assert_allclose(
            preprocessing.photometric_distortion(tf.constant(self.images), draws, "full"), expected, atol=1e-3
        )
        np.testing.assert_allclose(
            preprocessing.photometric_distortion(tf.constant(gray), draws, "full"),
            tf.image.adjust_contrast(gray, 1.25),
            atol=1e-3,
        )

    def test_hue_and_saturation_keep_the_luma(self):
        draws = tf.constant([[0, 0.7, -0.9, 0]] * 5)
        changed = preprocessing.photometric_distortion(tf.constant(self.images), draws, "reduced").numpy()
        luma = np.array(preprocessing.RGB_TO_YIQ[0])
        assert not np.allclose(changed, self.images, atol=1)
        np.testing.assert_allclose(changed @ luma, self.images @ luma, atol=1e-2)
