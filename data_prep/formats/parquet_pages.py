"""Finds where the values of a column of bytes lie in the pages of a Parquet file (Apache Parquet format, version 2).

pyarrow, which reads everything else of the file, gives copies of values and not their places. In an uncompressed file
each image lies with its length before it, as a member lies in an archive, and need not be copied out.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from data_prep.formats.fast_zlib import zlib

UNCOMPRESSED = 0
_CODECS = {UNCOMPRESSED: "", 1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}  # as pyarrow calls them
_ENCODINGS = {0, 2, 3, 4, 8}  # those in which values lie as they are; 3 and 4 are of levels and of indices
_PLAIN = 0

Read = Callable[[int, int], bytes | memoryview]
Place = tuple[int, int, str]  # offset, size in bytes, CRC-32 in hexadecimal digits

_DATA, _DICTIONARY, _DATA_2 = 0, 2, 3  # kinds of pages
_ABOUT = {_DATA: 5, _DICTIONARY: 7, _DATA_2: 8}  # the field that describes a page of each kind
_HEADER_BYTES = 1 << 15  # more than a header has, which may hold four values of at most 4 KiB


class DamagedPageError(ValueError):
    """A page that cannot be read; the message says why."""


class Chunk(NamedTuple):
    """The values of a column in a group of rows, which are pages one after the other."""

    codec: int
    encodings: frozenset[int]
    offset: int
    packed: int  # bytes in the file
    full: int  # bytes when decompressed

    @property
    def is_readable(self) -> bool:
        """Whether `places` finds its values."""
        return self.codec in _CODECS and self.encodings <= _ENCODINGS


def chunks(read: Read, size: int, column: int) -> list[Chunk]:
    """The chunks of a column, one for each group of rows, from the end of a file of `size` bytes.

    pyarrow has them, too, and ends the process by a C++ exception where a chunk's statistics are damaged.

    Raises:
      DamagedPageError, LookupError: they are damaged.
    """
    length = int.from_bytes(read(size - 8, 4), "little")
    found = []
    for group in _thrift(read(size - 8 - length, length), 0)[0][4]:
        about = group[1][column][3]
        starts = about.get(11), about[9]  # of the page that is the dictionary, and of the first other page
        found.append(Chunk(about[4], frozenset(about[2]), min(filter(None, starts)), about[7], about[6]))
    return found


class _Page(NamedTuple):
    kind: int
    about: dict[int, Any]
    offset: int
    packed: int  # bytes in the file
    full: int  # bytes of the decompressed page
    checksum: int | None


def places(
    read: Read, chunk: Chunk, most: int, rows: int, copy: Callable[[bytes], int] | None = None
) -> list[Place | None]:
    """Where the value of each row of a column chunk lies; None for a missing value.

    Args:
      read: (offset, size) -> bytes of the file.
      chunk: a readable chunk of a column that is not repeated.
      most: the column's highest definition level, which values have that are not missing.
      rows: the number of rows.
      copy: appends bytes to another file and returns their offset there, to which the places then refer; a compressed
        chunk needs it.
    Raises:
      DamagedPageError: a page contradicts its header, its checksum, or the number of rows.
      Exception: numpy's or pyarrow's, about a page whose content is malformed.
    """
    found, dictionary = list[Place | None](), list[Place]()
    for page in _pages(read, chunk):
        within, start = _opened(read, page, chunk.codec, copy)
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
        if page.about[4 if page.kind == _DATA_2 else 2] == _PLAIN:
            values = _plain(within, position, page.full, int(present.sum()), start)
        else:
            indices = within(position, page.full - position)
            values = map(dictionary.__getitem__, _integers(indices[1:], indices[0], int(present.sum())))
        found += [next(values) if is_there else None for is_there in present]
    if len(found) != rows:
        raise DamagedPageError(f"{len(found):,} of {rows:,} values are there")
    return found


def _pages(read: Read, chunk: Chunk) -> Iterator[_Page]:
    """The pages of data and dictionaries in a chunk."""
    position, end = chunk.offset, chunk.offset + chunk.packed
    while position < end:
        header, length = _thrift(read(position, min(_HEADER_BYTES, end - position)), 0)
        kind, full, packed = (header.get(field, -1) for field in (1, 2, 3))
        position += length
        sizes_fit = 0 <= packed <= end - position and 0 <= full <= chunk.full
        if not sizes_fit or (chunk.codec == UNCOMPRESSED and packed != full):
            raise DamagedPageError(f"no page at byte {position:,}")
        if kind in _ABOUT:
            yield _Page(kind, header[_ABOUT[kind]], position, packed, full, header.get(4))
        position += packed


def _opened(read: Read, page: _Page, codec: int, copy: Callable[[bytes], int] | None) -> tuple[Read, int]:
    """A function (offset, size) -> bytes of a decompressed page, and the offset at which that lies in its file."""
    if page.checksum is None and not copy:
        return lambda offset, size: read(page.offset + offset, size), page.offset
    content = bytes(read(page.offset, page.packed))
    if page.checksum is not None and zlib.crc32(content) != page.checksum & 0xFFFFFFFF:
        raise DamagedPageError(f"the page at byte {page.offset:,} does not fit its checksum")
    if codec != UNCOMPRESSED and page.about.get(7, True):
        import pyarrow

        levels = page.about[5] if page.kind == _DATA_2 else 0  # in bytes; these are not compressed there
        packed = memoryview(content)[levels:]
        content = content[:levels] + pyarrow.Codec(_CODECS[codec]).decompress(packed, page.full - levels, asbytes=True)
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
    """A struct of Thrift's compact protocol, field number -> value, and the place after it."""
    fields, number = dict[int, Any](), 0
    while head := data[place]:
        number, place = number + (head >> 4), place + 1
        if not head >> 4:
            value, place = _varint(data, place)
            number = value >> 1 ^ -(value & 1)
        if head & 15 in (1, 2):
            fields[number] = head & 15 == 1
        else:
            fields[number], place = _thrift_value(head & 15, data, place)
    return fields, place + 1


def _thrift_value(kind: int, data: Any, place: int) -> tuple[Any, int]:
    """A value of a kind that Parquet has, and the place after it."""
    if kind in (1, 2, 3):  # flags in lists, bytes
        return data[place], place + 1
    if kind in (4, 5, 6):
        value, place = _varint(data, place)
        return value >> 1 ^ -(value & 1), place
    if kind in (7, 8):
        size, place = (8, place) if kind == 7 else _varint(data, place)
        return data[place : place + size], place + size
    if kind == 9:
        count, kind, place = data[place] >> 4, data[place] & 15, place + 1
        if count == 15:
            count, place = _varint(data, place)
        values = []
        for _ in itertools.repeat(None, count):
            value, place = _thrift_value(kind, data, place)
            values.append(value)
        return values, place
    if kind == 12:
        return _thrift(data, place)
    raise DamagedPageError(f"a value of kind {kind}")
