"""Boxes and their labels on a picture."""

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrcnn.data.images import as_image

FAR = 1e6  # pixels; Pillow's pen takes no larger number
LETTERS = 60  # of a name on a picture
SMALLEST = 10.0  # pixels of a letter that can be read
FITS = 0.9  # of the labels, before smaller letters are tried


def colour_of(label: int) -> tuple[int, int, int]:
    """A class's own strong colour, the same on every picture: hues by the golden ratio, so that neighbours differ."""
    r, g, b = colorsys.hsv_to_rgb((label * 0.61803398875 + 0.02) % 1.0, 0.85, 0.9)
    return int(r * 255), int(g * 255), int(b * 255)


def draw_objects(
    image: Any,
    boxes: Tensor,
    labels: Sequence[int],
    texts: Sequence[str],
    line_width: int | None = None,
) -> Tensor:
    """The picture uint8 [3, H, W] with the boxes [N, 4] xyxy pixels in their labels' colours, the first on top, and their
    texts beside them; an empty text is none.

    image: what `fastrcnn.data.as_image` takes; of a tensor [C, H, W] with other channels than 1, 3 or 4 the first is shown.
    Texts never lie over each other: in a crowd the letters become smaller, and the last that find no place are left out.
    line_width: pixels (default: by the picture's and the boxes' size).
    """
    from PIL import Image, ImageDraw, ImageFont

    if isinstance(image, Tensor) and image.dim() == 3 and image.shape[0] not in (1, 3, 4):
        image = image[:1]
    picture = Image.fromarray(as_image(image).permute(1, 2, 0).cpu().numpy())
    pen = ImageDraw.Draw(picture)
    unit = max(picture.size) / 640  # line and letter sizes grow with the picture
    placed = boxes.detach().cpu().double().nan_to_num().clamp(-FAR, FAR)
    placed[:, 2:] = torch.maximum(placed[:, :2], placed[:, 2:])
    if line_width is None:
        sides = (placed[:, 2:] - placed[:, :2]).amin(1)
        fine = float(sides.median()) / 12 if len(sides) else 1.0  # small boxes keep an inside
        line_width = max(1, round(min(1.6 * unit, max(fine, 1.0))))
    corners = placed.tolist()
    for i in reversed(range(len(corners))):
        pen.rectangle(corners[i], outline=colour_of(int(labels[i])), width=line_width)
    for size in (11 * unit, 8 * unit, 6 * unit):
        size = max(SMALLEST, size)
        font, pad = ImageFont.load_default(size=size), size / 6
        inked = [pen.textbbox((0, 0), text, font=font) if text else None for text in texts]
        spots = _spots(corners, inked, pad, picture.size)
        wanted = sum(ink is not None for ink in inked)
        if size == SMALLEST or sum(spot is not None for spot in spots) >= FITS * wanted:
            break
    for label, text, ink, spot in zip(labels, texts, inked, spots):
        if spot is not None and ink is not None:
            colour = colour_of(int(label))
            dark = sum(c * w for c, w in zip(colour, (0.3, 0.59, 0.11))) > 140
            pen.rectangle(spot, fill=colour)
            start = spot[0] + pad - ink[0], spot[1] + pad - ink[1]
            pen.text(start, text, fill="black" if dark else "white", font=font)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def _spots(
    corners: Sequence[Sequence[float]],
    inked: Sequence[tuple[float, float, float, float] | None],
    pad: float,
    size: tuple[int, int],
) -> list[list[float] | None]:
    """Where each text goes, [x1, y1, x2, y2], or None: over, under or in its box, in the picture, on no other text."""
    taken = np.zeros((0, 4))
    spots: list[list[float] | None] = []
    for (x1, y1, x2, y2), ink in zip(corners, inked):
        spots.append(None)
        if ink is None:
            continue
        width, height = ink[2] - ink[0] + 2 * pad, ink[3] - ink[1] + 2 * pad
        left, right = (min(max(x, 0), max(size[0] - width, 0)) for x in (x1, x2 - width))
        inside = max(y1, 0), min(y2, size[1]) - height
        over = [(x, y) for y in (y1 - height, y2, *inside) for x in (left, right) if 0 <= y <= size[1] - height]
        for x, y in over or [(left, 0.0)]:
            spot = np.array([x, y, x + width, y + height])
            free = (spot[2:] <= taken[:, :2]).any(1) | (taken[:, 2:] <= spot[:2]).any(1)
            if free.all():
                taken = np.concatenate([taken, spot[None]])
                spots[-1] = spot.tolist()
                break
    return spots
