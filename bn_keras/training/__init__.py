"""Training from Python: what `launch/train` does, also with a network of your own; see docs/training.md.

from bn_keras.training import make_config, train
"""

from bn_keras.lazy_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
