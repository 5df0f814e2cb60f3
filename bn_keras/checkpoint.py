"""Checkpoints: all variables of a run at one step, in one atomically written .npz file.

An .npz is a zip of .npy files, so every array carries a CRC-32 and numpy alone reads it:

    >>> numpy.load("runs/bn_x5/checkpoint-00000500.npz")["conv1_7x7_bn/gamma"]
"""

import glob
import os
import zipfile

import numpy as np
from absl import logging

KEPT = 2


def save(directory: str, step: int, arrays: dict[str, np.ndarray]):
    """Writes a checkpoint under a temporary name, forces it to the disk, renames it, then drops all but the last two.

    Raises:
      OSError: the disk is full or not writable; checkpoints written before are untouched.
    """
    _write(os.path.join(directory, f"checkpoint-{step:08d}.npz"), arrays)
    for old in _existing(directory)[:-KEPT]:
        os.remove(old)


def save_best(directory: str, step: int, arrays: dict[str, np.ndarray]):
    """Writes `best-STEP.npz` in place of any other best one, as `save` does."""
    path = os.path.join(directory, f"best-{step:08d}.npz")
    _write(path, arrays)
    for old in glob.glob(os.path.join(glob.escape(directory), "best-*.npz")):
        if old != path:
            os.remove(old)


def _write(path, arrays):
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def load_newest(directory: str) -> tuple[int, dict[str, np.ndarray]] | None:
    """The newest checkpoint that is whole, as (step, arrays); a damaged one is named and the one before it is taken."""
    for path in reversed(_existing(directory)):
        try:
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            logging.warning("checkpoint %s is damaged (%s); trying the one before it", path, error)
            continue
        return int(os.path.basename(path).removeprefix("checkpoint-").removesuffix(".npz")), arrays
    return None


def newest_path(directory: str) -> str | None:
    """The path of the newest checkpoint, whole or not; None where there is none."""
    return max(_existing(directory), default=None)


def _existing(directory):
    return sorted(glob.glob(os.path.join(glob.escape(directory), "checkpoint-*.npz")))
