"""The 144 crops of one image (Section 4.2.3, as in GoogLeNet), every scale and square of it decoded and resized once.

The image is resized so that its short side is 256, 288, 320 and 352 pixels; of each the left, centre and right square
are taken (top, centre and bottom of a portrait); of each square the four corner crops and the centre crop of 224x224,
and the square itself resized to 224x224; and the mirror image of each: 4 * 3 * 6 * 2 = 144.

The network's `image_size` may be another one: the short sides then keep their ratio to it, so that a crop at 64x64
shows the same part of the image as one at 224x224 (not in the paper: ours).

Of an image longer than `_LONGEST` times its short side, the three squares are cut before they are resized (not in the
paper: ours), as a line of 30,000 pixels would otherwise be 44 GB long.
"""

from collections.abc import Callable

import tensorflow as tf

from bn_keras.input import preprocessing

SHORT_SIDES = (256, 288, 320, 352)
CROPS = 144
_PAPER_IMAGE_SIZE = 224
_SQUARES = 3
_LONGEST = 16


def short_sides(image_size: int) -> tuple[int, ...]:
    """The four short sides, in pixels, for a network whose input has `image_size`."""
    return tuple(round(side * image_size / _PAPER_IMAGE_SIZE) for side in SHORT_SIDES)


def squares(encoded: tf.Tensor, *, image_size: int, channels: int) -> tuple[tf.Tensor, ...]:
    """Three squares at each of the four scales: all that the 144 crops are cut from.

    Returns:
      Four tensors, float32 `[3, side, side, channels]` in [0, 255], for `side` in `short_sides(image_size)`.
    """
    # Floats, as TensorFlow resizes bytes 1.4 times slower, and here four times.
    image = tf.cast(preprocessing.decode(encoded, channels), tf.float32)
    shape = tf.cast(tf.shape(image)[:2], tf.float32)
    return tuple(_squares(image, shape, side) for side in short_sides(image_size))


def _squares(image, shape, side):
    short = tf.reduce_min(shape)
    squares = tf.cond(
        tf.reduce_max(shape) > _LONGEST * short,
        lambda: tf.image.resize(_cut_squares(image, tf.cast(short, tf.int32)), (side, side)),
        lambda: _cut_squares(tf.image.resize(image, tf.cast(tf.round(shape * (side / short)), tf.int32)), side),
    )
    return tf.ensure_shape(squares, (_SQUARES, side, side, image.shape[-1]))


def _cut_squares(image, side):
    """The first, the middle and the last square of an image whose short side is `side`."""
    room = tf.shape(image)[:2] - side  # [0, what the long side has more]
    begins = (tf.zeros_like(room), room // 2, room)
    return tf.stack([image[y : y + side, x : x + side] for y, x in map(tf.unstack, begins)])


def crops_of_squares(squares: tf.Tensor, image_size: int) -> tf.Tensor:
    """Of each square four corners, the centre and the whole, then the mirror images of these six.

    Args:
      squares: float32 `[N, side, side, channels]`.

    Returns:
      float32 `[N, 12, image_size, image_size, channels]`.
    """
    end = squares.shape[1] - image_size
    begins = ((0, 0), (0, end), (end, 0), (end, end), (end // 2, end // 2))
    views = [squares[:, y : y + image_size, x : x + image_size] for y, x in begins]
    views = tf.stack([*views, preprocessing.resize(squares, image_size)], 1)
    return tf.concat([views, tf.reverse(views, [-2])], 1)


def squares_at_once(image_size: int) -> int:
    """Squares whose crops, 48 of each at all scales, reach the network together: one at 224x224, and as many pixels at
    a smaller size. At 64x64 a network of a quarter of the width is 1.7 times faster for it.
    """
    return max(1, _PAPER_IMAGE_SIZE**2 // image_size**2)


def mean_over_crops(
    function: Callable[[tf.Tensor], tf.Tensor], squares: tuple[tf.Tensor, ...], image_size: int, output: tf.TensorSpec
) -> tf.Tensor:
    """The mean of `function` over the 144 crops of every image, by the crops of `squares_at_once` squares at a time.

    Args:
      function: from crops float32 `[B, image_size, image_size, channels]` to a tensor `[B, ...]`.
      squares: of N images as `squares` cuts them: four tensors `[N, 3, side, side, channels]`.
      output: shape and dtype of what `function` returns for one crop.

    Returns:
      `[N, ...]`.
    """
    count = _SQUARES * tf.shape(squares[0])[0]
    at_once = squares_at_once(image_size)
    if images := squares[0].shape[0]:  # of few images, known to be few, no more than there are
        at_once = min(at_once, _SQUARES * images)

    def parts(scale):
        """The squares of all images, and black ones to fill the last part."""
        scale = tf.reshape(scale, (-1, *scale.shape[2:]))
        scale = tf.pad(scale, [(0, -count % at_once), (0, 0), (0, 0), (0, 0)])
        return tf.reshape(scale, (-1, at_once, *scale.shape[1:]))

    def mean(part):
        crops = tf.concat([crops_of_squares(scale, image_size) for scale in part], 1)
        results = function(tf.reshape(crops, (-1, *crops.shape[2:])))
        return tf.reduce_mean(tf.reshape(results, (at_once, -1, *output.shape)), 1)

    spec = tf.TensorSpec((at_once, *output.shape), output.dtype)
    means = tf.map_fn(mean, tuple(map(parts, squares)), parallel_iterations=1, fn_output_signature=spec)
    means = tf.reshape(means, (-1, *output.shape))[:count]
    return tf.reduce_mean(tf.reshape(means, (-1, _SQUARES, *output.shape)), 1)
