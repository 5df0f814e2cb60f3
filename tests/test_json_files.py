"""A JSON file is what its schema says, or one short line says where it is not; nothing else comes of any file."""

import json
import os

import pytest

from bn_keras import InputError
from bn_keras.json_files import COUNT, COUNT_TEXT, FILE_NAME, NUMBER, TEXT, file_size, read_json

SCHEMA = {
    "type": "object",
    "required": ["count", "file"],
    "properties": {
        "count": COUNT,
        "file": FILE_NAME,
        "length": COUNT_TEXT,
        "rate": NUMBER,
        "names": {"type": "array", "items": TEXT},
    },
}
GOOD = {"count": 2**63 - 1, "file": "train-00000-of-00001", "length": "12", "rate": 0.5, "names": ["kite\nred"]}


@pytest.fixture
def complaint(tmp_path):
    """What is said about a file of this content, after the file's name."""

    def read(content):
        path = tmp_path / "x.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        with pytest.raises(InputError) as caught:
            read_json(str(path), SCHEMA, fix="write it again")
        line = str(caught.value)
        assert line.startswith(f"{path}") and line.endswith(": write it again")
        assert len(line) < len(str(path)) + 300 and line.isprintable()
        return line.removeprefix(str(path))

    return read


def test_what_fits_comes_back_as_it_is(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(GOOD))
    assert read_json(str(tmp_path / "x.json"), SCHEMA, fix="") == GOOD


@pytest.mark.parametrize(
    "field, value",
    [
        ("count", -1), ("count", 2**63), ("count", 1.0), ("count", True), ("count", "1"), ("count", None),
        ("file", "../x"), ("file", "/etc/passwd"), ("file", ".."), ("file", ".x"), ("file", "a\\b"), ("file", "a\n"),
        ("file", "a\0"), ("file", "a\u2028"), ("file", "\x1b[31m"), ("file", ""), ("file", "x" * 256),
        ("file", "\ud800"), ("file", ["x"]),
        ("length", "1e3"), ("length", "-1"), ("length", "1" * 19), ("length", -1), ("length", "1\n"),
        ("length", "\u0661"),
        ("rate", 10**400), ("rate", "fast"), ("rate", False),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_named_with_its_place(complaint, field, value):
    assert complaint(GOOD | {field: value}).startswith(f": $.{field} is ")


def test_a_place_inside_and_a_field_that_is_missing_are_named(complaint):
    assert complaint(GOOD | {"names": ["a", 2]}) == ": $.names[1] is 2, not text: write it again"
    assert complaint({"file": "x"}) == ": $ lacks count: write it again"
    assert complaint([1]).startswith(": $ is [1], not type 'object'")


def test_a_long_value_is_cut(complaint):
    complaint(GOOD | {"count": "x" * 1_000_000})
    complaint(GOOD | {"count": [list(range(1000))] * 1000})
    complaint(GOOD | {"names": {"\x1b" * 1000: 1}})


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "Expecting value"),
        (b'{"count": NaN}', "NaN"),
        (b'{"count": -Infinity}', "-Infinity"),
        (b'{"rate": 1e999}', "beyond the range"),
        (b'{"count": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 900 + b"1" + b"}" * 900, "lacks count"),
        ("{}".encode("utf-16"), "utf-8"),
        (b"\xff", "utf-8"),
        (b"{}{}", "Extra data"),
    ],
)
def test_what_is_not_json_is_said_in_one_line(complaint, content, said):
    assert said in complaint(content)


def test_a_file_of_more_bytes_than_any_has_is_not_read(tmp_path):
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(InputError, match=r"has 1,099,511,627,776 bytes, at most 67,108,864 are read: write it again"):
        read_json(str(tmp_path / "x.json"), SCHEMA, fix="write it again")


def test_a_pipe_a_device_and_a_folder_are_refused_without_opening_them(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(InputError, match="is no regular file"):
            file_size(str(path))
    assert file_size(str(tmp_path / "missing")) is None
    with pytest.raises(FileNotFoundError):
        read_json(str(tmp_path / "missing"), SCHEMA, fix="")
