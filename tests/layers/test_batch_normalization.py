"""The layer is Algorithm 1, its gradient Section 3's six formulas, its moving variance unbiased."""

import functools
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from bn_keras import BatchNormalization

EPSILON = 1e-3
X = np.random.default_rng(0).normal(3, 2, (4, 5, 6, 3)).astype("float32")
DY = np.random.default_rng(1).normal(size=X.shape).astype("float32")
AXES = (0, 1, 2)


def algorithm_1(x):
    mean, variance = x.mean(AXES), x.var(AXES)
    return (x - mean) / np.sqrt(variance + EPSILON)


def test_training_is_algorithm_1():
    np.testing.assert_allclose(BatchNormalization()(X, training=True), algorithm_1(X.astype("float64")), atol=1e-5)


def test_gradients_are_the_papers_six_formulas():
    layer = BatchNormalization(gamma_initializer=keras.initializers.Constant(1.5))
    layer.build(X.shape)
    x = tf.constant(X)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(layer(x, training=True) * DY)
    dx, dgamma, dbeta = tape.gradient(loss, [x, layer.gamma.value, layer.beta.value])
    x64, dy, m = X.astype("float64"), DY.astype("float64"), X[..., 0].size
    mean, variance = x64.mean(AXES), x64.var(AXES)
    dxhat = dy * 1.5
    dvariance = (dxhat * (x64 - mean)).sum(AXES) * -0.5 * (variance + EPSILON) ** -1.5
    dmean = (-dxhat / np.sqrt(variance + EPSILON)).sum(AXES) + dvariance * (-2 * (x64 - mean)).sum(AXES) / m
    expected = dxhat / np.sqrt(variance + EPSILON) + dvariance * 2 * (x64 - mean) / m + dmean / m
    np.testing.assert_allclose(dx, expected, atol=1e-5)
    np.testing.assert_allclose(dgamma, (dy * algorithm_1(x64)).sum(AXES), rtol=1e-4)
    np.testing.assert_allclose(dbeta, dy.sum(AXES), rtol=1e-4)


@pytest.mark.parametrize("unbiased", [True, False])
def test_moving_averages_take_the_unbiased_variance_of_algorithm_2(unbiased):
    layer = BatchNormalization(momentum=0.9, unbiased=unbiased)
    layer(X, training=True)
    np.testing.assert_allclose(layer.moving_mean, 0.1 * X.mean(AXES), rtol=1e-5)
    variance = X.var(AXES, ddof=1 if unbiased else 0)
    np.testing.assert_allclose(layer.moving_variance, 0.9 + 0.1 * variance, rtol=1e-5)


def test_inference_after_training_with_momentum_0_agrees_with_training():
    layer = BatchNormalization(momentum=0.0, unbiased=False)
    before = layer(X, training=False).numpy()
    trained = layer(X, training=True).numpy()
    assert not np.allclose(before, trained, atol=0.1)
    np.testing.assert_allclose(layer(X, training=False), trained, atol=1e-5)


def test_a_frozen_layer_neither_uses_nor_changes_batch_statistics():
    layer = BatchNormalization()
    layer.build(X.shape)
    layer.trainable = False
    np.testing.assert_allclose(layer(X, training=True), X / np.sqrt(1 + EPSILON), rtol=1e-5)
    np.testing.assert_array_equal(layer.moving_mean, np.zeros(3))


def test_scaling_the_input_changes_nothing_and_divides_the_gradient():
    """Section 3.3: BN((aW)u) = BN(Wu), exact with epsilon 0."""
    layer = BatchNormalization(epsilon=0.0)
    layer.build((20, 4))
    u, w = tf.constant(X.reshape(20, 18)), tf.constant(DY.reshape(-1)[:72].reshape(18, 4))
    results = []
    for a in (1.0, 8.0):
        with tf.GradientTape() as tape:
            weights = a * w
            tape.watch([u, weights])
            y = layer(u @ weights, training=True)
            loss = tf.reduce_sum(y * tf.sin(tf.range(4.0)) * u[:, :4])
        results.append((y, *tape.gradient(loss, [u, weights])))
    (y, du, dw), (scaled_y, scaled_du, scaled_dw) = results
    np.testing.assert_allclose(scaled_y, y, atol=1e-5)
    np.testing.assert_allclose(scaled_du, du, atol=1e-4)
    np.testing.assert_allclose(scaled_dw * 8, dw, rtol=1e-3, atol=1e-4)


