"""The options of the input pipeline; standard library only."""

import dataclasses
import typing
from typing import Literal

from bn_keras.errors import InputError

Interpolation = Literal["bilinear", "bicubic", "area", "lanczos3"]


@dataclasses.dataclass(frozen=True)
class InputOptions:
    """How examples are ordered, and how each image is preprocessed.

    Attributes:
      image_size: the height and width in pixels of the preprocessed image.
      augmentation: "imagenet" trains on GoogLeNet's random crop, mirrored half of the time, with distorted colors;
        "shift" on small shifts, mirrored half of the time; "none" on the whole image. It also decides the view that is
        evaluated, `preprocessing.evaluated_view`.
      shuffling: "within_shard" mixes all examples of several shards; "shard_order" permutes only the shards and keeps
        the order in each.
      photometric_distortion: "full" for TF-Slim's ranges, "reduced" for half of them, or "none"; only the augmentation
        "imagenet" uses it.
      distort_on: "host", or "device", which leaves the photometric distortion to a
        `photometric_distortion.PhotometricDistortion` in the model; only the augmentation "imagenet" uses it.
      rand_augment: strength of `rand_augment.rand_augment`, in [0, 1]; 0 leaves it out.
      interpolation: how a training crop is resized. Not in the paper: "bilinear" is TF-Slim's; it does not filter when
        it makes an image smaller.

    Raises:
      InputError: a value is not one of these.
    """

    image_size: int
    augmentation: Literal["imagenet", "shift", "none"] = "imagenet"
    shuffling: Literal["within_shard", "shard_order"] = "within_shard"
    photometric_distortion: Literal["full", "reduced", "none"] = "reduced"
    distort_on: Literal["host", "device"] = "host"
    rand_augment: float = 0.0
    interpolation: Interpolation = "bilinear"

    def __post_init__(self):
        if self.image_size < 1:
            raise InputError(f"image_size={self.image_size} must be at least 1")
        for field in dataclasses.fields(self):
            value, known = getattr(self, field.name), typing.get_args(field.type)
            if known and value not in known:
                raise InputError(f"{field.name}={value!r} is none of {', '.join(known)}")
