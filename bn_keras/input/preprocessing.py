"""One image from its encoded bytes to the network's input: the training crop and the views of evaluation.

Pixels are uint8 or float32 in [0, 255] until `to_network_range` or `distort_colors` makes them [-1, 1]. Every
random choice is a function of `DRAWS` numbers in [0, 1) that are given, so an example looks the same at any
parallelism and after any resume. To preprocess one image as in training:

    draws = uniform_draws(seed=(epoch, example))
    image = training_crop(encoded, random_crop(draws), image_size=224, channels=3)
    image = photometric_distortion.random_distortion(image, draws, "reduced")
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from bn_keras.input.image_header import MOST_PIXELS

# GoogLeNet (Szegedy et al. 2015, Section 6): "various sized patches of the image whose size is distributed evenly
# between 8% and 100% of the image area with aspect ratio constrained to the interval [3/4, 4/3]".
CROP_AREA = (0.08, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)

# Not in the paper: TF-Slim's evaluation keeps the central 87.5%, which is 224 of 256.
SINGLE_CROP_FRACTION = 0.875

# Not in the paper: He et al. (2016), who move CIFAR's 32 pixels by up to 4.
SHIFT = 1 / 8

_OVERSHOOTING = ("bicubic", "lanczos3")  # some of their weights are negative

RGB_TO_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))

# The parts of an example's draws.
_AREA = 0
_ASPECT = slice(1, 11)  # not in the paper: ten attempts, as in TF-Slim; when none fits, all of the image is taken
_PLACE = slice(_ASPECT.stop, _ASPECT.stop + 2)
MIRROR = _PLACE.stop
COLOR = slice(MIRROR + 1, MIRROR + 5)
DRAWS = COLOR.stop


def uniform_draws(seed: tf.Tensor | tuple[int, int], examples: int | None = None) -> tf.Tensor:
    """The random numbers of one example, float32 `[DRAWS]` in [0, 1), or of several, `[examples, DRAWS]`.

    Args:
      seed: int32 `[2]`.
    """
    return tf.random.stateless_uniform((DRAWS,) if examples is None else (examples, DRAWS), seed)


def decode(encoded: tf.Tensor, channels: int) -> tf.Tensor:
    """JPEG, PNG, GIF (first frame), BMP or WebP bytes to uint8 `[height, width, channels]`, without alpha.

    Formats that TensorFlow decodes only in color become gray by Rec. 601's luma, as it makes JPEG and PNG gray.
    """
    encoded = tf.convert_to_tensor(encoded)
    first = tf.strings.substr(encoded, 0, 1)
    special = (first == b"R") | (first == b"B") if channels == 3 else first != b"\x89"  # WebP, BMP; all but PNG
    image = tf.cond(special, lambda: _decode_special(encoded, channels), lambda: _decode_as_is(encoded, channels))
    return tf.ensure_shape(image, (None, None, channels))


def _decode_as_is(encoded, channels):
    return tf.io.decode_image(encoded, channels, expand_animations=False)


# One operation of the graph: its forty, although not run, would take as long as decoding an image of 8 x 8.
@tf.function(autograph=False, experimental_attributes={"_noinline": True})
def _decode_special(encoded, channels):
    def color():
        # Never channels=0: TensorFlow 2.21 then writes beyond its memory for an animated WebP.
        alpha = _is_webp_with_alpha(encoded)
        image = tf.cond(alpha, lambda: _decode_as_is(encoded, 4)[..., :3], lambda: _decode_as_is(encoded, 3))
        return tf.cond(_is_palette_bmp(encoded), lambda: _palette_colors(encoded, image), lambda: image)

    def gray():
        return to_bytes(tf.tensordot(tf.cast(color(), tf.float32), tf.constant(RGB_TO_YIQ[0]), 1)[..., None])

    return color() if channels == 3 else tf.cond(_is_jpeg(encoded, 1), lambda: _decode_as_is(encoded, 1), gray)


def _is_jpeg(encoded, channels):
    """Whether this is a JPEG that TensorFlow decodes to `channels` channels: it cannot make CMYK gray."""
    jpeg = tf.io.is_jpeg(encoded)
    if channels == 3:
        return jpeg
    return tf.cond(jpeg, lambda: tf.io.extract_jpeg_shape(encoded)[2] < 4, lambda: False)


def _is_palette_bmp(encoded):
    header = tf.io.decode_raw(encoded, tf.uint8, fixed_length=29)
    return tf.reduce_all(header[:2] == tuple(b"BM")) & (header[28] == 8)  # bits per pixel


def _palette_colors(encoded, image):
    """The colors of a BMP with 8 bits per pixel, which TensorFlow decodes to indices of its palette."""
    content = tf.cast(tf.io.decode_raw(encoded, tf.uint8), tf.int32)
    begin = 14 + content[14] + 256 * content[15]  # the palette follows two headers; the second begins with its size
    palette = tf.cast(tf.reshape(content[begin : begin + 4 * 256], (-1, 4)), tf.uint8)  # blue, green, red, nothing
    return tf.gather(palette[:, 2::-1], tf.cast(image[..., 0], tf.int32))


def _is_webp_with_alpha(encoded):
    """Whether this is a WebP whose header says that it has alpha and is no animation."""
    header = tf.io.decode_raw(encoded, tf.uint8, fixed_length=25)
    extended = tf.bitwise.bitwise_and(header[20], 0x12) == 0x10
    lossless = tf.bitwise.bitwise_and(header[24], 0x10) == 0x10
    flag = ((header[15] == ord("X")) & extended) | ((header[15] == ord("L")) & lossless)
    return tf.reduce_all(header[:4] == tuple(b"RIFF")) & flag


def resize(image: tf.Tensor, image_size: int, interpolation: str = "bilinear") -> tf.Tensor:
    """Resizes to float32 `[image_size, image_size, channels]` in [0, 255], whatever the aspect ratio."""
    # As floats: TensorFlow resizes bytes 1.4 times slower.
    image = tf.image.resize(tf.cast(image, tf.float32), (image_size, image_size), interpolation)
    return tf.clip_by_value(image, 0.0, 255.0) if interpolation in _OVERSHOOTING else image


class Crop(NamedTuple):
    """A training crop before the image's shape is known, of one example or a batch.

    Attributes:
      sizes: float32 `[..., 10, 2]`, heights and widths to try, as fractions of the square root of the image's area.
      place: float32 `[..., 2]` in [0, 1), how far down and right the crop is moved within the image.
      mirror: bool `[...]`, whether the crop is mirrored.
    """

    sizes: tf.Tensor
    place: tf.Tensor
    mirror: tf.Tensor


def random_crop(draws: tf.Tensor) -> Crop:
    """GoogLeNet's crop: an area within `CROP_AREA`, an aspect ratio within `CROP_ASPECT`, anywhere in the image.

    The area is drawn once, the aspect ratio again until the crop fits, so that areas are spread evenly, as GoogLeNet
    has it. TensorFlow's operation draws both again, or the height, which makes large crops rarer.

    Args:
      draws: float32 `[..., DRAWS]`, of `uniform_draws`. For many examples at once this takes no time that counts; for
        one alone, some per cent of the time of decoding an image.
    """
    side = tf.sqrt(CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * draws[..., _AREA, None])
    # Even in the logarithm, so that portrait is as likely as landscape (not in the paper: torchvision's).
    log_aspect = math.log(CROP_ASPECT[0]) + math.log(CROP_ASPECT[1] / CROP_ASPECT[0]) * draws[..., _ASPECT]
    stretch = tf.exp(log_aspect / 2.0)
    return Crop(tf.stack([side / stretch, side * stretch], -1), draws[..., _PLACE], draws[..., MIRROR] < 0.5)


def crop_window(shape: tf.Tensor, crop: Crop) -> tf.Tensor:
    """Where a crop lies in an image: the first of its sizes that fits, or the whole image if none does.

    Args:
      shape: int32 `[2]`, the image's height and width.
      crop: the crop of one example.

    Returns:
      int32 `[4]`: top, left, height, width.
    """
    image = tf.cast(shape, tf.float32)
    sizes = tf.maximum(1.0, tf.round(crop.sizes * tf.sqrt(image[0] * image[1])))
    sizes = tf.concat([sizes, image[None]], 0)
    size = sizes[tf.argmax(tf.reduce_all(sizes <= image, -1))]
    begin = tf.floor(crop.place * (image - size + 1.0))
    return tf.cast(tf.concat([begin, size], 0), tf.int32)


def training_crop(
    encoded: tf.Tensor, crop: Crop, *, image_size: int, channels: int, interpolation: str = "bilinear"
) -> tf.Tensor:
    """Decodes the crop of an image, resizes it and, if it is so drawn, mirrors it.

    Args:
      encoded: the bytes of an image that `decode` reads.
      crop: the result of `random_crop` for one example.

    Returns:
      uint8 `[image_size, image_size, channels]`.
    """
    image = _decode_window(encoded, lambda shape: crop_window(shape, crop), channels)
    # Mirrored last, when it is small: 5 us as bytes, 110 us as floats.
    image = to_bytes(resize(image, image_size, interpolation))
    image = tf.cond(crop.mirror, lambda: tf.reverse(image, [1]), lambda: image)
    return tf.ensure_shape(image, (image_size, image_size, channels))


def single_crop(encoded: tf.Tensor, *, image_size: int, channels: int, interpolation: str = "bilinear") -> tf.Tensor:
    """The central square whose side is 87.5% of the short side, resized.

    Returns:
      float32 `[image_size, image_size, channels]` in [0, 255].
    """

    def window(shape):
        side = tf.cast(tf.round(SINGLE_CROP_FRACTION * tf.cast(tf.reduce_min(shape), tf.float32)), tf.int32)
        return tf.concat([(shape - side) // 2, [side, side]], 0)

    image = _decode_window(encoded, window, channels)
    return tf.ensure_shape(resize(image, image_size, interpolation), (image_size, image_size, channels))


def _decode_window(encoded, window, channels):
    """Decodes a part of an image: `window` maps the image's shape to (top, left, height, width)."""

    def from_jpeg():
        shape = tf.io.extract_jpeg_shape(encoded)[:2]
        pixels = tf.reduce_prod(tf.cast(shape, tf.int64))
        # Not tf.debugging.assert_less_equal, which adds a branch to the graph.
        check = tf.raw_ops.Assert(condition=pixels <= MOST_PIXELS, data=["an image has too many pixels:", pixels])
        with tf.control_dependencies([check] if check else []):
            # Only the blocks under the crop are decoded: 663 images/s on a core, against 550 if all are.
            return tf.image.decode_and_crop_jpeg(encoded, window(shape), channels)

    def from_other():
        image = decode(encoded, channels)
        top, left, height, width = tf.unstack(window(tf.shape(image)[:2]))
        return image[top : top + height, left : left + width]

    return tf.cond(_is_jpeg(encoded, channels), from_jpeg, from_other)


