"""A trained network as it is used: pictures in, probabilities of the classes or features out."""

import functools
import io
import mimetypes
import os
import warnings
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from bn_keras.errors import InputError
from bn_keras.evaluation import multicrop
from bn_keras.evaluation.accuracy import class_probabilities
from bn_keras.evaluation.trained_network import Weights, head_of, image_view, load_network
from bn_keras.input.image_header import MOST_PIXELS, why_unreadable
from bn_keras.input.preprocessing import to_network_range
from bn_keras.input.records import PARALLEL_CALLS, without_autotune
from bn_keras.json_files import check_size
from bn_keras.runs.run_directory import RunDirectory
from bn_keras.runs.run_files import note

Images = str | os.PathLike | np.ndarray | Sequence[str | os.PathLike | np.ndarray]
"""A folder or a picture; uint8 `[N, height, width, channels]`; or a sequence of pictures or of such arrays of one."""

_BATCH = {1: 32, 144: 8}  # images at once, by their crops


class Classifier:
    """The classifier of a run, or of several whose mean is taken; everything is loaded once.

        classifier = Classifier("runs/mine")
        best = classifier.class_names[classifier.predict("cat.jpg")[0].argmax()]

    Args:
      directories: of one run, or of several that know the same classes.
      weights: which of the runs' weights to take.
      crops: 1 for the view of an image that the run's own evaluation takes; 144 for the mean over GoogLeNet's crops.

    Raises:
      InputError: there is no run, it has no such weights, or several know different classes.
    """

    def __init__(
        self, directories: str | os.PathLike | Sequence[str], *, weights: Weights = "last", crops: int = 1
    ) -> None:
        paths = [directories] if isinstance(directories, str | os.PathLike) else directories
        runs = [RunDirectory(os.fspath(path)) for path in paths]
        self._configs = [run.read_trained() for run in runs]
        self._crops = crops
        self.class_names = runs[0].read_class_names()
        for run in runs[1:]:
            if run.read_class_names() != self.class_names:
                raise InputError(
                    f"{run.path} and {runs[0].path} know different classes, so they are no ensemble: give one of them"
                )
        self.models = [load_network(run, weights=weights) for run in runs]
        shown = tuple(_shown(model, crops) for model in self.models)
        self._probabilities = tf.function(self._mean_probabilities, input_signature=[shown], autograph=False)
        self._body = functools.cache(self._make_body)

    @property
    def model(self) -> keras.Model:
        """The first run's network, folded: from images float32 in [-1, 1] to logits."""
        return self.models[0]

    def predict(
        self,
        images: Images,
        *,
        bad: list[tuple[str, str]] | None = None,
        after_batch: Callable[[int], None] = lambda images: None,
    ) -> np.ndarray:
        """The class probabilities of pictures.

        Args:
          images: pictures in JPEG, PNG, GIF, BMP or WebP, those of a folder by name, or their pixels. Files are seen as
            `data_prep` stores them for training: `upright_on_white`.
          bad: gets (path, what is wrong) of every picture that cannot be read; the picture's row is then NaN. None: the
            first such picture is an error.
          after_batch: called with the count of images that are done.

        Returns:
          float64 `[N, classes]`; a row's sum is 1.

        Raises:
          InputError: a picture cannot be read, or there is none.
          OSError: a file is missing.
        """
        return self._outputs(self._probabilities, self._configs, self._crops, images, bad, after_batch)

    def features(self, images: Images, layer: str | None = None) -> np.ndarray:
        """What the first run's network makes of pictures before it classifies them.

        Args:
          images: as in `predict`.
          layer: the name of the layer whose output is returned; None: the input of the last layer with weights, such as
            the 1,024 means of Inception.

        Returns:
          float32 `[N, ...]`.

        Raises:
          InputError: there is no such layer, a picture cannot be read, or there is none.
          OSError: a file is missing.
        """
        return self._outputs(self._body(layer), self._configs[:1], 1, images)

    def _make_body(self, layer):
        names = [each.name for each in self.model.layers]
        if layer is not None and layer not in names:
            raise InputError(f"`layer={layer}` is none of the network's, which are {names[0]}, ..., {names[-1]}")
        output = self.model.get_layer(layer).output if layer else head_of(self.model).input
        body = keras.Model(self.model.inputs, output)
        return tf.function(lambda views: body(views[0], training=False), input_signature=[(_shown(self.model, 1),)])

    def _mean_probabilities(self, views):
        each = [class_probabilities([model], view)[:, 0] for model, view in zip(self.models, views, strict=True)]
        return tf.reduce_mean(tf.stack(each), 0)

    def _outputs(self, function, configs, crops, images, bad=None, after_batch=lambda images: None):
        """The outputs for all images of `function`, which is given batches of what each run is shown of them."""
        names, strings, read = _sources(images)
        views = [image_view(config, crops) for config in configs]

        def prepare(number, string):
            encoded = read(string)
            return number, tuple(tf.nest.map_structure(to_network_range, view(encoded)) for view in views)

        def note_unreadable(begin, end, readable):
            for number in sorted({*range(begin, end)}.difference(readable)):
                reason = why_unreadable(read(strings[number]).numpy())
                if bad is None:
                    raise InputError(f"{names[number]} is {reason}")
                bad.append((names[number], reason))

        shown = tf.data.Dataset.from_tensor_slices(strings).enumerate().map(prepare, 2 * PARALLEL_CALLS).ignore_errors()
        traced = function.get_concrete_function()
        outputs = np.full((len(names), *traced.output_shapes[1:]), np.nan, traced.output_dtypes.as_numpy_dtype)
        done = 0
        for numbers, batch in without_autotune(shown.batch(_BATCH[crops]).prefetch(2)):
            outputs[numbers] = function(batch)
            begin, done = done, int(numbers[-1]) + 1
            note_unreadable(begin, done, numbers.numpy())
            after_batch(done)
        note_unreadable(done, len(names), ())
        return outputs


