"""Batch Normalization (Ioffe & Szegedy, 2015) on Keras: the layer, the networks, and what is needed to train them.

    from bn_keras import BatchNormalization, build_network, VARIANTS

A name's module is imported when the name is first used, so that `bn_keras.VARIANTS` costs no import of TensorFlow.
"""

from bn_keras.lazy_names import attach

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = attach(__name__, __file__)
