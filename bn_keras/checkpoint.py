"""Checkpoints: all variables of a run at one step, in one atomically written .npz file.

An .npz is a zip of .npy files, which numpy alone reads:

    >>> numpy.load("runs/bn_x5/checkpoint-00000500.npz")["conv1_7x7_bn/gamma"]

Beside the arrays it holds the texts that a run's directory has, so that it says by itself what it is a state of. Its
last bytes are a digest of all others.
"""

import io
import os
import zipfile
from collections.abc import Mapping

import numpy as np

from bn_keras.run_files import is_whole, newest, replacing, seal, states


def save(directory: str, step: int, arrays: dict[str, np.ndarray], texts: Mapping[str, str] | None = None):
    """Writes a checkpoint under a temporary name, forces it to the disk, renames it, then drops all but the last two.

    The one before is the newest that is whole: damaged ones do not count. Files that `save` did not name stay.

    Args:
      directory: of the run.
      step: that the arrays are of.
      arrays: by name.
      texts: by name; `RunDirectory.texts`.

    Raises:
      OSError: the disk is full or not writable; checkpoints written before are untouched.
    """
    path = os.path.join(directory, f"checkpoint-{step:08d}.npz")
    _write(path, step, arrays, texts)
    before = [old for of, old in states(directory) if of < step and _kind(old) == "checkpoint"]
    whole = next((k for k, old in enumerate(before) if is_whole(old)), len(before))
    for old in before[whole + 1 :]:
        os.remove(old)


def save_best(directory: str, step: int, arrays: dict[str, np.ndarray], texts: Mapping[str, str] | None = None):
    """Writes `best-STEP.npz`, as `save` does."""
    _write(os.path.join(directory, f"best-{step:08d}.npz"), step, arrays, texts)


def keep_best(directory: str, step: int):
    """Drops every best checkpoint but that of a step, if that one is there."""
    best = {of: path for of, path in states(directory) if _kind(path) == "best"}
    if best.pop(step, None):
        for path in best.values():
            os.remove(path)


def _kind(path):
    return os.path.basename(path).partition("-")[0]


def _write(path, step, arrays, texts):
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        with zipfile.ZipFile(temporary, "a") as archive:
            for name, text in (texts or {}).items():
                archive.writestr(zipfile.ZipInfo(name), text)  # of no date: equal states are equal bytes
        seal(temporary, step)


def load_newest(directory: str) -> tuple[int, dict[str, np.ndarray]] | None:
    """The newest checkpoint that is whole, as (step, arrays); a damaged one is named and the one before it is taken.

    Where no checkpoint is whole, the best one is taken.
    """
    return newest(directory, _read_arrays)


def _read_arrays(content):
    with np.load(io.BytesIO(content)) as file:
        arrays = {name: file[name] for name in file.files}
    return {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}  # texts are bytes
