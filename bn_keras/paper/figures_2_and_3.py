"""Figures 2 and 3 of the paper, made from the curves of runs."""

import json
import math
import os
import statistics

from bn_keras import storage
from bn_keras.markdown import mean_and_range, percent, table
from bn_keras.networks.variants import VARIANTS
from bn_keras.paper.published_results import FIGURE_3 as PUBLISHED
from bn_keras.plots import pyplot
from bn_keras.runs.run_config import RunConfig
from bn_keras.runs.run_directory import RunDirectory
from bn_keras.runs.run_files import replacing, write_text

FIGURE_2 = "figure2.png"
FIGURE_3 = "figure3.md"

REFERENCE = "inception"
"""Figure 3 counts the steps that each network needs to reach this network's best accuracy."""

_IMAGENET_CLASSES = 1000


class MeasuredRun:
    """A run's configuration and curve, for the report."""

    def __init__(self, directory: RunDirectory[RunConfig]):
        config = directory.read_config()
        assert config, "`find_runs` finds no other"
        self.config = config
        self.curve = directory.curve
        self.path = directory.path
        self.seed = self.config.seed


class Row:
    """Runs of one variant that differ only in the seed, or in how far they went with another seed: one line of Figure 2
    and one row of Figure 3.

    Args:
      name: the variant's name.
      runs: its runs; without any, the row is blank.
    """

    def __init__(self, name: str, runs: list[MeasuredRun]):
        self.runs = sorted(runs, key=lambda run: run.seed)
        self.variant = VARIANTS.get(name) or runs[0].config.variant  # a row that the person added
        self.rank = [*VARIANTS, name].index(name)
        self.path = self.runs[0].path if runs else ""
        # A run whose training was changed is not the paper's network, whatever its name.
        changed = any(run.config.variant != self.variant for run in runs)
        self.published = None if changed else PUBLISHED.get(name)

    def band(self) -> list[tuple[float, float, float, float]]:
        """The points (step, mean, lowest, highest validation accuracy) at which every seed was evaluated."""
        curves = [dict(run.curve.validation()) for run in self.runs]
        common = set.intersection(*map(set, curves)) if curves else set()
        accuracies = ((step, [curve[step] for curve in curves]) for step in sorted(common))
        return [(step, statistics.mean(each), min(each), max(each)) for step, each in accuracies]

    def max_accuracies(self) -> list[float]:
        return [most for run in self.runs if (most := run.curve.max_accuracy()) is not None]

    def diverged(self) -> list[dict]:
        return [row for run in self.runs if (row := run.curve.diverged())]


def rows_of(runs: list[RunDirectory]) -> list[Row]:
    """The rows of a report, in the order of the variants table."""
    rows = []
    # Threads, which earlier runs did not note, decide the last bits alone.
    for group in _alike([*map(MeasuredRun, runs)], "seed", "threads", "steps"):
        several = len({run.seed for run in group}) < len(group)  # runs of a seed, which only their steps tell apart
        parts = _alike(group, "seed", "threads") if several else [group]
        rows += [Row(part[0].config.variant.name, part) for part in parts]
    return sorted(rows, key=lambda row: (row.rank, row.path))


def _alike(runs, *free):
    """Groups runs whose configurations differ in the fields `free` alone."""
    groups = {}
    for run in runs:
        conditions = {name: value for name, value in run.config.flat().items() if name not in free}
        groups.setdefault(json.dumps(conditions, sort_keys=True), []).append(run)
    return groups.values()


def write_report(runs: list[RunDirectory], output_dir: str) -> list[str]:
    """Writes Figure 2 as a PNG and Figure 3 as a Markdown table.

    Args:
      runs: the result of `find_runs`; runs that differ only in the seed become one line and one row, mean and range.
      output_dir: the folder to write to; an earlier report there is replaced.

    Returns:
      The paths written.
    """
    rows = rows_of(runs)
    storage.make_folder(output_dir)
    paths = [os.path.join(output_dir, name) for name in (FIGURE_2, FIGURE_3)]
    draw_figure_2(rows, paths[0], _data_and_networks(rows))
    write_text(paths[1], figure_3(rows))
    return paths


