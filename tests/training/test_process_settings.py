"""The threads of one operation: a run's own, so that its bits are the same on any number of cores."""

import logging
import os

import pytest
import tensorflow as tf
from conftest import run_program

from bn_keras.training.process_settings import limit_threads

_TRAIN = """
import hashlib, os, sys

cores, threads, data_dir, directory = sys.argv[1:]
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])

import keras
from bn_keras import BatchNormalization, read_dataset
from bn_keras.training import make_config, train


def network(config):
    x = images = keras.Input((config.image_size, config.image_size, config.channels))
    for _ in range(2):
        x = keras.layers.Conv2D(16, 3, strides=2, use_bias=False)(x)
        x = keras.layers.Activation("relu")(BatchNormalization()(x))
    return keras.Model(images, keras.layers.Dense(config.classes)(keras.layers.GlobalMaxPooling2D()(x)))


dataset = read_dataset(data_dir)
config = make_config(dataset, "bn_x5", steps=3, **({"threads": int(threads)} if threads else {}))
train(config, dataset, directory, network=network)
weights = keras.models.load_model(f"{directory}/model.keras", compile=False).get_weights()
print(hashlib.sha256(b"".join(weight.tobytes() for weight in weights)).hexdigest())
"""


@pytest.fixture(scope="module")
def bits_on(data_dir, tmp_path_factory):
    """A function that trains on so many cores with --threads, and returns a digest of the weights."""

    def bits(cores, threads=""):
        directory = tmp_path_factory.mktemp("threads") / "run"
        done = run_program("-c", _TRAIN, cores, threads, data_dir, directory, warm=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]

    return bits


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_small_run_has_the_same_bits_on_one_core_and_on_two_unless_told_to_use_all(bits_on):
    assert bits_on(cores=1) == bits_on(cores=2) != bits_on(cores=2, threads="0")


def test_where_tensorflow_has_begun_a_line_says_that_threads_have_no_effect(caplog):
    tf.zeros(1)
    begun = tf.config.threading.get_intra_op_parallelism_threads()
    limit_threads(begun)
    limit_threads(None)
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        limit_threads(begun + 999)  # a line that no other test of this process has had, for each is said once
    assert f"`threads={begun + 999}` has no effect in this process" in caplog.text
    assert tf.config.threading.get_intra_op_parallelism_threads() == begun
