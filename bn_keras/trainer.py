"""Trains one run: steps, learning-rate decay, evaluation, checkpoints, exact resume, divergence.

All that a run does is a function of (seed, step, replica). A checkpoint is the values of the variables at a step, and
resuming is: restore them, forget the curve after that step, start the input at it. The result is bit for bit that of a
run that was never interrupted.
"""

import contextlib
import enum
import functools
import os
import signal
import time

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from bn_keras import checkpoint
from bn_keras.batch_normalization import BatchNormalization
from bn_keras.dataset import Dataset
from bn_keras.errors import InputError
from bn_keras.evaluation import Evaluator, count_correct
from bn_keras.inception import build_model
from bn_keras.input_pipeline import find_damage, training_batches, validation_batches
from bn_keras.progress import Progress
from bn_keras.run import MODEL_FILE, RunConfig, RunDirectory
from bn_keras.tensorboard import TensorBoardWriter
from bn_keras.variants import DECAY_FACTOR, MOMENTUM


class Outcome(enum.Enum):
    """How `train` ended."""

    FINISHED = "finished"
    DIVERGED = "diverged"
    INTERRUPTED = "interrupted"
    PREEMPTED = "preempted"


class StaircaseDecay(keras.optimizers.schedules.LearningRateSchedule):
    """`rate = initial * DECAY_FACTOR ^ floor(step * batch_size / decay_examples)`.

    In whole numbers, so that the steps at which the rate falls are exact at any count of steps.
    """

    def __init__(self, initial: float, batch_size: int, decay_examples: int):
        self.initial = initial
        self.batch_size = batch_size
        self.decay_examples = decay_examples

    def __call__(self, step):
        decays = tf.cast(step, tf.int64) * self.batch_size // self.decay_examples
        return self.initial * DECAY_FACTOR ** tf.cast(decays, tf.float32)

    def get_config(self):
        return {"initial": self.initial, "batch_size": self.batch_size, "decay_examples": self.decay_examples}


class TrainingState:
    """Model, optimizer and running sums of one run: every variable that a checkpoint holds.

    The sums of loss and correct answers since the last row of the curve live here too, so that a checkpoint may be made
    between two rows.
    """

    def __init__(self, config: RunConfig, strategy: tf.distribute.Strategy):
        keras.utils.set_random_seed(config.seed)
        with strategy.scope():
            self.model = build_model(
                config.variant,
                image_size=config.image_size,
                channels=config.channels,
                classes=config.classes,
                width=config.width,
                batch_normalization=functools.partial(BatchNormalization, momentum=config.bn_momentum),
            )
            self.learning_rate = StaircaseDecay(config.initial_learning_rate, config.batch_size, config.decay_examples)
            self.optimizer = keras.optimizers.SGD(self.learning_rate, momentum=MOMENTUM)
            self.optimizer.build(self.model.trainable_variables)
            self.step = _counter(tf.int64, 0)
            self.first_bad_step = _counter(tf.int64, 0)
            self.loss_sum = _counter(tf.float32, 0.0)
            self.correct = _counter(tf.int64, 0)

    def arrays(self) -> dict[str, np.ndarray]:
        """The value of every variable by its name."""
        return {name: np.asarray(variable.numpy()) for name, variable in self._variables().items()}

    def restore(self, arrays: dict[str, np.ndarray]):
        for name, variable in self._variables().items():
            variable.assign(arrays[name])

    def finite(self) -> bool:
        return bool(self._finite())

    @tf.function
    def _finite(self):
        variables = [tf.convert_to_tensor(variable.value) for variable in self.model.weights]
        return tf.reduce_all([tf.reduce_all(tf.math.is_finite(value)) for value in variables])

    def _variables(self):
        own = {name: getattr(self, name) for name in ("step", "loss_sum", "correct")}
        model = {f"model/{variable.path}": variable.value for variable in self.model.variables}
        optimizer = {f"optimizer/{variable.path}": variable.value for variable in self.optimizer.variables}
        return own | model | optimizer


def _counter(dtype, value):
    return tf.Variable(value, dtype=dtype, trainable=False, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)


def make_train_steps(state: TrainingState, config: RunConfig, strategy: tf.distribute.Strategy):
    """The training loop as one graph: `train_steps(iterator, count)` takes `count` steps, an int32 tensor."""
    cross_entropy = tf.nn.sparse_softmax_cross_entropy_with_logits

    def replica_step(images, labels):
        with tf.GradientTape() as tape:
            logits = state.model(images, training=True)
            loss = tf.reduce_sum(cross_entropy(labels, logits)) / config.batch_size
            total = loss + tf.add_n(state.model.losses) / strategy.num_replicas_in_sync if state.model.losses else loss
        variables = state.model.trainable_variables
        state.optimizer.apply(tape.gradient(total, variables), variables)
        return loss, total, count_correct(logits, labels)[0]

    @tf.function
    def train_steps(iterator, count):
        for _ in tf.range(count):
            results = strategy.run(replica_step, args=next(iterator))
            loss, total, correct = (strategy.reduce("SUM", result, axis=None) for result in results)
            state.step.assign_add(1)
            state.loss_sum.assign_add(loss)
            state.correct.assign_add(correct)
            if state.first_bad_step == 0 and not tf.math.is_finite(total):
                state.first_bad_step.assign(state.step)

    return train_steps


