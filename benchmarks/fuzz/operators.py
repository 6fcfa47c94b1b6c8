"""Random and hostile calls of every operator (convolution.py has conv_bn_relu) against its reference, in processes that
may die.

    python benchmarks/fuzz/operators.py --minutes 60 --seed 0 [--only nms,roi_align] [--workers 2]

A call is a name and a number: `--call roi_align:17` runs that one again and shows it. Counted: equal; refused (both raise
TypeError or ValueError, the message beginning with an argument's name); and, printed with their numbers, differences,
one side raising alone, errors without a name, deaths, calls longer than two minutes.
"""

import argparse
import importlib
import inspect
import json
import math
import random
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastrcnn import ops
from fastrcnn._extension import operators

INF, NAN = math.inf, math.nan
ODD = [NAN, INF, -INF, 0.0, -0.0, 1e-45, 1e-30, 1e19, -1e19, 1e30, 65504.0, 16777217.0, -1.0, 0.5]
DTYPES = [torch.float32, torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]
PATIENCE_S = 120


class Source:
    """Arguments from a seeded generator: plain ones, and in a hostile call now and then odd ones."""

    def __init__(self, name: str, number: int):
        self.pick = random.Random(f"{name}:{number}")
        torch.manual_seed(self.pick.getrandbits(48))
        self.hostile = self.pick.random() < 0.6
        self.dtype = self.pick.choice(DTYPES)

    def count(self, most: int = 40) -> int:
        return self.pick.choice([0, 1, 2, 3, 7, 17, most]) if self.hostile else self.pick.randint(1, most)

    def choice(self, *values):
        return self.pick.choice(values)

    def number(self, plain: float, *odd) -> float:
        return self.pick.choice([*odd, *ODD]) if self.hostile and self.pick.random() < 0.2 else plain

    def whole(self, plain: int, *odd: int) -> int:
        return self.pick.choice([*odd, 0, -1, 2**31, 2**32 + 1, -(2**40)]) if self.rare() else plain

    def rare(self) -> bool:
        return self.hostile and self.pick.random() < 0.15

    def tensor(self, value: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Some numbers odd, another layout, another dtype."""
        value = value.to(dtype or self.dtype)
        if self.hostile and value.numel() and self.pick.random() < 0.5:
            for _ in range(self.pick.randint(1, 4)):
                value.view(-1)[self.pick.randrange(value.numel())] = self.pick.choice(ODD)
        if value.dim() == 4 and self.pick.random() < 0.5:
            value = value.contiguous(memory_format=torch.channels_last)
        elif value.dim() and self.rare():
            value = torch.stack([value, value], -1)[..., 0]
        return value

    def boxes(self, *shape: int, size: float = 100) -> torch.Tensor:
        low, extent = torch.rand(*shape, 2) * size, torch.rand(*shape, 2) * size / 2
        grid = self.pick.random() < 0.3  # ties of IoU and of scores
        boxes = torch.cat([low, low + extent], -1)
        return self.tensor(boxes.round() if grid else boxes)

    def scores(self, *shape: int) -> torch.Tensor:
        scores = torch.rand(shape)
        return self.tensor((scores * 8).round() / 8 if self.pick.random() < 0.4 else scores)

    def ids(self, *shape: int, most: int = 4) -> torch.Tensor:
        return torch.randint(-1, most, shape).to(self.choice(torch.int64, torch.int32, torch.uint8))

    def rois(self, k: int, batch: int, size: float) -> torch.Tensor:
        index = torch.randint(-1, max(batch, 1), (k, 1)).float()
        rois = torch.cat([index, self.boxes(k, size=size).float()], 1)
        return self.tensor(rois, self.choice(torch.float32, torch.float32, torch.float64, torch.float16))

    def map(self, batch: int, channels: int, height: int, width: int) -> torch.Tensor:
        return self.tensor(torch.randn(batch, channels, height, width))


def suppression(s: Source, n: int) -> dict:
    return dict(boxes=s.boxes(n), scores=s.scores(n), iou_threshold=s.number(s.pick.random()))


def soft(s: Source, n: int) -> dict:
    rules = dict(sigma=s.number(s.pick.random() + 0.01, 1e-50, 1e300), min_score=s.number(s.choice(0.001, 0.2), 1e-50))
    return dict(suppression(s, n), method=s.choice("naive", "linear", "gaussian"), **rules)


def sampled(s: Source) -> dict:
    size = s.choice(s.pick.randint(1, 7), (s.pick.randint(1, 5), s.whole(s.pick.randint(1, 5))))
    return dict(output_size=size, sampling_ratio=s.whole(s.pick.randint(0, 4), 3000, 300))


def coder(s: Source) -> dict:
    means, stds = [s.number(0.1) for _ in range(4)], [s.number(0.5) for _ in range(4)]
    return dict(
        means=means, stds=stds, wh_ratio_clip=s.number(0.016, 1e-300, 1e300), symmetric_clip=s.choice(True, False)
    )


def make(name: str, number: int) -> dict:
    s = Source(name, number)
    n, batch, channels = s.count(), s.count(3), s.count(9)
    height, width = s.count(12), s.count(12)
    if name == "nms":
        return suppression(s, n)
    if name == "batched_nms":
        return dict(suppression(s, n), idxs=s.ids(n), max_output=s.choice(None, s.whole(s.pick.randint(0, 9))))
    if name == "nms_padded":
        counts = s.choice(None, s.ids(batch, most=n + 3))
        return dict(
            boxes=s.boxes(batch, n),
            scores=s.scores(batch, n),
            groups=s.choice(None, s.ids(batch, n)),
            iou_threshold=s.number(s.pick.random()),
            max_output=s.choice(0, 3, n),
            counts=counts,
        )
    if name == "soft_nms":
        return soft(s, n)
    if name == "batched_soft_nms":
        return dict(soft(s, n), idxs=s.ids(n), max_output=s.choice(None, s.pick.randint(0, 9)))
    if name == "soft_nms_padded":
        rules = {k: v for k, v in soft(s, n).items() if k not in ("boxes", "scores")}
        return dict(
            rules,
            boxes=s.boxes(batch, n),
            scores=s.scores(batch, n),
            groups=s.choice(None, s.ids(batch, n)),
            max_output=s.choice(0, 3, n),
            counts=s.choice(None, s.ids(batch, most=n + 3)),
        )
    if name == "select_candidates":
        return dict(scores=s.scores(batch, n), threshold=s.number(0.3), max_candidates=s.choice(0, 3, n, n + 5))
    if name == "roi_align":
        return dict(
            input=s.map(batch, channels, height, width),
            rois=s.rois(n, batch, 60),
            **sampled(s),
            spatial_scale=s.number(0.25),
            aligned=s.choice(True, False),
        )
    if name == "multilevel_roi_align":
        maps = [s.map(batch, channels, max(height >> i, 1), max(width >> i, 1)) for i in range(s.pick.randint(1, 4))]
        return dict(
            features=maps,
            rois=s.rois(n, batch, 60),
            **sampled(s),
            finest_scale=s.number(8),
            strides=[s.number(4 << i) for i in range(len(maps))],
            aligned=s.choice(True, False),
            profile=s.choice("mmdet", "torchvision", "detectron2"),
        )
    if name == "deform_roi_pool":
        args = dict(sampled(s), gamma=s.number(0.1), spatial_scale=s.number(0.25))
        pooled = args["output_size"] if isinstance(args["output_size"], tuple) else (args["output_size"],) * 2
        offset = s.tensor(torch.randn(n, 2, *(min(max(p, 1), 9) for p in pooled))) if s.choice(0, 1) else None
        return dict(input=s.map(batch, channels, height, width), rois=s.rois(n, batch, 60), offset=offset, **args)
    if name == "decode_boxes":
        lead, classes = s.choice((n,), (batch, n)), s.count(3)
        sizes = torch.tensor([80.0, 90]) if len(lead) == 1 else torch.rand(batch, 2) * 100
        limit = s.choice(None, (80, s.number(90)), s.tensor(sizes, torch.float32), sizes.long())
        return dict(
            anchors=s.boxes(*lead), deltas=s.tensor(torch.randn(*lead, 4 * classes)), max_shape=limit, **coder(s)
        )
    if name == "decode_proposals":
        levels = [(s.count(4), s.count(7), s.count(7)) for _ in range(s.pick.randint(1, 3))]
        logits = [s.tensor(torch.randn(batch, *level) * s.choice(1, 40)) for level in levels]
        deltas = [s.tensor(torch.randn(batch, 4 * a, h, w)) for a, h, w in levels]
        bases = [s.boxes(a, size=20) - 10 for a, _, _ in levels]
        sizes = s.tensor(torch.rand(batch, 2) * 60, torch.float32)
        return dict(
            cls_logits=logits,
            bbox_deltas=deltas,
            base_anchors=bases,
            **s.choice(dict(strides=[s.number(8) for _ in levels]), dict(strides=None, batch_shape=(s.whole(50), 60))),
            image_sizes=s.choice(sizes, torch.full((batch, 2), 50)),
            nms_pre=s.whole(s.pick.randint(0, 20)),
            min_size=s.number(s.choice(0.0, 3.0)),
            topk_on=s.choice("sigmoid", "logits"),
            score=s.choice("sigmoid", "logits"),
            **coder(s),
        )
    if name == "match_boxes":
        m, regions = s.count(6), s.count(3)
        ignore = s.choice(None, s.boxes(batch, regions))
        return dict(
            boxes=s.choice(s.boxes(n), s.boxes(batch, n)),
            gt_boxes=s.boxes(batch, m),
            ignore_boxes=ignore,
            gt_counts=s.choice(None, s.ids(batch, most=m + 2)),
            ignore_iof_thr=s.number(s.choice(-1.0, 0.4)),
            pos_iou_thr=s.number(0.5),
            neg_iou_thr=s.number(0.4),
            min_pos_iou=s.number(s.choice(0.0, 0.3)),
            match_low_quality=s.choice(True, False),
            low_quality=s.choice("last_gt", "argmax"),
            iou_eps=s.number(s.choice(0.0, 1e-6)),
        )
    if name == "deform_conv2d":
        share, groups = s.choice(1, 2, 4), s.choice(1, 2)
        offset_groups, (kh, kw) = s.choice(1, groups), (s.pick.randint(1, 3), s.pick.randint(1, 3))
        stride, padding, dilation = ([s.whole(s.pick.randint(low, 2)) for _ in range(2)] for low in (1, 0, 1))
        try:
            size = [
                max((h + 2 * p - d * (k - 1) - 1) // t + 1, 0)
                for h, k, t, p, d in zip((height, width), (kh, kw), stride, padding, dilation)
            ]
        except ZeroDivisionError:
            size = [1, 1]
        size = size if max(size) < 40 else [1, 1]
        taps = offset_groups * kh * kw
        return dict(
            input=s.map(batch, share * groups, height, width),
            weight=s.map(2 * groups, share, kh, kw),
            offset=s.map(batch, 2 * taps, *size),
            mask=s.choice(None, s.map(batch, taps, *size)),
            bias=s.choice(None, s.tensor(torch.randn(2 * groups))),
            stride=stride,
            padding=padding,
            dilation=dilation,
        )
    assert name == "preprocess", name
    resize = s.choice("opencv", "interpolate", "pillow")
    images = [
        torch.rand(3, s.count(30), s.count(30)).to(s.choice(torch.float32, torch.float64, torch.float16))
        for _ in range(s.pick.randint(1, 3))
    ]
    if resize != "interpolate":  # where the last bit of a place decides which neighbour has weight 0
        images = [s.tensor(i, i.dtype) for i in images]
    images = [(i * 255).to(torch.uint8) if s.choice(0, 1) and i.isfinite().all() else i for i in images]
    return dict(images=images, sizes=[(s.whole(s.pick.randint(1, 40)), s.pick.randint(1, 40)) for _ in images],
                batch_size=(40, s.whole(40)), mean=[s.number(0.4) for _ in range(3)], std=[s.number(0.3) for _ in range(3)],
                resize=resize, bgr=s.choice(True, False), dtype=s.dtype)  # fmt: skip


LEAVES = ("input", "features", "offset", "weight", "mask")  # what is differentiated
REFERENCE_GRADIENTS = {
    f"{name}_backward": importlib.import_module(f"fastrcnn.ops.{name}")._backward
    for name in ("multilevel_roi_align", "deform_conv2d", "deform_roi_pool")
}
REFERENCE_GRADIENTS["roi_align_backward"] = importlib.import_module("fastrcnn.ops.roi_align")._one_backward


class GradientCalls(TorchDispatchMode):
    """Keeps (name, arguments, result) of the gradients' operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        if name in REFERENCE_GRADIENTS:
            self.calls.append((name, args, out))
        return out


def as_list(out) -> list[torch.Tensor]:
    return [out] if isinstance(out, torch.Tensor) else list(out)


def outcome(function, kwargs: dict):
    """("ok", tensors), ("refused", message), ("unnamed", message) or ("raised", message)."""
    try:
        return "ok", as_list(function(**kwargs))
    except (TypeError, ValueError) as error:
        named = re.match(r"\w+", str(error))
        known = bool(named) and named[0] in inspect.signature(function).parameters
        return ("refused" if known or "one device" in str(error) else "unnamed"), f"{type(error).__name__}: {error}"
    except RuntimeError as error:
        return "raised", f"{type(error).__name__}: {error}"


def gradients(function, kwargs: dict) -> tuple[list, list]:
    """What the gradient's kernel gives, and what its reference gives for the same arguments."""
    leaves = [t for k in LEAVES for v in [kwargs.get(k)] for t in (v if isinstance(v, list) else [v])
              if isinstance(t, torch.Tensor)]  # fmt: skip
    leaves = [t.requires_grad_() for t in leaves]
    out = function(**kwargs)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    with GradientCalls() as recorder:
        torch.autograd.grad(out, leaves, weight, materialize_grads=True)
    ((name, args, result),) = recorder.calls
    with torch.no_grad():
        return as_list(result), as_list(REFERENCE_GRADIENTS[name](*args))


def differs(name: str, actual: list, expected: list, dtype: torch.dtype) -> str:
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"{name} {i}: {list(a.shape)} {a.dtype}, reference {list(b.shape)} {b.dtype}"
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return f"{name} {i}: {int((a != b).sum())} of {a.numel()} indices differ"
            continue
        a, b = a.double(), b.double()
        if i and name == "deform_roi_pool_backward":  # how it is not finite is left open
            a, b = (torch.where(t.isfinite(), t, torch.nan) for t in (a, b))
        unit = max(torch.finfo(t.dtype).eps for t in (actual[i], torch.empty(0, dtype=dtype)))
        scale = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
        close = torch.isclose(a, b, rtol=64 * unit, atol=64 * unit * scale + 1e-37, equal_nan=True)
        if not close.all():
            at = int((~close).flatten().nonzero()[0])
            one, other = a.flatten()[at].item(), b.flatten()[at].item()
            return f"{name} {i}: {int((~close).sum())} of {a.numel()}, at {at} {one:g}, reference {other:g}"
    return ""


def judge(name: str, number: int) -> tuple[str, str]:
    kwargs = make(name, number)
    tensors = [t for v in kwargs.values() for t in (v if isinstance(v, list) else [v]) if isinstance(t, torch.Tensor)]
    dtypes = [
        torch.float32 if t.dtype == torch.uint8 else t.dtype for t in tensors
    ]  # bytes of a picture count as float32
    dtype = max((d for d in dtypes if d.is_floating_point), key=lambda d: torch.finfo(d).eps, default=torch.float32)
    (kind, actual), (reference_kind, expected) = (outcome(getattr(ops, f), kwargs) for f in (name, f"{name}_reference"))
    if kind != reference_kind:
        return "one side alone", f"{kind} {actual if kind != 'ok' else ''}, reference {reference_kind} " + (
            expected if reference_kind != "ok" else ""
        )
    if kind != "ok":
        return kind, actual
    difference = differs(name, actual, expected, dtype)
    if not difference and f"{name}_backward" in REFERENCE_GRADIENTS:
        difference = differs(f"{name}_backward", *gradients(getattr(ops, name), kwargs), dtype)
    return ("difference", difference) if difference else ("equal", "")


def serve() -> None:
    """Reads "name number" lines, answers with one JSON line each."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        name, number = line.split()
        print(json.dumps(judge(name, int(number))), flush=True)


class Worker:
    """A process that answers calls, replaced when it dies or hangs."""

    process = None

    def call(self, name: str, number: int) -> tuple[str, str]:
        if self.process is None:
            command = [sys.executable, "-W", "ignore", __file__, "--serve"]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process.stdin.write(f"{name} {number}\n")
        self.process.stdin.flush()
        with ThreadPoolExecutor(1) as clock:
            answer = clock.submit(self.process.stdout.readline)
            try:
                line = answer.result(PATIENCE_S)
            except TimeoutError:
                line = None
                self.process.kill()
        if line:
            return tuple(json.loads(line))
        status, self.process = self.process.wait(), None
        return ("too long", f"over {PATIENCE_S} s") if line is None else ("died", f"status {status}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", default=",".join(n for n in operators() if n != "conv_bn_relu"), help="operators, with commas between"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--call", help="name:number, one call")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve()
    if args.call:
        name, number = args.call.split(":")
        print({k: v for k, v in make(name, int(number)).items()})
        print(*judge(name, int(number)))
        return
    names, found, end = args.only.split(","), Counter(), time.monotonic() + 60 * args.minutes

    def run(first: int) -> None:
        worker, number = Worker(), args.seed * 10**9 + first
        while time.monotonic() < end:
            for name in names:
                kind, text = worker.call(name, number)
                found[name, kind] += 1
                if kind not in ("equal", "refused"):
                    print(f"{name}:{number} {kind}: {text[:300]}", flush=True)
            number += args.workers

    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(run, range(args.workers)))
    for name in names:
        print(name, {kind: count for (of, kind), count in sorted(found.items()) if of == name})
    sys.exit(any(kind not in ("equal", "refused") for _, kind in found))


if __name__ == "__main__":
    main()