def whole_image(encoded: tf.Tensor, *, image_size: int, channels: int) -> tf.Tensor:
    """The whole image, resized: for data such as MNIST, where a crop or a mirror image means something else.

    Returns:
      float32 `[image_size, image_size, channels]` in [0, 255].
    """
    return tf.ensure_shape(resize(decode(encoded, channels), image_size), (image_size, image_size, channels))


def evaluated_view(augmentation: str) -> Callable[..., tf.Tensor]:
    """The function of this module that makes the view of an image that a network is evaluated on.

    Args:
      augmentation: how it was trained. "imagenet" trains on crops and is evaluated on the central one; the others train
        on whole images, and are evaluated on them.
    """
    return single_crop if augmentation == "imagenet" else whole_image


def shifted_image(encoded: tf.Tensor, draws: tf.Tensor, *, image_size: int, channels: int) -> tf.Tensor:
    """A whole small image, resized, mirrored half of the time, and moved by up to `SHIFT` of its side.

    The border that becomes empty shows the image reflected.

    Returns:
      float32 `[image_size, image_size, channels]` in [0, 255].
    """
    margin = round(SHIFT * image_size)
    image = whole_image(encoded, image_size=image_size, channels=channels)
    image = tf.pad(image, ((margin, margin), (margin, margin), (0, 0)), "REFLECT")
    top, left = tf.unstack(tf.cast(tf.floor(draws[_PLACE] * (2 * margin + 1)), tf.int32))
    image = image[top : top + image_size, left : left + image_size]
    image = tf.cond(draws[MIRROR] < 0.5, lambda: tf.reverse(image, [1]), lambda: image)
    return tf.ensure_shape(image, (image_size, image_size, channels))


def to_network_range(images: tf.Tensor) -> tf.Tensor:
    """[0, 255] to float32 in [-1, 1]."""
    return tf.cast(images, tf.float32) / 127.5 - 1.0


def to_bytes(images: tf.Tensor) -> tf.Tensor:
    """float32 in [0, 255] to the nearest uint8."""
    return tf.cast(tf.round(images), tf.uint8)
