"""`bn_keras.training.train` from Python: a network of one's own, exact resume, and a process that is as it was."""

import dataclasses
import os
import random
import shutil
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import make_run_config

from bn_keras import BatchNormalization, InputError, population_statistics, read_dataset
from bn_keras.evaluation.trained_network import load_network
from bn_keras.input.options import InputOptions
from bn_keras.input.pipeline import training_batches
from bn_keras.input.run_batches import RunBatches
from bn_keras.runs import checkpoint
from bn_keras.runs.run_config import RunConfig
from bn_keras.runs.run_directory import RunDirectory
from bn_keras.training import Outcome, make_config, train
from bn_keras.training.distribution import make_strategy
from bn_keras.training.interruption import Interruption
from bn_keras.training.process_settings import process_settings

STEPS = 6


def my_network(config):
    """A small network whose layers have the names that Keras gives them."""
    x = inputs = keras.Input((config.image_size, config.image_size, config.channels))
    for maps in (4, 6):
        x = keras.layers.Conv2D(maps, 3, strides=2, use_bias=False, kernel_regularizer=keras.regularizers.L2(1e-4))(x)
        x = keras.layers.Activation("relu")(BatchNormalization(momentum=0.5)(x))
    x = keras.layers.Dropout(0.2)(keras.layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, keras.layers.Dense(config.classes)(x))


@pytest.fixture(scope="module")
def dataset(data_dir):
    return read_dataset(str(data_dir))


def config_of(dataset, **changes):
    settings = {
        "image_size": 16,
        "batch_size": 14,
        "steps": STEPS,
        "checkpoint_every": 2,
        "eval_every": 3,
        "log_every": 1,
    }
    return make_config(dataset, "bn_x5", **settings | changes)


@pytest.fixture(scope="module")
def mine(dataset, tmp_path_factory):
    """A run of `my_network`, to its end in one go."""
    directory = tmp_path_factory.mktemp("mine") / "run"
    assert train(config_of(dataset), dataset, str(directory), network=my_network) is Outcome.FINISHED
    return directory


def test_a_network_of_ones_own_goes_on_bit_for_bit(dataset, mine, tmp_path):
    """From the checkpoint of step 4, in the same process and with a Dropout that must draw what it would have drawn."""
    copy = shutil.copytree(mine, tmp_path / "run")
    for name in ("checkpoint-00000006.npz", "model.keras"):
        (copy / name).unlink()
    assert train(config_of(dataset), dataset, str(copy), network=my_network) is Outcome.FINISHED
    (step, expected), (other, found) = (checkpoint.load_newest(str(run)) for run in (mine, copy))
    assert step == other == STEPS and expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_network_of_ones_own_is_evaluated_as_its_curve_says_and_folded(dataset, mine):
    model = load_network(str(mine))
    assert not [layer for layer in model.layers if isinstance(layer, BatchNormalization)]
    row = RunDirectory(str(mine)).curve.rows[-1]
    assert row["kind"] == "validation" and row["of"] == 21
    assert counted(model, str(mine), dataset) == row["top1"]


def counted(model, directory, dataset):
    """Validation images that a model is right about, out of TensorFlow's graph."""
    right = 0
    for images, labels in RunBatches(RunConfig.read(directory), dataset).evaluation().as_numpy_iterator():
        right += int(((np.asarray(model(images)).argmax(-1) == labels) & (labels >= 0)).sum())
    return right


def test_last_best_and_averaged_weights_are_those_that_the_curve_counted(dataset, tmp_path):
    """A run that ends below its best, with averages that lag behind."""
    config = config_of(dataset, ema=0.9, learning_rate=0.5, steps=8, eval_every=1, seed=1)
    train(config, dataset, str(tmp_path), network=my_network)
    rows = RunDirectory(str(tmp_path)).curve.rows
    plain, averaged = ([row["top1"] for row in rows if row["kind"] == kind] for kind in ("validation", "ema"))
    expected = {"last": plain[-1], "best": max(plain), "ema": averaged[-1]}
    assert expected["best"] > expected["last"]
    images = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 1)).astype("float32")
    logits = set()
    for weights, right in expected.items():
        model = load_network(str(tmp_path), weights=weights, network=my_network)
        assert counted(model, str(tmp_path), dataset) == right, weights
        logits.add(float(model(images)[0, 0]))
    assert len(logits) == 3


