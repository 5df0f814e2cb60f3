"""Every layer that a saved network may name, so that `import bn_keras.layers` is all that loading one needs.

    import bn_keras.layers
    model = keras.models.load_model("model.keras")

Keras looks layers up by their registered names, and imports no package but its own for them.
"""

from bn_keras.batch_normalization import BatchNormalization
from bn_keras.convolution import Conv2D
from bn_keras.dropout import Dropout
from bn_keras.inception import LocalResponseNormalization
from bn_keras.inference.folding import ScaleAndShift

__all__ = ["BatchNormalization", "Conv2D", "Dropout", "LocalResponseNormalization", "ScaleAndShift"]
