"""The ILSVRC2012 release ("ImageNet"): its archives, the folders people make of them, devkit, bounding boxes.

Known forms, found by name below one folder or given one by one:
  the release     ILSVRC2012_img_train.tar (a tar of 1,000 class tars), ILSVRC2012_img_val.tar (flat),
                  ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_bbox_train_v2.tar.gz, ILSVRC2012_bbox_val_v3.tgz
  torchvision's   train/WNID/*.JPEG, val/WNID/*.JPEG
  Kaggle's        ILSVRC/Data/CLS-LOC/{train/WNID,val}/*.JPEG, LOC_val_solution.csv, LOC_synset_mapping.txt

The class index is the position of the WordNet id (wnid) in sorted order, as everywhere since Caffe. The devkit numbers
the classes differently (ILSVRC2012_ID, the order of meta.mat), and only these numbers are in its validation ground
truth: they are mapped through the wnid.
"""

import csv
import functools
import gzip
import io
import os
import posixpath
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree import ElementTree

from data_prep import storage
from data_prep.errors import InputError
from data_prep.sources import image_folder, tar
from data_prep.sources.dataset import SPLITS, Box, Contents, Dataset, Found, Image, check_classes

NAME = "imagenet2012"
CLASSES = 1000
IMAGES = {"train": 1_281_167, "validation": 50_000}

# Where each part is below the folder given as --imagenet; the first that exists counts.
_PLACES = {
    "train": ("ILSVRC2012_img_train.tar", "train", "ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train"),
    "validation": ("ILSVRC2012_img_val.tar", "val", "validation", "ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val"),
    "devkit": ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12", "devkit"),
    "train_boxes": (
        "ILSVRC2012_bbox_train_v2.tar.gz",
        "ILSVRC/Annotations/CLS-LOC/train",
        "Annotations/CLS-LOC/train",
    ),
    "validation_boxes": ("ILSVRC2012_bbox_val_v3.tgz", "ILSVRC/Annotations/CLS-LOC/val", "Annotations/CLS-LOC/val"),
    "validation_labels": ("LOC_val_solution.csv",),
    "synset_words": ("LOC_synset_mapping.txt",),
}

_WNID = re.compile(r"n\d{8}")
_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)
_MAX_TEXT = 1 << 26  # bytes of a devkit (2.5 MB) or of one small file in it: more is no devkit
_MAX_XML = 1 << 20  # bytes of one annotation (under 10 kB)


@dataclass(frozen=True)
class Release:
    """Where the parts are: paths, empty for what there is not."""

    train: str
    validation: str
    devkit: str = ""
    train_boxes: str = ""
    validation_boxes: str = ""
    validation_labels: str = ""
    synset_words: str = ""


def find(folder: str, given: dict[str, str]) -> Release:
    """The parts found below `folder`, after those `given` by name of part.

    Raises:
      InputError: no such folder, or no training or no validation images in it.
    """
    if folder and not storage.is_folder(folder):
        raise InputError(f"--imagenet={folder}: no such folder; give the one that holds {_PLACES['train'][0]}")
    parts = {}
    for part, places in _PLACES.items():
        candidates = (storage.join(folder, place) for place in places) if folder else ()
        parts[part] = given.get(part) or next((path for path in candidates if storage.exists(path)), "")
    for split in SPLITS:
        if not parts[split]:
            raise InputError(f"--imagenet={folder}: holds none of {', '.join(_PLACES[split])}; or give --{split}=PATH")
    for part, path in parts.items():
        if path and not storage.exists(path):
            raise InputError(f"--{part}={path}: no such file or folder")
    return Release(**parts)


@dataclass(frozen=True)
class Devkit:
    """wnid by ILSVRC2012_ID, words by wnid (both of meta.mat), ILSVRC2012_ID by validation image number - 1."""

    wnids: dict[int, str]
    words: dict[str, str]
    ground_truth: list[int]


def read_devkit(path: str) -> Devkit:
    """Reads ILSVRC2012_devkit_t12, the archive or its extracted folder.

    Raises:
      InputError: a part is missing or malformed.
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
    except Exception as error:  # whatever a damaged .mat makes of scipy
        raise InputError(f"{path}: meta.mat cannot be read ({error}); fix: download the devkit again") from None
    wnids = {number: wnid for number, wnid, _ in rows}
    if not rows or len(wnids) < len(rows) or not all(map(_WNID.fullmatch, wnids.values())):
        raise InputError(f"{path}: meta.mat holds no table of unique ids and wnids; fix: download the devkit again")
    numbers = truth.split()
    if not all(re.fullmatch(b"[0-9]{1,9}", number) and int(number) in wnids for number in numbers):
        raise InputError(f"{path}: its ground truth holds an id that meta.mat lacks; fix: download the devkit again")
    return Devkit(wnids, {wnid: words for _, wnid, words in rows}, [int(number) for number in numbers])


def _small_files(path: str, limit: int, wanted) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of the files of a gzipped tar archive whose base name is `wanted`, streamed.

    Raises:
      InputError: cut, damaged (gzip's checksum is compared at the end), no such archive, or a member of more than
        `limit` bytes.
    """
    try:
        with storage.open_read(path) as file, gzip.open(file) as unzipped:
            with tarfile.open(fileobj=unzipped, mode="r|") as archive:
                while member := archive.next():
                    if member.size > limit:
                        raise InputError(f"{path}: member {member.name!r} declares {member.size:,} bytes; wrong file?")
                    if member.isfile() and wanted(posixpath.basename(member.name)):
                        yield member.name, archive.extractfile(member).read()
                    archive.members = []  # it keeps every header it has seen
            if len(unzipped.read(_MAX_TEXT)) == _MAX_TEXT:  # reading to the end is what compares the checksum
                raise InputError(f"{path}: something follows the end of the archive")
    except InputError:
        raise
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError, RuntimeError) as error:
        raise InputError(f"{path}: damaged archive ({error}); fix: download it again") from None


