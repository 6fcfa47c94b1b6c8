"""What every benchmark shares: proof first, then both sides timed in turn, one table, JSON rows.

A row: op, shape, dtype, device, ours_ms, rival, rival_ms, speedup, floor_ms, max_error. Times are medians of eager calls
made alternately, so that both sides see the same machine. floor_ms = max(bytes read and written once / copy rate,
FLOP / matmul rate), with both rates measured in the same run. float32 is float32: TF32 is off for convolutions, as torch
has it for matrices.
"""

import argparse
import functools
import json
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastrcnn._extension import has_kernel


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small shapes and few repetitions: a smoke test")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device(args.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return args


def require_kernel(op: str, device: str, *dtypes: torch.dtype) -> None:
    """A reference must never be timed as if it were a kernel."""
    for dtype in dtypes or (torch.float32,):
        if not has_kernel(op, torch.device(device).type, dtype):
            raise SystemExit(f"{op} has no kernel for {dtype} on {device}, only the reference: nothing to time "
                             "(see `fastrcnn info`)")  # fmt: skip


@functools.cache
def _flush_buffer(device: str) -> torch.Tensor:
    return torch.empty(1 << 28, dtype=torch.uint8, device=device)  # larger than any GPU's L2 cache


def _once(call: Callable, device: str) -> float:
    """One call in ms. On CUDA between two events behind a memset of 256 MB, which empties the L2 cache: the host enqueues
    the call meanwhile, so that launching counts only as far as it takes longer than that. A wait for the device counts.
    """
    if torch.device(device).type == "cpu":
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
        del result
        return seconds * 1e3
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush_buffer(device).zero_()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def paired(ours: Callable, rival: Callable, device: str, quick: bool, budget_s: float = 6.0) -> tuple[float, float]:
    """Medians in ms of the two, called in turn: at least 3 rounds (1 with quick), at most 50, within the budget."""
    for _ in range(1 if torch.device(device).type == "cpu" else 3):
        _once(ours, device)
        _once(rival, device)
    times: tuple[list[float], list[float]] = ([], [])
    begin = time.perf_counter()
    most = 1 if quick else 50
    while len(times[0]) < most and (len(times[0]) < 3 or time.perf_counter() - begin < budget_s):
        times[0].append(_once(ours, device))
        times[1].append(_once(rival, device))
    return statistics.median(times[0]), statistics.median(times[1])


class Rates:
    """Copy rate (bytes/s, read + write) and matmul rates (FLOP/s) of the device, measured when first asked for."""

    def __init__(self, device: str):
        self.device, self.known = device, {}

    def copy(self) -> float:
        if "copy" not in self.known:
            size = 1 << (26 if self.device == "cpu" else 29)
            a = torch.empty(size, dtype=torch.uint8, device=self.device)
            b = torch.empty_like(a)
            self.known["copy"] = 2 * size / min(_once(lambda: b.copy_(a), self.device) for _ in range(10)) * 1e3
        return self.known["copy"]

    def matmul(self, dtype: torch.dtype) -> float:
        if dtype not in self.known:
            n = 1024 if self.device == "cpu" else 8192
            a = torch.randn(n, n, device=self.device).to(dtype)
            self.known[dtype] = 2 * n**3 / min(_once(lambda: a @ a, self.device) for _ in range(6)) * 1e3
        return self.known[dtype]

    def floor_ms(self, num_bytes: float, flop: float = 0.0, dtype: torch.dtype = torch.float32) -> float:
        return 1e3 * max(num_bytes / self.copy(), flop / self.matmul(dtype) if flop else 0.0)


def row(op, shape, dtype, device, ours_ms, rival, rival_ms, floor_ms, max_error) -> dict:
    return dict(
        op=op, shape=shape, dtype=str(dtype).removeprefix("torch."), device=device, ours_ms=round(ours_ms, 4),
        rival=rival, rival_ms=round(rival_ms, 4), speedup=round(rival_ms / ours_ms, 2), floor_ms=round(floor_ms, 4),
        max_error=float(f"{max_error:.3g}"),
    )  # fmt: skip


def count_bytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def check(name: str, error: float, allowed: float) -> float:
    """Stops the benchmark where the result is wrong: a wrong kernel's time means nothing."""
    if not error <= allowed:
        raise SystemExit(f"{name}: differs from the rival by {error:.3g}, allowed {allowed:.3g}")
    return error


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def machine(device: str) -> dict:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    facts = dict(torch=torch.__version__, commit=commit or "unknown", date=time.strftime("%Y-%m-%d"))
    if torch.device(device).type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split() if shutil.which(query[0]) else []
        name = torch.cuda.get_device_name(device)
        return dict(gpu=name, driver=(*driver, "unknown")[0], cuda=torch.version.cuda, **facts)
    amx = "amx_bf16" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else False
    return dict(cpu=cpu_name(), threads=torch.get_num_threads(), amx=amx, **facts)


def report(rows: list[dict], args: argparse.Namespace) -> None:
    """The table on the screen, the rows in --json FILE."""
    print("  ".join(f"{k} {v}" for k, v in machine(args.device).items()))
    columns = ("op", "shape", "dtype", "ours_ms", "rival", "rival_ms", "speedup", "floor_ms", "max_error")
    cells = [[str(r[c]) for c in columns] for r in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    for line in [list(columns), *cells]:
        print("  ".join(v.ljust(w) for v, w in zip(line, widths)).rstrip())
    if args.json:
        args.json.write_text(json.dumps(dict(machine=machine(args.device), rows=rows), indent=1) + "\n")


def detector_like_boxes(n: int, device: str, seed: int = 0) -> torch.Tensor:
    """[n, 4] boxes as a detector emits them on 800 x 1344: about 50 jittered boxes an object, sizes of 16 to 200 pixels."""
    g = torch.Generator().manual_seed(seed)
    objects = max(n // 50, 1)
    centre = torch.rand(objects, 2, generator=g) * torch.tensor([1344.0, 800.0])
    size = torch.exp(torch.rand(objects, 2, generator=g) * 2.5 + 2.8)
    pick = torch.randint(objects, (n,), generator=g)
    c = centre[pick] + torch.randn(n, 2, generator=g) * size[pick] * 0.15
    s = size[pick] * torch.exp(torch.randn(n, 2, generator=g) * 0.2)
    return torch.cat([c - s / 2, c + s / 2], 1).to(device)


def rois(n: int, images: int, device: str, seed: int = 0) -> torch.Tensor:
    """[n * images, 5] RoIs of 16 to 660 pixels on 800 x 1344, spread over all pyramid levels."""
    g = torch.Generator().manual_seed(seed)
    total = n * images
    size = torch.exp(torch.rand(total, 2, generator=g) * 3.7 + 2.8)
    centre = torch.rand(total, 2, generator=g) * torch.tensor([1344.0, 800.0])
    boxes = torch.cat([centre - size / 2, centre + size / 2], 1)
    boxes[:, 0::2].clamp_(0, 1344)
    boxes[:, 1::2].clamp_(0, 800)
    image = torch.arange(images).repeat_interleave(n)[:, None].float()
    return torch.cat([image, boxes], 1).to(device)
