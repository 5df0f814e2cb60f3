"""How every program starts and fails: flags first, one clear line for what cannot work, an exit status."""

import contextlib
import os
import sys

from absl import flags

from bn_keras.errors import InputError
from data_prep.errors import InputError as DataInputError

BAD_FLAGS = 2
BAD_INPUT = 1


def run(main, doc: str, *, takes_arguments: bool = False):
    """Parses the flags, calls `main()` and exits with what it returns.

    `--help` prints `doc` and the program's own flags, `--helpfull` those of its libraries too. A flag that cannot be
    parsed exits with 2; bad input and failures of files and disks exit with 1; each with one line on stderr.

    Args:
      main: the program; returns an exit status, or None for 0.
      doc: what `--help` says before the flags.
      takes_arguments: whether `main` is called with what stands beside the flags, one list of at least one.
    """
    name = os.path.basename(sys.argv[0]).removesuffix(".py")
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
        if arguments and not takes_arguments:
            raise flags.Error(f"unexpected argument {arguments[0]!r}: flags look like --name=value")
        if takes_arguments and not arguments:
            raise flags.Error("nothing is named that it should work on")
    except flags.Error as error:
        fail(name, f"{error} (--help lists the flags)", BAD_FLAGS)
    try:
        sys.exit(main(arguments) if takes_arguments else main())
    except (InputError, DataInputError, OSError) as error:
        fail(name, error, BAD_INPUT)


@contextlib.contextmanager
def loading_tensorflow():
    """Silences what TensorFlow's C++ says on loading; programs load it inside, once their flags are known to be good.

    Its notes (oneDNN is on, the CPU's instructions, no GPU) come before its log level counts, and none is an error: a
    failure to load raises an ImportError.
    """
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


def fail(name, message, status):
    print(f"{name}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)
