"""Population statistics (Section 3.1, Algorithm 2): E[x] and Var[x] of every batch normalization of a trained model.

    statistics = population_statistics(model, training_batches, steps=100)        # written into the model
    statistics = population_statistics(model, training_batches, steps=100, write=False)
    with statistics.applied():
        evaluate(model)

While a model trains, moving averages stand in for these statistics, which are measured with its final parameters.
"""

import contextlib
import functools
import itertools
import warnings
import weakref
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Literal, Self

import keras
import numpy as np
from keras import ops

from bn_keras.inference.keras_graph import called_by_graphs, runs_call_of, unrolled
from bn_keras.layers.batch_normalization import BatchNormalization
from bn_keras.layers.moments import Moments
from bn_keras.private_names import layers_within


def population_statistics(
    model: keras.Model,
    batches: Iterable[Any],
    *,
    steps: int | None = None,
    estimator: Literal["mean_of_unbiased", "pooled"] = "mean_of_unbiased",
    layer_by_layer: bool = False,
    layers: Collection[keras.layers.Layer] | None = None,
    write: bool = True,
) -> "PopulationStatistics":
    """Measures E[x] and Var[x] of the inputs of the batch normalizations, over training mini-batches.

    Estimators, over mini-batches B of m_B values each (groups, where a layer has a `virtual_batch_size`):

        "mean_of_unbiased" (Algorithm 2, line 10):  E[x] = mean of mean_B,  Var[x] = mean of m_B/(m_B-1) * variance_B
        "pooled":  M = sum of m_B,  E[x] = sum of m_B * mean_B / M,
                   Var[x] = sum of m_B * (variance_B + (mean_B - E[x])^2) / (M - 1)

    "pooled" is the variance of all values together, also if the last batch is smaller. The paper's estimator leaves out
    how far the means of the mini-batches lie apart. Both are accumulated in float64.

    All layers are measured in one pass, in which every layer normalizes by the mini-batch, as in Algorithm 2. That is
    exact for a layer with no batch normalization before it. A later layer gets different inputs at inference, because
    the layers before it then normalize by population statistics. The difference is of the order of 1/sqrt(m), the
    noise of a mini-batch's statistics, so it matters where m is small (dense layers, `per_activation`,
    `virtual_batch_size`). `layer_by_layer` instead takes one pass for each layer, in which the layers
    before it already normalize by their population statistics: what was measured is what the layers see at inference.

    Everything but the batch normalizations runs in inference mode, so Dropout neither acts nor draws a seed. Where the
    layers are calls of a functional or Sequential model, a mini-batch is one compiled call. Layers inside of others
    (a subclassed model, an RNN's cell) are measured eagerly, which takes two to ten times as long; a call of a layer,
    one for each time step, then counts as a mini-batch.

    Args:
        model: a Keras model with BatchNormalization layers, `bn_keras`'s or Keras's own, of any depth of nesting.
        batches: an iterable of training mini-batches, `inputs` or, as for `fit`, tuples `(inputs, ...)`.
        steps: how many of the mini-batches to take, the paper's N; None takes all.
        estimator: one of the two above.
        layer_by_layer: whether each layer is measured in a pass of its own; `batches` is iterated over once for each.
        layers: the layers to measure; by default all that are `trainable`. A frozen layer keeps its averages, and so,
            with a warning, does one that the model does not call.
        write: whether the result replaces the model's moving_mean and moving_variance.

    Returns:
        PopulationStatistics. All other state of the model is left as it was, and without `write` its averages are too.

    Raises:
        ValueError: there is no layer to measure, or one that cannot be measured; there is no mini-batch, or none with
            two values for a channel; the estimator is unknown; `batches` is an iterator, which `layer_by_layer` cannot
            start again; or, with `write`, the inputs of a layer are not finite.
    """
    if estimator not in _ACCUMULATORS:
        raise ValueError(f"`estimator` must be one of {', '.join(_ACCUMULATORS)}. Received: {estimator=}")
    chosen = [layer for layer in batch_normalizations(model) if layer.trainable] if layers is None else list(layers)
    if not chosen:
        raise ValueError(f"There is no trainable BatchNormalization to measure. Received: {model=}")
    if layer_by_layer and iter(batches) is batches:
        raise ValueError(f"`layer_by_layer` starts again for every layer. Received: an iterator, {batches=}")

    def measure(layers):
        accumulators, batch = {}, None
        batch_moments = _batch_moments_function(model, layers)
        with _kept([*model.non_trainable_variables, *_states_of_rnns(model)]):
            for batch in itertools.islice(batches, steps):
                inputs, *_ = keras.utils.unpack_x_y_sample_weight(batch)
                for layer, groups in batch_moments(inputs):
                    accumulators.setdefault(layer, _ACCUMULATORS[estimator]()).add(*groups)
        if batch is None:
            raise ValueError(f"There is no mini-batch to measure. Received: {batches=}, {steps=}")
        return [(layer, accumulator.result(layer)) for layer, accumulator in accumulators.items()]

    statistics = PopulationStatistics(measure(chosen))
    not_called = ", ".join(f"'{layer.name}'" for layer in chosen if layer not in statistics)
    if not_called and (layers or not statistics):
        raise ValueError(f"Model '{model.name}' does not call {not_called}, so there is nothing to measure.")
    if not_called:
        warnings.warn(f"Model '{model.name}' does not call {not_called}: moving averages stay.", stacklevel=2)
    if layer_by_layer:
        # The first pass has shown in which order the layers run.
        finished = PopulationStatistics([])
        for layer in statistics:
            with finished.applied():
                finished = PopulationStatistics([*finished.items(), *measure([layer])])
        statistics = finished
    if write:
        for layer, moments in statistics.items():
            if not all(np.isfinite(values).all() for values in moments):
                raise ValueError(f"The inputs of layer '{layer.name}' are not finite: its moving averages stay.")
        statistics.write()
    return statistics


