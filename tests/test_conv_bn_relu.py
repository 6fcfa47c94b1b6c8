"""conv_bn_relu against its reference and torch's own layers."""

import importlib
import inspect
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_within_twice
from torch import nn

from fastrcnn._extension import has_kernel
from fastrcnn.ops import conv_bn_relu, conv_bn_relu_reference

op_module = importlib.import_module("fastrcnn.ops.conv_bn_relu")

# name: (kernel size, arguments)
SHAPES = {
    "1x1": (1, {}),
    "3x3": (3, {"padding": 1}),
    "7x7 of the stem": (7, {"stride": 2, "padding": 3}),
    "stride": (3, {"stride": 2, "padding": 1}),
    "dilation": (3, {"padding": 2, "dilation": 2}),
    "groups": (3, {"padding": 1, "groups": 4}),
    "depthwise": (3, {"padding": 1, "groups": 8}),
    "pairs": ((1, 3), {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
}
NORMS = ["all", "bias", "none"]


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch):
    """Without TF32, which two convolutions of one test might use differently."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def make(shape: str, norm: str = "all", residual: bool = False, dtype=torch.float32, channels=(8, 12), size=(9, 11)):
    """The tensors of a call in `dtype`, statistics in float32 beside half precision, and its other arguments."""
    kernel, where = SHAPES[shape]
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    groups = where.get("groups", 1)
    c, o = channels[0], channels[0] if groups == channels[0] else channels[1]
    weight = torch.randn(o, c // groups, *kernel) / (c // groups * kernel[0] * kernel[1]) ** 0.5
    bn = [torch.rand(o) + 0.5, torch.randn(o), torch.randn(o), torch.rand(o) + 0.5]
    if norm != "all":
        bn = [None, bn[1] if norm == "bias" else None, None, None]
    tensors = [torch.randn(2, c, *size), weight, *bn]
    if residual:
        tensors.append(torch.randn_like(F.conv2d(tensors[0], weight, **where)))
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    low = (0, 1, 6)
    tensors = [t if t is None else t.to(dtype if i in low else statistics) for i, t in enumerate(tensors)]
    return tensors[:6], {**where, "residual": tensors[6] if residual else None}


def to(device, args, kwargs, dtype=None):
    def move(t):
        return t.to(device, dtype) if isinstance(t, torch.Tensor) else t

    return [move(t) for t in args], {k: move(v) for k, v in kwargs.items()}


def batch_norm(y, weight, bias, mean, var, eps):
    return F.batch_norm(y, mean, var, weight, bias, False, 0.0, eps)


def differentiable_batch_norm(y, weight, bias, mean, var, eps):
    """torch's own has no gradient for the statistics."""
    weight, bias, mean, var = (t[:, None, None] for t in (weight, bias, mean, var))
    return (y - mean) / (var + eps).sqrt() * weight + bias


def plain(input, weight, *bn, eps=1e-5, residual=None, relu=True, norm=batch_norm, **where):
    """The same layers as a model writes them."""
    if bn[0] is None:
        y = F.conv2d(input, weight, bn[1], **where)
    else:
        y = norm(F.conv2d(input, weight, **where), *bn, eps)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_float32_errs_at_most_twice_as_much_as_plain_layers(device, need_kernel, shape, norm, residual, relu):
    need_kernel("conv_bn_relu", device)
    args, kwargs = to(device, *make(shape, norm, residual))
    exact_args, exact_kwargs = to(device, args, kwargs, torch.float64)
    exact = plain(*exact_args, relu=relu, **exact_kwargs)
    low = plain(*args, relu=relu, **kwargs)
    out = conv_bn_relu(*args, relu=relu, **kwargs)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_within_twice(out, low, exact)
    assert_within_twice(conv_bn_relu_reference(*args, relu=relu, **kwargs), low, exact)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_errs_at_most_twice_as_much_as_the_reference(device, need_kernel, shape, norm, residual, dtype):
    need_kernel("conv_bn_relu", device)
    channels = (16, 32) if shape != "depthwise" else (8, 8)
    args, kwargs = to(device, *make(shape, norm, residual, dtype, channels))
    exact_args, exact_kwargs = to(device, args, kwargs, torch.float32)
    for relu in (False, True):
        out = conv_bn_relu(*args, relu=relu, **kwargs)
        assert out.dtype == dtype
        low = conv_bn_relu_reference(*args, relu=relu, **kwargs)
        assert_within_twice(out, low, conv_bn_relu_reference(*exact_args, relu=relu, **exact_kwargs))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", NORMS)
def test_double_equals_plain_layers(device, shape, norm):
    args, kwargs = to(device, *make(shape, norm, True, torch.float64))
    torch.testing.assert_close(conv_bn_relu(*args, eps=1e-3, **kwargs), plain(*args, eps=1e-3, **kwargs))
    torch.testing.assert_close(conv_bn_relu_reference(*args, eps=1e-3, **kwargs), plain(*args, eps=1e-3, **kwargs))


def test_two_pixels_by_hand(device):
    x = torch.tensor([3.0, -5.0], device=device).view(1, 1, 1, 2)
    weight, residual = torch.full((1, 1, 1, 1), 2.0, device=device), torch.ones(1, 1, 1, 2, device=device)
    bn = [torch.tensor([v], device=device) for v in (3.0, 0.5, 4.0, 2.25)]  # 3 * (y - 4) / 1.5 + 0.5
    assert conv_bn_relu(x, weight, *bn, eps=0, relu=False).flatten().tolist() == [4.5, -27.5]
    assert conv_bn_relu(x, weight, *bn, eps=0, residual=residual).flatten().tolist() == [5.5, 0]


LAYOUTS = {
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layouts_equal_contiguous(device, layout, dtype):
    args, kwargs = to(device, *make("3x3", residual=True, dtype=dtype))
    expected = conv_bn_relu(*args, **kwargs)
    args[0], kwargs["residual"] = LAYOUTS[layout](args[0]), LAYOUTS[layout](kwargs["residual"])
    copies = args[0].clone(), kwargs["residual"].clone()
    args[1] = args[1].contiguous(memory_format=torch.channels_last)
    out = conv_bn_relu(*args, **kwargs)
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(args[0], copies[0])
    assert torch.equal(kwargs["residual"], copies[1])


@pytest.mark.parametrize("batch, size", [(0, (9, 11)), (1, (3, 3)), (2, (3, 1000))])
def test_empty_and_odd_sizes(device, batch, size):
    args, _ = to(device, *make("3x3", size=size))
    args[0] = args[0][:1].expand(batch, -1, -1, -1)
    out = conv_bn_relu(*args, stride=1)
    assert out.shape == (batch, 12, size[0] - 2, size[1] - 2)
    torch.testing.assert_close(out, conv_bn_relu_reference(*args))


@pytest.mark.parametrize(
    "shape, norm, residual, relu",
    [
        *[(shape, "all", True, True) for shape in ("1x1", "stride", "dilation", "groups", "pairs")],
        *[("stride", norm, *flags) for norm in NORMS for flags in ((False, False), (True, False), (False, True))],
    ],
)
def test_gradcheck(device, shape, norm, residual, relu):
    args, kwargs = make(shape, norm, residual, torch.float64, channels=(4, 4), size=(4, 5))
    args, kwargs = to(device, args, kwargs)
    names = [i for i, t in enumerate(args) if t is not None]
    leaves = [args[i].requires_grad_() for i in names]
    if residual:
        leaves.append(kwargs["residual"].requires_grad_())

    def call(*leaves):
        given = dict(zip(names, leaves))
        tensors = [given.get(i) for i in range(6)]
        return conv_bn_relu(*tensors, **{**kwargs, "residual": leaves[-1] if residual else None}, relu=relu)

    if relu:  # away from the kink
        with torch.no_grad():
            assert call(*leaves).clamp(min=0)[call(*leaves) > 0].min() > 1e-4
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("shape", ["3x3", "groups"])
@pytest.mark.parametrize("norm", NORMS)
def test_float32_gradients_err_at_most_twice_as_much_as_plain_layers(device, need_kernel, shape, norm):
    need_kernel("conv_bn_relu", device)
    args, kwargs = to(device, *make(shape, norm, True))
    upstream = torch.randn_like(kwargs["residual"])

    def gradients(function, dtype):
        a, k = to(device, args, kwargs, dtype)
        leaves = [t.detach().clone().requires_grad_() for t in (*a, k.pop("residual")) if t is not None]
        given = iter(leaves)
        tensors = [None if t is None else next(given) for t in a]
        if function is plain:
            k["norm"] = differentiable_batch_norm
        out = function(*tensors, residual=next(given), **k)
        return torch.autograd.grad(out, leaves, upstream.to(dtype))

    exact = gradients(plain, torch.float64)
    for got, low, want in zip(gradients(conv_bn_relu, torch.float32), gradients(plain, torch.float32), exact):
        assert_within_twice(got, low, want)


def test_gradients_go_only_where_they_are_asked_for(device):
    args, kwargs = to(device, *make("3x3", residual=True))
    for i in range(6):
        leaves = [t.detach().clone().requires_grad_(i == j) for j, t in enumerate(args)]
        conv_bn_relu(*leaves, **kwargs).sum().backward()
        assert [t.grad is not None for t in leaves] == [i == j for j in range(6)]


def small(device, norm="all", residual=True):
    return to(device, *make("3x3", norm, residual, channels=(4, 6), size=(5, 6)))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(device, norm, residual):
    args, kwargs = small(device, norm, residual)
    args = [t if t is None else t.requires_grad_() for t in args]
    where = [1, 1], [1, 1], [1, 1], 1
    op = torch.ops.fastrcnn.conv_bn_relu.default
    torch.library.opcheck(op, (*args, 1e-5, *where, kwargs["residual"], True))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x):
        bn = self.bn.weight, self.bn.bias, self.bn.running_mean, self.bn.running_var
        y = conv_bn_relu(x, self.weight, *bn, padding=1)
        return conv_bn_relu(x, self.weight, *bn, padding=1, residual=y, relu=False)


def test_compiles_as_one_graph_with_gradients(device):
    block, x = Block().to(device), torch.randn(2, 4, 5, 6, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for model in (compiled, block):
        out = model(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(block.parameters()))))
    torch.testing.assert_close(*results)


