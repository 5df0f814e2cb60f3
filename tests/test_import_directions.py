"""Who may import whom: the wings of the house, from the upper floor to the lower; docs/architecture.md draws them."""

import ast

import pytest
from conftest import ROOT

_INPUT = {"errors", "storage", "json_files", "settings", "runs", "networks", "input"}
_EVALUATION = _INPUT | {"private_names", "inference", "layers", "evaluation"}
MAY_IMPORT = {
    "bn_keras": {
        "errors": set(),
        "markdown": set(),
        "plots": set(),
        "progress": set(),
        "private_names": set(),
        "storage": {"errors"},
        "json_files": {"errors", "storage"},
        "settings": {"errors", "json_files"},
        "layers": {"errors", "private_names", "layers"},
        "inference": {"errors", "private_names", "layers", "inference"},
        "networks": {"errors", "layers", "networks", "settings"},
        "runs": {"errors", "storage", "json_files", "networks", "runs", "settings"},
        "input": _INPUT | {"markdown", "plots"},
        "evaluation": _EVALUATION | {"markdown", "plots"},
        "training": _EVALUATION | {"lazy_names", "markdown", "progress", "training"},
        "paper": _EVALUATION | {"progress", "markdown", "plots", "paper"},
    },
    "data_prep": {
        "errors": set(),
        "lazy_names": set(),
        "progress": set(),
        "signals": {"errors", "progress"},
        "program": {"errors", "signals"},
        "storage": {"errors", "signals"},
        "json_files": {"errors", "storage"},
        "formats": {"errors", "formats", "program", "storage"},
        "sources": {"errors", "formats", "json_files", "program", "progress", "sources", "storage"},
    },
}
"""What the modules of a wing may import of their package. The rooms of data_prep that are not named are the upper
floor, and import each other and everything below."""

STANDARD_LIBRARY_ONLY = (
    "errors",
    "storage",
    "progress",
    "markdown",
    "plots",
    "settings",
    "networks.variants",
    "runs.run_config",
    "runs.run_directory",
    "runs.run_files",
    "runs.training_curve",
    "input.bad_records",
    "input.dataset",
    "input.dataset_formats",
    "input.options",
    "evaluation.report",
    "training.recipes",
    "paper.figure_1",
    "paper.figure_4",
    "paper.figures_2_and_3",
    "paper.mnist_config",
    "paper.provenance",
)
HEAVY = {"tensorflow", "keras", "numpy", "matplotlib", "tensorboard", "jax", "torch"}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("bn_keras", "data_prep", "launch")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports(path, top_level=False):
    """The full names of all that a file imports, or of what it imports when it is loaded."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{name.name}" for name in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found


def packages(path, top_level=False):
    return {name.split(".")[0] for name in imports(path, top_level)}


@pytest.mark.parametrize("module", [name for name in MODULES if name.count(".") and not name.startswith("launch")])
def test_a_module_imports_downwards_only(module):
    package, wing = module.split(".")[:2]
    allowed = MAY_IMPORT[package].get(wing)
    found = {name.split(".")[1] for name in imports(MODULES[module]) if name.startswith(f"{package}.")}
    if allowed is not None:
        assert found <= allowed
    other = {"bn_keras": "data_prep", "data_prep": "bn_keras"}[package]
    assert not packages(MODULES[module]) & {other, "launch"}


def test_no_two_modules_import_each_other_on_any_way():
    graph = {module: imports(path) & MODULES.keys() - {module} for module, path in MODULES.items()}
    while free := [module for module, needs in graph.items() if not needs & graph.keys()]:
        for module in free:
            del graph[module]
    assert not graph


def test_data_prep_needs_no_tensorflow():
    for module, path in MODULES.items():
        assert not module.startswith("data_prep") or not packages(path) & {"tensorflow", "keras"}, module


@pytest.mark.parametrize("module", STANDARD_LIBRARY_ONLY)
def test_what_answers_at_once_loads_only_the_standard_library(module):
    assert not packages(MODULES[f"bn_keras.{module}"], top_level=True) & (HEAVY | {"absl"})


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("launch")])
def test_launchers_load_tensorflow_only_after_the_flags(module):
    assert not packages(MODULES[module], top_level=True) & HEAVY
