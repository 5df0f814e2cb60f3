"""Training images whose bytes are those of a validation image: counted, named, and left out if that is asked for."""

import numpy as np
import pytest
from miniature_release import jpeg
from test_again import contents
from test_ilsvrc2012 import records

from data_prep import convert, plan
from data_prep.errors import InputError
from data_prep.sources import image_folder

DRAW = np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path):
    """10 images a class to train and 4 to validate; cat/leak1.jpg and dog/leak2.jpg are validation images too."""
    for split, count in (("train", 10), ("validation", 4)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / split / name / f"{split}{name}{number}.jpg").write_bytes(jpeg(DRAW))
    for k, source in ((1, "cat/validationcat3.jpg"), (2, "cat/validationcat0.jpg")):
        leak = (tmp_path / "validation" / source).read_bytes()
        (tmp_path / "train" / ("cat", "dog")[k - 1] / f"leak{k}.jpg").write_bytes(leak)
    return tmp_path


def run(folder, output, drop, **arguments):
    lines = []
    data = image_folder.dataset(str(folder / "train"), str(folder / "validation"))
    options = plan.Options(train_shards=3, validation_shards=2, drop_duplicates=drop)
    convert.convert(data, str(output), options, log=lines.append, **arguments)
    return lines[-1], (records(output, "train"), records(output, "validation"))


@pytest.mark.parametrize("drop", [False, True])
def test_leaks_are_named_in_the_closing_line_and_left_out_if_asked(folder, drop):
    line, (train, validation) = run(folder, folder / "out", drop)
    said = "are left out of training" if drop else "are in both"
    assert line.startswith(f"2 training images have the bytes of a validation image and {said}")
    pairs = (folder / "out/duplicates.tsv").read_text()
    assert pairs == (
        f"{folder}/train/cat/leak1.jpg\t{folder}/validation/cat/validationcat3.jpg\n"
        f"{folder}/train/dog/leak2.jpg\t{folder}/validation/cat/validationcat0.jpg\n"
    )
    assert len(train) == (20 if drop else 22) and len(validation) == 8
    assert drop == (not {"leak1.jpg", "leak2.jpg"} & train.keys())


def test_what_is_dropped_does_not_depend_on_workers_and_is_not_done_again(folder):
    for workers in (1, 2):
        run(folder, folder / str(workers), True, workers=workers)
    assert contents(folder / "1") == contents(folder / "2")
    assert run(folder, folder / "1", True)[0].endswith("already complete, nothing to do")
    (folder / "1/train-00001-of-00003").unlink()
    run(folder, folder / "1", True)
    assert contents(folder / "1") == contents(folder / "2")


def test_without_copies_there_is_no_list(folder):
    for path in folder.rglob("leak*"):
        path.unlink()
    line, _ = run(folder, folder / "out", False)
    assert line.startswith("done: ") and not (folder / "out/duplicates.tsv").exists()


def test_a_class_of_which_every_training_image_is_dropped_is_an_error(folder):
    for path in (folder / "train/cat").iterdir():
        path.write_bytes((folder / "validation/cat/validationcat1.jpg").read_bytes())
    with pytest.raises(InputError, match=r"all train images of 1 class.*bad or left out"):
        run(folder, folder / "out", True)
