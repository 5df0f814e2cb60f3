"""Accuracy is counts, summed and divided once."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from bn_keras.evaluation import Evaluator, count_correct


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
    counts = Evaluator(model, tf.distribute.get_strategy())(
        tf.data.Dataset.from_tensor_slices(padded).batch(batch_size)
    )
    order = np.argsort(-images, axis=1)
    assert counts == ((order[:, 0] == labels).sum(), (order[:, :5] == labels[:, None]).any(1).sum(), 100)
