"""Time and memory of `bn_keras.BatchNormalization` beside Keras's layer and torch.nn.BatchNorm2d, in one run.

  python benchmarks/batch_normalization.py               prints Markdown tables; about four minutes on two cores
  python benchmarks/batch_normalization.py --onednn=0    TensorFlow without oneDNN
  python benchmarks/batch_normalization.py --sections=layer,memory

Every section runs in a process of its own; in it rounds alternate between the peers, so that they share what else the
machine does. A time is the median over rounds; a ratio is the median of the rounds' ratios. Torch, if it is installed,
gets as many threads as TensorFlow. CPU time, of all threads, counts also where other programs hold a core; torch's
threads spin while they wait, which adds to theirs.
"""

import dataclasses
import functools
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from absl import app, flags

ROOT = Path(__file__).parents[1]
SECTIONS = ("layer", "synchronized", "memory", "network", "folded")
SHAPES = ((32, 56, 56, 64), (32, 14, 14, 576))
# Seconds in which torch's threads stop spinning: what runs straight after them takes up to 1.6 times as long.
PAUSE = 0.05
FLAGS = flags.FLAGS
flags.DEFINE_enum("onednn", "1", ["0", "1"], "Whether TensorFlow uses oneDNN; the launchers turn it on.")
flags.DEFINE_list("sections", list(SECTIONS), f"Which to run, of {', '.join(SECTIONS)}.")
flags.DEFINE_integer("rounds", 30, "Rounds of the sections on one layer.", 1)
flags.DEFINE_integer("network_rounds", 9, "Rounds of the sections on the whole network.", 1)
flags.DEFINE_integer("batch", 32, "Images in a mini-batch of the whole network.", 1)
flags.DEFINE_string("peer", None, "Measures the memory of this peer only; the memory section's own use.")


