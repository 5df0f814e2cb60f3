"""Trains one network of the paper; the same command again continues where it stands.

launch/train --variant=bn_x5                            the embedded MNIST digits, a small network, minutes
launch/train --variant=bn_x5 --data_dir=imagenet        the paper's network and training
"""

import dataclasses
import os

from absl import flags

from bn_keras.dataset import read_dataset
from bn_keras.errors import InputError
from bn_keras.recipes import recipe_for
from bn_keras.run import RunConfig, RunDirectory
from bn_keras.variants import PAPER_BATCH_SIZE, VARIANTS
from launch import program
from launch.embedded import embedded_data

DIVERGED = 3
INTERRUPTED = 130  # the shell's number for a program that Ctrl-C ended

FLAGS = flags.FLAGS

flags.DEFINE_enum("variant", None, list(VARIANTS), "Which network of Sections 4.2.2 and 4.2.3.", required=True)
flags.DEFINE_string("data_dir", None, "Folder that data_prep wrote. Default: the embedded MNIST digits.")
flags.DEFINE_string("workdir", None, "Folder of this run. Default: runs/VARIANT.")
flags.DEFINE_integer("steps", None, "Steps to train, of batch_size images each. Default: the recipe's.", lower_bound=1)
flags.DEFINE_integer("batch_size", 32, "Images of one step over all devices; the learning rate grows with it.", 1)
flags.DEFINE_integer("seed", 0, "Of weights, order of examples, distortion and Dropout.", 0, 2**31 - 1)
flags.DEFINE_enum("strategy", "auto", ["auto", "one_device", "mirrored"], "How to use the devices of this machine.")
flags.DEFINE_integer("devices", None, "GPUs, or logical CPUs where there is no GPU. Default: all GPUs, or one CPU.", 1)

flags.DEFINE_integer("image_size", None, "Height and width of the input in pixels. Default: the recipe's.", 1)
flags.DEFINE_float("width", None, "Factor on the count of feature maps. Default: the recipe's.", 0.0, 16.0)
flags.DEFINE_enum("augmentation", None, ["imagenet", "shift", "none"], "Of crops and colors. Default: the recipe's.")
flags.DEFINE_float("bn_momentum", None, "Weight of the old moving average. Default: the recipe's.", 0.0, 1.0)

flags.DEFINE_float("learning_rate", None, "Per mini-batch of 32. Default: the variant's.", lower_bound=0.0)
flags.DEFINE_float("decay_epochs", None, "Epochs between decays by 4%. Default: the variant's.", lower_bound=0.0)
flags.DEFINE_float("l2_weight", None, "Lambda of the gradient's + lambda * w. Default: the variant's.", lower_bound=0.0)
flags.DEFINE_float("dropout", None, "Fraction dropped before the classifier. Default: the variant's.", 0.0, 0.999)
flags.DEFINE_boolean("local_response_normalization", None, "LRN after two layers. Default: the variant's.")
flags.DEFINE_enum("shuffling", None, ["within_shard", "shard_order"], "Order of examples. Default: the variant's.")
flags.DEFINE_enum("photometric_distortion", None, ["full", "reduced"], "Color changes. Default: the variant's.")

flags.DEFINE_integer("eval_every", None, "Steps between evaluations. Default: the recipe's.", lower_bound=1)
flags.DEFINE_integer("eval_batch_size", None, "Images of one evaluation step. Default: the recipe's.", lower_bound=1)
flags.DEFINE_integer("log_every", None, "Steps between points of the training curve. Default: the recipe's.", 1)
flags.DEFINE_integer("checkpoint_every", None, "Steps between checkpoints. Default: the recipe's.", lower_bound=1)
flags.DEFINE_enum("on_divergence", "stop", ["stop", "record"], f"stop: exit with {DIVERGED}; record: exit with 0.")


