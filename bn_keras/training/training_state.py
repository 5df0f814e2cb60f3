"""The variables of a run, and the training step that changes them."""

import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from bn_keras.errors import InputError
from bn_keras.evaluation.accuracy import count_correct
from bn_keras.evaluation.trained_network import Network, network_of
from bn_keras.inference.population_statistics import batch_normalizations
from bn_keras.input.photometric_distortion import PhotometricDistortion
from bn_keras.private_names import graph_of_its_own
from bn_keras.runs.run_config import RunConfig
from bn_keras.training.accumulation import sum_over_parts
from bn_keras.training.fine_tuning import freeze, rate_factors
from bn_keras.training.learning_rate import learning_rate
from bn_keras.training.optimizer import LossScale, MomentumSGD
from bn_keras.training.process_settings import enforces_determinism, process_settings
from bn_keras.training.soft_labels import SoftLabels, mixture_of


class TrainingState:
    """All variables of a run, which a checkpoint holds: those of the model, of the optimizer, and running sums.

    The sums are for the curve's next row: its examples, their losses, and the right answers. A checkpoint can thus be
    made between two rows. `step` counts steps and `examples` counts their images, because the batch size may be changed
    during a run.
    """

    _OWN = ("step", "examples", "row_examples", "loss_sum", "correct", "best_step", "best_accuracy")

    def __init__(self, config: RunConfig, strategy: tf.distribute.Strategy, network: Network = network_of):
        with process_settings(config, strategy), strategy.scope():
            self.model = _built(network, config)
            freeze(self.model, config)
            self.optimizer = MomentumSGD(
                self.model.trainable_variables,
                config.variant.momentum,
                config.clip_norm,
                config.ema,
                rate_factors(self.model, config),
                self._statistics(),
            )
            self.loss_scale = LossScale() if config.precision == "mixed_float16" else None
            self.step = _counter(tf.int64, 0)
            self.examples = _counter(tf.int64, 0)
            self.first_bad_step = _counter(tf.int64, 0)
            self.row_examples = _counter(tf.int64, 0)
            self.loss_sum = _counter(tf.float32, 0.0)
            self.correct = _counter(tf.int64, 0)
            self.best_step = _counter(tf.int64, 0)
            self.best_accuracy = _counter(tf.float32, 0.0)

    def _statistics(self):
        """(moving average, weight of its old value) of what training moves: frozen averages stay, and need no average.

        The weight is 0 where the average moves by another rule: what is averaged is then the moving average itself.
        """
        statistics = []
        for layer in batch_normalizations(self.model):
            plain = layer.momentum < 1 and not (layer.renorm or getattr(layer, "debias", False))
            moved = (layer.moving_mean, layer.moving_variance) if layer.trainable else ()
            statistics += [(statistic, layer.momentum if plain else 0.0) for statistic in moved]
        return statistics

    def note_accuracy(self, step: int, accuracy: float) -> bool:
        """Notes an evaluation's accuracy; returns whether it is the best so far."""
        if better := bool(accuracy > self.best_accuracy):
            self.best_step.assign(step)
            self.best_accuracy.assign(accuracy)
        return better

    def arrays(self) -> dict[str, np.ndarray]:
        """The value of every variable by its name."""
        return {name: np.asarray(variable.numpy()) for name, variable in self._variables().items()}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Sets every variable from a checkpoint.

        Raises:
          InputError: the arrays are of another network.
        """
        count: np.ndarray = np.zeros((), np.int64)
        fraction: np.ndarray = np.zeros((), np.float32)
        # Checkpoints of earlier versions lack some variables. These get their values before the first step.
        arrays = {"best_step": count, "best_accuracy": fraction} | arrays
        if "row_examples" not in arrays:  # the sums are then of unknown many examples
            arrays |= {"row_examples": count, "loss_sum": fraction, "correct": count}
        paths = [statistic.path for statistic, _ in self._statistics()]  # averages of statistics begin with these
        own = {f"optimizer/{kind}/{path}": f"model/{path}" for kind in ("average", "previous") for path in paths}
        arrays = {copy: arrays[name] for copy, name in own.items() if name in arrays} | arrays
        for name, variable in self._variables().items():
            if name not in arrays or arrays[name].shape != variable.shape:
                found = f"of shape {arrays[name].shape}" if name in arrays else "missing"
                raise InputError(
                    f"the checkpoint cannot go on as this run: {name} {tuple(variable.shape)} is {found} there; "
                    "give another `directory`"
                )
            variable.assign(arrays[name])

    def finite(self) -> bool:
        return bool(self._finite())

    @tf.function(autograph=False)
    def _finite(self):
        variables = [tf.convert_to_tensor(variable.value) for variable in self.model.weights]
        return tf.reduce_all([tf.reduce_all(tf.math.is_finite(value)) for value in variables])

    def _variables(self):
        own = {name: getattr(self, name) for name in self._OWN}
        model = {f"model/{variable.path}": variable.value for variable in self.model.variables}
        optimizer = self.optimizer.variables() | (self.loss_scale.variables() if self.loss_scale else {})
        return own | model | {f"optimizer/{name}": variable for name, variable in optimizer.items()}


def _built(network, config):
    """The model that the function `network` builds, with its variables made.

    Raises:
      InputError: the model does not map images to logits, or has losses that training would ignore.
    """
    model = network(config)
    if network is network_of:
        return model
    logits = model(tf.zeros((1, config.image_size, config.image_size, config.channels)), training=False)
    if not tf.is_tensor(logits) or logits.shape != (1, config.classes):
        shapes = tf.nest.map_structure(lambda output: tuple(output.shape), logits)
        raise InputError(f"`network` makes outputs of the shape {shapes}, not the logits (1, {config.classes})")
    if len(model.losses) > sum(weight.regularizer is not None for weight in model.trainable_variables):
        raise InputError("`network` adds losses of its own, but training knows the cross-entropy and L2 of weights")
    return model


def make_train_steps(
    state: TrainingState, config: RunConfig, strategy: tf.distribute.Strategy
) -> Callable[..., tf.Tensor]:
    """Makes the training loop, one TensorFlow graph.

    Returns:
      `train_steps(iterator, count)`, which takes `count` (int32 scalar) steps and returns float64 `[count, 2]`: how
      many seconds each step waited for its input after the step before, and how many it took in all.
    """
    replica_step = make_replica_step(state, config)

    def now():
        if enforces_determinism(config, strategy):  # TensorFlow then refuses its own clock
            return tf.ensure_shape(tf.numpy_function(time.time, [], tf.float64), [])
        return tf.timestamp()

    # Its call begins when the batch is there: on the one thread of a small network, weights read early would count
    # as waiting for input, 3 ms of a step of 70.
    @graph_of_its_own
    def train_step(images, labels):
        rate = learning_rate(config, state.examples)
        arguments = images, labels, rate, tf.identity(state.step), mixture_of(config, state.step)
        results = strategy.run(replica_step, args=arguments)
        loss, correct, usable = (strategy.experimental_local_results(result)[0] for result in results)
        state.step.assign_add(1)
        state.examples.assign_add(config.batch_size)
        state.row_examples.assign_add(config.batch_size)
        state.loss_sum.assign_add(loss * config.batch_size)
        state.correct.assign_add(tf.cast(correct, tf.int64))
        bad = (state.first_bad_step == 0) & ~tf.math.is_finite(loss)
        state.first_bad_step.assign(tf.where(bad, state.step, state.first_bad_step))
        if state.loss_scale:
            state.loss_scale.update(usable)
        return loss

    def end_of(step):
        """The time at which a step's last variable is assigned; the loss is known before the backward pass."""
        # `step` is an output of a function's call, and what waits for a call waits for all that the function assigns.
        with tf.control_dependencies([step]):
            # An accelerator assigns later than it is told to, in order: read from it, a value is here after that.
            here = [copy.read_value() for copy in strategy.experimental_local_results(state.loss_sum)]
        with tf.device("CPU:0"), tf.control_dependencies([tf.identity(value) for value in here]):
            return now()

    def after(time, values):
        """The values, but only from that time on: the clock must not be read while the step still runs."""

        def hold(value):
            with tf.device(value.device), tf.control_dependencies([time]):
                return tf.identity(value)

        return tf.nest.map_structure(hold, values, expand_composites=True)

    @tf.function
    def train_steps(iterator, count):
        times = tf.TensorArray(tf.float64, count)
        ended = now()
        for k in tf.range(count):
            begun = ended
            with tf.control_dependencies([begun]):
                images, labels = next(iterator)
            with tf.control_dependencies(strategy.experimental_local_results(labels)):
                arrived = now()
            ended = end_of(train_step(*after(arrived, (images, labels))))
            times = times.write(k, tf.stack([arrived - begun, ended - begun]))
        return times.stack()

    return train_steps


