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
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import torch
from operator_arguments import make
from torch.utils._python_dispatch import TorchDispatchMode

from fastrcnn import ops
from fastrcnn._extension import operators

PATIENCE_S = 120

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
