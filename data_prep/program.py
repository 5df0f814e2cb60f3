"""Starts and ends every program: reads flags, turns an error into one clear line, sets the exit status."""

import functools
import importlib.util
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import flags

from data_prep import signals
from data_prep.errors import InputError

BAD_FLAGS = 2
BAD_INPUT = 1

_PACKAGES = "bn_keras", "data_prep", "launch"
_EXTRAS = {
    "apache_beam": "beam",
    "fsspec": "remote",
    "matplotlib": "demo",
    "mlflow": "trackers",
    "mlxtend": "demo",
    "onnx": "onnx",
    "pillow_heif": "heic",
    "pyarrow": "parquet",
    "safetensors": "torch",
    "scipy": "imagenet",
    "tensorflow_datasets": "tfds",
    "tensorflow": "cpu",
    "tf2onnx": "onnx",
    "torch": "torch",
    "wandb": "trackers",
}
"""The extra of setup.py that installs each package; for all others, each program has an extra of its own."""


def run(
    main: Callable[..., int | None],
    doc: str,
    *,
    extra: str = "prep",
    bad_input: tuple[type[Exception], ...] = (InputError, OSError),
    least_arguments: int | None = None,
    continues: bool = False,
) -> NoReturn:
    """Parses the flags, calls `main`, and exits with the status that it returns.

    `--help` prints `doc` and the program's own flags, `--helpfull` those of its libraries too. A flag that cannot be
    parsed, or whose number no 32-bit float or 64-bit integer can hold, exits with 2. Bad input, a package that is not
    installed, and failures of files and disks exit with 1 or the exception's `exit_status`; a signal as in
    `data_prep.signals`. Each comes with one line on stderr. All output is `escaped` from here on.

    Args:
      main: the program; returns an exit status, or None for 0.
      doc: what `--help` says before the flags.
      extra: the extra of setup.py that the program needs.
      bad_input: the exceptions whose message is that line.
      least_arguments: how many arguments beside the flags there must be at least; `main` is called with their list.
        None: there must be none, and `main` is called without.
      continues: whether the same command continues after a signal has ended it, which the program then says.
    """
    name = _name(sys.argv[0])
    _open_streams()
    _bound_numbers()
    signals.install(f"{name}: interrupted by {{}}{'; the same command continues' if continues else ''}")
    try:
        arguments = _parse(main, doc, name, least_arguments)
        status = main() if least_arguments is None else main(arguments)
        sys.stdout.flush()
    except flags.Error as error:
        one_line = " ".join(map(str.strip, str(error).split("\n")))  # the lines of absl's message
        _fail(name, f"{one_line} (--help lists the flags)", BAD_FLAGS)
    except bad_input as error:
        _fail(name, error, getattr(error, "exit_status", BAD_INPUT))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", *_PACKAGES):
            raise
        _fail(name, f"{package} is not installed; fix: {_installation(_EXTRAS.get(package, extra))}", BAD_INPUT)
    finally:
        signals.uninstall()
    sys.exit(status)


SMALLEST_FLOAT, LARGEST_FLOAT = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""The normal numbers of float32. Smaller ones count as 0, larger ones are infinite."""


def _bound_numbers():
    """Makes every flag that takes a number refuse what TensorFlow's number types cannot hold."""
    for name in flags.FLAGS:
        kind = flags.FLAGS[name].parser
        if isinstance(kind, (flags.FloatParser, flags.IntegerParser)):
            wanted = "0 or from 1.2e-38 to 3.4e38" if isinstance(kind, flags.FloatParser) else "below 2^63"
            flags.register_validator(name, functools.partial(_fits, kind), message=f"must be {wanted}")


def _fits(parser, value):
    """Whether the value of a flag fits the number types of TensorFlow; None, no value, does."""
    if isinstance(parser, flags.IntegerParser):
        return value is None or abs(value) < 2**63
    return not value or SMALLEST_FLOAT <= abs(value) <= LARGEST_FLOAT  # false for NaN


def _parse(main, doc, name, least_arguments):
    """Reads the flags, and returns the other arguments."""
    module = sys.argv[0] if main.__module__ == "__main__" else main.__module__
    asked = {argument.lstrip("-") for argument in sys.argv[1:] if argument.startswith("-")}
    if asked & {"help", "helpshort", "h"}:
        print(as_started(f"{doc.strip()}\n\nFlags of {name}:\n{flags.FLAGS.module_help(module)}"))
        sys.exit(0)
    if "helpfull" in asked:
        print(as_started(f"{doc.strip()}\n{flags.FLAGS.get_help()}"))
        sys.exit(0)
    flags.FLAGS.set_gnu_getopt()  # flags may stand behind arguments
    arguments = flags.FLAGS(sys.argv)[1:]
    if arguments and least_arguments is None:
        raise flags.Error(f"unexpected argument {arguments[0]!r}: flags look like --name=value")
    if len(arguments) < (least_arguments or 0):
        raise flags.Error("nothing is named that it should work on")
    return arguments


