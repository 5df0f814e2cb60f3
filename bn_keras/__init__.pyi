from .errors import InputError as InputError
from .evaluation.classifier import Classifier as Classifier
from .inference.folding import fold_batch_normalization as fold_batch_normalization
from .inference.population_statistics import population_statistics as population_statistics
from .input.dataset_formats import read_dataset as read_dataset
from .layers.batch_normalization import BatchNormalization as BatchNormalization
from .networks.build import build_network as build_network
from .networks.variants import VARIANTS as VARIANTS
from .networks.variants import Variant as Variant

__version__: str
