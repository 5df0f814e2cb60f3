"""A data set in folders, one for each class. The class index is the position in the sorted names of the folders."""

import hashlib
import itertools
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from data_prep import storage
from data_prep.errors import InputError
from data_prep.formats import image
from data_prep.sources.dataset import (
    SPLITS,
    Contents,
    Dataset,
    Found,
    Image,
    archive_of,
    by_kind,
    check_classes,
    check_splits,
    head,
)
from data_prep.storage import File

# Endings of pictures. Pictures that cannot be decoded count as bad images, and are named.
_PICTURES = {
    *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "bmp", "dib", "gif", "webp", "tif", "tiff", "avif", "avifs", "jxl"),
    *("heic", "heics", "heif", "hif", "ppm", "pgm", "pbm", "pnm", "pfm", "jp2", "j2k", "jpc", "jpf", "jpx", "j2c"),
    *(
        "ico",
        "cur",
        "icns",
        "tga",
        "icb",
        "vda",
        "vst",
        "pcx",
        "sgi",
        "rgb",
        "bw",
        "mpo",
        "psd",
        "qoi",
        "dds",
        "exr",
        "hdr",
    ),
    *("svg", "eps", "dng", "cr2", "cr3", "nef", "arw", "orf", "raf", "rw2", "raw"),
}
# Endings of other files, which are left out unopened. With any other ending the first bytes decide.
_OTHERS = {
    *("txt", "md", "rst", "html", "htm", "pdf", "doc", "docx", "csv", "tsv", "xml", "json", "jsonl", "yaml", "yml"),
    *("ini", "cfg", "log", "db", "sqlite", "mat", "npy", "npz", "pkl", "py", "sh", "md5", "sha1", "sha256", "url"),
    *("lnk", "mp4", "mov", "avi"),
}
_ARCHIVES = {"tar", "gz", "tgz", "bz2", "tbz2", "xz", "txz", "zst", "zip", "7z", "rar"}  # instead of a class folder


def list_files(folder: str) -> list[File]:
    """Every file below a folder: see `storage.Storage.find`.

    Raises:
      InputError: there is no such folder.
    """
    if not storage.is_folder(folder):
        what = "is no folder" if storage.exists(folder) else "no such folder"
        raise InputError(f"{folder}: {what}; give a folder that holds one folder a class, or a tar of it")
    return storage.find(folder)


def digest(files: list[File]) -> str:
    """A digest that changes if any file's name, size or version does."""
    return hashlib.sha256(repr(files).encode("utf-8", "surrogateescape")).hexdigest()


def images(source: str, files: list[File], found: Found) -> list[Image]:
    """The images of a folder, of class "" if they are in no class folder; `found` takes notes of everything else."""
    candidates = (Image(path.partition("/")[0] if "/" in path else "", path, size, -1, v) for path, size, v in files)
    listed, left_out = pictures(source, candidates, found)
    for file in listed:
        if file.size < 0:
            found.rejected.append((storage.join(source, file.path), "is a link to nothing or a folder, or no file"))
            left_out.setdefault(file.synset, Counter())[_ending(file.path)] += 1
    found.left_out[source] = by_class(left_out, lambda folder: folder.partition("/")[0])
    return [file for file in listed if file.size >= 0]


def pictures(
    source: str, files: Iterable[Image], found: Found, named: str = ""
) -> tuple[list[Image], dict[str, Counter]]:
    """Tells pictures from other files, by the ending or, if that is not known, by the first bytes.

    Args:
      source: the folder or archive.
      named: what notes call the source, if not by its path.
      files: all files and folders (with a slash at the end) of the source; the folder of each is its class.
      found: gets a note that counts the other files by kind.
    Returns:
      The pictures, and folder -> how many other files it holds, by kind. An archive counts as a folder.
    """
    kept, kinds, unknown, others = [], Counter(), [], []
    for file in files:
        kind = _ending(file.path)
        if kind in _PICTURES:
            kept.append(file)
            kinds[kind] += 1
        elif kind in _OTHERS or kind in _ARCHIVES or file.size <= 0:
            others.append(file)
        else:
            unknown.append(file)
    for file, start in zip(unknown, _heads(source, unknown), strict=True):
        if start is None or image.is_picture(start):
            kept.append(file)
            kinds[_ending(file.path)] += 1
        else:
            others.append(file)
    left_out, example = {}, ""
    for file in others:
        kind = _ending(file.path)
        folder = left_out.setdefault(file.path if kind in _ARCHIVES else file.synset, Counter())
        if not file.path.endswith("/"):
            folder[kind] += 1
            example = example or file.path
    found.notes.append(f"{named or source}: {by_kind(kinds) or 'no images'}")
    if example:
        left = by_kind(sum(left_out.values(), Counter()))
        found.notes[-1] += f"; left out what is no image: {left}, such as {example}"
    return kept, left_out


def _heads(source: str, files: list[Image]) -> Iterator[bytes | None]:
    """The first bytes of each file; None if it cannot be read."""
    deflated = [bool(file.packed) and file.packed[0] >= 0 for file in files]
    places = []
    for file in itertools.compress(files, map(operator.not_, deflated)):
        path, start = (archive_of(source, file), file.offset)
        if start < 0:
            path, start = storage.join(source, file.path), 0
        places.append((path, start, start + min(file.size, image.SIGNATURE_BYTES)))
    plain = iter(storage.heads(places))
    for file, is_deflated in zip(files, deflated, strict=True):
        yield head(source, file, image.SIGNATURE_BYTES) if is_deflated else next(plain)


def by_class(left_out: dict[str, Counter], class_of: Callable[[str], str]) -> dict[str, Counter]:
    """Adds up the counts of folders by class."""
    grouped = {}
    for folder, kinds in left_out.items():
        grouped.setdefault(class_of(folder), Counter()).update(kinds)
    return grouped


def _ending(path: str) -> str:
    """The part of a file's name after its last dot, in lower case."""
    ending = path.rpartition(".")[2]
    return "" if "/" in ending or len(ending) == len(path) else ending.lower()


def name_after(train: str, is_split: bool = True) -> str:
    """The default name of a data set: that of its archive, or of the folder above `train`.

    Args:
      train: a folder or an archive.
      is_split: whether `train` holds only training images.
    """
    stem = os.path.splitext(os.path.basename(train.rstrip("/")))[0]
    if not storage.is_folder(train) and not stem.lower().startswith("train"):
        return stem
    return os.path.basename(os.path.dirname(os.path.abspath(train)) if is_split else os.path.abspath(train)) or "images"


def dataset(train: str, validation: str, name: str = "") -> Dataset:
    """The data set of two folders, each with a folder for each class.

    Raises:
      InputError: both splits have the same images; or as in `list_files`. `scan` raises the errors of `check_classes`.
    """
    check_splits(train, validation)
    sources = {"train": train, "validation": validation}
    files = {split: list_files(source) for split, source in sources.items()}

    def scan() -> Contents:
        found = Found()
        listed = {split: images(sources[split], files[split], found) for split in SPLITS}
        synsets = check_classes(listed, sources, found)
        return Contents(listed, synsets, synsets, notes=found.notes, rejected=found.rejected)

    base = [os.path.basename(source.rstrip("/")) or source for source in sources.values()]
    return Dataset(
        name=name or name_after(train),
        origin=f"image folders {base[0]} and {base[1]}",
        sources=sources,
        stamp=[digest(listed) for listed in files.values()],
        scan=scan,
    )
