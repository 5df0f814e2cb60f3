"""Classifies your pictures with a trained network, or an ensemble of several: the five most probable classes of each.

launch/predict cat.jpg dog.png --workdir=runs/bn_x30
launch/predict photos --workdir=runs/mine --output=answers.csv
"""

import sys
import time
from pathlib import Path

if not __package__:  # run by its path: the folder above has the packages, this one would hide others
    sys.path[0] = str(Path(__file__).parents[1])

import csv
import io
import json
import os
from typing import Any, NoReturn

from absl import flags

from bn_keras.progress import Progress
from bn_keras.runs.run_directory import RunDirectory
from bn_keras.runs.run_files import write_text
from data_prep.program import escaped
from launch import program, weights

FLAGS = flags.FLAGS

flags.adopt_module_key_flags(weights)
flags.DEFINE_list("workdir", None, "Folder of a run; several, separated by commas, are an ensemble.", required=True)
flags.register_validator("workdir", bool, "must name at least one run")
flags.DEFINE_enum(
    "protocol",
    "single_crop",
    ["single_crop", "multicrop144"],
    "Crops of each image: one, or the mean over 144.",
)
flags.DEFINE_string("output", None, "File for the answers, .csv or .json. Default: they are printed.")

SHOWN = 5
STARTED = time.monotonic()


Answer = tuple[str, list[tuple[str, float]]]
"""The path of a picture, and (class, probability) of its most probable classes, the most probable first."""


def main(paths: list[str]) -> int:
    for path in paths:
        os.stat(path)
    for directory in FLAGS.workdir:
        RunDirectory(directory).read_trained()
    if FLAGS.output:
        program.check_output(FLAGS.output, ".csv", ".json")

    with program.loading_tensorflow():
        from bn_keras.evaluation.classifier import Classifier, pictures

    images = [image for path in paths for image in pictures(path)]
    classifier = Classifier(FLAGS.workdir, weights=FLAGS.weights, crops=144 if FLAGS.protocol == "multicrop144" else 1)
    bad: list[tuple[str, str]] = []
    progress, begun = Progress("predict", len(images)), time.monotonic()
    probabilities = classifier.predict(images, bad=bad, after_batch=progress.update)
    ended = time.monotonic()
    progress.close("finished")
    unreadable = {path for path, _ in bad}
    answers = [
        (image, best_of(row, classifier.class_names))
        for image, row in zip(images, probabilities, strict=True)
        if image not in unreadable
    ]
    if FLAGS.output:
        write_text(FLAGS.output, as_csv(answers) if FLAGS.output.lower().endswith(".csv") else as_json(answers))
        speed = f"{len(images) / (ended - begun):,.0f} a second after a start of {begun - STARTED:.1f} s"
        print(f"{FLAGS.output}: {len(answers):,} of {len(images):,} images, {speed}")
    else:
        for image, best in answers:
            print(escaped(image, line=True))
            for name, probability in best:
                print(escaped(f"  {probability:6.2%}  {name}", line=True))
    for path, reason in bad:
        print(f"predict: {path} is {reason}", file=sys.stderr)
    return 1 if bad else 0


def best_of(probabilities: Any, class_names: list[str]) -> list[tuple[str, float]]:
    """(class, probability) of the most probable classes; of equals the first comes first."""
    order = (-probabilities).argsort(kind="stable")[:SHOWN]
    return [(class_names[k], float(probabilities[k])) for k in order]


def as_csv(answers: list[Answer]) -> str:
    """A row an image: its path, then class and probability of the most probable ones."""
    text = io.StringIO()
    writer = csv.writer(text)
    count = len(answers[0][1]) if answers else 0
    writer.writerow(["image", *(f"{what}_{k}" for k in range(1, count + 1) for what in ("class", "probability"))])
    for image, best in answers:
        writer.writerow([image, *(cell for name, probability in best for cell in (name, f"{probability:.6f}"))])
    return text.getvalue()


def as_json(answers: list[Answer]) -> str:
    """The same as a list of objects."""
    return json.dumps(
        [
            {"image": image, "classes": [{"class": name, "probability": probability} for name, probability in best]}
            for image, best in answers
        ],
        indent=1,
    )


def run() -> NoReturn:
    program.run(main, __doc__, takes_arguments=True)


if __name__ == "__main__":
    run()
