"""A manifest is what data_prep writes, or one line at once says where it is not; no path leaves its folder."""

import json
import os
import shutil

import pytest

from bn_keras import InputError, read_dataset


@pytest.fixture
def copy(data_dir, tmp_path):
    return shutil.copytree(data_dir, tmp_path / "copy")


def refused(folder, change, said):
    manifest = json.loads((folder / "dataset.json").read_text())
    change(manifest)
    (folder / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=said) as caught:
        read_dataset(str(folder))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda m: m.update(version=2), r"dataset\.json: \$\.version is 2, not const 1"),
        (lambda m: m.pop("class_names"), r"\$ lacks class_names"),
        (lambda m: m.update(class_names="abc"), r"\$\.class_names is 'abc'"),
        (lambda m: m.update(class_names=[["a"], "b"]), r"\$\.class_names\[0\] is \['a'\]"),
        (lambda m: m.update(class_names=["one"]), r"\$\.class_names is \['one'\], not minItems 2"),
        (lambda m: m.update(name=None), r"\$\.name is None"),
        (lambda m: m.update(label_base=-(10**30)), r"\$\.label_base is -1000"),
        (lambda m: m.update(label_base=True), r"\$\.label_base is True"),
        (lambda m: m.update(channels=2), r"\$\.channels is 2"),
        (lambda m: m.update(short_side=20), r"\$\.short_side is 20"),
        (lambda m: m["splits"].pop("validation"), r"\$\.splits lacks validation"),
        (lambda m: m["splits"].update(train=[]), r"\$\.splits\.train is \[\]"),
        (lambda m: m["splits"]["train"].update(shards=[]), "lists no train examples"),
    ],
)
def test_a_field_that_cannot_be_is_named_by_its_place(copy, change, said):
    refused(copy, change, said)


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("examples", 10**18, "has .* bytes, too few for the 1,000,000,000,000,000,000 examples"),
        ("examples", 2**63, "not a count below"),
        ("examples", -1, "not a count below"),
        ("examples", 10.0, "not a count below"),
        ("bytes", 1e300, "not a count below"),
        ("bytes", 17, "the manifest says 17"),
        ("file", "../train-00000-of-00006", "the name of a file in the same folder"),
        ("file", "/dev/zero", "the name of a file in the same folder"),
        ("file", "\x1b[2J", r"is '\\x1b\[2J'"),
    ],
)
def test_a_shard_that_cannot_be_is_named(copy, field, value, said):
    refused(copy, lambda m: m["splits"]["train"]["shards"][0].update({field: value}), said)


def test_a_shard_that_is_listed_twice_is_not_read_twice(copy):
    refused(copy, lambda m: m["splits"]["train"]["shards"].append(m["splits"]["train"]["shards"][0]), "listed twice")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["train-00001-of-00006", "dataset.json"])
def test_a_pipe_or_a_folder_in_place_of_a_file_is_named_at_once(copy, make, name):
    (copy / name).unlink()
    make(copy / name)
    with pytest.raises(InputError, match=f"{name} is no regular file"):
        read_dataset(str(copy))


def test_names_are_kept_whatever_is_in_them(copy):
    """Line breaks of every kind; bytes that are no UTF-8 as an escape sequence."""
    manifest = json.loads((copy / "dataset.json").read_text())
    names = ["red\nkite", "a\u2028b\x0b\x0c\x1c\x85", "caf\udce9"]
    (copy / "dataset.json").write_text(json.dumps(manifest | {"name": "caf\udce9", "class_names": names}))
    dataset = read_dataset(str(copy))
    assert dataset.class_names == (*names[:2], "caf\\udce9") and dataset.name == "caf\\udce9"
