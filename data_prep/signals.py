"""Ctrl-C and SIGTERM end a program at once, whatever it is doing, with one line and its own exit status.

A program ends as if by SIGKILL, without unwinding. That is safe, as every file is written aside and renamed. A loop
that has something to save handles the signals itself, with `signal.signal`: it gets the first one, and the program ends
at a second one, or if the loop does not react.
"""

import _thread
import contextlib
import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""Exit statuses, those of a shell for a program that a signal has ended."""

PATIENCE = 30.0
"""Seconds in which a loop has to react: a training step is shorter, and clusters send SIGKILL after about this time."""

_SAME = 1.0  # seconds in which a second signal counts as the same: terminals, `timeout` and our own parents send both

cleanups: list[Callable[[], None]] = []
"""Functions to call before a signal ends the program, which remove temporary folders."""

_line = ""
_stderr = 2
_ending = threading.RLock()
_ends = False
_held: list[int] | None = None


def install(line: str) -> None:
    """Handles the signals from now on. The main thread must call it before anything that takes long.

    Args:
      line: what the program says when a signal ends it; `{}` is the signal's name.
    """
    global _line, _stderr
    _line, _stderr = line, os.dup(2)  # the first is silenced while TensorFlow loads
    for number in STATUS:
        signal.signal(number, end)
    # The process that removes multiprocessing's semaphores after us does it without a warning.
    filters = os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker"
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, filters))


def watch() -> None:
    """Handles the signals in a thread of its own: a call into C++ keeps Python's handlers waiting until it is over.

    The signals are blocked everywhere else, because TensorFlow replaces the handler of SIGTERM in a cluster.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STATUS)
    threading.Thread(target=_watch, daemon=True).start()


def uninstall() -> None:
    """Leaves the signals to the operating system, while the interpreter ends."""
    for number in STATUS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STATUS)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Workers that start in this `with` block get no signals until they have called `start_worker`.

    The program itself answers a signal after the block: a worker that it leaves half started would print a traceback.
    """
    global _held
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STATUS)
    _held = []  # signals that another thread gets are handled by this one all the same
    try:
        yield
    finally:
        held, _held = _held, None
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if held:
            end(held[0])


def start_worker() -> None:
    """Prepares a worker process: its parent handles Ctrl-C, and it ends as soon as the parent ends, also by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STATUS)
    threading.Thread(target=_end_with, args=[multiprocessing.parent_process()], daemon=True).start()


def _end_with(parent):
    parent.join()
    os._exit(1)


def leave(status: int) -> None:
    """Ends the program at once, without unwinding."""
    for cleanup in cleanups:
        with contextlib.suppress(Exception):
            cleanup()
    os._exit(status)


def _watch():
    first = None
    while True:
        number = signal.sigwait(STATUS)
        now, handler = time.monotonic(), signal.getsignal(number)
        if first is None and handler != end:
            first = now
            _thread.interrupt_main(signal.Signals(number))  # makes Python call the handler
            impatient = threading.Timer(PATIENCE, _end_unless_handled, (number, handler))
            impatient.daemon = True
            impatient.start()
        elif first is None or now - first > _SAME:
            end(number, None)


def _end_unless_handled(number, handler):
    if signal.getsignal(number) == handler:
        end(number)


def end(number: int, frame: object = None) -> None:
    """Ends the program as a signal does; a handler for `signal.signal`."""
    global _ends
    if _held is not None:
        _held.append(number)
        return
    if not _ending.acquire(blocking=False):  # another thread is ending the program
        time.sleep(1.0)
        os._exit(STATUS[signal.Signals(number)])
    if _ends:  # a second signal interrupts this thread's own answer to the first, which goes on after it
        return
    _ends = True
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    start = "\n" if os.isatty(_stderr) else ""  # an updated line of progress may be there
    if select.select([], [_stderr], [], 1.0)[1]:  # writing into a full pipe would block
        with contextlib.suppress(OSError):
            os.write(_stderr, f"{start}{_line.format(name)}\n".encode(errors="backslashreplace"))
    leave(STATUS[signal.Signals(number)])
