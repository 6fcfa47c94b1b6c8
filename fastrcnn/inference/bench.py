"""How long a detector takes on this machine."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastrcnn._extension import kernel_table
from fastrcnn.inference.detector import Detector

WARM_UP, FEWEST = 2, 3  # passes


def time_detector(
    detector: Detector, images: Sequence[Tensor], batch_size: int | None = None, seconds: float = 10.0
) -> dict[str, Any]:
    """A dict: `ms_per_image` (median of the passes), `fastest_ms_per_image`, `images_per_second`, `passes`, `images`,
    `objects`, `device`, `precision` and `kernels` (operators that compiled kernels answer, of all).

    images: uint8 [3, H, W], decoded already; each pass detects in all of them, from pixels to boxes on the host, in
    batches of `batch_size` as `Detector` makes them. Passes are repeated for `seconds`, after two that are not counted.
    """
    for _ in range(WARM_UP):
        found = detector(images, batch_size)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < FEWEST or time.perf_counter() < end:
        start = time.perf_counter()
        found = detector(images, batch_size)
        times.append((time.perf_counter() - start) * 1e3 / len(images))
    table = kernel_table(next(detector.model.parameters()).dtype)
    kernels = sum(row.get(detector.device.type) == "kernel" for row in table.values())
    median = statistics.median(times)
    return dict(
        ms_per_image=median,
        fastest_ms_per_image=min(times),
        images_per_second=1e3 / median,
        passes=len(times),
        images=len(images),
        objects=sum(map(len, found)),
        device=str(detector.device),
        precision=detector.precision,
        kernels=f"{kernels} of {len(table)}",
    )
