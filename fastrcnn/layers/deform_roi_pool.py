"""Deformable RoI pooling with its own offsets (Dai et al., 2017), and weights for its bins (Zhu et al., 2019).

A first pooling without offsets feeds fully connected layers; they give the offsets of the second. The last ones start at
zero: offsets 0, weights sigmoid(0) = 1/2. Keys are mmcv's: offset_fc.{0,2,4}, mask_fc.{0,2}.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from fastrcnn.ops.deform_roi_pool import deform_roi_pool


def _fully_connected(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with a ReLU between them; the last one is all zeros."""
    layers: list[nn.Module] = []
    for i, (width, next_width) in enumerate(zip(widths, widths[1:])):
        layers += [nn.ReLU(inplace=True)] * (i > 0) + [nn.Linear(width, next_width)]
    nn.init.zeros_(layers[-1].weight)
    nn.init.zeros_(layers[-1].bias)
    return nn.Sequential(*layers)


class DeformRoIPool(nn.Module):
    """`deform_roi_pool` with fixed rules; offset [K, 2, out_h, out_w] is the caller's. Source: mmcv."""

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
    ):
        super().__init__()
        self.output_size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
        self.spatial_scale, self.sampling_ratio, self.gamma = spatial_scale, sampling_ratio, gamma

    def forward(self, input: Tensor, rois: Tensor, offset: Tensor | None = None) -> Tensor:
        """input [B, C, H, W], rois [K, 5] in image pixels -> [K, C, out_h, out_w]."""
        rules = self.output_size, self.spatial_scale, self.sampling_ratio, self.gamma
        return deform_roi_pool(input, rois, offset, *rules)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, gamma={self.gamma}"
        )


class DeformRoIPoolPack(DeformRoIPool):
    """output_channels: the channels of the input map. Source: mmcv's DeformRoIPoolPack."""

    def __init__(
        self,
        output_size: int | Sequence[int],
        output_channels: int,
        deform_fc_channels: int = 1024,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
    ):
        super().__init__(output_size, spatial_scale, sampling_ratio, gamma)
        self.output_channels, self.deform_fc_channels = output_channels, deform_fc_channels
        self._bins = self.output_size[0] * self.output_size[1]
        widths = self._bins * output_channels, deform_fc_channels, deform_fc_channels, self._bins * 2
        self.offset_fc = _fully_connected(widths)

    def _pool(self, input: Tensor, rois: Tensor) -> tuple[Tensor, Tensor]:
        """(pooled with offsets [K, C, out_h, out_w], what the fully connected layers saw [K, C * out_h * out_w])."""
        if input.dim() != 4 or input.shape[1] != self.output_channels:
            raise ValueError(f"input: expected [B, {self.output_channels}, H, W], got {list(input.shape)}")
        seen = super().forward(input, rois).flatten(1)
        offset = self.offset_fc(seen).view(seen.shape[0], 2, *self.output_size)
        return super().forward(input, rois, offset), seen

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        return self._pool(input, rois)[0]


class ModulatedDeformRoIPoolPack(DeformRoIPoolPack):
    """DeformRoIPoolPack, of the same arguments, whose bins are weighted by a sigmoid. Source: mmcv."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.mask_fc = _fully_connected((self._bins * self.output_channels, self.deform_fc_channels, self._bins))
        self.mask_fc.append(nn.Sigmoid())

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        pooled, seen = self._pool(input, rois)
        return pooled * self.mask_fc(seen).view(seen.shape[0], 1, *self.output_size)
