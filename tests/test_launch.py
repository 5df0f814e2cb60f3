"""The launchers as a person meets them: --help, mistyped flags, input that cannot work; one clear line each."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, run_program

from bn_keras import VARIANTS

PROGRAMS = sorted(path.name for path in (ROOT / "launch").iterdir() if path.is_symlink())


def complaint(done, status):
    """The one line that a program left on stderr when it exited with `status`."""
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_says_what_it_is_for_and_lists_its_flags_before_tensorflow_loads(name):
    done = run_program("-X", "importtime", "-m", f"launch.{name}", "--help")
    assert done.returncode == 0
    assert "--workdir" in done.stdout or "--data_dir" in done.stdout or "--port" in done.stdout
    assert "tensorflow" not in done.stderr and "keras.src" not in done.stderr


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_launcher_is_an_executable_of_the_checkout(name):
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix}
    done = subprocess.run(
        [ROOT / "launch" / name, "--help"], cwd="/", env=environment, capture_output=True, text=True, check=True
    )
    assert f"Flags of {name}:" in done.stdout


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--variant=bn_x6"], ["--variant=bn_x6", *VARIANTS]),
        (["--varaint=bn_x5"], ["varaint", "Did you mean: variant"]),
        (["--variant=bn_x5", "--batch_size=0"], ["--batch_size=0"]),
        (["--variant=bn_x5", "--batch_size=many"], ["--batch_size=many"]),
        (["--variant=bn_x5", "--width=17"], ["--width=17", "16"]),
        (["--variant=bn_x5", "bn_x30"], ["'bn_x30'", "--name=value"]),
        ([], ["--variant"]),
    ],
)
def test_a_flag_that_cannot_be_is_named_with_what_it_could_be(arguments, named):
    line = complaint(run_program("-m", "launch.train", *arguments), 2)
    assert all(part in line for part in named), line


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--batch_size=1"], ["--batch_size=1", "at least 2"]),
        (["--batch_size=61"], ["--batch_size=61", "60 training images"]),
        (["--batch_size=9", "--devices=2"], ["--batch_size=9", "2 devices"]),
        (["--eval_batch_size=9", "--devices=2"], ["--eval_batch_size=9", "2 devices"]),
        (["--devices=2", "--strategy=one_device"], ["--devices=2", "one_device"]),
        (["--width=0"], ["--width=0", "greater than 0"]),
        (["--decay_epochs=0"], ["--decay_epochs=0", "greater than 0"]),
        (["--distort_on=device"], ["--distort_on=device", "--augmentation=none"]),
    ],
)
def test_a_value_that_cannot_work_with_the_data_or_the_devices_is_named(data_dir, tmp_path, flags, named):
    command = ["--variant=bn_x5", f"--data_dir={data_dir}", f"--workdir={tmp_path / 'run'}"]
    line = complaint(run_program("-m", "launch.train", *command, *flags), 1)
    assert all(part in line for part in named), line
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_missing_or_holds_no_data_set_or_no_run_is_named(tmp_path):
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    for folder in (missing, empty):
        line = complaint(run_program("-m", "launch.train", "--variant=bn_x5", f"--data_dir={folder}"), 1)
        assert str(folder) in line and "python -m data_prep" in line
        line = complaint(run_program("-m", "launch.report", f"--workdir={folder}"), 1)
        assert str(folder) in line and "launch/train" in line


def test_make_demo_names_a_mistyped_variant_before_it_trains():
    command = [
        "make",
        "--no-print-directory",
        "-o",
        f"{sys.prefix}/installed",
        "demo",
        f"VENV={sys.prefix}",
        "VARIANTS=bn_x5 bn_x6",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert "VARIANTS=bn_x6: the variants are " + " ".join(VARIANTS) in done.stderr
