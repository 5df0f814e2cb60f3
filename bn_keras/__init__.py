"""Batch Normalization (Ioffe & Szegedy, 2015) on Keras: the layer, the networks, and what is needed to train them.

    from bn_keras import BatchNormalization, build_network, VARIANTS

Names are loaded when first used, so that `bn_keras.VARIANTS` costs no import of TensorFlow. They are listed in
`__init__.pyi`, where editors and type checkers see them.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