def batch_normalizations(model: keras.Model) -> list[keras.layers.Layer]:
    """The BatchNormalization layers of a model, `bn_keras`'s and Keras's own, nested ones included."""
    return [layer for layer in layers_within(model) if isinstance(layer, _NORMALIZATIONS)]


_NORMALIZATIONS = (BatchNormalization, keras.layers.BatchNormalization)


def _states_of_rnns(model):
    """The states of stateful RNNs, which Keras does not count among a model's variables."""
    return keras.tree.flatten([list(rnn.states) for rnn in _rnns(model) if rnn.states is not None])


class PopulationStatistics(dict):
    """{layer: Moments(count, mean, variance)}, float64 of the shape of gamma, in the order in which the layers run."""

    def write(self) -> None:
        """Sets the layers' moving_mean and moving_variance to the statistics; `debias` then takes them as complete."""
        for layer, moments in self.items():
            layer.moving_mean.assign(moments.mean)
            layer.moving_variance.assign(moments.variance)
            if layer.renorm:
                layer.moving_stddev.assign(np.sqrt(moments.variance + layer.epsilon))
            if getattr(layer, "debias", False):
                layer.moving_weight.assign(np.ones(layer.moving_weight.shape))

    @contextlib.contextmanager
    def applied(self) -> Iterator[Self]:
        """Writes the statistics for a `with` block; afterwards the layers' averages have their former bits again."""
        with _kept([variable for layer in self for variable in layer.variables]):
            self.write()
            yield self


@contextlib.contextmanager
def _kept(variables):
    """After a `with` block, the variables have their former bits again."""
    before = [(variable, ops.convert_to_numpy(variable)) for variable in variables]
    try:
        yield
    finally:
        for variable, value in before:
            variable.assign(value)


