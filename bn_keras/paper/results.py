"""Writes docs/results.md and its page for each data set from the files of runs.

A cell that was not run stays blank, and a claim that does not hold is reported as such.

Only the plots, and Figure 5, which is read off the network itself, need more than the standard library.
"""

import json
import os
import statistics
from collections.abc import Callable

from bn_keras import storage
from bn_keras.json_files import COUNT, TEXT, list_of, object_of, read_json, read_json_lines
from bn_keras.markdown import mean_and_range, percent, table
from bn_keras.networks.variants import VARIANTS
from bn_keras.paper import figure_1, figures_2_and_3
from bn_keras.paper.experiments import BATCH_SIZES, CHANGES, FIGURE_2_VARIANTS, RATE_FACTORS, STATISTICS
from bn_keras.paper.figures_2_and_3 import MeasuredRun, Row
from bn_keras.paper.mnist_config import MnistConfig
from bn_keras.paper.published_results import FIGURE_3 as PUBLISHED
from bn_keras.runs.run_directory import RunDirectory
from bn_keras.runs.run_files import note, write_text

LOG = "log.jsonl"
"""A file in the working directory with a line for every run that was started: its command, commit and machine."""

FIGURE_4 = "figure4.md"

DOCUMENT = "results.md"
PAGES = "results"
"""The folder beside the document, with a page, its plots and its claims for every data set."""

HOLDS, FAILS = "holds", "does not hold"

_CLAIM = {"type": "array", "prefixItems": [TEXT, TEXT, TEXT, {"type": ["boolean", "null"]}], "minItems": 4}
_CLAIMS_SCHEMA = object_of(title=TEXT, made_on=TEXT, claims=list_of(_CLAIM))
_LOG_SCHEMA = object_of(cpu=TEXT, cores=COUNT, tensorflow=TEXT, commit=TEXT)


def write_results(workdir: str, output_dir: str, name: str, command: str) -> list[str]:
    """Writes the page of one data set, with its plots and claims, and the document that compares all pages there are.

    Args:
      workdir: where `launch/results` keeps the runs on this data set; Figure 4's table is in `ensemble` there.
      output_dir: the folder of the document; pages go to `results` in it.
      name: the name of the page and of the data set's column.
      command: the command that made the runs.

    Returns:
      The paths of the page and of the document.
    """
    plots = os.path.join(output_dir, PAGES, name)
    storage.make_folder(plots)
    figure_2 = _rows(workdir, "figure2")
    rows = [next((row for row in figure_2 if row.variant.name == each), Row(each, [])) for each in FIGURE_2_VARIANTS]
    section_4_1 = _figure_1_runs(workdir)
    title = _title(name, figure_2, section_4_1)
    claims = [
        *(figure_1.claims(section_4_1) if section_4_1 else []),
        *_claims_of_4_2_2({row.variant.name: row for row in rows}),
    ]
    made_on = _made_on(workdir)
    parts = [
        f"# {title}\n",
        f"Written by `{command}` from the files of the runs; no number in it is typed. A blank cell was not run. "
        f"What the claims of the paper come to on every data set: [results.md](../{DOCUMENT}).\n",
        made_on,
        "## Figure 1: Section 4.1\n",
        *_figure_1(section_4_1, plots),
        "## Figures 2 and 3: Section 4.2.2\n",
        *_figures_2_and_3(rows, plots, title),
        "## Claims\n",
        table(
            ["Claim of the paper", "Paper", "Here", "At this scale"],
            [[claim, paper, here, _verdict(holds)] for claim, paper, here, holds in claims],
        ),
        "## The seven changes of Section 4.2.1, one by one on BN-Baseline\n",
        _changes(workdir, rows),
        "## Where training diverges\n",
        _divergence(workdir),
        "## Batch size and what the statistics are over\n",
        _batch_sizes(workdir),
        "## Moving averages against population statistics early in training\n",
        _early(workdir),
        "## Figure 4: Section 4.2.3\n",
        _figure_4(workdir),
    ]
    path = os.path.join(output_dir, PAGES, f"{name}.md")
    write_text(path, "\n".join(parts))
    found = {"title": title, "made_on": made_on, "claims": claims}
    write_text(os.path.join(output_dir, PAGES, f"{name}.json"), json.dumps(found, indent=1) + "\n")
    return [path, _write_document(output_dir)]


