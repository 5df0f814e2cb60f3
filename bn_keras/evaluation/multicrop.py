"""The 144 crops of one image (Section 4.2.3, as in GoogLeNet), which is decoded once and resized once for each scale.

The image is resized so that its short side is 256, 288, 320 and 352 pixels; of each the left, centre and right square
are taken (top, centre and bottom of a portrait). Each square gives its four corner crops and its centre crop of
224x224, and itself resized to 224x224; each of these six comes with its mirror image: 4 * 3 * 6 * 2 = 144.

At another `image_size` of the network, the short sides keep their ratio to it, so that a crop of 64x64 shows the same
part of the image as one of 224x224 (not in the paper: ours).

If an image is longer than `_LONGEST` times its short side, the three squares are cut before they are resized (not in
the paper: ours): an image one pixel wide and 30,000 long would otherwise become 44 GB.
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
    """Three squares at each of the four scales, from which all 144 crops are cut.

    Returns:
      Four tensors, float32 `[3, side, side, channels]` in [0, 255], for `side` in `short_sides(image_size)`.
    """
    # As floats: TensorFlow resizes bytes 1.4 times slower, and does it four times here.
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
    room = tf.shape(image)[:2] - side  # [0, how much longer the long side is]
    begins = (tf.zeros_like(room), room // 2, room)
    return tf.stack([image[y : y + side, x : x + side] for y, x in map(tf.unstack, begins)])


def crops_of_squares(squares: tf.Tensor, image_size: int) -> tf.Tensor:
    """Cuts each square into its four corners, the centre and the whole, followed by the mirror images of these six.

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
    """How many squares' crops, 48 at all scales, the network takes at once: one at 224x224, more at a smaller size.

    At 64x64 this makes a network of a quarter of the width 1.7 times faster.
    """
    return max(1, _PAPER_IMAGE_SIZE**2 // image_size**2)


def mean_over_crops(
    function: Callable[[tf.Tensor], tf.Tensor], squares: tuple[tf.Tensor, ...], image_size: int, output: tf.TensorSpec
) -> tf.Tensor:
    """The mean of `function` over the 144 crops of each image, called with the crops of `squares_at_once` squares.

    Args:
      function: maps crops float32 `[B, image_size, image_size, channels]` to a tensor `[B, ...]`.
      squares: the result of `squares` for N images, four tensors `[N, 3, side, side, channels]`.
      output: the shape and dtype that `function` returns for one crop.

    Returns:
      `[N, ...]`.
    """
    count = _SQUARES * tf.shape(squares[0])[0]
    at_once = squares_at_once(image_size)
    if images := squares[0].shape[0]:  # not more than there are, if the number of images is known
        at_once = min(at_once, _SQUARES * images)

    def parts(scale):
        """The squares of all images, with black ones to fill the last part."""
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
