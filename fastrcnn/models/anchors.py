"""Anchors of a feature pyramid (Ren et al., Faster R-CNN, 2015), in MMDetection's order: y, x, then ratio by scale."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn.models.build import build


class AnchorGenerator:
    """Base anchors per level and, for the losses, the full grids.

    An anchor of scale s and ratio r = height / width at a level of base size b is b * s * sqrt(1/r) wide and
    b * s * sqrt(r) high, centred on center_offset * b. strides: a number or (x, y) a level, in pixels; base_sizes default
    to the strides. scales: one list for all levels, or a list for each; or octave_base_scale * 2^(i / scales_per_octave).
    Source: MMDetection.
    """

    def __init__(
        self,
        strides: Sequence[float | tuple[float, float]],
        ratios: Sequence[float],
        scales: Sequence[float] | Sequence[Sequence[float]] | None = None,
        base_sizes: Sequence[float] | None = None,
        scale_major: bool = True,
        octave_base_scale: float | None = None,
        scales_per_octave: int | None = None,
        centers: Sequence[tuple[float, float]] | None = None,
        center_offset: float = 0.0,
    ):
        octave = octave_base_scale is not None and scales_per_octave is not None
        if octave == (scales is not None):
            raise ValueError("scales: expected either scales, or octave_base_scale with scales_per_octave")
        if octave:
            scales = [octave_base_scale * 2 ** (i / scales_per_octave) for i in range(scales_per_octave)]
        self.strides = [tuple(s) if isinstance(s, Sequence) else (s, s) for s in strides]
        self.base_sizes = [min(s) for s in self.strides] if base_sizes is None else list(base_sizes)
        if len(self.base_sizes) != len(self.strides):
            raise ValueError(f"base_sizes: expected {len(self.strides)} entries, got {self.base_sizes}")
        self.ratios, self.scale_major = list(ratios), scale_major
        self.scales = (
            [list(s) for s in scales] if isinstance(scales[0], Sequence) else [list(scales)] * len(self.strides)
        )
        if len(self.scales) != len(self.strides) or len({len(s) for s in self.scales}) != 1:
            raise ValueError(f"scales: expected as many for each of the {len(self.strides)} levels, got {scales}")
        self.centers, self.center_offset = centers, center_offset

    @property
    def num_base_anchors(self) -> int:
        return len(self.ratios) * len(self.scales[0])

    def base_anchors(self, rounded: bool = False) -> list[Tensor]:
        """[A, 4] xyxy pixels around the origin, one a level. `rounded`: torchvision's integers."""
        anchors = []
        for level, size in enumerate(self.base_sizes):
            ratios, scales = torch.tensor(self.ratios), torch.tensor(self.scales[level])
            h, w = torch.sqrt(ratios), 1 / torch.sqrt(ratios)
            if self.scale_major:
                ws = (size * w[:, None] * scales[None, :]).reshape(-1)
                hs = (size * h[:, None] * scales[None, :]).reshape(-1)
            else:
                ws = (size * scales[:, None] * w[None, :]).reshape(-1)
                hs = (size * scales[:, None] * h[None, :]).reshape(-1)
            x, y = self.centers[level] if self.centers else (self.center_offset * size, self.center_offset * size)
            base = torch.stack([x - 0.5 * ws, y - 0.5 * hs, x + 0.5 * ws, y + 0.5 * hs], -1)
            anchors.append(base.round() if rounded else base)
        return anchors

    def level_strides(self, sizes: Sequence[Sequence[int]], batch_shape: Sequence[int] | None) -> list[tuple]:
        """(x, y) strides a level. With the padded batch_shape (height, width): torchvision's size // map size."""
        if batch_shape is None:
            return self.strides
        return [(batch_shape[1] // w, batch_shape[0] // h) for h, w in sizes]

    def grid(self, sizes, batch_shape=None, device=None, bases=None) -> list[Tensor]:
        """All anchors [H * W * A, 4] a level, for maps of `sizes` (height, width); bases: base anchors on the device, None
        for those of `base_anchors()`."""
        grids = []
        strides = self.level_strides(sizes, batch_shape)
        if bases is None:
            bases = [base.to(device) for base in self.base_anchors()]
        for base, (h, w), (sx, sy) in zip(bases, sizes, strides):
            x = torch.arange(w, device=device, dtype=torch.float32) * sx
            y = torch.arange(h, device=device, dtype=torch.float32) * sy
            yy, xx = torch.meshgrid(y, x, indexing="ij")
            shift = torch.stack([xx, yy, xx, yy], -1).reshape(-1, 1, 4)
            grids.append((shift + base).reshape(-1, 4))
        return grids

    def inside(self, sizes, image_sizes: Tensor, allowed_border: int, divisor: int = 32, device=None) -> Tensor:
        """[B, sum of H * W * A] bool: anchors whose cell lies in an image's own padded area (its size rounded up to a
        multiple of `divisor` pixels), and, with allowed_border >= 0, which leave the image by less than that."""
        flags = []
        padded = torch.ceil(image_sizes.float() / divisor) * divisor  # [B, 2] (height, width)
        for (h, w), (sx, sy) in zip(sizes, self.strides):
            valid_h = torch.ceil(padded[:, 0] / sy)
            valid_w = torch.ceil(padded[:, 1] / sx)
            rows = torch.arange(h, device=device)[None] < valid_h[:, None]
            columns = torch.arange(w, device=device)[None] < valid_w[:, None]
            cell = rows[:, :, None] & columns[:, None, :]
            flags.append(cell[..., None].expand(-1, -1, -1, self.num_base_anchors).reshape(len(cell), -1))
        flags = torch.cat(flags, 1)
        if allowed_border >= 0:
            a = torch.cat(self.grid(sizes, device=device))[None]
            size = image_sizes.float().to(a.device)
            low = (a[..., :2] >= -allowed_border).all(-1)
            high = (a[..., 2] < size[:, 1:] + allowed_border) & (a[..., 3] < size[:, :1] + allowed_border)
            flags &= low & high
        return flags


def build_anchor_generator(cfg: dict | AnchorGenerator) -> AnchorGenerator:
    """From MMDetection's dict(type="AnchorGenerator", ...); an AnchorGenerator is returned as it is."""
    if isinstance(cfg, AnchorGenerator):
        return cfg
    return build({"type": "AnchorGenerator", **cfg}, {"AnchorGenerator": AnchorGenerator}, "anchor_generator")