def test_weights_that_a_run_does_not_have_are_refused(mine):
    with pytest.raises(InputError, match=r"`weights=ema`: .* was trained without `ema`: take `weights=last`"):
        load_network(str(mine), weights="ema", network=my_network)


def test_a_run_whose_statistics_were_not_averaged_goes_on_with_averages_that_begin_with_them(dataset, tmp_path):
    """As versions before kept no averages of moving statistics."""
    config = config_of(dataset, ema=0.9, steps=2)
    train(config, dataset, str(tmp_path), network=my_network)
    step, arrays = checkpoint.load_newest(str(tmp_path))
    old = {name: array for name, array in arrays.items() if not ("optimizer/" in name and "moving_" in name)}
    assert len(arrays) - len(old) == 8
    checkpoint.save(str(tmp_path), step, old)
    assert train(config_of(dataset, ema=0.9, steps=3), dataset, str(tmp_path), network=my_network) is Outcome.FINISHED


def test_before_its_end_a_network_of_ones_own_is_loaded_by_its_function_alone(dataset, mine, tmp_path):
    copy = shutil.copytree(mine, tmp_path / "run")
    (copy / "model.keras").unlink()
    with pytest.raises(InputError, match=r"network is built by the function my_network: .*or give that function as"):
        load_network(str(copy))
    images = np.random.default_rng(0).uniform(-1, 1, (5, 16, 16, 1)).astype("float32")
    found, expected = load_network(str(copy), network=my_network)(images), load_network(str(mine))(images)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_population_statistics_go_on_where_the_examples_end_that_training_saw(dataset, mine, tmp_path):
    """After 70 examples, 5 mini-batches of 14, whatever the step is: the batch may have been another on the way."""
    copy = shutil.copytree(mine, tmp_path / "run")
    step, arrays = checkpoint.load_newest(str(copy))
    checkpoint.save(str(copy), step + 1, arrays | {"examples": np.int64(70)})
    fed = RunBatches(RunConfig.read(str(copy)), dataset)
    found = load_network(str(copy), network=my_network, population_of=fed, population_steps=2)
    model = keras.models.load_model(mine / "model.keras")
    batches = training_batches(dataset, InputOptions(16, "none"), batch_size=14, seed=0, start_step=5)
    population_statistics(model, batches, steps=2)
    images = np.random.default_rng(0).uniform(-1, 1, (5, 16, 16, 1)).astype("float32")
    np.testing.assert_allclose(found(images), model(images, training=False), atol=1e-5)


def test_a_network_of_ones_own_is_part_of_the_run(dataset, mine):
    with pytest.raises(InputError, match=r"holds a run with builder my_network \(now \): give another `directory`$"):
        train(config_of(dataset), dataset, str(mine), allow_change=["builder"])


def wrong_outputs(config):
    inputs = keras.Input((config.image_size, config.image_size, config.channels))
    return keras.Model(inputs, keras.layers.Dense(config.classes)(inputs))


def own_loss(config):
    inputs = keras.Input((config.image_size, config.image_size, config.channels))
    x = keras.layers.Dense(config.classes, activity_regularizer="l2")(keras.layers.Flatten()(inputs))
    return keras.Model(inputs, x)


@pytest.mark.parametrize(
    "network, reason", [(wrong_outputs, r"shape \(1, 16, 16, 3\), not the logits \(1, 3\)"), (own_loss, "adds losses")]
)
def test_a_network_that_cannot_be_trained_is_refused_before_anything_is_written(dataset, tmp_path, network, reason):
    with pytest.raises(InputError, match=f"`network` .*{reason}"):
        train(config_of(dataset), dataset, str(tmp_path / "run"), network=network)
    assert not (tmp_path / "run").exists()


def process_state():
    """What training sets, as the process has it; the draws do not move it."""
    return {
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "environment": dict(os.environ),
        "policy": keras.config.dtype_policy().name,
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "determinism": deterministic(),
    }


def deterministic():
    """Whether an operation that has no deterministic form on any device is refused."""
    from tensorflow.python.framework.config import is_op_determinism_enabled

    return is_op_determinism_enabled()


