"""The order of examples is a function of (seed, epoch), evaluation sees every example once."""

import dataclasses
import io
import os
import re
import shutil
import typing

import keras
import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
from conftest import ROOT, run_program, start_program

from bn_keras import InputError, read_dataset
from bn_keras.input import photometric_distortion, pipeline, preprocessing
from bn_keras.input.bad_records import SkippedRecords
from bn_keras.input.dataset import Dataset, Shard
from bn_keras.input.options import InputOptions, Interpolation
from bn_keras.input.pipeline import training_batches, validation_batches
from bn_keras.input.records import PADDING_LABEL, find_damage
from bn_keras.input.shard_cache import cache_shards
from bn_keras.input.training_order import memory_bound, training_records

TRAIN, VALIDATION = 60, 21


@pytest.fixture(scope="module")
def dataset(data_dir):
    return read_dataset(str(data_dir))


OPTIONS = InputOptions(image_size=16)
WHOLE = InputOptions(image_size=20, augmentation="none")


def batches(dataset, count, *, batch_size=7, seed=3, options=OPTIONS, **where):
    found = training_batches(dataset, options, batch_size=batch_size, seed=seed, **where).take(count)
    return [(images.numpy(), labels.numpy()) for images, labels in found]


def assert_equal_batches(one, other):
    assert len(one) == len(other)
    for (images, labels), (other_images, other_labels) in zip(one, other, strict=True):
        np.testing.assert_array_equal(images, other_images)
        np.testing.assert_array_equal(labels, other_labels)


@pytest.mark.parametrize("shuffling", ["within_shard", "shard_order"])
def test_a_pipeline_started_at_any_step_continues_the_one_from_0(dataset, shuffling):
    options = dataclasses.replace(OPTIONS, shuffling=shuffling)
    whole = batches(dataset, 26, options=options)  # three epochs: 182 of 180 examples
    for start in (1, 5, 8, 9, 17, 25):
        assert_equal_batches(batches(dataset, 26 - start, start_step=start, options=options), whole[start:])


def test_rand_augment_changes_an_example_alike_from_any_start(dataset):
    options = dataclasses.replace(OPTIONS, rand_augment=0.3, distort_on="device")
    (first, second), (plain, _) = (
        [images.numpy() for (images, _), _ in training_batches(dataset, each, batch_size=7, seed=3).take(2)]
        for each in (options, dataclasses.replace(options, rand_augment=0.0))
    )
    (again, _), _ = next(iter(training_batches(dataset, options, batch_size=7, seed=3, start_step=1)))
    np.testing.assert_array_equal(again, second)
    assert first.dtype == plain.dtype == np.uint8 and (first != plain).any(axis=(1, 2, 3)).sum() > 3


def test_batches_do_not_depend_on_parallelism(dataset, monkeypatch):
    one_by_one = []
    for calls in (1, 2, 8):
        monkeypatch.setattr(pipeline, "PARALLEL_CALLS", calls)
        one_by_one.append(batches(dataset, 10))
    assert_equal_batches(one_by_one[0], one_by_one[1])
    assert_equal_batches(one_by_one[0], one_by_one[2])


@pytest.mark.parametrize("shuffling", ["within_shard", "shard_order"])
def test_an_epoch_holds_every_example_once_in_a_new_order(dataset, shuffling):
    options = InputOptions(image_size=16, augmentation="none", shuffling=shuffling)
    both = batches(dataset, 2, batch_size=TRAIN, options=options)
    first, second = (images.reshape(TRAIN, -1) for images, _ in both)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(np.unique(first, axis=0), np.unique(second, axis=0))


def order(dataset, start, count, **options):
    """Numbers and epochs of `count` examples in training order, `[2, count]`."""
    records = training_records(dataset, 3, start, **options).take(count)
    return np.array([(int(shard) * 10 + int(record), int(epoch)) for _, _, shard, record, epoch in records]).T


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