def read_boxes(path: str, found: Found) -> Iterator[tuple[str, list[Box]]]:
    """Image name without extension and bounding boxes of every annotation, from an archive or folder of Pascal VOC XML.

    Coordinates become fractions of the size the annotation states, clipped to [0, 1]; boxes without area, which the
    release contains, are left out, as TF-Slim's process_bounding_boxes.py does.
    """
    if storage.is_folder(path):
        listed = (name for name, _, _ in image_folder.list_files(path) if name.endswith(".xml"))
        files = ((name, storage.read(storage.join(path, name))) for name in listed)
    else:
        files = _small_files(path, _MAX_XML, lambda name: name.endswith(".xml") and not name.startswith("."))
    for name, content in files:
        try:
            boxes = _parse_boxes(content)
        except (ElementTree.ParseError, ValueError, TypeError, OverflowError) as error:
            found.rejected.append((f"{path}/{name}", f"is no bounding-box annotation ({error})"))
            continue
        yield posixpath.splitext(posixpath.basename(name))[0], boxes


def _parse_boxes(content: bytes) -> list[Box]:
    if b"<!" in content:
        raise ValueError("declares entities or a document type")
    root = ElementTree.fromstring(content)
    width, height = (float(root.findtext(f"size/{side}")) for side in ("width", "height"))
    if not (0 < width < 1e6 and 0 < height < 1e6):
        raise ValueError(f"a size of {width} x {height}")
    boxes = []
    for box in root.iterfind("object/bndbox"):
        xmin, ymin, xmax, ymax = (
            min(max(float(box.findtext(edge)) / size, 0.0), 1.0)
            for edge, size in (("xmin", width), ("ymin", height), ("xmax", width), ("ymax", height))
        )
        if xmin < xmax and ymin < ymax:
            boxes.append((xmin, ymin, xmax, ymax))
    return boxes


def _archive_images(archive: str, found: Found) -> list[Image]:
    """The images of a tar, in class tars or class folders; of class "" beside these, or if there is but one folder.

    Folders that are around all others, such as train/ around train/WNID/, are no classes.
    """
    version = " ".join(map(str, storage.version(archive)))
    with storage.open_read(archive) as file:

        def read_through(offset: int, size: int) -> bytes:
            file.seek(offset)
            return file.read(size)

        # A remote file is read on end, in large blocks; of a local one only the headers.
        read = read_through if storage.is_remote(archive) else functools.partial(storage.read_range, archive)
        members = _archive_members(archive, read, version, found)
        listed, left_out = image_folder.pictures(archive, members, found)
    folders = {member.synset for member in listed}
    around = os.path.commonpath(folders) if len(folders) > 1 else posixpath.dirname("".join(folders))
    inside = f"{around}/" if around else ""
    classes = {folder: folder.removeprefix(inside).partition("/")[0] for folder in folders} | {around: ""}
    for place, member in enumerate(listed):
        if classes[member.synset] != member.synset:
            listed[place] = member._replace(synset=classes[member.synset])
    below = {folder: kinds for folder, kinds in left_out.items() if folder.startswith(inside)}
    found.left_out[archive] = image_folder.by_class(below, lambda f: f.removeprefix(inside).partition("/")[0])
    return listed


def _archive_members(archive: str, read, version: str, found: Found) -> Iterator[Image]:
    """The files and folders of a tar and of the tars in it, each with its folder for a class."""
    for member in tar.index(read, 0, storage.size(archive), archive):
        folder, _, name = member.name.rpartition("/")
        if member.rejected:
            found.rejected.append((f"{archive}/{member.name}", member.rejected))
        elif not name.endswith(".tar"):
            yield Image(folder, member.name, member.size, member.offset, version)
        else:
            synset = name.removesuffix(".tar")
            yield Image(synset, f"{synset}/", 0)
            for inner in tar.index(read, member.offset, member.offset + member.size, f"{archive}: {member.name}"):
                if inner.name.endswith("/"):
                    continue
                path = f"{synset}/{posixpath.basename(inner.name)}"
                why = inner.rejected
                if _WNID.fullmatch(synset) and not path.startswith(f"{synset}/{synset}_"):
                    why = why or "is not named after its class"
                if why:
                    found.rejected.append((f"{archive}/{member.name}/{inner.name}", why))
                else:
                    yield Image(synset, path, inner.size, inner.offset, version)


