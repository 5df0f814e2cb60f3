"""SGD with momentum (Section 4.2), one fused operation for each weight, with L2, clipping and averaged weights."""

import contextlib
from collections.abc import Iterator, Sequence

import keras
import tensorflow as tf


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
      statistics: (BN's moving average, the weight of its old value in it). Averaged weights need statistics of their
        own: averages, in the proportions of the weights, of what each mini-batch moved these moving averages towards.
        An average of the moving averages themselves would still hold most of the initial 0 and 1 after 50 steps.
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
        self._statistics = list(statistics) if averaging else []
        self._averaged = [*weights, *(statistic for statistic, _ in self._statistics)] if averaging else []
        self._averages = [_copy_of(variable) for variable in self._averaged]
        self._previous = [_copy_of(statistic) for statistic, _ in self._statistics]

    def variables(self) -> dict[str, tf.Variable]:
        """Every variable of the optimizer by its name."""
        velocities = {f"velocity/{w.path}": v for w, v in zip(self._weights, self._velocities, strict=True)}
        averages = {f"average/{v.path}": a for v, a in zip(self._averaged, self._averages, strict=True)}
        previous = {f"previous/{v.path}": p for (v, _), p in zip(self._statistics, self._previous, strict=True)}
        return velocities | averages | previous

    def begin_averages(self) -> None:
        """Averages begin with what is averaged as it is now: weights that were taken over are no steps of training."""
        for variable, average in zip(self._averaged, self._averages, strict=True):
            average.assign(variable.numpy())
        for (statistic, _), previous in zip(self._statistics, self._previous, strict=True):
            previous.assign(statistic.numpy())

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
        for weight, average in zip(self._weights, self._averages, strict=False):
            strategy.extended.update(weight.value, self._average, args=(average, step, usable), group=False)
        averages = self._averages[len(self._weights) :]
        for (statistic, kept), average, previous in zip(self._statistics, averages, self._previous, strict=True):
            arguments = (kept, average, previous, step, usable)
            strategy.extended.update(statistic.value, self._average_statistic, args=arguments, group=False)

    def _update(self, weight, gradient, rate, usable, l2, velocity):
        def update():
            total = gradient + l2 * weight if l2 else gradient
            tf.raw_ops.ResourceApplyKerasMomentum(
                var=weight.handle, accum=velocity.handle, lr=rate, grad=total, momentum=self._momentum
            )
            return True

        return _if_usable(usable, update)

    def _average_statistic(self, moving, kept, average, previous, step, usable):
        of_mini_batch = (moving - kept * previous) / (1.0 - kept)
        previous.assign(moving)  # a step that changes no weight has moved it too
        return self._average(of_mini_batch, average, step, usable)

    def _average(self, variable, average, step, usable):
        def update():
            kept = tf.minimum(self._averaging, (1.0 + step) / (10.0 + step))
            average.assign_sub((1.0 - kept) * (average - variable))
            return True

        return _if_usable(usable, update)

    @contextlib.contextmanager
    def averages_applied(self) -> Iterator[None]:
        """In a `with` block, what is averaged has its averages' values; afterwards it has its former bits again."""
        before = [variable.numpy() for variable in self._averaged]
        try:
            for variable, average in zip(self._averaged, self._averages, strict=True):
                variable.assign(average.numpy())
            yield
        finally:
            for variable, value in zip(self._averaged, before, strict=True):
                variable.assign(value)


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
        """Updates the scale after a step, in cross-replica context; `finite` says whether its gradients were."""
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