def require(*modules: str) -> None:
    """Raises ModuleNotFoundError, which `run` turns into advice, for the first of `modules` that is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(name=module)


def _installation(extra: str) -> str:
    """The command that installs an extra of this project, which is on no package index.

    pip reads the extras of an installed package from that package.
    """
    checkout = Path(__file__).parents[1]
    if (checkout / "setup.py").exists():
        return f"pip install -e {shlex.quote(f'{checkout}[{extra}]')}"
    return f"pip install 'bn-keras[{extra}]'"


def as_started(text: str) -> str:
    """A text in which our programs are named in the way in which this one was started.

    Our texts name the programs of a checkout, `launch/train` and `python -m data_prep`. An installed package has
    `bn-train` and `bn-data-prep` instead.
    """
    if not os.path.basename(sys.argv[0]).startswith("bn-"):
        return text
    return _PROGRAM.sub(lambda match: "bn-" + (match[1] or "data-prep").replace("_", "-"), text)


_PROGRAM = re.compile(r"(?<![\w./=-])(?:launch/(\w+)|python -m data_prep\b)")


def run_another(*arguments: str, stdout: int | None = None) -> int:
    """Runs another program of ours, `python -m ARGUMENTS`, to its end, and returns its exit status.

    A signal is passed on to it, so that it can save its work; this program ends after it.
    """
    received = []

    def note(number, frame):
        received.append(number)
        if process:
            process.send_signal(number)

    process, before = None, {number: signal.signal(number, note) for number in signals.STATUS}
    process = start_another(*arguments, stdout=stdout)
    if received:
        process.send_signal(received[0])
    status = process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if received:
        signals.leave(signals.STATUS[received[0]])  # the other program has already said why
    return status


def start_another(*arguments: str, stdout: int | None = None, stderr: int | None = None) -> subprocess.Popen[bytes]:
    """Starts another program of ours, `python -m ARGUMENTS`; the streams are those of `Popen`."""
    # So that it is found even if this program is not installed and was run by its path.
    places = os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    return subprocess.Popen([sys.executable, "-m", *arguments], env=environment, stdout=stdout, stderr=stderr)


def escaped(text: str, line: bool = False) -> str:
    """Text from files and flags in a form that is safe to show on a terminal.

    Characters that a terminal obeys or a reader does not see are written as Python's escapes: control characters,
    directions of writing, line separators, halves of surrogate pairs. Line ends stay, and so do the joiners that some
    scripts need in words.

    Args:
      line: whether it must stay on one line.
    """
    return text.translate(_SHOWN).replace("\n", "\\n") if line else text.translate(_SHOWN)


class _Shown(dict):
    """A table from each character to its escaped form, filled when a character first occurs."""

    def __missing__(self, code):
        character = chr(code)
        hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        self[code] = ascii(character)[1:-1] if hidden and character not in "\n\u200c\u200d" else character
        return self[code]


_SHOWN = _Shown()


class _Stream(io.TextIOWrapper):
    """Standard output or standard error that escapes text; control sequences can be written to its `buffer`."""

    def write(self, text):
        return super().write(escaped(text))


class _Descriptor(io.FileIO):
    """The file of a standard stream. If no one reads standard output any more, the program ends."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # so that writing what is still buffered does not fail again
            os.close(nowhere)
            if self.fileno() == 2:
                return len(data)
            if isinstance(error, BrokenPipeError):
                signals.leave(128 + signal.SIGPIPE)  # as other programs end if no one reads their output
            error.filename = "standard output"
            raise


def _open_streams():
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # it was closed by whoever started us, and the next opened file would take its number
            os.open(os.devnull, os.O_RDWR)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        encoding = getattr(getattr(sys, name), "encoding", None) or "utf-8"
        buffer = io.BufferedWriter(_Descriptor(descriptor, "wb", closefd=False))
        setattr(sys, name, _Stream(buffer, encoding, "backslashreplace", line_buffering=True))


def _name(path: str) -> str:
    """The program's name for people; for `python -m PACKAGE` it is PACKAGE."""
    folder, file = os.path.split(path)
    return os.path.basename(folder) if file == "__main__.py" else file.removesuffix(".py")


def _fail(name, message, status):
    print(f"{name}: {escaped(as_started(str(message)), line=True)}", file=sys.stderr)
    sys.exit(status)
