"""Runs the benchmarks and writes docs/benchmarks.md: this project beside its peers, ratios first, the machine named.

  python -m benchmarks                                  all but accelerator and fine_tuning, half an hour on two cores
  python -m benchmarks --only=batch_normalization       one; the others' tables stay as they were

A benchmark is a program here that measures all peers in one run and prints Markdown tables. What it printed is kept in
--workdir, so a document can be made of runs of different days; each says its machine and commit.
"""

import argparse
import ast
import os
import platform
import subprocess
import sys
from pathlib import Path

from bn_keras.paper.provenance import commit, cpu_name

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))
ON_CPUS = [name for name in PROGRAMS if name not in ("accelerator", "fine_tuning")]
RATIO_WORDS = ("ratio", "against", "speed", "times", "share")


def ratios_first(markdown: str) -> str:
    """Moves the columns whose headers speak of ratios before the absolute ones, in every table of a text."""
    lines, order = [], None
    for line in markdown.splitlines():
        if not line.startswith("|"):
            order = None
            lines.append(line)
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if order is None:
            ratios = [k for k in range(1, len(cells)) if any(word in cells[k].lower() for word in RATIO_WORDS)]
            order = [0, *ratios, *(k for k in range(1, len(cells)) if k not in ratios)]
        lines.append(f"| {' | '.join(cells[k] for k in order if k < len(cells))} |")
    return "\n".join(lines)


def machine() -> str:
    """Processor, cores, Python and commit, in one line."""
    cores = len(os.sched_getaffinity(0))
    return f"{cpu_name()}, {cores} cores, Python {platform.python_version()}, commit {commit()}"


def run(name: str, where: str) -> str:
    """Runs one benchmark; its section of the document, which says where it ran."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{name}.py")],
        check=False,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        sys.exit(f"benchmarks: {name} failed with {done.returncode}; its table stays as it was")
    return f"{where}\n\n{ratios_first(done.stdout.strip())}\n"


def document(workdir: Path) -> str:
    """All sections; one that was never run says so."""
    parts = [
        "# Benchmarks\n",
        "Written by `make benchmark`: this project beside its peers, all peers of a table in one run. Ratios are "
        "medians of the rounds' ratios and come before absolute times, which depend on the machine.\n",
    ]
    for name in PROGRAMS:
        source = (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
        title = ast.get_docstring(ast.parse(source)).partition("\n")[0]
        kept = workdir / f"{name}.md"
        text = kept.read_text(encoding="utf-8") if kept.exists() else "Not run.\n"
        parts += [f"## {title}\n", f"`python benchmarks/{name}.py`\n", text]
    return "\n".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(ON_CPUS), help="which to run, separated by commas")
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "benchmarks", help="keeps the printed tables")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks.md", help="the document")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := sorted(set(names) - set(PROGRAMS)):
        parser.error(f"--only={unknown[0]}: the programs are {', '.join(PROGRAMS)}")
    options.workdir.mkdir(parents=True, exist_ok=True)
    where = machine()  # before the document is written, which makes the checkout one with changes
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] {name}", file=sys.stderr, flush=True)
        (options.workdir / f"{name}.md").write_text(run(name, where), encoding="utf-8")
        options.output.write_text(document(options.workdir), encoding="utf-8")
    print(options.output)


if __name__ == "__main__":
    main()
