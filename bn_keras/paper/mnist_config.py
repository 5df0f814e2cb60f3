"""The configuration of Section 4.1's run; standard library only."""

import dataclasses
from typing import ClassVar

from bn_keras.runs.run_config import MNIST_CONFIG_FILE
from bn_keras.settings import Configuration, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class MnistConfig(Configuration):
    """All settings of the two networks' training, by default the paper's; each field's help says what it does."""

    FILE: ClassVar[str] = MNIST_CONFIG_FILE

    dataset: str = setting("Name of the data set.", given=False)
    dataset_fingerprint: str = setting("SHA-256 of the data set's manifest.", given=False)
    train_examples: int = setting("Training examples, which make one epoch.", given=False, low=1)
    test_examples: int = setting("Examples of the validation split, which are the test images.", given=False, low=1)
    steps: int = setting("Steps to train both networks.", 50_000, low=1, on_continuing="free")
    batch_size: int = setting("Images of one step.", 60, low=2)
    # Not in the paper: ours, a rate at which both networks learn.
    learning_rate: float = setting("Learning rate of plain SGD.", 0.1, low=0.0)
    # Not in the paper: ours, "small".
    weight_deviation: float = setting("Standard deviation of the Gaussian initial weights.", 0.1, low=0.0)
    seed: int = setting("Random seed of the weights and the order of examples.", 0, low=0, high=2**31 - 1)
    eval_every: int = setting("Steps between points of the figure.", 250, low=1, on_continuing="free")
