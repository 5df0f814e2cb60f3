"""Reads public, pretrained weights into these networks.

Three layouts of files are known, and told apart by the names of their tensors:

    TF-Slim's inception_v2        Figure 5 with 96 projections in 4c and 4d, but its modules are named by their input
                                  (3a is Mixed_3b), its batch normalization has no gamma, its first convolution has
                                  biases in place of batch normalization, and its class 0 is "background", which is
                                  left out here
    PyTorch's BN-Inception        ported from Caffe by pretrained-models.pytorch: another reading of Figure 5
                                  (docs/paper.md). Its biases before batch normalization become part of the moving
                                  means here
    torchvision's ResNet-18, -50  also timm's
"""

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from bn_keras.errors import InputError, first_line
from bn_keras.networks.build import build_network
from bn_keras.networks.inception import FIGURE_5
from bn_keras.networks.resnet import EXPANSION, STAGES
from bn_keras.networks.variants import VARIANTS, Variant

_STEM = {"conv1_7x7": "Conv2d_1a_7x7", "conv2_3x3_reduce": "Conv2d_2b_1x1", "conv2_3x3": "Conv2d_2c_3x3"}
_MODULES = ("3b", "3c", "4a", "4b", "4c", "4d", "4e", "5a", "5b", "5c")  # TF-Slim's names of Figure 5's rows
_BRANCHES = {
    "1x1": "Branch_0/Conv2d_0a_1x1",
    "3x3_reduce": "Branch_1/Conv2d_0a_1x1",
    "3x3": "Branch_1/Conv2d_0b_3x3",
    "double_3x3_reduce": "Branch_2/Conv2d_0a_1x1",
    "double_3x3_1": "Branch_2/Conv2d_0b_3x3",
    "double_3x3_2": "Branch_2/Conv2d_0c_3x3",
    "projection": "Branch_3/Conv2d_0b_1x1",
}
_STRIDED_BRANCHES = {
    "3x3_reduce": "Branch_0/Conv2d_0a_1x1",
    "3x3": "Branch_0/Conv2d_1a_3x3",
    "double_3x3_reduce": "Branch_1/Conv2d_0a_1x1",
    "double_3x3_1": "Branch_1/Conv2d_0b_3x3",
    "double_3x3_2": "Branch_1/Conv2d_1a_3x3",
}

_BLOCK = {18: ("3x3_1", "3x3_2"), 50: ("1x1_reduce", "3x3", "1x1")}
"""The convolutions of a residual block here, in torchvision's order."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a file holds, in this project's terms.

    Attributes:
      variant: the row that describes the network.
      weights: {layer: its weights}, in the order of the Keras layer.
      frozen: the normalization layers that normalize nothing; population statistics leave them out.
    """

    variant: Variant
    weights: dict[str, list[np.ndarray]]
    frozen: tuple[str, ...] = ()


def read_public_weights(path: str, *, image_size: int = 224) -> tuple[Variant, keras.Model]:
    """The network that a file holds; the names of its tensors show which it is.

    Args:
      path: the path of a PyTorch or safetensors file, or a TensorFlow checkpoint's name as TensorFlow takes it
        (`inception_v2.ckpt`). Nothing that a file holds is executed.
      image_size: height and width of the input in pixels.

    Returns:
      The row that describes the network, and a model from images float32 `[N, image_size, image_size, channels]` in
      [-1, 1], red first, to logits float32 `[N, classes]`. The model itself turns such images into the pixels that it
      was trained on.

    Raises:
      InputError: the file is missing, damaged or of an unknown layout; a tensor is missing or has another shape.
      ModuleNotFoundError: PyTorch or safetensors, which the file needs, is not installed.
    """
    tensors = _Tensors(path)
    if (found := next((mark for mark in _LAYOUTS if mark in tensors), None)) is None:
        raise InputError(
            f"{path} has an unknown layout: known are (TF-Slim's inception_v2, PyTorch's bn_inception, torchvision's "
            f"ResNet-18 and ResNet-50): its tensors are {', '.join(sorted(tensors.names)[:3]) or 'none'}, ..."
        )
    layout = _LAYOUTS[found](tensors)
    tensors.check_that_all_are_used()
    kernel, *_ = layout.weights["logits"]
    stem = next(iter(layout.weights.values()))[0]
    model = build_network(layout.variant, image_size=image_size, channels=stem.shape[2], classes=kernel.shape[1])
    for name, values in layout.weights.items():
        layer = model.get_layer(name)
        for variable, value in zip(layer.weights, values, strict=True):
            if variable.shape != value.shape:
                raise InputError(f"{path} has {value.shape} for {variable.path}, the network {variable.shape}")
        layer.set_weights(values)
        layer.trainable = name not in layout.frozen
    return layout.variant, model


