"""A whole training step of a full-size network, beside Keras's BatchNormalization and PyTorch, and where it goes.

  python benchmarks/training_step.py                    BN-x5, 224x224, batch 32: three minutes on two cores
  python benchmarks/training_step.py --rounds=8 --variant=bn_baseline
  python benchmarks/training_step.py --image_size=64 --width=0.25 --threads=1      the small recipe's network

Three ways take a step of the same network on the same mini-batch, in turns, so that a noisy machine is noisy for all:

  ours    the trainer's own step: `bn_keras.training.training_state`
  keras   Keras's BatchNormalization and SGD, the L2 penalties as losses, one `tf.function`
  torch   PyTorch, channels_last, torch.optim.SGD with weight decay, as many threads

The table gives medians of time and of CPU time, and the median of the rounds' ratios. CPU time is the one to believe on
a machine that does other work too. Then: the loop of the trainer against its bare step, what records cost at the
default cadence, and the operations that a step's time goes to, from TensorFlow's profiler, with Keras's layer beside.
"""

import collections
import functools
import glob
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).parents[1]))

FLAGS = flags.FLAGS
flags.DEFINE_string("variant", "bn_x5", "Row of bn_keras.VARIANTS.")
flags.DEFINE_integer("image_size", 224, "Height and width of the images.", 32)
flags.DEFINE_integer("batch_size", 32, "Images of a step.", 2)
flags.DEFINE_float("width", 1.0, "Factor on the feature maps.")
flags.DEFINE_integer("rounds", 6, "Rounds of the comparison; the first is not counted.", 2)
flags.DEFINE_integer("threads", os.cpu_count(), "Threads of TensorFlow's and of PyTorch's operations.", 1)
flags.DEFINE_integer("operations", 16, "Rows of the table of operations.", 1)

CLASSES = 1000


def make_config():
    """The paper's recipe for the network of the flags."""
    from bn_keras.networks.variants import VARIANTS
    from bn_keras.runs.run_config import RunConfig

    variant = VARIANTS[FLAGS.variant]
    return RunConfig(
        variant=variant,
        dataset="random",
        dataset_fingerprint="",
        train_examples=1_281_167,
        validation_examples=50_000,
        classes=CLASSES,
        channels=3,
        image_size=FLAGS.image_size,
        width=FLAGS.width,
        batch_size=FLAGS.batch_size,
        replicas=1,
        steps=variant.steps,
        monitor="conv2_3x3,inception_4c_3x3,inception_5b_3x3",
    )


def our_steps(state, config, strategy, images, labels):
    """(the trainer's loop, the bare step that it repeats): functions of a count of steps."""
    import tensorflow as tf

    from bn_keras.training.training_state import make_replica_step, make_train_steps

    train_steps = make_train_steps(state, config, strategy)
    batches = iter(tf.data.Dataset.from_tensors((images, labels)).repeat())
    replica_step = make_replica_step(state, config)
    rate, step = tf.constant(config.initial_learning_rate), tf.constant(0, tf.int64)
    bare = tf.function(lambda: strategy.run(replica_step, args=(images, labels, rate, step)))

    def bare_steps(count):
        for _ in range(count):
            bare()[0].numpy()

    return lambda count: train_steps(batches, tf.constant(count)).numpy(), bare_steps


def keras_steps(config, images, labels):
    """The same network with Keras's BatchNormalization, trained as its users write it."""
    import keras
    import tensorflow as tf

    from bn_keras.networks.build import build_network

    model = build_network(
        config.variant,
        image_size=config.image_size,
        classes=CLASSES,
        width=config.width,
        batch_normalization=keras.layers.BatchNormalization,
    )
    optimizer = keras.optimizers.SGD(config.initial_learning_rate, momentum=config.variant.momentum)
    optimizer.build(model.trainable_variables)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = cross_entropy(labels, model(images, training=True))
            total = loss + tf.add_n(model.losses) if model.losses else loss
        optimizer.apply(tape.gradient(total, model.trainable_variables), model.trainable_variables)
        return loss

    def steps(count):
        for _ in range(count):
            step().numpy()

    return steps


