"""The page of a data set: what is counted is what was made, in the table and in the picture."""

import io
from collections import Counter

import numpy as np
import pytest
from conftest import run_program
from PIL import Image

from bn_keras import read_dataset
from bn_keras.input import dataset_page
from data_prep import convert
from data_prep.sources import image_folder

RNG = np.random.default_rng(0)


def picture(width, height, kind="JPEG", mode="RGB"):
    file = io.BytesIO()
    pixels = Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))
    pixels.convert(mode).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """4 ants and 2 bees to train, of which one is gray, one PNG, one was CMYK; a bad one; one of each to validate."""
    folder, leak = tmp_path_factory.mktemp("page"), picture(50, 40)
    files = {
        **{f"train/ant/{number}.jpg": picture(60, 30 + number) for number in range(2)},
        **{"train/ant/gray.jpg": picture(20, 70, mode="L"), "train/ant/leak.jpg": leak, "train/ant/bad.jpg": b"404"},
        **{"train/bee/a.png": picture(33, 22, "PNG"), "train/bee/cmyk.jpg": picture(44, 44, mode="CMYK")},
        **{"validation/ant/v.jpg": leak, "validation/bee/v.jpg": picture(50, 40)},
    }
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    data = image_folder.dataset(str(folder / "train"), str(folder / "validation"), "insects")
    convert.convert(data, str(folder / "records"), on_bad="skip", log=lambda line: None)
    return str(folder / "records")


def test_every_image_is_counted_by_class_size_format_and_color(data_dir):
    page = dataset_page.read(read_dataset(data_dir), "train")
    assert page.by_class.tolist() == [4, 2] and page.unreadable == 0
    assert page.sizes == Counter([(60, 30), (60, 31), (20, 70), (50, 40), (33, 22), (44, 44)])
    assert page.formats == {"JPEG": 5, "PNG": 1} and page.gray == 1
    assert page.sides(0).tolist() == [20, 33, 44, 50, 60, 60]


def test_the_lists_of_the_converter_are_counted_by_their_reasons(data_dir):
    assert dataset_page.listed(data_dir) == {
        "re-encoded": {"CMYK": 1},
        "bad, left out": {"is no image of a known kind": 1},
        "in training and validation": {"the same bytes": 1},
    }


def test_the_program_prints_the_table_and_draws_the_page(data_dir, tmp_path):
    output = tmp_path / "page.png"
    arguments = f"--data_dir={data_dir}", "--page", f"--output={output}"
    done = run_program("-m", "launch.show_input", *arguments, warm=True)
    assert done.returncode == 0, done.stderr
    for row in (
        "| images | 6 | 2 | 8 |",
        "| classes with images | 2 of 2 | 2 of 2 |  |",
        "| images a class: fewest, median, most | 2, 3, 4 | 1, 1, 1 |  |",
        "| width in pixels: least, median, most | 20, 47, 60 | 50, 50, 50 |  |",
        "| PNG | 1 |  | 1 |",
        "| gray | 1 |  | 1 |",
        "| re-encoded: CMYK |  |  | 1 |",
        "| in training and validation: the same bytes |  |  | 1 |",
    ):
        assert row in done.stdout.splitlines(), done.stdout
    with Image.open(output) as drawn:
        assert drawn.format == "PNG" and drawn.size == (1200, 800)
        assert len(drawn.convert("RGB").getcolors(1 << 20)) > 10


def test_a_damaged_record_is_unreadable_and_the_others_are_counted(data_dir, tmp_path):
    data = read_dataset(data_dir)
    shard = data.splits["validation"][0]
    with open(shard.path, "r+b") as file:
        file.seek(shard.bytes - 10)  # in the last record, whose checksum then is another
        last = file.read(1)
        file.seek(shard.bytes - 10)
        file.write(bytes((last[0] ^ 1,)))
    try:
        page = dataset_page.read(data, "validation")
    finally:
        with open(shard.path, "r+b") as file:
            file.seek(shard.bytes - 10)
            file.write(last)
    assert page.unreadable == 1 and page.by_class.sum() == 1
