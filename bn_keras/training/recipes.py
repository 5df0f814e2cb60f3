"""What a run does where its flags are silent: the paper's recipe, and three for small sets; standard library only."""

import dataclasses
import math

from bn_keras.input.dataset import Dataset
from bn_keras.networks.variants import Variant


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Defaults of a run.

    Attributes:
      name: for the log.
      image_size: height and width of the network's input in pixels.
      width: factor on the network's feature maps.
      augmentation: "imagenet", "shift" or "none".
      bn_momentum: weight of the old value in the moving averages.
      steps: of 32 images; None for the variant's own.
      eval_every, log_every, checkpoint_every, monitor_every: in steps.
      eval_batch_size: images of one evaluation step.
    """

    name: str
    image_size: int
    width: float
    augmentation: str
    bn_momentum: float
    steps: int | None
    eval_every: int
    eval_batch_size: int
    log_every: int
    checkpoint_every: int
    monitor_every: int


PAPER = Recipe(
    name="the paper's",
    image_size=224,
    width=1.0,
    augmentation="imagenet",
    bn_momentum=0.99,  # not in the paper: Keras's
    steps=None,
    eval_every=40_000,  # about an epoch of ILSVRC2012: 1,281,167 / 32
    eval_batch_size=250,
    log_every=100,
    checkpoint_every=1_000,
    monitor_every=1_000,
)

MOST_DECAYS = 112
"""Of the learning rate in a run of a small set, to 1% of its start. BN-x30 has as many in its 6 million steps."""

SMALL_SET = 100_000
"""Sets of larger images with fewer of them to train on get the recipe of small photo sets."""

PHOTOS = dataclasses.replace(
    PAPER,
    name="the small photo set's",
    image_size=128,
    width=0.5,
    bn_momentum=0.9,  # after a first try of 60 steps, 0.99 would be half the initial 0 and 1: accuracy at chance
    steps=5_000,  # 160,000 images, at 128x128 and half the width about a tenth of the paper's work for each
    eval_every=250,
    log_every=10,
    checkpoint_every=100,
    monitor_every=250,
)

SMALL_IMAGE = 64
"""Sets whose median short side is at most so many pixels get a small recipe."""

SMALL = Recipe(
    name="the small network's",
    image_size=64,  # Figure 5 divides its input by 32; 28x28 digits would end as one pixel before module 5
    width=0.25,
    augmentation="none",  # a mirrored digit is another digit
    bn_momentum=0.9,  # 0.99 averages 100 steps, too many to follow the weights in the first 50
    steps=500,
    eval_every=50,
    eval_batch_size=250,
    log_every=10,
    checkpoint_every=50,
    monitor_every=50,
)


SMALL_COLOR = dataclasses.replace(
    SMALL,
    name="the small color network's",
    augmentation="shift",  # a mirrored cat is a cat; a crop of 8% of 32x32 pixels is 9x9
    bn_momentum=0.99,
    steps=20_000,  # 12.8 epochs of CIFAR-10
    eval_every=1_000,
    log_every=50,
    checkpoint_every=500,
)


def recipe_for(dataset: Dataset) -> Recipe:
    """The recipe that fits a data set's images."""
    if dataset.median_short_side > SMALL_IMAGE:
        return PHOTOS if dataset.examples("train") < SMALL_SET else PAPER
    return SMALL if dataset.channels == 1 else SMALL_COLOR


def decay_epochs_for(recipe: Recipe, variant: Variant, examples: int, train_examples: int) -> float:
    """Epochs of `train_examples` between two decays of the learning rate, in a run that sees `examples`.

    The variant's, which are for ImageNet's epochs, as long as the rate then falls at most `MOST_DECAYS` times: 167
    photos are seen a thousand times in 5,000 steps. The paper's recipe keeps the variant's.
    """
    if recipe is PAPER:
        return variant.decay_epochs
    return max(variant.decay_epochs, spanning_decay_epochs(examples, train_examples))


def spanning_decay_epochs(examples: int, train_examples: int) -> float:
    """The fewest epochs between decays with which a rate falls at most `MOST_DECAYS` times in a run of `examples`."""
    return math.ceil(examples / (MOST_DECAYS + 1)) / train_examples
