"""Batch Normalization (Ioffe & Szegedy, 2015) on Keras: the layer, the networks, and what is needed to train them.

    from bn_keras import BatchNormalization, build_model, VARIANTS

Names are loaded when first used, so that `bn_keras.VARIANTS` costs no import of TensorFlow.
"""

import importlib
import os

# Without AVX-512 TensorFlow leaves oneDNN off, with which a step of BN-x5 at 224x224 takes 2.9 s instead of 3.8.
# Read when TensorFlow loads, so import this package first; a value set outside has the last word.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

__version__ = "0.1.0"

_HOMES = {
    "VARIANTS": "variants",
    "Variant": "variants",
    "InputError": "errors",
    "BatchNormalization": "batch_normalization",
    "build_model": "inception",
    "fold_batch_normalization": "inference.folding",
    "population_statistics": "inference.population_statistics",
    "read_dataset": "dataset",
}

__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'bn_keras' has no attribute {name!r}")
    return getattr(importlib.import_module(f"bn_keras.{_HOMES[name]}"), name)


def __dir__():
    return [*globals(), *_HOMES]
