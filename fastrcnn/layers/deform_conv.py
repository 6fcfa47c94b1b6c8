"""Deformable convolutions that compute their own offsets: mmcv's `DCN` and `DCNv2`, its names, keys and initial values.

The offsets come from an ordinary convolution `conv_offset` of the same geometry, whose weights start at zero: the layer
then begins as the plain convolution (v2: as half of it, since every mask is sigmoid(0)). Early checkpoints keep the offsets
of `conv2` in `conv2_offset`; `fastrcnn.load_weights` renames them (torch's own loading shows a layer its own keys alone).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from fastrcnn.ops.deform_conv2d import deform_conv2d


class _DeformConvPack(nn.Module):
    """What both share: the weight and `conv_offset`."""

    planes_per_tap: int  # channels of conv_offset for each tap and offset group

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: int | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
        deform_groups: int,
        bias: bool,
    ):
        super().__init__()
        for name, channels, count in (
            ("groups", in_channels, groups),
            ("groups", out_channels, groups),
            ("deform_groups", in_channels, deform_groups),
        ):
            if count < 1 or channels % count:
                raise ValueError(f"{name}: expected a divisor of {channels} channels, got {count}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = _pair(kernel_size), _pair(stride)
        self.padding, self.dilation = _pair(padding), _pair(dilation)
        self.groups, self.deform_groups = groups, deform_groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels))
        else:
            self.register_parameter("bias", None)
        planes = deform_groups * self.planes_per_tap * math.prod(self.kernel_size)
        where = self.kernel_size, self.stride, self.padding, self.dilation
        self.conv_offset = nn.Conv2d(in_channels, planes, *where)
        self.init_weights()

    def init_weights(self) -> None:
        """Offsets start at zero; a subclass starts its weight."""
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"deform_groups={self.deform_groups}, bias={self.bias is not None}"
        )


class DeformConv2dPack(_DeformConvPack):
    """Deformable convolution v1 (mmcv's "DCN"). x [B, in, H, W] -> [B, out, H', W']. It has no bias.

    An input smaller than the kernel needs no special care here: mmcv pads it, with the same result.
    """

    planes_per_tap = 2

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1,
                 deform_groups=1, bias=False):  # fmt: skip
        if bias:
            raise ValueError(f"bias: DeformConv2dPack has none, got {bias!r}")
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deform_groups, False
        )

    def init_weights(self) -> None:
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        super().init_weights()

    def forward(self, x: Tensor) -> Tensor:
        where = self.stride, self.padding, self.dilation
        return deform_conv2d(x, self.conv_offset(x), self.weight, None, *where)


class ModulatedDeformConv2dPack(_DeformConvPack):
    """Deformable convolution v2 (mmcv's "DCNv2"): each tap is also weighted, by sigmoid of the last third of conv_offset's
    channels. x [B, in, H, W] -> [B, out, H', W']."""

    planes_per_tap = 3

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1,
                 deform_groups=1, bias=True):  # fmt: skip
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deform_groups, bool(bias)
        )

    def init_weights(self) -> None:
        bound = 1 / math.sqrt(self.in_channels * math.prod(self.kernel_size))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        super().init_weights()

    def forward(self, x: Tensor) -> Tensor:
        # The first two thirds are the offsets as the operator takes them, the last the mask.
        planes = self.conv_offset(x)
        taps = planes.shape[1] // 3
        offset, mask = planes[:, : 2 * taps], planes[:, 2 * taps :].sigmoid()
        return deform_conv2d(x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)
