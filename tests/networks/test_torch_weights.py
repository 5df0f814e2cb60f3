"""Public weights in PyTorch's layouts give the logits that PyTorch gives, on the same pixels.

The original networks are written here as operations of PyTorch on tensors of the original names, with their own tables.
"""

import dataclasses

import numpy as np
import pytest
from conftest import run_program

from bn_keras import VARIANTS, InputError
from bn_keras.networks.public_weights import read_public_weights

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.needs("torch")
functional = torch.nn.functional

# Caffe's BN-Inception: 1x1; 3x3 reduce, 3x3; double 3x3 reduce, double 3x3; pool and its projection.
CAFFE = {
    "3a": (64, (64, 64), (64, 96), ("avg", 32)),
    "3b": (64, (64, 96), (64, 96), ("avg", 64)),
    "3c": (0, (128, 160), (64, 96), ("max", 0)),
    "4a": (224, (64, 96), (96, 128), ("avg", 128)),
    "4b": (192, (96, 128), (96, 128), ("avg", 128)),
    "4c": (160, (128, 160), (128, 160), ("avg", 128)),
    "4d": (96, (128, 192), (160, 192), ("avg", 128)),
    "4e": (0, (128, 192), (192, 256), ("max", 0)),
    "5a": (352, (192, 320), (160, 224), ("avg", 128)),
    "5b": (352, (192, 320), (192, 224), ("max", 128)),
}