class _MeanOfUnbiased:
    """Algorithm 2, line 10: the mean of the means and of the unbiased variances of mini-batches."""

    def __init__(self):
        self.batches = self.count = self.mean = self.variance = 0.0

    def add(self, count, mean, variance):
        known = count > 1
        unbiased = variance * count / np.maximum(count - 1, 1)
        self.batches += np.sum(known, axis=0)
        self.count += np.sum(count * known, axis=0)
        self.mean += np.sum(mean * known, axis=0)
        self.variance += np.sum(unbiased * known, axis=0)

    def result(self, layer):
        _check_measured(np.min(self.batches) > 0, layer)
        return Moments(self.count, self.mean / self.batches, self.variance / self.batches)


class _Pooled:
    """Mean and unbiased variance of all values; groups are merged by the squares about their common mean."""

    def __init__(self):
        self.count = self.mean = self.squares = 0.0

    def add(self, counts, means, variances):
        for count, mean, variance in zip(counts, means, variances, strict=True):
            total = np.maximum(self.count + count, 1)
            difference = mean - self.mean
            self.mean += difference * count / total
            self.squares += count * variance + difference**2 * self.count * count / total
            self.count += count

    def result(self, layer):
        _check_measured(np.min(self.count) > 1, layer)
        return Moments(self.count, self.mean, self.squares / (self.count - 1))


_ACCUMULATORS = {"mean_of_unbiased": _MeanOfUnbiased, "pooled": _Pooled}


def _check_measured(measured, layer):
    if not measured:
        raise ValueError(f"A channel of layer '{layer.name}' never had two values in a mini-batch, so no variance.")


_LAST_COMPILED = weakref.WeakKeyDictionary()  # model -> (layers, function)


def _batch_moments_function(model, layers):
    """A function inputs -> [(layer, Moments)], one for each call of a layer, which normalizes by the mini-batch.

    The Moments are numpy float64 [groups, *gamma.shape]. A model's last function is kept and used again for the same
    layers, as at every evaluation of a run, because tracing the network of Figure 5 takes seconds.
    """
    known, function = _LAST_COMPILED.get(model, (None, None))
    if known != layers:
        function = _make_batch_moments(weakref.ref(model), layers)
        if model.built:  # a Sequential model has its graph from then on
            _LAST_COMPILED[model] = layers, function
    return function


def _make_batch_moments(model, layers):
    """Makes that function. `model` is a weak reference, as the kept function would otherwise keep its model alive.

    It is compiled if the model's graph is known to call the layers. Otherwise a layer may be called in a function that
    was traced before, or in a loop that returns no moments, so every function then runs eagerly.
    """
    in_batch_mode = _BatchMode(layers)
    called = []

    def moments_of(forward, converted=lambda moments: moments):
        called.clear()
        moments = []

        def observe(layer, values):
            called.append(layer)
            moments.append(converted(values))

        with in_batch_mode.observed_by(observe):
            forward()
        return moments

    in_graph = called_by_graphs(model()).issuperset(layers) and all(runs_call_of(each, type(each)) for each in layers)
    match keras.backend.backend() if in_graph else "none":
        case "tensorflow":
            import tensorflow as tf

            measured = tf.function(lambda x: moments_of(lambda: model()(x, training=False)), autograph=False)
        case "jax":
            import jax

            def stateless(trainable, non_trainable, x):
                return moments_of(lambda: model().stateless_call(trainable, non_trainable, x, training=False))

            jitted = jax.jit(stateless)

            def measured(x):
                trainable = [variable.value for variable in model().trainable_variables]
                return jitted(trainable, [variable.value for variable in model().non_trainable_variables], x)

        case _:

            def measured(x):
                with _eagerly(), _one_call_for_each_step(model(), layers):
                    if not model().built:
                        model()(x, training=False)
                    try:
                        return moments_of(lambda: model()(x, training=False), _as_numpy)
                    except _SymbolicError:
                        raise ValueError(
                            f"Layer '{called[-1].name}' is called in a function that the backend always traces, as "
                            "`vectorized_map` does: its statistics cannot be measured. Leave it out of `layers`."
                        ) from None

    def batch_moments(inputs):
        moments = measured(keras.tree.map_structure(ops.convert_to_tensor, inputs))
        return list(zip(called, map(_as_numpy, moments), strict=True))

    return batch_moments