def _write_document(output_dir):
    """Writes the document: the claims of all pages side by side, and Figure 5, which is the same for any data."""
    pages = {}
    for file in sorted(storage.files(os.path.join(output_dir, PAGES))):
        name, kind = os.path.splitext(file)
        if kind == ".json":
            fix = f"remove it, or write it again with `launch/results --name={name}`"
            pages[name] = read_json(os.path.join(output_dir, PAGES, file), _CLAIMS_SCHEMA, fix)
    cells = {}
    for name, page in pages.items():
        for claim, paper, here, holds in page["claims"]:
            cells.setdefault((claim, paper), {})[name] = f"{here}: {_verdict(holds)}" if here else ""
    links = [f"[{page['title']}]({PAGES}/{name}.md)" for name, page in pages.items()]
    parts = [
        "# Results\n",
        "Written by `launch/results` from the runs on every data set; no number in it is typed. A blank cell was not "
        "run. A claim is judged on the mean over the seeds that were run; a page has figures, tables and conditions.\n",
        table(
            ["Claim of the paper", "Paper", *links],
            [[claim, paper, *(own.get(name, "") for name in pages)] for (claim, paper), own in cells.items()],
        ),
        "## Figure 5: the network\n",
        _figure_5(),
    ]
    path = os.path.join(output_dir, DOCUMENT)
    write_text(path, "\n".join(parts))
    return path


def _title(name, rows, section_4_1):
    """The page's title: the data set with its images and, if Figure 2 was run, the networks' size and width."""
    configs = [row.runs[0].config for row in rows] or [run.read_config() for run in section_4_1]
    if not configs:
        return name
    images = f"{name}, {configs[0].train_examples:,} images"
    return f"{images}, {configs[0].image_size}x{configs[0].image_size}, width {configs[0].width:g}" if rows else images


def _verdict(holds):
    return {None: "", True: HOLDS, False: FAILS}[holds]


def _measured(workdir, section):
    """The runs of a section that came to their end, by the name of their folder: half a run would be called slow."""
    folder = os.path.join(workdir, section)
    measured = {}
    for name in _names(folder):
        run = RunDirectory(os.path.join(folder, name))
        if (config := run.read_config()) is None:
            continue
        step = run.curve.last_step()
        if step >= config.steps or run.curve.diverged() or run.curve.stalled(config.patience, step):
            measured[name] = MeasuredRun(run)
        else:
            note(f"{run.path}: at step {step:,} of {config.steps:,}, so it is left out of the results")
    return measured


def _names(folder):
    return sorted({found.removeprefix(f"{folder}/").split("/")[0] for found in storage.find(folder)} - {""})


def _rows(workdir, section):
    return figures_2_and_3.rows_of([RunDirectory(run.path) for run in _measured(workdir, section).values()])


def _made_on(workdir):
    path = os.path.join(workdir, LOG)
    if not storage.exists(path):
        return ""
    log, damaged = read_json_lines(path, _LOG_SCHEMA)
    if damaged:
        note(f"{path}: {len(damaged)} line(s) are damaged, the first is line {damaged[0]}: left out")
    machines = sorted({f"{run['cpu']}, {run['cores']} cores, TensorFlow {run['tensorflow']}" for run in log})
    commits = sorted({run["commit"] for run in log})
    return f"Runs made on {'; '.join(machines)}; at commit {', '.join(commits)}.\n"


def _figure_1_runs(workdir):
    folder = os.path.join(workdir, "figure1")
    runs = [RunDirectory(os.path.join(folder, name), MnistConfig) for name in _names(folder)]
    return [run for run in runs if run.curve.rows]