def torch_steps(config, images, labels):
    """Figure 5 in PyTorch, as its users write it; None where it is not installed."""
    try:
        import torch
        from torch import nn
    except ImportError:
        return None
    from bn_keras.networks.inception import FIGURE_5, STEM_DEPTH_MULTIPLIER

    variant = config.variant
    if not variant.batch_normalization or variant.local_response_normalization or variant.dropout:
        return None
    torch.manual_seed(0)
    activation = {"relu": functools.partial(nn.ReLU, inplace=True), "sigmoid": nn.Sigmoid}[variant.activation]

    def maps(count):
        return count if config.width == 1.0 else max(8, int(count * config.width) // 8 * 8)

    def conv(inputs, outputs, size, stride=1):
        convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
        nn.init.kaiming_normal_(convolution.weight)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01), activation())

    class Inception(nn.Module):
        def __init__(self, inputs, row):
            super().__init__()
            self.branches = nn.ModuleList()
            if row.conv_1x1:
                self.branches.append(conv(inputs, maps(row.conv_1x1), 1))
            reduced, double = maps(row.reduce_3x3), maps(row.double_reduce_3x3)
            self.branches.append(
                nn.Sequential(conv(inputs, reduced, 1), conv(reduced, maps(row.conv_3x3), 3, row.stride))
            )
            wide = maps(row.double_3x3)
            self.branches.append(
                nn.Sequential(conv(inputs, double, 1), conv(double, wide, 3), conv(wide, wide, 3, row.stride))
            )
            kind = {"average": nn.AvgPool2d, "max": nn.MaxPool2d}[row.pool]
            pool = kind(3, row.stride, padding=1)
            self.branches.append(nn.Sequential(pool, conv(inputs, maps(row.projection), 1)) if row.projection else pool)
            parts = [row.conv_3x3, row.double_3x3, row.conv_1x1, row.projection]
            self.outputs = sum(maps(part) for part in parts if part) + (0 if row.projection else inputs)

        def forward(self, x):
            return torch.cat([branch(x) for branch in self.branches], 1)

    depth = 3 * STEM_DEPTH_MULTIPLIER
    stem = nn.Conv2d(3, depth, 7, 2, padding=3, groups=3, bias=False)
    layers = [stem, conv(depth, maps(64), 1), nn.MaxPool2d(3, 2, 1), conv(maps(64), maps(64), 1)]
    layers += [conv(maps(64), maps(192), 3), nn.MaxPool2d(3, 2, 1)]
    channels = maps(192)
    for row in FIGURE_5:
        layers.append(Inception(channels, row))
        channels = layers[-1].outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.SGD(
        [{"params": weights, "weight_decay": variant.l2_weight}, {"params": others, "weight_decay": 0.0}],
        lr=config.initial_learning_rate,
        momentum=config.variant.momentum,
    )
    x = torch.from_numpy(images.numpy().transpose(0, 3, 1, 2)).contiguous(memory_format=torch.channels_last)
    y = torch.from_numpy(labels.numpy()).long()
    print(f"torch {torch.__version__}: {sum(p.numel() for p in model.parameters()):,} trainable parameters")

    def steps(count):
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    return steps


def compare(ways, rounds, count=1):
    """Seconds and CPU seconds of a step of every way, by rounds; the first round warms up."""
    seconds, of_cpus = {name: [] for name in ways}, {name: [] for name in ways}
    for number in range(rounds):
        for name, steps in ways.items():
            time.sleep(0.05)  # in which torch's threads stop spinning
            began, cpus_began = time.perf_counter(), time.process_time()
            steps(count)
            if number:
                seconds[name].append((time.perf_counter() - began) / count)
                of_cpus[name].append((time.process_time() - cpus_began) / count)
    return seconds, of_cpus


def ratio(seconds, name, other):
    return statistics.median(one / two for one, two in zip(seconds[name], seconds[other], strict=True))


def record_costs(state, config, images):
    """{what: (seconds, steps between two)} of what the trainer writes."""
    from bn_keras.runs.run_directory import RunDirectory
    from bn_keras.training.activation_monitor import Monitor
    from bn_keras.training.run_writer import RunRecord

    monitor = Monitor(state.model, config.monitor, images)
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(os.path.join(folder, "run"))
        directory.open(config, ["a"])
        record = RunRecord(config, directory, 0)
        looks = monitor.look()
        fields = dict.fromkeys(("learning_rate", "loss", "accuracy", "images_per_second"), 0.5)
        what = {
            "training row": (lambda: (state.finite(), record.add("training", 1, 32, **fields)), config.log_every),
            "checkpoint": (
                lambda: (state.finite(), record.save(1, state.arrays(), 0)),
                config.checkpoint_every,
            ),
            "monitor": (
                lambda: record.add("monitor", 1, 32, percentiles=(15, 50, 85), layers=monitor.look() and looks),
                config.monitor_every,
            ),
        }
        costs = {}
        for name, (write, every) in what.items():
            write()
            times = []
            for _ in range(3):
                began = time.perf_counter()
                write()
                times.append(time.perf_counter() - began)
            costs[name] = statistics.median(times), every
        record.close("measured")
    return costs


_CALLS = {"StatefulPartitionedCall", "PartitionedCall", "While", "StatelessWhile"}


