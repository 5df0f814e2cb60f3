"""Starts every program here: flags and failures are handled as in `data_prep.program`, then TensorFlow is loaded."""

import contextlib
import functools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import NoReturn

from absl import flags

from bn_keras import storage
from bn_keras.errors import InputError, first_line
from data_prep import program, signals
from data_prep.errors import InputError as DataInputError


def run(
    main: Callable[..., int | None], doc: str, *, takes_arguments: bool = False, continues: bool = False
) -> NoReturn:
    """Runs a launcher, by `data_prep.program.run`.

    Args:
      main: the program; returns an exit status, or None for 0.
      doc: what `--help` says before the flags.
      takes_arguments: whether `main` takes a list of at least one argument beside the flags.
      continues: whether the same command continues after a signal has ended it.
    """
    bad_input = InputError, DataInputError, OSError
    least_arguments = 1 if takes_arguments else None

    @functools.wraps(main)
    def speaking_of_flags(*arguments):
        _check_urls()
        try:
            return main(*arguments)
        except InputError as error:
            raise type(error)(as_flags(str(error))) from error
        except Exception as error:
            if type(error).__name__ not in ("MemoryError", "ResourceExhaustedError"):  # Python's and TensorFlow's
                raise
            fixes = {"batch_size": "a smaller", "eval_batch_size": "a smaller", "accumulate": "a larger"}
            fix = " or ".join(f"{what} --{name}" for name, what in fixes.items() if name in flags.FLAGS)
            reason = first_line(error) or "Python's"
            raise InputError(f"not enough memory ({reason}): give {fix or 'fewer or smaller images'}") from error

    program.run(
        speaking_of_flags,
        doc,
        extra="train",
        bad_input=bad_input,
        least_arguments=least_arguments,
        continues=continues,
    )


_IN_BUCKETS = {"data_dir", "initial_weights", "output_dir", "workdir"}
"""The flags that may be the URL of a file or folder."""


def _check_urls():
    """Refuses a URL in a flag that needs a path of this machine, and a URL whose store does not answer."""
    for name in set(flags.FLAGS) - {"tpu"}:
        value = flags.FLAGS[name].value
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, str) and storage.is_remote(path):
                if name not in _IN_BUCKETS:
                    raise InputError(f"--{name}={path}: no bucket can be given there; fix: give a path of this machine")
                storage.exists(path)


def check_output(path: str, *endings: str) -> None:
    """Makes the folder of --output; refuses, before any work, a file that could not be written in the end.

    Raises:
      InputError: its name has none of these endings, or a folder has its name.
      OSError: the folder cannot be made or written to.
    """
    if not path.lower().endswith(endings):
        raise InputError(f"--output={path} ends in none of {', '.join(endings)}")
    if os.path.isdir(path):
        raise InputError(f"--output={path} is a folder: name a file")
    check_folder(os.path.dirname(path))


def check_folder(path: str) -> None:
    """Makes a folder, if it is a local one; OSError if it cannot be written to."""
    storage.make_folder(path or ".")
    if not storage.is_remote(path):
        tempfile.TemporaryFile(dir=path or ".").close()


_FLAGS_OF_ARGUMENTS = {"directory": "workdir", "skipped": "on_bad=skip"}
"""The flags whose names differ from the library's argument."""


def as_flags(text: str) -> str:
    """A message of the library, with its arguments, such as `batch_size=1`, written as the program's flags."""

    def flag(found):
        name = _FLAGS_OF_ARGUMENTS.get(found["name"], found["name"])
        if name.partition("=")[0] not in flags.FLAGS:
            return found[0]
        if found["value"] in ("=True", "=False"):
            return f"--{'no' * (found['value'] == '=False')}{name}"
        return f"--{name}{found['value'] or ''}"

    return re.sub(r"`(?P<name>\w+)(?P<value>=[^`]*)?`", flag, text)


@contextlib.contextmanager
def loading_tensorflow() -> Iterator[None]:
    """A `with` block in which programs load TensorFlow, once their flags are known to be good.

    It turns oneDNN on, with which a step of BN-x5 at 224x224 takes 2.9 s instead of 3.8, and which TensorFlow leaves
    off on CPUs without AVX-512. A value of TF_ENABLE_ONEDNN_OPTS that is set outside is kept.

    It also silences stderr: TensorFlow prints notes (oneDNN is on, the CPU's instructions, no GPU) before its log level
    takes effect. None of them is an error, as a failure to load raises an ImportError.
    """
    signals.watch()
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
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
