"""Synchronized statistics over replicas are those of one device that has the full batch, at one collective each way."""

import socket

import numpy as np
import pytest
from conftest import run_program, start_program

SHAPE, EPSILON, GAMMA = (8, 6, 5, 3), 1e-3, 1.5
DY = np.random.default_rng(1).normal(size=SHAPE).astype("float32")
COMMON = f"""
import json, os, sys
import numpy as np, tensorflow as tf, keras
from bn_keras import BatchNormalization
folder = sys.argv[1]
inputs = np.load(folder + "/inputs.npz")

def make_layer():
    layer = BatchNormalization(momentum=0.0, synchronized=True, gamma_initializer=keras.initializers.Constant({GAMMA}))
    layer.build({SHAPE})
    return layer

def step(layer, x, dy):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
    dx, dgamma, dbeta = tape.gradient(y, [x, layer.gamma.value, layer.beta.value], dy)
    return dict(y=y, dx=dx, dgamma=dgamma, dbeta=dbeta)
"""
TWO_REPLICAS = (
    COMMON
    + """
import bn_keras.layers.tensorflow_kernels
from bn_keras.training.distribution import make_strategy
strategy = make_strategy("mirrored", 2)
calls = []
all_reduce = tf.distribute.ReplicaContext.all_reduce
tf.distribute.ReplicaContext.all_reduce = lambda self, *args, **kwargs: (
    calls.append(self.replica_id_in_sync_group), all_reduce(self, *args, **kwargs))[1]
results = {}
for name in inputs["names"]:
    mean, split, device = name.split("_")
    bn_keras.layers.tensorflow_kernels.only_cpus = lambda: device == "cpu"
    part = lambda value: strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(np.split(value, [int(split)])[context.replica_id_in_sync_group]))
    with strategy.scope():
        layer = make_layer()
    calls.clear()
    got = tf.function(lambda x, dy: strategy.run(lambda x, dy: step(layer, x, dy), (x, dy)))(
        part(inputs["x" + mean]), part(inputs["dy"]))
    results[name + "_collectives"] = len(calls) / 2
    for key, value in got.items():
        locals_ = [each.numpy() for each in strategy.experimental_local_results(value)]
        results[name + "_" + key] = np.concatenate(locals_) if key in ("y", "dx") else sum(locals_)
    for key in ("moving_mean", "moving_variance"):
        one, other = strategy.experimental_local_results(getattr(layer, key).value)
        np.testing.assert_array_equal(one, other)
        results[name + "_" + key] = one.numpy()
np.savez(folder + "/results.npz", **results)

def twice(x):
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = layer(x, training=True) ** 2
        dx = inner.gradient(y, x)
    return outer.gradient(dx, x)

try:
    tf.function(lambda x: strategy.run(twice, (x,)))(part(inputs["x0"]))
except LookupError as error:
    assert "cannot be differentiated again" in str(error), error
else:
    raise AssertionError("a second derivative without the terms through the moments")
"""
)
WORKER = (
    COMMON
    + """
worker = int(sys.argv[2])
os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": sys.argv[3:]}, "task": {"type": "worker", "index": worker}})
strategy = tf.distribute.MultiWorkerMirroredStrategy()
with strategy.scope():
    layer = make_layer()
x, dy = (tf.constant(np.split(inputs[name], [5])[worker]) for name in ("x1000", "dy"))
function = tf.function(lambda: strategy.run(lambda: step(layer, x, dy))).get_concrete_function()
graph = function.graph.as_graph_def()
operations = [node.op for nodes in (graph.node, *(f.node_def for f in graph.library.function)) for node in nodes]
results = {key: value.numpy() for key, value in function().items()}
for key in ("moving_mean", "moving_variance"):
    results[key] = getattr(layer, key).numpy()
results["collectives"] = sum(name.startswith("CollectiveReduce") for name in operations)
np.savez(f"{folder}/worker{worker}.npz", **results)
"""
)
# mean_split_device: values of deviation 1 about the mean, the first `split` of 8 examples on the first replica; what is
# computed on an accelerator, computed here.
CASES = ["0_4_cpu", "1000_4_cpu", "1000_5_cpu", "1000_7_cpu", "1000_8_cpu", "0_5_accelerator", "1000_7_accelerator"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synchronized")
    x = np.random.default_rng(0).normal(size=SHAPE)
    np.savez(folder / "inputs.npz", names=CASES, dy=DY, x0=x.astype("float32"), x1000=(x + 1000).astype("float32"))
    return folder


@pytest.fixture(scope="module")
def two_replicas(folder):
    done = run_program("-c", TWO_REPLICAS, folder, warm=True)
    assert done.returncode == 0, done.stderr
    return dict(np.load(folder / "results.npz"))


def assert_is_the_full_batch(results, x):
    """Within 1e-6 of the largest value, 8 float32 roundings; x itself is exact, the oracle is float64 of its bits."""
    x, dy, axes = x.astype("float64"), DY.astype("float64"), (0, 1, 2)
    mean, variance, m = x.mean(axes), x.var(axes), x[..., 0].size
    xhat = (x - mean) / np.sqrt(variance + EPSILON)
    expected = {
        "y": GAMMA * xhat,
        "dx": GAMMA / np.sqrt(variance + EPSILON) * (dy - dy.mean(axes) - xhat * (dy * xhat).mean(axes)),
        "dgamma": (dy * xhat).sum(axes),
        "dbeta": dy.sum(axes),
        "moving_mean": mean,
        "moving_variance": variance * m / (m - 1),
    }
    for name, value in expected.items():
        error = abs(results[name] - value).max() / max(1, abs(value).max())
        assert error < 1e-6, f"{name} is off by {error}"


@pytest.mark.parametrize("case", CASES)
def test_two_replicas_equal_one_device_with_the_full_batch(case, folder, two_replicas):
    results = {name.removeprefix(f"{case}_"): value for name, value in two_replicas.items() if name.startswith(case)}
    assert_is_the_full_batch(results, np.load(folder / "inputs.npz")["x" + case.split("_")[0]])


@pytest.mark.parametrize("mean", [0, 1000])
def test_one_device_is_as_exact(mean, folder):
    import keras
    import tensorflow as tf

    from bn_keras import BatchNormalization

    x = tf.constant(np.load(folder / "inputs.npz")[f"x{mean}"])
    layer = BatchNormalization(momentum=0.0, gamma_initializer=keras.initializers.Constant(GAMMA))
    layer.build(SHAPE)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
    dx, dgamma, dbeta = tape.gradient(y, [x, layer.gamma.value, layer.beta.value], tf.constant(DY))
    results = {"y": y, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}
    results |= {name: getattr(layer, name) for name in ("moving_mean", "moving_variance")}
    assert_is_the_full_batch({name: np.asarray(value) for name, value in results.items()}, x.numpy())


@pytest.mark.parametrize("case", CASES)
def test_a_layer_takes_one_collective_forward_and_one_backward(case, two_replicas):
    assert two_replicas[f"{case}_collectives"] == 2


def test_two_worker_processes_equal_one_device_with_the_full_batch(folder):
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("localhost", 0))
        addresses = [f"localhost:{each.getsockname()[1]}" for each in (one, other)]
    workers = [start_program("-c", WORKER, folder, number, *addresses, warm=True) for number in (0, 1)]
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=300)
            assert worker.returncode == 0, errors
    finally:
        for worker in workers:
            worker.kill()
    one, other = (dict(np.load(folder / f"worker{number}.npz")) for number in (0, 1))
    results = {name: np.concatenate([one[name], other[name]]) for name in ("y", "dx")}
    results |= {name: one[name] + other[name] for name in ("dgamma", "dbeta")}
    for name in ("moving_mean", "moving_variance"):
        np.testing.assert_array_equal(one[name], other[name])
        results[name] = one[name]
    assert_is_the_full_batch(results, np.load(folder / "inputs.npz")["x1000"])
    assert one["collectives"] == other["collectives"] == 2


def test_synchronized_and_virtual_batches_exclude_each_other():
    from bn_keras import BatchNormalization

    with pytest.raises(ValueError, match="over more than a replica's batch"):
        BatchNormalization(synchronized=True, virtual_batch_size=4)
