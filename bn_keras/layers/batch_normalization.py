"""Batch normalization (Ioffe & Szegedy, 2015): Algorithm 1 in training, moving averages in inference."""

import math
import warnings
from collections.abc import Callable
from typing import Any, TypedDict, Unpack

import keras
from keras import ops

from bn_keras.layers import tensorflow_kernels
from bn_keras.layers.groups import Tensor
from bn_keras.layers.moments import Moments, at_least_float32, moments_over, scale_and_shift, transform
from bn_keras.layers.moving_averages import MovingAverages
from bn_keras.layers.replicas import replica_count

# Keras takes an initializer, a regularizer or a constraint by its name, by its configuration, or as an object.
KerasObject = str | dict[str, Any] | Callable[..., Any]


class LayerArguments(TypedDict, total=False):
    """The arguments of every Keras layer."""

    name: str | None
    dtype: Any
    trainable: bool
    autocast: bool
    activity_regularizer: KerasObject | None
    input_shape: tuple[int | None, ...]


@keras.saving.register_keras_serializable(package="bn_keras")
class BatchNormalization(keras.layers.Layer):
    """Normalizes each channel by the mean and variance of the mini-batch (Section 3, Algorithm 1).

    In training (`training=True` and `layer.trainable`), over the m values of a channel:

        mean = sum(x) / m
        variance = sum((x - mean)^2) / m
        y = gamma * (x - mean) / sqrt(variance + epsilon) + beta

    and the moving averages that inference will use take a step towards them:

        moving_mean = momentum * moving_mean + (1 - momentum) * mean
        moving_variance = momentum * moving_variance + (1 - momentum) * variance * m / (m - 1)

    In inference:

        y = gamma * (x - moving_mean) / sqrt(moving_variance + epsilon) + beta

    The arguments, weights and semantics are those of `keras.layers.BatchNormalization` (Keras 3.15); the
    arguments that Keras does not have follow after `synchronized`.

    Args:
        axis: int, the channel axis; 1 for `channels_first` images.
        momentum: weight of the *old* value in the moving averages, in [0, 1]. 0.99 (not in the paper: Keras).
        epsilon: added to the variance. 1e-3 (not in the paper: TF-Slim, Keras).
        center: whether there is a beta.
        scale: whether there is a gamma.
        beta_initializer, gamma_initializer, moving_mean_initializer, moving_variance_initializer:
            initializers; 0, 1, 0 and 1 (not in the paper: Keras).
        beta_regularizer, gamma_regularizer, beta_constraint, gamma_constraint: optional.
        renorm, renorm_clipping, renorm_momentum: batch renormalization (Ioffe, 2017), as in Keras.
        synchronized: TensorFlow only. Takes mean and variance over the examples of all replicas, at one collective
            forward and one backward; second derivatives are then an error.
        unbiased: whether moving_variance averages the unbiased variance of Algorithm 2, line 10, m/(m-1) times the
            variance; `False` is Keras's behaviour. m is the global count when synchronized.
        virtual_batch_size: int or None. Statistics over groups of this many consecutive examples (32 in the paper)
            at any real batch size; the last group is smaller where the batch does not divide.
        per_activation: whether each activation, channel *and* position, has its own statistics, gamma and beta
            (the "non-convolutional" BN of Section 4.2.3). Needs a fixed input shape; m is the batch.
        debias: whether the moving averages weigh only mini-batches, not their initial 0 and 1: after t steps the
            weights are divided by their sum, 1 - momentum^t. Early evaluation then sees the data's statistics.

    Call arguments:
        inputs: floating point [batch, ...] of rank 2 or more. float16 and bfloat16 keep float32 statistics.
        training: bool. `layer.trainable = False` means inference, whatever `training` says.
        mask: bool, shape `inputs.shape[:-1]` or broadcastable to it. False positions do not enter the statistics.

    A channel with one value has no variance (Section 3 requires m > 1): in training its y is beta (with `renorm`, it is
    normalized by its averages), and its moving averages stay. A layer warns of that once, except where the count is
    known only to a mask or to a graph that XLA compiles.

    Raises:
        ValueError: an argument out of range; a mask of the wrong rank.
    """

    statistics = MovingAverages()

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: KerasObject = "zeros",
        gamma_initializer: KerasObject = "ones",
        moving_mean_initializer: KerasObject = "zeros",
        moving_variance_initializer: KerasObject = "ones",
        beta_regularizer: KerasObject | None = None,
        gamma_regularizer: KerasObject | None = None,
        beta_constraint: KerasObject | None = None,
        gamma_constraint: KerasObject | None = None,
        renorm: bool = False,
        renorm_clipping: dict[str, float] | None = None,
        renorm_momentum: float = 0.99,
        synchronized: bool = False,
        unbiased: bool = True,
        virtual_batch_size: int | None = None,
        per_activation: bool = False,
        debias: bool = False,
        **kwargs: Unpack[LayerArguments],
    ) -> None:
        super().__init__(**kwargs)
        if synchronized and keras.backend.backend() != "tensorflow":
            raise ValueError(
                "`synchronized=True` needs the TensorFlow backend. "
                f"Received: synchronized={synchronized} on {keras.backend.backend()}"
            )
        if synchronized and virtual_batch_size:
            raise ValueError(
                "`synchronized` statistics are over more than a replica's batch, `virtual_batch_size` over less. "
                f"Received: {synchronized=}, {virtual_batch_size=}"
            )
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"`momentum` is the weight of the old value, in [0, 1]. Received: {momentum=}")
        if epsilon < 0.0:
            raise ValueError(f"`epsilon` must not be negative. Received: {epsilon=}")
        if virtual_batch_size is not None and virtual_batch_size < 1:
            raise ValueError(f"`virtual_batch_size` counts examples, 1 or more. Received: {virtual_batch_size=}")
        if per_activation and axis != -1:
            raise ValueError(f"`per_activation` statistics have no channel axis. Received: {axis=}")
        self.axis = int(axis)
        self.momentum = float(momentum)
        self.epsilon = float(epsilon)
        self.center = center
        self.scale = scale
        self.beta_initializer = keras.initializers.get(beta_initializer)
        self.gamma_initializer = keras.initializers.get(gamma_initializer)
        self.moving_mean_initializer = keras.initializers.get(moving_mean_initializer)
        self.moving_variance_initializer = keras.initializers.get(moving_variance_initializer)
        self.beta_regularizer = keras.regularizers.get(beta_regularizer)
        self.gamma_regularizer = keras.regularizers.get(gamma_regularizer)
        self.beta_constraint = keras.constraints.get(beta_constraint)
        self.gamma_constraint = keras.constraints.get(gamma_constraint)
        self.renorm = renorm
        self.renorm_clipping = _checked_clipping(renorm_clipping or {}) if renorm else renorm_clipping
        self.renorm_momentum = renorm_momentum
        self.synchronized = synchronized
        self.unbiased = unbiased
        self.virtual_batch_size = virtual_batch_size
        self.per_activation = per_activation
        self.debias = debias
        self.supports_masking = True
        self.gamma: keras.Variable = None
        self.beta: keras.Variable = None
        self.moving_mean: keras.Variable = None
        self.moving_variance: keras.Variable = None
        self.moving_weight: keras.Variable = None
        self._has_warned = False

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        rank = len(input_shape)
        self.compute_output_shape(input_shape)
        axis = self.axis % rank
        own = tuple(range(1, rank)) if self.per_activation else (axis,)
        shape = tuple(input_shape[i] for i in own)
        if None in shape:
            raise ValueError(
                f"Dimensions {own}, which have their own statistics, must be known. Received: {input_shape=}"
            )
        self._reduction_axes = tuple(i for i in range(rank) if i not in own)
        self._broadcast_shape = tuple(input_shape[i] if i in own else 1 for i in range(own[0], rank))
        if self.scale:
            rules = self.gamma_initializer, self.gamma_regularizer, self.gamma_constraint
            self.gamma = self._add_parameter("gamma", shape, *rules)
        if self.center:
            rules = self.beta_initializer, self.beta_regularizer, self.beta_constraint
            self.beta = self._add_parameter("beta", shape, *rules)
        self.moving_mean = self._add_average("moving_mean", shape, self.moving_mean_initializer)
        self.moving_variance = self._add_average("moving_variance", shape, self.moving_variance_initializer)
        if self.renorm:
            deviation = _square_root_of(self.moving_variance_initializer)
            self.moving_stddev = self._add_average("moving_stddev", shape, deviation)
            self.renorm_mean = self._add_average("renorm_mean", shape, self.moving_mean_initializer)
            self.renorm_stddev = self._add_average("renorm_stddev", shape, deviation)
        if self.debias:
            self.moving_weight = self._add_average("moving_weight", shape, "zeros")
        self.input_spec = keras.layers.InputSpec(ndim=rank, axes=dict(zip(own, shape, strict=True)))

    def _add_parameter(self, name, shape, initializer, regularizer, constraint):
        return self.add_weight(
            shape=shape,
            name=name,
            initializer=initializer,
            regularizer=regularizer,
            constraint=constraint,
            autocast=False,
        )

    def _add_average(self, name, shape, initializer):
        return self.add_weight(shape=shape, name=name, initializer=initializer, trainable=False, autocast=False)

    def load_own_variables(self, store: Any) -> None:
        """Also loads the weights of a layer without `debias`, whose averages then count as complete."""
        values = {name: store[name] for name in store.keys()}  # noqa: SIM118 - a store of Keras is no mapping
        if self.debias and len(values) == len(self.weights) - 1:
            values[str(len(values))] = ops.ones(self.moving_weight.shape)
        super().load_own_variables(values)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        if not -len(input_shape) <= self.axis < len(input_shape):
            raise ValueError(
                f"Axis {self.axis} is out of bounds for input shape {input_shape}. Received: axis={self.axis}"
            )
        return input_shape

    def call(self, inputs: Tensor, training: bool | None = None, mask: Tensor | None = None) -> Tensor:
        if mask is not None and len(mask.shape) != len(inputs.shape) - 1:
            raise ValueError(
                "The mask provided should be one dimension less than the inputs. "
                f"Received: mask.shape={mask.shape}, inputs.shape={inputs.shape}"
            )
        if not keras.backend.is_float_dtype(inputs.dtype):
            inputs = ops.cast(inputs, "float32")
        own = self.input_spec.axes
        if any(inputs.shape[i] is None for i in own):  # in a graph; the layer knows them since it was built
            inputs = ops.reshape(inputs, [own.get(i, size) for i, size in enumerate(ops.shape(inputs))])
        # Statistics of float16 and bfloat16 inputs are float32: 70000 is beyond float16, 257 is no bfloat16.
        dtype = at_least_float32(inputs.dtype)
        gamma, beta = (value if value is None else ops.cast(value, dtype) for value in (self.gamma, self.beta))
        if self.statistics.by_mini_batch(bool(training and self.trainable)):
            if training and mask is None and not (self.synchronized and replica_count() > 1):
                self._warn_where_one_value(inputs)
            outputs, moments = self._normalize(inputs, mask, gamma, beta)
            self.statistics.update(self, moments)
        else:
            mean, variance = ops.cast(self.moving_mean, dtype), ops.cast(self.moving_variance, dtype)
            outputs = self._transform(inputs, mean, variance, gamma, beta)
        return ops.cast(outputs, self.compute_dtype)

    def _warn_where_one_value(self, inputs):
        """Warns once if a channel has one value. A TensorFlow graph may know this only when it runs."""
        sizes = [ops.shape(inputs)[i] for i in self._reduction_axes]
        if self.virtual_batch_size == 1:
            sizes = sizes[1:]
        if math.prod(size for size in sizes if isinstance(size, int)) == 1:
            tensorflow_kernels.when_one(math.prod(sizes), self._warn_of_one_value)

    def _warn_of_one_value(self):
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"Layer '{self.name}' got one value per channel in training, which has no variance: its output is beta "
                "and its moving averages stay. Training needs m > 1 (Section 3): a larger batch, or, where the last "
                "batch of an epoch is a single example, one without it (`drop_remainder=True`).",
                stacklevel=2,
            )

    def _transform(self, x, mean, variance, gamma, beta):
        """Normalizes x by a given mean and variance, [*gamma.shape]."""
        axis = self.axis % len(x.shape)
        if not self.per_activation and tensorflow_kernels.takes_fused_inference(x, axis):
            return tensorflow_kernels.transform_fused(x, axis, mean, variance, gamma, beta, self.epsilon)
        mean, variance, gamma, beta = (self._broadcast(value) for value in (mean, variance, gamma, beta))
        if tensorflow_kernels.is_from_linear_operation(x):  # it has rounded x already: this is as exact
            scale, shift = scale_and_shift(mean, variance, gamma, beta, self.epsilon)
            return ops.add(ops.cast(x, mean.dtype) * scale, shift)
        return transform(ops.cast(x, mean.dtype), mean, variance, gamma, beta, self.epsilon)

    def _normalize(self, x, mask, gamma, beta):
        """Algorithm 1. Returns y, and the Moments of the groups of x, each [groups, *gamma.shape]."""
        groups = self._equal_groups(x)
        if tensorflow_kernels.fit(x) and groups and mask is None and not self.renorm:
            return self._normalize_unmasked(x, groups, gamma, beta)
        x = ops.cast(x, gamma.dtype if gamma is not None else at_least_float32(x.dtype))
        if mask is not None:
            mask = ops.broadcast_to(ops.expand_dims(ops.cast(mask, "bool"), -1), ops.shape(x))
        arguments = self._reduction_axes, self.virtual_batch_size, mask, self.synchronized
        groups, pivot, moments = moments_over(x, *arguments)
        gamma, beta = self._broadcast(gamma), self._broadcast(beta)
        if self.renorm:
            gamma, beta = self._renormalized(pivot, moments, gamma, beta)
        scale, shift = scale_and_shift(moments.mean, moments.variance, gamma, beta, self.epsilon)
        pivot_of_each, scale, shift = map(groups.spread, (pivot, scale, shift))
        outputs = (x - pivot_of_each) * scale + shift
        moments, shape = moments._replace(mean=pivot + moments.mean), (-1, *self.moving_mean.shape)
        return outputs, Moments(*(ops.reshape(value, shape) for value in moments))

    def _normalize_unmasked(self, x, groups, gamma, beta):
        view, axis, parameters = self._channel_view(x, gamma, beta)
        parts = ops.split(view, groups) if groups > 1 else [view]
        arguments = axis, *parameters, self.epsilon, self.synchronized
        results = (tensorflow_kernels.normalize(part, *arguments) for part in parts)
        outputs, moments = zip(*results, strict=True)
        outputs = ops.concatenate(outputs) if groups > 1 else outputs[0]
        shape = (groups, *self.moving_mean.shape)
        moments = Moments(*(ops.reshape(ops.stack(values), shape) for values in zip(*moments, strict=True)))
        return ops.reshape(outputs, ops.shape(x)), moments

    def _channel_view(self, x, *parameters):
        """x with its channels (or its activations) in one dimension; this dimension; the parameters in its shape."""
        if not self.per_activation:
            return x, self.axis % len(x.shape), parameters
        flat = ops.reshape(x, (-1, math.prod(x.shape[1:])))
        return flat, 1, [value if value is None else ops.reshape(value, (-1,)) for value in parameters]

    def _broadcast(self, value):
        return value if value is None else ops.reshape(value, self._broadcast_shape)

    def _equal_groups(self, x):
        """How many equal groups x divides into; None if the last would be smaller, or the batch is not known."""
        if self.virtual_batch_size is None:
            return 1
        batch = x.shape[0]
        if batch is None or (batch > self.virtual_batch_size and batch % self.virtual_batch_size):
            return None
        return max(1, batch // self.virtual_batch_size)

    def _renormalized(self, pivot, moments, gamma, beta):
        """gamma and beta that include the correction (r, d) of batch renormalization; the moments are of x - pivot."""
        deviation = ops.sqrt(moments.variance + self.epsilon)
        average = ops.maximum(self._broadcast(self.renorm_stddev), math.sqrt(self.epsilon))
        r = deviation / average
        d = (moments.mean + (pivot - self._broadcast(self.renorm_mean))) / average
        limits = self.renorm_clipping or {}
        r = ops.clip(r, limits.get("rmin", -math.inf), limits.get("rmax", math.inf))
        d = ops.clip(d, -limits.get("dmax", math.inf), limits.get("dmax", math.inf))
        r, d = ops.stop_gradient(r), ops.stop_gradient(d)
        beta = (d if gamma is None else d * gamma) + (0.0 if beta is None else beta)
        return (r if gamma is None else r * gamma), beta

    def get_config(self) -> dict[str, Any]:
        config = {
            "axis": self.axis,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "center": self.center,
            "scale": self.scale,
            "beta_initializer": keras.initializers.serialize(self.beta_initializer),
            "gamma_initializer": keras.initializers.serialize(self.gamma_initializer),
            "moving_mean_initializer": keras.initializers.serialize(self.moving_mean_initializer),
            "moving_variance_initializer": keras.initializers.serialize(self.moving_variance_initializer),
            "beta_regularizer": keras.regularizers.serialize(self.beta_regularizer),
            "gamma_regularizer": keras.regularizers.serialize(self.gamma_regularizer),
            "beta_constraint": keras.constraints.serialize(self.beta_constraint),
            "gamma_constraint": keras.constraints.serialize(self.gamma_constraint),
            "renorm": self.renorm,
            "renorm_clipping": self.renorm_clipping,
            "renorm_momentum": self.renorm_momentum,
            "synchronized": self.synchronized,
            "unbiased": self.unbiased,
            "virtual_batch_size": self.virtual_batch_size,
            "per_activation": self.per_activation,
            "debias": self.debias,
        }
        return {**super().get_config(), **config}


def _square_root_of(initializer):
    """The initializer of a deviation, from a copy of a variance's, as an initializer object is used only once."""
    copy = keras.initializers.get(keras.initializers.serialize(initializer))
    return lambda shape, dtype=None: ops.sqrt(copy(shape, dtype=dtype))


def _checked_clipping(clipping):
    rmin, rmax, dmax = clipping.get("rmin", -math.inf), clipping.get("rmax", math.inf), clipping.get("dmax", 0.0)
    if set(clipping) - {"rmin", "rmax", "dmax"}:
        raise ValueError(f"Received invalid keys for `renorm_clipping`, which has rmin, rmax and dmax: {clipping}")
    if rmax < rmin:
        raise ValueError(f"rmax should be at least rmin in `renorm_clipping`. Received: {rmin=}, {rmax=}")
    if dmax < 0:
        raise ValueError(f"dmax should be non-negative in `renorm_clipping`. Received: {dmax=}")
    return clipping