def test_the_gradient_to_the_weights_is_smaller_for_larger_weights():
    """Section 3.3: the scale does not change the layer's Jacobian, and larger weights lead to smaller gradients."""
    layer = BatchNormalization(epsilon=0.0)
    layer.build((20, 4))
    u, w = tf.constant(X.reshape(20, 18)), tf.constant(DY.reshape(-1)[:72].reshape(18, 4))
    norms = []
    for a in (0.5, 1.0, 2.0):
        weights = a * w
        with tf.GradientTape() as tape:
            tape.watch(weights)
            loss = tf.reduce_sum(layer(u @ weights, training=True) * u[:, :4])
        norms.append(float(tf.norm(tape.gradient(loss, weights))))
    np.testing.assert_allclose(np.array(norms) * [0.5, 1, 2], norms[1], rtol=1e-3)


def test_gamma_and_beta_can_restore_the_identity():
    """Section 3: with gamma = sqrt(Var[x] + epsilon) and beta = E[x] the transform is the identity."""
    layer = BatchNormalization()
    layer.build(X.shape)
    layer.gamma.assign(np.sqrt(X.var(AXES) + EPSILON))
    layer.beta.assign(X.mean(AXES))
    np.testing.assert_allclose(layer(X, training=True), X, atol=1e-5)


def test_convolutional_statistics_are_one_pair_per_feature_map():
    """Section 3.2: a mini-batch of size m and maps of p x q locations give m' = m * p * q values."""
    layer = BatchNormalization(momentum=0.0)
    layer(X, training=True)
    assert layer.gamma.shape == layer.beta.shape == (3,)
    m = 4 * 5 * 6
    np.testing.assert_allclose(layer.moving_variance, X.astype("float64").var(AXES) * m / (m - 1), rtol=1e-5)


def test_inference_is_one_fixed_affine_map():
    """Section 3.1: the output for an example does not depend on the rest of the batch."""
    layer = BatchNormalization()
    layer(X, training=True)
    together = np.array(layer(X, training=False))
    np.testing.assert_allclose(np.concatenate([layer(X[i : i + 1]) for i in range(4)]), together, atol=1e-6)
    middle = layer((X[:2] + X[2:]) / 2, training=False)
    np.testing.assert_allclose(middle, (together[:2] + together[2:]) / 2, atol=1e-5)


def test_the_gradient_can_be_differentiated_again():
    """A gradient penalty: against Keras's layer, whose gradient is composed."""
    second = []
    for layer_class in (BatchNormalization, keras.layers.BatchNormalization):
        layer, x = layer_class(), tf.constant(X)
        layer.build(X.shape)
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(tf.sin(layer(x, training=True)) * DY)
            penalty = tf.reduce_sum(inner.gradient(loss, x) ** 2)
        second.append(outer.gradient(penalty, [x, layer.gamma.value]))
    for ours, theirs in zip(*second, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


# --- Keras


SHAPES = {2: (7, 4), 3: (5, 6, 4), 4: (3, 5, 4, 4), 5: (2, 3, 4, 2, 4)}
# Float16 and bfloat16 results are rounded once, from float32, by Keras's layer too: neighbours at most. With a mask
# Keras divides by the count plus 1e-7.
TOLERANCES = {"float32": 2e-5, "float64": 1e-10, "mixed_float16": 2e-3, "mixed_bfloat16": 2e-2}


def step(layer, x, mask, training):
    x = tf.constant(x, layer.compute_dtype)
    parameters = [variable.value for variable in layer.trainable_variables]
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=training, mask=mask)
        loss = tf.reduce_sum(tf.cast(y, "float64") * tf.cast(tf.reshape(tf.range(tf.size(y)) % 7, y.shape), "float64"))
    return [y, *tape.gradient(loss, [x, *parameters])]


