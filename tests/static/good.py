"""Every public name as a person uses it: mypy and pyright accept all of it. Never run."""

import bn_keras
from bn_keras import (
    VARIANTS,
    BatchNormalization,
    InputError,
    Variant,
    build_network,
    fold_batch_normalization,
    population_statistics,
    read_dataset,
)

row: Variant = VARIANTS["bn_x5"]
rate: float = row.learning_rate
layer = BatchNormalization(momentum=0.9, virtual_batch_size=32, name="bn", dtype="float32", trainable=False)
other = BatchNormalization(-1, 1, gamma_initializer=lambda shape, dtype: 1, beta_regularizer={"class_name": "L2"})
model = build_network(row, classes=10, batch_normalization=BatchNormalization)
statistics = population_statistics(model, [1, 2], steps=2, estimator="pooled", layers=[layer, other])
folded = fold_batch_normalization(model)
try:
    examples: int = read_dataset("data", label_base=1, classes=10).examples("train")
except InputError as error:
    print(error, bn_keras.__version__)
