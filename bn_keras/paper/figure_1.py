"""Figure 1 of the paper, Section 4.1, from the curve that `paper.section_4_1` wrote; nothing in it is typed by hand."""

import os
import statistics

from bn_keras.errors import InputError
from bn_keras.paper.plots import pyplot
from bn_keras.runs.run_directory import RunDirectory
from bn_keras.runs.run_files import replacing, write_text

FIGURE_1 = "figure1.png"
TABLE_1 = "figure1.md"

NETWORKS = {"without_bn": "Without BN", "with_bn": "With BN"}
PERCENTILES = (15, 50, 85)


def write_figure_1(directory: RunDirectory, output_dir: str) -> list[str]:
    """Writes Figure 1 as a PNG and what it shows in numbers as Markdown; returns both paths."""
    os.makedirs(output_dir, exist_ok=True)
    paths = [os.path.join(output_dir, name) for name in (FIGURE_1, TABLE_1)]
    draw(directory, paths[0])
    write_text(paths[1], table(directory))
    return paths


def claims(directory: RunDirectory) -> list[tuple[str, str, str, bool]]:
    """Section 4.1's claims as (claim, in the paper, here, whether it holds)."""
    rows = _by_network(directory)
    without, with_bn = _steps_to(rows["without_bn"], common := _common(rows)), _steps_to(rows["with_bn"], common)
    ahead = max(map(_accuracy, rows["with_bn"])) - max(map(_accuracy, rows["without_bn"]))
    drift = {name: statistics.median(_drifts(rows[name])) for name in NETWORKS}
    return [
        ("Training is faster with BN", "yes", f"{without / with_bn:.1f}x to {common:.1%}", with_bn < without),
        ("Test accuracy is higher with BN", "yes", f"{100 * ahead:+.1f} points", ahead > 0),
        (
            "Inputs of the sigmoids are more stable with BN",
            "yes",
            f"drift {drift['with_bn']:.2f} against {drift['without_bn']:.2f}",
            drift["with_bn"] < drift["without_bn"],
        ),
    ]


def _common(rows):
    """The best test accuracy that both networks reach."""
    return min(max(map(_accuracy, rows[name])) for name in NETWORKS)


def _steps_to(rows, accuracy):
    return next(row["step"] for row in rows if _accuracy(row) >= accuracy)


def _by_network(directory):
    rows = {name: [row for row in directory.curve.rows if row["network"] == name] for name in NETWORKS}
    if not all(rows.values()):
        raise InputError(
            f"{directory.curve.path} lacks the rows of a network: a larger --steps trains on and adds some"
        )
    return rows


def _accuracy(row):
    return row["top1"] / row["of"]


def _drift(rows, unit):
    """How far the 50th percentile of a sigmoid's input travels over training: its highest less its lowest value."""
    middle = [row["percentiles"][1][unit] for row in rows]
    return max(middle) - min(middle)


def _drifts(rows):
    return [_drift(rows, unit) for unit in range(len(rows[0]["percentiles"][0]))]


def typical_unit(rows) -> int:
    """The paper shows "one typical sigmoid": ours is the one whose median drifts as far as the median one's does."""
    drifts = _drifts(rows)
    return drifts.index(statistics.median_low(drifts))


def table(directory: RunDirectory) -> str:
    """What Figure 1 shows in numbers, and under which conditions, as Markdown."""
    rows, c = _by_network(directory), directory.read_config()
    common = _common(rows)
    lines = [
        f"| Network | Steps to {common:.1%} | Max test accuracy | At step | Last test accuracy | Drift of the median |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, title in NETWORKS.items():
        best = max(rows[name], key=_accuracy)
        lines.append(
            f"| {title} | {_steps_to(rows[name], common):,} | {_accuracy(best):.1%} | {best['step']:,} "
            f"| {_accuracy(rows[name][-1]):.1%} | {statistics.median(_drifts(rows[name])):.2f} |"
        )
    return "\n".join(lines) + (
        f"\n\n{c['dataset']}: {c['train_examples']:,} training, {c['test_examples']:,} test images, binary; "
        f"{c['steps']:,} steps of {c['batch_size']}, plain SGD at {c['learning_rate']:g}, Gaussian initial weights of "
        f"deviation {c['weight_deviation']:g}, seed {c['seed']}. {common:.1%} is the best that both reach. "
        "Drift: of the 50th percentile, over the test images, of the input of a sigmoid of the last hidden layer, "
        "highest less lowest over training; the median of its 100 sigmoids.\n"
    )


def draw(directory: RunDirectory, path: str):
    """Figure 1: (a) test accuracy by step; (b, c) the percentiles of a typical sigmoid's input without and with BN."""
    plt = pyplot()
    rows = _by_network(directory)
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), dpi=130, layout="constrained")
    for color, (name, title) in enumerate(NETWORKS.items()):
        steps = [row["step"] for row in rows[name]]
        style = {"color": f"C{color}", "linestyle": "-" if name == "with_bn" else "--"}
        axes[0].plot(steps, [_accuracy(row) for row in rows[name]], label=title, **style)
        unit = typical_unit(rows[name])
        low, middle, high = ([row["percentiles"][k][unit] for row in rows[name]] for k in range(len(PERCENTILES)))
        panel = axes[1 + color]
        panel.fill_between(steps, low, high, color=f"C{color}", alpha=0.15, linewidth=0)
        for values, percentile in zip((high, middle, low), reversed(PERCENTILES), strict=True):
            panel.plot(steps, values, color=f"C{color}", linewidth=1.6 if percentile == 50 else 0.9)
            panel.annotate(
                f"{percentile}th",
                (steps[-1], values[-1]),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        panel.set(title=f"({'bc'[color]}) {title}", ylabel=f"Input of sigmoid {unit}, last hidden layer")
    limits = [axis.get_ylim() for axis in axes[1:]]
    for axis in axes[1:]:
        axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    axes[0].set(title="(a)", ylabel="Test accuracy", ylim=(None, 1))
    axes[0].legend(loc="lower right")
    for axis in axes:
        axis.set(xlabel="Step")
        axis.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}K" if step else "0")
        axis.grid(alpha=0.25)
    with replacing(path) as temporary:
        figure.savefig(temporary)
    plt.close(figure)
