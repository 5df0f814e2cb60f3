"""The 144 crops show the parts of the image that the paper names, on an image whose pixels are their coordinates."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from bn_keras.evaluation import multicrop
from bn_keras.evaluation.accuracy import class_probabilities
from bn_keras.input import preprocessing

SIZE = 56  # a quarter of the paper's, so the short sides are 64, 72, 80, 88
LONG, SHORT = 100, 64


def coordinate_png(height, width):
    """Red is x, green is y."""
    y, x = np.mgrid[:height, :width]
    return tf.io.encode_png(np.stack([x, y, 0 * x], -1).astype("uint8"))


def positions(length, side, scaled):
    """Where on an axis of `length` pixels the pixels of a resized axis look: bilinear, half-pixel centres."""
    return np.clip((np.arange(scaled) + 0.5) * length / scaled - 0.5, 0, length - 1)


def expected_crops(height, width):
    """Every crop as (y of its rows, x of its columns), from the words of Section 4.2.3 and GoogLeNet."""
    short = min(height, width)
    for third in ("left or top", "centre", "right or bottom"):
        for side in (64, 72, 80, 88):
            ys, xs = (positions(length, side, round(length * side / short)) for length in (height, width))
            begin = {"left or top": 0, "centre": 0.5, "right or bottom": 1}[third]
            top, left = (int(begin * (len(axis) - side)) for axis in (ys, xs))
            ys, xs = ys[top : top + side], xs[left : left + side]
            end, middle = side - SIZE, (side - SIZE) // 2
            views = [(ys[t : t + SIZE], xs[s : s + SIZE]) for t, s in itertools.product((0, end), repeat=2)]
            views.append((ys[middle : middle + SIZE], xs[middle : middle + SIZE]))
            whole = np.clip((np.arange(SIZE) + 0.5) * side / SIZE - 0.5, 0, side - 1)
            views.append(tuple(np.interp(whole, np.arange(side), axis) for axis in (ys, xs)))
            yield from views
            yield from ((rows, columns[::-1]) for rows, columns in views)


def all_crops(encoded, channels=3):
    scales = multicrop.squares(encoded, image_size=SIZE, channels=channels)
    by_square = np.concatenate([multicrop.crops_of_squares(scale, SIZE) for scale in scales], 1)
    return by_square.reshape(-1, *by_square.shape[2:])


def test_the_papers_short_sides_at_its_size_and_in_ratio_at_others():
    assert multicrop.short_sides(224) == (256, 288, 320, 352)
    assert multicrop.short_sides(64) == (73, 82, 91, 101)


@pytest.mark.parametrize("height, width", [(SHORT, LONG), (LONG, SHORT), (75, 50), (120, 200)])
def test_the_crops_of_landscape_and_portrait(height, width):
    crops = all_crops(coordinate_png(height, width))
    expected = list(expected_crops(height, width))
    assert len(crops) == len(expected) == multicrop.CROPS
    for crop, (rows, columns) in zip(crops, expected, strict=True):
        np.testing.assert_allclose(crop[..., 0], np.tile(columns, (SIZE, 1)), atol=1e-3)
        np.testing.assert_allclose(crop[..., 1], np.tile(rows[:, None], (1, SIZE)), atol=1e-3)


def test_no_two_crops_of_an_oblong_image_are_equal():
    assert len({crop.tobytes() for crop in all_crops(coordinate_png(SHORT, LONG))}) == multicrop.CROPS


def test_of_a_square_image_the_three_squares_are_one():
    assert len({crop.tobytes() for crop in all_crops(coordinate_png(SHORT, SHORT))}) == multicrop.CROPS / 3


def test_the_probabilities_are_the_mean_over_the_crops_one_by_one():
    random = np.random.default_rng(0)
    encoded = [tf.io.encode_png(random.integers(0, 256, (*shape, 3), "uint8")) for shape in ((30, 41), (50, 50))]
    model = keras.Sequential([keras.Input((SIZE, SIZE, 3)), keras.layers.Flatten(), keras.layers.Dense(7)])
    network_range = preprocessing.to_network_range
    views = [multicrop.squares(image, image_size=SIZE, channels=3) for image in encoded]
    views = tuple(network_range(tf.stack(scale)) for scale in zip(*views, strict=True))
    found = class_probabilities([model], views)
    for k, image in enumerate(encoded):
        logits = np.concatenate([model(network_range(crop[None])) for crop in all_crops(image)]).astype("float64")
        expected = np.exp(logits - logits.max(1, keepdims=True))
        expected = (expected / expected.sum(1, keepdims=True)).mean(0)
        np.testing.assert_allclose(found[k, 0], expected, rtol=1e-4)  # float32 logits of 1e1


@pytest.mark.parametrize("upright", [False, True])
def test_of_a_line_of_pixels_the_squares_are_its_ends_and_its_middle(upright):
    """30,000 x 1 pixels; resized as a whole to 256 pixels, the other side would have 7,680,000."""
    line = np.random.default_rng(0).integers(0, 256, (1, 30_000, 1), "uint8")
    encoded = tf.io.encode_png(line.transpose(1, 0, 2) if upright else line)
    for scale in multicrop.squares(encoded, image_size=224, channels=1):
        first, middle, last = scale.numpy()
        assert (first == line[0, 0]).all() and (middle == line[0, 14_999]).all() and (last == line[0, -1]).all()


def test_a_long_image_has_nearly_the_squares_that_resizing_it_as_a_whole_gives():
    """Of 17 times the short side, cut before resizing; beside it, by Pillow, resized as a whole and then cut."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5), "uint8")
    image = Image.fromarray(pixels).resize((17 * 48, 48), Image.BICUBIC)
    encoded = tf.io.encode_png(np.asarray(image)[..., None])
    (first, middle, last), *_ = multicrop.squares(encoded, image_size=224, channels=1)
    whole = np.asarray(image.convert("F").resize((17 * 256, 256), Image.BILINEAR))
    for found, begin in ((first, 0), (middle, 8 * 256), (last, 16 * 256)):
        np.testing.assert_allclose(found[..., 0], whole[:, begin : begin + 256], atol=3)
