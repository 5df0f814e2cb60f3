"""The plan of a conversion: which image goes into which shard, at which place.

It depends only on the inputs and the options. On disk it is two files, of which the second is written last:
  members.jsonl   a line for each shard: its members in order, each a `Member`
  plan.json       what all shards share, and where each shard's line is
"""

import functools
import hashlib
import json
import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

from data_prep import json_files, storage
from data_prep.errors import InputError
from data_prep.json_files import COUNT, HEX, TEXT, list_of, record, row
from data_prep.sources.dataset import SPLITS, Box, Contents, Image

# TF-Slim's and tf-models' numbers of shards for the full ILSVRC2012; other sets get a power of two by their size.
_ILSVRC2012_SHARDS = {"train": (1_281_167, 1024), "validation": (50_000, 128)}
_SHARD_BYTES = 160 << 20  # 1,024 shards of ILSVRC2012's training images have 138 MiB
_FIX = "delete plan.json, and the same command goes on with the shards that are whole"
_FEWEST_SHARDS = {"train": 4, "validation": 1}


@dataclass(frozen=True)
class Options:
    """The options that decide, beside the inputs, the bytes that are written.

    Attributes:
      seed: the random seed of the global shuffle.
      label_base: the label of class index 0.
      train_shards, validation_shards: how many shards to write; 0: a number that fits the size.
      limit: the most images in a split, the first ones of the shuffled order; 0: all.
      max_side, quality, upright: see `data_prep.formats.image.Storage`.
      decode: whether to decode every image, to find damage that no header shows.
      drop_duplicates: whether to leave out training images with the same bytes as a validation image.
    """

    seed: int = 0
    label_base: int = 1
    train_shards: int = 0
    validation_shards: int = 0
    limit: int = 0
    max_side: int = 0
    quality: int = 95
    decode: bool = False
    upright: bool = False
    drop_duplicates: bool = False


class Shard(NamedTuple):
    """A shard to write: its file name, how much goes in, and where its line in members.jsonl is.

    Its bytes depend on its line, its images' bytes, its classes' names and the options for storing images. `inputs`
    changes if any of these does, so a shard may stay if only the rest of the plan changes.
    """

    file: str
    split: str
    examples: int
    size: int  # of its images, in bytes
    start: int
    length: int
    line: str  # SHA-256
    inputs: (
        str  # SHA-256 of the images' names, sizes, versions and boxes, the classes, and the options for storing images
    )


class Member(NamedTuple):
    """An image of a shard: see `data_prep.sources.dataset.Image`."""

    path: str
    archive: str
    offset: int
    size: int
    packed: Sequence[int]
    class_index: int
    boxes: Sequence[Box]


@dataclass(frozen=True)
class Plan:
    """What plan.json holds.

    Attributes:
      fingerprint: SHA-256 of all members, classes and options.
      request: the options and a stamp of the inputs; a plan is only for the same request.
      classes: (synset, name) of each class index.
      rejected: (path, why) of members that must not be used.
      images: split -> how many images of each class index go in.
      shards: the shards, in order.
    """

    fingerprint: str
    request: dict
    classes: list[tuple[str, str]]
    rejected: list[tuple[str, str]]
    images: dict[str, list[int]]
    shards: list[Shard]


_SPLIT = {"enum": list(SPLITS)}
_FLAG = {"type": "boolean"}
_OPTIONS = {field.name: _FLAG if isinstance(field.default, bool) else COUNT for field in fields(Options)}
_SCHEMA = record(
    fingerprint=HEX,
    request=record(name=TEXT, origin=TEXT, stamp={}, **_OPTIONS),
    classes=list_of(row(TEXT, TEXT)),
    rejected=list_of(row(TEXT, TEXT)),
    images=record(**{split: list_of(COUNT) for split in SPLITS}),
    shards=list_of(row(json_files.FILE_NAME, _SPLIT, COUNT, COUNT, COUNT, COUNT, HEX, HEX)),
)


def shard_count(split: str, examples: int, size: int) -> int:
    """How many shards to make of `examples` images with `size` bytes in all; each gets at least one image."""
    full, shards = _ILSVRC2012_SHARDS[split]
    if examples < full:
        shards = max(_FEWEST_SHARDS[split], 1 << math.ceil(math.log2(max(size / _SHARD_BYTES, 1))))
    return min(shards, examples)


def shuffled(seed: int, split: str, found: list[Image]) -> list[Image]:
    """A permutation that depends only on the seed and the images' classes and names.

    Images are sorted by a hash of these, so the order is the same for folders and archives, in any order of listing,
    and for any version of Python.
    """
    prefix = f"{seed}/{split}/"

    def key(image: Image) -> bytes:
        identity = f"{prefix}{image.synset}/{image.name}"
        return hashlib.blake2b(identity.encode("utf-8", "surrogateescape"), digest_size=16).digest()

    # Two sorts, the second of which keeps the order of what is equal: a key of both takes 80 MB more for ImageNet.
    return sorted(sorted(found, key=operator.attrgetter("path")), key=key)


