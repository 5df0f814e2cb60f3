"""The same command again: after a bad image has been dealt with, and in a folder that somebody has been at.

A result is right if it equals, to the byte, that of a conversion from scratch.
"""

import json
import os
import shutil
import tarfile
from pathlib import Path

import miniature_release
import numpy as np
import pytest

from data_prep import convert, json_files, plan, verify
from data_prep.errors import InputError
from data_prep.sources import ilsvrc2012, image_folder

CLASSES = ("ant", "bee", "cow")
DRAW = np.random.default_rng(0)


def picture():
    return miniature_release.jpeg(DRAW, size=(24, 24), quality=90)


@pytest.fixture
def folder(tmp_path):
    """train/CLASS/0.jpg to 9.jpg and validation/CLASS/0.jpg, 1.jpg, below `tmp_path`."""
    for split, count in (("train", 10), ("validation", 2)):
        for name in CLASSES:
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / split / name / f"{number}.jpg").write_bytes(picture())
    return tmp_path


FORMS = "folder", "tar", "zip", pytest.param("parquet", marks=pytest.mark.needs("pyarrow"))


def data_of(folder, form="folder"):
    """The folder's data set, or that of two archives that are made of the folder as it is."""
    for split in ("train", "validation") if form != "folder" else ():
        files = {str(path.relative_to(folder)): path for path in sorted((folder / split).rglob("*.jpg"))}
        archive = folder / f"{split}.{form}"
        if form == "tar":
            with tarfile.open(archive, "w") as tar:
                tar.add(folder / split, split)
        elif form == "zip":
            miniature_release.zip_of(archive, {name: path.read_bytes() for name, path in files.items()})
        else:
            rows = [
                {"image": {"bytes": path.read_bytes(), "path": name.replace("/", "-")}, "label": path.parent.name}
                for name, path in files.items()
            ]
            miniature_release.write_parquet(archive, rows)
    return given(folder, form)


def given(folder, form):
    """The data set of the folder or the archives as they are."""
    if form == "folder":
        return image_folder.dataset(str(folder / "train"), str(folder / "validation"), name="animals")
    release = ilsvrc2012.Release(*(str(folder / f"{split}.{form}") for split in ("train", "validation")))
    return ilsvrc2012.dataset(release, name="animals", unpacked=str(folder / "unpacked"))


def run(data, output, lines=None, **arguments):
    log = lines if lines is not None else []
    return convert.convert(data, str(output), plan.Options(train_shards=6), log=log.append, **arguments)


def contents(output):
    return {str(p.relative_to(output)): p.read_bytes() for p in Path(output).rglob("*") if p.is_file()}


def inodes(output):
    return {path.name: path.stat().st_ino for path in Path(output).glob("*-of-*")}


def shard_of(output, member):
    """The shard whose line of the plan holds a member."""
    planned = plan.load(str(output / ".data_prep"))
    for shard in planned.shards:
        if any(row[0].endswith(member) for row in plan.members(str(output / ".data_prep"), shard)):
            return shard.file


def spoil_last(folder, output, form):
    """Spoils an image of the last training shard, so that all other training shards are done when it is found."""
    run(data_of(folder, form), output)
    planned = plan.load(str(output / ".data_prep"))
    path = plan.members(str(output / ".data_prep"), planned.shards[5])[0][0]
    shutil.rmtree(output)
    bad = folder / (f"train/{path}" if form == "folder" else path.replace("-", "/"))
    bad.write_bytes(b"404 not found")
    with pytest.raises(InputError, match="fix: replace or remove it, or leave out all such with --on_bad=skip"):
        run(data_of(folder, form), output)
    assert len(inodes(output)) == 5
    return bad


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fix", ["replace", "remove"])
def test_a_bad_image_is_replaced_or_removed_and_the_same_command_goes_on(folder, form, fix):
    output, lines = folder / "out", []
    bad = spoil_last(folder, output, form)
    before = inodes(output)
    if fix == "remove":
        bad.unlink()
    else:
        bad.write_bytes(picture())
    run(data_of(folder, form), output, lines)
    assert before.items() <= inodes(output).items()
    assert form == "tar" or "5 of 7 shards are already there" in lines  # a tar says nothing about each of its members
    run(given(folder, form), folder / "scratch")
    assert contents(output) == contents(folder / "scratch")


