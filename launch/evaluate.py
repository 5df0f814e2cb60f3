"""Evaluates a trained classifier, or an ensemble of several: accuracy, and precision, recall and F1 of every class.

launch/evaluate --workdir=runs/bn_x30
launch/evaluate --workdir=ensemble/1,ensemble/2 --protocol=single_crop --protocol=multicrop144
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the folder above has the packages, this one would hide others
    sys.path[0] = str(Path(__file__).parents[1])

import json
import os
from typing import Any, NoReturn

from absl import flags

from bn_keras import storage
from bn_keras.errors import InputError
from bn_keras.evaluation.report import ClassScores, Result, class_scores, draw_confusion, report
from bn_keras.input.dataset import Dataset
from bn_keras.input.shard_cache import on_this_machine
from bn_keras.paper.figure_4 import figure_4
from bn_keras.progress import Progress
from bn_keras.runs.run_config import RunConfig
from bn_keras.runs.run_directory import RunDirectory
from bn_keras.runs.run_files import replacing, write_text
from launch import normalization, program, records, weights

FLAGS = flags.FLAGS

flags.adopt_module_key_flags(records)
flags.adopt_module_key_flags(weights)
flags.adopt_module_key_flags(normalization)
flags.DEFINE_list("workdir", None, "Folder of a run; several, separated by commas, are an ensemble.", required=True)
flags.register_validator("workdir", bool, "must name at least one run")
flags.DEFINE_multi_enum(
    "protocol",
    ["single_crop"],
    ["single_crop", "multicrop144"],
    "Crops of each image; give the flag twice for both. single_crop: the one that training evaluates on.",
)
flags.DEFINE_integer(
    "batch_size",
    None,
    "Images of one step on all devices together. Default: 250; with 144 crops, 8 for each device.",
    1,
)
flags.DEFINE_enum("strategy", "auto", ["auto", "one_device", "mirrored"], "How to use the devices of this machine.")
flags.DEFINE_integer(
    "devices", None, "How many GPUs to use or, without a GPU, logical CPUs. Default: all GPUs, or one CPU.", 1
)
flags.DEFINE_string(
    "output_dir", None, "Folder of the results. Default: the run's; for an ensemble, the folder above its first run."
)
flags.DEFINE_integer(
    "mistakes", 32, "Also draw this many of the wrongly classified images, those with the largest losses; 0: none.", 0
)
flags.DEFINE_boolean(
    "figure4", None, "Also write Figure 4 beside the paper's numbers. Default: only for 1,000 classes."
)

IMAGENET_CLASSES = 1000
CROPS = {"single_crop": 1, "multicrop144": 144}


def main() -> None:
    directories = [RunDirectory(path) for path in FLAGS.workdir]
    configs = [directory.read_trained() for directory in directories]
    dataset, skipped = records.read_records()
    check_fit(directories, configs, dataset)
    alone = len(directories) == 1
    folder = directories[0].path.rstrip("/")
    output_dir = FLAGS.output_dir or (folder if alone else os.path.dirname(folder) or ".")
    program.check_folder(output_dir)

    with program.loading_tensorflow():
        from bn_keras.evaluation.accuracy import evaluate
        from bn_keras.evaluation.mistakes import WorstMistakes
        from bn_keras.evaluation.trained_network import image_view, load_network
        from bn_keras.input.run_batches import RunBatches
        from bn_keras.training.distribution import make_strategy

    strategy = make_strategy(FLAGS.strategy, FLAGS.devices)  # only this machine, also in a cluster
    dataset = on_this_machine(dataset, FLAGS.cache)
    fed = [RunBatches(config, dataset, skipped) for config in configs]
    with fed[0].naming_damage("train"):
        models = [
            load_network(
                directory,
                strategy,
                population_of=batches if FLAGS.statistics == "population" else None,
                population_steps=FLAGS.statistics_steps,
                weights=FLAGS.weights,
            )
            for directory, batches in zip(directories, fed, strict=True)
        ]
    names = tuple(directory.path for directory in directories)
    members = [(name,) for name in names] + ([] if alone else [names])
    results = []
    for protocol in dict.fromkeys(FLAGS.protocol):
        crops = CROPS[protocol]
        batch_size = FLAGS.batch_size or (250 if crops == 1 else 8) * strategy.num_replicas_in_sync
        batches = fed[0].evaluation(batch_size=batch_size, view=image_view(configs[0], crops))
        progress = Progress(protocol, -(-dataset.examples("validation") // batch_size), skipped)
        mistakes = WorstMistakes(FLAGS.mistakes)
        with fed[0].naming_damage("validation"):
            evaluations = evaluate(models, batches, strategy, after_batch=progress.update, mistakes=mistakes)
        progress.close("finished")
        results += [
            Result(
                networks=networks,
                crops=crops,
                statistics=FLAGS.statistics,
                calibration_error=evaluation.calibration_error,
                **evaluation.counts._asdict(),
            )
            for networks, evaluation in zip(members, evaluations, strict=True)
        ]
        draw_pictures(evaluations[-1], mistakes, dataset, protocol, output_dir)
    write_results(results, class_scores(evaluations[-1].by_class.tolist()), dataset, output_dir)
    records.say_skipped(skipped)


def draw_pictures(evaluation: Any, mistakes: Any, dataset: Dataset, protocol: str, output_dir: str) -> None:
    """Draws the confusions of the one network, or of the ensemble, and its worst mistakes."""
    if evaluation.confusion is not None:
        path = os.path.join(output_dir, f"confusion_{protocol}.png")
        draw_confusion(evaluation.confusion.tolist(), dataset.class_names, protocol, path)
    if mistakes.found:
        sheet = mistakes.sheet(dataset.class_names, f"{dataset.name}: worst mistakes, {protocol}")
        with replacing(os.path.join(output_dir, f"mistakes_{protocol}.png")) as temporary:
            sheet.save(temporary)


def write_results(results: list[Result], scores: list[ClassScores], dataset: Dataset, output_dir: str) -> None:
    """Prints and writes the report of all results, and the scores of each class in the last of them."""
    content: dict[str, Any] = {"dataset": dataset.name, "dataset_fingerprint": dataset.fingerprint}
    content["results"] = [result.as_json() for result in results]
    content["classes"] = [
        {"name": name, **score._asdict()} for name, score in zip(dataset.class_names, scores, strict=True)
    ]
    files = {"evaluation.md": report(results, scores, dataset.class_names, dataset.name)}
    if FLAGS.figure4 or (FLAGS.figure4 is None and len(dataset.class_names) == IMAGENET_CLASSES):
        files["figure4.md"] = figure_4(results, dataset.name)
    print("\n".join(files.values()))  # before anything is written: a disk may be full
    for name, text in {"evaluation.json": json.dumps(content, indent=1), **files}.items():
        path = os.path.join(output_dir, name)
        write_text(path, text)
        print(f"{name}: {storage.absolute(path)}")


def check_fit(directories: list[RunDirectory[RunConfig]], configs: list[RunConfig], dataset: Dataset) -> None:
    """Refuses networks that do not fit the data set, or that need different views of an image."""
    expected = {"classes": len(dataset.class_names), "channels": dataset.channels}
    expected |= {name: getattr(configs[0], name) for name in ("image_size", "augmentation")}
    for directory, config in zip(directories, configs, strict=True):
        for name, value in expected.items():
            if (own := getattr(config, name)) != value:
                source = dataset.name if name in ("classes", "channels") else directories[0].path
                raise InputError(f"{directory.path} has {name} {own}, {source} has {value}")
    if any(config.dataset_fingerprint != dataset.fingerprint for config in configs):
        print(f"note: not every network was trained on this preparation of {dataset.name}", file=sys.stderr)


def run() -> NoReturn:
    program.run(main, __doc__)


if __name__ == "__main__":
    run()
