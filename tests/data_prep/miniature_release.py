"""A faithful miniature of the ILSVRC2012 release: its archives, names and nesting, and the dirt that the real one has.

Images are of random blocks with a colour that tells the class, so that a decoded image can be traced to its label.
"""

import csv
import io
import json
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

# In sorted order, which is the class index; the devkit numbers them in another order.
WNIDS = ("n01440764", "n01443537", "n02096051", "n07753592")
WORDS = ("tench, Tinca tinca", "goldfish, Carassius auratus", "Airedale, Airedale terrier", "banana")
ILSVRC_IDS = (3, 1, 4, 2)
COLORS = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40))


def jpeg(rng, color=(128, 128, 128), mode="RGB", size=None, **options) -> bytes:
    """A JPEG of 24 to 64 pixels a side, near `color`."""
    width, height = size or (int(side) for side in rng.integers(24, 65, 2))
    noise = rng.integers(-30, 31, (height, width, 3))
    image = Image.fromarray(np.clip(np.asarray(color) + noise, 0, 255).astype(np.uint8)).convert(mode)
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90} | options)
    return file.getvalue()


def other_format(rng, color, kind: str) -> bytes:
    """The same kind of image in another format."""
    file = io.BytesIO()
    Image.open(io.BytesIO(jpeg(rng, color))).save(file, kind)
    return file.getvalue()


def rotated_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees to view
    return exif.tobytes()


def tar_of(members: dict[str, bytes], mode: str = "w") -> bytes:
    """A tar archive with GNU headers, as the release has."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=tarfile.GNU_FORMAT) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def zip_of(path: Path, files: dict[str, bytes], compression=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_parquet(path: Path, rows: list[dict], names=None, **options) -> Path:
    """As `datasets` writes it, with its description of the columns in the schema's metadata."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    label = pyarrow.int64() if isinstance(rows[0]["label"], int) else pyarrow.string()
    schema = pyarrow.schema([("image", image), ("label", label)])
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
        schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path, row_group_size=10, **options)
    return path


def annotation(wnid: str, name: str, width: int, height: int, boxes) -> bytes:
    """Pascal VOC XML; `boxes` are (xmin, ymin, xmax, ymax) in pixels."""
    objects = "".join(
        f"<object><name>{wnid}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
        for a, b, c, d in boxes
    )
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><folder>{wnid}</folder><filename>{name}</filename>{size}{objects}</annotation>".encode()


@dataclass
class Release:
    """A release in `folder`, and the truth about it.

    Attributes:
      train, validation: image name -> (class index, bytes), without the bad ones.
      bad: names of images that nothing can decode.
      repaired: names of images that are no plain RGB or gray JPEG.
      boxes: image name without extension -> list of pixel boxes with area, (width, height).
    """

    folder: Path
    train: dict
    validation: dict
    bad: set
    repaired: set
    boxes: dict


