"""Rows of boxes by index."""

from torch import Tensor


def take_boxes(boxes: Tensor, index: Tensor) -> Tensor:
    """boxes [B, N, 4], index [B, K] int64 in 0..N-1 -> [B, K, 4]."""
    return boxes.gather(1, index[..., None].expand(-1, -1, 4))
