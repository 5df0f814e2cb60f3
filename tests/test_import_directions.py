"""Who may import whom: launch -> bn_keras and data_prep, which never import each other."""

import ast

import pytest
from conftest import ROOT

STANDARD_LIBRARY_ONLY = (
    "variants",
    "training_curve",
    "run",
    "dataset",
    "recipes",
    "errors",
    "report",
    "progress",
    "provenance",
    "skipped_records",
    "figure_1",
    "figure_4",
)
HEAVY = {"tensorflow", "keras", "numpy", "matplotlib", "tensorboard", "jax", "torch"}


def imports(path, top_level=False):
    """The first names of all that a file imports, or of what it imports when it is loaded."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", sorted(ROOT.glob("bn_keras/**/*.py")), ids=lambda path: path.stem)
def test_bn_keras_imports_neither_data_prep_nor_launch(path):
    assert not imports(path) & {"data_prep", "launch"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("data_prep/*.py")), ids=lambda path: path.stem)
def test_data_prep_imports_neither_bn_keras_nor_tensorflow(path):
    assert not imports(path) & {"bn_keras", "launch", "tensorflow", "keras"}


@pytest.mark.parametrize("module", STANDARD_LIBRARY_ONLY)
def test_what_answers_at_once_loads_only_the_standard_library(module):
    assert not imports(ROOT / "bn_keras" / f"{module}.py", top_level=True) & (HEAVY | {"absl"})


@pytest.mark.parametrize("path", sorted(ROOT.glob("launch/*.py")), ids=lambda path: path.stem)
def test_launchers_load_tensorflow_only_after_the_flags(path):
    assert not imports(path, top_level=True) & HEAVY
