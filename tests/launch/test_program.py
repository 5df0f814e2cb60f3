"""What a program prints, and how it ends when it cannot: names escaped, closed and full outputs, one line."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run_program, start_program

from data_prep.program import escaped


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m \x07\r\t\x00\x7f", r"\x1b[31mred\x1b[0m \x07\r\t\x00\x7f"),
        ("\x9b31m", r"\x9b31m"),  # an escape sequence in one character
        ("photo\u202egpj.exe", r"photo\u202egpj.exe"),  # bidi override
        ("a\u2066b\u2069\u200f\u061c", r"a\u2066b\u2069\u200f\u061c"),
        ("one\u2028two\u2029three\x85four", r"one\u2028two\u2029three\x85four"),
        ("\udcff", r"\udcff"),  # a byte that is no UTF-8
        ("\ufeffBOM", r"\ufeffBOM"),
        ("\U000e0041", r"\U000e0041"),  # a tag, which nothing draws
        ("Käse 猫 \U0001f408 \u0645\u06cc\u200c", "Käse 猫 \U0001f408 \u0645\u06cc\u200c"),
        ("two\nlines", "two\nlines"),
    ],
)
def test_what_a_terminal_would_obey_or_hide_is_written_out(text, shown):
    assert escaped(text) == shown


def test_a_line_stays_one_line():
    assert escaped("two\nlines", line=True) == r"two\nlines"


def refused(command, folder):
    """The name of a program that refuses a command in an empty folder and writes nothing there, and its one line."""
    name, *arguments = command.split()
    done = run_program("-m", f"launch.{name}", *arguments, cwd=folder)
    assert done.returncode == 1 and not os.listdir(folder)
    (line,) = done.stderr.splitlines()
    return name, line


@pytest.mark.parametrize(
    "command",
    [
        "train --variant=bn_x5 --cache={url}",
        "export --workdir=runs/a --output={url}",
        "import_weights --checkpoint={url} --workdir=runs/a",
    ],
)
def test_a_file_that_cannot_lie_in_a_bucket_is_refused_in_one_line_before_anything_is_written(tmp_path, command):
    name, line = refused(command.format(url="gs://bucket/x"), tmp_path)
    assert line.startswith(f"{name}: --") and "=gs://bucket/x: no bucket can be given there" in line


@pytest.mark.parametrize(
    "command",
    [
        "train --variant=bn_x5 --workdir={url}",
        "train --variant=bn_x5 --data_dir={url}",
        "evaluate --workdir=runs/a,{url}",
        "results --output_dir={url}",
    ],
)
def test_a_bucket_that_cannot_be_had_is_refused_in_one_line_before_anything_is_written(tmp_path, command):
    name, line = refused(command.format(url="nosuch://bucket/x"), tmp_path)  # of fsspec, or that it is not installed
    assert line.startswith((f"{name}: nosuch://bucket/x: ", f"{name}: fsspec is not installed; fix: pip install "))


HOSTILE = "\x1b]0;owned\x07\x9b31m\u202egpj\u2028"


def test_a_hostile_name_is_one_escaped_line_of_an_error(tmp_path):
    name = f"{HOSTILE}\n\udcff"
    for command in (
        ["data_prep", f"--train={tmp_path}/{name}", f"--validation={tmp_path}", f"--output_dir={tmp_path}/out"],
        ["launch.train", "--variant=bn_x5", f"--data_dir={tmp_path}/{name}"],
        ["launch.report", f"--workdir={tmp_path}/{name}"],
        ["launch.predict", f"{tmp_path}/{name}", f"--workdir={tmp_path}"],
    ):
        done = run_program("-m", *command, text=False)
        assert done.returncode == 1
        shown = done.stderr.decode()
        assert shown.isascii() and shown[:-1].isprintable() and shown.endswith("\n"), shown
        assert r"\x1b]0;owned\x07\x9b31m\u202egpj\u2028\n\udcff" in shown


def test_logs_and_warnings_are_escaped_too():
    code = f"""
import logging, sys, warnings
from absl import flags
from absl import logging as absl_logging
from data_prep import program
def main():
    absl_logging.error("%s", {HOSTILE!r})
    logging.getLogger("a").error("%s", {HOSTILE!r})
    warnings.warn({HOSTILE!r})
    raise RuntimeError({HOSTILE!r})
