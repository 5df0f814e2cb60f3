"""Images in every form that people have them in, made here, converted, and compared with what their maker knows.

The truth is a file name -> class and bytes; records are read by independent_reader.py.
"""

import json
import os
import shutil
import tarfile
import zipfile

import miniature_release
import numpy as np
import pytest
from independent_reader import examples
from miniature_release import WNIDS, WORDS, tar_of, write_parquet, zip_of
from test_ilsvrc2012 import records

from data_prep import convert, plan
from data_prep.errors import InputError
from data_prep.sources import ilsvrc2012


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return miniature_release.write(tmp_path_factory.mktemp("release"), dirty=False)


@pytest.fixture(scope="module")
def animals():
    """cat/cat0.jpg to dog/dog9.jpg -> bytes."""
    rng = np.random.default_rng(0)
    names = [f"{name}/{name}{number}.jpg" for name in ("cat", "cow", "dog") for number in range(10)]
    return {name: miniature_release.jpeg(rng) for name in names}


def write(folder, files):
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def below(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run(data, output, lines=None, **options):
    """Converts; returns the data set's records, file name -> Example, of both splits."""
    log = (lines if lines is not None else []).append
    convert.convert(data, str(output), plan.Options(**options), log=log)
    return {split: records(output, split) for split in ("train", "validation")}


def of_imagenet(path, output, **given):
    return ilsvrc2012.dataset(ilsvrc2012.find(str(path), given), unpacked=str(output / ".data_prep/unpacked"))


def of_images(path, output, **given):
    return ilsvrc2012.of_images(str(path), "", ilsvrc2012.Given(**given), str(output / ".data_prep/unpacked"))


def assert_release(found, release, words=True):
    """Every image of the release, byte for byte, with its class."""
    for split, truth in (("train", release.train), ("validation", release.validation)):
        assert found[split].keys() == truth.keys()
        for name, (index, content) in truth.items():
            example = found[split][name]
            assert example["image/encoded"] == [content]
            assert example["image/class/label"] == [1 + index]
            assert example["image/class/synset"] == [WNIDS[index].encode()]
            assert not words or example["image/class/text"] == [WORDS[index].encode()]


# ImageNet


@pytest.fixture(scope="module")
def kaggle(release, tmp_path_factory):
    """Kaggle's tree, extracted."""
    folder = tmp_path_factory.mktemp("kaggle")
    miniature_release.extract_as_kaggle(release, folder)
    return folder


@pytest.fixture(scope="module")
def shards(release, tmp_path_factory):
    """What the release's archives become."""
    output = tmp_path_factory.mktemp("shards")
    run(of_imagenet(release.folder, output), output)
    return output


def assert_same_shards(output, shards):
    for shard in shards.glob("*-of-*"):
        assert (output / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize("inside", ["", "imagenet/"])
def test_kaggles_zip_gives_the_shards_of_the_release_without_being_unpacked(
    release, kaggle, shards, tmp_path, compression, inside
):
    files = {inside + name: content for name, content in below(kaggle).items()}
    archive = zip_of(tmp_path / "imagenet-object-localization-challenge.zip", files, compression)
    output = tmp_path / "out"
    for place in (archive, tmp_path):  # the zip, or the folder that it was downloaded into
        assert_release(run(of_imagenet(place, output), output), release)
        assert_same_shards(output, shards)
        assert not (output / ".data_prep/unpacked").exists()
        shutil.rmtree(output)


@pytest.mark.parametrize("given", ["around", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
def test_kaggles_tree_may_be_given_one_folder_too_high_or_some_too_deep(release, kaggle, tmp_path, given):
    folder = kaggle / given
    if given == "around":
        folder = tmp_path / "around"
        folder.mkdir()
        (folder / "kaggle").symlink_to(kaggle)
    assert_release(run(of_imagenet(folder, tmp_path / "out"), tmp_path / "out"), release)


@pytest.mark.parametrize("form", ["tar.gz", "tar", "folder"])
def test_patched2019_has_its_labels_from_the_annotations(release, kaggle, tmp_path, form):
    files = {name: content for name, content in below(kaggle).items() if name.startswith("ILSVRC/")}
    path = write(tmp_path / "folder", files) if form == "folder" else tmp_path / f"imagenet_patched2019.{form}"
    if form != "folder":
        path.write_bytes(tar_of(files, "w:gz" if form == "tar.gz" else "w"))
    output = tmp_path / "out"
    found = run(of_imagenet(path, output), output)
    assert_release(found, release, words=False)
    assert sum(bool(e["image/object/bbox/xmin"]) for split in found.values() for e in split.values()) == len(
        release.boxes
    )


def test_validation_images_without_labels_name_the_file_that_is_missing(kaggle, tmp_path):
    files = {name: content for name, content in below(kaggle).items() if "/Data/" in name}
    write(tmp_path / "in", files)
    with pytest.raises(InputError, match=r"--devkit=ILSVRC2012_devkit_t12.tar.gz \(from image-net.org\).*LOC_val_sol"):
        run(of_imagenet(tmp_path / "in", tmp_path / "out"), tmp_path / "out")


def hugging_face_name(name, index):
    return f"{name.removesuffix('.JPEG')}_{WNIDS[index]}.JPEG"


def hugging_face_rows(images):
    return [
        {"image": {"bytes": content, "path": hugging_face_name(name, index)}, "label": index}
        for name, (index, content) in images.items()
    ]


@pytest.mark.parametrize("compression", ["snappy", "none", "zstd"])
@pytest.mark.parametrize("layout", ["data/{}-0000{}-of-00002.parquet", "default/{}/000{}.parquet"])
@pytest.mark.needs("pyarrow")
def test_hugging_faces_parquet_gives_the_shards_of_the_release_but_for_boxes(release, tmp_path, compression, layout):
    for split, images in (("train", release.train), ("validation", release.validation)):
        rows = hugging_face_rows(images)
        for number, part in enumerate((rows[:5], rows[5:])):
            path = tmp_path / "in" / layout.format(split, number)
            write_parquet(path, part, WORDS, compression=compression)
    output = tmp_path / "out"
    found = run(of_imagenet(tmp_path / "in", output), output)
    assert_release(found, release)
    archives_ = [tmp_path / f"{split}.tar" for split in ("train", "val")]
    for path, images in zip_pairs(archives_, (release.train, release.validation)):
        path.write_bytes(tar_of({f"{WNIDS[index]}/{name}": content for name, (index, content) in images.items()}))
    devkit = release.folder / "ILSVRC2012_devkit_t12.tar.gz"
    plain = ilsvrc2012.dataset(ilsvrc2012.Release(*map(str, archives_), str(devkit)), "imagenet2012")
    run(plain, tmp_path / "plain")
    assert_same_shards(output, tmp_path / "plain")
    assert not (output / ".data_prep/unpacked").exists()


def zip_pairs(*parts):
    return list(__builtins__["zip"](*parts, strict=True))


def test_hugging_faces_tar_gz_parts_are_labelled_by_their_names(release, tmp_path):
    images = {
        split: {hugging_face_name(name, index): content for name, (index, content) in truth.items()}
        for split, truth in (("train", release.train), ("val", release.validation))
    }
    train = list(images["train"].items())
    parts = {"train_images_0": dict(train[:9]), "train_images_1": dict(train[9:]), "val_images": images["val"]}
    write(tmp_path / "in", {f"data/{name}.tar.gz": tar_of(files, "w:gz") for name, files in parts.items()})
    output, lines = tmp_path / "out", []
    found = run(of_images(tmp_path / "in", output), output, lines)
    assert_release(found, release, words=False)
    assert any("2 archives and val_images.tar.gz" in line for line in lines)


def test_a_folder_of_class_tars_is_the_release_s_training_tar_untarred(release, shards, tmp_path):
    with tarfile.open(release.folder / "ILSVRC2012_img_train.tar") as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(tmp_path / "in/train")
    for name in os.listdir(release.folder):
        if "img_train" not in name:
            (tmp_path / "in" / name).symlink_to(release.folder / name)
    output = tmp_path / "out"
    assert_release(run(of_imagenet(tmp_path / "in", output), output), release)
    assert_same_shards(output, shards)


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_tiny_imagenet_has_its_labels_from_val_annotations(release, tmp_path, form):
    files, lines = {}, []
    for name, (index, content) in release.train.items():
        files[f"train/{WNIDS[index]}/images/{name}"] = content
        files[f"train/{WNIDS[index]}/{WNIDS[index]}_boxes.txt"] = b"n01443537_0.JPEG\t0\t10\t63\t58\n"
    for name, (index, content) in release.validation.items():
        files[f"val/images/{name}"] = content
        lines.append(f"{name}\t{WNIDS[index]}\t0\t32\t44\t62\n")
    files["test/images/test_0.JPEG"] = content
    files["val/val_annotations.txt"] = "".join(lines).encode()
    files["words.txt"] = "".join(f"{wnid}\t{words}\n" for wnid, words in zip_pairs(WNIDS, WORDS)).encode()
    files = {f"tiny-imagenet-200/{name}": content for name, content in files.items()}
    path = write(tmp_path, files) / "tiny-imagenet-200"
    if form == "zip":
        path = zip_of(tmp_path / "tiny-imagenet-200.zip", files)
    for number, data in enumerate((of_imagenet, of_images)):
        output = tmp_path / str(number)
        assert_release(run(data(path, output), output), release)


def test_the_words_of_a_class_may_hold_what_unicode_calls_a_line_break(kaggle, tmp_path):
    words = [f"{text}\u2028\x85a line" for text in WORDS]
    copy = shutil.copytree(kaggle, tmp_path / "kaggle")
    lines = [f"{wnid} {text}\r\n" for wnid, text in zip_pairs(WNIDS, words)]
    (copy / "LOC_synset_mapping.txt").write_bytes("".join(lines).encode())
    run(of_imagenet(copy, tmp_path / "out"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["class_names"] == words


# Any images


def split_truth(found):
    return {
        split: {(e["image/class/synset"][0].decode(), name, e["image/encoded"][0]) for name, e in examples.items()}
        for split, examples in found.items()
    }


def test_one_folder_is_split_by_class_and_seed(animals, tmp_path):
    write(tmp_path / "in", animals)
    runs = [
        split_truth(run(of_images(tmp_path / "in", tmp_path / str(k), share=0.3, seed=seed), tmp_path / str(k)))
        for k, seed in enumerate((0, 0, 1))
    ]
    for sides in runs:
        counts = {name: sum(synset == name for synset, *_ in sides["validation"]) for name in ("cat", "cow", "dog")}
        assert counts == {"cat": 3, "cow": 3, "dog": 3}
        assert {content for *_, content in sides["train"] | sides["validation"]} == set(animals.values())
        assert len(sides["train"]) == 21
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("seed", range(5))
def test_identical_files_stay_on_the_same_side_also_across_classes(animals, tmp_path, seed):
    files = {name: content for name, content in animals.items() if name[-5] < "6"}
    copies = {f"cat/copy{k}.jpg": animals["cat/cat0.jpg"] for k in range(3)} | {
        "dog/dogcopy.jpg": animals["cow/cow1.jpg"]
    }
    write(tmp_path / "in", files | copies)
    sides = split_truth(run(of_images(tmp_path / "in", tmp_path / "out", seed=seed), tmp_path / "out"))
    train, validation = ({content for *_, content in sides[split]} for split in ("train", "validation"))
    assert not train & validation
    for split in sides.values():
        assert {synset for synset, *_ in split} == {"cat", "cow", "dog"}


def test_a_class_with_too_few_images_is_named_and_stays_in_training(animals, tmp_path):
    files = {name: content for name, content in animals.items() if not name.startswith("dog") or "0" in name}
    files |= {"emu/1.jpg": animals["dog/dog3.jpg"], "emu/2.jpg": animals["dog/dog3.jpg"]}
    lines = []
    data = of_images(write(tmp_path / "in", files), tmp_path / "out")
    found = run(data, tmp_path / "out", lines)
    (line,) = (line for line in lines if "too few" in line)
    assert "2 class(es) have too few different images for validation" in line and "'dog' (1), 'emu' (2)" in line
    assert {e["image/class/label"][0] for e in found["train"].values()} >= {3, 4}


@pytest.mark.parametrize("validation", ["validation", "val", "valid", "test", "Val"])
@pytest.mark.parametrize("form", ["folder", "zip", "tar"])
def test_folders_called_train_and_val_are_the_splits_and_that_is_said(animals, tmp_path, validation, form):
    files = {f"pets/train/{name}": content for name, content in animals.items()}
    files |= {f"pets/{validation}/{name}": content for name, content in list(animals.items())[::5]}
    path = write(tmp_path, files) / "pets"
    if form == "zip":
        path = zip_of(tmp_path / "pets.zip", files)
    elif form == "tar":
        path = tmp_path / "pets.tar"
        path.write_bytes(tar_of(files))
    lines = []
    convert.convert(of_images(path, tmp_path / "out"), str(tmp_path / "out"), log=lines.append)
    assert any(line.endswith(f"pets: training and validation images are train and {validation}") for line in lines)
    manifest = json.loads((tmp_path / "out/dataset.json").read_text())
    assert [split["examples"] for split in manifest["splits"].values()] == [30, 6]
    assert manifest["class_names"] == ["cat", "cow", "dog"] and manifest["name"] == "pets"
    with pytest.raises(InputError, match="need no --validation_share"):
        of_images(path, tmp_path / "out", share=0.2)


def test_beside_val_the_folder_test_is_left_out_and_that_is_said(animals, tmp_path):
    files = {f"{split}/{name}": c for split in ("train", "valid", "test") for name, c in animals.items()}
    lines = []
    convert.convert(of_images(write(tmp_path / "in", files), tmp_path / "out"), str(tmp_path / "out"), log=lines.append)
    assert any("are train and valid; left out: test" in line for line in lines)


@pytest.mark.parametrize(("train", "validation"), [("Training", "Testing"), ("training", "dev")])
def test_other_words_for_the_splits_are_recognized(animals, tmp_path, train, validation):
    files = {f"{split}/{name}": content for split in (train, validation) for name, content in animals.items()}
    found = run(of_images(write(tmp_path / "in", files), tmp_path / "out"), tmp_path / "out")
    assert [len(examples) for examples in found.values()] == [30, 30]


@pytest.mark.parametrize("around", ["train", "download/pets"])
def test_folders_around_all_class_folders_are_no_classes(animals, tmp_path, around):
    files = {f"{around}/{name}": content for name, content in animals.items()} | {"readme.md": b"pets"}
    sides = split_truth(run(of_images(write(tmp_path / "in", files), tmp_path / "out"), tmp_path / "out"))
    assert {synset for split in sides.values() for synset, *_ in split} == {"cat", "cow", "dog"}
    assert json.loads((tmp_path / "out/dataset.json").read_text())["name"] == "in"


def test_a_refused_set_leaves_no_folder_behind(animals, tmp_path):
    write(tmp_path / "in", {name: content for name, content in animals.items() if name.startswith("cat")})
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "new", tmp_path / "empty"):
        with pytest.raises(InputError, match="holds one class"):
            convert.convert(of_images(tmp_path / "in", output), str(output), log=lambda line: None)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "empty"} and not os.listdir(tmp_path / "empty")


def test_one_image_a_class_is_too_few_and_the_classes_are_named(animals, tmp_path):
    write(tmp_path / "in", {name: content for name, content in animals.items() if "0" in name})
    with pytest.raises(InputError, match=r"too few different images.*'cat' \(1\), 'cow' \(1\), 'dog' \(1\); fix: add"):
        run(of_images(tmp_path / "in", tmp_path / "out"), tmp_path / "out")


@pytest.mark.parametrize(
    ("files", "compression", "why"),
    [
        ({"cat/0.jpg": b"", "dog/0.jpg": b""}, zipfile.ZIP_LZMA, r"cat/0\.jpg is compressed by method 14"),
        ({"pets.zip": b"PK"}, zipfile.ZIP_STORED, r"left out what is no image: 1 \.zip"),
    ],
)
def test_a_zip_without_a_usable_image_says_what_it_holds(tmp_path, files, compression, why):
    path = zip_of(tmp_path / "a.zip", files, compression)
    with pytest.raises(InputError, match=f"no images found for the train split.*{why}"):
        run(of_images(path, tmp_path / "out"), tmp_path / "out")


@pytest.mark.parametrize("form", ["zip", "deflated", "tar.gz", "tar"])
def test_an_archive_of_class_folders_is_split_as_its_folder_is(animals, tmp_path, form):
    named = {f"pets/{name}": content for name, content in animals.items()}
    folder = write(tmp_path, named) / "pets"
    path = tmp_path / f"pets.{form.replace('deflated', 'zip')}"
    if "tar" in form:
        path.write_bytes(tar_of(named, "w:gz" if form == "tar.gz" else "w"))
    else:
        zip_of(path, named, zipfile.ZIP_DEFLATED if form == "deflated" else zipfile.ZIP_STORED)
    first, second = (
        split_truth(run(of_images(path, tmp_path / out), tmp_path / out)) for path, out in ((folder, "a"), (path, "b"))
    )
    assert first == second


@pytest.mark.parametrize("names", [None, ("cat", "cow", "dog"), ("zebra", "yak", "ant")], ids=str)
@pytest.mark.needs("pyarrow")
def test_parquet_keeps_the_numbers_and_names_of_its_classes(animals, tmp_path, names):
    rows = [
        {"image": {"bytes": content, "path": None}, "label": ("cat", "cow", "dog").index(path[:3])}
        for path, content in animals.items()
    ]
    write_parquet(tmp_path / "pets.parquet", rows, names)
    found = run(of_images(tmp_path / "pets.parquet", tmp_path / "out"), tmp_path / "out", label_base=0)
    labels = {content: ("cat", "cow", "dog").index(path[:3]) for path, content in animals.items()}
    seen = {}
    for split in found.values():
        for example in split.values():
            (label,), (content,) = example["image/class/label"], example["image/encoded"]
            assert labels[content] == label
            assert example["image/class/text"] == [(names or ("0", "1", "2"))[label].encode()]
            seen[content] = label
    assert seen == labels


@pytest.mark.needs("pyarrow")
def test_parquet_of_words_for_labels_and_a_class_that_no_image_has(animals, tmp_path):
    rows = [{"image": {"bytes": c, "path": p}, "label": p[:3]} for p, c in animals.items()]
    write_parquet(tmp_path / "words.parquet", rows)
    assert run(of_images(tmp_path / "words.parquet", tmp_path / "a"), tmp_path / "a")
    manifest = json.loads((tmp_path / "a/dataset.json").read_text())
    assert manifest["class_names"] == ["cat", "cow", "dog"]
    rows = [row | {"label": ("cat", "cow", "dog").index(row["label"]) * 2} for row in rows]
    write_parquet(tmp_path / "numbers.parquet", rows, ("cat", "none", "cow", "never", "dog"))
    found = run(of_images(tmp_path / "numbers.parquet", tmp_path / "b"), tmp_path / "b")
    assert {e["image/class/label"][0] for e in found["train"].values()} == {1, 3, 5}


@pytest.mark.needs("pyarrow")
def test_parquet_without_a_column_of_labels_names_its_columns(animals, tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"picture": list(animals.values()), "species": [name[:3] for name in animals]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"--label_column; there are picture, species"):
        run(of_images(tmp_path / "a.parquet", tmp_path / "out"), tmp_path / "out")
    assert run(of_images(tmp_path / "a.parquet", tmp_path / "b", label_column="species"), tmp_path / "b")


@pytest.mark.parametrize(
    ("values", "kind", "names"),
    [
        ([0.0, 1.0, None], "float64", ["0", "1"]),
        ([0.0, 1.0, float("nan")], "float64", ["0", "1"]),
        ([True, False, None], "bool_", ["False", "True"]),
        (["cat", "dog", None], "large_string", ["cat", "dog"]),
    ],
)
@pytest.mark.needs("pyarrow")
def test_a_column_of_classes_may_be_of_any_kind_and_lack_some(animals, tmp_path, values, kind, names):
    import pyarrow
    from pyarrow import parquet

    labels = pyarrow.array([values[number % 3] for number in range(30)], getattr(pyarrow, kind)())
    parquet.write_table(pyarrow.table({"image": list(animals.values()), "label": labels}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a-0000002: has no class; fix: leave out all such with --on_bad=skip"):
        run(of_images(tmp_path / "a.parquet", tmp_path / "out"), tmp_path / "out")
    data = of_images(tmp_path / "a.parquet", tmp_path / "out")
    manifest = convert.convert(data, str(tmp_path / "out"), on_bad="skip", log=lambda line: None)
    assert manifest["class_names"] == names
    assert sum(split["examples"] for split in manifest["splits"].values()) == 20


@pytest.mark.needs("pyarrow")
def test_parquet_of_paths_or_of_lists_of_classes_says_so(animals, tmp_path):
    import pyarrow
    from pyarrow import parquet

    lists = pyarrow.table({"image": list(animals.values()), "label": [[0]] * 30})
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    images = pyarrow.array([{"bytes": None, "path": name} for name in animals], kind)
    paths = pyarrow.table({"image": images, "label": [0, 1] * 15})
    for table, message in ((lists, r"'label' holds list<.*>, not one class"), (paths, "no row has an image's bytes")):
        parquet.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(InputError, match=message):
            run(of_images(tmp_path / "a.parquet", tmp_path / "out"), tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("label", ["cls", "json"])
def test_web_datasets_tars_have_their_classes_beside_each_image(animals, tmp_path, label):
    classes = ("cat", "cow", "dog")
    for split, images in (("train", animals), ("validation", dict(list(animals.items())[::4]))):
        for shard in range(2):
            members = {}
            for number, (path, content) in enumerate(list(images.items())[shard::2]):
                index = classes.index(path[:3])
                text = json.dumps({"label": index}).encode() if label == "json" else str(index).encode()
                members |= {f"{number:06}.jpg": content, f"{number:06}.{label}": text}
            write(tmp_path / "in", {f"pets-{split}-{shard:04}.tar": tar_of(members)})
    data = of_images(tmp_path / "in", tmp_path / "out")
    convert.convert(data, str(tmp_path / "out"), plan.Options(label_base=0), log=lambda line: None)
    seen = {}
    for shard in (tmp_path / "out").glob("train-*"):
        for example in examples(shard):
            seen[example["image/encoded"][0]] = example["image/class/label"][0]
    assert seen == {content: classes.index(path[:3]) for path, content in animals.items()}


@pytest.mark.parametrize(
    "form", ["zip", "tar", "tar.gz", "tars", pytest.param("parquet", marks=pytest.mark.needs("pyarrow"))]
)
def test_lists_and_messages_name_an_image_by_its_archive_and_its_path_in_that(animals, tmp_path, form):
    files = {f"train/{name}": content for name, content in animals.items()} | {"train/cat/bad.jpg": b"404"}
    files |= {f"val/{name[:4]}v{name[4:]}": content for name, content in list(animals.items())[::5]}
    files["val/dog/cmyk.jpg"] = miniature_release.jpeg(np.random.default_rng(1), mode="CMYK")
    output, path = tmp_path / "out", tmp_path / f"pets.{form}"
    held = {f"pets/{name}": content for name, content in files.items()}
    if form == "parquet":
        rows = [{"image": {"bytes": c, "path": p.rpartition("/")[2]}, "label": p[6:9]} for p, c in files.items()]
        write_parquet(path, [row for row, name in zip_pairs(rows, files) if name.startswith("train/")])
    elif form == "zip":
        zip_of(path, held | {"pets/train/../x.jpg": b"404"})
    elif form == "tars":
        for split in ("train", "val"):
            own = {name.removeprefix(f"{split}/"): content for name, content in files.items() if name.startswith(split)}
            write(path, {f"{split}.tar": tar_of(own)})
    else:
        path.write_bytes(tar_of(held | {"pets/train/../x.jpg": b"404"}, "w:gz" if form == "tar.gz" else "w"))
    with pytest.raises(InputError) as refused:
        run(of_images(path, output), output)
    convert.convert(of_images(path, output), str(output), on_bad="skip", log=lambda line: None)
    inside = {"tars": "train.tar/cat/", "parquet": ""}.get(form, "pets/train/cat/")
    bad = (output / "bad.tsv").read_text().splitlines()
    assert f"{path}/{inside}bad.jpg: " in str(refused.value) or f"{path}/pets/train/../x.jpg: " in str(refused.value)
    assert bad[-1].startswith(f"{path}/{inside}bad.jpg\t")
    if form in ("zip", "tar", "tar.gz"):
        assert bad[0].startswith(f"{path}/pets/train/../x.jpg\t")
    if form != "parquet":
        inside = "val.tar" if form == "tars" else "pets/val"
        assert (output / "repaired.tsv").read_text().startswith(f"{path}/{inside}/dog/cmyk.jpg\tCMYK")
        assert f"{path}/{inside}/cat/vcat0.jpg\n" in (output / "duplicates.tsv").read_text()


def test_annotations_and_unlabelled_images_in_an_archive_are_named_by_their_path_in_it(kaggle, tmp_path):
    files = below(kaggle)
    annotation = next(name for name in files if name.endswith(".xml"))
    unknown = "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_99999999.JPEG"
    files |= {annotation: b"no XML", unknown: next(c for name, c in files.items() if name.endswith(".JPEG"))}
    path, output = zip_of(tmp_path / "imagenet-object-localization-challenge.zip", files), tmp_path / "out"
    convert.convert(of_imagenet(path, output), str(output), on_bad="skip", log=lambda line: None)
    assert {line.partition("\t")[0] for line in (output / "bad.tsv").read_text().splitlines()} == {
        f"{path}/{annotation}",
        f"{path}/{unknown}",
    }