def figure_3(rows: list[Row]) -> str:
    """Figure 3 as Markdown: steps to Inception's best accuracy, and maximum accuracy, beside the paper's.

    A run is compared with Inception's run of the same seed: its steps to that run's best accuracy, and the ratio of
    both numbers of steps. Without a run of Inception or of ImageNet's classes, nothing can be compared with the paper,
    and the table has only accuracies.
    """
    reference = next((row for row in rows if row.variant.name == REFERENCE), Row(REFERENCE, []))
    if not (reference.runs or any(run.config.classes == _IMAGENET_CLASSES for row in rows for run in row.runs)):
        return _own_accuracies(rows)
    best = mean_and_range(reference.max_accuracies(), percent) or "Inception's best"
    header = [
        "Model",
        f"Steps to {best}",
        "Speed-up",
        "Max accuracy",
        "Paper: steps to 72.2%",
        "Speed-up",
        "Max accuracy",
    ]
    lines = []
    for row in rows:
        paper = row.published
        cells = [
            _label(row, rows) + _divergence(row),
            *steps_and_speed_up(row, reference),
            mean_and_range(row.max_accuracies(), percent),
            f"{paper.steps / 1e6:.1f}e6" if paper and paper.steps else "-",
            f"{paper.speed_up:.1f}x" if paper and paper.steps else "",
            percent(paper.max_accuracy) if paper else "-",
        ]
        lines.append(cells)
    return table(header, lines) + "\n" + _caption(rows, bool(reference.max_accuracies()))


def _own_accuracies(rows):
    lines = []
    for row in rows:
        best = [found for run in row.runs if (found := run.curve.best(math.inf))]
        cells = (
            mean_and_range([accuracy for _, accuracy in best], percent),
            mean_and_range([step for step, _ in best], "{:,.0f}".format),
            mean_and_range([run.curve.validation()[-1][1] for run in row.runs if run.curve.validation()], percent),
        )
        lines.append([_label(row, rows) + _divergence(row), *cells])
    header = ["Model", "Max accuracy", "At step", "Last accuracy"]
    return f"{table(header, lines)}\n{_conditions(rows)}; validation accuracy of one view an image.\n"


def _divergence(row):
    diverged = row.diverged()
    if not diverged:
        return ""
    of = "" if len(row.runs) == 1 else f" in {len(diverged)} of {len(row.runs)}"
    return f" (diverged{of} at step {mean_and_range([found['step'] for found in diverged], '{:,.0f}'.format)})"


def compared_with_reference(row: Row, reference: Row) -> list[tuple[float, float]]:
    """(steps, speed-up) of each run that reaches the best accuracy of the reference's run of the same seed."""
    if not comparable(row, reference):
        return []
    best = {run.seed: most for run in reference.runs if (most := run.curve.max_accuracy()) is not None}
    to_best = {run.seed: run.curve.steps_to(best[run.seed]) for run in reference.runs if run.seed in best}
    steps = [(run.curve.steps_to(best[run.seed]), to_best[run.seed]) for run in row.runs if run.seed in best]
    return [(own, other / own) for own, other in steps if own is not None and other is not None]


def steps_and_speed_up(row: Row, reference: Row) -> tuple[str, str]:
    """Two cells: the steps to the reference's best accuracy, and in how many runs if not in all; and the speed-up."""
    reached = compared_with_reference(row, reference)
    missed = f" in {len(reached)} of {len(row.runs)}" if 0 < len(reached) < len(row.runs) else ""
    none = "-" if comparable(row, reference) else ""
    return (
        mean_and_range([steps for steps, _ in reached], "{:,.0f}".format) + missed or none,
        mean_and_range([ratio for _, ratio in reached], "{:.1f}x".format),
    )


