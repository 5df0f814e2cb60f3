"""ResNet-18 and ResNet-50, version 1.5: size, geometry and initial weights of Goyal et al., logits of torchvision."""

import importlib.util
import sys
import types
from pathlib import Path

import keras
import numpy as np
import pytest

from bn_keras import VARIANTS, build_network


@pytest.fixture(scope="module")
def small():
    keras.utils.set_random_seed(0)
    return {name: build_network(name, image_size=64, width=0.25, classes=5) for name in ("resnet18", "resnet50")}


@pytest.mark.parametrize("name, parameters", [("resnet18", 11_689_512), ("resnet50", 25_557_032)])
def test_trainable_parameters_are_the_published_count(name, parameters):
    model = build_network(name, image_size=32)
    assert sum(int(np.prod(weight.shape)) for weight in model.trainable_weights) == parameters


def test_a_block_begins_as_the_identity(small):
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype("float32")
    for model in small.values():
        layers = [model.get_layer(f"stage1_block2{part}") for part in ("", "_sum")]
        before, after = (
            keras.Model(model.input, layer.output) for layer in (layers[1].input[1]._keras_history[0], layers[0])
        )
        np.testing.assert_array_equal(before(images), after(images))  # relu of what is not negative, plus 0


def test_a_bottleneck_strides_in_its_3x3(small):
    strides = {
        name: small["resnet50"].get_layer(f"stage2_block1_{name}_conv").strides for name in ("1x1_reduce", "3x3", "1x1")
    }
    assert strides == {"1x1_reduce": (1, 1), "3x3": (2, 2), "1x1": (1, 1)}


def test_only_kernels_have_a_penalty(small):
    for model in small.values():
        for weight in model.trainable_weights:
            assert (weight.regularizer is not None) == (weight.name == "kernel"), weight.path
            assert weight.name != "kernel" or 2 * float(weight.regularizer.l2) == pytest.approx(1e-4)


def test_initial_kernels_are_he_normal_over_their_outputs():
    keras.utils.set_random_seed(0)
    model = build_network("resnet18", image_size=32)
    kernel = model.get_layer("stage3_block2_3x3_1_conv").kernel.numpy()  # 3 x 3 x 256 x 256
    assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 256)), rel=5e-3)
    assert model.get_layer("logits").kernel.numpy().std() == pytest.approx(0.01, rel=5e-3)


def test_the_recipe_is_goyals():
    row = VARIANTS["resnet50"]
    assert row.learning_rate * 256 / 32 == pytest.approx(0.1)
    assert (row.momentum, row.l2_weight, row.schedule, row.decay_epochs) == (0.9, 1e-4, "steps", 10)
    assert row.steps * 32 / 1_281_167 == pytest.approx(90, rel=1e-5)


@pytest.mark.needs("torch", "torchvision")
def test_logits_are_torchvisions(small, monkeypatch):
    """The same weights in torchvision's network, layer by layer in the order of its definition."""
    import torch

    # Its packages load operators that PyPI's torchvision has for CUDA alone; the network's own module needs none.
    folder = Path(importlib.util.find_spec("torchvision").origin).parent
    for name, place in (("torchvision", folder), ("torchvision.models", folder / "models")):
        package = types.ModuleType(name)
        package.__path__ = [str(place)]
        monkeypatch.setitem(sys.modules, name, package)
    theirs_of = importlib.import_module("torchvision.models.resnet")
    ours = build_network("resnet18", image_size=64, classes=5)
    random = np.random.default_rng(0)
    for layer in ours.layers:
        layer.set_weights([random.uniform(0.05, 0.1, weight.shape) for weight in layer.get_weights()])
    theirs = theirs_of.resnet18(num_classes=5).eval()

    def copy(name, conv, norm):
        conv.weight.data = torch.tensor(ours.get_layer(f"{name}_conv").kernel.numpy().transpose(3, 2, 0, 1))
        own = ours.get_layer(f"{name}_bn")
        values = (own.gamma, own.beta, own.moving_mean, own.moving_variance)
        for target, value in zip(
            (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var), values, strict=True
        ):
            target.copy_(torch.tensor(value.numpy()))

    copy("conv1", theirs.conv1, theirs.bn1)
    for stage in range(4):
        for number, block in enumerate(getattr(theirs, f"layer{stage + 1}")):
            name = f"stage{stage + 1}_block{number + 1}"
            copy(f"{name}_3x3_1", block.conv1, block.bn1)
            copy(f"{name}_3x3_2", block.conv2, block.bn2)
            if block.downsample:
                copy(f"{name}_shortcut", *block.downsample)
    theirs.fc.weight.data = torch.tensor(ours.get_layer("logits").kernel.numpy().T)
    theirs.fc.bias.data = torch.tensor(ours.get_layer("logits").bias.numpy())
    images = random.normal(size=(2, 64, 64, 3)).astype("float32")
    expected = theirs(torch.tensor(images.transpose(0, 3, 1, 2))).detach().numpy()
    np.testing.assert_allclose(ours(images), expected, rtol=1e-4)
