"""Files of runs on this machine: written as a whole, found once, and never waited for."""

import os

import pytest
from conftest import CLASSES, make_run_config

from bn_keras import InputError, storage
from bn_keras.runs.run_directory import RunDirectory
from bn_keras.runs.run_files import replacing, write_text


def test_what_links_lead_to_is_found_once_and_a_link_to_a_folder_above_ends(tmp_path):
    root = tmp_path / "runs"
    for file in (root / "zebra/a.txt", tmp_path / "elsewhere/b.txt"):
        file.parent.mkdir(parents=True)
        file.touch()
    (root / "latest").symlink_to("zebra")
    (root / "far").symlink_to(tmp_path / "elsewhere")
    for name in ("up", "zebra/up", "zebra/self"):
        (root / name).symlink_to(root)
    assert storage.find(str(root)) == [f"{root}/zebra/a.txt", f"{root}/far/b.txt"]


def test_different_files_are_written_to_one_folder_at_once_and_what_a_kill_leaves_is_overwritten(tmp_path):
    one, other = str(tmp_path / "checkpoint-00000001.npz"), str(tmp_path / "answers.npz")
    with replacing(one) as first, open(first, "w") as file:
        write_text(other, "answers")
        file.write("arrays")
    with replacing(str(tmp_path / "checkpoint-00000002.npz")) as second:
        assert second == first
        open(second, "w").close()
    assert [storage.read(path) for path in (one, other)] == [b"arrays", b"answers"]


@pytest.mark.parametrize("name", ["model.keras", "classes.txt"])
def test_a_pipe_is_refused_at_once_where_a_file_of_a_run_is_read(tmp_path, name):
    directory = RunDirectory(str(tmp_path))
    directory.open(make_run_config(), CLASSES)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name} is no regular file"):
        directory.read_class_names()
        directory.read_trained()
