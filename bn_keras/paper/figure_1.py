"""Figure 1 of the paper (Section 4.1), made from the curves that `paper.section_4_1` writes."""

import os
import statistics
from collections.abc import Callable, Sequence

from bn_keras import storage
from bn_keras.errors import InputError
from bn_keras.markdown import mean_and_range, percent, table
from bn_keras.plots import pyplot
from bn_keras.runs.run_directory import RunDirectory
from bn_keras.runs.run_files import replacing, write_text

FIGURE_1 = "figure1.png"
TABLE_1 = "figure1.md"

NETWORKS = {"without_bn": "Without BN", "with_bn": "With BN"}
PERCENTILES = (15, 50, 85)


class Network:
    """One of the two networks of a run, by its rows of the curve.

    Args:
      rows: the network's rows, in order; `percentiles` of a row are the 15th, 50th and 85th, each of all sigmoids.
    """

    def __init__(self, rows: list[dict]):
        self.steps = [row["step"] for row in rows]
        self.accuracies = [row["top1"] / row["of"] for row in rows]
        self._percentiles = [row["percentiles"] for row in rows]

    def steps_to(self, accuracy: float) -> int:
        return next(step for step, reached in zip(self.steps, self.accuracies, strict=True) if reached >= accuracy)

    def units(self) -> range:
        return range(len(self._percentiles[0][0]))

    def percentile(self, index: int, unit: int) -> list[float]:
        """A percentile of a sigmoid's input over the test images, for each row."""
        return [row[index][unit] for row in self._percentiles]

    def widths(self, unit: int) -> list[float]:
        """The 85th minus the 15th percentile, for each row."""
        return [high - low for low, high in zip(self.percentile(0, unit), self.percentile(2, unit), strict=True)]

    def median_over_units(self, measure: Callable[["Network", int], float]) -> float:
        return statistics.median(measure(self, unit) for unit in self.units())

    def typical_unit(self) -> int:
        """The sigmoid to show, for the paper's "one typical sigmoid": that whose drift is the median of all."""
        drifts = [drift(self, unit) for unit in self.units()]
        return drifts.index(statistics.median_low(drifts))


def drift(network: Network, unit: int) -> float:
    """How far the 50th percentile of a sigmoid's input moves over training: its highest minus its lowest value."""
    return _travel(network.percentile(1, unit))


def relative_drift(network: Network, unit: int) -> float:
    """`drift` in units of the distribution's mean width, the 85th minus the 15th percentile."""
    return drift(network, unit) / max(statistics.mean(network.widths(unit)), _LEAST)


def edge_drift(network: Network, unit: int) -> float:
    """How far the 15th or the 85th percentile moves, whichever moves farther."""
    return max(_travel(network.percentile(0, unit)), _travel(network.percentile(2, unit)))


def spreading(network: Network, unit: int) -> float:
    """The distribution's greatest width over its smallest during training; 1 if its shape stays the same."""
    widths = network.widths(unit)
    return max(widths) / max(min(widths), _LEAST)


def _travel(values):
    return max(values) - min(values)


_LEAST = 1e-4
"""Least width to divide by: the curve holds four decimals."""

STABILITY: dict[str, Callable[[Network, int], float]] = {
    "Drift of the median": drift,
    "Drift in widths": relative_drift,
    "Drift of the edges": edge_drift,
    "Widest to narrowest": spreading,
}
"""The paper calls the inputs with BN "more stable" by eye. Four measures of it, which are lower for stabler inputs."""


def read_networks(directory: RunDirectory) -> dict[str, Network]:
    """Both networks of a run, by the keys of `NETWORKS`.

    Raises:
      InputError: the curve lacks a network, as it does before the first evaluation.
    """
    rows = {name: [row for row in directory.curve.rows if row.get("network") == name] for name in NETWORKS}
    if not all(rows.values()):
        raise InputError(f"{directory.curve.path} lacks the rows of a network: train it on with more `steps`")
    return {name: Network(own) for name, own in rows.items()}


def write_figure_1(directory: RunDirectory, output_dir: str) -> list[str]:
    """Writes Figure 1 as a PNG, and its numbers as Markdown; returns both paths."""
    storage.make_folder(output_dir)
    paths = [os.path.join(output_dir, name) for name in (FIGURE_1, TABLE_1)]
    draw([directory], paths[0])
    write_text(paths[1], figure_1_table([directory]))
    return paths


