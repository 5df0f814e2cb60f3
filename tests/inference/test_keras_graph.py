"""A graph of Keras can be read, run call by call, and made again."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from bn_keras.inference import keras_graph


def small_model():
    x = keras.Input((3,), name="x")
    hidden = layers.Dense(2, name="dense")(x)
    return keras.Model(x, ops.relu(hidden) + 1.0)


def test_calls_come_in_an_order_in_which_they_can_be_made():
    model = small_model()
    names = [call.operation.name.partition("_")[0] for call in keras_graph.graph_calls(model)]
    assert names == ["dense", "relu", "add"]


def test_making_every_call_is_calling_the_model():
    model = small_model()
    rows = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    values = {id(model.inputs[0]): rows}
    for call in keras_graph.graph_calls(model):
        args, kwargs = keras_graph.call_arguments(call, values)
        values[id(call.outputs[0])] = call.operation(*args, **kwargs)
    np.testing.assert_array_equal(values[id(model.outputs[0])], model(rows))


class OfTwice(keras.Model):
    def call(self, inputs):
        return super().call(2 * inputs)


@pytest.mark.parametrize("make", [lambda x, y: keras.Model(x, y), lambda x, y: keras.Sequential([x, layers.ReLU()])])
def test_functional_and_sequential_models_have_a_graph(make):
    x = keras.Input((3,))
    assert keras_graph.functional_graph(make(x, layers.ReLU()(x))) is not None


def test_a_call_of_its_own_hides_the_graph():
    x = keras.Input((3,))
    model, wrapped = OfTwice(x, layers.ReLU()(x)), keras.Model(x, layers.ReLU()(x))
    wrapped.call = lambda inputs: inputs
    assert keras_graph.functional_graph(model) is keras_graph.functional_graph(wrapped) is None


def test_calls_by_nested_graphs_are_the_models_own_but_not_those_in_a_layer():
    inner, distributed = layers.Dense(3), layers.Dense(3)
    x, step = keras.Input((5, 3)), keras.Input((3,))
    hidden = keras.Sequential([keras.Input((5, 3)), inner])(x)
    hidden = layers.TimeDistributed(keras.Model(step, distributed(step)))(hidden)
    called = keras_graph.called_by_graphs(keras.Model(x, hidden))
    assert inner in called and distributed not in called


def test_new_inputs_are_of_the_old_kind():
    inputs = {"a": keras.Input((3,), name="a", sparse=True), "b": keras.Input((2,), 7, "int32", name="b")}
    model = keras.Model(inputs, layers.Dense(2)(inputs["a"]) + ops.cast(inputs["b"], "float32"))
    new = keras_graph.new_inputs(model)
    assert new["a"] is not inputs["a"] and new["a"].sparse
    assert (new["b"].name, new["b"].shape, new["b"].dtype) == ("b", (7, 2), "int32")


@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`")  # as it is meant to
def test_a_layer_is_made_again_with_functions_and_classes_that_nobody_registered():
    class Cell(layers.SimpleRNNCell):
        pass

    factor = 3.0
    twin = keras_graph.from_own_config(layers.Dense(2, activation=lambda value: value * factor), use_bias=False)
    assert twin.activation(2.0) == 6.0 and not twin.use_bias
    assert type(keras_graph.from_own_config(layers.RNN(Cell(2))).cell) is Cell


def test_a_layer_is_made_again_whose_init_takes_only_arguments_of_its_own():
    class Power(layers.Layer):
        def __init__(self, power):
            super().__init__(name="power", dtype="float64")
            self.power = power

    layer = Power(2)
    layer.trainable = False
    twin = keras_graph.from_own_config(layer)
    assert (twin.power, twin.name, twin.dtype, twin.trainable) == (2, "power", "float64", False)


@pytest.mark.parametrize("stacked", [False, True])
def test_an_unrolled_rnn_calls_its_cell_once_for_each_time_step(stacked):
    calls = []

    class Cell(layers.SimpleRNNCell):
        def call(self, *args, **kwargs):
            calls.append(self)
            return super().call(*args, **kwargs)

    cell = Cell(2)
    rnn = layers.RNN([cell, layers.LSTMCell(2)] if stacked else cell)
    sequence = np.random.default_rng(0).normal(size=(2, 5, 3)).astype("float32")
    expected = rnn(sequence)
    calls.clear()
    with keras_graph.unrolled(rnn):
        np.testing.assert_allclose(rnn(sequence), expected, atol=1e-6)
    assert len(calls) == 5
    rnn(sequence)
    assert len(calls) > 5 + 5
