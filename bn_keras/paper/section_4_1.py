"""Section 4.1: three fully connected layers of 100 sigmoids on binary MNIST, with and without Batch Normalization.

Both networks start from the same weights and see the same mini-batches; all images are in memory. As in `trainer`, all
that a run does depends only on (seed, step), so an interrupted run continues bit for bit.
"""

import dataclasses
import time

import keras
import numpy as np
import tensorflow as tf

from bn_keras.errors import InputError
from bn_keras.evaluation.accuracy import count_correct
from bn_keras.input.dataset import Dataset
from bn_keras.input.options import InputOptions
from bn_keras.input.pipeline import validation_batches
from bn_keras.layers.batch_normalization import BatchNormalization
from bn_keras.paper.figure_1 import NETWORKS, PERCENTILES
from bn_keras.paper.mnist_config import MnistConfig
from bn_keras.progress import Progress
from bn_keras.runs import checkpoint
from bn_keras.runs.run_directory import RunDirectory

IMAGE_SIZE = 28
HIDDEN_LAYERS = 3
UNITS = 100

_CHECKPOINT_EVERY = 1_000  # steps, about a second of work


def read_binary_images(dataset: Dataset, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads a whole split: (images float32 `[N, 784]` of 0 and 1, labels int32 `[N]`).

    The paper's images are binary; our threshold, half of full scale, is not in the paper.

    Raises:
      InputError: the images are not gray.
    """
    if dataset.channels != 1:
        raise InputError(f"{dataset.name} has color images; Section 4.1 takes gray digits, such as MNIST")
    once = dataclasses.replace(dataset, splits={"validation": dataset.splits[split]})
    batches = validation_batches(once, InputOptions(IMAGE_SIZE, augmentation="none"), batch_size=500)
    images, labels = (np.concatenate(parts) for parts in zip(*batches.as_numpy_iterator(), strict=True))
    real = labels >= 0
    return (images[real].reshape(-1, IMAGE_SIZE**2) > 0).astype("float32"), labels[real]


def build_network(batch_normalization: bool, *, classes: int, weight_deviation: float, seed: int) -> keras.Model:
    """Builds the network of Section 4.1. Its outputs are the logits and the inputs of the last hidden layer's sigmoids.

    A layer is `z = sigmoid(Wu + b)`, or with BN `z = sigmoid(BN(Wu))` (Section 3.2).
    """
    seeds = np.random.default_rng(seed).integers(2**31, size=HIDDEN_LAYERS + 1)
    gaussian = [keras.initializers.RandomNormal(0.0, weight_deviation, seed=int(each)) for each in seeds]
    x = inputs = keras.Input((IMAGE_SIZE**2,))
    for layer in range(HIDDEN_LAYERS):
        x = keras.layers.Dense(UNITS, use_bias=not batch_normalization, kernel_initializer=gaussian[layer])(x)
        if batch_normalization:
            x = BatchNormalization(debias=True)(x)
        before_sigmoid = x
        x = keras.layers.Activation("sigmoid")(x)
    logits = keras.layers.Dense(classes, kernel_initializer=gaussian[HIDDEN_LAYERS])(x)
    return keras.Model(inputs, [logits, before_sigmoid], name=list(NETWORKS)[batch_normalization])


class _Network:
    """One of the two networks, its optimizer and the loss since the last point of the curve."""

    def __init__(self, batch_normalization: bool, classes: int, config: MnistConfig):
        self.model = build_network(
            batch_normalization, classes=classes, weight_deviation=config.weight_deviation, seed=config.seed
        )
        self.optimizer = keras.optimizers.SGD(config.learning_rate)
        self.optimizer.build(self.model.trainable_variables)
        self.loss_sum = tf.Variable(0.0, trainable=False)

    def step(self, images, labels):
        with tf.GradientTape() as tape:
            logits, _ = self.model(images, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        variables = self.model.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        self.loss_sum.assign_add(loss)

    def variables(self):
        keras_variables = [*self.model.variables, *self.optimizer.variables]
        named = {f"{self.model.name}/{k}/{variable.path}": variable.value for k, variable in enumerate(keras_variables)}
        return {**named, f"{self.model.name}/loss_sum": self.loss_sum}


def batch_indices(examples: int, batch_size: int, seed: int, start: int, count: int) -> np.ndarray:
    """The indices of the examples of `count` steps from `start`, int32 `[count, batch_size]`, in shuffled epochs."""
    positions = np.arange(start * batch_size, (start + count) * batch_size)
    epochs = positions // examples
    indices = np.empty(len(positions), np.int32)
    for epoch in np.unique(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(examples)
        indices[epochs == epoch] = order[positions[epochs == epoch] % examples]
    return indices.reshape(count, batch_size)


def train(config: MnistConfig, dataset: Dataset, directory: RunDirectory[MnistConfig]) -> None:
    """Trains both networks in `directory`, from their newest checkpoint, if there is one, to `config.steps`.

    A row of the curve is one network at one step, tested on all test images. It holds `top1` of `of`; the mean `loss`
    of the mini-batches since the row before; and `percentiles`, the 15th, 50th and 85th of the input of each of the 100
    sigmoids of the last hidden layer.

    Raises:
      InputError: the directory holds another run, another process trains in it, or the loss is not finite.
    """
    directory.check(config, dataset.class_names)
    train_images, train_labels = map(tf.constant, read_binary_images(dataset, "train"))
    test_images, test_labels = map(tf.constant, read_binary_images(dataset, "validation"))
    networks = [_Network(bool(k), len(dataset.class_names), config) for k in range(len(NETWORKS))]
    row_step = tf.Variable(0, dtype=tf.int64, trainable=False)  # step of the last rows, from which on losses are summed
    variables = {name: variable for network in networks for name, variable in network.variables().items()}
    variables["row_step"] = row_step

    @tf.function
    def train_steps(indices):
        for batch in indices:
            for network in networks:
                network.step(tf.gather(train_images, batch), tf.gather(train_labels, batch))

    @tf.function
    def test(network):
        logits, before_sigmoid = networks[network].model(test_images, training=False)
        return count_correct(logits, test_labels), before_sigmoid

    def restore():
        if not (saved := checkpoint.load_newest(directory.path)):
            return 0
        step, arrays = saved
        rows = [row["step"] for row in directory.curve.rows if row["step"] <= step]
        arrays = {"row_step": np.asarray(max(rows, default=0))} | arrays  # which earlier versions lack
        for name, variable in variables.items():
            if name not in arrays:
                raise InputError(f"the checkpoint of step {step} lacks {name}: give another `directory`")
            variable.assign(arrays[name])
        return step

    restore()  # once before anything is written, and again when no other process can train there
    directory.open(config, dataset.class_names)
    step = restore()
    curve = directory.curve
    curve.truncate(step)

    def add_rows():
        for k, network in enumerate(networks):
            counts, before_sigmoid = test(k)
            loss = float(network.loss_sum.numpy()) / max(1, step - int(row_step.numpy()))
            if not np.isfinite(loss):
                raise InputError(
                    f"the loss {network.model.name} is not finite before step {step}: give a lower learning rate"
                )
            network.loss_sum.assign(0.0)
            curve.append(
                {
                    "kind": "test",
                    "network": network.model.name,
                    "step": step,
                    "examples": step * config.batch_size,
                    "top1": int(counts[0]),
                    "of": int(counts[2]),
                    "loss": loss,
                    "percentiles": np.percentile(before_sigmoid, PERCENTILES, axis=0).round(4).tolist(),
                    "wall_time": time.time(),
                }
            )
        row_step.assign(step)

    progress = Progress("mnist", config.steps)
    while step < config.steps:
        stop = min(config.steps, *(step // every * every + every for every in (config.eval_every, _CHECKPOINT_EVERY)))
        indices = batch_indices(config.train_examples, config.batch_size, config.seed, step, stop - step)
        train_steps(tf.constant(indices))
        step = stop
        progress.update(step)
        if step % config.eval_every == 0 or step == config.steps:
            add_rows()
            progress.evaluated(step, curve.rows[-1]["top1"] / curve.rows[-1]["of"])
        if step % _CHECKPOINT_EVERY == 0 or step == config.steps:
            curve.sync()
            checkpoint.save(directory.path, step, {name: value.numpy() for name, value in variables.items()})
    progress.close("finished")
