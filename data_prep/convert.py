"""Converts an image data set into TFRecord shards with a manifest, `dataset.json`: plan, shards, manifest.

The plan (which image goes into which shard, at which place) depends only on the inputs and the options, and is
written first. Each shard depends only on its line of the plan; it is written aside, synced, renamed, and recorded in
the journal with its count, size and checksum. The manifest is made from the journal, last. After a kill at any time,
the same command continues with the missing shards, and the result is the same to the byte. The same holds if inputs
were mended in between: the plan is made again, and shards whose inputs did not change stay.

In the output folder:
  train-00000-of-01024, ...        the shards
  dataset.json                     the manifest: what a reader needs to know; it exists only if everything is there
  bad.tsv, repaired.tsv            images left out or re-encoded, with the reason; only if there are any
  duplicates.tsv                   training images whose bytes are those of a validation image; only if there are any
  dataset_info.json, features.json, image.class.label.labels.txt   see data_prep.formats.tfds_metadata
  .data_prep/plan.json, members.jsonl   the plan
  .data_prep/journal/SHARD.json    what became of each finished shard
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

from data_prep import beam_runner, local_runner, manifest, plan, program, shard, storage
from data_prep.errors import InputError
from data_prep.progress import Counters, Progress
from data_prep.shard import WORK_FOLDER, ShardTask
from data_prep.sources.dataset import SPLITS, Contents, Dataset

_SHARD_NAME = re.compile(r"[a-z]+-\d{5}-of-\d{5}")
_LOCK_ATTEMPTS = 20  # times 0.1 s, in which the workers of a conversion that was just killed notice it
DEFAULTS = plan.Options()


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
      output_dir: a new or empty folder, or one that holds the same conversion.
      options: the options that decide the bytes that are written.
      workers: how many processes to use; the output does not depend on it.
      on_bad: "fail" stops at the first bad image; "skip" leaves bad images out and lists them in bad.tsv; "report" goes
        through all, lists them in bad.tsv and then fails without a manifest.
      reread: whether to read every shard back before it gets its name.
      beam_options: flags for Apache Beam, which then writes the shards; None for local processes.
      dry_run: whether only to say what would be done, and to write nothing.
      log: called with lines for the person who waits.
    Returns:
      The manifest; {} of a dry run.
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
    _check_place(output_dir, dataset)
    planned = _claim(output_dir, request)
    if dry_run:
        _describe_plan(dataset, options, request, log)
        return {}
    counters = Counters()
    with (
        _left_as_it_was(output_dir),
        _locked(output_dir),
        local_runner.pool(1 if beam_options is not None else workers, counters) as pool,
    ):
        _remove_temporary(output_dir)
        if not planned:
            local_runner.start(pool)
            log(f"planning {dataset.name}: listing {dataset.origin}")
            contents = _scan(dataset)
            for note in contents.notes:
                log(note)
            plan.save(work_folder, contents, options, request)
            del contents
            planned = plan.load(work_folder)
            assert planned, "it has just been saved"
        if planned.rejected and on_bad == "fail":
            path, why = planned.rejected[0]
            raise InputError(f"{path}: {why}; fix: leave out all such with --on_bad=skip")
        _remove_others(output_dir, planned)
        entries, wrote = {}, False
        # If duplicates are dropped, the validation shards come first: they decide what training leaves out.
        for splits in (("validation",), ("train",)) if options.drop_duplicates else (SPLITS,):
            lines = [line for line in planned.shards if line.split in splits]
            left_out = shard.digest(entries.values())
            found = {line.file: shard.read_journal(output_dir, line, left_out) for line in lines}
            missing = [line for line in lines if found[line.file] is None]
            if missing:
                wrote = True
                storage.remove(storage.join(output_dir, manifest.FILE))  # it would say that everything is there
                if dataset.unpacked and not storage.exists(_whole(dataset)):
                    _scan(dataset)
                if len(missing) < len(found):
                    log(f"{len(found) - len(missing)} of {len(found)} shards are already there")
                named = dataset.named or dataset.sources
                tasks = [
                    ShardTask(
                        line,
                        planned.fingerprint,
                        output_dir,
                        dataset.sources[line.split],
                        named[line.split],
                        options,
                        on_bad,
                        reread,
                        left_out,
                    )
                    for line in missing
                ]
                if beam_options is None:
                    images, size = (sum(getattr(line, what) for line in missing) for what in ("examples", "size"))
                    progress = Progress(images, size, counters)
                    local_runner.run(tasks, pool, progress)
                    progress.tick(final=True)
                else:
                    beam_runner.run(shard.write, tasks, beam_options)
                found |= {line.file: shard.read_journal(output_dir, line, left_out) for line in missing}
            entries |= found
        whole = [entries[line.file] for line in planned.shards]
        finished = manifest.finish(output_dir, planned, whole, dataset.named or dataset.sources, on_bad, wrote, log)
        if dataset.unpacked:
            shutil.rmtree(dataset.unpacked, ignore_errors=True)
        return finished


def _scan(dataset: Dataset) -> Contents:
    """Lists a data set, and unpacks archives that can only be read in order."""
    if dataset.unpacked:
        storage.remove(_whole(dataset))
    contents = dataset.scan()
    if dataset.unpacked:
        storage.write(_whole(dataset), b"")
    return contents


def _whole(dataset: Dataset) -> str:
    """The file that exists once all is unpacked."""
    return storage.join(dataset.unpacked, "whole")


def _describe_plan(dataset: Dataset, options: plan.Options, request: dict, log: Callable[[str], None]) -> None:
    """Says what a conversion would do."""
    contents = dataset.scan()
    planned = plan.make(contents, options, request, lambda lines: None)
    log(f"{dataset.name} from {dataset.origin}: {len(contents.synsets):,} classes, plan {planned.fingerprint[:8]}")
    for split in SPLITS:
        shards = [line for line in planned.shards if line.split == split]
        examples, size = sum(line.examples for line in shards), sum(line.size for line in shards)
        log(f"{split}: {examples:,} images, {size / 1e9:.3g} GB, in {len(shards):,} shards from {shards[0].file}")
    log(f"{len(contents.boxes):,} annotations with bounding boxes, {len(contents.rejected):,} members to leave out")
    for line in [*contents.notes, *(": ".join(pair) for pair in contents.rejected[:20])]:
        log(line)
    log("dry run: nothing written")


def _check_place(output_dir: str, dataset: Dataset) -> None:
    """Raises InputError if the output folder lies among the images, where a listing would take it for a class."""
    for source in dataset.sources.values():
        place = os.path.relpath(os.path.realpath(output_dir), os.path.realpath(source))
        if not place.startswith("."):  # neither outside nor hidden
            raise InputError(f"{output_dir}: lies in {source}, among the images; give --output_dir another place")


def _claim(output_dir: str, request: dict) -> plan.Plan | None:
    """The plan in the output folder, if it is of the same request; None if a plan has to be made.

    A plan has to be made if the folder is empty, if its plan was deleted, and if the inputs have changed since an
    unfinished conversion began, such as a bad image that was replaced or removed.

    Raises:
      InputError: the folder holds another plan, or files that no conversion wrote.
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
        if not storage.exists(storage.join(output_dir, manifest.FILE)):
            return None
        raise InputError(
            f"{output_dir}: is complete, and the input files have changed since (names, sizes or times of "
            f"modification). Give another --output_dir, or delete its {manifest.FILE} to convert what has changed"
        )
    raise InputError(
        f"{output_dir}: holds another plan, {_describe(held.request)}; this command asks for {_describe(request)}: "
        f"{'; '.join(differences)}. Give another --output_dir, or delete that folder"
    )


