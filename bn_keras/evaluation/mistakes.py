"""A network's worst mistakes: the wrong answers with the largest losses, as a contact sheet."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from PIL import Image

from bn_keras.input.contact_sheet import contact_sheet
from bn_keras.markdown import percent


class Mistake(NamedTuple):
    """A wrong answer.

    Attributes:
      loss: the cross-entropy in nats.
      image: float32 `[H, W, C]` in [-1, 1], as the network saw it.
      label: the image's class.
      answer: the class that was answered.
      probability: that of the answer.
    """

    loss: float
    image: np.ndarray
    label: int
    answer: int
    probability: float


def judge(log_probabilities: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """What `WorstMistakes.add` needs to know of a batch.

    Args:
      log_probabilities: floating point `[N, classes]`.
      labels: int32 `[N]`; rows with a negative label are padding.

    Returns:
      The losses of wrong answers, -1 for right ones and padding; the answers, int32; and their probabilities; `[N]`.
    """
    answers = tf.argmax(log_probabilities, axis=1, output_type=labels.dtype)
    losses = -tf.gather(log_probabilities, tf.maximum(labels, 0), batch_dims=1)
    losses = tf.where(tf.math.is_finite(losses), losses, losses.dtype.max)
    losses = tf.where((answers != labels) & (labels >= 0), losses, tf.constant(-1, losses.dtype))
    return losses, answers, tf.exp(tf.reduce_max(log_probabilities, 1))


class WorstMistakes:
    """Keeps the mistakes with the largest losses of all batches that are added, the worst one first.

    Args:
      count: how many to keep.
    """

    def __init__(self, count: int):
        self._count = count
        self.found: list[Mistake] = []

    def add(
        self, images: tf.Tensor, labels: tf.Tensor, losses: tf.Tensor, answers: tf.Tensor, probabilities: tf.Tensor
    ) -> None:
        """Adds the mistakes of a batch; the last three arguments are the result of `judge`."""
        order = np.argsort(-losses.numpy())[: self._count]
        new = [
            Mistake(float(losses[k]), images[k].numpy(), int(labels[k]), int(answers[k]), float(probabilities[k]))
            for k in order
            if losses[k] >= 0
        ]
        self.found = sorted([*self.found, *new], key=lambda mistake: -mistake.loss)[: self._count]

    def sheet(self, class_names: Sequence[str], title: str, **layout: Any) -> Image.Image:
        """A contact sheet; under each image stand its class, the answer and the answer's probability.

        Args:
          class_names: the name of each class.
          title: the line above the images.
          layout: `columns` and `tile` of `contact_sheet`.
        """
        captions = [
            f"{class_names[each.label]}; answer: {class_names[each.answer]} {percent(each.probability, digits=0)}"
            for each in self.found
        ]
        return contact_sheet(np.stack([each.image for each in self.found]), captions, title=title, **layout)
