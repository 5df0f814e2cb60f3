"""A training step on an accelerator, with this project's BatchNormalization and with Keras's, on any Keras backend.

  KERAS_BACKEND=jax python benchmarks/accelerator.py     some minutes on an H200, most of them compiling

  KERAS_BACKEND=jax python benchmarks/accelerator.py --hlo     what XLA reads and writes; seconds, on any machine

Two lone layers, then the whole BN-x5 at 224x224, in float32 and with bfloat16 activations. A layer's step is the
forward pass and the gradients of inputs, gamma and beta; the network's is forward, backward and the update. Both sides
are compiled by XLA (on PyTorch: run as they are), and take turns, round by round. Without an accelerator it refuses:
the other programs measure a CPU.

A layer's step is bound by memory, so --hlo counts, in XLA's optimized program, the bytes that its kernels read and
write, in sizes of x: the least that a forward pass needs is 3, x read for its moments and for y, and y written.
"""

import functools
import math
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
sys.path.insert(0, str(Path(__file__).parents[1]))

from absl import app, flags

from benchmarks._hlo import memory_traffic, optimized_hlo

FLAGS = flags.FLAGS
flags.DEFINE_integer("batch_size", 256, "Images of a step.", 2)
flags.DEFINE_integer("rounds", 5, "Rounds; the table shows the median.", 1)
flags.DEFINE_integer("repeats", 20, "Steps of a round.", 1)
flags.DEFINE_bool("hlo", False, "Print what XLA reads and writes, instead of times.")
flags.DEFINE_bool("anywhere", False, "Run without an accelerator as well.")

SHAPES = ((56, 56, 64), (14, 14, 576))
PRECISIONS = {"float32": "float32", "bfloat16 activations": "mixed_bfloat16"}


def device_name():
    """What the backend computes on; None if that is a CPU."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        return None if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    if keras.backend.backend() == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else None
    import tensorflow as tf

    devices = tf.config.list_physical_devices("GPU")
    return tf.config.experimental.get_device_details(devices[0])["device_name"] if devices else None


def wait_for(value):
    """Until a tensor, or the first of several, has been computed."""
    import keras

    while isinstance(value, tuple | list):
        value = value[0]
    keras.ops.convert_to_numpy(keras.ops.sum(keras.ops.cast(value, "float32")))


def layer_step(layer, x, gradient):
    """A function of no arguments: the gradients of x, gamma and beta, and the step of the moving averages."""
    import keras

    layer.build(x.shape)
    parameters = [variable.value for variable in layer.trainable_variables]
    if keras.backend.backend() == "jax":
        import jax

        averages = [variable.value for variable in layer.non_trainable_variables]

        def loss(x, parameters):
            y, moved = layer.stateless_call(parameters, averages, x, training=True)
            return keras.ops.sum(keras.ops.cast(y * gradient, "float32")), moved

        return functools.partial(jax.jit(jax.grad(loss, (0, 1), has_aux=True)), x, parameters)
    if keras.backend.backend() == "torch":
        import torch

        x = x.clone().requires_grad_()

        def step():
            y = layer(x, training=True)
            return torch.autograd.grad(y, [x, *parameters], gradient)

        return step
    import tensorflow as tf

    @tf.function(jit_compile=True)
    def step():
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return tape.gradient(y, [x, *parameters], gradient)

    return step


def network_step(batch_normalization, images, labels):
    """A function of no arguments: one step of Keras's own training loop."""
    import keras

    from bn_keras.networks.build import build_network

    model = build_network("bn_x5", image_size=224, classes=1000, batch_normalization=batch_normalization)
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=keras.backend.backend() != "torch",
    )

    def step():
        model.train_on_batch(images, labels)
        return model.trainable_variables[0].value

    return step


def measure(ways):
    """Milliseconds of each way's step, for every round."""
    for step in ways.values():
        for _ in range(3):  # compiles
            wait_for(step())
    rounds = []
    for _ in range(FLAGS.rounds):
        times = {}
        for name, step in ways.items():
            wait_for(step())
            started = time.perf_counter()
            for _ in range(FLAGS.repeats):
                result = step()
            wait_for(result)
            times[name] = 1e3 * (time.perf_counter() - started) / FLAGS.repeats
        rounds.append(times)
    return rounds


def print_traffic(layers):
    """The table of --hlo."""
    import keras
    import numpy as np

    print(f"{keras.backend.backend()} backend: memory traffic in sizes of x, and kernels, of XLA's optimized program\n")
    print("| [32, 28, 28, 64] | " + " | ".join(layers) + " |\n|" + "---|" * (1 + len(layers)))
    for precision in PRECISIONS.values():
        keras.config.set_dtype_policy(precision)
        dtype = keras.config.dtype_policy().compute_dtype
        x = keras.ops.convert_to_tensor(np.ones((32, 28, 28, 64)), dtype)
        size = math.prod(x.shape) * (4 if dtype == "float32" else 2)
        for what, dy in (("forward", None), ("forward and backward", x)):
            cells = []
            for make in layers.values():
                traffic, kernels = memory_traffic(optimized_hlo(make(), x, dy))
                cells.append(f"{traffic / size:.2f}, {kernels} kernels")
            print(f"| {what}, {dtype} | {' | '.join(cells)} |", flush=True)


def main(_):
    import keras
    import numpy as np

    from bn_keras import BatchNormalization

    if FLAGS.hlo:
        keras_layer = keras.layers.BatchNormalization
        groups = functools.partial(BatchNormalization, virtual_batch_size=8)
        print_traffic({"ours": BatchNormalization, "in groups of 8": groups, "Keras's": keras_layer})
        return
    device = device_name()
    if device is None and not FLAGS.anywhere:
        sys.exit("accelerator: none is seen by Keras's backend; fix: run where one is, or give --anywhere")
    layers = {"ours": BatchNormalization, "keras": keras.layers.BatchNormalization}
    draw = np.random.default_rng(0)
    images = draw.uniform(-1, 1, (FLAGS.batch_size, 224, 224, 3)).astype("float32")
    images, labels = map(keras.ops.convert_to_tensor, (images, draw.integers(0, 1000, FLAGS.batch_size)))
    print(
        f"{device}, {keras.backend.backend()} backend, batches of {FLAGS.batch_size}, median of {FLAGS.rounds} rounds\n"
    )
    print("| | Keras's time against ours | ours, ms | Keras's, ms |\n|---|---|---|---|")
    for name, policy in PRECISIONS.items():
        keras.config.set_dtype_policy(policy)
        works = {}
        for shape in SHAPES:
            shape = (FLAGS.batch_size, *shape)
            x, dy = (
                keras.ops.convert_to_tensor(draw.normal(0, 1, shape), keras.config.dtype_policy().compute_dtype)
                for _ in range(2)
            )
            works[f"layer, {list(shape)}"] = {which: layer_step(layer(), x, dy) for which, layer in layers.items()}
        works["network"] = {which: network_step(layer, images, labels) for which, layer in layers.items()}
        for work, ways in works.items():
            rounds = measure(ways)
            ours, theirs = (statistics.median(times[which] for times in rounds) for which in layers)
            ratio = statistics.median(times["keras"] / times["ours"] for times in rounds)
            print(f"| {work}, {name} | {ratio:.2f} | {ours:.3g} | {theirs:.3g} |", flush=True)


if __name__ == "__main__":
    app.run(main)