def operations(steps, rounds):
    """{operation: (seconds of one step, calls)} of TensorFlow's profiler; they overlap where threads are free.

    A node's time is the least of the rounds, in most of which something else had the core for a while.
    """
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    least = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            tf.profiler.experimental.start(folder)
            steps(1)
            tf.profiler.experimental.stop()
            (path,) = glob.glob(f"{folder}/plugins/profile/*/*.xplane.pb")
            space = xplane_pb2.XSpace.FromString(Path(path).read_bytes())
        nodes = collections.defaultdict(list)
        for plane in space.planes:
            for line in plane.lines:
                for event in line.events:
                    nodes[plane.event_metadata[event.metadata_id].name].append(event.duration_ps / 1e12)
        for node, times in nodes.items():
            least[node] = min(least.get(node, (0, math.inf)), (-len(times), sum(times)))  # whole traces have more calls
    found = collections.defaultdict(lambda: (0.0, 0))
    for node, (calls, seconds) in least.items():
        name, _, kind = node.rpartition(":")
        # Operations are "name:Kind"; "ExecutorState::Process" and its like are not.
        if name and not name.endswith(":") and kind.isidentifier() and kind not in _CALLS:
            found[kind] = found[kind][0] + seconds, found[kind][1] - calls
    return found


def main(_):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as the launchers do
    os.environ["OMP_NUM_THREADS"] = str(FLAGS.threads)
    import tensorflow as tf

    from bn_keras.training.training_state import TrainingState

    tf.config.threading.set_intra_op_parallelism_threads(FLAGS.threads)
    tf.config.threading.set_inter_op_parallelism_threads(FLAGS.threads)
    config = make_config()
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    shape = (FLAGS.batch_size, FLAGS.image_size, FLAGS.image_size, 3)
    images = tf.random.stateless_uniform(shape, [0, 1], -1.0, 1.0)
    labels = tf.random.stateless_uniform(shape[:1], [0, 2], maxval=CLASSES, dtype=tf.int32)
    state = TrainingState(config, strategy)
    loop, bare = our_steps(state, config, strategy, images, labels)
    ways = {
        "ours": loop,
        "keras": keras_steps(config, images, labels),
        "torch": torch_steps(config, images, labels),
    }
    ways = {name: steps for name, steps in ways.items() if steps}
    print(
        f"{config.variant.title}, {FLAGS.image_size}x{FLAGS.image_size}, batch {FLAGS.batch_size}, width "
        f"{FLAGS.width:g}, {FLAGS.threads} threads, tensorflow {tf.__version__}\n"
    )
    for steps in ways.values():
        steps(2)
    began = time.process_time()
    loop(1)
    count = max(1, round(1.0 / (time.process_time() - began)))
    seconds, of_cpus = compare(ways, FLAGS.rounds, count)
    print("| step | ours / this, in CPU time | in time | CPU s | s |\n|---|---:|---:|---:|---:|")
    for name in ways:
        cells = ratio(of_cpus, "ours", name), ratio(seconds, "ours", name)
        medians = statistics.median(of_cpus[name]), statistics.median(seconds[name])
        print(f"| {name} | " + " | ".join([*map("{:.2f}".format, cells), *map("{:.4f}".format, medians)]) + " |")
    step = statistics.median(seconds["ours"])
    _, of_cpus = compare({"loop": loop, "bare": bare}, FLAGS.rounds, count)
    print(
        f"\nThe trainer's loop takes {ratio(of_cpus, 'loop', 'bare') - 1:+.1%} of the bare step's CPU time.\n",
        flush=True,
    )
    print("| written | s | every | of the steps' time |\n|---|---:|---:|---:|")
    costs = record_costs(state, config, images)
    for name, (cost, every) in costs.items():
        print(f"| {name} | {cost:.3f} | {every:,} | {cost / every / step:.2%} |")
    print(f"| all | | | {sum(cost / every for cost, every in costs.values()) / step:.2%} |\n", flush=True)
    found = {name: operations(ways[name], FLAGS.rounds) for name in ("ours", "keras")}
    print("| operation | ours, ms | calls | keras, ms | calls |\n|---|---:|---:|---:|---:|")
    sums = {name: tuple(map(sum, zip(*kinds.values(), strict=True))) for name, kinds in found.items()}
    kinds = sorted(set().union(*found.values()), key=lambda kind: -found["ours"][kind][0] - found["keras"][kind][0])
    for kind in kinds[: FLAGS.operations]:
        cells = [f"{1e3 * found[name][kind][0]:.2f} | {found[name][kind][1]:,}" for name in found]
        print(f"| {kind} | {' | '.join(cells)} |")
    cells = [f"{1e3 * seconds:.2f} | {calls:,}" for seconds, calls in sums.values()]
    print(f"| all | {' | '.join(cells)} |")


if __name__ == "__main__":
    app.run(main)
