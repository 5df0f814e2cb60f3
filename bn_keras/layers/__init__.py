"""All layers of this package, so that `import bn_keras.layers` is enough to load any saved network.

    import bn_keras.layers
    model = keras.models.load_model("model.keras")

Keras finds a layer by its registered name, and imports no package but its own to look for it.
"""

import keras

from bn_keras.layers.batch_normalization import BatchNormalization
from bn_keras.layers.dropout import Dropout
from bn_keras.layers.local_response_normalization import LocalResponseNormalization
from bn_keras.layers.scale_and_shift import ScaleAndShift

__all__ = ["BatchNormalization", "Dropout", "LocalResponseNormalization", "ScaleAndShift"]

# Networks saved before December 2026 name this package's own convolution, which computed the same as Keras's.
keras.saving.get_custom_objects()["bn_keras>Conv2D"] = keras.layers.Conv2D
