from .batch_normalization import BatchNormalization as BatchNormalization
from .dataset import read_dataset as read_dataset
from .errors import InputError as InputError
from .inception import build_model as build_model
from .inference.folding import fold_batch_normalization as fold_batch_normalization
from .inference.population_statistics import population_statistics as population_statistics
from .variants import VARIANTS as VARIANTS
from .variants import Variant as Variant

__version__: str