def test_exports_with_any_batch_and_size(device):
    block, x = Block().to(device).eval(), torch.randn(2, 4, 5, 6, device=device)
    dims = {0: torch.export.Dim("b", min=2), 2: torch.export.Dim("h", min=4), 3: torch.export.Dim("w", min=4)}
    exported = torch.export.export(block, (x,), dynamic_shapes=(dims,)).module()
    more = torch.randn(3, 4, 9, 7, device=device)
    torch.testing.assert_close(exported(more), block(more))


X, W, V = torch.zeros(1, 4, 5, 5), torch.zeros(6, 4, 3, 3), torch.ones(6)


@pytest.mark.parametrize(
    "wrong, error, name",
    [
        ({"input": X[0]}, ValueError, "input"),
        ({"input": X.int()}, TypeError, "input"),
        ({"input": None}, TypeError, "input"),
        ({"input": X[..., :2]}, ValueError, "input"),
        ({"weight": W[0]}, ValueError, "weight"),
        ({"weight": W[:, :3]}, ValueError, "weight"),
        ({"weight": W.double()}, TypeError, "weight"),
        ({"groups": 2}, ValueError, "weight"),
        ({"groups": 0}, ValueError, "weight"),
        ({"bn_weight": V[:5]}, ValueError, "bn_weight"),
        ({"bn_weight": None}, ValueError, "bn_weight"),
        ({"bn_bias": None}, ValueError, "bn_bias"),
        ({"bn_mean": None}, ValueError, "bn_mean"),
        ({"bn_mean": V[None]}, ValueError, "bn_mean"),
        ({"bn_var": None}, ValueError, "bn_var"),
        ({"bn_var": V.long()}, TypeError, "bn_var"),
        ({"stride": (1, 1, 1)}, ValueError, "stride"),
        ({"stride": 0}, ValueError, "stride"),
        ({"padding": (1,)}, ValueError, "padding"),
        ({"padding": -1}, ValueError, "padding"),
        ({"dilation": (1, 2, 3)}, ValueError, "dilation"),
        ({"dilation": 0}, ValueError, "dilation"),
        ({"residual": torch.zeros(1, 6, 5, 5)}, ValueError, "residual"),
        ({"residual": torch.zeros(6, 3, 3)}, ValueError, "residual"),
        ({"residual": torch.zeros(1, 6, 3, 3, dtype=torch.int64)}, TypeError, "residual"),
        ({"residual": torch.zeros(1, 6, 3, 3, dtype=torch.float64)}, TypeError, "residual"),
        ({"residual": torch.zeros(1, 6, 3, 3, device="meta")}, ValueError, "residual"),
    ],
)
def test_wrong_arguments_are_named(wrong, error, name):
    right = {"input": X, "weight": W, "bn_weight": V, "bn_bias": V, "bn_mean": V, "bn_var": V}
    conv_bn_relu(**right)
    with pytest.raises(error, match=name):
        conv_bn_relu(**{**right, **wrong})


