"""Training from Python: what `launch/train` does, also with a network of your own; see docs/training.md.

from bn_keras.training import make_config, train
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
