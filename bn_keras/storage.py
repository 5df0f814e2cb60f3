"""Reads and writes files by their path: local ones by the operating system, `gs://`, `s3://` and other URLs by fsspec.

An object store shows an object only after all of it has arrived. A file for a bucket is therefore made on this machine
and sent as a whole; it needs no temporary name, as a local file does.
"""

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from bn_keras.errors import InputError

Value = TypeVar("Value")


def is_remote(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)


def absolute(path: str) -> str:
    """The absolute path; a URL is returned as it is."""
    return path if is_remote(path) else os.path.abspath(path)


def _ask(url: str, question: Callable[[Any, str], Value]) -> Value:
    """The answer of a URL's fsspec file system to a question about the URL's path.

    Raises:
      InputError: fsspec does not know the URL, or a package that it needs for it is not installed.
      OSError: the store cannot do it.
    """
    import fsspec  # here, so that a program that lacks it can say so

    try:  # without cached listings, as other processes also write there
        filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
        return question(filesystem, path)
    except OSError:
        raise
    except (ImportError, ValueError) as error:
        raise InputError(f"{url}: {error}") from None
    except Exception as error:  # whatever a store's client raises for the network or for missing credentials
        raise OSError(f"{url}: {error}") from error


def exists(path: str) -> bool:
    """Whether the name exists, even as a link to nothing."""
    return _ask(path, lambda store, name: store.exists(name)) if is_remote(path) else os.path.lexists(path)


def is_folder(path: str) -> bool:
    return _ask(path, lambda store, name: store.isdir(name)) if is_remote(path) else os.path.isdir(path)


def file_size(path: str) -> int | None:
    """The size in bytes of a regular file; None if nothing is there.

    Raises:
      InputError: it is a folder, a pipe, a socket or a device; opening or reading one of those may never end.
    """
    try:
        if is_remote(path):
            info = _ask(path, lambda store, name: store.info(name))
            regular, size = info["type"] == "file", info["size"]
        else:
            status = os.stat(path)
            regular, size = stat.S_ISREG(status.st_mode), status.st_size
    except FileNotFoundError:
        return None
    if not regular:
        raise InputError(f"{path} is no regular file: move it away")
    return size


def read(path: str) -> bytes:
    """The content of a file.

    Raises:
      InputError: it is no regular file, as in `file_size`.
      OSError: it is missing or cannot be read.
    """
    if is_remote(path):
        return _ask(path, lambda store, name: store.cat_file(name))
    file_size(path)
    with open(path, "rb") as file:
        return file.read()


def files(folder: str) -> dict[str, object]:
    """The name of each file in a folder, with a value that changes when its content does; {} if there is no folder."""
    found: dict[str, object] = {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if is_remote(folder):
            for info in _ask(folder, lambda store, name: store.ls(name, detail=True)):
                if info["type"] == "file":
                    found[os.path.basename(info["name"])] = repr(info)
        else:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_file():
                        with contextlib.suppress(FileNotFoundError):  # it has just been removed
                            status = entry.stat()
                            found[entry.name] = status.st_ino, status.st_size, status.st_mtime_ns
    return found


def find(root: str) -> list[str]:
    """The path of every file below a folder, without hidden ones. What several links lead to is listed once."""
    if is_remote(root):
        return _ask(
            root, lambda store, name: [os.path.join(root, found.removeprefix(f"{name}/")) for found in store.find(name)]
        )
    found, seen = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        if (place := os.path.realpath(folder)) in seen:
            folders.clear()  # also of a link to a folder above, which would never end
            continue
        seen.add(place)
        folders[:] = sorted(
            (name for name in folders if not name.startswith(".")),
            key=lambda name: (os.path.islink(os.path.join(folder, name)), name),
        )
        found += [os.path.join(folder, name) for name in sorted(names) if not name.startswith(".")]
    return found


def make_folder(path: str) -> None:
    """Makes a local folder; a bucket needs none."""
    if not is_remote(path):
        os.makedirs(path, exist_ok=True)


def remove(path: str) -> None:
    if is_remote(path):
        _ask(path, lambda store, name: store.rm_file(name))
    else:
        os.remove(path)


def put(local: str, url: str) -> None:
    """Puts a local file into a bucket."""
    _ask(url, lambda store, name: store.put_file(local, name))


def fetch(path: str, local: str) -> None:
    """Copies a file to this machine."""
    if is_remote(path):
        _ask(path, lambda store, name: store.get_file(name, local))
    else:
        shutil.copyfile(path, local)


@contextlib.contextmanager
def local(path: str) -> Iterator[str]:
    """In a `with` block, the name of a local file with the content of `path`: the file itself, or a copy."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, os.path.basename(path))
        fetch(path, copy)
        yield copy


class Outbox:
    """A local folder for programs that can write only to local folders.

    Args:
      folder: the folder in which the files are wanted.

    Attributes:
      path: the local folder to write to: `folder` itself, if it is local.
    """

    def __init__(self, folder: str):
        self._folder = folder
        self._temporary = tempfile.TemporaryDirectory() if is_remote(folder) else None
        self.path = self._temporary.name if self._temporary else folder

    def send(self) -> None:
        """Sends every file to the folder in which it is wanted."""
        for path in find(self.path) if self._temporary else ():
            if os.path.isfile(path):
                put(path, os.path.join(self._folder, os.path.relpath(path, self.path)))
