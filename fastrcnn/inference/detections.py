"""The objects found in one image."""

import csv
import io
import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrcnn.data.images import as_image
from fastrcnn.inference.draw import LETTERS, draw_objects

PICTURES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
COLUMNS = ("x1", "y1", "x2", "y2", "score", "label", "name")


def _needs(package: str, method: str, install: str = "'fastrcnn[tables]'") -> ImportError:
    return ImportError(f"{method} needs {package}: pip install {install}")


@dataclass(repr=False, eq=False)
class Detections:
    """boxes [N, 4] float32 xyxy in absolute pixels of the original image, scores [N] float32, labels [N] int64 counted
    from 0, by descending score, all on the CPU; class_names[label] is a label's name, category_ids[label] its COCO id.
    `xyxy`, `confidence` and `class_id` are the same as numpy arrays, under supervision's names.

    class_scores [N, classes] float32 and features [N, D] float32 are there where the detector was asked for them; source
    is the image, as the detector got it, that `draw`, `show` and `save` take where they are given none.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    class_names: list[str] = field(default_factory=list)
    category_ids: list[int] = field(default_factory=list)
    class_scores: Tensor | None = None
    features: Tensor | None = None
    source: Any = None

    def __len__(self) -> int:
        return len(self.boxes)

    def __repr__(self) -> str:
        found = ", ".join(f"{n} {name}" for name, n in Counter(self.names).most_common(6))
        best = f", best {self.scores[0]:.2f}" if len(self) else ""
        return f"Detections({len(self)} objects{': ' if found else ''}{found}{best})"

    def __eq__(self, other: object) -> bool:
        """Whether all objects are the same, bit for bit, and called the same."""
        if not isinstance(other, Detections):
            return NotImplemented
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.name != "source"]
        return all(torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
                   for a, b in pairs)  # fmt: skip

    def __getitem__(self, index: Any) -> "Detections":
        """A selection by boolean mask, indices, slice, or one whole number, which gives the Detections of that one
        object. Raises IndexError for what is not there."""
        places = np.arange(len(self))[index.cpu().numpy() if isinstance(index, Tensor) else index]
        if places.ndim > 1:
            raise IndexError(f"expected one index, mask or slice over the {len(self)} objects, got {index!r}")
        rows = torch.from_numpy(np.atleast_1d(places).copy())
        scores, features = (None if t is None else t[rows] for t in (self.class_scores, self.features))
        own = self.boxes[rows], self.scores[rows], self.labels[rows]
        return Detections(*own, self.class_names, self.category_ids, scores, features, self.source)

    def __iter__(self) -> Iterator["Detections"]:
        """The objects one by one, each as Detections of one."""
        return (self[i] for i in range(len(self)))

    def filter(self, min_score: float = 0.0, classes: Collection[str] | None = None) -> "Detections":
        """The objects of at least this score, of the named classes (default: all). Raises ValueError naming a class that
        is unknown."""
        keep = self.scores >= min_score
        if classes is not None:
            unknown = [name for name in classes if name not in self.class_names]
            if unknown:
                raise ValueError(f"classes: expected some of {', '.join(self.class_names)}, got {', '.join(unknown)}")
            keep &= torch.tensor([name in classes for name in self.names], dtype=torch.bool)
        return self[keep]

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

    def to_coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """COCO result dicts: image_id, category_id, bbox (x, y, width, height; pixels), score."""
        xywh = torch.cat([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]], 1).tolist()
        rows = zip(xywh, self.scores.tolist(), self.labels.tolist())
        return [
            dict(image_id=image_id, category_id=(self.category_ids or range(1, label + 2))[label],
                 bbox=[round(v, 2) for v in box], score=round(score, 5))
            for box, score, label in rows
        ]  # fmt: skip

    def to_yolo(self, size: tuple[int, int] | None = None) -> list[str]:
        """Lines of a YOLO text file: label, then the box's middle, width and height over the picture's. Boxes are cut at
        the picture. size: (height, width) of the picture in pixels (default: those of `source`)."""
        height, width = self._picture(None, "size").shape[1:] if size is None else size
        whole = torch.tensor([width, height, width, height], dtype=torch.float64)
        x1, y1, x2, y2 = (self.boxes.double() / whole).clamp(0, 1).T
        columns = zip(self.labels.tolist(), torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], 1).tolist())
        return [f"{label} " + " ".join(f"{v:.6g}" for v in box) for label, box in columns]

    def to_columns(self) -> dict[str, list[Any]]:
        """x1, y1, x2, y2 (pixels), score, label and name of the objects, each a list."""
        columns = [*self.boxes.T.tolist(), self.scores.tolist(), self.labels.tolist(), self.names]
        return dict(zip(COLUMNS, columns))

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` of `to_columns`; needs the package pandas."""
        try:
            import pandas
        except ImportError:
            raise _needs("pandas", "to_pandas") from None
        return pandas.DataFrame(self.to_columns())

    def to_arrow(self) -> Any:
        """A `pyarrow.Table` of `to_columns`, boxes and scores float32; needs the package pyarrow."""
        try:
            import pyarrow
        except ImportError:
            raise _needs("pyarrow", "to_arrow") from None
        kinds = [pyarrow.float32()] * 5 + [pyarrow.int64(), pyarrow.string()]
        return pyarrow.table(self.to_columns(), schema=pyarrow.schema(list(zip(COLUMNS, kinds))))

    def to_supervision(self) -> Any:
        """The same as `supervision.Detections`; needs the package supervision."""
        try:
            import supervision
        except ImportError:
            raise _needs("supervision", "to_supervision", "supervision") from None
        return supervision.Detections(
            xyxy=self.xyxy,
            confidence=self.confidence,
            class_id=self.class_id,
            data={"class_name": np.array(self.names)},
        )

    def _picture(self, image: Any, what: str = "image") -> Any:
        image = self.source if image is None else image
        if image is None:
            raise ValueError(f"{what}: these detections do not know their picture, give it")
        return image if isinstance(image, Tensor) else as_image(image)

    def draw(self, image: Any = None, line_width: int | None = None, labels: bool = True) -> Tensor:
        """The picture uint8 [3, H, W] with boxes, names and scores, the best object on top.

        image: path, PIL image, array or tensor (default: the one that was detected in); of a tensor [C, H, W] with other
        channels than 1, 3 or 4 the first is shown. line_width: pixels; labels: names and scores, too. In a crowd the
        labels of the lowest scores that find no place are left out. Raises ValueError where no image is known.
        """
        names = [name[:LETTERS].encode("utf-8", "replace").decode() for name in self.names]
        texts = [f"{name} {score:.2f}" if labels else "" for name, score in zip(names, self.scores.tolist())]
        return draw_objects(self._picture(image), self.boxes, self.labels.tolist(), texts, line_width)

    def _image(self, image: Any) -> Any:
        from PIL import Image

        return Image.fromarray(self.draw(image).permute(1, 2, 0).numpy())

    def show(self, image: Any = None) -> None:
        """Opens the drawn picture in the system's viewer. image: as in `draw`."""
        self._image(image).show()

    def save(self, path: str | Path, image: Any = None) -> Path:
        """Writes the drawn picture (.jpg, .png), COCO results (.json), a table (.csv, .parquet) or YOLO's lines (.txt), by
        the suffix; returns the path. image: as in `draw`. Raises ValueError for another suffix, OSError."""
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix in PICTURES:
            self._image(image).save(path, PICTURES[suffix], **(dict(quality=92) if suffix != ".png" else {}))
        elif suffix == ".json":
            path.write_text(json.dumps(self.to_coco()), encoding="utf-8")
        elif suffix == ".csv":
            rows = zip(*self.to_columns().values())
            with open(path, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([COLUMNS, *rows])
        elif suffix == ".parquet":
            table = self.to_arrow()
            from pyarrow import parquet

            parquet.write_table(table, path)
        elif suffix == ".txt":
            size = None if image is None else tuple(self._picture(image).shape[1:])
            path.write_text("".join(f"{line}\n" for line in self.to_yolo(size)), encoding="utf-8")
        else:
            raise ValueError(f"path: expected a name in .jpg, .png, .json, .csv, .parquet or .txt, got {path}")
        return path

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows, where the picture is known."""
        if self.source is None:
            return None
        encoded = io.BytesIO()
        self._image(None).save(encoded, "PNG")
        return encoded.getvalue()
