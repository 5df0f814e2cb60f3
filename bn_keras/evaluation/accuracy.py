"""Top-1 and top-5 accuracy. Right answers are counted over all examples and divided once, whatever the batch size.

`Evaluator` is for training; `evaluate` is Section 4.2.3: one crop or 144, one network or an ensemble.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from bn_keras.evaluation import multicrop
from bn_keras.evaluation.mistakes import WorstMistakes, judge

CALIBRATION_BINS = 15
"""Bins of equal width in (0, 1] for the expected calibration error, as many as Guo et al. (2017) take."""

MOST_CLASSES_CONFUSED = 50
"""Confusions are counted for at most this many classes, as a plot of more cannot be read."""


class Counts(NamedTuple):
    """How many examples' class was the network's first answer, or among its first five, and how many there were."""

    top1: int
    top5: int
    of: int


LARGEST_LOSS = -math.log(np.finfo("float32").tiny)
"""Largest loss of one example, 87.3, which is that of float32's smallest probability. A loss that is not finite counts
as this."""


class Validation(NamedTuple):
    """An evaluation during training: the fields of `Counts`, and the examples' mean cross-entropy in nats."""

    top1: int
    top5: int
    of: int
    loss: float


class Evaluation(NamedTuple):
    """The evaluation of one network, or of an ensemble, on a data set.

    Attributes:
      counts: the counts of right answers.
      calibration_error: expected calibration error (Guo et al., 2017): the difference between confidence and
        accuracy, averaged over examples in `CALIBRATION_BINS` bins of confidence; 0 is calibrated.
      by_class: int64 `[classes, 3]`: the class's examples, the answers that named it, and the right ones among them.
      confusion: int64 `[classes, classes]`, the number of examples by (class, answer); None for more than
        `MOST_CLASSES_CONFUSED` classes.
    """

    counts: Counts
    calibration_error: float
    by_class: np.ndarray
    confusion: np.ndarray | None


def count_correct(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """The counts of one batch. Rows with a negative label are padding and are not counted.

    Args:
      logits: floating point `[N, classes]`, or anything else that ranks the classes.
      labels: int32 `[N]`.

    Returns:
      int64 `[3]`: top-1, top-5 (of fewer than five classes all are right), examples. A tie counts as wrong, so a
      network whose logits are all equal, or not finite, is never right.
    """
    real = labels >= 0
    own = tf.gather(logits, tf.maximum(labels, 0), batch_dims=1)
    rank = tf.reduce_sum(tf.cast(~(logits < own[:, None]), tf.int32), -1) - 1
    finite = tf.math.is_finite(own)
    counted = [real & finite & (rank < 1), real & finite & (rank < 5), real]
    return tf.stack([tf.reduce_sum(tf.cast(mask, tf.int64)) for mask in counted])


def _loss_sum(logits, labels):
    """The summed cross-entropy of one batch, float32. Rows with a negative label are padding and are not counted."""
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(labels, 0), tf.cast(logits, "float32"))
    losses = tf.where(losses < LARGEST_LOSS, losses, LARGEST_LOSS)  # also if the loss is NaN
    return tf.reduce_sum(tf.where(labels >= 0, losses, 0.0))


class Evaluator:
    """Runs a model over batches in inference mode under a distribution strategy.

    Args:
      model: the model, from images to logits.
      strategy: the strategy under which the model was made.
    """

    def __init__(self, model: keras.Model, strategy: tf.distribute.Strategy):

        def replica_step(images, labels):
            logits = model(images, training=False)
            return (count_correct(logits, labels), _loss_sum(logits, labels)), ()

        self._sum = _SumOverBatches(replica_step, strategy)

    def __call__(self, batches) -> Validation:
        """Evaluates all `batches` of (images, labels), a dataset of `validation_batches` or a distributed one."""
        counts, loss_sum = self._sum(batches)
        counts = _counts(counts)
        return Validation(**counts._asdict(), loss=float(loss_sum) / counts.of)