def claims(directories: Sequence[RunDirectory]) -> list[tuple[str, str, str, bool]]:
    """Section 4.1's claims as (claim, the paper's answer, ours, whether it holds for the mean over the runs)."""
    runs = [read_networks(directory) for directory in directories]
    speed_ups, ahead = [], []
    for run in runs:
        without, with_bn = run["without_bn"], run["with_bn"]
        common = _common(run)
        speed_ups.append(without.steps_to(common) / with_bn.steps_to(common))
        ahead.append(100 * (max(with_bn.accuracies) - max(without.accuracies)))
    found = [
        ("Training is faster with BN", "yes", mean_and_range(speed_ups, "{:.1f}x".format), _mean(speed_ups) > 1),
        ("Test accuracy is higher with BN", "yes", mean_and_range(ahead, "{:+.1f} points".format), _mean(ahead) > 0),
    ]
    for title, measure in STABILITY.items():
        unsteady, steady = ([run[name].median_over_units(measure) for run in runs] for name in NETWORKS)
        here = f"{_mean(steady):.2f} against {_mean(unsteady):.2f}"
        claim = f"Inputs of the sigmoids are more stable with BN: {title[0].lower()}{title[1:]}"
        found.append((claim, "yes", here, _mean(steady) < _mean(unsteady)))
    return found


_mean = statistics.mean


def _common(run):
    """The highest test accuracy that both networks reach."""
    return min(max(network.accuracies) for network in run.values())


def figure_1_table(directories: Sequence[RunDirectory]) -> str:
    """Figure 1's numbers and their conditions, as Markdown: mean and range over the runs."""
    runs = [read_networks(directory) for directory in directories]
    configs = [config for directory in directories if (config := directory.read_config())]
    common = mean_and_range(map(_common, runs), percent)
    lines = []
    for name, title in NETWORKS.items():
        networks = [run[name] for run in runs]
        best = [max(network.accuracies) for network in networks]
        columns = [
            mean_and_range([run[name].steps_to(_common(run)) for run in runs], "{:,.0f}".format),
            mean_and_range(best, percent),
            mean_and_range([n.steps_to(most) for n, most in zip(networks, best, strict=True)], "{:,.0f}".format),
            mean_and_range([network.accuracies[-1] for network in networks], percent),
        ]
        columns += [
            mean_and_range([network.median_over_units(measure) for network in networks], "{:.2f}".format)
            for measure in STABILITY.values()
        ]
        lines.append([title, *columns])
    c = configs[0]
    header = ["Network", f"Steps to {common}", "Max test accuracy", "At step", "Last test accuracy", *STABILITY]
    return table(header, lines) + (
        f"\n{c.dataset}: {c.train_examples:,} training, {c.test_examples:,} test images, binary; "
        f"{c.steps:,} steps of {c.batch_size}, plain SGD at {c.learning_rate:g}, Gaussian initial weights of "
        f"deviation {c.weight_deviation:g}, seed {', '.join(str(each.seed) for each in configs)}. {common} is "
        "the best that both reach. The last four columns are of the inputs of the last hidden layer's sigmoids over "
        "the test images, each the median of the 100 sigmoids: how far the 50th percentile travels over training, its "
        "highest less its lowest value; the same in units of the mean distance between the 15th and the 85th "
        "percentile; how far the 15th or the 85th travels; and that distance at its greatest over its smallest.\n"
    )


def draw(directories: Sequence[RunDirectory], path: str) -> None:
    """Figure 1: (a) test accuracy by step; (b, c) the percentiles of a typical sigmoid's input without and with BN.

    Args:
      directories: runs that differ in the seed; each is a line of (a), and the first is shown in (b, c).
      path: the path of the PNG.
    """
    plt = pyplot()
    runs = [read_networks(directory) for directory in directories]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), dpi=130, layout="constrained")
    for color, (name, title) in enumerate(NETWORKS.items()):
        style = {"color": f"C{color}", "linestyle": "-" if name == "with_bn" else "--", "linewidth": 1}
        for number, run in enumerate(runs):
            axes[0].plot(run[name].steps, run[name].accuracies, label=None if number else title, **style)
        network = runs[0][name]
        unit = network.typical_unit()
        low, middle, high = (network.percentile(k, unit) for k in range(len(PERCENTILES)))
        panel = axes[1 + color]
        panel.fill_between(network.steps, low, high, color=f"C{color}", alpha=0.15, linewidth=0)
        for values, percentile in zip((high, middle, low), reversed(PERCENTILES), strict=True):
            panel.plot(network.steps, values, color=f"C{color}", linewidth=1.6 if percentile == 50 else 0.9)
            panel.annotate(
                f"{percentile}th",
                (network.steps[-1], values[-1]),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        panel.set(title=f"({'bc'[color]}) {title}", ylabel=f"Input of sigmoid {unit}, last hidden layer")
    limits = [axis.get_ylim() for axis in axes[1:]]
    for axis in axes[1:]:
        axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    # Half a point must be visible: the axis begins six points below the lower of both best accuracies.
    top = max(max(network.accuracies) for run in runs for network in run.values())
    axes[0].set(title="(a)", ylabel="Test accuracy", ylim=(min(map(_common, runs)) - 0.06, min(1.0, top + 0.01)))
    axes[0].yaxis.set_major_formatter(lambda accuracy, _: f"{accuracy:.0%}")
    axes[0].legend(loc="lower right")
    for axis in axes:
        axis.set(xlabel="Step")
        axis.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}K" if step else "0")
        axis.grid(alpha=0.25)
    with replacing(path) as temporary:
        figure.savefig(temporary)
    plt.close(figure)
