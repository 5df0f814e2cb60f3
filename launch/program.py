"""How every program here starts: flags and failures as in `data_prep.program`, then TensorFlow."""

import contextlib
import os
import sys

from bn_keras.errors import InputError
from data_prep import program, signals
from data_prep.errors import InputError as DataInputError


def run(main, doc: str, *, takes_arguments: bool = False, continues: bool = False):
    """`data_prep.program.run` of a launcher.

    Args:
      main: the program; returns an exit status, or None for 0.
      doc: what `--help` says before the flags.
      takes_arguments: whether `main` is called with what stands beside the flags, one list of at least one.
      continues: whether the same command goes on where a signal ended it.
    """
    bad_input = InputError, DataInputError, OSError
    least_arguments = 1 if takes_arguments else None
    program.run(main, doc, bad_input=bad_input, least_arguments=least_arguments, continues=continues)


@contextlib.contextmanager
def loading_tensorflow():
    """Silences what TensorFlow's C++ says on loading; programs load it inside, once their flags are known to be good.

    Its notes (oneDNN is on, the CPU's instructions, no GPU) come before its log level counts, and none is an error: a
    failure to load raises an ImportError.
    """
    signals.watch()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
