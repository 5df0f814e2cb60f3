"""Pictures of a run in TensorBoard: which images they show, and that they change nothing of the run."""

import io
import shutil

import keras
import numpy as np
import tensorflow as tf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from bn_keras import BatchNormalization, read_dataset
from bn_keras.evaluation.mistakes import WorstMistakes, judge
from bn_keras.runs import checkpoint
from bn_keras.training import Outcome, make_config, train


def network(config):
    inputs = keras.Input((config.image_size, config.image_size, config.channels))
    x = BatchNormalization(momentum=0.5)(keras.layers.Conv2D(4, 3, strides=4, use_bias=False)(inputs))
    return keras.Model(inputs, keras.layers.Dense(config.classes)(keras.layers.Flatten()(x)))


def test_the_worst_mistakes_are_those_that_numpy_finds():
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (5, 4, 3)).astype("float32")
    labels = random.integers(0, 3, (5, 4)).astype("int32")
    labels[4, 2:] = -1  # padding
    images = np.arange(20, dtype="float32").reshape(5, 4, 1, 1, 1)

    exponentials = np.exp(logits.astype("float64"))
    of_class = np.take_along_axis(exponentials, np.maximum(labels, 0)[..., None], 2)[..., 0]
    losses = -np.log(of_class / exponentials.sum(2))
    wrong = (logits.argmax(2) != labels) & (labels >= 0)
    expected = np.argsort(np.where(wrong, -losses, 0), axis=None)[:6]
    assert wrong.sum() > 6

    model = keras.layers.Lambda(lambda x: tf.gather(logits.reshape(20, 3), tf.cast(x[:, 0, 0, 0], tf.int32)))
    batches = [(tf.constant(images[k]), tf.constant(labels[k])) for k in range(5)]
    mistakes = WorstMistakes(6)
    for shown, classes in batches:
        mistakes.add(shown, classes, *judge(tf.nn.log_softmax(model(shown)), classes))
    found = mistakes.found
    assert [int(mistake.image[0, 0, 0]) for mistake in found] == expected.tolist()
    assert [mistake.label for mistake in found] == labels.reshape(-1)[expected].tolist()
    assert [mistake.answer for mistake in found] == logits.reshape(20, 3).argmax(1)[expected].tolist()
    shares = (exponentials.max(2) / exponentials.sum(2)).reshape(-1)[expected]
    np.testing.assert_allclose([mistake.probability for mistake in found], shares, rtol=1e-5)
    np.testing.assert_allclose([mistake.loss for mistake in found], losses.reshape(-1)[expected], rtol=1e-5)


def shown(run):
    """{tag: [(step, the PNG's size)]} of the pictures that TensorBoard reads of a run."""
    events = EventAccumulator(str(run), size_guidance={"tensors": 0}).Reload()
    found = {}
    for tag in (tag for tag in events.Tags()["tensors"] if tag.startswith("pictures/")):
        for event in events.Tensors(tag):
            width, height, png = make_ndarray(event.tensor_proto)
            with Image.open(io.BytesIO(png)) as picture:
                assert picture.size == (int(width), int(height))
                found.setdefault(tag, []).append((event.step, picture.size))
    return found


def test_a_run_with_pictures_has_the_same_weights_and_keeps_them_through_a_resume(data_dir, tmp_path):
    dataset = read_dataset(str(data_dir))
    settings = {"image_size": 16, "batch_size": 14, "steps": 4, "eval_every": 2, "checkpoint_every": 2}
    runs = {pictures: tmp_path / f"with_{pictures}" for pictures in (0, 3)}
    for pictures, run in runs.items():
        config = make_config(dataset, "bn_x5", **settings, pictures=pictures)
        assert train(config, dataset, str(run), network=network) is Outcome.FINISHED
    (_, plain), (_, drawn) = (checkpoint.load_newest(str(run)) for run in runs.values())
    for name, array in plain.items():
        np.testing.assert_array_equal(drawn[name], array, err_msg=name)
    assert not shown(runs[0])
    first = shown(runs[3])
    assert [step for step, _ in first["pictures/training_images"]] == [2, 4]
    assert first["pictures/worst_mistakes"], "21 images after 2 and 4 steps"

    resumed = shutil.copytree(runs[3], tmp_path / "resumed")
    for name in ("checkpoint-00000004.npz", "model.keras"):
        (resumed / name).unlink()
    (resumed / "pictures/worst_mistakes-00000001.png").write_bytes(b"\x89PNG cut")  # is left out, with a word
    assert train(config, dataset, str(resumed), network=network) is Outcome.FINISHED
    assert shown(resumed) == first