@pytest.mark.parametrize(
    "rank, axis, dtype",
    [
        pytest.param(*case, marks=() if case[2] == "float32" or case[0] == 4 else pytest.mark.slow)
        for case in itertools.product(SHAPES, (-1, 1), TOLERANCES)
    ],
)
def test_output_gradients_and_averages_are_keras(rank, axis, dtype):
    shape = SHAPES[rank]
    draw = np.random.default_rng(rank)
    x = draw.normal(1, 3, shape)
    for center, scale, masked, training in itertools.product((True, False), repeat=4):
        if masked and axis % rank != rank - 1:
            continue  # a mask has the shape of the inputs without the last axis
        arguments = {"axis": axis, "center": center, "scale": scale, "dtype": dtype, "momentum": 0.9}
        theirs = keras.layers.BatchNormalization(**arguments)
        ours = BatchNormalization(unbiased=False, **arguments)
        theirs.build(shape)
        ours.build(shape)
        theirs.set_weights([draw.uniform(0.5, 2, weight.shape) for weight in theirs.get_weights()])
        ours.set_weights(theirs.get_weights())
        mask = tf.constant(draw.uniform(size=shape[:-1]) < 0.7) if masked else None
        results = [[*step(layer, x, mask, training), *layer.get_weights()] for layer in (ours, theirs)]
        for our, their in zip(*results, strict=True):
            our, their = (np.asarray(value, "float64") for value in (our, their))
            tolerance = max(TOLERANCES[dtype], masked * 1e-6) * max(1, np.abs(their).max())
            np.testing.assert_allclose(our, their, atol=tolerance, err_msg=f"{center=} {scale=} {masked=} {training=}")


def test_a_saved_keras_model_becomes_ours_by_loading_its_weights(tmp_path):
    def network(normalization):
        layers = [keras.layers.Dense(4), normalization(momentum=0.5), keras.layers.ReLU(), normalization(scale=False)]
        return keras.Sequential([keras.Input((6,)), *layers])

    theirs = network(keras.layers.BatchNormalization)
    x = np.random.default_rng(3).normal(size=(16, 6)).astype("float32")
    theirs(x, training=True)
    theirs.save_weights(tmp_path / "model.weights.h5")
    ours = network(BatchNormalization)
    ours.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(ours(x), theirs(x), atol=1e-5)
    debiased = network(functools.partial(BatchNormalization, debias=True))
    debiased.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(debiased(x), theirs(x), atol=1e-5)


def test_ours_has_every_argument_of_keras_at_the_same_place_with_the_same_default():
    import inspect

    theirs = inspect.signature(keras.layers.BatchNormalization).parameters
    ours = inspect.signature(BatchNormalization).parameters
    named = [name for name in theirs if name != "kwargs"]
    assert list(ours)[: len(named)] == named
    assert [ours[name].default for name in named] == [theirs[name].default for name in named]


# --- torch


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.needs("torch")
def test_output_gradients_and_unbiased_averages_are_torchs(momentum):
    import torch

    layer = BatchNormalization(momentum=momentum, epsilon=1e-5)
    layer.build(X.shape)
    theirs = torch.nn.BatchNorm2d(3, momentum=1 - momentum, eps=1e-5)
    x = tf.constant(X)
    x_torch = torch.from_numpy(np.moveaxis(X, 3, 1).copy()).requires_grad_()
    for _ in range(3):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        gradients = tape.gradient(y, [x, layer.gamma.value, layer.beta.value], tf.constant(DY))
        x_torch.grad = None
        theirs.zero_grad()
        y_torch = theirs(x_torch)
        y_torch.backward(torch.from_numpy(np.moveaxis(DY, 3, 1).copy()))
    expected = [np.moveaxis(v.detach().numpy(), 1, 3) for v in (y_torch, x_torch.grad)]
    expected += [v.detach().numpy() for v in (theirs.weight.grad, theirs.bias.grad)]
    for our, their in zip([y, *gradients], expected, strict=True):
        np.testing.assert_allclose(our, their, atol=2e-6 * max(1, np.abs(their).max()))
    np.testing.assert_allclose(layer.moving_mean, theirs.running_mean, rtol=1e-6)
    np.testing.assert_allclose(layer.moving_variance, theirs.running_var, rtol=1e-6)


