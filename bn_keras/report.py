"""Figure 2 and Figure 3 of the paper, from the curves of runs; nothing in them is typed by hand."""

import os

from bn_keras.run import RunDirectory
from bn_keras.variants import VARIANTS

FIGURE_2 = "figure2.png"
FIGURE_3 = "figure3.md"

REFERENCE = "inception"
"""Figure 3 counts the steps of every network to the best accuracy of this one."""


class MeasuredRun:
    """One run as the report sees it: its configuration, curve and place among the paper's rows."""

    def __init__(self, directory: RunDirectory):
        self.config = directory.read_config()
        self.curve = directory.curve
        self.path = directory.path
        self.variant = VARIANTS[self.config["variant"]]
        self.rank = list(VARIANTS).index(self.variant.name)


def write_report(runs: list[RunDirectory], output_dir: str) -> list[str]:
    """Writes Figure 2 as a PNG and Figure 3 as a Markdown table.

    Args:
      runs: of `find_runs`.
      output_dir: where; files of an earlier report are replaced.

    Returns:
      The paths written.
    """
    measured = sorted((MeasuredRun(run) for run in runs), key=lambda run: (run.rank, run.path))
    os.makedirs(output_dir, exist_ok=True)
    paths = [os.path.join(output_dir, name) for name in (FIGURE_2, FIGURE_3)]
    draw_figure_2(measured, paths[0])
    with open(paths[1], "w", encoding="utf-8") as file:
        file.write(figure_3(measured))
    return paths


def figure_3(runs: list[MeasuredRun]) -> str:
    """Figure 3 as Markdown: steps to Inception's best accuracy, and maximum accuracy, beside the paper's."""
    target, reference_steps = _reference(runs)
    best = "Inception's best" if target is None else f"{target:.1%}"
    lines = [
        f"| Model | Steps to {best} | Speed-up | Max accuracy | Paper: steps to 72.2% | Speed-up | Max accuracy |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    paper_reference = VARIANTS[REFERENCE].paper_steps_to_72_2
    for run in runs:
        steps = run.curve.steps_to(target) if target is not None else None
        most, row = run.curve.max_accuracy(), run.variant
        diverged = run.curve.diverged()
        cells = (
            row.title + (f" (diverged at step {diverged['step']:,})" if diverged else ""),
            "" if target is None else "-" if steps is None else f"{steps:,.0f}",
            f"{reference_steps / steps:.1f}x" if steps else "",
            "" if most is None else f"{most:.1%}",
            "-" if row.paper_steps_to_72_2 is None else f"{row.paper_steps_to_72_2 / 1e6:.1f}e6",
            f"{paper_reference / row.paper_steps_to_72_2:.1f}x" if row.paper_steps_to_72_2 else "",
            "-" if row.paper_max_accuracy is None else f"{row.paper_max_accuracy:.1%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n" + _caption(runs, target)


def _reference(runs):
    """The best accuracy of the first run of `REFERENCE` and its steps to it; None, None where nothing was measured."""
    curve = next((run.curve for run in runs if run.variant.name == REFERENCE), None)
    best = curve.max_accuracy() if curve else None
    return best, None if best is None else curve.steps_to(best)


def _caption(runs, target):
    """What the numbers were measured on, for every distinct set of conditions among the runs."""
    conditions = sorted(
        {
            f"{c['dataset']} ({c['train_examples']:,} training, {c['validation_examples']:,} validation images), "
            f"{c['image_size']}x{c['image_size']} pixels, width {c['width']:g}, batch {c['batch_size']}, "
            f"{c['steps']:,} steps, seed {c['seed']}"
            for c in (run.config for run in runs)
        }
    )
    note = "" if target is not None else f"No finished run of {REFERENCE}, so no steps to its best accuracy. "
    return (
        f"{note}Ours: {'; '.join(conditions)}; validation accuracy of one view an image, steps of 32 images, "
        "read at every evaluation. Paper: ILSVRC2012, Figure 3. `-`: never reached, or not in the paper; "
        "blank: not run.\n"
    )


def draw_figure_2(runs: list[MeasuredRun], path: str):
    """Figure 2: validation accuracy by steps of 32 images, one line a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9.5, 5), dpi=150, layout="constrained")
    for run in runs:
        points = run.curve.validation()
        # The same variant has the same color in every report; networks without BN are dashed.
        axes.plot(
            [step for step, _ in points],
            [accuracy for _, accuracy in points],
            label=_label(run, runs),
            color=f"C{run.rank}",
            linestyle="-" if run.variant.batch_normalization else "--",
            marker=".",
        )
        if run.curve.diverged() and points:
            axes.plot(*points[-1], marker="x", markersize=9, color=f"C{run.rank}")
    best, _ = _reference(runs)
    if best is not None:
        axes.axhline(best, color="0.7", linewidth=0.8, zorder=0)
        axes.annotate("Inception's best", (0, best), xytext=(4, 3), textcoords="offset points", color="0.4", fontsize=8)
    axes.set(xlabel="Training steps of 32 images", ylabel="Validation accuracy", ylim=(0, 1), xlim=(0, None))
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper")
    figure.savefig(path)
    plt.close(figure)


def _label(run, runs):
    alike = sum(other.variant.name == run.variant.name for other in runs)
    return run.variant.title if alike == 1 else f"{run.variant.title} ({os.path.basename(run.path)})"
