"""A run that begins with trained weights: what is taken over, what moves, and that it resumes exactly."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from conftest import make_run_config
from warm_start import shrink

from bn_keras import VARIANTS, InputError, build_network, read_dataset
from bn_keras.runs import checkpoint
from bn_keras.runs.run_directory import RunDirectory
from bn_keras.training.distribution import make_strategy
from bn_keras.training.fine_tuning import read_weights, take_over
from bn_keras.training.recipes import make_config
from bn_keras.training.trainer import train
from bn_keras.training.training_state import TrainingState, make_train_steps

SMALL = {"image_size": 32, "width": 0.1, "channels": 1, "classes": 3}


@pytest.fixture(scope="module", autouse=True)
def small_networks():
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        yield


def network(**changes):
    return build_network("resnet18", **SMALL | changes)


def weights_of(model):
    return {weight.path: weight.numpy() for weight in model.weights}


def test_layers_that_fit_by_name_and_shape_are_taken_and_the_rest_is_said():
    source = weights_of(network())
    model = network(classes=5)
    before = model.get_layer("logits").kernel.numpy()
    assert take_over(model, source, "runs/a") == "16 of 17 layers begin with the weights of runs/a, not logits"
    assert all((value == source[path]).all() for path, value in weights_of(model).items() if "logits" not in path)
    np.testing.assert_array_equal(model.get_layer("logits").kernel, before)


def test_another_count_of_channels_keeps_all_but_the_first_convolution():
    model = network(channels=3, image_size=64)
    assert take_over(model, weights_of(network()), "a") == "16 of 17 layers begin with the weights of a, not conv1_conv"


def test_weights_of_which_none_fits_are_refused():
    with pytest.raises(InputError, match=r"`initial_weights=a`: no layer fits this network"):
        take_over(network(), weights_of(build_network("bn_x5", **SMALL | {"classes": 4})), "a")


def after_steps(count, **changes):
    """(before, after) so many steps: the weights of a ResNet-18 that is trained as its configuration says."""
    changes = {"batch_size": 6, "normalization_batch": "replica", **SMALL, **changes}
    config = make_run_config(variant=VARIANTS["resnet18"], **changes)
    strategy = make_strategy("one_device")
    state = TrainingState(config, strategy)
    before = weights_of(state.model)
    images = np.random.default_rng(0).normal(size=(6, 32, 32, 1)).astype("float32")
    batches = tf.data.Dataset.from_tensors((images, np.array([0, 1, 2] * 2, "int32"))).repeat()
    make_train_steps(state, config, strategy)(iter(batches), tf.constant(count))
    return before, weights_of(state.model)


def moved(before, after):
    return {path for path in before if (before[path] != after[path]).any()}


def test_a_frozen_body_keeps_every_bit_and_the_classifier_learns():
    assert moved(*after_steps(2, freeze="body")) == {"logits/kernel", "logits/bias"}


def test_a_frozen_body_whose_statistics_are_not_frozen_moves_its_averages_alone():
    paths = moved(*after_steps(2, freeze="body", frozen_statistics=False))
    assert {path.rpartition("/")[2] for path in paths} == {"kernel", "bias", "moving_mean", "moving_variance"}
    assert {path for path in paths if path.endswith("kernel")} == {"logits/kernel"}


def test_up_to_a_named_layer_nothing_moves_and_all_behind_it_does():
    before, after = after_steps(2, freeze="stage1_block2")
    layers = {path.partition("/")[0] for path in moved(before, after)}
    assert layers == {path.partition("/")[0] for path in before if path.startswith(("stage2", "logits"))}


def test_a_layer_that_is_not_there_is_named():
    with pytest.raises(InputError, match=r"`freeze=stage9` is no layer of the network: give `body`, or one such as "):
        after_steps(0, freeze="stage9")


def test_the_body_moves_at_its_own_rate():
    _, whole = after_steps(1)
    _, slower = after_steps(1, body_learning_rate=VARIANTS["resnet18"].learning_rate / 10)
    for path in ("stage1_block1_3x3_2_bn/gamma", "stage2_block1_3x3_2_bn/gamma"):  # which begin with 0
        np.testing.assert_allclose(slower[path], whole[path] / 10, rtol=1e-5)
    np.testing.assert_array_equal(slower["logits/kernel"], whole["logits/kernel"])


def config_of(dataset, source, **changes):
    small = {"image_size": 32, "batch_size": 10, "eval_batch_size": 21, "steps": 4, "checkpoint_every": 2}
    return make_config(dataset, "resnet18", initial_weights=str(source), **small | changes)


@pytest.fixture(scope="module")
def dataset(data_dir):
    return read_dataset(str(data_dir))


@pytest.fixture(scope="module")
def source(dataset, tmp_path_factory):
    """A trained ResNet-18 that sees pixels as torchvision's does."""
    directory = tmp_path_factory.mktemp("source") / "run"
    train(config_of(dataset, "", width=0.1, input_convention="torch"), dataset, str(directory))
    return directory


