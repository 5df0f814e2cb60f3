"""Algorithm 2: population statistics are over training mini-batches, with final parameters, by either estimator."""

import gc
import weakref

import keras
import numpy as np
import pytest

from bn_keras import BatchNormalization, population_statistics
from bn_keras.dropout import Dropout

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
    before_second = keras.Model(model.inputs, model.layers[4].output)
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


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"estimator": "median"}, "`estimator` must be one of mean_of_unbiased, pooled"),
        ({"batches": []}, "There is no mini-batch to measure"),
        ({"batches": [DATA[:1, :1]]}, "never had two values"),
        ({"batches": iter([DATA]), "layer_by_layer": True}, "starts again for every layer"),
        (
            {"model": keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])},
            "There is no trainable BatchNormalization",
        ),
    ],
)
def test_errors_say_what_is_missing(arguments, message):
    model = keras.Sequential([keras.Input((None, 3)), BatchNormalization()])
    with pytest.raises(ValueError, match=message):
        population_statistics(**{"model": model, "batches": [DATA]} | arguments)
