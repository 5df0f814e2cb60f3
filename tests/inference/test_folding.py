"""Folding a normalization into the layer before it changes nothing but the count of layers."""

import functools
import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from keras.src.applications import densenet

from bn_keras import VARIANTS, BatchNormalization, build_network, population_statistics
from bn_keras.inference.folding import fold_batch_normalization
from bn_keras.layers.scale_and_shift import ScaleAndShift

NORMALIZATIONS = (BatchNormalization, layers.BatchNormalization)


def randomized(model, seed=0):
    """The model with the statistics, gammas and betas of a trained one."""
    random = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        if isinstance(layer, NORMALIZATIONS):
            layer.set_weights([random.uniform(0.5, 1.5, weight.shape) for weight in layer.get_weights()])
    return model


def assert_folds(model, replaced=0, inputs=None, left=0):
    """The folded model has `left` normalizations, `replaced` scale-and-shifts, and the same outputs to 1e-5 relative,
    and the model is as before."""
    randomized(model)
    before = state(model)
    folded = fold_batch_normalization(model)
    for old, new in zip(before, state(model), strict=True):
        np.testing.assert_array_equal(new, old)
    kinds = list(folded._flatten_layers())
    assert sum(isinstance(layer, NORMALIZATIONS) for layer in kinds) == left
    assert sum(isinstance(layer, ScaleAndShift) for layer in kinds) == replaced
    if inputs is None:
        draw = np.random.default_rng(1)
        symbolic = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
        inputs = keras.tree.map_structure(lambda x: draw.normal(size=(4, *x.shape[1:])).astype("float32"), symbolic)
    expected, got = (each(inputs, training=False) for each in (model, folded))
    keras.tree.assert_same_structure(got, expected)
    for one, other in zip(keras.tree.flatten(got), keras.tree.flatten(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(ops.max(abs(other))))
    ours = {id(variable) for variable in model.variables}
    assert not any(id(variable) in ours for variable in folded.variables), "variables are shared"
    return folded


def state(model):
    """Values of its variables, and in how many calls its operations take part."""
    calls = [len(operation._inbound_nodes) for operation in getattr(model, "operations", ())]
    return [np.array(ops.convert_to_numpy(variable)) for variable in model.variables] + calls


WITH_BN = [name for name, row in VARIANTS.items() if row.batch_normalization]
DIFFERENT = ("bn_baseline", "ensemble_5", "resnet50")  # LRN and Dropout; per-activation statistics; residual sums


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DIFFERENT else pytest.mark.slow) for name in WITH_BN]
)
def test_a_folded_network_has_no_normalization_and_the_same_logits(name):
    model = build_network(name, image_size=32, width=0.1, classes=5)
    assert_folds(model, replaced=sum(getattr(layer, "per_activation", False) for layer in model.layers))


LINEAR = {
    "dense": ((6,), layers.Dense(4)),
    "dense without bias": ((6,), layers.Dense(4, use_bias=False)),
    "dense on rank 3": ((3, 6), layers.Dense(4)),
    "1d": ((9, 3), layers.Conv1D(4, 3)),
    "2d": ((9, 8, 3), layers.Conv2D(4, 3, strides=2, padding="same")),
    "2d in groups": ((9, 8, 4), layers.Conv2D(6, 3, groups=2)),
    "3d": ((5, 5, 5, 2), layers.Conv3D(4, 3)),
    "depthwise 1d": ((9, 3), layers.DepthwiseConv1D(3, depth_multiplier=2)),
    "depthwise 2d": ((9, 8, 3), layers.DepthwiseConv2D(3, depth_multiplier=2)),
    "separable 1d": ((9, 3), layers.SeparableConv1D(4, 3)),
    "separable 2d": ((9, 8, 3), layers.SeparableConv2D(4, 3, use_bias=False)),
    "transposed 1d": ((9, 3), layers.Conv1DTranspose(4, 3, strides=2)),
    "transposed 2d": ((9, 8, 3), layers.Conv2DTranspose(4, 3, strides=2)),
    "transposed 3d": ((5, 5, 5, 2), layers.Conv3DTranspose(4, 3)),
}


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("normalization", NORMALIZATIONS, ids=["ours", "keras"])
def test_every_linear_layer_takes_the_normalization_in(kind, normalization):
    shape, linear = LINEAR[kind]
    linear = type(linear).from_config(linear.get_config())
    if linear.use_bias:
        linear.bias_initializer = keras.initializers.RandomNormal()
    x = keras.Input(shape)
    folded = assert_folds(keras.Model(x, layers.ReLU()(normalization()(linear(x)))))
    assert len(folded.layers) == 3


