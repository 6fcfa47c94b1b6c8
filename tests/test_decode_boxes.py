"""decode_boxes against its reference, torchvision's coder and cases worked out by hand."""

import math

import pytest
import torch
from conftest import assert_within_twice, random_boxes
from torchvision.models.detection._utils import BoxCoder

from fastrcnn.ops import decode_boxes, decode_boxes_reference

NAN, INF = float("nan"), float("inf")
STDS = (0.1, 0.1, 0.2, 0.2)


def anchors_and_deltas(n: int, classes: int = 1, batch: int | None = None, scale: float = 1.0):
    leading = (n,) if batch is None else (batch, n)
    anchors = random_boxes(math.prod(leading)).view(*leading, 4)
    return anchors, torch.randn(*leading, 4 * classes) * scale


def assert_equals_reference(anchors, deltas, *rules):
    """In float32 by the error from float64: coordinates near 0 are differences of large numbers."""
    out, expected = decode_boxes(anchors, deltas, *rules), decode_boxes_reference(anchors, deltas, *rules)
    assert out.shape == expected.shape == deltas.shape
    assert out.dtype == expected.dtype
    if out.dtype == torch.float64:
        torch.testing.assert_close(out, expected)
    elif out.numel():
        assert_within_twice(out, expected, decode_boxes_reference(anchors.double(), deltas.double(), *rules))
    return out


@pytest.mark.parametrize(
    "max_shape, expected",
    [(None, [-4, 4, 16, 24]), ((20, 12), [0, 4, 12, 20]), ((3, 40), [0, 3, 16, 3])],
)
def test_one_box_by_hand(device, max_shape, expected):
    """Centre (5, 10) moves by a tenth of 10 and a fifth of 20; the width doubles."""
    anchors = torch.tensor([[0.0, 0, 10, 20]], device=device)
    deltas = torch.tensor([[0.1, 0.2, math.log(2), 0]], device=device)
    actual = decode_boxes(anchors, deltas, max_shape)
    torch.testing.assert_close(actual, torch.tensor([expected], dtype=torch.float32, device=device))


def test_means_and_stds_by_hand(device):
    anchors = torch.tensor([[0.0, 0, 10, 20]], device=device)
    deltas = torch.tensor([[2.0, 1, 1, 0]], device=device)
    means, stds = (-0.1, 0.1, 0, 0), (0.1, 0.1, math.log(2), 5)
    actual = decode_boxes(anchors, deltas, None, means, stds)  # the same (0.1, 0.2, log 2, 0)
    torch.testing.assert_close(actual, torch.tensor([[-4.0, 4, 16, 24]], device=device))


@pytest.mark.parametrize("symmetric, smallest", [(True, 10 * 0.25), (False, 10 * math.exp(-3))])
def test_growth_is_bounded_above_and_with_symmetric_clip_below(device, symmetric, smallest):
    anchors = torch.tensor([[0.0, 0, 10, 10]], device=device)
    deltas = torch.tensor([[0.0, 0, 3, -3]], device=device)
    box = decode_boxes(anchors, deltas, wh_ratio_clip=0.25, symmetric_clip=symmetric)[0]
    size = box[2:] - box[:2]
    torch.testing.assert_close(size, torch.tensor([40.0, smallest], device=device))


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 2047, 2048, 2049, 5000])
@pytest.mark.parametrize("symmetric_clip", [False, True])
@pytest.mark.parametrize("max_shape", [None, (300, 500)])
def test_equals_reference(device, need_kernel, n, symmetric_clip, max_shape):
    need_kernel("decode_boxes", device)
    anchors, deltas = (t.to(device) for t in anchors_and_deltas(n, scale=3))
    rules = max_shape, (0, 0.1, 0, -0.2), STDS, 0.5, symmetric_clip
    assert_equals_reference(anchors, deltas, *rules)
    assert_equals_reference(anchors.double(), deltas.double(), *rules)


@pytest.mark.parametrize("batch, n, classes", [(0, 5, 2), (1, 7, 80), (3, 100, 1), (2, 33, 3), (2, 0, 3), (2, 5, 0)])
def test_batches_and_classes_equal_reference(device, need_kernel, batch, n, classes):
    need_kernel("decode_boxes", device)
    anchors, deltas = (t.to(device) for t in anchors_and_deltas(n, classes, batch, 0.5))
    sizes = torch.tensor([[200, 300], [480, 100], [50, 640]], device=device)[:batch]
    for max_shape in (None, (333, 444), sizes, sizes.double()):
        out = assert_equals_reference(anchors, deltas, max_shape)
    if batch:
        assert torch.equal(decode_boxes(anchors[-1], deltas[-1], sizes[batch - 1]), out[-1])


@pytest.mark.parametrize("classes", [1, 5])
def test_equals_torchvision(device, classes):
    anchors, deltas = (t.double().to(device) for t in anchors_and_deltas(400, classes, scale=8))
    limit = math.log(1000 / 16)
    theirs = BoxCoder((10, 10, 5, 5), limit).decode_single(deltas, anchors)
    ours = decode_boxes(anchors, deltas, stds=STDS, wh_ratio_clip=16 / 1000, symmetric_clip=False)
    torch.testing.assert_close(ours, theirs)


