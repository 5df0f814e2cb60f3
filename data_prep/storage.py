"""Reads and writes files by their path: local ones by the operating system, `gs://`, `s3://` and other URLs by fsspec.

A local file is written under another name, synced to disk and renamed, so that a name never holds half a file. An
object store shows an object only after its upload is complete, so there a file is written under its own name.
"""

import concurrent.futures
import contextlib
import functools
import os
import posixpath
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import IO, Any, NamedTuple, Protocol

from data_prep.errors import InputError

# Hidden files and folders, and what macOS, Synology and old tar programs put beside files. Not "." and "..".
_CLUTTER = re.compile(r"(^|/)(\.(?!\.?(/|$))|Icon\r$|(__MACOSX|@eaDir|PaxHeaders?(\.\d+)?)(/|$))")
_TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.tmp\Z")


def is_clutter(path: str) -> bool:
    """Whether a file, or a folder that it is in, has a name that does not belong to data."""
    return _CLUTTER.search(path) is not None


def is_temporary(name: str) -> bool:
    """Whether a local file has the name of an unfinished one of `written_aside`."""
    return _TEMPORARY.search(name) is not None


def is_remote(path: str) -> bool:
    return "://" in path


class File(NamedTuple):
    """A file below a folder."""

    path: str  # relative to that folder
    size: int  # bytes; -1: it can be no image, such as a link to nothing, a pipe or a folder
    version: object  # JSON value that changes with the content: time of modification, an object store's tag


class WrittenAside(Protocol):
    """A file that gets its name when `publish` is called.

    Attributes:
      wanted: whether `publish` is to be called.
      temporary: the file's name until then; "" if it has none.
    """

    wanted: bool
    temporary: str

    def write_all(self, parts: Sequence[bytes]) -> None:
        """Writes every byte of every part, or raises OSError."""

    def publish(self) -> None: ...

    def discard(self) -> None: ...