def write(
    folder: Path, images_a_class: int = 6, validation_images: int = 10, dirty: bool = True, seed: int = 0
) -> Release:
    """Writes the five archives into `folder`; with `dirty`, the first classes hold one file of each kind of dirt."""
    rng = np.random.default_rng(seed)
    train, validation, bad, repaired, boxes = {}, {}, set(), set(), {}
    class_tars, xml = {}, {}
    dirt = {
        (0, 0): ("gray", lambda c: jpeg(rng, c, "L")),
        (0, 1): ("exif", lambda c: jpeg(rng, c, size=(60, 30), exif=rotated_exif())),
        (0, 2): ("progressive", lambda c: jpeg(rng, c, progressive=True)),
        (1, 0): ("repaired", lambda c: jpeg(rng, c, "CMYK")),
        (1, 1): ("repaired", lambda c: other_format(rng, c, "PNG")),
        (1, 2): ("repaired", lambda c: other_format(rng, c, "GIF")),
        (1, 3): ("repaired", lambda c: other_format(rng, c, "BMP")),
        (1, 4): ("repaired", lambda c: other_format(rng, c, "WEBP")),
        (2, 0): ("bad", lambda c: b""),
        (2, 1): ("bad", lambda c: jpeg(rng, c)[:-200]),
        (2, 2): ("bad", lambda c: b"<html>404</html>"),
    }
    for index, (wnid, color) in enumerate(zip(WNIDS, COLORS, strict=True)):
        members = {}
        for number in range(images_a_class):
            name = f"{wnid}_{number * 7 + 26}.JPEG"
            kind, make = dirt.get((index, number), ("", None)) if dirty else ("", None)
            members[name] = make(color) if make else jpeg(rng, color)
            if kind == "bad":
                bad.add(name)
            else:
                train[name] = (index, members[name])
                repaired |= {name} if kind == "repaired" else set()
                with Image.open(io.BytesIO(members[name])) as image:
                    width, height = image.size
                stem = name.removesuffix(".JPEG")
                if number % 2:
                    boxes[stem] = [(1, 2, width - 1, height // 2), (0, 0, width, height)], (width, height)
                    # The release also has boxes without area; they are left out.
                    pixels = [*boxes[stem][0], (5, 5, 5, 9)]
                    xml[f"{wnid}/{stem}.xml"] = annotation(wnid, stem, width, height, pixels)
        class_tars[f"{wnid}.tar"] = tar_of(members)
    xml["n09999999/n09999999_1.xml"] = annotation("n09999999", "n09999999_1", 50, 50, [(1, 1, 9, 9)])
    truth, validation_members, validation_xml = [], {}, {}
    for number in range(1, validation_images + 1):
        index = int(rng.integers(len(WNIDS)))
        name = f"ILSVRC2012_val_{number:08}.JPEG"
        validation_members[name] = jpeg(rng, COLORS[index], size=(40, 32))
        validation[name] = (index, validation_members[name])
        truth.append(ILSVRC_IDS[index])
        stem = name.removesuffix(".JPEG")
        boxes[stem] = [(4, 4, 20, 16)], (40, 32)
        validation_xml[f"val/{stem}.xml"] = annotation(WNIDS[index], stem, 40, 32, [(4, 4, 20, 16)])
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_of(class_tars))
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_of(validation_members))
    (folder / "ILSVRC2012_bbox_train_v2.tar.gz").write_bytes(tar_of(xml, "w:gz"))
    (folder / "ILSVRC2012_bbox_val_v3.tgz").write_bytes(tar_of(validation_xml, "w:gz"))
    devkit = {
        "ILSVRC2012_devkit_t12/readme.txt": b"devkit",
        "ILSVRC2012_devkit_t12/data/meta.mat": meta_mat(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{i}\n" for i in truth).encode(),
    }
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar_of(devkit, "w:gz"))
    return Release(folder, train, validation, bad, repaired, boxes)


def meta_mat() -> bytes:
    """The table of synsets by ILSVRC2012_ID, and an inner node after them, as in the real file."""
    rows = sorted(zip(ILSVRC_IDS, WNIDS, WORDS, strict=True))
    names = (
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    )
    table = np.zeros((len(rows) + 1, 1), [(name, object) for name in names])
    for place, (number, wnid, words) in enumerate([*rows, (1001, "n00001740", "entity")]):
        inner = number > 1000
        table[place, 0] = (float(number), wnid, words, "a gloss", float(3 * inner), np.zeros((1, 0)), 0.0, 1300.0)
    file = io.BytesIO()
    scipy.io.savemat(file, {"synsets": table})
    return file.getvalue()


def extract_as_torchvision(release: Release, folder: Path) -> None:
    """train/WNID/NAME and val/WNID/NAME, of the good images."""
    for split, images in (("train", release.train), ("val", release.validation)):
        for name, (index, content) in images.items():
            path = folder / split / WNIDS[index] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def extract_as_kaggle(release: Release, folder: Path) -> None:
    """The layout of the Kaggle competition's archive, of the good images."""
    data = folder / "ILSVRC/Data/CLS-LOC"
    extract_as_torchvision(release, data)
    with (folder / "LOC_val_solution.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ImageId", "PredictionString"])
        for name, (index, content) in release.validation.items():
            (data / "val" / name).write_bytes(content)
            (data / "val" / WNIDS[index] / name).unlink()
            rows.writerow([name.removesuffix(".JPEG"), f"{WNIDS[index]} 4 4 20 16 "])
    for wnid in WNIDS:
        if (data / "val" / wnid).exists():
            (data / "val" / wnid).rmdir()
    lines = (f"{wnid} {words}\n" for wnid, words in zip(WNIDS, WORDS, strict=True))
    (folder / "LOC_synset_mapping.txt").write_text("".join(lines))
    for split, member in (("train", "ILSVRC2012_bbox_train_v2.tar.gz"), ("val", "ILSVRC2012_bbox_val_v3.tgz")):
        target = folder / "ILSVRC/Annotations/CLS-LOC" / (split if split == "train" else "")
        with tarfile.open(release.folder / member) as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 has it
            archive.extractall(target)