@pytest.mark.parametrize("form", FORMS)
def test_an_image_of_the_same_size_is_another_image(folder, form):
    output, target = folder / "out", folder / "train/ant/3.jpg"
    bad = spoil_last(folder, output, form)
    bad.write_bytes(picture())
    while len(content := picture()) != target.stat().st_size:
        pass
    time = target.stat().st_mtime  # in a tar, whose times are of seconds, nothing but the bytes tells them apart
    target.write_bytes(content)
    if form == "tar":
        os.utime(target, (time, time))
    run(data_of(folder, form), output)
    shard = (output / shard_of(output, "ant-3.jpg" if form == "parquet" else "ant/3.jpg")).read_bytes()
    assert content in shard


@pytest.mark.parametrize("number", [0, 3, 7, 17, 28])
def test_after_a_removal_only_shards_between_its_own_and_the_end_of_the_longer_ones_change(folder, number):
    (folder / "train/ant/9.jpg").unlink()  # 29 images: 5 in each shard but the last
    output, lines = folder / "out", []
    run(data_of(folder), output)
    order = plan.shuffled(0, "train", data_of(folder).scan().images["train"])
    (output / "dataset.json").unlink()
    before, ids = {f.name: f.read_bytes() for f in output.glob("*-of-*")}, inodes(output)
    (folder / "train" / order[number].path).unlink()
    run(data_of(folder), output, lines)
    same = {name for name, content in before.items() if (output / name).read_bytes() == content}
    assert len(same) == 7 - (abs(number // 5 - 4) + 1) and all(inodes(output)[name] == ids[name] for name in same)
    assert f"{len(same)} of 7 shards are already there" in lines


def test_another_number_of_shards_after_a_removal_leaves_none_of_the_old(folder):
    output = folder / "out"
    run(data_of(folder), output)
    (output / "dataset.json").unlink()
    for path in (folder / "validation/ant").iterdir():
        path.unlink()
    (folder / "validation/ant").rmdir()
    data, options = data_of(folder), plan.Options(train_shards=6, validation_shards=0)
    convert.convert(data, str(output), options, log=lambda line: None)
    convert.convert(data, str(folder / "scratch"), options, log=lambda line: None)
    (output / ".data_prep/journal/train-00000-of-00009.json").write_text("{}")
    (output / "train-00000-of-00009").write_bytes(b"of an earlier plan")
    convert.convert(data, str(output), options, log=lambda line: None)
    assert contents(output) == contents(folder / "scratch")


def test_lists_of_images_that_are_no_longer_bad_go(folder):
    output = folder / "out"
    bad = folder / "train/ant/3.jpg"
    bad.write_bytes(b"404")
    (folder / "train/bee/4.jpg").write_bytes(miniature_release.jpeg(DRAW, mode="CMYK"))
    with pytest.raises(InputError, match="1 bad image"):
        run(data_of(folder), output, on_bad="report")
    assert (output / "bad.tsv").exists() and (output / "repaired.tsv").exists()
    for path in (bad, folder / "train/bee/4.jpg"):
        path.write_bytes(picture())
    run(data_of(folder), output)
    run(data_of(folder), folder / "scratch")
    assert contents(output) == contents(folder / "scratch")
    assert not (output / "bad.tsv").exists() and not (output / "repaired.tsv").exists()


def test_a_finished_data_set_is_changed_only_when_its_manifest_is_deleted(folder):
    output = folder / "out"
    run(data_of(folder), output)
    before = contents(output)
    (folder / "train/ant/3.jpg").write_bytes(picture())
    with pytest.raises(InputError, match=r"is complete.*changed.*delete its dataset\.json"):
        run(data_of(folder), output)
    assert contents(output) == before
    (output / "dataset.json").unlink()
    run(data_of(folder), output)
    run(data_of(folder), folder / "scratch")
    assert contents(output) == contents(folder / "scratch")


# What --on_bad=skip leaves


@pytest.mark.parametrize("on_bad", ["skip", "report"])
@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("names", [("bee",), ("ant", "bee"), CLASSES])
def test_a_class_or_a_split_without_a_usable_image_is_an_error(folder, on_bad, split, names):
    output = folder / "out"
    for name in names:
        for path in (folder / split / name).iterdir():
            path.write_bytes(b"404 not found")
    with pytest.raises(InputError, match=f"all {split} images of {len(names)} class") as refused:
        run(data_of(folder), output, on_bad=on_bad)
    assert all(repr(name) in str(refused.value) for name in names) and "bad.tsv" in str(refused.value)
    assert not (output / "dataset.json").exists()
    with pytest.raises(InputError):  # nor at the second try
        run(data_of(folder), output, on_bad=on_bad)
    for name in names:
        (folder / split / name / "0.jpg").write_bytes(picture())
    manifest = run(data_of(folder), output, on_bad="skip")
    assert manifest["class_names"] == list(CLASSES)


def test_the_folder_of_a_bad_class_can_be_removed_as_the_message_says(folder):
    for path in (folder / "train/bee").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match="remove the class's folder"):
        run(data_of(folder), folder / "out", on_bad="skip")
    for split in ("train", "validation"):
        shutil.rmtree(folder / split / "bee")
    assert run(data_of(folder), folder / "out", on_bad="skip")["class_names"] == ["ant", "cow"]


def test_of_a_choice_by_limit_only_a_whole_split_of_bad_images_is_an_error(folder):
    for name in ("ant", "bee"):
        for path in (folder / "train" / name).iterdir():
            path.write_bytes(b"")
    options = plan.Options(limit=8)
    manifest = convert.convert(data_of(folder), str(folder / "out"), options, on_bad="skip", log=lambda line: None)
    assert 0 < manifest["splits"]["train"]["examples"] < 8


# A folder that somebody has been at

DEEP = b"[" * 100_000
HOSTILE = [b"", b"[]", b"{}", b"null", b"\xff\xfe", DEEP, b'{"shards": ' + b"9" * 5000 + b"}", b'{"splits": 1e18}']


def changed(value, path, new):
    """A JSON value with the part at `path` replaced."""
    value = json.loads(json.dumps(value))
    *parents, last = path
    part = value
    for key in parents:
        part = part[key]
    part[last] = new
    return json.dumps(value).encode()


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_manifest_is_one_line_of_verify(folder, content):
    run(data_of(folder), folder / "out")
    (folder / "out/dataset.json").write_bytes(content)
    with pytest.raises(InputError, match=r"dataset\.json: is (damaged|nested).*fix: delete it"):
        verify.verify(str(folder / "out"), decode=False, workers=1)
    (folder / "out/dataset.json").unlink()  # the fix
    run(data_of(folder), folder / "out")
    assert verify.verify(str(folder / "out"), decode=False, workers=1) == ([], 36)


@pytest.mark.parametrize(
    ("path", "new"),
    [
        (("splits", "train", "shards", 0, "file"), "../../train-00000-of-00006"),
        (("splits", "train", "shards", 0, "file"), "/etc/passwd"),
        (("splits", "train", "shards", 0, "file"), "\x1b[2J"),
        (("splits", "train", "shards", 0, "file"), ".."),
        (("splits", "train", "shards", 0, "examples"), 10**18),
        (("splits", "train", "shards", 0, "examples"), 1e18),
        (("splits", "train", "shards", 0, "bytes"), -1),
        (("splits", "train", "shards", 0, "crc32c"), 7),
        (("splits", "train", "shards"), {}),
        (("class_names",), "abc"),
        (("label_base",), True),
    ],
)
def test_a_manifest_of_wrong_types_ranges_or_places_is_refused(folder, path, new):
    manifest = run(data_of(folder), folder / "out")
    (folder / "out/dataset.json").write_bytes(changed(manifest, path, new))
    with pytest.raises(InputError, match=r"dataset\.json: is damaged: \$\.") as refused:
        verify.verify(str(folder / "out"), decode=False, workers=1)
    assert "\x1b" not in str(refused.value)


@pytest.mark.parametrize("content", [*HOSTILE, "journal"], ids=range(len(HOSTILE) + 1))
def test_a_hostile_plan_is_one_line_whose_fix_keeps_the_shards(folder, content):
    output, lines = folder / "out", []
    run(data_of(folder), output)
    (output / "dataset.json").unlink()
    before, ids = contents(output), inodes(output)
    held = output / ".data_prep/plan.json"
    if content == "journal":
        content = changed(json.loads(held.read_text()), ("shards", 0, 0), "../../train-00000-of-00006")
    held.write_bytes(content)
    with pytest.raises(InputError, match=r"plan\.json: is (damaged|nested).*fix: delete plan\.json"):
        run(data_of(folder), output)
    held.unlink()  # the fix
    run(data_of(folder), output, lines)
    assert inodes(output) == ids and before.items() <= contents(output).items()


def test_a_changed_line_of_the_plan_is_found(folder):
    output = folder / "out"
    run(data_of(folder), output)
    (output / "train-00000-of-00006").unlink()
    truth = contents(output)
    members = output / ".data_prep/members.jsonl"
    members.write_bytes(members.read_bytes().replace(b"ant/", b"../", 1))
    with pytest.raises(InputError, match=r"members\.jsonl: is damaged at byte \d+; fix: delete plan\.json"):
        run(data_of(folder), output)
    (output / ".data_prep/plan.json").unlink()
    run(data_of(folder), output)
    assert truth.items() <= contents(output).items()


@pytest.mark.parametrize(
    ("path", "new"),
    [
        (("bytes",), 1e18),
        (("examples",), 10**18),
        (("examples",), 3),
        (("inputs",), "0" * 64),
        (("short_sides",), "24:9 x"),
        (("short_sides",), [[24, 9]]),
        (("bad",), [["a", "b"]]),
        (("file",), "../../x"),
    ],
)
def test_a_journal_entry_that_does_not_fit_is_written_again(folder, path, new):
    output = folder / "out"
    run(data_of(folder), output)
    truth = contents(output)
    entry = output / ".data_prep/journal/train-00002-of-00006.json"
    for content in (changed(json.loads(entry.read_text()), path, new), DEEP):
        entry.write_bytes(content)
        run(data_of(folder), output)
        assert contents(output) == truth


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def directory(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def device(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [pipe, directory, device])
@pytest.mark.parametrize("name", ["dataset.json", "train-00001-of-00006"])
def test_verify_names_what_is_no_regular_file(folder, make, name):
    run(data_of(folder), folder / "out")
    make(folder / "out" / name)
    if name == "dataset.json":
        with pytest.raises(InputError, match=r"dataset\.json: is a folder, a pipe or a device"):
            verify.verify(str(folder / "out"), decode=False, workers=1)
    else:
        findings, _ = verify.verify(str(folder / "out"), decode=False, workers=1)
        assert findings == [f"{folder}/out/{name}: is missing, or no regular file"]


@pytest.mark.parametrize("make", [pipe, device])
@pytest.mark.parametrize("name", ["plan.json", "members.jsonl", "lock", "journal/train-00001-of-00006.json"])
def test_the_converter_waits_for_no_pipe_in_its_folder(folder, make, name):
    output = folder / "out"
    run(data_of(folder), output)
    (output / "dataset.json").unlink()
    (output / "train-00002-of-00006").unlink()
    make(output / ".data_prep" / name)
    try:
        run(data_of(folder), output)
        assert name.startswith("journal")  # written again
    except (InputError, OSError) as error:
        assert name in str(error)


@pytest.mark.parametrize("make", [pipe, directory, device])
def test_inputs_that_are_no_regular_files_are_named(folder, make):
    make(folder / "train/ant/x.jpg")
    lines = []
    if make is directory:  # a folder in a class folder, here an empty one
        run(data_of(folder), folder / "out")
    else:
        with pytest.raises(InputError, match=r"ant/x\.jpg: is a link to nothing or a folder, or no file"):
            run(data_of(folder), folder / "out", lines)
    make(folder / "cats.tar")
    with pytest.raises(InputError, match=r"cats\.tar"):
        release = ilsvrc2012.Release(str(folder / "cats.tar"), str(folder / "validation"))
        run(ilsvrc2012.dataset(release), folder / "other")


def test_names_that_control_a_terminal_are_escaped_in_lists(folder):
    name = "\x1b[31m\x9b1m\u202e\u2028ü.jpg"
    (folder / "train/ant" / name).write_bytes(b"")
    (folder / "train/bee" / f"{name}.png").write_bytes(miniature_release.jpeg(DRAW, mode="CMYK"))
    output = folder / "out"
    run(data_of(folder), output, on_bad="skip")
    escaped = r"\x1b[31m\x9b1m\u202e\u2028ü.jpg"
    assert (output / "bad.tsv").read_text() == f"{folder}/train/ant/{escaped}\tis empty (0 bytes)\n"
    assert (output / "repaired.tsv").read_text() == f"{folder}/train/bee/{escaped}.png\tCMYK\n"


def test_a_class_name_of_two_lines_is_one_line_of_the_labels(folder):
    for split in ("train", "validation"):
        (folder / split / "bee").rename(folder / split / "b\ne\u2028e")
    run(data_of(folder), folder / "out")
    labels = (folder / "out/image.class.label.labels.txt").read_text()
    assert labels.splitlines() == ["background", "ant", r"b\ne\u2028e", "cow"]


def test_files_of_others_that_end_in_tmp_are_left_alone(folder):
    output = folder / "out"
    run(data_of(folder), output)
    (output / "train-00000-of-00006").unlink()
    (output / "mine.tmp").write_text("mine")
    (output / "train-00000-of-00006.0123abcd.tmp").write_text("half")
    run(data_of(folder), output)
    assert (output / "mine.tmp").exists() and not (output / "train-00000-of-00006.0123abcd.tmp").exists()


def test_a_schema_takes_no_float_for_an_integer(tmp_path):
    (tmp_path / "a.json").write_text('{"n": 1.0}')
    with pytest.raises(InputError, match=r"a\.json: is damaged: \$\.n is 1\.0, against type; fix: go home"):
        json_files.read(str(tmp_path / "a.json"), json_files.record(n=json_files.COUNT), "go home")
