"""Folding a normalization into the layer before it changes nothing but the count of layers."""

import numpy as np
import pytest

from bn_keras import VARIANTS, BatchNormalization, build_model
from bn_keras.folding import fold_batch_normalization


@pytest.mark.parametrize("name", [name for name, row in VARIANTS.items() if row.batch_normalization])
def test_a_folded_network_has_no_normalization_and_the_same_logits(name):
    model = build_model(name, image_size=32, width=0.1, classes=5)
    random = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, BatchNormalization):
            layer.set_weights([random.uniform(0.5, 1.5, weight.shape) for weight in layer.get_weights()])
    folded = fold_batch_normalization(model)
    assert not any(isinstance(layer, BatchNormalization) for layer in folded.layers)
    images = random.normal(size=(4, 32, 32, 3)).astype("float32")
    expected = model(images, training=False).numpy()
    np.testing.assert_allclose(folded(images), expected, atol=1e-5 * abs(expected).max())
