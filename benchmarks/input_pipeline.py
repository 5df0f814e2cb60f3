"""Training images a second of the input pipeline, beside bare decoding, TF-Slim's preprocessing and PyTorch's loader.

  python benchmarks/pipeline.py             prints Markdown tables; about two minutes on two cores

The input is records of 500 x 375 JPEGs of about 100 kB (ImageNet's median size), in memory or the page cache. Bare:
every image decoded around the crop that ours takes, which it is given, and resized to 224 x 224; no records, no order,
no draws. TF-Slim: the training preprocessing of inception_preprocessing.py (crop, bilinear resize, mirror, the four
distortions of tf.image in the first of its orders) run through tf.data as it is meant. PyTorch: a DataLoader whose
workers crop, resize, mirror and distort by the same draws with Pillow. Rounds alternate between the ways; ratios are
medians over rounds.

Then: equal batches at any parallelism and count of hosts, the start at a random step of a set of ImageNet's size, and
how well the order mixes.
"""

import hashlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from absl import app, flags

FLAGS = flags.FLAGS
PARTS = ("rates", "equal", "start", "order")
flags.DEFINE_multi_enum("part", PARTS, PARTS, "What to measure; by default all.")
flags.DEFINE_integer("images", 600, "Images a round of each way.", 64)
flags.DEFINE_integer("rounds", 5, "Rounds; the tables show the median.", 1)
flags.DEFINE_integer("cores", os.cpu_count(), "Parallel calls, and workers of the DataLoader.", 1)

SIZE, BATCH, SEED = 224, 32, 0
DISTINCT = 200
RECORDS = 2000  # of which an epoch is; ImageNet's shards have 1,251
SHARD = 250
READY = 8  # batches that a way may have prepared before it is asked for them


