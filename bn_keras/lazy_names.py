"""Imports the modules of a package only when their names are first used, so that importing the package is fast."""

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """The `__getattr__`, `__dir__` and `__all__` of a package.

    Its `__init__.pyi` lists the names and their modules, for editors, for type checkers and for this function, in lines
    like `from .module import name as name`.

    Args:
      package: its `__name__`.
      file: its `__file__`.
    """
    stub = Path(file).with_suffix(".pyi").read_text(encoding="utf-8")
    imported = re.findall(r"^from (\.[\w.]+) import (\w+) as \2$", stub, re.MULTILINE)
    modules = {name: f"{package}{module}" for module, name in imported}

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(modules[name]), name)

    def names() -> list[str]:
        return sorted([*vars(sys.modules[package]), *modules])

    return get, names, sorted(modules)
