"""Plan -> shards -> manifest: image data set in, TFRecord shards with `dataset.json` out.

The plan (which image goes into which shard, at which place) is a pure function of the inputs and the options and is
written first. Each shard is a pure function of its line of the plan: written aside, synced, renamed, and recorded in
the journal with its count, size and checksum. The manifest is put together from the journal, last. Killed anywhere,
the same command goes on with the shards that are missing, and the result is the same to the byte. So it is when inputs
have been mended in between: the plan is made again, and shards whose inputs are as they were stay.

In the output folder:
  train-00000-of-01024, ...        the shards
  dataset.json                     the manifest: what a reader needs to know; its presence says that all is there
  bad.tsv, repaired.tsv            images left out or re-encoded, with the reason; only if there are any
  dataset_info.json, features.json, image.class.label.labels.txt   see data_prep.formats.tfds_metadata
  .data_prep/plan.json, members.jsonl   the plan
  .data_prep/journal/SHARD.json    what became of each finished shard
"""

import collections
import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields

from data_prep import beam_runner, json_files, plan, program, signals, storage
from data_prep.errors import BadImageError, InputError
from data_prep.formats import image as images
from data_prep.formats import tfds_metadata, tfrecord
from data_prep.json_files import COUNT, HEX, TEXT, list_of, record, row
from data_prep.program import escaped
from data_prep.progress import Counters, Progress
from data_prep.sources.dataset import SPLITS, Dataset, read_image

MANIFEST = "dataset.json"
WORK_FOLDER = ".data_prep"
_SHARD_NAME = re.compile(r"[a-z]+-\d{5}-of-\d{5}")
_LOCK_ATTEMPTS = 20  # of 0.1 s: the workers of a conversion that was just killed take a moment to notice
DEFAULTS = plan.Options()


def write_shard(task: dict, count: Callable[[int, int, int], None] = lambda images, size, bad: None) -> dict:
    """Writes one shard and its journal entry; a pure function of `task`, so any worker anywhere may run it.

    Args:
      task: shard (`data_prep.plan.Shard`); work_folder and fingerprint of its plan; output_dir, sources, options,
        on_bad, reread.
      count: called with images, bytes and bad images as they are done.
    Returns:
      The journal entry.
    Raises:
      InputError: a bad image and on_bad is "fail"; the shard is then not there.
    """
    # Once a block of this size has been freed, glibc keeps smaller ones for the next image. Without it, every image of
    # 30 to 128 KiB gives its pages back and faults them in again, which halves the speed.
    bytearray(16 << 20)
    planned = plan.Shard(*task["shard"])
    classes = plan.load_once(task["work_folder"], task["fingerprint"]).classes
    source, path = task["sources"][planned.split], storage.join(task["output_dir"], planned.file)
    options = plan.Options(**task["options"])
    kept = images.Storage(options.max_side, options.quality, options.decode)
    storage.remove(_journal(task["output_dir"], planned.file))  # it speaks of what is replaced here
    bad, repaired, short_sides, gray = [], [], collections.Counter(), 0
    with storage.written_aside(path) as output:
        shard = tfrecord.ShardWriter(output.write_all)
        for member, offset, size, class_index, boxes in plan.members(task["work_folder"], planned):
            place = f"{source}/{member}"
            try:
                if size > images.MAX_FILE_BYTES:
                    raise BadImageError(f"has {size:,} bytes, more than {images.MAX_FILE_BYTES:,}")
                stored = images.prepare(read_image(source, member, offset, size), member, kept)
            except BadImageError as error:
                if task["on_bad"] == "fail":
                    raise InputError(
                        f"{place}: {error}; fix: replace or remove it, or leave out all such with --on_bad=skip"
                    ) from None
                bad.append([place, str(error), class_index])
                count(1, size, 1)
                continue
            synset, text = classes[class_index]
            label = options.label_base + class_index
            shard.write(*tfrecord.encode_example(_features(stored, member, label, synset, text, boxes)))
            if stored.repaired:
                repaired.append([place, stored.repaired])
            short_sides[min(stored.width, stored.height)] += 1
            gray += stored.channels == 1
            count(1, size, 0)
        if storage.size(path) == shard.bytes and storage.crc32c(path) == shard.crc32c:
            output.wanted = False  # the shard of an earlier plan is right for this one
        elif task["reread"] and not storage.is_remote(path):
            _check_written(output.temporary, shard)
    entry = {
        "file": planned.file,
        "split": planned.split,
        "inputs": planned.inputs,
        "examples": shard.examples,
        "bytes": shard.bytes,
        "crc32c": f"{shard.crc32c:08x}",
        "gray": gray,
        "short_sides": " ".join(f"{side}:{count}" for side, count in sorted(short_sides.items())),
        "bad": bad,
        "repaired": repaired,
    }
    storage.write(_journal(task["output_dir"], planned.file), _json(entry))
    return entry