# --- any shape, any mean


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4).map(lambda sizes: (*sizes, 2)),
    axis=st.integers(-4, -1),
    mean=st.sampled_from([0.0, -3.0, 1e3, 1e6]),
    deviation=st.sampled_from([1.0, 100.0]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_mean_is_float64s_result(shape, axis, mean, deviation, seed):
    axis = max(axis, 1 - len(shape))
    x = np.random.default_rng(seed).normal(mean, deviation, shape).astype("float32")
    axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    m = x.size // shape[axis]
    if m == 1:
        return
    layer = BatchNormalization(axis=axis, momentum=0.0)
    x64 = x.astype("float64")
    expected = (x64 - x64.mean(axes, keepdims=True)) / np.sqrt(x64.var(axes, keepdims=True) + EPSILON)
    # 1e-6 of the deviation; values about 1e6 are 0.06 apart, so a deviation of 1 has few bits but no more error.
    np.testing.assert_allclose(layer(x, training=True), expected, atol=5e-6)
    np.testing.assert_allclose(layer.moving_mean, x64.mean(axes), rtol=1e-6, atol=1e-6 * deviation)
    np.testing.assert_allclose(layer.moving_variance, x64.var(axes) * m / (m - 1), rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("shape", [(256, 7), (32, 28, 28, 4)])
def test_a_first_example_unlike_the_others_costs_few_digits(shape):
    """The kernel's pivot is the mean of the first example: here 1000 deviations away from the rest."""
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    x[0] += 1000
    axes = tuple(range(x.ndim - 1))
    x64 = x.astype("float64")
    expected = (x64 - x64.mean(axes)) / np.sqrt(x64.var(axes) + EPSILON)
    layer = BatchNormalization(momentum=0.0, unbiased=False)
    # 31 of 32 examples lie apart from the pivot: (mean - pivot)^2 is 31 times the variance, which costs 5 of 24 bits.
    np.testing.assert_allclose(layer(x, training=True), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, x64.var(axes), rtol=2e-5)


# --- extremes


@pytest.mark.parametrize("value", [1e18, 3e19, -1e18, 1e-40, 1e-45, 0.0, 1000.0, 123456.7])
def test_a_constant_channel_is_beta_exactly(value):
    layer = BatchNormalization(beta_initializer=keras.initializers.Constant(0.25))
    x = np.full((4, 3, 3, 2), value, "float32")
    np.testing.assert_array_equal(layer(x, training=True), np.full_like(x, 0.25))


@pytest.mark.parametrize("magnitude", [1e18, 1e19, 1e25, 1e-20, 1e-40])
def test_extremes_stay_finite_forward_and_backward(magnitude):
    layer = BatchNormalization(momentum=0.5)
    layer.build(X.shape)
    x = tf.constant((X - 3) * np.float32(magnitude))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
    gradients = tape.gradient(y, [x, layer.gamma.value, layer.beta.value], tf.constant(DY))
    for value in (y, *gradients, *layer.get_weights(), layer(x, training=False)):
        assert np.isfinite(value).all()
    if magnitude <= 1e18:
        np.testing.assert_allclose(
            y, algorithm_1((X - 3).astype("float64") * magnitude), atol=1e-5 if magnitude > 1 else 1e-15
        )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_inputs_keep_float32_statistics(dtype):
    """1000 values of 300 sum to 3e5: infinity in float16, and 257 is no bfloat16."""
    layer = BatchNormalization(momentum=0.0, dtype=f"mixed_{dtype}")
    x = tf.cast(tf.constant(np.random.default_rng(0).normal(300, 2, (1000, 2)), "float32"), dtype)
    y = layer(x, training=True)
    x64 = x.numpy().astype("float64")
    assert y.dtype == dtype and layer.moving_mean.dtype == "float32"
    np.testing.assert_allclose(layer.moving_mean, x64.mean(0), rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, x64.var(0, ddof=1), rtol=1e-4)


# --- one value per channel


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "shape, arguments",
    [((1, 3), {}), ((1, 1, 1, 3), {}), ((4, 3), {"virtual_batch_size": 1}), ((1, 5, 5, 3), {"per_activation": True})],
)
def test_one_value_per_channel_gives_beta_leaves_the_averages_and_is_warned_of_once(shape, arguments, dynamic):
    layer = BatchNormalization(beta_initializer=keras.initializers.Constant(0.25), **arguments)
    layer.build(shape)
    train = functools.partial(layer, training=True)
    if dynamic:
        train = tf.function(train, input_signature=[tf.TensorSpec((None, *shape[1:]))])
    with pytest.warns(UserWarning, match="one value per channel in training") as caught:
        for value in (7.0, -3.0):
            np.testing.assert_array_equal(train(tf.fill(shape, value)), np.full(shape, 0.25))
    warned = [each for each in caught if each.category is UserWarning]  # on Python 3.13 TensorFlow warns of itself too
    assert len(warned) == 1
    np.testing.assert_array_equal(layer.moving_mean, np.zeros(layer.moving_mean.shape))
    np.testing.assert_array_equal(layer.moving_variance, np.ones(layer.moving_mean.shape))


def test_no_value_at_all_leaves_the_averages_and_two_are_not_warned_of(recwarn):
    layer = BatchNormalization(renorm=True)
    layer.build((None, 3))
    run = tf.function(lambda x: layer(x, training=True), input_signature=[tf.TensorSpec((None, 3))])
    before = layer.get_weights()
    assert run(tf.zeros((0, 3))).shape == (0, 3)
    for ours, theirs in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    run(tf.zeros((2, 3)))
    assert not any("one value" in str(warning.message) for warning in recwarn)


def test_a_dynamic_batch_and_dynamic_positions_give_the_static_result():
    for arguments in ({}, {"virtual_batch_size": 3}, {"axis": 1}):
        layer = BatchNormalization(**arguments)
        dynamic = [size if i == layer.axis % 4 else None for i, size in enumerate(X.shape)]
        layer.build(dynamic)
        run = tf.function(lambda x: layer(x, training=True), input_signature=[tf.TensorSpec(dynamic)])  # noqa: B023
        np.testing.assert_allclose(run(X), BatchNormalization(**arguments)(X, training=True), atol=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"virtual_batch_size": 3}, {"axis": 1}, {"per_activation": True}])
