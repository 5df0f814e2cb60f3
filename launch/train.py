"""Trains one network of the paper; the same command again continues where it stands.

launch/train --variant=bn_x5                            the embedded MNIST digits, a small network, minutes
launch/train --variant=bn_x5 --data_dir=imagenet        the paper's network and training
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the folder above has the packages, this one would hide others
    sys.path[0] = str(Path(__file__).parents[1])

import dataclasses
import math
import os

from absl import flags

from bn_keras.errors import InputError
from bn_keras.networks.variants import PAPER_BATCH_SIZE, VARIANTS
from bn_keras.runs.run_directory import WARMUP_EPOCHS, RunConfig, RunDirectory
from bn_keras.training.recipes import PAPER, decay_epochs_for, recipe_for, spanning_decay_epochs
from launch import peers, program, records

DIVERGED = 3
SMALL_RATE = 0.01  # of the first: what is trained at less hardly moves
INTERRUPTED = 130  # the shell's number for a program that Ctrl-C ended

FLAGS = flags.FLAGS

flags.adopt_module_key_flags(records)
flags.DEFINE_enum("variant", None, list(VARIANTS), "Which network of Sections 4.2.2 and 4.2.3.", required=True)
flags.DEFINE_string("workdir", None, "Folder of this run. Default: runs/VARIANT.")
flags.DEFINE_integer("steps", None, "Steps to train, of batch_size images each. Default: the recipe's.", lower_bound=1)
flags.DEFINE_integer("batch_size", 32, "Images of one step over all devices; the learning rate grows with it.", 1)
flags.DEFINE_integer("seed", 0, "Of weights, order of examples, distortion and Dropout.", 0, 2**31 - 1)

flags.DEFINE_enum(
    "strategy",
    "auto",
    ["auto", "one_device", "mirrored", "multi_worker", "tpu"],
    "What to train on. multi_worker: the processes that TF_CONFIG or SLURM names; the others: this machine.",
)
flags.DEFINE_integer("devices", None, "GPUs, or logical CPUs where there is no GPU. Default: all GPUs, or one CPU.", 1)
flags.DEFINE_float("peer_timeout", 600.0, "Seconds to wait for the other processes of a cluster.", lower_bound=1.0)
flags.DEFINE_string("tpu", None, "Name or address of a TPU; local on a TPU VM.")
flags.DEFINE_string(
    "normalization_batch", "32", "Batch statistics over groups of so many examples, over a replica's, or global."
)
flags.DEFINE_enum("scale_learning_rate", "linear", ["linear", "none"], "How the rate grows with the batch.")
flags.DEFINE_enum("precision", "float32", ["float32", "mixed_bfloat16", "mixed_float16"], "Of the layers' arithmetic.")
flags.DEFINE_boolean("jit_compile", False, "Compile the step with XLA.")
flags.DEFINE_boolean("deterministic", True, "Have GPUs give the same bits each time, as CPUs do.")
flags.DEFINE_float(
    "ema", 0.0, "Weight of the old value in averaged weights, which are evaluated too; 0: none.", 0.0, 1.0
)
flags.DEFINE_float("clip_norm", 0.0, "Largest norm of all gradients together; 0: no clipping.", 0.0)

flags.DEFINE_integer("image_size", None, "Height and width of the input in pixels. Default: the recipe's.", 1)
flags.DEFINE_float("width", None, "Factor on the count of feature maps. Default: the recipe's.", 0.0, 16.0)
flags.DEFINE_enum("augmentation", None, ["imagenet", "shift", "none"], "Of crops and colors. Default: the recipe's.")
flags.DEFINE_enum(
    "distort_on", "host", ["host", "device"], "Where colors are changed: by the input pipeline, or with the step."
)
flags.DEFINE_float("bn_momentum", None, "Weight of the old moving average. Default: the recipe's.", 0.0, 1.0)

flags.DEFINE_float("learning_rate", None, "Per mini-batch of 32. Default: the variant's.", lower_bound=0.0)
flags.DEFINE_float("decay_epochs", None, "Epochs between decays by 4%. Default: see docs/training.md.", lower_bound=0.0)
flags.DEFINE_float("l2_weight", None, "Lambda of the gradient's + lambda * w. Default: the variant's.", lower_bound=0.0)
flags.DEFINE_float("dropout", None, "Fraction dropped before the classifier. Default: the variant's.", 0.0, 0.999)
flags.DEFINE_boolean("local_response_normalization", None, "LRN after two layers. Default: the variant's.")
flags.DEFINE_enum("shuffling", None, ["within_shard", "shard_order"], "Order of examples. Default: the variant's.")
flags.DEFINE_enum("photometric_distortion", None, ["full", "reduced"], "Color changes. Default: the variant's.")

flags.DEFINE_string("cache", None, "Copy the records to this local folder first, or into memory: --cache=memory.")
flags.DEFINE_string("data_service", None, "Machines that prepare batches, ADDRESS:PORT,...: see launch/data_service.")

flags.DEFINE_integer("eval_every", None, "Steps between evaluations. Default: the recipe's.", lower_bound=1)
flags.DEFINE_integer("eval_batch_size", None, "Images of one evaluation step. Default: the recipe's.", lower_bound=1)
flags.DEFINE_integer("log_every", None, "Steps between points of the training curve. Default: the recipe's.", 1)
flags.DEFINE_integer("checkpoint_every", None, "Steps between checkpoints. Default: the recipe's.", lower_bound=1)
flags.DEFINE_integer(
    "population_statistics", 0, "Also evaluate with the statistics of so many training mini-batches (Algorithm 2).", 0
)
flags.DEFINE_string("monitor", "", "Nonlinearities whose inputs are recorded as in Figure 1: NAME or NAME:MAP, ...")
flags.DEFINE_integer("monitor_every", None, "Steps between those. Default: the recipe's.", lower_bound=1)
flags.DEFINE_list("allow_change", [], "Fields of run.json that may differ from those of the run that is continued.")
flags.DEFINE_string("profile", None, "Steps that TensorFlow's profiler records, as FIRST:LAST.")
flags.DEFINE_boolean("dry_run", False, "Print the plan, its cost measured on a few steps, and write nothing.")
flags.DEFINE_enum("on_divergence", "stop", ["stop", "record"], f"stop: exit with {DIVERGED}; record: exit with 0.")


def main():
    dataset = records.read_records(keep=not FLAGS.dry_run)
    recipe = recipe_for(dataset)
    config = make_config(dataset, recipe)
    directory = RunDirectory(FLAGS.workdir or os.path.join("runs", FLAGS.variant))
    config = with_its_schedule(config, recipe, directory)
    allowed, profiled = allowed_changes(config), profiled_steps(config)
    directory.check(config, dataset.class_names, allowed)
    if not FLAGS.dry_run and directory.finished(config):
        diverged = directory.curve.diverged()
        state = f"diverged at step {diverged['step']}" if diverged else f"all {config.steps} steps are done"
        print(f"{FLAGS.variant}: nothing to do, {state} in {directory.path}")
        return status(bool(diverged))

    peers.check_services(FLAGS.data_service)
    in_cluster = FLAGS.strategy == "multi_worker" or (FLAGS.strategy == "auto" and not FLAGS.tpu)
    in_cluster = in_cluster and any(map(os.environ.get, ("TF_CONFIG", "SLURM_STEP_NUM_TASKS")))
    if in_cluster and not FLAGS.dry_run:
        peers.watched()
    with program.loading_tensorflow():
        from bn_keras.input import pipeline
        from bn_keras.training.cost_estimate import describe_cost
        from bn_keras.training.distribution import addresses, find_cluster, make_strategy, uses_gpus
        from bn_keras.training.learning_rate import learning_rate
        from bn_keras.training.trainer import Outcome, train

    cluster = find_cluster(alone=FLAGS.strategy == "multi_worker") if in_cluster else None
    if cluster and FLAGS.dry_run:  # needs nobody else
        strategy = make_strategy("auto", FLAGS.devices)
        replicas = strategy.num_replicas_in_sync * len(addresses(cluster))
    else:
        with peers.waiting_for(addresses(cluster, others=True) if cluster else [], FLAGS.peer_timeout):
            strategy = make_strategy(FLAGS.strategy, FLAGS.devices, FLAGS.tpu, cluster)
        replicas = strategy.num_replicas_in_sync
    config = dataclasses.replace(config, replicas=replicas)
    check_replicas(config)
    directory.check(config, dataset.class_names, allowed)
    last_rate = float(learning_rate(config, (config.steps - 1) * config.batch_size))
    print(describe(config, recipe, last_rate), flush=True)
    if last_rate < SMALL_RATE * config.initial_learning_rate:
        epochs = spanning_decay_epochs(config.steps * config.batch_size, config.train_examples)
        fix = f"--decay_epochs={math.ceil(100 * epochs) / 100} spans the run"
        print(f"the learning rate falls below {SMALL_RATE:.0%} of its start: {fix}")
    if uses_gpus(strategy):
        if not config.deterministic:
            print("GPUs give other bits each time, so a continued run is not bit for bit the same: see --deterministic")
        elif config.jit_compile:
            raise InputError(
                "--jit_compile: on GPUs, XLA has no gradient of max pooling that is the same each time; "
                "fix: --nodeterministic, or without --jit_compile"
            )
    if FLAGS.dry_run:
        own = strategy.num_replicas_in_sync
        share = dataclasses.replace(config, replicas=own, batch_size=config.batch_size * own // config.replicas)
        print(describe_cost(share, dataset, strategy))
        if cluster:
            print(f"measured on this process's {share.batch_size} images of a step, without the exchange")
        return 0
    if FLAGS.cache:
        dataset = pipeline.cache_shards(dataset, FLAGS.cache)
    print(f"at most {pipeline.memory_bound(dataset) / 1e6:,.0f} MB of records in memory", flush=True)
    dataset = dataclasses.replace(dataset, data_service=FLAGS.data_service)
    outcome = train(config, dataset, directory, strategy, profiled)
    records.say_skipped(dataset)
    print(
        f"{FLAGS.variant}: {outcome.value}; see it with: tensorboard --logdir={os.path.dirname(directory.path) or '.'}"
    )
    return INTERRUPTED if outcome is Outcome.INTERRUPTED else status(outcome is Outcome.DIVERGED)


def status(diverged):
    return DIVERGED if diverged and FLAGS.on_divergence == "stop" else 0


def allowed_changes(config):
    """The fields of --allow_change."""
    known = config.flat()
    for name in FLAGS.allow_change:
        if name not in known:
            raise InputError(f"--allow_change={name} is no field of a run: they are {', '.join(known)}")
    return frozenset(FLAGS.allow_change)


def profiled_steps(config):
    """The steps of --profile."""
    if FLAGS.profile is None:
        return range(0)
    first, _, last = FLAGS.profile.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise InputError(f"--profile={FLAGS.profile} is not FIRST:LAST, two steps of which the run's first is 1")
    if int(first) > config.steps:
        raise InputError(f"--profile={FLAGS.profile} begins after the last step: the run has {config.steps:,}")
    return range(int(first), int(last) + 1)


def make_config(dataset, recipe):
    """The run's configuration: flags first, then the recipe that fits the data, then the variant."""
    variant = VARIANTS[FLAGS.variant]
    given = {field.name: getattr(FLAGS, field.name, None) for field in dataclasses.fields(variant)}
    variant = dataclasses.replace(variant, **{k: v for k, v in given.items() if v is not None and k != "steps"})
    steps = FLAGS.steps or (recipe.steps or variant.steps) * PAPER_BATCH_SIZE // FLAGS.batch_size or 1
    if FLAGS.decay_epochs is None:
        decay_epochs = decay_epochs_for(recipe, variant, steps * FLAGS.batch_size, dataset.examples("train"))
        variant = dataclasses.replace(variant, decay_epochs=decay_epochs)
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
    for flag, kept in (("ema", "weights"), ("bn_momentum", "averages")):
        if getattr(FLAGS, flag) == 1:
            raise InputError(f"--{flag}=1 would keep the initial {kept} for ever: give less, such as 0.9999")
    over = FLAGS.normalization_batch
    if over not in ("replica", "global") and not (over.isdecimal() and int(over) > 1):
        raise InputError(f"--normalization_batch={over} must be a count of examples above 1, replica or global")

    def choose(name):
        value = getattr(FLAGS, name)
        return getattr(recipe, name) if value is None else value

    if FLAGS.distort_on == "device" and choose("augmentation") != "imagenet":
        raise InputError(
            f"--distort_on=device: --augmentation={choose('augmentation')} changes no colors; leave one of them out"
        )

    config = RunConfig(
        variant=variant,
        dataset=dataset.name,
        dataset_fingerprint=dataset.fingerprint,
        train_examples=dataset.examples("train"),
        validation_examples=dataset.examples("validation"),
        classes=len(dataset.class_names),
        channels=dataset.channels,
        batch_size=FLAGS.batch_size,
        normalization_batch=over,
        scale_learning_rate=FLAGS.scale_learning_rate,
        precision=FLAGS.precision,
        jit_compile=FLAGS.jit_compile,
        ema=FLAGS.ema,
        clip_norm=FLAGS.clip_norm,
        population_statistics=FLAGS.population_statistics,
        monitor=FLAGS.monitor,
        replicas=None,  # known when TensorFlow has counted the devices
        seed=FLAGS.seed,
        distort_on=FLAGS.distort_on,
        deterministic=FLAGS.deterministic,
        steps=steps,
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
                "monitor_every",
            )
        },
    )
    if config.initial_learning_rate > program.LARGEST_FLOAT:
        raise InputError(
            f"--learning_rate={FLAGS.learning_rate:g} is {config.initial_learning_rate:g} at "
            f"--batch_size={config.batch_size}, which is infinite in 32 bits: give a lower one"
        )
    return config


