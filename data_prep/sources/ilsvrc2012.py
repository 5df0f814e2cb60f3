"""Reads the ILSVRC2012 release ("ImageNet"): its archives or folders made of them, its devkit and bounding boxes.

These forms are known. Their parts are found by name below one folder, or given one by one:
  the release     ILSVRC2012_img_train.tar (a tar of 1,000 class tars), ILSVRC2012_img_val.tar (flat),
                  ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_bbox_train_v2.tar.gz, ILSVRC2012_bbox_val_v3.tgz
  torchvision's   train/WNID/*.JPEG, val/WNID/*.JPEG
  Kaggle's        ILSVRC/Data/CLS-LOC/{train/WNID,val}/*.JPEG, LOC_val_solution.csv, LOC_synset_mapping.txt: the folder,
                  its zip, or patched2019.tar.gz, which has annotations in place of the CSV
  Hugging Face's  data/{train,validation}-*.parquet, or data/{train_images_*,val_images}.tar.gz
  Tiny ImageNet   train/WNID/images/*.JPEG, val/images/*.JPEG, val/val_annotations.txt, words.txt: the folder or its zip

The class index is the position of the WordNet id (wnid) in sorted order, as everywhere since Caffe. The devkit numbers
the classes differently (ILSVRC2012_ID, the order of meta.mat). Its validation ground truth has only these numbers,
which are mapped to the class index through the wnid.
"""

import contextlib
import csv
import dataclasses
import functools
import gzip
import io
import posixpath
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from data_prep import storage
from data_prep.errors import InputError
from data_prep.sources import archives, image_folder, share
from data_prep.sources.archives import Place, Unpacked, locate
from data_prep.sources.dataset import SPLITS, Box, Contents, Dataset, Found, Image, check_classes, check_splits

NAME = "imagenet2012"
CLASSES = 1000
IMAGES = {"train": 1_281_167, "validation": 50_000}

# Endings of archives of Kaggle and Stanford that hold all parts.
_WHOLE = ("challenge.zip", "patched2019.tar.gz", "patched2019.tar", "imagenet-200.zip")

# Where each part may be below the folder given as --imagenet; the first that exists is taken.
_PLACES = {
    "train": ("ILSVRC2012_img_train.tar", "train", "ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train", "CLS-LOC/train"),
    "validation": (
        *("ILSVRC2012_img_val.tar", "val", "validation"),
        *("ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val", "CLS-LOC/val"),
    ),
    "devkit": ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12", "devkit"),
    "train_boxes": (
        "ILSVRC2012_bbox_train_v2.tar.gz",
        "ILSVRC/Annotations/CLS-LOC/train",
        "Annotations/CLS-LOC/train",
    ),
    "validation_boxes": ("ILSVRC2012_bbox_val_v3.tgz", "ILSVRC/Annotations/CLS-LOC/val", "Annotations/CLS-LOC/val"),
    # Tiny ImageNet has its own table; `..` finds Kaggle's if a folder inside of it was given.
    "validation_labels": (
        *("LOC_val_solution.csv", "val/val_annotations.txt"),
        *("../LOC_val_solution.csv", "../../LOC_val_solution.csv", "../../../LOC_val_solution.csv"),
    ),
    "synset_words": (
        *("LOC_synset_mapping.txt", "words.txt"),
        *("../LOC_synset_mapping.txt", "../../LOC_synset_mapping.txt", "../../../LOC_synset_mapping.txt"),
    ),
}

_WNID = re.compile(r"n\d{8}")
_WORDS = re.compile(r"(n\d{8})[ \t](.*)")
_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)
_MAX_TEXT = 1 << 26  # most bytes of a devkit (2.5 MB) or of one small file in it
_MAX_XML = 1 << 20  # most bytes of one annotation (under 10 kB)


@dataclass(frozen=True)
class Release:
    """The paths of the parts, "" for a missing one. Without validation images, a share of training is taken."""

    train: str | Place
    validation: str | Place
    devkit: str = ""
    train_boxes: str = ""
    validation_boxes: str = ""
    validation_labels: str = ""
    synset_words: str = ""


def find(folder: str, given: Mapping[str, str | None]) -> Release:
    """Finds the parts in a folder or archive, or in the only folder or known archive in it; `given` ones come first.

    Raises:
      InputError: there is no such folder, or it has no training or no validation images.
    """
    if folder and not archives.exists(folder):
        raise InputError(f"--imagenet={folder}: no such folder; give the one that holds {_PLACES['train'][0]}")
    parts, root = dict[str, Any](), folder
    if folder and not all(given.get(split) for split in SPLITS):
        root = next((place for place in _roots(folder) if _part(place, "train")), folder)
    for part in _PLACES:
        parts[part] = given.get(part) or (_part(root, part) if folder else "")
    if folder and not any(parts[split] for split in SPLITS):
        parts |= archives.splits(root)[0]
    for split in SPLITS:
        if not parts[split]:
            raise InputError(f"--imagenet={folder}: holds none of {', '.join(_PLACES[split])}; or give --{split}=PATH")
    for part, path in parts.items():
        if isinstance(path, str) and path and not archives.exists(path):
            raise InputError(f"--{part}={path}: no such file or folder")
    return Release(**parts)


