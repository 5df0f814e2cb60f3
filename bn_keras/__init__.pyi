from .layers.batch_normalization import BatchNormalization as BatchNormalization
from .input.dataset import read_dataset as read_dataset
from .errors import InputError as InputError
from .networks.inception import build_model as build_model
from .inference.folding import fold_batch_normalization as fold_batch_normalization
from .inference.population_statistics import population_statistics as population_statistics
from .networks.variants import VARIANTS as VARIANTS
from .networks.variants import Variant as Variant

__version__: str