def _as_numpy(moments):
    try:
        return Moments(*(np.asarray(ops.convert_to_numpy(value), np.float64) for value in moments))
    except Exception as error:  # each backend has its own
        raise _SymbolicError from error


class _SymbolicError(Exception):
    """A layer was called while its model was only traced, so its moments have no values."""


class _BatchMode:
    """Layers that can be made to normalize by the mini-batch; Keras's are run by our layer on their own variables."""

    def __init__(self, layers):
        self.layers = layers
        self.ours = {}
        for layer in layers:
            if not (isinstance(layer, BatchNormalization) or runs_call_of(layer, keras.layers.BatchNormalization)):
                raise ValueError(
                    f"Layer '{layer.name}' ({type(layer).__name__}) has another `call` than Keras's layer, so its "
                    "statistics cannot be measured. Leave it out of `layers`."
                )
            if layer.built and not isinstance(layer, BatchNormalization):
                self._ours_for(layer)

    def _ours_for(self, layer):
        if layer not in self.ours:
            ours = BatchNormalization.from_config(layer.get_config())
            ours.build_from_config(layer.get_build_config())
            vars(ours).update((name, value) for name, value in vars(layer).items() if isinstance(value, keras.Variable))
            self.ours[layer] = ours
        return self.ours[layer]

    @contextlib.contextmanager
    def observed_by(self, observe):
        """For a `with` block, the layers normalize by the mini-batch, and each call gives `observe(layer, Moments)`."""

        def call(layer, inputs, training=None, mask=None):
            ours = self._ours_for(layer)
            vars(ours)["statistics"] = _Recorder(layer, observe)
            return ours.call(inputs, mask=mask)

        replaced: list[tuple[keras.Layer, str, Any]] = []
        for layer in self.layers:
            if isinstance(layer, BatchNormalization):
                replaced.append((layer, "statistics", _Recorder(layer, observe)))
            else:
                replaced.append((layer, "call", functools.partial(call, layer)))
        for layer, name, value in replaced:
            vars(layer)[name] = value
        try:
            yield
        finally:
            for layer, name, _ in replaced:
                del vars(layer)[name]


class _Recorder:
    """Takes the place of `MovingAverages`: always normalizes by the mini-batch, and passes its Moments on."""

    def __init__(self, layer, observe):
        self.layer, self.observe = layer, observe

    def by_mini_batch(self, training):
        return True

    def update(self, _, moments):
        self.observe(self.layer, moments)


@contextlib.contextmanager
def _eagerly():
    """For a `with` block, compiled functions run as plain Python, and nothing is traced."""
    match keras.backend.backend():
        case "tensorflow":
            import tensorflow as tf

            before = tf.config.functions_run_eagerly()
            tf.config.run_functions_eagerly(True)
            try:
                yield
            finally:
                tf.config.run_functions_eagerly(before)
        case "jax":
            import jax

            with jax.disable_jit():
                yield
        case "torch":
            import torch

            with torch.no_grad():
                yield


@contextlib.contextmanager
def _one_call_for_each_step(model, layers):
    """For a `with` block, RNNs that contain the layers call their cells once for each time step, in Python."""
    with contextlib.ExitStack() as stack:
        for rnn in _rnns(model):
            if not set(layers).isdisjoint(layers_within(rnn)):
                stack.enter_context(unrolled(rnn))
        yield


def _rnns(model):
    return [layer for layer in layers_within(model) if isinstance(layer, keras.layers.RNN)]
