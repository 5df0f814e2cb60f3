"""What is said of an image that cannot be read names what it is."""

import io

import numpy as np
import pytest
from PIL import Image

from bn_keras.input.image_header import read_header, why_unreadable

RANDOM = np.random.default_rng(0).integers(0, 256, (30, 40, 3), "uint8")


def encoded(format, mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(RANDOM).convert(mode).save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("format, mode, gray", [("JPEG", "L", True), ("PNG", "LA", True), ("PNG", "P", False)])
def test_the_header_says_size_and_color(format, mode, gray):
    assert read_header(encoded(format, mode)) == (format, 40, 30, gray)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "empty"),
        (b"<html>404</html>", "no JPEG, PNG, GIF, BMP or WebP image"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "no JPEG, PNG, GIF, BMP or WebP image but of the format 'heic'"),
        (encoded("TIFF"), "a TIFF image, and only JPEG, PNG, GIF, BMP or WebP"),
        (encoded("PPM"), "a PPM image, and only JPEG, PNG, GIF, BMP or WebP"),
        (encoded("JPEG")[:-100], "a JPEG image of 40 x 30 pixels that is damaged"),
        (encoded("JPEG")[:100], "an image with a damaged header"),
        (encoded("WEBP", save_all=True, append_images=[Image.new("RGB", (40, 30))]), "an animated WebP"),
    ],
)
def test_what_cannot_be_read_is_named(content, said):
    assert why_unreadable(content).startswith(said)
