"""Every layer that a saved network may name, so that `import bn_keras.layers` is all that loading one needs.

    import bn_keras.layers
    model = keras.models.load_model("model.keras")

Keras looks layers up by their registered names, and imports no package but its own for them.
"""

import keras

from bn_keras.layers.batch_normalization import BatchNormalization
from bn_keras.layers.dropout import Dropout
from bn_keras.layers.local_response_normalization import LocalResponseNormalization
from bn_keras.layers.scale_and_shift import ScaleAndShift

__all__ = ["BatchNormalization", "Dropout", "LocalResponseNormalization", "ScaleAndShift"]

# Networks saved before December 2026 name a convolution of this package's, which computed what Keras's does.
keras.saving.get_custom_objects()["bn_keras>Conv2D"] = keras.layers.Conv2D
