"""ILSVRC2012 in each of the forms people have it, against the truth that the miniature's generator keeps."""

import gzip
import io
import json
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
from conftest import run_program, start_program
from miniature_release import WNIDS, WORDS

from data_prep import ilsvrc2012, tfrecord


def data_prep(*arguments):
    return run_program("-m", "data_prep", *arguments, timeout=120)


def converted(folder, output, *arguments):
    result = data_prep(f"--imagenet={folder}", f"--output_dir={output}", "--workers=1", *arguments)
    assert result.returncode == 0, result.stderr
    return json.loads((output / "dataset.json").read_text())


def records(output, split):
    """File name -> Example of a split; test_data_prep.py holds the reader used here to TensorFlow's."""
    manifest = json.loads((output / "dataset.json").read_text())
    found = {}
    for shard in manifest["splits"][split]["shards"]:
        with (output / shard["file"]).open("rb") as file:
            for _, data in tfrecord.read_records(file):
                example = tfrecord.decode_example(data)
                found[example["image/filename"][0].decode()] = example
    return found


def refused(result, *words):
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert str(word) in result.stderr


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return miniature_release.write(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def output(release, tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    converted(release.folder, folder, "--on_bad=skip")
    return folder


def test_every_good_image_is_there_with_the_class_of_its_synset(release, output):
    for split, truth in (("train", release.train), ("validation", release.validation)):
        found = records(output, split)
        assert found.keys() == truth.keys()
        for name, (index, content) in truth.items():
            example = found[name]
            assert example["image/class/label"] == [1 + index]
            assert example["image/class/synset"] == [WNIDS[index].encode()]
            assert example["image/class/text"] == [WORDS[index].encode()]
            if name not in release.repaired:
                assert example["image/encoded"] == [content]


def test_repaired_images_are_rgb_jpegs_of_the_same_picture(release, output):
    found = records(output, "train")
    for name in release.repaired:
        _, content = release.train[name]
        (encoded,) = found[name]["image/encoded"]
        with Image.open(io.BytesIO(encoded)) as image, Image.open(io.BytesIO(content)) as original:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", original.size)
            difference = np.asarray(image, int) - np.asarray(original.convert("RGB"), int)
        assert np.abs(difference).mean() < 8  # JPEG at quality 95 of noise; a wrong CMYK inversion is off by 100
        assert found[name]["image/format"] == [b"JPEG"]
    listed = (output / "repaired.tsv").read_text()
    assert all(name in listed for name in release.repaired) and len(listed.splitlines()) == len(release.repaired)


def test_gray_stays_gray_and_exif_orientation_is_not_applied(release, output):
    found = records(output, "train")
    gray, rotated = (found[f"{WNIDS[0]}_{number}.JPEG"] for number in (26, 33))
    assert gray["image/channels"] == [1] and gray["image/colorspace"] == [b"Grayscale"]
    assert (rotated["image/width"], rotated["image/height"]) == ([60], [30])


def test_bad_images_are_listed_with_the_reason(release, output):
    lines = (output / "bad.tsv").read_text().splitlines()
    assert {line.split("\t")[0].rpartition("/")[2] for line in lines} == release.bad
    assert any("is empty (0 bytes)" in line for line in lines)


def test_boxes_are_fractions_in_tf_slims_columns(release, output):
    found = records(output, "train") | records(output, "validation")
    assert sum(bool(example["image/object/bbox/xmin"]) for example in found.values()) == len(release.boxes)
    for stem, (boxes, (width, height)) in release.boxes.items():
        example = found[f"{stem}.JPEG"]
        for column, pixels, size in zip(
            ("xmin", "ymin", "xmax", "ymax"), zip(*boxes, strict=True), (width, height) * 2, strict=True
        ):
            assert example[f"image/object/bbox/{column}"] == pytest.approx([p / size for p in pixels])
        assert example["image/object/bbox/label"] == example["image/class/label"] * len(boxes)


@pytest.mark.parametrize("form", ["torchvision", "kaggle"])
def test_extracted_trees_give_the_same_shards_as_the_archives(tmp_path, form):
    (tmp_path / "release").mkdir()
    release = miniature_release.write(tmp_path / "release", dirty=False)
    tree = tmp_path / form
    {"torchvision": miniature_release.extract_as_torchvision, "kaggle": miniature_release.extract_as_kaggle}[form](
        release, tree
    )
    extra = []
    if form == "torchvision":
        names = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_bbox_train_v2.tar.gz", "ILSVRC2012_bbox_val_v3.tgz")
        flags = ("devkit", "train_boxes", "validation_boxes")
        extra = [f"--{flag}={release.folder / name}" for flag, name in zip(flags, names, strict=True)]
    by_archive = converted(release.folder, tmp_path / "a")
    by_tree = converted(tree, tmp_path / "b", *extra)
    assert by_tree["splits"] == by_archive["splits"]
    assert by_tree["class_names"] == by_archive["class_names"] == list(WORDS)


def test_strict_imagenet_and_missing_parts_name_what_lacks(release, tmp_path):
    where = f"--output_dir={tmp_path}/out"
    refused(data_prep(f"--imagenet={release.folder}", where, "--strict_imagenet"), "4 classes instead of 1,000")
    train, validation = (f"{release.folder}/ILSVRC2012_img_{split}.tar" for split in ("train", "val"))
    refused(data_prep(f"--train={train}", f"--validation={validation}", where), "--devkit=ILSVRC2012_devkit_t12.tar.gz")
    refused(data_prep(f"--imagenet={tmp_path}", where), tmp_path, "ILSVRC2012_img_train.tar")
    refused(data_prep(f"--imagenet={release.folder}", where, f"--devkit={train}"), train, "damaged archive")


def test_dry_run_says_what_would_be_done_and_writes_nothing(release, tmp_path):
    result = data_prep(f"--imagenet={release.folder}", f"--output_dir={tmp_path}/out", "--dry_run")
    assert "train: 24 images" in result.stdout and "4 classes" in result.stdout
    assert not (tmp_path / "out").exists()


def test_limit_takes_the_first_of_the_shuffled_order(release, tmp_path):
    manifest = converted(release.folder, tmp_path, "--limit=5", "--on_bad=skip")
    assert manifest["splits"]["validation"]["examples"] == 5


def test_max_side_stores_smaller_images_and_leaves_small_ones_alone(release, tmp_path):
    converted(release.folder, tmp_path, "--max_side=40", "--quality=90", "--on_bad=skip")
    shrunk = 0
    for name, example in records(tmp_path, "train").items():
        with Image.open(io.BytesIO(release.train[name][1])) as original:
            width, height = original.size
        with Image.open(io.BytesIO(example["image/encoded"][0])) as image:
            assert [image.width] == example["image/width"] and [image.height] == example["image/height"]
            if max(width, height) > 40:
                shrunk += 1
                assert (
                    max(image.size) == 40 and abs(min(image.size) - min(width, height) * 40 / max(width, height)) <= 1
                )
            elif name not in release.repaired:
                assert example["image/encoded"] == [release.train[name][1]]
    assert shrunk > 3


def hostile(**fields):
    info = tarfile.TarInfo("n01440764/a.JPEG")
    for name, value in fields.items():
        setattr(info, name, value)
    return info


@pytest.mark.parametrize(
    ("member", "word"),
    [
        (hostile(name="/etc/passwd.JPEG"), "absolute"),
        (hostile(name="n01440764/../../b.JPEG"), "absolute"),
        (hostile(type=tarfile.SYMTYPE, linkname="/etc/passwd"), "symbolic link"),
        (hostile(type=tarfile.LNKTYPE, linkname="x"), "hard link"),
        (hostile(type=tarfile.CHRTYPE), "device"),
        (hostile(type=tarfile.FIFOTYPE), "named pipe"),
        (hostile(name="n01440764/twice.JPEG"), "second member of that name"),
        (hostile(name="n01440764/a\nb.JPEG"), "control characters"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_hostile_members_are_refused_or_left_out_by_name(release, tmp_path, member, word):
    rng = np.random.default_rng(0)
    train = tmp_path / "train.tar"
    with tarfile.open(train, "w") as archive:
        for name in ("n01440764/twice.JPEG", *(f"{wnid}/{i}.JPEG" for wnid in WNIDS for i in range(2))):
            content = miniature_release.jpeg(rng)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        archive.addfile(member)
    common = f"--imagenet={release.folder}", f"--train={train}", f"--output_dir={tmp_path}/out"
    refused(data_prep(*common), word, train)
    result = data_prep(*common, "--on_bad=skip")
    assert result.returncode == 0, result.stderr
    assert word in (tmp_path / "out/bad.tsv").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"train.tar", "out"}


def test_cut_or_damaged_archives_are_refused(release, tmp_path):
    whole = (release.folder / "ILSVRC2012_img_train.tar").read_bytes()
    train, where = tmp_path / "train.tar", f"--output_dir={tmp_path}/out"
    for content, word in (
        (whole[: len(whole) // 2], "damaged tar archive at byte"),
        (whole[:-20480], "damaged tar archive"),
        (whole[:100] + b"7" + whole[101:], "checksum"),
        (b"\0" + whole[:-1], "no POSIX or GNU tar header"),
        (gzip.compress(whole), "gunzip"),
        (b"", "end mark"),
        (whole + whole, "follows the end mark"),
    ):
        train.write_bytes(content)
        refused(data_prep(f"--imagenet={release.folder}", f"--train={train}", where, "--on_bad=skip"), word, train)


def test_a_decompression_bomb_is_a_bad_image(release, tmp_path):
    rng = np.random.default_rng(0)
    bomb = bytearray(miniature_release.jpeg(rng, mode="L"))
    frame = bomb.index(b"\xff\xc0")
    bomb[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"  # 65,500 x 65,500 pixels
    for wnid in WNIDS:
        (tmp_path / "train" / wnid).mkdir(parents=True)
        (tmp_path / "train" / wnid / "a.JPEG").write_bytes(miniature_release.jpeg(rng))
    (tmp_path / "train" / WNIDS[0] / "bomb.JPEG").write_bytes(bomb)
    common = f"--imagenet={release.folder}", f"--train={tmp_path}/train", f"--output_dir={tmp_path}/out"
    refused(data_prep(*common), "bomb.JPEG", "65500 x 65500")


def test_verify_names_file_record_and_offset_of_damage(release, output, tmp_path):
    result = data_prep("verify", output, "--verify=decode")
    assert result.returncode == 0 and "all whole" in result.stdout, result.stderr
    subprocess.run(["cp", "-r", f"{output}/.", tmp_path], check=True)
    shard = tmp_path / "train-00002-of-00004"
    with shard.open("rb") as file:
        offsets = [offset for offset, _ in tfrecord.read_records(file)]
    content = bytearray(shard.read_bytes())
    content[offsets[2] + 500] ^= 1
    shard.write_bytes(content)
    refused(data_prep("verify", tmp_path), shard, f"record 2 at byte {offsets[2]:,}")
    shard.write_bytes(content[: offsets[1] + 30])
    refused(data_prep("verify", tmp_path), shard, f"record 1 at byte {offsets[1]:,}")
    shard.unlink()
    refused(data_prep("verify", tmp_path), f"{shard}: is missing")
    refused(data_prep("verify", tmp_path / "none"), "no such folder")


def write_tar_of_tiny_images(path, images, classes):
    """A tar of `images` 1 x 1 JPEGs in `classes` class folders; headers as `tarfile` writes them, 20 times faster."""
    content = miniature_release.jpeg(np.random.default_rng(0), mode="L", size=(1, 1))
    info = tarfile.TarInfo("0" * 40 + ".JPEG")
    info.size = len(content)
    header = info.tobuf(tarfile.GNU_FORMAT)
    rest = sum(header[45:148]) + sum(header[156:]) + 8 * 32
    data = content + bytes(-len(content) % 512)
    with path.open("wb") as file:
        for number in range(images):
            name = f"n{number % classes:08}/n{number % classes:08}_{number:020}.JPEG".encode()
            file.write(name + header[45:148] + b"%06o\0 " % (sum(name) + rest) + header[156:] + data)
        file.write(bytes(1024))


@pytest.mark.slow
def test_imagenets_count_of_images_takes_less_than_a_gigabyte_of_memory(tmp_path):
    """Main process and two workers together, pages that they share counted once; a million images in some minutes."""
    for split, count in ilsvrc2012.IMAGES.items():
        write_tar_of_tiny_images(tmp_path / f"{split}.tar", count, ilsvrc2012.CLASSES)
    flags = f"--train={tmp_path}/train.tar", f"--validation={tmp_path}/validation.tar", "--strict_imagenet"
    program = start_program("-m", "data_prep", *flags, "--workers=2", f"--output_dir={tmp_path}/out")
    peak = 0
    while program.poll() is None:
        peak = max(peak, memory_of_tree(program.pid))
        time.sleep(0.5)
    assert program.returncode == 0, program.stderr.read()
    manifest = json.loads((tmp_path / "out/dataset.json").read_text())
    assert [len(split["shards"]) for split in manifest["splits"].values()] == [1024, 128]
    print(f"peak: {peak / 1e6:.0f} MB")
    assert peak < 1e9


def memory_of_tree(pid):
    """Proportional set size of a process and its children in bytes; 0 of those that just ended."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    (pss,) = (int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("Pss:"))
    return pss + sum(map(memory_of_tree, children))