def make_jpegs(count):
    """JPEGs like photographs: smooth colors at three scales under fine noise, 500 x 375 pixels."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for _ in range(count):
        image = 128 + draw.normal(0, 9, (375, 500, 1))
        for cells, amplitude in ((6, 50), (24, 25), (96, 15)):
            noise = draw.normal(0, 1, (cells * 3 // 4, cells, 3)).astype("float32")
            noise = 0.4 * noise + noise.mean(-1, keepdims=True)
            planes = [Image.fromarray(noise[..., c]).resize((500, 375), Image.BICUBIC) for c in range(3)]
            image = image + amplitude * np.stack(planes, -1)
        file = io.BytesIO()
        Image.fromarray(np.clip(image, 0, 255).astype("uint8")).save(file, "JPEG", quality=93)
        yield file.getvalue()


def record(jpeg, label):
    """A serialized example in our schema."""
    import tensorflow as tf

    features = {
        "image/encoded": tf.train.Feature(bytes_list=tf.train.BytesList(value=[jpeg])),
        "image/class/label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
    }
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def write_records(folder, jpegs):
    """Shards of `SHARD` records in our schema and their manifest; returns the folder."""
    import tensorflow as tf

    shards = []
    for begin in range(0, RECORDS, SHARD):
        path = folder / f"train-{begin // SHARD:05}"
        with tf.io.TFRecordWriter(str(path)) as writer:
            for number in range(begin, begin + SHARD):
                writer.write(record(jpegs[number % len(jpegs)], number % 1000))
        shards.append({"file": path.name, "examples": SHARD, "bytes": path.stat().st_size})
    return write_manifest(folder, {"train": shards, "validation": shards[:1]})


def write_manifest(folder, splits):
    manifest = {
        "format": "bn_keras.dataset",
        "version": 1,
        "name": "photographs",
        "class_names": [str(k) for k in range(1000)],
        "label_base": 0,
        "channels": 3,
        "short_side": {"median": 375},
        "splits": {split: {"shards": shards} for split, shards in splits.items()},
    }
    (folder / "dataset.json").write_text(json.dumps(manifest))
    return str(folder)


def explicit(dataset):
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def bare(jpegs, windows):
    import tensorflow as tf

    def prepare(encoded, window):
        image = tf.image.resize(tf.image.decode_and_crop_jpeg(encoded, window, 3), (SIZE, SIZE))
        return tf.ensure_shape(image, (SIZE, SIZE, 3))

    data = tf.data.Dataset.from_tensor_slices((jpegs, windows)).repeat()
    return explicit(data.map(prepare, FLAGS.cores).batch(BATCH, drop_remainder=True).prefetch(2))


def tf_slim(dataset):
    import tensorflow as tf

    schema = {
        dataset.image_feature: tf.io.FixedLenFeature((), tf.string),
        dataset.label_feature: tf.io.FixedLenFeature((), tf.int64),
    }

    def prepare(number, record):
        features = tf.io.parse_single_example(record, schema)
        encoded, label = features[dataset.image_feature], features[dataset.label_feature]
        seed = tf.stack([number, tf.constant(SEED, tf.int64)])
        image = tf.image.convert_image_dtype(tf.image.decode_jpeg(encoded, 3), tf.float32)
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            tf.shape(image),
            tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            seed,
            min_object_covered=0.1,
            aspect_ratio_range=(0.75, 1.33),
            area_range=(0.05, 1.0),
            max_attempts=100,
            use_image_if_no_bounding_boxes=True,
        )
        image = tf.image.resize(tf.slice(image, begin, size), (SIZE, SIZE))
        image = tf.image.stateless_random_flip_left_right(tf.ensure_shape(image, (SIZE, SIZE, 3)), seed)
        image = tf.image.stateless_random_brightness(image, 32 / 255, seed)
        image = tf.image.stateless_random_saturation(image, 0.5, 1.5, seed)
        image = tf.image.stateless_random_hue(image, 0.2, seed)
        image = tf.image.stateless_random_contrast(image, 0.5, 1.5, seed)
        return (tf.clip_by_value(image, 0.0, 1.0) - 0.5) * 2.0, label

    data = tf.data.TFRecordDataset([shard.path for shard in dataset.splits["train"]]).repeat().enumerate()
    return explicit(data.map(prepare, FLAGS.cores).batch(BATCH, drop_remainder=True).prefetch(2))


class PillowImages:
    """A PyTorch data set: Pillow decodes, crops, resizes and mirrors; numpy distorts, by the draws that ours takes."""

    def __init__(self, jpegs, windows, draws, repeats):
        self.jpegs, self.windows, self.draws, self.repeats = jpegs, windows, draws, repeats

    def __len__(self):
        return len(self.jpegs) * self.repeats

    def __getitem__(self, number):
        import numpy as np
        import torch
        from PIL import Image, ImageEnhance

        number %= len(self.jpegs)
        top, left, height, width = (int(side) for side in self.windows[number])
        image = Image.open(io.BytesIO(self.jpegs[number])).convert("RGB")
        image = image.resize((SIZE, SIZE), Image.BILINEAR, (left, top, left + width, top + height))
        mirror, brightness, hue, saturation, contrast = self.draws[number]
        if mirror < 0.5:
            image = image.transpose(Image.FLIP_LEFT_RIGHT)
        image = ImageEnhance.Brightness(image).enhance(1 + (2 * brightness - 1) * 32 / 255)
        image = ImageEnhance.Color(image).enhance(0.5 + saturation)
        planes = image.convert("HSV").split()
        turn = round((2 * hue - 1) * 0.2 * 255)
        hues = planes[0].point([(value + turn) % 256 for value in range(256)])
        image = Image.merge("HSV", (hues, *planes[1:])).convert("RGB")
        image = ImageEnhance.Contrast(image).enhance(0.5 + contrast)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return pixels.float().div_(127.5).sub_(1.0)


def pytorch(jpegs, windows, draws):
    import torch

    each = FLAGS.images + READY * BATCH
    images = PillowImages(jpegs, windows, draws, 1 + (1 + FLAGS.rounds) * each // len(jpegs))
    return torch.utils.data.DataLoader(
        images, batch_size=BATCH, num_workers=FLAGS.cores, drop_last=True, persistent_workers=True
    )


def ours(dataset, distort_on):
    from bn_keras.input.options import InputOptions
    from bn_keras.input.pipeline import training_batches

    options = InputOptions(SIZE, photometric_distortion="full", distort_on=distort_on)
    return training_batches(dataset, options, batch_size=BATCH, seed=SEED)


def rate(iterator):
    """Images a second, once what lay ready is gone."""
    time.sleep(0.5)  # the way before this one still fills its buffers; PyTorch's workers took a third of what came next
    for _ in range(READY):
        next(iterator)
    started, count = time.perf_counter(), FLAGS.images // BATCH
    for _ in range(count):
        next(iterator)
    return count * BATCH / (time.perf_counter() - started)


def measure_rates(dataset, jpegs):
    from bn_keras.input import pipeline, preprocessing

    pipeline.PARALLEL_CALLS = FLAGS.cores
    draws = preprocessing.uniform_draws((SEED, 0), DISTINCT)
    windows = [preprocessing.crop_window((375, 500), preprocessing.random_crop(row)).numpy() for row in draws]
    ways = {
        "bare: decode around the crop, resize": bare(jpegs, windows),
        "ours, distortion on the host": ours(dataset, "host"),
        "ours, distortion in the model": ours(dataset, "device"),
        "TF-Slim's preprocessing": tf_slim(dataset),
    }
    try:
        ways["PyTorch DataLoader, Pillow"] = pytorch(jpegs, windows, draws[:, preprocessing.MIRROR :].numpy())
    except ImportError:
        print("torch is not installed: its row is left out", file=sys.stderr)
    # Going on all the time: a start, which reads eight shards before the first batch, is measured below.
    iterators = {name: iter(batches) for name, batches in ways.items()}
    rounds = [{name: rate(iterator) for name, iterator in iterators.items()} for _ in range(1 + FLAGS.rounds)][1:]
    against = list(ways)[1:3]
    size = statistics.mean(map(len, jpegs)) / 1e3
    print(f"\nJPEGs of {size:.0f} kB, {FLAGS.cores} cores, median of {FLAGS.rounds} rounds of {FLAGS.images} images\n")
    print("| | images/s | ours on the host against it | ours in the model against it |\n|---|---|---|---|")
    for name in ways:
        ratios = [statistics.median(r[own] / r[name] for r in rounds) for own in against]
        print(f"| {name} | {statistics.median(r[name] for r in rounds):,.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


def measure_start(folder, jpeg):
    """Seconds from making the pipeline at a random step of 1,281,167 examples in 1,024 shards to its first batch.

    Every shard is the same file of a shard's records, each of one JPEG, under another name; so they lie in the page
    cache, and nothing of a slow disk is in the seconds.
    """
    import numpy as np
    import tensorflow as tf

    from bn_keras import read_dataset
    from bn_keras.input.options import InputOptions
    from bn_keras.input.pipeline import training_batches

    counts = np.full(1024, 1_281_167 // 1024)
    counts[: 1_281_167 % 1024] += 1
    shards = []
    for count in sorted(set(counts)):
        with tf.io.TFRecordWriter(str(folder / f"records-{count}")) as writer:
            for _ in range(count):
                writer.write(record(jpeg, 0))
    for number, count in enumerate(counts):
        name = f"train-{number:05}-of-01024"
        os.link(folder / f"records-{count}", folder / name)
        shards.append({"file": name, "examples": int(count), "bytes": (folder / name).stat().st_size})
    write_manifest(folder, {"train": shards, "validation": shards[:1]})
    seconds = []
    for step in np.random.default_rng(0).integers(0, 6_000_000, 5):
        started = time.perf_counter()
        dataset = read_dataset(str(folder))
        batches = training_batches(dataset, InputOptions(SIZE), batch_size=BATCH, seed=SEED, start_step=int(step))
        next(iter(batches))
        seconds.append(time.perf_counter() - started)
    print(
        f"\nStart at a random step of 1,281,167 examples in 1,024 shards of {shards[0]['bytes'] / 1e6:.0f} MB, in the "
        f"page cache: first batch after {statistics.median(seconds):.1f} s (median of 5; longest {max(seconds):.1f} s)"
    )


def check_equal(dataset):
    """Whether batches are the same at parallelism 1, 2, 8 and shared by 1, 2, 4 hosts."""
    import numpy as np

    from bn_keras.input import pipeline
    from bn_keras.input.options import InputOptions

    def batches(hosts=1, host=0):
        found = pipeline.training_batches(
            dataset, InputOptions(SIZE), batch_size=BATCH, seed=SEED, start_step=3, hosts=hosts, host=host
        )
        return [[part.numpy() for part in batch] for batch in found.take(3)]

    def digest(batches):
        return hashlib.sha256(b"".join(part.tobytes() for batch in batches for part in batch)).hexdigest()

    found = {}
    for calls in (1, 2, 8):
        pipeline.PARALLEL_CALLS = calls
        found[f"parallelism {calls}"] = digest(batches())
    for hosts in (2, 4):
        shares = zip(*(batches(hosts, host) for host in range(hosts)), strict=True)
        joined = [
            [np.stack(parts, 1).reshape(BATCH, *parts[0].shape[1:]) for parts in zip(*share, strict=True)]
            for share in shares
        ]
        found[f"{hosts} hosts"] = digest(joined)
    equal = len(set(found.values())) == 1
    print(f"\nBatches are {'equal' if equal else 'NOT EQUAL'} at {', '.join(found)}")


def measure_order(folder):
    """How well the order mixes, beside a full permutation, on 102,400 examples in 64 shards."""
    import numpy as np
    import tensorflow as tf

    from bn_keras import read_dataset
    from bn_keras.input.training_order import training_records

    shards, each, classes = 64, 1600, 100
    total = shards * each
    with tf.io.TFRecordWriter(str(folder / "records")) as writer:
        for _ in range(each):
            writer.write(b"")
    listed = []
    for number in range(shards):
        os.link(folder / "records", folder / f"train-{number}")
        listed.append({"file": f"train-{number}", "examples": each, "bytes": (folder / "records").stat().st_size})
    dataset = read_dataset(write_manifest(folder, {"train": listed, "validation": listed[:1]}))

    def positions(shuffling):
        records = training_records(dataset, SEED, 0, shuffling=shuffling).map(lambda *r: r[2] * each + r[3])
        examples = np.concatenate(list(records.batch(1 << 12).take(2 * total // (1 << 12)).as_numpy_iterator()))
        return examples.reshape(2, total)

    random = np.random.default_rng(0)
    orders = {
        "within_shard": positions("within_shard"),
        "shard_order": positions("shard_order"),
        "full permutation": np.stack([random.permutation(total), random.permutation(total)]),
    }
    label_sets = {
        "shuffled shards": random.permutation(total) % classes,
        "shards in class order": np.arange(total) * classes // total,
    }
    print("\n| order | rank correlation of two epochs | together again | classes in 32, shuffled | in class order |")
    print("|---|---|---|---|---|")
    for name, (first, second) in orders.items():
        ranks = np.argsort(first), np.argsort(second)
        correlation = np.corrcoef(*ranks)[0, 1]
        batch_of = ranks[1] // BATCH
        pairs = batch_of[first.reshape(-1, BATCH)]
        together = (pairs[:, :, None] == pairs[:, None]).sum() - pairs.size
        mix = [np.mean([len(set(row)) for row in labels[first].reshape(-1, BATCH)]) for labels in label_sets.values()]
        print(
            f"| {name} | {correlation:+.3f} | {together / pairs.size / (BATCH - 1):.2%} | {mix[0]:.1f} | {mix[1]:.1f} |"
        )
    print(
        f"\nA random order of {shards} shards has a rank correlation of +-{shards**-0.5:.2f} by chance. Together "
        "again: of the other 31 examples of a mini-batch, those that share one in the next epoch too."
    )


def main(_):
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    from bn_keras import read_dataset

    jpegs = list(make_jpegs(DISTINCT))
    with tempfile.TemporaryDirectory() as root:
        folders = {name: Path(root, name) for name in ("photographs", "small", "large", "order")}
        for folder in folders.values():
            folder.mkdir()
        dataset = read_dataset(write_records(folders["photographs"], jpegs))
        if "rates" in FLAGS.part:
            measure_rates(dataset, jpegs)
        if "equal" in FLAGS.part:
            check_equal(dataset)
        if "start" in FLAGS.part:
            image = tf.image.resize(tf.io.decode_jpeg(jpegs[0]), (96, 128))
            measure_start(folders["small"], tf.io.encode_jpeg(tf.cast(image, tf.uint8)).numpy())
            measure_start(folders["large"], jpegs[0])  # ImageNet's size
        if "order" in FLAGS.part:
            measure_order(folders["order"])


if __name__ == "__main__":
    app.run(main)
