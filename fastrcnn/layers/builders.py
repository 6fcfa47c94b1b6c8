"""Layers from MMDetection's configuration dicts: `dict(type="BN", requires_grad=True)` and the like."""

import re
from collections.abc import Callable

from torch import Tensor, nn

from fastrcnn.layers.deform_conv import DeformConv2dPack, ModulatedDeformConv2dPack


class ConvWS2d(nn.Conv2d):
    """Convolution with weight standardisation (Qiao et al., 2019): each filter has mean 0 and deviation 1 (+ eps)."""

    def __init__(self, *args, eps: float = 1e-5, **kwargs):
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + self.eps)
        return self._conv_forward(x, flat.view_as(self.weight), self.bias)


CONVS = {
    "Conv2d": nn.Conv2d,
    "Conv": nn.Conv2d,
    "ConvWS": ConvWS2d,
    "DCN": DeformConv2dPack,
    "DCNv2": ModulatedDeformConv2dPack,
}
NORMS = {
    "BN": ("bn", nn.BatchNorm2d),
    "BN2d": ("bn", nn.BatchNorm2d),
    "SyncBN": ("bn", nn.SyncBatchNorm),
    "GN": ("gn", nn.GroupNorm),
}
ACTIVATIONS = {
    "ReLU": nn.ReLU,
    "LeakyReLU": nn.LeakyReLU,
    "PReLU": nn.PReLU,
    "ReLU6": nn.ReLU6,
    "ELU": nn.ELU,
    "GELU": nn.GELU,
    "SiLU": nn.SiLU,
    "Swish": nn.SiLU,
    "HSwish": nn.Hardswish,
    "Sigmoid": nn.Sigmoid,
    "Tanh": nn.Tanh,
}


def split_type(cfg: dict, what: str, known) -> tuple[str, dict]:
    """("BN", {"requires_grad": True}) from dict(type="BN", requires_grad=True)."""
    if not isinstance(cfg, dict) or "type" not in cfg:
        raise TypeError(f"{what}: expected a dict with the key 'type', got {cfg!r}")
    options = dict(cfg)
    kind = options.pop("type")
    if kind not in known:
        raise ValueError(f"{what}: unknown type {kind!r}, expected one of {sorted(known)}")
    return kind, options


def construct(make: Callable[..., nn.Module], what: str, kind: str, *args, **options) -> nn.Module:
    """make(*args, **options). Raises ValueError naming `what`, the type `kind` and the option that it has not."""
    try:
        return make(*args, **options)
    except TypeError as error:
        option = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if option is None or option[1] not in options:
            raise
        raise ValueError(f"{what}: {kind} has no option {option[1]!r}, or it is not supported") from None


def build_conv(conv_cfg: dict | None, *args, **kwargs) -> nn.Module:
    """A convolution; None is nn.Conv2d."""
    if conv_cfg is None:
        return nn.Conv2d(*args, **kwargs)
    kind, options = split_type(conv_cfg, "conv_cfg", CONVS)
    return construct(CONVS[kind], "conv_cfg", kind, *args, **kwargs, **options)


def build_norm(norm_cfg: dict, num_features: int, postfix: int | str = "") -> tuple[str, nn.Module]:
    """(name, layer): the name is MMDetection's state-dict key, "bn1" for BN with postfix 1, "gn" for GN without."""
    kind, options = split_type(norm_cfg, "norm_cfg", NORMS)
    requires_grad = options.pop("requires_grad", True)
    prefix, layer = NORMS[kind]
    if kind == "GN":
        options["num_channels"] = num_features
    else:
        options["num_features"] = num_features
    norm = construct(layer, "norm_cfg", kind, **options)
    for parameter in norm.parameters():
        parameter.requires_grad = requires_grad
    return f"{prefix}{postfix}", norm


def build_activation(act_cfg: dict, inplace: bool = True) -> nn.Module:
    kind, options = split_type(act_cfg, "act_cfg", ACTIVATIONS)
    if kind not in ("PReLU", "GELU", "Sigmoid", "Tanh"):
        options.setdefault("inplace", inplace)
    return construct(ACTIVATIONS[kind], "act_cfg", kind, **options)
