"""conv_bn_relu against its reference and torch's own layers."""

import importlib
import inspect
import math
from itertools import product
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_within_twice

from fastrcnn.ops import conv_bn_relu, conv_bn_relu_reference

op_module = importlib.import_module("fastrcnn.ops.conv_bn_relu")
OF_CUDA = importlib.import_module("fastrcnn.ops.conv_cuda")._cuda

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
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


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


ROUNDINGS = {torch.float64: 8, torch.float32: 8, torch.float16: 1, torch.bfloat16: 1}


def within_roundings(got, right, size, dtype):
    """Off by no more than some roundings of `size`, the sum of absolute terms."""
    allowed = ROUNDINGS[dtype] * torch.finfo(dtype).eps * size.abs().max()
    error = (got.double() - right).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def sizes(args, kwargs):
    """The call whose result is the sum of the absolute terms: statistics that subtract are made to add."""
    args = [t if t is None else t.abs() for t in args]
    args[4] = None if args[4] is None else -args[4]
    return args, {**kwargs, "residual": kwargs["residual"] if kwargs["residual"] is None else kwargs["residual"].abs()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_plain_layers_in_float64(device, shape, norm, dtype):
    args, kwargs = to(device, *make(shape, norm, True, dtype))
    for residual in (kwargs.pop("residual"), None):
        exact = to(device, args, {**kwargs, "residual": residual}, torch.float64)
        size_args, size_kwargs = sizes(*exact)
        size = plain(*size_args, eps=0.1, **size_kwargs)
        for relu, function in product((False, True), (conv_bn_relu, conv_bn_relu_reference)):
            out = function(*args, eps=0.1, relu=relu, residual=residual, **kwargs)
            assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
            within_roundings(out, plain(*exact[0], eps=0.1, relu=relu, **exact[1]), size, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_of_half_the_size_is_read_by_nearest_neighbour(device, dtype):
    for shape, size in (("1x1", (6, 8)), ("1x1", (5, 7)), ("3x3", (1, 4)), ("groups", (3, 2))):
        args, kwargs = to(device, *make(shape, residual=True, dtype=dtype, size=size))
        half = kwargs.pop("residual")[:, :, ::2, ::2].clone()
        up = F.interpolate(half.double(), scale_factor=2)[:, :, : size[0], : size[1]].to(dtype)
        for relu, function in product((False, True), (conv_bn_relu, conv_bn_relu_reference)):
            leaves = [up.clone().requires_grad_(), half.clone().requires_grad_()]
            outs = [
                function(*args, residual=r, relu=relu, upsample_residual=u, **kwargs)
                for r, u in zip(leaves, (False, True))
            ]
            assert torch.equal(*outs)
            upstream = torch.randint(-4, 5, outs[0].shape, device=device).to(dtype)
            full, of_half = (torch.autograd.grad(out, x, upstream)[0] for out, x in zip(outs, leaves))
            padded = F.pad(full, (0, size[1] % 2, 0, size[0] % 2))
            quarters = [padded[..., i::2, j::2] for i, j in product((0, 1), (0, 1))]
            assert torch.equal(of_half, sum(quarters))
    with pytest.raises(ValueError, match=r"^residual: expected half the output's shape .*, got"):
        conv_bn_relu(*args, residual=up, upsample_residual=True, **kwargs)
    with pytest.raises(ValueError, match=r"^upsample_residual: True without"):
        conv_bn_relu(*args, upsample_residual=True, **kwargs)


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
def test_empty_and_odd_sizes(device, need_kernel, batch, size):
    need_kernel("conv_bn_relu", device)
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


@pytest.mark.parametrize("shape", ["3x3", "groups", "pairs"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_equal_plain_layers_in_float64(device, shape, norm, dtype):
    args, kwargs = to(device, *make(shape, norm, True, dtype))
    upstream = torch.randn_like(kwargs["residual"])

    def gradients(function, args, kwargs, upstream):
        tensors = [*args, kwargs["residual"]]
        tensors = [t if t is None else t.detach().clone().requires_grad_() for t in tensors]
        out = function(*tensors[:6], eps=0.1, **{**kwargs, "residual": tensors[6]})
        return out, torch.autograd.grad(out, [t for t in tensors if t is not None], upstream)

    out, got = gradients(conv_bn_relu, args, kwargs, upstream)
    upstream = upstream.double() * (out > 0)  # the plain layers without ReLU: no output may fall on its other side
    exact = to(device, args, dict(kwargs, relu=False), torch.float64)
    exact[1]["norm"] = differentiable_batch_norm
    right = gradients(plain, *exact, upstream)[1]
    size = gradients(plain, *sizes(*exact), upstream.abs())[1]
    for a, b, c in zip(got, right, size, strict=True):
        within_roundings(a, b, c, dtype)


NARROW = [  # input, weight, stride, padding, dilation, groups
    ((1, 16, 1, 1), (16, 16, 2, 1), (1, 2), (2, 1), (2, 2), 1),
    ((1, 2, 8, 1), (4, 1, 1, 1), (1, 2), (1, 1), (1, 3), 2),
    ((2, 16, 8, 1), (8, 16, 3, 1), (2, 2), (0, 1), (3, 2), 1),
    ((1, 2, 20, 1), (8, 2, 3, 1), 2, (0, 1), 2, 1),
    ((3, 32, 3, 1), (64, 8, 1, 1), (2, 3), 2, (1, 2), 4),
    ((1, 8, 20, 5), (8, 8, 2, 2), (3, 2), (1, 0), (1, 3), 1),  # outputs one wide: AMX
    *[((3, 3, 1, 2), (16, 3, 1, 2), (1, 3), (0, 1), (2, 1), 1)] * 8,  # its gradient: stale memory, in every second call
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_maps(device, dtype):
    """Shapes at which oneDNN ended the process or was wrong, forward and backward."""
    for x_shape, w_shape, *where in NARROW:
        where = dict(zip(("stride", "padding", "dilation", "groups"), where))
        x, w = (torch.randn(s, device=device, dtype=dtype).requires_grad_() for s in (x_shape, w_shape))
        bias = torch.randn(w_shape[0], device=device)
        for function in (conv_bn_relu, conv_bn_relu_reference):
            out = function(x.contiguous(memory_format=torch.channels_last), w, None, bias, None, None, **where)
            x64, w64 = (t.detach().double().requires_grad_() for t in (x, w))
            right = F.conv2d(x64, w64, bias.double(), **where)
            pairs = zip(
                torch.autograd.grad(out.sum(), (x, w)), torch.autograd.grad((right * (out > 0)).sum(), (x64, w64))
            )
            unit = ROUNDINGS[dtype] * torch.finfo(dtype).eps
            for got, want in ((out, right.relu()), *pairs):
                torch.testing.assert_close(got.double(), want, rtol=unit, atol=4 * unit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
def test_relu_keeps_nan(device, dtype, residual):
    """Four pixels under a 1 x 1 weight of 1: NaN of both signs, infinities, and a zero that has lost its sign."""
    values = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, -2.0, 3.0, -0.0, 0.0], device=device, dtype=dtype)
    x, zeros = values.view(1, 1, 2, 4), torch.zeros(1, 1, 2, 4, device=device, dtype=dtype)
    x, r = (zeros, x) if residual else (x, None)
    for function in (conv_bn_relu, conv_bn_relu_reference):
        out = function(x, torch.ones(1, 1, 1, 1, device=device, dtype=dtype), None, None, None, None, residual=r)
        right = torch.tensor([math.nan, math.nan, math.inf, 0, 0, 3, 0, 0], device=device, dtype=dtype)
        torch.testing.assert_close(out.flatten(), right, equal_nan=True, rtol=0, atol=0)
    weight = torch.ones(2, 1, 1, 1, device=device, dtype=dtype).index_fill_(0, torch.tensor(1, device=device), math.nan)
    out = conv_bn_relu(zeros, weight, None, None, None, None)
    assert out.isnan().float().mean((0, 2, 3)).tolist() == [0, 1]


def test_gradients_go_only_where_they_are_asked_for(device):
    args, kwargs = to(device, *make("3x3", residual=True))
    for i in range(6):
        leaves = [t.detach().clone().requires_grad_(i == j) for j, t in enumerate(args)]
        conv_bn_relu(*leaves, **kwargs).sum().backward()
        assert [t.grad is not None for t in leaves] == [i == j for j in range(6)]


X, W, V = torch.zeros(1, 4, 5, 5), torch.zeros(6, 4, 3, 3), torch.ones(6)
WRONG = [
    (name, value, TypeError) for name in ("stride", "padding", "dilation", "groups") for value in (None, "1", 1.5, True)
]
WRONG += [(name, value, ValueError) for name in ("stride", "padding", "dilation", "groups") for value in (-1, 2**32)]
WRONG += [("eps", value, ValueError) for value in (math.nan, math.inf, -1e-5)] + [("eps", "0", TypeError)]
WRONG += [("input", X[:, :, :0], ValueError), ("input", X[..., :2], ValueError), ("groups", 0, ValueError)]
WRONG += [("padding", 2**20, ValueError), ("relu", 1, TypeError), ("weight", W[:0], ValueError)]
WRONG += [("residual", torch.zeros(1, 6, 3, 3, device="meta"), ValueError), ("bn_var", V.long(), TypeError)]


@pytest.mark.parametrize("name, value, error", WRONG)
def test_wrong_arguments_are_named(name, value, error):
    right = {"input": X, "weight": W, "bn_weight": V, "bn_bias": V, "bn_mean": V, "bn_var": V}
    with pytest.raises(error, match=name if name != "residual" else "on one device"):
        conv_bn_relu(**{**right, name: value})


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
        out = op_module._checked(OF_CUDA, *tensors, eps, **kwargs)
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


@pytest.mark.parametrize("relu", [False, True])
def test_cuda_upsamples_the_residual(cuda_kernel, relu):
    args, kwargs = make("1x1", residual=True)
    kwargs |= dict(residual=kwargs["residual"][:, :, ::2, ::2], upsample_residual=True, relu=relu)
    torch.testing.assert_close(cuda_kernel(*args, **kwargs)[0], conv_bn_relu_reference(*args, **kwargs))


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
