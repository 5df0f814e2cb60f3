"""Decides what is stored for one image file: its own bytes if training can decode them, or the image encoded again.

Gray stays gray. A picture that lies on its side or is mirrored, by its EXIF orientation, is turned upright and encoded
again if `Storage.upright` says so: Pillow cannot turn a JPEG without decoding it. ImageNet stays as it is: TF-Slim,
TFDS and torchvision train on the stored pixels, and its bounding boxes refer to them.

Transparent pixels become white, 16 bits become the upper 8, floats from 0 to 1 become 0 to 255, and the first of
several pictures in a file (animations, pages) is taken. CMYK becomes RGB by (255 - C)(255 - K)/255; a JPEG with
Adobe's marker holds 255 - C, ..., 255 - K, one without holds C, ..., K, as `tf.io.decode_jpeg` has it.
"""

import functools
import io
import re
import warnings
from typing import Any, NamedTuple

from data_prep.errors import BadImageError
from data_prep.formats import jpeg, png

# The largest of ILSVRC2012 has 61 million pixels (n04197391, 9331 x 6530); beyond this a file is a decompression bomb.
MAX_PIXELS = 1 << 26
MAX_SIDE = 1_000_000  # libpng, and so TensorFlow, reads no wider PNG
# The largest file of ILSVRC2012 is under 16 MiB; more is not read into memory.
MAX_FILE_BYTES = 1 << 26

_JPEG_NAMES = (".jpg", ".jpeg", ".jpe", ".jfif")
_LOSSY_FORMATS = ("JPEG", "MPO", "WEBP", "AVIF", "HEIF", "JPEG2000")  # the others are stored as PNG
_DECODED_FORMATS = (
    *("JPEG", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "AVIF", "PPM", "JPEG2000"),
    *("ICO", "CUR", "ICNS", "PCX", "SGI", "PSD", "QOI", "DDS"),
)
_TGA_NAMES = (".tga", ".icb", ".vda", ".vst")  # a format without a signature

SIGNATURE_BYTES = 16  # how much of a file `is_picture` needs
_UNDECODED = rb"....ftyp(?:hei[cmsx]|hev[cmsx]|mif1|msf1)|\0\0\0\x0cJXL |\xff\x0a"  # HEIF, JPEG XL
_SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8[79]a|BM....\0\0\0\0|RIFF....WEBP|II[*+]\0|MM\0[*+]|....ftypavi[fs]|P[1-7]\s+[#\d]|"
    rb"\x01\xda[\0\1][\1\2]|\0\0\0\x0cjP  |\xff\x4f\xff\x51|\0\0[\1\2]\0[^\0]\0|icns|8BPS|qoif|DDS |" + _UNDECODED,
    re.DOTALL,
)


def is_picture(head: bytes) -> bool:
    """Whether a file's first `SIGNATURE_BYTES` are those of a picture, also of one that Pillow cannot decode."""
    return _SIGNATURES.match(head) is not None


class Stored(NamedTuple):
    """An image as it goes into a record. If it was re-encoded, `repaired` says what was wrong with the file."""

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
    upright: bool = False  # apply EXIF orientation


AS_IT_IS = Storage()
UPRIGHT = "turned upright by its EXIF orientation"

