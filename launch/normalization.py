"""The flags of the statistics by which a trained network normalizes; a program adopts them like those of `records`."""

from absl import flags

flags.DEFINE_enum(
    "statistics",
    "moving",
    ["moving", "population"],
    "Batch normalization by moving averages, or by Algorithm 2 on training images of --data_dir.",
)
flags.DEFINE_integer(
    "statistics_steps", 100, "How many training mini-batches population statistics are measured on.", 1
)
