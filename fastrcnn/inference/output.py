"""Results on disk: pictures and COCO-format JSON."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastrcnn.inference.detections import Detections
from fastrcnn.inference.detector import Detector


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


def write_detections(
    detector: Detector,
    sources: list[str],
    folder: Path,
    classes: set[int] | None = None,
    batch_size: int | None = None,
    pictures: bool = True,
) -> Iterator[Detections | Exception]:
    """Detects in `sources` and gives, for each as it is done, its Detections or why it could not be read.

    Pictures (with `pictures`) go to `folder` as they are done, detections.json at the end or when it is interrupted: what
    is found is never lost. Objects of other labels than `classes` are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images: dict[int, dict] = {}
    annotations: dict[int, list[dict]] = {}
    taken = {Path(source).resolve() for source in sources}
    try:
        for index, image, found in detector.stream(sources, batch_size):
            if isinstance(found, Detections):
                if classes is not None:
                    found = found[torch.tensor([i in classes for i in found.labels.tolist()], dtype=torch.bool)]
                if pictures:
                    write_picture(picture_path(folder, sources[index], taken), found.draw(image))
                height, width = image.shape[1:]
                images[index] = dict(id=index + 1, file_name=sources[index], width=width, height=height)
                annotations[index] = found.to_coco(index + 1)
            yield found
    finally:
        _write_coco(folder / "detections.json", images, annotations, detector)


def _write_coco(path: Path, images: dict[int, dict], annotations: dict[int, list[dict]], detector: Detector) -> None:
    """A COCO file of the detections (with scores), in the order of the indices. images and annotations: by index, as
    COCO's entries and as `Detections.to_coco` gives them."""
    rows = [a for i in sorted(annotations) for a in annotations[i]]
    rows = [dict(id=n, area=a["bbox"][2] * a["bbox"][3], iscrowd=0, **a) for n, a in enumerate(rows, 1)]
    categories = [dict(id=i, name=name) for i, name in zip(detector.category_ids, detector.class_names)]
    content = dict(images=[images[i] for i in sorted(images)], annotations=rows, categories=categories)
    path.write_text(json.dumps(content))
