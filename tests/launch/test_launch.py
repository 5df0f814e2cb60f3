"""The launchers as a person meets them: --help, mistyped flags, input that cannot work; one clear line each."""

import importlib.metadata
import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, run_program, start_program

from bn_keras import VARIANTS

PROGRAMS = sorted(path.stem for path in (ROOT / "launch").glob("*.py") if path.with_suffix("").exists())
NOT_OF_KERAS = {"PIL", "google_crc32c", "jsonschema", "matplotlib", "mlxtend", "tensorboard"}
"""What a program may lack when it starts, and then asks for."""


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
    loaded = set(re.findall(r"\| +(\w+)$", done.stderr, re.MULTILINE))
    assert "absl" in loaded and not loaded & {"tensorflow", "keras", *NOT_OF_KERAS}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_launcher_is_an_executable_of_the_checkout(name):
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix}
    done = subprocess.run(
        [ROOT / "launch" / name, "--help"], cwd="/", env=environment, capture_output=True, text=True, check=True
    )
    assert f"Flags of {name}:" in done.stdout


@pytest.mark.parametrize("file", [*(f"launch/{name}.py" for name in PROGRAMS), "data_prep", "data_prep/__main__.py"])
def test_a_program_that_is_run_by_its_path_finds_its_own_packages(file, tmp_path):
    """Whatever else is found by these names; `inspect` was hidden by a launcher of that name."""
    for package in ("bn_keras", "data_prep", "launch"):
        (tmp_path / f"{package}.py").write_text("raise RuntimeError('of another checkout')")
    done = run_program(ROOT / file, "--help", cwd="/", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0 and "Flags of" in done.stdout, done.stderr


def test_no_module_of_a_program_hides_one_that_is_installed():
    """Its folder comes first where a program is run by its path, or a person works in it."""
    ours = {path.stem for folder in ("launch", "data_prep") for path in (ROOT / folder).iterdir()}
    assert not ours & (sys.stdlib_module_names | importlib.metadata.packages_distributions().keys())


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
        (["--batch_size=61"], ["--batch_size=61", "training images", "at most 60"]),
        (["--batch_size=9", "--devices=2"], ["--batch_size=9", "2 devices"]),
        (["--eval_batch_size=9", "--devices=2"], ["--eval_batch_size=9", "2 devices"]),
        (["--devices=2", "--strategy=one_device"], ["--devices=2", "one_device"]),
        (["--width=0"], ["--width=0", "greater than 0"]),
        (["--decay_epochs=0"], ["--decay_epochs=0", "greater than 0"]),
        (["--data_service=localhost:1"], ["localhost:1 (Connection refused)", "launch/data_service"]),
        (["--data_service=localhost"], ["'localhost'", "HOST:PORT"]),
        (["--data_service="], ["--data_service=", "HOST:PORT"]),
        (["--data_service=a:1,,b:2"], ["--data_service=a:1,,b:2", "''", "HOST:PORT"]),
        (["--data_service=no.such.host.invalid:5050"], ["no.such.host.invalid:5050"]),
        (["--distort_on=device"], ["--distort_on=device", "--augmentation=none"]),
    ],
)
def test_a_value_that_cannot_work_with_the_data_or_the_devices_is_named(data_dir, tmp_path, flags, named):
    command = ["--variant=bn_x5", f"--data_dir={data_dir}", f"--workdir={tmp_path / 'run'}"]
    line = complaint(run_program("-m", "launch.train", *command, *flags, warm=True), 1)
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
    assert "--variants=bn_x6: the variants are " + ", ".join(VARIANTS) in done.stderr


def test_of_two_first_programs_in_a_fresh_folder_one_prepares_the_data_and_one_waits(tmp_path):
    code = "from launch.embedded import embedded_data; print(embedded_data())"
    both = [start_program("-c", code, cwd=tmp_path) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sorted("done: 4,000" in output for output, _ in outputs) == [False, True]
    assert sum("waiting for another program, which prepares data/mnist" in errors for _, errors in outputs) == 1
    assert all(output.endswith("data/mnist\n") for output, _ in outputs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_preparing_the_data_ends_with_the_program_that_asked_for_it(tmp_path, number):
    code = "from data_prep import program; from launch.embedded import embedded_data; program.run(embedded_data, '')"
    process = start_program("-c", code, cwd=tmp_path, start_new_session=True)
    while not (tmp_path / "data/mnist/.data_prep/lock").exists():
        assert process.poll() is None, process.communicate()
    os.killpg(process.pid, number)  # as a terminal, or a machine that shuts down, does
    errors = process.communicate(timeout=20)[1]
    assert process.returncode == 128 + number
    assert errors.startswith("data_prep: interrupted by") and errors.count("\n") == 1


def test_a_dry_run_on_no_data_of_its_own_writes_nothing(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp")}
    for folder in ("here", "tmp"):
        (tmp_path / folder).mkdir()
    command = ["--variant=bn_x5", "--width=0.1", "--image_size=32", "--dry_run"]
    done = run_program("-m", "launch.train", *command, cwd=tmp_path / "here", env=environment, small=True)
    assert done.returncode == 0 and "4,000 training" in done.stdout, done.stderr
    assert not [*(tmp_path / "here").iterdir(), *(tmp_path / "tmp").iterdir()]


def test_importing_the_library_changes_nothing_of_the_process():
    program = """
import os
import keras  # which sets variables of its own
before = dict(os.environ)
import bn_keras
bn_keras.VARIANTS, bn_keras.BatchNormalization
import bn_keras.training
bn_keras.training.train
assert {k: v for k, v in os.environ.items() if before.get(k) != v} == {}
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
    done = run_program("-c", program, env=environment | {"PYTHONPATH": str(ROOT), "KERAS_BACKEND": "tensorflow"})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("outside, inside", [(None, "1"), ("0", "0")])
def test_launchers_turn_onednn_on_unless_told_otherwise(outside, inside):
    program = """
import os
from launch.program import loading_tensorflow
with loading_tensorflow():
    pass
print(os.environ["TF_ENABLE_ONEDNN_OPTS"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "TF_ENABLE_ONEDNN_OPTS"}
    environment |= {"PYTHONPATH": str(ROOT)} | ({"TF_ENABLE_ONEDNN_OPTS": outside} if outside else {})
    done = run_program("-c", program, env=environment)
    assert done.stdout.strip() == inside, done.stderr
