"""RoIAlign where tiles, lists and packs of channels end, its bits on every run, and what only a GPU shows."""

import importlib

import pytest
import torch
from conftest import assert_within_twice
from test_roi_align import (
    INF,
    NAN,
    STRIDES,
    assert_equals,
    forward_and_gradients,
    layout,
    pyramid,
    random_rois,
)

from fastrcnn.ops import multilevel_roi_align, multilevel_roi_align_reference, roi_align, roi_align_reference
from fastrcnn.ops.roi_align import level_rule


@pytest.mark.parametrize("height, width", [(1, 1), (5, 7), (6, 8), (7, 9), (12, 16), (13, 17), (8, 1), (1, 24)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_maps_that_end_at_and_beside_a_tiles_edge(device, need_kernel, height, width, channels_last):
    need_kernel("roi_align_backward", device)
    x = layout(torch.randn(2, 8, height, width), channels_last).to(device)
    rois = random_rois(20, size=max(height, width), largest=12).to(device)
    for sampling_ratio in (0, 2):
        assert_equals(roi_align, roi_align_reference, x, rois, (3, 4), 1.0, sampling_ratio)


@pytest.mark.parametrize("pooled", [1, (3, 5), 14, (1, 33), (40, 2)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_any_number_of_bins(device, need_kernel, pooled, channels_last):
    need_kernel("roi_align_backward", device)
    x = layout(torch.randn(2, 8, 15, 18), channels_last).to(device)
    rois = random_rois(8, size=18, largest=20).to(device)
    for sampling_ratio in (0, 2):
        assert_equals(roi_align, roi_align_reference, x, rois, pooled, 1.0, sampling_ratio)


@pytest.mark.parametrize("channels_last", [False, True])
def test_many_unsorted_rois_on_one_tile(device, need_kernel, channels_last):
    """More than a tile collects, weighs or looks at in one go; images and levels in any order, padding in between."""
    need_kernel("multilevel_roi_align_backward", device)
    maps = [layout(torch.randn(3, 2, s, s, dtype=torch.float64), channels_last).to(device) for s in (9, 5)]
    rois = random_rois(2600, images=2, size=9, largest=9).double()  # the third image has none
    rois[::7, 0] = -1
    rois = rois.to(device)
    args = rois, 2, [1, 2], 1
    out, grads = forward_and_gradients(multilevel_roi_align, maps, *args, finest_scale=1.5)
    want, want_grads = forward_and_gradients(multilevel_roi_align_reference, maps, *args, finest_scale=1.5)
    torch.testing.assert_close(out, want)
    for g, w in zip(grads, want_grads):
        assert (w != 0).any()
        torch.testing.assert_close(g, w)


GIANTS = {
    "larger than the map": [-40, -40, 60, 60],
    "far larger": [-3000, -2000, 4000, 3000],
    "far larger on one side": [3, 2, 90000, 5],
    "just the map": [0, 0, 260, 12],
    "beyond the map": [5000, 5000, 9000, 9000],
    "beside the map": [-9000, 0, -2, 12],
    "touching the corner": [260, 12, 400, 400],
}


@pytest.mark.parametrize("name", GIANTS)
@pytest.mark.parametrize("pooled", [1, 7])
@pytest.mark.parametrize("channels_last", [False, True])
def test_giant_rois_with_adaptive_sampling(device, need_kernel, name, pooled, channels_last):
    """A bin of them has more pixels than a list holds, or more samples outside the map than inside."""
    need_kernel("roi_align_backward", device)
    x = layout(torch.randn(1, 8, 12, 260), channels_last).to(device)
    rois = torch.tensor([[0.0, *GIANTS[name]], [0, 1, 1, 7, 9]], device=device)
    assert_equals(roi_align, roi_align_reference, x, rois, pooled)


@pytest.mark.parametrize("sampling_ratio", [1, 20, 100])
def test_few_and_many_fixed_samples_of_giant_and_inverted_rois(device, need_kernel, sampling_ratio):
    need_kernel("roi_align_backward", device)
    x = layout(torch.randn(1, 4, 30, 26, dtype=torch.float64), True).to(device)
    rois = torch.tensor([[0, -100, -90, 150, 160], [0, 150, 160, -100, -90], [0, 25, 3, 2, 28]], dtype=torch.float64)
    for aligned in (False, True):
        assert_equals(roi_align, roi_align_reference, x, rois.to(device), (2, 3), 1.0, sampling_ratio, aligned)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3, 5, 8, 33, 300])
def test_any_number_of_channels_in_every_dtype(device, need_kernel, dtype, channels):
    need_kernel("multilevel_roi_align", device)
    rois = random_rois(4, images=1, size=32, largest=32).to(device)
    for channels_last in (False, True):
        maps = [layout(torch.randn(1, channels, s, s), channels_last).to(device, dtype) for s in (8, 4)]
        args = rois, 2, [4, 8], 2, True, 6
        if dtype in (torch.float64, torch.float32):
            assert_equals(multilevel_roi_align, multilevel_roi_align_reference, maps, *args)
            continue
        out, grads = forward_and_gradients(multilevel_roi_align, maps, *args)
        low, low_grads = forward_and_gradients(multilevel_roi_align_reference, maps, *args)
        leaves = [m.double().requires_grad_() for m in maps]
        exact = multilevel_roi_align_reference(leaves, *args)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
        exact_grads = torch.autograd.grad(exact, leaves, grad.double(), allow_unused=True, materialize_grads=True)
        assert_within_twice(out, low, exact.detach())
        for g, low_g, exact_g in zip(grads, low_grads, exact_grads):
            assert_within_twice(g, low_g, exact_g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [0, 1, 2, 4, 8])
def test_slices_of_channels_need_not_lie_on_16_bytes(device, need_kernel, dtype, first):
    need_kernel("roi_align", device)
    whole = layout(torch.randn(2, 24, 9, 11), True).to(device, dtype)
    x = whole[:, first : first + 16]
    rois = random_rois(6, size=11, largest=9).to(device)
    assert torch.equal(roi_align(x, rois, 3), roi_align(layout(x.contiguous(), True), rois, 3))
    grad = layout(torch.randn(6, 24, 3, 3), True).to(device, dtype)[:, first : first + 16]
    ops = torch.ops.fastrcnn
    expected = ops.roi_align_backward(grad.contiguous(), x, rois, 1.0, 0, True)
    assert torch.equal(ops.roi_align_backward(grad, x, rois, 1.0, 0, True), expected)


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradient_is_the_same_bits_with_padding_between_and_beside_other_images(device, need_kernel, channels_last):
    need_kernel("multilevel_roi_align_backward", device)
    maps, rois = pyramid(device, channels=8, images=1, channels_last=channels_last), random_rois(40, images=1)
    grad = torch.randn(40, 8, 3, 3)
    more, more_grad = torch.full((120, 5), -1.0), torch.randn(120, 8, 3, 3)
    more[::3], more_grad[::3] = rois, grad
    more[1::3] = rois * torch.tensor([0.0, 1, 1, 1, 1]) + torch.tensor([1.0, 0, 0, 0, 0])
    twice = [torch.cat([m, m]) for m in maps]
    rules = [1 / s for s in STRIDES], 0, True, level_rule(14.0, "mmdet")
    op = torch.ops.fastrcnn.multilevel_roi_align_backward
    alone = op(grad.to(device), maps, rois.to(device), *rules)
    beside = op(more_grad.to(device), twice, more.to(device), *rules)
    for _ in range(2):
        again = op(more_grad.to(device), twice, more.to(device), *rules)
        assert all(torch.equal(a, b) for a, b in zip(beside, again))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(alone, beside))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("value", [INF, NAN])
def test_values_that_are_not_finite_stay_in_their_bin(device, need_kernel, channels_last, value):
    need_kernel("roi_align_backward", device)
    x = layout(torch.randn(1, 8, 20, 20), channels_last).to(device)
    rois = torch.tensor([[0.0, 2, 2, 14, 14]], device=device)  # 4 x 4 bins of 3 pixels, from pixel 2 on
    grad = torch.ones(1, 8, 4, 4, device=device)
    grad[0, :, 1, 2] = value
    gradient = torch.ops.fastrcnn.roi_align_backward(grad, x, rois, 1.0, 0, True)
    touched = torch.zeros(20, 20, dtype=torch.bool)
    touched[5:8, 8:11] = True  # samples lie on pixel centres
    assert torch.equal((~gradient.isfinite()).cpu(), touched.expand(1, 8, 20, 20))
    reference = importlib.import_module("fastrcnn.ops.roi_align")._one_backward(grad, x, rois, 1.0, 0, True)
    torch.testing.assert_close(gradient, reference, equal_nan=True)
    x[:, :, 6, 9] = value
    bins = torch.zeros(4, 4, dtype=torch.bool)
    bins[1, 2] = True
    out = roi_align(x, rois, 4)
    assert torch.equal((~out.isfinite()).cpu(), bins.expand(1, 8, 4, 4))
    torch.testing.assert_close(out, roi_align_reference(x, rois, 4), equal_nan=True)
    beside = roi_align(x, rois, 4, sampling_ratio=1)  # samples on (6, 9) alone have weights for it: the bin's middle
    torch.testing.assert_close(beside, roi_align_reference(x, rois, 4, sampling_ratio=1), equal_nan=True)


@pytest.mark.parametrize("far", [1e9, 1e30, INF, NAN])
def test_rois_beyond_any_map_equal_the_reference(device, need_kernel, far):
    """A bin has at most 65,536 samples along an axis."""
    need_kernel("roi_align", device)
    x = torch.randn(1, 4, 9, 11, device=device)
    rois = torch.tensor([[0.0, -far, 1, far, 8], [0, 2, -far, 9, far], [0, far, far, 1, 1]], device=device)
    torch.testing.assert_close(roi_align(x, rois, 2), roi_align_reference(x, rois, 2))
    long = torch.tensor([[0.0, -3e5, 0, 7e5, 9]], device=device)  # bins of 10^6 pixels: a sample every 15
    torch.testing.assert_close(roi_align(1e6 * x, long, 1), roi_align_reference(1e6 * x, long, 1))


def cuda_rule(request, device):
    if device == "cpu" and not request.config.getoption("--emulate-cuda"):
        pytest.skip("a rule of the CUDA kernels")


@pytest.mark.parametrize("index", [2, 100, INF])
@pytest.mark.parametrize("channels_last", [False, True])
def test_image_index_out_of_range_gives_zeros_on_cuda(request, device, need_kernel, index, channels_last):
    cuda_rule(request, device)
    need_kernel("multilevel_roi_align", device)
    maps, rois = pyramid(device, channels=8, channels_last=channels_last), random_rois(6).to(device)
    rois[2, 0] = index
    kept = rois.clone()
    kept[2, 0] = -1
    out, grads = forward_and_gradients(multilevel_roi_align, maps, rois, 3, STRIDES)
    want, want_grads = forward_and_gradients(multilevel_roi_align, maps, kept, 3, STRIDES)
    assert (out[2] == 0).all()
    assert torch.equal(out, want)
    assert all(torch.equal(g, w) for g, w in zip(grads, want_grads))


def test_up_to_eight_levels_on_cuda(request, device, need_kernel):
    cuda_rule(request, device)
    need_kernel("multilevel_roi_align", device)
    maps = [torch.randn(2, 3, 40 >> i, 40 >> i, device=device) for i in range(5)] + [torch.randn(2, 3, 1, 1)] * 4
    maps, strides, rois = [m.to(device) for m in maps], [2**i for i in range(9)], random_rois(9, size=40).to(device)
    args = {"finest_scale": 3.0}
    assert_equals(multilevel_roi_align, multilevel_roi_align_reference, maps[:8], rois, 3, strides[:8], **args)
    with pytest.raises(ValueError, match="at most 8 levels"):
        multilevel_roi_align(maps, rois, 3, strides)
    with pytest.raises(ValueError, match="output_size"):
        multilevel_roi_align(maps[:2], rois, (500, 13), strides[:2])


@pytest.mark.parametrize("channels_last", [False, True])
def test_no_images_or_channels_on_cuda(request, device, need_kernel, channels_last):
    cuda_rule(request, device)
    need_kernel("roi_align", device)
    rois = torch.tensor([[0.0, 0, 0, 4, 4], [0, 0, 0, 0, 0], [-1, 0, 0, 4, 4]], device=device)
    for shape in ((0, 4, 5, 5), (2, 0, 5, 5)):
        out, (grad,) = forward_and_gradients(roi_align, layout(torch.zeros(shape), channels_last).to(device), rois, 3)
        assert torch.equal(out, torch.zeros(3, shape[1], 3, 3, device=device))
        assert grad.shape == shape


def test_many_rois_of_a_large_map_equal_some_at_a_time(device, need_kernel):
    """On CUDA they run in the order of their places from 1,057 RoIs on maps of more than 32 MiB on."""
    need_kernel("roi_align", device)
    x = torch.randn(2, 1, 512, 600, device=device).expand(
        -1, 16, -1, -1
    )  # 37.5 MiB, were it not one map for all channels
    rois = random_rois(1100, size=500, largest=20).to(device)
    rois[::50, 0] = -1
    parts = [roi_align(x, part, 1, sampling_ratio=1) for part in rois.split(500)]
    assert torch.equal(roi_align(x, rois, 1, sampling_ratio=1), torch.cat(parts))


# What follows needs a GPU.


def on_gpu(dtype=torch.bfloat16, channels=64):
    maps = [m.to(dtype) for m in pyramid("cuda", channels=channels, size=256, channels_last=True)]
    return maps, random_rois(400, size=256, largest=256).cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_cuda_equals_cpu_and_repeats_bit_by_bit(need_kernel, dtype, channels_last):
    need_kernel("multilevel_roi_align_backward", "cuda")
    maps, rois = on_gpu(dtype)
    maps = [layout(m, channels_last) for m in maps]
    runs = [forward_and_gradients(multilevel_roi_align, maps, rois, 7, STRIDES) for _ in range(5)]
    for out, grads in runs[1:]:
        assert torch.equal(out, runs[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, runs[0][1]))
    want, want_grads = forward_and_gradients(multilevel_roi_align, [m.cpu() for m in maps], rois.cpu(), 7, STRIDES)
    torch.testing.assert_close(runs[0][0].cpu(), want)
    for g, w in zip(runs[0][1], want_grads):
        torch.testing.assert_close(g.cpu(), w, atol=1e-4 if dtype == torch.float32 else 2e-2, rtol=1e-2)


def need_memory(gigabytes: int) -> None:
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory")


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_map_of_more_than_2_to_the_31_elements(need_kernel, channels_last):
    need_kernel("roi_align_backward", "cuda")
    need_memory(24)
    side, part = 3000, 64
    kept = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.zeros(2, 256, side, side, dtype=torch.bfloat16, device="cuda", memory_format=kept)
    assert x[1].numel() > 2**31
    x[1, :, -part:, -part:] = torch.randn(256, part, part)
    corner = layout(x[1:, :, -part:, -part:], channels_last)
    # Every sample lies on a multiple of 1 / 128 pixel, exact in float32 on either map, and right of the corner's edge.
    near = (random_rois(20, images=1, size=part).cuda() * 4).round() / 4
    near[:, 1:].clamp_(min=1)
    far = near + torch.tensor([1.0, *[side - part] * 4], device="cuda")
    out = roi_align(x, far, 8, sampling_ratio=2)
    assert torch.equal(out, roi_align(corner, near, 8, sampling_ratio=2))
    op = torch.ops.fastrcnn.roi_align_backward
    gradient, expected = op(out, x, far, 1.0, 2, True), op(out, corner, near, 1.0, 2, True)
    assert torch.equal(gradient[1:, :, -part:, -part:], expected)
    gradient[1, :, -part:, -part:] = 0
    assert not gradient.any()


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_an_output_of_more_than_2_to_the_31_elements(need_kernel, channels_last):
    need_kernel("roi_align_backward", "cuda")
    need_memory(24)
    x = layout(torch.randn(1, 256, 32, 40, dtype=torch.bfloat16, device="cuda"), channels_last)
    rois = random_rois(180_000, images=1, size=40, largest=30).cuda()
    out = roi_align(x, rois, 7)
    assert out.numel() > 2**31
    assert torch.equal(out[-9:], roi_align(x, rois[-9:], 7))
    ops = torch.ops.fastrcnn
    grad = out.zero_()
    grad[-9:] = torch.randn(9, 256, 7, 7)
    expected = ops.roi_align_backward(grad[-9:], x, rois[-9:], 1.0, 0, True)
    assert torch.equal(ops.roi_align_backward(grad, x, rois, 1.0, 0, True), expected)
