"""Fine-tuning beside training from scratch: 50 classes of Tiny ImageNet, 50 images each, at equal steps.

  python benchmarks/fine_tuning.py --images=tiny-imagenet-200/train       about an hour on two cores

BN-x5 of a quarter of the width learns 150 of the 200 classes at 64x64; the others are every fourth one. Of these it
learns from 50 images a class, by the same command with and without `--initial_weights`, and is evaluated on 50 others.
All is done by data_prep and launch/train below --workdir, and what is there is not done again: this command goes on
where it was stopped, and then prints the table.
"""

import os
import subprocess
import sys
from pathlib import Path

from absl import app, flags

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bn_keras.markdown import mean_and_range, table  # noqa: E402
from bn_keras.runs.run_directory import RunDirectory  # noqa: E402

FLAGS = flags.FLAGS
flags.DEFINE_string("images", "tiny-imagenet-200/train", "Folder with one folder a class.")
flags.DEFINE_string("workdir", "runs/fine_tuning", "Keeps the records and the runs.")
flags.DEFINE_integer("steps", 16_000, "Steps of 32 images on the first classes.", 1)
flags.DEFINE_integer("fine_tuning_steps", 500, "Steps of 32 images on the others.", 1)
flags.DEFINE_integer("seeds", 3, "Runs of each kind.", 1)

PER_CLASS = 50  # images of a class to learn from, and as many to be evaluated on
KINDS = {
    "from scratch": [],
    "fine-tuned": ["--initial_weights={pretrained}"],
    "fine-tuned, the classifier alone": ["--initial_weights={pretrained}", "--freeze=body"],
}


def link(classes, folder, chosen):
    """A folder of links to some images of each class, in place of copies."""
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for image in sorted((Path(FLAGS.images) / name).rglob("*.JPEG"))[chosen]:
            if not (link := folder / name / image.name).exists():
                link.symlink_to(image.resolve())


def run(*command):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *command], check=True, stdout=sys.stderr, env=env)


def train(directory, *arguments):
    if not (directory / "model.keras").exists():
        run("-m", "launch.train", "--variant=bn_x5", "--schedule=cosine", f"--workdir={directory}", *arguments)


def convert(output, *sources):
    if not (output / "dataset.json").exists():
        run("-m", "data_prep", f"--output_dir={output}", *sources)


def last_accuracy(directory):
    return RunDirectory(str(directory)).curve.validation()[-1][1]


def main(_):
    workdir = Path(FLAGS.workdir)
    classes = sorted(os.listdir(FLAGS.images))
    others = classes[3::4]
    first = [name for name in classes if name not in others]
    many, train_few, held_out = (workdir / name for name in (f"{len(first)}", "train", "validation"))
    link(first, many, slice(None))
    link(others, train_few, slice(PER_CLASS))
    link(others, held_out, slice(PER_CLASS, 2 * PER_CLASS))
    convert(workdir / f"records{len(first)}", f"--images={many}", "--validation_share=0.02")
    convert(workdir / f"records{len(others)}", f"--train={train_few}", f"--validation={held_out}")
    pretrained = workdir / "pretrained"
    train(pretrained, f"--data_dir={workdir / f'records{len(first)}'}", f"--steps={FLAGS.steps}")
    accuracies = {}
    for seed in range(FLAGS.seeds):
        for number, (kind, arguments) in enumerate(KINDS.items()):
            directory = workdir / f"{number}-{seed}"
            records = f"--data_dir={workdir / f'records{len(others)}'}"
            steps = f"--steps={FLAGS.fine_tuning_steps}", f"--eval_every={FLAGS.fine_tuning_steps}"
            given = [argument.format(pretrained=pretrained) for argument in arguments]
            train(directory, records, *steps, f"--seed={seed}", *given)
            accuracies.setdefault(kind, []).append(last_accuracy(directory))
    scratch = accuracies["from scratch"]
    rows = [
        [
            kind,
            mean_and_range((own / base for own, base in zip(found, scratch, strict=True)), "{:.2f}".format),
            mean_and_range(found, "{:.1%}".format),
        ]
        for kind, found in accuracies.items()
    ]
    print(
        f"BN-x5 at 64x64, width 0.25: {FLAGS.steps:,} steps of 32 images on {len(first)} classes "
        f"({last_accuracy(pretrained):.1%} of their validation images), then {FLAGS.fine_tuning_steps} on "
        f"{len(others)} others, {PER_CLASS} images each; means over {FLAGS.seeds} seeds, with the lowest and highest\n"
    )
    print(table(["", "times the accuracy from scratch", f"accuracy on {PER_CLASS} other images a class"], rows))


if __name__ == "__main__":
    app.run(main)