def _sources(images: Images) -> tuple[list[str], list, Callable]:
    """The name of every picture; its path or its bytes; and the function that makes bytes of these."""
    if isinstance(images, str | os.PathLike):
        images = pictures(os.fspath(images))
    if not len(images):
        raise InputError("`images` is empty: give at least one picture")
    if isinstance(images[0], np.ndarray):  # as files without loss, so that they are seen as files are
        return [f"array {k}" for k in range(len(images))], [tf.io.encode_png(image) for image in images], tf.identity
    paths = [str(path) for path in images]
    for path in paths:
        os.stat(path)  # raises for one that is missing
        check_size(path, "give a smaller picture")
    return paths, paths, _read_upright


@tf.function(input_signature=[tf.TensorSpec((), tf.string)])  # called alone, NumPy gets its bytes as an array
def _read_upright(path):
    encoded = tf.numpy_function(upright_on_white, [tf.io.read_file(path)], tf.string, stateful=False)
    return tf.ensure_shape(encoded, ())


def upright_on_white(encoded: bytes) -> bytes:
    """A picture as data_prep stores it: turned upright by its EXIF orientation, and white where it is transparent.

    TensorFlow decodes pixels as they are stored: a phone's photo may lie on its side, and what is transparent is black.
    A file that needs none of this, or that Pillow cannot read, is returned as it is.
    """
    from PIL import Image, ImageOps

    if encoded.startswith(b"\xff\xd8\xff") and not any(mark in encoded for mark in (b"Exif", b"tiff:Orientation")):
        return encoded  # neither EXIF nor XMP says an orientation; Pillow would take ten times as long to find out
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(io.BytesIO(encoded), formats=["JPEG", "PNG", "GIF", "WEBP"]) as image,
        ):
            turned = image.getexif().get(_ORIENTATION, 1) != 1
            known = image.mode[0] not in "IF" and image.width * image.height <= MOST_PIXELS
            if not known or not (turned or image.has_transparency_data):
                return encoded
            mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
            upright = ImageOps.exif_transpose(image)
            plain = upright.convert(mode)
            if upright.has_transparency_data:
                alpha = upright.convert("RGBA").getchannel("A")
                plain = Image.composite(plain, Image.new(mode, plain.size, "white"), alpha)
            output = io.BytesIO()
            plain.save(output, "PNG", compress_level=1)
            return output.getvalue()
    except Exception:  # whatever Pillow raises for a damaged file, which is then found to be bad
        return encoded


_ORIENTATION = 0x0112  # EXIF's tag


def pictures(path: str) -> list[str]:
    """The path itself of a file; the sorted paths of the pictures in a folder and below it, known by their endings."""
    if not os.path.isdir(path):
        return [path]
    files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    found = [file for file in files if (mimetypes.guess_type(file)[0] or "").startswith("image/")]
    if not found:
        raise InputError(f"{path} holds no picture: give a folder with JPEG, PNG, GIF, BMP or WebP files")
    if others := set(files).difference(found):
        note(f"{path}: what is no picture is left out, {len(others):,} in all, such as {min(others)}")
    return found


def _shown(model, crops):
    """What `class_probabilities` is given of a batch of images."""
    size, _, channels = model.input_shape[1:]
    if crops == 1:
        return tf.TensorSpec((None, size, size, channels))
    return tuple(tf.TensorSpec((None, 3, side, side, channels)) for side in multicrop.short_sides(size))
