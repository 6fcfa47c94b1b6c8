"""The objects found in one image."""

import colorsys
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastrcnn.data.images import as_image

FAR = 1e6  # pixels; Pillow's pen takes no larger number
LETTERS = 60  # of a name on a picture


def _colour(label: int) -> tuple[int, int, int]:
    """A class's own strong colour: hues by the golden ratio, so that neighbours differ."""
    r, g, b = colorsys.hsv_to_rgb((label * 0.61803398875 + 0.02) % 1.0, 0.85, 0.9)
    return int(r * 255), int(g * 255), int(b * 255)


@dataclass
class Detections:
    """boxes [N, 4] float32 xyxy in absolute pixels of the original image, scores [N] float32, labels [N] int64 counted
    from 0, by descending score, all on the CPU; class_names[label] is a label's name, category_ids[label] its COCO id.
    `xyxy`, `confidence` and `class_id` are the same as numpy arrays, under supervision's names.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    class_names: list[str] = field(repr=False, default_factory=list)
    category_ids: list[int] = field(repr=False, default_factory=list)

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index) -> "Detections":
        """A selection by boolean mask, indices, slice, or one whole number, which gives the Detections of that one
        object. Raises IndexError for what is not there."""
        rows = np.arange(len(self))[index.cpu().numpy() if isinstance(index, Tensor) else index]
        if rows.ndim > 1:
            raise IndexError(f"expected one index, mask or slice over the {len(self)} objects, got {index!r}")
        rows = torch.from_numpy(np.atleast_1d(rows).copy())
        return Detections(self.boxes[rows], self.scores[rows], self.labels[rows], self.class_names, self.category_ids)

    def __iter__(self) -> Iterator["Detections"]:
        """The objects one by one, each as Detections of one."""
        return (self[i] for i in range(len(self)))

    @property
    def xyxy(self) -> np.ndarray:
        return self.boxes.numpy()

    @property
    def confidence(self) -> np.ndarray:
        return self.scores.numpy()

    @property
    def class_id(self) -> np.ndarray:
        return self.labels.numpy()

    @property
    def names(self) -> list[str]:
        """The class name of each object."""
        return [self._name(i) for i in self.labels.tolist()]

    def _name(self, label: int) -> str:
        return self.class_names[label] if label < len(self.class_names) else f"class {label}"

    def to_coco(self, image_id: int = 0) -> list[dict]:
        """COCO result dicts: image_id, category_id, bbox (x, y, width, height; pixels), score."""
        xywh = torch.cat([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]], 1).tolist()
        rows = zip(xywh, self.scores.tolist(), self.labels.tolist())
        return [
            dict(image_id=image_id, category_id=(self.category_ids or range(1, label + 2))[label],
                 bbox=[round(v, 2) for v in box], score=round(score, 5))
            for box, score, label in rows
        ]  # fmt: skip

    def to_supervision(self):
        """The same as `supervision.Detections`; needs the package supervision."""
        try:
            import supervision
        except ImportError:
            raise ImportError("to_supervision needs supervision: pip install supervision") from None
        return supervision.Detections(
            xyxy=self.xyxy,
            confidence=self.confidence,
            class_id=self.class_id,
            data={"class_name": np.array(self.names)},
        )

    def draw(self, image) -> Tensor:
        """The picture uint8 [3, H, W] with boxes, names and scores, the best object on top.

        image: path, PIL image, array or tensor; of a tensor [C, H, W] with other channels than 1, 3 or 4 the first is
        shown.
        """
        from PIL import Image, ImageDraw, ImageFont

        if isinstance(image, Tensor) and image.dim() == 3 and image.shape[0] not in (1, 3, 4):
            image = image[:1]
        picture = Image.fromarray(as_image(image).permute(1, 2, 0).cpu().numpy())
        pen = ImageDraw.Draw(picture)
        unit = max(picture.size) / 640  # line and letter sizes grow with the picture
        width, font = max(1, round(1.6 * unit)), ImageFont.load_default(size=max(10.0, 11 * unit))
        for i in reversed(range(len(self))):
            x1, y1, x2, y2 = self.boxes[i].nan_to_num().clamp(-FAR, FAR).tolist()
            colour = _colour(int(self.labels[i]))
            pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=width)
            name = self._name(int(self.labels[i]))[:LETTERS].encode("utf-8", "replace").decode()
            text = f"{name} {self.scores[i]:.2f}"
            left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
            height, pad = bottom - top, 2 * unit
            # Above the box where there is room, inside otherwise, and never out of the picture.
            x = min(max(x1, 0), max(picture.width - (right - left) - 2 * pad, 0))
            y = y1 - height - 2 * pad if y1 >= height + 2 * pad else max(y1, 0)
            pen.rectangle((x, y, x + right - left + 2 * pad, y + height + 2 * pad), fill=colour)
            ink = "black" if sum(c * w for c, w in zip(colour, (0.3, 0.59, 0.11))) > 140 else "white"
            pen.text((x + pad - left, y + pad - top), text, fill=ink, font=font)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
