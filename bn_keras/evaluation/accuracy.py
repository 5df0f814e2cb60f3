"""Top-1 and top-5 accuracy as counts: summed over every example once, divided once, whatever the batch size.

`Evaluator` is what training looks at; `evaluate` is Section 4.2.3: one crop or 144, one network or an ensemble.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from bn_keras.evaluation import multicrop

CALIBRATION_BINS = 15
"""Of equal width over the confidence in (0, 1], as Guo et al. (2017) take for the expected calibration error."""

MOST_CLASSES_CONFUSED = 50
"""Confusions are counted for at most this many classes: more cannot be read in a plot."""


class Counts(NamedTuple):
    """Examples whose class was the network's first, or among its first five, and all examples looked at."""

    top1: int
    top5: int
    of: int


LARGEST_LOSS = -math.log(np.finfo("float32").tiny)
"""Of one example: the loss at float32's smallest probability, 87.3. A loss that is not finite counts as this."""


class Validation(NamedTuple):
    """What training looks at: the fields of `Counts`, and the mean cross-entropy of the examples, in nats."""

    top1: int
    top5: int
    of: int
    loss: float


class Evaluation(NamedTuple):
    """What one network, or an ensemble, makes of a data set.

    Attributes:
      counts: of right answers.
      calibration_error: expected calibration error (Guo et al., 2017): the difference of confidence and accuracy in
        `CALIBRATION_BINS` bins of confidence, weighted by their examples; 0 is calibrated.
      by_class: int64 `[classes, 3]`: examples of the class, answers that named it, and right answers.
      confusion: int64 `[classes, classes]`, examples by (own class, answer); None for more than
        `MOST_CLASSES_CONFUSED` classes.
    """

    counts: Counts
    calibration_error: float
    by_class: np.ndarray
    confusion: np.ndarray | None