def _figure_1(runs, plots):
    if not runs:
        return ["Not run: `launch/mnist`, on gray digits.\n"]
    figure_1.draw(runs, os.path.join(plots, figure_1.FIGURE_1))
    return [
        _picture("Test accuracy, and the input of a typical sigmoid", plots, figure_1.FIGURE_1),
        figure_1.figure_1_table(runs),
    ]


def _figures_2_and_3(rows, plots, title):
    if not any(row.runs for row in rows):
        return ["Not run: `launch/results --only=figure2`.\n"]
    figures_2_and_3.draw_figure_2(rows, os.path.join(plots, figures_2_and_3.FIGURE_2), title)
    return [
        _picture("Validation accuracy by step of the seven networks", plots, figures_2_and_3.FIGURE_2),
        figures_2_and_3.figure_3(rows),
    ]


def _picture(text, plots, file):
    return f"![{text}]({os.path.basename(plots)}/{file})\n"


def _claims_of_4_2_2(rows):
    """Section 4.2.2's claims, each judged by the mean over the seeds that were run.

    A network is faster than Inception only if it reaches the best accuracy of Inception's run with every seed.
    """

    reference = rows[figures_2_and_3.REFERENCE]
    best = {name: statistics.mean(found) for name, row in rows.items() if (found := row.max_accuracies())}

    def faster(name, claim, paper, test: Callable):
        row = rows[name]
        if not figures_2_and_3.comparable(row, reference):
            return (claim, paper, "", None)
        ratios = [ratio for _, ratio in figures_2_and_3.compared_with_reference(row, reference)]
        if len(ratios) < len(row.runs):
            return (claim, paper, f"reached in {len(ratios)} of {len(row.runs)} runs", False)
        return (claim, paper, f"{statistics.mean(ratios):.1f}x", test(statistics.mean(ratios)))

    def ahead_of_bn_x5(name, claim, test: Callable):
        theirs = PUBLISHED[name].max_accuracy - PUBLISHED["bn_x5"].max_accuracy
        if not {name, "bn_x5"} <= best.keys():
            return (claim, f"{100 * theirs:+.1f} points", "", None)
        ours = best[name] - best["bn_x5"]
        return (claim, f"{100 * theirs:+.1f} points", f"{100 * ours:+.1f} points", test(ours))

    claims = [
        faster(
            name,
            f"{VARIANTS[name].title} matches Inception in fewer steps",
            f"{PUBLISHED[name].speed_up:.1f}x",
            lambda ratio: ratio > 1,
        )
        for name in ("bn_baseline", "bn_x5", "bn_x30")
    ]
    claims += [
        faster("bn_x5", "BN-x5 is at least 14 times faster than Inception", "14.8x", lambda ratio: ratio >= 14),
        ahead_of_bn_x5("bn_x30", "BN-x30 starts more slowly than BN-x5 and ends higher", lambda points: points > 0),
        ahead_of_bn_x5(
            "bn_x5_sigmoid",
            "BN-x5-Sigmoid learns, below the networks with ReLU",
            lambda points: points < 0 and best["bn_x5_sigmoid"] > 0.5,
        ),
    ]
    sigmoid, here, holds = rows["inception_sigmoid"], "", None
    if (share := best.get("inception_sigmoid")) is not None:
        chance = sigmoid.runs[0].config.classes
        here, holds = f"{percent(share)} of 1/{chance}", share < 1.5 / chance
    claims.append(("Inception with sigmoid stays at chance", "1/1000", here, holds))
    fast = rows["inception_x5"]
    diverged = f"{len(fast.diverged())} of {len(fast.runs)} runs diverged" if fast.runs else ""
    holds = len(fast.diverged()) == len(fast.runs) if fast.runs else None
    claims.append(("Inception at 5x the rate diverges", "machine infinity", diverged, holds))
    return claims


