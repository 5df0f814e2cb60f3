"""SGD with momentum (Section 4.2), one fused operation for each weight, with L2, clipping and averaged weights."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import keras
import tensorflow as tf


class _Average(NamedTuple):
    """A variable of the model and its average over training.

    Attributes:
      variable: a weight, or one of batch normalization's moving averages.
      average: the average.
      previous: the moving average before the last step; None for a weight.
      kept: the weight of the old value in the moving average.
    """

    variable: keras.Variable
    average: tf.Variable
    previous: tf.Variable | None = None
    kept: float = 0.0


class MomentumSGD:
    """SGD with momentum. For every trainable weight w, with gradient g and L2 weight lambda:

        velocity = momentum * velocity - rate * (g + lambda * w)
        w = w + velocity

    `+ lambda * w` is the gradient of the L2 penalty; as 70 terms of the loss it would cost three more passes over the
    weights and 500 operations. The optimizer has to be made under the strategy's scope.

    Args:
      weights: the trainable Keras variables; their regularizers must be None or `keras.regularizers.L2`.
      momentum: weight of the old velocity, in [0, 1).
      clip_norm: gradients (without L2) are scaled down if their joint norm is larger; 0 never scales.
      averaging: weight of the old value in the moving average of the weights; 0 keeps no average. At step t it is at
        most (1 + t) / (10 + t), as in `tf.train.ExponentialMovingAverage`, so that the initial weights are forgotten.
      rate_factors: the factor on the learning rate of each weight; None for 1.
      statistics: BN's moving averages, each with the weight of its old value. Averaged weights need statistics of the
        same mini-batches: each mini-batch's statistics are recovered from the step of the moving average, and averaged
        like the weights. An average of the moving averages would still be mostly their initial 0 and 1 after 50 steps.
    """

    def __init__(
        self,
        weights: list,
        momentum: float,
        clip_norm: float | None = None,
        averaging: float = 0.0,
        rate_factors: Sequence[float] | None = None,
        statistics: Sequence[tuple[keras.Variable, float]] = (),
    ):
        self._weights = weights
        self._l2 = [_l2_of(weight) for weight in weights]
        self._momentum = momentum
        self._rate_factors = rate_factors or [1.0] * len(weights)
        self._clip_norm = clip_norm
        self._averaging = averaging
        self._velocities = [_zeros_like(weight) for weight in weights]
        self._averages = []
        if averaging:
            self._averages += [_Average(weight, _copy_of(weight)) for weight in weights]
            self._averages += [
                _Average(moving, _copy_of(moving), previous=_copy_of(moving), kept=kept) for moving, kept in statistics
            ]

    def variables(self) -> dict[str, tf.Variable]:
        """Every variable of the optimizer by its name."""
        velocities = {f"velocity/{w.path}": v for w, v in zip(self._weights, self._velocities, strict=True)}
        averages = {f"average/{each.variable.path}": each.average for each in self._averages}
        previous = {
            f"previous/{each.variable.path}": each.previous for each in self._averages if each.previous is not None
        }
        return velocities | averages | previous

    def begin_averages(self) -> None:
        """Averages begin with what is averaged as it is now: weights that were taken over are no steps of training."""
        for each in self._averages:
            each.average.assign(each.variable.numpy())
            if each.previous is not None:
                each.previous.assign(each.variable.numpy())

    def apply(
        self, gradients: list[tf.Tensor], rate: tf.Tensor, step: tf.Tensor, usable: tf.Tensor | None = None
    ) -> None:
        """Takes one step, in replica context.

        Args:
          gradients: the gradient of each weight, in order, summed over all replicas and so the same on each.
          rate: the learning rate, float32 scalar.
          step: how many steps were taken before, int64 scalar.
          usable: bool scalar; False changes nothing. None means True, without a branch in the graph.
        """
        if self._clip_norm:
            gradients, _ = tf.clip_by_global_norm(gradients, self._clip_norm)
        tf.__internal__.distribute.interim.maybe_merge_call(
            self._update_all, tf.distribute.get_strategy(), gradients, rate, tf.cast(step, tf.float32), usable
        )

    def _update_all(self, strategy, gradients, rate, step, usable):
        for k, (weight, gradient) in enumerate(zip(self._weights, gradients, strict=True)):
            factor = self._rate_factors[k]
            arguments = (gradient, rate if factor == 1 else rate * factor, usable, self._l2[k], self._velocities[k])
            strategy.extended.update(weight.value, self._update, args=arguments, group=False)
        for variable, *others in self._averages:
            strategy.extended.update(variable.value, self._average, args=(*others, step, usable), group=False)

    def _update(self, weight, gradient, rate, usable, l2, velocity):
        def update():
            total = gradient + l2 * weight if l2 else gradient
            tf.raw_ops.ResourceApplyKerasMomentum(
                var=weight.handle, accum=velocity.handle, lr=rate, grad=total, momentum=self._momentum
            )
            return True

        return _if_usable(usable, update)

    def _average(self, variable, average, previous, kept, step, usable):
        value = variable
        if previous is not None:
            value = (variable - kept * previous) / (1.0 - kept)  # of this step's mini-batch
            previous.assign(variable)  # also after a step that is not usable, which has moved it too

        def update():
            share = tf.minimum(self._averaging, (1.0 + step) / (10.0 + step))
            average.assign_sub((1.0 - share) * (average - value))
            return True

        return _if_usable(usable, update)

    @contextlib.contextmanager
    def averages_applied(self) -> Iterator[None]:
        """In a `with` block, what is averaged has its averages' values; afterwards it has its former bits again."""
        before = [each.variable.numpy() for each in self._averages]
        try:
            for each in self._averages:
                each.variable.assign(each.average.numpy())
            yield
        finally:
            for each, value in zip(self._averages, before, strict=True):
                each.variable.assign(value)


