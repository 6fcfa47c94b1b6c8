"""The gradients of a convolution: Winograd's kernels in each width of vectors, and which convolutions take them."""

import importlib
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrcnn.layers import conv_norm_act
from fastrcnn.ops import conv_bn_relu, conv_bn_relu_reference

winograd, backward = (importlib.import_module(f"fastrcnn.ops.{name}") for name in ("conv_winograd", "conv_backward"))
WIDTHS = [lanes for lanes in (4, 8, 16) if lanes <= winograd.LANES]
# batch, channels, filters, height, width: odd sizes, one pixel, channels that fill no vector, several blocks of tiles
SIZES = [(1, 3, 5, 1, 1), (2, 16, 32, 9, 11), (1, 70, 45, 13, 21), (3, 33, 17, 5, 4), (1, 20, 40, 62, 83)]
PADDINGS = [(1, 1), (0, 2), (2, 0)]
CASES = [(s, p) for s, p in product(SIZES, PADDINGS) if min(s[3] + 2 * p[0], s[4] + 2 * p[1]) > 2]
ROUNDINGS = 8  # of float32, of the sum of absolute terms; measured: 4.3


@pytest.fixture(autouse=True)
def kernels(need_kernel):
    for name in ("_winograd_weight", "_winograd_weight_gradient", "_conv_winograd"):
        need_kernel(name, "cpu")


def make(size, padding):
    batch, channels, filters, height, width = size
    x, weight = torch.randn(batch, channels, height, width), torch.randn(filters, channels, 3, 3)
    return x, weight, torch.randn(batch, filters, height + 2 * padding[0] - 2, width + 2 * padding[1] - 2)


def exact(gradient, x, weight, padding, stride=(1, 1)):
    """torch's gradients in float64, and the largest sum of absolute terms of each."""

    def of(*tensors):
        tensors = [t.double() for t in tensors]
        where = None, stride, padding, (1, 1), False, [0, 0], 1, [True, True, False]
        return torch.ops.aten.convolution_backward(*tensors, *where)[:2]

    sizes = of(gradient.abs(), x.abs(), weight.abs())
    return list(zip(of(gradient, x, weight), (size.max().item() for size in sizes)))