def _features(stored: images.Stored, path: str, label: int, synset: str, text: str, boxes: list) -> dict:
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


def _json(value) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _journal(output_dir: str, file: str) -> str:
    return storage.join(output_dir, WORK_FOLDER, "journal", f"{file}.json")


_ENTRY = record(
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
)


def _read_journal(output_dir: str, shard: plan.Shard) -> dict | None:
    """The journal entry of a shard that is there as it was written, from the inputs as they are, else None."""
    try:
        entry = json_files.read(_journal(output_dir, shard.file), _ENTRY, "delete it")
    except (FileNotFoundError, InputError):  # none, or a damaged one
        return None
    same = (entry["file"], entry["split"], entry["inputs"]) == (shard.file, shard.split, shard.inputs)
    same &= entry["examples"] + len(entry["bad"]) == shard.examples
    return entry if same and storage.size(storage.join(output_dir, shard.file)) == entry["bytes"] else None


def _remove_others(output_dir: str, planned: plan.Plan) -> None:
    """Removes the shards of an earlier plan, which the journal lists, that are not in this one."""
    files = {shard.file for shard in planned.shards}
    for name in storage.names(storage.join(output_dir, WORK_FOLDER, "journal")):
        file = name.removesuffix(".json")
        if file not in files and _SHARD_NAME.fullmatch(file):
            storage.remove(storage.join(output_dir, file))
            storage.remove(_journal(output_dir, file))


@contextlib.contextmanager
def _locked(output_dir: str) -> Iterator[None]:
    """Holds the output folder against a second conversion at the same time (local folders)."""
    if storage.is_remote(output_dir):
        yield
        return
    with storage.open_local(os.path.join(output_dir, WORK_FOLDER, "lock"), "w") as lock:
        for _ in range(_LOCK_ATTEMPTS):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.1)
        else:
            raise InputError(f"{output_dir}: another conversion is running there; wait for it or end it")
        yield


def _claim(output_dir: str, request: dict) -> plan.Plan | None:
    """The plan that the output folder holds, if it is the one of this request; None if one is to be made.

    That is so when the folder holds nothing, when its plan has been deleted, and when the inputs have changed since an
    unfinished conversion began: a bad image has been replaced or removed.

    Raises:
      InputError: it holds another plan, or files that no conversion wrote.
    """
    held = plan.load(storage.join(output_dir, WORK_FOLDER))
    if not held:
        ours = storage.exists(storage.join(output_dir, WORK_FOLDER, "journal"))
        if not ours and (foreign := [name for name in storage.names(output_dir) if name != WORK_FOLDER]):
            raise InputError(
                f"{output_dir}: holds {foreign[0]!r} and {len(foreign) - 1} other file(s), no conversion of ours; "
                "give --output_dir an empty or new folder"
            )
        return None
    if held.request == request:
        return held
    differences = [
        _difference(key, held.request.get(key), value)
        for key, value in request.items()
        if held.request.get(key) != value and key != "stamp"
    ]
    if not differences:
        if not storage.exists(storage.join(output_dir, MANIFEST)):
            return None
        raise InputError(
            f"{output_dir}: is complete, and the input files have changed since (names, sizes or times of "
            f"modification). Give another --output_dir, or delete its {MANIFEST} to convert what has changed"
        )
    raise InputError(
        f"{output_dir}: holds another plan, {_describe(held.request)}; this command asks for {_describe(request)}: "
        f"{'; '.join(differences)}. Give another --output_dir, or delete that folder"
    )


