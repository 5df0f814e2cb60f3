"""What the converter does with mutated images and archives, kills at random, remote folders, and clusters.

An image is either stored with the size and channels that decoders see, or named as bad; an archive is either refused or
gives only bytes that are in it. Nothing hangs, nothing else is raised.
"""

import hashlib
import importlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
import zipfile

import google_crc32c
import miniature_release
import numpy as np
import pytest
from conftest import ROOT, run_program
from PIL import Image

from data_prep import convert, plan, storage, verify
from data_prep.errors import BadImageError, InputError
from data_prep.formats import image, tfrecord
from data_prep.sources import archives, dataset, ilsvrc2012, image_folder, tar

SLOW = pytest.mark.slow


def encoded(kind, mode="RGB", **options):
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    with Image.open(io.BytesIO(miniature_release.jpeg(rng, size=(40, 33)))) as picture:
        picture.convert(mode).save(file, kind, **options)
    return file.getvalue()


SEEDS = [
    encoded("JPEG"),
    encoded("JPEG", quality=50, subsampling=0),
    encoded("JPEG", "L"),
    encoded("JPEG", progressive=True),
    encoded("JPEG", optimize=True, restart_marker_blocks=2),
    encoded("JPEG", "CMYK"),
    encoded("PNG"),
    encoded("PNG", "L"),
    encoded("PNG", "P"),
    encoded("GIF", "P"),
    encoded("BMP"),
    encoded("WEBP"),
]


def mutated(draw: random.Random, content: bytes, others: list[bytes]) -> bytes:
    """Flips bits (more of them in the first 700 bytes), cuts, splices with another file, or replaces a stretch."""
    changed = bytearray(content)
    kind = draw.randrange(6)
    at = draw.randrange(len(changed))
    if kind < 3:
        for _ in range(draw.choice((1, 1, 2, 8))):
            place = draw.randrange(len(changed) if draw.random() < 0.5 else min(len(changed), 700))
            changed[place] ^= 1 << draw.randrange(8)
    elif kind == 3:
        del changed[at:]
    elif kind == 4:
        other = draw.choice(others)
        changed[at:] = other[draw.randrange(len(other)) :]
    else:
        changed[at : at + draw.randrange(1, 64)] = draw.randbytes(draw.randrange(64))
    return bytes(changed)


@pytest.mark.parametrize("count", [1500, pytest.param(20_000, marks=SLOW)])
def test_mutated_images_are_stored_as_decoders_see_them_or_named_as_bad(count):
    import tensorflow as tf

    draw, stored = random.Random(0), 0
    for _ in range(count):
        content = mutated(draw, draw.choice(SEEDS), SEEDS)
        start = time.monotonic()
        try:
            result = image.prepare(content, "a.JPEG", image.Storage())
        except BadImageError:
            continue
        finally:
            assert time.monotonic() - start < 5
        stored += 1
        size = (result.height, result.width, result.channels)
        assert result.repaired or result.encoded == content
        assert tf.io.decode_jpeg(result.encoded).numpy().shape == size
        with Image.open(io.BytesIO(result.encoded)) as picture:
            picture.load()
            assert (picture.height, picture.width, len(picture.getbands())) == size
    assert 0.2 * count < stored < 0.5 * count


def names_by_tarfile(content):
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return archive.getnames()


@pytest.mark.parametrize("count", [1500, pytest.param(20_000, marks=SLOW)])
def test_mutated_archives_give_only_what_is_in_them_or_are_refused(count):
    """A header's checksum guards names and sizes, so a mutated archive lists the true members or raises InputError.

    That checksum is a plain sum: two flips can cancel each other. Such a header is true to any reader; Python's agrees.
    """
    members = {f"n{i:08}_{i}.JPEG": bytes((i,)) * (100 + 300 * i) for i in range(5)}
    whole = miniature_release.tar_of(members)
    nested = miniature_release.tar_of({"n00000001.tar": whole, "n00000002.tar": whole})
    truth = set(members) | {"n00000001.tar", "n00000002.tar"}
    draw = random.Random(0)
    refused = 0
    for _ in range(count):
        content = mutated(draw, draw.choice((whole, nested)), [whole, nested])

        def read(offset, size, content=content):
            return content[offset : offset + size]

        try:
            for member in tar.index(read, 0, len(content), "a.tar"):
                assert member.offset + member.size <= len(content)
                assert member.rejected or member.name in truth or member.name in names_by_tarfile(content)
        except InputError as error:
            refused += 1
            assert "a.tar" in str(error) and "\n" not in str(error)
    assert refused > 0.3 * count


