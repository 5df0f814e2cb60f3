"""`bn_keras.Classifier` and launch/predict: the same answers for files and pixels; a bad one costs no other."""

import csv
import io
import json
import re

import keras
import numpy as np
import pytest
from conftest import ROOT, run_program
from PIL import Image, ImageOps

from bn_keras import Classifier, InputError
from bn_keras.evaluation.classifier import pictures, upright_on_white


@pytest.fixture(scope="module")
def classifier(trained_runs):
    return Classifier(trained_runs[0])


@pytest.fixture
def photos(image_folders, tmp_path):
    """A folder of three pictures, one of them damaged, in a folder below, and of a text."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for kind, name in (("circle", "b.png"), ("stripe", "more/a.png")):
        (folder / name).write_bytes((image_folders / "validation" / kind / "0.png").read_bytes())
    (folder / "a.png").write_bytes((folder / "b.png").read_bytes()[:60])
    (folder / "notes.txt").write_text("no picture")
    return folder


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))[..., None]


def view_of(path):
    """The central 87.5% at 32x32, in [-1, 1], by Pillow."""
    with Image.open(path) as image:
        side = round(0.875 * min(image.size))
        left, top = ((length - side) // 2 for length in image.size)
        square = image.convert("F").crop((left, top, left + side, top + side))
    return np.asarray(square.resize((32, 32), Image.BILINEAR))[..., None] / 127.5 - 1


def test_probabilities_are_the_saved_models_for_files_and_pixels_alike(classifier, trained_runs, photos):
    paths = [photos / "b.png", photos / "more" / "a.png"]
    found = classifier.predict(paths)
    logits = keras.models.load_model(trained_runs[0] / "model.keras")(np.stack([*map(view_of, paths)])).numpy()
    powers = np.exp(logits.astype("float64"))
    np.testing.assert_allclose(found, powers / powers.sum(-1, keepdims=True), atol=2e-5)
    np.testing.assert_array_equal(classifier.predict([*map(pixels_of, paths)]), found)
    alone = classifier.predict(paths[1])[0]  # whose sums may have another order than those of a batch of two
    np.testing.assert_allclose(alone, found[1], rtol=1e-6)
    assert classifier.class_names == ["circle", "square", "stripe"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_on_its_side_is_seen_upright_as_data_prep_stores_it(classifier, photos, orientation):
    """Pillow's own transposition is the oracle."""
    with Image.open(photos / "b.png") as image:
        image = image.crop((0, 0, 40, 30))
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(photos / "stored.png", exif=exif)
        with Image.open(photos / "stored.png") as stored:
            ImageOps.exif_transpose(stored).save(photos / "upright.png")
    found, expected = (classifier.predict(photos / f"{name}.png") for name in ("stored", "upright"))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("form", ["PNG", "GIF", "WEBP"])
def test_what_is_transparent_is_seen_white_as_data_prep_stores_it(classifier, photos, form):
    with Image.open(photos / "b.png") as image:
        color = image.convert("RGB")
    alpha = Image.new("L", color.size)
    alpha.paste(255, (10, 10, 40, 40))
    pixels = np.where(np.asarray(alpha)[..., None] == 255, np.asarray(color), 0).astype("uint8")
    stored = Image.fromarray(pixels)
    stored.putalpha(alpha)
    stored.save(photos / "stored", form, lossless=True)
    with Image.open(photos / "stored") as image:
        shown = np.asarray(image.convert("RGBA"))
    white = np.where(shown[..., 3:] == 255, shown[..., :3], 255).astype("uint8")
    np.testing.assert_array_equal(classifier.predict(photos / "stored"), classifier.predict([white]))


@pytest.mark.parametrize("said_in", [None, "exif", "xmp"])
def test_a_jpeg_is_turned_by_exif_or_xmp_and_otherwise_stays_the_very_bytes(said_in):
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    said = {None: {}, "exif": {"exif": exif}, "xmp": {"xmp": xmp}}[said_in]
    stored = io.BytesIO()
    Image.new("RGB", (24, 16), "red").save(stored, "JPEG", **said)
    found = upright_on_white(stored.getvalue())
    with Image.open(io.BytesIO(found)) as image:
        assert image.size == ((16, 24) if said_in else (24, 16))
    assert (found == stored.getvalue()) == (said_in is None)


