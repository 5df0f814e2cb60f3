"""Turns an image data set into TFRecord shards with a manifest.

  python -m data_prep --embedded=mnist --output_dir=D                    5,000 real digits, no download
  python -m data_prep --train=FOLDER --validation=FOLDER --output_dir=D  one folder a class, JPEG or PNG

The same command again goes on where it was interrupted.
"""

import os
import sys

from absl import app, flags

from data_prep import embedded
from data_prep.errors import InputError

FLAGS = flags.FLAGS

flags.DEFINE_enum("embedded", None, embedded.NAMES, "Convert this small data set, which needs no download.")
flags.DEFINE_string("train", None, "Folder with one folder of training images a class.")
flags.DEFINE_string("validation", None, "Folder with one folder of validation images a class.")
flags.DEFINE_string("output_dir", None, "Where shards and manifest go: a new or empty folder, or one to finish.")
flags.DEFINE_string("name", "", "Name of the data set in the manifest; by default the folder above --train.")
flags.DEFINE_integer("seed", 0, "Of the shuffle, and of the split of embedded data.")
flags.DEFINE_integer("label_base", 1, "Label of the first class; TF-Slim's is 1 (0 is background), TFDS's 0.", 0)
flags.DEFINE_integer("train_shards", 0, "Number of training shards; 0: by size.", 0)
flags.DEFINE_integer("validation_shards", 0, "Number of validation shards; 0: by size.", 0)
flags.DEFINE_integer("workers", len(os.sched_getaffinity(0)), "Processes; the output does not depend on it.", 1)
flags.DEFINE_enum("on_bad", "fail", ["fail", "skip", "report"], "Bad images: stop; leave out; list all, then fail.")
flags.DEFINE_enum(
    "verify",
    "crc",
    ["none", "crc", "decode"],
    "Check: nothing; read every shard back; also decode every image, which finds damage that no header shows.",
)


def _dataset():
    """The data set that the flags name."""
    from data_prep import convert, image_folder

    if not FLAGS.output_dir:
        raise InputError("--output_dir is missing: where shall the shards go?")
    if FLAGS.embedded:
        if FLAGS.train or FLAGS.validation:
            raise InputError("--embedded needs no --train or --validation; give one or the other")
        folder = os.path.join(FLAGS.output_dir, convert.WORK_FOLDER, "images")
        return embedded.dataset(FLAGS.embedded, FLAGS.seed, folder)
    if not (FLAGS.train and FLAGS.validation):
        raise InputError("what to convert? Give --embedded=mnist, or both --train=FOLDER and --validation=FOLDER")
    return image_folder.dataset(FLAGS.train, FLAGS.validation, FLAGS.name)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise InputError(f"unexpected argument {argv[1]!r}; see --help")
    from data_prep import convert

    dataset = _dataset()
    convert.convert(
        dataset,
        FLAGS.output_dir,
        convert.Options(
            seed=FLAGS.seed,
            label_base=FLAGS.label_base,
            train_shards=FLAGS.train_shards,
            validation_shards=FLAGS.validation_shards,
            decode=FLAGS.verify == "decode",
        ),
        workers=FLAGS.workers,
        on_bad=FLAGS.on_bad,
        reread=FLAGS.verify != "none",
    )
    if FLAGS.embedded:
        embedded.remove(dataset)


def _main(argv: list[str]) -> int:
    try:
        main(argv)
    except (InputError, OSError) as error:
        print(f"data_prep: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndata_prep: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def run() -> None:
    """The program, as `python -m data_prep` and as console script."""
    if __name__ != "__main__":  # a console script: absl's --help looks for the flags and text of this module
        sys.argv[0] = __name__
        sys.modules["__main__"].__doc__ = __doc__
    app.run(_main)


if __name__ == "__main__":
    run()
