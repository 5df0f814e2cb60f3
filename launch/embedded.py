"""The embedded data set, prepared the first time that a program is given no other."""

import contextlib
import fcntl
import os
import sys
import tempfile

from bn_keras.input.dataset import MANIFEST
from data_prep import program, signals

FOLDER = os.path.join("data", "mnist")


def embedded_data(keep: bool = True) -> str:
    """Prepares the MNIST digits in `data/mnist` as data_prep would, unless they are there; returns the folder.

    Of several programs that start at once, one prepares them and the others wait.

    Args:
      keep: False prepares what is not there in a temporary folder instead, which is removed when this program ends.
    """
    if _prepared():
        return FOLDER
    if not keep:
        folder = tempfile.TemporaryDirectory()
        signals.cleanups.append(folder.cleanup)  # without a signal, it goes with the interpreter
        _prepare(folder.name, stdout=os.open(os.devnull, os.O_WRONLY))
        return folder.name
    parent = os.path.dirname(FOLDER)
    os.makedirs(parent, exist_ok=True)
    with _locked(parent):
        if not _prepared():
            _prepare(FOLDER)
    return FOLDER


def _prepared():
    return os.path.exists(os.path.join(FOLDER, MANIFEST))


def _prepare(folder, stdout=None):
    if status := program.run_another("data_prep", "--embedded=mnist", f"--output_dir={folder}", stdout=stdout):
        sys.exit(status)  # data_prep has said why


@contextlib.contextmanager
def _locked(folder):
    """Holds a folder against programs that would write into it, where its file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another program, which prepares {FOLDER}", file=sys.stderr)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