def train(config: RunConfig, dataset: Dataset, directory: RunDirectory, strategy: tf.distribute.Strategy) -> Outcome:
    """Trains `config` in `directory`, from where it stands to `config.steps`.

    Returns when all steps are done or when the run has diverged, which is then the last row of the curve.

    Raises:
      InputError: the directory holds another run, or another process trains in it.
      OSError: nothing more can be written; the last checkpoint is whole.
    """
    directory.check(config)
    directory.open(config, dataset.class_names)
    curve = directory.curve
    state = TrainingState(config, strategy)
    if saved := checkpoint.load_newest(directory.path):
        state.restore(saved[1])
        logging.info("continuing %s at step %d", directory.path, saved[0])
    step = int(state.step.numpy())
    curve.truncate(step)
    board = TensorBoardWriter(directory.path, config.flat(), curve.rows)

    train_steps = make_train_steps(state, config, strategy)
    evaluator = Evaluator(state.model, strategy)
    validation = validation_batches(
        dataset,
        batch_size=config.eval_batch_size,
        image_size=config.image_size,
        augmentation=config.augmentation,
    )
    batches = training_batches(
        dataset,
        batch_size=config.batch_size,
        image_size=config.image_size,
        seed=config.seed,
        start_step=step,
        augmentation=config.augmentation,
        shuffling=config.variant.shuffling,
        photometric_distortion=config.variant.photometric_distortion,
    )
    iterator = iter(strategy.experimental_distribute_dataset(batches))
    progress = Progress(config.variant.name, config.steps)
    interruption = _Interruption()

    def add_row(kind, at=None, **fields):
        at = step if at is None else at
        row = {"kind": kind, "step": at, "examples": at * config.batch_size, **fields, "wall_time": time.time()}
        curve.append(row)
        board.add(row)

    def diverge(at, reason):
        add_row("diverged", at, reason=reason)
        board.close()
        progress.close(f"diverged at step {at}: {reason}")
        return Outcome.DIVERGED

    def save():
        curve.sync()
        checkpoint.save(directory.path, step, state.arrays())
        board.flush()

    def due(every):
        return step % every == 0 or step == config.steps

    cadences = (config.log_every, config.eval_every, config.checkpoint_every)
    logged_step = max((row["step"] for row in curve.rows if row["kind"] == "training"), default=0)
    images, seconds, steps_per_second = 0, 0.0, 0.0
    while step < config.steps:
        count = min(config.steps, *(step // every * every + every for every in cadences)) - step
        # About one second a call, so that the progress line lives and a signal is seen soon; the first call compiles.
        count = min(count, max(1, int(steps_per_second)))
        started = time.perf_counter()
        with _naming_damage(dataset, "train"):
            train_steps(iterator, tf.constant(count))
        step = int(state.step.numpy())
        elapsed = time.perf_counter() - started
        steps_per_second = count / elapsed
        images, seconds = images + count * config.batch_size, seconds + elapsed
        if bad_step := int(state.first_bad_step.numpy()):
            return diverge(bad_step, "the loss is not finite")
        progress.update(step)
        if due(config.log_every):
            seen = (step - logged_step) * config.batch_size
            add_row(
                "training",
                learning_rate=float(state.learning_rate(step - 1)),  # of the row's last step
                loss=float(state.loss_sum.numpy()) / (step - logged_step),
                accuracy=int(state.correct.numpy()) / seen,
                images_per_second=images / seconds,
            )
            state.loss_sum.assign(0.0)
            state.correct.assign(0)
            logged_step, images, seconds = step, 0, 0.0
        if due(config.eval_every):
            with _naming_damage(dataset, "validation"):
                counts = evaluator(validation)
            add_row("validation", **counts._asdict())
            progress.evaluated(step, counts.top1 / counts.of)
        if due(config.checkpoint_every) or interruption.outcome:
            if not state.finite():
                return diverge(step, "a weight is not finite")
            save()
        if interruption.outcome and step < config.steps:
            board.close()
            progress.close(f"interrupted at step {step}; the same command continues")
            return interruption.outcome

    _save_model(state.model, directory.path)
    board.close()
    progress.close("finished")
    return Outcome.FINISHED


class _Interruption:
    """Notes the first SIGINT or SIGTERM, for the loop to save and stop; a second one ends the process as usual."""

    def __init__(self):
        self.outcome = None
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number, frame):
        self.outcome = Outcome.INTERRUPTED if number == signal.SIGINT else Outcome.PREEMPTED
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _naming_damage(dataset, split):
    """Turns TensorFlow's error about a record into one that names the file and the record."""
    try:
        yield
    except (tf.errors.DataLossError, tf.errors.InvalidArgumentError, tf.errors.NotFoundError) as error:
        if damage := find_damage(dataset, split):
            raise InputError(damage) from error
        raise


def _save_model(model, directory):
    path = os.path.join(directory, MODEL_FILE)
    temporary = os.path.join(directory, "unfinished.keras")
    model.save(temporary)
    os.replace(temporary, path)
