"""Every distinct convolution of a deployed detector, and each of them on CUDA: ours as the plan chooses, cuDNN's fused
call, torch.compile's, the floor. conv_bn_relu_bench.py --device cuda prints it, conv_model.py predicts it.
"""

from typing import NamedTuple

import timing
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastrcnn import ops
from fastrcnn.layers import fold_batch_norm
from fastrcnn.ops.conv_tile import half_size, out_shape
from fastrcnn.zoo.recipes import recipe

SIZE = 800, 1344


class Layer(NamedTuple):
    """input: channels, height, width; weight: its shape; residual: "", "full" or "half"."""

    input: tuple[int, int, int]
    weight: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    residual: str
    relu: bool

    def title(self) -> str:
        (c, h, w), (o, _, kh, kw) = self.input, self.weight
        groups = f" in {self.groups} groups" * (self.groups > 1)
        return f"{c}->{o} {kh}x{kw}/{self.stride[0]}{groups} {h}x{w}" + f" + {self.residual} residual" * bool(
            self.residual
        )

    def out(self, images: int = 1) -> list[int]:
        x, w = torch.empty(images, *self.input, device="meta"), torch.empty(self.weight, device="meta")
        return out_shape(x, w, self.stride, self.padding, self.dilation)

    def flop(self, images: int) -> int:
        out = self.out(images)
        return 2 * out[0] * out[2] * out[3] * torch.Size(self.weight).numel()

    def elements(self, images: int) -> float:
        """Read once and written once."""
        out = torch.Size(self.out(images)).numel()
        beside = {"": 0.0, "full": 1.0, "half": 0.25}[self.residual]
        return images * torch.Size(self.input).numel() + torch.Size(self.weight).numel() + out * (1 + beside)


class _Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.layers: dict[Layer, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.fastrcnn.conv_bn_relu.default:
            x, w, *_ = args
            where, (residual, relu, half) = [tuple(pair) for pair in args[7:10]], args[11:14]
            kind = "" if residual is None else "half" if half else "full"
            layer = Layer(tuple(x.shape[1:]), tuple(w.shape), *where, args[10], kind, relu)
            self.layers[layer] = self.layers.get(layer, 0) + 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def layers_of(name: str, size: tuple[int, int] = SIZE) -> dict[str, dict[Layer, int]]:
    """How often each part of a named detector, folded, calls each convolution for one image."""
    found = {}
    with FakeTensorMode():
        model = fold_batch_norm(recipe(name, 80).eval())
        maps = torch.empty(1, 3, *size)
        for part, module in (("backbone", model.backbone), ("FPN", model.neck), ("RPN head", model.rpn_head)):
            with _Recorded() as seen:
                maps = module(maps)
            found[part] = seen.layers
    return found


def _random(shape, dtype, device) -> torch.Tensor:
    x = torch.randn(*shape, device=device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def rows_of(layer: Layer, images: int, dtype: torch.dtype, library, args, rates: timing.Rates) -> list[dict]:
    """Against `library(call arguments)` and torch.compile. The result is checked against float32 first."""
    device, out = args.device, layer.out(images)
    x = _random((images, *layer.input), dtype, device)
    w = _random(layer.weight, dtype, device) / torch.Size(layer.weight[1:]).numel() ** 0.5
    bias = torch.randn(layer.weight[0], device=device).to(dtype)
    sides = {"": None, "full": out[2:], "half": [half_size(n) for n in out[2:]]}[layer.residual]
    residual = None if sides is None else _random((*out[:2], *sides), dtype, device)
    call = (x, w, None, bias, None, None, 0.0, *layer[2:6], residual, layer.relu, layer.residual == "half")

    def plain(x, w, bias, residual):
        y = F.conv2d(x, w, bias, *layer[2:6])
        if residual is not None:
            y = y + (F.interpolate(residual, size=y.shape[2:]) if layer.residual == "half" else residual)
        return F.relu(y) if layer.relu else y

    compiled = torch.compile(plain, dynamic=False)
    exact = plain(*(t if t is None else t.float() for t in (x, w, bias, residual)))
    allowed = max(2 * (library(*call).float() - exact).abs().max().item(), 1e-5 * exact.abs().max().item())
    error = timing.check(layer.title(), (ops.conv_bn_relu(*call).float() - exact).abs().max().item(), allowed)
    floor = rates.floor_ms(layer.elements(images) * x.element_size(), layer.flop(images), dtype)
    rivals = {"cuDNN fused": lambda: library(*call), "torch.compile": lambda: compiled(x, w, bias, residual)}
    rows = []
    for name, rival in rivals.items():
        ours, theirs = timing.paired(lambda: ops.conv_bn_relu(*call), rival, device, args.quick, budget_s=1.0)
        title = layer.title() + f" B={images}"
        rows.append(timing.row("conv_bn_relu", title, dtype, device, ours, name, theirs, floor, error))
    return rows
