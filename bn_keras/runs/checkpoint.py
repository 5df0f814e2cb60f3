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

from bn_keras.runs.run_files import is_whole, newest, replacing, seal, states


def save(
    directory: str,
    step: int,
    arrays: dict[str, np.ndarray],
    texts: Mapping[str, str] | None = None,
    best: int | None = None,
) -> None:
    """Writes a checkpoint under a temporary name, forces it to the disk, renames it, then drops what `keep` does not.

    Args:
      directory: of the run.
      step: that the arrays are of.
      arrays: by name.
      texts: by name; `RunDirectory.texts`.
      best: as in `keep`.

    Raises:
      OSError: the disk is full or not writable; checkpoints written before are untouched.
    """
    _write(os.path.join(directory, f"checkpoint-{step:08d}.npz"), step, arrays, texts)
    keep(directory, step, best)


def save_best(directory: str, step: int, arrays: dict[str, np.ndarray], texts: Mapping[str, str] | None = None) -> None:
    """Writes `best-STEP.npz`, as `save` does, and drops nothing."""
    _write(os.path.join(directory, f"best-{step:08d}.npz"), step, arrays, texts)


def keep(directory: str, step: int, best: int | None) -> None:
    """Drops what a run at `step` no longer needs: all but the last two checkpoints, and all best ones but one.

    Of two checkpoints the one before is the newest that is whole: damaged ones do not count. Files that are not named
    as `save` names them stay.

    Args:
      directory: of the run.
      step: of the last checkpoint.
      best: step of the best one to keep; None keeps all, as does one that is not there.
    """
    found = states(directory)
    before = [path for of, path in found if of < step and _kind(path) == "checkpoint"]
    whole = next((k for k, path in enumerate(before) if is_whole(path)), len(before))
    beaten: dict[int | None, str] = {of: path for of, path in found if _kind(path) == "best"}
    for old in [*before[whole + 1 :], *(beaten.values() if beaten.pop(best, None) else ())]:
        os.remove(old)


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
    return newest(directory, arrays_of)


def arrays_of(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint's bytes, by name."""
    with np.load(io.BytesIO(content)) as file:
        arrays = {name: file[name] for name in file.files}
    return {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}  # texts are bytes