def cudnn_convolution_relu(self, weight, bias, stride, padding, dilation, groups):
    """torch's operator of this name, on the CPU, for what cuDNN takes."""
    assert groups == 1 and all(t.numel() and t.is_contiguous(memory_format=torch.channels_last) for t in (self, weight))
    assert self.dtype != torch.float64 and (bias is None or (bias.is_contiguous() and bias.dtype == self.dtype))
    return F.relu(F.conv2d(self, weight, bias, stride, padding, dilation, groups))


def cudnn_convolution_add_relu(self, weight, z, alpha, bias, stride, padding, dilation, groups):
    assert alpha == 1 and cudnn_convolution_relu(self, weight, bias, stride, padding, dilation, groups) is not None
    return F.relu(F.conv2d(self, weight, bias, stride, padding, dilation, groups) + z)


@pytest.fixture
def cuda_kernel(monkeypatch):
    """The function registered for CUDA, run on CPU tensors with cuDNN's operators imitated: (output, those called)."""
    imitated = {f.__name__: Mock(side_effect=f) for f in (cudnn_convolution_relu, cudnn_convolution_add_relu)}
    for name, mock in imitated.items():
        schema = getattr(torch.ops.aten, name).default._schema
        assert [a.name for a in schema.arguments] == list(inspect.signature(mock.side_effect).parameters)
        monkeypatch.setattr(torch, name, mock)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))

    def call(*tensors, eps=1e-5, **kwargs):
        for mock in imitated.values():
            mock.reset_mock()
        rest = (dict(stride=1, padding=0, dilation=1, groups=1, residual=None, relu=True) | kwargs).values()
        out = op_module._call(op_module._cuda, *tensors, eps, *rest)
        return out, [name for name, mock in imitated.items() if mock.called]

    return call


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cuda_arithmetic_on_the_cpu(cuda_kernel, shape, norm, residual, dtype):
    args, kwargs = make(shape, norm, residual, dtype)
    exact_args, exact_kwargs = to("cpu", args, kwargs, torch.float64)
    for relu in (False, True):
        out, called = cuda_kernel(*args, relu=relu, **kwargs)
        fused = relu and dtype != torch.float64 and kwargs.get("groups", 1) == 1
        assert called == ([f"cudnn_convolution_{'add_' * residual}relu"] if fused else [])
        assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
        low = conv_bn_relu_reference(*args, relu=relu, **kwargs)
        assert_within_twice(out, low, plain(*exact_args, relu=relu, **exact_kwargs))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("relu", [False, True])
