"""Accuracy is counts, summed and divided once."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import run_program

from bn_keras.evaluation.accuracy import Evaluator, count_correct, evaluate


def test_counts_against_a_sort():
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(200, 9)).astype("float32"), random.integers(0, 9, 200).astype("int32")
    order = np.argsort(-logits, axis=1)
    top1 = (order[:, 0] == labels).sum()
    top5 = (order[:, :5] == labels[:, None]).any(1).sum()
    assert count_correct(logits, labels).numpy().tolist() == [top1, top5, 200]


def test_padding_counts_nowhere():
    logits = tf.one_hot([0, 1, 2, 3], 6)
    assert count_correct(logits, tf.constant([0, -1, 2, -1])).numpy().tolist() == [2, 2, 2]


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_network_that_says_the_same_of_all_classes_is_right_about_nothing(value):
    assert count_correct(tf.fill((4, 10), value), tf.constant([0, 1, 2, 3])).numpy().tolist() == [0, 0, 4]


@pytest.mark.parametrize("batch_size", [1, 7, 32, 1000])
def test_counts_are_exact_at_any_batch_size(batch_size):
    random = np.random.default_rng(1)
    images, labels = random.normal(size=(100, 8)).astype("float32"), random.integers(0, 8, 100).astype("int32")
    model = keras.Sequential([keras.Input((8,)), keras.layers.Activation("linear")])
    pad = -100 % batch_size
    padded = np.pad(images, ((0, pad), (0, 0))), np.pad(labels, (0, pad), constant_values=-1)
    *counts, loss = Evaluator(model, tf.distribute.get_strategy())(
        tf.data.Dataset.from_tensor_slices(padded).batch(batch_size)
    )
    order = np.argsort(-images, axis=1)
    assert counts == [(order[:, 0] == labels).sum(), (order[:, :5] == labels[:, None]).any(1).sum(), 100]
    logits = images.astype("float64")
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(100), labels]
    assert loss == pytest.approx(losses.mean(), rel=1e-6)  # sums of float32


def test_a_loss_that_is_not_finite_is_that_of_the_smallest_probability():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Activation("linear")])
    logits = np.array([[np.nan, 0], [0, np.inf], [0, 1e30]], "float32")
    batches = tf.data.Dataset.from_tensors((logits, np.zeros(3, "int32")))
    assert Evaluator(model, tf.distribute.get_strategy())(batches).loss == pytest.approx(-np.log(2.0**-126))


def identity_evaluation(*logits, labels):
    """Evaluates networks that answer with what they are shown: all of them see the logits side by side."""
    logits = [np.asarray(each, "float32") for each in logits]
    classes = logits[0].shape[1]
    images = keras.Input((classes * len(logits),))
    models = [keras.Model(images, images[:, k * classes : (k + 1) * classes]) for k in range(len(logits))]
    batches = tf.data.Dataset.from_tensors((np.concatenate(logits, 1), np.array(labels, "int32")))
    return evaluate(models, batches, tf.distribute.get_strategy())


def test_an_ensemble_answers_by_the_mean_of_probabilities_not_of_logits():
    # One network is sure of class 0; two others prefer class 1 a little. In probabilities 1 + 2 * 0.4 to 2 * 0.6.
    sure, other = np.array([[20.0, 0.0]]), np.log([[0.4, 0.6]])
    *members, ensemble = identity_evaluation(sure, other, other, labels=[0])
    assert [member.counts.top1 for member in members] == [1, 0, 0]
    assert ensemble.counts.top1 == 1
    geometric = np.log([[0.1, 0.9]]) * 2 + np.array([[1.0, 0.0]])  # here the mean of logits would be right
    *_, ensemble = identity_evaluation(np.log([[0.999, 0.001]]), np.log([[0.45, 0.55]]), labels=[1])
    assert ensemble.counts.top1 == 0 and geometric.argmax() == 1


def test_calibration_error_by_hand():
    # Three answers with confidence 0.9, of which two are right, and one padding row: |0.9 * 3 - 2| / 3.
    logits = np.log([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.5, 0.5]])
    (evaluation,) = identity_evaluation(logits, labels=[0, 1, 1, -1])
    assert evaluation.counts == (2, 3, 3)
    assert evaluation.calibration_error == pytest.approx(0.7 / 3, rel=1e-6)


def test_confusions_count_own_class_by_answer():
    logits = np.eye(3)[[0, 1, 1, 2]]
    (evaluation,) = identity_evaluation(logits, labels=[0, 0, 1, -1])
    assert evaluation.confusion.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert evaluation.by_class.tolist() == [[2, 1, 1], [1, 2, 1], [0, 0, 0]]


def test_no_confusions_of_many_classes():
    (evaluation,) = identity_evaluation(np.eye(51), labels=range(51))
    assert evaluation.confusion is None and evaluation.counts.top1 == 51
    assert evaluation.by_class.tolist() == [[1, 1, 1]] * 51


# The same 21 images in any cut, by one program on one device and on two: what it prints must not depend on either.
COUNTS = """
import functools, json, sys
import keras, tensorflow as tf
from bn_keras.evaluation import multicrop
from bn_keras.input.dataset_formats import read_dataset
from bn_keras.training.distribution import make_strategy
from bn_keras.evaluation.accuracy import Evaluator, evaluate
from bn_keras.input.options import InputOptions
from bn_keras.input.pipeline import validation_batches
devices, data_dir = int(sys.argv[1]), sys.argv[2]
strategy = make_strategy("mirrored" if devices > 1 else "one_device", devices)
dataset = read_dataset(data_dir)
keras.utils.set_random_seed(0)
with strategy.scope():
    model = keras.Sequential([
        keras.Input((32, 32, 1)),
        keras.layers.Conv2D(4, 5, 3, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(3),
    ])
images, _ = next(iter(validation_batches(dataset, InputOptions(32), batch_size=21)))
model.layers[-1].bias.assign(-tf.reduce_mean(model(images), 0))  # or one class would be the answer to all
squares = functools.partial(multicrop.squares, image_size=32, channels=1)
found = []
for batch_size, view in [*((size, None) for size in (1, 7, 32, 1000)), (1, squares), (7, squares), (32, squares)]:
    batches = validation_batches(dataset, InputOptions(32), batch_size=batch_size, view=view)
    (evaluation,) = evaluate([model], batches, strategy)
    found.append([batch_size, view is not None, evaluation.counts, evaluation.confusion.tolist()])
    if batch_size == 7 and view is None:
        assert Evaluator(model, strategy)(batches)[:3] == evaluation.counts
print(json.dumps(found))
"""


def test_counts_are_exact_for_any_batch_size_on_one_device_and_on_two(data_dir):
    found = {}
    for devices in (1, 2):
        done = run_program("-c", COUNTS, devices, data_dir, warm=True)
        assert done.returncode == 0, done.stderr
        for batch_size, multicrop, counts, confusion in json.loads(done.stdout.splitlines()[-1]):
            assert sum(map(sum, confusion)) == counts[2] == 21
            found.setdefault(multicrop, {})[devices, batch_size] = (counts, confusion)
    for results in found.values():
        first = results[1, 1]
        assert all(result == first for result in results.values()), results
        assert sum(any(column) for column in zip(*first[1], strict=True)) > 1  # not one answer to all
