"""The table of variants says what Sections 4.2.1 and 4.2.2 say."""

import dataclasses

import pytest

from bn_keras.networks.variants import VARIANTS

RESULTS = {"name", "title", "steps"}
SEVEN_CHANGES = {
    "learning_rate",
    "dropout",
    "l2_weight",
    "decay_epochs",
    "local_response_normalization",
    "shuffling",
    "photometric_distortion",
}


def differences(one, other):
    one, other = (dataclasses.asdict(VARIANTS[name]) for name in (one, other))
    return {field for field in one if one[field] != other[field]} - RESULTS


def test_bn_baseline_is_inception_with_batch_normalization():
    assert differences("inception", "bn_baseline") == {"batch_normalization"}


def test_bn_x5_is_bn_baseline_with_the_seven_changes():
    assert differences("bn_baseline", "bn_x5") == SEVEN_CHANGES


def test_bn_x30_is_bn_x5_at_another_rate():
    assert differences("bn_x5", "bn_x30") == {"learning_rate"}


def test_bn_x5_sigmoid_is_bn_x5_with_another_nonlinearity():
    assert differences("bn_x5", "bn_x5_sigmoid") == {"activation"}


@pytest.mark.parametrize(
    "number, fields",
    [
        (1, {"initial_weight_scale"}),
        (2, {"dropout"}),
        (3, {"per_activation_modules"}),
        (4, {"initial_weight_scale", "dropout"}),
        (5, {"dropout", "per_activation_modules"}),
        (6, {"initial_weight_scale", "dropout", "per_activation_modules"}),
    ],
)
def test_each_network_of_the_ensemble_is_bn_x30_with_its_own_mix_of_three_changes(number, fields):
    assert differences("bn_x30", f"ensemble_{number}") == fields
    row = VARIANTS[f"ensemble_{number}"]
    assert row.dropout in (0, 0.05, 0.1)  # Section 4.2.3: "5% or 10%"
    assert row.initial_weight_scale >= 1


def test_each_control_moves_one_thing():
    assert differences("inception", "inception_x5") == {"learning_rate"}
    assert differences("inception", "inception_sigmoid") == {"activation"}


@pytest.mark.parametrize(
    "name, rate",
    [("inception", 0.0015), ("bn_baseline", 0.0015), ("bn_x5", 0.0075), ("bn_x30", 0.045), ("inception_x5", 0.0075)],
)
def test_learning_rates_are_the_papers(name, rate):
    assert VARIANTS[name].learning_rate == pytest.approx(rate, rel=1e-12)


def test_l2_is_divided_by_5_and_the_rate_decays_6_times_faster():
    before, after = VARIANTS["bn_baseline"], VARIANTS["bn_x5"]
    assert before.l2_weight / after.l2_weight == pytest.approx(5)
    assert before.decay_epochs / after.decay_epochs == pytest.approx(6)


def test_rows_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        VARIANTS["bn_x5"].learning_rate = 1.0
