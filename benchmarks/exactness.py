"""Rounding errors of this project's BatchNormalization in training, beside Keras's, on every Keras backend installed.

  python benchmarks/exactness.py                         a minute on two cores

Values of deviation 1 about a mean, [32, 56, 56, 16], float32, gamma 1, beta 0. An error is the largest distance of y to
float64 numpy's y of the same float32 values. A constant channel is beta, 0 here, exactly; in Keras's layer its last bit
is divided by sqrt(epsilon).
"""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
SHAPE = (32, 56, 56, 16)
MEANS = (0, 10, 100, 1000, 1e5)
CONSTANTS = (5.3, 1000.3)
EPSILON = 1e-3
WAYS = {
    "tensorflow": ("TensorFlow, eager", "TensorFlow, graph", "TensorFlow, XLA"),
    "jax": ("JAX, jit",),
    "torch": ("PyTorch",),
}


def compiled(way, function):
    """`function` as the way runs it."""
    if way == "JAX, jit":
        import jax

        return jax.jit(function)
    if way in ("TensorFlow, graph", "TensorFlow, XLA"):
        import tensorflow as tf

        return tf.function(function, jit_compile=way == "TensorFlow, XLA")
    return function


@functools.cache
def _tensorflow_step(layer, way):
    """(x, dy) to y and the gradients, compiled once for a layer."""
    import tensorflow as tf

    parameters = [variable.value for variable in layer.trainable_variables]

    def step(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return y, *tape.gradient(y, [x, *parameters], dy)

    return compiled(way, step)


def train(layer, x, dy, way):
    """One training step of a built layer: y and the gradients of x, gamma and beta, as numpy; its averages move."""
    import keras

    x, dy = keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(dy)
    parameters = [variable.value for variable in layer.trainable_variables]
    if way.startswith("TensorFlow"):
        results = _tensorflow_step(layer, way)(x, dy)
    elif way == "PyTorch":
        import torch

        x = x.clone().requires_grad_()
        y = layer(x, training=True)
        results = y.detach(), *torch.autograd.grad(y, [x, *parameters], dy)
    else:
        import jax

        def step(x, dy, parameters, averages):
            def forward(x, parameters):
                return layer.stateless_call(parameters, averages, x, training=True)

            y, gradients_of, moved = jax.vjp(forward, x, parameters, has_aux=True)
            dx, parameters = gradients_of(dy)
            return (y, dx, *parameters), moved

        averages = [variable.value for variable in layer.non_trainable_variables]
        results, moved = compiled(way, step)(x, dy, parameters, averages)
        for variable, value in zip(layer.non_trainable_variables, moved, strict=True):
            variable.assign(value)
    return [keras.ops.convert_to_numpy(value) for value in results]


def errors(layer, x, dy, way):
    """{what: error} of a training step and an inference of a layer with momentum 0, against float64 numpy.

    Of y, dx and the inference: the largest distance. Of the averages: relative to their value, at least 1. Of dgamma
    and dbeta, which are sums: relative to the sum of their terms' magnitudes.
    """
    import keras

    if not layer.built:
        layer.build(x.shape)
    y, dx, dgamma, dbeta = train(layer, x, dy, way)
    axes = tuple(i for i in range(x.ndim) if i != layer.axis % x.ndim)
    channels = [size if i not in axes else 1 for i, size in enumerate(x.shape)]
    m = x.size // max(channels)
    x64, dy = x.astype("float64"), dy.astype("float64")
    mean, variance = (f(x64, axis=axes, keepdims=True) for f in (np.mean, np.var))
    inverse = 1 / np.sqrt(variance + EPSILON)
    xhat = (x64 - mean) * inverse
    mean_dy, mean_dy_xhat = (np.mean(value, axis=axes, keepdims=True) for value in (dy, dy * xhat))
    averages = [
        keras.ops.convert_to_numpy(each.value).astype("float64").reshape(channels)
        for each in (layer.moving_mean, layer.moving_variance)
    ]
    predict = compiled(way, lambda x: layer(x, training=False))
    predicted = keras.ops.convert_to_numpy(predict(keras.ops.convert_to_tensor(x)))
    unbiased = variance * (m / (m - 1) if getattr(layer, "unbiased", False) else 1)
    return {
        "y": abs(y - xhat).max(),
        "dx": abs(dx - inverse * (dy - mean_dy - xhat * mean_dy_xhat)).max(),
        "inference": abs(predicted - (x64 - averages[0]) / np.sqrt(averages[1] + EPSILON)).max(),
        "moving_mean": (abs(averages[0] - mean) / np.maximum(1, abs(mean))).max(),
        "moving_variance": (abs(averages[1] - unbiased) / np.maximum(1, unbiased)).max(),
        "dgamma": (abs(dgamma - (dy * xhat).sum(axes)) / abs(dy * xhat).sum(axes)).max(),
        "dbeta": (abs(dbeta - dy.sum(axes)) / abs(dy).sum(axes)).max(),
    }


def print_rows(way):
    """The table's rows of this process's backend, run in one way."""
    import keras

    from bn_keras import BatchNormalization

    draw = np.random.default_rng(0)
    x, dy = (draw.normal(size=SHAPE) for _ in range(2))
    inputs = [(x + mean).astype("float32") for mean in MEANS]
    inputs += [np.full(SHAPE, value, "float32") for value in CONSTANTS]
    for name, layer_class in (("ours", BatchNormalization), ("Keras's", keras.layers.BatchNormalization)):
        found = [errors(layer_class(momentum=0.0), x, dy.astype("float32"), way)["y"] for x in inputs]
        print(f"| {way} | {name} | {' | '.join(f'{error:.1e}' if error else '0' for error in found)} |", flush=True)


def main():
    header = ["", "", *(f"mean {mean:,.0f}" for mean in MEANS), *(f"constant {value}" for value in CONSTANTS)]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    for backend, ways in WAYS.items():
        if importlib.util.find_spec(backend) is None:
            print(f"{backend} is not installed: its rows are left out", file=sys.stderr)
            continue
        environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT), "TF_ENABLE_ONEDNN_OPTS": "1"}
        for way in ways:
            subprocess.run([sys.executable, __file__, way], check=True, env=environment, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    print_rows(sys.argv[1]) if len(sys.argv) > 1 else main()
