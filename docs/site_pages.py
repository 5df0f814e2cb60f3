"""Pages of the documentation site that are made when it is built: a reference page a wing, and the files above docs/.

Only what has a docstring and no leading underscore is shown; mkdocs.yml says so. Nothing is imported.
"""

import ast
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
ABOVE = ("BUILD.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
"""Files of the checkout's root that are pages too."""


def on_files(files, config):
    """Adds the pages; mkdocs calls it before it reads any."""
    pages = {name: (ROOT / name).read_text(encoding="utf-8") for name in ABOVE}
    pages["reference/bn_keras.md"] = _reference("bn_keras", _named("bn_keras"))
    for init in (ROOT / "bn_keras").glob("*/__init__.py"):
        wing = f"bn_keras.{init.parent.name}"
        modules = sorted(f"{wing}.{path.stem}" for path in init.parent.glob("[!_]*.py"))
        pages[f"reference/{init.parent.name}.md"] = _reference(wing, _named(wing) or modules)
    pages["reference/programs.md"] = _programs()
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """The files of ABOVE are beside the pages of docs/ on the site."""
    return re.sub(rf"\]\((docs/|\.\./(?={'|'.join(ABOVE)}))", "](", markdown)


def _docstring(path):
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def _named(package):
    """The full names that a package lists for its users, in `__all__` or in a stub."""
    init = ROOT / package.replace(".", "/") / "__init__.py"
    stub = init.with_suffix(".pyi")
    statements = ast.parse((stub if stub.exists() else init).read_text(encoding="utf-8")).body
    found = [statement for statement in statements if isinstance(statement, ast.ImportFrom)]
    return [f"{f'{package}.' * each.level}{each.module}.{name.name}" for each in found for name in each.names]


def _reference(package, names):
    """The page of a package: its docstring, then each of its modules, or of its names."""
    introduction = _docstring(ROOT / package.replace(".", "/") / "__init__.py")
    return "\n\n".join([f"# {package}", introduction, *(f"::: {name}" for name in names)]) + "\n"


def _programs():
    """What `--help` of each program begins with."""
    programs = {"python -m data_prep": ROOT / "data_prep" / "__main__.py"}
    launchers = sorted(path for path in (ROOT / "launch").glob("*.py") if path.with_suffix("").exists())
    programs |= {f"launch/{path.stem}": path for path in launchers}
    parts = [
        "# Programs",
        "Every program lists its flags with `--help`. An installed package has `bn-train` in place of `launch/train`, "
        "and `bn-data-prep` in place of `python -m data_prep`.",
    ]
    for name, path in programs.items():
        parts.append(f"## {name}")
        for text in _docstring(path).split("\n\n"):
            parts.append(f"```text\n{text}\n```" if text.lstrip().startswith((name, "launch/")) else text)
    return "\n\n".join(parts) + "\n"
