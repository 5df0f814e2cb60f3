"""Pictures of a run for TensorBoard: the training images that the network gets, and its worst mistakes."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from PIL import Image

from bn_keras.input.contact_sheet import contact_sheet
from bn_keras.input.run_batches import RunBatches

_LAYOUT = {"columns": 4, "tile": 96}
"""A sheet is then about as wide as TensorBoard shows it, so that captions can be read."""


class Mistake(NamedTuple):
    """A wrong answer: its cross-entropy, the image float32 `[H, W, C]`, its class and the class that was answered."""

    loss: float
    image: np.ndarray
    label: int
    answer: int


class Pictures:
    """Draws contact sheets of `config.pictures` images each.

    Args:
      model: the run's model, from images to logits.
      batches: the run's mini-batches.
    """

    def __init__(self, model: keras.Model, batches: RunBatches):
        self._batches = batches
        self._judge = tf.function(lambda images, labels: _judge(model(images, training=False), labels))

    def draw(self, examples: int, validation: Iterable) -> dict[str, Image.Image]:
        """The sheets by name; without a mistake there is no sheet of mistakes.

        Args:
          examples: how many examples the run has seen; the sheet of training images shows the next ones.
          validation: batches of the run's `evaluation`.
        """
        count, dataset = self._batches.config.pictures, self._batches.dataset
        images, labels = next(iter(self._batches.training(examples, distort_on="host")))
        captions = [dataset.class_names[label] for label in labels.numpy()[:count]]
        title = f"{dataset.name}: training, after {examples:,} examples"
        sheets = {"training_images": contact_sheet(images.numpy()[:count], captions, title=title, **_LAYOUT)}
        if mistakes := worst_mistakes(self._judge, validation, count):
            names = dataset.class_names
            captions = [f"{names[each.label]}; answer: {names[each.answer]}" for each in mistakes]
            title = f"{dataset.name}: worst mistakes, after {examples:,} examples"
            images = np.stack([each.image for each in mistakes])
            sheets["worst_mistakes"] = contact_sheet(images, captions, title=title, **_LAYOUT)
        return sheets


def worst_mistakes(judge: Callable, batches: Iterable, count: int) -> list[Mistake]:
    """The wrong answers with the largest losses, the worst one first.

    Args:
      judge: maps a batch's images and labels to the losses of wrong answers, -1 for all others, and the answers.
      batches: (images float32 `[N, H, W, C]`, labels int32 `[N]`); rows with a negative label are padding.
      count: how many mistakes to return at most.
    """
    worst: list[Mistake] = []
    for images, labels in batches:
        losses, answers = (part.numpy() for part in judge(images, labels))
        for k in np.argsort(-losses)[:count]:
            if losses[k] >= 0:
                worst.append(Mistake(float(losses[k]), images[k].numpy(), int(labels[k]), int(answers[k])))
        worst = sorted(worst, key=lambda mistake: -mistake.loss)[:count]
    return worst


def _judge(logits, labels):
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(labels, 0), tf.cast(logits, tf.float32))
    answers = tf.argmax(logits, axis=1, output_type=labels.dtype)
    losses = tf.where(tf.math.is_finite(losses), losses, losses.dtype.max)
    return tf.where((answers != labels) & (labels >= 0), losses, -1.0), answers