def count_correct(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Counts of one batch; rows with a negative label are padding and count nowhere.

    Args:
      logits: floating point `[N, classes]`, or anything else that ranks the classes.
      labels: int32 `[N]`.

    Returns:
      int64 `[3]`: top-1, top-5 (top-1 of fewer than five classes counts all), examples. A class ties as lost, so a
      network whose logits are all equal, or not finite, is right about nothing.
    """
    real = labels >= 0
    own = tf.gather(logits, tf.maximum(labels, 0), batch_dims=1)
    rank = tf.reduce_sum(tf.cast(~(logits < own[:, None]), tf.int32), -1) - 1
    finite = tf.math.is_finite(own)
    counted = [real & finite & (rank < 1), real & finite & (rank < 5), real]
    return tf.stack([tf.reduce_sum(tf.cast(mask, tf.int64)) for mask in counted])


def _loss_sum(logits, labels):
    """The summed cross-entropy of one batch, float32; rows with a negative label are padding and count nowhere."""
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(labels, 0), tf.cast(logits, "float32"))
    losses = tf.where(losses < LARGEST_LOSS, losses, LARGEST_LOSS)  # also where the loss is no number
    return tf.reduce_sum(tf.where(labels >= 0, losses, 0.0))


class Evaluator:
    """Runs a model over batches in inference mode under a distribution strategy.

    Args:
      model: from images to logits.
      strategy: the one that the model was made under.
    """

    def __init__(self, model: keras.Model, strategy: tf.distribute.Strategy):

        def replica_step(images, labels):
            logits = model(images, training=False)
            return count_correct(logits, labels), _loss_sum(logits, labels)

        self._sum = _SumOverBatches(replica_step, strategy)

    def __call__(self, batches) -> Validation:
        """Sums over all of `batches`, (images, labels): a dataset as `validation_batches` makes, or distributed."""
        counts, loss_sum = self._sum(batches)
        counts = _counts(counts)
        return Validation(**counts._asdict(), loss=float(loss_sum) / counts.of)


def evaluate(
    models: Sequence[keras.Model],
    batches: tf.data.Dataset,
    strategy: tf.distribute.Strategy,
    *,
    after_batch: Callable[[int], None] = lambda batch: None,
) -> list[Evaluation]:
    """Evaluates networks and, where there are several, their ensemble.

    Args:
      models: from images to logits, made under `strategy`.
      batches: of `validation_batches`; views of one image, or the `multicrop.squares` of 144.
      after_batch: called with the count of batches that are done, after each.

    Returns:
      One evaluation a model; of several, one more: of the arithmetic mean of their class probabilities.
    """

    def replica_step(views, labels):
        probabilities = class_probabilities(models, views)
        if len(models) > 1:
            probabilities = tf.concat([probabilities, tf.reduce_mean(probabilities, 1, keepdims=True)], 1)
        return [_tally(each, labels) for each in tf.unstack(probabilities, axis=1)]

    tallies = _SumOverBatches(replica_step, strategy)(batches, after_batch)
    return [_evaluation(*tally) for tally in tallies]


def class_probabilities(models: Sequence[keras.Model], views: tf.Tensor | tuple[tf.Tensor, ...]) -> tf.Tensor:
    """The class probabilities that each of several networks gives each image, averaged over its crops.

    Args:
      models: M models from images to logits.
      views: images float32 `[N, image_size, image_size, channels]` in [-1, 1], or the squares of 144 crops:
        four tensors `[N, 3, side, side, channels]`.

    Returns:
      float64 `[N, M, classes]`: float32 would make all small probabilities of a confident network equal, to 0.
    """

    def probabilities(images):
        return tf.stack([tf.nn.softmax(tf.cast(model(images, training=False), tf.float64)) for model in models], 1)

    if isinstance(views, tuple):
        output = tf.TensorSpec((len(models), models[0].output_shape[-1]), tf.float64)
        return multicrop.mean_over_crops(probabilities, views, models[0].input_shape[1], output)
    return probabilities(views)


class _SumOverBatches:
    """The sum of `function(images, labels)`, a structure of tensors, over replicas and batches."""

    def __init__(self, function, strategy):
        @tf.function
        def step(images, labels):
            results = strategy.run(function, args=(images, labels))
            return tf.nest.map_structure(lambda result: strategy.reduce("SUM", result, axis=None), results)

        self._step = step
        self._strategy = strategy

    def __call__(self, batches, after_batch=lambda batch: None):
        if isinstance(batches, tf.data.Dataset):  # else they are distributed
            batches = self._strategy.experimental_distribute_dataset(batches)
        total = None
        for number, batch in enumerate(batches, start=1):
            result = self._step(*batch)
            total = result if total is None else tf.nest.map_structure(tf.add, total, result)
            after_batch(number)
        return tf.nest.map_structure(lambda value: value.numpy(), total)


def _tally(probabilities, labels):
    """Sums of one batch: counts; examples, confidences and right answers by bin of confidence; by class; confusions."""
    classes = probabilities.shape[-1]
    real = labels >= 0
    confidence = tf.reduce_max(probabilities, -1)
    answer = tf.argmax(probabilities, -1, tf.int32)
    bins = tf.clip_by_value(tf.cast(tf.math.ceil(confidence * CALIBRATION_BINS), tf.int32) - 1, 0, CALIBRATION_BINS - 1)
    columns = tf.stack([tf.ones_like(confidence), confidence, tf.cast(answer == labels, tf.float64)], -1)
    calibration = tf.math.unsorted_segment_sum(columns * tf.cast(real, tf.float64)[:, None], bins, CALIBRATION_BINS)
    own, one = tf.maximum(labels, 0), tf.cast(real, tf.int64)
    named_right = tf.where(answer == labels, one, 0)
    sums = [(one, own), (one, answer), (named_right, own)]
    by_class = tf.stack([tf.math.unsorted_segment_sum(values, at, classes) for values, at in sums], -1)
    tally = [count_correct(probabilities, labels), calibration, by_class]
    if classes <= MOST_CLASSES_CONFUSED:
        confusion = tf.math.unsorted_segment_sum(one, own * classes + answer, classes**2)
        tally.append(tf.reshape(confusion, (classes, classes)))
    return tally


def _evaluation(counts, calibration, by_class, confusion=None):
    examples, confidences, right = calibration.T
    error = float(np.abs(confidences - right).sum() / examples.sum())
    return Evaluation(_counts(counts), error, by_class, confusion)


def _counts(counts):
    return Counts(*(int(count) for count in counts))
