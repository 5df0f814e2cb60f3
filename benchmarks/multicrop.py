"""Evaluation by 144 crops beside the direct way, on the same JPEGs and the same network.

  python benchmarks/multicrop.py                                     64x64, width 0.25; about three minutes on two cores
  python benchmarks/multicrop.py --image_size=224 --width=1 --images=4 --direct_images=4      the paper's network
  python benchmarks/multicrop.py --images=1000 --direct_images=1000  nothing extrapolated

The direct ways decode and resize the image anew for each of its 144 crops, and run the trained network as it is; the
crops are prepared by as many threads as ours and reach the network by as many, so that nothing else is lost, or one by
one. Ours decodes once and resizes once per scale, cuts the crops beside the network, and has batch normalization
folded. Rounds alternate between the ways, ratios are of the same round, and all ways must give the same probabilities.
The images are 500 x 375 (ImageNet's median).
"""

import os
import statistics
import sys
import time
from pathlib import Path

from _photos import make_jpegs
from absl import app, flags

sys.path.insert(0, str(Path(__file__).parents[1]))

FLAGS = flags.FLAGS
flags.DEFINE_integer("images", 120, "Images of one round of ours.", 1)
flags.DEFINE_integer("direct_images", 24, "Images of one round of the direct way, which is slower.", 1)
flags.DEFINE_integer("image_size", 64, "Height and width of the network's input in pixels.", 1)
flags.DEFINE_float("width", 0.25, "Factor on the network's feature maps.", 0.0, 16.0)
flags.DEFINE_integer("rounds", 3, "Rounds; the table shows medians.", 1)

DISTINCT = 24


def direct_crop(encoded, number):
    """Crop `number` of 144 by itself, as a program that knows one crop at a time cuts it."""
    import tensorflow as tf

    from bn_keras.evaluation import multicrop
    from bn_keras.input import preprocessing

    size = FLAGS.image_size
    number, mirror = tf.cast(number // 2, tf.int32), number % 2
    number, view = number // 6, number % 6
    third, scale = number // 4, number % 4
    image = preprocessing.decode(encoded, 3)
    shape = tf.cast(tf.shape(image)[:2], tf.float32)
    side = tf.gather(multicrop.short_sides(size), scale)
    long_and_short = tf.cast(tf.round(shape * (tf.cast(side, tf.float32) / tf.reduce_min(shape))), tf.int32)
    resized = tf.image.resize(image, long_and_short)
    y, x = tf.unstack((tf.shape(resized)[:2] - side) * third // 2)
    square = resized[y : y + side, x : x + side]

    def corner_or_centre():
        top, left = tf.unstack(tf.gather([(0, 0), (0, 2), (2, 0), (2, 2), (1, 1)], view) * (side - size) // 2)
        return square[top : top + size, left : left + size]

    crop = tf.cond(view == 5, lambda: preprocessing.resize(square, size), corner_or_centre)
    crop = tf.cond(mirror == 1, lambda: tf.reverse(crop, [1]), lambda: crop)
    return preprocessing.to_network_range(tf.ensure_shape(crop, (size, size, 3)))


def options(dataset):
    import tensorflow as tf

    chosen = tf.data.Options()
    chosen.autotune.enabled = False
    return dataset.with_options(chosen)


def make_direct(model, jpegs, crops_at_once):
    """A direct way: images -> the mean probabilities of each, float64 [images, classes]."""
    import numpy as np
    import tensorflow as tf

    probabilities = tf.function(lambda crops: tf.nn.softmax(tf.cast(model(crops, training=False), tf.float64)))

    def direct(images):
        crops = tf.data.Dataset.range(images).flat_map(
            lambda k: tf.data.Dataset.range(144).map(lambda number: (tf.gather(jpegs, k % len(jpegs)), number))
        )
        batches = crops.map(direct_crop, os.cpu_count()).batch(crops_at_once).prefetch(2)
        found = np.concatenate([probabilities(batch) for batch in options(batches)])
        return found.reshape(images, 144, -1).mean(1)

    return direct


def make_ours(model, jpegs):
    """This project's way, to the same result."""
    import numpy as np
    import tensorflow as tf

    from bn_keras.evaluation import multicrop
    from bn_keras.evaluation.accuracy import class_probabilities
    from bn_keras.inference.folding import fold_batch_normalization
    from bn_keras.input.preprocessing import to_network_range

    folded = fold_batch_normalization(model)
    views = tuple(
        tf.TensorSpec((None, 3, side, side, 3), tf.float32) for side in multicrop.short_sides(FLAGS.image_size)
    )
    probabilities = tf.function(lambda *squares: class_probabilities([folded], squares)[:, 0], input_signature=views)

    def squares(k):
        cut = multicrop.squares(tf.gather(jpegs, k % len(jpegs)), image_size=FLAGS.image_size, channels=3)
        return tuple(map(to_network_range, cut))

    def ours(images):
        batches = tf.data.Dataset.range(images).map(squares, os.cpu_count()).batch(8).prefetch(2)
        return np.concatenate([probabilities(*batch) for batch in options(batches)])

    return ours


def make_model():
    import numpy as np

    from bn_keras import build_network

    model = build_network("bn_x30", image_size=FLAGS.image_size, width=FLAGS.width)
    draw = np.random.default_rng(0)
    for layer in model.layers:
        if layer.name.endswith("_bn"):
            layer.set_weights([draw.uniform(0.5, 1.5, weight.shape) for weight in layer.get_weights()])
    return model


def main(_):
    import numpy as np
    import tensorflow as tf

    from bn_keras.evaluation import multicrop

    jpegs = tf.constant(list(make_jpegs(DISTINCT)))
    model = make_model()
    at_once = 48 * multicrop.squares_at_once(FLAGS.image_size)  # as ours
    ways = {
        f"direct, by {at_once} crops": (make_direct(model, jpegs, at_once), FLAGS.direct_images),
        "direct, crop by crop": (make_direct(model, jpegs, 1), FLAGS.direct_images),
        "ours": (make_ours(model, jpegs), FLAGS.images),
    }
    first = {name: way(2) for name, (way, _) in ways.items()}  # also compiles
    for name in ways:
        np.testing.assert_allclose(first["ours"], first[name], rtol=1e-3, atol=1e-6)
    rates = {name: [] for name in ways}
    for _ in range(FLAGS.rounds):
        for name, (way, images) in ways.items():
            started = time.perf_counter()
            way(images)
            rates[name].append(images / (time.perf_counter() - started))
    print(
        f"BN-x30 at {FLAGS.image_size}x{FLAGS.image_size}, width {FLAGS.width:g}, 144 crops of JPEGs of 500 x 375, "
        f"{os.cpu_count()} CPUs, medians of {FLAGS.rounds} rounds\n\n"
        "| | ratio of ours | images a round | images/s | crops/s | 1,000 images in |\n|---|---:|---:|---:|---:|---:|"
    )
    for name, (_, images) in ways.items():
        rate = statistics.median(rates[name])
        ratio = statistics.median(ours / other for ours, other in zip(rates["ours"], rates[name], strict=True))
        minutes = f"{1000 / rate / 60:.1f} min" + ("" if images >= 1000 else " (scaled)")
        print(f"| {name} | {ratio:.2f} | {images:,} | {rate:.2f} | {144 * rate:,.0f} | {minutes} |")


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as the launchers do
    app.run(main)