def comparable(row: Row, reference: Row) -> bool:
    """Whether both were run on the same data set, and the reference was evaluated."""
    both = row.runs and reference.max_accuracies()
    return bool(both and row.runs[0].config.dataset == reference.runs[0].config.dataset)


def _conditions(rows):
    """The conditions of the measurements, one text for each distinct set of conditions among the rows."""
    found = {
        f"{c.dataset} ({c.train_examples:,} training, {c.validation_examples:,} validation images), "
        f"{c.image_size}x{c.image_size} pixels, width {c.width:g}, batch {c.batch_size}, "
        f"{_steps(row)} steps, {_seeds(row)}"
        for row in rows
        if row.runs
        for c in [row.runs[0].config]
    }
    return "; ".join(sorted(found))


def _caption(rows, has_reference):
    note = "" if has_reference else f"No finished run of {REFERENCE}, so no steps to its best accuracy. "
    several = " Several seeds: mean (lowest to highest), each compared with Inception's run of its seed."
    return (
        f"{note}Ours: {_conditions(rows)}; validation accuracy of one view an image, steps of 32 images, "
        f"read at every evaluation.{several if any(len(row.runs) > 1 for row in rows) else ''} "
        "Paper: ILSVRC2012, Figure 3. `-`: never reached, or not in the paper. A blank cell was not run.\n"
    )


def _data_and_networks(rows):
    configs = [run.config for row in rows for run in row.runs]
    each = (
        f"{its.dataset}, {its.train_examples:,} images, {its.image_size}x{its.image_size}, width {its.width:g}"
        for its in configs
    )
    return "; ".join(dict.fromkeys(each))


def _text_of_a_plot(text):
    # A name that is not UTF-8 has bytes that no font has, and what stands between dollars would be a formula.
    return os.fsencode(text).decode(errors="backslashreplace").replace("$", r"\$")


def _steps(row):
    fewest, most = (each(run.config.steps for run in row.runs) for each in (min, max))
    return f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"


def _seeds(row):
    return f"seed{'s' if len(row.runs) > 1 else ''} {', '.join(str(run.seed) for run in row.runs)}"


def draw_figure_2(rows: list[Row], path: str, title: str) -> None:
    """Draws Figure 2: validation accuracy by steps of 32 images, for each row the mean over seeds in their range."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9.5, 5), dpi=150, layout="constrained")
    for row in rows:
        if not (points := row.band()):
            continue
        steps, means, lows, highs = zip(*points, strict=True)
        # The same variant has the same color in every report; networks without BN are dashed.
        color = f"C{row.rank}"
        line = "-" if row.variant.batch_normalization else "--"
        axes.plot(steps, means, label=_label(row, rows), color=color, linestyle=line, marker=".")
        if len(row.runs) > 1:
            axes.fill_between(steps, lows, highs, color=color, alpha=0.15, linewidth=0)
        if row.diverged():
            axes.plot(steps[-1], means[-1], marker="x", markersize=9, color=color)
    if best := [most for row in rows if row.variant.name == REFERENCE for most in row.max_accuracies()]:
        mean = statistics.mean(best)
        axes.axhline(mean, color="0.7", linewidth=0.8, zorder=0)
        axes.annotate("Inception's best", (0, mean), xytext=(4, 3), textcoords="offset points", color="0.4", fontsize=8)
    axes.set(
        title=_text_of_a_plot(title),
        xlabel="Training steps of 32 images",
        ylabel="Validation accuracy",
        ylim=(0, 1),
        xlim=(0, None),
    )
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper")
    with replacing(path) as temporary:
        figure.savefig(temporary)
    plt.close(figure)


def _label(row, rows):
    alike = sum(other.variant.name == row.variant.name for other in rows)
    return row.variant.title if alike == 1 else f"{row.variant.title} ({_text_of_a_plot(os.path.basename(row.path))})"