def check(found, right, size):
    assert found.shape == right.shape and found.dtype == torch.float32
    error, allowed = (found.double() - right).abs().max().item(), ROUNDINGS * torch.finfo(torch.float32).eps * size
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("turned", [False, True])
def test_a_weights_points_are_those_of_float64(size, turned):
    _, weight, _ = make(size, (1, 1))
    for lanes, given in product(WIDTHS, (weight, weight.contiguous(memory_format=torch.channels_last))):
        right = winograd.winograd_weight(weight, lanes, turned)
        torch.testing.assert_close(winograd.points_of(given, lanes, turned), right, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size, padding", CASES)
def test_a_weights_gradient_is_that_of_float64(size, padding):
    x, weight, gradient = make(size, padding)
    _, (right, unit) = exact(gradient, x, weight, padding)
    layouts = x, x.contiguous(memory_format=torch.channels_last)
    for lanes, given in product(WIDTHS, layouts):
        check(winograd.weight_gradient(given, gradient, padding, lanes), right, unit)
    twin = winograd._gradient_reference(x.double(), gradient.double(), padding, 4)
    torch.testing.assert_close(twin, right, rtol=0, atol=1e-12 * unit)


def test_any_number_of_threads_gives_the_same_bits():
    x, weight, gradient = make((2, 40, 70, 61, 90), (1, 1))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((winograd.weight_gradient(x, gradient, (1, 1), WIDTHS[-1]),
                          winograd.points_of(weight.repeat(8, 8, 1, 1), WIDTHS[-1], True)))  # fmt: skip
    finally:
        torch.set_num_threads(before)
    check(found[0][0], *exact(gradient, x, weight, (1, 1))[1])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_views_an_empty_batch_and_wrong_arguments():
    x, weight, gradient = make((2, 32, 24, 10, 14), (1, 1))
    right = exact(gradient[..., 2:, ::2], x[:, ::2, 2:, ::2], weight[:, :16], (1, 1))[1]
    check(winograd.weight_gradient(x[:, ::2, 2:, ::2], gradient[..., 2:, ::2], (1, 1), WIDTHS[-1]), *right)
    none = winograd.weight_gradient(x[:0], gradient[:0], (1, 1), 4)
    assert none.shape == weight.shape and not none.any()
    for wrong in ((x.double(), gradient, (1, 1), 4), (x, gradient[:, :, 1:], (1, 1), 4), (x, gradient, (1, 1), 5)):
        with pytest.raises(ValueError):
            winograd.weight_gradient(*wrong)
    for wrong in ((weight[..., :2], 4, False), (weight.double(), 4, False), (weight, 3, False)):
        with pytest.raises(ValueError):
            winograd.points_of(*wrong)


@pytest.fixture
def asked(monkeypatch):
    """Which of the two answered, in order."""
    calls = []
    for module, name in ((winograd, "convolve"), (winograd, "gradients"), (backward, "_reference")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function, n=name: calls.append(n) or f(*a))
    return calls


WIDE = (2, 16, 24, 20, 30)  # 1,200 pixels


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("norm", [False, True])
def test_the_operators_gradients_are_those_of_float64(asked, padding, norm):
    x, weight, gradient = make(WIDE, padding)
    filters = len(weight)
    shape = [len(x), filters, *((n + 1) // 2 for n in gradient.shape[2:])]
    tensors = [x, weight / 12, torch.rand(filters) + 0.5, torch.randn(filters), torch.randn(filters),
               torch.rand(filters) + 0.5, torch.randn(shape)]  # fmt: skip
    if not norm:
        tensors[2] = tensors[4] = tensors[5] = None

    def run(op, cast):
        leaves = [None if t is None else cast(t).requires_grad_() for t in tensors]
        out = op(*leaves[:6], padding=padding, residual=leaves[6], upsample_residual=True)
        asked_for = [t for t in leaves if t is not None]
        return [out, *torch.autograd.grad(out, asked_for, cast(gradient))]

    found = run(conv_bn_relu, lambda t: t.detach().clone())
    assert asked == ["convolve", "gradients"]
    for a, b in zip(found, run(conv_bn_relu_reference, torch.Tensor.double), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_a_bad_pixel_spoils_what_it_reaches_and_no_more(asked, bad):
    x, weight, _ = make(WIDE, (1, 1))
    x[1, 3, 7, 7] = bad
    out = conv_bn_relu(x, weight, None, None, None, None, padding=1, relu=False)
    assert asked == []
    others = torch.ones(out.shape, dtype=torch.bool)
    others[1, :, 6:9, 6:9] = False
    right = torch.conv2d(x.double().masked_fill(x == bad, 0), weight.double(), padding=1)
    torch.testing.assert_close(out[others].double(), right[others], rtol=0, atol=1e-3)


def test_only_what_is_asked_for_is_computed(monkeypatch):
    calls = []
    for name in ("conv_winograd", "weight_gradient"):
        function = getattr(winograd, name)
        monkeypatch.setattr(winograd, name, lambda *a, f=function, n=name: calls.append(n) or f(*a))
    x, weight, gradient = make(WIDE, (1, 1))
    for wanted, name in (((True, False), "conv_winograd"), ((False, True), "weight_gradient")):
        found = backward.conv_backward(gradient, x, weight, (1, 1), (1, 1), (1, 1), 1, *wanted)
        assert calls == [name] and [t.numel() > 0 for t in found] == list(wanted)
        calls.clear()


def test_which_convolutions_take_it():
    def takes(size=WIDE, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, dtype=torch.float32, kernel=3):
        x, weight = (
            torch.empty(size[0], size[1] * groups, *size[3:], dtype=dtype),
            torch.empty(size[2], size[1], kernel, kernel, dtype=dtype),
        )
        return winograd.pays(x, weight, stride, padding, dilation, groups)

    assert takes() == (winograd.LANES > 4)
    others = [
        dict(size=(1, *WIDE[1:])),
        dict(size=(2, 8, 24, 20, 30)),
        dict(size=(2, 16, 8, 20, 30)),
        dict(stride=(2, 1)),
        dict(padding=(3, 3)),
        dict(dilation=(2, 2)),
        dict(groups=2),
        dict(dtype=torch.float64),
        dict(kernel=1),
    ]
    assert not any(takes(**other) for other in others)


@pytest.mark.parametrize("batch, channels, stride", [(3, 4, (2, 2)), (1, 8, (2, 3)), (2, 20, (3, 1))])
def test_narrow_kernels_of_one_pixel_with_a_stride(asked, monkeypatch, batch, channels, stride):
    """Through the strided view: torch's own call with a stride writes past its memory for some of them."""
    strides, reference = [], backward._reference
    monkeypatch.setattr(backward, "_reference", lambda *a: strides.append(a[3]) or reference(*a))
    x, weight = torch.randn(batch, channels, 9, 11), torch.randn(6, channels, 1, 1)
    gradient = torch.randn_like(torch.conv2d(x, weight, stride=stride))
    found = backward.conv_backward(gradient, x, weight, stride, (0, 0), (1, 1), 1, True, True)
    for a, right in zip(found, exact(gradient, x, weight, (0, 0), stride)):
        check(a, *right)
    assert asked == ["_reference"] and strides == [(1, 1)]


def test_a_training_norm_takes_the_operators_convolution(asked):
    conv, norm = nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
    x = torch.randn(2, 16, 20, 30)
    out = conv_norm_act(x, conv, norm)
    (found,) = torch.autograd.grad(out.square().sum(), conv.weight)
    assert asked == ["convolve", "gradients"]
    assert norm.num_batches_tracked == 1
    right = F.batch_norm(conv(x), None, None, norm.weight, norm.bias, True).relu()
    torch.testing.assert_close(out, right, rtol=1e-5, atol=1e-5)
    (expected,) = torch.autograd.grad(right.square().sum(), conv.weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert norm.eval() and torch.equal(conv_norm_act(x, conv, norm), conv_bn_relu(
        x, conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, padding=1))  # fmt: skip


@pytest.mark.parametrize("name", ["_winograd_weight", "_winograd_weight_gradient", "_conv_backward"])
def test_fakes_say_the_shapes(name):
    x, weight, gradient = make(WIDE, (1, 1))
    calls = {
        "_winograd_weight": [(weight, 4, False), (weight, 4, True)],
        "_winograd_weight_gradient": [(x, gradient, (1, 1), 4)],
        "_conv_backward": [
            (gradient, x, weight, (1, 1), (1, 1), (1, 1), 1, *w) for w in product((True, False), repeat=2)
        ],
    }
    for call in calls[name]:
        torch.library.opcheck(getattr(torch.ops.fastrcnn, name).default, call, test_utils="test_faketensor")


@pytest.mark.parametrize("stride", [1, 2, (2, 3)])
def test_half_precision_sees_a_narrow_kernel_of_one_pixel_through_its_stride(two_threads, monkeypatch, stride):
    """torch's own convolution would have a stride and, on two threads, end the process in its gradient."""
    conv, norm = nn.Conv2d(8, 16, 1, stride, bias=False), nn.BatchNorm2d(16)
    x = torch.randn(1, 8, 16, 24, requires_grad=True)
    strides, conv2d = [], F.conv2d
    with monkeypatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(
            F, "conv2d", lambda x, w, b, stride=1, *more: strides.append(stride) or conv2d(x, w, b, stride, *more)
        )
        out = conv_norm_act(x, conv, norm, relu=False)
    assert strides in ([1], [(1, 1)])
    assert out.dtype == torch.bfloat16 and out.shape == conv(x).shape
    gradient = torch.randn(out.shape)
    found = torch.autograd.grad(out, (x, conv.weight), gradient.bfloat16())
    right = F.batch_norm(F.conv2d(x.double(), conv.weight.double(), None, stride), None, None, training=True)
    torch.testing.assert_close(out.double(), right, rtol=0, atol=0.05)
    for a, b in zip(found, torch.autograd.grad(right, (x, conv.weight), gradient.double())):
        assert (a - b).norm() < 0.02 * b.norm()
