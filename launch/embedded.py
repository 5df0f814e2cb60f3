"""Prepares the embedded data set when a program is first started without another one."""

import contextlib
import fcntl
import os
import sys
import tempfile

from bn_keras.input.dataset import MANIFEST
from data_prep import program, signals

FOLDER = os.path.join("data", "mnist")


def embedded_data(keep: bool = True) -> str:
    """Prepares the MNIST digits in `data/mnist`, as data_prep would, unless they are there; returns the folder.

    If several programs start at once, one prepares them and the others wait.

    Args:
      keep: False prepares missing digits in a temporary folder instead, which is removed when the program ends.
    """
    if _prepared():
        return FOLDER
    if not keep:
        folder = tempfile.TemporaryDirectory()
        signals.cleanups.append(folder.cleanup)  # if no signal comes, the interpreter removes it at its end
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
        sys.exit(status)  # data_prep has already said why it failed


@contextlib.contextmanager
def _locked(folder):
    """Locks a folder against other programs that would write into it, if its file system has locks."""
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
