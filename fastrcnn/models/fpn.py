"""Feature Pyramid Network (Lin et al., 2017), with all of MMDetection's options."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrcnn.layers import ConvModule
from fastrcnn.ops.conv_tile import half_size

INITS = {"Xavier": nn.init.xavier_uniform_, "Caffe2Xavier": partial(nn.init.kaiming_uniform_, a=1)}
UPSAMPLE = {"mode", "scale_factor", "align_corners", "recompute_scale_factor", "antialias"}
EXTRA_SOURCES = (False, True, "on_input", "on_lateral", "on_output")


class FPN(nn.Module):
    """Laterals (1x1), top-down sums, outputs (3x3), and `num_outs` levels in all.

    add_extra_convs: False pools the last output; True or "on_input" convolves the last used input, "on_lateral" its
    lateral, "on_output" the last output. relu_before_extra_convs: ReLU before every extra convolution but the first.
    end_level: last input used (-1: all); then num_outs must be the number of used inputs. init_cfg: type "Xavier", or
    "Caffe2Xavier" (Kaiming-uniform of gain 1, as torchvision and Detectron2 start). Source: MMDetection's FPN.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int,
        start_level: int = 0,
        end_level: int = -1,
        add_extra_convs: bool | str = False,
        relu_before_extra_convs: bool = False,
        no_norm_on_lateral: bool = False,
        conv_cfg: dict | None = None,
        norm_cfg: dict | None = None,
        act_cfg: dict | None = None,
        upsample_cfg: dict = dict(mode="nearest"),
        init_cfg: dict = dict(type="Xavier", layer="Conv2d", distribution="uniform"),
    ):
        super().__init__()
        named = dict(init_cfg or {})
        self.init_type = named.pop("type", None)
        odd = named.pop("layer", "Conv2d") != "Conv2d" or named.pop("distribution", "uniform") != "uniform"
        if self.init_type not in INITS or odd or named:
            raise ValueError(f"init_cfg: expected the type {' or '.join(INITS)} for Conv2d, uniform, got {init_cfg}")
        if set(upsample_cfg) - UPSAMPLE:
            raise ValueError(f"upsample_cfg: expected some of {sorted(UPSAMPLE)}, got {upsample_cfg}")
        if add_extra_convs not in EXTRA_SOURCES:
            raise ValueError(f"add_extra_convs: expected one of {EXTRA_SOURCES}, got {add_extra_convs!r}")
        num_ins = len(in_channels)
        last = num_ins - 1 if end_level in (-1, num_ins - 1) else end_level
        if not 0 <= start_level <= last < num_ins:
            raise ValueError(f"start_level, end_level: {start_level}, {end_level} do not fit {num_ins} inputs")
        used = last - start_level + 1
        if num_outs < used or (end_level not in (-1, num_ins - 1) and num_outs != used):
            raise ValueError(f"num_outs: {num_outs} does not fit the {used} levels {start_level}..{last}")
        self.start_level, self.last_level, self.num_outs, self.used = start_level, last, num_outs, used
        self.num_ins, self.out_channels = num_ins, out_channels
        self.add_extra_convs = "on_input" if add_extra_convs is True else add_extra_convs
        self.relu_before_extra_convs = relu_before_extra_convs
        self.upsample_cfg = dict(upsample_cfg)
        shared = dict(conv_cfg=conv_cfg, act_cfg=act_cfg, inplace=False)
        lateral_norm = None if no_norm_on_lateral else norm_cfg
        self.lateral_convs = nn.ModuleList(
            ConvModule(in_channels[i], out_channels, 1, norm_cfg=lateral_norm, **shared)
            for i in range(start_level, last + 1)
        )
        self.fpn_convs = nn.ModuleList(
            ConvModule(out_channels, out_channels, 3, padding=1, norm_cfg=norm_cfg, **shared) for _ in range(used)
        )
        if self.add_extra_convs:
            for i in range(num_outs - used):
                cin = in_channels[last] if i == 0 and self.add_extra_convs == "on_input" else out_channels
                self.fpn_convs.append(ConvModule(cin, out_channels, 3, 2, 1, norm_cfg=norm_cfg, **shared))
        self.init_weights()

    def init_weights(self) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                INITS[self.init_type](m.weight)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def _upsample(self, x: Tensor, size: Sequence[int]) -> Tensor:
        if "scale_factor" in self.upsample_cfg:
            return F.interpolate(x, **self.upsample_cfg)
        return F.interpolate(x, size=tuple(size), **self.upsample_cfg)

    def _doubles(self, coarse: Tensor, size: Sequence[int]) -> bool:
        """Whether `_upsample` reads pixel i of each axis from i // 2."""
        return self.upsample_cfg == dict(mode="nearest") and [half_size(n) for n in size] == list(coarse.shape[-2:])

    def _laterals(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The top-down pass. Where a lateral is linear, the coarser map rides on its convolution as the residual, which
        reads it upsampled where it is of half the size."""
        laterals: list[Tensor] = []
        for i in reversed(range(self.used)):
            x, lateral = inputs[i + self.start_level], self.lateral_convs[i]
            coarse, size = laterals[0] if laterals else None, x.shape[-2:]
            if coarse is None:
                out = lateral(x)
            elif lateral.activate is None and self._doubles(coarse, size):
                out = lateral(x, coarse, upsample_residual=True)
            elif lateral.activate is None:
                out = lateral(x, self._upsample(coarse, size))
            else:
                out = lateral(x) + self._upsample(coarse, size)
            laterals.insert(0, out)
        return laterals

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """inputs: [B, in_channels[i], H_i, W_i], finest first -> `num_outs` maps [B, out_channels, H_i, W_i]."""
        if len(inputs) != self.num_ins:
            raise ValueError(f"inputs: expected {self.num_ins} feature maps, got {len(inputs)}")
        laterals = self._laterals(inputs)
        outs = [conv(x) for conv, x in zip(self.fpn_convs, laterals)]
        if not self.add_extra_convs:
            while len(outs) < self.num_outs:
                outs.append(F.max_pool2d(outs[-1], 1, stride=2))
            return tuple(outs)
        sources = {"on_input": inputs[self.last_level], "on_lateral": laterals[-1], "on_output": outs[-1]}
        for i, conv in enumerate(self.fpn_convs[self.used :]):
            x = sources[self.add_extra_convs] if i == 0 else outs[-1]
            outs.append(conv(torch.relu(x) if i > 0 and self.relu_before_extra_convs else x))
        return tuple(outs)
