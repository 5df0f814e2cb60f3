"""Finds a split's images: in a folder of class folders, an archive, a folder in an archive, or several archives.

A folder in an archive is written like a folder in a folder: `data.zip/train`. Tar and zip archives are read where they
are, and so is Parquet whose images are not compressed. Archives that can only be read in order are unpacked beside the
plan: gzip to its tar, compressed Parquet to its images.
"""

import functools
import glob
import gzip
import json
import os
import posixpath
import re
import sys
import weakref
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from data_prep import storage
from data_prep.errors import InputError
from data_prep.sources import image_folder, parquet, tar, zip
from data_prep.sources.dataset import MOST_CLASSES, Found, Image, read_image
from data_prep.sources.zip import Read

ENDINGS = (".tar", ".tar.gz", ".tgz", ".zip", ".parquet")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev", "test", "testing"), "validation"),
}
"""What people call the splits. If there are several names for a split, the first one here is taken."""

_WNID = re.compile(r"n\d{8}")
_HUGGING_FACE = re.compile(r"(.*)_(n\d{8})(\.JPEG)", re.DOTALL)  # n01440764_10026_n01440764.JPEG
_SPLIT = re.compile(r"(?:^|[^a-z])(train|validation|valid|val|test)(?:ing)?(?:[^a-z]|$)")
_SMALL = (".csv", ".txt")
_MAX_LABEL = 1 << 16  # most bytes of a .cls or .json
_MAX_TEXT = 1 << 26  # most bytes of a table of labels or an annotation
_BLOCK = 1 << 20
_INSIDE = re.compile(r"(.*?\.(?:zip|tar|tar\.gz|tgz))/(.*)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Place:
    """Where images are.

    Attributes:
      path: the path as a person wrote it.
      folder: the folder, or the only archive.
      archives: the names of archives in the folder; "" for the only one; none if the folder itself holds images.
      inside: a folder in each archive; "" for all of the archive.
    """

    path: str
    folder: str
    archives: tuple[str, ...] = ()
    inside: str = ""

    def file(self, archive: str) -> str:
        return storage.join(self.folder, archive) if archive else self.folder

    @functools.cached_property
    def is_unpacked(self) -> bool:
        """Whether some of its archives can only be read in order."""
        kinds = {file: _kind(file) for file in map(self.file, self.archives)}
        return any(
            kind == "gzip" or (kind == "parquet" and parquet.is_copied(file, _reader(file)))
            for file, kind in kinds.items()
        )

    def source(self, unpacked: str) -> str:
        """The folder or archive to which its images' offsets refer; `unpacked` is the folder to unpack into."""
        return unpacked if self.is_unpacked else self.folder

    def stamp(self) -> object:
        """A JSON value that changes when its files do."""
        if self.archives:
            return [[archive, *storage.version(self.file(archive))] for archive in self.archives]
        return image_folder.digest(image_folder.list_files(self.folder))


def locate(path: str | Place) -> Place:
    """The place that a path names; a place is returned as it is.

    Raises:
      InputError: there is nothing at the path.
    """
    if isinstance(path, Place):
        return path
    if storage.is_folder(path):
        names = [name for name in storage.names(path) if not storage.is_clutter(name)]
        held = tuple(name for name in names if name.lower().endswith(ENDINGS))
        if held and not any(storage.is_folder(storage.join(path, name)) for name in names):
            return Place(path, path, held)
        return Place(path, path.rstrip("/") or path)
    if storage.exists(path):
        return Place(path, path, ("",))
    if (match := _INSIDE.fullmatch(path)) and storage.exists(match[1]):
        return Place(path, match[1], ("",), match[2].strip("/"))
    if glob.has_magic(path) and (found := sorted(glob.glob(path))):
        return Place(path, os.path.dirname(path), tuple(map(os.path.basename, found)))
    raise InputError(f"{path}: no such folder; give a folder that holds one folder a class, or an archive of it")


def _kind(file: str) -> str:
    """The kind of an archive, by its first bytes."""
    (start,) = storage.heads([(file, 0, 4)])
    kinds = {**dict.fromkeys(zip.SIGNATURES, "zip"), b"PAR1": "parquet"}
    return "gzip" if (start or b"").startswith(b"\x1f\x8b") else kinds.get(start or b"", "tar")


@dataclass
class Unpacked:
    """A folder for unpacking archives that can only be read in order.

    Attributes:
      folder: the folder's path.
      names: archive -> name of the file that it was unpacked to.
    """

    folder: str
    names: dict[str, str] = field(default_factory=dict)

    def name(self, archive: str, ending: str) -> str:
        """The name of the file to unpack an archive to."""
        stem = posixpath.basename(archive).partition(".")[0]
        return self.names.setdefault(archive, f"{len(self.names)}-{stem}.{ending}")


def _reader(file: str) -> Read:
    """A function (offset, size) -> bytes of a file; for a gzip file, of its content.

    A remote or compressed file is read from beginning to end, a local one only where it is asked for.
    """
    is_gzip = _kind(file) == "gzip"
    if not storage.is_remote(file) and not is_gzip:
        return functools.partial(storage.read_range, file)
    stored: Any = storage.open_read(file)
    opened = gzip.GzipFile(fileobj=stored) if is_gzip else stored

    def read_through(offset: int, size: int) -> bytes:
        opened.seek(offset)
        return opened.read(size)

    weakref.finalize(read_through, stored.close)
    return read_through


def _index(file: str, read: Read, named: str, wanted: Callable[[str], bool]) -> Iterator[tar.Member]:
    """The members of these names of a zip or tar archive that `_reader` reads."""
    if _kind(file) == "zip":
        return zip.index(read, storage.size(file), named, wanted)
    return (member for member in _tar_index(file, read, named) if wanted(member.name))


def _tar_index(file: str, read: Read, named: str) -> Iterator[tar.Member]:
    end = 1 << 62 if _kind(file) == "gzip" else storage.size(file)  # only its end tells how long it is
    try:
        yield from tar.index(read, 0, end, named)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{named}: damaged archive ({error}); fix: download it again") from None


# Names in archives


@functools.lru_cache(maxsize=4)
def _names(file: str, version: tuple) -> frozenset[str]:
    """The folders of a zip or tar archive, and its files that may hold labels."""
    found = set()
    if _kind(file) == "zip":
        listed = zip.names(_reader(file), storage.size(file), file)
    else:
        listed = (member.name for member in _tar_index(file, _reader(file), file))
    for name in listed:
        folder = posixpath.dirname(name)
        while folder and folder not in found:
            found.add(folder)
            folder = posixpath.dirname(folder)
        if name.endswith(_SMALL):
            found.add(name)
    return frozenset(found)


def _inside(path: str) -> tuple[str, str] | None:
    """The tar or zip archive that a path leads into, and the path in it, "" for the archive itself; else None."""
    match = _INSIDE.fullmatch(path if path.endswith("/") else f"{path}/")
    if match and storage.size(match[1]) >= 0 and _kind(match[1]) != "parquet":
        return match[1], posixpath.normpath(match[2]) if match[2] else ""
    return None


def exists(path: str) -> bool:
    """Whether a file or folder exists, also in an archive."""
    if storage.exists(path):
        return True
    place = _inside(path)
    return place is not None and place[1] in _names(place[0], tuple(storage.version(place[0])))


def folders(path: str) -> list[str]:
    """The names of the folders in a folder or at the top of an archive, without clutter."""
    if storage.is_folder(path):
        shown = (name for name in storage.names(path) if not storage.is_clutter(name))
        return [name for name in shown if storage.is_folder(storage.join(path, name))]
    place = _inside(path)
    if not place:
        return []
    prefix = f"{place[1]}/" if place[1] else ""
    names = _names(place[0], tuple(storage.version(place[0])))
    below = {name.removeprefix(prefix).partition("/")[0] for name in names if name.startswith(prefix)}
    return sorted(name for name in below if f"{prefix}{name}" in names and not name.endswith(_SMALL))


def read(path: str) -> bytes:
    """The bytes of a file, which may be in an archive."""
    if storage.exists(path):
        return storage.read(path)
    archive, name = _inside(path) or (path, "")
    return next(content for _, content in _contents(archive, name.__eq__))


def files(path: str, ending: str) -> Iterator[tuple[str, bytes]]:
    """The path and bytes of each file with this ending below a folder, which may be in an archive."""
    if storage.is_folder(path):
        for file in image_folder.list_files(path):
            if file.path.endswith(ending):
                yield (full := storage.join(path, file.path)), storage.read(full)
        return
    archive, inside = _inside(path) or (path, "")
    folder = f"{inside}/" if inside else ""
    for name, content in _contents(archive, lambda name: name.startswith(folder) and name.endswith(ending)):
        yield f"{archive}/{name}", content


def _contents(archive: str, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    read = _reader(archive)
    for member in _index(archive, read, archive, wanted):
        if not member.rejected and member.size <= _MAX_TEXT:
            image = Image("", member.name, member.size, member.offset, packed=member.packed)
            yield member.name, read_image(archive, image) if member.packed else read(member.offset, member.size)


def splits(path: str) -> tuple[dict[str, Place], str]:
    """Finds training and validation images in a folder or an archive, by names.

    The names are folders `train` and `val`, or archives with these words in their names, also in the folder `data`.

    Returns:
      Split -> place, empty if no names tell, and a line that says what was found.
    """
    below = folders(path)
    while len(below) == 1 and below[0].lower() not in (*SPLIT_NAMES, "data"):  # a folder that holds everything
        path = storage.join(path, below[0])
        below = folders(path)
    named, note = _by_split({name: name.lower() for name in below}, path)
    if named:
        return {split: locate(storage.join(path, names[0])) for split, names in named.items()}, note
    for folder in (path, storage.join(path, "data")):
        held = (
            [name for name in storage.names(folder) if name.lower().endswith(ENDINGS)]
            if storage.is_folder(folder)
            else []
        )
        words = {name: match[1] for name in held if (match := _SPLIT.search(name.lower()))}
        named, note = _by_split(words, folder)
        if named:
            return {split: Place(folder, folder, tuple(names)) for split, names in named.items()}, note
    return {}, ""


def innermost(folder: str) -> str:
    """The folder itself or, as long as it holds one folder of folders and perhaps texts, that one."""
    while storage.is_folder(folder):
        held = [name for name in storage.names(folder) if not storage.is_clutter(name)]
        held = [name for name in held if not name.lower().endswith((*_SMALL, ".md"))]
        if len(held) != 1 or not folders(inner := storage.join(folder, held[0])):
            break
        folder = inner
    return folder


def _by_split(words: dict[str, str], path: str) -> tuple[dict[str, list[str]], str]:
    """Split -> names in a folder, by the word in each that names a split; empty unless there are both splits."""
    present = [word for word in SPLIT_NAMES if word in words.values()]
    chosen = {SPLIT_NAMES[word]: word for word in reversed(present)}
    if len(chosen) < 2:
        return {}, ""
    named = {
        split: [name for name, word in words.items() if word == chosen[split]] for split in ("train", "validation")
    }
    others = sorted(set(words) - {name for names in named.values() for name in names})
    said = " and ".join(f"{len(names)} archives" if len(names) > 1 else names[0] for names in named.values())
    left = f"; left out: {', '.join(others[:5])}" if others else ""
    return named, f"{path}: training and validation images are {said}{left}"


# Images


def images(place: Place, unpacked: Unpacked, found: Found, label_column: str = "") -> list[Image]:
    """The images of a place, each with its class, "" if that is not known.

    Folders that hold all others, such as train/ in train/WNID/, are no classes.

    Args:
      place: where the images are.
      unpacked: where to unpack archives that can only be read in order.
      found: takes notes of everything else.
      label_column: the column of a Parquet file that holds the class; "" for the one that is called so.
    Raises:
      InputError: an archive is cut or damaged, or has no classes.
    """
    if not place.archives:
        return image_folder.images(place.folder, image_folder.list_files(place.folder), found)
    if place.is_unpacked:
        storage.make_folder(unpacked.folder)
    if _kind(place.file(place.archives[0])) == "parquet":
        listed = []
        for archive in place.archives:
            file, target = place.file(archive), ""
            if place.is_unpacked:
                target = storage.join(unpacked.folder, unpacked.name(file, "images"))
            listed += parquet.images(file, _reader(file), bool(archive), target, found, label_column)
        return listed
    labels = _Labels()
    members = (image for archive in place.archives for image in _members(place, archive, unpacked, labels, found))
    listed, left_out = image_folder.pictures(place.source(unpacked.folder), members, found, place.path)
    if labels:
        return labels.given_to(listed, place, found)
    for number, image in enumerate(listed):  # in place, as a copy of ImageNet's takes 160 MB
        listed[number] = _unsuffixed(image)
    around = _around({image.synset for image in listed} - {""})
    inside = f"{around}/" if around else ""
    classes = {image.synset: image.synset.removeprefix(inside).partition("/")[0] for image in listed} | {around: ""}
    below = {folder: kinds for folder, kinds in left_out.items() if folder.startswith(inside)}
    found.left_out[place.path] = image_folder.by_class(below, lambda f: f.removeprefix(inside).partition("/")[0])
    for number, image in enumerate(listed):
        listed[number] = image._replace(synset=classes[image.synset])
    return listed


def _around(folders: set[str]) -> str:
    """The folder that holds all class folders."""
    return os.path.commonpath(folders) if len(folders) > 1 else posixpath.dirname("".join(folders))


def _unsuffixed(image: Image) -> Image:
    """Gives an image without a folder the class at the end of its name, as in Hugging Face's parts of ImageNet."""
    match = _HUGGING_FACE.fullmatch(image.path) if not image.synset else None
    return image._replace(synset=match[2], path=match[1] + match[3]) if match else image


def _members(place: Place, archive: str, unpacked: Unpacked, labels: "_Labels", found: Found) -> Iterator[Image]:
    """The files and folders of an archive and of the tars in it; the folder of each is its class."""
    file = named = place.file(archive)
    name = archive
    prefix = f"{archive}/" if archive else ""
    version = " ".join(map(str, storage.version(file)))
    if _kind(file) == "gzip":
        file, name = _gunzipped(file, unpacked)
    single = re.fullmatch(r"(.*)\.tar", archive) if len(place.archives) > 1 else None
    of_class = single[1] if single and _WNID.fullmatch(single[1]) else ""
    read, is_zip = _reader(file), _kind(file) == "zip"
    inside = f"{place.inside}/" if place.inside else ""
    for member in _index(file, read, named, lambda name: name.startswith(inside)):
        folder, _, base = member.name.rpartition("/")
        folder = sys.intern(folder[len(place.inside) :].strip("/"))  # of a thousand images one string
        if member.rejected:
            found.rejected.append((f"{named}/{member.name}", member.rejected))
        elif is_zip or not base.endswith(".tar"):
            where = member.offset, member.packed[1] if member.packed else version, name, member.packed
            path = prefix + member.name
            labels.note(path, member, read)
            yield Image(of_class or folder, path, member.size, *where)
        else:
            synset = base.removesuffix(".tar")
            yield Image(synset, f"{synset}/", 0)
            end = member.offset + member.size
            for inner in tar.index(read, member.offset, end, f"{named}/{member.name}"):
                if not inner.name.endswith("/"):
                    path = f"{synset}/{posixpath.basename(inner.name)}"
                    if why := inner.rejected or _misplaced(path, synset):
                        found.rejected.append((f"{named}/{member.name}/{inner.name}", why))
                    else:
                        yield Image(synset, path, inner.size, inner.offset, version, name)


def _misplaced(path: str, synset: str) -> str:
    named_after = not _WNID.fullmatch(synset) or path.startswith(f"{synset}/{synset}_")
    return "" if named_after else "is not named after its class"


def _gunzipped(file: str, unpacked: Unpacked) -> tuple[str, str]:
    """Unpacks the tar in a gzip file, unless that was done before, and returns it with its name.

    Raises:
      InputError: the file is cut or damaged, or the checksum at its end does not fit.
    """
    known, name = file in unpacked.names, unpacked.name(file, "tar")
    target = storage.join(unpacked.folder, name)
    if not known:
        try:
            with (
                storage.open_read(file) as packed,
                gzip.open(packed) as stream,
                storage.written_aside(target) as output,
            ):
                while block := stream.read(_BLOCK):
                    output.write_all([block])
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{file}: damaged archive ({error}); fix: download it again") from None
    return target, name


class _Labels(dict):
    """The classes of a WebDataset, from N.cls or N.json beside N.jpg: path without endings -> class."""

    def note(self, path: str, member: tar.Member, read) -> None:
        """Reads a file of the archive, if it is one that holds a class."""
        stem, _, ending = path.rpartition(".")
        if ending not in ("cls", "json") or member.size > _MAX_LABEL or member.packed:
            return
        text = read(member.offset, member.size)
        if ending == "json":
            try:
                text = str(json.loads(text)["label"]).encode()
            except (ValueError, KeyError, TypeError, RecursionError):
                return
            self.setdefault(stem, text.decode("utf-8", "replace").strip())
        else:
            self[stem] = text.decode("utf-8", "replace").strip()

    def given_to(self, listed: list[Image], place: Place, found: Found) -> list[Image]:
        """The images with their classes; images without one are rejected."""
        labelled = []
        for image in listed:
            folder, _, base = image.path.rpartition("/")
            stem = f"{folder}/{base.partition('.')[0]}" if folder else base.partition(".")[0]
            if label := self.get(stem):
                labelled.append(image._replace(synset=label))
            else:
                found.rejected.append((f"{place.folder}/{image.path}", "has no class: no .cls beside it"))
        numbers = {image.synset for image in labelled}
        if all(re.fullmatch("[0-9]{1,6}", number) for number in numbers):
            most = max(map(int, numbers), default=-1)
            if most < MOST_CLASSES:
                found.classes |= {number: (str(number), str(number)) for number in range(most + 1)}
                return [image._replace(synset=str(int(image.synset))) for image in labelled]
        return labelled