def test_cuda_takes_any_layout(cuda_kernel, layout, relu):
    args, kwargs = make("3x3", "bias", True)
    expected = conv_bn_relu_reference(*args, relu=relu, **kwargs)
    args[0], kwargs["residual"] = LAYOUTS[layout](args[0]), LAYOUTS[layout](kwargs["residual"])
    torch.testing.assert_close(cuda_kernel(*args, relu=relu, **kwargs)[0], expected)


def test_when_cudnn_is_not_asked(cuda_kernel, monkeypatch):
    args, kwargs = make("3x3", dtype=torch.bfloat16)
    assert not cuda_kernel(args[0][:0], *args[1:], **kwargs)[1]
    flags, turing = torch.backends.cudnn, lambda device: (7, 5)
    for owner, name, value in (
        (flags, "enabled", False), (flags, "deterministic", True), (torch.cuda, "get_device_capability", turing),
        (torch, "are_deterministic_algorithms_enabled", lambda: True),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert not cuda_kernel(*args, **kwargs)[1]


def test_where_cudnn_has_no_engine(cuda_kernel, monkeypatch):
    args, kwargs = make("3x3")
    refusal = Mock(side_effect=RuntimeError("GET was unable to find an engine to execute this computation"))
    monkeypatch.setattr(torch, "cudnn_convolution_relu", refusal)
    torch.testing.assert_close(cuda_kernel(*args, **kwargs)[0], conv_bn_relu_reference(*args, **kwargs))
    refusal.side_effect = torch.OutOfMemoryError("out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        cuda_kernel(*args, **kwargs)


def test_cuda_has_a_kernel_where_torch_has_cudnn():
    assert has_kernel("conv_bn_relu", "cuda") == (bool(torch.version.cuda) and torch.backends.cudnn.is_available())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["1x1", "3x3", "7x7 of the stem", "stride", "dilation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stale_memory_does_not_reach_the_output(shape, dtype):
    """Without a residual torch gives cuDNN the output itself as the addend, times zero: a stale NaN must not be read."""
    args, kwargs = to("cuda", *make(shape, dtype=dtype, channels=(64, 64), size=(40, 56)))
    low, exact = (conv_bn_relu_reference(*a, **kwargs) for a in (args, to("cuda", args, {}, torch.float32)[0]))
    stale = [torch.full_like(low, torch.nan) for _ in range(8)]
    del stale
    assert_within_twice(conv_bn_relu(*args, **kwargs), low, exact, floor=1e-5)