def _difference(name: str, there, here) -> str:
    if name == "decode":  # the one that is not called as its flag
        return f"--verify=decode was given {'there and not here' if there else 'here and not there'}"
    return f"{name} is {there!r} there and {here!r} here"


def _describe(request: dict) -> str:
    digest = hashlib.sha256(json.dumps(request).encode()).hexdigest()[:8]
    return f"{digest} ({request['name']} from {request['origin']}, seed {request['seed']})"


def convert(
    dataset: Dataset,
    output_dir: str,
    options: plan.Options = DEFAULTS,
    *,
    workers: int = 1,
    on_bad: str = "fail",
    reread: bool = True,
    beam_options: list[str] | None = None,
    dry_run: bool = False,
    log: Callable[[str], None] = print,
) -> dict:
    """Converts a data set, or finishes what an earlier call began.

    Args:
      dataset: what to convert.
      output_dir: empty, new, or holding the same conversion.
      options: what decides the bytes that are written.
      workers: processes; the output does not depend on it.
      on_bad: "fail" stops at the first bad image; "skip" leaves bad images out and lists them in bad.tsv; "report" goes
        through all, lists them in bad.tsv and then fails without a manifest.
      reread: read every shard back before it gets its name.
      beam_options: have Apache Beam write the shards, with these flags of its; None: local processes.
      dry_run: only say what would be done; nothing is written.
      log: takes lines for the person who waits.
    Returns:
      The manifest.
    Raises:
      InputError: the inputs or the output folder cannot work, or a bad image was found.
      OSError: the disk is full, the folder not writable, ...
    """
    if beam_options is not None:
        program.require("apache_beam")
    request = {"name": dataset.name, "origin": dataset.origin, **asdict(options), "stamp": dataset.stamp}
    request = json.loads(json.dumps(request))  # tuples become lists, as in the plan
    work_folder = storage.join(output_dir, WORK_FOLDER)
    storage.close_files()  # archives may have been replaced since an earlier call
    planned = _claim(output_dir, request)
    if dry_run:
        return _describe_plan(dataset, options, request, log)
    storage.make_folder(storage.join(work_folder, "journal"))
    counters = Counters()
    with _locked(output_dir), _pool(1 if beam_options is not None else workers, counters) as pool:
        _remove_temporary(output_dir)
        if not planned:
            if pool:
                pool.submit(int)  # starts all workers: they load numpy while the plan is made
            log(f"planning {dataset.name}: listing {dataset.origin}")
            contents = dataset.scan()
            for note in contents.notes:
                log(note)
            plan.save(work_folder, contents, options, request)
            del contents
            planned = plan.load(work_folder)
        if planned.rejected and on_bad == "fail":
            path, why = planned.rejected[0]
            raise InputError(f"{path}: {why}; fix: leave out all such with --on_bad=skip")
        _remove_others(output_dir, planned)
        entries = {shard.file: _read_journal(output_dir, shard) for shard in planned.shards}
        missing = [shard for shard in planned.shards if entries[shard.file] is None]
        if missing:
            storage.remove(storage.join(output_dir, MANIFEST))  # it says that all is there
            if not all(storage.exists(source) for source in dataset.sources.values()):
                dataset.scan()  # writes an embedded set again, or says what is missing
            if len(missing) < len(entries):
                log(f"{len(entries) - len(missing)} of {len(entries)} shards are already there")
            shared = {
                "output_dir": output_dir,
                "work_folder": work_folder,
                "fingerprint": planned.fingerprint,
                "sources": dataset.sources,
                "options": asdict(options),
                "on_bad": on_bad,
                "reread": reread,
            }
            tasks = [{"shard": shard, **shared} for shard in missing]
            if beam_options is None:
                images, size = (sum(getattr(shard, what) for shard in missing) for what in ("examples", "size"))
                progress = Progress(images, size, counters)
                _run(tasks, pool, progress)
                progress.tick(final=True)
            else:
                beam_runner.run(write_shard, tasks, beam_options)
            entries |= {shard.file: _read_journal(output_dir, shard) for shard in missing}
        return _finish(output_dir, planned, list(entries.values()), on_bad, bool(missing), log)


