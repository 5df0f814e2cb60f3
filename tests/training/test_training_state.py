"""The optimizer's arithmetic, the learning rate's schedule, and a step that XLA compiles for a TPU."""

import dataclasses
import re
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import make_run_config
from tensorflow.python.eager import context

from bn_keras.input.photometric_distortion import distort_colors, random_colors
from bn_keras.input.preprocessing import uniform_draws
from bn_keras.layers.batch_normalization import BatchNormalization
from bn_keras.layers.dropout import Dropout
from bn_keras.layers.local_response_normalization import LocalResponseNormalization
from bn_keras.networks.variants import VARIANTS
from bn_keras.training.learning_rate import learning_rate
from bn_keras.training.optimizer import LossScale, MomentumSGD
from bn_keras.training.training_state import TrainingState, make_replica_step, make_train_steps

RATE = tf.constant(0.5)


def weights_of(*values, l2=None):
    regularizer = keras.regularizers.L2(l2) if l2 else None
    layers = [keras.layers.Dense(1, use_bias=False, kernel_regularizer=regularizer) for _ in values]
    for layer, value in zip(layers, values, strict=True):
        layer.build((None, len(value)))
        layer.kernel.assign(np.reshape(value, (-1, 1)))
    return [layer.kernel for layer in layers]


def take_step(optimizer, *gradients, rate=RATE, step=0, usable=None):
    """One step as the trainer takes it: in a graph, in replica context."""
    values = [tf.constant(np.reshape(gradient, (-1, 1)), tf.float32) for gradient in gradients]
    usable = None if usable is None else tf.constant(usable)
    tf.function(lambda: optimizer.apply(values, rate, tf.constant(step, tf.int64), usable))()


def test_the_velocity_keeps_nine_tenths_and_l2_enters_as_lambda_w():
    (weight,) = weights_of([2.0, -4.0], l2=0.05)  # Keras's c, so lambda is 0.1
    optimizer = MomentumSGD([weight], 0.9)
    take_step(optimizer, [1.0, 1.0])
    # velocity = -0.5 * (1 + 0.1 * [2, -4]) = [-0.6, -0.3]
    np.testing.assert_allclose(weight.numpy()[:, 0], [1.4, -4.3], rtol=1e-6)
    take_step(optimizer, [0.0, 0.0])
    # velocity = 0.9 * [-0.6, -0.3] - 0.5 * 0.1 * [1.4, -4.3] = [-0.61, -0.055]
    np.testing.assert_allclose(weight.numpy()[:, 0], [0.79, -4.355], rtol=1e-6)


def test_the_steps_schedule_is_goyals_and_warms_up_from_the_rate_of_256():
    config = make_run_config(variant=VARIANTS["resnet50"], batch_size=512, train_examples=1000)
    expected = [(0, 0.1), (2_500, 0.15), (5_000, 0.2), (29_999, 0.2), (30_000, 0.02), (60_000, 0.002), (80_000, 2e-4)]
    for examples, rate in expected:
        assert float(learning_rate(config, tf.constant(examples, tf.int64))) == pytest.approx(rate, rel=1e-6)


def test_the_cosine_schedule_is_kerass():
    row = dataclasses.replace(VARIANTS["resnet18"], schedule="cosine", decay_epochs=2.0)
    config = make_run_config(variant=row, train_examples=1000)
    keras_schedule = keras.optimizers.schedules.CosineDecay(row.learning_rate, decay_steps=18_000)
    for examples in (0, 5_000, 9_000, 17_999, 18_000, 30_000):
        found = float(learning_rate(config, tf.constant(examples, tf.int64)))
        assert found == pytest.approx(float(keras_schedule(examples)), rel=1e-5, abs=1e-9)