def test_a_run_takes_over_what_the_weights_of_a_run_ask_for(dataset, source):
    config = config_of(dataset, source)
    assert (config.width, config.variant.input_convention) == (0.1, "torch")
    given = config_of(dataset, source, width=0.2, input_convention="tensorflow")
    assert (given.width, given.variant.input_convention) == (0.2, "tensorflow")
    gone = config_of(dataset, "gone", continued=dataclasses.replace(config, initial_weights="gone"))
    assert (gone.width, gone.variant.input_convention) == (0.1, "torch")


def test_weights_of_a_run_and_of_its_model_are_the_same(source):
    one, other = read_weights(str(source)), read_weights(str(source / "model.keras"))
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_array_equal(one[path], other[path])


def test_a_run_that_begins_with_trained_weights_is_continued_bit_for_bit(dataset, source, tmp_path, caplog):
    config = config_of(dataset, source, freeze="stage1_block2", body_learning_rate=0.001, ema=0.9)
    for directory, stops in (("whole", (4,)), ("halves", (2, 4))):
        for steps in stops:
            train(dataclasses.replace(config, steps=steps), dataset, str(tmp_path / directory))
    assert "17 of 17 layers begin with the weights of" in caplog.text
    whole, halves = (checkpoint.load_newest(str(tmp_path / directory))[1] for directory in ("whole", "halves"))
    for path in whole.keys() - {"best_step"}:  # the run that stopped at step 2 was evaluated there
        np.testing.assert_array_equal(whole[path], halves[path], err_msg=path)
    before, after = read_weights(str(source)), read_weights(str(tmp_path / "whole"))
    np.testing.assert_array_equal(after["conv1_conv/kernel"], before["conv1_conv/kernel"])
    assert (after["stage2_block1_3x3_2_conv/kernel"] != before["stage2_block1_3x3_2_conv/kernel"]).any()
    averaged = {path.split("/")[2] for path in whole if path.startswith("optimizer/average/")}
    assert averaged == {path.partition("/")[0] for path in moved(before, after)}, "what is frozen has no average"
    with pytest.raises(InputError, match=r"holds a run with freeze stage1_block2 \(now body\)"):
        RunDirectory(str(tmp_path / "whole")).check(dataclasses.replace(config, freeze="body"), dataset.class_names)


def test_averages_begin_with_the_weights_that_are_taken_over(dataset, source, tmp_path):
    """At a rate of 0 they stay what they began with, so the weights of the source, bit for bit."""
    config = config_of(dataset, source, freeze="body", learning_rate=0.0, ema=0.9, steps=1)
    train(config, dataset, str(tmp_path))
    kernel = checkpoint.load_newest(str(tmp_path))[1]["optimizer/average/logits/kernel"]
    np.testing.assert_array_equal(kernel, read_weights(str(source))["logits/kernel"])