@pytest.mark.parametrize("hosts", [4])
def test_hosts_share_the_batches_that_one_alone_would_see(dataset, hosts):
    for start, count in ((0, 3 * TRAIN), (TRAIN + 28, 56)):
        alone = order(dataset, start, count)
        for host in range(hosts):
            own = order(dataset, start, count // hosts, hosts=hosts, host=host)
            np.testing.assert_array_equal(own, alone[:, host::hosts])


@pytest.mark.parametrize("hosts", [3])
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
        validation_batches(dataset, OPTIONS, batch_size=7, hosts=2)


@pytest.mark.parametrize("wrong", [{"augmentation": "imagnet"}, {"distort_on": "gpu"}, {"image_size": 0}])
def test_an_unknown_option_is_named(wrong):
    (name,) = wrong
    with pytest.raises(InputError, match=f"^{name}="):
        InputOptions(**{"image_size": 16} | wrong)


def test_another_seed_is_another_order_and_another_crop(dataset):
    (one, labels), (other, other_labels) = (batches(dataset, 1, seed=seed, batch_size=TRAIN)[0] for seed in (0, 1))
    assert not np.array_equal(labels, other_labels)
    assert not {image.tobytes() for image in one} & {image.tobytes() for image in other}


def test_an_example_is_cropped_anew_in_every_epoch(dataset):
    (one, _), (other, _) = batches(dataset, 2, batch_size=TRAIN)
    assert not {image.tobytes() for image in one} & {image.tobytes() for image in other}


def test_images_are_in_the_networks_range(dataset):
    images, labels = batches(dataset, 1, batch_size=TRAIN, options=InputOptions(16, photometric_distortion="full"))[0]
    assert images.dtype == np.float32 and images.shape == (TRAIN, 16, 16, 1)
    assert images.min() >= -1 and images.max() <= 1
    assert set(labels) == {0, 1, 2}


@pytest.mark.parametrize("batch_size", [1, 4, 7, 21, 32])
def test_evaluation_sees_every_example_once_at_any_batch_size(dataset, batch_size):
    found = list(validation_batches(dataset, WHOLE, batch_size=batch_size))
    assert all(images.shape[0] == batch_size for images, _ in found)
    labels = np.concatenate([labels for _, labels in found])
    assert np.bincount(labels[labels != PADDING_LABEL]).tolist() == [7, 7, 7]
    images = np.concatenate([images for images, _ in found])[labels != PADDING_LABEL]
    assert len(np.unique(images.reshape(VALIDATION, -1), axis=0)) == VALIDATION


@pytest.mark.parametrize(("hosts", "batch_size"), [(2, 2), (2, 8), (3, 9), (4, 32)])
def test_hosts_evaluate_every_example_once_in_equally_many_batches(dataset, hosts, batch_size):
    def evaluated(**options):
        found = list(validation_batches(dataset, WHOLE, **options))
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
    (images, _), *_ = validation_batches(dataset, WHOLE, batch_size=VALIDATION)
    read = {np.round((image.numpy() + 1) * 127.5).astype("float32").tobytes() for image in images}
    assert read == stored


@pytest.mark.parametrize("cache", ["memory", "folder"])
def test_cached_shards_are_read_from_the_copy(dataset, tmp_path, cache):
    copied = cache_shards(dataset, "memory" if cache == "memory" else str(tmp_path / "cache"))
    try:
        assert all(os.path.exists(shard.path) for shard in copied.splits["train"])
        assert not {s.path for s in copied.splits["train"]} & {s.path for s in dataset.splits["train"]}
        assert_equal_batches(batches(copied, 2), batches(dataset, 2))
        changed = os.stat(copied.splits["train"][0].path).st_mtime_ns
        assert cache_shards(dataset, "memory" if cache == "memory" else str(tmp_path / "cache")) == copied
        assert os.stat(copied.splits["train"][0].path).st_mtime_ns == changed
    finally:
        if cache == "memory":
            shutil.rmtree(os.path.dirname(copied.splits["train"][0].path))


def test_a_cache_without_room_is_refused_with_both_sizes(dataset, tmp_path):
    shards = tuple(dataclasses.replace(shard, bytes=1 << 50) for shard in dataset.splits["train"])
    huge = dataclasses.replace(dataset, splits={"train": shards})
    with pytest.raises(InputError, match=f"needs {6 << 50:,} bytes, .* has .* free"):
        cache_shards(huge, str(tmp_path))


def test_records_in_memory_are_bounded_by_two_shards_a_lane(dataset):
    largest = max(shard.bytes for shard in dataset.splits["train"])
    assert [memory_bound(dataset, hosts) for hosts in (1, 2, 8, 16)] == [
        16 * largest,
        8 * largest,
        2 * largest,
        2 * largest,
    ]


READ_AN_EPOCH = """
import sys
import tensorflow as tf
from bn_keras.input.dataset import Dataset, Shard
from bn_keras.input.training_order import memory_bound, training_records

def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

shards = tuple(Shard(path, 20, 20 * (400_000 + 16)) for path in sys.argv[1:])
dataset = Dataset("large", ("a", "b"), 0, 3, 200, {"train": shards}, "f")
records = iter(training_records(dataset, 0, 0))
next(records)
before = peak()
for _ in range(len(shards) * 20):
    next(records)
print(memory_bound(dataset), peak() - before)
"""


def test_records_in_memory_stay_below_what_is_said(tmp_path):
    """32 shards of 8 MB, of which 16 are said to be held at most. The kernel counts what an epoch really takes, with
    TensorFlow's buffers and heap, for which 16 MB are left; to hold all records takes 256 MB."""
    for number in range(32):
        with tf.io.TFRecordWriter(str(tmp_path / f"{number:02}")) as writer:
            for _ in range(20):
                writer.write(bytes(400_000))
    done = run_program("-c", READ_AN_EPOCH, *sorted(tmp_path.iterdir()))
    assert done.returncode == 0, done.stderr
    said, taken = map(int, done.stdout.split())
    assert said == 16 * 20 * 400_016 and said / 2 < taken < said + 16e6


@pytest.mark.slow
def test_batches_prepared_by_two_services_are_those_of_none(dataset):
    started = [start_program("-m", "launch.data_service", "--port=0") for _ in range(2)]
    try:
        addresses = [re.search(r"--data_service=(\S+)", process.stdout.readline())[1] for process in started]
        served = batches(dataset, 12, batch_size=8, data_service=",".join(addresses), start_step=3)
        assert_equal_batches(served, batches(dataset, 12, batch_size=8, start_step=3))
        served = batches(dataset, 3, batch_size=8, data_service=addresses[0])
        assert_equal_batches(served, batches(dataset, 3, batch_size=8))
        of_host = batches(dataset, 3, batch_size=8, data_service=",".join(addresses), hosts=2, host=1)
        assert_equal_batches(of_host, batches(dataset, 3, batch_size=8, hosts=2, host=1))
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_a_start_in_a_set_of_imagenets_size_opens_only_the_shards_it_needs(tmp_path):
    """1,281,167 examples in 1,024 shards, of which only the eight that the step is in exist."""
    counts = [1_281_167 // 1024 + (number < 1_281_167 % 1024) for number in range(1024)]
    shards = tuple(Shard(str(tmp_path / f"train-{k}"), count, 0) for k, count in enumerate(counts))
    dataset = Dataset("imagenet", ("one",), 0, 3, 375, {"train": shards}, "")
    start, opened = 20_000_000, []
    while True:
        try:
            found = list(training_records(dataset, 0, start).take(16))
            break
        except tf.errors.NotFoundError as error:
            path = re.search(r"(\S*train-\d+)", error.message)[1]
            opened.append(path)
            with tf.io.TFRecordWriter(path) as writer:
                for _ in range(counts[int(path.rpartition("-")[2])]):
                    writer.write(b"")
            assert len(opened) <= 16  # each lane's shard, and the one read ahead
    assert len(opened) >= 8 and {int(epoch) for *_, epoch in found} == {start // 1_281_167}


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


class TestBadExamples:
    """A shard whose third record is no image, and one whose framing breaks after four records."""

    @pytest.fixture
    def damaged(self, data_dir, tmp_path):
        copy = shutil.copytree(data_dir, tmp_path / "copy")
        no_image, broken = copy / "train-00001-of-00006", copy / "train-00004-of-00006"
        records = [record.numpy() for record in tf.data.TFRecordDataset(str(no_image))]
        image = tf.train.Example.FromString(records[2]).features.feature["image/encoded"].bytes_list.value[0]
        records[2] = records[2].replace(image, b"x" * len(image))
        with tf.io.TFRecordWriter(str(no_image)) as writer:
            for record in records:
                writer.write(record)
        sizes = [16 + len(record.numpy()) for record in tf.data.TFRecordDataset(str(broken))]
        content = bytearray(broken.read_bytes())
        content[sum(sizes[:4]) + 20] ^= 1
        broken.write_bytes(content)
        return read_dataset(str(copy)), {no_image.name: {2}, broken.name: set(range(4, 10))}, sum(sizes[:4])

    def test_they_are_named_by_file_record_and_byte(self, damaged):
        dataset, _, offset = damaged
        third = sum(16 + len(r.numpy()) for r in tf.data.TFRecordDataset(dataset.splits["train"][1].path).take(2))
        assert f"record 2 of {dataset.splits['train'][1].path}, at byte {third}," in find_damage(dataset, "train")
        broken = dataclasses.replace(dataset, splits={"train": dataset.splits["train"][4:5]})
        assert f"record 4 of {dataset.splits['train'][4].path}, at byte {offset}," in find_damage(broken, "train")

    def test_without_skip_they_end_training(self, damaged):
        with pytest.raises(tf.errors.OpError):
            batches(damaged[0], 10, options=WHOLE)

    def test_skipped_ones_leave_every_other_example_where_it_is(self, damaged, dataset, capfd):
        damaged, bad, _ = damaged
        found = SkippedRecords()
        whole, skipped = batches(dataset, 9, batch_size=20), batches(damaged, 9, batch_size=20, skipped=found)
        examples, _ = order(dataset, 0, 180)
        bad_rows = [example % 10 in bad.get(f"train-{example // 10:05}-of-00006", ()) for example in examples]
        bad_rows = np.reshape(bad_rows, (9, 20))
        assert bad_rows.sum() == 3 * 7
        for (images, labels), (other, other_labels), bad_row in zip(whole, skipped, bad_rows, strict=True):
            np.testing.assert_array_equal(other[~bad_row], images[~bad_row])
            np.testing.assert_array_equal(other_labels[~bad_row], labels[~bad_row])
            good = {image.tobytes() for image in images[~bad_row]}
            assert all(image.tobytes() in good for image in other[bad_row])
        named = re.findall(r"left out: record (\d+) of (\S*(train-\d+-of-\d+))", capfd.readouterr().err)
        assert len(named) == 7  # each once in three epochs
        assert {(number, name) for number, _, name in named} == {
            (str(number), name) for name, numbers in bad.items() for number in numbers
        }
        assert str(found) == f"7 records were left out, first record {named[0][0]} of {named[0][1]}"

    def test_evaluation_counts_without_the_skipped_ones(self, damaged, dataset):
        damaged, bad, _ = damaged

        def evaluated(dataset, **options):
            dataset = dataclasses.replace(dataset, splits={"validation": dataset.splits["train"]})
            batches = validation_batches(dataset, WHOLE, batch_size=16, **options)
            return (np.concatenate(part) for part in zip(*batches, strict=True))

        found = SkippedRecords()
        (images, labels), (whole_images, whole_labels) = evaluated(damaged, skipped=found), evaluated(dataset)
        places = [(f"train-{row // 10:05}-of-00006", row % 10) for row in range(TRAIN)]
        good = np.array([record not in bad.get(name, ()) for name, record in places] + [False] * 4)
        np.testing.assert_array_equal(labels, np.where(good, whole_labels, PADDING_LABEL))
        np.testing.assert_array_equal(images[good], whole_images[good])
        assert len(found) == 7


class TestDecode:
    """Every format, of color and of gray pixels, with and without alpha, for a network of either kind."""

    RANDOM = np.random.default_rng(0).integers(0, 256, (30, 40, 3), "uint8")

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("format", ["PNG", "GIF", "BMP", "WEBP"])
    @pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
    def test_the_pixels_are_pillows(self, format, mode, channels):
        image = PIL.Image.fromarray(self.RANDOM).convert(mode)
        if mode == "RGBA":
            image.putalpha(PIL.Image.fromarray(self.RANDOM[..., 0] | 1))  # where it is 0, GIF has no color
        file = io.BytesIO()
        image.save(file, format, **{"lossless": True, "exact": True} if format == "WEBP" else {})
        if format == "GIF":  # of at most 256 colors, which Pillow chooses
            image = PIL.Image.open(io.BytesIO(file.getvalue()))
        wanted = np.asarray(image.convert("RGB").convert("L" if channels == 1 else "RGB"), int).reshape(
            30, 40, channels
        )
        found = preprocessing.decode(file.getvalue(), channels).numpy()
        assert abs(found - wanted).max() <= channels % 3  # luma is rounded, or cut off

    @pytest.mark.parametrize("channels", [1, 3])
    def test_a_cmyk_jpeg_is_read(self, channels):
        flat = PIL.Image.new("RGB", (32, 32), (200, 120, 40)).convert("CMYK")
        file = io.BytesIO()
        flat.save(file, "JPEG", quality=95)
        found = preprocessing.single_crop(file.getvalue(), image_size=8, channels=channels)
        wanted = (200, 120, 40) if channels == 3 else 0.299 * 200 + 0.587 * 120 + 0.114 * 40
        np.testing.assert_allclose(found, np.broadcast_to(wanted, (8, 8, channels)), atol=3)

    def test_an_animated_webp_is_an_error(self):
        file = io.BytesIO()
        moving = [PIL.Image.fromarray(self.RANDOM), PIL.Image.fromarray(255 - self.RANDOM)]
        for options in ({}, {"background": (0, 0, 0, 0)}):
            moving[0].save(file, "WEBP", save_all=True, append_images=moving[1:], **options)
            for channels in (1, 3):
                with pytest.raises(tf.errors.InvalidArgumentError):
                    preprocessing.decode(file.getvalue(), channels)

    def test_an_image_of_too_many_pixels_is_an_error_before_it_is_decoded(self):
        file = io.BytesIO()
        PIL.Image.new("L", (8, 8)).save(file, "JPEG")
        content = file.getvalue()
        frame = content.index(b"\xff\xc0") + 5
        content = content[:frame] + b"\xff\x00\xff\x00" + content[frame + 4 :]  # height and width
        with pytest.raises(tf.errors.InvalidArgumentError, match="too many pixels"):
            preprocessing.single_crop(content, image_size=8, channels=1)

    @pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (1, 1), (2, 3)])
    def test_an_image_of_any_shape_has_crops(self, size):
        pixels = np.random.default_rng(0).integers(0, 256, (*size, 1), "uint8")
        encoded, options = tf.io.encode_png(pixels), {"image_size": 16, "channels": 1}
        if 30_000 in size:
            assert (preprocessing.single_crop(encoded, **options).numpy() == pixels.reshape(-1)[14_999]).all()
        for seed in range(20):
            crop = preprocessing.random_crop(preprocessing.uniform_draws((0, seed)))
            assert preprocessing.training_crop(encoded, crop, **options).shape == (16, 16, 1)


class TestCrop:
    def crops(self, height, width, count=500):
        draws = preprocessing.uniform_draws((0, 1), count)
        crops = tf.data.Dataset.from_tensor_slices(preprocessing.random_crop(draws))
        windows = crops.map(lambda crop: preprocessing.crop_window((height, width), crop))
        return np.array(list(windows.as_numpy_iterator()))

    @pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (60, 400), (3, 2), (1, 1)])
    def test_it_lies_in_the_image(self, height, width):
        top, left, tall, wide = self.crops(height, width, 100).T
        assert (top >= 0).all() and (left >= 0).all() and (tall >= 1).all() and (wide >= 1).all()
        assert (top + tall <= height).all() and (left + wide <= width).all()

    def test_areas_are_even_from_8_to_100_percent_and_aspects_from_3_4_to_4_3(self):
        top, left, tall, wide = self.crops(400, 400).T
        area, aspect = tall * wide / 400**2, wide / tall
        assert area.min() > 0.075 and area.max() <= 1 and aspect.min() > 0.73 and aspect.max() < 1.36
        quarters = np.histogram(area, [0.08, 0.31, 0.54, 0.77, 1.001])[0]
        assert (abs(quarters - 125) < 3.5 * np.sqrt(500 * 0.25 * 0.75)).all(), quarters
        assert 0.45 < (aspect > 1).mean() < 0.55
        assert 0.45 < np.mean(top[tall < 300] / (400 - tall[tall < 300])) < 0.55
        assert 0.45 < np.mean(left[wide < 300] / (400 - wide[wide < 300])) < 0.55

    def test_where_none_fits_it_is_the_whole_image(self):
        assert ((self.crops(20, 400, 20) == (0, 0, 20, 400)).all(-1)).any()

    def test_the_pixels_are_pillows(self):
        """A JPEG decoded around the crop and resized is the decoded image cropped, mirrored and resized by Pillow."""
        from PIL import Image

        smooth = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
        photograph = Image.fromarray(smooth).resize((160, 120), Image.BICUBIC)
        file = io.BytesIO()
        photograph.save(file, "JPEG", quality=95)
        decoded, mirrors = Image.open(file).convert("RGB"), 0
        for seed in range(20):
            random = preprocessing.random_crop(preprocessing.uniform_draws((seed, 0)))
            top, left, height, width = preprocessing.crop_window((120, 160), random).numpy()
            image = preprocessing.training_crop(file.getvalue(), random, image_size=224, channels=3).numpy()
            crop = decoded.crop((left, top, left + width, top + height)).resize((224, 224), Image.BILINEAR)
            crop = np.asarray(crop, np.float32)
            mirrored = abs(image - crop[:, ::-1]).mean() < abs(image - crop).mean()
            mirrors += mirrored
            # Pillow rounds to bytes, and its chroma upsampling at a crop's border is the whole image's.
            assert abs(image - (crop[:, ::-1] if mirrored else crop)).mean() < 1.5
        assert 3 < mirrors < 17

    @pytest.mark.parametrize("interpolation", typing.get_args(Interpolation))
    def test_no_interpolation_leaves_the_range_of_bytes(self, interpolation):
        """Bicubic and Lanczos overshoot at an edge: -20 would be 236 as a byte."""
        edge = np.repeat([[0, 255]], 8, 1)[..., None].repeat(16, 0).astype(np.uint8)
        image = preprocessing.resize(edge, 64, interpolation).numpy()
        assert image.shape == (64, 64, 1)
        assert image.min() == 0 and image.max() == 255
        assert abs(preprocessing.to_bytes(image).numpy() - image).max() <= 0.5


