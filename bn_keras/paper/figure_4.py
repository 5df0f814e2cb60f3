"""Figure 4 of the paper, made from evaluations: the error of one network or an ensemble, by one crop or 144 crops.

Standard library only.
"""

from bn_keras.evaluation.report import Result, name_of, share_cells
from bn_keras.markdown import percent, table

PAPER = {
    # (crops, whether an ensemble): (top-1 error, top-5 error), in percent
    (1, False): ("25.2", "7.82"),
    (144, False): ("21.99", "5.82"),
    (144, True): ("20.1", "4.9"),
}
"""Figure 4's numbers, of BN-Inception on ILSVRC2012's validation set. The ensemble has six networks."""


def figure_4(results: list[Result], dataset: str) -> str:
    """Figure 4's table as Markdown beside the paper's numbers, and whether each ensemble beat its best member."""
    header = ["Model", "Crops", "Models", "Top-1 error", "95% interval", "Top-5 error", "95% interval"]
    header += ["Calibration error", "Paper: top-1", "top-5"]
    rows = []
    for result in results:
        models = len(result.networks)
        paper = PAPER.get((result.crops, models > 1), ("-", "-"))
        top1, top5 = (share_cells(result.of - right, result.of) for right in (result.top1, result.top5))
        calibration_error = percent(result.calibration_error, digits=2)
        rows.append([name_of(result), str(result.crops), str(models), *top1, *top5, calibration_error, *paper])
    statistics = " and ".join(sorted({result.statistics for result in results}))
    verdicts = "".join(f"\n{_verdict(result, results)}\n" for result in results if len(result.networks) > 1)
    return (
        table(header, rows) + f"{verdicts}\n"
        f"Ours: {dataset}, {results[0].of:,} validation images; batch normalization by {statistics} statistics; Wilson "
        "intervals; expected calibration error over 15 bins. Paper: ILSVRC2012's validation set, Figure 4, in percent; "
        "`-`: not in the paper.\n"
    )


def _verdict(ensemble, results):
    """A sentence on whether an ensemble beat its best member on the same images and crops."""
    alone = [
        result
        for result in results
        if len(result.networks) == 1
        and result.networks[0] in ensemble.networks
        and (result.crops, result.statistics) == (ensemble.crops, ensemble.statistics)
    ]
    if not alone:
        return f"The members of the {name_of(ensemble)} were not evaluated alone."
    best = max(alone, key=lambda result: (result.top1, result.top5))
    outcome = {True: "beat", False: "did not beat"}[ensemble.top1 > best.top1]
    return (
        f"By {ensemble.crops} crop{'s' * (ensemble.crops > 1)}, the {name_of(ensemble)} {outcome} its best member, "
        f"{name_of(best)}: {ensemble.of - ensemble.top1} against {best.of - best.top1} wrong of {ensemble.of:,}. (The "
        "best is chosen on these same images, which favors it.)"
    )
