"""Files of a run that are whole or are not taken: written aside, ended by a digest; standard library only.

A checkpoint (.npz) and a model (.keras) are zips. A zip ends with a comment, which numpy, Keras and unzip pass over; of
ours it is `step STEP sha256 DIGEST`, the digest of all bytes before it. So any changed bit is found, wherever it is.
"""

import contextlib
import functools
import hashlib
import io
import logging
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import TypeVar

Value = TypeVar("Value")

_STATE = re.compile(r"(checkpoint|best)-(\d{8,})\.npz")
_COMMENT = re.compile(rb"step (\d+) sha256 \Z")
_DIGEST_BYTES = 64  # sha256 in hexadecimal
_BARE_END = struct.Struct("<4s16sH")  # the last 22 bytes of a zip without a comment: mark, ..., length of the comment


class DamagedError(ValueError):
    """A file is not what was written."""


@functools.cache
def note(line: str) -> None:
    """Says on stderr what a person should know, once: several parts of a program look at the same file."""
    logging.getLogger("bn_keras").warning("%s", line)


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """The name of a file to write, which is synced and takes the place of `path` when the `with` block ends well.

    All files of one kind in a folder are written under one name, so that what a kill leaves is written over.
    """
    temporary = os.path.join(os.path.dirname(path), ".unfinished" + os.path.splitext(path)[1])
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def write_text(path: str, text: str) -> None:
    """Writes a whole text in UTF-8; what has no UTF-8, as a file's name may, is written as an escape."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def seal(path: str, step: int) -> None:
    """Ends a zip without a comment by the step that it holds and the digest of all before."""
    comment = b"step %d sha256 " % step
    with open(path, "rb+") as file:
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", len(comment) + _DIGEST_BYTES) + comment)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.write(digest.encode())


def read_sealed(path: str) -> tuple[int | None, bytes]:
    """The step and the bytes of a zip.

    One without a comment was written before there were any: its step is None, and the CRC-32 of its members is checked.

    Raises:
      DamagedError: it is not what was written.
      OSError: it is missing or cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read()
    if len(content) >= _BARE_END.size:
        mark, _, length = _BARE_END.unpack(content[-_BARE_END.size :])
        if mark == b"PK\5\6" and length == 0:
            return None, _checked_by_members(content)
    sealed, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    comment = _COMMENT.search(sealed[-64:])
    if not comment or hashlib.sha256(sealed).hexdigest().encode() != digest:
        raise DamagedError("its sha256 is another")
    return int(comment[1]), content


def _checked_by_members(content):
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged = archive.testzip()
    except Exception as error:  # whatever zipfile makes of damaged bytes
        raise DamagedError(str(error)) from None
    if damaged:
        raise DamagedError(f"the CRC-32 of {damaged} is another")
    return content


def states(directory: str) -> list[tuple[int, str]]:
    """(step, path) of the checkpoints, newest first, then of the best ones; files of other names are not ours."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(directory) as entries:
        for entry in entries:
            name = _STATE.fullmatch(entry.name)
            if name and name[2] == f"{int(name[2]):08d}" and entry.is_file():
                found.append((name[1] == "checkpoint", int(name[2]), entry.path))
    return [(step, path) for _, step, path in sorted(found, reverse=True)]


def signature(directory: str) -> list[tuple]:
    """What tells the states of a directory from others, without reading them."""
    found = []
    for _, path in states(directory):
        with contextlib.suppress(FileNotFoundError):  # a run that trains has just dropped it
            status = os.stat(path)
            found.append((path, status.st_ino, status.st_size, status.st_mtime_ns))
    return found


def newest(directory: str, read: Callable[[bytes], Value]) -> tuple[int, Value] | None:
    """The newest state that is whole, as (step, what `read` makes of its bytes); damaged ones are named.

    Raises:
      PermissionError: one may not be read.
    """
    for step, path in states(directory):
        try:
            of, content = read_sealed(path)
            if of not in (None, step):
                raise DamagedError(f"it is of step {of}")
            return step, read(content)
        except PermissionError:
            raise
        except Exception as error:  # whatever numpy makes of damaged bytes that no digest covers
            note(f"checkpoint {path} is damaged ({error}): the newest one that is whole is taken")
    return None


def is_whole(path: str) -> bool:
    """Whether a state can be read."""
    with contextlib.suppress(OSError, DamagedError):
        read_sealed(path)
        return True
    return False
