"""Every layer that a saved network may name, so that `import bn_keras.layers` is all that loading one needs.

    import bn_keras.layers
    model = keras.models.load_model("model.keras")

Keras looks layers up by their registered names, and imports no package but its own for them.
"""

from bn_keras.inference.folding import ScaleAndShift
from bn_keras.layers.batch_normalization import BatchNormalization
from bn_keras.layers.convolution import Conv2D
from bn_keras.layers.dropout import Dropout
from bn_keras.networks.inception import LocalResponseNormalization

__all__ = ["BatchNormalization", "Conv2D", "Dropout", "LocalResponseNormalization", "ScaleAndShift"]
