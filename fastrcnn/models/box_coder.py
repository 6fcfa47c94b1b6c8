"""Boxes to regression deltas and back (Girshick et al., R-CNN, 2014, appendix C)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn.models.build import build
from fastrcnn.ops import decode_boxes
from fastrcnn.ops._checks import coordinates


class DeltaXYWHBBoxCoder:
    """MMDetection's coder: deltas are (centre shift / size, log of the size ratio), minus target_means, over target_stds.

    symmetric_clip: whether dw and dh are clamped from below as well as from above when decoding (MMDetection does).
    """

    def __init__(
        self,
        target_means: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
        target_stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        clip_border: bool = True,
        symmetric_clip: bool = True,
    ):
        self.means, self.stds = tuple(target_means), tuple(target_stds)
        self.clip_border, self.symmetric_clip = clip_border, symmetric_clip

    def encode(self, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
        """boxes, gt_boxes [N, 4] xyxy pixels, boxes of positive size -> deltas [N, 4]."""
        boxes, gt_boxes = coordinates(boxes), coordinates(gt_boxes)  # float32 whatever the model is, as in MMDetection
        size, gt_size = boxes[:, 2:] - boxes[:, :2], gt_boxes[:, 2:] - gt_boxes[:, :2]
        centre, gt_centre = (boxes[:, :2] + boxes[:, 2:]) * 0.5, (gt_boxes[:, :2] + gt_boxes[:, 2:]) * 0.5
        deltas = torch.cat([(gt_centre - centre) / size, torch.log(gt_size / size)], -1)
        # Means and stds are numbers: a tensor of them would be copied to the device each time.
        columns = zip(deltas.unbind(-1), self.means, self.stds)
        return torch.stack([(d - mean) / std for d, mean, std in columns], -1)

    def decode(self, boxes: Tensor, deltas: Tensor, max_shape=None) -> Tensor:
        """boxes [N, 4], deltas [N, 4 * C] -> [N, 4 * C] xyxy pixels, clipped to max_shape (height, width) if given."""
        limit = max_shape if self.clip_border else None
        return decode_boxes(boxes, deltas, limit, self.means, self.stds, symmetric_clip=self.symmetric_clip)


def build_box_coder(cfg: dict | DeltaXYWHBBoxCoder) -> DeltaXYWHBBoxCoder:
    if isinstance(cfg, DeltaXYWHBBoxCoder):
        return cfg
    return build({"type": "DeltaXYWHBBoxCoder", **cfg}, {"DeltaXYWHBBoxCoder": DeltaXYWHBBoxCoder}, "bbox_coder")
