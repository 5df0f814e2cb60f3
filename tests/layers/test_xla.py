"""Compiled by XLA, the layer reads and writes no more memory than Keras's: counted in the optimized program."""

import functools
import json

import pytest
from conftest import on, run_program

from benchmarks._hlo import memory_traffic

PROGRAM = """
import functools, json, os, sys
os.environ["KERAS_BACKEND"], dtype = sys.argv[1:]
import keras
from benchmarks._hlo import memory_traffic, optimized_hlo
from bn_keras import BatchNormalization
from bn_keras.layers import moments, replicas

keras.config.set_dtype_policy(dtype)
x = keras.ops.ones((32, 28, 28, 64), keras.config.dtype_policy().compute_dtype)
size = 32 * 28 * 28 * 64 * (4 if dtype == "float32" else 2)
layers = {
    "ours": BatchNormalization,
    "groups": functools.partial(BatchNormalization, virtual_batch_size=8),
    "uneven groups": functools.partial(BatchNormalization, virtual_batch_size=7),
    "keras": keras.layers.BatchNormalization,
}
if keras.backend.backend() == "tensorflow":
    layers["synchronized"] = functools.partial(BatchNormalization, synchronized=True)
results = {}
for name, make in layers.items():
    if name == "synchronized":  # over two replicas that hold the same
        moments.replica_count = replicas.replica_count = lambda: 2
        replicas.sum_over_replicas = lambda value: 2 * value
    results[name] = [memory_traffic(optimized_hlo(make(), x, dy))[0] / size for dy in (None, x)]
print(json.dumps(results))
"""
CASES = [on(backend, dtype) for backend in ("tensorflow", "jax") for dtype in ("float32", "mixed_bfloat16")]
# The first example of every group of 7 or 8 of 32, read, copied and read again.
OF_PIVOTS = {"ours": 0.25, "synchronized": 0.25, "groups": 1.0, "uneven groups": 1.0}


@functools.cache
def traffic(backend, dtype):
    done = run_program("-c", PROGRAM, backend, dtype, warm=backend == "tensorflow")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("backend, dtype", CASES)
@pytest.mark.parametrize("direction", [0, 1], ids=["forward", "forward and backward"])
def test_a_step_reads_and_writes_no_more_than_with_keras_layer(backend, dtype, direction):
    found = traffic(backend, dtype)
    for name, of_pivots in OF_PIVOTS.items():
        if name in found:
            assert found[name][direction] <= found["keras"][direction] + of_pivots, name


def test_what_is_counted_is_what_a_known_program_reads_and_writes():
    import tensorflow as tf

    x = tf.ones((8, 1000))
    programs = {
        "x + 1, read and written": (lambda x: x + 1, 2.0),
        "sum over rows, read once, and written": (lambda x: tf.reduce_sum(x, 0), 9 / 8),
        "less the mean of rows, read twice and written": (lambda x: x - tf.reduce_mean(x, 0), 3 + 2 / 8),
        "the first row, read and written": (lambda x: x[:1] * 2.0, 2 / 8),
    }
    for name, (function, expected) in programs.items():
        compiled = tf.function(function, jit_compile=True).experimental_get_compiler_ir(x)
        assert memory_traffic(compiled(stage="optimized_hlo"))[0] / (4 * 8000) == pytest.approx(expected, abs=0.01), (
            name
        )