def _difference(name: str, there, here) -> str:
    if name == "decode":  # these two have other names than their flags
        return f"--verify=decode was given {'there and not here' if there else 'here and not there'}"
    if name == "upright":
        return f"--orientation is {'apply' if there else 'keep'} there and {'apply' if here else 'keep'} here"
    return f"{name} is {there!r} there and {here!r} here"


def _describe(request: dict) -> str:
    digest = hashlib.sha256(json.dumps(request).encode()).hexdigest()[:8]
    return f"{digest} ({request['name']} from {request['origin']}, seed {request['seed']})"


def _remove_others(output_dir: str, planned: plan.Plan) -> None:
    """Removes shards that the journal lists, from an earlier plan, and that are not in this one."""
    files = {line.file for line in planned.shards}
    for name in storage.names(storage.join(output_dir, WORK_FOLDER, "journal")):
        file = name.removesuffix(".json")
        if file not in files and _SHARD_NAME.fullmatch(file):
            storage.remove(storage.join(output_dir, file))
            storage.remove(shard.journal(output_dir, file))


def _remove_temporary(output_dir: str) -> None:
    """Removes the unfinished files of a killed conversion."""
    if storage.is_remote(output_dir):
        return
    for folder in (output_dir, *(os.path.join(output_dir, WORK_FOLDER, part) for part in ("", "journal"))):
        for name in storage.names(folder):
            if storage.is_temporary(name):
                os.unlink(os.path.join(folder, name))


@contextlib.contextmanager
def _left_as_it_was(output_dir: str) -> Iterator[None]:
    """Makes the folders of a conversion, and removes them again if an error in the `with` block comes before a plan."""
    work_folder = storage.join(output_dir, WORK_FOLDER)
    was_there = storage.exists(output_dir), storage.exists(work_folder)
    storage.make_folder(storage.join(work_folder, "journal"))
    try:
        yield
    except Exception:
        if not storage.is_remote(output_dir) and not was_there[1] and not plan.exists(work_folder):
            shutil.rmtree(work_folder if was_there[0] else output_dir)
        raise


@contextlib.contextmanager
def _locked(output_dir: str) -> Iterator[None]:
    """Locks the output folder, if it is local, against a second conversion at the same time."""
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
