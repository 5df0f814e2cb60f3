"""Each name that Keras or TensorFlow keeps private does what it is needed for, and is in one module only."""

import ast

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT
from keras import layers

from bn_keras import BatchNormalization, private_names

PROGRAMS = [path for folder in ("bn_keras", "launch") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_module_uses_a_private_name(path):
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("keras.src", "tensorflow.")):
            found.append(node.module)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            own = ast.unparse(node.value) == "self" or node.attr in ("_replace", "_asdict", "_fields")
            found += [] if own else [node.attr]
    assert not found or path == ROOT / "bn_keras" / "private_names.py"


def test_without_functional_of_a_sequential_model_could_not_be_folded():
    model = keras.Sequential([layers.Dense(2)])
    assert private_names.functional_of(model) is None
    model.build((None, 3))
    assert private_names.functional_of(model).layers[-1] is model.layers[-1]


def test_without_functional_a_model_with_a_graph_could_not_be_told_from_one_without():
    x = keras.Input((3,))
    assert isinstance(keras.Model(x, layers.Dense(2)(x)), private_names.Functional)
    assert not isinstance(keras.Sequential([x]), private_names.Functional)


def test_without_safe_mode_scope_a_layer_with_a_lambda_could_not_be_made_again():
    config = keras.saving.serialize_keras_object(layers.Lambda(lambda value: 3 * value))
    with pytest.raises(ValueError, match="Lambda"):
        keras.saving.deserialize_keras_object(config)
    with private_names.SafeModeScope(safe_mode=False):
        assert keras.saving.deserialize_keras_object(config)(np.ones(1)) == 3.0


def test_without_calls_by_depth_the_order_of_a_graphs_calls_would_be_unknown():
    x = keras.Input((3,))
    first, second = layers.Dense(2), layers.ReLU()
    model = keras.Model(x, second(first(x)))
    by_depth = private_names.calls_by_depth(model)
    assert [by_depth[depth][0].operation for depth in sorted(by_depth)] == [second, first, model.layers[0]]


def test_without_operation_before_the_monitor_could_not_find_a_normalization():
    normalization = BatchNormalization()
    assert private_names.operation_before(normalization(keras.Input((3,)))) is normalization


def test_without_mask_of_folding_would_lose_a_mask():
    ids = keras.Input((5,), dtype="int32")
    assert private_names.mask_of(layers.Embedding(4, 2, mask_zero=True)(ids)).shape == (None, 5)
    assert private_names.mask_of(ids) is None


def test_without_layers_within_nested_normalizations_would_not_be_found():
    normalization = BatchNormalization()
    inner = keras.Sequential([keras.Input((3,)), normalization])
    outer = keras.Sequential([keras.Input((5, 3)), layers.TimeDistributed(inner)])
    assert normalization in private_names.layers_within(outer)


def test_without_outside_graphs_a_folded_copy_would_be_a_call_of_the_old_model():
    x = keras.Input((3,))
    layer = layers.Lambda(lambda value: 3 * value)
    model = keras.Model(x, layer(x))
    twin = private_names.outside_graphs(layer)
    assert keras.Model(x, twin(x)) and len(layer._inbound_nodes) == len(model.layers) - 1 == 1
    np.testing.assert_array_equal(twin(np.ones((1, 3))), layer(np.ones((1, 3))))


def test_with_the_preparation_of_dropout_stacked_cells_would_count_one_time_step_twice():
    calls = []

    class Cell(layers.SimpleRNNCell):
        def call(self, *args, **kwargs):
            calls.append(self)
            return super().call(*args, **kwargs)

    rnn = layers.RNN([Cell(2), layers.LSTMCell(2)], unroll=True)
    sequence = np.zeros((2, 5, 3), "float32")
    rnn(sequence)  # builds it
    counts = []
    for _ in range(2):
        put_back = private_names.without_dropout_preparation(rnn)
        calls.clear()
        rnn(sequence)
        counts.append(len(calls))
        put_back()
        calls.clear()
        rnn(sequence)
        counts.append(len(calls))
    assert counts == [5, 6, 5, 6]


@pytest.mark.parametrize("xla", [True, False])
def test_without_compiled_by_xla_a_kernel_that_xla_expands_inexactly_would_be_taken(xla):
    seen = []
    tf.function(lambda: seen.append(private_names.compiled_by_xla()), jit_compile=xla)()
    assert seen == [xla] and not private_names.compiled_by_xla()


def test_without_new_layer_names_a_network_that_is_built_again_would_have_other_names():
    first = layers.Dense(2).name
    with private_names.new_layer_names():
        assert layers.Dense(2).name == "dense"
    assert layers.Dense(2).name not in (first, "dense")


def test_without_seeds_put_back_a_run_would_change_what_the_process_draws():
    def draw():
        return [keras.random.normal((3,)).numpy(), tf.random.normal((3,)).numpy()]

    keras.utils.set_random_seed(1)
    draw()
    expected = draw()
    keras.utils.set_random_seed(1)
    draw()
    with private_names.seeds_put_back():
        keras.utils.set_random_seed(2)
        draw()
    np.testing.assert_array_equal(draw(), expected)


def test_without_same_bits_each_time_determinism_could_not_be_put_back():
    with private_names.seeds_put_back():
        keras.utils.set_random_seed(0)
        refused = pytest.raises(tf.errors.FailedPreconditionError, match="determinism is enabled")
        with private_names.same_bits_each_time(), refused:
            tf.timestamp()
        tf.timestamp()
