"""launch/predict names the classes of a person's own pictures."""

import re

import numpy as np
from conftest import run_program
from PIL import Image


def predict(*arguments):
    return run_program("-m", "launch.predict", *arguments)


def expected(run, path):
    """Class probabilities of the trained network for the central 87.5% of a picture, by PIL and the saved model."""
    import keras

    import bn_keras.layers  # noqa: F401 (registers them)

    with Image.open(path) as image:
        side = round(0.875 * min(image.size))
        left, top = ((length - side) // 2 for length in image.size)
        square = image.convert("F").crop((left, top, left + side, top + side))
        pixels = square.resize((32, 32), Image.BILINEAR)
    images = np.asarray(pixels)[None, :, :, None] / 127.5 - 1
    logits = keras.models.load_model(run / "model.keras")(images, training=False).numpy()[0].astype("float64")
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def test_classes_of_two_pictures_by_an_ensemble_of_two(trained_runs, image_folders):
    paths = [image_folders / "validation" / kind / "0.png" for kind in ("circle", "stripe")]
    done = predict(*paths, f"--workdir={','.join(map(str, trained_runs))}")
    assert done.returncode == 0, done.stderr
    lines = iter(done.stdout.splitlines())
    for path in paths:
        probabilities = np.mean([expected(run, path) for run in trained_runs], 0)
        assert next(lines) == str(path)
        for k in np.argsort(-probabilities):
            percent, name = re.fullmatch(r" +([\d.]+)%  (\w+)", next(lines)).groups()
            assert name == ("circle", "square", "stripe")[k]
            assert abs(float(percent) / 100 - probabilities[k]) < 2e-4  # printed with two decimals
    assert next(lines, None) is None


def test_what_cannot_be_seen_is_named(trained_runs, tmp_path):
    (tmp_path / "note.txt").write_text("not a picture")
    for name, message in (("note.txt", "is not a JPEG, PNG, GIF or BMP image"), ("none.png", "No such file")):
        done = predict(tmp_path / name, f"--workdir={trained_runs[0]}")
        assert done.returncode == 1 and message in done.stderr and name in done.stderr
        assert "Traceback" not in done.stderr
    done = predict(f"--workdir={trained_runs[0]}")
    assert done.returncode == 2 and "nothing is named" in done.stderr
