"""Figure 5 of the paper, made from the network as it is built, with a line for each row of the figure."""

import math

from bn_keras.markdown import table
from bn_keras.networks.build import build_network
from bn_keras.networks.inception import FIGURE_5

_ROWS = ("conv1_7x7", "pool1", "conv2_3x3", "pool2", *(f"inception_{row.name}" for row in FIGURE_5), "logits")
_BRANCHES = ("1x1", "3x3_reduce", "3x3", "double_3x3_reduce", "double_3x3_2", "projection")


def figure_5() -> str:
    """Markdown: output size, feature maps, parameters and multiply-adds, read off the layers of BN-x5 at 224x224."""
    model = build_network("bn_x5")
    layers = {layer.name: layer for layer in model.layers}
    header = ["Row", "Output", "1x1", "3x3 reduce", "3x3", "Double 3x3 reduce", "Double 3x3", "Pool + projection"]
    header += ["Parameters", "Multiply-adds"]
    rows = []
    for row in _ROWS:
        own = [layer for name, layer in layers.items() if name == row or name.startswith(f"{row}_")]
        branches = [layers.get(f"{row}_{branch}_conv") for branch in _BRANCHES]
        maps = [str(layer.filters) if layer else "" for layer in branches]
        if pool := layers.get(f"{row}_pool"):
            kind = type(pool).__name__.removesuffix("Pooling2D").lower()
            maps[-1] = f"{kind} {maps[-1] or 'pass through'}"
        size = "x".join(map(str, layers[row].output.shape[1:]))
        parameters, products = (sum(map(count, own)) for count in (lambda layer: layer.count_params(), _multiply_adds))
        rows.append([row, size, *maps, f"{parameters:,}", f"{products / 1e6:,.1f}e6"])
    products = sum(map(_multiply_adds, model.layers))
    rows.append(["in all", *7 * [""], f"{model.count_params():,}", f"{products / 1e6:,.1f}e6"])
    return table(header, rows)


def _multiply_adds(layer) -> int:
    """The layer's multiply-adds for one image, in its kernels; normalization and pooling are not counted."""
    kernels = [weight for weight in layer.weights if "kernel" in weight.name]
    return sum(math.prod(kernel.shape) for kernel in kernels) * math.prod(layer.output.shape[1:-1])
