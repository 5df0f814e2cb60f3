"""The package, its extras and its programs; BUILD.md says which extras are for what."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.*)"', (HERE / "bn_keras" / "__init__.py").read_text(encoding="utf-8"), re.M)[1]
# Where a description is read alone, the files that it links to are not there: their links become plain words.
README = re.sub(r"!?\[([^]]*)\]\((?!https?://)[^)]*\)", r"\1", (HERE / "README.md").read_text(encoding="utf-8"))

TENSORFLOW = ">=2.20,<2.22"
LINUX_X86 = "sys_platform == 'linux' and platform_machine == 'x86_64'"
OTHER = "sys_platform != 'linux' or platform_machine != 'x86_64'"
PREP = ["absl-py>=2.1", "google-crc32c>=1.7", "jsonschema>=4.23", "pillow>=11.3"]
PROGRAMS = [
    "benchmark_input",
    "compare",
    "data_service",
    "evaluate",
    "export",
    "import_weights",
    "mnist",
    "predict",
    "report",
    "results",
    "show_input",
    "train",
]

setup(
    name="bn-keras",
    version=VERSION,
    description="Batch Normalization (Ioffe & Szegedy, 2015) on Keras 3: the layer, the networks, and a trainer",
    long_description=README,
    long_description_content_type="text/markdown",
    author="The bn_keras authors",
    license="Apache-2.0",
    keywords=[
        "batch normalization",
        "convolutional neural network",
        "deep learning",
        "image classification",
        "ImageNet",
        "Inception",
        "Keras",
        "reproducibility",
        "TensorFlow",
        "TFRecord",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["bn_keras*", "data_prep*", "launch"]),
    package_data={"": ["*.pyi"], "bn_keras": ["py.typed"]},
    install_requires=["keras>=3.13,<3.16", "numpy>=2.0"],  # the layer's; whoever has Keras has one of its backends
    extras_require={
        "prep": PREP,
        "train": [*PREP, "protobuf>=5.28", "tensorboard>=2.20,<2.22"],
        # No TensorFlow is a hard requirement: its distributions exclude each other, and the TPU's stops at 2.20.
        "cpu": [f"tensorflow-cpu{TENSORFLOW}; {LINUX_X86}", f"tensorflow{TENSORFLOW}; {OTHER}"],
        "gpu": [f"tensorflow[and-cuda]{TENSORFLOW}"],
        "tpu": ["tensorflow-tpu>=2.20,<2.21"],
        "imagenet": ["scipy>=1.14"],
        "beam": ["apache-beam>=2.77"],
        "remote": ["fsspec>=2024.2"],
        "parquet": ["isal>=1.7", "pyarrow>=18"],
        "zip": ["isal>=1.7"],  # inflates and takes checksums faster than Python's zlib
        "tfds": ["importlib_resources>=6.4", "tensorflow-datasets>=4.9.10"],  # which imports it without asking for it
        "heic": ["pillow-heif>=0.22"],
        "onnx": ["onnx>=1.17", "onnxruntime>=1.20", "tf2onnx>=1.16"],
        "torch": ["safetensors>=0.4", "torch>=2.6"],  # reads public weights
        "trackers": ["mlflow-skinny>=3.0", "wandb>=0.20"],
        "readers": ["tensorflow-datasets>=4.9.10", "tfrecord>=1.14"],  # independent readers, for the converter's tests
        "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.29"],
        "lesson": ["jupyterlab>=4.3", "nbconvert>=7.16"],
        "screenshots": ["playwright>=1.50"],
        "demo": ["matplotlib>=3.9", "mlxtend>=0.24"],
        "test": ["hypothesis>=6.100", "mypy>=1.15", "pytest>=8.3", "pytest-xdist>=3.6", "ruff>=0.12", "scipy>=1.14"],
    },
    entry_points={
        "console_scripts": [
            "bn-data-prep = data_prep.__main__:run",
            *(f"bn-{name.replace('_', '-')} = launch.{name}:run" for name in PROGRAMS),
        ]
    },
)
