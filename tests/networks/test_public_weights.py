"""Public weights, read by name, give the logits of the network that they were made for."""

import re
import time

import numpy as np
import pytest
import tensorflow as tf
from conftest import run_program, start_program

from bn_keras import read_dataset
from bn_keras.errors import InputError
from bn_keras.evaluation.trained_network import load_network
from bn_keras.networks.public_weights import read_public_weights
from bn_keras.runs.run_directory import RunDirectory
from bn_keras.training.recipes import make_config

# TF-Slim's nets/inception_v2.py: maps of the convolutions of each branch, in order, by its own module names.
MODULES = {
    "Mixed_3b": ((64,), (64, 64), (64, 96, 96), ("avg", 32)),
    "Mixed_3c": ((64,), (64, 96), (64, 96, 96), ("avg", 64)),
    "Mixed_4a": ((128, 160), (64, 96, 96)),
    "Mixed_4b": ((224,), (64, 96), (96, 128, 128), ("avg", 128)),
    "Mixed_4c": ((192,), (96, 128), (96, 128, 128), ("avg", 128)),
    "Mixed_4d": ((160,), (128, 160), (128, 160, 160), ("avg", 96)),
    "Mixed_4e": ((96,), (128, 192), (160, 192, 192), ("avg", 96)),
    "Mixed_5a": ((128, 192), (192, 256, 256)),
    "Mixed_5b": ((352,), (192, 320), (160, 224, 224), ("avg", 128)),
    "Mixed_5c": ((352,), (192, 320), (192, 224, 224), ("max", 128)),
}
TRAINED_PARAMETERS_AND_STATISTICS = (
    10_173_112  # of the network before its logits, by TF-Slim's own inception_v2_test.py
)


class SlimNetwork:
    """The network as raw TensorFlow operations on named tensors, which are drawn where they are first asked for."""

    def __init__(self, channels, classes, random):
        self.channels, self.classes, self.random = channels, classes, random
        self.tensors = {}

    def tensor(self, name, shape, low, high):
        if name not in self.tensors:
            self.tensors[name] = self.random.uniform(low, high, shape).astype("float32")
        return self.tensors[name]

    def kernel(self, name, *shape):
        most = np.sqrt(6 / np.prod(shape[:3]))  # keeps the deviation from layer to layer
        return self.tensor(f"InceptionV2/{name}", shape, -most, most)

    def normalized(self, x, scope):
        maps, scope = x.shape[-1], f"InceptionV2/{scope}/BatchNorm"
        beta = self.tensor(f"{scope}/beta", maps, -0.5, 0.5)
        mean, variance = (
            self.tensor(f"{scope}/moving_{n}", maps, *r) for n, r in (("mean", (-1, 1)), ("variance", (1, 3)))
        )
        return tf.nn.relu((x - mean) / tf.sqrt(variance + 1e-3) + beta)

    def conv(self, x, maps, size, scope, stride=1):
        kernel = self.kernel(f"{scope}/weights", size, size, x.shape[-1], maps)
        return self.normalized(tf.nn.conv2d(x, kernel, stride, "SAME"), scope)

    def inception(self, x, scope):
        *branches, pool = MODULES[scope] if len(MODULES[scope]) == 4 else (*MODULES[scope], None)
        outputs = []
        for number, maps in enumerate(branches):
            y, strided = x, pool is None
            for k, count in enumerate(maps):
                last = strided and k == len(maps) - 1
                size = 1 if k == 0 else 3
                name = f"Conv2d_{'1a' if last else '0' + 'abc'[k]}_{size}x{size}"
                y = self.conv(y, count, size, f"{scope}/Branch_{number}/{name}", 2 if last else 1)
            outputs.append(y)
        if pool is None:
            outputs.append(tf.nn.max_pool2d(x, 3, 2, "SAME"))
        else:
            pooled = {"avg": tf.nn.avg_pool2d, "max": tf.nn.max_pool2d}[pool[0]](x, 3, 1, "SAME")
            outputs.append(self.conv(pooled, pool[1], 1, f"{scope}/Branch_3/Conv2d_0b_1x1"))
        return tf.concat(outputs, 3)

    def __call__(self, images):
        stem = "Conv2d_1a_7x7"
        depthwise = self.kernel(f"{stem}/depthwise_weights", 7, 7, self.channels, 8)
        pointwise = self.kernel(f"{stem}/pointwise_weights", 1, 1, 8 * self.channels, 64)
        x = tf.nn.separable_conv2d(images, depthwise, pointwise, (1, 2, 2, 1), "SAME")
        x = tf.nn.relu(x + self.tensor(f"InceptionV2/{stem}/biases", 64, -0.5, 0.5))
        x = tf.nn.max_pool2d(x, 3, 2, "SAME")
        x = self.conv(self.conv(x, 64, 1, "Conv2d_2b_1x1"), 192, 3, "Conv2d_2c_3x3")
        x = tf.nn.max_pool2d(x, 3, 2, "SAME")
        for scope in MODULES:
            x = self.inception(x, scope)
        x = tf.reduce_mean(x, (1, 2), keepdims=True)
        scope = "Logits/Conv2d_1c_1x1"
        kernel = self.kernel(f"{scope}/weights", 1, 1, 1024, self.classes)
        return tf.nn.conv2d(x, kernel, 1, "SAME")[:, 0, 0] + self.tensor(
            f"InceptionV2/{scope}/biases", self.classes, -1, 1
        )


def write_checkpoint(tensors, folder):
    """A checkpoint as TensorFlow 1's Saver writes one: names to tensors."""
    path = str(folder / "inception_v2.ckpt")
    tf.raw_ops.SaveV2(
        prefix=path,
        tensor_names=list(tensors),
        shape_and_slices=[""] * len(tensors),
        tensors=[tf.constant(value) for value in tensors.values()],
    )
    return path


