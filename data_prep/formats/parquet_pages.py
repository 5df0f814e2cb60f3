"""Finds where the values of a column of bytes lie in the pages of a Parquet file (Apache Parquet format, version 2).

pyarrow, which reads everything else of the file, gives copies of values and not their places. In an uncompressed file
each image lies with its length before it, as a member lies in an archive, and need not be copied out.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from data_prep.formats.fast_zlib import zlib

CODECS = {"UNCOMPRESSED", "SNAPPY", "GZIP", "ZSTD", "BROTLI"}
ENCODINGS = {"PLAIN", "PLAIN_DICTIONARY", "RLE_DICTIONARY", "RLE", "BIT_PACKED"}
"""pyarrow's names of the encodings in which values lie as they are; the last two are of levels and of indices."""

Read = Callable[[int, int], bytes | memoryview]
Place = tuple[int, int, str]  # offset, size in bytes, CRC-32 in hexadecimal digits

_DATA, _DICTIONARY, _DATA_2 = 0, 2, 3  # kinds of pages
_ABOUT = {_DATA: 5, _DICTIONARY: 7, _DATA_2: 8}  # the field that describes a page of each kind
_HEADER_BYTES = 1 << 15  # more than a header has, which may hold four values of at most 4 KiB


class DamagedPageError(ValueError):
    """A page that cannot be read; the message says why."""


class _Page(NamedTuple):
    kind: int
    about: dict[int, Any]
    offset: int
    packed: int  # bytes in the file
    full: int  # bytes of the decompressed page
    checksum: int | None


def places(
    read: Read, chunk: Any, column: Any, rows: int, copy: Callable[[bytes], int] | None = None
) -> list[Place | None]:
    """Where the value of each row of a column chunk lies; None for a missing value.

    Args:
      read: (offset, size) -> bytes of the file.
      chunk, column: pyarrow's ColumnChunkMetaData and ColumnSchema. The codec is one of `CODECS`, the encodings are of
        `ENCODINGS`, and the column is not repeated.
      rows: the number of rows.
      copy: appends bytes to another file and returns their offset there, to which the places then refer; a compressed
        chunk needs it.
    Raises:
      DamagedPageError: a page contradicts its header, its checksum, or the number of rows.
      Exception: numpy's or pyarrow's, about a page whose content is malformed.
    """
    found, dictionary, most = list[Place | None](), list[Place](), column.max_definition_level
    for page in _pages(read, chunk):
        within, start = _opened(read, page, chunk.compression, copy)
        count = page.about[1]
        if page.kind == _DICTIONARY:
            dictionary = list(_plain(within, 0, page.full, count, start))
            continue
        if not 0 <= count <= rows - len(found):
            raise DamagedPageError(f"the page at byte {page.offset:,} has {count:,} of {rows:,} values")
        position, present = 0, np.full(count, True)
        if page.kind == _DATA_2:
            position = page.about[5]
        elif most:
            position = 4 + int.from_bytes(within(0, 4), "little")
        if most:
            levels_at = 0 if page.kind == _DATA_2 else 4
            levels = within(levels_at, position - levels_at)
            present = _integers(levels, most.bit_length(), count) == most
        values: Iterator[Place]
        if page.about[4 if page.kind == _DATA_2 else 2] == 0:
            values = _plain(within, position, page.full, int(present.sum()), start)
        else:
            indices = within(position, page.full - position)
            values = map(dictionary.__getitem__, _integers(indices[1:], indices[0], int(present.sum())))
        found += [next(values) if is_there else None for is_there in present]
    if len(found) != rows:
        raise DamagedPageError(f"{len(found):,} of {rows:,} values are there")
    return found


def _pages(read: Read, chunk: Any) -> Iterator[_Page]:
    """The pages of a column chunk, which lie one after the other."""
    position = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))
    end = position + chunk.total_compressed_size
    while position < end:
        header, length = _thrift(read(position, min(_HEADER_BYTES, end - position)), 0)
        kind, full, packed = (header.get(field, -1) for field in (1, 2, 3))
        position += length
        sizes_fit = 0 <= packed <= end - position and 0 <= full <= chunk.total_uncompressed_size
        if not sizes_fit or (chunk.compression == "UNCOMPRESSED" and packed != full):
            raise DamagedPageError(f"no page at byte {position:,}")
        if kind in _ABOUT:
            yield _Page(kind, header[_ABOUT[kind]], position, packed, full, header.get(4))
        position += packed


