"""Argument checks shared by the public functions: each error names the argument, what came and what was expected."""

import reprlib
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
NUMBERS = (int, float, np.integer, np.floating, torch.SymInt, torch.SymFloat)
MOST = sys.float_info.max
LARGEST = 2**31 - 1  # what the kernels' int holds
ANY_COUNT = 2**63 - 1  # of what is only a limit


def check_tensor(name: str, value, shape: str, *, floating: bool = True, last: int | None = None) -> None:
    """`shape` is documentation and rank at once: "N, 4" asks for two dimensions. `last` fixes the last one's size."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape [{shape}], got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {value.layout}")
    rank = len(shape.split(","))
    if value.dim() != rank or (last is not None and value.shape[-1] != last):
        raise ValueError(f"{name}: expected shape [{shape}], got {list(value.shape)}")
    if floating and value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected a floating point tensor, got {value.dtype}")
    if not floating and value.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected an integer tensor, got {value.dtype}")


def check_map(name: str, value) -> None:
    """A feature map [B, C, H, W] of at least one pixel: of none there is nothing to sample."""
    check_tensor(name, value, "B, C, H, W")
    if value.shape[2] < 1 or value.shape[3] < 1:
        raise ValueError(f"{name}: expected [B, C, H, W] of at least one pixel, got {list(value.shape)}")


def check_same_length(name: str, value: Tensor, other_name: str, other: Tensor, dims: int = 1) -> None:
    if value.shape[:dims] != other.shape[:dims]:
        got, want = list(value.shape), list(other.shape)
        raise ValueError(f"{name}: expected the leading size of {other_name} {want}, got {got}")


def check_same_device(**tensors: Tensor | None) -> None:
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"expected all tensors on one device, got {devices}")


def _shown(value) -> str:
    return f"{type(value).__name__} {list(getattr(value, 'shape', ())) or reprlib.repr(value)}"


def check_number(name: str, value, low: float = -MOST, high: float = MOST) -> float:
    """`value`, a finite number in [low, high], as a float. A bool, a string or a tensor is none."""
    if isinstance(value, bool) or not isinstance(value, NUMBERS):
        raise TypeError(f"{name}: expected a number, got {_shown(value)}")
    if not low <= value <= high:
        span = "a finite number" if high == MOST else f"a number in [{low:g}, {high:g}]"
        raise ValueError(f"{name}: expected {span}, got {value}")
    return float(value)


def check_positive(name: str, value) -> float:
    number = check_number(name, value)
    if not number > 0:
        raise ValueError(f"{name}: expected a number > 0, got {value}")
    return number


def check_numbers(name: str, values, count: int) -> list[float]:
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected {count} numbers, got {_shown(values)}")
    if len(values) != count:
        raise ValueError(f"{name}: expected {count} numbers, got {len(values)}: {values}")
    return [check_number(f"{name}[{i}]", v) for i, v in enumerate(values)]


def check_int(name: str, value, low: int = -LARGEST, high: int = LARGEST) -> int:
    """`value`, a whole number in [low, high]; more than the kernels' int holds would be cut off on the way to them."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {_shown(value)}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected an int in [{low}, {high}], got {value}")
    return int(value) if isinstance(value, np.integer) else value


def check_pair(name: str, value, low: int) -> list[int]:
    """An int or two of them (height, width), each >= low."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        if len(value) != 2:
            raise ValueError(f"{name}: expected an int or two of them, got {value!r}")
        return [check_int(f"{name}[{i}]", v, low) for i, v in enumerate(value)]
    return [check_int(name, value, low)] * 2


def check_flag(name: str, value) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {_shown(value)}")
    return bool(value)


def check_choice(name: str, value, choices: Sequence[str]) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {tuple(choices)}, got {_shown(value)}")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {tuple(choices)}, got {value!r}")
    return value


def check_tensors(name: str, values) -> list[Tensor]:
    """A list or tuple of at least one tensor, whose shapes and dtypes the caller looks at."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name}: expected a list of tensors, got {_shown(values)}")
    if not values:
        raise ValueError(f"{name}: expected at least one tensor, got none")
    for i, value in enumerate(values):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}[{i}]: expected a tensor, got {_shown(value)}")
    return list(values)


def coordinates(t: Tensor) -> Tensor:
    """`t` in the dtype that box arithmetic runs in: float64 stays, everything else becomes float32."""
    return t if t.dtype == torch.float64 else t.float()


def check_coder(means, stds, wh_ratio_clip) -> tuple[list[float], list[float], float]:
    return (
        check_numbers("means", means, 4),
        check_numbers("stds", stds, 4),
        check_positive("wh_ratio_clip", wh_ratio_clip),
    )