class LossScale:
    """Dynamic loss scaling (Micikevicius et al., 2018), so that small float16 gradients do not become 0.

    The loss is multiplied by `scale` before differentiation and the gradients divided by it. A step whose gradients are
    not all finite is left out and halves the scale; `GROWTH_INTERVAL` good steps in a row double it.
    """

    INITIAL = 2.0**15
    GROWTH_INTERVAL = 2000  # both not in the paper: Keras's LossScaleOptimizer

    def __init__(self):
        kind = {"trainable": False, "aggregation": tf.VariableAggregation.ONLY_FIRST_REPLICA}
        self._scale = tf.Variable(self.INITIAL, **kind)
        self._good_steps = tf.Variable(0, dtype=tf.int64, **kind)

    def variables(self) -> dict[str, tf.Variable]:
        return {"loss_scale": self._scale, "loss_scale_good_steps": self._good_steps}

    @property
    def scale(self) -> tf.Tensor:
        return tf.convert_to_tensor(self._scale)

    def update(self, usable: tf.Tensor) -> None:
        """Updates the scale after a step, in cross-replica context.

        Args:
          usable: bool scalar, whether the step's gradients were all finite.
        """
        good = tf.where(usable, self._good_steps + 1, 0)
        grow = good == self.GROWTH_INTERVAL
        factor = tf.where(usable, tf.where(grow, 2.0, 1.0), 0.5)
        self._scale.assign(tf.maximum(self._scale * factor, 1.0))
        self._good_steps.assign(tf.where(grow, tf.zeros_like(good), good))


def _if_usable(usable, update):
    return update() if usable is None else tf.cond(usable, update, lambda: False)


def _copy_of(variable):
    return tf.Variable(variable.value, trainable=False)


def _zeros_like(weight):
    return tf.Variable(tf.zeros(weight.shape, weight.dtype), trainable=False)


def _l2_of(weight):
    """A weight's lambda. Keras's L2 is the penalty c * sum(w^2), whose gradient is 2c * w."""
    if weight.regularizer is None:
        return 0.0
    if type(weight.regularizer) is not keras.regularizers.L2:
        raise ValueError(f"Only L2 regularization is known here. Received: {weight.path} with {weight.regularizer}")
    return 2.0 * float(weight.regularizer.l2)
