"""Checkpoints: all variables of a run at one step, in one atomically written .npz file.

An .npz is a zip of .npy files, which numpy alone reads:

    >>> numpy.load("runs/bn_x5/checkpoint-00000500.npz")["conv1_7x7_bn/gamma"]

Beside the arrays it holds a copy of the run's `run.json` and `classes.txt`, so that a checkpoint alone says which run
it belongs to. Its last bytes are a digest of all others.
"""

import io
import os
import zipfile
from collections.abc import Mapping

import numpy as np

from bn_keras import storage
from bn_keras.runs.run_files import is_whole, newest, replacing, seal, states


def save(
    directory: str,
    step: int,
    arrays: dict[str, np.ndarray],
    texts: Mapping[str, str] | None = None,
    best: int | None = None,
) -> None:
    """Writes a checkpoint under a temporary name, forces it to the disk, renames it, and then calls `keep`.

    Args:
      directory: the run's directory.
      step: the step that the arrays are of.
      arrays: the value of each variable, by name.
      texts: the texts to hold beside them, `RunDirectory.texts`.
      best: passed to `keep`.

    Raises:
      OSError: the disk is full or not writable; checkpoints written before are untouched.
    """
    _write(os.path.join(directory, f"checkpoint-{step:08d}.npz"), step, arrays, texts)
    keep(directory, step, best)


def save_best(directory: str, step: int, arrays: dict[str, np.ndarray], texts: Mapping[str, str] | None = None) -> None:
    """Writes `best-STEP.npz` in the same way, and removes nothing."""
    _write(os.path.join(directory, f"best-{step:08d}.npz"), step, arrays, texts)


def keep(directory: str, step: int, best: int | None) -> None:
    """Removes what a run at `step` no longer needs: all but the last two checkpoints, and all best ones but one.

    Damaged checkpoints do not count as one of the two. Files whose names are not those of checkpoints stay.

    Args:
      directory: the run's directory.
      step: the step of the last checkpoint.
      best: the step of the best checkpoint to keep. All best ones stay if it is None, or if there is none of that step.
    """
    found = states(directory)
    before = [path for of, path in found if of < step and _kind(path) == "checkpoint"]
    whole = next((k for k, path in enumerate(before) if is_whole(path)), len(before))
    beaten: dict[int | None, str] = {of: path for of, path in found if _kind(path) == "best"}
    for old in [*before[whole + 1 :], *(beaten.values() if beaten.pop(best, None) else ())]:
        storage.remove(old)


def _kind(path):
    return os.path.basename(path).partition("-")[0]


def _write(path, step, arrays, texts):
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        with zipfile.ZipFile(temporary, "a") as archive:
            for name, text in (texts or {}).items():
                archive.writestr(zipfile.ZipInfo(name), text)  # without a date: equal states are equal bytes
        seal(temporary, step)


def load_newest(directory: str) -> tuple[int, dict[str, np.ndarray]] | None:
    """(step, arrays) of the newest whole checkpoint, or of the best one if no other is whole; names damaged ones."""
    return newest(directory, arrays_of)


def load_best(directory: str) -> tuple[int, dict[str, np.ndarray]] | None:
    """The checkpoint of the best evaluation, if there is one that is whole, as (step, arrays)."""
    return newest(directory, arrays_of, kind="best")


def arrays_of(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint's bytes, by name."""
    with np.load(io.BytesIO(content)) as file:
        arrays = {name: file[name] for name in file.files}
    return {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}  # texts are bytes
