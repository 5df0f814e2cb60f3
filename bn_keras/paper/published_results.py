"""The paper's results of its networks, Figure 3, by the name of the variant; standard library only.

A network that is not in this table was not published, or has no numbers in the paper: the negative controls.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """A row of Figure 3.

    Attributes:
      steps: steps of 32 images to 72.2% validation accuracy with a single crop; None if that was not reached.
      max_accuracy: the best validation accuracy with a single crop, a fraction.
    """

    steps: float | None
    max_accuracy: float

    @property
    def speed_up(self) -> float | None:
        """Inception's steps divided by its own; None if it did not reach 72.2%."""
        return self.steps and _INCEPTION_STEPS / self.steps


_INCEPTION_STEPS = 31.0e6

FIGURE_3 = {
    "inception": Published(_INCEPTION_STEPS, 0.722),
    "bn_baseline": Published(13.3e6, 0.727),
    "bn_x5": Published(2.1e6, 0.730),
    "bn_x30": Published(2.7e6, 0.748),
    "bn_x5_sigmoid": Published(None, 0.698),
}
