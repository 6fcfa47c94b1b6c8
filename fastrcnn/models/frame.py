"""Where the images of a batch lie, and how big they were."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Frame(NamedTuple):
    """The geometry of a batch, which the preprocessor makes and every head takes.

    sizes [B, 2] (height, width) of the images in the batch, before padding; padded: (height, width) of the batch;
    factors [B, 2] float32 (width, height), new over old, or None: boxes stay in pixels of the batch.
    """

    sizes: Tensor
    padded: tuple[int, int]
    factors: Tensor | None = None

    @classmethod
    def of(cls, batch: Tensor, image_sizes, scale_factors=None) -> "Frame":
        """The frame of a batch [B, C, H, W] whose geometry a caller gives as tensors or lists, on the batch's device.

        Raises ValueError naming image_sizes or scale_factors where their shape is another.
        """
        sizes = _pairs("image_sizes", "(height, width)", image_sizes, batch, None)
        if scale_factors is not None:
            scale_factors = _pairs("scale_factors", "(width, height)", scale_factors, batch, torch.float32)
        return cls(sizes, tuple(batch.shape[2:]), scale_factors)

    def scale(self, targets: Sequence[dict]) -> list[dict]:
        """targets with `boxes` and `ignore_boxes` in pixels of the original images -> in pixels of the batch."""
        keys = ("boxes", "ignore_boxes")
        pairs = zip(targets, self.factors.repeat(1, 2), strict=True)
        return [{**target, **{k: target[k] * factor for k in keys if k in target}} for target, factor in pairs]


def _pairs(name: str, what: str, value, batch: Tensor, dtype: torch.dtype | None) -> Tensor:
    pairs = torch.as_tensor(value, dtype=dtype, device=batch.device)
    if pairs.shape != (batch.shape[0], 2):
        raise ValueError(f"{name}: expected [{len(batch)}, 2] {what}, got {list(pairs.shape)}")
    return pairs
