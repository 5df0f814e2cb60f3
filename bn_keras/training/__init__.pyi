from .recipes import make_config as make_config
from .trainer import Outcome as Outcome
from .trainer import train as train
