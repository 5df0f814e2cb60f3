"""What a type checker sees of the public names: right use is accepted, every mistake refused in its line."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import bn_keras

STATIC = ROOT / "tests" / "static"
MISTAKES = {
    number for number, line in enumerate((STATIC / "bad.py").read_text().splitlines(), 1) if line.endswith("# mistake")
}


def run(*command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MYPYPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_mypy_accepts_the_packages_and_right_use_of_them_and_refuses_every_mistake():
    done = run("mypy", "bn_keras", "data_prep", "launch", STATIC / "good.py", STATIC / "bad.py")
    found = re.findall(r"^\S*?(\w+)\.py:(\d+): error: ", done.stdout, re.MULTILINE)
    assert {(file, int(line)) for file, line in found} == {("bad", line) for line in MISTAKES}, done.stdout


@pytest.mark.needs("pyright")
def test_pyright_accepts_right_use_and_refuses_every_mistake():
    done = run("pyright", "--outputjson", STATIC / "good.py", STATIC / "bad.py")
    found = [finding for finding in json.loads(done.stdout)["generalDiagnostics"] if finding["severity"] == "error"]
    lines = {(os.path.basename(each["file"]), each["range"]["start"]["line"] + 1) for each in found}
    assert lines == {("bad.py", line) for line in MISTAKES}, found


def test_every_public_name_is_there_when_it_is_asked_for():
    assert set(bn_keras.__all__) == {
        "BatchNormalization", "Classifier", "InputError", "VARIANTS", "Variant", "build_network",
        "fold_batch_normalization", "population_statistics", "read_dataset",
    }  # fmt: skip
    for name in bn_keras.__all__:
        assert name in dir(bn_keras) and getattr(bn_keras, name) is not None
    with pytest.raises(AttributeError, match="bulid_model"):
        _ = bn_keras.bulid_model


def test_what_type_checkers_read_is_installed_with_the_package(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build", f"--build-base={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    built = {path.name for path in (tmp_path / "lib" / "bn_keras").iterdir()}
    assert {"py.typed", "__init__.pyi"} <= built


def public_functions(nodes, inside="", method=False):
    for node in nodes:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, f"{inside}{node.name}.", method=True)
        elif isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
            yield inside + node.name, node, method


@pytest.mark.parametrize("package", ["bn_keras", "data_prep", "launch"])
def test_every_public_function_says_its_types(package):
    lacking = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for name, node, method in public_functions(ast.parse(path.read_text(encoding="utf-8")).body):
            is_static = any(ast.unparse(each) == "staticmethod" for each in node.decorator_list)
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs][method and not is_static :]
            arguments += filter(None, (node.args.vararg, node.args.kwarg))
            lacking += [f"{path.name}: {name}({each.arg})" for each in arguments if each.annotation is None]
            lacking += [f"{path.name}: {name} ->"] if node.returns is None and name.split(".")[-1] != "__init__" else []
    assert not lacking
