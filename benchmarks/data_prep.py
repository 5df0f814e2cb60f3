"""Images a second of the converter, beside TF-Slim's way and TensorFlow Datasets' writer on the same JPEGs.

  python benchmarks/data_prep.py                  prints a Markdown table; ten minutes on two cores, 14 GB

The input is a tar of class tars of JPEGs (500 x 375, as ImageNet's median), just written, so that it is in the page
cache; inputs and outputs are in memory (/dev/shm), and one row writes to a disk. TF-Slim's way, as in
build_imagenet_data.py: read the file, decode the image to check it and learn its size, build the tf.train.Example,
write it with TFRecordWriter. TFDS: its writer and Image feature, given decoded images, which it encodes again, or open
files, which it copies, if tensorflow-datasets is installed. The same images as a zip, a deflated zip and Parquet, both
as Hugging Face's datasets writes it and compressed by Snappy, stand beside unpacking the zips first, and beside what
datasets takes to load its Parquet and read its files without decoding them. Each way is one process, but for "2
workers"; starting Python and importing are not measured, planning and starting workers are. Rounds alternate between
the ways.

The images are parts of photographs. zlib stores most of an ordinary JPEG as it is, so isal inflates one of 80 kB in 53
us. Of noise, or of the same photographs at quality 99, it takes 270 us.
"""

import contextlib
import functools
import importlib.util
import io
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

from absl import app, flags

ROOT = Path(__file__).parents[1]
FLAGS = flags.FLAGS
flags.DEFINE_integer("images", 20_000, "Images to convert with data_prep; the slower ways take a twentieth.", 400)
flags.DEFINE_integer("rounds", 7, "Rounds; the table shows the median.", 1)
flags.DEFINE_string("folder", "/dev/shm", "Where inputs and outputs go.")
flags.DEFINE_string("disk", tempfile.gettempdir(), "A folder on a disk, for the row that writes to one.")

CLASSES = 20
ZIPS = {"zip": zipfile.ZIP_STORED, "deflated zip": zipfile.ZIP_DEFLATED}


