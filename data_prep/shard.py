"""Writes one shard of the plan: reads its images, writes its TFRecord file and its journal entry.

The result depends only on the task, so any worker anywhere may do it. The journal entry is written after the shard, and
says what became of it. A shard without an entry, or with an entry of other inputs, is written again.
"""

import collections
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import google_crc32c

from data_prep import json_files, plan, storage
from data_prep.errors import BadImageError, InputError
from data_prep.formats import image as images
from data_prep.formats import tfrecord
from data_prep.json_files import COUNT, HEX, TEXT, list_of, record, row
from data_prep.sources.dataset import Box, read_image

WORK_FOLDER = ".data_prep"
_STRIDE = 61  # bytes; a prime, so that all channels of uncompressed pixels are met


@dataclass(frozen=True)
class ShardTask:
    """What a worker needs to know.

    Attributes:
      shard: the shard's line of the plan.
      fingerprint: the fingerprint of the plan, which is in `output_dir`/.data_prep.
      output_dir: the folder for the shard and its journal entry.
      source: the folder or archive of the shard's images.
      named: what messages call that source.
      options: the options of the conversion.
      on_bad: "fail" raises at the first bad image; "skip" and "report" leave it out.
      reread: whether to read the shard back before it gets its name.
      left_out: the `digest` of the validation shards whose images must not go in; "" if all may.
    """

    shard: plan.Shard
    fingerprint: str
    output_dir: str
    source: str
    named: str
    options: plan.Options
    on_bad: str
    reread: bool
    left_out: str = ""


@dataclass(frozen=True)
class JournalEntry:
    """What became of a finished shard.

    Attributes:
      file, split, inputs: as in the plan's `Shard`.
      examples, bytes, crc32c: the file's number of records, its size, and its checksum as eight hexadecimal digits.
      gray: how many examples have one channel.
      short_sides: "pixels:images" for each length of the shorter side, separated by spaces.
      bad: [path, why, class index] of each image that was left out.
      repaired: [path, what was wrong] of each image that was re-encoded.
      contents: the `content` of each example's file, joined.
      dropped: [path, content, class index] of each image that was left out because of its content.
      left_out: as in the task.
    """

    file: str
    split: str
    inputs: str
    examples: int
    bytes: int
    crc32c: str
    gray: int
    short_sides: str
    bad: list[tuple[str, str, int]]
    repaired: list[tuple[str, str]]
    contents: str
    dropped: list[tuple[str, str, int]]
    left_out: str


_SCHEMA = record(
    file=TEXT,
    split=TEXT,
    inputs=HEX,
    examples=COUNT,
    bytes=COUNT,
    crc32c=HEX,
    gray=COUNT,
    short_sides={"type": "string", "pattern": r"\A([0-9]{1,9}:[0-9]{1,9}( (?!\Z)|\Z))*\Z"},
    bad=list_of(row(TEXT, TEXT, COUNT)),
    repaired=list_of(row(TEXT, TEXT)),
    contents={"type": "string", "pattern": r"\A([0-9a-f]{16})*\Z"},
    dropped=list_of(row(TEXT, HEX, COUNT)),
    left_out={"anyOf": [HEX, {"const": ""}]},
)


def write(task: ShardTask, count: Callable[[int, int, int], None] = lambda images, size, bad: None) -> None:
    """Writes one shard and its journal entry.

    Args:
      task: what to write.
      count: called with the numbers of images, bytes and bad images that are done.
    Raises:
      InputError: there is a bad image and on_bad is "fail"; no shard is then written.
    """
    # Once a block of this size has been freed, glibc keeps smaller ones for the next image. Without it, every image of
    # 30 to 128 KiB gives its pages back and faults them in again, which halves the speed.
    bytearray(16 << 20)
    planned, options, source = task.shard, task.options, task.source
    work_folder, path = storage.join(task.output_dir, WORK_FOLDER), storage.join(task.output_dir, planned.file)
    classes = plan.load_once(work_folder, task.fingerprint).classes
    kept = images.Storage(options.max_side, options.quality, options.decode, options.upright)
    storage.remove(
        journal(task.output_dir, planned.file)
    )  # an old entry would describe the shard that is replaced here
    left_out, contents, dropped = _validation_contents(task.output_dir, task.fingerprint, task.left_out), [], []
    bad, repaired, short_sides, gray = [], [], collections.Counter(), 0
    with storage.written_aside(path) as output:
        shard = tfrecord.ShardWriter(output.write_all)
        for member in plan.members(work_folder, planned):
            place = f"{task.named}/{member.path}"
            try:
                if member.size > images.MAX_FILE_BYTES:
                    raise BadImageError(f"has {member.size:,} bytes, more than {images.MAX_FILE_BYTES:,}")
                data = read_image(source, member)
                if (held := content(data)) in left_out:
                    dropped.append((place, held, member.class_index))
                    count(1, member.size, 0)
                    continue
                stored = images.prepare(data, member.path, kept)
            except BadImageError as error:
                if task.on_bad == "fail":
                    raise InputError(
                        f"{place}: {error}; fix: replace or remove it, or leave out all such with --on_bad=skip"
                    ) from None
                bad.append((place, str(error), member.class_index))
                count(1, member.size, 1)
                continue
            if stored.repaired == images.UPRIGHT and member.boxes:
                raise InputError(f"{place}: its bounding boxes are of the pixels as stored; fix: --orientation=keep")
            synset, text = classes[member.class_index]
            label = options.label_base + member.class_index
            shard.write(*tfrecord.encode_example(_features(stored, member.path, label, synset, text, member.boxes)))
            contents.append(held)
            if stored.repaired:
                repaired.append((place, stored.repaired))
            short_sides[min(stored.width, stored.height)] += 1
            gray += stored.channels == 1
            count(1, member.size, 0)
        if storage.size(path) == shard.bytes and storage.crc32c(path) == shard.crc32c:
            output.wanted = False  # the shard of an earlier plan is right for this one
        elif task.reread and not storage.is_remote(path):
            _check_written(output.temporary, shard)
    entry = JournalEntry(
        file=planned.file,
        split=planned.split,
        inputs=planned.inputs,
        examples=shard.examples,
        bytes=shard.bytes,
        crc32c=f"{shard.crc32c:08x}",
        gray=gray,
        short_sides=" ".join(f"{side}:{count}" for side, count in sorted(short_sides.items())),
        bad=bad,
        repaired=repaired,
        contents="".join(contents),
        dropped=dropped,
        left_out=task.left_out,
    )
    storage.write(journal(task.output_dir, planned.file), json_files.encoded(asdict(entry)))