def test_xla_takes_a_batch_that_is_not_known_when_it_is_traced(arguments):
    """As in the last, smaller batch of an epoch of `fit`."""
    layer = BatchNormalization(**arguments)
    layer.build((None, *X.shape[1:]))
    signature = [tf.TensorSpec((None, *X.shape[1:]))]
    run = tf.function(lambda x: layer(x, training=True), input_signature=signature, jit_compile=True)
    np.testing.assert_allclose(run(X), BatchNormalization(**arguments)(X, training=True), atol=1e-5)


# --- masks


def test_masked_values_do_not_enter_the_statistics():
    mask = np.random.default_rng(4).uniform(size=X.shape[:-1]) < 0.5
    layer = BatchNormalization(momentum=0.0)
    poisoned = np.where(mask[..., None], X, 1e6).astype("float32")
    y = layer(poisoned, training=True, mask=tf.constant(mask))
    values = X[mask].astype("float64")
    np.testing.assert_allclose(layer.moving_mean, values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, values.var(0, ddof=1), rtol=1e-4)
    expected = (values - values.mean(0)) / np.sqrt(values.var(0) + EPSILON)
    np.testing.assert_allclose(np.array(y)[mask], expected, atol=1e-5)


def test_a_mask_of_another_rank_is_refused():
    with pytest.raises(ValueError, match="one dimension less than the inputs"):
        BatchNormalization()(X, mask=np.ones(X.shape, bool))


# --- beyond Keras


