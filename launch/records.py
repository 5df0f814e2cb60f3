"""The flags that say which records a program reads; a program adds them by `flags.adopt_module_key_flags(records)`."""

from absl import flags

from bn_keras.input.bad_records import SkippedRecords
from bn_keras.input.dataset import Dataset
from bn_keras.input.dataset_formats import read_dataset
from launch.embedded import embedded_data

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "data_dir",
    None,
    "Folder of records: of data_prep, of TFDS, or of TF-Slim's shards. Default: the embedded MNIST digits.",
)
flags.DEFINE_integer(
    "label_base", None, "Label of the first class; needed only for TF-Slim's shards, which do not say it.", 0, 1
)
flags.DEFINE_integer("classes", None, "Number of classes; needed only for TF-Slim's shards, which do not say it.", 2)
flags.DEFINE_enum(
    "on_bad", "fail", ["fail", "skip"], "What to do with a record that cannot be used. skip: leave it out."
)
flags.DEFINE_string(
    "cache",
    None,
    "Copy the records to this local folder first, or into memory: --cache=memory. Default: none; of a bucket, bn_keras "
    "in the system's folder for temporary files.",
)


def read_records(keep: bool = True) -> tuple[Dataset, SkippedRecords | None]:
    """The data set that the flags name, and the counter of records that are left out; None where a bad one is an error.

    Args:
      keep: as in `embedded_data`.
    """
    dataset = read_dataset(FLAGS.data_dir or embedded_data(keep), FLAGS.label_base, FLAGS.classes)
    return dataset, SkippedRecords() if FLAGS.on_bad == "skip" else None


def say_skipped(skipped: SkippedRecords | None) -> None:
    """Says which records were left out, if --on_bad=skip."""
    if skipped is not None:
        print(skipped)