def make(contents: Contents, options: Options, request: dict, write: Callable[[list[bytes]], None]) -> Plan:
    """Plans a conversion, and calls `write` with each line of members.jsonl.

    Raises:
      InputError: more shards are asked for than there are images.
    """
    class_index = {synset: index for index, synset in enumerate(contents.synsets)}
    identity = hashlib.sha256(json.dumps([contents.synsets, contents.class_names, asdict(options)]).encode())
    classes = list(zip(contents.synsets, contents.class_names, strict=True))
    storage_options = [options.label_base, options.max_side, options.quality, options.decode, options.upright]
    shards, images, start = [], {}, 0
    for split in SPLITS:
        order = shuffled(options.seed, split, contents.images[split])[: options.limit or None]
        by_class = Counter(image.synset for image in order)
        images[split] = [by_class[synset] for synset in contents.synsets]
        wanted = getattr(options, f"{split}_shards")
        count = wanted or shard_count(split, len(order), sum(image.size for image in order))
        if count > len(order):
            raise InputError(f"--{split}_shards={count}: there are only {len(order)} images to put into them")
        # The first shards take the rest, one each. When an image goes, only the shards between its own and the last of
        # these get other images.
        least, more = divmod(len(order), max(count, 1))
        for index in range(count):
            members = order[index * least + min(index, more) : (index + 1) * least + min(index + 1, more)]
            rows = [
                Member(
                    *(image.path, image.archive, image.offset, image.size, image.packed, class_index[image.synset]),
                    boxes=contents.boxes.get(image.name.rpartition(".")[0], ()),
                )
                for image in members
            ]
            line = json.dumps(rows, separators=(",", ":")).encode() + b"\n"
            identity.update(line)
            write([line])
            file = f"{split}-{index:05}-of-{count:05}"
            digest = hashlib.sha256(line).hexdigest()
            used = [(k, *classes[k]) for k in sorted({member.class_index for member in rows})]
            # The place of an image does not count: an archive that is made again may hold it elsewhere.
            images_of = [
                (row.path, row.size, row.boxes, image.version) for row, image in zip(rows, members, strict=True)
            ]
            inputs = json.dumps([images_of, [row.class_index for row in rows], used, storage_options]).encode()
            size = sum(image.size for image in members)
            where = start, len(line), digest, hashlib.sha256(inputs).hexdigest()
            shards.append(Shard(file, split, len(members), size, *where))
            start += len(line)
    return Plan(identity.hexdigest(), request, classes, contents.rejected, images, shards)


def save(folder: str, contents: Contents, options: Options, request: dict) -> None:
    """Plans a conversion and writes both files into `folder`."""
    storage.remove(_path(folder))  # it does not fit the members that are written next
    with storage.written_aside(members_path(folder)) as file:
        plan = make(contents, options, request, file.write_all)
    storage.write(_path(folder), json_files.encoded(asdict(plan)))
    storage.close_files()


def exists(folder: str) -> bool:
    """Whether there is a plan in `folder`."""
    return storage.exists(_path(folder))


def load(folder: str) -> Plan | None:
    """The plan in `folder`; None if there is none.

    Raises:
      InputError: the plan is damaged.
    """
    try:
        plan = json_files.read(_path(folder), _SCHEMA, _FIX)
    except FileNotFoundError:
        return None
    return Plan(
        **{field.name: plan[field.name] for field in fields(Plan)} | {"shards": [*map(Shard._make, plan["shards"])]}
    )


@functools.lru_cache(maxsize=1)
def load_once(folder: str, fingerprint: str) -> Plan:
    """The plan in `folder`, kept for a worker's next shard.

    Raises:
      InputError: the plan has another fingerprint by now.
    """
    plan = load(folder)
    if not plan or plan.fingerprint != fingerprint:
        raise InputError(f"{_path(folder)}: has been removed or replaced while its shards were written")
    return plan


def members(folder: str, shard: Shard) -> list[Member]:
    """The members of one shard, from its line of members.jsonl.

    Raises:
      InputError: the line is damaged.
    """
    line = storage.read_range(members_path(folder), shard.start, shard.length)
    if hashlib.sha256(line).hexdigest() != shard.line:
        raise InputError(f"{members_path(folder)}: is damaged at byte {shard.start:,}; fix: {_FIX}")
    return [*map(Member._make, json.loads(line))]


def members_path(folder: str) -> str:
    return storage.join(folder, "members.jsonl")


def _path(folder: str) -> str:
    return storage.join(folder, "plan.json")
