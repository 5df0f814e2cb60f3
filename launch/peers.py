"""Says which other processes training waits for, and ends a wait that takes too long.

While TensorFlow joins a cluster, it holds Python's lock until the last peer has come, and handles SIGTERM itself: no
thread of that process can say anything, measure time or end it. Training in a cluster therefore runs in a child
process, and the process that was started watches it.
"""

import concurrent.futures
import contextlib
import ctypes
import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from bn_keras.errors import InputError, LostWorkerError
from bn_keras.json_files import ADDRESS
from data_prep import signals

_FIRST, _LAST = 5.0, 60.0  # seconds between lines, doubled after each
_NAMED = 8  # peers that a line names
_SOON = 1.0  # seconds in which a child can end by itself
_REST = 2.0  # seconds between a child and the next, in which the others notice that one is lost
_PR_SET_PDEATHSIG = 1

_to_parent = None


def watched(restart_wait: float = 0.0) -> None:
    """Continues in a child process. The process that was started passes signals on to it, and ends as it ends.

    It must be called before there are other threads, as the child would not have them.

    Args:
      restart_wait: seconds to wait for a process that is lost. For so long a new child replaces one that was killed, or
        that ended as `LostWorkerError` says. The seconds count anew each time that all processes have come together.
    """
    global _to_parent
    deadline = None
    while True:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            break
        os.close(writer)
        status, joined = _watch(child, os.fdopen(reader), deadline)
        if deadline is None or joined:
            deadline = time.monotonic() + restart_wait
        lost = status < 0 or status == LostWorkerError.exit_status
        if not lost or time.monotonic() + _REST >= deadline:
            signals.leave(status if status >= 0 else 128 - status)
        print(f"train: starts again, for {restart_wait:g} s at most (--restart_wait)", file=sys.stderr)
        time.sleep(_REST)
    os.close(reader)
    with contextlib.suppress(AttributeError, OSError):  # Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _to_parent = os.fdopen(writer, "w", buffering=1)


@contextlib.contextmanager
def waiting_for(addresses: Sequence[str], seconds: float) -> Iterator[None]:
    """A `with` block that waits for all peers; the program ends if they do not come. To be used after `watched`.

    Args:
      addresses: HOST:PORT of each peer.
      seconds: how long to wait; then the program exits with 1.
    """
    if addresses:
        print(json.dumps([addresses, seconds]), file=_to_parent)
    yield
    if addresses:
        print(json.dumps([[], 0]), file=_to_parent)


def check_services(flag: str | None) -> None:
    """Checks that a service answers at each address of --data_service; TensorFlow would wait forever.

    Raises:
      InputError: no service answers at an address.
    """
    addresses = flag.split(",") if flag is not None else []
    for address in addresses:
        if not re.match(ADDRESS["pattern"], address):
            raise InputError(f"--data_service={flag}: {address!r} is not {ADDRESS['description']}")
    if absent := _absent(addresses):
        raise InputError(f"--data_service: {absent[0]}: start launch/data_service there, which says its address")


def watch_services(flag: str | None, first: float = _FIRST) -> None:
    """Says from now on which machine of --data_service no longer answers, as TensorFlow waits for it silently.

    Args:
      flag: the value of --data_service.
      first: seconds between two checks. While a machine is absent they become rarer, up to one every `_LAST` seconds.
    """

    def watch(addresses):
        pause = first
        while True:
            time.sleep(pause)
            absent = _absent(addresses)
            pause = min(2 * pause, _LAST) if absent else first
            if absent:
                print(
                    f"waiting for {', '.join(absent)}: end this program, start launch/data_service there, and the same "
                    "command continues",
                    file=sys.stderr,
                )

    if flag:
        threading.Thread(target=watch, args=[flag.split(",")], daemon=True).start()


def _watch(child, messages, deadline):
    """Watches a child process until it ends. Returns its status, and whether all processes had come together.

    Args:
      child: the number of the child's process.
      messages: the file to which `waiting_for` writes there.
      deadline: when to give up waiting for others, if `waiting_for` does not say it.
    """
    received, addresses, joined = [], [], False

    def forward(number, frame):
        received.append((number, time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    before = {number: signal.signal(number, forward) for number in signals.STATUS}
    while True:
        if select.select([messages], [], [], 0.2 if addresses else None)[0]:
            if not (line := messages.readline()):
                break
            addresses, seconds = json.loads(line)
            joined = not addresses
            started, flag = time.monotonic(), "--peer_timeout"
            if deadline is not None:
                seconds, flag = max(deadline - started, _SOON), "--restart_wait"
            pause = _FIRST
            due = started + min(pause, seconds)
        elif received and time.monotonic() > received[0][1] + _SOON:
            os.kill(child, signal.SIGKILL)
            signals.end(received[0][0])
        elif time.monotonic() > due:
            absent = _absent(addresses) or [f"{address} (answers, has not joined)" for address in addresses]
            more = f" and {len(absent) - _NAMED} more" if len(absent) > _NAMED else ""
            peers = ", ".join(absent[:_NAMED]) + more
            if time.monotonic() >= started + seconds:
                os.kill(child, signal.SIGKILL)
                print(
                    f"train: gave up after {seconds:.3g} s ({flag}) without {peers}: start every process of the "
                    "cluster, the same command continues",
                    file=sys.stderr,
                )
                signals.leave(1)
            print(f"waiting for {peers}", file=sys.stderr)
            pause = min(2 * pause, _LAST)
            due = min(due + pause, started + seconds)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        name = signal.Signals(-status).name
        print(f"train: ended by {name}; the same command on every process continues", file=sys.stderr)
    if received:
        signals.leave(status if status >= 0 else 128 - status)
    for number, handler in before.items():
        signal.signal(number, handler)
    return status, joined


def _absent(addresses):
    """The addresses where no one answers, each with the reason."""
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        reasons = zip(addresses, pool.map(_absence, addresses), strict=True)
        return [f"{address} ({reason})" for address, reason in reasons if reason]


def _absence(address):
    """Why no one answers at an address; None if someone does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or "no answer"
    return None
