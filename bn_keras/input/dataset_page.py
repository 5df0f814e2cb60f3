"""A page of a data set itself: images a class, their sizes, formats and colors, what was re-encoded and left out."""

import os
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from bn_keras import plots, storage
from bn_keras.input.dataset import Dataset
from bn_keras.input.image_header import read_header
from bn_keras.markdown import table

LISTS = {
    "repaired.tsv": "re-encoded",
    "bad.tsv": "bad, left out",
    "duplicates.tsv": "in training and validation",
}
"""The lists that `data_prep` writes beside its records, with a line for each image, and what their images are."""

_MOST_NAMES = 24  # of classes under a chart
_SPLIT_COLORS = {"train": "tab:blue", "validation": "tab:orange"}


@dataclass
class SplitPage:
    """What the images of a split are.

    Attributes:
      by_class: int64 `[classes]`, how many there are of each.
      sizes: (width, height) in pixels -> how many.
      formats: Pillow's name of the format -> how many.
      gray: how many have one channel.
      unreadable: how many records are damaged, have a label that no class has, or hold no image.
    """

    by_class: np.ndarray
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    gray: int = 0
    unreadable: int = 0

    def sides(self, side: int) -> np.ndarray:
        """The widths (side 0) or heights (1) of all images, sorted; int64 `[N]`."""
        values = [size[side] for size in self.sizes]
        return np.sort(np.repeat(np.array(values, np.int64), list(self.sizes.values())))


def read(dataset: Dataset, split: str) -> SplitPage:
    """Reads every record of a split once, and the header of its image."""
    import tensorflow as tf
    from google.protobuf.message import DecodeError

    page = SplitPage(np.zeros(len(dataset.class_names), np.int64))
    for shard in dataset.splits[split]:
        page.unreadable += shard.examples
        for record in tf.data.TFRecordDataset(shard.path).ignore_errors().as_numpy_iterator():
            try:
                features = tf.train.Example.FromString(record).features.feature
            except DecodeError:
                continue
            image = features[dataset.image_feature].bytes_list.value
            label = features[dataset.label_feature].int64_list.value
            header = read_header(image[0]) if len(image) == len(label) == 1 else None
            if header and 0 <= label[0] - dataset.label_base < len(dataset.class_names):
                page.unreadable -= 1
                page.by_class[label[0] - dataset.label_base] += 1
                page.sizes[header.width, header.height] += 1
                page.formats[header.format] += 1
                page.gray += header.gray
    return page


def listed(data_dir: str) -> dict[str, Counter[str]]:
    """{what the images of a list are: {reason: how many}}; nothing is listed beside records of another program."""
    found = {}
    for name, what in LISTS.items():
        path = os.path.join(data_dir, name)
        lines = storage.read(path).decode("utf-8", "replace").split("\n")[:-1] if storage.exists(path) else []
        is_pair = name == "duplicates.tsv"  # its second column is the other image, not a reason
        found[what] = Counter("the same bytes" if is_pair else line.partition("\t")[2] for line in lines)
    return found


def page_table(pages: dict[str, SplitPage], lists: dict[str, Counter[str]]) -> str:
    """The page as a Markdown table, with a column for each split and one for both."""

    def row(name, value):
        """A number of each split and of both."""
        of_each = [value(page) for page in pages.values()]
        return [name, *(f"{number:,}" if number else "" for number in (*of_each, sum(of_each)))]

    def spread(name, values):
        """Lowest, median and highest of the values of each split."""
        of_each = (values(page) for page in pages.values())
        texts = (f"{v.min():,}, {int(np.median(v)):,}, {v.max():,}" if len(v) else "" for v in of_each)
        return [name, *texts, ""]

    formats = sorted({name for page in pages.values() for name in page.formats})
    rows = [
        row("images", lambda page: int(page.by_class.sum())),
        ["classes with images", *(f"{(p.by_class > 0).sum():,} of {len(p.by_class):,}" for p in pages.values()), ""],
        spread("images a class: fewest, median, most", lambda page: page.by_class),
        spread("width in pixels: least, median, most", lambda page: page.sides(0)),
        spread("height in pixels: least, median, most", lambda page: page.sides(1)),
        *(row(name, lambda page, name=name: page.formats[name]) for name in formats),
        row("gray", lambda page: page.gray),
        row("unreadable", lambda page: page.unreadable),
    ]
    for what, reasons in lists.items():
        for reason, number in reasons.most_common(5):
            rows.append([f"{what}: {reason}", *("" for _ in pages), f"{number:,}"])
    return table(["", *pages, "both"], rows)


def draw(path: str, dataset: Dataset, pages: dict[str, SplitPage], lists: dict[str, Counter[str]]) -> None:
    """Draws the page as a picture: images a class, sizes, shorter sides, and counts of kinds."""
    plt = plots.pyplot()
    figure, ((classes, sizes), (sides, kinds)) = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    figure.suptitle(f"{dataset.name}: {len(dataset.class_names):,} classes")
    few = len(dataset.class_names) <= _MOST_NAMES
    for number, (split, page) in enumerate(pages.items()):
        color, label = _SPLIT_COLORS[split], f"{split}, {page.by_class.sum():,} images"
        if few:
            places = np.arange(len(page.by_class)) + 0.4 * number - 0.2
            classes.bar(places, page.by_class, 0.4, color=color, label=label)
        else:
            classes.stairs(np.sort(page.by_class)[::-1], color=color, label=label, fill=True)
        widths, heights = zip(*page.sizes, strict=True) if page.sizes else ((), ())
        area = 8 + 200 * np.array(list(page.sizes.values())) / max(page.sizes.values(), default=1)
        sizes.scatter(widths, heights, area, color=color, alpha=0.4, linewidths=0)
        shorter = np.repeat([min(size) for size in page.sizes], list(page.sizes.values()))
        sides.hist(shorter, 40, color=color, alpha=0.6)
    if few:
        names = [name[:24] for name in dataset.class_names]
        classes.set_xticks(range(len(names)), names, rotation=60, ha="right")
    classes.set(title="images a class", xlabel="" if few else "classes, the largest first")
    sizes.set(title="sizes", xlabel="width in pixels", ylabel="height in pixels", xlim=0, ylim=0)
    sides.set(title="images by their shorter side", xlabel="pixels")
    figure.legend(*classes.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    counts = sum((page.formats for page in pages.values()), Counter())
    bars = {**counts, "gray": sum(page.gray for page in pages.values())}
    bars |= {"unreadable": sum(page.unreadable for page in pages.values())}
    bars |= {what: sum(reasons.values()) for what, reasons in lists.items()}
    drawn = kinds.barh(list(bars), list(bars.values()), color="tab:gray")
    kinds.bar_label(drawn, [f" {count:,}" for count in bars.values()])
    kinds.set(title="formats, colors, and what was done", xscale="symlog", xlabel="images")
    kinds.xaxis.set_major_formatter("{x:,.0f}")
    kinds.margins(x=0.15)
    kinds.invert_yaxis()
    figure.savefig(path, dpi=100)
    plt.close(figure)
