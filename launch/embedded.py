"""The embedded data set, prepared the first time that a program is given no other."""

import os
import subprocess
import sys

from bn_keras.dataset import MANIFEST

FOLDER = os.path.join("data", "mnist")


def embedded_data() -> str:
    """Prepares the MNIST digits in `data/mnist` as data_prep would, unless they are there; returns the folder."""
    if not os.path.exists(os.path.join(FOLDER, MANIFEST)):
        command = [sys.executable, "-m", "data_prep", "--embedded=mnist", f"--output_dir={FOLDER}"]
        if status := subprocess.run(command, check=False).returncode:
            sys.exit(status)  # data_prep has said why
    return FOLDER
