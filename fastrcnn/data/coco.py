"""Annotations in COCO's JSON format."""

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastrcnn.data.check import read_coco
from fastrcnn.data.images import read_image


def apply(transforms, image: Tensor, target: dict) -> tuple[Tensor, dict]:
    """Runs torchvision.transforms.v2 on an image and its boxes together; boxes that leave the frame are dropped."""
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    size = image.shape[-2:]
    boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
    given = {"boxes": boxes, "labels": target["labels"]}
    if "ignore_boxes" in target:
        given["ignore_boxes"] = tv_tensors.BoundingBoxes(target["ignore_boxes"], format="XYXY", canvas_size=size)
    image, moved = transforms(tv_tensors.Image(image), given)
    ignored = moved.pop("ignore_boxes", None)
    moved = v2.SanitizeBoundingBoxes()(moved) if len(moved["boxes"]) else moved
    out = {**target, "boxes": moved["boxes"].as_subclass(Tensor), "labels": moved["labels"]}
    if ignored is not None:
        out["ignore_boxes"] = v2.functional.clamp_bounding_boxes(ignored).as_subclass(Tensor)
    return image.as_subclass(Tensor), out


class CocoDataset(Dataset):
    """(image uint8 [3, H, W], target) pairs of a COCO annotation file, to train on; `annotations` is the file as it is
    written, to measure against.

    target: boxes [N, 4] float32 xyxy pixels, labels [N] int64 counted from 0 in the order of the category ids,
    ignore_boxes [R, 4] (iscrowd), image_id. Boxes are cut at the picture's edge; what is then not a pixel wide and high is
    left out; `left_out` counts both. class_names and category_ids are by label. Raises ValueError naming file and entry for
    what is not COCO's format, and, at its turn, for a picture that cannot be read or is not of the stated size.
    """

    def __init__(self, annotations: str | Path, images: str | Path | None = None, transforms=None):
        self.path, self.transforms = Path(annotations), transforms
        self.folder = Path(images) if images is not None else self.path.parent / "images"
        self.images, categories, self.annotations = read_coco(self.path)
        self.class_names = [c["name"] for c in categories]
        self.category_ids = [c["id"] for c in categories]
        self.left_out: Counter[str] = Counter()
        label_of = {c: i for i, c in enumerate(self.category_ids)}
        by_image: dict[int | str, list] = {image["id"]: [] for image in self.images}
        for a in self.annotations:
            by_image[a["image_id"]].append(a)
        self.targets = [self._target(image, by_image[image["id"]], label_of) for image in self.images]

    def _target(self, image: dict, annotations: list[dict], label_of: dict) -> dict:
        boxes, labels, ignored = [], [], []
        width, height = image["width"], image["height"]
        for a in annotations:
            x, y, w, h = a["bbox"]
            box = [max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)]
            if w < 1 or h < 1:
                self.left_out["less than a pixel wide or high"] += 1
            elif box[2] - box[0] < 1 or box[3] - box[1] < 1:
                self.left_out["outside the picture"] += 1
            else:
                if max(-x, -y, x + w - width, y + h - height) > 1:  # less is rounding
                    self.left_out["cut at the edge"] += 1
                if not a["iscrowd"]:
                    labels.append(label_of[a["category_id"]])
                (ignored if a["iscrowd"] else boxes).append(box)
        return dict(
            boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            labels=torch.tensor(labels, dtype=torch.int64),
            ignore_boxes=torch.tensor(ignored, dtype=torch.float32).reshape(-1, 4),
            image_id=image["id"],
        )

    def __len__(self) -> int:
        return len(self.images)

    def picture(self, index: int) -> Path:
        """Where the picture of an image lies."""
        return self.folder / self.images[index]["file_name"]

    def check_size(self, index: int, image: Tensor) -> None:
        """Raises ValueError for a picture [3, H, W] of another size than the file says: the boxes are not its own."""
        said = self.images[index]
        height, width = image.shape[-2:]
        if (width, height) != (said["width"], said["height"]):
            swapped = (height, width) == (said["width"], said["height"])
            hint = " (turned by its EXIF orientation, or annotated with the sides swapped)" if swapped else ""
            raise ValueError(f"{self.path}: images[{index}]: {said['width']} x {said['height']} pixels are stated, "
                             f"{self.picture(index)} has {width} x {height}{hint}")  # fmt: skip

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        image, target = read_image(self.picture(index)), self.targets[index]
        self.check_size(index, image)
        return (image, target) if self.transforms is None else apply(self.transforms, image, target)