def evaluate(
    models: Sequence[keras.Model],
    batches: tf.data.Dataset,
    strategy: tf.distribute.Strategy,
    *,
    after_batch: Callable[[int], None] = lambda batch: None,
    mistakes: WorstMistakes | None = None,
) -> list[Evaluation]:
    """Evaluates networks and, if there are several, their ensemble.

    Args:
      models: the networks, from images to logits, made under `strategy`.
      batches: a dataset of `validation_batches`, whose view is one crop, or the `multicrop.squares` of 144.
      after_batch: called after each batch with the number of batches that are done.
      mistakes: takes note of the worst mistakes of the one network, or of the ensemble.

    Returns:
      One evaluation for each model and, of several, one more of the mean of their class probabilities.
    """

    def replica_step(views, labels):
        probabilities = class_probabilities(models, views)
        if len(models) > 1:
            probabilities = tf.concat([probabilities, tf.reduce_mean(probabilities, 1, keepdims=True)], 1)
        each = tf.unstack(probabilities, axis=1)
        return [_tally(own, labels) for own in each], judge(tf.math.log(each[-1]), labels)

    def note(number, views, labels, judged):
        if mistakes is not None:
            shown = views[0] if isinstance(views, tuple) else views  # of 144 crops, the squares of the smallest scale
            for images, *others in zip(
                *map(strategy.experimental_local_results, (shown, labels, *judged)), strict=True
            ):
                mistakes.add(images[:, 1] if images.shape.rank == 5 else images, *others)
        after_batch(number)

    tallies = _SumOverBatches(replica_step, strategy)(batches, note)
    return [_evaluation(*tally) for tally in tallies]


def class_probabilities(models: Sequence[keras.Model], views: tf.Tensor | tuple[tf.Tensor, ...]) -> tf.Tensor:
    """The class probabilities that each of several networks gives each image, averaged over its crops.

    Args:
      models: the M networks, from images to logits.
      views: images float32 `[N, image_size, image_size, channels]` in [-1, 1], or the squares of 144 crops:
        four tensors `[N, 3, side, side, channels]`.

    Returns:
      float64 `[N, M, classes]`. In float32 all small probabilities of a confident network would be 0, and equal.
    """

    def probabilities(images):
        return tf.stack([tf.nn.softmax(tf.cast(model(images, training=False), tf.float64)) for model in models], 1)

    if isinstance(views, tuple):
        output = tf.TensorSpec((len(models), models[0].output_shape[-1]), tf.float64)
        return multicrop.mean_over_crops(probabilities, views, models[0].input_shape[1], output)
    return probabilities(views)


class _SumOverBatches:
    """The sum of what a function returns for each batch, over replicas and batches.

    Args:
      function: `function(images, labels)` returns two structures of tensors: what is summed, and what is not.
      strategy: the strategy under which it runs.
    """

    def __init__(self, function, strategy):
        @tf.function
        @tf.autograph.experimental.do_not_convert
        def step(images, labels):
            summed, others = strategy.run(function, args=(images, labels))
            return tf.nest.map_structure(lambda result: strategy.reduce("SUM", result, axis=None), summed), others

        self._step = step
        self._strategy = strategy

    def __call__(self, batches, after_batch=lambda number, images, labels, others: None):
        if isinstance(batches, tf.data.Dataset):  # otherwise they are distributed already
            batches = self._strategy.experimental_distribute_dataset(batches)
        total = None
        for number, batch in enumerate(batches, start=1):
            result, others = self._step(*batch)
            total = result if total is None else tf.nest.map_structure(tf.add, total, result)
            after_batch(number, *batch, others)
        return tf.nest.map_structure(lambda value: value.numpy(), total)


def _tally(probabilities, labels):
    """The sums of one batch: the counts; examples, confidences and right answers of each bin; the counts of each class;
    the confusions."""
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
