"""The network is Figure 5's."""

from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf

from bn_keras import VARIANTS, build_network
from bn_keras.layers.local_response_normalization import LocalResponseNormalization
from bn_keras.networks.inception import FIGURE_5
from bn_keras.paper.figure_5 import figure_5


@pytest.fixture(scope="module")
def full():
    return {name: build_network(name) for name in ("bn_x5", "inception")}


def layer_types(model):
    return {type(layer).__name__ for layer in model.layers}


def test_parameters_with_and_without_batch_normalization(full):
    assert full["bn_x5"].count_params() == 11_208_192
    assert sum(np.prod(weight.shape) for weight in full["bn_x5"].trainable_weights) == 11_188_288
    assert full["inception"].count_params() == 11_178_336


def test_a_plain_stem_has_a_7x7_kernel_over_colors():
    assert build_network(replace(VARIANTS["bn_x5"], separable_stem=False)).count_params() == 11_214_888


@pytest.mark.parametrize(
    "layer, shape",
    [
        ("conv1_7x7", (112, 112, 64)),
        ("pool1", (56, 56, 64)),
        ("conv2_3x3", (56, 56, 192)),
        ("pool2", (28, 28, 192)),
        ("inception_3a", (28, 28, 256)),
        ("inception_3b", (28, 28, 320)),
        ("inception_3c", (14, 14, 576)),
        ("inception_4a", (14, 14, 576)),
        ("inception_4b", (14, 14, 576)),
        ("inception_4c", (14, 14, 576)),
        ("inception_4d", (14, 14, 576)),
        ("inception_4e", (7, 7, 1024)),
        ("inception_5a", (7, 7, 1024)),
        ("inception_5b", (7, 7, 1024)),
        ("logits", (1000,)),
    ],
)
def test_shapes_are_the_figures(full, layer, shape):
    assert full["bn_x5"].get_layer(layer).output.shape[1:] == shape


def test_the_table_of_figure_5_is_read_off_the_network():
    """The multiply-adds by hand: kernel size x maps in x maps out x positions, for each convolution of a module."""
    lines = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in figure_5().splitlines()
    }
    products = 28**2 * (192 * (64 + 64 + 64 + 32) + 9 * 64 * 64 + 9 * 64 * 96 + 9 * 96 * 96)
    parameters = 192 * (64 + 64 + 64 + 32) + 9 * (64 * 64 + 64 * 96 + 96 * 96) + 4 * (64 + 64 + 64 + 64 + 96 + 96 + 32)
    assert lines["inception_3a"] == [
        "28x28x256",
        *("64", "64", "64", "64", "96", "average 32"),
        f"{parameters:,}",
        f"{products / 1e6:,.1f}e6",
    ]
    assert lines["inception_3c"][:7] == ["14x14x576", "", "128", "160", "64", "96", "max pass through"]
    assert lines["in all"][7] == "11,208,192"


def test_the_output_column_is_the_sum_of_the_branches():
    maps = {}
    before = 192
    for row in FIGURE_5:
        maps[row.name] = row.conv_1x1 + row.conv_3x3 + row.double_3x3 + (row.projection or before)
        before = maps[row.name]
    assert maps == {row.name: row.output for row in FIGURE_5}


def test_the_other_reading_of_4c_and_4d_has_608_maps():
    model = build_network(replace(VARIANTS["bn_x5"], projection_4c_4d=128), image_size=32)
    assert [model.get_layer(f"inception_{name}").output.shape[-1] for name in ("4c", "4d", "4e")] == [608, 608, 1056]


def test_a_network_has_the_layers_that_its_row_says():
    for name, variant in VARIANTS.items():
        types = layer_types(build_network(name, image_size=32, width=0.1, classes=3))
        assert ("Dropout" in types) == (variant.dropout > 0)
        assert ("LocalResponseNormalization" in types) == variant.local_response_normalization
        assert ("BatchNormalization" in types) == variant.batch_normalization


def test_batch_normalization_stands_between_every_convolution_and_its_nonlinearity():
    model = build_network("bn_x5_sigmoid", image_size=32, width=0.1)
    activations = [layer for layer in model.layers if isinstance(layer, keras.layers.Activation)]
    assert len(activations) == 69
    for layer in activations:
        assert layer.activation is keras.activations.sigmoid
        normalization = model.get_layer(f"{layer.name}_bn")
        convolution = model.get_layer(f"{layer.name}_conv")
        assert layer.input is normalization.output and normalization.input is convolution.output
        assert not convolution.use_bias


def test_the_penalty_is_half_lambda_times_the_squared_weights():
    model = build_network("inception", image_size=32, width=0.1, classes=3)
    kernels = [w.numpy() for w in model.trainable_weights if w.name not in ("bias", "gamma", "beta")]
    assert len(kernels) == 69 + 1 + 1  # a convolution each, a second kernel in the separable stem, the classifier
    expected = 2e-4 / 2 * sum(np.square(k, dtype=np.float64).sum() for k in kernels)
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)


def test_width_scales_the_maps_in_multiples_of_8():
    model = build_network("bn_x5", width=0.3, image_size=32)
    assert model.get_layer("conv2_3x3").output.shape[-1] == 56  # 192 * 0.3 = 57.6


