"""Random changes of a picture and its boxes together, on torchvision.transforms.v2: what recipes train with.

Each function gives a transform; `v2.Compose([flip(), multi_scale(...)])` joins them, and `apply` runs them on a target.
They draw from torch's generator alone. There is no mosaic: no published Faster R-CNN was trained with it, and it would
read four pictures for one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

PIXEL = 1.0  # what is left of a box is kept from here on, in width and height


def apply(transforms, image: Tensor, target: dict) -> tuple[Tensor, dict]:
    """Runs torchvision.transforms.v2 on an image [C, H, W] and its boxes together; boxes that leave the frame, or are
    then less than a pixel wide or high, are dropped."""
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    size = image.shape[-2:]
    boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
    given = {"boxes": boxes, "labels": target["labels"]}
    if "ignore_boxes" in target:
        given["ignore_boxes"] = tv_tensors.BoundingBoxes(target["ignore_boxes"], format="XYXY", canvas_size=size)
    image, moved = transforms(tv_tensors.Image(image), given)
    ignored = moved.pop("ignore_boxes", None)
    moved = v2.SanitizeBoundingBoxes(min_size=PIXEL)(moved) if len(moved["boxes"]) else moved
    out = {**target, "boxes": moved["boxes"].as_subclass(Tensor), "labels": moved["labels"]}
    if ignored is not None:
        ignored = v2.functional.clamp_bounding_boxes(ignored).as_subclass(Tensor)
        out["ignore_boxes"] = ignored[(ignored[:, 2:] > ignored[:, :2]).all(1)]
    return image.as_subclass(Tensor), out


def flip(p: float = 0.5):
    """Left and right change sides, with probability p."""
    from torchvision.transforms import v2

    return v2.RandomHorizontalFlip(p)


def multi_scale(min_sizes: Sequence[int], max_size: int):
    """One of min_sizes (pixels) for the short side, the long side at most max_size, the ratio of the sides kept."""
    from torchvision.transforms import v2

    return v2.RandomShortestSize(list(min_sizes), max_size, antialias=True)


def large_scale_jitter(size: int = 1024, scale: tuple[float, float] = (0.1, 2.0)):
    """Resized to fit `size` x `size` pixels times a random scale, the ratio of the sides kept, then cut to at most
    `size` x `size` at a random place. What is smaller is not filled up: the batch pads it, with the same zeros."""
    from torchvision.transforms import v2

    return v2.Compose([v2.ScaleJitter((size, size), scale, antialias=True), _crop()(lambda h, w: (size, size), 1)])


def crop_with_boxes(least: float = 0.3, tries: int = 10):
    """Cut to a random part, each side `least` to 1 of the picture's, that holds the middle of at least one box; where
    none is found in so many tries, or there is no box, the picture stays whole."""

    def part(height: int, width: int) -> tuple[int, int]:
        sides = torch.empty(2).uniform_(least, 1).tolist()
        return max(1, round(sides[0] * height)), max(1, round(sides[1] * width))

    return _crop()(part, tries, needs_box=True)


def photometric():
    """Brightness, contrast, saturation, hue and the order of the colours, each at random, of pictures with three
    channels; others stay as they are."""
    from torchvision.transforms import v2

    return _coloured(v2.RandomPhotometricDistort)


def colour_jitter(strength: float):
    """Brightness, contrast and saturation times a random factor each, 1 - strength to 1 + strength, of pictures with three
    channels; others stay as they are. Hue and the order of the colours stay: many objects are told by their colour."""
    from torchvision.transforms import v2

    return _coloured(v2.ColorJitter, brightness=strength, contrast=strength, saturation=strength)


def _coloured(change: type, **options):
    """A transform of colours that lets pictures alone which have not three channels."""

    class Coloured(change):
        def transform(self, inpt, params):
            return super().transform(inpt, params) if inpt.shape[-3:-2] == (3,) else inpt

    return Coloured(**options)


def _crop():
    """The class of crops, made when it is asked for: torchvision.transforms is slow to import."""
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    class Crop(v2.Transform):
        """part(height, width) of a picture gives the size to cut out, at a random place."""

        def __init__(self, part, tries: int, needs_box: bool = False):
            super().__init__()
            self.part, self.tries, self.needs_box = part, tries, needs_box

        def make_params(self, flat_inputs: list) -> dict:
            full = next(tuple(x.shape[-2:]) for x in flat_inputs if isinstance(x, tv_tensors.Image))
            boxes = next((x for x in flat_inputs if isinstance(x, tv_tensors.BoundingBoxes)), torch.zeros(0, 4))
            middles = (boxes[:, :2] + boxes[:, 2:]) / 2
            for _ in range(self.tries):
                height, width = (min(a, b) for a, b in zip(self.part(*full), full))
                top = int(torch.randint(full[0] - height + 1, ()))
                left = int(torch.randint(full[1] - width + 1, ()))
                corner, size = torch.tensor([left, top]), torch.tensor([width, height])
                if not self.needs_box or ((middles >= corner) & (middles < corner + size)).all(1).any():
                    return dict(top=top, left=left, height=height, width=width)
            return dict(top=0, left=0, height=full[0], width=full[1])

        def transform(self, inpt, params):
            return self._call_kernel(v2.functional.crop, inpt, **params)

    return Crop
