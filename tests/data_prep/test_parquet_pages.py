"""Every way in which pyarrow writes a column of bytes, read by our reader of pages and by pyarrow itself."""

import importlib

import numpy as np
import pytest

from data_prep import storage
from data_prep.sources import archives
from data_prep.sources.dataset import Found, read_image

pytestmark = pytest.mark.needs("pyarrow")

ROWS = 2500
WAYS = {
    "as pyarrow does": {},
    "uncompressed": {"compression": "none"},
    "without a dictionary": {"compression": "none", "use_dictionary": False},
    "a dictionary that is soon full": {"compression": "none", "dictionary_pagesize_limit": 2000},
    "many pages": {"compression": "none", "data_page_size": 200, "write_batch_size": 7},
    "many compressed pages": {"data_page_size": 200, "write_batch_size": 7, "use_dictionary": False},
    "pages of version 2": {"compression": "none", "data_page_version": "2.0"},
    "compressed pages of version 2": {"compression": "zstd", "data_page_version": "2.0", "use_dictionary": False},
    "checksums": {"compression": "none", "write_page_checksum": True, "data_page_size": 200, "write_batch_size": 7},
    "gzip": {"compression": "gzip"},
    "lz4": {"compression": "lz4"},
    "lengths apart": {"use_dictionary": False, "column_encoding": {"image.bytes": "DELTA_LENGTH_BYTE_ARRAY"}},
    "prefixes apart": {"use_dictionary": False, "column_encoding": {"image.bytes": "DELTA_BYTE_ARRAY"}},
    "an index of pages": {"compression": "none", "write_page_index": True, "data_page_size": 200},
}
COPIED_OUT = {"as pyarrow does", "many compressed pages", "compressed pages of version 2", "gzip", "lz4"} | {
    "lengths apart",
    "prefixes apart",
}


def table(missing: float, kind: str):
    """A table of short byte strings, some of them several times, of which a share is missing."""
    pyarrow, draw = importlib.import_module("pyarrow"), np.random.default_rng(0)
    held = [draw.bytes(int(size)) for size in draw.integers(1, 90, ROWS // 2)]
    values = [None if draw.random() < missing else held[draw.integers(len(held))] for _ in range(ROWS)]
    content = pyarrow.array(values, getattr(pyarrow, kind)())
    image = pyarrow.StructArray.from_arrays([content, pyarrow.array(map(str, range(ROWS)))], ["bytes", "path"])
    return pyarrow.table({"image": image, "label": [number % 2 for number in range(ROWS)]}), values


@pytest.mark.parametrize("missing", [0, 0.2])
@pytest.mark.parametrize("way", WAYS)
def test_each_value_lies_where_it_is_said_to_lie(tmp_path, way, missing):
    written, truth = table(missing, "large_binary" if missing else "binary")
    path = str(tmp_path / "a.parquet")
    importlib.import_module("pyarrow.parquet").write_table(written, path, row_group_size=900, **WAYS[way])
    place, found = archives.locate(path), Found()
    unpacked = archives.Unpacked(str(tmp_path / "unpacked"))
    assert place.is_unpacked == (way in COPIED_OUT)
    listed = {int(image.path): image for image in archives.images(place, unpacked, found)}
    given = {number: read_image(place.source(unpacked.folder), image) for number, image in listed.items()}
    assert given == {number: value for number, value in enumerate(truth) if value is not None}
    assert {int(where.rpartition("/")[2]) for where, _ in found.rejected} == {
        k for k, v in enumerate(truth) if v is None
    }
    same = {}
    for number, content in given.items():
        assert same.setdefault(content, listed[number].version) == listed[number].version
    assert storage.exists(unpacked.folder) == (way in COPIED_OUT)
