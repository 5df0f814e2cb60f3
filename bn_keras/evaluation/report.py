"""The report of an evaluation: accuracy with its interval, precision, recall and F1 of every class, confusions.

Only the plot needs more than the standard library.
"""

import dataclasses
import math
import os
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from bn_keras.markdown import percent, table
from bn_keras.plots import pyplot
from bn_keras.runs.run_files import replacing

NORMAL_QUANTILE = 1.959963984540054
"""The normal distribution's quantile of 97.5%, for two-sided intervals of 95%."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The result of one evaluation.

    Attributes:
      networks: the directories of the runs; several are an ensemble.
      crops: how many crops of each image, 1 or 144.
      statistics: what batch normalization used, "moving" or "population".
      top1, top5: how many examples' class was the first answer, or among the first five.
      of: how many examples there were.
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
        """The fields and, as fractions, the errors that follow from the counts."""
        errors = {"top1": self.of - self.top1, "top5": self.of - self.top5}
        derived: dict[str, Any] = {f"{k}_error": wrong / self.of for k, wrong in errors.items()}
        derived |= {f"{k}_error_interval": wilson_interval(wrong, self.of) for k, wrong in errors.items()}
        return dataclasses.asdict(self) | derived


def wilson_interval(count: int, of: int) -> tuple[float, float]:
    """Wilson's score interval of 95% for a probability, when `count` of `of` cases were seen.

    With p = count / of and z = `NORMAL_QUANTILE`:

        (p + z^2 / 2of +- z * sqrt(p * (1 - p) / of + z^2 / 4of^2)) / (1 + z^2 / of)
    """
    p, z = count / of, NORMAL_QUANTILE
    middle = p + z**2 / (2 * of)
    half = z * math.sqrt(p * (1 - p) / of + z**2 / (4 * of**2))
    low, high = ((middle + sign * half) / (1 + z**2 / of) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


class ClassScores(NamedTuple):
    """How well one class is recognized.

    Attributes:
      examples: how many examples the class has.
      precision: the share of right answers among those that named the class; 0 if none did.
      recall: the share of the class's examples that were recognized; 0 if it has none.
      f1: 2 precision recall / (precision + recall); 0 if both are 0.
    """

    examples: int
    precision: float
    recall: float
    f1: float


def class_scores(by_class: Sequence[Sequence[int]]) -> list[ClassScores]:
    """The scores of every class.

    Args:
      by_class: for every class, its examples, the answers that named it, and the right ones among them.
    """
    found = []
    for examples, answers, right in by_class:
        precision, recall = right / answers if answers else 0.0, right / examples if examples else 0.0
        found.append(ClassScores(int(examples), precision, recall, 2 * right / (examples + answers) if right else 0.0))
    return found


MOST_CLASSES_LISTED = 50
"""Of more classes than this, the report lists those with the lowest F1; evaluation.json has all."""


def report(results: Sequence[Result], scores: Sequence[ClassScores], class_names: Sequence[str], dataset: str) -> str:
    """An evaluation as Markdown: a row for each network and ensemble, then a row for each class.

    Args:
      results: the results of all networks and protocols.
      scores: the last result's scores, by class.
      class_names: the name of each class.
      dataset: the data set's name.
    """
    rows = []
    for result in results:
        top1, top5 = (share_cells(right, result.of) for right in (result.top1, result.top5))
        rows.append([name_of(result), str(result.crops), *top1, *top5, percent(result.calibration_error, digits=2)])
    header = ["Model", "Crops", "Accuracy", "95% interval", "Top-5 accuracy", "95% interval", "Calibration error"]
    order: Sequence[int] = range(len(scores))
    if few := len(scores) > MOST_CLASSES_LISTED:
        order = sorted(order, key=lambda k: scores[k].f1)[:MOST_CLASSES_LISTED]
    by_class = [[class_names[k], f"{scores[k].examples:,}", *map(percent, scores[k][1:])] for k in order]
    means = [statistics.mean(values) for values in list(zip(*scores, strict=True))[1:]]
    by_class.append(["mean of all classes", f"{results[-1].of:,}", *map(percent, means)])
    shown = f"the {MOST_CLASSES_LISTED} classes of {len(scores):,} with the lowest F1" if few else "every class"
    norms = " and ".join(sorted({result.statistics for result in results}))
    return (
        f"{table(header, rows)}\n{dataset}, {results[0].of:,} validation images; batch normalization by {norms} "
        "statistics; Wilson intervals; expected calibration error over 15 bins.\n\n"
        f"{name_of(results[-1])}, {results[-1].crops} crop{'s' * (results[-1].crops > 1)}, {shown}:\n\n"
        f"{table(['Class', 'Images', 'Precision', 'Recall', 'F1'], by_class)}"
    )


def share_cells(count: int, of: int) -> tuple[str, str]:
    """A share in percent, and its Wilson interval of 95%."""
    low, high = wilson_interval(count, of)
    return percent(count / of, digits=2), f"{percent(low, digits=2)} to {percent(high, digits=2)}"


def name_of(result: Result) -> str:
    """A run's folder, or how many networks an ensemble has."""
    first, *others = result.networks
    return f"ensemble of {len(result.networks)}" if others else os.path.basename(os.path.normpath(first))


def draw_confusion(confusion: Sequence[Sequence[int]], class_names: Sequence[str], title: str, path: str) -> None:
    """Draws the count of every pair (class, answer); the shade is the pair's share of the class.

    Right answers, on the diagonal, are blue; mistakes are red.
    """
    plt = pyplot()
    classes = range(len(class_names))
    shares = [[count / max(sum(row), 1) for count in row] for row in confusion]
    right = [[shares[own][answer] if own == answer else math.nan for answer in classes] for own in classes]
    wrong = [[math.nan if own == answer else shares[own][answer] for answer in classes] for own in classes]
    side = 2.5 + 0.42 * len(class_names)
    figure, axes = plt.subplots(figsize=(side, side), dpi=120, layout="constrained")
    axes.imshow(right, cmap="Blues", vmin=0, vmax=1.4)  # above 1, so that counts stay legible on the darkest shade
    axes.imshow(wrong, cmap="Reds", vmin=0, vmax=1)
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
