"""The exceptions for input that cannot work, and the part of TensorFlow's errors that their messages quote."""

import re


class InputError(ValueError):
    """A flag, file or data set that cannot work.

    The message is one line that names the thing, where it was found, and the fix. The launchers
    print it without a traceback and exit with a non-zero status.
    """


class LostWorkerError(InputError):
    """Another worker process is gone. When all of them are started again, they continue from the last checkpoint."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: try again


_AROUND = "Graph execution error:", "Detected at node", "  File ", "\t"
"""How the lines begin that TensorFlow writes around what an error of a graph says."""


def first_line(error: Exception) -> str:
    """What an error says, without the operations and the stack that TensorFlow writes around it."""
    said = (line for line in str(error).splitlines() if line and not line.startswith(_AROUND))
    return re.sub(r"\{\{\w+ [^}]*\}\} ?| \[Op:\w+\].*", "", next(said, ""))