class TestPhotometricDistortion:
    images = np.random.default_rng(0).uniform(60, 190, (5, 4, 3, 3)).astype("float32")

    def distort(self, moves, amount="full", images=None):
        """Distorts by brightness, hue, saturation and contrast moves in [-1, 1]; returns pixels in [0, 255]."""
        images = self.images if images is None else images
        draws = np.zeros((len(images), preprocessing.DRAWS), "float32")
        draws[:, -4:] = (np.array(moves) + 1) / 2

        def distort(images, draws):
            colors = photometric_distortion.random_colors(draws, amount, images.shape[-1])
            return photometric_distortion.distort_colors(images, colors)

        distorted = distort(images, draws).numpy()
        one_by_one = [distort(image, draw) for image, draw in zip(images, draws, strict=True)]
        np.testing.assert_allclose(distorted, one_by_one, atol=1e-6)
        return (distorted + 1) * 127.5

    def test_no_move_is_no_change(self):
        np.testing.assert_allclose(self.distort((0, 0, 0, 0)), self.images, atol=1e-3)

    def test_none_of_it_is_no_change(self):
        np.testing.assert_allclose(self.distort((1, 0.7, -0.9, 0.5), "none"), self.images, atol=1e-3)

    def test_brightness_adds_up_to_32(self):
        np.testing.assert_allclose(self.distort((1, 0, 0, 0)), self.images + 32, atol=1e-3)
        np.testing.assert_allclose(self.distort((1, 0, 0, 0), "reduced"), self.images + 16, atol=1e-3)

    def test_contrast_is_tensorflows(self):
        expected = tf.image.adjust_contrast(self.images, 1.25)
        np.testing.assert_allclose(self.distort((0, 0, 0, 0.5)), expected, atol=1e-3)
        gray = self.images.mean(-1, keepdims=True)
        expected = tf.image.adjust_contrast(gray, 1.25)
        np.testing.assert_allclose(self.distort((0, 0, 0, 0.5), images=gray), expected, atol=1e-3)

    def test_hue_and_saturation_are_tensorflow_addons(self):
        """Its reference values (version 0.23.0), of which those with scale_value 1 are hue and saturation alone."""
        golden = np.load(ROOT / "tests" / "golden" / "hsv_in_yiq.npz")
        matrix = photometric_distortion.hue_saturation_matrix(
            golden["delta_hue_radians"], golden["scale_saturation"]
        ).numpy()
        adjusted = np.einsum("nij,nhwj->nhwi", matrix, golden["image"]) * golden["scale_value"][:, None, None, None]
        np.testing.assert_allclose(adjusted, golden["adjusted"], atol=1e-6)

    def test_all_at_once_is_hue_and_saturation_then_contrast_then_brightness(self):
        moves = (0.4, -0.5, 0.6, 0.3)
        matrix = photometric_distortion.hue_saturation_matrix(-0.5 * 0.4 * np.pi, 1 + 0.6 * 0.5).numpy()
        turned = self.images @ matrix.T
        mean = turned.mean((1, 2), keepdims=True)
        expected = (turned - mean) * 1.15 + mean + 0.4 * 32
        np.testing.assert_allclose(self.distort(moves), np.clip(expected, 0, 255), atol=1e-3)

    def test_it_is_clipped_to_the_networks_range(self):
        bright = self.distort((1, 0, 0, 0), images=np.full((1, 2, 2, 3), 250, "float32"))
        np.testing.assert_allclose(bright, 255, atol=1e-3)

    def test_hue_and_saturation_keep_the_luma(self):
        changed = self.distort((0, 0.7, -0.9, 0), "reduced")
        luma = np.array(preprocessing.RGB_TO_YIQ[0])
        assert not np.allclose(changed, self.images, atol=1)
        np.testing.assert_allclose(changed @ luma, self.images @ luma, atol=1e-2)

    def test_in_the_model_it_is_the_hosts(self, dataset):
        (images, labels), *_ = batches(dataset, 1)
        options = dataclasses.replace(OPTIONS, distort_on="device")
        (inputs, other_labels), *_ = training_batches(dataset, options, batch_size=7, seed=3).take(1)
        assert inputs[0].dtype == tf.uint8
        layer = photometric_distortion.PhotometricDistortion("reduced")
        assert layer.get_config()["amount"] == "reduced"
        np.testing.assert_array_equal(labels, other_labels)
        np.testing.assert_allclose(layer(inputs), images, atol=1e-6)

    def test_the_layer_is_part_of_a_saved_model(self, tmp_path):
        images, draws = keras.Input((4, 4, 3), dtype="uint8"), keras.Input((preprocessing.DRAWS,))
        model = keras.Model([images, draws], photometric_distortion.PhotometricDistortion("full")([images, draws]))
        inputs = [tf.cast(self.images[:, :3, :3], tf.uint8), preprocessing.uniform_draws((1, 2), 5)]
        inputs[0] = tf.pad(inputs[0], ((0, 0), (0, 1), (0, 1), (0, 0)))
        model.save(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(again(inputs), model(inputs))
        colors = photometric_distortion.random_colors(inputs[1], "full", 3)
        np.testing.assert_array_equal(model(inputs), photometric_distortion.distort_colors(inputs[0], colors))