def make_jpegs(count):
    """Parts of 500 x 375 pixels of scikit-learn's two photographs, as JPEGs."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    draw, photos = np.random.default_rng(0), load_sample_images().images
    for number in range(count):
        photo, file = photos[number % 2], io.BytesIO()
        top, left = (int(draw.integers(side - part)) for side, part in zip(photo.shape, (375, 500), strict=False))
        Image.fromarray(photo[top : top + 375, left : left + 500]).save(file, "JPEG", quality=95)
        yield file.getvalue()


def tar_of(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def write_inputs(folder, pool):
    """train.tar, a tar of class tars, and a small validation.tar of class folders; returns their paths."""
    names = [f"n{10_000_000 + index}" for index in range(CLASSES)]
    tars = {}
    for index, name in enumerate(names):
        numbers = range(index, FLAGS.images, CLASSES)
        tars[f"{name}.tar"] = tar_of({f"{name}_{n}.JPEG": pool[n % len(pool)] for n in numbers})
    train, validation = folder / "train.tar", folder / "validation.tar"
    train.write_bytes(tar_of(tars))
    validation.write_bytes(tar_of({f"{name}/{name}_1.JPEG": pool[0] for name in names}))
    return train, validation


def write_forms(folder, pool):
    """The same images in class folders of a zip, of a deflated zip, and as Parquet: form -> paths of both splits."""
    names = [f"n{10_000_000 + index}" for index in range(CLASSES)]
    splits = {
        "train": [(names[n % CLASSES], n, pool[n % len(pool)]) for n in range(FLAGS.images)],
        "validation": [(name, 1, pool[0]) for name in names],
    }
    forms = {}
    for form, method in ZIPS.items():
        forms[form] = [folder / f"{split}-{method}.zip" for split in splits]
        for path, images in zip(forms[form], splits.values(), strict=True):
            with zipfile.ZipFile(path, "w", method) as archive:
                for name, number, content in images:
                    archive.writestr(f"{name}/{name}_{number}.JPEG", content)
    with contextlib.suppress(ImportError):
        import pyarrow
        from pyarrow import parquet

        ways = {"Parquet": {"compression": "none", "use_dictionary": False}, "Parquet by Snappy": {}}
        for form, options in ways.items():
            forms[form] = [folder / f"{split}-{len(options)}.parquet" for split in splits]
            for path, images in zip(forms[form], splits.values(), strict=True):
                label = pyarrow.array([names.index(name) for name, *_ in images])
                files = pyarrow.StructArray.from_arrays(
                    [
                        pyarrow.array([content for *_, content in images], pyarrow.large_binary()),
                        pyarrow.array([f"{name}_{number}.JPEG" for name, number, _ in images]),
                    ],
                    ["bytes", "path"],
                )
                table = pyarrow.table({"image": files, "label": label})
                parquet.write_table(table, path, row_group_size=100, **options)
    return forms


def unzip_first(folder, inputs, workers):
    """Unpacks both archives to folders, and converts these."""
    started = time.perf_counter()
    folders = [folder / path.stem for path in inputs]
    for path, target in zip(inputs, folders, strict=True):
        shutil.unpack_archive(path, target)
    unpacking = time.perf_counter() - started
    images, seconds = data_prep(folder / "out", folders, workers)
    return images, unpacking + seconds


def hugging_face(folder, inputs):
    """Loads Parquet as `datasets` does, into Arrow files of its own, and reads every file of both splits."""
    import datasets

    count = 0
    for path in inputs:
        held = datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(folder), split="train")
        for row in held.with_format("arrow").iter(100):
            count += len(row["image"].combine_chunks().field("bytes").to_pylist())
    return (count,)


# In a process of its own, as a person runs it: in this one TensorFlow's threads would forbid workers by fork.
CONVERSION = """
import sys, time
from data_prep import convert, plan
from data_prep.sources import ilsvrc2012
train, validation, output, workers = sys.argv[1:]
started = time.perf_counter()
found = ilsvrc2012.find("", {"train": train, "validation": validation})
data = ilsvrc2012.dataset(found, unpacked=output + "/.data_prep/unpacked")
convert.convert(data, output, plan.Options(train_shards=16), workers=int(workers), log=lambda line: None)
print(time.perf_counter() - started)
"""


def data_prep(folder, inputs, workers):
    """Our converter with its defaults: every shard synced and read back."""
    command = [sys.executable, "-c", CONVERSION, *map(str, inputs), str(folder), str(workers)]
    ran = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return FLAGS.images + CLASSES, float(ran.stdout)


def disk_alone(folder, inputs):
    """The same bytes, written in blocks of 1 MiB and synced: what the disk allows."""
    with inputs[0].open("rb") as source, (folder / "copy").open("wb", buffering=0) as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
        os.fsync(copy.fileno())
    return (FLAGS.images,)


def write_files(folder, pool):
    """The pool as files; returns their paths."""
    paths = [folder / f"n01440764_{number}.JPEG" for number in range(len(pool))]
    for path, content in zip(paths, pool, strict=True):
        path.write_bytes(content)
    return [str(path) for path in paths]


def tf_slim(folder, paths, count):
    import tensorflow as tf

    def feature(value):
        if isinstance(value, bytes):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))

    with tf.io.TFRecordWriter(str(folder / "train-00000-of-00001")) as writer:
        for number in range(count):
            with tf.io.gfile.GFile(paths[number % len(paths)], "rb") as file:
                content = file.read()
            height, width, channels = tf.io.decode_jpeg(content, channels=3).shape
            values = {
                "image/encoded": content,
                "image/format": b"JPEG",
                "image/colorspace": b"RGB",
                "image/channels": channels,
                "image/height": height,
                "image/width": width,
                "image/filename": b"n01440764_10026.JPEG",
                "image/class/label": 1,
                "image/class/synset": b"n01440764",
                "image/class/text": b"tench, Tinca tinca",
            }
            features = tf.train.Features(feature={name: feature(value) for name, value in values.items()})
            writer.write(tf.train.Example(features=features).SerializeToString())
    return (count,)


@functools.cache
def tfds_builder():
    """A builder class of TFDS for a pool of images; TFDS allows only one of a name."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    class Pool(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        images, decoded = (), False

        def _info(self):
            image, label = tfds.features.Image(encoding_format="jpeg"), tfds.features.ClassLabel(num_classes=1000)
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"image": image, "label": label})
            )

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number, content in enumerate(self.images):
                image = tf.io.decode_jpeg(content).numpy() if self.decoded else io.BytesIO(content)
                yield number, {"image": image, "label": number % 1000}

    return Pool


