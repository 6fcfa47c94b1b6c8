"""Pictures with what was found right, found wrong and missed, side by side on one sheet."""

import io
from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from fastrcnn.evaluation.diagnosis import Looked
from fastrcnn.evaluation.plots import drawable, short

RIGHT, WRONG, MISSED = (40, 200, 90), (235, 50, 50), (255, 205, 0)
CELL, COLUMNS, LINE = 460, 3, 24  # pixels of a picture's place, pictures a row, pixels of a line of text


def contact_sheet(pictures: Iterable[tuple[Tensor, Looked, str]], class_names: Sequence[str]) -> bytes:
    """A JPEG file's bytes. pictures: uint8 [3, H, W], what is known of it, and its name. Right detections are green, wrong
    ones red with class and score, missed objects yellow with their class."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=14)
    cells = [_cell(Image, ImageDraw, font, *picture, class_names) for picture in pictures]
    rows = [cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)]
    heights = [max(cell.height for cell in row) for row in rows]
    sheet = Image.new(
        "RGB", (min(COLUMNS, max(len(cells), 1)) * (CELL + 8) + 8, sum(heights) + 8 * (len(rows) + 1)), "white"
    )
    top = 8
    for row, height in zip(rows, heights):
        for column, cell in enumerate(row):
            sheet.paste(cell, (8 + column * (CELL + 8), top))
        top += height + 8
    encoded = io.BytesIO()
    sheet.save(encoded, "JPEG", quality=88)
    return encoded.getvalue()


def _cell(Image, ImageDraw, font, image: Tensor, looked: Looked, name: str, class_names: Sequence[str]):
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    scale = min(CELL / picture.width, CELL / picture.height)
    picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    cell = Image.new("RGB", (CELL, picture.height + LINE), "white")
    pen = ImageDraw.Draw(picture)
    told = [f"{short(class_names[label])} {score:.2f}" for label, score in zip(looked.labels, looked.scores)]
    wrong = ~looked.right
    boxes = [*((box, RIGHT, "") for box in looked.boxes[looked.right]),
             *((box, MISSED, short(class_names[label])) for box, label in zip(looked.missed, looked.missed_labels)),
             *((box, WRONG, text) for box, text, bad in zip(looked.boxes, told, wrong) if bad)]  # fmt: skip
    for box, colour, text in boxes:
        x1, y1, x2, y2 = (np.nan_to_num(box).clip(-1e6, 1e6) * scale).tolist()
        pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=2)
        if text:
            _, _, right, bottom = pen.textbbox((0, 0), text, font=font)
            x, y = min(max(x1, 0), max(picture.width - right - 4, 0)), max(y1 - bottom - 3, 0)
            pen.rectangle((x, y, x + right + 4, y + bottom + 3), fill=colour)
            pen.text((x + 2, y), text, fill="black" if colour == MISSED else "white", font=font)
    cell.paste(picture, (0, LINE))
    caption = f"{int(wrong.sum())} wrong, {len(looked.missed)} missed: {drawable(name)}"
    letters = ImageDraw.Draw(cell)
    while letters.textlength(caption, font) > CELL and len(caption) > 10:
        caption = caption[:-2].rstrip("…") + "…"
    letters.text((0, 2), caption, fill="black", font=font)
    return cell
