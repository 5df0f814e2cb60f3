"""Turns an image data set into TFRecord shards with a manifest.

  python -m data_prep --embedded=mnist --output_dir=D                    5,000 real digits, no download
  python -m data_prep --images=FOLDER --output_dir=D                     a folder for each class; a fifth is validation
  python -m data_prep --train=FOLDER --validation=FOLDER --output_dir=D  the same, but split already
  python -m data_prep --tfds=cifar10 --output_dir=D                      a data set that TensorFlow Datasets downloads
  python -m data_prep --imagenet=FOLDER --output_dir=D                   ImageNet (ILSVRC2012), archives or extracted
  python -m data_prep verify D                                           checks the records in D

The same command again continues an interrupted conversion.
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback before `program.run` handles it
if not __package__:  # run by its path: the folder above has the packages, this one would hide others
    sys.path[0] = str(Path(__file__).parents[1])

import os
import shlex
import tempfile

from absl import flags

from data_prep import program, signals
from data_prep.errors import InputError
from data_prep.json_files import MOST
from data_prep.sources import embedded
from data_prep.sources.dataset import Dataset

FLAGS = flags.FLAGS


def _cores() -> int:
    """How many cores this process may use; macOS does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


flags.DEFINE_string(
    "images", "", "Images to split: a folder or archive with a folder for each class, or one that holds train and val."
)
flags.DEFINE_float(
    "validation_share",
    None,
    "Share of each class that goes to validation, if images are not split. Default: 0.2.",
    0,
    1,
)
flags.DEFINE_enum("embedded", None, embedded.NAMES, "Convert this small data set, which needs no download.")
flags.DEFINE_string("tfds", "", "Name of a data set of TensorFlow Datasets, which downloads it, such as cifar10.")
flags.DEFINE_string(
    "imagenet", "", "Folder or archive with ILSVRC2012: of image-net.org, torchvision, Kaggle or Hugging Face."
)
flags.DEFINE_string(
    "label_column", "", "Column of Parquet files that holds the class. Default: the one that is called so."
)
flags.DEFINE_string(
    "train",
    "",
    "Training images: a folder with a folder for each class, a tar or zip of it, tars of classes, or Parquet.",
)
flags.DEFINE_string("validation", "", "Validation images, in the same forms; ILSVRC2012_img_val.tar needs --devkit.")
flags.DEFINE_string(
    "devkit", "", "ILSVRC2012_devkit_t12.tar.gz or its folder, with names of classes and validation labels."
)
flags.DEFINE_string("train_boxes", "", "ILSVRC2012_bbox_train_v2.tar.gz or a folder of annotations.")
flags.DEFINE_string("validation_boxes", "", "ILSVRC2012_bbox_val_v3.tgz or a folder of annotations.")
flags.DEFINE_bool(
    "strict_imagenet", False, "Fail unless there are 1,000 synsets, 1,281,167 training and 50,000 validation images."
)
flags.DEFINE_string("output_dir", "", "Folder for the shards and the manifest: a new or empty one, or one to finish.")
flags.DEFINE_string("name", "", "Name of the data set. Default: that of its archive, or of the folder above --train.")
flags.DEFINE_integer("seed", 0, "Random seed of the shuffle and of splits.", 0, MOST)
flags.DEFINE_integer(
    "label_base", 1, "Label of the first class: 1 as in TF-Slim, where 0 is background, or 0 as in TFDS.", 0, 1
)
flags.DEFINE_integer("train_shards", 0, "Number of training shards; 0: a number that fits the size.", 0, 99999)
flags.DEFINE_integer("validation_shards", 0, "Number of validation shards; 0: a number that fits the size.", 0, 99999)
flags.DEFINE_integer("limit", 0, "Most images in each split, chosen at random; 0: all.", 0, MOST)
flags.DEFINE_integer(
    "max_side", 0, "Shrink images whose larger side has more pixels than this, such as 500; 0: never.", 0, MOST
)
flags.DEFINE_enum(
    "duplicates",
    "report",
    ["report", "drop"],
    "Training images with the bytes of a validation image. report: count and list them; drop: also leave them out.",
)
flags.DEFINE_enum(
    "orientation",
    None,
    ["apply", "keep"],
    "EXIF orientation. apply: turn pictures upright; keep: as stored. Default: keep for ImageNet, else apply.",
)
flags.DEFINE_integer("quality", 95, "JPEG quality of images that are re-encoded (shrunk or repaired).", 1, 100)
flags.DEFINE_integer("workers", _cores(), "Number of processes; the output does not depend on it.", 1)
flags.DEFINE_enum(
    "on_bad",
    "fail",
    ["fail", "skip", "report"],
    "Bad images. fail: stop at the first; skip: leave them out; report: list all of them, then fail.",
)
flags.DEFINE_enum(
    "verify",
    "crc",
    ["none", "crc", "decode"],
    "Checks. none; crc: read every shard back; decode: also decode every image, to find damage in pixels.",
)
flags.DEFINE_enum("runner", "local", ["local", "beam"], "What runs the conversion: local processes, or Apache Beam.")
flags.DEFINE_string("beam_options", "", "Beam's own flags, such as '--runner=DataflowRunner --project=P --region=R'.")
flags.DEFINE_bool("dry_run", False, "Print what would be done; write nothing.")