def _describe_plan(dataset: Dataset, options: plan.Options, request: dict, log: Callable[[str], None]) -> None:
    """Says what a conversion would do."""
    contents = dataset.scan()
    planned = plan.make(contents, options, request, lambda lines: None)
    log(f"{dataset.name} from {dataset.origin}: {len(contents.synsets):,} classes, plan {planned.fingerprint[:8]}")
    for split in SPLITS:
        shards = [shard for shard in planned.shards if shard.split == split]
        examples, size = sum(shard.examples for shard in shards), sum(shard.size for shard in shards)
        log(f"{split}: {examples:,} images, {size / 1e9:.3g} GB, in {len(shards):,} shards from {shards[0].file}")
    log(f"{len(contents.boxes):,} annotations with bounding boxes, {len(contents.rejected):,} members to leave out")
    for line in [*contents.notes, *(": ".join(pair) for pair in contents.rejected[:20])]:
        log(line)
    log("dry run: nothing written")


def _remove_temporary(output_dir: str) -> None:
    """Removes what a killed run left half-written."""
    if storage.is_remote(output_dir):
        return
    for folder in (output_dir, *(os.path.join(output_dir, WORK_FOLDER, part) for part in ("", "journal"))):
        for name in storage.names(folder):
            if storage.is_temporary(name):
                os.unlink(os.path.join(folder, name))


_counters = None  # of the process that a worker belongs to


def _start_worker(counters: Counters) -> None:
    """Prepares a worker process."""
    import jsonschema  # noqa: F401 - 0.1 s each, which the plan and `data_prep.formats.jpeg` would need at the first image
    import numpy  # noqa: F401

    global _counters
    _counters = counters
    signals.start_worker()


def _process_context() -> multiprocessing.context.BaseContext:
    """How to start workers: by fork, 0.2 s faster, unless that would cut off other threads (fsspec, TensorFlow)."""
    alone = os.path.isdir("/proc/self/task") and len(os.listdir("/proc/self/task")) == 1
    return multiprocessing.get_context("fork" if alone else "spawn")


def _write_shard_in_worker(task: dict) -> dict:
    return write_shard(task, _counters.add)