def nothing_before():
    x = keras.Input((5, 3))
    return x, BatchNormalization()(x)


def nonlinearity_between():
    x = keras.Input((5, 3))
    return x, BatchNormalization()(layers.Dense(4, activation="relu")(x))


def read_twice():
    x = keras.Input((5, 3))
    hidden = layers.Dense(4)(x)
    return x, layers.Add()([BatchNormalization()(hidden), hidden])


def linear_is_an_output():
    x = keras.Input((5, 3))
    hidden = layers.Dense(4)(x)
    return x, [BatchNormalization()(hidden), hidden]


def linear_is_shared():
    x, z = keras.Input((5, 3)), keras.Input((5, 3))
    dense = layers.Dense(4)
    return [x, z], [BatchNormalization()(dense(x)), dense(z)]


def normalization_is_shared():
    x = keras.Input((5, 3))
    normalization = BatchNormalization()
    return x, [normalization(layers.Dense(4)(x)), normalization(layers.Dense(4)(x))]


def per_activation():
    x = keras.Input((5, 3))
    return x, BatchNormalization(per_activation=True)(layers.Dense(4)(x))


def another_axis():
    x = keras.Input((5, 3))
    return x, BatchNormalization(axis=1)(layers.Dense(4)(x))


@pytest.mark.parametrize(
    "build",
    [
        nothing_before,
        nonlinearity_between,
        read_twice,
        linear_is_an_output,
        linear_is_shared,
        normalization_is_shared,
        per_activation,
        another_axis,
    ],
)
def test_where_there_is_nothing_to_fold_into_it_is_a_scale_and_shift(build):
    assert_folds(keras.Model(*build()), replaced=1)


def test_gamma_beta_and_epsilon_count():
    x = keras.Input((5, 3))
    hidden = BatchNormalization(center=False, epsilon=0.1)(layers.Dense(4)(x))
    assert_folds(keras.Model(x, BatchNormalization(scale=False)(layers.Dense(4)(hidden))))


def test_sequential_and_nested_models_are_folded():
    inner = keras.Sequential([keras.Input((5, 4)), layers.Dense(4), BatchNormalization()])
    assert_folds(keras.Sequential([keras.Input((5, 3)), layers.Dense(4), BatchNormalization(), inner, layers.Dense(2)]))


def test_a_folded_model_saves_and_loads(tmp_path):
    folded = assert_folds(keras.Model(*nothing_before()), replaced=1)
    folded.save(tmp_path / "folded.keras")
    x = np.random.default_rng(2).normal(size=(2, 5, 3)).astype("float32")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "folded.keras")(x), folded(x))


def test_half_precision_keeps_its_policy():
    x = keras.Input((5, 3))
    hidden = layers.Dense(4, dtype="mixed_bfloat16")(x)
    model = randomized(keras.Model(x, BatchNormalization(dtype="mixed_bfloat16")(hidden)))
    folded = fold_batch_normalization(model)
    assert folded.output.dtype == "bfloat16"
    value = np.random.default_rng(2).normal(size=(2, 5, 3)).astype("float32")
    one, other = (keras.ops.cast(each(value), "float32") for each in (folded, model))
    np.testing.assert_allclose(one, other, atol=0.05)  # bfloat16 has 8 bits


def with_operations():
    x = keras.Input((5, 6))
    hidden = BatchNormalization()(layers.Dense(6)(x))
    hidden = ops.relu(2.0 * hidden + x) - np.ones(6, "float32")
    first, second = ops.split(hidden, 2, axis=-1)
    return x, {"sum": first + hidden[..., :3], "more": [ops.einsum("bij,bkj->bik", second, second), ops.mean(hidden)]}


def called_by_keyword():
    query, value = keras.Input((5, 3)), keras.Input((6, 3))
    hidden = BatchNormalization()(inputs=layers.Dense(4)(inputs=query), training=False)
    return [query, value], layers.MultiHeadAttention(2, 3)(query=hidden, value=value)


def called_with_a_list():
    query, value = keras.Input((5, 3)), keras.Input((6, 3))
    return [query, value], layers.Attention()([BatchNormalization()(layers.Dense(3)(query)), value], training=False)


