"""How every program here starts: flags and failures as in `data_prep.program`, then TensorFlow."""

import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from absl import flags

from bn_keras.errors import InputError
from data_prep import program, signals
from data_prep.errors import InputError as DataInputError


def run(
    main: Callable[..., int | None], doc: str, *, takes_arguments: bool = False, continues: bool = False
) -> NoReturn:
    """`data_prep.program.run` of a launcher.

    Args:
      main: the program; returns an exit status, or None for 0.
      doc: what `--help` says before the flags.
      takes_arguments: whether `main` is called with what stands beside the flags, one list of at least one.
      continues: whether the same command goes on where a signal ended it.
    """
    for name in flags.FLAGS:
        kind = flags.FLAGS[name].parser
        if isinstance(kind, (flags.FloatParser, flags.IntegerParser)):
            wanted = "0 or from 1.2e-38 to 3.4e38" if isinstance(kind, flags.FloatParser) else "below 2^63"
            flags.register_validator(name, functools.partial(_fits, kind), message=f"must be {wanted}")
    bad_input = InputError, DataInputError, OSError
    least_arguments = 1 if takes_arguments else None

    @functools.wraps(main)
    def speaking_of_flags(*arguments):
        _refuse_urls(*arguments)
        try:
            return main(*arguments)
        except InputError as error:
            raise InputError(as_flags(str(error))) from error

    program.run(
        speaking_of_flags,
        doc,
        extra="train",
        bad_input=bad_input,
        least_arguments=least_arguments,
        continues=continues,
    )


_TAKE_URLS = {"tpu"}
"""The flags that may be a URL: a TPU's address. All others would make a local folder named `gs:`."""


def _refuse_urls(arguments=()):
    """Refuses buckets, to which data_prep alone writes."""
    given = {f"--{name}=": flags.FLAGS[name].value for name in set(flags.FLAGS) - _TAKE_URLS}
    for name, value in {**given, "": arguments}.items():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, str) and "://" in part:
                raise InputError(f"{name}{part}: a local file or folder is needed; fix: copy it, or mount the bucket")


_FLAGS_OF_ARGUMENTS = {"directory": "workdir", "skipped": "on_bad=skip"}
"""Where a flag is not named as the library's argument."""


def as_flags(text: str) -> str:
    """What the library says of its arguments, as `batch_size=1` or `directory`, in terms of the program's flags."""

    def flag(found):
        name = _FLAGS_OF_ARGUMENTS.get(found["name"], found["name"])
        if name.partition("=")[0] not in flags.FLAGS:
            return found[0]
        if found["value"] in ("=True", "=False"):
            return f"--{'no' * (found['value'] == '=False')}{name}"
        return f"--{name}{found['value'] or ''}"

    return re.sub(r"`(?P<name>\w+)(?P<value>=[^`]*)?`", flag, text)


SMALLEST_FLOAT, LARGEST_FLOAT = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""Of float32's normal numbers: what is nearer to 0 counts as 0 there, what is further is infinite."""


def _fits(parser, value):
    """Whether networks can count with the value of a flag; None is no value."""
    if isinstance(parser, flags.IntegerParser):
        return value is None or abs(value) < 2**63
    return not value or SMALLEST_FLOAT <= abs(value) <= LARGEST_FLOAT  # false of NaN


@contextlib.contextmanager
def loading_tensorflow() -> Iterator[None]:
    """Turns oneDNN on and silences TensorFlow's C++; programs load it inside, once their flags are known to be good.

    Without AVX-512 TensorFlow leaves oneDNN off, with which a step of BN-x5 at 224x224 takes 2.9 s instead of 3.8. A
    value of TF_ENABLE_ONEDNN_OPTS that is set outside has the last word.

    Its notes (oneDNN is on, the CPU's instructions, no GPU) come before its log level counts, and none is an error: a
    failure to load raises an ImportError.
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
