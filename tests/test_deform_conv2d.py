"""deform_conv2d against its reference, and the reference against torchvision and plain convolution."""

from dataclasses import dataclass

import pytest
import torch
import torchvision
from conftest import assert_within_twice, layout

from fastrcnn.ops.deform_conv2d import deform_conv2d, deform_conv2d_reference

NAN, INF = float("nan"), float("inf")


@dataclass
class Case:
    channels: int = 6
    filters: int = 4
    kernel: tuple = (3, 3)
    stride: tuple = (1, 1)
    padding: tuple = (1, 1)
    dilation: tuple = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    masked: bool = False
    spread: float = 2.0  # standard deviation of the offsets, in pixels
    size: tuple = (9, 11)
    batch: int = 2

    def tensors(self, device, dtype=torch.float32, channels_last=False):
        """input, offset, weight, mask"""
        taps = self.kernel[0] * self.kernel[1]
        geometry = zip(self.size, self.kernel, self.stride, self.padding, self.dilation)
        out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in geometry]
        x = layout(torch.randn(self.batch, self.channels, *self.size, dtype=dtype), channels_last)
        offset = torch.randn(self.batch, 2 * self.offset_groups * taps, *out, dtype=dtype) * self.spread
        weight = torch.randn(self.filters, self.channels // self.groups, *self.kernel, dtype=dtype)
        mask = torch.rand(self.batch, self.offset_groups * taps, *out, dtype=dtype) if self.masked else None
        return [t if t is None else t.to(device) for t in (x, offset, weight, mask)]

    @property
    def where(self):
        return self.stride, self.padding, self.dilation


CASES = {
    "plain": Case(),
    "masked": Case(masked=True),
    "1x1": Case(kernel=(1, 1), padding=(0, 0)),
    "rectangular": Case(kernel=(3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), masked=True),
    "strided and dilated": Case(stride=(2, 2), padding=(2, 2), dilation=(2, 2)),
    "groups": Case(channels=12, filters=6, groups=3, offset_groups=2, masked=True),
    "depthwise": Case(channels=8, filters=8, groups=8),
    "one offset group a channel": Case(channels=5, offset_groups=5, masked=True),
    "vector widths": Case(channels=64, filters=3, offset_groups=2, masked=True),
    "far outside": Case(spread=50.0, masked=True),
    "no offset": Case(spread=0.0, masked=True),
    "one pixel": Case(size=(1, 1), masked=True),
    "one channel, one filter": Case(channels=1, filters=1),
    "more columns than fit at once": Case(channels=32, filters=4, groups=2, size=(64, 66), masked=True),
}


def forward_and_gradients(function, tensors, where, grad=None):
    """The output and the gradients of input, offset, weight and, where there is one, mask, for one fixed gradient."""
    leaves = [t if t is None else t.detach().clone(memory_format=torch.preserve_format) for t in tensors]
    leaves = [t if t is None else t.requires_grad_() for t in leaves]
    out = function(*leaves[:3], None, *where, mask=leaves[3])
    if grad is None:
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], grad)]


def assert_all_close(actual, expected, dtype):
    """Sums of up to some ten thousand terms in another order: their error grows with the largest result, not with each."""
    unit = 1e-12 if dtype == torch.float64 else 1e-5
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=unit, atol=unit * max(b.abs().max().item() if b.numel() else 0, 1))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_reference(device, need_kernel, name, dtype, channels_last):
    need_kernel("deform_conv2d", device)
    need_kernel("deform_conv2d_backward", device)
    case = CASES[name]
    tensors = case.tensors(device, dtype, channels_last)
    results = forward_and_gradients(deform_conv2d, tensors, case.where)
    assert_all_close(results, forward_and_gradients(deform_conv2d_reference, tensors, case.where), dtype)
    kept = torch.channels_last if channels_last and case.channels > 1 else torch.contiguous_format
    assert all(t.is_contiguous(memory_format=kept) for t in results[:2])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_equals_torchvision(device, name, dtype):
    case = CASES[name]
    tensors = case.tensors(device, dtype)
    results = forward_and_gradients(deform_conv2d_reference, tensors, case.where)
    assert_all_close(results, forward_and_gradients(torchvision.ops.deform_conv2d, tensors, case.where), dtype)


