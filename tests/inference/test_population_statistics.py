"""Algorithm 2: population statistics are over training mini-batches, with final parameters, by either estimator."""

import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

from bn_keras import BatchNormalization, population_statistics
from bn_keras.layers.dropout import Dropout

DATA = np.random.default_rng(0).normal(4, 3, (20, 5, 3)).astype("float32") * [1, 2, 3]
UNEQUAL = [DATA[:8], DATA[8:16], DATA[16:]]


def one_layer(**arguments):
    layer = BatchNormalization(**arguments)
    return keras.Sequential([keras.Input((5, 3)), layer]), layer


def deep_model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8),
            BatchNormalization(name="first"),
            keras.layers.Activation("relu"),
            Dropout(0.5, seed=1),
            keras.layers.Dense(4),
            BatchNormalization(name="second"),
        ]
    )
    batches = [np.random.default_rng(k).normal(2, 1, (4, 6)).astype("float32") for k in range(6)]
    return model, batches


def state(model):
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in model.variables]


def assert_same_state(model, before):
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value, err_msg=variable.path)


def test_the_papers_estimator_is_the_mean_of_means_and_of_unbiased_variances():
    model, layer = one_layer()
    population_statistics(model, UNEQUAL)
    np.testing.assert_allclose(layer.moving_mean, np.mean([b.mean((0, 1)) for b in UNEQUAL], 0), rtol=1e-6)
    variance = np.mean([b.astype("float64").var((0, 1), ddof=1) for b in UNEQUAL], 0)
    np.testing.assert_allclose(layer.moving_variance, variance, rtol=1e-6)