def test_training_leaves_the_process_as_it_was(dataset, tmp_path):
    keras.utils.set_random_seed(7)
    first = [keras.random.normal((3,)).numpy(), tf.random.normal((3,)).numpy()]
    number = keras.backend.get_uid("dense")
    keras.utils.set_random_seed(7)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        before = process_state()
        train(config_of(dataset, steps=1, seed=3), dataset, str(tmp_path / "run"), network=my_network)
        assert process_state() == before
    finally:
        keras.config.set_dtype_policy("float32")
    np.testing.assert_array_equal([keras.random.normal((3,)).numpy(), tf.random.normal((3,)).numpy()], first)
    assert keras.backend.get_uid("dense") == number + 1


def test_gpus_are_made_exact_only_while_a_run_lasts(monkeypatch):
    monkeypatch.setattr("bn_keras.training.process_settings.uses_gpus", lambda strategy: True)
    strategy = make_strategy("one_device")
    with process_settings(make_run_config(deterministic=False), strategy):
        assert not deterministic()
    with process_settings(make_run_config(), strategy):
        assert deterministic()
        with process_settings(make_run_config(), strategy):
            pass
        assert deterministic()
    assert not deterministic()


def test_a_run_that_fails_puts_signals_back(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), Interruption() as interruption:
        interruption.take_over()
        assert signal.getsignal(signal.SIGTERM) != before
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_first_signal_is_noted_and_the_second_goes_as_before():
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with Interruption() as interruption:
            interruption.take_over()
            signal.raise_signal(signal.SIGTERM)
            assert interruption.signal == signal.SIGTERM and came == []
            interruption.take_over()  # as after the next steps
            signal.raise_signal(signal.SIGTERM)
            assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_training_in_a_thread_leaves_signals_alone():
    import threading

    def run():
        with Interruption() as interruption:
            interruption.take_over()
            seen.append(signal.getsignal(signal.SIGTERM))

    seen = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


def test_mixed_smoothed_and_augmented_examples_go_on_bit_for_bit(dataset, tmp_path):
    config = config_of(dataset, mixup=0.4, label_smoothing=0.1, rand_augment=0.3, steps=4)
    for directory, stops in (("whole", (4,)), ("halves", (2, 4))):
        for steps in stops:
            train(dataclasses.replace(config, steps=steps), dataset, str(tmp_path / directory), network=my_network)
    (_, whole), (_, halves) = (checkpoint.load_newest(str(tmp_path / name)) for name in ("whole", "halves"))
    for name in whole.keys() - {"best_step", "best_accuracy"}:  # the halves were evaluated at step 2, too
        np.testing.assert_array_equal(halves[name], whole[name], err_msg=name)


def linear(config):
    """A network without batch normalization, which a rate of 0 leaves as it is."""
    inputs = keras.Input((config.image_size, config.image_size, config.channels))
    return keras.Model(inputs, keras.layers.Dense(config.classes)(keras.layers.Flatten()(inputs)))


def arrays_of(directory):
    return checkpoint.load_newest(str(directory))


def test_without_a_better_evaluation_a_run_ends_and_goes_on_if_it_is_told_to(dataset, tmp_path, capsys):
    """A rate of 0 learns nothing, so that the first of its evaluations, one a step, is the best."""
    config = config_of(dataset, patience=2, learning_rate=0.0, eval_every=1, steps=STEPS, checkpoint_every=2)
    run = tmp_path / "run"
    assert train(config, dataset, str(run), network=linear) is Outcome.FINISHED
    assert "finished at step 3: no evaluation since step 1 was better" in capsys.readouterr().err
    step, stopped = arrays_of(run)
    assert step == 3 and RunDirectory(str(run)).model_step() == 3 and (run / "best-00000001.npz").exists()
    own = RunConfig.read(str(run))
    assert RunDirectory(str(run)).finished(own)

    for name in ("checkpoint-00000003.npz", "model.keras"):  # as a kill leaves it
        (run / name).unlink()
    assert not RunDirectory(str(run)).finished(own)
    assert train(config, dataset, str(run), network=linear) is Outcome.FINISHED
    step, again = arrays_of(run)
    assert step == 3 and all((again[name] == stopped[name]).all() for name in stopped)

    patient = dataclasses.replace(config, patience=0)
    assert train(patient, dataset, str(run), network=linear) is Outcome.FINISHED
    whole = tmp_path / "whole"
    train(patient, dataset, str(whole), network=linear)
    (step, found), (_, expected) = arrays_of(run), arrays_of(whole)
    assert step == STEPS and all((found[name] == expected[name]).all() for name in expected)