def _dataset() -> Dataset:
    """The data set that the flags name."""
    from data_prep import shard
    from data_prep.sources import ilsvrc2012, tfds

    ways = ("images", "embedded", "tfds", "imagenet", "train")
    named = [f"--{way}" for way in ways if FLAGS[way].value] or ["--validation"] * bool(FLAGS.validation)
    if not named or (named == ["--train"] and not FLAGS.validation) or named == ["--validation"]:
        raise InputError(
            "what to convert? Give --images=FOLDER, or --train=FOLDER and --validation=FOLDER, or --imagenet=FOLDER, "
            "or --tfds=NAME, or --embedded=mnist"
        )
    if len(named) > 1 and named != ["--imagenet", "--train"]:
        raise InputError(f"{' and '.join(named)}: give one or the other")
    if FLAGS.validation_share is not None and not (FLAGS.images or FLAGS.tfds):
        raise InputError("--validation_share needs --images or --tfds, a set of images that is not split yet")
    unpacked = os.path.join(FLAGS.output_dir, shard.WORK_FOLDER, "unpacked")
    if FLAGS.dry_run:
        temporary = tempfile.TemporaryDirectory()
        signals.cleanups.append(temporary.cleanup)
        unpacked = temporary.name
    if FLAGS.embedded:
        return embedded.dataset(FLAGS.embedded, FLAGS.seed, unpacked)
    if FLAGS.tfds:
        return tfds.dataset(FLAGS.tfds, FLAGS.name, FLAGS.validation_share, FLAGS.seed, unpacked)
    given = {"strict": FLAGS.strict_imagenet, "label_column": FLAGS.label_column, "seed": FLAGS.seed}
    if FLAGS.images:
        given["share"] = FLAGS.validation_share
        return ilsvrc2012.of_images(FLAGS.images, FLAGS.name, ilsvrc2012.Given(**given), unpacked)
    parts = {part: FLAGS[part].value for part in ("train", "validation", "devkit", "train_boxes", "validation_boxes")}
    name = FLAGS.name or (ilsvrc2012.NAME if _of_imagenet() else "")
    return ilsvrc2012.dataset(ilsvrc2012.find(FLAGS.imagenet, parts), name, ilsvrc2012.Given(**given), unpacked)


def _of_imagenet() -> bool:
    """Whether the data set is ImageNet, whose pixels are not turned."""
    return any(
        FLAGS[flag].value for flag in ("imagenet", "strict_imagenet", "devkit", "train_boxes", "validation_boxes")
    )


def _convert() -> int:
    from data_prep import convert, plan

    if not FLAGS.output_dir:
        raise InputError("--output_dir is missing: where shall the shards go?")
    if FLAGS.validation_share in (0, 1):
        raise InputError(f"--validation_share={FLAGS.validation_share}: give a number between 0 and 1, such as 0.2")
    if FLAGS.beam_options and FLAGS.runner != "beam":
        raise InputError("--beam_options needs --runner=beam")
    try:
        beam_options = shlex.split(FLAGS.beam_options) if FLAGS.runner == "beam" else None
    except ValueError as error:
        raise InputError(f"--beam_options={FLAGS.beam_options}: {error}") from None
    convert.convert(
        _dataset(),
        FLAGS.output_dir,
        plan.Options(
            seed=FLAGS.seed,
            label_base=FLAGS.label_base,
            train_shards=FLAGS.train_shards,
            validation_shards=FLAGS.validation_shards,
            limit=FLAGS.limit,
            max_side=FLAGS.max_side,
            quality=FLAGS.quality,
            decode=FLAGS.verify == "decode",
            drop_duplicates=FLAGS.duplicates == "drop",
            upright=(FLAGS.orientation or ("keep" if _of_imagenet() else "apply")) == "apply",
        ),
        workers=FLAGS.workers,
        on_bad=FLAGS.on_bad,
        reread=FLAGS.verify != "none",
        beam_options=beam_options,
        dry_run=FLAGS.dry_run,
        log=lambda text: print(program.escaped(text, line=True)),
    )
    return 0


def _verify(folder: str) -> int:
    from data_prep import verify

    findings, records = verify.verify(folder, FLAGS.verify == "decode", FLAGS.workers)
    if findings:
        shown = [program.escaped(finding, line=True) for finding in findings]
        print("\n".join([f"{len(findings)} finding(s):", *shown]), file=sys.stderr)
        return program.BAD_INPUT
    print(f"{folder}: {records:,} records, all whole")
    return 0


def _main(arguments: list[str]) -> int:
    match arguments:
        case []:
            return _convert()
        case [folder] if folder != "verify" and os.path.exists(folder) and not FLAGS.images:
            FLAGS["images"].value = folder
            return _convert()
        case ["verify"] if FLAGS.output_dir:
            return _verify(FLAGS.output_dir)
        case ["verify", folder]:
            return _verify(folder)
        case ["verify"]:
            raise InputError("verify what? Give the folder: verify FOLDER")
        case _:
            raise InputError(
                f"{arguments[0]!r} is no folder or archive of images, and no command; the one command is: verify FOLDER"
            )


def run() -> None:
    """The program, as `python -m data_prep` and as console script."""
    program.run(_main, __doc__, least_arguments=0, continues=True)


if __name__ == "__main__":
    run()