@pytest.mark.parametrize("function", [deform_conv2d, deform_conv2d_reference])
def test_without_offsets_it_is_a_convolution(device, function):
    case = Case(spread=0.0, groups=2)
    x, offset, weight, _ = case.tensors(device, torch.float64)
    bias = torch.randn(case.filters, dtype=torch.float64, device=device)
    expected = torch.conv2d(x, weight, bias, padding=1, groups=2)
    torch.testing.assert_close(function(x, offset, weight, bias, padding=1), expected)
    half = torch.full_like(offset[:, :9], 0.5)
    expected = torch.conv2d(x, weight / 2, None, padding=1, groups=2)
    torch.testing.assert_close(function(x, offset, weight, padding=1, mask=half), expected)


@pytest.mark.parametrize("function", [deform_conv2d, deform_conv2d_reference])
def test_one_point_by_hand(device, function):
    """Offsets are (y, x): a 1x1 kernel at (0, 0) reads (1.25, 0.5) between the rows 1 and 2, and fades out below row 2."""
    x = torch.arange(9.0, device=device).view(1, 1, 3, 3)
    for (dy, dx), value in {
        (1.25, 0.5): 4.25,
        (2.75, 0.0): 1.5,
        (-0.5, 2.0): 1.0,
        (3.0, 0.0): 0.0,
        (-1.0, 0.0): 0,
    }.items():
        offset = torch.tensor([dy, dx], device=device).view(1, 2, 1, 1)
        out = function(x, offset, torch.ones(1, 1, 1, 1, device=device), stride=3)
        assert out.item() == value


@pytest.mark.parametrize("function", [deform_conv2d, deform_conv2d_reference])
@pytest.mark.parametrize("where", [NAN, INF, -INF, 1e30, -1e30])
def test_points_that_are_nowhere_read_zero(device, function, where):
    case = Case(masked=True)
    x, offset, weight, mask = case.tensors(device)
    offset[0, 0] = where
    results = forward_and_gradients(function, (x, offset, weight, mask), case.where)
    assert all(t.isfinite().all() for t in results)
    assert (results[2][0, :2] == 0).all() and (results[4][0, 0] == 0).all()
    offset[0, 0] = 100.0
    assert_all_close(results, forward_and_gradients(function, (x, offset, weight, mask), case.where), torch.float32)


def test_no_images_give_an_empty_output_and_gradients(device):
    case = Case(batch=0, masked=True)
    x, offset, weight, mask = case.tensors(device)
    results = forward_and_gradients(deform_conv2d, (x, offset, weight, mask), case.where)
    assert [list(t.shape) for t in results] == [
        [0, 4, 9, 11],
        [0, 6, 9, 11],
        [0, 18, 9, 11],
        [4, 6, 3, 3],
        [0, 9, 9, 11],
    ]
    assert (results[3] == 0).all()


SLICES = {
    "channels of NCHW": lambda x: x[:, 3:9],
    "channels of channels-last": lambda x: layout(x, True)[:, 3:9],
    "every other column": lambda x: x[:, :6, :, ::2],
    "transposed": lambda x: x[:, :6].transpose(2, 3),
    "one map for all channels": lambda x: x[:, :1].expand(-1, 6, -1, -1),
}


@pytest.mark.parametrize("name", SLICES)
def test_strided_tensors_equal_contiguous(device, need_kernel, name):
    need_kernel("deform_conv2d", device)
    x = SLICES[name](torch.randn(2, 13, 12, 14, device=device))
    case = Case(masked=True, size=tuple(x.shape[2:]))
    _, offset, weight, mask = case.tensors(device)
    args = layout(offset, True), weight.transpose(2, 3), None, *case.where, layout(mask, True)
    want = offset, weight.transpose(2, 3).contiguous(), None, *case.where, mask
    torch.testing.assert_close(deform_conv2d(x, *args), deform_conv2d_reference(x.contiguous(), *want))
    grad = torch.randn(1, 4, 1, 1, device=device).expand(2, 4, *case.size)
    tensors = x, offset, weight, mask
    results = forward_and_gradients(deform_conv2d, tensors, case.where, grad)
    full = forward_and_gradients(deform_conv2d_reference, tensors, case.where, grad.contiguous())
    assert_all_close(results, full, torch.float32)