class Storage(Protocol):
    """The operations that local disks and object stores have in common."""

    def exists(self, path: str) -> bool: ...

    def is_folder(self, path: str) -> bool: ...

    def size(self, path: str) -> int:
        """The size in bytes; -1 if there is no such regular file."""

    def version(self, path: str) -> list:
        """The size in bytes, and a value that changes when the file's content does."""

    def make_folder(self, path: str) -> None: ...

    def names(self, folder: str) -> list[str]:
        """The sorted names in a folder; empty if there is no such folder."""

    def find(self, folder: str) -> list[File]:
        """Every file below a folder, in sorted order, without clutter.

        Links to files are followed, links to folders only directly in `folder`. Local folders directly in `folder` are
        listed too, with a slash at the end: an empty one is a class without an image.
        """

    def open_read(self, path: str) -> IO[bytes]:
        """A binary file open for reading."""

    def heads(self, places: list[tuple[str, int, int]]) -> list[bytes | None]:
        """The bytes from start to end of each (path, start, end), None if they cannot be read."""

    def read(self, path: str) -> bytes: ...

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on, fewer at the end. A local file stays open until `close_files`."""

    def remove(self, path: str) -> None:
        """Removes a file, if it exists."""

    def new_file(self, path: str) -> WrittenAside: ...


class Local:
    """The operating system's files."""

    def __init__(self):
        self._open: dict[str, int] = {}  # files that read_range has opened: path -> descriptor

    exists = staticmethod(os.path.exists)
    is_folder = staticmethod(os.path.isdir)

    def size(self, path: str) -> int:
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return -1
        return status.st_size if stat.S_ISREG(status.st_mode) else -1

    def version(self, path: str) -> list:
        status = os.stat(path)
        return [status.st_size, status.st_mtime_ns]

    def make_folder(self, path: str) -> None:
        os.makedirs(path, exist_ok=True)

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(folder))
        except FileNotFoundError:
            return []

    def find(self, folder: str) -> list[File]:
        files, pending = [], [""]
        while pending:
            relative = pending.pop()
            with os.scandir(os.path.join(folder, relative)) as entries:
                for entry in entries:
                    path = posixpath.join(relative, entry.name)
                    if is_clutter(entry.name):
                        continue
                    if entry.is_dir(follow_symlinks=not relative):
                        pending.append(path)
                        if not relative:
                            files.append(File(f"{path}/", -1, None))
                    elif entry.is_file():
                        status = entry.stat()
                        files.append(File(path, status.st_size, status.st_mtime_ns))
                    else:
                        files.append(File(path, -1, None))
        return sorted(files)

    def open_read(self, path: str) -> IO[bytes]:
        return open_local(path, "rb")

    def heads(self, places: list[tuple[str, int, int]]) -> list[bytes | None]:
        return [self._head(*place) for place in places]

    def _head(self, path: str, start: int, end: int) -> bytes | None:
        try:
            with self.open_read(path) as file:
                file.seek(start)
                return file.read(end - start)
        except OSError:
            return None

    def read(self, path: str) -> bytes:
        with _naming(path), open_local(path, "rb", buffering=0) as file:
            return file.read()

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        try:
            if path not in self._open:
                self._open[path] = _open_regular(path)
            return os.pread(self._open[path], size, offset)
        except OSError as error:  # without the context manager, which costs 1 us an image
            raise _named(error, path) from None

    def close_files(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def new_file(self, path: str) -> "_LocalFile":
        return _LocalFile(path)


class Remote:
    """An object store, or another file system that fsspec knows by the URL's scheme; one request serves many files."""

    def __init__(self, filesystem: Any):
        self._filesystem = filesystem

    def exists(self, path: str) -> bool:
        return self._filesystem.exists(path)

    def is_folder(self, path: str) -> bool:
        return self._filesystem.isdir(path)

    def size(self, path: str) -> int:
        return self._filesystem.size(path) if self.exists(path) else -1

    def version(self, path: str) -> list:
        info = self._filesystem.info(path)
        return [info["size"], _tag(info)]

    def make_folder(self, path: str) -> None:
        self._filesystem.makedirs(path, exist_ok=True)

    def names(self, folder: str) -> list[str]:
        if not self.exists(folder):
            return []
        return sorted(posixpath.basename(path.rstrip("/")) for path in self._filesystem.ls(folder, detail=False))

    def find(self, folder: str) -> list[File]:
        root = self._filesystem._strip_protocol(folder).rstrip("/") + "/"
        found = self._filesystem.find(folder, detail=True).items()
        files = (File(path.removeprefix(root), info["size"], _tag(info)) for path, info in found)
        return sorted(file for file in files if not is_clutter(file.path))

    def open_read(self, path: str) -> IO[bytes]:
        return self._filesystem.open(path, "rb")

    def heads(self, places: list[tuple[str, int, int]]) -> list[bytes | None]:
        read = self._filesystem.cat_ranges(*map(list, zip(*places, strict=True)), on_error="return")
        return [head if isinstance(head, bytes) else None for head in read]

    def read(self, path: str) -> bytes:
        with _naming(path), self.open_read(path) as file:
            return file.read()

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        return self._filesystem.cat_file(path, offset, offset + size)

    def remove(self, path: str) -> None:
        if self.exists(path):
            self._filesystem.rm_file(path)

    def new_file(self, path: str) -> "_RemoteFile":
        return _RemoteFile(self._filesystem.open(path, "wb", autocommit=False))


_LOCAL = Local()


def at(path: str) -> Storage:
    """The storage of a path or URL.

    Raises:
      InputError: a package that fsspec needs for this URL is not installed.
    """
    if not is_remote(path):
        return _LOCAL
    import fsspec

    try:
        return Remote(fsspec.core.url_to_fs(path)[0])
    except (ImportError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None


def join(folder: str, *names: str) -> str:
    return (posixpath if is_remote(folder) else os.path).join(folder, *names)


# The methods of `Storage`, for a path of either kind.


def exists(path: str) -> bool:
    return at(path).exists(path)


def is_folder(path: str) -> bool:
    return at(path).is_folder(path)


def size(path: str) -> int:
    return at(path).size(path)


def version(path: str) -> list:
    return at(path).version(path)


def make_folder(path: str) -> None:
    at(path).make_folder(path)


def names(folder: str) -> list[str]:
    return at(folder).names(folder)


def find(folder: str) -> list[File]:
    return at(folder).find(folder)


def open_read(path: str) -> IO[bytes]:
    return at(path).open_read(path)


def heads(places: list[tuple[str, int, int]]) -> list[bytes | None]:
    """The bytes from start to end of each (path, start, end) of one storage, None if they cannot be read."""
    return at(places[0][0]).heads(places) if places else []


def read(path: str) -> bytes:
    return at(path).read(path)


def read_range(path: str, offset: int, size: int) -> bytes:
    return at(path).read_range(path, offset, size)


def remove(path: str) -> None:
    at(path).remove(path)


def close_files() -> None:
    """Closes the files that `read_range` keeps open, so that its next call opens a file anew."""
    _LOCAL.close_files()


def crc32c(path: str) -> int:
    """CRC-32C of a whole file."""
    import google_crc32c  # here, so that a program that lacks it can say so

    crc = 0
    with open_read(path) as file:
        while block := file.read(1 << 18):  # fits into a core's cache: 1 MiB takes 15% longer
            crc = google_crc32c.extend(crc, block)
    return crc


def _open_regular(path: str, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file. Opening or reading anything else, such as a pipe, may never end."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path}: is a folder, a pipe or a device, no file; fix: move it away")
    return descriptor


def open_local(path: str, mode: str, buffering: int = -1) -> IO[Any]:
    """Opens a regular local file.

    Raises:
      InputError: the path is something else.
    """
    return open(path, mode, buffering, opener=_open_regular)


def _named(error: OSError, path: str) -> OSError:
    """An error of the operating system, such as a full disk or a bad sector, that names the file."""
    error.filename = error.filename or path
    return error


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """In a `with` block, errors of the operating system name the file."""
    try:
        yield
    except OSError as error:
        raise _named(error, path) from None


def _tag(info: dict) -> str:
    """A value of an object store that changes with an object's content."""
    names = ("etag", "ETag", "md5Hash", "mtime", "updated", "LastModified", "created")
    return str(next((info[name] for name in names if name in info), ""))


# Bytes between syncs, which run in the background while the next bytes are written. With a single sync at the end, a
# disk of 300 MB/s idles while a worker computes, and the worker waits while the disk writes.
_SYNC_BYTES = 32 << 20


@functools.cache
def _syncer() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(1)


class _LocalFile:
    """A file under a temporary name until `publish`."""

    wanted = True

    def __init__(self, path: str):
        self._path, self.temporary = path, f"{path}.{secrets.token_hex(4)}.tmp"
        self._descriptor = os.open(self.temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._unsynced = 0
        self._syncing: Future[None] | None = None

    def write_all(self, parts: Sequence[bytes]) -> None:
        written, wanted = os.writev(self._descriptor, parts), sum(map(len, parts))
        while written < wanted:  # the disk is nearly full, or a signal came
            written += os.write(self._descriptor, b"".join(parts)[written:])
        self._unsynced += wanted
        if self._unsynced > _SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            self._syncing, self._unsynced = _syncer().submit(os.fsync, self._descriptor), 0

    def publish(self) -> None:
        if self._syncing:
            self._syncing.result()
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        os.replace(self.temporary, self._path)
        folder = os.open(os.path.dirname(self._path) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def discard(self) -> None:
        if self._syncing:
            self._syncing.exception()
        with contextlib.suppress(OSError):
            os.close(self._descriptor)
        with contextlib.suppress(OSError):
            os.unlink(self.temporary)


class _RemoteFile:
    """An object whose upload is completed by `publish`."""

    wanted = True
    temporary = ""

    def __init__(self, file):
        self._file = file

    def write_all(self, parts: Sequence[bytes]) -> None:
        self._file.write(b"".join(parts))

    def publish(self) -> None:
        self._file.close()
        self._file.commit()

    def discard(self) -> None:
        self._file.close()
        self._file.discard()


@contextlib.contextmanager
def written_aside(path: str) -> Iterator[WrittenAside]:
    """A file that gets the name `path`, whole and on disk, when the `with` block ends.

    It does not if the block raises, or sets its `wanted` to False.
    """
    file = at(path).new_file(path)
    try:
        with _naming(path):
            yield file
            (file.publish if file.wanted else file.discard)()
    except BaseException:
        file.discard()
        raise


def write(path: str, content: bytes) -> None:
    """Writes a whole file atomically."""
    with written_aside(path) as file:
        file.write_all([content])
