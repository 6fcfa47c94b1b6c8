"""Convolution + normalisation + activation, through the fused operator wherever the normalisation is fixed."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrcnn.layers.builders import build_activation, build_conv, build_norm
from fastrcnn.ops import conv_bn_relu
from fastrcnn.ops.conv_backward import pointwise_view
from fastrcnn.ops.conv_cpu import conv_prepared, prepared
from fastrcnn.ops.conv_tile import upsampled


def _has_fixed_statistics(norm: nn.Module) -> bool:
    fixed = isinstance(norm, nn.modules.batchnorm._BatchNorm) and not norm.training
    return fixed and norm.affine and norm.track_running_stats


def _is_prepared(conv: nn.Conv2d, x: Tensor, residual: Tensor | None) -> bool:
    """Whether `prepare_convolutions` has been here, and nothing but the result is asked for: no gradient, no program for
    elsewhere, in which the weights stand as they are."""
    if getattr(conv, "winograd", None) is None or torch.compiler.is_exporting():
        return False
    return not any(t is not None and t.requires_grad for t in (x, conv.weight, conv.bias, residual))


def _convolved(x: Tensor, conv: nn.Module, plain: bool) -> Tensor:
    """conv(x). Under autocast its gradient is torch's own, which a narrow 1x1 with a stride may not take: see
    `pointwise_view`."""
    seen = None
    if plain and conv.in_channels < 16:
        seen = pointwise_view(x, conv.kernel_size, conv.stride, conv.padding, conv.groups)
    return conv(x) if seen is None else F.conv2d(seen, conv.weight, conv.bias)


def conv_norm_act(
    x: Tensor,
    conv: nn.Module,
    norm: nn.Module | None,
    relu: bool = True,
    residual: Tensor | None = None,
    upsample_residual: bool = False,
) -> Tensor:
    """relu(norm(conv(x)) + residual): one fused pass where `norm` is absent or a batch norm in eval mode, plain modules
    where it trains or is of another kind. x [B, C, H, W], residual of the output's shape, or with upsample_residual of
    half its height and width, rounded up, read by nearest neighbour."""
    plain = type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    out = None
    if plain and not torch.is_autocast_enabled(x.device.type):
        where, epilogue = (conv.stride, conv.padding, conv.dilation, conv.groups), (residual, relu, upsample_residual)
        if norm is None or isinstance(norm, nn.Identity):
            if _is_prepared(conv, x, residual):
                return conv_prepared(x, conv.weight, conv.winograd, conv.bias, conv.padding, *epilogue)
            return conv_bn_relu(x, conv.weight, None, conv.bias, None, None, 0.0, *where, *epilogue)
        if conv.bias is None and _has_fixed_statistics(norm):
            statistics = norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps
            return conv_bn_relu(x, conv.weight, *statistics, *where, *epilogue)
        if norm.training:  # for the operator's gradients, which are the faster ones
            out = conv_bn_relu(x, conv.weight, None, conv.bias, None, None, 0.0, *where, None, False)
    out = _convolved(x, conv, plain) if out is None else out
    out = out if norm is None else norm(out)
    if residual is not None:
        out = out + (upsampled(residual, out.shape[2:]) if upsample_residual else residual)
    return torch.relu(out) if relu else out


class ConvModule(nn.Module):
    """mmcv's ConvModule in the order conv, norm, act; keys `conv.*` and `bn.*` (or `gn.*`).

    The convolution has a bias exactly when there is no norm (bias="auto").
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool | str = "auto",
        conv_cfg: dict | None = None,
        norm_cfg: dict | None = None,
        act_cfg: dict | None = dict(type="ReLU"),
        inplace: bool = True,
    ):
        super().__init__()
        bias = norm_cfg is None if bias == "auto" else bias
        self.conv = build_conv(
            conv_cfg, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=bias
        )
        self.norm_name = None
        if norm_cfg is not None:
            self.norm_name, norm = build_norm(norm_cfg, out_channels)
            self.add_module(self.norm_name, norm)
        self.activate = None if act_cfg is None else build_activation(act_cfg, inplace)
        self.init_weights()

    def init_weights(self) -> None:
        """Kaiming-normal (fan-out) and no bias, as mmcv starts it; a deformable convolution has a rule of its own."""
        if hasattr(self.conv, "init_weights"):
            self.conv.init_weights()
        else:
            slope = getattr(self.activate, "negative_slope", 0)
            rule = "leaky_relu" if slope else "relu"
            nn.init.kaiming_normal_(self.conv.weight, slope, "fan_out", rule)
            if self.conv.bias is not None:
                nn.init.zeros_(self.conv.bias)

    @property
    def norm(self) -> nn.Module | None:
        return None if self.norm_name is None else getattr(self, self.norm_name)

    def norm_pairs(self):
        """(conv, the module that owns the norm, the norm's name in it) for `fold_batch_norm`."""
        if self.norm_name is not None:
            yield self.conv, self, self.norm_name

    def forward(self, x: Tensor, residual: Tensor | None = None, upsample_residual: bool = False) -> Tensor:
        """x [B, in, H, W] -> [B, out, H', W']; `residual` is added before the activation, see `conv_norm_act`."""
        relu = isinstance(self.activate, nn.ReLU)
        out = conv_norm_act(x, self.conv, self.norm, relu, residual, upsample_residual)
        return out if relu or self.activate is None else self.activate(out)


@torch.no_grad()
def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Writes every batch norm into its convolution and joins convolutions that read one map (`join_outputs`), in place, for
    a model that will only predict: this is then done once instead of at every call. State-dict keys change, so it is for
    the deployed copy. Returns `model`."""
    for module in list(model.modules()):
        for conv, owner, name in getattr(module, "norm_pairs", tuple)():
            norm = getattr(owner, name)
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or type(conv) is not nn.Conv2d:
                continue
            if not norm.affine or not norm.track_running_stats:
                continue
            scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
            bias = norm.bias.double() - norm.running_mean.double() * scale
            if conv.bias is not None:
                bias += conv.bias.double() * scale
            conv.weight.copy_(conv.weight.double() * scale[:, None, None, None])
            conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
            setattr(owner, name, nn.Identity())
        if hasattr(module, "join_outputs"):
            module.join_outputs()
    return model


@torch.no_grad()
def prepare_convolutions(model: nn.Module) -> nn.Module:
    """Puts weights in the layout that the fused convolution reads, and on a CPU those of float32 3x3 convolutions into the
    form of Winograd's algorithm, too (`ops/conv_winograd.py`; four times their memory, beside them). For a folded model
    whose weights change no more. Returns `model`."""
    for m in model.modules():
        if type(m) is nn.Conv2d:
            m.to(memory_format=torch.channels_last)
            m.winograd = prepared(m.weight, m.stride, m.dilation, m.groups)
    return model
