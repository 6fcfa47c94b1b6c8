"""ResNet (He et al., 2016), ResNeXt (Xie et al., 2017) and ResNet-V1d (He et al., "Bag of Tricks", 2019).

Arguments, defaults and state-dict keys are MMDetection's; a torchvision ResNet's weights fit by name.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastrcnn.layers import build_conv, build_norm, build_plugin, conv_norm_act
from fastrcnn.models.pretrained import pretrained_source, take_pretrained
from fastrcnn.ops.conv_stem import stem

POSITIONS = ("after_conv1", "after_conv2", "after_conv3")


def _downsample(x: Tensor, downsample: nn.Sequential | None) -> Tensor:
    """The shortcut: optional average pool, 1x1 convolution, norm."""
    if downsample is None:
        return x
    *pool, conv, norm = downsample
    return conv_norm_act(pool[0](x) if pool else x, conv, norm, relu=False)


class _Block(nn.Module):
    """What both blocks share: checkpointing, and the list of norms to fold."""

    def forward(self, x: Tensor) -> Tensor:
        if self.with_cp and x.requires_grad:
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _add_norm(self, norm_cfg: dict, channels: int, index: int) -> None:
        name, norm = build_norm(norm_cfg, channels, index)
        setattr(self, f"norm{index}_name", name)
        self.add_module(name, norm)

    def _conv_norm(self, x: Tensor, index: int, relu: bool = True, residual: Tensor | None = None) -> Tensor:
        norm = getattr(self, getattr(self, f"norm{index}_name"))
        return conv_norm_act(x, getattr(self, f"conv{index}"), norm, relu, residual)

    def norm_pairs(self):
        for i in range(1, self.num_convs + 1):
            yield getattr(self, f"conv{i}"), self, getattr(self, f"norm{i}_name")
        if self.downsample is not None:
            yield self.downsample[-2], self.downsample, str(len(self.downsample) - 1)


class BasicBlock(_Block):
    """3x3, 3x3; the second has neither stride nor dilation."""

    expansion = 1
    num_convs = 2

    def __init__(self, inplanes, planes, stride=1, dilation=1, downsample=None, style="pytorch", with_cp=False,
                 conv_cfg=None, norm_cfg=dict(type="BN"), dcn=None, plugins=()):  # fmt: skip
        super().__init__()
        if dcn is not None or plugins:
            raise ValueError("dcn, plugins: only bottlenecks (depth 50 and above) have a place for them")
        self.conv1 = build_conv(conv_cfg, inplanes, planes, 3, stride, dilation, dilation, bias=False)
        self._add_norm(norm_cfg, planes, 1)
        self.conv2 = build_conv(conv_cfg, planes, planes, 3, padding=1, bias=False)
        self._add_norm(norm_cfg, planes, 2)
        self.downsample = downsample
        self.with_cp = with_cp

    def _forward(self, x: Tensor) -> Tensor:
        out = self._conv_norm(x, 1)
        return self._conv_norm(out, 2, residual=_downsample(x, self.downsample))


class Bottleneck(_Block):
    """1x1, 3x3, 1x1; the stride is on the 3x3 (style "pytorch") or on the first 1x1 ("caffe").

    dcn: the 3x3's dict, dict(type="DCN" or "DCNv2", deform_groups=1, fallback_on_stride=False); with fallback_on_stride a
    3x3 with a stride stays an ordinary one. plugins: dicts of `cfg` (see `build_plugin`) and `position`.
    """

    expansion = 4
    num_convs = 3

    def __init__(self, inplanes, planes, stride=1, dilation=1, downsample=None, style="pytorch", with_cp=False,
                 conv_cfg=None, norm_cfg=dict(type="BN"), dcn=None, plugins=(), groups=1, base_width=4,
                 base_channels=64):  # fmt: skip
        super().__init__()
        if style not in ("pytorch", "caffe"):
            raise ValueError(f'style: expected "pytorch" or "caffe", got {style!r}')
        width = planes if groups == 1 else math.floor(planes * (base_width / base_channels)) * groups
        stride1, stride2 = (1, stride) if style == "pytorch" else (stride, 1)
        out = planes * self.expansion
        self.conv1 = build_conv(conv_cfg, inplanes, width, 1, stride1, bias=False)
        self._add_norm(norm_cfg, width, 1)
        conv2_cfg = dict(dcn or {})
        if conv2_cfg.pop("fallback_on_stride", False) and stride2 != 1:
            conv2_cfg = {}
        if conv2_cfg and conv_cfg is not None:
            raise ValueError(f"conv_cfg: expected None beside dcn, got {conv_cfg}")
        self.conv2 = build_conv(conv2_cfg or conv_cfg, width, width, 3, stride2, dilation, dilation, groups, bias=False)
        self._add_norm(norm_cfg, width, 2)
        self.conv3 = build_conv(conv_cfg, width, out, 1, bias=False)
        self._add_norm(norm_cfg, out, 3)
        self.downsample = downsample
        self.with_cp = with_cp
        self.plugin_names: dict[str, list[str]] = {position: [] for position in POSITIONS}
        for plugin in plugins:
            position = plugin.get("position")
            if position not in POSITIONS:
                raise ValueError(f"plugins: expected a position of {POSITIONS}, got {position!r}")
            self._add_plugin(plugin["cfg"], position, out if position == "after_conv3" else width)

    def _add_plugin(self, cfg: dict, position: str, channels: int) -> None:
        name, layer = build_plugin(cfg, in_channels=channels)
        if hasattr(self, name):
            raise ValueError(f"plugins: two are called {name!r}; give one a postfix")
        self.add_module(name, layer)
        self.plugin_names[position].append(name)

    def _plugged(self, x: Tensor, position: str) -> Tensor:
        for name in self.plugin_names[position]:
            x = getattr(self, name)(x)
        return x

    def _forward(self, x: Tensor) -> Tensor:
        out = self._plugged(self._conv_norm(x, 1), "after_conv1")
        out = self._plugged(self._conv_norm(out, 2), "after_conv2")
        shortcut = _downsample(x, self.downsample)
        if not self.plugin_names["after_conv3"]:
            return self._conv_norm(out, 3, residual=shortcut)
        return torch.relu(self._plugged(self._conv_norm(out, 3, relu=False), "after_conv3") + shortcut)


def make_res_layer(block, inplanes, planes, num_blocks, stride=1, dilation=1, avg_down=False, conv_cfg=None,
                   norm_cfg=dict(type="BN"), **kwargs) -> nn.Sequential:  # fmt: skip
    """One stage: `num_blocks` blocks, the first with the stride and, where shapes differ, the projection shortcut."""
    out = planes * block.expansion
    downsample = None
    if stride != 1 or inplanes != out:
        pool = [nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)] if avg_down else []
        conv = build_conv(conv_cfg, inplanes, out, 1, stride=1 if avg_down else stride, bias=False)
        downsample = nn.Sequential(*pool, conv, build_norm(norm_cfg, out)[1])
    shared = dict(dilation=dilation, conv_cfg=conv_cfg, norm_cfg=norm_cfg, **kwargs)
    blocks = [block(inplanes, planes, stride=stride, downsample=downsample, **shared)]
    blocks += [block(out, planes, stride=1, **shared) for _ in range(1, num_blocks)]
    return nn.Sequential(*blocks)


def init_convs_and_norms(module: nn.Module) -> None:
    """Kaiming-normal convolutions (fan-out), unit norms; layers with a rule of their own (plugins, offsets) follow it."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(m, nn.modules.batchnorm._BatchNorm | nn.GroupNorm) and m.weight is not None:
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)
    _follow_own_rules(module)


