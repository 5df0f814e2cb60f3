"""Splits one set of images into training and validation images: by class, by a seed, with equal files on one side."""

import hashlib
from collections import Counter, defaultdict

from data_prep.errors import BadImageError, InputError
from data_prep.sources.dataset import Found, Image, read_image


def split(source: str, images: list[Image], share: float, seed: int, found: Found) -> dict[str, list[Image]]:
    """Splits the images of each class.

    A class of n images gives round(share * n) to validation, at least 1 and at most n - 1. Files of the same bytes stay
    together, so a class with copies may give fewer or more. The choice depends only on the seed and the images' classes
    and names.

    Args:
      source: the folder or archive that the images are in.
      images: the images with their classes; those of class "" go to training.
      share: the share of validation, between 0 and 1.
      seed: the random seed of the choice.
      found: gets a line about classes whose images cannot be on both sides.
    Returns:
      "train" and "validation" -> images.
    Raises:
      InputError: there is not a single class whose images can be on both sides.
    """
    all_of = Counter(image.synset for image in images)
    wanted = {synset: min(max(round(share * count), 1), count - 1) for synset, count in all_of.items()} | {"": 0}
    groups = [(group, Counter(image.synset for image in group)) for group in _groups(source, images, seed)]
    given, chosen = Counter(), set()

    def choose(number: int, own: Counter) -> None:
        chosen.add(number)
        given.update(own)

    for number, (_, own) in enumerate(groups):
        if all(given[synset] + count <= wanted[synset] for synset, count in own.items()):
            choose(number, own)
    for number, (_, own) in enumerate(groups):  # classes in which every group of equal files was too large
        leaves_some = all(given[synset] + count < all_of[synset] for synset, count in own.items())
        if number not in chosen and leaves_some and any(synset and not given[synset] for synset in own):
            choose(number, own)
    if few := sorted(synset for synset in all_of if synset and not given[synset]):
        named = ", ".join(f"{synset!r} ({all_of[synset]:,})" for synset in few[:5])
        too_few = f"{source}: {len(few)} class(es) have too few different images for validation"
        listed = f"{named}{', ...' if len(few) > 5 else ''}"
        if not chosen:
            raise InputError(f"{too_few}, and no other class is there: {listed}; fix: add images")
        found.notes.append(f"{too_few}, so all are for training: {listed}")
    sides = {"train": [], "validation": []}
    for number, (group, _) in enumerate(groups):
        sides["validation" if number in chosen else "train"] += group
    return sides


def _groups(source: str, images: list[Image], seed: int) -> list[list[Image]]:
    """The images in an order that the seed decides, in groups of the same bytes.

    Only files with the same size as another one are read.
    """
    sizes, groups = Counter(image.size for image in images), defaultdict(list)
    for image in images:
        groups[_content(source, image) if sizes[image.size] > 1 else (image.path,)].append(image)

    def key(group: list[Image]) -> bytes:
        first = min(f"{image.synset}/{image.name}" for image in group)
        return hashlib.blake2b(f"{seed}/share/{first}".encode("utf-8", "surrogateescape"), digest_size=16).digest()

    return sorted(groups.values(), key=lambda group: (key(group), group[0].path))


def _content(source: str, image: Image) -> bytes | tuple[str]:
    try:
        return hashlib.blake2b(read_image(source, image), digest_size=16).digest()
    except BadImageError:  # a worker reports it later
        return (image.path,)
