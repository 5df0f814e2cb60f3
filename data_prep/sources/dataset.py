"""The input of a conversion: labelled images in folders or archives, not read yet."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from data_prep import storage
from data_prep.errors import BadImageError, InputError
from data_prep.formats.fast_zlib import zlib

SPLITS = ("train", "validation")
MOST_CLASSES = 1 << 17  # a larger class number is an error
_AGAIN = "fix: give the same command again, which plans again"

# (xmin, ymin, xmax, ymax) of one object, as fractions of the image's width and height.
Box = tuple[float, float, float, float]


class Image(NamedTuple):
    """One image file: the class it belongs to and where its bytes are."""

    synset: str  # class folder, for ImageNet the WordNet id
    path: str  # in its folder or archive
    size: int  # bytes
    offset: int = -1  # in the archive; -1: a file of a folder
    version: object = None  # JSON value that changes with the content: time of modification, a checksum, a store's tag
    archive: str = ""  # the archive in the folder; "": the source itself
    packed: tuple[int, ...] = ()  # of a zip's member: the bytes it takes if it is deflated, else -1; CRC-32

    @property
    def name(self) -> str:
        """The file's name without folders."""
        return self.path.rpartition("/")[2]


@dataclass
class Found:
    """What a scan gathers beside the images: see `Contents`.

    Attributes:
      left_out: source -> folder -> how many of its files are no images, by kind; {} for an empty folder.
      classes: number -> class and its name, if the source numbers its classes; if empty, they are numbered in order.
    """

    notes: list[str] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    left_out: dict[str, dict[str, Counter]] = field(default_factory=dict)
    classes: dict[int, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Contents:
    """What a scan of a data set has found.

    Attributes:
      images: split -> its images, in any order.
      synsets: the class folder or WordNet id of each class index.
      class_names: the name of each class index, for people.
      boxes: file name without extension -> bounding boxes.
      notes: lines about what was left out.
      rejected: (path, why) of members that must not be used; they count as bad images.
    """

    images: dict[str, list[Image]]
    synsets: list[str]
    class_names: list[str]
    boxes: dict[str, list[Box]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Dataset:
    """A data set as the command line names it.

    Attributes:
      name: a short name, for the manifest.
      origin: what the data set is made from, for people.
      sources: split -> folder or archive to which images' paths and offsets refer.
      named: split -> what messages call its source; None for the source itself.
      unpacked: local folder into which `scan` unpacks archives that can only be read in order; removed at the end.
      stamp: a JSON value that changes when the inputs do; it is cheap to get.
      scan: a function that lists everything, which may take minutes.
    """

    name: str
    origin: str
    sources: dict[str, str]
    stamp: object
    scan: Callable[[], Contents]
    unpacked: str = ""
    named: dict[str, str] | None = None


def by_kind(kinds: Counter) -> str:
    """Says how many files there are of each kind."""
    return ", ".join(f"{count:,} {f'.{kind}' if kind else 'without an ending'}" for kind, count in kinds.most_common())


def check_splits(train: object, validation: object) -> None:
    """Raises InputError if both splits are of the same images."""
    if train == validation:
        raise InputError(f"{train}: is given for training and for validation; give other images for one")


def check_classes(images: dict[str, list[Image]], sources: dict[str, str], found: Found) -> list[str]:
    """The classes of the training images, in order. Images in no class folder are removed, with a note.

    Raises:
      InputError: a split has no images in class folders, a class folder has no image, there are fewer than two classes,
        or only validation images have a class.
    """
    classes = {}
    for split in SPLITS:
        source = sources[split]
        classes[split] = {image.synset for image in images[split]} - {""}
        strays = [image.path for image in images[split] if not image.synset]
        if not classes[split]:
            if not strays:
                reasons = [f"; {path} {why}" for path, why in found.rejected if path.startswith(source)]
                reasons += [f"; {note}" for note in found.notes if note.startswith(f"{source}: ")]
                raise InputError(f"{source}: no images found for the {split} split{''.join(reasons[:1])}")
            raise InputError(
                f"{source}: its {len(strays)} {split} image(s), such as {strays[0]}, are in no class folder; "
                "give what holds one folder a class"
            )
        if strays:
            found.notes.append(f"{source}: left out {len(strays)} image(s) in no class folder, such as {strays[0]}")
            images[split] = [image for image in images[split] if image.synset]
        left_out = found.left_out.get(source, {})
        if empty := sorted(left_out.keys() - classes[split] - {""}):
            named = ", ".join(f"{name!r} ({by_kind(left_out[name]) or 'nothing in it'})" for name in empty[:5])
            raise InputError(
                f"{source}: {len(empty)} class(es) without an image: {named}{', ...' if len(empty) > 5 else ''}; "
                "fix: add images, unpack what is an archive, or remove it"
            )
    train, validation = classes.values()
    if len(train) < 2:
        raise InputError(
            f"{sources['train']}: holds one class ({', '.join(train)}); give a folder that holds one folder a class, "
            "with at least two classes"
        )
    if unknown := sorted(validation - train):
        raise InputError(
            f"{sources['validation']}: {len(unknown)} class(es) that {sources['train']} lacks: "
            f"{', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}; no network can learn these; "
            "add training images or remove the folders"
        )
    if found.classes:  # also a class without an image, as the others keep their numbers
        return [found.classes[number][0] for number in sorted(found.classes)]
    return sorted(train)


class Placed(Protocol):
    """Where the bytes of an image are; what `Image` and a plan's `Member` have in common."""

    @property
    def path(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def offset(self) -> int: ...

    @property
    def archive(self) -> str: ...

    @property
    def packed(self) -> Sequence[int]: ...


def archive_of(source: str, image: Placed) -> str:
    """The archive to which an image's offset refers."""
    return storage.join(source, image.archive) if image.archive else source


def read_image(source: str, image: Placed) -> bytes:
    """The bytes of one image; `source` is the folder or archive it is in.

    Raises:
      BadImageError: the image may not be read, or its zip archive is damaged there.
      InputError: the image is gone, or its size has changed.
    """
    stored = image.packed[0] if image.packed and image.packed[0] >= 0 else image.size
    try:
        if image.offset < 0:
            data = storage.read(storage.join(source, image.path))
        else:
            data = storage.read_range(archive_of(source, image), image.offset, stored)
    except FileNotFoundError:
        raise InputError(
            f"{storage.join(source, image.path)}: was there when the plan was made and is gone; {_AGAIN}"
        ) from None
    except PermissionError:
        raise BadImageError("may not be read (permission denied)") from None
    if len(data) != stored:
        raise InputError(
            f"{storage.join(source, image.path)}: had {stored} bytes when the plan was made, now {len(data)}; {_AGAIN}"
        )
    return _unpacked(data, image) if image.packed else data


def _unpacked(data: bytes, image: Placed) -> bytes:
    """The content of a member of a zip archive."""
    deflated, crc = image.packed
    if deflated >= 0:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, image.size + 1)
        except zlib.error as error:
            raise BadImageError(f"is damaged in its zip archive ({error})") from None
    if len(data) != image.size or zlib.crc32(data) != crc:
        raise BadImageError("is damaged in its zip archive (its CRC-32 is another)")
    return data


def head(source: str, image: Placed, size: int) -> bytes:
    """At most the first `size` bytes of a deflated image."""
    start = storage.read_range(archive_of(source, image), image.offset, min(image.packed[0], 4 * size + 256))
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(start, size)
    except zlib.error:
        return b""
