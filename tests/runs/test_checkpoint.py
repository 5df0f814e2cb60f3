"""A checkpoint is whole or it is not taken, and nothing is dropped that is needed or not ours."""

import json
import logging
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from bn_keras.runs import checkpoint
from bn_keras.runs.run_files import is_whole, read_sealed

ARRAYS = {"model/conv/kernel": np.arange(6, dtype="float32").reshape(2, 3), "step": np.int64(4)}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def save_old(folder, step):
    """As versions did that wrote no digest."""
    np.savez(folder / f"checkpoint-{step:08d}.npz", **ARRAYS)


def test_what_was_saved_comes_back(tmp_path):
    checkpoint.save(tmp_path, 4, ARRAYS, {"run.json": "{}"})
    step, arrays = checkpoint.load_newest(tmp_path)
    assert step == 4 and arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)


def test_numpy_alone_reads_one(tmp_path):
    checkpoint.save(tmp_path, 4, ARRAYS)
    with np.load(tmp_path / "checkpoint-00000004.npz") as file:
        np.testing.assert_array_equal(file["model/conv/kernel"], ARRAYS["model/conv/kernel"])


def test_one_without_a_digest_still_comes_back(tmp_path):
    save_old(tmp_path, 4)
    step, arrays = checkpoint.load_newest(tmp_path)
    assert step == 4 and arrays["step"] == 4


def test_an_empty_or_missing_directory_has_none(tmp_path):
    assert checkpoint.load_newest(tmp_path) is None
    assert checkpoint.load_newest(tmp_path / "missing") is None


def flipped(path, bits):
    """Each of the bits in turn, while it alone is flipped in the file; in place, as new files keep a disk busy."""
    with open(path, "rb+", buffering=0) as file:
        for bit in bits:
            (byte,) = os.pread(file.fileno(), 1, bit // 8)
            os.pwrite(file.fileno(), bytes([byte ^ 1 << bit % 8]), bit // 8)
            yield bit
            os.pwrite(file.fileno(), bytes([byte]), bit // 8)


def test_no_flipped_bit_and_no_cut_escapes(tmp_path):
    checkpoint.save(tmp_path, 4, ARRAYS, {"run.json": json.dumps({f"field_{k}": k for k in range(20)})})
    path = tmp_path / "checkpoint-00000004.npz"
    whole = path.read_bytes()
    assert 8 * len(whole) >= 7_008 and is_whole(path)
    taken = [("flip", bit) for bit in flipped(path, range(8 * len(whole))) if is_whole(path)]
    assert path.read_bytes() == whole
    for length in reversed(range(len(whole))):
        os.truncate(path, length)
        taken += [("cut", length)] if is_whole(path) else []
    assert taken == []


@pytest.mark.slow
def test_no_flipped_bit_of_a_real_checkpoint_escapes(trained_runs, tmp_path):
    """7,008 bits, spread over the file."""
    path = Path(shutil.copy(trained_runs[0] / "checkpoint-00000012.npz", tmp_path))
    assert is_whole(path)
    for bit in flipped(path, np.linspace(0, 8 * path.stat().st_size - 1, 7_008).astype(int)):
        assert not is_whole(path), bit


def test_the_last_two_are_kept(tmp_path):
    for step in (1, 2, 10, 3000):
        checkpoint.save(tmp_path, step, ARRAYS)
    assert names(tmp_path) == ["checkpoint-00000010.npz", "checkpoint-00003000.npz"]


def test_steps_of_nine_digits_are_newer_than_those_of_eight(tmp_path):
    for step in (99_999_998, 99_999_999, 100_000_000):
        checkpoint.save(tmp_path, step, ARRAYS)
    assert names(tmp_path) == ["checkpoint-100000000.npz", "checkpoint-99999999.npz"]
    assert checkpoint.load_newest(tmp_path)[0] == 100_000_000


def test_damaged_ones_do_not_count_as_kept(tmp_path):
    for step in (3, 6, 9, 12):
        save_old(tmp_path, step)
    for step in (6, 9, 12):
        (tmp_path / f"checkpoint-{step:08d}.npz").write_bytes(b"")
    checkpoint.save(tmp_path, 7, ARRAYS)  # a run that went on from step 3
    assert checkpoint.load_newest(tmp_path)[0] == 7
    assert is_whole(tmp_path / "checkpoint-00000003.npz")
    checkpoint.save(tmp_path, 14, ARRAYS)
    assert names(tmp_path) == [f"checkpoint-{step:08d}.npz" for step in (7, 9, 12, 14)]


def test_files_and_folders_of_other_names_are_not_ours(tmp_path):
    others = ["checkpoint-00000001 (copy).npz", "checkpoint-1.npz", "best-mine.npz", "checkpoint-00000001.npz.bak"]
    for name in others:
        (tmp_path / name).write_text("mine")
    (tmp_path / "checkpoint-00000002.npz").mkdir()
    for step in (3, 4, 5):
        checkpoint.save(tmp_path, step, ARRAYS)
    checkpoint.save_best(tmp_path, 5, ARRAYS)
    checkpoint.keep(tmp_path, 5, best=5)
    ours = ["best-00000005.npz", "checkpoint-00000004.npz", "checkpoint-00000005.npz"]
    assert names(tmp_path) == sorted([*others, *ours, "checkpoint-00000002.npz"])


def test_one_best_is_dropped_when_the_next_is_there(tmp_path):
    for step in (2, 4):
        checkpoint.save_best(tmp_path, step, ARRAYS)
    checkpoint.keep(tmp_path, 6, best=6)
    assert names(tmp_path) == ["best-00000002.npz", "best-00000004.npz"]
    checkpoint.keep(tmp_path, 6, best=4)
    assert names(tmp_path) == ["best-00000004.npz"]


def test_the_best_is_taken_where_no_other_is_whole(tmp_path):
    checkpoint.save_best(tmp_path, 2, ARRAYS)
    checkpoint.save(tmp_path, 4, ARRAYS)
    (tmp_path / "checkpoint-00000004.npz").write_bytes(b"PK")
    assert checkpoint.load_newest(tmp_path)[0] == 2


def test_one_of_another_name_is_not_taken_for_it(tmp_path):
    checkpoint.save(tmp_path, 2, ARRAYS)
    (tmp_path / "checkpoint-00000002.npz").rename(tmp_path / "checkpoint-00000900.npz")
    assert checkpoint.load_newest(tmp_path) is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
@pytest.mark.parametrize("sealed", [True, False], ids=["with a digest", "without"])
def test_a_damaged_one_is_named_and_the_one_before_is_taken(tmp_path, caplog, damage, sealed):
    for step in (1, 2):
        if sealed:
            checkpoint.save(tmp_path, step, ARRAYS)
        else:
            save_old(tmp_path, step)
    path = tmp_path / "checkpoint-00000002.npz"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[content.index(np.float32(5).tobytes())] ^= 1  # the array's last value
    path.write_bytes({"truncate": content[:-30], "flip": content, "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert checkpoint.load_newest(tmp_path)[0] == 1
    assert caplog.text.count(str(path)) == 1


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, ARRAYS)

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, ARRAYS)
    assert names(tmp_path) == ["checkpoint-00000001.npz"]


def test_the_step_and_the_digest_are_a_zips_comment(tmp_path):
    checkpoint.save(tmp_path, 4, ARRAYS)
    path = tmp_path / "checkpoint-00000004.npz"
    assert zipfile.ZipFile(path).comment.startswith(b"step 4 sha256 ")
    assert read_sealed(path)[0] == 4