@pytest.mark.parametrize("batch, size", [(8, 4), (7, 3), (5, 8)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_virtual_batch_has_statistics_of_its_own(batch, size, dynamic):
    x = np.random.default_rng(5).normal(np.arange(batch)[:, None, None], 1, (batch, 6, 3)).astype("float32")
    layer = BatchNormalization(virtual_batch_size=size, momentum=0.0)
    shape = (None if dynamic else batch, 6, 3)
    layer.build(shape)
    y = tf.function(lambda x: layer(x, training=True), input_signature=[tf.TensorSpec(shape)])(x)
    groups = [x[i : i + size].astype("float64") for i in range(0, batch, size)]
    expected = [(g - g.mean((0, 1))) / np.sqrt(g.var((0, 1)) + EPSILON) for g in groups]
    np.testing.assert_allclose(y, np.concatenate(expected), atol=1e-5)
    counts = np.array([g[..., 0].size for g in groups], "float64")
    np.testing.assert_allclose(layer.moving_mean, np.average([g.mean((0, 1)) for g in groups], 0, counts), rtol=1e-5)
    variance = np.average([g.var((0, 1), ddof=1) for g in groups], 0, counts - 1)
    np.testing.assert_allclose(layer.moving_variance, variance, rtol=1e-5)


def test_per_activation_normalizes_every_activation_by_the_batch_alone():
    """Section 4.2.3: non-convolutional BN, one gamma and beta per activation."""
    layer = BatchNormalization(per_activation=True, momentum=0.0)
    y = layer(X, training=True)
    x64 = X.astype("float64")
    np.testing.assert_allclose(y, (x64 - x64.mean(0)) / np.sqrt(x64.var(0) + EPSILON), atol=1e-5)
    assert layer.gamma.shape == layer.moving_mean.shape == X.shape[1:]
    np.testing.assert_allclose(layer.moving_variance, x64.var(0, ddof=1), rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_debiased_averages_are_the_datas_from_the_first_step(momentum):
    """After t steps the weights 1 - momentum, (1 - momentum) * momentum, ... are divided by their sum."""
    layer = BatchNormalization(momentum=momentum, debias=True)
    batches = np.random.default_rng(6).normal(5, 2, (4, 16, 3)).astype("float32")
    for t in range(1, 5):
        layer(batches[t - 1], training=True)
        weights = momentum ** np.arange(t)[::-1]
        for average, values in (
            (layer.moving_mean, [b.mean(0) for b in batches[:t]]),
            (layer.moving_variance, [b.astype("float64").var(0, ddof=1) for b in batches[:t]]),
        ):
            np.testing.assert_allclose(average, np.average(values, 0, weights), rtol=2e-5)


@pytest.mark.parametrize(
    "arguments", [{}, {"debias": True}, {"renorm": True}, {"per_activation": True}, {"virtual_batch_size": 2}]
)
def test_a_keras_file_holds_everything(arguments, tmp_path):
    model = keras.Sequential([keras.Input(X.shape[1:]), BatchNormalization(momentum=0.5, **arguments)])
    model(X, training=True)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(X), model(X))
    for each in (model, loaded):
        each(X + 1, training=True)
    for ours, theirs in zip(loaded.layers[-1].variables, model.layers[-1].variables, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=ours.path)


def debiased_model(momentum=0.9):
    return keras.Sequential([keras.Input((3,)), BatchNormalization(momentum=momentum, debias=True, name="bn")])


def by_weights(model, folder):
    twin = debiased_model()
    twin.set_weights(model.get_weights())
    return twin


def by_h5(model, folder):
    model.save(folder / "model.h5")
    return keras.models.load_model(folder / "model.h5")


def by_weights_file(model, folder):
    model.save_weights(folder / "model.weights.h5")
    twin = debiased_model()
    twin.load_weights(folder / "model.weights.h5")
    return twin


def by_clone(model, folder):
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    return twin


@pytest.mark.parametrize("copy", [by_weights, by_h5, by_weights_file, by_clone])
def test_debiased_averages_go_on_in_a_copy(copy, tmp_path):
    batches = np.random.default_rng(6).normal(5, 2, (4, 16, 3)).astype("float32")
    model = debiased_model()
    for batch in batches[:3]:
        model(batch, training=True)
    twin = copy(model, tmp_path)
    twin(batches[3], training=True)
    weights = 0.9 ** np.arange(4)[::-1]
    np.testing.assert_allclose(twin.layers[-1].moving_mean, np.average(batches.mean(1), 0, weights), rtol=1e-5)
    names = [weight.name for weight in twin.layers[-1].weights]
    assert names == ["gamma", "beta", "moving_mean", "moving_variance", "moving_weight"]


ARGUMENTS = {
    "axis": 1,
    "momentum": 0.5,
    "epsilon": 0.5,
    "center": False,
    "scale": False,
    "beta_initializer": keras.initializers.Constant(2.0),
    "gamma_initializer": keras.initializers.Constant(2.0),
    "moving_mean_initializer": keras.initializers.Constant(2.0),
    "moving_variance_initializer": keras.initializers.Constant(2.0),
    "beta_regularizer": keras.regularizers.L2(0.1),
    "gamma_regularizer": keras.regularizers.L2(0.1),
    "beta_constraint": keras.constraints.NonNeg(),
    "gamma_constraint": keras.constraints.NonNeg(),
    "renorm": True,
    "renorm_clipping": {"rmax": 1.1, "rmin": 0.9, "dmax": 0.1},
    "renorm_momentum": 0.5,
    "synchronized": True,
    "unbiased": False,
    "virtual_batch_size": 2,
    "per_activation": True,
    "debias": True,
}
NEEDS = {"renorm_clipping": {"renorm": True}, "renorm_momentum": {"renorm": True}}


def what_one_can_see(layer):
    x = X[:, :3, :3]  # three channels on either axis
    training = layer(x, training=True)
    layer(x, training=True)
    losses = [float(loss) for loss in layer.losses] + [len(layer.losses)]
    constrained = [variable.constraint is not None for variable in layer.trainable_variables]
    variables = [keras.ops.convert_to_numpy(variable) for variable in layer.variables]
    return [np.array(training), np.array(layer(x)), *losses, *constrained, *variables]


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if name != "synchronized"])  # tests/test_synchronized.py
def test_every_argument_has_an_effect(name):
    base = NEEDS.get(name, {})
    one, other = (what_one_can_see(BatchNormalization(**each)) for each in (base, base | {name: ARGUMENTS[name]}))
    same = len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert not same


