"""Folding a normalization into the layer before it changes nothing but the count of layers."""

import keras
import numpy as np
import pytest
from keras import layers

from bn_keras import VARIANTS, BatchNormalization, build_model
from bn_keras.inference.folding import ScaleAndShift, fold_batch_normalization

NORMALIZATIONS = (BatchNormalization, layers.BatchNormalization)


def randomized(model, seed=0):
    """The model with the statistics, gammas and betas of a trained one."""
    random = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        if isinstance(layer, NORMALIZATIONS):
            layer.set_weights([random.uniform(0.5, 1.5, weight.shape) for weight in layer.get_weights()])
    return model


def assert_folds(model, replaced=0):
    """The folded model has no normalization, `replaced` scale-and-shifts, and the same outputs to 1e-5 relative."""
    randomized(model)
    folded = fold_batch_normalization(model)
    kinds = list(folded._flatten_layers())
    assert not any(isinstance(layer, NORMALIZATIONS) for layer in kinds)
    assert sum(isinstance(layer, ScaleAndShift) for layer in kinds) == replaced
    shapes = [(4, *tensor.shape[1:]) for tensor in model.inputs]
    inputs = [np.random.default_rng(1).normal(size=shape).astype("float32") for shape in shapes]
    inputs = inputs if len(inputs) > 1 else inputs[0]
    before = [np.array(keras.ops.convert_to_numpy(variable)) for variable in model.variables]
    expected, got = (keras.tree.flatten(each(inputs, training=False)) for each in (model, folded))
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(keras.ops.max(abs(other))))
    ours = {id(variable) for variable in model.variables}
    assert not any(id(variable) in ours for variable in folded.variables), "variables are shared"
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    return folded


WITH_BN = [name for name, row in VARIANTS.items() if row.batch_normalization]
DIFFERENT = ("bn_baseline", "ensemble_5")  # LRN and Dropout; per-activation statistics


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DIFFERENT else pytest.mark.slow) for name in WITH_BN]
)
def test_a_folded_network_has_no_normalization_and_the_same_logits(name):
    model = build_model(name, image_size=32, width=0.1, classes=5)
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


APPLICATIONS = keras.applications


@pytest.mark.parametrize(
    "application, replaced",
    [
        (APPLICATIONS.MobileNetV2, 0),
        pytest.param(APPLICATIONS.ResNet50, 0, marks=pytest.mark.slow),
        pytest.param(APPLICATIONS.ResNet50V2, 17, marks=pytest.mark.slow),
        pytest.param(APPLICATIONS.DenseNet121, 62, marks=pytest.mark.slow),
        pytest.param(APPLICATIONS.InceptionV3, 0, marks=pytest.mark.slow),
        pytest.param(APPLICATIONS.Xception, 0, marks=pytest.mark.slow),
        pytest.param(APPLICATIONS.EfficientNetB0, 0, marks=pytest.mark.slow),
        pytest.param(APPLICATIONS.NASNetMobile, None, marks=pytest.mark.slow),
    ],
)
def test_networks_of_keras_applications_are_folded(application, replaced):
    size = 224 if application is APPLICATIONS.NASNetMobile else 96
    model = application(weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None)
    if replaced is None:
        randomized(model)
        replaced = sum(isinstance(layer, ScaleAndShift) for layer in fold_batch_normalization(model).layers)
    assert_folds(model, replaced=replaced)


class Subclassed(keras.Model):
    def call(self, inputs):
        return inputs


@pytest.mark.parametrize("model", [Subclassed(), keras.Sequential([layers.Dense(2)])], ids=["subclassed", "not built"])
def test_what_has_no_graph_is_refused(model):
    with pytest.raises(ValueError, match="Only a built functional or Sequential model can be folded"):
        fold_batch_normalization(model)