def content(data: bytes) -> str:
    """16 hexadecimal digits that are equal for files of the same bytes, and for no two others by chance.

    A checksum of all bytes and a digest of every 61st byte take 11 us for 110 kB; a digest of all bytes takes 197.
    """
    some = b"%d %d " % (len(data), google_crc32c.value(data)) + data[::_STRIDE]
    return hashlib.blake2b(some, digest_size=8).hexdigest()


def digest(entries: Iterable[JournalEntry]) -> str:
    """A digest of the contents of shards; "" if there are none."""
    joined = "".join(entry.contents for entry in entries)
    return hashlib.sha256(joined.encode()).hexdigest() if joined else ""


@functools.lru_cache(maxsize=1)
def _validation_contents(output_dir: str, fingerprint: str, left_out: str) -> frozenset[str]:
    """The contents of the validation shards with the digest `left_out`; none if that is ""."""
    lines = plan.load_once(storage.join(output_dir, WORK_FOLDER), fingerprint).shards if left_out else []
    entries = [read_journal(output_dir, line) for line in lines if line.split == "validation"]
    return frozenset(held for entry in entries if entry for held in contents_of(entry.contents))


def contents_of(joined: str) -> Iterator[str]:
    """The single `content`s of several that are joined."""
    return (joined[start : start + 16] for start in range(0, len(joined), 16))


def _features(stored: images.Stored, path: str, label: int, synset: str, text: str, boxes: Sequence[Box]) -> dict:
    xmin, ymin, xmax, ymax = zip(*boxes, strict=True) if boxes else ((), (), (), ())
    return {
        "image/channels": stored.channels,
        "image/class/label": label,
        "image/class/synset": synset.encode("utf-8", "surrogateescape"),
        "image/class/text": text.encode("utf-8", "surrogateescape"),
        "image/colorspace": b"Grayscale" if stored.channels == 1 else b"RGB",
        "image/encoded": stored.encoded,
        "image/filename": path.rpartition("/")[2].encode("utf-8", "surrogateescape"),
        "image/format": stored.format.encode(),
        "image/height": stored.height,
        "image/object/bbox/label": (label,) * len(boxes),
        "image/object/bbox/xmax": xmax,
        "image/object/bbox/xmin": xmin,
        "image/object/bbox/ymax": ymax,
        "image/object/bbox/ymin": ymin,
        "image/width": stored.width,
    }


def _check_written(path: str, shard: tfrecord.ShardWriter) -> None:
    """Reads a shard back; raises OSError if the file system did not keep what was written."""
    if storage.crc32c(path) != shard.crc32c:
        raise OSError(f"{path}: reads back other bytes than were just written: failing disk?")


def journal(output_dir: str, file: str) -> str:
    """The path of a shard's journal entry."""
    return storage.join(output_dir, WORK_FOLDER, "journal", f"{file}.json")


def read_journal(output_dir: str, planned: plan.Shard, left_out: str = "") -> JournalEntry | None:
    """The journal entry of a shard, if the shard is unchanged and its inputs are those of the plan; else None.

    Args:
      output_dir: the folder of the shard.
      planned: the shard's line of the plan.
      left_out: as in the shard's task.
    """
    try:
        entry = JournalEntry(**json_files.read(journal(output_dir, planned.file), _SCHEMA, "delete it"))
    except (FileNotFoundError, InputError, TypeError):  # none, a damaged one, one of another version
        return None
    same = (entry.file, entry.split, entry.inputs) == (planned.file, planned.split, planned.inputs)
    same &= entry.examples + len(entry.bad) + len(entry.dropped) == planned.examples
    same &= entry.left_out == left_out
    return entry if same and storage.size(storage.join(output_dir, planned.file)) == entry.bytes else None
