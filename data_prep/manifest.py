"""Ends a conversion: makes `bad.tsv`, `repaired.tsv` and the manifest, `dataset.json`, from the journal.

The manifest says what a reader needs to know. It is written last, so it exists only if everything is there.
"""

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields

from data_prep import json_files, plan, storage
from data_prep.errors import InputError
from data_prep.formats import tfds_metadata
from data_prep.program import escaped
from data_prep.shard import WORK_FOLDER, JournalEntry, contents_of
from data_prep.sources.dataset import SPLITS

FILE = "dataset.json"


def finish(
    output_dir: str,
    planned: plan.Plan,
    entries: list[JournalEntry],
    named: dict[str, str],
    on_bad: str,
    wrote: bool,
    log: Callable[[str], None],
) -> dict:
    """Checks the journal as a whole; writes bad.tsv, repaired.tsv and the manifest; returns the manifest.

    Args:
      output_dir: the folder to write to.
      planned, entries: the plan, and the journal's entries in the plan's order.
      named: split -> the folder or archive with which messages begin an image's path.
      on_bad: "skip" accepts bad images.
      wrote: whether this call wrote a shard.
      log: called with lines for the person who waits.
    Raises:
      InputError: there are bad images that may not be skipped, or a class or split has only bad images.
    """
    bad = planned.rejected + sorted([path, why] for entry in entries for path, why, _ in entry.bad)
    repaired = sorted(row for entry in entries for row in entry.repaired)
    both = sorted(_in_both(output_dir, planned, entries, named))
    for name, rows in (("bad.tsv", bad), ("repaired.tsv", repaired), ("duplicates.tsv", both)):
        path = storage.join(output_dir, name)
        if rows:
            with storage.written_aside(path) as file:
                for where, what in rows:
                    file.write_all([f"{escaped(where, line=True)}\t{escaped(what, line=True)}\n".encode()])
        else:
            storage.remove(path)
    _check_classes_left(output_dir, planned, entries)
    if bad and on_bad != "skip":
        raise InputError(
            f"{len(bad)} bad image(s), listed in {storage.join(output_dir, 'bad.tsv')}, the first: "
            f"{': '.join(bad[0])}; the rest is converted; run again with --on_bad=skip to leave these out"
        )
    manifest = _manifest(planned, entries)
    path = storage.join(output_dir, FILE)
    if wrote or not storage.exists(path):
        for name, content in tfds_metadata.files(manifest).items():
            storage.write(storage.join(output_dir, name), content)
        storage.write(path, json_files.encoded(manifest))
        counts = ", ".join(f"{split['examples']:,} {name}" for name, split in manifest["splits"].items())
        log(f"done: {counts} images in {output_dir}; {_by_reason(repaired)} re-encoded, {_by_reason(bad)} bad left out")
        if both:
            what = "are left out of training" if planned.request["drop_duplicates"] else "are in both, see --duplicates"
            log(
                f"{len(both):,} training images have the bytes of a validation image and {what}: "
                f"{both[0][0]} is {both[0][1]}; all are in {storage.join(output_dir, 'duplicates.tsv')}"
            )
    else:
        log(f"{output_dir}: already complete, nothing to do")
    return manifest


def _in_both(
    output_dir: str, planned: plan.Plan, entries: list[JournalEntry], named: dict[str, str]
) -> Iterator[tuple[str, str]]:
    """(training image, validation image) for each pair of the same bytes, also if the training image was left out."""
    shards = list(zip(planned.shards, entries, strict=True))
    held: dict[str, tuple[int, int]] = {}
    for number, (line, entry) in enumerate(shards):
        if line.split == "validation":
            held |= {content: (number, k) for k, content in enumerate(contents_of(entry.contents))}

    def stored(number: int) -> list[str]:
        """The paths of a shard's examples."""
        line, entry = shards[number]
        absent = {path for path, *_ in [*entry.bad, *entry.dropped]}
        members = plan.members(storage.join(output_dir, WORK_FOLDER), line)
        paths = (f"{named[line.split]}/{member.path}" for member in members)
        return [path for path in paths if path not in absent]

    stored_in_validation = functools.cache(stored)
    for number, (line, entry) in enumerate(shards):
        both = [(path, content) for path, content, _ in entry.dropped]
        if line.split == "train" and not held.keys().isdisjoint(contents := list(contents_of(entry.contents))):
            both += [pair for pair in zip(stored(number), contents, strict=True) if pair[1] in held]
        for path, content in both:
            shard, place = held[content]
            yield path, stored_in_validation(shard)[place]


def _by_reason(rows: Sequence[Sequence[str]]) -> str:
    """How many images there are, in all and for each reason, the most frequent reason first."""
    reasons = collections.Counter(why for _, why in rows).most_common(5)
    named = ", ".join(f"{count:,} {why}" for why, count in reasons)
    return f"{len(rows):,} ({named}{', ...' if len(reasons) > 5 else ''})" if rows else "0"


def _check_classes_left(output_dir: str, planned: plan.Plan, entries: list[JournalEntry]) -> None:
    """Raises InputError if all images of a split or a class are bad or dropped.

    With --limit only the splits are checked, as a class may have other images.
    """
    left = {split: list(counts) for split, counts in planned.images.items()}
    for entry in entries:
        for *_, class_index in [*entry.bad, *entry.dropped]:
            left[entry.split][class_index] -= 1
    for split in SPLITS:
        emptied = [k for k, count in enumerate(planned.images[split]) if count and not left[split][k]]
        if emptied and (not planned.request["limit"] or not any(left[split])):
            named = ", ".join(repr(planned.classes[k][0]) for k in emptied[:5])
            raise InputError(
                f"{output_dir}: all {split} images of {len(emptied)} class(es) are bad or left out: {named}"
                f"{', ...' if len(emptied) > 5 else ''}; they are listed in bad.tsv and duplicates.tsv there; "
                "fix: replace some of them, or remove the class's folder, and give the same command again"
            )


def _manifest(planned: plan.Plan, entries: list[JournalEntry]) -> dict:
    short_sides = collections.Counter()
    for entry in entries:
        for side, _, count in (pair.partition(":") for pair in entry.short_sides.split()):
            short_sides[int(side)] += int(count)
    total, seen, median = sum(short_sides.values()), 0, 0
    for side in sorted(short_sides):
        seen += short_sides[side]
        if 2 * seen >= total:
            median = side
            break
    splits = {}
    for split in SPLITS:
        shards = [entry for entry in entries if entry.split == split]
        splits[split] = {
            "examples": sum(entry.examples for entry in shards),
            "shards": [
                {key: getattr(entry, key) for key in ("file", "examples", "bytes", "crc32c")} for entry in shards
            ],
        }
    return {
        "format": "bn_keras.dataset",
        "version": 1,
        "name": planned.request["name"],
        "label_base": planned.request["label_base"],
        "channels": 1 if sum(entry.gray for entry in entries) == total else 3,
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