def _part(folder: str, part: str) -> str:
    """The path of a part of the release in a folder or archive; "" if the part is missing."""
    return next((path for place in _PLACES[part] if archives.exists(path := storage.join(folder, place))), "")


def _roots(folder: str, depth: int = 3) -> Iterator[str]:
    """A folder or archive, then the known archives in it, the only folder in it, and so on downwards."""
    yield folder
    below = archives.folders(folder)
    if storage.is_folder(folder):
        below = [name for name in storage.names(folder) if name.lower().endswith(_WHOLE)] + below[: len(below) == 1]
    if depth and len(below) == 1:
        yield from _roots(storage.join(folder, below[0]), depth - 1)


@dataclass(frozen=True)
class Given:
    """What the person has given beside the places.

    Attributes:
      strict: whether to require 1,000 synsets, 1,281,167 training and 50,000 validation images.
      share: the share of validation, between 0 and 1, if images are not split; None for 0.2. `seed` decides which.
      label_column: the column of Parquet files that holds the class.
      note: a line that says how the places were found.
    """

    strict: bool = False
    share: float | None = None
    seed: int = 0
    label_column: str = ""
    note: str = ""


NOTHING = Given()


def _share(given: Given) -> float:
    return 0.2 if given.share is None else given.share


@dataclass(frozen=True)
class Devkit:
    """wnid by ILSVRC2012_ID, words by wnid (both of meta.mat), ILSVRC2012_ID by validation image number - 1."""

    wnids: dict[int, str]
    words: dict[str, str]
    ground_truth: list[int]


def read_devkit(path: str) -> Devkit:
    """Reads ILSVRC2012_devkit_t12, the archive or its extracted folder.

    Raises:
      InputError: a part of the devkit is missing or malformed.
    """
    wanted = {"meta.mat": b"", "ILSVRC2012_validation_ground_truth.txt": b""}
    if storage.is_folder(path):
        for name in wanted:
            file = storage.join(path, "data", name)
            wanted[name] = storage.read(file) if storage.exists(file) else b""
    else:
        for member, content in _small_files(path, _MAX_TEXT, wanted.__contains__):
            wanted[posixpath.basename(member)] = content
    for name, content in wanted.items():
        if not content:
            raise InputError(f"{path}: holds no {name}; is it ILSVRC2012_devkit_t12?")
    mat, truth = wanted.values()
    import scipy.io

    try:
        synsets = scipy.io.loadmat(io.BytesIO(mat), squeeze_me=True)["synsets"]
        rows = [(int(row["ILSVRC2012_ID"]), str(row["WNID"]), str(row["words"])) for row in synsets.ravel()]
    except Exception as error:  # whatever scipy raises for a damaged .mat
        raise InputError(f"{path}: meta.mat cannot be read ({error}); fix: download the devkit again") from None
    wnids = {number: wnid for number, wnid, _ in rows}
    if not rows or len(wnids) < len(rows) or not all(map(_WNID.fullmatch, wnids.values())):
        raise InputError(f"{path}: meta.mat holds no table of unique ids and wnids; fix: download the devkit again")
    numbers = truth.split()
    if not all(re.fullmatch(b"[0-9]{1,9}", number) and int(number) in wnids for number in numbers):
        raise InputError(f"{path}: its ground truth holds an id that meta.mat lacks; fix: download the devkit again")
    return Devkit(wnids, {wnid: words for _, wnid, words in rows}, [int(number) for number in numbers])


def _small_files(path: str, limit: int, wanted) -> Iterator[tuple[str, bytes]]:
    """Streams the name and bytes of the files in a gzipped tar archive whose base name is `wanted`.

    Raises:
      InputError: the archive is missing, cut or damaged (gzip's checksum is compared at the end), or a member has more
        than `limit` bytes.
    """
    try:
        with storage.open_read(path) as file, gzip.open(file) as unzipped:
            with tarfile.open(fileobj=unzipped, mode="r|") as archive:
                while member := archive.next():
                    if member.size > limit:
                        raise InputError(f"{path}: member {member.name!r} declares {member.size:,} bytes; wrong file?")
                    wants = member.isfile() and wanted(posixpath.basename(member.name))
                    if wants and (content := archive.extractfile(member)):
                        yield member.name, content.read()
                    archive.members = []  # type: ignore[attr-defined]  # it keeps every header it has seen
            if len(unzipped.read(_MAX_TEXT)) == _MAX_TEXT:  # gzip compares its checksum only when it is read to the end
                raise InputError(f"{path}: something follows the end of the archive")
    except InputError:
        raise
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError, RuntimeError) as error:
        raise InputError(f"{path}: damaged archive ({error}); fix: download it again") from None


