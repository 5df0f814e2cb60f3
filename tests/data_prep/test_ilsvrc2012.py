"""ILSVRC2012 in each of the forms people have it, against the truth that the miniature's generator keeps."""

import gzip
import io
import itertools
import json
import struct
import subprocess
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import miniature_release
import numpy as np
import pytest
from conftest import run_program, start_program
from independent_reader import examples
from miniature_release import WNIDS, WORDS
from PIL import Image

from data_prep.errors import InputError
from data_prep.formats import tfrecord
from data_prep.sources import ilsvrc2012, tar


def data_prep(*arguments):
    return run_program("-m", "data_prep", *arguments, timeout=120)


def converted(folder, output, *arguments):
    result = data_prep(f"--imagenet={folder}", f"--output_dir={output}", "--workers=1", *arguments)
    assert result.returncode == 0, result.stderr
    return json.loads((output / "dataset.json").read_text())


def records(output, split):
    """File name -> Example of a split."""
    shards = json.loads((output / "dataset.json").read_text())["splits"][split]["shards"]
    held = itertools.chain.from_iterable(examples(output / shard["file"]) for shard in shards)
    return {example["image/filename"][0].decode(): example for example in held}


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


def test_torchvisions_tree_gives_the_same_shards_beside_devkit_and_boxes_and_alone_lacks_their_words(tmp_path):
    for name in ("release", "beside", "alone"):
        (tmp_path / name).mkdir()
    release = miniature_release.write(tmp_path / "release", dirty=False)
    miniature_release.extract_as_torchvision(release, tmp_path / "beside")
    miniature_release.extract_as_torchvision(release, tmp_path / "alone")
    for name in ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_bbox_train_v2.tar.gz", "ILSVRC2012_bbox_val_v3.tgz"):
        (tmp_path / "beside" / name).write_bytes((release.folder / name).read_bytes())
    outputs = [tmp_path / name / "out" for name in ("release", "beside", "alone")]
    manifests = [converted(output.parent, output) for output in outputs]
    assert manifests[1]["splits"] == manifests[0]["splits"] and manifests[2]["name"] == "imagenet2012"
    for split in ("train", "validation"):
        whole, alone = records(outputs[0], split), records(outputs[2], split)
        assert list(alone) == list(whole)
        for name, example in alone.items():
            differing = {key for key in example if example[key] != whole[name][key]}
            assert differing <= {"image/class/text", *(key for key in example if "bbox" in key)}
            assert example["image/class/text"] == example["image/class/synset"]


# Archives as people make them


def write_tar(path, members):
    path.write_bytes(miniature_release.tar_of(members))
    return path


def animals(prefix=""):
    rng = np.random.default_rng(0)
    return {f"{prefix}{name}/{i}.jpg": miniature_release.jpeg(rng) for name in ("cat", "dog") for i in range(2)}


def test_an_archive_made_on_macos_is_read_as_the_folder_is(tmp_path):
    clutter = {}
    for name in ("cat/._0.jpg", "._cat", ".DS_Store", "__MACOSX/cat/0.jpg", "PaxHeader/0.jpg", "cat/@eaDir/0.jpg"):
        clutter[name] = b"Mac OS X"
    train = write_tar(tmp_path / "train.tar", clutter | animals() | {"dog/Icon\r": b""})
    (tmp_path / "train").mkdir()
    with tarfile.open(train) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(tmp_path / "train")
    validation = write_tar(tmp_path / "validation.tar", animals("./"))
    manifests = []
    for name, source in (("a", train), ("b", tmp_path / "train")):
        flags = f"--train={source}", f"--validation={validation}", f"--output_dir={tmp_path / name}", "--name=pets"
        assert (result := data_prep(*flags)).returncode == 0, result.stderr
        manifests.append(json.loads((tmp_path / name / "dataset.json").read_text()))
    assert manifests[0]["splits"] == manifests[1]["splits"]
    assert manifests[0]["splits"]["train"]["examples"] == 4


