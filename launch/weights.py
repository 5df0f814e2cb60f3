"""The flag of the weights that a program takes from a run, by `flags.adopt_module_key_flags(weights)`."""

from absl import flags

flags.DEFINE_enum(
    "weights",
    "last",
    ["last", "best", "ema"],
    "Which weights of a run: of its newest step, of its best evaluation, or the averages that --ema keeps.",
)
