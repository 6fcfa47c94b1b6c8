"""What is exported: the model from a batch to padded detections, its inputs, and what a file says beside its weights."""

import json

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fastrcnn.export.pixels import Pixels
from fastrcnn.inference import Detector
from fastrcnn.models.base_detector import BaseDetector

OUTPUTS = ("boxes", "scores", "labels", "counts")
RAW_INPUTS = ("batch", "image_sizes", "scale_factors")


class Core(nn.Module):
    """batch [B, 3, H, W] normalised and padded, image_sizes [B, 2] (height, width) int64 before padding, scale_factors
    [B, 2] (width, height) float32, new over old -> boxes [B, D, 4] xyxy pixels of the original images, scores [B, D],
    labels [B, D] from 0 in every profile, counts [B]; zeros beyond."""

    def __init__(self, model: BaseDetector):
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor, image_sizes: Tensor, scale_factors: Tensor) -> tuple[Tensor, ...]:
        boxes, scores, labels, counts = self.model.predict_padded(batch, image_sizes, scale_factors)
        return boxes, scores, (labels - self.model.label_offset).clamp(min=0), counts


class FromPixels(nn.Module):
    """images uint8 [B, 3, H, W] RGB -> as `Core`."""

    def __init__(self, model: BaseDetector):
        super().__init__()
        self.pixels, self.core = Pixels(model.data_preprocessor, model.dtype), Core(model)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.core(*self.pixels(images))


def program(model: BaseDetector, raw: bool, dynamic: bool) -> ExportedProgram:
    """From pixels, or of the batch (`raw`), for any number and size of images or for one of the largest."""
    p, images = model.data_preprocessor, Dim("images")
    count, height, width = (2, 384, 640) if dynamic else (1, p.min_size, p.max_size)
    if not raw:
        shapes = dict(images={0: images, 2: Dim("height"), 3: Dim("width")}) if dynamic else None
        inputs = (torch.zeros(count, 3, height, width, dtype=torch.uint8),)
        return torch.export.export(FromPixels(model).eval(), inputs, dynamic_shapes=shapes)
    # Maps of one row or column would be taken for the only ones: the frame has more on its coarsest.
    step = p.pad_size_divisor
    height, width = (-(-side // step) * step for side in (height, width))
    batch = torch.zeros(count, 3, height, width, dtype=model.dtype).contiguous(memory_format=torch.channels_last)
    inputs = batch, torch.tensor([[height, width]] * count), torch.ones(count, 2)
    sides = (step * Dim(name, min=2) if step > 1 else Dim(name, min=64) for name in ("rows", "columns"))
    shapes = dict(batch={0: images, **dict(zip((2, 3), sides))}, image_sizes={0: images}, scale_factors={0: images})
    return torch.export.export(Core(model).eval(), inputs, dynamic_shapes=shapes if dynamic else None)


def prepared(model: BaseDetector, images: Tensor) -> dict[str, Tensor]:
    """A raw program's inputs, by name, for images uint8 [B, 3, H, W]."""
    batch, geometry = model.prepare(list(images))
    return dict(zip(RAW_INPUTS, (batch, geometry.sizes, geometry.factors)))


def metadata(detector: Detector, precision: str, raw: bool) -> dict[str, str]:
    """Texts that a file keeps: names of the classes by label, and how pixels are prepared."""
    model = detector.model
    p = model.data_preprocessor
    preprocessing = dict(
        color="bgr" if p.bgr else "rgb", mean=p.mean, std=p.std, resize=p.profile.resize, min_size=p.min_size,
        max_size=p.max_size, pad_size_divisor=p.pad_size_divisor, inside=not raw,
    )  # fmt: skip
    return dict(
        class_names=json.dumps(detector.class_names),
        category_ids=json.dumps(detector.category_ids),
        preprocessing=json.dumps(preprocessing),
        profile=model.profile.name,
        model=type(model).__name__,
        precision=precision,
    )
