"""Population statistics (Section 3.1, Algorithm 2): E[x] and Var[x] of every batch normalization of a trained model.

    statistics = population_statistics(model, training_batches, steps=100)        # written into the model
    statistics = population_statistics(model, training_batches, steps=100, write=False)
    with statistics.applied():
        evaluate(model)

Moving averages stand in for them while a model still trains; these are measured with its final parameters.
"""

import contextlib
import itertools
import weakref
from collections.abc import Collection, Iterable
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from bn_keras.batch_normalization import BatchNormalization
from bn_keras.batch_statistics import Moments

ESTIMATORS = ("mean_of_unbiased", "pooled")


def population_statistics(
    model: keras.Model,
    batches: Iterable[Any],
    *,
    steps: int | None = None,
    estimator: Literal["mean_of_unbiased", "pooled"] = "mean_of_unbiased",
    layer_by_layer: bool = False,
    layers: Collection[BatchNormalization] | None = None,
    write: bool = True,
) -> "PopulationStatistics":
    """Measures E[x] and Var[x] of the inputs of the batch normalizations, over training mini-batches.

    Estimators, over mini-batches B of m_B values each (groups, where a layer has a `virtual_batch_size`):

        "mean_of_unbiased" (Algorithm 2, line 10):  E[x] = mean of mean_B,  Var[x] = mean of m_B/(m_B-1) * variance_B
        "pooled":  M = sum of m_B,  E[x] = sum of m_B * mean_B / M,
                   Var[x] = sum of m_B * (variance_B + (mean_B - E[x])^2) / (M - 1)

    "pooled" is the variance of all the values together, exact also where the last batch is smaller; the paper's leaves
    out how far the means of the batches lie apart. Both are accumulated in float64.

    All layers are measured in one pass, behind layers that normalize by the mini-batch, as in Algorithm 2. That is
    exact for a layer with no batch normalization before it. Behind others its inputs at inference are different ones:
    there, the layers before it normalize by population statistics. The difference is of the order of 1/sqrt(m), the
    noise of a mini-batch's statistics, so it matters where m is small (dense layers, `per_activation`,
    `virtual_batch_size`). `layer_by_layer` then measures each layer behind the finished ones, in as many passes as
    there are layers; its result is the fixed point: what the layers see at inference is what was measured.

    Everything but the batch normalizations runs in inference mode, so Dropout neither acts nor draws a seed.

    Args:
        model: a built Keras model with `bn_keras.BatchNormalization` layers, of any depth of nesting.
        batches: an iterable of training mini-batches, `inputs` or tuples `(inputs, ...)`.
        steps: mini-batches to take of it, the paper's N; None takes all.
        estimator: one of the two above.
        layer_by_layer: whether to measure in one pass a layer; `batches` is then iterated over as often.
        layers: the layers to measure; by default all that are `trainable`. A frozen layer keeps its averages.
        write: whether the model keeps the result as its moving_mean and moving_variance.

    Returns:
        PopulationStatistics. The model's other state, and without `write` all of it, is as before.

    Raises:
        ValueError: no layer to measure, no mini-batch, none with two values for a channel, an unknown estimator, or
            an iterator that cannot start again for `layer_by_layer`.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"`estimator` must be one of {', '.join(ESTIMATORS)}. Received: {estimator=}")
    if layers is None:
        layers = [layer for layer in batch_normalizations(model) if layer.trainable]
    if not layers:
        raise ValueError(f"There is no trainable bn_keras.BatchNormalization to measure. Received: model={model.name}")
    if layer_by_layer and iter(batches) is batches:
        raise ValueError(f"`layer_by_layer` starts again for every layer. Received: an iterator, {batches=}")

    def measure(layers):
        accumulators = {
            layer: {"mean_of_unbiased": _MeanOfUnbiased, "pooled": _Pooled}[estimator]() for layer in layers
        }
        batch_moments = _batch_moments_function(model, layers)
        for batch in itertools.islice(batches, steps):
            inputs, *_ = keras.utils.unpack_x_y_sample_weight(batch)
            for layer, groups in batch_moments(inputs):
                accumulators[layer].add(*groups)
                accumulators[layer] = accumulators.pop(layer)  # to the end: the order in which they ran
        return [(layer, accumulator.result(layer)) for layer, accumulator in accumulators.items()]

    statistics = PopulationStatistics(measure(layers))
    if layer_by_layer:
        # The first pass told the order in which the layers run.
        finished = PopulationStatistics([])
        for layer in statistics:
            with finished.applied():
                finished = PopulationStatistics([*finished.items(), *measure([layer])])
        statistics = finished
    if write:
        statistics.write()
    return statistics


def batch_normalizations(model):
    """The `bn_keras.BatchNormalization` layers of a model, nested ones included."""
    return [layer for layer in model._flatten_layers(include_self=False) if isinstance(layer, BatchNormalization)]


class PopulationStatistics(dict):
    """{layer: Moments(count, mean, variance)}, float64 of the shape of gamma, in the order in which the layers run."""

    def write(self):
        """Makes them the layers' moving_mean and moving_variance, as averages that nothing is missing from."""
        for layer, moments in self.items():
            layer.moving_mean.assign(moments.mean)
            layer.moving_variance.assign(moments.variance)
            if layer.renorm:
                layer.moving_stddev.assign(np.sqrt(moments.variance + layer.epsilon))
            if layer.debias:
                layer.moving_weight.assign(np.ones(layer.moving_weight.shape))

    @contextlib.contextmanager
    def applied(self):
        """Writes them for the time of a `with` block; afterwards the layers have their very bits back."""
        before = [(variable, ops.convert_to_numpy(variable)) for layer in self for variable in layer.variables]
        try:
            self.write()
            yield self
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


