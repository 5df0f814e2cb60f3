"""The networks as a table of frozen rows, those of Sections 4.2.2 and 4.2.3 first; standard library only.

Every row is a `replace` of an earlier one, as the paper tells it: BN-Baseline is Inception with Batch Normalization
before each nonlinearity, the accelerated networks are BN-Baseline with the seven changes of Section 4.2.1, each
control is Inception with one thing moved, and the six networks of the ensemble are BN-x30 with a mix of three changes.
Networks that others published follow.

    >>> VARIANTS["bn_x30"].learning_rate
    0.045
"""

import dataclasses
from dataclasses import replace
from typing import Any, Literal, Self

from bn_keras.settings import setting

PAPER_BATCH_SIZE = 32
"""Section 4.2: "mini-batches of size 32". Each learning rate and number of steps in the table is for batches of 32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One network and the way it is trained; each setting's help says what it does.

    Attributes:
      name: the value of `--variant`.
      title: the paper's name, for plots and tables.
      steps: how long it is trained by default, in steps of 32 images.
    """

    name: str
    title: str
    steps: int
    network: str = setting(
        "Module of bn_keras.networks that builds the network.", "inception", given=False, on_continuing="never"
    )
    learning_rate: float = setting("Initial learning rate of SGD for a mini-batch of 32.", low=0.0)
    schedule: Literal["exponential", "steps", "cosine"] = setting(
        "How the learning rate falls. exponential: by 4% every --decay_epochs; steps: to a tenth after 3, 6 and 8 "
        "times --decay_epochs; cosine: to 0 over 9 times --decay_epochs.",
        "exponential",
    )
    decay_epochs: float = setting("Epochs that make one unit of the schedule's time.", above=0.0)
    # Not in the paper: GoogLeNet's.
    momentum: float = setting("Momentum of SGD: weight of the old velocity.", 0.9, low=0.0, below=1.0)
    warmup_batch: int = setting(
        "Warm-up starts at the learning rate of a mini-batch of this size.", PAPER_BATCH_SIZE, given=False, low=1
    )
    # Not in the paper: TF-Slim's.
    input_convention: Literal["tensorflow", "torch", "caffe"] = setting(
        "Pixels that the first convolution gets. tensorflow: in [-1, 1]; torch: minus ImageNet's mean color, divided "
        "by its deviation; caffe: 0 to 255, minus a mean color.",
        "tensorflow",
    )
    l2_weight: float = setting(
        "L2 regularization (weight decay): the gradient of each kernel w gets this factor times w added.", low=0.0
    )
    dropout: float = setting(
        "Fraction of the classifier's inputs set to 0 in training.", 0.0, low=0.0, high=0.999, has_variables=bool
    )
    shuffling: Literal["within_shard", "shard_order"] = setting(
        "Order of examples. within_shard: all examples of several shards are mixed; shard_order: only the shards are.",
        "within_shard",
    )
    photometric_distortion: Literal["full", "reduced", "none"] = setting(
        "How much the colors of training images are changed; reduced: half of full.", "reduced"
    )
    batch_normalization: bool = setting(
        "Batch normalization before every nonlinearity but the softmax (Section 3.2); convolutions then have no bias.",
        True,
        on_continuing="never",
        network="inception",
    )
    activation: Literal["relu", "sigmoid"] = setting("The nonlinearity.", "relu", network="inception")
    initial_weight_scale: float = setting(
        "Factor on the deviation of the convolutions' initial weights.", 1.0, above=0.0, network="inception"
    )
    per_activation_modules: int = setting(
        "How many of Figure 5's last modules normalize each activation, not each channel.",
        0,
        low=0,
        high=10,
        on_continuing="never",
        network="inception",
    )
    local_response_normalization: bool = setting(
        "Local response normalization after the first pooling and after the 3x3 convolution with 192 maps.",
        False,
        network="inception",
    )
    separable_stem: bool = setting(
        "Makes the first 7x7 convolution separable: depthwise with multiplier 8, then 1x1 (Figure 5).",
        True,
        on_continuing="never",
        network="inception",
    )
    # 128 is in the figure's projection column, but makes 608 maps, not the 576 of its output column, and 1056 after 4e.
    projection_4c_4d: int = setting(
        "Feature maps of the pool projections in the modules 4c and 4d.",
        96,
        choices=(96, 128),
        on_continuing="never",
        network="inception",
    )
    # Not in the paper: TF-Slim's.
    padding: Literal["tensorflow", "caffe"] = setting(
        "Padding of strided convolutions and poolings. tensorflow: SAME; caffe: alike on all sides, and averaged.",
        "tensorflow",
        network="inception",
    )
    # Not in the paper: TF-Slim's.
    epsilon: float = setting(
        "Constant that batch normalization adds to the variance.", 1e-3, above=0.0, network="inception"
    )
    depth: int = setting(
        "Number of layers with weights.",
        0,
        given=False,
        choices=(0, 18, 50),
        on_continuing="never",
        network="resnet",
    )

    @classmethod
    def own(cls, name: str, **settings: Any) -> Self:
        """Makes a row that is not in the table."""
        return cls(name=name, title=name, steps=0, **settings)


