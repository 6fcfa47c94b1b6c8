"""The global context block of GCNet (Cao et al., 2019): one context vector for the picture, fused into every pixel."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

FUSIONS = ("channel_add", "channel_mul")


def _transform(channels: int, planes: int) -> nn.Sequential:
    """[B, C, 1, 1] -> [B, C, 1, 1] through a bottleneck of `planes` channels; zero at the start."""
    shrink, expand = nn.Conv2d(channels, planes, 1), nn.Conv2d(planes, channels, 1)
    return nn.Sequential(shrink, nn.LayerNorm([planes, 1, 1]), nn.ReLU(inplace=True), expand)


class ContextBlock(nn.Module):
    """y = x * sigmoid(mul(c)) + add(c), where c is the mean of x over the pixels, weighted by attention or plain.

    in_channels: C. ratio: the bottleneck has int(C * ratio) channels. pooling_type: "att" weights the pixels by
    softmax(conv_mask(x)), "avg" weights them equally. fusion_types: "channel_add", "channel_mul" or both. Source: mmcv's
    ContextBlock; keys `conv_mask.*`, `channel_add_conv.{0,1,3}.*`, `channel_mul_conv.{0,1,3}.*`.
    """

    def __init__(
        self,
        in_channels: int,
        ratio: float,
        pooling_type: str = "att",
        fusion_types: Sequence[str] = ("channel_add",),
    ):
        super().__init__()
        if pooling_type not in ("att", "avg"):
            raise ValueError(f'pooling_type: expected "att" or "avg", got {pooling_type!r}')
        if isinstance(fusion_types, str) or not fusion_types or not set(fusion_types) <= set(FUSIONS):
            raise ValueError(f"fusion_types: expected one or more of {FUSIONS}, got {fusion_types!r}")
        planes = int(in_channels * ratio)
        if planes < 1:
            raise ValueError(f"ratio: {ratio} of {in_channels} channels leaves none")
        self.conv_mask = nn.Conv2d(in_channels, 1, 1) if pooling_type == "att" else None
        self.channel_add_conv = _transform(in_channels, planes) if "channel_add" in fusion_types else None
        self.channel_mul_conv = _transform(in_channels, planes) if "channel_mul" in fusion_types else None
        self.init_weights()

    def init_weights(self) -> None:
        """Fresh, the sum changes nothing and the product halves the input: both last convolutions are zero."""
        if self.conv_mask is not None:
            nn.init.kaiming_normal_(self.conv_mask.weight, mode="fan_in", nonlinearity="relu")
            nn.init.zeros_(self.conv_mask.bias)
        for transform in (self.channel_add_conv, self.channel_mul_conv):
            if transform is not None:
                nn.init.zeros_(transform[-1].weight)
                nn.init.zeros_(transform[-1].bias)

    def _context(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, 1, 1]."""
        if self.conv_mask is None:
            return x.mean((2, 3), keepdim=True)
        attention = self.conv_mask(x).flatten(2).softmax(2)  # [B, 1, H * W]
        return (x.flatten(2) @ attention.transpose(1, 2)).unsqueeze(3)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same shape."""
        context = self._context(x)
        if self.channel_mul_conv is not None:
            x = x * torch.sigmoid(self.channel_mul_conv(context))
        if self.channel_add_conv is not None:
            x = x + self.channel_add_conv(context)
        return x
