"""Which convolution answers which call. Nothing is guessed: the first call of a kind runs the candidates, drops those that
disagree with the first one (cuDNN's, oneDNN's), and times the others; later ones take the fastest.

A kind is a line that names the device, the dtype, the shapes and the epilogue; pixels count to the nearest quarter of a
doubling, so that pictures of many sizes are few kinds.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from fastrcnn._write import replacing

# kind -> milliseconds of its candidates, the fastest first
PLAN: dict[str, dict[str, float]] = {}
ROUNDS = 5


def choose(
    kind: str, names: Sequence[str], run: Callable[[str], Tensor], clock: Callable[[Callable], float] | None = None
) -> str:
    """The fastest of `names` for this kind by the plan. What is not planned is measured, on CUDA by `milliseconds`; there
    nothing is under stream capture and in deterministic mode, and names[0] answers. clock: `host_milliseconds`, of a
    caller on the CPU that knows that it may."""
    if kind not in PLAN and len(names) > 1 and (clock or _may_measure()):
        PLAN[kind] = _measured(names, run, clock or milliseconds)
    return next((name for name in PLAN.get(kind, ()) if name in names), names[0])


def save_plan(path: str | os.PathLike) -> None:
    """JSON of what has been measured or loaded; a file that is there is replaced at once or not at all."""
    with replacing(Path(path)) as file:
        file.write(json.dumps(PLAN, indent=1).encode())


def plan_beside(weights: str | os.PathLike) -> Path:
    """Where a plan lies that is loaded with a file of weights: `model.safetensors.plan.json`."""
    return Path(f"{os.fspath(weights)}.plan.json")


def load_plan(path: str | os.PathLike) -> dict[str, dict[str, float]]:
    """Adds a saved plan to this process's, and returns it, the fastest of each kind first. Raises ValueError naming the
    file and what is wrong in it."""
    try:
        plan = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a plan: {error}") from None
    if not isinstance(plan, dict):
        raise ValueError(f"{path}: expected an object of kinds, got {type(plan).__name__}")
    for kind, times in plan.items():
        if not isinstance(times, dict) or not times or not all(map(_is_time, times.values())):
            raise ValueError(f"{path}: {kind}: expected the milliseconds of each candidate, got {times!r:.80}")
    plan = {kind: _fastest_first(times) for kind, times in plan.items()}
    PLAN.update(plan)
    return plan


def _is_time(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def _fastest_first(times: dict[str, float]) -> dict[str, float]:
    return dict(sorted(times.items(), key=lambda item: item[1]))


@cache
def kind_of(device: str, dtype: torch.dtype, weight: tuple, pixels: int, where: tuple, epilogue: str) -> str:
    """weight: its shape; pixels: of all images' outputs; where: stride, padding, dilation, groups."""
    size = round(4 * math.log2(max(pixels, 1))) / 4
    stride, padding, dilation = map(_short, where[:3])
    kernel = f"{weight[1] * where[3]}->{weight[0]} {weight[2]}x{weight[3]} /{stride} p{padding} d{dilation} g{where[3]}"
    return f"{device}, {str(dtype).removeprefix('torch.')}, {kernel}, 2^{size:g} pixels{epilogue}"


def _short(pair: Sequence[int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"


def _may_measure() -> bool:
    if torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic:
        return False
    return not torch.cuda.is_current_stream_capturing()


def _measured(
    names: Sequence[str], run: Callable[[str], Tensor], clock: Callable[[Callable], float]
) -> dict[str, float]:
    times, right = {}, run(names[0])
    for name in names:
        try:
            if name == names[0] or _agree(run(name), right):
                times[name] = clock(partial(run, name))
        except (ValueError, torch.OutOfMemoryError):  # a shape that this one does not take, or no room for two results
            continue
    return _fastest_first(times)


def _agree(a: Tensor, b: Tensor) -> bool:
    """To some roundings of the largest number; no NaN does."""
    roundings = 64 if b.dtype == torch.float32 else 4  # a sum's own, or the result's
    unit = roundings * torch.finfo(b.dtype).eps * torch.linalg.vector_norm(b, math.inf).float()
    return all(bool(((x.float() - y.float()).abs() <= unit).all()) for x, y in zip(a, b))  # image by image: less memory


def milliseconds(call: Callable[[], Tensor]) -> float:
    """The fastest of some runs between two events on the current stream."""
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)


def host_milliseconds(call: Callable[[], Tensor]) -> float:
    """The fastest of some runs on the CPU, of fewer where one takes long."""
    times = []
    while len(times) < ROUNDS and sum(times) < 30:
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)
