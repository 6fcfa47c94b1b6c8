"""Every operator with two threads while another process keeps one of two cores busy, against itself with one thread.

The busy process is started here and ends with this one; both are held to the same two cores. Servers share their cores: a
thread that waits for another one may wait until the system schedules it, some milliseconds each time. Both sides must give
the same. A speedup below 0.83 means more than 1.2 times slower with the second thread than without.
"""

import os
import subprocess
import sys
from functools import partial

import timing
import torch

from fastrcnn import ops
from fastrcnn.models.anchors import AnchorGenerator
from fastrcnn.ops.conv_cpu import _direct
from fastrcnn.ops.conv_winograd import conv_winograd, winograd_weight

BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"


def tensors(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in tensors(part)]


def conv(cin: int, cout: int, height: int, width: int):
    x = torch.randn(1, cin, height, width).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(cout, cin, 3, 3) / (9 * cin) ** 0.5
    where = (1, 1), (1, 1), (1, 1), 1
    direct = partial(_direct, x, weight, None, None, None, None, 0.0, *where, None, True, False)
    return direct, partial(conv_winograd, x, winograd_weight(weight), None, None, (1, 1), cout, False, True)


def cases(quick: bool):
    """(operator, shape, call)"""
    g = torch.Generator().manual_seed(0)
    for n in (100,) if quick else (1000, 10000):
        boxes, scores = timing.detector_like_boxes(n, "cpu"), torch.rand(n, generator=g)
        yield "nms", f"N={n}", partial(ops.nms, boxes, scores, 0.5)
        yield "batched_nms", f"N={n} in 80 groups", partial(ops.batched_nms, boxes, scores, torch.arange(n) % 80, 0.5)
        yield "soft_nms", f"N={n // 10}", partial(ops.soft_nms, boxes[: n // 10], scores[: n // 10])
    part = 16 if quick else 1
    yield "nms_padded", f"B=8 N={4000 // part}", partial(
        ops.nms_padded, torch.stack([timing.detector_like_boxes(4000 // part, "cpu", i) for i in range(8)]),
        torch.rand(8, 4000 // part, generator=g), None, 0.7, 1000,
    )  # fmt: skip
    height, width = 800 // part // 32 * 32 or 32, 1344 // part // 32 * 32 or 64
    sizes = [(-(-height // s), -(-width // s)) for s in (4, 8, 16, 32, 64)]
    generator = AnchorGenerator(strides=[4, 8, 16, 32, 64], ratios=[0.5, 1.0, 2.0], scales=[8])
    base = list(generator.base_anchors(rounded=True))
    maps = [[torch.randn(1, c, *size, generator=g) for size in sizes] for c in (3, 12)]
    frame = torch.tensor([[height, width]])
    yield (
        "decode_proposals",
        f"{height}x{width}",
        partial(ops.decode_proposals, *maps, base, [4, 8, 16, 32, 64], frame, 1000),
    )
    n = 1000 // part
    yield (
        "decode_boxes",
        f"{n} x 91",
        partial(ops.decode_boxes, timing.detector_like_boxes(n, "cpu"), torch.randn(n, 364, generator=g)),
    )
    yield (
        "select_candidates",
        f"{n} x 80",
        partial(ops.select_candidates, torch.rand(1, n * 80, generator=g), 0.95, 4096),
    )
    anchors, truth = timing.detector_like_boxes(268569 // part, "cpu", 2), timing.detector_like_boxes(20, "cpu", 3)
    yield "match_boxes", f"{len(anchors)} x 20", partial(ops.match_boxes, anchors, truth[None])
    picture = torch.randint(0, 256, (3, height, width), generator=g, dtype=torch.uint8)
    yield (
        "preprocess",
        f"{height}x{width}",
        partial(
            ops.preprocess, [picture], [(height // 2, width // 2)], (height // 2, width // 2), [0.0] * 3, [1.0] * 3
        ),
    )
    features = [torch.randn(1, 256 // part, *size, generator=g) for size in sizes[:4]]
    features = [f.contiguous(memory_format=torch.channels_last) for f in features]
    yield (
        "multilevel_roi_align",
        f"{n} RoIs x {256 // part}",
        partial(ops.multilevel_roi_align, features, timing.rois(n, 1, "cpu"), 7, [4, 8, 16, 32], 2),
    )
    for shape in [(64, 64, 20, 32)] if quick else [(256, 256, 13, 21), (256, 256, 50, 84), (256, 256, 200, 336)]:
        name = "{}->{} {}x{}".format(*shape)
        for op, call in zip(("conv_bn_relu", "conv_winograd"), conv(*shape)):
            yield op, name, call


def with_threads(threads: int, call):
    torch.set_num_threads(threads)
    return call()


@torch.inference_mode()
def main() -> None:
    args = timing.arguments(__doc__)
    for op in ("nms", "conv_bn_relu", "_conv_winograd", "multilevel_roi_align"):
        timing.require_kernel(op, "cpu")
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cores)
    busy = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        rows = []
        for op, shape, call in cases(args.quick):
            one, two = partial(with_threads, 1, call), partial(with_threads, 2, call)
            pairs = zip(tensors(one()), tensors(two()), strict=True)
            error = max([(a.float() - b.float()).abs().max().item() for a, b in pairs if a.numel()], default=0.0)
            timing.check(op, error, 1e-4)  # oneDNN may sum in another order
            times = timing.paired(two, one, "cpu", args.quick, budget_s=4.0)
            rows.append(timing.row(op, shape, torch.float32, "cpu", times[0], "one thread", times[1], 0.0, error))
    finally:
        busy.kill()
        busy.wait()
    timing.report(rows, args)


if __name__ == "__main__":
    main()
