"""Annotations in COCO's JSON format."""

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

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
    """(image uint8 [3, H, W], target) pairs of a COCO annotation file.

    target: boxes [N, 4] float32 xyxy pixels, labels [N] int64 counted from 0 in the order of the category ids,
    ignore_boxes [R, 4] (iscrowd), image_id. Boxes are clipped to the image; empty ones are left out.
    Raises ValueError for a file that is not COCO's format.
    """

    def __init__(self, annotations: str | Path, images: str | Path | None = None, transforms=None):
        path = Path(annotations)
        with open(path) as file:
            content = json.load(file)
        missing = {"images", "annotations", "categories"} - set(content if isinstance(content, dict) else ())
        if missing:
            raise ValueError(f"{path}: not a COCO annotation file, it lacks {sorted(missing)}")
        self.path, self.transforms = path, transforms
        self.folder = Path(images) if images is not None else path.parent / "images"
        categories = sorted(content["categories"], key=lambda c: c["id"])
        self.class_names = [c["name"] for c in categories]
        self.category_ids = [c["id"] for c in categories]
        label_of = {c: i for i, c in enumerate(self.category_ids)}
        self.images = content["images"]
        by_image: dict[int, list] = {image["id"]: [] for image in self.images}
        for a in content["annotations"]:
            if a["image_id"] not in by_image or a["category_id"] not in label_of:
                raise ValueError(f"{path}: annotation {a['id']} names an unknown image or category")
            by_image[a["image_id"]].append(a)
        self.targets = [self._target(image, by_image[image["id"]], label_of) for image in self.images]

    @staticmethod
    def _target(image: dict, annotations: list[dict], label_of: dict) -> dict:
        boxes, labels, ignored = [], [], []
        for a in annotations:
            x, y, w, h = a["bbox"]
            box = [max(x, 0), max(y, 0), min(x + w, image["width"]), min(y + h, image["height"])]
            if box[2] - box[0] < 1 or box[3] - box[1] < 1:
                continue
            if a.get("iscrowd", 0):
                ignored.append(box)
            else:
                boxes.append(box)
                labels.append(label_of[a["category_id"]])
        return dict(
            boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            labels=torch.tensor(labels, dtype=torch.int64),
            ignore_boxes=torch.tensor(ignored, dtype=torch.float32).reshape(-1, 4),
            image_id=image["id"],
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        image, target = read_image(self.folder / self.images[index]["file_name"]), self.targets[index]
        return (image, target) if self.transforms is None else apply(self.transforms, image, target)