def state_between_layers():
    x, before = keras.Input((6, 4)), [keras.Input((3,)), keras.Input((3,))]
    hidden = BatchNormalization()(layers.Dense(4)(x))
    outputs, *after = layers.LSTM(3, return_state=True)(hidden, initial_state=before)
    return [x, *before], [BatchNormalization()(layers.Dense(2)(outputs)), after]


def inputs_and_outputs_by_name():
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    return {"a": a, "b": b}, {"y": BatchNormalization()(layers.Dense(3)(a)) * b}


def nested_and_called_twice():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    inner = keras.Model({"a": a, "b": b}, [BatchNormalization()(layers.Dense(4)(a)), a + b])
    x = keras.Input((4,))
    first, second = inner({"a": x, "b": x})
    return x, inner({"a": second, "b": first}, training=False)


FACTOR = 3.0


def functions_of_ones_own():
    x = keras.Input((5, 4))
    hidden = BatchNormalization()(layers.Dense(4)(layers.Lambda(lambda t: t * FACTOR)(x)))
    hidden = layers.TimeDistributed(layers.Lambda(lambda t: t + FACTOR))(hidden)
    return x, layers.GRU(3, activation=lambda t: ops.tanh(t) * FACTOR)(hidden)


def layers_of_ones_own():
    class Scale(layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=shape[-1:], initializer="uniform")

        def call(self, inputs):
            return inputs * self.scale

        def compute_output_shape(self, shape):
            return shape

    x = keras.Input((5, 4))
    return x, layers.TimeDistributed(Scale())(Scale()(BatchNormalization()(layers.Dense(4)(x))))


@pytest.mark.parametrize(
    "build",
    [
        with_operations,
        called_by_keyword,
        called_with_a_list,
        state_between_layers,
        inputs_and_outputs_by_name,
        nested_and_called_twice,
        functions_of_ones_own,
        layers_of_ones_own,
    ],
)
def test_graphs_of_every_shape_fold(build):
    keras.utils.set_random_seed(0)  # a mean that is 0 by chance would be asked for to 1e-5 of nothing
    assert_folds(keras.Model(*build()))


def test_masks_reach_the_layers_behind():
    ids, mask = keras.Input((6,), dtype="int32"), keras.Input((6,), dtype="bool")
    hidden = layers.Embedding(10, 4, mask_zero=True)(ids)
    first = layers.LSTM(4)(BatchNormalization()(layers.Dense(4)(hidden)))
    second = layers.GlobalAveragePooling1D()(BatchNormalization()(layers.Dense(4)(first[:, None] + hidden), mask=mask))
    draw = np.random.default_rng(1)
    inputs = [draw.integers(0, 3, (4, 6)), draw.uniform(size=(4, 6)) < 0.6]
    assert_folds(keras.Model([ids, mask], [first, second]), replaced=1, inputs=inputs)  # a given mask: not the Dense's


def test_sparse_and_optional_inputs_stay_that():
    class AddIfThere(layers.Layer):
        def call(self, x, y=None):
            return x if y is None else x + y

        def compute_output_spec(self, x, y=None):
            return keras.KerasTensor(x.shape, x.dtype)

    x, y = keras.Input((6,), sparse=True), keras.Input((4,), optional=True)
    model = keras.Model([x, y], AddIfThere()(BatchNormalization()(layers.Dense(4)(x)), y))
    dense = np.random.default_rng(1).normal(size=(3, 6)).astype("float32")
    assert_folds(model, inputs=[tf.sparse.from_dense(dense), None])


def in_training():
    x = keras.Input((5,))
    return x, layers.BatchNormalization()(layers.Dense(4)(x), training=True)


def derived():
    class OfTwice(layers.BatchNormalization):
        def call(self, inputs, training=None, mask=None):
            return super().call(2 * inputs, training=training, mask=mask)

    x = keras.Input((5,))
    return x, OfTwice()(layers.Dense(4)(x))


def in_another_layer():
    x = keras.Input((5, 3))
    return x, layers.TimeDistributed(BatchNormalization())(layers.Dense(4)(x))


@pytest.mark.parametrize("build", [in_training, derived, in_another_layer])
def test_a_normalization_that_is_more_than_an_affine_map_of_the_graph_stays(build):
    assert_folds(keras.Model(*build()), left=1)


class OfAnotherKernel(layers.Conv1D):
    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, kernel - ops.mean(kernel))


