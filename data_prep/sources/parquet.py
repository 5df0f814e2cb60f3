"""Reads images and labels from Parquet files, as Hugging Face's `datasets` writes them, with pyarrow.

A column of images holds files: a struct of `bytes` and `path`, or only bytes. The rows of a group are compressed
together, so all images are first copied out, in order, to a file in which each can be found.
"""

import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from data_prep import storage
from data_prep.errors import InputError
from data_prep.program import require
from data_prep.sources.dataset import MOST_CLASSES, Found, Image

LABELS = ("label", "labels", "fine_label", "class", "cls", "category", "target", "y")
"""Names of the column that holds the class; the first that exists is taken."""

_NAMED = re.compile(
    r"(.*?)(?:_(n\d{8}))?(\.JPEG)", re.DOTALL
)  # n01440764_10026_n01440764.JPEG of Hugging Face's ImageNet
_BATCH_ROWS = 64


class Copies:
    """Images that are written one after the other to a file, in which each is found by its offset.

    Args:
      output: the file.
      name: its name in the folder that is the images' source.
    """

    def __init__(self, output: storage.WrittenAside, name: str):
        self._output, self._name, self._offset = output, name, 0

    def add(self, synset: str, path: str, content: Any) -> Image:
        """Writes the bytes of an image, whose version is their checksum."""
        import google_crc32c

        self._output.write_all([content])
        where = self._offset, f"{google_crc32c.value(bytes(content)):08x}", self._name
        self._offset += len(content)
        return Image(synset, path, len(content), *where)


def images(file: str, is_one_of_several: bool, target: str, found: Found, label_column: str = "") -> list[Image]:
    """The images of a file, which are copied to the file `target`.

    Args:
      file: the path of the Parquet file.
      is_one_of_several: whether the images' paths begin with the file's name.
      target: the path to copy to, in a folder that exists.
      found: gets the classes, if the file names or numbers them, and the rows without an image.
      label_column: the column that holds the class; "" for the first of `LABELS`.
    Raises:
      InputError: the file is not Parquet, is damaged, or lacks a column of images or of labels.
    """
    require("pyarrow")
    import pyarrow
    from pyarrow import parquet

    listed, base, number = [], posixpath.basename(file), -1
    prefix = f"{base}/" if is_one_of_several else ""
    try:
        with storage.open_read(file) as opened, storage.written_aside(target) as output:
            # Checksums are of pages that have one. To read ahead takes 139 us an image, to read in order 100.
            table = parquet.ParquetFile(opened, page_checksum_verification=True, pre_buffer=False)
            image, label = _columns(file, table.schema_arrow, label_column)
            classes, copies = _classes(table.schema_arrow, label), Copies(output, posixpath.basename(target))
            found.classes = classes | found.classes
            for number, (content, path, value) in enumerate(_rows(table, image, label)):
                stem, wnid, ending = _name(path, base, number)
                if content is None or value is None:
                    why = "holds no image" if content is None else "has no class"
                    found.rejected.append((f"{file}/{stem}{ending}", why))
                    continue
                if isinstance(value, int):
                    if (classes and value not in classes) or not 0 <= value < MOST_CLASSES:
                        found.rejected.append((f"{file}/{stem}{ending}", f"has class {value}, which is none"))
                        continue
                    synset, text = classes.get(value) or (str(value), str(value))
                    synset = wnid or synset
                    found.classes[value] = synset, text
                else:
                    synset = str(value)
                listed.append(copies.add(synset, f"{prefix}{stem}{ending}", content))
            groups = sum(table.metadata.row_group(k).num_rows for k in range(table.num_row_groups))
            if {table.metadata.num_rows, groups} != {number + 1}:
                raise pyarrow.ArrowInvalid(f"{number + 1:,} rows of {table.metadata.num_rows:,}")
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise InputError(f"{file}: damaged Parquet file ({error}); fix: download it again") from None
    found.notes.append(f"{file}: {len(listed):,} images, of column {image!r}, classes of column {label!r}")
    return listed


def _columns(file: str, schema, label_column: str) -> tuple[str, str]:
    """The names of the columns that hold images and classes."""
    import pyarrow

    def holds_images(kind) -> bool:
        if pyarrow.types.is_struct(kind):
            return any(field.name == "bytes" and holds_images(field.type) for field in kind)
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)

    image = next((field.name for field in schema if holds_images(field.type)), "")
    label = next((name for name in ([label_column] if label_column else LABELS) if name in schema.names), "")
    columns = ", ".join(schema.names)
    if not image:
        raise InputError(f"{file}: has no column of images (bytes), but {columns}")
    if not label:
        raise InputError(f"{file}: no column says the class; give one with --label_column; there are {columns}")
    return image, label


def _classes(schema, label: str) -> dict[int, tuple[str, str]]:
    """Number -> class and its name, from Hugging Face's metadata in the schema; empty if there are none."""
    try:
        names = [*map(str, json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"])]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    times = Counter(names)  # ImageNet has two kinds of crane
    return {k: (name if times[name] == 1 else f"{name} ({k})", name) for k, name in enumerate(names)}


def _rows(table, image: str, label: str) -> Iterator[tuple]:
    """The bytes, path and class of each row; None for a missing one."""
    import pyarrow

    for batch in table.iter_batches(_BATCH_ROWS, columns=[image, label]):
        column, paths = batch.column(image), None
        if pyarrow.types.is_struct(column.type):
            if column.type.get_field_index("path") >= 0:
                paths = column.field("path")
            column = column.field("bytes")
        for row, value in enumerate(batch.column(label)):
            content = column[row]
            path = paths[row].as_py() if paths is not None else None
            yield content.as_buffer() if content.is_valid else None, path, value.as_py()


def _name(path: str | None, file: str, number: int) -> tuple[str, str, str]:
    """Splits a file's name into the name, the WordNet id at its end, and the ending."""
    base = posixpath.basename(path or "") or f"{posixpath.splitext(file)[0]}-{number:07}"
    match = _NAMED.fullmatch(base)
    return (match[1], match[2] or "", match[3]) if match else (base, "", "")