def test_there_is_no_argument_without_a_test():
    import inspect

    assert set(inspect.signature(BatchNormalization).parameters) == {*ARGUMENTS, "kwargs"}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_config_round_trips(name):
    layer = BatchNormalization(**NEEDS.get(name, {}), **{name: ARGUMENTS[name]}, name="bn", dtype="mixed_bfloat16")
    config = layer.get_config()
    assert BatchNormalization.from_config(config).get_config() == config
    assert config != BatchNormalization(name="bn", dtype="mixed_bfloat16").get_config()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"momentum": 1.5}, r"weight of the old value, in \[0, 1\]"),
        ({"epsilon": -1e-3}, "must not be negative"),
        ({"virtual_batch_size": 0}, "counts examples, 1 or more"),
        ({"per_activation": True, "axis": 1}, "have no channel axis"),
        ({"renorm": True, "renorm_clipping": {"max": 1}}, "invalid keys"),
    ],
)
def test_an_argument_out_of_range_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchNormalization(**arguments)


def test_shapes_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="out of bounds"):
        BatchNormalization(axis=4).build((2, 3))
    with pytest.raises(ValueError, match="must be known"):
        BatchNormalization().build((2, None))
    assert BatchNormalization().compute_output_shape((None, 3, 4)) == (None, 3, 4)
    spec = BatchNormalization(dtype="mixed_float16").compute_output_spec(keras.KerasTensor((None, 3), "float16"))
    assert (spec.shape, spec.dtype) == ((None, 3), "float16")


def test_a_custom_loop_in_one_graph_moves_the_averages():
    """tensorflow#16102: no update collection to remember."""
    layer = BatchNormalization(momentum=0.0)
    layer.build((None, 3))

    @tf.function
    def train(x, steps):
        for _ in tf.range(steps):
            layer(x, training=True)

    train(tf.constant(X.reshape(-1, 3)), 2)
    np.testing.assert_allclose(layer.moving_mean, X.mean(AXES), rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"axis": 1}, {"per_activation": True}, {"virtual_batch_size": 2}])
def test_a_graph_of_unknown_channels_is_that_of_known_ones(arguments, training):
    layer, twin = BatchNormalization(**arguments), BatchNormalization(**arguments)
    for each in (layer, twin):
        each.build((None, *X.shape[1:]))
    run = tf.function(lambda x: layer(x, training=training), input_signature=[tf.TensorSpec([None] * 4)])
    np.testing.assert_allclose(run(X), twin(X, training=training), atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mean", [0, 1000])
@pytest.mark.parametrize("shape", [(6, 3), (4, 6, 3), (4, 6, 5, 3), (4, 6, 5, 2, 3)])
def test_a_vectorized_map_is_a_loop(shape, mean, training):
    layer = BatchNormalization()
    layer.build(shape)
    x = np.random.default_rng(0).normal(mean, 1, (5, *shape)).astype("float32")
    mapped = tf.vectorized_map(lambda x: layer(x, training=training), tf.constant(x))
    np.testing.assert_allclose(mapped, [layer(each, training=training) for each in x], rtol=1e-6, atol=1e-6)
