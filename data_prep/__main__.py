"""Turns an image data set into TFRecord shards with a manifest.

  python -m data_prep --embedded=mnist --output_dir=D                    5,000 real digits, no download
  python -m data_prep --train=FOLDER --validation=FOLDER --output_dir=D  one folder a class
  python -m data_prep --imagenet=FOLDER --output_dir=D                   ILSVRC2012, as archives or extracted
  python -m data_prep verify D                                           checks what is in D

The same command again goes on where it was interrupted.
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
from data_prep.sources import embedded

FLAGS = flags.FLAGS


def _cores() -> int:
    """How many cores this process may use; macOS does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


flags.DEFINE_enum("embedded", None, embedded.NAMES, "Convert this small data set, which needs no download.")
flags.DEFINE_string("imagenet", "", "Folder with ILSVRC2012: the release's archives, torchvision's tree or Kaggle's.")
flags.DEFINE_string(
    "train", "", "Training images: a folder with one folder a class, or a tar of these or of class tars."
)
flags.DEFINE_string("validation", "", "Validation images, likewise; ILSVRC2012_img_val.tar needs --devkit.")
flags.DEFINE_string("devkit", "", "ILSVRC2012_devkit_t12.tar.gz or its folder: synset words and validation labels.")
flags.DEFINE_string("train_boxes", "", "ILSVRC2012_bbox_train_v2.tar.gz or a folder of annotations.")
flags.DEFINE_string("validation_boxes", "", "ILSVRC2012_bbox_val_v3.tgz or a folder of annotations.")
flags.DEFINE_bool("strict_imagenet", False, "Assert 1,000 synsets, 1,281,167 training and 50,000 validation images.")
flags.DEFINE_string("output_dir", "", "Where shards and manifest go: a new or empty folder, or one to finish.")
flags.DEFINE_string("name", "", "Name of the data set; by default that of its archive, or of the folder above --train.")
flags.DEFINE_integer("seed", 0, "Of the shuffle, and of the split of embedded data.")
flags.DEFINE_integer("label_base", 1, "Label of the first class; TF-Slim's is 1 (0 is background), TFDS's 0.", 0)
flags.DEFINE_integer("train_shards", 0, "Number of training shards; 0: by size.", 0, 99999)
flags.DEFINE_integer("validation_shards", 0, "Number of validation shards; 0: by size.", 0, 99999)
flags.DEFINE_integer("limit", 0, "At most so many images a split, a random choice; 0: all.", 0)
flags.DEFINE_integer("max_side", 0, "Shrink images whose larger side has more pixels, such as 500; 0: never.", 0)
flags.DEFINE_integer("quality", 95, "JPEG quality of images that are re-encoded (shrunk or repaired).", 1, 100)
flags.DEFINE_integer("workers", _cores(), "Processes; the output does not depend on it.", 1)
flags.DEFINE_enum("on_bad", "fail", ["fail", "skip", "report"], "Bad images: stop; leave out; list all, then fail.")
flags.DEFINE_enum(
    "verify",
    "crc",
    ["none", "crc", "decode"],
    "Check: nothing; read every shard back; also decode every image, which finds damage that no header shows.",
)
flags.DEFINE_enum("runner", "local", ["local", "beam"], "What runs the work: local processes, or Apache Beam.")
flags.DEFINE_string("beam_options", "", "Beam's own flags, such as '--runner=DataflowRunner --project=P --region=R'.")
flags.DEFINE_bool("dry_run", False, "Say what would be done; write nothing.")


def _dataset():
    """The data set that the flags name."""
    from data_prep import shard, storage
    from data_prep.sources import ilsvrc2012, image_folder

    if FLAGS.embedded:
        if FLAGS.train or FLAGS.validation or FLAGS.imagenet:
            raise InputError("--embedded needs no --train, --validation or --imagenet; give one or the other")
        folder = os.path.join(FLAGS.output_dir, shard.WORK_FOLDER, "images")
        if FLAGS.dry_run:
            temporary = tempfile.TemporaryDirectory()
            signals.cleanups.append(temporary.cleanup)
            folder = temporary.name
        return embedded.dataset(FLAGS.embedded, FLAGS.seed, folder)
    if not FLAGS.imagenet and not (FLAGS.train and FLAGS.validation):
        raise InputError(
            "what to convert? Give --embedded=mnist, or --train=FOLDER and --validation=FOLDER, or --imagenet=FOLDER"
        )
    parts = {part: FLAGS[part].value for part in ("train", "validation", "devkit", "train_boxes", "validation_boxes")}
    of_imagenet = any((FLAGS.imagenet, FLAGS.strict_imagenet, *list(parts.values())[2:]))
    given = (FLAGS.train, FLAGS.validation)
    if of_imagenet or any(storage.exists(path) and not storage.is_folder(path) for path in given):
        name = FLAGS.name or (ilsvrc2012.NAME if of_imagenet else "")
        return ilsvrc2012.dataset(ilsvrc2012.find(FLAGS.imagenet, parts), name, FLAGS.strict_imagenet)
    return image_folder.dataset(FLAGS.train, FLAGS.validation, FLAGS.name)


def _convert() -> None:
    from data_prep import convert, plan

    if not FLAGS.output_dir:
        raise InputError("--output_dir is missing: where shall the shards go?")
    if FLAGS.beam_options and FLAGS.runner != "beam":
        raise InputError("--beam_options needs --runner=beam")
    dataset = _dataset()
    convert.convert(
        dataset,
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
        ),
        workers=FLAGS.workers,
        on_bad=FLAGS.on_bad,
        reread=FLAGS.verify != "none",
        beam_options=shlex.split(FLAGS.beam_options) if FLAGS.runner == "beam" else None,
        dry_run=FLAGS.dry_run,
        log=lambda text: print(program.escaped(text, line=True)),
    )
    if FLAGS.embedded:
        embedded.remove(dataset)


def _verify(folder: str) -> int:
    from data_prep import verify

    findings, records = verify.verify(folder, FLAGS.verify == "decode", FLAGS.workers)
    if findings:
        shown = [program.escaped(finding, line=True) for finding in findings]
        print("\n".join([f"{len(findings)} finding(s):", *shown]), file=sys.stderr)
        return program.BAD_INPUT
    print(f"{folder}: {records:,} records, all whole")
    return 0


def _main(arguments: list[str]) -> int | None:
    match arguments:
        case []:
            return _convert()
        case ["verify"] if FLAGS.output_dir:
            return _verify(FLAGS.output_dir)
        case ["verify", folder]:
            return _verify(folder)
        case ["verify"]:
            raise InputError("verify what? Give the folder: verify FOLDER")
        case [unknown, *_]:
            raise InputError(f"unknown command or argument {unknown!r}; the one command is: verify FOLDER")


def run() -> None:
    """The program, as `python -m data_prep` and as console script."""
    program.run(_main, __doc__, least_arguments=0, continues=True)


if __name__ == "__main__":
    run()