def _labelled_validation(release: Release, flat: list[Image], devkit: Devkit | None, found: Found) -> Iterator[Image]:
    """Validation images that are in no class folder, with the class the ground truth gives them."""
    if release.validation_labels:
        text = storage.read(release.validation_labels).decode("utf-8", "replace")
        try:
            truth = {row[0]: row[1].split(" ")[0] for row in csv.reader(io.StringIO(text)) if len(row) > 1}
        except csv.Error as error:
            raise InputError(f"{release.validation_labels}: no table of labels ({error}); fix: download it") from None
    elif devkit:
        truth = {
            f"ILSVRC2012_val_{number:08}": devkit.wnids[label] for number, label in enumerate(devkit.ground_truth, 1)
        }
    else:
        raise InputError(
            f"{release.validation}: its {len(flat)} images, such as {flat[0].path}, are in no class folder, so their "
            f"labels are needed; fix: give one folder a class, or of ImageNet's also --devkit={_PLACES['devkit'][0]}"
        )
    for image in flat:
        name = posixpath.basename(image.path)
        wnid = truth.get(posixpath.splitext(name)[0])
        if wnid and _WNID.fullmatch(wnid):
            yield image._replace(synset=wnid)
        else:
            why = "has no label in the ground truth" if _VALIDATION_NAME.fullmatch(name) else "is no validation image"
            found.rejected.append((storage.join(release.validation, image.path), why))


def _scan(release: Release, files: dict, strict: bool) -> Contents:
    found = Found()
    devkit = read_devkit(release.devkit) if release.devkit else None
    images = {}
    for split in SPLITS:
        source = getattr(release, split)
        if split in files:
            images[split] = image_folder.images(source, files[split], found)
        else:
            images[split] = _archive_images(source, found)
    train, validation = ({image.synset for image in images[split]} for split in SPLITS)
    if not train & validation and (release.validation_labels or devkit or validation == {""}):
        images["validation"] = list(_labelled_validation(release, images["validation"], devkit, found))
    sources = {split: getattr(release, split) for split in SPLITS}
    synsets = check_classes(images, sources, found)
    if strict:
        _assert_complete(images, synsets, sources)
    words = devkit.words if devkit else {}
    if release.synset_words:
        lines = storage.read(release.synset_words).decode("utf-8", "replace").splitlines()
        words = words or {wnid: text for wnid, _, text in (line.partition(" ") for line in lines)}
    if devkit and (unknown := [synset for synset in synsets if synset not in words]):
        found.notes.append(f"{release.devkit}: knows no words for {len(unknown)} classes, such as {unknown[0]}")
    boxes = {}
    for path in (release.train_boxes, release.validation_boxes):
        if path:
            boxes.update(read_boxes(path, found))
    return Contents(images, synsets, [words.get(s, s) for s in synsets], boxes, found.notes, found.rejected)


def _assert_complete(images: dict[str, list[Image]], synsets: list[str], sources: dict[str, str]) -> None:
    if len(synsets) != CLASSES or not all(map(_WNID.fullmatch, synsets)):
        have = f"{len(synsets):,} classes instead of {CLASSES:,} synsets"
        raise InputError(f"{sources['train']}: --strict_imagenet: {have}; fix: give the whole release")
    for split, count in IMAGES.items():
        if len(images[split]) != count:
            have = f"{len(images[split]):,} images instead of {count:,}"
            raise InputError(f"{sources[split]}: --strict_imagenet: {have}; fix: look for what is missing or too much")


def dataset(release: Release, name: str = "", strict: bool = False) -> Dataset:
    """The data set of a release.

    Args:
      release: see `find`.
      name: for the manifest; by default `NAME` of the release's archives, of others what they are called.
      strict: assert 1,000 synsets, 1,281,167 training and 50,000 validation images.
    Raises:
      InputError: a folder is missing; `scan` raises more.
    """
    sources = {split: getattr(release, split) for split in SPLITS}
    files = {split: image_folder.list_files(path) for split, path in sources.items() if storage.is_folder(path)}
    stamp = {}
    for part in _PLACES:
        path = getattr(release, part)
        if part in files:
            stamp[part] = image_folder.digest(files[part])
        elif path and storage.is_folder(path):
            stamp[part] = image_folder.digest(image_folder.list_files(path))
        elif path:
            stamp[part] = [posixpath.basename(path), *storage.version(path)]
    is_release = posixpath.basename(release.train) == _PLACES["train"][0]
    return Dataset(
        name=name or (NAME if is_release else image_folder.name_after(release.train)),
        origin=" and ".join(posixpath.basename(path.rstrip("/")) for path in sources.values()),
        sources=sources,
        stamp=stamp,
        scan=functools.partial(_scan, release, files, strict),
    )
