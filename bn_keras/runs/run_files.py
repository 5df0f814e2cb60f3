"""Writes a run's files so that each is either whole or missing, and finds damaged ones; standard library only.

A file is written under another name, synced and renamed. A checkpoint (.npz) and a model (.keras) are zips, and a zip
may end with a comment, which numpy, Keras and unzip ignore. Ours is `step STEP sha256 DIGEST`, with the digest of all
bytes before it, so that any changed bit is found.
"""

import contextlib
import functools
import hashlib
import io
import logging
import os
import re
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from typing import TypeVar

from bn_keras import storage

Value = TypeVar("Value")

_STATE = re.compile(r"(checkpoint|best)-(\d{8,})\.npz")
_STEP_OF_NAME = re.compile(r"-\d{8,}(?=\.)")
_COMMENT = re.compile(rb"step (\d+) sha256 \Z")
_DIGEST_BYTES = 64  # sha256 in hexadecimal
_BARE_END = struct.Struct("<4s16sH")  # the last 22 bytes of a zip without a comment: mark, ..., length of the comment


class DamagedError(ValueError):
    """A file has other bytes than were written."""


@functools.cache
def note(line: str) -> None:
    """Says a line on stderr, but only once, as several parts of a program may look at the same file."""
    logging.getLogger("bn_keras").warning("%s", line)


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """Gives a temporary name to write to; the file is synced and renamed to `path` if the `with` block ends well.

    The name is that of the file without a step, so that what a kill leaves behind is overwritten, and two programs can
    write different files at once. A file of a bucket is written on this machine, and put there as a whole.
    """
    if storage.is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = os.path.join(folder, os.path.basename(path))
            yield temporary
            storage.put(temporary, path)
        return
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".unfinished.{_STEP_OF_NAME.sub('', name)}")
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
    """Writes a text in UTF-8; characters without UTF-8, which names of files may have, become escapes."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def seal(path: str, step: int) -> None:
    """Adds the comment to a zip that has none: the step that it holds, and the digest of all bytes before."""
    comment = b"step %d sha256 " % step
    with open(path, "rb+") as file:
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", len(comment) + _DIGEST_BYTES) + comment)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.write(digest.encode())


def read_sealed(path: str) -> tuple[int | None, bytes]:
    """The step and the bytes of a zip that `seal` has sealed.

    Earlier versions wrote no comment. The step of such a zip is None, and the CRC-32 of its members is checked instead.

    Raises:
      DamagedError: the zip is damaged.
      OSError: it is missing or cannot be read.
    """
    content = storage.read(path)
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
    except Exception as error:  # whatever zipfile raises for damaged bytes
        raise DamagedError(str(error)) from None
    if damaged:
        raise DamagedError(f"the CRC-32 of {damaged} is another")
    return content


def states(directory: str) -> list[tuple[int, str]]:
    """(step, path) of all checkpoints, newest first, and then of the best ones; files with other names are left out."""
    return [(step, path) for step, path, _ in signature(directory)]


def signature(directory: str) -> list[tuple[int, str, object]]:
    """`states`, each with a value that changes whenever the file does; made without reading any."""
    found = []
    for file, version in storage.files(directory).items():
        name = _STATE.fullmatch(file)
        if name and name[2] == f"{int(name[2]):08d}":
            found.append((name[1] == "checkpoint", int(name[2]), os.path.join(directory, file), version))
    return [(step, path, version) for _, step, path, version in sorted(found, reverse=True)]


def newest(directory: str, read: Callable[[bytes], Value], kind: str = "") -> tuple[int, Value] | None:
    """(step, `read(content)`) of the newest checkpoint that is whole, or None; damaged ones are named.

    Args:
      kind: "best" looks only at the checkpoints of best evaluations; "" looks at these last, after all others.

    Raises:
      PermissionError: a checkpoint may not be read.
    """
    for step, path in states(directory):
        if not os.path.basename(path).startswith(kind):
            continue
        try:
            of, content = read_sealed(path)
            if of not in (None, step):
                raise DamagedError(f"it is of step {of}")
            return step, read(content)
        except PermissionError:
            raise
        except Exception as error:  # whatever numpy raises for damaged bytes that no digest covers
            note(f"checkpoint {path} is damaged ({error}): the newest one that is whole is taken")
    return None


def is_whole(path: str) -> bool:
    """Whether a checkpoint is undamaged."""
    with contextlib.suppress(OSError, DamagedError):
        read_sealed(path)
        return True
    return False
