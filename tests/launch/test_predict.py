"""launch/predict names the classes of a person's own pictures."""

import os
import re

import numpy as np
from conftest import run_program
from PIL import Image

from bn_keras.input.image_header import READABLE


def predict(*arguments):
    return run_program("-m", "launch.predict", *arguments, warm=True)


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
    for name, message in (("note.txt", f"is no {READABLE} image"), ("none.png", "No such file")):
        done = predict(tmp_path / name, f"--workdir={trained_runs[0]}")
        assert done.returncode == 1 and message in done.stderr and name in done.stderr
        assert "Traceback" not in done.stderr
    done = predict(f"--workdir={trained_runs[0]}")
    assert done.returncode == 2 and "nothing is named" in done.stderr


def test_a_gray_network_sees_the_same_in_every_format_that_is_read(trained_runs, image_folders, tmp_path):
    """Of gray pixels, stored without loss; a palette whose entries are in another order too."""
    with Image.open(image_folders / "validation" / "circle" / "0.png") as image:
        gray = image.convert("L")
    turned = Image.fromarray(255 - np.asarray(gray))
    turned.putpalette([level for entry in range(256) for level in [255 - entry] * 3])
    pictures = {"l.png": gray, "rgb.png": gray.convert("RGB"), "l.bmp": gray, "rgb.bmp": gray.convert("RGB")}
    pictures |= {"l.gif": gray, "turned.bmp": turned, "l.webp": gray, "alpha.webp": gray.convert("RGBA")}
    for name, picture in pictures.items():
        picture.save(tmp_path / name, **{"lossless": True} if name.endswith("webp") else {})
    done = predict(*(tmp_path / name for name in pictures), f"--workdir={trained_runs[0]}")
    assert done.returncode == 0, done.stderr
    answers = [part.partition("\n")[2] for part in done.stdout.split(str(tmp_path))[1:]]
    assert len(answers) == len(pictures) and answers[0].count("%") == 3
    assert set(answers) == {answers[0]}


def test_a_picture_of_another_format_and_a_pipe_are_named(trained_runs, tmp_path):
    random = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), "uint8"))
    random.save(tmp_path / "x.tif")
    random.save(tmp_path / "moves.webp", save_all=True, append_images=[random.rotate(90)])
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    random.save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-100])
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    said = {
        "x.tif": "is a TIFF image",
        "moves.webp": "is an animated WebP",
        "x.heic": "but of the format 'heic'",
        "cut.jpg": "is a JPEG image of 40 x 40 pixels that is damaged",
        "empty.png": "is empty",
        "pipe.png": "is no regular file",
    }
    for name, reason in said.items():
        done = predict(tmp_path / name, f"--workdir={trained_runs[0]}")
        assert done.returncode == 1 and re.search(f"{tmp_path / name} .*{reason}", done.stderr), done.stderr