def tfds_writer(folder, pool, count, decoded=False):
    builder = tfds_builder()(data_dir=str(folder))
    builder.decoded = decoded
    builder.images = [pool[number % len(pool)] for number in range(count)]
    with contextlib.redirect_stdout(sys.stderr):  # the tables are alone on stdout
        builder.download_and_prepare()
    return (count,)


def measure(way, *arguments, parent=None):
    """Images a second of wall time, and of CPU time of this process and its children with their start.

    A way returns how many images it wrote, and the seconds it took if that is not the time of the call.
    """
    folder = Path(tempfile.mkdtemp(dir=parent or FLAGS.folder))

    def cpu():
        return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

    try:
        started, used = time.perf_counter(), cpu()
        images, *seconds = way(folder, *arguments)
        wall = seconds[0] if seconds else time.perf_counter() - started
        return images / wall, images / (cpu() - used)
    finally:
        shutil.rmtree(folder)


def main(_):
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    folder = Path(tempfile.mkdtemp(dir=FLAGS.folder))
    try:
        pool = list(make_jpegs(200))
        inputs, paths = write_inputs(folder, pool), write_files(folder, pool)
        few = max(FLAGS.images // 20, 100)
        one, two, slim = "data_prep, 1 worker", "data_prep, 2 workers", "TF-Slim's way"
        ways = {one: (data_prep, inputs, 1), two: (data_prep, inputs, 2), slim: (tf_slim, paths, few)}
        try:
            import tensorflow_datasets  # noqa: F401

            ways["TFDS's writer, given images"] = (tfds_writer, pool, few, True)
            ways["TFDS's writer, given files"] = (tfds_writer, pool, few)
        except ImportError:
            print("tensorflow-datasets is not installed: its rows are left out", file=sys.stderr)
        forms = write_forms(folder, pool)
        ways |= {f"data_prep of a {form}, 1 worker": (data_prep, paths, 1) for form, paths in forms.items()}
        ways |= {f"unpack the {z} first, then data_prep, 1 worker": (unzip_first, forms[z], 1) for z in ZIPS}
        if "Parquet" in forms and importlib.util.find_spec("datasets"):
            ways["Hugging Face's datasets: load Parquet, read its files"] = (hugging_face, forms["Parquet"])
        ways["data_prep, 2 workers, to the disk"] = (data_prep, inputs, 2)
        ways["the disk alone: write and sync"] = (disk_alone, inputs)
        disks = {name: FLAGS.disk for name in ways if "disk" in name}
        for way in ways.values():  # imports and first calls are not measured
            if few in way:
                measure(*(100 if argument == few else argument for argument in way))
        rounds = [
            {name: measure(*way, parent=disks.get(name)) for name, way in ways.items()} for _ in range(FLAGS.rounds)
        ]

        def ratio(name, to, kind):
            return statistics.median(r[name][kind] / r[to][kind] for r in rounds)

        size = statistics.mean(map(len, pool)) / 1e3
        print(f"\n{FLAGS.images:,} JPEGs of {size:.0f} kB, median of {FLAGS.rounds} rounds, {os.cpu_count()} cores\n")
        print("| | images/s | data_prep, 1 worker, against it | images per CPU second | likewise |")
        print("|---|---|---|---|---|")
        for name in ways:
            wall, cpu = (statistics.median(r[name][kind] for r in rounds) for kind in (0, 1))
            print(f"| {name} | {wall:,.0f} | {ratio(one, name, 0):.2f} | {cpu:,.0f} | {ratio(one, name, 1):.2f} |")
        print(f"\nTwo workers convert {ratio(two, one, 0):.2f} times as many images a second as one.")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    app.run(main)