def test_the_pooled_estimator_is_the_variance_of_all_values_together():
    model, layer = one_layer()
    population_statistics(model, UNEQUAL, estimator="pooled")
    np.testing.assert_allclose(layer.moving_mean, DATA.mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(layer.moving_variance, DATA.astype("float64").var((0, 1), ddof=1), rtol=1e-6)


@pytest.mark.parametrize("estimator", ["mean_of_unbiased", "pooled"])
def test_accumulation_is_exact_at_mean_1000_over_many_batches(estimator):
    """Float64 sums: no E[x^2] - m^2, no drift with the count of batches."""
    model, _ = one_layer()
    batches = np.random.default_rng(1).normal(1000, 1, (200, 2, 5, 3)).astype("float32")
    ((_, moments),) = population_statistics(model, batches, estimator=estimator).items()
    x = batches.astype("float64")
    pooled = estimator == "pooled"
    expected = x.reshape(-1, 3).var(0, ddof=1) if pooled else x.reshape(200, -1, 3).var(1, ddof=1).mean(0)
    np.testing.assert_allclose(moments.mean, x.mean((0, 1, 2)), rtol=1e-7)
    # A batch's mean about 1000 is a float32, within 3e-5: squared, and by chance, 1e-6 of the spread of the means.
    np.testing.assert_allclose(moments.variance, expected, rtol=5e-6)
    np.testing.assert_array_equal(moments.count, 2000)


def test_groups_of_a_virtual_batch_count_as_mini_batches():
    model, layer = one_layer(virtual_batch_size=4)
    population_statistics(model, [DATA])
    groups = DATA.reshape(5, 4, 5, 3).astype("float64")
    np.testing.assert_allclose(layer.moving_variance, groups.var((1, 2), ddof=1).mean(0), rtol=1e-6)


def test_per_activation_statistics_have_a_value_for_every_activation():
    model, layer = one_layer(per_activation=True)
    population_statistics(model, [DATA], estimator="pooled")
    np.testing.assert_allclose(layer.moving_variance, DATA.astype("float64").var(0, ddof=1), rtol=1e-5)


def test_steps_is_the_papers_n_and_targets_are_ignored():
    model, layer = one_layer()
    population_statistics(model, ((batch, np.zeros(len(batch))) for batch in UNEQUAL), steps=1)
    np.testing.assert_allclose(layer.moving_mean, UNEQUAL[0].mean((0, 1)), rtol=1e-6)


def test_one_pass_measures_every_layer_behind_layers_in_batch_mode():
    model, batches = deep_model()
    second = model.get_layer("second")
    expected = []
    for batch in batches:
        hidden = batch.astype("float64") @ model.layers[0].get_weights()[0]
        hidden = np.maximum((hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-3), 0)
        expected.append((hidden @ model.layers[4].get_weights()[0]).var(0, ddof=1))
    population_statistics(model, batches)
    np.testing.assert_allclose(second.moving_variance, np.mean(expected, 0), rtol=1e-4)


@pytest.mark.parametrize("estimator", ["mean_of_unbiased", "pooled"])
def test_layer_by_layer_measures_what_the_layers_see_at_inference(estimator):
    model, batches = deep_model()
    population_statistics(model, batches, estimator=estimator, layer_by_layer=True)
    before_second = keras.Model(*model.inputs, model.layers[4].output)
    seen = np.stack([before_second(batch, training=False) for batch in batches]).astype("float64")
    variance = seen.var(1, ddof=1).mean(0) if estimator == "mean_of_unbiased" else seen.reshape(-1, 4).var(0, ddof=1)
    np.testing.assert_allclose(model.get_layer("second").moving_mean, seen.mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(model.get_layer("second").moving_variance, variance, rtol=1e-5)
    measured = state(model)
    population_statistics(model, batches, estimator=estimator, layer_by_layer=True)
    for value, again in zip(measured, state(model), strict=True):
        np.testing.assert_allclose(again, value, rtol=1e-6)  # a fixed point


def test_the_first_layer_is_the_same_in_one_pass_and_layer_by_layer_but_the_second_is_not():
    model, batches = deep_model()
    one = {layer.name: m for layer, m in population_statistics(model, batches, write=False).items()}
    each = population_statistics(model, batches, write=False, layer_by_layer=True)
    each = {layer.name: m for layer, m in each.items()}
    np.testing.assert_allclose(one["first"].variance, each["first"].variance, rtol=1e-6)
    assert abs(one["second"].variance / each["second"].variance - 1).max() > 0.05


def test_everything_but_the_moving_averages_stays():
    model, batches = deep_model()
    names = [variable.path for variable in model.variables]
    before = state(model)
    population_statistics(model, batches)
    for name, old, new in zip(names, before, state(model), strict=True):
        assert np.array_equal(old, new) != ("moving_" in name), name


def test_without_write_everything_stays_and_applied_lasts_for_the_block():
    model, batches = deep_model()
    before = state(model)
    statistics = population_statistics(model, batches, write=False)
    assert_same_state(model, before)
    with statistics.applied():
        np.testing.assert_allclose(
            model.get_layer("first").moving_mean, statistics[model.get_layer("first")].mean, rtol=1e-6
        )
    assert_same_state(model, before)


@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_a_failing_data_set_leaves_model_and_mode_as_they_were(layer_by_layer):
    class Failing:
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield batches[0]
            if self.passes > layer_by_layer:
                raise OSError("disk gone")

    model, batches = deep_model()
    before, output = state(model), np.array(model(batches[0], training=False))
    with pytest.raises(OSError, match="disk gone"):
        population_statistics(model, Failing(), layer_by_layer=layer_by_layer)
    assert_same_state(model, before)
    np.testing.assert_array_equal(model(batches[0], training=False), output)


def test_a_failure_under_applied_gives_the_old_bits_back():
    model, batches = deep_model()
    before = state(model)
    statistics = population_statistics(model, batches, write=False)
    with pytest.raises(OSError), statistics.applied():
        raise OSError
    assert_same_state(model, before)


def test_frozen_layers_keep_their_averages_and_layers_can_be_chosen():
    model, batches = deep_model()
    model.get_layer("first").trainable = False
    assert [layer.name for layer in population_statistics(model, batches)] == ["second"]
    np.testing.assert_array_equal(model.get_layer("first").moving_mean, np.zeros(8))
    chosen = population_statistics(model, batches, layers=[model.get_layer("first")], write=False)
    assert [layer.name for layer in chosen] == ["first"]


def test_a_model_is_traced_once_and_measured_with_its_present_weights():
    traces = []

    class Scale(keras.layers.Layer):
        def build(self, shape):
            self.factor = self.add_weight(shape=(), initializer="ones")

        def call(self, x):
            traces.append(x.shape)
            return x * self.factor

    scale, layer = Scale(), BatchNormalization()
    model = keras.Sequential([keras.Input((5, 3)), scale, layer])
    traces.clear()
    for factor in (1, 2):
        scale.factor.assign(factor)
        population_statistics(model, [DATA])
        np.testing.assert_allclose(layer.moving_mean, factor * DATA.mean((0, 1)), rtol=1e-6)
    assert len(traces) == 1


def test_a_measured_model_is_freed_with_its_last_reference():
    model, _ = one_layer()
    population_statistics(model, [DATA])
    freed = weakref.ref(model)
    del model
    gc.collect()
    assert freed() is None


def test_nested_models_are_measured():
    inner, layer = one_layer()
    images = keras.Input((5, 3))
    population_statistics(keras.Model(images, keras.layers.Dense(2)(inner(images))), [DATA])
    np.testing.assert_allclose(layer.moving_mean, DATA.mean((0, 1)), rtol=1e-6)


@pytest.mark.parametrize("arguments", [{"debias": True}, {"renorm": True}])
def test_what_was_measured_is_what_inference_uses(arguments):
    model, layer = one_layer(momentum=0.9, **arguments)
    population_statistics(model, [DATA])
    expected = (DATA - DATA.mean((0, 1))) / np.sqrt(DATA.astype("float64").var((0, 1), ddof=1) + layer.epsilon)
    np.testing.assert_allclose(model(DATA, training=False), expected, atol=1e-5)
    if layer.debias:  # the next step of training moves it by 1 - momentum, as an average of long standing
        model(DATA * 0, training=True)
        np.testing.assert_allclose(layer.moving_mean, 0.9 * DATA.mean((0, 1)), rtol=1e-5)


NORMALIZATIONS = (BatchNormalization, keras.layers.BatchNormalization)
ROWS = [np.random.default_rng(k).normal(3, 2, (8, 6)).astype("float32") for k in range(3)]
SEQUENCES = [np.random.default_rng(k).normal(size=(8, 3, 6)).astype("float32") for k in range(2)]


def assert_measured(layer, batches):
    """Algorithm 2, line 10, over [values, channels] in float64."""
    batches = [batch.astype("float64") for batch in batches]
    np.testing.assert_allclose(layer.moving_mean, np.mean([b.mean(0) for b in batches], 0), atol=1e-6)
    np.testing.assert_allclose(layer.moving_variance, np.mean([b.var(0, ddof=1) for b in batches], 0), rtol=1e-5)


def assert_normalized_by_averages(model, layer, inputs, hidden):
    expected = (hidden - layer.moving_mean) / np.sqrt(layer.moving_variance + layer.epsilon)
    np.testing.assert_allclose(model(inputs, training=False), expected, atol=1e-5)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_keras_layers_are_measured_like_ours(normalization):
    x = keras.Input((6, 3))
    first, second = normalization(axis=1, epsilon=0.1, scale=False), normalization()
    model = keras.Model(x, second(first(x)))
    batches = [np.random.default_rng(k).normal(1, 3, (4, 6, 3)) for k in range(2)]
    first.beta.assign(np.arange(6))
    population_statistics(model, [batch.astype("float32") for batch in batches])
    assert_measured(first, [batch.transpose(0, 2, 1).reshape(-1, 6) for batch in batches])
    normalized = [
        (b - b.mean((0, 2), keepdims=True)) / np.sqrt(b.var((0, 2), keepdims=True) + 0.1) + np.arange(6)[:, None]
        for b in batches
    ]
    assert_measured(second, [hidden.reshape(-1, 3) for hidden in normalized])
    assert normalization.call.__get__(first) == first.call


def test_masked_values_do_not_count_for_keras_layers_either():
    x, layer = keras.Input((5, 6)), keras.layers.BatchNormalization()
    batch = np.random.default_rng(0).normal(1, 3, (4, 5, 6)).astype("float32")
    batch[:, 3:] = 0
    population_statistics(keras.Model(x, layer(keras.layers.Masking()(x))), [batch])
    assert_measured(layer, [batch[:, :3].reshape(-1, 6)])


class OfOneFunction(keras.Model):
    """All that is called is a function that TensorFlow compiles, with Python's `if` in it."""

    def __init__(self, normalization):
        super().__init__()
        self.dense, self.normalization = keras.layers.Dense(4), normalization()
        self.dense.build((None, 6))
        self.normalization.build((None, 4))
        self.built = True

    @tf.function
    def call(self, inputs):
        outputs = self.normalization(self.dense(inputs))
        if tf.reduce_sum(outputs) > 1e9:
            outputs *= 2.0
        return outputs


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_functions_traced_before_are_measured_and_infer_as_before(normalization):
    model = OfOneFunction(normalization)
    model(ROWS[0], training=False)
    model.predict(ROWS[0], verbose=0)
    population_statistics(model, ROWS)
    kernel, bias = model.dense.get_weights()
    assert_measured(model.normalization, [rows @ kernel + bias for rows in ROWS])
    for rows in (ROWS[0], ROWS[0][:5]):  # a shape that was traced before, and one that was not
        assert_normalized_by_averages(model, model.normalization, rows, rows @ kernel + bias)
    assert_normalized_by_averages(
        lambda x, training: model.predict(x, verbose=0), model.normalization, ROWS[0], ROWS[0] @ kernel + bias
    )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_failure_in_a_model_of_functions_leaves_it_in_inference(normalization):
    def failing():
        yield ROWS[0]
        raise OSError("disk gone")

    model = OfOneFunction(normalization)
    before = state(model)
    with pytest.raises(OSError, match="disk gone"):
        population_statistics(model, failing())
    assert_same_state(model, before)
    kernel, bias = model.dense.get_weights()
    assert_normalized_by_averages(model, model.normalization, ROWS[0], ROWS[0] @ kernel + bias)
    assert not tf.config.functions_run_eagerly()


class Cell(keras.layers.Layer):
    def __init__(self, normalization=BatchNormalization, **kwargs):
        super().__init__(**kwargs)
        self.state_size = self.output_size = 6
        self.normalization = normalization()

    def call(self, inputs, states, training=None):
        outputs = self.normalization(inputs, training=training)
        return outputs, [outputs]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("stacked", [False, True])
def test_in_an_rnn_each_time_step_is_a_mini_batch(normalization, stacked):
    cell = Cell(normalization)
    x = keras.Input((None, 6))
    rnn = keras.layers.RNN([cell, keras.layers.LSTMCell(2)] if stacked else cell)
    model = keras.Model(x, rnn(x))
    population_statistics(model, SEQUENCES)
    assert_measured(cell.normalization, [sequence[:, t] for sequence in SEQUENCES for t in range(3)])
    assert not rnn.unroll


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_inside_of_time_distributed_each_time_step_is_a_mini_batch(normalization):
    x, layer = keras.Input((3, 6)), normalization()
    population_statistics(keras.Model(x, keras.layers.TimeDistributed(layer)(x)), SEQUENCES)
    assert_measured(layer, [sequence[:, t] for sequence in SEQUENCES for t in range(3)])


def test_a_stateful_rnn_goes_on_from_where_it_was():
    x = keras.Input(batch_shape=(8, 3, 6))
    rnn = keras.layers.LSTM(6, stateful=True, return_sequences=True)
    model = keras.Model(x, BatchNormalization()(rnn(x)))
    model(SEQUENCES[0])
    before = [keras.ops.convert_to_numpy(value) for value in rnn.states]
    population_statistics(model, SEQUENCES)
    np.testing.assert_array_equal(rnn.states, before)


class OneOfTwo(keras.Model):
    def __init__(self, normalization):
        super().__init__(name="one_of_two")
        self.called, self.spare, self.unbuilt = normalization(), normalization(name="spare"), normalization(name="new")
        self.spare.build((None, 6))

    def call(self, inputs):
        return self.called(inputs)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_layer_that_is_not_called_keeps_its_averages_with_a_warning(normalization):
    model = OneOfTwo(normalization)
    model(ROWS[0])
    with pytest.warns(UserWarning, match="Model 'one_of_two' does not call 'spare', 'new': moving averages stay"):
        population_statistics(model, ROWS)
    assert_measured(model.called, ROWS)
    np.testing.assert_array_equal(model.spare.moving_mean, np.zeros(6))
    with pytest.raises(ValueError, match="does not call 'spare', so there is nothing to measure"):
        population_statistics(model, ROWS, layers=[model.spare])


class OfTwice(BatchNormalization):
    def call(self, inputs, training=None, mask=None):
        return super().call(2 * inputs, training=training, mask=mask)


def test_a_derived_layer_is_measured_where_it_normalizes():
    layer = OfTwice()
    population_statistics(keras.Sequential([keras.Input((6,)), layer]), ROWS)
    assert_measured(layer, [2 * rows for rows in ROWS])


def derived_from_keras():
    class OfTwice(keras.layers.BatchNormalization):
        def call(self, inputs, training=None, mask=None):
            return super().call(2 * inputs, training=training, mask=mask)

    return keras.Sequential([keras.Input((6,)), OfTwice(name="twice")])


def called_in_a_vectorized_map():
    class Mapped(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.normalization = BatchNormalization(name="mapped")
            self.normalization.build((None, 6))

        def call(self, inputs):
            return keras.ops.vectorized_map(self.normalization, inputs)

        def compute_output_shape(self, shape):
            return shape

    return keras.Sequential([keras.Input((3, 6)), Mapped()])


@pytest.mark.parametrize(
    "make, batches, message",
    [
        (derived_from_keras, ROWS, r"^Layer 'twice' \(OfTwice\) has another `call` than Keras's layer, so .*$"),
        (called_in_a_vectorized_map, SEQUENCES, r"^Layer 'mapped' is called in a function that .* always traces, .*$"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(make, batches, message):
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        population_statistics(model, batches)
    assert_same_state(model, before)


class Subclassed(keras.Model):
    """One that TensorFlow compiles."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = parts

    @tf.function
    def call(self, inputs):
        for part in self.parts:
            inputs = part(inputs)
        return inputs


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("make", [lambda *parts: keras.Sequential(parts), Subclassed], ids=["Sequential", "subclassed"])
def test_the_first_mini_batch_builds_a_model(make, normalization):
    dense, layer = keras.layers.Dense(4), normalization()
    model = make(dense, layer)
    for _ in range(2):
        population_statistics(model, ROWS)
        kernel, bias = dense.get_weights()
        assert_measured(layer, [rows @ kernel + bias for rows in ROWS])
        assert_normalized_by_averages(model, layer, ROWS[0], ROWS[0] @ kernel + bias)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"estimator": "median"}, "`estimator` must be one of mean_of_unbiased, pooled"),
        ({"batches": []}, "There is no mini-batch to measure"),
        ({"batches": [DATA[:1, :1]]}, "never had two values"),
        ({"batches": [DATA, DATA * np.nan]}, "inputs of layer '.*' are not finite: its moving averages stay"),
        ({"batches": iter([DATA]), "layer_by_layer": True}, "starts again for every layer"),
        (
            {"model": keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])},
            "There is no trainable BatchNormalization",
        ),
    ],
)
def test_errors_say_what_is_missing(arguments, message):
    model = keras.Sequential([keras.Input((None, 3)), BatchNormalization()])
    before = model.get_weights()
    with pytest.raises(ValueError, match=message):
        population_statistics(**{"model": model, "batches": [DATA]} | arguments)
    for value, kept in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, kept)