@pytest.mark.parametrize(
    "linear",
    [
        OfAnotherKernel(4, 3),
        layers.SpectralNormalization(layers.Conv1D(4, 3)),
        layers.Conv1D(4, 3, activity_regularizer="l2"),
        layers.Conv1D(4, 3, dtype="float64"),
        layers.EinsumDense("abc,cd->abd", (None, 4)),
    ],
    ids=["a subclass", "a wrapper", "with a loss", "of another dtype", "einsum"],
)
def test_a_layer_that_is_more_than_its_weights_is_left_alone(linear):
    x = keras.Input((9, 6))
    assert_folds(keras.Model(x, BatchNormalization()(linear(x))), replaced=1)


@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_quantized_layers_keep_their_bits(mode):
    x = keras.Input((16,))
    hidden = BatchNormalization()(layers.Dense(8)(x))
    model = keras.Model(x, BatchNormalization()(layers.EinsumDense("ab,bc->ac", (6,))(hidden)))
    model.quantize(mode)
    folded = assert_folds(model, replaced=2)
    assert folded.layers[1].quantization_mode == mode


@pytest.mark.parametrize("quantized", [False, True])
def test_lora_factors_count(quantized):
    dense = layers.Dense(4)
    x = keras.Input((5,))
    model = keras.Model(x, BatchNormalization()(dense(x)))
    if quantized:
        model.quantize("int8")
    dense.enable_lora(2)
    dense.lora_kernel_b.assign(np.random.default_rng(0).normal(size=(2, 4)))
    assert_folds(model, replaced=1)


def adapted(layer, data):
    layer.adapt(data)
    return layer


