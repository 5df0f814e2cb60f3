"""Reads an image file's header with Pillow, for samples and messages; TensorFlow decodes the pixels."""

import io
import warnings
from typing import NamedTuple

READABLE = "JPEG, PNG, GIF, BMP or WebP"
MOST_PIXELS = 1 << 28
"""Most pixels of one image; ILSVRC2012's largest has 61 million."""

_READABLE_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "WEBP")  # MPO: a JPEG that is followed by further ones
_SIGNATURES = b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"RIFF"


class Header(NamedTuple):
    """The header of one image file.

    Attributes:
      format: Pillow's name of it, such as "JPEG".
      width, height: in pixels.
      gray: whether it has one channel, apart from alpha.
    """

    format: str
    width: int
    height: int
    gray: bool


def read_header(encoded: bytes) -> Header | None:
    """The header of an image file; None if Pillow cannot read it."""
    from PIL import Image  # here, so that a program that lacks it can say so

    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(encoded)) as image:
            return Header(image.format or "image", *image.size, Image.getmodebase(image.mode) == "L")
    except Exception:  # whatever Pillow's 40 readers raise for damaged bytes
        return None


def why_unreadable(encoded: bytes) -> str:
    """Why `preprocessing.decode` fails on a file, in words that follow "is"."""
    header = read_header(encoded)
    if not encoded:
        return "empty"
    if header is None and encoded.startswith(_SIGNATURES):
        return f"an image with a damaged header, or of more than {MOST_PIXELS:,} pixels: save it as a smaller PNG"
    if header is None:
        iso = encoded[4:8] == b"ftyp" and encoded[8:12].decode("ascii", "replace").strip()  # HEIC, AVIF, videos
        return f"no {READABLE} image" + (f" but of the format {iso!r}: convert it to PNG" if iso else "")
    if header.format not in _READABLE_FORMATS:
        return f"a {header.format} image, and only {READABLE} can be read: convert it to PNG"
    if header.format == "WEBP" and b"ANIM" in encoded[:64]:
        return "an animated WebP: convert one of its pictures to PNG"
    size = f"{header.width:,} x {header.height:,} pixels"
    return f"a {header.format} image of {size} that is damaged, of a rare kind or too large: save it as a smaller PNG"
