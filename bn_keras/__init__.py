"""Batch Normalization (Ioffe & Szegedy, 2015) on Keras: the layer, the networks, and what is needed to train them.

    from bn_keras import BatchNormalization, build_network, VARIANTS

A name's module is imported when the name is first used, so that `bn_keras.VARIANTS` costs no import of TensorFlow.
`__init__.pyi` lists the names and their modules, for editors, for type checkers, and for this module.
"""

import ast
import importlib
from pathlib import Path

__version__ = "0.1.0"

_MODULES = {
    name.asname: statement.module
    for statement in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(statement, ast.ImportFrom)
    for name in statement.names
}

__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
