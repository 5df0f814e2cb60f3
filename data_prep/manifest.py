"""The end of a conversion: the journal put together into `bad.tsv`, `repaired.tsv` and the manifest, `dataset.json`.

The manifest is what a reader needs to know. It is written last: its presence says that all is there.
"""

import collections
from collections.abc import Callable
from dataclasses import fields

from data_prep import json_files, plan, storage
from data_prep.errors import InputError
from data_prep.formats import tfds_metadata
from data_prep.program import escaped
from data_prep.shard import JournalEntry
from data_prep.sources.dataset import SPLITS

FILE = "dataset.json"


def finish(
    output_dir: str,
    planned: plan.Plan,
    entries: list[JournalEntry],
    on_bad: str,
    wrote: bool,
    log: Callable[[str], None],
) -> dict:
    """Checks the journal as a whole, and writes bad.tsv, repaired.tsv and the manifest, which it returns.

    Raises:
      InputError: there are bad images that were not to be skipped, or a class or split has no others.
    """
    bad = planned.rejected + sorted([path, why] for entry in entries for path, why, _ in entry.bad)
    repaired = sorted(row for entry in entries for row in entry.repaired)
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
    path = storage.join(output_dir, FILE)
    if wrote or not storage.exists(path):
        for name, content in tfds_metadata.files(manifest).items():
            storage.write(storage.join(output_dir, name), content)
        storage.write(path, json_files.encoded(manifest))
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


def _check_classes_left(output_dir: str, planned: plan.Plan, entries: list[JournalEntry]) -> None:
    """Raises InputError if bad images leave a split or a class without any, as a scan that finds none does.

    Of a choice by --limit only the splits count: the class may have other images.
    """
    left = {split: list(counts) for split, counts in planned.images.items()}
    for entry in entries:
        for *_, class_index in entry.bad:
            left[entry.split][class_index] -= 1
    for split in SPLITS:
        emptied = [k for k, count in enumerate(planned.images[split]) if count and not left[split][k]]
        if emptied and (not planned.request["limit"] or not any(left[split])):
            named = ", ".join(repr(planned.classes[k][0]) for k in emptied[:5])
            raise InputError(
                f"{output_dir}: all {split} images of {len(emptied)} class(es) are bad: {named}"
                f"{', ...' if len(emptied) > 5 else ''}; they are listed in {storage.join(output_dir, 'bad.tsv')}; "
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
