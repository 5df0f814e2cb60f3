"""Matplotlib as every plot here uses it: it needs no display, and shows names of classes as they are."""

import warnings
from types import ModuleType


def pyplot() -> ModuleType:
    """`matplotlib.pyplot`; loaded here, because it takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a class may be called "$x_"
    warnings.filterwarnings("ignore", "Glyph .* missing from")  # in a script that the font does not have
    from matplotlib import pyplot

    return pyplot
