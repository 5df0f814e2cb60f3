"""The records that reading leaves out because they cannot be used (`--on_bad=skip`); standard library only."""

import sys

_NAMED = 10


class SkippedRecords:
    """Counts the records that were left out, each once, however often it is read; names the first few on stderr."""

    def __init__(self):
        self._found = {}  # a dict, which keeps the order

    def add(self, path: str, record: int) -> None:
        """Notes a record, by its file and its number in the file, from 0."""
        if (path, record) in self._found:
            return
        self._found[path, record] = None
        if len(self) <= _NAMED:
            more = "; of more, only the count" if len(self) == _NAMED else ""
            print(f"left out: record {record} of {path}{more}", file=sys.stderr, flush=True)

    def __len__(self):
        return len(self._found)

    def __str__(self):
        if not self._found:
            return "no record was left out"
        path, record = next(iter(self._found))
        count = "1 record was" if len(self) == 1 else f"{len(self):,} records were"
        return f"{count} left out, first record {record} of {path}"
