"""TFRecord shards of `tf.train.Example`, in TF-Slim's image schema, written and read without TensorFlow.

A record is: length (uint64, little-endian), masked CRC-32C of those 8 bytes, the serialized Example, masked CRC-32C of
it. An Example is protocol buffer wire format; features are written in sorted order, as protobuf's deterministic
serialization does, so equal images give equal bytes.
"""

import functools
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import google_crc32c

# TF-Slim's build_imagenet_data.py and tf-models' imagenet_to_gcs.py; the field number in Feature's oneof.
BYTES, FLOAT, INT64 = 1, 2, 3
SCHEMA = {
    "image/channels": INT64,
    "image/class/label": INT64,
    "image/class/synset": BYTES,
    "image/class/text": BYTES,
    "image/colorspace": BYTES,
    "image/encoded": BYTES,
    "image/filename": BYTES,
    "image/format": BYTES,
    "image/height": INT64,
    "image/object/bbox/label": INT64,
    "image/object/bbox/xmax": FLOAT,
    "image/object/bbox/xmin": FLOAT,
    "image/object/bbox/ymax": FLOAT,
    "image/object/bbox/ymin": FLOAT,
    "image/width": INT64,
}


_MAX_RECORD = 1 << 28  # bytes; data_prep.formats.image reads no file larger than a quarter of this


class DamagedRecordError(ValueError):
    """A record that cannot be read; the message says what is wrong, `offset` at which byte the record begins."""

    offset: int


def _varint(value: int) -> bytes:
    """Unsigned LEB128; negative int64 values take ten bytes, as protobuf writes them."""
    if 0 <= value < 0x80:
        return bytes((value,))
    if 0x4000 <= value < 0x200000:  # the length of most images
        return bytes((value & 0x7F | 0x80, value >> 7 & 0x7F | 0x80, value >> 14))
    value &= (1 << 64) - 1
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _field(number: int, payload: bytes) -> bytes:
    return bytes((number << 3 | 2,)) + _varint(len(payload)) + payload


_KEYS = {name: _field(1, name.encode()) for name in SCHEMA}


@functools.lru_cache(maxsize=1 << 14)  # labels, names of classes, sizes and formats recur
def _feature(name: str, value: Any) -> bytes:
    """One entry of the map of features."""
    kind = SCHEMA[name]
    if kind == BYTES:
        values = _field(1, value)
    elif isinstance(value, int):
        values = _field(1, _varint(value))
    elif not value:
        values = b""
    elif kind == INT64:
        values = _field(1, b"".join(map(_varint, value)))
    else:
        values = _field(1, struct.pack(f"<{len(value)}f", *value))
    return _field(1, _KEYS[name] + _field(2, _field(kind, values)))


def encode_example(features: dict) -> tuple[bytes, bytes, bytes]:
    """Serializes a `tf.train.Example`.

    Args:
      features: every name of SCHEMA -> bytes, int, or a tuple of float or int.
    Returns:
      Three parts that make the serialized Example when joined: what precedes the image's bytes, these bytes, and what
      follows. They are kept apart so that a large image is never copied.
    """
    image = features["image/encoded"]
    before, after = [], []
    part = before
    for name in SCHEMA:
        value = features[name]
        if name == "image/encoded":
            # Each enclosing length includes the image. From the inside: value, BytesList, Feature, map entry.
            entry = b"\x0a" + _varint(len(image))
            for tag in (b"\x0a", b"\x12"):
                entry = tag + _varint(len(entry) + len(image)) + entry
            entry = _KEYS[name] + entry
            part.append(b"\x0a" + _varint(len(entry) + len(image)) + entry)
            part = after
            continue
        part.append(_feature(name, value))
    head, tail = b"".join(before), b"".join(after)
    return b"\x0a" + _varint(len(head) + len(image) + len(tail)) + head, image, tail


def _wire_fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The number and value of each protocol buffer field: an int for a varint, bytes for a field with a length."""
    position = 0
    while position < len(data):
        tag, position = _read_varint(data, position)
        value, position = _read_varint(data, position)
        if tag & 7 == 0:
            yield tag >> 3, value
        elif tag & 7 == 2:
            position += value
            if position > len(data):
                raise DamagedRecordError("is not a tf.train.Example (a field is longer than its message)")
            yield tag >> 3, data[position - value : position]
        else:
            raise DamagedRecordError(f"is not a tf.train.Example (wire type {tag & 7})")


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data) and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise DamagedRecordError("is not a tf.train.Example (a number does not end)")


def _one(data: bytes, number: int) -> bytes:
    return next((value for field, value in _wire_fields(data) if field == number and isinstance(value, bytes)), b"")


def decode_example(data: bytes) -> dict[str, list]:
    """Parses a serialized `tf.train.Example` into name -> list of bytes, float or int.

    Raises:
      DamagedRecordError: `data` is not an Example.
    """
    features = {}
    for _, entry in _wire_fields(_one(data, 1)):
        if not isinstance(entry, bytes):
            raise DamagedRecordError("is not a tf.train.Example (a feature is a number)")
        name = _one(entry, 1).decode(errors="replace")
        values = []
        for kind, listed in _wire_fields(_one(entry, 2)):
            for _, value in _wire_fields(listed if isinstance(listed, bytes) else b""):
                if kind == BYTES or isinstance(value, int):
                    values.append(value)
                elif kind == FLOAT:
                    values.extend(struct.unpack(f"<{len(value) // 4}f", value[: len(value) // 4 * 4]))
                else:
                    position = 0
                    while position < len(value):
                        number, position = _read_varint(value, position)
                        values.append(number)
        features[name] = values
    return features


def _masked_crc32c(crc: int) -> bytes:
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


class ShardWriter:
    """Appends records to an open binary file, counting and checksumming what it writes.

    Attributes:
      examples, bytes: how many were written so far.
      crc32c: the CRC-32C of the whole file so far.
    """

    def __init__(self, write_all: Callable[[Sequence[bytes]], object]):
        """`write_all` takes a sequence of bytes objects and writes all of them."""
        self._write_all = write_all
        self.examples = self.bytes = self.crc32c = 0

    def write(self, *parts: bytes) -> None:
        """Writes one record whose data is the concatenation of `parts`."""
        length = struct.pack("<Q", sum(map(len, parts)))
        crc = 0
        for part in parts:
            crc = google_crc32c.extend(crc, part)
        first, *rest = parts
        record = (length + _masked_crc32c(google_crc32c.value(length)) + first, *rest, _masked_crc32c(crc))
        self._write_all(record)
        for part in record:
            self.crc32c = google_crc32c.extend(self.crc32c, part)
            self.bytes += len(part)
        self.examples += 1


def read_records(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The offset and data of each record of an open binary file.

    Raises:
      DamagedRecordError: a checksum does not fit or the file ends within a record; `.offset` is that record's.
    """
    offset = 0
    while head := file.read(12):
        try:
            if len(head) < 12:
                raise DamagedRecordError("ends within a record's length")
            if head[8:] != _masked_crc32c(google_crc32c.value(head[:8])):
                raise DamagedRecordError("has a length that does not fit its checksum")
            (length,) = struct.unpack("<Q", head[:8])
            if length > _MAX_RECORD:
                raise DamagedRecordError(f"declares {length:,} bytes")
            data = file.read(length)
            foot = file.read(4)
            if len(foot) < 4:
                raise DamagedRecordError("ends within a record")
            if foot != _masked_crc32c(google_crc32c.value(data)):
                raise DamagedRecordError("has data that do not fit their checksum")
        except DamagedRecordError as damage:
            damage.offset = offset
            raise
        yield offset, data
        offset += 16 + length
