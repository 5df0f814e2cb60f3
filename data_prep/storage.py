"""Files by path: local ones through the operating system, `gs://`, `s3://` and other URLs through fsspec.

A local file is written aside, synced to disk and renamed, so that a name never holds half a file. An object store
shows an object only once its upload is complete, so there it is written under its own name.
"""

import concurrent.futures
import contextlib
import functools
import os
import posixpath
import secrets
from collections.abc import Iterator, Sequence

import google_crc32c

from data_prep.errors import InputError


def is_remote(path: str) -> bool:
    return "://" in path


def _filesystem(url: str):
    """The fsspec file system of a URL."""
    try:
        import fsspec
    except ImportError:
        raise InputError(f"{url}: remote paths need fsspec; fix: pip install 'bn_keras[remote]'") from None
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
    """Size in bytes, -1 if there is no such file."""
    if is_remote(path):
        filesystem = _filesystem(path)
        return filesystem.size(path) if filesystem.exists(path) else -1
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return -1


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


def open_read(path: str):
    """A binary file open for reading."""
    return _filesystem(path).open(path, "rb") if is_remote(path) else open(path, "rb")


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
    with _naming(path), open_read(path) as file:
        return file.read()


@functools.lru_cache(maxsize=4)
def _descriptor(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def read_range(path: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`, fewer at the end; a local file stays open for the next call."""
    if is_remote(path):
        return _filesystem(path).cat_file(path, offset, offset + size)
    try:
        return os.pread(_descriptor(path), size, offset)
    except OSError as error:  # without the context manager, which costs 1 us an image
        raise _named(error, path) from None


def crc32c(path: str) -> int:
    """CRC-32C of a whole file."""
    crc = 0
    with open_read(path) as file:
        while block := file.read(1 << 18):  # what a core's cache holds: 1 MiB takes 15% longer
            crc = google_crc32c.extend(crc, block)
    return crc


def find(folder: str) -> list[tuple[str, int, object]]:
    """(path relative to the remote `folder`, size in bytes, tag) of every object below it that is not hidden."""
    filesystem = _filesystem(folder)
    root = filesystem._strip_protocol(folder).rstrip("/") + "/"
    files = []
    for path, info in filesystem.find(folder, detail=True).items():
        relative = path.removeprefix(root)
        if not any(part.startswith(".") for part in relative.split("/")):
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
    """A file that appears under `path`, whole and on disk, when the block ends, and not at all when it raises."""
    file = (_RemoteFile if is_remote(path) else _LocalFile)(path)
    try:
        with _naming(path):
            yield file
            file.publish()
    except BaseException:
        file.discard()
        raise


def write(path: str, content: bytes) -> None:
    """Writes a whole file atomically."""
    with written_aside(path) as file:
        file.write_all([content])