def test_initial_weights_of_convolutions_are_scaled():
    def weights(name):
        keras.utils.set_random_seed(0)
        return build_network(name, image_size=32, width=0.1).get_weights()

    once, twice = weights("bn_x30"), weights("ensemble_1")
    for one, two in zip(once[:-2], twice[:-2], strict=True):
        np.testing.assert_allclose(two, one * (2 if one.ndim == 4 else 1), rtol=1e-6)
    np.testing.assert_array_equal(once[-2], twice[-2])  # the classifier's


def test_the_last_modules_normalize_each_activation_by_itself():
    model = build_network("ensemble_5", image_size=64, width=0.1)
    own = {layer.name for layer in model.layers if getattr(layer, "per_activation", False)}
    assert own == {layer.name for layer in model.layers if layer.name.startswith(("inception_5a", "inception_5b"))} & {
        layer.name for layer in model.layers if layer.name.endswith("_bn")
    }
    assert model.get_layer("inception_5b_1x1_bn").gamma.shape == (2, 2, 32)
    row = replace(VARIANTS["bn_x30"], per_activation_modules=11)
    with pytest.raises(
        ValueError,
        match=r"per_activation_modules must be at least 0 and at most 10\. Received: per_activation_modules=11",
    ):
        build_network(row)


def test_another_normalization_layer_takes_every_place():
    model = build_network("bn_x5", image_size=32, width=0.1, batch_normalization=keras.layers.BatchNormalization)
    normalizations = [layer for layer in model.layers if layer.name.endswith("_bn")]
    assert len(normalizations) == 69
    assert all(type(layer) is keras.layers.BatchNormalization for layer in normalizations)


def test_logits_are_float32_under_a_half_precision_policy():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = build_network("bn_x5", image_size=32, width=0.1)
    finally:
        keras.config.set_dtype_policy(before)
    assert model.output.dtype == "float32"
    assert model.get_layer("inception_5b").output.dtype == "bfloat16"


def test_the_model_survives_saving(tmp_path):
    model = build_network("bn_baseline", image_size=32, width=0.1, classes=3, channels=1)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 1)).astype("float32")
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(model(images), again(images))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"variant": "bn_x6"}, r"variant must be one of inception, .*Received: variant='bn_x6'"),
        ({"width": 0.0}, r"width must be greater than 0.*Received: width=0\.0"),
        ({"image_size": 0}, r"image_size must be at least 1\. Received: image_size=0"),
        ({"classes": 0}, r"classes must be at least 1\. Received: classes=0"),
        (
            {"variant": replace(VARIANTS["bn_x5"], projection_4c_4d=100)},
            r"projection_4c_4d must be one of 96, 128\. Received: projection_4c_4d=100",
        ),
        ({"variant": replace(VARIANTS["bn_x5"], depth=18)}, r"depth is no setting of inception"),
        ({"variant": replace(VARIANTS["resnet18"], activation="sigmoid")}, r"activation is no setting of resnet"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_network(**{"variant": "bn_x5", **arguments})


def test_lrn_is_tensorflows_with_alpha_over_the_window():
    x = np.random.default_rng(0).normal(0, 50, (2, 3, 3, 17)).astype("float32")
    expected = tf.nn.local_response_normalization(x, depth_radius=2, bias=1.0, alpha=1e-4 / 5, beta=0.75)
    np.testing.assert_allclose(LocalResponseNormalization()(x), expected, rtol=2e-6)


def test_lrn_needs_a_window_with_a_centre():
    with pytest.raises(ValueError, match=r"size must be odd.*Received: size=4"):
        LocalResponseNormalization(size=4)


def test_a_global_channels_first_is_refused_and_its_advice_works():
    keras.config.set_image_data_format("channels_first")
    try:
        with pytest.raises(ValueError, match=r"set_image_data_format\('channels_last'\)"):
            build_network("bn_x5", image_size=32, width=0.1)
    finally:
        keras.config.set_image_data_format("channels_last")
    assert build_network("bn_x5", image_size=32, width=0.1).output_shape == (None, 1000)


@pytest.mark.parametrize("image_size", [32, 226])
def test_caffes_borders_make_figure_5s_sizes(image_size):
    """At 226 the first pool has an odd size, 113, of which Caffe makes 56 and TensorFlow's SAME 57."""
    model = build_network(replace(VARIANTS["bn_x5"], padding="caffe"), image_size=image_size, width=0.1)
    sizes = [
        model.get_layer(name).output.shape[1] for name in ("pool1", "inception_3a", "inception_4a", "inception_5b")
    ]
    assert sizes == {32: [8, 4, 2, 1], 226: [56, 28, 14, 7]}[image_size]


def test_pixels_reach_the_first_convolution_by_their_convention():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3))
    mean, deviation = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
    conventions = {
        "torch": lambda pixels: (pixels / 255 - mean) / deviation,
        "caffe": lambda pixels: pixels - np.array((128.0, 117.0, 104.0)),
    }
    for convention, values_of in conventions.items():
        row = replace(VARIANTS["resnet18"], input_convention=convention)
        model = build_network(row, image_size=32, width=0.1)
        seen = keras.Model(model.input, model.get_layer("input_convention").output)(pixels / 127.5 - 1.0)
        np.testing.assert_allclose(seen, values_of(pixels), atol=5e-5)
        gray = build_network(row, image_size=32, width=0.1, channels=1)
        seen = keras.Model(gray.input, gray.get_layer("input_convention").output)(pixels[..., :1] / 127.5 - 1.0)
        np.testing.assert_allclose(seen[..., 0], values_of(pixels[..., :1]).mean(-1), atol=5e-5)