class Original:
    """A network whose tensors are drawn when they are first asked for."""

    def __init__(self):
        self.random = torch.Generator().manual_seed(0)
        self.state = {}

    def tensor(self, name, *shape, low=-0.3, high=0.3):
        if name not in self.state:
            self.state[name] = low + (high - low) * torch.rand(shape, generator=self.random)
        return self.state[name]

    def conv(self, x, name, maps, size, stride=1, bias=False):
        most = (6 / (x.shape[1] * size**2)) ** 0.5  # keeps the deviation from layer to layer
        kernel = self.tensor(f"{name}.weight", maps, x.shape[1], size, size, low=-most, high=most)
        bias = self.tensor(f"{name}.bias", maps) if bias else None
        return functional.conv2d(x, kernel, bias, stride, padding=size // 2)

    def normalized(self, x, name):
        maps = x.shape[1]
        gamma, beta = self.tensor(f"{name}.weight", maps, low=0.5, high=1.0), self.tensor(f"{name}.bias", maps)
        mean = self.tensor(f"{name}.running_mean", maps)
        variance = self.tensor(f"{name}.running_var", maps, low=0.7, high=1.5)
        self.state[f"{name}.num_batches_tracked"] = torch.tensor(1)
        return functional.batch_norm(x, mean, variance, gamma, beta, eps=1e-5)

    def linear(self, x, name, outputs):
        return functional.linear(
            x, self.tensor(f"{name}.weight", outputs, x.shape[1]), self.tensor(f"{name}.bias", outputs)
        )

    def __call__(self, pixels):
        """From pixels `[N, size, size, 3]` in [0, 255], red first, to logits, as numpy arrays."""
        inputs = torch.tensor(np.ascontiguousarray(self.inputs(pixels).transpose(0, 3, 1, 2)), dtype=torch.float32)
        return self.logits(inputs).numpy()


class BNInception(Original):
    def inputs(self, pixels):
        return pixels[..., ::-1] - np.array((104.0, 117.0, 128.0))

    def block(self, x, name, maps, size, stride=1):
        return functional.relu(self.normalized(self.conv(x, name, maps, size, stride, bias=True), f"{name}_bn"))

    def module(self, x, name, single, triple, double, pool):
        name, stride = f"inception_{name}", 1 if single else 2
        branches = [self.block(x, f"{name}_1x1", single, 1)] if single else []
        y = self.block(x, f"{name}_3x3_reduce", triple[0], 1)
        branches.append(self.block(y, f"{name}_3x3", triple[1], 3, stride))
        y = self.block(x, f"{name}_double_3x3_reduce", double[0], 1)
        y = self.block(y, f"{name}_double_3x3_1", double[1], 3)
        branches.append(self.block(y, f"{name}_double_3x3_2", double[1], 3, stride))
        if stride == 2:
            branches.append(functional.max_pool2d(x, 3, 2, ceil_mode=True))
        else:
            average = {"avg": functional.avg_pool2d, "max": functional.max_pool2d}[pool[0]]
            branches.append(self.block(average(x, 3, 1, padding=1), f"{name}_pool_proj", pool[1], 1))
        return torch.cat(branches, 1)

    def logits(self, x):
        x = functional.max_pool2d(self.block(x, "conv1_7x7_s2", 64, 7, 2), 3, 2, ceil_mode=True)
        x = self.block(self.block(x, "conv2_3x3_reduce", 64, 1), "conv2_3x3", 192, 3)
        x = functional.max_pool2d(x, 3, 2, ceil_mode=True)
        for name, row in CAFFE.items():
            x = self.module(x, name, *row)
        return self.linear(x.mean((2, 3)), "last_linear", 1000)


@dataclasses.dataclass
class ResNet(Original):
    depth: int

    def __post_init__(self):
        super().__init__()

    def inputs(self, pixels):
        return (pixels / 255 - np.array((0.485, 0.456, 0.406))) / np.array((0.229, 0.224, 0.225))

    def block(self, x, name, maps, stride):
        sizes = {18: ((3, maps, stride), (3, maps, 1)), 50: ((1, maps, 1), (3, maps, stride), (1, 4 * maps, 1))}[
            self.depth
        ]
        y = x
        for k, (size, count, by) in enumerate(sizes, 1):
            y = self.normalized(self.conv(y, f"{name}.conv{k}", count, size, by), f"{name}.bn{k}")
            y = functional.relu(y) if k < len(sizes) else y
        if y.shape != x.shape:
            x = self.normalized(self.conv(x, f"{name}.downsample.0", y.shape[1], 1, stride), f"{name}.downsample.1")
        return functional.relu(x + y)

    def logits(self, x):
        x = functional.relu(self.normalized(self.conv(x, "conv1", 64, 7, 2), "bn1"))
        x = functional.max_pool2d(x, 3, 2, padding=1)
        for stage, blocks in enumerate({18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[self.depth]):
            for number in range(blocks):
                x = self.block(x, f"layer{stage + 1}.{number}", 64 * 2**stage, 2 if stage and not number else 1)
        return self.linear(x.mean((2, 3)), "fc", 1000)


ORIGINALS = {"bn_inception": BNInception(), "resnet18": ResNet(18), "resnet50": ResNet(50)}


def pixels_of(size):
    return np.random.default_rng(size).integers(0, 256, (2, size, size, 3)).astype("float32")


def write(original, path):
    original(pixels_of(64))  # draws the tensors
    torch.save(original.state, path)
    return str(path)


@pytest.mark.parametrize("name", ORIGINALS)
@pytest.mark.parametrize("image_size", [224, 226])  # of 226, Caffe's first pool and five strides of ResNet are odd
def test_logits_are_pytorchs_to_1e_4(name, image_size, tmp_path):
    original, pixels = ORIGINALS[name], pixels_of(image_size)
    _, model = read_public_weights(write(original, tmp_path / "weights.pth"), image_size=image_size)
    expected = original(pixels)
    assert expected.std() > 0.5
    np.testing.assert_allclose(model(pixels / 127.5 - 1.0, training=False), expected, rtol=0, atol=1e-4)


@pytest.mark.needs("safetensors")
def test_the_layout_is_known_by_content_in_each_kind_of_file(tmp_path):
    from safetensors.torch import save_file

    original = ORIGINALS["resnet18"]
    expected = read_public_weights(write(original, tmp_path / "weights"), image_size=32)[1].get_weights()
    torch.save(original.state, tmp_path / "old", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": {f"module.{k}": v for k, v in original.state.items()}}, tmp_path / "parallel")
    save_file(original.state, tmp_path / "safe")
    for name in ("old", "parallel", "safe"):
        variant, model = read_public_weights(str(tmp_path / name), image_size=32)
        assert variant == dataclasses.replace(VARIANTS["resnet18"], input_convention="torch")
        for one, other in zip(model.get_weights(), expected, strict=True):
            np.testing.assert_array_equal(one, other)


class Mischief:
    def __reduce__(self):
        return print, ("this pickle ran code",)


def test_a_file_that_could_run_code_is_refused(tmp_path, capfd):
    torch.save({"conv1.weight": Mischief()}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"weights\.pth is no PyTorch file of tensors alone, or damaged"):
        read_public_weights(str(tmp_path / "weights.pth"))
    assert "ran code" not in capfd.readouterr().out


def changed(state, changes):
    return {name: value for name, value in (state | changes).items() if value is not None}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fc.bias": None}, r"has no fc\.bias: its other tensors are of a layout that has one"),
        ({"layer1.0.se.weight": torch.zeros(1)}, r"has layer1\.0\.se\.weight, for which the network has no place"),
        ({"layer4.2.conv1.weight": torch.zeros(1)}, r"is a ResNet of \(2, 2, 2, 3\) blocks: only ResNet-18 and"),
        ({"conv1.weight": torch.zeros(64, 3, 3, 3)}, r"has \(3, 3, 3, 64\) for conv1_conv/kernel, the network"),
        ({"layer1.0.conv1.weight": None}, r"has an unknown layout: .*its tensors are bn1\.bias, "),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, message):
    path = write(ORIGINALS["resnet18"], tmp_path / "weights.pth")
    torch.save(changed(ORIGINALS["resnet18"].state, changes), path)
    with pytest.raises(InputError, match=message):
        read_public_weights(path, image_size=32)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"PK\3\4 and nothing that follows")
    with pytest.raises(InputError, match=r"weights\.pth is no PyTorch file of tensors alone, or damaged \("):
        read_public_weights(str(tmp_path / "weights.pth"))


def test_an_imported_network_is_predicted_with_and_exported_without_a_flag(tmp_path, image_folders):
    """The exported SavedModel and `launch/predict` see a photo as the original network does."""
    import tensorflow as tf

    from bn_keras.input.preprocessing import single_crop

    original, run, names = ORIGINALS["bn_inception"], tmp_path / "run", [f"name {k}" for k in range(1000)]
    path = write(original, tmp_path / "weights.pth")
    (tmp_path / "names.txt").write_text("\n".join(names))
    command = ["-m", "launch.import_weights", f"--checkpoint={path}", f"--workdir={run}", "--image_size=64"]
    done = run_program(*command, f"--class_names={tmp_path / 'names.txt'}", warm=True)
    assert done.returncode == 0 and "1000 classes" in done.stdout, done.stderr
    random = np.random.default_rng(0)
    encoded = tf.io.encode_png(random.integers(0, 256, (80, 70, 3)).astype("uint8")).numpy()
    (tmp_path / "photo.png").write_bytes(encoded)
    expected = torch.tensor(original(single_crop(encoded, image_size=64, channels=3).numpy()[None]))[0].softmax(0)
    done = run_program("-m", "launch.predict", tmp_path / "photo.png", f"--workdir={run}", warm=True)
    best = int(expected.argmax())
    assert done.stdout.splitlines()[1].split(maxsplit=1) == [f"{float(expected[best]):.2%}", names[best]], done.stderr
    done = run_program("-m", "launch.export", f"--workdir={run}", f"--output={tmp_path / 'served'}", warm=True)
    assert done.returncode == 0, done.stderr
    served = tf.saved_model.load(str(tmp_path / "served"))
    np.testing.assert_allclose(served.serve([encoded])["probabilities"][0], expected, rtol=1e-3, atol=1e-7)
