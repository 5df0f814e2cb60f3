"""Pictures of a run for TensorBoard: the training images that the network gets, and its worst mistakes."""

from collections.abc import Iterable

import keras
import tensorflow as tf
from PIL import Image

from bn_keras.evaluation.mistakes import WorstMistakes, judge
from bn_keras.input.contact_sheet import contact_sheet
from bn_keras.input.run_batches import RunBatches

_LAYOUT = {"columns": 4, "tile": 96}
"""A sheet is then about as wide as TensorBoard shows it, so that captions can be read."""


class Pictures:
    """Draws contact sheets of `config.pictures` images each.

    Args:
      model: the run's model, from images to logits.
      batches: the run's mini-batches.
    """

    def __init__(self, model: keras.Model, batches: RunBatches):
        self._batches = batches

        @tf.function
        def judged(images, labels):
            logits = tf.cast(model(images, training=False), tf.float32)
            return judge(tf.nn.log_softmax(logits), labels)

        self._judged = judged

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
        mistakes = WorstMistakes(count)
        for images, labels in validation:
            mistakes.add(images, labels, *self._judged(images, labels))
        if mistakes.found:
            title = f"{dataset.name}: worst mistakes, after {examples:,} examples"
            sheets["worst_mistakes"] = mistakes.sheet(dataset.class_names, title, **_LAYOUT)
        return sheets
