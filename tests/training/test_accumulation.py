"""A mini-batch in parts: NumPy's step, the statistics of the whole bit for bit, exact resume."""

import json
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import make_run_config, run_program

from bn_keras import BatchNormalization, InputError, read_dataset
from bn_keras.runs import checkpoint
from bn_keras.training import make_config, train
from bn_keras.training.training_state import TrainingState, make_replica_step

RATE, GROUP, BATCH = 0.5, 4, 16


def network(config):
    images = keras.Input((config.image_size, config.image_size, config.channels))
    x = BatchNormalization(momentum=0.75, virtual_batch_size=GROUP)(keras.layers.Flatten()(images))
    return keras.Model(images, keras.layers.Dense(config.classes)(x))


def after_a_step(images, labels, parts):
    """{name: value} of the variables of `network`, before and after one step in so many parts."""
    config = make_run_config(
        batch_size=BATCH, normalization_batch=str(GROUP), accumulate=parts, image_size=2, augmentation="none"
    )
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    state = TrainingState(config.on_devices(1, False), strategy, network)
    before = state.arrays()
    step = make_replica_step(state, config)
    arguments = tf.constant(images), tf.constant(labels), tf.constant(RATE), tf.constant(0, tf.int64)
    tf.function(lambda: strategy.run(step, args=arguments))()
    return tuple(
        {name.rpartition("/")[2]: value for name, value in arrays.items() if name.startswith("model/")}
        for arrays in (before, state.arrays())
    )


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    images = random.normal(3, 2, (BATCH, 2, 2, 1)).astype("float32")
    return images, random.integers(0, 3, BATCH).astype("int32")


def test_a_step_in_parts_is_numpys_step_on_the_whole(batch):
    images, labels = batch
    before, after = after_a_step(images, labels, parts=2)
    groups = images.reshape(-1, GROUP, 4).astype("float64")
    x = ((groups - groups.mean(1, keepdims=True)) / np.sqrt(groups.var(1, keepdims=True) + 1e-3)).reshape(BATCH, 4)
    powers = np.exp(x @ before["kernel"] + before["bias"])
    error = (powers / powers.sum(1, keepdims=True) - np.eye(3)[labels]) / BATCH
    np.testing.assert_allclose(after["bias"], before["bias"] - RATE * error.sum(0), atol=1e-6)
    np.testing.assert_allclose(after["kernel"], before["kernel"] - RATE * x.T @ error, atol=1e-6)
    np.testing.assert_allclose(after["moving_mean"], 0.25 * groups.mean(1).mean(0), rtol=1e-6)
    np.testing.assert_allclose(after["moving_variance"], 0.75 + 0.25 * groups.var(1, ddof=1).mean(0), rtol=1e-6)


@pytest.mark.parametrize("parts", [2, 4])
def test_moving_averages_are_those_of_the_whole_mini_batch_within_two_units_of_the_last_place(batch, parts):
    """TensorFlow divides by a count that the graph knows, of the whole, in another way than by one that it computes."""
    _, whole = after_a_step(*batch, parts=1)
    _, found = after_a_step(*batch, parts=parts)
    for name in ("moving_mean", "moving_variance"):
        np.testing.assert_array_max_ulp(found[name], whole[name], maxulp=2)


_THREE_STEPS = """
import json, sys
import keras, numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from bn_keras.training.training_state import TrainingState, make_replica_step
from bn_keras import BatchNormalization, VARIANTS
from bn_keras.runs.run_config import RunConfig


def network(config):
    x = images = keras.Input((16, 16, 1))
    for maps in (8, 16):
        x = keras.layers.Conv2D(maps, 3, strides=2, use_bias=False, kernel_regularizer="l2")(x)
        x = keras.layers.Activation("relu")(BatchNormalization(virtual_batch_size=8)(x))
    return keras.Model(images, keras.layers.Dense(3)(keras.layers.GlobalMaxPooling2D()(x)))


def trained(parts, strategy, jit_compile=False):
    replicas = strategy.num_replicas_in_sync
    config = RunConfig(
        variant=VARIANTS["bn_x5"], dataset="random", train_examples=1000, validation_examples=0, classes=3, channels=1,
        image_size=16, batch_size=32, normalization_batch="8", steps=3, accumulate=parts, augmentation="none",
        jit_compile=jit_compile,
    ).on_devices(replicas, False)
    state = TrainingState(config, strategy, network)
    replica_step = make_replica_step(state, config)
    random = np.random.default_rng(0)

    @tf.function
    def step(images, labels):
        strategy.run(replica_step, args=(images, labels, tf.constant(0.05), tf.constant(0, tf.int64)))

    for _ in range(3):
        images, labels = random.normal(3, 1, (32, 16, 16, 1)).astype("float32"), random.integers(0, 3, 32)
        shares = [np.split(images, replicas), np.split(labels, replicas)]
        step(*(strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(share[context.replica_id_in_sync_group])) for share in shares))
    return state.arrays()


one = tf.distribute.OneDeviceStrategy("CPU:0")
in_parts = trained(2, one)
others = {
    "the whole": trained(1, one),
    "by XLA": trained(2, one, jit_compile=True),
    "two devices": trained(1, tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])),
    "parts on two devices": trained(2, tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])),
}
print(json.dumps({
    other: max(float(abs(arrays[name] - value).max()) for name, value in in_parts.items())
    for other, arrays in others.items()
}))
"""


def test_parts_differ_from_the_whole_and_from_devices_in_last_bits_alone():
    """Three steps of values up to 1: 2^-23 is 1.2e-7. Sums of gradients have another order."""
    done = run_program("-c", _THREE_STEPS, warm=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 4 and max(found.values()) < 1e-6, found


def test_a_run_in_parts_goes_on_bit_for_bit(data_dir, tmp_path):
    dataset = read_dataset(str(data_dir))
    settings = {"image_size": 16, "batch_size": 16, "accumulate": 2, "normalization_batch": str(GROUP)}
    config = make_config(dataset, "bn_x5", **settings, steps=4, checkpoint_every=2, eval_every=4, threads=0)
    train(config, dataset, str(tmp_path / "whole"), network=network)
    copy = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("checkpoint-00000004.npz", "model.keras"):
        (copy / name).unlink()
    train(config, dataset, str(copy), network=network)
    (_, expected), (step, found) = (checkpoint.load_newest(str(tmp_path / name)) for name in ("whole", "cut"))
    assert step == 4
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"accumulate": 3}, r"`accumulate=3` cannot divide a device's 128 images .* give a divisor of 4$"),
        ({"accumulate": 8}, r"whole groups of 32 \(`normalization_batch`\): give a divisor of 4$"),
        ({"accumulate": 2, "normalization_batch": "global"}, "`normalization_batch=global`: give a number"),
    ],
)
def test_parts_that_would_cut_a_group_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make_run_config(batch_size=128, **changes).on_devices(1, False)
    assert make_run_config(batch_size=128, accumulate=4).on_devices(1, False).accumulate == 4
