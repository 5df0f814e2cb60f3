"""Networks that were saved by earlier versions load."""

import json
import zipfile

import keras
import numpy as np
import pytest

import bn_keras.layers  # noqa: F401 - all that loading one needs


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_the_convolution_of_earlier_versions_is_keras(tmp_path, suffix):
    model = keras.Sequential([keras.Input((6, 6, 4)), keras.layers.Conv2D(3, 3, padding="same", name="conv")])
    path = tmp_path / f"model.{suffix}"

    @keras.saving.register_keras_serializable(package="bn_keras")
    class Conv2D(keras.layers.Conv2D):
        """As it was saved before December 2026."""

    earlier = keras.models.clone_model(model, clone_function=lambda layer: Conv2D.from_config(layer.get_config()))
    earlier.set_weights(model.get_weights())
    earlier.save(path)
    keras.saving.get_custom_objects()["bn_keras>Conv2D"] = keras.layers.Conv2D
    if suffix == "keras":
        with zipfile.ZipFile(path) as file:
            saved = json.loads(file.read("config.json"))["config"]["layers"][-1]
        assert saved["registered_name"] == "bn_keras>Conv2D"
    loaded = keras.models.load_model(path)
    assert type(loaded.layers[-1]) is keras.layers.Conv2D
    images = np.random.default_rng(0).normal(size=(2, 6, 6, 4)).astype("float32")
    np.testing.assert_array_equal(loaded(images), model(images))
