"""A checkpoint is whole or it is not taken."""

import logging

import numpy as np
import pytest

from bn_keras import checkpoint

ARRAYS = {"model/conv/kernel": np.arange(6, dtype="float32").reshape(2, 3), "step": np.int64(4)}


def test_what_was_saved_comes_back(tmp_path):
    checkpoint.save(tmp_path, 4, ARRAYS)
    step, arrays = checkpoint.load_newest(tmp_path)
    assert step == 4 and arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)


def test_an_empty_directory_has_none(tmp_path):
    assert checkpoint.load_newest(tmp_path) is None


def test_the_last_two_are_kept(tmp_path):
    for step in (1, 2, 10, 3000):
        checkpoint.save(tmp_path, step, ARRAYS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000010.npz", "checkpoint-00003000.npz"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_one_is_named_and_the_one_before_is_taken(tmp_path, caplog, damage):
    checkpoint.save(tmp_path, 1, ARRAYS)
    checkpoint.save(tmp_path, 2, ARRAYS)
    path = tmp_path / "checkpoint-00000002.npz"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[content.index(np.float32(5).tobytes())] ^= 1  # the array's last value
    path.write_bytes({"truncate": content[:-30], "flip": content, "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert checkpoint.load_newest(tmp_path)[0] == 1
    assert str(path) in caplog.text


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, ARRAYS)

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, ARRAYS)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001.npz"]
