"""Keras's own tests of its layer, from the installed Keras, run with our class in its place."""

import functools
import importlib
import types

import pytest

from bn_keras import BatchNormalization

suite = importlib.import_module("keras.src.layers.normalization.batch_normalization_test")

# What differs on purpose: all for Algorithm 2, line 10, whose moving variance has m/(m-1). With `unbiased=False` these
# pass too.
DIFFERENCES = {
    "test_correctness": "momentum 0 then keeps the variance with m/(m-1), so inference after training differs by it",
    "test_bachnorm_ignore_masked_values": "20 unmasked values of variance 0.25 give 0.25 * 20/19",
    "test_renorm_correctness": "moving_stddev follows the square root of the unbiased variance of 3 values",
}
KERAS_LAYERS = suite.layers


def put_in_place(monkeypatch, layer_class):
    members = {name: getattr(KERAS_LAYERS, name) for name in dir(KERAS_LAYERS) if not name.startswith("__")}
    monkeypatch.setattr(suite, "layers", types.SimpleNamespace(**members | {"BatchNormalization": layer_class}))


def is_difference(name):
    return name.startswith(tuple(DIFFERENCES))


def keras_tests():
    return [name for name in dir(suite.BatchNormalizationTest) if name.startswith("test_") and name != "test_session"]


def run(name):
    case = suite.BatchNormalizationTest(name)
    case.setUp()
    getattr(case, name)()
    case.doCleanups()


# Keras's own tests give `fit` a generator, and a model without weights.
@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed", "ignore:The model does not have any trainable weights")
@pytest.mark.parametrize("name", [name for name in keras_tests() if not is_difference(name)])
def test_keras_tests_hold_for_ours(name, monkeypatch):
    put_in_place(monkeypatch, BatchNormalization)
    run(name)


@pytest.mark.parametrize("name", [name for name in keras_tests() if is_difference(name)])
def test_the_others_hold_with_keras_biased_variance(name, monkeypatch):
    put_in_place(monkeypatch, functools.partial(BatchNormalization, unbiased=False))
    run(name)


@pytest.mark.parametrize("prefix", DIFFERENCES)
def test_every_difference_is_one(prefix, monkeypatch):
    put_in_place(monkeypatch, BatchNormalization)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        run(next(name for name in keras_tests() if name.startswith(prefix)))