MEMBERS = {f"{name}/{i:08}_{i}.jpg": bytes((i,)) * (100 + 300 * i) for i, name in enumerate(("ant", "bee") * 4)}


def write_zip(path, compression):
    return miniature_release.zip_of(path, {f"pets/{name}": content for name, content in MEMBERS.items()}, compression)


def write_parquet(path, compression):
    rows = [{"image": {"bytes": content, "path": name}, "label": name[:3]} for name, content in MEMBERS.items()]
    return miniature_release.write_parquet(path, rows, compression=compression, write_page_checksum=True)


def contents_by_pyarrow(path):
    assert path.suffix == ".parquet"
    table = importlib.import_module("pyarrow.parquet").read_table(path)
    return {row["image"]["bytes"] for row in table.to_pylist()}


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=SLOW)])
@pytest.mark.parametrize(
    ("write", "compression"),
    [
        (write_zip, zipfile.ZIP_STORED),
        (write_zip, zipfile.ZIP_DEFLATED),
        pytest.param(write_parquet, "none", marks=pytest.mark.needs("pyarrow")),
        pytest.param(write_parquet, "snappy", marks=pytest.mark.needs("pyarrow")),
    ],
    ids=["zip", "deflated zip", "parquet", "snappy parquet"],
)
def test_mutated_zip_and_parquet_give_only_images_that_are_in_them_or_are_refused(tmp_path, write, compression, count):
    """Zip has a checksum of each member, Parquet, where its writer is asked for them, of each page.

    Nothing guards a page's header: two flips can take away its checksum and change its page. Such a file holds other
    images to any reader; pyarrow, asked for all of it, agrees.
    """
    path = write(tmp_path / f"pets.{write.__name__[6:]}", compression)
    whole, truth = path.read_bytes(), {(name[:3], name[4:], content) for name, content in MEMBERS.items()}
    draw, unpacked, refused = random.Random(0), str(tmp_path / "unpacked"), 0
    for number in range(count):
        path.write_bytes(mutated(draw, whole, [whole]) if number else whole)
        storage.close_files()
        start, given, found = time.monotonic(), set(), dataset.Found()
        try:
            place = archives.locate(str(path))
            for listed in archives.images(place, archives.Unpacked(unpacked), found):
                try:
                    content = dataset.read_image(place.source(unpacked), listed)
                    given.add((listed.synset, listed.name, content))
                except BadImageError:
                    found.rejected.append((listed.path, "is damaged"))
        except InputError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
            continue
        finally:
            assert time.monotonic() - start < 5
        assert given <= truth or {content for *_, content in given} <= contents_by_pyarrow(path), number
        assert len(given) + len(found.rejected) == len(truth), number
        assert number or given == truth
    assert refused > 0.3 * count