def make_replica_step(state: TrainingState, config: RunConfig) -> Callable[..., tuple[tf.Tensor, ...]]:
    """Makes one replica's part of a step.

    Returns:
      `replica_step(images, labels, rate, step, mixture)`. Images and labels are a mini-batch of `training_batches`,
      and the mixture is `mixture_of` the step. It returns three scalars, the same on every replica: the mean loss of
      the whole mini-batch, without L2, float32; the number of right answers, float32 (of a mixture, the right answer
      is the label with the largest share); and whether the gradients were finite, bool.
    """
    weights = state.model.trainable_variables
    distort = PhotometricDistortion(config.variant.photometric_distortion) if config.distort_on == "device" else None
    soft_labels = SoftLabels(config) if config.label_smoothing or config.mixup else None

    def replica_step(images, labels, rate, step, mixture=None):
        context = tf.distribute.get_replica_context()
        if distort:
            images = distort(images)
        cross_entropy, targets = tf.nn.sparse_softmax_cross_entropy_with_logits, labels
        if soft_labels:
            cross_entropy = tf.nn.softmax_cross_entropy_with_logits
            images, targets = soft_labels(images, labels, mixture, context.replica_id_in_sync_group)
            labels = tf.argmax(targets, -1, labels.dtype)

        def gradients_and_sums(images, labels, targets):
            with tf.GradientTape() as tape:
                logits = state.model(images, training=True)
                loss = tf.reduce_sum(cross_entropy(targets, logits)) / config.batch_size
                scaled = loss * state.loss_scale.scale if state.loss_scale else loss
            gradients = tape.gradient(scaled, [weight.value for weight in weights])
            return [*gradients, tf.stack([loss, tf.cast(count_correct(logits, labels)[0], tf.float32)])]

        batch = images, labels, targets
        if config.accumulate == 1:
            *gradients, sums = gradients_and_sums(*batch)
        else:
            shapes = [*(weight.shape for weight in weights), (2,)]
            *gradients, sums = sum_over_parts(state.model, gradients_and_sums, batch, config.accumulate, shapes)
        if context.num_replicas_in_sync > 1:
            *gradients, sums = context.all_reduce(tf.distribute.ReduceOp.SUM, [*gradients, sums])
        usable = tf.constant(True)
        if state.loss_scale:
            gradients = [gradient / state.loss_scale.scale for gradient in gradients]
            usable = tf.reduce_all([tf.reduce_all(tf.math.is_finite(gradient)) for gradient in gradients])
        state.optimizer.apply(gradients, rate, step, usable if state.loss_scale else None)
        return sums[0], sums[1], usable

    return tf.function(replica_step, jit_compile=True) if config.jit_compile else replica_step


def _counter(dtype, value):
    return tf.Variable(value, dtype=dtype, trainable=False, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)
