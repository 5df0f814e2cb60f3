"""The configuration of a run: everything that its weights and its curve are a function of; standard library only."""

import dataclasses
from typing import Any, ClassVar, Literal, Self

from bn_keras.errors import InputError
from bn_keras.networks.variants import PAPER_BATCH_SIZE, VARIANTS, Variant
from bn_keras.settings import Configuration, setting

MNIST_CONFIG_FILE = "mnist.json"
"""The configuration file of a run of Section 4.1, `MnistConfig`."""

WARMUP_EPOCHS, WARMUP_ABOVE = 5, 256
"""Not in the paper: Goyal et al. (2017), who warm up a linearly scaled rate for 5 epochs at batches above 256."""

LARGEST_RATE = (2 - 2.0**-23) * 2.0**127
"""The largest float32: the learning rate is a float32, and a larger one would be infinite."""


def _read(help, **options):
    """A field whose value is read from the data set or counted on the machine."""
    return setting(help, given=False, **options)


def _free(help, default=dataclasses.MISSING, **options):
    """A field that changes no weight: how far a run goes, or how often something is written."""
    return setting(help, default, on_continuing="free", **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Configuration):
    """The configuration of a run, by default the paper's; each field's help says what it does.

    `bn_keras.training.make_config` makes one that fits a data set.
    """

    FILE: ClassVar[str] = "run.json"

    variant: Variant = setting("Which network of Sections 4.2.2 and 4.2.3.", rows=VARIANTS)
    dataset: str = _read("Name of the data set.")
    dataset_fingerprint: str | None = _read("SHA-256 of the data set's manifest.", default=None)
    train_examples: int = _read("Training examples, which make one epoch.", low=0)
    validation_examples: int = _read("Validation examples, which make one evaluation.", low=0)
    classes: int | None = _read("Classes, each an output of the network.", default=None, low=2, on_continuing="never")
    channels: int | None = _read(
        "Channels of the network's input, 1 or 3.", default=None, low=1, high=3, on_continuing="never"
    )
    image_size: int = setting("Height and width of the network's input in pixels.", 224, low=1)
    width: float = setting(
        "Factor on the number of feature maps of every layer.", 1.0, above=0.0, high=16.0, on_continuing="never"
    )
    augmentation: Literal["imagenet", "shift", "none"] = setting(
        "How training images are changed. imagenet: random crop, mirror, colors; shift: small shift, mirror; none.",
        "imagenet",
    )
    # Not in the paper: Keras's.
    bn_momentum: float = setting(
        "Weight of the old value in batch normalization's moving averages.", 0.99, low=0.0, below=1.0
    )
    normalization_batch: str = setting(
        "Examples that share batch statistics. A number: groups of this size on each device; replica: all of a "
        "device; global: those of all devices together.",
        "32",
    )
    batch_size: int = setting(
        "Images of one step on all devices together; the learning rate grows with it.", PAPER_BATCH_SIZE, low=1
    )
    accumulate: int = setting(
        "Parts in which a device computes its share of a mini-batch, one after another, to need less memory.", 1, low=1
    )
    scale_learning_rate: Literal["linear", "none"] = setting(
        "How the learning rate grows with the batch size. none: not at all.", "linear"
    )
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = setting(
        "Precision of the layers' arithmetic.",
        "float32",
        has_variables=lambda precision: precision == "mixed_float16",  # of its loss scale
    )
    jit_compile: bool = setting("Compile the training step with XLA.", False)
    threads: int | None = setting(
        "CPU threads of one operation, on which the last bits of its sums depend. 0: one for each core.",
        None,
        low=0,
        high=1024,
    )
    ema: float = setting(
        "Weight of the old value in an average of the weights over training, which is evaluated too; 0: no average.",
        0.0,
        low=0.0,
        below=1.0,
        has_variables=bool,
    )
    initial_weights: str = setting(
        "Start from the pretrained weights of a run or of a .keras model, where they fit.", ""
    )
    label_smoothing: float = setting(
        "Share of each label that is divided equally among all classes; 0: none.", 0.0, low=0.0, below=1.0
    )
    mixup: float = setting(
        "MixUp of pairs of images and of their labels, by weights of Beta(MIXUP, MIXUP); 0: none.",
        0.0,
        low=0.0,
        high=1.0,
    )
    rand_augment: float = setting(
        "RandAugment: two of Keras's operations on each training image, of up to this strength; 0: none.",
        0.0,
        low=0.0,
        high=1.0,
    )
    freeze: str = setting(
        "Layers that are not trained. body: all but the classifier; the name of a layer: all up to that one.",
        "",
        on_continuing="never",
    )
    frozen_statistics: bool = setting(
        "Frozen layers normalize by the averages that they start with, not by the mini-batch.", True
    )
    body_learning_rate: float = setting(
        "Initial learning rate of all layers but the classifier, for a mini-batch of 32; 0: the classifier's.",
        0.0,
        low=0.0,
    )
    clip_norm: float = setting(
        "Clip the gradients so that their common norm is at most this; 0: no clipping.", 0.0, low=0.0
    )
    # With batch statistics per replica, their count changes what is learned; None until the devices are counted.
    replicas: int | None = _read("Devices that share a batch.", default=None, low=1)
    seed: int = setting(
        "Random seed of the weights, the order of examples, the augmentation and Dropout.", 0, low=0, high=2**31 - 1
    )
    steps: int = _free("Steps to train, of batch_size images each.", low=0)  # 0: a network that was imported
    eval_every: int = _free("Steps between evaluations.", 40_000, low=1)  # an epoch of ILSVRC2012: 1,281,167 / 32
    eval_batch_size: int = _free("Images of one evaluation step on all devices together.", 250, low=1)
    patience: int = _free("Stop after this many evaluations in a row that are no better; 0: never.", 0, low=0)
    log_every: int = _free("Steps between points of the training curve.", 100, low=1)
    checkpoint_every: int = _free("Steps between checkpoints.", 1_000, low=1)
    population_statistics: int = _free(
        "Also evaluate with the statistics of this many training mini-batches (Algorithm 2); 0: do not.", 0, low=0
    )
    monitor: str = _free(
        "Nonlinearities whose inputs are recorded as in Figure 1: NAME or NAME:MAP, separated by commas.", ""
    )
    monitor_every: int = _free("Steps between records of --monitor.", 1_000, low=1)
    pictures: int = _free(
        "Also show this many training images and worst mistakes in TensorBoard, at each evaluation; 0: none.",
        0,
        low=0,
        high=1024,
    )
    distort_on: Literal["host", "device"] = setting(
        "Where the colors of training images are changed. host: in the input pipeline; device: in the training step.",
        "host",
    )
    builder: str = _read(
        "Function that built the network, if it is not one of this package.", default="", on_continuing="never"
    )
    deterministic: bool = setting("Make GPUs compute the same bits each time, as CPUs do.", True)

    @property
    def initial_learning_rate(self) -> float:
        """The learning rate of the run's batch size; the paper's is for a mini-batch of 32."""
        scale = self.batch_size / PAPER_BATCH_SIZE if self.scale_learning_rate == "linear" else 1.0
        return self.variant.learning_rate * scale

    @property
    def warmup_examples(self) -> int:
        """How many images the warm-up takes, in which the learning rate grows to its initial value; 0: no warm-up."""
        warm = self.scale_learning_rate == "linear" and self.batch_size > WARMUP_ABOVE
        return WARMUP_EPOCHS * self.train_examples if warm else 0

    @property
    def warmup_learning_rate(self) -> float:
        """The learning rate at which the warm-up begins: the rate for a mini-batch of the variant's `warmup_batch`."""
        return self.variant.learning_rate * self.variant.warmup_batch / PAPER_BATCH_SIZE

    @property
    def decay_examples(self) -> int:
        """How many images make one unit of time of the learning rate's schedule."""
        return min(max(1, round(self.variant.decay_epochs * self.train_examples)), 2**62)  # within int64

    def network_arguments(self) -> dict[str, Any]:
        """What `build_network` needs beside the variant."""
        arguments = {name: getattr(self, name) for name in ("image_size", "channels", "classes", "width")}
        arguments["momentum"] = self.bn_momentum
        if self.normalization_batch == "global":
            return arguments | {"synchronized": True}
        # A group as large as the batch needs no groups: the layer is faster without, with the same bits.
        share = self.batch_size // (self.replicas or 1)
        if self.normalization_batch != "replica" and int(self.normalization_batch) < share:
            return arguments | {"virtual_batch_size": int(self.normalization_batch)}
        return arguments

    def start_step(self, examples: int) -> int:
        """The index of the mini-batch that follows after `examples`; rounded up if the batch size was changed."""
        return -(-examples // self.batch_size)

    def check(self) -> None:
        """Refuses settings that cannot work on any devices, or on those known already.

        Raises:
          InputError: names the arguments.
        """
        super().check()
        size, over, title = self.batch_size, self.normalization_batch, self.variant.title
        if self.steps < 1:
            raise InputError("`steps=0` trains nothing: give at least 1")
        if size > self.train_examples:
            raise InputError(
                f"`batch_size={size}` is more than the training images of {self.dataset}: give at most "
                f"{self.train_examples}"
            )
        if self.variant.batch_normalization and size == 1:
            raise InputError(f"`batch_size=1` leaves {title} one image: batch statistics need at least 2 (Section 3.1)")
        if over not in ("replica", "global") and not (over.isdecimal() and int(over) > 1):
            raise InputError(f"`normalization_batch={over}` must be a count of examples above 1, replica or global")
        if self.distort_on == "device" and self.augmentation != "imagenet":
            raise InputError(
                f"`distort_on=device`: `augmentation={self.augmentation}` changes no colors; leave one of them out"
            )
        if self.body_learning_rate and not self.variant.learning_rate:
            raise InputError(
                "`learning_rate=0` leaves no rate for the body: give `freeze=body` to train the classifier alone"
            )
        if self.population_statistics and self.freeze == "body" and self.frozen_statistics:
            raise InputError("`population_statistics`: `freeze=body` leaves no batch normalization to measure")
        if self.population_statistics and not self.variant.batch_normalization:
            raise InputError(f"`population_statistics`: {title} has no batch normalization to measure")
        if self.initial_learning_rate > LARGEST_RATE:
            raise InputError(
                f"`learning_rate={self.variant.learning_rate:g}` is {self.initial_learning_rate:g} at "
                f"`batch_size={size}`, which is infinite in 32 bits: give a lower one"
            )

    def on_devices(self, replicas: int, gpus: bool) -> Self:
        """The configuration for a number of devices, which are GPUs or not.

        Raises:
          InputError: these devices cannot train it.
        """
        self.check()
        config = dataclasses.replace(self, replicas=replicas)
        for name in ("batch_size", "eval_batch_size"):
            if (size := getattr(config, name)) % replicas:
                raise InputError(f"`{name}={size}` cannot be shared by {replicas} devices: give a multiple of that")
        if config.jit_compile and replicas > 1:
            raise InputError("`jit_compile` works on one device: XLA cannot compile the exchange between replicas")
        if config.variant.batch_normalization and config.batch_size == replicas:
            raise InputError(
                f"`batch_size={config.batch_size}` leaves one image to each of {replicas} devices: "
                "batch statistics need at least 2 (Section 3.1)"
            )
        if (parts := config.accumulate) > 1:
            group = config.normalization_batch if config.variant.batch_normalization else "1"
            if not group.isdecimal():
                raise InputError(f"`accumulate={parts}` cannot work with `normalization_batch={group}`: give a number")
            if (share := config.batch_size // replicas) % (parts * int(group)):
                raise InputError(
                    f"`accumulate={parts}` cannot divide a device's {share} images into parts of whole groups of "
                    f"{group} (`normalization_batch`): give a divisor of {share // int(group) or 1}"
                )
        if gpus and config.deterministic and config.jit_compile:
            raise InputError(
                "`jit_compile`: on GPUs, XLA's gradient of max pooling is not the same each time; "
                "fix: `deterministic=False`, or without `jit_compile`"
            )
        return config
