"""Random changes of a picture and its boxes together, on torchvision.transforms.v2: what recipes train with.

Each function gives a transform; `v2.Compose([flip(), multi_scale(...)])` joins them. `apply` runs them on a target.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def apply(transforms, image: Tensor, target: dict) -> tuple[Tensor, dict]:
    """Runs torchvision.transforms.v2 on an image and its boxes together; boxes that leave the frame, or are then less than a
    pixel wide or high, are dropped."""
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
        ignored = v2.functional.clamp_bounding_boxes(ignored).as_subclass(Tensor)
        out["ignore_boxes"] = ignored[(ignored[:, 2:] > ignored[:, :2]).all(1)]
    return image.as_subclass(Tensor), out