_ORIENTATION = 0x0112  # EXIF's tag
_TURNS = {
    **{2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"},
    **{6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"},
}
_EXIF_WITHIN = 1 << 17  # bytes: a segment of 64 KiB may stand before EXIF's


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
    if storage.decode and kind == "JPEG":
        _check_coded_data(data)
    if storage.upright and _turn(data):
        return _reencode(*_decode(data, storage), jpeg_name, storage, UPRIGHT)
    if not kind or (kind == "PNG" and jpeg_name):
        image, kind = _decode(data, storage, name.lower().endswith(_TGA_NAMES))
        return _reencode(image, kind, jpeg_name, storage, f"{kind} {'under a JPEG name' if jpeg_name else 'image'}")
    try:
        header = (jpeg if kind == "JPEG" else png).parse(data)
    except jpeg.UnusualError as unusual:
        return _reencode(*_decode(data, storage), jpeg_name, storage, str(unusual))
    _check_pixels(header.width, header.height)
    if storage.max_side and max(header.width, header.height) > storage.max_side:
        return _reencode(*_decode(data, storage), jpeg_name, storage)
    if storage.decode:
        _decode(data)
    return Stored(data, kind, *header)


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImageError(f"declares {width} x {height} pixels, more than {MAX_PIXELS:,}: a decompression bomb?")
    if max(width, height) > MAX_SIDE:
        raise BadImageError(f"declares {width} x {height} pixels, more than {MAX_SIDE:,} a side")


def _turn(data: bytes) -> str:
    """The transposition that turns a file's picture upright, as its EXIF orientation says; "" if it is."""
    from PIL import Image

    if data.startswith(jpeg.SIGNATURE) and data.find(b"Exif\0\0", 0, _EXIF_WITHIN) < 0:
        return ""
    if data.startswith(png.SIGNATURE) and b"eXIf" not in data:
        return ""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=_formats()) as image:
            if image.format == "TIFF":  # Pillow turns these itself
                return ""
            return _TURNS.get(image.getexif().get(_ORIENTATION, 1), "")
    except Exception:  # whatever Pillow raises for a damaged file; later it is decoded, or found to be bad
        return ""


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that are decoded, with HEIC if pillow-heif is installed."""
    try:
        import pillow_heif
    except ImportError:
        return _DECODED_FORMATS
    pillow_heif.register_heif_opener()
    return (*_DECODED_FORMATS, "HEIF")


def _decode(data: bytes, storage: Storage = AS_IT_IS, tga: bool = False) -> tuple[Any, str]:
    """Decodes every pixel with Pillow; raises BadImageError.

    Args:
      data: a file.
      storage: the size, and whether EXIF orientation is applied.
      tga: the file's name says that it is TGA.
    Returns:
      A Pillow image of mode L or RGB, and the file's format.
    """
    from PIL import Image, UnidentifiedImageError

    turn = _turn(data) if storage.upright else ""
    if data.startswith(png.SIGNATURE):
        data = png.without_text(data)
    formats = (*_formats(), "TGA") if tga else _formats()
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=formats) as image:
            _check_pixels(*image.size)
            kind = image.format or ""
            if image.mode not in ("L", "RGB") or image.has_transparency_data:
                image = _gray_or_rgb(image, kind)
            if storage.max_side:  # after the colors, as a palette's indices cannot be averaged
                # Pillow decodes JPEGs at a suitable scale.
                image.thumbnail((storage.max_side, storage.max_side), Image.Resampling.LANCZOS)
            image.load()
            return image.transpose(Image.Transpose[turn]) if turn else image, kind
    except BadImageError:
        raise
    except UnidentifiedImageError:
        known = re.match(_UNDECODED, data, re.DOTALL)
        fix = "HEIC or JPEG XL, which Pillow cannot decode; for HEIC: pip install 'bn-keras[heic]'"
        what = fix if known else "no image of a known kind"
        raise BadImageError(f"is {what}") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... for damaged files
        raise BadImageError(f"cannot be decoded ({error or type(error).__name__})") from error


def _gray_or_rgb(image, kind: str):
    """Turns a Pillow image of any mode into mode L or RGB, with white in place of transparent pixels."""
    import numpy as np
    from PIL import Image, ImageChops, ImageCms

    image.load()
    transparent = image.info.get("transparency")
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image)
        if image.mode == "F":
            if not (pixels.min() >= 0 and pixels.max() <= 1):
                raise BadImageError("has floating-point pixels that are not from 0 to 1; fix: save it with 8 bits")
            return Image.fromarray(np.rint(255 * pixels).astype(np.uint8))
        if kind == "TIFF" and image.mode == "I" and not (pixels.min() >= 0 and 255 < pixels.max() < 1 << 16):
            raise BadImageError("has pixels of 32 bits that are not of 16-bit range; fix: save it with 8 or 16 bits")
        upper = (pixels >> 8).astype(np.uint8)
        if transparent is not None:
            upper[pixels == transparent] = 255
        return Image.fromarray(upper)
    if kind == "JPEG" and image.mode == "CMYK" and "adobe_transform" not in image.info:
        image = ImageChops.invert(image)  # Pillow inverts every CMYK JPEG
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    target = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if not image.has_transparency_data:
        return image.convert(target)
    if image.mode in ("La", "RGBa"):  # colors already multiplied by alpha
        image = image.convert(image.mode[:-1] + "A")
    alpha = image.convert("LA" if target == "L" else "RGBA").getchannel("A")
    white = Image.new(target, image.size, "white")
    white.paste(image.convert(target), mask=alpha)
    return white


def _check_coded_data(data: bytes) -> None:
    """Raises BadImageError if a JPEG's coded data end before its pixels do; decoders silently fill these with gray.

    To find out, bytes are added where coded data end: only a decoder that still needs data reads them, and then shows
    other pixels.
    """
    whole = _decode(data)[0]
    try:
        lacks = jpeg.lacks(data)
    except (
        ValueError,
        LookupError,
        ZeroDivisionError,
    ):  # of another coding, or with headers that only Pillow understands
        return
    if lacks:
        raise BadImageError(f"lacks {lacks}")
    if whole.tobytes() != _decode(jpeg.with_more_coded_data(data))[0].tobytes():
        raise BadImageError("has coded data that end before its pixels do")


def decoded_size(data: bytes) -> tuple[int, int, int]:
    """Width, height and channels of an image, after decoding every pixel; raises BadImageError."""
    if data.startswith(jpeg.SIGNATURE):
        _check_coded_data(data)
    image, _ = _decode(data)
    return *image.size, 1 if image.mode == "L" else 3


def _reencode(image, kind: str, jpeg_name: bool, storage: Storage, repaired: str = "") -> Stored:
    """Encodes a decoded image: as PNG if it was lossless, unless its name says JPEG, as readers go by the name."""
    encoded = io.BytesIO()
    lossless = not jpeg_name and kind not in _LOSSY_FORMATS
    try:
        if lossless:
            image.save(encoded, "PNG")
        else:
            image.save(encoded, "JPEG", quality=storage.quality, subsampling="4:4:4" if repaired else "4:2:0")
    except OSError as error:  # JPEG allows at most 65,500 pixels on a side
        raise BadImageError(f"of {image.width} x {image.height} pixels cannot be encoded again ({error})") from error
    channels = 1 if image.mode == "L" else 3
    return Stored(encoded.getvalue(), "PNG" if lossless else "JPEG", image.width, image.height, channels, repaired)