def test_it_is_keras_sgd_on_the_loss_with_its_penalties():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, kernel_regularizer=keras.regularizers.L2(0.01))])
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    x = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
    ours, theirs = MomentumSGD(model.trainable_variables, 0.9), keras.optimizers.SGD(0.1, momentum=0.9)
    for step in range(5):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x) ** 2)
        gradients = tape.gradient(loss, [weight.value for weight in model.trainable_variables])
        ours.apply(gradients, tf.constant(0.1), tf.constant(step, tf.int64))
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(twin(x) ** 2) + tf.add_n(twin.losses)
        theirs.apply(tape.gradient(loss, twin.trainable_variables), twin.trainable_variables)
    for one, other in zip(model.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_another_regularizer_is_refused():
    layer = keras.layers.Dense(1, kernel_regularizer=keras.regularizers.L1(0.1))
    layer.build((None, 2))
    with pytest.raises(ValueError, match="Only L2 regularization is known here"):
        MomentumSGD([layer.kernel], 0.9)


def test_clipping_scales_all_gradients_by_their_joint_norm():
    weights = weights_of([0.0], [0.0])
    take_step(MomentumSGD(weights, 0.9, clip_norm=1.0), [3.0], [4.0])
    np.testing.assert_allclose([weight.numpy().item() for weight in weights], [-0.3, -0.4], rtol=1e-6)
    weights = weights_of([0.0], [0.0])
    take_step(MomentumSGD(weights, 0.9, clip_norm=10.0), [3.0], [4.0])
    np.testing.assert_allclose([weight.numpy().item() for weight in weights], [-1.5, -2.0], rtol=1e-6)


def test_averages_move_towards_the_weights_and_lend_them_their_place():
    (weight,) = weights_of([1.0])
    optimizer = MomentumSGD([weight], 0.9, averaging=0.75)
    take_step(optimizer, [2.0], step=0)  # weight 1 -> 0; keeps (1 + 0) / (10 + 0) = 0.1 of the average, 1
    with optimizer.averages_applied():
        np.testing.assert_allclose(weight.numpy().item(), 0.1, rtol=1e-6)
    assert weight.numpy().item() == 0.0
    take_step(optimizer, [-1.8], step=90)  # velocity -0.9 + 0.9 = 0; keeps min(0.75, 0.91)
    with optimizer.averages_applied():
        np.testing.assert_allclose(weight.numpy().item(), 0.075, rtol=1e-5)


def test_averaged_statistics_are_those_of_the_mini_batches_in_the_proportions_of_the_weights():
    """By the formula of `MomentumSGD`: the average keeps min(0.9, (1 + t) / (10 + t)) of itself in step t."""
    (weight,) = weights_of([1.0])
    statistic = keras.Variable([0.0, 1.0], trainable=False, name="moving_mean")
    optimizer = MomentumSGD([weight], momentum=0.9, averaging=0.9, statistics=[(statistic, 0.99)])
    expected, moving = np.array([0.0, 1.0]), np.array([0.0, 1.0])
    for step, of_mini_batch in enumerate(([4.0, 5.0], [-1.0, 0.5], [7.0, 7.0])):
        moving = 0.99 * moving + 0.01 * np.array(of_mini_batch)
        statistic.assign(moving)
        take_step(optimizer, [0.0], step=step)
        kept = min(0.9, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * np.array(of_mini_batch)
    with optimizer.averages_applied():
        np.testing.assert_allclose(statistic.numpy(), expected, rtol=1e-4)  # a 100th of its last bits is known
    np.testing.assert_array_equal(statistic.numpy(), moving.astype("float32"))


def test_a_step_left_out_moves_no_average_of_statistics_and_the_next_counts_its_own_mini_batch():
    (weight,) = weights_of([1.0])
    statistic = keras.Variable([0.0], trainable=False, name="moving_mean")
    optimizer = MomentumSGD([weight], momentum=0.9, averaging=0.9, statistics=[(statistic, 0.5)])
    statistic.assign([4.0])  # towards 8
    take_step(optimizer, [np.inf], step=0, usable=False)
    statistic.assign([3.0])  # towards 2
    take_step(optimizer, [0.0], step=0)
    with optimizer.averages_applied():
        np.testing.assert_allclose(statistic.numpy(), [0.9 * 2.0], rtol=1e-6)


def test_weights_have_their_very_bits_back_after_averages():
    values = np.random.default_rng(0).normal(size=100).astype("float32")
    (weight,) = weights_of(values)
    optimizer = MomentumSGD([weight], 0.9, averaging=0.9)
    take_step(optimizer, values / 3)
    before = weight.numpy()
    with optimizer.averages_applied():
        assert not np.array_equal(weight.numpy(), before)
    np.testing.assert_array_equal(weight.numpy(), before)


def test_a_step_that_overflows_changes_nothing_and_halves_the_scale():
    (weight,) = weights_of([1.0])
    optimizer, scale = MomentumSGD([weight], 0.9, averaging=0.9), LossScale()
    before = {name: variable.numpy() for name, variable in optimizer.variables().items()}
    take_step(optimizer, [np.inf], usable=False)
    scale.update(tf.constant(False))
    assert weight.numpy().item() == 1.0
    for name, variable in optimizer.variables().items():
        np.testing.assert_array_equal(variable.numpy(), before[name])
    assert float(scale.scale) == LossScale.INITIAL / 2


def test_a_run_of_good_steps_doubles_the_scale(monkeypatch):
    monkeypatch.setattr(LossScale, "GROWTH_INTERVAL", 3)
    scale = LossScale()
    seen = []
    for usable in (True, True, False, True, True, True, True):
        scale.update(tf.constant(usable))
        seen.append(float(scale.scale) / LossScale.INITIAL)
    assert seen == [1, 1, 0.5, 0.5, 0.5, 1, 1]


def rate_at(config, examples):
    return float(learning_rate(config, tf.constant(examples, tf.int64)))


def test_the_rate_falls_by_4_percent_after_so_many_examples_at_any_batch():
    for batch_size in (32, 96):
        config = make_run_config(batch_size=batch_size)
        initial = 0.0075 * batch_size / 32
        assert config.decay_examples == 1600  # 8/6 epochs of 1200
        np.testing.assert_allclose(rate_at(config, 1599), initial, rtol=1e-6)
        np.testing.assert_allclose(rate_at(config, 1600), initial * 0.96, rtol=1e-6)
        np.testing.assert_allclose(rate_at(config, 4 * 1600), initial * 0.96**4, rtol=1e-6)


def test_above_256_the_rate_grows_to_its_value_in_5_epochs():
    assert make_run_config(batch_size=256).warmup_examples == 0
    config = make_run_config(batch_size=512)
    assert config.warmup_examples == 5 * 1200
    np.testing.assert_allclose(rate_at(config, 0), 0.0075, rtol=1e-6)  # as at a batch of 32
    np.testing.assert_allclose(rate_at(config, 3000), 0.0075 * (1 + 16) / 2 * 0.96, rtol=1e-6)
    np.testing.assert_allclose(rate_at(config, 6400), 0.0075 * 16 * 0.96**4, rtol=1e-6)


def test_without_scaling_the_rate_is_the_variants():
    config = make_run_config(batch_size=512, scale_learning_rate="none")
    assert config.warmup_examples == 0
    np.testing.assert_allclose(rate_at(config, 0), 0.0075, rtol=1e-6)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_a_step_that_distorts_learns_what_one_on_distorted_images_learns(policy):
    images = tf.cast(tf.random.stateless_uniform((8, 4, 6, 3), [0, 1], 0, 256, tf.int32), tf.uint8)
    draws, labels = uniform_draws((0, 1), 8), tf.range(8) % 5
    learned = {}
    for distort_on in ("host", "device"):
        keras.config.set_dtype_policy(policy)
        try:
            keras.utils.set_random_seed(0)
            model = keras.Sequential(
                [keras.Input((4, 6, 3)), keras.layers.Flatten(), keras.layers.Dense(5, dtype="float32")]
            )
            config = make_run_config(batch_size=8, distort_on=distort_on)
            state = types.SimpleNamespace(
                model=model, optimizer=MomentumSGD(model.trainable_variables, 0.9), loss_scale=None
            )
            step = make_replica_step(state, config)
        finally:
            keras.config.set_dtype_policy("float32")
        seen = (images, draws)
        if distort_on == "host":
            seen = tf.function(lambda: distort_colors(images, random_colors(draws, "reduced", 3)))()
        tf.function(lambda step=step, seen=seen: step(seen, labels, RATE, tf.constant(0, tf.int64)))()
        learned[distort_on] = model.get_weights()
    for one, other in zip(learned["host"], learned["device"], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_xla_compiles_the_whole_step_in_static_shapes(policy):
    """What a TPU needs and this machine can show. The network has one layer of each kind that the real ones have."""
    keras.config.set_dtype_policy(policy)
    try:
        model = keras.Sequential(
            [
                keras.Input((16, 16, 3)),
                keras.layers.SeparableConv2D(8, 7, 2, padding="same", depth_multiplier=2, use_bias=False),
                BatchNormalization(virtual_batch_size=4),
                keras.layers.Activation("relu"),
                keras.layers.MaxPooling2D(3, 2, padding="same"),
                LocalResponseNormalization(),
                keras.layers.AveragePooling2D(3, 1, padding="same"),
                keras.layers.GlobalAveragePooling2D(),
                Dropout(0.4, seed=1),
                keras.layers.Dense(5, dtype="float32", kernel_regularizer=keras.regularizers.L2(1e-4)),
            ]
        )
    finally:
        keras.config.set_dtype_policy("float32")
    optimizer = MomentumSGD(model.trainable_variables, 0.9, clip_norm=1.0, averaging=0.9)
    state = types.SimpleNamespace(model=model, optimizer=optimizer, loss_scale=None)
    step = make_replica_step(state, make_run_config(batch_size=8, jit_compile=True, distort_on="device"))
    images = tf.cast(tf.random.stateless_uniform((8, 16, 16, 3), [0, 1], 0, 256, tf.int32), tf.uint8)
    images, labels = (images, uniform_draws((0, 2), 8)), tf.range(8) % 5
    arguments = (images, labels, tf.constant(0.1), tf.constant(0, tf.int64), None)
    losses = [float(step(*arguments)[0]) for _ in range(8)]
    assert losses[-1] < losses[0]
    hlo = step.experimental_get_compiler_ir(*arguments)(stage="hlo")
    assert "convolution" in hlo and ("bf16" in hlo) == (policy == "mixed_bfloat16")
    assert not re.search(r"\[[^\]]*<=", hlo)


def loops_operations(function, *arguments):
    """The kinds of operations in those graphs with a loop that TensorFlow, after all that it optimizes, runs."""
    context.context().enable_run_metadata()
    try:
        function(*arguments)
        graphs = context.context().export_run_metadata().partition_graphs
    finally:
        context.context().disable_run_metadata()
    kinds = [{node.op for node in graph.node} for graph in graphs]
    return set().union(*(graph for graph in kinds if "NextIteration" in graph))


@pytest.mark.parametrize("loop", ["steps", "parts of a step"])
def test_no_loop_has_gradients_in_its_graph_whose_kernels_oneDNN_chooses_by_addresses_in_memory(loop):  # noqa: N802
    def network(config):
        x = images = keras.Input((8, 8, 1))
        x = BatchNormalization(virtual_batch_size=4)(keras.layers.Conv2D(4, 3, use_bias=False)(x))
        x = keras.layers.MaxPooling2D(3, 2, padding="same")(x)
        return keras.Model(images, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(x)))

    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    parts = 2 if loop == "parts of a step" else 1
    config = make_run_config(
        batch_size=8, image_size=8, normalization_batch="4", accumulate=parts, augmentation="none"
    ).on_devices(1, False)
    state = TrainingState(config, strategy, network)
    batch = tf.random.stateless_normal((8, 8, 8, 1), (0, 0)), tf.range(8) % 3
    if parts == 1:
        batches = strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensors(batch).repeat())
        kinds = loops_operations(make_train_steps(state, config, strategy), iter(batches), tf.constant(2))
    else:
        step = make_replica_step(state, config)
        arguments = *batch, RATE, tf.constant(0, tf.int64)
        kinds = loops_operations(tf.function(lambda: strategy.run(step, args=arguments)))
    assert kinds and not {kind for kind in kinds if "Grad" in kind or "Backprop" in kind}, kinds
