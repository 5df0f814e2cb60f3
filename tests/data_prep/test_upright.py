"""EXIF orientation: own pictures are turned upright, ImageNet's stay; against Pillow's own way to turn them."""

import importlib
import io

import numpy as np
import pytest
from miniature_release import jpeg
from PIL import Image, ImageOps

from data_prep import convert, plan
from data_prep.formats import image
from data_prep.sources import image_folder

DRAW = np.random.default_rng(0)
BLOCKS = np.kron(DRAW.integers(0, 256, (6, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)  # 32 x 48, smooth for JPEG
UPRIGHT = image.Storage(upright=True)


def photo(kind, orientation, pixels=BLOCKS, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    if kind == "HEIF":
        importlib.import_module("pillow_heif").register_heif_opener()
    Image.fromarray(pixels).save(file, kind, exif=exif.tobytes(), **options)
    return file.getvalue()


def truth(content):
    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"), int)


def pixels(stored):
    with Image.open(io.BytesIO(stored.encoded)) as picture:
        assert picture.getexif().get(0x0112, 1) == 1  # or a reader that applies it would turn it again
        assert picture.size == (stored.width, stored.height)
        return np.asarray(picture.convert("RGB"), int)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize(
    "kind", [*("PNG", "TIFF", "JPEG", "WEBP", "AVIF"), pytest.param("HEIF", marks=pytest.mark.needs("pillow_heif"))]
)
def test_a_turned_picture_is_stored_upright_exactly_where_its_format_is_lossless(kind, orientation):
    content = photo(kind, orientation)
    stored = image.prepare(content, f"a.{kind}", UPRIGHT)
    difference = np.abs(pixels(stored) - truth(content))
    if kind in ("PNG", "TIFF"):
        assert stored.format == "PNG" and not difference.any()
    else:
        assert stored.format == "JPEG" and difference.mean() < 2  # of quality 95 at hard edges; turned wrongly it is 80
    assert np.abs(pixels(stored) - truth(photo("PNG", orientation))).mean() < 20
    assert kind in ("TIFF", "HEIF") or stored.repaired == "turned upright by its EXIF orientation"


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [0, 1, 9, 6])
def test_what_is_upright_or_to_be_kept_stays_byte_for_byte(kind, orientation):
    content = photo(kind, orientation)
    storage = image.Storage() if orientation == 6 else UPRIGHT
    stored = image.prepare(content, f"a.{kind}", storage)
    assert stored.encoded == content and not stored.repaired


@pytest.mark.parametrize("mode", ["L", "CMYK", "LA", "P", "I;16"])
def test_gray_and_other_modes_are_turned_too(mode):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    picture = (
        Image.fromarray(BLOCKS).convert("L").convert(mode) if mode == "I;16" else Image.fromarray(BLOCKS).convert(mode)
    )
    picture.save(file, "JPEG" if mode == "CMYK" else "PNG", exif=exif.tobytes())
    stored = image.prepare(file.getvalue(), "a", UPRIGHT)
    assert (stored.width, stored.height) == (48, 32)
    assert stored.channels == (1 if mode in ("L", "LA", "I;16") else 3)


def test_max_side_is_of_the_upright_picture():
    stored = image.prepare(photo("JPEG", 6), "a.jpg", image.Storage(max_side=24, upright=True))
    assert (stored.width, stored.height) == (24, 16)


def test_a_damaged_exif_segment_is_no_orientation():
    content = photo("JPEG", 6)
    place = content.index(b"Exif\0\0") + 6
    content = content[:place] + b"\xff" * 12 + content[place + 12 :]
    assert image.prepare(content, "a.jpg", UPRIGHT).encoded == content


def test_the_closing_line_counts_what_was_turned(tmp_path):
    for split in ("train", "validation"):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(3):
                content = photo("JPEG", 6) if number else jpeg(DRAW)
                (tmp_path / split / name / f"{number}.jpg").write_bytes(content)
    data, lines = image_folder.dataset(str(tmp_path / "train"), str(tmp_path / "validation")), []
    convert.convert(data, str(tmp_path / "out"), plan.Options(upright=True), log=lines.append)
    (done,) = (line for line in lines if line.startswith("done"))
    assert "8 (8 turned upright by its EXIF orientation) re-encoded" in done
