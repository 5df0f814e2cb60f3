"""Public BN-Inception weights: TF-Slim's `inception_v2` checkpoint into the network of Figure 5, name by name.

TF-Slim's network is Figure 5 with 96 projections in 4c and 4d, but for three things: its modules are named by their
input (3a is `Mixed_3b`), its batch normalization has no gamma, and its first convolution has biases in place of batch
normalization. Its class 0 is "background", which is left out here.
"""

import keras
import numpy as np
import tensorflow as tf

from bn_keras.errors import InputError
from bn_keras.networks.build import build_network
from bn_keras.networks.inception import FIGURE_5
from bn_keras.networks.variants import VARIANTS

SCOPE = "InceptionV2"
VARIANT = VARIANTS["bn_x30"]
"""The row whose network it is: batch normalization, ReLU, no local response normalization, no Dropout."""

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
_CLASSIFIER = "Logits/Conv2d_1c_1x1"


def slim_scopes() -> dict[str, str]:
    """{the name here of a convolution: TF-Slim's scope of it}, for all 69."""
    scopes = {name: f"{SCOPE}/{scope}" for name, scope in _STEM.items()}
    for row, module in zip(FIGURE_5, _MODULES, strict=True):
        branches = _BRANCHES if row.stride == 1 else _STRIDED_BRANCHES
        scopes |= {f"inception_{row.name}_{name}": f"{SCOPE}/Mixed_{module}/{b}" for name, b in branches.items()}
    return scopes


def read_slim_checkpoint(path: str, *, image_size: int = 224) -> keras.Model:
    """The network with a checkpoint's weights.

    Args:
      path: of the checkpoint, `inception_v2.ckpt`, as TensorFlow names it.
      image_size: height and width of the input in pixels.

    Returns:
      A model from images float32 `[N, image_size, image_size, channels]` in [-1, 1] to logits float32 `[N, classes]`;
      the checkpoint's 1001 classes but for the background are 1000.

    Raises:
      InputError: there is no checkpoint, or a variable is missing or of another shape.
    """
    try:
        reader = tf.train.load_checkpoint(path)
    except (ValueError, tf.errors.OpError) as error:
        raise InputError(f"no TensorFlow checkpoint {path} ({str(error).splitlines()[0]})") from None
    shapes = reader.get_variable_to_shape_map()

    def read(name):
        if name not in shapes:
            raise InputError(f"{path} has no variable {name}: it is not of TF-Slim's inception_v2")
        return reader.get_tensor(name)

    scopes = slim_scopes()
    stem = scopes["conv1_7x7"]
    classifier = read(f"{SCOPE}/{_CLASSIFIER}/weights")[0, 0]
    channels, classes = read(f"{stem}/depthwise_weights").shape[2], classifier.shape[1] - 1
    model = build_network(VARIANT, image_size=image_size, channels=channels, classes=classes)

    def assign(layer_name, values):
        layer = model.get_layer(layer_name)
        for variable, value in zip(layer.weights, values, strict=True):
            if variable.shape != value.shape:
                raise InputError(f"{path} has {value.shape} for {variable.path}, the network {variable.shape}")
        layer.set_weights(values)

    for name, scope in scopes.items():
        kernels = ("depthwise_weights", "pointwise_weights") if scope == stem else ("weights",)
        assign(f"{name}_conv", [read(f"{scope}/{kernel}") for kernel in kernels])
        if f"{scope}/BatchNorm/beta" in shapes:
            beta, mean, variance = (read(f"{scope}/BatchNorm/{n}") for n in ("beta", "moving_mean", "moving_variance"))
            gamma = read(f"{scope}/BatchNorm/gamma") if f"{scope}/BatchNorm/gamma" in shapes else np.ones_like(beta)
        else:
            beta = read(f"{scope}/biases")
            layer = model.get_layer(f"{name}_bn")
            gamma, mean, variance = np.ones_like(beta), np.zeros_like(beta), np.full_like(beta, 1.0 - layer.epsilon)
            layer.trainable = False  # there is nothing to normalize: population statistics pass it by
        assign(f"{name}_bn", [gamma, beta, mean, variance])
    assign("logits", [classifier[:, 1:], read(f"{SCOPE}/{_CLASSIFIER}/biases")[1:]])
    return model
