"""Reads the PNG header (ISO/IEC 15948): an image's size, and its integrity by checksums, without decoding."""

import struct
import zlib

from data_prep.formats.jpeg import Header, UnusualError

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_GRAY, _RGB = 0, 2
_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf")


def without_text(data: bytes) -> bytes:
    """A PNG file without texts, color profile and EXIF, as decoders refuse files in which these are long."""
    parts, position = [data[: len(SIGNATURE)]], len(SIGNATURE)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if kind not in _TEXT or end > len(data):
            parts.append(data[position:end])
        position = end
    return b"".join(parts) + data[position:]


def parse(data: bytes) -> Header:
    """Reads the chunks of a whole PNG file and checks every CRC.

    Returns:
      The width, height and channels of an 8-bit gray or RGB image; only these kinds are stored as they are.
    Raises:
      UnusualError: damaged, or of another kind (palette, alpha, 16-bit, transparency); the message says which.
    """
    position, header, pixels = len(SIGNATURE), None, False
    while True:
        if position + 12 > len(data):
            raise UnusualError("a truncated file")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise UnusualError("a truncated file")
        if zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise UnusualError("a damaged chunk")
        if (kind == b"IHDR") != (header is None):
            raise UnusualError("a misplaced header")
        if kind == b"IHDR":
            if length != 13:
                raise UnusualError("a malformed header")
            width, height, depth, color, *methods = struct.unpack_from(">IIBBBBB", data, position + 8)
            if depth != 8 or color not in (_GRAY, _RGB):
                raise UnusualError(f"bit depth {depth}, color type {color}")
            if not 0 < width < 1 << 31 or not 0 < height < 1 << 31 or methods[:2] != [0, 0] or methods[2] > 1:
                raise UnusualError("a malformed header")
            header = Header(width, height, 1 if color == _GRAY else 3)
        elif kind == b"tRNS":
            raise UnusualError("transparency")
        elif kind == b"IDAT":
            pixels = True
        elif kind == b"IEND":
            if header is None or not pixels or end != len(data):
                raise UnusualError("an early end or bytes after the end of the image")
            return header
        position = end