@pytest.mark.parametrize("number", range(8))
def test_a_flipped_bit_in_the_folder_of_a_zips_name_takes_no_image_away(tmp_path, number):
    others = {"a/1.jpg": b"1"}, {"z/1.jpg": b"1"}
    files = others[0] | {f"pets/{name}": content for name, content in sorted(MEMBERS.items())} | others[1]
    path = miniature_release.zip_of(tmp_path / "a.zip", files)
    content = bytearray(path.read_bytes())
    name = f"pets/{sorted(MEMBERS)[number]}".encode()
    content[content.rindex(name)] ^= 1  # in the directory; the member's own header stays
    path.write_bytes(content)
    place = archives.locate(f"{path}/pets")
    with pytest.raises(InputError, match=r"a\.zip: damaged zip archive: no member 'qets/"):
        archives.images(place, archives.Unpacked(str(tmp_path)), dataset.Found())


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=SLOW)])
def test_mutated_devkits_and_annotations_are_refused_or_read_as_they_were(tmp_path, count):
    release = miniature_release.write(tmp_path)
    devkit = (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").read_bytes()
    boxes = (tmp_path / "ILSVRC2012_bbox_train_v2.tar.gz").read_bytes()
    found = dataset.Found()
    true_devkit = ilsvrc2012.read_devkit(str(tmp_path / "ILSVRC2012_devkit_t12.tar.gz"))
    true_boxes = dict(ilsvrc2012.read_boxes(str(tmp_path / "ILSVRC2012_bbox_train_v2.tar.gz"), found))
    assert not found.rejected and release.boxes.keys() > {
        name for name, listed in true_boxes.items() if len(listed) > 1
    }
    draw, path = random.Random(0), tmp_path / "mutated.tar.gz"
    for _ in range(count):
        for content, read, truth in (
            (devkit, ilsvrc2012.read_devkit, true_devkit),
            (boxes, lambda name: dict(ilsvrc2012.read_boxes(name, found)), true_boxes),
        ):
            path.write_bytes(mutated(draw, content, [devkit, boxes]))
            try:
                assert read(str(path)) == truth
            except InputError as error:
                assert str(path) in str(error)


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=SLOW)])
def test_verify_finds_every_mutation_of_a_shard(tmp_path, count):
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(3):
                (tmp_path / split / name / f"{number}.jpg").write_bytes(miniature_release.jpeg(rng))
    output = tmp_path / "out"
    data = image_folder.dataset(str(tmp_path / "train"), str(tmp_path / "validation"))
    convert.convert(data, str(output), plan.Options(train_shards=1), log=lambda line: None)
    shard = output / "train-00000-of-00001"
    whole = shard.read_bytes()
    draw = random.Random(0)
    assert verify.verify(str(output), decode=False, workers=1) == ([], 12)
    for _ in range(count):
        content = mutated(draw, whole, [whole])
        if content != whole:
            shard.write_bytes(content)
            findings, _ = verify.verify(str(output), decode=False, workers=1)
            assert findings and str(shard) in findings[0]


def write_kaggles_zip(release, folder):
    miniature_release.extract_as_kaggle(release, folder / "tree")
    files = (path for path in sorted((folder / "tree").rglob("*")) if path.is_file())
    members = {str(path.relative_to(folder / "tree")): path.read_bytes() for path in files}
    path = folder / "imagenet-object-localization-challenge.zip"
    return miniature_release.zip_of(path, members, zipfile.ZIP_DEFLATED)


def write_hugging_faces_parquet(release, folder):
    """Training images are copied out, validation images are read where they are."""
    for split, images, compression in (
        ("train", release.train, "snappy"),
        ("validation", release.validation, "none"),
    ):
        rows = [
            {"image": {"bytes": content, "path": name}, "label": index} for name, (index, content) in images.items()
        ]
        path, options = folder / f"data/{split}-00000-of-00001.parquet", {"compression": compression}
        miniature_release.write_parquet(path, rows, miniature_release.WORDS, write_page_checksum=True, **options)
    return folder


FORMS = {
    "tar": lambda release, folder: release.folder,
    "zip": write_kaggles_zip,
    "parquet": write_hugging_faces_parquet,
}


