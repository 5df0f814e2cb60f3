"""Reads images and labels from Parquet files, as Hugging Face's `datasets` writes them, with pyarrow.

A column of images holds files: a struct of `bytes` and `path`, or only bytes. Images that are not compressed are read
where they are, like those in a tar. Otherwise the images of a group of rows are compressed together, so all are first
copied out, in order, to a file in which each can be found.
"""

import contextlib
import json
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from data_prep import storage
from data_prep.errors import InputError
from data_prep.formats import parquet_pages
from data_prep.formats.parquet_pages import Place, Read
from data_prep.program import require
from data_prep.sources.dataset import MOST_CLASSES, Found, Image

LABELS = ("label", "labels", "fine_label", "class", "cls", "category", "target", "y")
"""Names of the column that holds the class; the first that exists is taken."""

_NAMED = re.compile(
    r"(.*?)(?:_(n\d{8}))?(\.JPEG)", re.DOTALL
)  # n01440764_10026_n01440764.JPEG of Hugging Face's ImageNet
_BATCH_ROWS = 16  # 64 take a third longer, as they leave the cache

# What reading numbers raises that mean nothing, beside pyarrow's own exceptions.
_OF_DAMAGE = ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError

Copy = Callable[[Any], int]


class Copies:
    """Appends bytes to a file, in which they are found by their offset."""

    def __init__(self, output: storage.WrittenAside):
        self._output, self._offset = output, 0

    def add(self, content: Any) -> int:
        """Writes bytes, and returns their offset."""
        self._output.write_all([content])
        self._offset += len(content)
        return self._offset - len(content)


@dataclass(frozen=True)
class _Table:
    """An open Parquet file.

    Attributes:
      table: pyarrow's ParquetFile.
      image: the name of the column of images.
      leaf: the path of the column of bytes: `image` itself, or `image`.bytes.
      chunks: the chunks of that column, one for each group of rows.
      read: (offset, size) -> bytes of the file.
    """

    table: Any
    image: str
    leaf: str
    chunks: list[parquet_pages.Chunk]
    read: Read

    @property
    def is_copied(self) -> bool:
        """Whether the images have to be copied out, as they are compressed or in an encoding of their own."""
        return not all(chunk.is_readable and chunk.codec == parquet_pages.UNCOMPRESSED for chunk in self.chunks)

    def rows(self, label: str, copy: Copy | None) -> Iterator[tuple[Place | None, str | None, Any]]:
        """The place of the bytes, the path and the class of each row; None for what is missing."""
        columns, path_column = _leaves(self.table), f"{self.image}.path"
        has_paths = self.leaf != self.image and path_column in columns
        wanted = [label, path_column] if has_paths else [label]
        for group, chunk in enumerate(self.chunks):
            count = self.table.metadata.row_group(group).num_rows
            others = self.table.read_row_group(group, wanted, use_threads=False)
            if others.num_rows != count:
                raise ValueError(f"{others.num_rows:,} of {count:,} rows")
            if chunk.is_readable:
                most = columns[self.leaf].max_definition_level
                places = parquet_pages.places(self.read, chunk, most, count, copy)
            else:
                assert copy, "as `is_copied` says"
                places = self._decoded(group, copy)
            named = others.column(self.image).combine_chunks().field("path") if has_paths else [None] * count
            for place, path, value in zip(places, named, others.column(label), strict=True):
                yield place, path and path.as_py(), _class(value.as_py())

    def _decoded(self, group: int, copy: Copy) -> list[Place | None]:
        """Copies the images of a group of rows, in an encoding that only pyarrow reads."""
        places = list[Place | None]()
        for batch in self.table.iter_batches(_BATCH_ROWS, [group], [self.leaf], use_threads=False):
            column = batch.column(0) if self.leaf == self.image else batch.column(0).field("bytes")
            buffers = (value.as_buffer() if value.is_valid else None for value in column)
            places += [b if b is None else (copy(b), len(b), parquet_pages.checksum(b)) for b in buffers]
        return places


@contextlib.contextmanager
def _opened(file: str, read: Read) -> Iterator[_Table]:
    """An open Parquet file; errors about its content, also in the `with` block, become an InputError."""
    require("pyarrow")
    import pyarrow
    from pyarrow import parquet

    try:
        with storage.open_read(file) as opened:
            # Checksums are of pages that have one. To read ahead takes 139 us an image, to read in order 100.
            table = parquet.ParquetFile(opened, page_checksum_verification=True, pre_buffer=False)
            groups = sum(table.metadata.row_group(k).num_rows for k in range(table.num_row_groups))
            if groups != table.metadata.num_rows:
                raise ValueError(f"{groups:,} rows of {table.metadata.num_rows:,}")
            image, leaf = _columns_of_images(file, table.schema_arrow)
            chunks = parquet_pages.chunks(read, storage.size(file), list(_leaves(table)).index(leaf))
            yield _Table(table, image, leaf, chunks, read)
    except InputError:
        raise
    except (pyarrow.ArrowException, *_OF_DAMAGE) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        why = " ".join(str(error).split())
        raise InputError(f"{file}: damaged Parquet file ({why}); fix: download it again") from None