def print_table(title, first, times):
    """times: {name: [(wall, CPU) seconds of a round, ...]}; the ratios are against the row `first`."""
    print(f"\n{title}\n\n| | ms | ratio to {first} | CPU ms | ratio of CPU time |\n|---|---|---|---|---|")
    for name, rounds in times.items():
        cells = []
        for seconds, of_first in zip(zip(*rounds, strict=True), zip(*times[first], strict=True), strict=True):
            ratio = statistics.median(theirs / ours for theirs, ours in zip(seconds, of_first, strict=True))
            cells.append(f"{statistics.median(seconds) * 1e3:.2f} | {ratio:.2f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def alternate(ways, rounds, warm_up=3):
    """(wall, CPU) seconds of every way in every round, after `warm_up` rounds that trace, allocate and fill caches."""
    times = {name: [] for name in ways}
    for number in range(warm_up + rounds):
        for name, way in ways.items():
            time.sleep(PAUSE)
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            if number >= warm_up:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


@functools.cache
def activations(shape):
    import numpy as np
    import tensorflow as tf

    random = np.random.default_rng(0)
    return tuple(tf.constant(random.normal(mean, 2, shape).astype("float32")) for mean in (3, 0))


def peers():
    """{name: make}, where make(shape) is (train, infer); train() is a forward pass and one back to x, gamma, beta."""
    import keras

    from bn_keras import BatchNormalization

    ways = {
        "bn_keras": functools.partial(keras_peer, BatchNormalization),
        "Keras": functools.partial(keras_peer, keras.layers.BatchNormalization),
    }
    try:
        import torch
    except ImportError:
        print("torch is not installed: its rows are left out", file=sys.stderr)
        return ways
    torch.set_num_threads(os.cpu_count())
    return ways | {
        "torch, channels_last": functools.partial(torch_peer, True),
        "torch, contiguous": functools.partial(torch_peer, False),
    }


def keras_peer(layer_class, shape):
    import tensorflow as tf

    x, dy = activations(shape)
    layer = layer_class()
    layer.build(shape)
    parameters = [variable.value for variable in layer.trainable_variables]

    @tf.function
    def train():
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return y, tape.gradient(y, [x, *parameters], dy)

    @tf.function
    def infer():
        return layer(x, training=False)

    return train, infer


def torch_peer(channels_last, shape):
    import torch

    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x, dy = (
        torch.from_numpy(value.numpy()).permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
        for value in activations(shape)
    )
    x.requires_grad_()
    training, inference = torch.nn.BatchNorm2d(shape[-1]), torch.nn.BatchNorm2d(shape[-1]).eval()

    def train():
        x.grad = None
        training.zero_grad()
        training(x).backward(dy)

    def infer():
        with torch.no_grad():
            inference(x)

    return train, infer


def layer_section():
    for shape in SHAPES:
        ways = {name: make(shape) for name, make in peers().items()}
        for index, title in enumerate(("Training, forward and backward", "Inference")):
            times = alternate({name: way[index] for name, way in ways.items()}, FLAGS.rounds)
            print_table(f"{title}, {list(shape)}", "bn_keras", times)


def synchronized_section():
    import keras
    import tensorflow as tf

    from bn_keras import BatchNormalization

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

    def peer(layer_class, shape):
        halves = [tf.split(value, 2) for value in activations(shape)]
        x, dy = (
            strategy.experimental_distribute_values_from_function(lambda c, h=half: h[c.replica_id_in_sync_group])
            for half in halves
        )
        with strategy.scope():
            layer = layer_class(synchronized=True)
            layer.build(shape)

        def step(x, dy):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
            return y, tape.gradient(y, [x, *(variable.value for variable in layer.trainable_variables)], dy)

        return tf.function(lambda: strategy.run(step, args=(x, dy)))

    for shape in SHAPES:
        classes = {"bn_keras": BatchNormalization, "Keras": keras.layers.BatchNormalization}
        times = alternate({name: peer(layer, shape) for name, layer in classes.items()}, FLAGS.rounds)
        print_table(f"Synchronized over two replicas, forward and backward, {list(shape)}", "bn_keras", times)


def memory_section():
    """The most memory that a training step holds beyond x and dy, of a process of its own for each peer."""
    shape = (256, *SHAPES[0][1:])  # 206 MB a tensor: beside it the programs' own memory is small
    if FLAGS.peer:
        make = peers()[FLAGS.peer]
        make(SHAPES[0])[0]()  # loads libraries and starts threads
        train, _ = make(shape)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is held now
        before = _resident("VmRSS")
        train()
        print(_resident("VmHWM") - before)
        return
    size = 4 * math.prod(shape)
    print(f"\nPeak memory of a training step beyond x and dy, {list(shape)}\n\n| | MB | sizes of x |\n|---|---|---|")
    for name in ("bn_keras", "Keras", "torch, channels_last", "torch, contiguous"):
        done = run_section("memory", f"--peer={name}", capture_output=True, text=True)
        if done.returncode == 0:
            used = int(done.stdout.split()[-1])
            print(f"| {name} | {used / 1e6:.0f} | {used / size:.2f} |", flush=True)


def _resident(field):
    """VmRSS, the memory held, or VmHWM, its peak, in bytes; Linux."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def variant(name):
    """A row without LRN, so that BN is what two rows differ in."""
    from bn_keras import VARIANTS

    return dataclasses.replace(VARIANTS[name], local_response_normalization=False, dropout=0.0)


def network_section():
    import keras
    import tensorflow as tf

    from bn_keras import BatchNormalization, build_network

    images = tf.random.normal((FLAGS.batch, 224, 224, 3))
    labels = tf.random.uniform((FLAGS.batch,), maxval=1000, dtype=tf.int32)

    def peer(name, layer):
        model = build_network(variant(name), batch_normalization=layer)
        optimizer = keras.optimizers.SGD(0.001, momentum=0.9)
        optimizer.build(model.trainable_variables)

        @tf.function
        def step():
            with tf.GradientTape() as tape:
                logits = model(images, training=True)
                loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
                loss += tf.add_n(model.losses)
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
            return loss

        return step

    ways = {
        "Inception without LRN": peer("inception", None),
        "BN-Baseline without LRN, bn_keras": peer("bn_baseline", BatchNormalization),
        "BN-Baseline without LRN, Keras's layer": peer("bn_baseline", keras.layers.BatchNormalization),
    }
    times = alternate(ways, FLAGS.network_rounds, warm_up=1)
    print_table(f"A training step of the whole network, {FLAGS.batch} images of 224x224", next(iter(ways)), times)


def folded_section():
    import keras
    import tensorflow as tf

    from bn_keras import BatchNormalization, build_network, fold_batch_normalization

    images = tf.random.normal((FLAGS.batch, 224, 224, 3))

    def peer(model):
        return tf.function(lambda: model(images, training=False))

    unfolded = build_network(variant("bn_x5"), batch_normalization=BatchNormalization)
    ways = {
        "folded": peer(fold_batch_normalization(unfolded)),
        "unfolded, bn_keras": peer(unfolded),
        "unfolded, Keras's layer": peer(
            build_network(variant("bn_x5"), batch_normalization=keras.layers.BatchNormalization)
        ),
    }
    times = alternate(ways, 2 * FLAGS.network_rounds, warm_up=1)
    print_table(f"Inference of BN-x5, {FLAGS.batch} images of 224x224", "folded", times)
    for name in ("ResNet50", "MobileNetV2"):
        model = getattr(keras.applications, name)(weights=None)
        ways = {"folded": peer(fold_batch_normalization(model)), "unfolded": peer(model)}
        times = alternate(ways, 2 * FLAGS.network_rounds, warm_up=1)
        print_table(f"Inference of keras.applications.{name}, {FLAGS.batch} images of 224x224", "folded", times)


def run_section(name, *arguments, **options):
    """Runs this program for one section, in a process of its own."""
    options["env"] = {**os.environ, "PYTHONPATH": str(ROOT), "BN_KERAS_SECTION": name}
    return subprocess.run([sys.executable, __file__, *sys.argv[1:], *arguments], check=False, **options)


def main(_):
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = FLAGS.onednn
    section = os.environ.get("BN_KERAS_SECTION")
    if section:
        globals()[f"{section}_section"]()
        return
    print(f"oneDNN {'on' if FLAGS.onednn == '1' else 'off'}, {os.cpu_count()} cores", flush=True)
    for name in FLAGS.sections:
        run_section(name)


if __name__ == "__main__":
    app.run(main)
