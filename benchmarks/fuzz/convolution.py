"""Random small calls of conv_bn_relu on the CPU, forward and backward, against its formula in float64.

    python benchmarks/fuzz/convolution.py --minutes 60 --seed 0

Maps of 1 to 20 pixels a side, every dtype, layout, stride, padding, dilation and group count; in one case out of four some
values are NaN or infinite. The calls run in a process of their own, so that one that dies is a fault like any other.
Allowed is an error of some roundings of the largest sum of absolute terms; NaN and infinities must lie where the reference
has them. Each fault is printed with the seed that repeats it (`--seed N --calls 1`); exit status 1 if there was one.
"""

import argparse
import random
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from fastrcnn.ops import conv_bn_relu, conv_bn_relu_reference

LAYOUTS = (
    lambda t: t.contiguous(),
    lambda t: t.contiguous(memory_format=torch.channels_last),
    lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
)
ROUNDINGS = {torch.float64: 64, torch.float32: 64, torch.float16: 8, torch.bfloat16: 8}


def case(seed: int):
    """The seven tensors (some None), the other arguments, and whether a value is NaN or infinite."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    dtype = r.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64])
    while True:
        groups = r.choice([1, 1, 1, 2, 4])
        c, o = groups * r.choice([1, 2, 3, 8, 16]), groups * r.choice([1, 2, 3, 8, 16])
        size, kernel = r.choices([1, 1, 2, 3, 5, 8, 20], k=2), r.choices([1, 1, 2, 3], k=2)
        where = dict(stride=r.choices([1, 2, 3], k=2), padding=r.choices([0, 0, 1, 2, 3], k=2),
                     dilation=r.choices([1, 1, 2, 3], k=2))  # fmt: skip
        axes = zip(size, kernel, *where.values())
        out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes]
        if min(out) > 0:
            break
    batch, norm = r.choice([1, 1, 2, 3]), r.choice(["all", "all", "bias", "none"])
    tensors = [torch.randn(batch, c, *size), torch.randn(o, c // groups, *kernel), torch.randn(o), torch.randn(o),
               torch.randn(o), torch.rand(o) + 0.1, torch.randn(batch, o, *out)]  # fmt: skip
    statistics = dtype if r.random() < 0.3 or dtype == torch.float64 else torch.float32
    tensors = [t.to(statistics if t.dim() == 1 else dtype) for t in tensors]
    hostile = r.random() < 0.25
    if hostile:
        for t in r.sample(tensors, r.choice([1, 1, 2])):
            t.view(-1)[r.randrange(t.numel())] = r.choice([float("nan"), float("inf"), -float("inf")])
    tensors = [r.choice(LAYOUTS)(t) if t.dim() == 4 else t for t in tensors]
    absent = {"all": (), "bias": (2, 4, 5), "none": (2, 3, 4, 5)}[norm] + ((6,) if r.random() < 0.5 else ())
    tensors = [None if i in absent else t for i, t in enumerate(tensors)]
    return tensors, dict(where, groups=groups, eps=r.choice([0.0, 1e-5, 1e-3])), r.random() < 0.6, hostile


def formula(x, weight, bn_weight, bias, mean, var, residual, *, eps, **where):
    """Before the ReLU, as plain layers compute it."""
    y = F.conv2d(x, weight, None, **where)
    if bn_weight is not None:
        y = (y - mean[:, None, None]) * (bn_weight / (var + eps).sqrt())[:, None, None]
    y = y if bias is None else y + bias[:, None, None]
    return y if residual is None else y + residual


def gradients(function, tensors, upstream):
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out = function(leaves)
    return out.detach(), torch.autograd.grad(out, [t for t in leaves if t is not None], upstream(out))


def faults(seed: int):
    tensors, kwargs, relu, hostile = case(seed)
    g = torch.randn(1 << 18)

    def call(t):
        return conv_bn_relu(*t[:6], residual=t[6], relu=relu, **kwargs)

    dtype = tensors[0].dtype
    out, found = gradients(call, tensors, lambda y: g[: y.numel()].view(y.shape).to(dtype))
    mask = ~(out <= 0) if relu else torch.ones_like(out, dtype=torch.bool)
    exact = [t if t is None else t.double() for t in tensors]
    upstream = g[: out.numel()].view(out.shape).to(dtype).double() * mask
    want, exact_grads = gradients(lambda t: formula(*t, **kwargs), exact, lambda y: upstream)
    want = want.relu() if relu else want
    if hostile:
        want = conv_bn_relu_reference(*tensors[:6], residual=tensors[6], relu=relu, **kwargs)
        alike = out.isnan().eq(want.isnan()) & (out.isfinite() | out.isnan() | out.eq(want))
        alike &= out.isfinite().eq(want.isfinite())
        if not alike.all():
            yield f"NaN or infinity elsewhere in {int((~alike).sum())} of {out.numel()} outputs"
        return
    size = [t if t is None else t.abs() for t in exact]
    if size[4] is not None:
        size[4] = -size[4]
    bound, bounds = gradients(lambda t: formula(*t, **kwargs), size, lambda y: upstream.abs())
    names = ["output", *(n for n, t in zip(("input", "weight", "bn_weight", "bn_bias", "bn_mean", "bn_var", "residual"),
                                           tensors) if t is not None)]  # fmt: skip
    for name, got, right, most in zip(names, (out, *found), (want, *exact_grads), (bound, *bounds)):
        low = torch.finfo(got.dtype if name == "output" else dtype)
        allowed = ROUNDINGS[dtype] * low.eps * most.abs().max() + low.tiny
        error = (got.double() - right).abs().max()
        if not error <= allowed:
            yield f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def described(seed: int) -> str:
    tensors, kwargs, relu, hostile = case(seed)
    given = [i for i, t in enumerate(tensors) if t is not None]
    x, w = tensors[:2]
    return f"{x.dtype} x {list(x.shape)} w {list(w.shape)} {kwargs} relu={relu} given {given} hostile={hostile}"


def child(seed: int, calls: int) -> None:
    torch.set_num_threads(1)
    for s in range(seed, seed + calls):
        print("try", s, flush=True)
        for fault in faults(s):
            print("fault", s, fault, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=int, help="as many calls, whatever the time")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.seed, args.calls)
    end, seed, wrong, last = time.monotonic() + 60 * args.minutes, args.seed, 0, args.seed + (args.calls or 2**62)
    while seed < last and (args.calls or time.monotonic() < end):
        command = [sys.executable, __file__, "--child", "--seed", str(seed), "--calls", str(min(2000, last - seed))]
        ran = subprocess.run(command, capture_output=True, text=True)
        lines = [line.split(" ", 2) for line in ran.stdout.splitlines()]
        found = [(int(line[1]), line[2]) for line in lines if line[0] == "fault"]
        tried = [int(line[1]) for line in lines if line[0] == "try"]
        if ran.returncode:
            reason = ran.stderr.strip().splitlines()[-1:] or [""]
            found.append((tried[-1] if tried else seed, f"ended with status {ran.returncode} {reason[0]}"))
        for s, fault in found:
            print(f"seed {s}: {fault}: {described(s)}", flush=True)
        wrong, seed = wrong + len({s for s, _ in found}), (tried[-1] if tried else seed) + 1
    print(f"{seed - args.seed} calls tried, {wrong} with faults")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