def _check_measured(measured, layer):
    if not measured:
        raise ValueError(
            f"A channel of layer '{layer.name}' never had two values in a mini-batch, so it has no variance. "
            "Received: no batches, or batches of one value per channel."
        )


_LAST_COMPILED = weakref.WeakKeyDictionary()  # model -> (layers, function)


def _batch_moments_function(model, layers):
    """Compiled inputs -> [(layer, Moments)], one for each call of a layer, in order, with the layers in batch mode.

    The Moments are numpy float64 [groups, *gamma.shape]. A model's last function serves again where the layers are the
    same, as it does at every evaluation of a run: tracing Figure 5 takes seconds.
    """
    known, function = _LAST_COMPILED.get(model, (None, None))
    if known != layers:
        function = _compile_batch_moments(weakref.ref(model), layers)
        _LAST_COMPILED[model] = list(layers), function
    return function


def _compile_batch_moments(model, layers):
    """Makes that function; `model` is a weak reference, or the function would keep its own model alive."""
    called = []

    def moments_of(forward):
        called.clear()
        moments = []

        def observe(layer, values):
            called.append(layer)
            moments.append(values)

        for layer in layers:
            layer.moments_observer = observe
        try:
            forward()
        finally:
            for layer in layers:
                layer.moments_observer = None
        return moments

    match keras.backend.backend():
        case "tensorflow":
            import tensorflow as tf

            compiled = tf.function(lambda x: moments_of(lambda: model()(x, training=False)), autograph=False)
        case "jax":
            import jax

            def stateless(trainable, non_trainable, x):
                return moments_of(lambda: model().stateless_call(trainable, non_trainable, x, training=False))

            jitted = jax.jit(stateless)

            def compiled(x):
                trainable = [variable.value for variable in model().trainable_variables]
                return jitted(trainable, [variable.value for variable in model().non_trainable_variables], x)

        case "torch":
            import torch

            def compiled(x):
                with torch.no_grad():
                    return moments_of(lambda: model()(x, training=False))

    def batch_moments(inputs):
        moments = compiled(keras.tree.map_structure(ops.convert_to_tensor, inputs))
        values = [Moments(*(np.asarray(ops.convert_to_numpy(value), np.float64) for value in each)) for each in moments]
        return list(zip(called, values, strict=True))

    return batch_moments
