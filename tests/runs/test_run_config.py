"""run.json of versions before: read, and continued or refused in one line."""

import dataclasses
import json
import re

import pytest

from bn_keras import VARIANTS, InputError
from bn_keras.runs.run_config import RunConfig
from bn_keras.runs.run_directory import RunDirectory

# What `launch/train --variant=bn_baseline --width=0.1 --image_size=32 --steps=6 --ema=0.9 --log_every=1
# --checkpoint_every=1` wrote on the digits before the configuration defined its own file.
WRITTEN_BEFORE = """{
 "variant": "bn_baseline", "batch_normalization": true, "activation": "relu", "learning_rate": 0.0015,
 "decay_epochs": 8.0, "l2_weight": 0.0002, "dropout": 0.4, "initial_weight_scale": 1.0, "per_activation_modules": 0,
 "local_response_normalization": true, "shuffling": "shard_order", "photometric_distortion": "full",
 "dataset": "mnist", "dataset_fingerprint": "FINGERPRINT", "train_examples": 4000, "validation_examples": 1000,
 "classes": 3, "channels": 1, "image_size": 32, "width": 0.1, "augmentation": "none", "bn_momentum": 0.9,
 "normalization_batch": "32", "batch_size": 32, "scale_learning_rate": "linear", "precision": "float32",
 "jit_compile": false, "ema": 0.9, "clip_norm": 0.0, "replicas": 1, "seed": 0, "steps": 6, "eval_every": 50,
 "eval_batch_size": 250, "log_every": 1, "checkpoint_every": 1, "population_statistics": 0, "monitor": "",
 "monitor_every": 50, "distort_on": "host", "deterministic": true
}"""
ADDED_SINCE = {"distort_on", "deterministic"}
"""Fields that versions before that one had not written yet."""

CLASSES = ["zero", "one", "two"]
CONFIG = RunConfig(
    variant=VARIANTS["bn_baseline"],
    dataset="mnist",
    dataset_fingerprint="FINGERPRINT",
    train_examples=4000,
    validation_examples=1000,
    classes=3,
    channels=1,
    image_size=32,
    width=0.1,
    augmentation="none",
    bn_momentum=0.9,
    ema=0.9,
    replicas=1,
    steps=6,
    eval_every=50,
    log_every=1,
    checkpoint_every=1,
    monitor_every=50,
)


@pytest.fixture(params=["the last version", "the one before"])
def run(tmp_path, request):
    flat = json.loads(WRITTEN_BEFORE)
    if request.param != "the last version":
        flat = {name: value for name, value in flat.items() if name not in ADDED_SINCE}
    (tmp_path / "run.json").write_text(json.dumps(flat))
    return tmp_path


def test_a_run_that_was_made_before_is_continued(run):
    assert RunConfig.read(str(run)) == CONFIG
    RunDirectory(str(run)).check(dataclasses.replace(CONFIG, steps=12), CLASSES, [])


@pytest.mark.parametrize("name, value", [("seed", 1), ("deterministic", False), ("builder", "my_network")])
def test_a_run_that_was_made_before_is_refused_where_it_is_another(run, name, value):
    with pytest.raises(InputError, match=rf"holds a run with {name} .* \(now {value}\): give another `directory`"):
        RunDirectory(str(run)).check(dataclasses.replace(CONFIG, **{name: value}), CLASSES, [])


def test_a_run_of_a_later_version_is_refused_in_one_line(run):
    flat = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(flat | {"sharpness": 2}))
    with pytest.raises(
        InputError, match=re.escape("$ has ['sharpness'], which this version does not know: ")
    ) as caught:
        RunConfig.read(str(run))
    assert "\n" not in str(caught.value)