@contextlib.contextmanager
def _pool(workers: int, counters: Counters) -> Iterator[concurrent.futures.ProcessPoolExecutor | None]:
    """Local processes, which start with the first task; None for one worker, which is this process."""
    if workers == 1:
        yield None
        return
    pool = concurrent.futures.ProcessPoolExecutor(workers, _process_context(), _start_worker, (counters,))
    try:
        yield pool
    except concurrent.futures.BrokenExecutor:
        raise InputError("a worker process died (out of memory?); run again, with fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _run(tasks: list[dict], pool: concurrent.futures.ProcessPoolExecutor | None, progress: Progress) -> None:
    """Writes all shards, in the pool's processes or in this one."""
    if pool is None:

        def count(*amounts: int) -> None:
            progress.counters.add(*amounts)
            progress.tick()

        for task in tasks:
            write_shard(task, count)
        return
    pending = {pool.submit(_write_shard_in_worker, task) for task in tasks}
    while pending:
        done, pending = concurrent.futures.wait(pending, 0.25, concurrent.futures.FIRST_COMPLETED)
        progress.tick()
        for future in done:
            future.result()


def _finish(output_dir, planned, entries, on_bad, wrote, log) -> dict:
    """Checks the journal as a whole and writes bad.tsv and the manifest."""
    bad = planned.rejected + sorted([path, why] for entry in entries for path, why, _ in entry["bad"])
    repaired = sorted(row for entry in entries for row in entry["repaired"])
    for name, rows in (("bad.tsv", bad), ("repaired.tsv", repaired)):
        path = storage.join(output_dir, name)
        if rows:
            lines = (f"{escaped(path, line=True)}\t{escaped(why, line=True)}\n" for path, why in rows)
            storage.write(path, "".join(lines).encode())
        else:
            storage.remove(path)
    _check_classes_left(output_dir, planned, entries)
    if bad and on_bad != "skip":
        raise InputError(
            f"{len(bad)} bad image(s), listed in {storage.join(output_dir, 'bad.tsv')}, the first: "
            f"{': '.join(bad[0])}; the rest is converted; run again with --on_bad=skip to leave these out"
        )
    manifest = _manifest(planned, entries)
    path = storage.join(output_dir, MANIFEST)
    if wrote or not storage.exists(path):
        for name, content in tfds_metadata.files(manifest).items():
            storage.write(storage.join(output_dir, name), content)
        storage.write(path, _json(manifest))
        counts = ", ".join(f"{split['examples']:,} {name}" for name, split in manifest["splits"].items())
        log(f"done: {counts} images in {output_dir}; {_by_reason(repaired)} re-encoded, {_by_reason(bad)} bad left out")
    else:
        log(f"{output_dir}: already complete, nothing to do")
    return manifest


def _by_reason(rows: list[list[str]]) -> str:
    """How many images there are, and of each reason, the most frequent first."""
    reasons = collections.Counter(why for _, why in rows).most_common(5)
    named = ", ".join(f"{count:,} {why}" for why, count in reasons)
    return f"{len(rows):,} ({named}{', ...' if len(reasons) > 5 else ''})" if rows else "0"


def _check_classes_left(output_dir: str, planned: plan.Plan, entries: list[dict]) -> None:
    """Raises InputError if bad images leave a split or a class without any, as a scan that finds none does.

    Of a choice by --limit only the splits count: the class may have other images.
    """
    left = {split: list(counts) for split, counts in planned.images.items()}
    for entry in entries:
        for *_, class_index in entry["bad"]:
            left[entry["split"]][class_index] -= 1
    for split in SPLITS:
        emptied = [k for k, count in enumerate(planned.images[split]) if count and not left[split][k]]
        if emptied and (not planned.request["limit"] or not any(left[split])):
            named = ", ".join(repr(planned.classes[k][0]) for k in emptied[:5])
            raise InputError(
                f"{output_dir}: all {split} images of {len(emptied)} class(es) are bad: {named}"
                f"{', ...' if len(emptied) > 5 else ''}; they are listed in {storage.join(output_dir, 'bad.tsv')}; "
                "fix: replace some of them, or remove the class's folder, and give the same command again"
            )


def _manifest(planned: plan.Plan, entries: list[dict]) -> dict:
    short_sides = collections.Counter()
    for entry in entries:
        for side, _, count in (pair.partition(":") for pair in entry["short_sides"].split()):
            short_sides[int(side)] += int(count)
    total, seen, median = sum(short_sides.values()), 0, 0
    for side in sorted(short_sides):
        seen += short_sides[side]
        if 2 * seen >= total:
            median = side
            break
    splits = {}
    for split in SPLITS:
        shards = [entry for entry in entries if entry["split"] == split]
        splits[split] = {
            "examples": sum(entry["examples"] for entry in shards),
            "shards": [{key: entry[key] for key in ("file", "examples", "bytes", "crc32c")} for entry in shards],
        }
    return {
        "format": "bn_keras.dataset",
        "version": 1,
        "name": planned.request["name"],
        "label_base": planned.request["label_base"],
        "channels": 1 if sum(entry["gray"] for entry in entries) == total else 3,
        "class_names": [text for _, text in planned.classes],
        "synsets": [synset for synset, _ in planned.classes],
        "short_side": {"min": min(short_sides), "median": median, "max": max(short_sides)},
        "splits": splits,
        "plan": {
            "fingerprint": planned.fingerprint,
            "source": planned.request["origin"],
            "options": {field.name: planned.request[field.name] for field in fields(plan.Options)},
        },
    }