class Words(layers.Layer):
    """A vocabulary and variables in one."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.lookup, self.embedding = layers.StringLookup(), layers.Embedding(10, 3)

    def call(self, words):
        return self.embedding(self.lookup(words))


WORDS = tf.constant(["a b", "b c", "of two\nlines", "c"])
NUMBERS = np.random.default_rng(0).normal(2, 3, (50, 1)).astype("float32")


@pytest.mark.parametrize(
    "make, data",
    [
        (lambda: adapted(layers.StringLookup(output_mode="multi_hot"), WORDS), WORDS[:, None]),
        (lambda: adapted(layers.TextVectorization(output_sequence_length=3), WORDS), WORDS),
        (lambda: adapted(layers.TextVectorization(None, output_mode="tf_idf", pad_to_max_tokens=False), WORDS), WORDS),
        (lambda: adapted(layers.IntegerLookup(output_mode="one_hot"), np.array([3, 5, 7])), np.array([[3], [7], [8]])),
        (lambda: adapted(layers.Discretization(num_bins=4, output_mode="one_hot"), NUMBERS), NUMBERS),
        (lambda: adapted(layers.Normalization(), NUMBERS), NUMBERS),
    ],
    ids=["StringLookup", "TextVectorization", "tf_idf", "IntegerLookup", "Discretization", "Normalization"],
)
def test_adapted_layers_keep_what_they_were_adapted_to(make, data):
    layer = make()
    x = keras.Input(data.shape[1:], dtype=data.dtype if isinstance(data, np.ndarray) else "string")
    hidden = ops.cast(layer(x), "float32")
    assert_folds(keras.Model(x, BatchNormalization()(layers.Dense(4)(hidden))), inputs=data)


def test_vocabularies_inside_of_layers_are_copied():
    words = Words()
    words.lookup.adapt(WORDS[:2])
    x = keras.Input((), dtype="string")
    assert_folds(keras.Model(x, BatchNormalization()(layers.Dense(4)(words(x)))), inputs=WORDS)


def test_what_is_frozen_stays_frozen():
    x = keras.Input((5,))
    frozen, free = layers.Dense(4, name="frozen", trainable=False), layers.Dense(4, name="free")
    folded = assert_folds(keras.Model(x, BatchNormalization()(free(BatchNormalization()(frozen(x))))))
    assert [variable.path for variable in folded.trainable_variables] == ["free/kernel", "free/bias"]


def test_layers_of_a_map_of_policies_keep_theirs():
    policies = keras.dtype_policies.DTypePolicyMap()
    policies["half"] = keras.DTypePolicy("mixed_bfloat16")
    x = keras.Input((5,))
    hidden = layers.Dense(4, dtype=policies, name="half")(x)
    folded = assert_folds(keras.Model(x, BatchNormalization(dtype=policies)(hidden)), replaced=1)
    assert folded.get_layer("half").compute_dtype == "bfloat16"


def test_float16_statistics_become_a_float32_scale_and_shift():
    x = keras.Input((5,), dtype="float16")
    model = randomized(keras.Model(x, layers.BatchNormalization(dtype="float16")(layers.ReLU(dtype="float16")(x))))
    value = np.random.default_rng(0).uniform(500, 1000, (4, 5)).astype("float16")
    np.testing.assert_array_equal(fold_batch_normalization(model)(value), model(value))


@pytest.mark.parametrize("mean", [0, 100, 1e5])
def test_a_large_mean_costs_a_scale_and_shift_no_digits(mean):
    x = keras.Input((5, 3))
    model = keras.Model(x, BatchNormalization()(x))
    model.layers[1].set_weights([np.ones(3), np.zeros(3), np.full(3, mean), np.ones(3)])
    value = (mean + np.random.default_rng(0).normal(size=(4, 5, 3))).astype("float32")
    expected = (value.astype("float64") - mean) / np.sqrt(1 + 1e-3)
    np.testing.assert_allclose(fold_batch_normalization(model)(value), expected, atol=1e-6)


NETWORKS = [name for name, network in vars(keras.applications).items() if inspect.isfunction(network)]
DENSENET = "DenseNet121 with 2 in place of 6 to 24 layers a block"
SMALLEST = {"InceptionV3": 75, "InceptionResNetV2": 75, "Xception": 71}


@pytest.fixture
def dtype_policy(request):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy(before)


@pytest.mark.parametrize(
    "name, dtype_policy, tolerance",
    [
        ("MobileNetV3Small", "float32", 1e-5),
        (DENSENET, "float32", 1e-5),
        *(pytest.param(name, "float64", 1e-12, marks=pytest.mark.slow) for name in NETWORKS),
    ],
    indirect=["dtype_policy"],
)
def test_every_network_of_keras_applications_is_measured_and_folds(name, dtype_policy, tolerance):
    """All of them in float64: the largest turn float32's rounding errors into 1e-4 of their outputs, folded or not."""
    size = SMALLEST.get(name, 32)
    network = (
        functools.partial(densenet.DenseNet, (2, 2, 2, 2)) if name == DENSENET else getattr(keras.applications, name)
    )
    model = network(weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None)
    normalizations = [layer for layer in model._flatten_layers() if isinstance(layer, NORMALIZATIONS)]
    draw = np.random.default_rng(0)
    for layer in normalizations:
        for parameter in layer.trainable_variables:
            parameter.assign(draw.uniform(0.5, 1.5, parameter.shape))
    images = draw.uniform(0, 255, (8, size, size, 3)).astype(dtype_policy)
    if normalizations:
        assert set(population_statistics(model, [images])) == set(normalizations)
    folded = fold_batch_normalization(model)
    assert not any(isinstance(layer, NORMALIZATIONS) for layer in folded._flatten_layers())
    expected = np.asarray(model(images, training=False))
    np.testing.assert_allclose(folded(images, training=False), expected, atol=tolerance * abs(expected).max())


class Subclassed(keras.Model):
    def call(self, inputs):
        return inputs


class OfTwice(keras.Sequential):
    def call(self, inputs, training=None, mask=None):
        return super().call(2 * inputs)


@pytest.mark.parametrize(
    "model",
    [Subclassed(), keras.Sequential([layers.Dense(2)]), OfTwice([keras.Input((3,)), layers.Dense(2)])],
    ids=["subclassed", "not built", "with a call of its own"],
)
def test_what_has_no_graph_is_refused(model):
    with pytest.raises(ValueError, match="Only a built functional or Sequential model can be folded"):
        fold_batch_normalization(model)


def test_a_layer_without_a_configuration_is_refused_by_name_in_one_line():
    class Block(keras.Model):
        def __init__(self, units):
            super().__init__(name="block")
            self.dense = layers.Dense(units)

        def call(self, inputs):
            return self.dense(inputs)

    x = keras.Input((3,))
    model = keras.Model(x, BatchNormalization()(layers.Dense(4)(Block(2)(x))))
    before = state(model)
    with pytest.raises(ValueError, match=r"^Layer 'block' \(Block\) cannot be made again from its get_config: .*$"):
        fold_batch_normalization(model)
    for old, new in zip(before, state(model), strict=True):
        np.testing.assert_array_equal(new, old)
