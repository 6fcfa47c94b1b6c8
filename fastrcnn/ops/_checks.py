"""Argument checks shared by the public functions: each error names the argument, what came and what was expected."""

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_tensor(name: str, value, shape: str, *, floating: bool = True, last: int | None = None) -> None:
    """`shape` is documentation and rank at once: "N, 4" asks for two dimensions. `last` fixes the last one's size."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape [{shape}], got {type(value).__name__}")
    rank = len(shape.split(","))
    if value.dim() != rank or (last is not None and value.shape[-1] != last):
        raise ValueError(f"{name}: expected shape [{shape}], got {list(value.shape)}")
    if floating and value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected a floating point tensor, got {value.dtype}")
    if not floating and (value.dtype.is_floating_point or value.dtype == torch.bool):
        raise TypeError(f"{name}: expected an integer tensor, got {value.dtype}")


def check_same_length(name: str, value: Tensor, other_name: str, other: Tensor, dims: int = 1) -> None:
    if value.shape[:dims] != other.shape[:dims]:
        got, want = list(value.shape), list(other.shape)
        raise ValueError(f"{name}: expected the leading size of {other_name} {want}, got {got}")


def check_same_device(**tensors: Tensor | None) -> None:
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"expected all tensors on one device, got {devices}")


def check_unit(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")


def check_max_output(max_output: int) -> None:
    if max_output < 0:
        raise ValueError(f"max_output: expected a number >= 0, got {max_output}")


def coordinates(t: Tensor) -> Tensor:
    """`t` in the dtype that box arithmetic runs in: float64 stays, everything else becomes float32."""
    return t if t.dtype == torch.float64 else t.float()


def check_coder(means, stds, wh_ratio_clip: float) -> None:
    if len(means) != 4 or len(stds) != 4:
        raise ValueError(f"means, stds: expected four numbers each, got {means} and {stds}")
    if not wh_ratio_clip > 0:
        raise ValueError(f"wh_ratio_clip: expected a number > 0, got {wh_ratio_clip}")
