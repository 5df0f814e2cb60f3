"""What is packed, what it asks for, and what it says to somebody who did not install all of it."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile

import pytest
from conftest import ROOT, run_program
from test_import_directions import packages

import bn_keras
from data_prep import program

BLOCKED = {"PIL", "google_crc32c", "jsonschema", "lazy_loader", "matplotlib", "mlxtend", "scipy", "tensorboard"}
"""Packages that extras install, and that neither Keras nor TensorFlow loads."""

BACKENDS = {"tensorflow", "jax", "torch"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the project's sdist, `bn_keras-*.tar`, and its metadata, `bn_keras.egg-info`."""
    folder = tmp_path_factory.mktemp("built")
    egg, sdist = ["egg_info", f"--egg-base={folder}"], ["sdist", "--formats=tar", f"--dist-dir={folder}"]
    subprocess.run([sys.executable, "setup.py", "-q", *egg, *sdist], cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def metadata(built):
    return importlib.metadata.PathDistribution(built / "bn_keras.egg-info")


@pytest.fixture
def without(tmp_path):
    """Makes an environment in which packages of some names are not installed."""

    def environment(*packages, **variables):
        for package in packages:
            (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError(name={package!r})")
        return dict(os.environ) | {"PYTHONPATH": f"{tmp_path}:{ROOT}"} | variables

    return environment


def test_the_citation_is_of_this_version():
    assert f"\nversion: {bn_keras.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the list of files that git keeps")
def test_an_sdist_holds_every_file_of_the_repository(built):
    with tarfile.open(next(built.glob("*.tar"))) as sdist:
        packed = {name.partition("/")[2] for name in sdist.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split(
        "\n"
    )
    assert {name for name in tracked if (ROOT / name).is_file()} - packed == set()


def test_the_description_stands_without_the_files_that_readme_links_to(metadata):
    description = metadata.metadata.get_payload()
    assert "docs/benchmarks.md" in description
    assert not re.findall(r"\]\((?!https?://)", description)


def test_the_layer_alone_asks_for_keras_and_numpy(metadata):
    required = [line for line in metadata.requires if "extra ==" not in line]
    assert {re.match(r"[\w-]+", line)[0] for line in required} == {"keras", "numpy"}


def test_the_layer_and_folding_work_where_nothing_but_keras_and_its_backend_is_installed(without):
    done = run_program(
        "-c",
        """
import keras, bn_keras.layers
from bn_keras import BatchNormalization, fold_batch_normalization
assert abs(keras.ops.mean(BatchNormalization()(keras.random.normal((8, 4), mean=3), training=True))) < 1e-5
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), BatchNormalization()])
assert BatchNormalization not in map(type, fold_batch_normalization(model).layers)
""",
        env=without(*BLOCKED),
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("missing", "command", "extra"),
    [
        ("jsonschema", ["-m", "launch.train", "--variant=bn_x5", "--data_dir={data}", "--workdir={new}"], "train"),
        ("tensorflow", ["-m", "launch.train", "--variant=bn_x5", "--data_dir={data}", "--workdir={new}"], "cpu"),
        ("jsonschema", ["-m", "data_prep", "verify", "{data}"], "prep"),
        ("fsspec", ["-m", "data_prep", "--train=s3://a", "--validation=s3://b", "--output_dir={new}"], "remote"),
    ],
)
def test_a_program_without_its_extra_says_which_to_install(data_dir, tmp_path, without, missing, command, extra):
    arguments = [word.format(data=data_dir, new=tmp_path / "new") for word in command]
    done = run_program(*arguments, env=without(missing))
    advice = f"{missing} is not installed; fix: pip install -e '{ROOT}[{extra}]'\n"
    assert done.returncode == 1 and done.stderr.endswith(advice) and done.stderr.count("\n") == 1, done.stderr


def test_every_package_that_is_imported_is_one_that_an_extra_or_keras_installs(metadata):
    """Others may happen to be installed beside them, and may not be there elsewhere."""
    files = [path for package in ("bn_keras", "data_prep", "launch") for path in (ROOT / package).rglob("*.py")]
    imported = set().union(*(packages(path) for path in files)) - sys.stdlib_module_names
    distributions = importlib.metadata.packages_distributions()
    required = {re.match(r"[\w-]+", line)[0].lower() for line in metadata.requires}
    for module in imported - {"bn_keras", "data_prep", "launch", "absl", *BACKENDS}:
        start = module.replace("_", "-")  # of the distribution's name, if that is not installed
        names = distributions.get(module) or [name for name in required if name.startswith(start)]
        assert required & {name.lower().replace("_", "-") for name in names}, module


def test_every_extra_that_a_program_names_installs_what_it_lacks(metadata):
    for module, extra in program._EXTRAS.items():
        installed = [line for line in metadata.requires if f'extra == "{extra}"' in line]
        assert any(line.startswith(module.replace("_", "-")) for line in installed), module


def test_a_program_of_an_installed_package_names_the_programs_that_are_installed():
    start = "import sys; sys.argv[0] = '/usr/bin/bn-data-service'; from launch.data_service import run; run()"
    done = run_program("-c", start, "--help")
    assert "bn-train ... --data_service=" in done.stdout and "Flags of bn-data-service" in done.stdout
    assert "launch/" not in done.stdout
    wrong = "import sys; sys.argv[0] = '/usr/bin/bn-report'; from launch.report import run; run()"
    done = run_program("-c", wrong, "--workdir=no/launch/train")
    assert "bn-train --" in done.stderr and "no/launch/train" in done.stderr and done.stderr.startswith("bn-report: ")