def low_precision_by_hand(x, offset, weight, bias, stride, padding, dilation, mask):
    """Plain torch at the input's precision: columns, rounded as any tensor of that dtype is, then the product."""
    eye = torch.eye(9 * x.shape[1], device=x.device).view(-1, x.shape[1], 3, 3)
    columns = deform_conv2d_reference(x.float(), offset.float(), eye, bias, stride, padding, dilation, mask.float())
    return torch.conv2d(columns.to(x.dtype), weight.reshape(len(weight), -1, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_low_precision_errs_at_most_twice_as_much_as_plain_torch(device, need_kernel, dtype, channels_last):
    need_kernel("deform_conv2d", device)
    case = Case(channels=40, filters=16, masked=True)
    tensors = [t.to(dtype) for t in case.tensors(device, channels_last=channels_last)]
    results = forward_and_gradients(deform_conv2d, tensors, case.where)
    low = forward_and_gradients(low_precision_by_hand, tensors, case.where)
    exact = forward_and_gradients(deform_conv2d_reference, [t.double() for t in tensors], case.where, None)
    grad = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(2)).to(results[0]).double()
    exact = forward_and_gradients(deform_conv2d_reference, [t.double() for t in tensors], case.where, grad)
    for ours, plain, best in zip(results, low, exact, strict=True):
        assert ours.dtype == dtype
        assert_within_twice(ours, plain, best)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_offsets_and_mask_of_another_dtype(device, need_kernel, dtype):
    need_kernel("deform_conv2d", device)
    case = Case(masked=True)
    x, offset, weight, mask = case.tensors(device)
    x, weight = x.to(dtype), weight.to(dtype)
    results = forward_and_gradients(deform_conv2d, (x, offset, weight, mask), case.where)
    assert [t.dtype for t in results] == [dtype, dtype, torch.float32, dtype, torch.float32]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for a, b in zip(results, forward_and_gradients(deform_conv2d_reference, (x, offset, weight, mask), case.where)):
        torch.testing.assert_close(a.to(wide), b.to(wide), rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("function", [deform_conv2d, deform_conv2d_reference])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_pixel_of_weight_0_is_not_read(device, function, value):
    x = torch.ones(1, 1, 3, 3, device=device)
    x[0, 0, 1, 1] = value
    offset, weight = torch.zeros(1, 2, 3, 3, device=device), torch.ones(1, 1, 1, 1, device=device)
    mask = torch.ones(1, 1, 3, 3, device=device)
    assert (~function(x, offset, weight).isfinite()).flatten().nonzero().tolist() == [[4]]  # whole pixels
    assert (~function(x, offset + 0.5, weight).isfinite()).flatten().nonzero().tolist() == [[0], [1], [3], [4]]
    mask[0, 0, 1, 1] = 0
    assert function(x, offset, weight, mask=mask)[0, 0, 1, 1] == 0


def test_repeats_bit_by_bit(device, need_kernel):
    need_kernel("deform_conv2d_backward", device)
    case = Case(channels=48, size=(40, 50), masked=True)
    tensors = case.tensors(device)
    once, again = [forward_and_gradients(deform_conv2d, tensors, case.where) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck(device, masked, channels_last):
    case = Case(channels=4, filters=2, groups=2, offset_groups=2, size=(4, 3), stride=(2, 1), masked=masked, batch=1)
    x, offset, weight, mask = case.tensors(device, torch.float64, channels_last)
    offset = offset.floor() + 0.1 + 0.8 * torch.rand_like(offset)  # the slope jumps at whole pixels
    tensors = [t if t is None else t.requires_grad_() for t in (x, offset, weight, mask)]
    bias = torch.randn(2, dtype=torch.float64, device=device, requires_grad=True)

    def call(x, offset, weight, mask, bias):
        return deform_conv2d(x, offset, weight, bias, *case.where, mask=mask)

    assert torch.autograd.gradcheck(call, (*tensors, bias))


def test_autocast_multiplies_in_the_low_precision(device):
    x, offset, weight, _ = Case().tensors(device)
    with torch.autocast(device, torch.bfloat16):
        out = deform_conv2d(x, offset, weight, padding=1)
    assert out.dtype == torch.bfloat16
    exact = deform_conv2d(x, offset, weight, padding=1)
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=2**-6 * exact.abs().max().item())