def make_checkpoint(folder, channels, classes, images):
    network = SlimNetwork(channels, classes, np.random.default_rng(0))
    logits = network(images).numpy()
    tensors = {**network.tensors, "global_step": np.array(1, "int64")}
    return write_checkpoint(tensors, folder), tensors, logits


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).uniform(-1, 1, (2, 64, 64, 3)).astype("float32")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, images):
    return make_checkpoint(tmp_path_factory.mktemp("slim"), 3, 1001, images)


def test_the_layout_has_as_many_values_as_tf_slims_network(checkpoint):
    _, tensors, _ = checkpoint
    logits = 1024 * 1001 + 1001
    assert sum(value.size for name, value in tensors.items() if name != "global_step") == (
        TRAINED_PARAMETERS_AND_STATISTICS + logits
    )


def test_the_logits_are_those_of_its_own_layout_without_the_background(checkpoint, images):
    path, _, expected = checkpoint
    _, model = read_public_weights(path, image_size=64)
    assert model.output_shape == (None, 1000) and expected.std() > 0.1
    np.testing.assert_allclose(model(images, training=False), expected[:, 1:], atol=2e-4 * np.abs(expected).max())


def test_population_statistics_leave_the_first_convolution_alone(checkpoint):
    _, model = read_public_weights(checkpoint[0], image_size=64)
    frozen = [layer.name for layer in model.layers if layer.name.endswith("_bn") and not layer.trainable]
    assert frozen == ["conv1_7x7_bn"]


def test_a_gamma_and_a_normalized_first_convolution_are_read_where_they_are(checkpoint, tmp_path):
    _, tensors, _ = checkpoint
    random = np.random.default_rng(2)
    stem, other = "InceptionV2/Conv2d_1a_7x7", "InceptionV2/Mixed_5c/Branch_0/Conv2d_0a_1x1/BatchNorm/gamma"
    values = {name: value for name, value in tensors.items() if name != f"{stem}/biases"}
    added = {
        f"{stem}/BatchNorm/{name}": random.uniform(1, 2, 64) for name in ("beta", "moving_mean", "moving_variance")
    }
    values |= {name: value.astype("float32") for name, value in {**added, other: random.uniform(1, 2, 352)}.items()}
    _, model = read_public_weights(write_checkpoint(values, tmp_path), image_size=64)
    gamma, *rest = model.get_layer("conv1_7x7_bn").get_weights()
    assert (gamma == 1).all()
    for found, name in zip(rest, added, strict=True):
        np.testing.assert_array_equal(found, values[name])
    np.testing.assert_array_equal(model.get_layer("inception_5b_1x1_bn").gamma, values[other])


def test_what_is_no_such_checkpoint_is_named(checkpoint, tmp_path):
    _, tensors, _ = checkpoint
    with pytest.raises(InputError, match=r"no file and no TensorFlow checkpoint .*nothing"):
        read_public_weights(str(tmp_path / "nothing"))
    name = "InceptionV2/Mixed_4a/Branch_1/Conv2d_1a_3x3/weights"
    without = {key: value for key, value in tensors.items() if key != name}
    with pytest.raises(InputError, match=f"has no {name}: its other tensors are of a layout that has one"):
        read_public_weights(write_checkpoint(without, tmp_path), image_size=32)
    reshaped = {**tensors, name: tensors[name][:, :, :, 1:]}
    with pytest.raises(InputError, match=r"has \(3, 3, 96, 95\) for .*inception_3c_double_3x3_2_conv"):
        read_public_weights(write_checkpoint(reshaped, tmp_path), image_size=32)


def test_a_file_is_no_run_to_begin_with_but_what_the_refusal_says_makes_one(data_dir, tmp_path):
    images = np.random.default_rng(3).uniform(-1, 1, (2, 32, 32, 1)).astype("float32")
    path, _, expected = make_checkpoint(tmp_path, 1, 4, images)
    dataset, run = read_dataset(str(data_dir)), tmp_path / "run"
    with pytest.raises(InputError, match=r"is no run and no \.keras model") as refused:
        make_config(dataset, "bn_x30", initial_weights=path)
    advice = re.search(r"`launch/import_weights (.*)`", str(refused.value))[1].replace("RUN", str(run))
    command = ("-m", "launch.import_weights", *advice.split(), f"--data_dir={data_dir}", "--image_size=32")
    done = run_program(*command, warm=True)
    assert done.returncode == 0 and "3 classes" in done.stdout, done.stderr
    directory = RunDirectory(str(run))
    assert directory.read_class_names() == ["circle", "square", "stripe"]
    logits = load_network(directory)(images)
    np.testing.assert_allclose(logits, expected[:, 1:], atol=2e-4 * np.abs(expected).max())
    for source in (run, run / "model.keras"):
        assert make_config(dataset, "bn_x30", initial_weights=str(source)).width == 1.0, "the recipe's is another"
    again = run_program(*command, warm=True)
    assert again.returncode == 1 and "holds a run" in again.stderr


def test_a_run_whose_import_was_killed_is_imported_by_the_same_command(data_dir, tmp_path):
    images = np.zeros((1, 32, 32, 1), "float32")
    path, *_ = make_checkpoint(tmp_path, 1, 4, images)
    run = tmp_path / "run"
    command = ["-m", "launch.import_weights", f"--checkpoint={path}", f"--workdir={run}", f"--data_dir={data_dir}"]
    process = start_program(*command, "--image_size=32", warm=True)
    while not (run / "classes.txt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert not (run / "model.keras").exists()
    done = run_program(*command, "--image_size=32", warm=True)
    assert done.returncode == 0 and (run / "model.keras").exists(), done.stderr