def _changes(workdir, figure_2):
    """The mean best accuracy and the steps to Inception's best, with one change, with none and with all seven."""
    by_name = {row.variant.name: row for row in figure_2}
    groups = {}
    for name, run in _measured(workdir, "changes").items():
        groups.setdefault(name.rpartition("-")[0], []).append(run)
    rows = [_change_row("BN-Baseline: none", by_name["bn_baseline"], by_name["inception"])]
    for field, title in CHANGES.items():
        rows.append(_change_row(title, Row("bn_baseline", groups.get(field, [])), by_name["inception"]))
    rows.append(_change_row("BN-x5: all seven", by_name["bn_x5"], by_name["inception"]))
    return table(["Change", "Steps to Inception's best", "Speed-up", "Max accuracy", "Last accuracy"], rows) + (
        "\nThe embedded digits are neither cropped nor distorted, so change 7 acts only on sets with the ImageNet "
        "augmentation; shuffling within shards needs several shards to differ from the order of shards.\n"
    )


def _change_row(title, row, reference):
    return [
        title,
        *figures_2_and_3.steps_and_speed_up(row, reference),
        mean_and_range(row.max_accuracies(), percent),
        mean_and_range([run.curve.validation()[-1][1] for run in row.runs if run.curve.validation()], percent),
    ]


def _outcome(run):
    """A cell with the result of a run: its best accuracy, or where it diverged; "" if it was not run."""
    if run is None:
        return ""
    if diverged := run.curve.diverged():
        return f"diverged at step {diverged['step']:,}"
    most = run.curve.max_accuracy()
    return "" if most is None else percent(most)


def _divergence(workdir):
    runs = _measured(workdir, "divergence")
    names = ("inception", "bn_baseline")
    rows = [[f"x{factor}", *(_outcome(runs.get(f"{name}-x{factor}")) for name in names)] for factor in RATE_FACTORS]
    return table(["Factor on the rate of 0.0015", *(VARIANTS[name].title for name in names)], rows) + (
        "\nBest validation accuracy of a short run, or the step at which loss or weights stopped being finite.\n"
    )


def _batch_sizes(workdir):
    groups = {}
    for name, run in _measured(workdir, "batch_size").items():
        if (most := run.curve.max_accuracy()) is not None:
            groups.setdefault(name.rpartition("-")[0], []).append(most)
    rows = [
        [str(batch), *(mean_and_range(groups.get(f"{kind}-{batch}", []), percent) for kind in STATISTICS)]
        for batch in BATCH_SIZES
    ]
    return table(["Batch", *(title for title, _ in STATISTICS.values())], rows) + (
        "\nBN-x5, best validation accuracy after the same number of images at every batch size; the rate grows "
        "linearly with the batch. Groups of 32 are the batch itself up to 32.\n"
    )


def _early(workdir):
    rows = []
    for run in _measured(workdir, "early").values():
        at = {}
        for row in run.curve.rows:
            if row["kind"] in ("validation", "population"):
                at.setdefault(row["step"], {})[row["kind"]] = row["top1"] / row["of"]
        rows += [
            [f"{step:,}", *(percent(found[kind]) if kind in found else "" for kind in ("validation", "population"))]
            for step, found in sorted(at.items())
        ]
    return table(["Step of BN-x5", "Moving averages", "Population statistics"], rows) + (
        "\nThe same weights, evaluated with the moving averages and with Algorithm 2 over training mini-batches.\n"
    )


def _figure_4(workdir):
    path = os.path.join(workdir, "ensemble", FIGURE_4)
    return storage.read(path).decode() if storage.exists(path) else "Not run: `make ensemble`.\n"


def _figure_5():
    from bn_keras.paper.figure_5 import figure_5  # loads Keras

    return figure_5() + (
        "\nBN-x5 for 1,000 classes, as `build_network` makes it; multiply-adds of one image in its convolutions "
        "and its classifier. Section 4.2 says 13.6 million parameters, which no reading of the paper's figure adds up "
        "to: [paper.md](paper.md).\n"
    )