def main():
    dataset = read_dataset(FLAGS.data_dir or embedded_data())
    recipe = recipe_for(dataset)
    config = make_config(dataset, recipe)
    directory = RunDirectory(FLAGS.workdir or os.path.join("runs", FLAGS.variant))
    directory.check(config)
    if directory.finished(config):
        diverged = directory.curve.diverged()
        state = f"diverged at step {diverged['step']}" if diverged else f"all {config.steps} steps are done"
        print(f"{FLAGS.variant}: nothing to do, {state} in {directory.path}")
        return status(bool(diverged))

    with program.loading_tensorflow():
        from bn_keras.distribution import make_strategy
        from bn_keras.trainer import Outcome, train

    strategy = make_strategy(FLAGS.strategy, FLAGS.devices)
    config = dataclasses.replace(config, replicas=strategy.num_replicas_in_sync)
    check_replicas(config)
    print(describe(config, recipe), flush=True)
    outcome = train(config, dataset, directory, strategy)
    print(
        f"{FLAGS.variant}: {outcome.value}; see it with: tensorboard --logdir={os.path.dirname(directory.path) or '.'}"
    )
    return INTERRUPTED if outcome is Outcome.INTERRUPTED else status(outcome is Outcome.DIVERGED)


def status(diverged):
    return DIVERGED if diverged and FLAGS.on_divergence == "stop" else 0


def make_config(dataset, recipe):
    """The run's configuration: flags first, then the recipe that fits the data, then the variant."""
    variant = VARIANTS[FLAGS.variant]
    given = {field.name: getattr(FLAGS, field.name, None) for field in dataclasses.fields(variant)}
    variant = dataclasses.replace(variant, **{k: v for k, v in given.items() if v is not None and k != "steps"})
    for flag in ("width", "decay_epochs"):
        if getattr(FLAGS, flag) == 0:
            raise InputError(f"--{flag}=0 cannot work: give a number greater than 0")
    if FLAGS.batch_size > dataset.examples("train"):
        raise InputError(
            f"--batch_size={FLAGS.batch_size} is more than the {dataset.examples('train'):,} training images of "
            f"{dataset.name}: give at most so many"
        )
    if variant.batch_normalization and FLAGS.batch_size == 1:
        raise InputError(
            f"--batch_size=1 leaves {variant.title} one image: batch statistics need at least 2 (Section 3.1)"
        )

    def choose(name):
        value = getattr(FLAGS, name)
        return getattr(recipe, name) if value is None else value

    return RunConfig(
        variant=variant,
        dataset=dataset.name,
        dataset_fingerprint=dataset.fingerprint,
        train_examples=dataset.examples("train"),
        validation_examples=dataset.examples("validation"),
        classes=len(dataset.class_names),
        channels=dataset.channels,
        batch_size=FLAGS.batch_size,
        replicas=None,  # known when TensorFlow has counted the devices
        seed=FLAGS.seed,
        steps=FLAGS.steps or (recipe.steps or variant.steps) * PAPER_BATCH_SIZE // FLAGS.batch_size or 1,
        **{
            name: choose(name)
            for name in (
                "image_size",
                "width",
                "augmentation",
                "bn_momentum",
                "eval_every",
                "eval_batch_size",
                "log_every",
                "checkpoint_every",
            )
        },
    )


def check_replicas(config):
    for flag in ("batch_size", "eval_batch_size"):
        size = getattr(config, flag)
        if size % config.replicas:
            raise InputError(f"--{flag}={size} cannot be shared by {config.replicas} devices: give a multiple of that")
    if config.variant.batch_normalization and config.batch_size == config.replicas:
        raise InputError(
            f"--batch_size={config.batch_size} leaves one image to each of {config.replicas} devices: "
            "batch statistics need at least 2 (Section 3.1)"
        )


def describe(config, recipe):
    """The arithmetic of the run, before it starts."""
    epochs = config.steps * config.batch_size / config.train_examples
    embedded = "" if FLAGS.data_dir else "no --data_dir, so the embedded data: "
    return "\n".join(
        (
            f"{embedded}{config.dataset}, {config.train_examples:,} training and {config.validation_examples:,} "
            f"validation images, {config.classes} classes",
            f"{config.variant.title} at {config.image_size}x{config.image_size}, width {config.width:g} "
            f"({recipe.name} recipe)",
            f"batch {config.batch_size} = {config.replicas} x {config.batch_size // config.replicas}, learning rate "
            f"{config.initial_learning_rate:g} ({config.variant.learning_rate:g} per {PAPER_BATCH_SIZE}), "
            f"{config.steps:,} steps = {epochs:.1f} epochs",
        )
    )


def run():
    program.run(main, __doc__)


if __name__ == "__main__":
    run()