def _follow_own_rules(module: nn.Module) -> None:
    for m in module.children():
        if hasattr(m, "init_weights"):
            m.init_weights()
        else:
            _follow_own_rules(m)


class ResNet(nn.Module):
    """Feature maps of the stages `out_indices`, finest first.

    depth: 18, 34 (BasicBlock), 50, 101, 152 (Bottleneck). frozen_stages: -1 trains everything, 0 freezes the stem, k the
    stem and the first k stages. norm_eval keeps batch norms on their running statistics while training. with_cp
    recomputes blocks in the backward pass to save memory. dcn: the dict of a deformable 3x3 convolution (see Bottleneck)
    for the stages marked in stage_with_dcn. plugins: dicts with `cfg`, `position` ("after_conv1", "after_conv2" or
    "after_conv3") and optionally `stages`, one bool a stage. pretrained, or init_cfg=dict(type="Pretrained",
    checkpoint=..., prefix=...): a file, an https address or MMDetection's "torchvision://resnet50" that `init_weights`
    reads; building reads nothing. Source: MMDetection's ResNet.
    """

    arch_settings = {
        18: (BasicBlock, (2, 2, 2, 2)),
        34: (BasicBlock, (3, 4, 6, 3)),
        50: (Bottleneck, (3, 4, 6, 3)),
        101: (Bottleneck, (3, 4, 23, 3)),
        152: (Bottleneck, (3, 8, 36, 3)),
    }

    def __init__(
        self,
        depth: int,
        in_channels: int = 3,
        stem_channels: int | None = None,
        base_channels: int = 64,
        num_stages: int = 4,
        strides: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
        out_indices: Sequence[int] = (0, 1, 2, 3),
        style: str = "pytorch",
        deep_stem: bool = False,
        avg_down: bool = False,
        frozen_stages: int = -1,
        conv_cfg: dict | None = None,
        norm_cfg: dict = dict(type="BN", requires_grad=True),
        norm_eval: bool = True,
        dcn: dict | None = None,
        stage_with_dcn: Sequence[bool] = (False, False, False, False),
        plugins: Sequence[dict] | None = None,
        with_cp: bool = False,
        zero_init_residual: bool = True,
        pretrained: str | None = None,
        init_cfg: dict | None = None,
    ):
        super().__init__()
        if depth not in self.arch_settings:
            raise ValueError(f"depth: expected one of {sorted(self.arch_settings)}, got {depth}")
        if not 1 <= num_stages <= 4 or max(out_indices) >= num_stages:
            raise ValueError(f"out_indices: expected indices below num_stages (1..4), got {out_indices}, {num_stages}")
        if len(strides) < num_stages or len(dilations) < num_stages:
            raise ValueError(f"strides, dilations: expected {num_stages} entries, got {strides} and {dilations}")
        if not -1 <= frozen_stages <= num_stages:
            raise ValueError(f"frozen_stages: expected -1..{num_stages}, got {frozen_stages}")
        if dcn is not None and len(stage_with_dcn) != num_stages:
            raise ValueError(f"stage_with_dcn: expected {num_stages} entries, got {stage_with_dcn}")
        for plugin in plugins or ():
            unknown = set(plugin) - {"cfg", "position", "stages"}
            if unknown or len(plugin.get("stages") or strides[:num_stages]) != num_stages:
                raise ValueError(f"plugins: expected cfg, position and stages (one of {num_stages} each), got {plugin}")
        self.pretrained = pretrained_source(pretrained, init_cfg)
        block, num_blocks = self.arch_settings[depth]
        self.depth, self.out_indices, self.deep_stem = depth, tuple(out_indices), deep_stem
        self.style, self.in_channels = style, in_channels
        self.frozen_stages, self.norm_eval, self.zero_init_residual = frozen_stages, norm_eval, zero_init_residual
        inplanes = stem_channels or base_channels
        self._make_stem(in_channels, inplanes, conv_cfg, norm_cfg)
        self.res_layers = []
        for i in range(num_stages):
            planes = base_channels * 2**i
            layer = make_res_layer(
                block, inplanes, planes, num_blocks[i], strides[i], dilations[i], avg_down, conv_cfg, norm_cfg,
                style=style, with_cp=with_cp, dcn=dcn if dcn is not None and stage_with_dcn[i] else None,
                plugins=[p for p in plugins or () if (p.get("stages") or [True] * num_stages)[i]],
                **self._block_options(),
            )  # fmt: skip
            inplanes = planes * block.expansion
            self.add_module(f"layer{i + 1}", layer)
            self.res_layers.append(f"layer{i + 1}")
        self.feat_dim = inplanes
        self._init_at_random()
        self._freeze_stages()

    def _block_options(self) -> dict:
        return {}

    def _make_stem(self, in_channels: int, channels: int, conv_cfg, norm_cfg) -> None:
        if self.deep_stem:
            half = channels // 2
            layers: list[nn.Module] = []
            for cin, cout, stride in ((in_channels, half, 2), (half, half, 1), (half, channels, 1)):
                conv = build_conv(conv_cfg, cin, cout, 3, stride, 1, bias=False)
                layers += [conv, build_norm(norm_cfg, cout)[1], nn.ReLU(inplace=True)]
            self.stem = nn.Sequential(*layers)
        else:
            self.conv1 = build_conv(conv_cfg, in_channels, channels, 7, 2, 3, bias=False)
            self.norm1_name, norm1 = build_norm(norm_cfg, channels, 1)
            self.add_module(self.norm1_name, norm1)
        self.maxpool = nn.MaxPool2d(3, 2, 1)

    def set_style(self, style: str) -> None:
        """Moves each stage's stride to the 3x3 ("pytorch") or the first 1x1 ("caffe") of its first bottleneck."""
        self.style = style
        for block in self.modules():
            if isinstance(block, Bottleneck):
                strides = (1, 1), max(block.conv1.stride, block.conv2.stride)
                block.conv1.stride, block.conv2.stride = strides if style == "pytorch" else strides[::-1]
                if hasattr(block.conv2, "conv_offset"):
                    block.conv2.conv_offset.stride = block.conv2.stride

    def train_norms(self, requires_grad: bool) -> None:
        """Whether the norms' scales and offsets are trained, outside of the frozen stages."""
        for m in self.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.requires_grad_(requires_grad)
        self._freeze_stages()

    def norm_pairs(self):
        if self.deep_stem:
            for i in (0, 3, 6):
                yield self.stem[i], self.stem, str(i + 1)
        else:
            yield self.conv1, self, self.norm1_name

    def init_weights(self, state: Mapping[str, Tensor] | None = None) -> None:
        """Fresh weights: those of `state`, a classifier's, for every key that it has; else Kaiming-normal convolutions
        (fan-out) and unit norms, with zero_init_residual each block starting as identity.

        Raises ValueError where `pretrained` or init_cfg names a checkpoint and no state is handed in.
        """
        self._init_at_random()
        take_pretrained(self, state)

    def _init_at_random(self) -> None:
        init_convs_and_norms(self)
        if self.zero_init_residual and self.pretrained is None:
            for m in self.modules():
                last = getattr(m, getattr(m, f"norm{m.num_convs}_name")) if isinstance(m, _Block) else None
                if last is not None and last.weight is not None:
                    nn.init.zeros_(last.weight)

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        stem = [self.stem] if self.deep_stem else [self.conv1, getattr(self, self.norm1_name)]
        for module in stem + [getattr(self, f"layer{i}") for i in range(1, self.frozen_stages + 1)]:
            module.eval()
            for parameter in module.parameters():
                parameter.requires_grad = False

    def train(self, mode: bool = True):
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for m in self.modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):
                    m.eval()
        return self

    def _stem(self, x: Tensor) -> Tensor:
        norm = getattr(self, self.norm1_name)
        folded = isinstance(norm, nn.Identity) and type(self.conv1) is nn.Conv2d
        if folded and not torch.is_autocast_enabled(x.device.type):
            return stem(x, self.conv1.weight, self.conv1.bias)
        return self.maxpool(conv_norm_act(x, self.conv1, norm))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [B, in_channels, H, W] -> one [B, C_i, H / stride_i, W / stride_i] for each of `out_indices`."""
        x = x.contiguous(memory_format=torch.channels_last)
        if self.deep_stem:
            for i in (0, 3, 6):
                x = conv_norm_act(x, self.stem[i], self.stem[i + 1])
            x = self.maxpool(x)
        else:
            x = self._stem(x)
        outs = []
        for i, name in enumerate(self.res_layers):
            x = getattr(self, name)(x)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)


class ResNeXt(ResNet):
    """ResNet with grouped 3x3 convolutions of width floor(planes * base_width / base_channels) * groups."""

    arch_settings = {d: ResNet.arch_settings[d] for d in (50, 101, 152)}

    def __init__(self, groups: int = 1, base_width: int = 4, base_channels: int = 64, **kwargs):
        self._width_rule = dict(groups=groups, base_width=base_width, base_channels=base_channels)
        super().__init__(base_channels=base_channels, **kwargs)

    def _block_options(self) -> dict:
        return self._width_rule


class ResNetV1d(ResNet):
    """ResNet with a stem of three 3x3 convolutions and average pooling before the projection shortcuts."""

    def __init__(self, **kwargs):
        super().__init__(deep_stem=True, avg_down=True, **kwargs)
