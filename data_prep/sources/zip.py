"""Indexes a zip archive (PKWARE APPNOTE 6.3, zip64) by its central directory: finds where each member's bytes are.

The directory is read in blocks, and members are returned one by one: Kaggle's ImageNet has 1.9 million, and Python's
zipfile would keep a kilobyte for each. Nothing is unpacked, so no member can name a place to write to. An archive that
is cut, or in which the two headers of a member contradict each other, is refused as a whole.
"""

import functools
import stat
import struct
from collections.abc import Callable, Iterator

from data_prep import storage
from data_prep.errors import InputError
from data_prep.sources.tar import Member, unusable_name

SIGNATURES = (b"PK\3\4", b"PK\5\6")  # of a member, of the end of an archive without any

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_COMMENT = 1 << 16  # also of names and extra fields
_BLOCK = 1 << 20
_MAX32, _ZIP64 = 0xFFFFFFFF, 1
_STORED, _DEFLATED = 0, 8
_ENCRYPTED, _UTF8 = 1, 1 << 11
_UNIX = 3  # made by, which says how to read the attributes

Read = Callable[[int, int], bytes]


def index(read: Read, end: int, archive: str, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[Member]:
    """The members of a zip archive in the first `end` bytes of a file, without clutter (`storage.is_clutter`).

    Args:
      read: (offset, size) -> bytes of the file; fewer only at its end.
      end: the file's size.
      archive: what messages call it.
      wanted: whether a name is of interest. The headers of other members are not looked at, but for neighbors of
        wanted ones: a flipped bit in the folder of a name would take its image away unsaid.
    Raises:
      InputError: not a zip archive, in parts, cut, or damaged.
    """

    broken = functools.partial(_broken, archive)
    start, seen = _directory(read, end, broken)[2], set()
    after_wanted, unwanted = False, None
    for entry in _entries(read, end, broken):
        made_by, flags, method, crc, *_, attributes, _, raw, _ = entry
        name = _text(raw, flags).removeprefix("./")
        if not wanted(name):
            if after_wanted:
                _located(read, start, entry, broken)
            after_wanted, unwanted = False, entry
            continue
        if unwanted:
            _located(read, start, unwanted, broken)
        after_wanted, unwanted = True, None
        if name.endswith("/"):
            yield Member(name, 0, 0)
            continue
        data, full, packed = _located(read, start, entry, broken)
        if storage.is_clutter(name):  # not before both headers say so: one flipped bit makes an n a dot
            continue
        rejected = unusable_name(name, seen)
        if flags & _ENCRYPTED:
            rejected = "is encrypted"
        elif method not in (_STORED, _DEFLATED):
            rejected = f"is compressed by method {method}, not stored or deflated"
        elif made_by >> 8 == _UNIX and stat.S_ISLNK(attributes >> 16):
            rejected = "is a symbolic link, not a file"
        seen.add(name)
        yield Member(name, data, full, rejected, (packed if method == _DEFLATED else -1, crc))


def _located(read: Read, start: int, entry: tuple, broken) -> tuple[int, int, int]:
    """Where a member's bytes lie, its size and the bytes it takes, if its own header agrees with the directory."""
    _, flags, method, _, packed, full, _, offset, raw, extra = entry
    if _MAX32 in (packed, full, offset):
        full, packed, offset = _large(extra, full, packed, offset, broken)
    local = read(offset, _LOCAL.size + len(raw)) if offset < start else b""
    if len(local) < _LOCAL.size + len(raw) or local[:4] != b"PK\3\4" or local[_LOCAL.size :] != raw:
        raise broken(f"no member {_text(raw, flags)!r} at byte {offset:,}")
    if int.from_bytes(local[8:10], "little") != method:
        raise broken(f"two headers of member {_text(raw, flags)!r} contradict each other")
    data = offset + _LOCAL.size + len(raw) + int.from_bytes(local[28:30], "little")
    if data + packed > start or (method == _STORED and packed != full):
        raise broken(f"member {_text(raw, flags)!r} declares {packed:,} bytes, {max(start - data, 0):,} are left")
    return data, full, packed


def names(read: Read, end: int, archive: str) -> Iterator[str]:
    """The names of all members, folders with a slash at the end, from the directory only."""
    for _, flags, *_, raw, _ in _entries(read, end, functools.partial(_broken, archive)):
        name = _text(raw, flags).removeprefix("./")
        if not storage.is_clutter(name):
            yield name


def _broken(archive: str, why: str) -> InputError:
    return InputError(
        f"{archive}: damaged zip archive: {why}; fix: make it again, or download it again and compare its checksum"
    )


def _entries(read: Read, end: int, broken) -> Iterator[tuple]:
    """For each member: the directory's fields that matter, its name, and its extra fields."""
    count, size, position = _directory(read, end, broken)
    stop, block, place = position + size, b"", 0
    for _ in range(count):
        if len(block) - place < _ENTRY.size + 3 * _COMMENT and position < stop:  # the longest entry
            more = read(position, min(_BLOCK, stop - position))
            block, place, position = block[place:] + more, 0, position + len(more)
        if len(block) - place < _ENTRY.size:
            raise broken("its directory ends before its last member")
        entry = _ENTRY.unpack_from(block, place)
        signature, made_by, _, flags, method, _, _, crc, packed, full, named, extended, commented, *_ = entry
        if signature != b"PK\1\2":
            raise broken("no member where its directory has one")
        name_at = place + _ENTRY.size
        extra_at = name_at + named
        place = extra_at + extended + commented
        if place > len(block):
            raise broken("its directory ends within a member")
        raw, extra = block[name_at:extra_at], block[extra_at : extra_at + extended]
        yield made_by, flags, method, crc, packed, full, *entry[-2:], raw, extra
    if place != len(block) or position != stop:
        raise broken("its directory has more members than it says")


def _directory(read: Read, end: int, broken) -> tuple[int, int, int]:
    """The directory's number of members, and its size and offset in bytes."""
    tail_start = max(end - _END.size - _COMMENT, 0)
    tail = read(tail_start, end - tail_start)
    place = tail.rfind(b"PK\5\6")
    if place < 0 or len(tail) - place < _END.size:
        raise broken("it ends without an end mark")
    _, disk, first_disk, here, count, size, offset, comment = _END.unpack_from(tail, place)
    position = tail_start + place
    if position + _END.size + comment != end:
        raise broken("something follows the end mark")
    if disk or first_disk or here != count:
        raise broken("it is one of several parts")
    locator = read(position - _LOCATOR.size, _LOCATOR.size) if position >= _LOCATOR.size else b""
    if locator.startswith(b"PK\6\7"):
        _, _, position, _ = _LOCATOR.unpack(locator)
        block = read(position, _END64.size) if position < end else b""
        if len(block) < _END64.size or not block.startswith(b"PK\6\6"):
            raise broken("its zip64 end mark is missing")
        *_, here, count, size, offset = _END64.unpack(block)
        if here != count:
            raise broken("it is one of several parts")
    if offset + size != position or count * _ENTRY.size > size:
        raise broken(f"its directory of {count:,} members is not where it says")
    return count, size, offset


def _large(extra: bytes, full: int, packed: int, offset: int, broken) -> list[int]:
    """The sizes and the offset of a member, from its zip64 field if they need it."""
    place, numbers = 0, b""
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, place)
        if kind == _ZIP64:
            numbers = extra[place + 4 : place + 4 + length]
        place += 4 + length
    values = []
    for value in (full, packed, offset):
        if value == _MAX32:
            if len(numbers) < 8:
                raise broken("a member lacks its zip64 sizes")
            value, numbers = int.from_bytes(numbers[:8], "little"), numbers[8:]
        values.append(value)
    return values


def _text(raw: bytes, flags: int) -> str:
    """A member's name. macOS writes UTF-8 without the flag that says so."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("utf-8", "surrogateescape") if flags & _UTF8 else raw.decode("cp437")
