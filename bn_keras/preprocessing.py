"""One image from its encoded bytes to the network's input: the training crop, distortion, and the single crop.

Pixels are float32 in [0, 255] until `to_network_range` makes them [-1, 1]. Every random choice is a function of a
stateless seed, int32 `[2]`, so an example looks the same at any parallelism and after any resume.
"""

import math

import tensorflow as tf

# GoogLeNet (Szegedy et al. 2015, Section 6): "various sized patches of the image whose size is distributed evenly
# between 8% and 100% of the image area with aspect ratio constrained to the interval [3/4, 4/3]".
CROP_AREA = (0.08, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)

# Not in the paper: TF-Slim's evaluation keeps the central 87.5%, which is 224 of 256.
SINGLE_CROP_FRACTION = 0.875

# Not in the paper: He et al. (2016), who move CIFAR's 32 pixels by up to 4.
SHIFT = 1 / 8

# Not in the paper: TF-Slim's. Brightness as a fraction of full scale, hue in radians of the YIQ plane (TF-Slim's
# 0.2 of a turn in HSV), saturation and contrast as the half-width of a factor's range around 1.
_FULL_DISTORTION = (32 / 255, 0.2 * 2 * math.pi, 0.5, 0.5)

RGB_TO_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def decode(encoded, channels: int):
    """JPEG, PNG, GIF (first frame) or BMP bytes to uint8 `[height, width, channels]`."""
    return tf.io.decode_image(encoded, channels, expand_animations=False)


def resize(image, image_size: int):
    """Bilinear, to float32 `[image_size, image_size, channels]`; the aspect ratio is not kept."""
    return tf.image.resize(image, (image_size, image_size))


def training_crop(encoded, seed, *, image_size: int, channels: int):
    """GoogLeNet's crop, resized, mirrored half of the time.

    Returns:
      float32 `[image_size, image_size, channels]` in [0, 255].
    """
    seeds = tf.random.split(seed, 2)

    def window(shape):
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            shape,
            tf.zeros((1, 0, 4)),
            seeds[0],
            min_object_covered=0.0,
            aspect_ratio_range=CROP_ASPECT,
            area_range=CROP_AREA,
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        return begin, size

    def from_jpeg():
        # Decoding only the blocks under the crop: 663 against 550 images/s a core for decode, then crop.
        begin, size = window(tf.io.extract_jpeg_shape(encoded))
        return tf.image.decode_and_crop_jpeg(encoded, tf.concat([begin[:2], size[:2]], 0), channels)

    def from_other():
        image = decode(encoded, channels)
        begin, size = window(tf.shape(image))
        return tf.slice(image, begin, tf.concat([size[:2], [channels]], 0))

    image = resize(tf.cond(tf.io.is_jpeg(encoded), from_jpeg, from_other), image_size)
    image = tf.image.stateless_random_flip_left_right(image, seeds[1])
    return tf.ensure_shape(image, (image_size, image_size, channels))


def single_crop(encoded, *, image_size: int, channels: int):
    """The central 87.5% of the short side as a square, resized.

    Returns:
      float32 `[image_size, image_size, channels]` in [0, 255].
    """
    image = decode(encoded, channels)
    shape = tf.shape(image)[:2]
    side = tf.cast(tf.round(SINGLE_CROP_FRACTION * tf.cast(tf.reduce_min(shape), tf.float32)), tf.int32)
    begin = (shape - side) // 2
    image = image[begin[0] : begin[0] + side, begin[1] : begin[1] + side]
    return tf.ensure_shape(resize(image, image_size), (image_size, image_size, channels))


def whole_image(encoded, *, image_size: int, channels: int):
    """All of the image, resized: for sets such as MNIST, where a crop or a mirror changes what is seen.

    Returns:
      float32 `[image_size, image_size, channels]` in [0, 255].
    """
    return tf.ensure_shape(resize(decode(encoded, channels), image_size), (image_size, image_size, channels))


def shifted_image(encoded, seed, *, image_size: int, channels: int):
    """All of a small color image, resized, mirrored half of the time and moved by up to `SHIFT` of its side.

    What moves in at the border is the image reflected.

    Returns:
      float32 `[image_size, image_size, channels]` in [0, 255].
    """
    seeds = tf.random.split(seed, 2)
    margin = round(SHIFT * image_size)
    image = whole_image(encoded, image_size=image_size, channels=channels)
    image = tf.pad(image, ((margin, margin), (margin, margin), (0, 0)), "REFLECT")
    image = tf.image.stateless_random_crop(image, (image_size, image_size, channels), seeds[0])
    return tf.image.stateless_random_flip_left_right(image, seeds[1])


def distortion_draws(seed):
    """Four numbers in [-1, 1), float32 `[4]`: how far brightness, hue, saturation and contrast move."""
    return tf.random.stateless_uniform((4,), seed, -1.0, 1.0)


def photometric_distortion(images, draws, amount: str):
    """Random brightness, hue, saturation and contrast of a batch, as one affine map of each image's colors.

    With `M` the color matrix of `hue_saturation_matrix`, `b` the brightness offset, `k` the contrast factor and `mean`
    the mean over an image's pixels: `y = k * (M x - M mean) + M mean + b`, clipped to [0, 255]. One matrix product in
    place of four passes over the pixels (800 against 637 images/s for the whole pipeline on two cores).

    Args:
      images: float32 `[N, H, W, C]` in [0, 255]. With one channel, hue and saturation change nothing.
      draws: float32 `[N, 4]` in [-1, 1), of `distortion_draws`.
      amount: "full" (TF-Slim's ranges) or "reduced" (half of them; the seventh change of Section 4.2.1).

    Returns:
      float32 `[N, H, W, C]` in [0, 255].
    """
    factor = {"full": 1.0, "reduced": 0.5}[amount]
    brightness, hue, saturation, contrast = (factor * most * draws[:, k] for k, most in enumerate(_FULL_DISTORTION))
    k = (1.0 + contrast)[:, None, None]
    _, height, width, channels = images.shape
    pixels = tf.reshape(images, (-1, height * width, channels))
    if channels == 3:
        matrix = tf.transpose(hue_saturation_matrix(hue, 1.0 + saturation), (0, 2, 1))
        mean = tf.reduce_mean(pixels, 1, keepdims=True) @ matrix
        pixels = pixels @ (matrix * k)
    else:
        mean = tf.reduce_mean(pixels, 1, keepdims=True)
        pixels = pixels * k
    pixels += (1.0 - k) * mean + 255.0 * brightness[:, None, None]
    return tf.reshape(tf.clip_by_value(pixels, 0.0, 255.0), (-1, height, width, channels))


def hue_saturation_matrix(delta_hue, scale_saturation):
    """Color matrices that turn the IQ plane by `delta_hue` radians and scale it: TensorFlow Addons' `hsv_in_yiq`.

    Args:
      delta_hue: float32 `[N]`, radians.
      scale_saturation: float32 `[N]`, a factor.

    Returns:
      float32 `[N, 3, 3]`; a column of RGB values times it is the distorted color.
    """
    yiq = tf.constant(RGB_TO_YIQ, tf.float32)
    cosine, sine = scale_saturation * tf.cos(delta_hue), scale_saturation * tf.sin(delta_hue)
    one, zero = tf.ones_like(cosine), tf.zeros_like(cosine)
    turn = tf.stack([one, zero, zero, zero, cosine, -sine, zero, sine, cosine], -1)
    return tf.linalg.inv(yiq) @ tf.reshape(turn, (-1, 3, 3)) @ yiq


def to_network_range(images):
    """[0, 255] to [-1, 1]."""
    return images / 127.5 - 1.0