class _Tensors:
    """The tensors of a file by name; remembers which have been read."""

    def __init__(self, path: str):
        self.path = path
        if os.path.exists(f"{path}.index"):
            self.names: Collection[str]
            self.names, self._get = _open_tensorflow(path)
            self._unused: set[str] = set()  # a training checkpoint also holds the optimizer's tensors
        else:
            values = _load_torch(path)
            self.names, self._get = values.keys(), values.__getitem__
            self._unused = {name for name in values if not name.endswith("num_batches_tracked")}

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.names:
            raise InputError(f"{self.path} has no {name}: its other tensors are of a layout that has one")
        self._unused.discard(name)
        return np.asarray(self._get(name), "float32")

    def check_that_all_are_used(self) -> None:
        if self._unused:
            raise InputError(f"{self.path} has {min(self._unused)}, for which the network has no place")


def _open_tensorflow(path) -> tuple[Mapping[str, Any], Callable]:
    try:
        reader = tf.train.load_checkpoint(path)
    except (ValueError, tf.errors.OpError) as error:
        raise InputError(f"no TensorFlow checkpoint {path} ({first_line(error)})") from None
    return reader.get_variable_to_shape_map(), reader.get_tensor


def _load_torch(path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise InputError(f"no file and no TensorFlow checkpoint {path} ({error.strerror})") from None
    try:
        if start[8:] == b"{":
            from safetensors.torch import load_file

            values = load_file(path)
        else:
            import torch

            values = torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # whatever zipfile, pickle and torch raise for damaged bytes, or for more than tensors
        raise InputError(f"{path} is no PyTorch file of tensors alone, or damaged ({first_line(error)})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no tensors by name, but {type(values).__name__}")
    values = values.get("state_dict", values)
    return {name.removeprefix("module."): value.float().numpy() for name, value in values.items()}


def _slim(tensors):
    """TF-Slim's inception_v2, also with gammas and with a normalized first convolution, if the file has them."""
    scopes = {name: f"InceptionV2/{scope}" for name, scope in _STEM.items()}
    for row, module in zip(FIGURE_5, _MODULES, strict=True):
        branches = _BRANCHES if row.stride == 1 else _STRIDED_BRANCHES
        scopes |= {f"inception_{row.name}_{name}": f"InceptionV2/Mixed_{module}/{b}" for name, b in branches.items()}
    variant, weights, frozen = VARIANTS["bn_x30"], {}, tuple[str, ...]()
    for name, scope in scopes.items():
        kernels = ("depthwise_weights", "pointwise_weights") if name == "conv1_7x7" else ("weights",)
        weights[f"{name}_conv"] = [tensors[f"{scope}/{kernel}"] for kernel in kernels]
        scope_bn = f"{scope}/BatchNorm"
        if f"{scope_bn}/beta" in tensors:
            beta, mean, variance = (tensors[f"{scope_bn}/{n}"] for n in ("beta", "moving_mean", "moving_variance"))
            gamma = tensors[f"{scope_bn}/gamma"] if f"{scope_bn}/gamma" in tensors else np.ones_like(beta)
        else:
            beta = tensors[f"{scope}/biases"]
            gamma, mean, variance = np.ones_like(beta), np.zeros_like(beta), np.full_like(beta, 1 - variant.epsilon)
            frozen += (f"{name}_bn",)
        weights[f"{name}_bn"] = [gamma, beta, mean, variance]
    classifier = "InceptionV2/Logits/Conv2d_1c_1x1"
    weights["logits"] = [tensors[f"{classifier}/weights"][0, 0, :, 1:], tensors[f"{classifier}/biases"][1:]]
    return Layout(variant, weights, frozen)


def _bn_inception(tensors):
    """PyTorch's BN-Inception. Its input is blue, green, red, so the first kernel's channels are reversed."""
    names = {"conv1_7x7": "conv1_7x7_s2", "conv2_3x3_reduce": "conv2_3x3_reduce", "conv2_3x3": "conv2_3x3"}
    for row in FIGURE_5:
        for branch in _BRANCHES if row.stride == 1 else _STRIDED_BRANCHES:
            name = f"inception_{row.name}_{branch}"
            names[name] = name.replace("projection", "pool_proj")
    weights = {}
    for name, theirs in names.items():
        kernel = _kernel(tensors[f"{theirs}.weight"])
        weights[f"{name}_conv"] = [kernel[:, :, ::-1] if name == "conv1_7x7" else kernel]
        gamma, beta, mean, variance = _normalization(tensors, f"{theirs}_bn")
        weights[f"{name}_bn"] = [gamma, beta, mean - tensors[f"{theirs}.bias"], variance]
    weights["logits"] = [tensors["last_linear.weight"].T, tensors["last_linear.bias"]]
    variant = dataclasses.replace(
        VARIANTS["bn_x30"],
        separable_stem=False,
        projection_4c_4d=128,
        padding="caffe",
        epsilon=1e-5,
        input_convention="caffe",
    )
    return Layout(variant, weights)


def _resnet(tensors):
    """torchvision's ResNet-18 or ResNet-50."""
    blocks = {name.rpartition(".conv1.")[0] for name in tensors.names if name.startswith("layer") and ".conv1." in name}
    stages = tuple(sum(block.startswith(f"layer{stage}.") for block in blocks) for stage in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in tensors
    depth = next((d for d, known in STAGES.items() if known == stages and (EXPANSION[d] > 1) == bottleneck), None)
    if depth is None:
        raise InputError(f"{tensors.path} is a ResNet of {stages} blocks: only ResNet-18 and ResNet-50 are known")
    names = {"conv1": ("conv1", "bn1")}
    for block in sorted(blocks):
        stage, number = block.removeprefix("layer").split(".")
        here = f"stage{stage}_block{int(number) + 1}"
        for k, name in enumerate(_BLOCK[depth], 1):
            names[f"{here}_{name}"] = (f"{block}.conv{k}", f"{block}.bn{k}")
        if f"{block}.downsample.0.weight" in tensors:
            names[f"{here}_shortcut"] = (f"{block}.downsample.0", f"{block}.downsample.1")
    weights = {}
    for name, (convolution, normalization) in names.items():
        weights[f"{name}_conv"] = [_kernel(tensors[f"{convolution}.weight"])]
        weights[f"{name}_bn"] = _normalization(tensors, normalization)
    weights["logits"] = [tensors["fc.weight"].T, tensors["fc.bias"]]
    return Layout(dataclasses.replace(VARIANTS[f"resnet{depth}"], input_convention="torch"), weights)


_LAYOUTS = {
    "InceptionV2/Conv2d_1a_7x7/depthwise_weights": _slim,
    "conv1_7x7_s2.weight": _bn_inception,
    "layer1.0.conv1.weight": _resnet,
}
"""The layouts, each by a tensor that no other layout has."""


def _kernel(value):
    """Turns PyTorch's [maps, channels, height, width] into [height, width, channels, maps]."""
    return value.transpose(2, 3, 1, 0)


def _normalization(tensors, name):
    """gamma, beta, mean and variance; older files have them as [1, maps]."""
    return [tensors[f"{name}.{part}"].reshape(-1) for part in ("weight", "bias", "running_mean", "running_var")]
