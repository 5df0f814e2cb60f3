"""At every mean the layer is as exact as float32 can be: against float64 numpy of the same values, on every backend."""

import json

import numpy as np
import pytest
from conftest import on, run_program

from benchmarks.exactness import WAYS

COMMON = """
import os, sys
os.environ["KERAS_BACKEND"], way, what = sys.argv[1:]
import json
import numpy as np, keras
from keras import ops
from bn_keras import BatchNormalization
from benchmarks import exactness

draw = np.random.default_rng(0)
numpy = lambda value: ops.convert_to_numpy(ops.cast(value, "float32")).astype("float64")
results = {}
"""
ERRORS = (
    COMMON
    + """
layers = {}
for shape, axis, mean in json.loads(what):
    layer = layers.setdefault((*shape, axis), BatchNormalization(axis=axis, momentum=0.0))
    x, dy = draw.normal(mean, 1, shape).astype("float32"), draw.normal(size=shape).astype("float32")
    found = exactness.errors(layer, x, dy, way)
    results |= {f"{name} of {shape}, axis {axis}, mean {mean:g}": float(error) for name, error in found.items()}
print(json.dumps(results))
"""
)
CONSTANT = (
    COMMON
    + """
for shape, arguments in (
    ((6, 5), {}), ((4, 3, 5), {"axis": 1}), ((8, 7, 5, 3), {}), ((8, 7, 5, 3), {"virtual_batch_size": 3}),
    ((5, 4, 3), {"per_activation": True}), ((8, 7, 5, 3), {"dtype": "mixed_float16"}),
    ((8, 7, 5, 3), {"dtype": "mixed_bfloat16"}), ((3, 2, 2, 2, 3), {}),
):
    layer = BatchNormalization(**arguments)
    layer.build(shape)
    for value in (0.0, 5.3, -1000.3, 1e5, 123456.7):
        if "float16" in arguments.get("dtype", "") and abs(value) > 65504:
            continue
        x, dy = np.full(shape, value, "float32"), draw.normal(size=shape).astype("float32")
        dtype = layer.compute_dtype
        y, dx, *_ = exactness.train(layer, ops.cast(x, dtype), ops.cast(dy, dtype), way)
        results[f"{value}, {shape}, {arguments}"] = float(abs(numpy(y)).max()), bool(np.isfinite(numpy(dx)).all())
print(json.dumps(results))
"""
)
EACH_ARGUMENT = (
    COMMON
    + """
def normalized(x, axes):
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-3)

plain = {"renorm": True, "renorm_clipping": {"rmin": 1, "rmax": 1, "dmax": 0}}  # whose correction is none
for mean in (0, 3, 1000, 1e5):
    x = draw.normal(mean, 1, (10, 12, 6, 4)).astype("float32")
    x64 = x.astype("float64")
    mask = draw.uniform(size=x.shape[:-1]) < 0.7
    mask[0] = False
    poisoned = np.where(mask[..., None], x, 1e6).astype("float32")
    groups = [normalized(x64[i : i + 4], (0, 1, 2)) for i in range(0, 10, 4)]
    cases = {
        "virtual_batch_size": ({"virtual_batch_size": 4}, x, None, np.concatenate(groups)),
        "per_activation": ({"per_activation": True}, x, None, normalized(x64, 0)),
        "renorm": (plain, x, None, normalized(x64, (0, 1, 2))),
        "mask": ({}, poisoned, mask, None),
    }
    for name, (arguments, inputs, mask, expected) in cases.items():
        layer = BatchNormalization(momentum=0.0, **arguments)
        layer.build(x.shape)
        if way == "JAX, jit":
            state = [[v.value for v in vs] for vs in (layer.trainable_variables, layer.non_trainable_variables)]
            call = lambda x: layer.stateless_call(*state, x, training=True, mask=mask)[0]
        else:
            call = lambda x: layer(x, training=True, mask=None if mask is None else ops.convert_to_tensor(mask))
        y = numpy(exactness.compiled(way, call)(ops.convert_to_tensor(inputs)))
        if name == "mask":
            y, expected = y[mask], normalized(x64[mask], 0)
        results[f"{name}, mean {mean:g}"] = float(abs(y - expected).max())
print(json.dumps(results))
"""
)
HALF = (
    COMMON
    + """
for dtype in ("float16", "bfloat16"):
    classes = {"ours": BatchNormalization, "theirs": keras.layers.BatchNormalization}
    layers = {name: layer_class(dtype="mixed_" + dtype) for name, layer_class in classes.items()}
    for layer in layers.values():
        layer.build((16, 14, 14, 8))
    for mean in (0, 10, 100):
        x = ops.cast(draw.normal(mean, 1, (16, 14, 14, 8)).astype("float32"), dtype)
        x64 = numpy(x)
        expected = (x64 - x64.mean((0, 1, 2))) / np.sqrt(x64.var((0, 1, 2)) + 1e-3)
        for name, layer in layers.items():
            y = exactness.train(layer, x, ops.ones_like(x), way)[0]
            results[f"{dtype}, mean {mean}, {name}"] = float(abs(numpy(y) - expected).max())
print(json.dumps(results))
"""
)
EVERY_WAY = [on(backend, way) for backend, ways in WAYS.items() for way in ways]
LONG = [((65536, 8), -1, 3), ((8, 16000, 8), -1, 3), ((4, 2, 40000, 8), -1, 3), ((4, 8, 2, 40000), 1, 3)]
SHAPES = [(256, 8), (8, 100, 8), (8, 14, 14, 8), (4, 5, 6, 7, 8)]
CASES = [(shape, axis, mean) for shape in SHAPES for axis in (-1, 1) for mean in (3, 1e5) if len(shape) > 2 or axis < 0]
CASES += [((8, 14, 14, 8), -1, mean) for mean in (0, 10, 100, 1000)]


