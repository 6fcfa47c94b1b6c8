"""Results on disk: pictures and COCO-format JSON."""

import json
from pathlib import Path

from torch import Tensor


def picture_path(folder: Path, source: str, taken: set[Path]) -> Path:
    """Where a source's picture goes in `folder`: under the source's own name, numbered where that path is in `taken`
    (resolved paths: sources and pictures so far). The path is added to `taken`."""
    name = Path(source.split("?")[0])
    suffix = ".jpg" if name.suffix.lower() in (".jpg", ".jpeg") else ".png"
    path, n = folder / f"{name.stem}{suffix}", 2
    while path.resolve() in taken:
        path, n = folder / f"{name.stem}_{n}{suffix}", n + 1
    taken.add(path.resolve())
    return path


def write_picture(path: Path, picture: Tensor) -> None:
    """Writes uint8 [3, H, W] as JPEG or PNG, by the suffix."""
    from torchvision.io import write_jpeg, write_png

    if path.suffix == ".jpg":
        write_jpeg(picture, str(path), quality=92)
    else:
        write_png(picture, str(path))


def write_coco(path: Path, images: dict[int, dict], annotations: dict[int, list[dict]], detector) -> None:
    """A COCO file of the detections (with scores), in the order of the indices. images and annotations: by index, as
    COCO's entries and as `Detections.to_coco` gives them."""
    rows = [a for i in sorted(annotations) for a in annotations[i]]
    rows = [dict(id=n, area=a["bbox"][2] * a["bbox"][3], iscrowd=0, **a) for n, a in enumerate(rows, 1)]
    categories = [dict(id=i, name=name) for i, name in zip(detector.category_ids, detector.class_names)]
    content = dict(images=[images[i] for i in sorted(images)], annotations=rows, categories=categories)
    path.write_text(json.dumps(content))
