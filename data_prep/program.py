"""How every program starts and fails: flags first, one clear line for what cannot work, an exit status."""

import os
import sys

from absl import flags

from data_prep.errors import InputError

BAD_FLAGS = 2
BAD_INPUT = 1


def run(
    main,
    doc: str,
    *,
    bad_input: tuple[type[Exception], ...] = (InputError, OSError),
    least_arguments: int | None = None,
):
    """Parses the flags, calls `main` and exits with what it returns.

    `--help` prints `doc` and the program's own flags, `--helpfull` those of its libraries too. A flag that cannot be
    parsed exits with 2; bad input and failures of files and disks exit with 1; each with one line on stderr.

    Args:
      main: the program; returns an exit status, or None for 0.
      doc: what `--help` says before the flags.
      bad_input: the exceptions whose message is that line.
      least_arguments: `main` is called with a list of what stands beside the flags, at least so many; None: there must
        be nothing, and it is called without.
    """
    name = _name(sys.argv[0])
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a file's name need not be text
    module = sys.argv[0] if main.__module__ == "__main__" else main.__module__
    asked = {argument.lstrip("-") for argument in sys.argv[1:] if argument.startswith("-")}
    if asked & {"help", "helpshort", "h"}:
        print(f"{doc.strip()}\n\nFlags of {name}:\n{flags.FLAGS.module_help(module)}")
        sys.exit(0)
    if "helpfull" in asked:
        print(f"{doc.strip()}\n{flags.FLAGS.get_help()}")
        sys.exit(0)
    flags.FLAGS.set_gnu_getopt()  # flags may stand behind arguments
    try:
        arguments = flags.FLAGS(sys.argv)[1:]
        if arguments and least_arguments is None:
            raise flags.Error(f"unexpected argument {arguments[0]!r}: flags look like --name=value")
        if len(arguments) < (least_arguments or 0):
            raise flags.Error("nothing is named that it should work on")
    except flags.Error as error:
        _fail(name, f"{error} (--help lists the flags)", BAD_FLAGS)
    try:
        sys.exit(main() if least_arguments is None else main(arguments))
    except bad_input as error:
        _fail(name, error, BAD_INPUT)


def _name(path: str) -> str:
    """What a person calls the program: for `python -m PACKAGE` that is PACKAGE."""
    folder, file = os.path.split(path)
    return os.path.basename(folder) if file == "__main__.py" else file.removesuffix(".py")


def _fail(name, message, status):
    print(f"{name}: {' '.join(map(str.strip, str(message).splitlines()))}", file=sys.stderr)
    sys.exit(status)
