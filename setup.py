from pathlib import Path

from setuptools import find_packages, setup

TENSORFLOW = ">=2.20,<2.22"
LINUX_X86 = "sys_platform == 'linux' and platform_machine == 'x86_64'"
OTHER = "sys_platform != 'linux' or platform_machine != 'x86_64'"

setup(
    name="bn-keras",
    version="0.1.0",
    description="Ioffe & Szegedy (2015), Batch Normalization, reproduced on TensorFlow and Keras",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["bn_keras*", "data_prep*", "launch"]),
    package_data={"bn_keras": ["py.typed", "*.pyi"]},
    install_requires=[
        "absl-py>=2.1",
        "google-crc32c>=1.7",
        "jsonschema>=4.23",
        "keras>=3.13,<3.16",
        "lazy-loader>=0.4",
        "numpy>=2.0",
        "pillow>=11.3",
        "protobuf>=5.28",
        "tensorboard>=2.20,<2.22",
    ],
    extras_require={
        # No TensorFlow is a hard requirement: its distributions exclude each other, and the TPU's stops at 2.20.
        "cpu": [f"tensorflow-cpu{TENSORFLOW}; {LINUX_X86}", f"tensorflow{TENSORFLOW}; {OTHER}"],
        "gpu": [f"tensorflow[and-cuda]{TENSORFLOW}"],
        "tpu": ["tensorflow-tpu>=2.20,<2.21"],
        "imagenet": ["scipy>=1.14"],
        "beam": ["apache-beam>=2.77"],
        "remote": ["fsspec>=2024.2"],
        "onnx": ["onnx>=1.17", "onnxruntime>=1.20", "tf2onnx>=1.16"],
        "readers": ["tensorflow-datasets>=4.9.10", "tfrecord>=1.14"],  # independent readers, for the converter's tests
        "docs": ["pdoc>=15"],
        "demo": ["matplotlib>=3.9", "mlxtend>=0.24"],
        "test": ["hypothesis>=6.100", "mypy>=1.15", "pytest>=8.3", "pytest-xdist>=3.6", "ruff>=0.12", "scipy>=1.14"],
    },
    entry_points={
        "console_scripts": [
            "bn-data-prep = data_prep.__main__:run",
            "bn-train = launch.train:run",
            "bn-benchmark-input = launch.benchmark_input:run",
            "bn-data-service = launch.data_service:run",
            "bn-show-input = launch.show_input:run",
            "bn-report = launch.report:run",
            "bn-evaluate = launch.evaluate:run",
            "bn-predict = launch.predict:run",
            "bn-export = launch.export:run",
            "bn-import-slim = launch.import_slim:run",
            "bn-mnist = launch.mnist:run",
            "bn-results = launch.results:run",
        ]
    },
)