@pytest.mark.parametrize(
    ("form", "kills"),
    [
        ("tar", 5),
        ("zip", 3),
        pytest.param("parquet", 3, marks=pytest.mark.needs("pyarrow")),
        *(pytest.param(f, 100, marks=SLOW) for f in FORMS),
    ],
)
def test_killed_at_random_places_the_output_is_the_same_to_the_byte(tmp_path, form, kills):
    """Each conversion is killed again and again until one run gets through; every file of the output is compared."""
    (tmp_path / "release").mkdir()
    (tmp_path / "form").mkdir()
    release = miniature_release.write(tmp_path / "release", images_a_class=40)
    place = FORMS[form](release, tmp_path / "form")

    def command(name):
        flags = "--on_bad=skip", "--train_shards=30", "--workers=2", "--max_side=40"
        where = f"--imagenet={place}", f"--output_dir={tmp_path / name}"
        return [sys.executable, "-m", "data_prep", *where, *flags]

    def contents(name):
        files = (path for path in (tmp_path / name).rglob("*") if path.is_file())
        return {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files}

    start = time.monotonic()
    subprocess.run(command("whole"), cwd=ROOT, check=True, capture_output=True)
    took = time.monotonic() - start
    truth = contents("whole")
    draw, killed, name = random.Random(0), 0, 0
    while killed < kills:
        fresh = not (tmp_path / str(name)).exists()
        start = time.monotonic()
        process = subprocess.Popen(command(str(name)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            _, errors = process.communicate(timeout=draw.uniform(0.1, 1.2) * took)
            assert process.returncode == 0, errors
            assert contents(str(name)) == truth
            name += 1
            if fresh:  # a machine that was busy at first would let no kill land
                took = min(took, time.monotonic() - start)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += (tmp_path / str(name)).exists()  # not while Python was starting
    result = subprocess.run(command(str(name)), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert contents(str(name)) == truth


def test_two_conversions_into_one_folder_are_refused(tmp_path):
    import fcntl

    miniature_release.write(tmp_path, dirty=False)
    command = [sys.executable, "-m", "data_prep", f"--imagenet={tmp_path}", f"--output_dir={tmp_path}/out"]
    (tmp_path / "out/.data_prep").mkdir(parents=True)
    with (tmp_path / "out/.data_prep/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 1 and "another conversion is running" in result.stderr
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.needs("fsspec")
def test_remote_inputs_and_outputs_go_through_fsspec(tmp_path):
    import fsspec

    release = miniature_release.write(tmp_path, dirty=False)
    miniature_release.extract_as_torchvision(release, tmp_path)
    remote = fsspec.filesystem("memory")
    for name in ("train", "val", "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"):
        remote.put(str(tmp_path / name), f"/in/{name}", recursive=True)
    where = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
    archives = ilsvrc2012.dataset(ilsvrc2012.find("memory://in", {p: f"memory://in/{n}" for p, n in where.items()}))
    local = ilsvrc2012.dataset(ilsvrc2012.find(str(tmp_path), {"train_boxes": "", "validation_boxes": ""}))
    trees = image_folder.dataset("memory://in/train", "memory://in/val")
    manifests = [
        convert.convert(data, output, log=lambda line: None)
        for data, output in ((archives, "memory://a"), (trees, "memory://b"), (local, str(tmp_path / "out")))
    ]
    (tmp_path / "out/dataset.json").unlink()
    shards = [shard for split in manifests[0]["splits"].values() for shard in split["shards"]]
    for shard in shards:
        content = remote.cat(f"/a/{shard['file']}")
        assert (
            len(content) == shard["bytes"]
            and len(list(tfrecord.read_records(io.BytesIO(content)))) == shard["examples"]
        )
    assert json.loads(remote.cat("/a/dataset.json")) == manifests[0]
    again = []
    convert.convert(archives, "memory://a", log=again.append)
    assert again == ["memory://a: already complete, nothing to do"]
    assert verify.verify("memory://a", decode=True, workers=1) == ([], 34)
    by_class = [[s["examples"] for s in m["splits"]["train"]["shards"]] for m in manifests]
    assert by_class[0] == by_class[1] == by_class[2]


@pytest.fixture
def converted(tmp_path):
    """The miniature release, and the folder it was converted into without its bad images."""
    release = miniature_release.write(tmp_path)
    data = ilsvrc2012.dataset(ilsvrc2012.find(str(tmp_path), {}))
    convert.convert(data, str(tmp_path / "out"), on_bad="skip", log=lambda line: None)
    return release, tmp_path / "out"


@pytest.mark.needs("apache_beam")
def test_beam_writes_the_same_bytes(tmp_path):
    """Also where what the validation images hold decides what is left out of training."""
    (tmp_path / "release").mkdir()
    release = miniature_release.write(tmp_path / "release")
    leak = next(content for name, (_, content) in release.train.items() if name not in release.repaired)
    contents = {name: content for name, (_, content) in release.validation.items()} | {min(release.validation): leak}
    (tmp_path / "release/ILSVRC2012_img_val.tar").write_bytes(miniature_release.tar_of(contents))
    command = [
        sys.executable,
        "-m",
        "data_prep",
        f"--imagenet={tmp_path}/release",
        "--on_bad=skip",
        "--duplicates=drop",
    ]
    for runner in ("local", "beam"):
        result = subprocess.run(
            [*command, f"--runner={runner}", f"--output_dir={tmp_path / runner}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
    assert subprocess.run(["diff", "-r", tmp_path / "local", tmp_path / "beam"]).returncode == 0
    assert (tmp_path / "beam/duplicates.tsv").exists()


# What readers of others must give back: file name, label and digest of the stored bytes, as a line.
PRINT = "print(name.decode(), int(label), hashlib.sha256(encoded).hexdigest())\n"


def assert_truth(release, output, result):
    """The lines printed by a reader are those of our records, which are those of the images' generator."""
    assert result.returncode == 0, result.stderr
    read = {name: (int(label), digest) for name, label, digest in map(str.split, result.stdout.splitlines())}
    truth = release.train | release.validation
    assert read.keys() == truth.keys() and len(result.stdout.splitlines()) == len(truth)
    stored = {}
    for shard in output.glob("*-of-*"):
        with shard.open("rb") as file:
            for _, data in tfrecord.read_records(file):
                example = tfrecord.decode_example(data)
                stored[example["image/filename"][0].decode()] = example["image/encoded"][0]
    for name, (index, content) in truth.items():
        assert read[name] == (1 + index, hashlib.sha256(stored[name]).hexdigest())
        assert name in release.repaired or stored[name] == content


@pytest.mark.needs("tensorflow_datasets")
def test_tensorflow_datasets_reads_every_record_back_equal(converted):
    code = (
        "import hashlib, sys, numpy as np, tensorflow as tf, tensorflow_datasets as tfds\n"
        "builder = tfds.builder_from_directory(sys.argv[1])\n"
        "raw = {'image/encoded': tfds.decode.SkipDecoding()}\n"
        "for split in ('train', 'validation'):\n"
        "    whole, bytes_ = (tfds.as_numpy(builder.as_dataset(split=split, decoders=d)) for d in (None, raw))\n"
        "    for example, stored in zip(whole, bytes_, strict=True):\n"
        "        name, label, encoded = (stored[f'image/{key}'] for key in ('filename', 'class/label', 'encoded'))\n"
        "        synset = builder.info.features['image/class/label'].int2str(int(label))\n"
        "        assert synset.encode() == example['image/class/synset']\n"
        "        assert example['image/encoded'].shape == (example['image/height'], example['image/width'], 3)\n"
        "        assert np.array_equal(example['image/encoded'], tf.io.decode_image(encoded, 3))\n"
        f"        {PRINT}"
    )
    release, output = converted
    assert_truth(release, output, run_program("-c", code, output))


@pytest.mark.needs("tfrecord")
def test_the_tfrecord_package_reads_every_record_back_equal(converted):
    code = (
        "import glob, hashlib, sys\n"
        "from data_prep.formats import tfrecord as ours\n"
        "from tfrecord.reader import tfrecord_loader\n"
        "for shard in glob.glob(sys.argv[1] + '/*-of-*'):\n"
        "    with open(shard, 'rb') as file:\n"
        "        examples = [ours.decode_example(data) for _, data in ours.read_records(file)]\n"
        "    for record, example in zip(tfrecord_loader(shard, None), examples, strict=True):\n"
        "        filled = {key: values for key, values in example.items() if values}\n"
        "        assert record.keys() >= filled.keys()\n"
        "        for key, values in filled.items():\n"
        "            read = [bytes(record[key])] if isinstance(values[0], bytes) else record[key].tolist()\n"
        "            assert read == values, key\n"
        "        name, (label,), encoded = (\n"
        "            bytes(record['image/filename']), record['image/class/label'], bytes(record['image/encoded']))\n"
        f"        {PRINT}"
    )
    release, output = converted
    assert_truth(release, output, run_program("-c", code, output))


def example_of(features):
    import tensorflow as tf

    example = tf.train.Example()
    for name, value in features.items():
        kind = "bytes_list" if isinstance(value, bytes) else "int64_list"
        getattr(example.features.feature[name], kind).value.append(value)
    return example.SerializeToString()


@pytest.mark.parametrize("count", [1500, pytest.param(20_000, marks=SLOW)])
def test_mutated_examples_under_right_checksums_are_findings_or_legal(tmp_path, count):
    """Who writes a damaged Example with a right checksum gets a finding at most; nothing else is raised."""
    whole = example_of({"image/encoded": SEEDS[0], "image/class/label": 1, "image/format": b"JPEG"})
    draw, path, damaged = random.Random(0), tmp_path / "train-00000-of-00001", 0
    for _ in range(count // 10):
        with path.open("wb") as file:
            shard = tfrecord.ShardWriter(lambda parts, file=file: file.write(b"".join(parts)))
            for _ in range(10):
                shard.write(mutated(draw, whole, [whole, *SEEDS]))
        findings, records = verify.verify(str(tmp_path), decode=False, workers=1)
        damaged += len(findings)
        assert records == 10
    assert damaged > 0.1 * count


def test_a_record_that_declares_an_enormous_length_is_a_finding(tmp_path):
    length = (1 << 62).to_bytes(8, "little")
    head = length + tfrecord._masked_crc32c(google_crc32c.value(length))
    (tmp_path / "train-00000-of-00001").write_bytes(head + bytes(100))
    findings, _ = verify.verify(str(tmp_path), decode=False, workers=1)
    assert len(findings) == 1 and "record 0 at byte 0 declares 4,611,686,018,427,387,904 bytes" in findings[0]


def test_an_image_that_may_not_be_read_is_bad_and_a_broken_disk_stops(tmp_path, monkeypatch):
    miniature_release.write(tmp_path, dirty=False)
    data = ilsvrc2012.dataset(ilsvrc2012.find(str(tmp_path), {}))
    real, error = storage.read_range, PermissionError(13, "Permission denied")

    def broken(path, offset, size):
        if path.endswith("img_val.tar") and offset == 512 and size > 512:
            raise error
        return real(path, offset, size)

    monkeypatch.setattr(storage, "read_range", broken)
    manifest = convert.convert(data, str(tmp_path / "a"), on_bad="skip", log=lambda line: None)
    assert manifest["splits"]["validation"]["examples"] == 9
    assert "ILSVRC2012_val_00000001.JPEG\tmay not be read" in (tmp_path / "a/bad.tsv").read_text()
    error = OSError(5, "Input/output error")
    with pytest.raises(OSError, match="Input/output error"):
        convert.convert(data, str(tmp_path / "b"), on_bad="skip", log=lambda line: None)
    assert not (tmp_path / "b/dataset.json").exists()


def test_a_damaged_journal_is_written_again_and_a_damaged_plan_named(converted):
    _, output = converted
    data = ilsvrc2012.dataset(ilsvrc2012.find(str(output.parent), {}))
    truth = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    for content in (b"", b"[]", b"{}", b'{"bytes"'):
        (output / ".data_prep/journal/train-00001-of-00004.json").write_bytes(content)
        convert.convert(data, str(output), on_bad="skip", log=lambda line: None)
        assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == truth
        (output / ".data_prep/plan.json").write_bytes(content)
        with pytest.raises(InputError, match=r"plan\.json: is damaged"):
            convert.convert(data, str(output), on_bad="skip", log=lambda line: None)
        (output / ".data_prep/plan.json").write_bytes(truth[output / ".data_prep/plan.json"])


def test_a_full_disk_in_a_tiny_file_system_is_one_line(tmp_path):
    """A real full disk, where the sandbox lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        (tmp_path / "release").mkdir()
        miniature_release.write(tmp_path / "release", dirty=False)
        command = [sys.executable, "-m", "data_prep", f"--imagenet={tmp_path}/release", f"--output_dir={disk}/out"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (
            result.returncode == 1 and "No space left on device" in result.stderr and "Traceback" not in result.stderr
        )
        assert not [name for name in os.listdir(disk / "out") if name.endswith(".tmp")]
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    finally:
        subprocess.run(["umount", disk], check=True)