def with_its_schedule(config, recipe, directory):
    """The configuration with the decay of the run that it continues, where the default depends on the run's length."""
    if recipe is PAPER or FLAGS.decay_epochs is not None:
        return config
    found = directory.read_config() or {}
    if found.get("variant") != config.variant.name:
        return config
    decay_epochs = found.get("decay_epochs", config.variant.decay_epochs)
    return dataclasses.replace(config, variant=dataclasses.replace(config.variant, decay_epochs=decay_epochs))


def check_replicas(config):
    for flag in ("batch_size", "eval_batch_size"):
        size = getattr(config, flag)
        if size % config.replicas:
            raise InputError(f"--{flag}={size} cannot be shared by {config.replicas} devices: give a multiple of that")
    if config.jit_compile and config.replicas > 1:
        raise InputError("--jit_compile works on one device: XLA cannot compile the exchange between replicas")
    if config.population_statistics and not config.variant.batch_normalization:
        raise InputError(f"--population_statistics: {config.variant.name} has no batch normalization to measure")
    if config.variant.batch_normalization and config.batch_size == config.replicas:
        raise InputError(
            f"--batch_size={config.batch_size} leaves one image to each of {config.replicas} devices: "
            "batch statistics need at least 2 (Section 3.1)"
        )


def describe(config, recipe, last_rate):
    """The arithmetic of the run, before it starts; `last_rate` is the learning rate of its last step."""
    epochs = config.steps * config.batch_size / config.train_examples
    embedded = "" if FLAGS.data_dir else "no --data_dir, so the embedded data: "
    return "\n".join(
        (
            f"{embedded}{config.dataset}, {config.train_examples:,} training and {config.validation_examples:,} "
            f"validation images, {config.classes} classes",
            f"{config.variant.title} at {config.image_size}x{config.image_size}, width {config.width:g} "
            f"({recipe.name} recipe)",
            f"batch {config.batch_size} = {config.replicas} x {config.batch_size // config.replicas}, learning rate "
            f"{config.initial_learning_rate:g} ({config.variant.learning_rate:g} per {PAPER_BATCH_SIZE}"
            f"{f', grown to over {WARMUP_EPOCHS} epochs' if config.warmup_examples else ''}) to {last_rate:.3g}, "
            f"{config.steps:,} steps = {config.steps * config.batch_size // PAPER_BATCH_SIZE:,} of {PAPER_BATCH_SIZE} "
            f"images = {epochs:.1f} epochs",
        )
    )


def run():
    program.run(main, __doc__, continues=True)


if __name__ == "__main__":
    run()
