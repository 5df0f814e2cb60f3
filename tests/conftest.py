"""Small real data through the real converter, and programs run as a person runs them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from warm_start import WarmProgram, shrink

from bn_keras import VARIANTS
from bn_keras.runs.run_config import RunConfig

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as the launchers do

ROOT = Path(__file__).parents[1]
CLASSES = ("circle", "square", "stripe")


LONGEST = (
    *("test_trainer", "test_trainer_devices", "test_exactness", "test_input_programs", "test_signals", "test_cluster"),
    *("test_launch", "test_fine_tuning", "test_build", "test_batch_normalization", "test_inception", "test_folding"),
    *("test_evaluate", "test_predict", "test_population_statistics", "test_accumulation", "test_train"),
    *("test_faults", "test_data_prep", "test_again"),
)
"""Files that take longest, in this order: they start first, so that no worker of `make test` is left with one alone."""


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))
    for item in items:
        for package in {package for marker in item.iter_markers("needs") for package in marker.args}:
            if importlib.util.find_spec(package) is None and not Path(sys.executable).with_name(package).exists():
                item.add_marker(pytest.mark.skip(reason=f"{package} is not installed"))


def on(backend, *others, marks=()):
    """A case of `parametrize` that begins with one of Keras's backends, of which `make test` has TensorFlow."""
    needed = [] if backend == "tensorflow" else [pytest.mark.needs(backend)]
    return pytest.param(backend, *others, marks=[*needed, *marks])


def write_image(path, kind, seed, size=20):
    """A gray PNG of one of three shapes at a random place under noise, so that no two are equal."""
    random = np.random.default_rng([seed, CLASSES.index(kind)])
    y, x = np.mgrid[:size, :size] - random.uniform(size * 0.3, size * 0.7, (2, 1, 1))
    pixels = {"circle": x**2 + y**2 < 25, "square": np.maximum(abs(x), abs(y)) < 4, "stripe": abs(x + y) < 3}[kind]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels * 200 + random.integers(0, 40, (size, size))).astype("uint8")).save(path)


@pytest.fixture(scope="session")
def image_folders(tmp_path_factory):
    """Folders `train` (60 images) and `validation` (21), one folder a class."""
    folder = tmp_path_factory.mktemp("images")
    for split, count in (("train", 20), ("validation", 7)):
        for number in range(count):
            for kind in CLASSES:
                write_image(folder / split / kind / f"{number}.png", kind, seed=(split == "train") * 1000 + number)
    return folder


@pytest.fixture(scope="session")
def data_dir(image_folders, tmp_path_factory):
    """The folders as records: 60 training examples in 6 shards, 21 for validation in 2."""
    output = tmp_path_factory.mktemp("records") / "shapes"
    done = run_program(
        "-m",
        "data_prep",
        f"--train={image_folders / 'train'}",
        f"--validation={image_folders / 'validation'}",
        f"--output_dir={output}",
        "--train_shards=6",
        "--validation_shards=2",
    )
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="session")
def trained_runs(data_dir, tmp_path_factory):
    """Two finished runs of a small Inception on `data_dir` at 32x32 and width 0.1: ensemble_2 after 12 steps, and,
    because training takes its time, an ensemble_5 that is random but for its place among the runs."""
    import keras

    from bn_keras import build_network

    trained, random = (tmp_path_factory.mktemp("trained") / name for name in ("ensemble_2", "ensemble_5"))
    done = run_program(
        "-m",
        "launch.train",
        "--variant=ensemble_2",
        f"--data_dir={data_dir}",
        f"--workdir={trained}",
        "--width=0.1",
        "--image_size=32",
        "--augmentation=imagenet",
        "--batch_size=16",
        "--eval_batch_size=8",
        "--steps=12",
        "--bn_momentum=0.5",  # of 0.9, 28% of the initial 0 and 1 would remain
        "--eval_every=12",
        small=True,
    )
    assert done.returncode == 0, done.stderr
    random.mkdir()
    config = json.loads((trained / "run.json").read_text()) | {"variant": "ensemble_5"}
    (random / "run.json").write_text(json.dumps(config))
    (random / "classes.txt").write_bytes((trained / "classes.txt").read_bytes())
    keras.utils.set_random_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        model = build_network("ensemble_5", image_size=32, width=0.1, channels=1, classes=len(CLASSES))
    draws = np.random.default_rng(0)
    for layer in model.layers:
        if layer.name.endswith("_bn"):
            layer.set_weights([draws.uniform(0.5, 1.5, weight.shape) for weight in layer.get_weights()])
    model.save(random / "model.keras")
    return trained, random


@pytest.fixture
def small_networks(monkeypatch):
    """Networks of this process are as small as those of `start_program(small=True)`."""
    shrink(monkeypatch.setattr)


def make_run_config(**changes):
    """A run of BN-x5 on 1,200 examples of three classes, on one device; else as in the paper."""
    known = {
        "variant": VARIANTS["bn_x5"],
        "dataset": "shapes",
        "dataset_fingerprint": "f" * 64,
        "train_examples": 1200,
        "validation_examples": 21,
        "classes": len(CLASSES),
        "channels": 1,
        "replicas": 1,
        "steps": 1000,
    }
    return RunConfig(**known | changes)


_AS_A_PERSON = {
    "cwd": ROOT,
    "env": {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"},
    "stdout": subprocess.PIPE,
    "stderr": subprocess.PIPE,
    "text": True,
}


def start_program(*arguments, warm=False, small=False, **options):
    """Starts `python ARGUMENTS` in the checkout; warm, where TensorFlow is loaded; small, also with a small Inception.

    Those are for tests whose claim is neither how a program starts nor the network: `warm_start`.
    """
    arguments, options = [*map(str, arguments)], _AS_A_PERSON | options
    if warm or small:
        return WarmProgram(arguments, small, **options)
    return subprocess.Popen([sys.executable, *arguments], **options)


def run_on_a_full_disk(size, kind, *arguments):
    """Runs `python -m MODULE ...` where no file may grow beyond `size` bytes."""
    assert kind == "-m"
    program = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); "
    program += "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
    return run_program("-c", program, *arguments, small=True)


def run_plan(*flags):
    """Runs `launch/train --dry_run` but for the cost, which would be measured on steps of the network."""
    program = "from launch import plan, train; plan.cost = lambda *arguments: ''; train.run()"
    return run_program("-c", program, "--dry_run", *flags, small=True)


def run_program(*arguments, timeout=600, **options):
    """Runs a program to its end, at most `timeout` seconds; arguments are those of `start_program`."""
    with start_program(*arguments, **options) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)
