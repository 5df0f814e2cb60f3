"""What is stored for one image file: its own bytes where training decodes them as they are, else a re-encoding.

Gray stays gray. EXIF orientation is not applied: TF-Slim, TFDS and torchvision train on the stored pixels too, and
ImageNet's bounding boxes refer to them. Alpha is dropped, 16 bits become the upper 8, CMYK becomes RGB by
(255 - C)(255 - K)/255 of Adobe's inverted values, as `tf.io.decode_jpeg` does it.
"""

import io
import warnings
from typing import NamedTuple

from data_prep import jpeg, png
from data_prep.errors import BadImageError

# The largest of ILSVRC2012 has 61 million pixels (n04197391, 9331 x 6530); beyond this a file is a decompression bomb.
MAX_PIXELS = 1 << 26
# The largest file of ILSVRC2012 is under 16 MiB; more is not read into memory.
MAX_FILE_BYTES = 1 << 26

_JPEG_NAMES = (".jpg", ".jpeg", ".jpe", ".jfif")
_DECODED_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")


class Stored(NamedTuple):
    """An image as it goes into a record; `repaired` says what was wrong with the file if it was re-encoded."""

    encoded: bytes
    format: str  # JPEG or PNG
    width: int
    height: int
    channels: int  # 1 or 3
    repaired: str = ""


class Storage(NamedTuple):
    """How images are stored: the larger side at most `max_side` pixels (0: any), re-encoded at JPEG `quality`."""

    max_side: int = 0
    quality: int = 95
    decode: bool = False  # decode every image, to find damage that no header shows


def prepare(data: bytes, name: str, storage: Storage) -> Stored:
    """Turns one image file into what its record holds.

    Args:
      data: the file's bytes; its kind is found from these, never from the name.
      name: the file's name; under a JPEG name only JPEG is stored.
      storage: size and quality to store.
    Raises:
      BadImageError: empty, truncated, damaged, not an image, or too large.
    """
    if not data:
        raise BadImageError("is empty (0 bytes)")
    jpeg_name = name.lower().endswith(_JPEG_NAMES)
    kind = "JPEG" if data.startswith(jpeg.SIGNATURE) else "PNG" if data.startswith(png.SIGNATURE) else ""
    if not kind or (kind == "PNG" and jpeg_name):
        image, kind = _decode(data, storage.max_side)
        return _reencode(image, kind, jpeg_name, storage, f"{kind} {'under a JPEG name' if jpeg_name else 'image'}")
    try:
        header = (jpeg if kind == "JPEG" else png).parse(data)
    except jpeg.UnusualError as unusual:
        return _reencode(*_decode(data, storage.max_side), jpeg_name, storage, str(unusual))
    _check_pixels(header.width, header.height)
    if storage.max_side and max(header.width, header.height) > storage.max_side:
        return _reencode(*_decode(data, storage.max_side), jpeg_name, storage)
    if storage.decode:
        _decode(data)
    return Stored(data, kind, *header)


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImageError(f"declares {width} x {height} pixels, more than {MAX_PIXELS:,}: a decompression bomb?")


def _decode(data: bytes, max_side: int = 0):
    """Decodes with Pillow to mode L or RGB, every pixel; raises BadImageError."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=_DECODED_FORMATS) as image:
            _check_pixels(*image.size)
            if max_side:
                image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)  # decodes JPEGs at a fitting scale
            image.load()
            if image.mode in ("I;16", "I;16B", "I;16L", "I", "I;16N"):
                image = image.point(lambda value: value / 256).convert("L")
            gray = image.mode in ("1", "L", "LA", "La")
            return image.convert("L" if gray else "RGB"), image.format
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError("is no image of a known kind") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... for damaged files
        raise BadImageError(f"cannot be decoded ({error or type(error).__name__})") from error


def decoded_size(data: bytes) -> tuple[int, int, int]:
    """Width, height and channels of an image, after decoding every pixel; raises BadImageError."""
    image, _ = _decode(data)
    return *image.size, 1 if image.mode == "L" else 3


def _reencode(image, kind: str, jpeg_name: bool, storage: Storage, repaired: str = "") -> Stored:
    """Encodes a decoded image: as PNG if it was lossless, unless its name says JPEG, which readers go by."""
    encoded = io.BytesIO()
    lossless = not jpeg_name and kind in ("PNG", "GIF", "BMP")
    if lossless:
        image.save(encoded, "PNG")
    else:
        image.save(encoded, "JPEG", quality=storage.quality, subsampling="4:4:4" if repaired else "4:2:0")
    channels = 1 if image.mode == "L" else 3
    return Stored(encoded.getvalue(), "PNG" if lossless else "JPEG", *image.size, channels, repaired)