def _class(value: Any) -> Any:
    """The class of a value; pandas makes floats of a column of numbers in which one is missing."""
    if not isinstance(value, float):
        return value
    return int(value) if value.is_integer() else None if value != value else value


def _leaves(table: Any) -> dict[str, Any]:
    """The columns of a ParquetFile that hold values: path -> pyarrow's ColumnSchema, in order."""
    columns = map(table.schema.column, range(len(table.schema)))
    return {column.path: column for column in columns}


def is_copied(file: str, read: Read) -> bool:
    """Whether the images of a file have to be copied out, as they are compressed or encoded.

    Raises:
      InputError: the file is not Parquet, is damaged, or has no column of images.
    """
    with _opened(file, read) as opened:
        return opened.is_copied


def images(file: str, read: Read, is_one_of_several: bool, target: str, found: Found, label_column: str) -> list[Image]:
    """The images of a file.

    Args:
      file: the path of the Parquet file.
      read: (offset, size) -> bytes of the file.
      is_one_of_several: whether the images' paths begin with the file's name.
      target: the path to copy the images to, in a folder that exists; "" to leave them where they are.
      found: gets the classes, if the file names or numbers them, and the rows without an image.
      label_column: the column that holds the class; "" for the first of `LABELS`.
    Raises:
      InputError: the file is not Parquet, is damaged, or lacks a column of images or of labels.
    """
    # glibc then keeps freed blocks of up to this size, such as pages of 11 MB: to fault them in takes twice as long.
    bytearray(31 << 20)
    base = posixpath.basename(file)
    own = base if is_one_of_several else ""
    prefix, archive = own and f"{own}/", posixpath.basename(target) or own
    listed = []
    with _opened(file, read) as opened, storage.written_aside(target) if target else contextlib.nullcontext() as output:
        label = _label(file, opened.table.schema_arrow, label_column)
        classes = _classes(opened.table.schema_arrow, label)
        found.classes = classes | found.classes
        rows = opened.rows(label, Copies(output).add if output else None)
        for number, (place, path, value) in enumerate(rows):
            stem, wnid, ending = _name(path, base, number)
            why = "has no class" if value is None else ""
            if isinstance(value, int) and ((classes and value not in classes) or not 0 <= value < MOST_CLASSES):
                why = f"has class {value}, which is none"
            if why or place is None:
                found.rejected.append((f"{file}/{stem}{ending}", why or "holds no image"))
                continue
            synset = str(value)
            if isinstance(value, int):
                synset, text = classes.get(value) or (synset, synset)
                synset = wnid or synset
                found.classes[value] = synset, text
            offset, size, version = place
            listed.append(Image(synset, f"{prefix}{stem}{ending}", size, offset, version, archive))
    if not listed:
        raise InputError(f"{file}: no row has an image's bytes in column {opened.image!r} and a class in {label!r}")
    found.notes.append(f"{file}: {len(listed):,} images, of column {opened.image!r}, classes of column {label!r}")
    return listed


def _columns_of_images(file: str, schema: Any) -> tuple[str, str]:
    """The name of the column of images, and the path of its bytes."""
    from pyarrow import types

    for field in schema:
        kind, path = field.type, field.name
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind, path = kind.field("bytes").type, f"{field.name}.bytes"
        if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
            return field.name, path
    raise InputError(f"{file}: has no column of images (bytes), but {', '.join(schema.names)}")


def _label(file: str, schema: Any, label_column: str) -> str:
    """The name of the column of classes."""
    from pyarrow import types

    label = next((name for name in ([label_column] if label_column else LABELS) if name in schema.names), "")
    if not label:
        columns = ", ".join(schema.names)
        raise InputError(f"{file}: no column says the class; give one with --label_column; there are {columns}")
    if types.is_nested(kind := schema.field(label).type):
        raise InputError(f"{file}: column {label!r} holds {kind}, not one class; give one with --label_column")
    return label


def _classes(schema, label: str) -> dict[int, tuple[str, str]]:
    """Number -> class and its name, from Hugging Face's metadata in the schema; empty if there are none."""
    try:
        names = [*map(str, json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"])]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    times = Counter(names)  # ImageNet has two kinds of crane
    return {k: (name if times[name] == 1 else f"{name} ({k})", name) for k, name in enumerate(names)}


def _name(path: str | None, file: str, number: int) -> tuple[str, str, str]:
    """Splits a file's name into the name, the WordNet id at its end, and the ending."""
    base = posixpath.basename(path or "") or f"{posixpath.splitext(file)[0]}-{number:07}"
    match = _NAMED.fullmatch(base)
    return (match[1], match[2] or "", match[3]) if match else (base, "", "")