def test_batches_of_any_count_are_put_together_in_order(classifier, photos):
    paths, done = [photos / "b.png", photos / "more" / "a.png"] * 20, []
    found = classifier.predict(paths, after_batch=done.append)
    np.testing.assert_allclose(found, np.tile(classifier.predict(paths[:2]), (20, 1)), atol=1e-6)
    assert done == [32, 40]


def test_features_are_what_the_classifier_multiplies(classifier, photos):
    head = classifier.model.layers[-1]
    features = classifier.features(photos / "b.png")
    assert features.shape == (1, head.kernel.shape[0])
    powers = np.exp((features @ head.kernel.numpy() + head.bias.numpy()).astype("float64"))
    np.testing.assert_allclose(classifier.predict(photos / "b.png"), powers / powers.sum(), rtol=1e-4)
    assert classifier.features(photos / "b.png", layer="pool2").shape[1:3] == (4, 4)
    with pytest.raises(InputError, match=r"`layer=nose` is none of the network's, which are images, \.\.\., logits"):
        classifier.features(photos / "b.png", layer="nose")


def test_pictures_of_a_folder_are_found_by_name_and_others_are_said(photos, tmp_path, caplog):
    assert pictures(str(photos)) == [str(photos / name) for name in ("a.png", "b.png", "more/a.png")]
    assert "what is no picture is left out, 1 in all, such as" in caplog.text and "notes.txt" in caplog.text
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no picture"):
        pictures(str(tmp_path / "empty"))


def test_a_bad_picture_is_an_error_or_noted(classifier, photos):
    with pytest.raises(InputError, match=r"a\.png is .*damaged"):
        classifier.predict(photos)
    bad = []
    found = classifier.predict(photos, bad=bad)
    ((path, reason),) = bad
    assert path == str(photos / "a.png") and "damaged" in reason
    assert np.isnan(found[0]).all() and np.isfinite(found[1:]).all()
    with pytest.raises(FileNotFoundError):
        classifier.predict([photos / "none.png"])


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_the_answers_for_a_folder_are_a_table_and_a_bad_picture_is_named(classifier, trained_runs, photos, ending):
    output = photos.parent / f"answers.{ending}"
    done = run_program("-m", "launch.predict", photos, f"--workdir={trained_runs[0]}", f"--output={output}", warm=True)
    assert done.returncode == 1 and re.search(r"a\.png is .*damaged", done.stderr), done.stderr
    assert re.search(r"answers\.\w+: 2 of 3 images, [\d,]+ a second after a start of [\d.]+ s", done.stdout)
    text = output.read_text()
    if ending == "csv":
        rows = list(csv.DictReader(text.splitlines()))
        answers = {row["image"]: (row["class_1"], float(row["probability_1"])) for row in rows}
        assert list(rows[0]) == ["image", *(f"{what}_{k}" for k in (1, 2, 3) for what in ("class", "probability"))]
    else:
        answers = {row["image"]: tuple(row["classes"][0].values()) for row in json.loads(text)}
    paths = [str(photos / "b.png"), str(photos / "more" / "a.png")]
    assert list(answers) == paths
    for (name, probability), row in zip(answers.values(), classifier.predict(paths), strict=True):
        assert name == classifier.class_names[row.argmax()] and abs(probability - row.max()) < 1e-6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output=answers.xls"], "--output=answers.xls ends in none of .csv, .json"),
        (["--output={0}/a.csv/b.csv"], "{0}/a.csv"),  # a file is where a folder would have to be made
        (["--output={0}/c.csv"], "{0}/c.csv is a folder"),
        (["--workdir="], "must name at least one run"),
    ],
)
def test_an_output_that_could_not_be_written_is_refused_before_anything_is_loaded(
    trained_runs, photos, tmp_path, flags, message
):
    (tmp_path / "a.csv").touch()
    (tmp_path / "c.csv").mkdir()
    flags = [f"--workdir={trained_runs[0]}", *(flag.format(tmp_path) for flag in flags)]
    done = run_program("-m", "launch.predict", photos, *flags)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    assert message.format(tmp_path) in done.stderr and done.stderr.count("\n") == 1


def test_the_lines_of_the_readme_classify_a_folder(trained_runs, photos, tmp_path, monkeypatch, capsys):
    (photos / "a.png").unlink()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(trained_runs[0])
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"^```python\n(import bn_keras\n.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    exec(lines, names := {})
    assert len(capsys.readouterr().out.splitlines()) == len(names["features"]) == 2