@pytest.mark.parametrize(
    ("train", "name"),
    [
        ("cats.tar", "cats"),
        ("pets/train.tar", "pets"),
        ("ILSVRC2012_img_train.tar", "imagenet2012"),
        ("cats.TAR", "cats"),
    ],
)
def test_an_archive_gives_the_data_set_its_own_name(tmp_path, train, name):
    (tmp_path / train).parent.mkdir(exist_ok=True)
    write_tar(tmp_path / train, animals())
    validation = write_tar(tmp_path / "dogs.tar", animals())
    assert ilsvrc2012.dataset(ilsvrc2012.Release(str(tmp_path / train), str(validation))).name == name


def test_a_folder_whose_name_ends_in_tar_is_a_folder(tmp_path):
    for part in ("train.tar", "validation.tar"):
        for path, content in animals(f"{part}/").items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(content)
    flags = f"--train={tmp_path}/train.tar", f"--validation={tmp_path}/validation.tar", f"--output_dir={tmp_path}/out"
    assert data_prep(*flags).returncode == 0
    assert json.loads((tmp_path / "out/dataset.json").read_text())["name"] == tmp_path.name


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.tar.xz", b"\xfd7zXZ\0" + bytes(600), ("compressed with xz", "unxz it")),
        ("a.tar.bz2", b"BZh9" + bytes(600), ("compressed with bzip2", "bunzip2 it")),
        ("a.7z", b"7z\xbc\xaf\x27\x1c", ("is a 7z archive", "unpack it and give the folder")),
        ("a.rar", b"Rar!\x1a\7", ("is a RAR archive", "unpack it and give the folder")),
        ("a.jpg", miniature_release.jpeg(np.random.default_rng(0)), ("no POSIX or GNU tar header",)),
    ],
)
def test_another_kind_of_archive_is_said_with_what_to_do(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    validation = write_tar(tmp_path / "validation.tar", animals())
    flags = f"--train={tmp_path / name}", f"--validation={validation}", f"--output_dir={tmp_path}/out"
    refused(data_prep(*flags), tmp_path / name, *words)


def test_a_tar_whose_first_member_is_called_as_a_zip_begins_is_a_tar(tmp_path):
    read = write_tar(tmp_path / "a.tar", {"PK\3\4": b"x"}).read_bytes()
    assert [member.size for member in tar.index(lambda at, size: read[at : at + size], 0, len(read), "a")] == [1]


def test_images_in_no_class_folder_are_said(tmp_path):
    flat = write_tar(tmp_path / "flat.tar", {name.replace("/", "_"): c for name, c in animals().items()})
    good = write_tar(tmp_path / "good.tar", animals())
    stray = write_tar(
        tmp_path / "stray.tar", animals() | {"stray.jpg": miniature_release.jpeg(np.random.default_rng(0))}
    )
    where = f"--output_dir={tmp_path}/out"
    refused(data_prep(f"--train={flat}", f"--validation={good}", where), flat, "cat_0.jpg, are in no class folder")
    refused(
        data_prep(f"--train={good}", f"--validation={flat}", where), flat, "in no class folder", "one folder a class"
    )
    for name, source in (("a", stray), ("b", tmp_path / "tree")):
        if name == "b":
            with tarfile.open(stray) as archive:
                archive.extraction_filter = getattr(tarfile, "data_filter", None)
                archive.extractall(source)
        result = data_prep(f"--train={good}", f"--validation={source}", f"--output_dir={tmp_path / name}")
        assert result.returncode == 0, result.stderr
        assert f"{source}: left out 1 image(s) in no class folder, such as stray.jpg" in result.stdout


def with_pax(records):
    """A tar of one member under a pax header of these records, as bytes."""
    info = tarfile.TarInfo("n01440764/a.JPEG")
    info.size = 4
    payload = b"".join(records)
    header = tarfile.TarInfo("x")
    header.type, header.size = b"x", len(payload)
    parts = header.tobuf(tarfile.USTAR_FORMAT), payload, bytes(-len(payload) % 512), info.tobuf(tarfile.USTAR_FORMAT)
    return b"".join(parts) + b"data" + bytes(508 + 1024)


@pytest.mark.parametrize(
    "record",
    [b"5011 size=" + b"9" * 5000 + b"\n", b"9" * 5000 + b" size=4\n", b"9 size=-4\n", "10 size=\u0664\n".encode()],
    ids=["digits", "length", "negative", "Arabic"],
)
def test_numbers_of_pax_headers_that_are_none_are_one_line(tmp_path, record):
    (tmp_path / "a.tar").write_bytes(with_pax([record]))
    validation = write_tar(tmp_path / "validation.tar", animals())
    flags = f"--train={tmp_path}/a.tar", f"--validation={validation}", f"--output_dir={tmp_path}/out"
    refused(data_prep(*flags), "damaged tar archive at byte")


@pytest.mark.parametrize("content", [b"a,b\0\n", b"x" * 200_000 + b",y", b"\xff\xfe,1\n"])
def test_hostile_validation_labels_are_one_line(release, tmp_path, content):
    (tmp_path / "LOC_val_solution.csv").write_bytes(content)
    given = ilsvrc2012.find(str(release.folder), {"validation_labels": str(tmp_path / "LOC_val_solution.csv")})
    with pytest.raises(InputError, match=r"no table of labels|no images found"):
        ilsvrc2012.dataset(given).scan()


def test_a_ground_truth_of_5000_digits_is_one_line(tmp_path):
    miniature_release.write(tmp_path, dirty=False)
    members = {
        "ILSVRC2012_devkit_t12/data/meta.mat": miniature_release.meta_mat(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"1\n" + b"9" * 5000,
    }
    (tmp_path / "devkit.tar.gz").write_bytes(miniature_release.tar_of(members, "w:gz"))
    with pytest.raises(InputError, match="ground truth holds an id that meta"):
        ilsvrc2012.read_devkit(str(tmp_path / "devkit.tar.gz"))


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
        (gzip.compress(whole)[:-1000], "damaged archive"),
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


def write_zip_of_tiny_images(path, images, classes):
    """As `write_tar_of_tiny_images`, by hand too, as a zip64 archive."""
    content = miniature_release.jpeg(np.random.default_rng(0), mode="L", size=(1, 1))
    sizes, directory = (zlib.crc32(content), len(content), len(content)), bytearray()
    with path.open("wb") as file:
        for number in range(images):
            name = f"n{number % classes:08}/n{number % classes:08}_{number:020}.JPEG".encode()
            entry = 0x314, 20, 0, 0, 0, 0, *sizes, len(name), 0, 0, 0, 0, 0, file.tell()
            directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", *entry) + name
            file.write(struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, *sizes, len(name), 0) + name + content)
        start, size = file.tell(), len(directory)
        file.write(directory)
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, images, images, size, start))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, start + size, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))


@pytest.mark.parametrize("write", [write_tar_of_tiny_images, write_zip_of_tiny_images])
def test_an_archive_of_tiny_images_is_what_python_reads_too(tmp_path, write):
    path = tmp_path / "a.archive"
    write(path, 5, 2)
    is_tar = tarfile.is_tarfile(path)
    with (tarfile.open if is_tar else zipfile.ZipFile)(path) as archive:
        names = archive.getnames() if is_tar else archive.namelist()
    assert names == [f"n{k % 2:08}/n{k % 2:08}_{k:020}.JPEG" for k in range(5)]


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_tar_of_tiny_images, write_zip_of_tiny_images])
def test_imagenets_count_of_images_takes_less_than_a_gigabyte_of_memory(tmp_path, write):
    """Main process and two workers together, pages that they share counted once; a million images in some minutes."""
    for split, count in ilsvrc2012.IMAGES.items():
        write(tmp_path / f"{split}.archive", count, ilsvrc2012.CLASSES)
    flags = f"--train={tmp_path}/train.archive", f"--validation={tmp_path}/validation.archive", "--strict_imagenet"
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