def run(program, backend, way, what=None):
    done = run_program("-c", program, backend, way, json.dumps(what), warm=backend == "tensorflow")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_exact(found):
    assert {name: error for name, error in found.items() if not error <= 1e-6} == {}


@pytest.mark.parametrize("backend, way", EVERY_WAY)
def test_training_its_gradients_the_averages_and_inference_are_right_to_1e_6_at_every_mean(backend, way):
    found = run(ERRORS, backend, way, CASES)
    assert len(found) == 7 * len(CASES)
    assert_exact(found)


@pytest.mark.parametrize("backend, way", EVERY_WAY)
def test_long_rows_are_as_exact_as_images(backend, way):
    assert_exact(run(ERRORS, backend, way, LONG))


@pytest.mark.parametrize("backend, way", EVERY_WAY)
def test_groups_masks_activations_and_renorm_are_as_exact(backend, way):
    assert_exact(run(EACH_ARGUMENT, backend, way))


@pytest.mark.parametrize("backend, way", EVERY_WAY)
def test_a_constant_channel_is_beta_exactly(backend, way):
    found = run(CONSTANT, backend, way)
    assert {case: result for case, result in found.items() if result != [0.0, True]} == {}


@pytest.mark.parametrize("backend, way", EVERY_WAY)
def test_half_precision_is_no_worse_than_keras(backend, way):
    found = run(HALF, backend, way)
    ours = {name.removesuffix(", ours"): error for name, error in found.items() if name.endswith("ours")}
    assert len(ours) == 6
    assert {name: error for name, error in ours.items() if not error <= found[f"{name}, theirs"] * (1 + 1e-6)} == {}


def test_an_accelerators_kernel_is_as_exact(monkeypatch):
    """What TensorFlow runs on a GPU without XLA, here on a CPU; channels last, whose sums are more exact there."""
    from benchmarks import exactness
    from bn_keras import BatchNormalization
    from bn_keras.layers import tensorflow_kernels

    monkeypatch.setattr(tensorflow_kernels, "only_cpus", lambda: False)
    draw = np.random.default_rng(0)
    for mean in (0, 3, 1000, 1e5):
        x, dy = (draw.normal(centre, 1, (4, 5, 6, 4)).astype("float32") for centre in (mean, 0))
        assert_exact(exactness.errors(BatchNormalization(momentum=0.0), x, dy, "TensorFlow, graph"))
