"""Files by path: local ones through the operating system, `gs://`, `s3://` and other URLs through fsspec.

A local file is written aside, synced to disk and renamed, so that a name never holds half a file. An object store
shows an object only once its upload is complete, so there it is written under its own name.
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

from data_prep.errors import InputError

# Hidden files and folders, and what macOS, Synology and old tar programs put beside files. Not "." and "..".
_CLUTTER = re.compile(r"(^|/)(\.(?!\.?(/|$))|Icon\r$|(__MACOSX|@eaDir|PaxHeaders?(\.\d+)?)(/|$))")
_TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.tmp\Z")


def is_clutter(path: str) -> bool:
    """Whether a file, or a folder that it is in, is none of the data's, by its name."""
    return _CLUTTER.search(path) is not None


def is_temporary(name: str) -> bool:
    """Whether a local file has the name of one that `written_aside` had not finished."""
    return _TEMPORARY.search(name) is not None


def is_remote(path: str) -> bool:
    return "://" in path


def _filesystem(url: str):
    """The fsspec file system of a URL."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)[0]
    except (ImportError, ValueError) as error:
        raise InputError(f"{url}: {error}") from None


def join(folder: str, *names: str) -> str:
    return (posixpath if is_remote(folder) else os.path).join(folder, *names)


def exists(path: str) -> bool:
    return _filesystem(path).exists(path) if is_remote(path) else os.path.exists(path)


def is_folder(path: str) -> bool:
    return _filesystem(path).isdir(path) if is_remote(path) else os.path.isdir(path)


def size(path: str) -> int:
    """Size in bytes, -1 if there is no such regular file."""
    if is_remote(path):
        filesystem = _filesystem(path)
        return filesystem.size(path) if filesystem.exists(path) else -1
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def version(path: str) -> list:
    """Size in bytes and what changes when the file's content does: its time of modification, or the store's tag."""
    if is_remote(path):
        info = _filesystem(path).info(path)
        return [info["size"], _tag(info)]
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def make_folder(path: str) -> None:
    if is_remote(path):
        _filesystem(path).makedirs(path, exist_ok=True)
    else:
        os.makedirs(path, exist_ok=True)


def names(folder: str) -> list[str]:
    """Sorted names in a folder; empty if there is none."""
    if is_remote(folder):
        filesystem = _filesystem(folder)
        if not filesystem.exists(folder):
            return []
        return sorted(posixpath.basename(path.rstrip("/")) for path in filesystem.ls(folder, detail=False))
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def _open_regular(path: str, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file; to open or read anything else, such as a pipe, may take for ever."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path}: is a folder, a pipe or a device, no file; fix: move it away")
    return descriptor


def open_local(path: str, mode: str, buffering: int = -1):
    """A regular local file.

    Raises:
      InputError: it is something else.
    """
    return open(path, mode, buffering, opener=_open_regular)


def open_read(path: str):
    """A binary file open for reading."""
    return _filesystem(path).open(path, "rb") if is_remote(path) else open_local(path, "rb")


def heads(places: list[tuple[str, int, int]]) -> list[bytes | None]:
    """The bytes from start to end of each (path, start, end), None if they cannot be read; a store is asked once."""
    if not places or not is_remote(places[0][0]):
        return [_head(*place) for place in places]
    paths, starts, ends = map(list, zip(*places, strict=True))
    read = _filesystem(paths[0]).cat_ranges(paths, starts, ends, on_error="return")
    return [head if isinstance(head, bytes) else None for head in read]


def _head(path: str, start: int, end: int) -> bytes | None:
    try:
        with open_read(path) as file:
            file.seek(start)
            return file.read(end - start)
    except OSError:
        return None


def remove(path: str) -> None:
    """Removes a file if it is there."""
    if is_remote(path):
        if exists(path):
            _filesystem(path).rm_file(path)
        return
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _named(error: OSError, path: str) -> OSError:
    """Names the file in what the operating system says about it: a full disk, a bad sector."""
    error.filename = error.filename or path
    return error


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Names the file in the operating system's errors of a block."""
    try:
        yield
    except OSError as error:
        raise _named(error, path) from None


def read(path: str) -> bytes:
    with _naming(path), open_read(path) if is_remote(path) else open_local(path, "rb", buffering=0) as file:
        return file.read()


_open_files: dict[str, int] = {}  # what read_range has opened: path -> descriptor


def read_range(path: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`, fewer at the end; a local file stays open until `close_files`."""
    if is_remote(path):
        return _filesystem(path).cat_file(path, offset, offset + size)
    try:
        if path not in _open_files:
            _open_files[path] = _open_regular(path)
        return os.pread(_open_files[path], size, offset)
    except OSError as error:  # without the context manager, which costs 1 us an image
        raise _named(error, path) from None


def close_files() -> None:
    """Closes what `read_range` keeps open, so that the next call opens what is under that name by then."""
    while _open_files:
        os.close(_open_files.popitem()[1])


def crc32c(path: str) -> int:
    """CRC-32C of a whole file."""
    import google_crc32c  # here, so that a program that lacks it can say so

    crc = 0
    with open_read(path) as file:
        while block := file.read(1 << 18):  # what a core's cache holds: 1 MiB takes 15% longer
            crc = google_crc32c.extend(crc, block)
    return crc


def find(folder: str) -> list[tuple[str, int, object]]:
    """(path relative to the remote `folder`, size in bytes, tag) of every object below it that is no clutter."""
    filesystem = _filesystem(folder)
    root = filesystem._strip_protocol(folder).rstrip("/") + "/"
    files = []
    for path, info in filesystem.find(folder, detail=True).items():
        relative = path.removeprefix(root)
        if not is_clutter(relative):
            files.append((relative, info["size"], _tag(info)))
    return sorted(files)


def _tag(info: dict) -> str:
    """What an object store changes with an object's content."""
    names = ("etag", "ETag", "md5Hash", "mtime", "updated", "LastModified", "created")
    return str(next((info[name] for name in names if name in info), ""))


# So much is written between syncs that run beside the writing; with one sync at the end a disk of 300 MB/s idles
# while a worker computes, and a worker waits while the disk writes.
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
        self._unsynced, self._syncing = 0, None

    def write_all(self, parts: Sequence[bytes]) -> None:
        """Writes every byte of every part, or raises OSError."""
        written, wanted = os.writev(self._descriptor, parts), sum(map(len, parts))
        while written < wanted:  # a nearly full disk, or a signal
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

    def __init__(self, path: str):
        self._file = _filesystem(path).open(path, "wb", autocommit=False)

    def write_all(self, parts: Sequence[bytes]) -> None:
        self._file.write(b"".join(parts))

    def publish(self) -> None:
        self._file.close()
        self._file.commit()

    def discard(self) -> None:
        self._file.close()
        self._file.discard()


@contextlib.contextmanager
def written_aside(path: str) -> Iterator[_LocalFile | _RemoteFile]:
    """A file that appears under `path`, whole and on disk, when the block ends.

    It does not when the block raises, or sets its `wanted` to False.
    """
    file = (_RemoteFile if is_remote(path) else _LocalFile)(path)
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