_INCEPTION = Variant(
    name="inception",
    title="Inception",
    batch_normalization=False,
    activation="relu",
    learning_rate=0.0015,
    decay_epochs=8.0,  # not in the paper: GoogLeNet
    l2_weight=2e-4,  # not in the paper: Caffe's GoogLeNet
    dropout=0.4,  # Section 4.2.3
    initial_weight_scale=1.0,
    per_activation_modules=0,
    local_response_normalization=True,
    shuffling="shard_order",
    photometric_distortion="full",
    steps=31_000_000,
)

_BN_BASELINE = replace(
    _INCEPTION,
    name="bn_baseline",
    title="BN-Baseline",
    batch_normalization=True,
)


def _accelerated(rate_factor: float) -> dict:
    """Applies the seven changes of Section 4.2.1 in order. The first, the learning rate, differs by network."""
    return {
        "learning_rate": _BN_BASELINE.learning_rate * rate_factor,  # 1. increase the learning rate
        "dropout": 0.0,  # 2. remove Dropout
        "l2_weight": _BN_BASELINE.l2_weight / 5,  # 3. reduce the L2 weight regularization by a factor of 5
        "decay_epochs": _BN_BASELINE.decay_epochs / 6,  # 4. decay the learning rate 6 times faster
        "local_response_normalization": False,  # 5. remove Local Response Normalization
        "shuffling": "within_shard",  # 6. shuffle training examples more thoroughly
        "photometric_distortion": "reduced",  # 7. reduce the photometric distortions
    }


_BN_X5 = replace(
    _BN_BASELINE,
    name="bn_x5",
    title="BN-x5",
    **_accelerated(5),
    steps=6_000_000,  # not in the paper: as long as BN-x30
)

_BN_X30 = replace(
    _BN_X5,
    name="bn_x30",
    title="BN-x30",
    learning_rate=_BN_BASELINE.learning_rate * 30,
    steps=6_000_000,  # Section 4.2.2: 74.8% after 6e6 steps
)

_BN_X5_SIGMOID = replace(
    _BN_X5,
    name="bn_x5_sigmoid",
    title="BN-x5-Sigmoid",
    activation="sigmoid",
)

_INCEPTION_X5 = replace(
    _INCEPTION,
    name="inception_x5",
    title="Inception at 5x the rate",
    learning_rate=_INCEPTION.learning_rate * 5,  # Section 4.2.2: the parameters reach machine infinity
)

_INCEPTION_SIGMOID = replace(
    _INCEPTION,
    name="inception_sigmoid",
    title="Inception with sigmoid",
    activation="sigmoid",  # Section 4.2.2: never better than chance
)


def _ensemble(number: int, **changes) -> Variant:
    """One of the six networks of Section 4.2.3."""
    name, title = f"ensemble_{number}", f"Ensemble member {number}"
    return replace(_BN_X30, name=name, title=title, **changes)


# Section 4.2.3: each is BN-x30 with some of: increased initial weights in the convolutional layers, Dropout of 5% or
# 10%, per-activation BN with the last hidden layers. Which network has which, by how much the weights are increased and
# how many layers are the last is not in the paper: ours.
_ENSEMBLE = (
    _ensemble(1, initial_weight_scale=2.0),  # not in the paper: our mix
    _ensemble(2, dropout=0.05),  # not in the paper: our mix
    _ensemble(3, per_activation_modules=1),  # not in the paper: our mix
    _ensemble(4, dropout=0.1, initial_weight_scale=2.0),  # not in the paper: our mix
    _ensemble(5, dropout=0.1, per_activation_modules=2),  # not in the paper: our mix
    _ensemble(6, dropout=0.05, initial_weight_scale=1.5, per_activation_modules=1),  # not in the paper: our mix
)


def _resnet(depth: int) -> Variant:
    """He et al. (2015) as trained by Goyal et al. (2017), Section 5.1, whose values are below; not in the paper."""
    return Variant(
        name=f"resnet{depth}",
        title=f"ResNet-{depth}",
        network="resnet",
        depth=depth,
        learning_rate=0.1 * PAPER_BATCH_SIZE / 256,  # 0.1 for 256 images
        schedule="steps",
        decay_epochs=10.0,  # tenths after 30, 60 and 80 epochs
        warmup_batch=256,
        l2_weight=1e-4,
        photometric_distortion="none",
        steps=90 * 1_281_167 // PAPER_BATCH_SIZE,  # 90 epochs
    )


VARIANTS: dict[str, Variant] = {
    row.name: row
    for row in (
        _INCEPTION,
        _BN_BASELINE,
        _BN_X5,
        _BN_X30,
        _BN_X5_SIGMOID,
        _INCEPTION_X5,
        _INCEPTION_SIGMOID,
        *_ENSEMBLE,
        _resnet(18),
        _resnet(50),
    )
}