def read_boxes(path: str, found: Found) -> Iterator[tuple[str, list[Box]]]:
    """The image's name without extension, and the boxes, of every annotation (Pascal VOC XML) in an archive or folder.

    Coordinates become fractions of the size that the annotation states, clipped to [0, 1]. Boxes without area, which
    the release contains, are left out, as in TF-Slim's process_bounding_boxes.py.
    """
    files: Iterator[tuple[str, bytes]]
    if path.endswith(("gz", ".GZ")) and not storage.is_folder(path):
        held = _small_files(path, _MAX_XML, lambda name: name.endswith(".xml") and not name.startswith("."))
        files = ((f"{path}/{name}", content) for name, content in held)
    else:
        files = archives.files(path, ".xml")
    for name, content in files:
        try:
            boxes = _parse_boxes(content)
        except (ElementTree.ParseError, ValueError, TypeError, OverflowError) as error:
            found.rejected.append((name, f"is no bounding-box annotation ({error})"))
            continue
        yield posixpath.splitext(posixpath.basename(name))[0], boxes


def _parse_annotation(content: bytes) -> ElementTree.Element:
    if b"<!" in content:
        raise ValueError("declares entities or a document type")
    return ElementTree.fromstring(content)


def _parse_boxes(content: bytes) -> list[Box]:
    root = _parse_annotation(content)
    width, height = (float(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
    if not (0 < width < 1e6 and 0 < height < 1e6):
        raise ValueError(f"a size of {width} x {height}")
    boxes = []
    for box in root.iterfind("object/bndbox"):
        xmin, ymin, xmax, ymax = (
            min(max(float(box.findtext(edge, "")) / size, 0.0), 1.0)
            for edge, size in (("xmin", width), ("ymin", height), ("xmax", width), ("ymax", height))
        )
        if xmin < xmax and ymin < ymax:
            boxes.append((xmin, ymin, xmax, ymax))
    return boxes


def _truth(release: Release, flat: list[Image], devkit: Devkit | None) -> dict[str, str]:
    """Validation image's name without ending -> wnid, from the file that has these labels."""
    labels = release.validation_labels
    if labels:
        text = archives.read(labels).decode("utf-8", "replace")
        if labels.endswith(".txt"):  # Tiny ImageNet's: name, wnid and box, with tabs between
            rows = (line.split("\t") for line in text.split("\n"))
            return {posixpath.splitext(row[0])[0]: row[1] for row in rows if len(row) > 1}
        try:
            return {row[0]: row[1].split(" ")[0] for row in csv.reader(io.StringIO(text)) if len(row) > 1}
        except csv.Error as error:
            raise InputError(f"{labels}: no table of labels ({error}); fix: download it") from None
    if devkit:
        return {
            f"ILSVRC2012_val_{number:08}": devkit.wnids[label] for number, label in enumerate(devkit.ground_truth, 1)
        }
    if release.validation_boxes and not release.validation_boxes.endswith("gz"):  # patched2019 has no other labels
        truth = {}
        for name, content in archives.files(release.validation_boxes, ".xml"):
            with contextlib.suppress(ElementTree.ParseError, ValueError):
                wnid = _parse_annotation(content).findtext("object/name", "")
                truth[posixpath.splitext(posixpath.basename(name))[0]] = wnid
        return truth
    place = locate(release.validation)
    raise InputError(
        f"{place.path}: its {len(flat)} images, such as {flat[0].path}, are in no class folder, so their labels "
        "are needed; fix: give one folder a class, or of ImageNet's also "
        f"--devkit={_PLACES['devkit'][0]} (from image-net.org), or put Kaggle's LOC_val_solution.csv beside"
    )


def _labelled_validation(release: Release, flat: list[Image], devkit: Devkit | None, found: Found) -> Iterator[Image]:
    """Validation images that are in no class folder, with their class by the ground truth."""
    truth, place = _truth(release, flat, devkit), locate(release.validation)
    found.left_out.pop(place.path, None)  # its folders are no classes
    for image in flat:
        name = posixpath.basename(image.path)
        wnid = truth.get(posixpath.splitext(name)[0])
        if wnid and _WNID.fullmatch(wnid):
            yield image._replace(synset=wnid)
        else:
            why = "has no label in the ground truth" if _VALIDATION_NAME.fullmatch(name) else "is no validation image"
            found.rejected.append((f"{place.folder}/{image.path}", why))


def _scan(release: Release, folder: str, given: Given) -> Contents:
    found, unpacked = Found(notes=[given.note] if given.note else []), Unpacked(folder)
    devkit = read_devkit(release.devkit) if release.devkit else None
    places = _places(release)
    images = {split: archives.images(place, unpacked, found, given.label_column) for split, place in places.items()}
    if "validation" not in images:
        images = share.split(places["train"].source(folder), images["train"], _share(given), given.seed, found)
    train, validation = ({image.synset for image in images[split]} for split in SPLITS)
    if not train & validation and (release.validation_labels or devkit or validation == {""}):
        images["validation"] = list(_labelled_validation(release, images["validation"], devkit, found))
    named = {"validation": f"the validation share of {release.train}"} | {s: place.path for s, place in places.items()}
    synsets = check_classes(images, named, found)
    if given.strict:
        _assert_complete(images, synsets, named)
    words = devkit.words if devkit else dict(found.classes.values())
    if release.synset_words:
        lines = (
            archives.read(release.synset_words).decode("utf-8", "replace").split("\n")
        )  # a name may hold other line breaks
        words = words or {match[1]: match[2] for line in lines if (match := _WORDS.fullmatch(line.removesuffix("\r")))}
    if devkit and (unknown := [synset for synset in synsets if synset not in words]):
        found.notes.append(f"{release.devkit}: knows no words for {len(unknown)} classes, such as {unknown[0]}")
    boxes = {}
    for path in (release.train_boxes, release.validation_boxes):
        if path:
            boxes.update(read_boxes(path, found))
    return Contents(images, synsets, [words.get(s, s) for s in synsets], boxes, found.notes, found.rejected)


def _places(release: Release) -> dict[str, Place]:
    return {split: locate(getattr(release, split)) for split in SPLITS if getattr(release, split)}


def _assert_complete(images: dict[str, list[Image]], synsets: list[str], sources: dict[str, str]) -> None:
    if len(synsets) != CLASSES or not all(map(_WNID.fullmatch, synsets)):
        have = f"{len(synsets):,} classes instead of {CLASSES:,} synsets"
        raise InputError(f"{sources['train']}: --strict_imagenet: {have}; fix: give the whole release")
    for split, count in IMAGES.items():
        if len(images[split]) != count:
            have = f"{len(images[split]):,} images instead of {count:,}"
            raise InputError(f"{sources[split]}: --strict_imagenet: {have}; fix: look for what is missing or too much")


def dataset(release: Release, name: str = "", given: Given = NOTHING, unpacked: str = "") -> Dataset:
    """The data set of a release, or of any other folders and archives.

    Args:
      release: see `find`.
      name: the name for the manifest; by default `NAME` for the release's archives, else the name of the files.
      given: what the person has given beside these.
      unpacked: local folder for unpacking archives that can only be read in order.
    Raises:
      InputError: a folder is missing. `scan` may raise more.
    """
    places, stamp = _places(release), {}
    check_splits(release.train, release.validation)
    for part in _PLACES:
        path = getattr(release, part)
        if part in places:
            stamp[part] = places[part].stamp()
        elif path and storage.exists(path):
            stamp[part] = locate(path).stamp() if storage.is_folder(path) else storage.version(path)
    if "validation" not in places:
        stamp["share"] = _share(given)
    sources = {split: places.get(split, places["train"]).source(unpacked) for split in SPLITS}
    train = places["train"].path
    is_release = posixpath.basename(train) == _PLACES["train"][0]
    return Dataset(
        name=name or (NAME if is_release else image_folder.name_after(train, is_split="validation" in places)),
        origin=" and ".join(posixpath.basename(place.path.rstrip("/")) for place in places.values()),
        sources=sources,
        stamp=stamp,
        scan=functools.partial(_scan, release, unpacked, given),
        unpacked=unpacked if any(place.is_unpacked for place in places.values()) else "",
        named={split: places.get(split, places["train"]).folder for split in SPLITS},
    )


def of_images(path: str, name: str = "", given: Given = NOTHING, unpacked: str = "") -> Dataset:
    """The data set of a folder or archive that holds training and validation images, or images to be split.

    Args:
      path: the path of the folder or archive.
      name, given, unpacked: see `dataset`.
    Raises:
      InputError: a share was given, although the images are split already.
    """
    places, note = archives.splits(path)
    if not places:
        name = name or image_folder.name_after(path, is_split=False)
        return dataset(Release(archives.innermost(path), ""), name, given, unpacked)
    if given.share is not None:
        raise InputError(f"{note}: they need no --validation_share; to split one of them give it as --images")
    root = next((root for root in _roots(path) if _part(root, "validation_labels")), path)
    labels = {part: _part(root, part) for part in ("validation_labels", "synset_words")}
    release = Release(places["train"], places["validation"], **labels)
    return dataset(release, name, dataclasses.replace(given, note=note), unpacked)