def _opened(read: Read, page: _Page, codec: str, copy: Callable[[bytes], int] | None) -> tuple[Read, int]:
    """A function (offset, size) -> bytes of a decompressed page, and the offset at which that lies in its file."""
    if page.checksum is None and not copy:
        return lambda offset, size: read(page.offset + offset, size), page.offset
    content = bytes(read(page.offset, page.packed))
    if page.checksum is not None and zlib.crc32(content) != page.checksum & 0xFFFFFFFF:
        raise DamagedPageError(f"the page at byte {page.offset:,} does not fit its checksum")
    if codec != "UNCOMPRESSED" and page.about.get(7, True):
        import pyarrow

        levels = page.about[5] if page.kind == _DATA_2 else 0  # in bytes; these are not compressed there
        packed = memoryview(content)[levels:]
        content = content[:levels] + pyarrow.Codec(codec).decompress(packed, page.full - levels, asbytes=True)
    view = memoryview(content)
    return lambda offset, size: view[offset : offset + size], copy(content) if copy else page.offset


def _plain(within: Read, position: int, end: int, count: int, start: int) -> Iterator[Place]:
    """The places of values that each follow their length, four bytes; `start` is the page's own offset."""
    for _ in range(count):
        size = int.from_bytes(within(position, 4), "little")
        position += 4
        if size > end - position:
            raise DamagedPageError(f"a value of {size:,} bytes, {max(end - position, 0):,} are left")
        yield start + position, size, checksum(within(position, size))
        position += size


def checksum(content: Any) -> str:
    """The CRC-32 of bytes."""
    return f"{zlib.crc32(content):08x}"


def _integers(data: Any, bits: int, count: int) -> np.ndarray:
    """Numbers of `bits` bits each, in runs of one number and in groups of eight numbers (RLE / bit-packed hybrid)."""
    if bits > 32:
        raise DamagedPageError(f"numbers of {bits} bits")
    parts, left, place = [np.zeros(0, np.int64)], count, 0
    while left > 0:
        head, place = _varint(data, place)
        if head & 1:
            groups = min(head >> 1, -(-left // 8))
            flags = np.unpackbits(np.frombuffer(data, np.uint8, groups * bits, place), bitorder="little")
            parts.append(flags.reshape(-1, bits) @ (1 << np.arange(bits)))
            place += (head >> 1) * bits
        else:
            width = -(-bits // 8)
            parts.append(np.full(min(head >> 1, left), int.from_bytes(data[place : place + width], "little")))
            place += width
        if not len(parts[-1]):
            raise DamagedPageError("an empty run of numbers")
        left -= len(parts[-1])
    return np.concatenate(parts)[:count]


def _varint(data: Any, place: int) -> tuple[int, int]:
    """An unsigned LEB128 number, and the place after it."""
    value = shift = 0
    while data[place] & 0x80:
        value |= (data[place] & 0x7F) << shift
        shift, place = shift + 7, place + 1
        if shift > 63:
            raise DamagedPageError("a number that does not end")
    return value | data[place] << shift, place + 1


def _thrift(data: Any, place: int) -> tuple[dict[int, Any], int]:
    """A struct of Thrift's compact protocol, field number -> value, and the place after it.

    It may hold what headers of pages hold: flags, integers, bytes and structs.
    """
    fields, number = dict[int, Any](), 0
    while head := data[place]:
        delta, kind = head >> 4, head & 15
        number, place = number + delta, place + 1
        if not delta:
            raise DamagedPageError("a malformed header of a page")
        if kind in (1, 2):
            fields[number] = kind == 1
        elif kind in (4, 5, 6):
            value, place = _varint(data, place)
            fields[number] = value >> 1 ^ -(value & 1)
        elif kind == 8:
            size, place = _varint(data, place)
            fields[number] = data[place : place + size]
            place += size
        elif kind == 12:
            fields[number], place = _thrift(data, place)
        else:
            raise DamagedPageError("a malformed header of a page")
    return fields, place + 1