def test_non_finite_and_degenerate_input_equals_reference(device, need_kernel):
    need_kernel("decode_boxes", device)
    anchors, deltas = anchors_and_deltas(40)
    for column in range(4):
        deltas[column, column], deltas[4 + column, column], deltas[8 + column, column] = NAN, INF, -INF
        anchors[12 + column, column] = NAN
    anchors[20:24, 2:] = anchors[20:24, :2]  # points
    anchors[24:28] = anchors[24:28][:, [2, 3, 0, 1]]  # inverted
    anchors, deltas = anchors.to(device), deltas.to(device)
    for max_shape in (None, (300, 400)):
        for symmetric_clip in (True, False):
            args = anchors, deltas, max_shape, (0,) * 4, (1,) * 4, 0.1, symmetric_clip
            torch.testing.assert_close(decode_boxes(*args), decode_boxes_reference(*args), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("delta_dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_follow_the_anchors_and_low_precision_runs_in_float32(device, need_kernel, dtype, delta_dtype):
    need_kernel("decode_boxes", device)
    anchors, deltas = anchors_and_deltas(100, 2, 2, 0.5)
    anchors, deltas = anchors.to(device, dtype), deltas.to(device, delta_dtype)
    out = assert_equals_reference(anchors, deltas, (300, 400))
    work = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.dtype == work
    assert torch.equal(out, decode_boxes(anchors.to(work), deltas.to(work), (300, 400)))


def test_non_contiguous_input_equals_contiguous(device):
    anchors, deltas = (t.to(device) for t in anchors_and_deltas(60, 2, 2))
    sizes = torch.tensor([[200.0, 300], [480, 100]], device=device)
    expected = decode_boxes(anchors, deltas, sizes)
    wide = torch.full((2, 60, 9), NAN, device=device)
    wide[..., 3:7] = anchors
    turned = deltas.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(decode_boxes(wide[..., 3:7], turned, sizes.t().contiguous().t()), expected)
    shared = anchors[:1].expand(2, -1, -1)
    assert torch.equal(decode_boxes(shared, deltas, sizes), decode_boxes(shared.contiguous(), deltas, sizes))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("starts", [(1, 0), (0, 1), (2, 3)])
def test_contiguous_slices_off_16_bytes_equal_aligned_ones(device, dtype, starts):
    anchors, deltas = anchors_and_deltas(70, 3, 2, 0.5)
    aligned = anchors.to(device, dtype), deltas.to(device, dtype)
    shifted = []
    for t, start in zip(aligned, starts):
        room = torch.full((t.numel() + 4,), NAN, dtype=dtype, device=device)
        shifted.append(room[start : start + t.numel()].view_as(t).copy_(t))
    assert torch.equal(decode_boxes(*shifted, (300, 400)), decode_boxes(*aligned, (300, 400)))


@pytest.mark.parametrize("symmetric_clip", [False, True])
@pytest.mark.parametrize("max_shape", [None, (35, 45)])
def test_gradcheck(device, symmetric_clip, max_shape):
    anchors = torch.tensor([[3, 4, 20, 30], [10, 8, 40, 25], [-5, 20, 15, 50.0]], dtype=torch.float64, device=device)
    deltas = torch.randn(3, 8, dtype=torch.float64).to(device)
    anchors, deltas = anchors[None].requires_grad_(), deltas[None].requires_grad_()

    def decode(anchors, deltas):
        return decode_boxes(anchors, deltas, max_shape, (0.1, 0, 0, 0), (0.2, 0.2, 1, 1), 0.5, symmetric_clip)

    assert torch.autograd.gradcheck(decode, (anchors, deltas))


def test_gradients_equal_those_of_the_reference(device, need_kernel):
    need_kernel("decode_boxes", device)
    anchors, deltas = (t.double().to(device) for t in anchors_and_deltas(200, 3, 2))
    grads = []
    for function in (decode_boxes, decode_boxes_reference):
        leaves = anchors.clone().requires_grad_(), deltas.clone().requires_grad_()
        out = function(*leaves, (300, 400), stds=STDS, wh_ratio_clip=0.8)
        grads.append(torch.autograd.grad((out * torch.linspace(-1, 1, 12, device=device)).sum(), leaves))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("n", [0, 3])
def test_gradients_keep_the_dtype_and_shape_of_the_input(device, n):
    anchors, deltas = anchors_and_deltas(n, 2)
    anchors, deltas = anchors.to(device).requires_grad_(), deltas.to(device, torch.bfloat16).requires_grad_()
    decode_boxes(anchors, deltas, (300, 400)).sum().backward()
    for t in (anchors, deltas):
        assert t.grad.dtype == t.dtype
        assert t.grad.shape == t.shape
