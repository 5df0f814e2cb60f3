"""A contact sheet: the images that the network is fed, with captions, in one picture."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_CAPTION_LINES = 2
_GAP = 6


def contact_sheet(
    images: np.ndarray, captions: Sequence[str], *, title: str, columns: int = 8, tile: int = 160
) -> Image.Image:
    """Draws images with captions in rows.

    Args:
      images: float32 `[N, H, W, C]` in [-1, 1], the network's input.
      captions: N strings, each cut to two lines.
      title: the line above the images.
      columns: how many images a row has.
      tile: the height and width of each image in pixels; if it is larger than H, single pixels show.
    """
    images = np.asarray(images)
    font = ImageFont.load_default(12)
    line = 15
    rows = -(-len(images) // columns)
    width = columns * (tile + _GAP) + _GAP
    height = line + 2 * _GAP + rows * (tile + _CAPTION_LINES * line + _GAP)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), title, "black", font)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left = _GAP + number % columns * (tile + _GAP)
        top = line + 2 * _GAP + number // columns * (tile + _CAPTION_LINES * line + _GAP)
        pixels = np.round((image + 1) * 127.5).clip(0, 255).astype("uint8")
        picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")
        resampling = Image.Resampling.LANCZOS if tile < picture.width else Image.Resampling.NEAREST
        sheet.paste(picture.resize((tile, tile), resampling), (left, top))
        for k, text in enumerate(_wrap(caption, font, tile)):
            draw.text((left, top + tile + k * line), text, "black", font)
    return sheet


def _wrap(caption, font, width):
    """The first lines of a caption, broken to the width of a tile."""
    lines = [""]
    for letter in caption:
        if font.getlength(lines[-1] + letter) > width:
            lines.append("")
        lines[-1] += letter
    return lines[:_CAPTION_LINES]