program.run(main, "")
"""
    done = run_program("-c", code, text=False)
    shown = done.stderr.decode()
    assert shown.isascii() and shown.replace("\n", "").isprintable()
    assert shown.count(r"\x1b]0;owned\x07") == 4  # and the traceback


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["evaluate", "--workdir="], "must name at least one run"),
        (["compare", "--variants="], "must name at least one variant"),
        (["show_input", "--output=sheet.xyz"], "--output=sheet.xyz ends in none of .png, .jpg, .jpeg, .webp"),
        (["show_input", "--output={0}"], "{0} ends in none of .png, .jpg, .jpeg, .webp"),
    ],
)
def test_a_value_that_would_fail_after_the_work_is_refused_before_it(data_dir, tmp_path, command, message):
    command = ["-m", f"launch.{command[0]}", f"--data_dir={data_dir}", *(flag.format(tmp_path) for flag in command[1:])]
    done = run_program(*command)
    assert done.returncode in (1, 2) and done.stderr.count("\n") == 1 and message.format(tmp_path) in done.stderr


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"kite\nred\n", ["kite", "red"]),
        (b"\xef\xbb\xbfkite\r\nred", ["kite", "red"]),  # as Windows's Notepad writes it
        (b"a\xe2\x80\xa8b\n\n\xe9t\xe9\n", ["a\u2028b", "", "\\xe9t\\xe9"]),  # a line separator; Latin-1
    ],
)
def test_names_of_imported_classes_are_the_lines_of_a_file_of_any_editor(tmp_path, content, names):
    (tmp_path / "names.txt").write_bytes(content)
    code = "import json, sys; from launch.import_weights import names_in; print(json.dumps(names_in(sys.argv[1])))"
    done = run_program("-c", code, tmp_path / "names.txt")
    assert done.returncode == 0 and json.loads(done.stdout) == names, done.stderr


def test_too_little_memory_is_one_line_that_names_a_flag():
    code = """
import tensorflow as tf
from absl import flags
from launch import program
flags.DEFINE_integer("batch_size", 40_000, "")
step = tf.function(lambda batch: tf.reduce_sum(tf.zeros([batch, 1000, 1000, 8])))
program.run(lambda: step(tf.constant(flags.FLAGS.batch_size)), "")
"""
    done = run_program("-c", code, warm=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "not enough memory (OOM when allocating tensor with shape[40000,1000,1000,8] " in done.stderr
    assert done.stderr.endswith(": give a smaller --batch_size\n")


def test_output_that_nobody_reads_ends_a_program_quietly():
    process = start_program("-m", "launch.train", "--helpfull")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


@pytest.mark.parametrize("closed", ["<&- >&-", "2>&-", "<&- >&- 2>&-"])
def test_a_program_works_with_closed_streams(image_folders, tmp_path, closed):
    """A file that it opens must not be taken for standard output."""
    command = f"{sys.executable} -m data_prep --train={image_folders}/train --validation={image_folders}/validation"
    command += f" --output_dir={tmp_path}/out --workers=2 {closed}"
    done = subprocess.run(command, shell=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0
    assert run_program("-m", "data_prep", "verify", tmp_path / "out").returncode == 0


def test_a_full_disk_under_the_output_is_one_line():
    with open("/dev/full", "w") as full:
        done = run_program("-m", "launch.train", "--help", stdout=full)
    assert done.returncode == 1
    assert done.stderr == "train: [Errno 28] No space left on device: 'standard output'\n"


def test_notes_that_cannot_be_written_do_not_stop_the_work(image_folders, tmp_path):
    with open("/dev/full", "w") as full:
        command = [f"--train={image_folders}/train", f"--validation={image_folders}/validation"]
        done = run_program("-m", "data_prep", *command, f"--output_dir={tmp_path}/out", stderr=full)
    assert done.returncode == 0 and (tmp_path / "out/dataset.json").exists()


def test_an_image_of_a_hostile_name_is_one_escaped_line_of_a_dry_run_and_of_a_verification(image_folders, tmp_path):
    folder = shutil.copytree(image_folders, tmp_path / "images")
    (folder / f"train/circle/{HOSTILE}\n.jpg").write_bytes(b"no picture")
    command = ["-m", "data_prep", f"--train={folder}/train", f"--validation={folder}/validation"]
    done = run_program(*command, f"--output_dir={tmp_path}/out", text=False)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1
    assert rb"\x1b]0;owned\x07\x9b31m\u202egpj\u2028\n.jpg" in done.stderr
    skipped = run_program(*command, f"--output_dir={tmp_path}/skip", "--on_bad=skip", text=False)
    assert skipped.returncode == 0 and b"\x1b" not in skipped.stdout + skipped.stderr
