"""What the converter does with mutated images and archives, kills at random, remote folders, and clusters.

An image is either stored with the size and channels that decoders see, or named as bad; an archive is either refused or
gives only bytes that are in it. Nothing hangs, nothing else is raised.
"""

import hashlib
import importlib.util
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import miniature_release
from conftest import ROOT, run_program

from data_prep import convert, ilsvrc2012, image, image_folder, plan, tar, tfrecord, verify
from data_prep.errors import InputError

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
        except image.BadImageError:
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


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=SLOW)])
def test_mutated_devkits_and_annotations_are_refused_or_read_as_they_were(tmp_path, count):
    release = miniature_release.write(tmp_path)
    devkit = (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").read_bytes()
    boxes = (tmp_path / "ILSVRC2012_bbox_train_v2.tar.gz").read_bytes()
    found = ilsvrc2012.Found()
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


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=SLOW)])
def test_killed_at_random_places_the_output_is_the_same_to_the_byte(tmp_path, kills):
    """Each conversion is killed again and again until one run gets through; every file of the output is compared."""
    (tmp_path / "release").mkdir()
    miniature_release.write(tmp_path / "release", images_a_class=40)

    def command(name):
        flags = "--on_bad=skip", "--train_shards=30", "--workers=2", "--max_side=40"
        where = f"--imagenet={tmp_path}/release", f"--output_dir={tmp_path / name}"
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
        process = subprocess.Popen(command(str(name)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            _, errors = process.communicate(timeout=draw.uniform(0.1, 1.2) * took)
            assert process.returncode == 0, errors
            assert contents(str(name)) == truth
            name += 1
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
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


def test_remote_inputs_and_outputs_go_through_fsspec(tmp_path):
    fsspec = pytest.importorskip("fsspec")
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


@pytest.mark.skipif(not importlib.util.find_spec("apache_beam"), reason="needs the extra [beam]")
def test_beam_writes_the_same_bytes(tmp_path):
    (tmp_path / "release").mkdir()
    miniature_release.write(tmp_path / "release")
    command = [sys.executable, "-m", "data_prep", f"--imagenet={tmp_path}/release", "--on_bad=skip"]
    for name, flags in (("local", []), ("beam", ["--runner=beam"])):
        result = subprocess.run(
            [*command, *flags, f"--output_dir={tmp_path / name}"], cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
    assert subprocess.run(["diff", "-r", tmp_path / "local", tmp_path / "beam"]).returncode == 0


@pytest.mark.skipif(not importlib.util.find_spec("tensorflow_datasets"), reason="needs tensorflow-datasets")
def test_tensorflow_datasets_opens_the_folder(converted):
    release, output = converted
    code = (
        "import sys, tensorflow_datasets as tfds\n"
        "builder = tfds.builder_from_directory(sys.argv[1])\n"
        "for split in ('train', 'validation'):\n"
        "    for example in tfds.as_numpy(builder.as_dataset(split=split)):\n"
        "        name = builder.info.features['image/class/label'].int2str(int(example['image/class/label']))\n"
        "        assert name.encode() == example['image/class/synset']\n"
        "        assert example['image/encoded'].shape == (example['image/height'], example['image/width'], 3)\n"
        "        print(example['image/filename'].decode())\n"
    )
    result = run_program("-c", code, output)
    assert set(result.stdout.split()) == release.train.keys() | release.validation.keys(), result.stderr


@pytest.mark.skipif(not importlib.util.find_spec("tfrecord"), reason="needs the package tfrecord")
def test_the_tfrecord_package_reads_every_record_back_equal(converted):
    release, output = converted
    code = (
        "import glob, sys, hashlib\n"
        "from tfrecord.reader import tfrecord_loader\n"
        "kinds = {'image/encoded': 'byte', 'image/class/label': 'int', 'image/filename': 'byte'}\n"
        "for shard in glob.glob(sys.argv[1] + '/*-of-*'):\n"
        "    for record in tfrecord_loader(shard, None, kinds):\n"
        "        digest = hashlib.sha256(bytes(record['image/encoded'])).hexdigest()\n"
        "        print(bytes(record['image/filename']).decode(), int(record['image/class/label'][0]), digest)\n"
    )
    lines = run_program("-c", code, output).stdout.splitlines()
    read = {name: (int(label), digest) for name, label, digest in map(str.split, lines)}
    truth = release.train | release.validation
    assert read.keys() == truth.keys()
    for name, (index, content) in truth.items():
        assert read[name][0] == 1 + index
        assert name in release.repaired or read[name][1] == hashlib.sha256(content).hexdigest()


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
