"""Figure 4 of the paper, from evaluations: error of one network or an ensemble, by one crop or 144 an image.

Standard library only, but for the plot.
"""

import dataclasses
import math
import os

from bn_keras.paper.plots import pyplot
from bn_keras.runs.run_files import replacing

PAPER = {
    # crops, whether an ensemble: top-1 error, top-5 error, in percent
    (1, False): ("25.2", "7.82"),
    (144, False): ("21.99", "5.82"),
    (144, True): ("20.1", "4.9"),
}
"""Figure 4, BN-Inception on ILSVRC2012's validation set; the ensemble is of six networks."""

NORMAL_QUANTILE = 1.959963984540054
"""Of 97.5%: two-sided intervals of 95%."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One evaluation.

    Attributes:
      networks: the runs; several are an ensemble.
      crops: of every image, 1 or 144.
      statistics: "moving" or "population".
      top1, top5: examples whose class was the first, or among the first five.
      of: examples.
      calibration_error: expected calibration error, a fraction.
    """

    networks: tuple[str, ...]
    crops: int
    statistics: str
    top1: int
    top5: int
    of: int
    calibration_error: float

    def as_json(self) -> dict:
        """The fields, and the errors that follow from the counts, as fractions."""
        errors = {"top1": self.of - self.top1, "top5": self.of - self.top5}
        derived = {f"{k}_error": wrong / self.of for k, wrong in errors.items()}
        derived |= {f"{k}_error_interval": wilson_interval(wrong, self.of) for k, wrong in errors.items()}
        return dataclasses.asdict(self) | derived


def wilson_interval(count: int, of: int) -> tuple[float, float]:
    """Wilson's score interval of 95% for the probability of which `count` of `of` were seen.

    With p = count / of and z = `NORMAL_QUANTILE`:

        (p + z^2 / 2of +- z * sqrt(p * (1 - p) / of + z^2 / 4of^2)) / (1 + z^2 / of)
    """
    p, z = count / of, NORMAL_QUANTILE
    middle = p + z**2 / (2 * of)
    half = z * math.sqrt(p * (1 - p) / of + z**2 / (4 * of**2))
    low, high = ((middle + sign * half) / (1 + z**2 / of) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def figure_4(results: list[Result], dataset: str) -> str:
    """Figure 4's table as Markdown beside the paper's numbers, and whether each ensemble beat its best member."""
    lines = [
        "| Model | Crops | Models | Top-1 error | 95% interval | Top-5 error | 95% interval | Calibration error "
        "| Paper: top-1 | top-5 |",
        "|---|---:|---:|---:|---|---:|---|---:|---:|---:|",
    ]
    for result in results:
        models = len(result.networks)
        paper = PAPER.get((result.crops, models > 1), ("-", "-"))
        errors = (_error_cells(result.of - right, result.of) for right in (result.top1, result.top5))
        cells = [_name(result), str(result.crops), str(models), *sum(errors, ()), f"{result.calibration_error:.2%}"]
        lines.append(f"| {' | '.join((*cells, *paper))} |")
    statistics = " and ".join(sorted({result.statistics for result in results}))
    verdicts = "".join(f"\n{_verdict(result, results)}\n" for result in results if len(result.networks) > 1)
    return (
        "\n".join(lines) + f"\n{verdicts}\n"
        f"Ours: {dataset}, {results[0].of:,} validation images; batch normalization by {statistics} statistics; Wilson "
        "intervals; expected calibration error over 15 bins. Paper: ILSVRC2012's validation set, Figure 4, in percent; "
        "`-`: not in the paper.\n"
    )


def _error_cells(wrong, of):
    low, high = wilson_interval(wrong, of)
    return f"{wrong / of:.2%}", f"{low:.2%} to {high:.2%}"


def _name(result):
    first, *others = result.networks
    return f"ensemble of {len(result.networks)}" if others else os.path.basename(os.path.normpath(first))


def _verdict(ensemble, results):
    """Whether an ensemble beat the best of its members, the same images and crops seen."""
    alone = [
        result
        for result in results
        if len(result.networks) == 1
        and result.networks[0] in ensemble.networks
        and (result.crops, result.statistics) == (ensemble.crops, ensemble.statistics)
    ]
    if not alone:
        return f"The members of the {_name(ensemble)} were not evaluated alone."
    best = max(alone, key=lambda result: (result.top1, result.top5))
    outcome = {True: "beat", False: "did not beat"}[ensemble.top1 > best.top1]
    return (
        f"By {ensemble.crops} crop{'s' * (ensemble.crops > 1)}, the {_name(ensemble)} {outcome} its best member, "
        f"{_name(best)}: {ensemble.of - ensemble.top1} against {best.of - best.top1} wrong of {ensemble.of:,}. (The "
        "best is chosen on these same images, which favors it.)"
    )


def draw_confusion(confusion, class_names, title: str, path: str):
    """The counts of (own class, answer) as colored squares with their numbers; right answers are left white."""
    plt = pyplot()
    classes = range(len(class_names))
    mistakes = [[0 if own == answer else confusion[own][answer] for answer in classes] for own in classes]
    side = 2.5 + 0.42 * len(class_names)
    figure, axes = plt.subplots(figsize=(side, side), dpi=120, layout="constrained")
    axes.imshow(mistakes, cmap="Reds", vmin=0)
    for own in classes:
        for answer in classes:
            if count := int(confusion[own][answer]):
                axes.text(answer, own, count, ha="center", va="center", fontsize=8, color="0.2")
    axes.set(xlabel="Answer", ylabel="Class", title=title)
    axes.set_xticks(classes, class_names, rotation=90)
    axes.set_yticks(classes, class_names)
    with replacing(path) as temporary:
        figure.savefig(temporary)
    plt.close(figure)
