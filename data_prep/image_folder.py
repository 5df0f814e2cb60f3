"""An image-folder data set: one folder a class, the class index being the position in the sorted folder names."""

import hashlib
import os
import posixpath

from data_prep import storage
from data_prep.dataset import SPLITS, Contents, Dataset, Found, Image, check_classes
from data_prep.errors import InputError

# What people keep images under; other files (Thumbs.db, README, annotations) are left out and counted.
IMAGE_NAMES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp")


def list_files(folder: str) -> list[tuple[str, int, object]]:
    """(path relative to `folder`, size in bytes, version) of every file below it, in sorted order.

    Hidden files and folders are left out. Links to files are followed, links to folders only directly in `folder`.
    The size of what can be no image, such as a link to nothing or a pipe, is -1.

    Raises:
      InputError: no such folder.
    """
    if not storage.is_folder(folder):
        what = "is a file" if storage.exists(folder) else "no such folder"
        raise InputError(f"{folder}: {what}; give a folder that holds one folder a class")
    if storage.is_remote(folder):
        return storage.find(folder)
    files, pending = [], [""]
    while pending:
        relative = pending.pop()
        with os.scandir(os.path.join(folder, relative)) as entries:
            for entry in entries:
                path = posixpath.join(relative, entry.name)
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=not relative):
                    pending.append(path)
                elif entry.is_file():
                    status = entry.stat()
                    files.append((path, status.st_size, status.st_mtime_ns))
                else:
                    files.append((path, -1, None))
    return sorted(files)


def digest(files: list[tuple[str, int, object]]) -> str:
    """Changes when any file's name, size or version does."""
    return hashlib.sha256(repr(files).encode("utf-8", "surrogateescape")).hexdigest()


def images(source: str, files: list[tuple[str, int, object]], found: Found, flat: bool = False) -> list[Image]:
    """The images in class folders, if `flat` also those outside (class ""); `found` gets what else there is."""
    listed, others = [], []
    for path, size, _ in files:
        synset = path.partition("/")[0] if "/" in path else ""
        if not (synset or flat) or not path.lower().endswith(IMAGE_NAMES):
            others.append(path)
        elif size < 0:
            found.rejected.append((storage.join(source, path), "is a link to nothing or a folder, or no file"))
        else:
            listed.append(Image(synset, path, size))
    if others:
        what = f"left out {len(others)} file(s) that are no images in a class folder, such as {others[0]}"
        found.notes.append(f"{source}: {what}")
    return listed


def dataset(train: str, validation: str, name: str = "") -> Dataset:
    """The data set of two folders that each hold one folder a class.

    Raises:
      InputError: see `list_files`; `scan` raises those of `check_classes`.
    """
    sources = {"train": train, "validation": validation}
    files = {split: list_files(source) for split, source in sources.items()}

    def scan() -> Contents:
        found = Found()
        listed = {split: images(sources[split], files[split], found) for split in SPLITS}
        synsets = check_classes(listed, sources)
        return Contents(listed, synsets, synsets, notes=found.notes, rejected=found.rejected)

    base = [os.path.basename(source.rstrip("/")) or source for source in sources.values()]
    return Dataset(
        name=name or os.path.basename(os.path.dirname(os.path.abspath(train))) or "images",
        origin=f"image folders {base[0]} and {base[1]}",
        sources=sources,
        stamp=[digest(listed) for listed in files.values()],
        scan=scan,
    )
