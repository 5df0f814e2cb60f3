"""An exported network gives what the trained one gives, in each format, to 1e-5."""

import importlib.util
import json

import keras
import numpy as np
import pytest
from conftest import run_program
from PIL import Image

from bn_keras.runs.run_directory import RunDirectory

ONLY_TENSORFLOW = """
import json, sys

for name in ("keras", "tf_keras", "bn_keras", "launch", "data_prep"):
    sys.modules[name] = None  # importing it fails
import tensorflow as tf
model = tf.saved_model.load(sys.argv[1])
encoded = tf.constant([open(path, "rb").read() for path in sys.argv[2:]])
for function in (model.serve, model.signatures["serving_default"]):
    found = {name: value.numpy() for name, value in function(encoded).items()}
print(json.dumps({
    "probabilities": found["probabilities"].tolist(),
    "classes": [[name.decode() for name in row] for row in found["top_classes"]],
    "top": found["top_probabilities"].tolist(),
}))
"""


@pytest.fixture(scope="module")
def run(trained_runs):
    return trained_runs[1]


@pytest.fixture(scope="module")
def trained(run):
    import bn_keras.layers  # noqa: F401 (registers them)

    return keras.models.load_model(run / "model.keras")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(-1, 1, (5, 32, 32, 1)).astype("float32")


def export(run, output, *flags):
    return run_program("-m", "launch.export", f"--workdir={run}", f"--output={output}", *flags, warm=True)


@pytest.mark.slow
@pytest.mark.parametrize("folded", [True, False])
def test_a_fresh_process_loads_a_file_with_one_import(run, trained, images, tmp_path, folded):
    path = run / "model.keras"
    if folded:
        path = tmp_path / "folded.keras"
        assert export(run, path, "--format=keras").returncode == 0
    np.save(tmp_path / "images.npy", images)
    load = "import sys, keras, numpy as np, bn_keras.layers; model = keras.models.load_model(sys.argv[1]); "
    predict = "np.save(sys.argv[3], model(np.load(sys.argv[2]), training=False))"
    done = run_program("-c", load + predict, path, tmp_path / "images.npy", tmp_path / "logits.npy")
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "logits.npy")
    np.testing.assert_allclose(found, trained(images, training=False), rtol=1e-5, atol=1e-5)


def test_keras(run, trained, images, tmp_path):
    done = export(run, tmp_path / "model.keras", "--format=keras")
    assert done.returncode == 0, done.stderr
    again = keras.models.load_model(tmp_path / "model.keras")
    assert not any("Normalization" in type(layer).__name__ for layer in again.layers)
    np.testing.assert_allclose(again(images), trained(images, training=False), rtol=1e-5, atol=1e-5)


def test_a_saved_model_takes_image_files_in_a_process_that_has_only_tensorflow(run, trained, tmp_path):
    from bn_keras.evaluation.trained_network import image_view
    from bn_keras.input.preprocessing import to_network_range

    done = export(run, tmp_path / "model")
    assert done.returncode == 0, done.stderr
    pixels = np.random.default_rng(1).integers(0, 256, (40, 61), "uint8")
    encoded = []
    paths = [tmp_path / name for name in ("a.jpg", "b.png", "c.jpg", "d.gif", "e.bmp", "f.webp")]
    for path in paths:
        image = Image.fromarray(np.dstack([pixels] * 3) if path.name in ("c.jpg", "f.webp") else pixels)
        image.save(path, **{"lossless": True} if path.suffix == ".webp" else {})
        encoded.append(path.read_bytes())
    done = run_program("-c", ONLY_TENSORFLOW, tmp_path / "model", *paths)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    view = image_view(RunDirectory(str(run)).read_config())
    views = np.stack([to_network_range(view(each)) for each in encoded])
    expected = keras.ops.softmax(trained(views, training=False)).numpy()
    np.testing.assert_allclose(found["probabilities"], expected, atol=1e-5)
    np.testing.assert_allclose(expected[3:], expected[[1, 1, 1]], atol=1e-6)  # of the same gray pixels, without loss
    order = np.argsort(-expected, 1)
    names = np.array(["circle", "square", "stripe"])
    assert found["classes"] == names[order].tolist()
    np.testing.assert_allclose(found["top"], np.take_along_axis(expected, order, 1), atol=1e-5)


@pytest.mark.needs("onnxruntime", "tf2onnx")
def test_onnx(run, trained, images, tmp_path):
    import onnxruntime

    done = export(run, tmp_path / "model.onnx", "--format=onnx")
    assert done.returncode == 0, done.stderr
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: images})
    np.testing.assert_allclose(logits, trained(images, training=False), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_exported_is_one_clear_line(run, tmp_path):
    (tmp_path / "there").mkdir()
    onnx_there = importlib.util.find_spec("tf2onnx") and importlib.util.find_spec("onnx")
    for output, flags, message in (
        (tmp_path / "there", (), "there exists"),
        (tmp_path / "model", ("--format=keras",), "must end in .keras"),
        *([] if onnx_there else [(tmp_path / "model", ("--format=onnx",), "onnx is not installed; fix: pip install")]),
    ):
        done = export(run, output, *flags)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
