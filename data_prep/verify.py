"""Checks finished shards: every checksum, whether every record fits the schema, and on request every image's pixels."""

import concurrent.futures
import multiprocessing
import re
from collections.abc import Iterator

from data_prep import json_files, manifest, signals, storage
from data_prep.errors import BadImageError, InputError
from data_prep.formats import image, tfrecord
from data_prep.json_files import COUNT, HEX, TEXT, list_of, record
from data_prep.shard import WORK_FOLDER
from data_prep.sources.dataset import SPLITS

_SHARD = record(file=json_files.FILE_NAME, examples=COUNT, bytes=COUNT, crc32c=HEX)
_MANIFEST = record(
    label_base=COUNT,
    class_names=list_of(TEXT),
    splits={"type": "object", "additionalProperties": record(examples=COUNT, shards=list_of(_SHARD))},
)
_SHARD_NAME = re.compile(r"(.*?)(\d{1,9})-of-(\d{1,9})")
_MOST_NAMED = 20  # most findings for a shard


def verify(folder: str, decode: bool, workers: int) -> tuple[list[str], int]:
    """Checks the shards in a folder: those that its manifest lists or, without a manifest, all files named like shards.

    Args:
      folder: a folder that a conversion wrote, or one of TFRecord files of TF-Slim or tf-models.
      decode: whether also to decode every image and compare it with its record.
      workers: how many processes to use.
    Returns:
      A line for each finding, which names the file, the record and its byte offset; and how many records were read.
    Raises:
      InputError: there is no such folder, or it has no shards.
    """
    tasks = list(_tasks(folder, decode))
    if workers == 1 or len(tasks) == 1:
        return _joined(map(check_shard, tasks))
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), signals.start_worker
    ) as pool:
        with signals.blocked():
            results = pool.map(check_shard, tasks)
        return _joined(results)


def _joined(results) -> tuple[list[str], int]:
    findings, records = [], 0
    for found, read in results:
        findings += found
        records += read
    return findings, records


def _tasks(folder: str, decode: bool) -> Iterator[dict]:
    if not storage.is_folder(folder):
        raise InputError(f"{folder}: no such folder; give the --output_dir of a conversion")
    path = storage.join(folder, manifest.FILE)
    if storage.exists(path):
        listed = json_files.read(path, _MANIFEST, "delete it, and give the command of its conversion again")
        labels = [listed["label_base"], len(listed["class_names"])]
        for split in listed["splits"].values():
            for shard in split["shards"]:
                yield {**shard, "folder": folder, "decode": decode, "labels": labels}
        return
    if WORK_FOLDER in storage.names(folder):
        raise InputError(f"{folder}: the conversion is not finished; run its command again first")
    places = folder, *(storage.join(folder, split) for split in SPLITS)  # as imagenet_to_gcs.py of tf-models writes it
    shards = [
        (match[1], int(match[3]), int(match[2]), place, name)
        for place in filter(storage.is_folder, places)
        for name in storage.names(place)
        if (match := _SHARD_NAME.fullmatch(name))
    ]
    if not shards:
        raise InputError(f"{folder}: holds neither {manifest.FILE} nor files named like train-00000-of-01024")
    counts, seen = {}, set()
    for split, count, number, place, name in sorted(shards):
        if counts.setdefault(split, count) != count or number >= count or (split, number) in seen:
            raise InputError(
                f"{storage.join(place, name)}: is of another conversion than the shards beside it; "
                "fix: leave the shards of one in the folder"
            )
        seen.add((split, number))
        yield {"folder": place, "decode": decode, "labels": None, "file": name}
    for split, count in counts.items():
        missing = next((number for number in range(count) if (split, number) not in seen), None)
        if missing is not None:
            raise InputError(f"{folder}: lacks shard {split}{missing:05}-of-{count:05}; fix: copy it again")


def check_shard(task: dict) -> tuple[list[str], int]:
    """The findings about one shard, and how many records were read from it."""
    path = storage.join(task["folder"], task["file"])
    findings, records = [], 0
    size = storage.size(path)
    if size < 0:
        return [f"{path}: is missing, or no regular file"], 0
    if size != task.get("bytes", size):
        findings.append(f"{path}: has {size:,} bytes, the manifest says {task['bytes']:,}")
    with storage.open_read(path) as file:
        try:
            for offset, data in tfrecord.read_records(file):
                try:
                    _check_example(data, task)
                except (tfrecord.DamagedRecordError, BadImageError) as error:
                    findings.append(f"{path}: record {records} at byte {offset:,} {error}")
                records += 1
        except tfrecord.DamagedRecordError as damage:
            findings.append(f"{path}: record {records} at byte {damage.offset:,} {damage}; what follows was not read")
    if not records and not findings and "examples" not in task:
        findings.append(f"{path}: holds no records")
    if not findings:
        if records != task.get("examples", records):
            findings.append(f"{path}: holds {records} records, the manifest says {task['examples']}")
        elif "crc32c" in task and f"{storage.crc32c(path):08x}" != task["crc32c"]:
            findings.append(f"{path}: every record is whole, but the file is not the one that was written")
    if len(findings) > _MOST_NAMED:
        findings[_MOST_NAMED:] = [f"{path}: ... and {len(findings) - _MOST_NAMED} more"]
    return findings, records


def _check_example(data: bytes, task: dict) -> None:
    """Raises DamagedRecordError or BadImageError unless `data` is an Example of the schema, with a legal label."""
    features = tfrecord.decode_example(data)
    try:
        (encoded,), (label,) = features["image/encoded"], features["image/class/label"]
    except (KeyError, ValueError):
        raise tfrecord.DamagedRecordError("lacks image/encoded or image/class/label") from None
    if task["labels"]:
        base, classes = task["labels"]
        if not base <= label < base + classes:
            raise tfrecord.DamagedRecordError(f"has label {label}, legal are {base} to {base + classes - 1}")
    if task["decode"]:
        actual = dict(zip(("width", "height", "channels"), image.decoded_size(encoded), strict=True))
        if not task["labels"]:
            del actual["channels"]  # TF-Slim's records say 3 for gray images, too
        for name, value in actual.items():
            if (stated := features.get(f"image/{name}", [value])) != [value]:
                raise tfrecord.DamagedRecordError(f"states {name} {stated}, its image has {value}")
