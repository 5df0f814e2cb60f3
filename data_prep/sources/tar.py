"""Indexes a tar archive (POSIX ustar and pax, GNU) by its headers: finds where each member's bytes are.

Nothing is unpacked, so no member can name a place to write to; members that try are marked as rejected. An archive that
is cut, or whose headers do not fit their checksums, is refused as a whole.
"""

import re
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from data_prep import storage
from data_prep.errors import InputError

_BLOCK = 512
_PADDING = 1 << 20  # zeros that may follow the end mark; GNU tar pads to 10 kB, tapes to at most 1 MiB
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_MAX_EXTENSION = 1 << 16  # most bytes of a long name or pax header

_REGULAR, _FOLDER, _GNU_LONG_NAME, _PAX, _PAX_GLOBAL = b"\x0007", b"5", b"L", b"x", b"g"
_REJECTED_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a named pipe",
    b"K": "a link",
    b"S": "a sparse file",
}


# Other files that people may have instead of a tar, by their first bytes, and what to do about each.
_OTHER_ARCHIVES = {
    b"BZh": ("is compressed with bzip2, so members cannot be found quickly", "bunzip2 it"),
    b"\xfd7zXZ\0": ("is compressed with xz, so members cannot be found quickly", "unxz it"),
    b"\x28\xb5\x2f\xfd": ("is compressed with zstd, so members cannot be found quickly", "unzstd it"),
    b"7z\xbc\xaf\x27\x1c": ("is a 7z archive", "unpack it and give the folder"),
    b"Rar!": ("is a RAR archive", "unpack it and give the folder"),
}


class Member(NamedTuple):
    """A file in an archive, or a folder (with a slash at the end). `rejected` says why it must not be used, if so."""

    name: str
    offset: int  # where its bytes begin in the file that was indexed
    size: int
    rejected: str = ""
    packed: tuple[int, ...] = ()  # in a zip: its compressed size if it is deflated, else -1; its CRC-32


def index(read: Callable[[int, int], bytes], start: int, end: int, archive: str) -> Iterator[Member]:
    """The members of a tar archive in the bytes `start` to `end` of a file, without clutter (`storage.is_clutter`).

    Args:
      read: a function (offset, size) -> bytes of the file, fewer only at its end.
      start, end: the archive's range: the whole file, or a member that is itself an archive.
      archive: what messages call the archive.
    Raises:
      InputError: it is not a tar archive, or is cut or damaged.
    """
    position, seen, long_name, pax = start, set(), "", {}

    def broken(why: str) -> InputError:
        where = f"{archive}: damaged tar archive at byte {position}: {why}"
        return InputError(f"{where}; fix: make it again, or download it again and compare its checksum")

    while True:
        block = read(position, min(_BLOCK, end - position))
        if position == start and block[257:262] != b"ustar":
            for signature, (what, fix) in _OTHER_ARCHIVES.items():
                if block.startswith(signature):
                    raise InputError(f"{archive}: {what}; fix: {fix}")
        if len(block) < _BLOCK:
            raise broken("it ends without an end mark")
        if not any(block):
            break
        if block[257:262] != b"ustar":
            raise broken("no POSIX or GNU tar header")
        size, checksum = _number(block[124:136]), _number(block[148:156])
        # A header's checksum is the sum of its bytes, itself taken as spaces: Adler-32's low half, 12 times faster
        # than sum(), is that, modulo 65,521 (starting from 0).
        if zlib.adler32(block[:148] + 8 * b" " + block[156:], 0) & 0xFFFF != checksum % 65521:
            raise broken("a header does not fit its checksum")
        kind = block[156:157]
        if kind in (_PAX, _PAX_GLOBAL, _GNU_LONG_NAME):
            if not 0 <= size <= min(_MAX_EXTENSION, end - position - _BLOCK):
                raise broken(f"an extended header of {size:,} bytes")
            payload = read(position + _BLOCK, size)
            if kind == _GNU_LONG_NAME:
                long_name = _text(payload)
            elif kind == _PAX:
                if (records := _pax_records(payload)) is None:
                    raise broken("a malformed extended header")
                pax = records
            position += _BLOCK + _blocks(size)
            continue
        if "size" in pax:
            size = int(pax["size"]) if re.fullmatch("[0-9]{1,19}", pax["size"]) else -1
        prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
        name = pax.get("path") or long_name or (f"{prefix}/" if prefix else "") + _text(block[:100])
        offset = position + _BLOCK
        if kind == _FOLDER or (kind in _REJECTED_KINDS and kind != b"S"):
            size = 0
        if size < 0 or offset + size > end:
            raise broken(f"member {name!r} declares {size:,} bytes, {max(end - offset, 0):,} are left")
        position = offset + _blocks(size)
        extensions, long_name, pax = pax, "", {}
        name = name.removeprefix("./")
        if storage.is_clutter(name):
            continue
        if kind == _FOLDER:
            yield Member(f"{name.rstrip('/')}/", offset, 0)
            continue
        rejected = ""
        if kind not in _REGULAR or not kind:
            rejected = f"is {_REJECTED_KINDS.get(kind, f'of unknown type {kind!r}')}, not a file"
        elif any(key.startswith("GNU.sparse") for key in extensions):
            rejected = "is a sparse file"
        else:
            rejected = unusable_name(name, seen)
        seen.add(name)
        yield Member(name, offset, size, rejected)
    rest = read(position, min(end - position, _PADDING))
    if any(rest) or (end - position > _PADDING and read(position + _PADDING, 1)):
        raise broken("something follows the end mark")


def unusable_name(name: str, seen: set[str]) -> str:
    """Why a member of this name must not be used; "" if it may. `seen` holds the names before it."""
    if name.startswith("/") or "\\" in name or (".." in name and ".." in name.split("/")):
        return "has an absolute path or one with '..'"
    if not name or _CONTROL.search(name):
        return "has a name with control characters"
    return "is the second member of that name" if name in seen else ""


def _blocks(size: int) -> int:
    return (size + _BLOCK - 1) // _BLOCK * _BLOCK


def _number(field: bytes) -> int:
    """The value of a number field, octal text or, if the first bit is set, base 256; -1 if it is neither."""
    if field[0] & 0x80:
        return int.from_bytes(bytes((field[0] & 0x7F,)) + field[1:], "big") if not field[0] & 0x40 else -1
    digits = field.partition(b"\0")[0].strip()
    return int(digits or b"0", 8) if not digits.strip(b"01234567") else -1


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax_records(payload: bytes) -> dict[str, str] | None:
    """The records `length key=value` of a pax extended header; None if they are malformed."""
    records = {}
    while payload:
        length = payload.partition(b" ")[0]
        if not re.fullmatch(b"[0-9]{1,5}", length) or not len(length) + 2 < int(length) <= len(payload):
            return None
        record, payload = payload[len(length) + 1 : int(length)], payload[int(length) :]
        key, equals, value = record.removesuffix(b"\n").partition(b"=")
        if not equals:
            return None
        records[_text(key)] = value.decode("utf-8", "surrogateescape")
    return records
