"""roi_align and multilevel_roi_align against their references, torchvision and cases worked out by hand."""

import pytest
import torch
import torchvision
from conftest import assert_within_twice, layout, random_rois

from fastrcnn.ops import (
    multilevel_roi_align,
    multilevel_roi_align_reference,
    roi_align,
    roi_align_reference,
)

PROFILES = ["mmdet", "torchvision", "detectron2"]
STRIDES = [4, 8, 16, 32]
NAN, INF = float("nan"), float("inf")


def pyramid(device, channels=3, images=2, size=128, dtype=torch.float32, channels_last=False) -> list[torch.Tensor]:
    maps = [torch.randn(images, channels, size // s, size // s, dtype=dtype).to(device) for s in STRIDES]
    return [layout(m, channels_last) for m in maps]


def forward_and_gradients(function, features, *args, **kwargs):
    """Output and gradients for one fixed gradient of the output."""
    several = isinstance(features, list)
    leaves = [f.detach().clone(memory_format=torch.preserve_format).requires_grad_() for f in features]
    if not several:
        leaves = [features.detach().clone(memory_format=torch.preserve_format).requires_grad_()]
    out = function(leaves if several else leaves[0], *args, **kwargs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    return out.detach(), torch.autograd.grad(out, leaves, grad, allow_unused=True, materialize_grads=True)


def assert_equals(function, reference, features, *args, **kwargs):
    out, grads = forward_and_gradients(function, features, *args, **kwargs)
    want, want_grads = forward_and_gradients(reference, features, *args, **kwargs)
    torch.testing.assert_close(out, want)
    for g, w in zip(grads, want_grads):
        torch.testing.assert_close(g, w)
    return out


@pytest.mark.parametrize("channels", [1, 3, 16, 63, 64, 65, 130])
@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_reference_at_channel_block_edges(device, need_kernel, channels, channels_last):
    need_kernel("roi_align", device)
    x = layout(torch.randn(2, channels, 20, 24), channels_last).to(device)
    rois = random_rois(12).to(device)
    out = assert_equals(roi_align, roi_align_reference, x, rois, (7, 5), 0.2, 2)
    assert out.shape == (12, channels, 7, 5)
    kept = torch.channels_last if channels_last and channels > 1 else torch.contiguous_format
    assert out.is_contiguous(memory_format=kept)


@pytest.mark.parametrize("sampling_ratio", [-1, 0, 1, 3])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_reference_and_torchvision_for_any_box(device, need_kernel, sampling_ratio, aligned, channels_last):
    need_kernel("roi_align", device)
    x = layout(torch.randn(2, 17, 24, 20, dtype=torch.float64), channels_last).to(device)
    rois = random_rois(30).double()
    rois[0:3, 3:] = rois[0:3, 1:3]  # points
    rois[3] = torch.tensor([1, 500, 500, 600, 600])  # wholly outside
    rois[4] = torch.tensor([0, -300, -300, 400, 400])  # larger than the map
    rois[24:27] = rois[24:27][:, [0, 3, 4, 1, 2]]  # both axes inverted
    rois[27:] = rois[27:][:, [0, 3, 2, 1, 4]]  # one axis inverted
    rois = rois.to(device)
    assert_equals(roi_align, roi_align_reference, x, rois, 7, 0.2, sampling_ratio, aligned)
    if aligned and sampling_ratio <= 0:
        rois = rois[:24]  # torchvision takes a negative number of samples for inverted boxes and fails
    assert_equals(roi_align, torchvision.ops.roi_align, x, rois, 7, 0.2, sampling_ratio, aligned)


def test_one_bin_by_hand(device):
    """aligned: pixel centres lie at half-integers, so the RoI [1, 3] x [1, 3] samples the middle of pixels 1 and 2."""
    x = torch.arange(16.0, device=device).view(1, 1, 4, 4)
    rois = torch.tensor([[0.0, 1, 1, 3, 3]], device=device)
    assert roi_align(x, rois, 2, sampling_ratio=1).flatten().tolist() == [5, 6, 9, 10]
    assert roi_align(x, rois, 1, sampling_ratio=1).item() == 7.5
    assert roi_align(x, rois, 1, sampling_ratio=1, aligned=False).item() == 10  # half a pixel further down and right


@pytest.mark.parametrize("channels_last", [False, True])
def test_padding_and_non_finite_rois_give_zeros(device, need_kernel, channels_last):
    need_kernel("multilevel_roi_align", device)
    maps = pyramid(device, channels=5, channels_last=channels_last)
    rois = random_rois(9)
    rois[0, 0], rois[1, 0], rois[2, 0] = -1, -7, NAN
    rois[3, 1], rois[4, 4], rois[5, 3], rois[6, 2] = NAN, NAN, INF, -INF
    rois[7, 1:] = torch.tensor([-INF, -INF, INF, INF])
    rois = rois.to(device)
    for sampling_ratio in (0, 2):
        for profile in PROFILES:
            args = rois, 7, STRIDES, sampling_ratio
            out = assert_equals(multilevel_roi_align, multilevel_roi_align_reference, maps, *args, profile=profile)
            assert (out[:8] == 0).all()
            assert (out[8] != 0).any()
        out = assert_equals(roi_align, roi_align_reference, maps[0], rois, 7, 0.25, sampling_ratio)
        assert (out[:8] == 0).all()


@pytest.mark.parametrize("index", [2, 100, INF])
@pytest.mark.parametrize("channels_last", [False, True])
def test_image_index_out_of_range_raises(index, channels_last):
    maps = pyramid("cpu", channels_last=channels_last)
    rois = random_rois(4)
    rois[2, 0] = index
    with pytest.raises(ValueError, match=r"^rois: row 2"):
        roi_align(maps[0], rois, 7)
    with pytest.raises(ValueError, match=r"^rois: row 2"):
        roi_align_reference(maps[0], rois, 7)
    with pytest.raises(ValueError, match=r"^rois: row 2"):
        multilevel_roi_align(maps, rois, 7, STRIDES)
    with pytest.raises(ValueError, match=r"^rois: row 2"):
        torch.ops.fastrcnn.roi_align_backward(torch.zeros(4, 3, 7, 7), maps[0], rois, 1.0, 2, True)


@pytest.mark.parametrize("channels_last", [False, True])
def test_no_rois_give_an_empty_output_and_zero_gradients(device, channels_last):
    x = layout(torch.randn(2, 4, 8, 8), channels_last).to(device).requires_grad_()
    out = roi_align(x, torch.zeros(0, 5, device=device), 7)
    assert out.shape == (0, 4, 7, 7)
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


SLICES = {
    "channels of NCHW": lambda x: x[:, 3:19],
    "channels of channels-last": lambda x: layout(x, True)[:, 3:19],
    "every other column": lambda x: x[:, :, :, ::2],
    "every other column of channels-last": lambda x: layout(x, True)[:, :, :, ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "every other image": lambda x: x.repeat_interleave(2, 0)[::2],
    "one map for all channels": lambda x: x[:, :1].expand(-1, 6, -1, -1),
}


@pytest.mark.parametrize("name", SLICES)
def test_strided_features_equal_contiguous(device, need_kernel, name):
    need_kernel("roi_align", device)
    x = SLICES[name](torch.randn(2, 21, 24, 26).to(device))
    rois = torch.cat([random_rois(10), torch.full((10, 2), NAN)], 1)[:, :5].to(device)
    torch.testing.assert_close(roi_align(x, rois, 7, 0.2), roi_align_reference(x.contiguous(), rois, 7, 0.2))
    leaf = x.detach().requires_grad_()
    out = roi_align(leaf, rois.t().contiguous().t(), (5, 3), 0.2)
    grad = torch.randn(out.shape[::-1], device=device).permute(3, 2, 1, 0)
    want_leaf = x.contiguous().requires_grad_()
    want = torch.autograd.grad(roi_align_reference(want_leaf, rois, (5, 3), 0.2), want_leaf, grad)[0]
    torch.testing.assert_close(torch.autograd.grad(out, leaf, grad)[0], want)


@pytest.mark.parametrize("pooled", [(1, 1), (1, 4), (4, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_expanded_gradient_equals_a_full_one(device, need_kernel, pooled, channels_last):
    need_kernel("roi_align_backward", device)
    x = layout(torch.randn(2, 6, 12, 12), channels_last).to(device)
    rois = random_rois(6, size=12, largest=10).to(device)
    for grad in (torch.ones(1, device=device).expand(6, 6, *pooled), torch.randn(6, 1, 1, 1).expand(6, 6, *pooled)):
        grad = grad.to(device)
        actual = torch.ops.fastrcnn.roi_align_backward(grad, x, rois, 1.0, 2, True)
        expected = torch.ops.fastrcnn.roi_align_backward(grad.contiguous(), x, rois, 1.0, 2, True)
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(actual, expected)
        out = roi_align_reference(leaf, rois, pooled, sampling_ratio=2)
        torch.testing.assert_close(actual, torch.autograd.grad(out, leaf, grad)[0])


@pytest.mark.parametrize("last", [[], [0], [1, 3], [0, 1, 2, 3]])
def test_mixed_layouts_run_as_nchw(device, need_kernel, last):
    need_kernel("multilevel_roi_align", device)
    maps = [layout(m, i in last) for i, m in enumerate(pyramid(device, channels=6))]
    rois = random_rois(20, largest=128).to(device)
    out = assert_equals(multilevel_roi_align, multilevel_roi_align_reference, maps, rois, 7, STRIDES, finest_scale=14)
    kept = torch.channels_last if len(last) == 4 else torch.contiguous_format
    assert out.is_contiguous(memory_format=kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_low_precision_errs_at_most_twice_as_much_as_the_reference(device, need_kernel, dtype, channels_last):
    need_kernel("multilevel_roi_align", device)
    maps = pyramid(device, channels=70, dtype=dtype, channels_last=channels_last)
    exact_maps = [m.float() for m in maps]
    rois = random_rois(20, largest=128).to(device)
    args = rois, 7, STRIDES, 0, True, 14
    out, grads = forward_and_gradients(multilevel_roi_align, maps, *args)
    low, low_grads = forward_and_gradients(multilevel_roi_align_reference, maps, *args)
    exact = multilevel_roi_align_reference(exact_maps, *args)
    assert out.dtype == dtype
    assert_within_twice(out, low, exact)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out).float()
    leaves = [m.requires_grad_() for m in exact_maps]
    exact_grads = torch.autograd.grad(multilevel_roi_align_reference(leaves, *args), leaves, grad)
    for g, low_g, exact_g in zip(grads, low_grads, exact_grads):
        assert g.dtype == dtype
        assert_within_twice(g, low_g, exact_g)


@pytest.mark.parametrize("channels_last", [False, True])
def test_double_and_rois_of_another_dtype_equal_the_reference(device, need_kernel, channels_last):
    need_kernel("multilevel_roi_align", device)
    maps = pyramid(device, dtype=torch.float64, channels_last=channels_last)
    for roi_dtype in (torch.float64, torch.float32, torch.bfloat16):
        rois = random_rois(10).to(device, roi_dtype)
        assert_equals(multilevel_roi_align, multilevel_roi_align_reference, maps, rois, 7, STRIDES, finest_scale=14)
    assert_equals(roi_align, roi_align_reference, maps[0].float(), random_rois(10).to(device, torch.float64), 7, 0.25)


def chosen_levels(device, sides: list[float], profile: str, op=multilevel_roi_align) -> list[int]:
    """The level each square RoI is read from: level l holds the value l everywhere."""
    maps = [torch.full((1, 1, 512 // s, 512 // s), float(i), dtype=torch.float64) for i, s in enumerate(STRIDES)]
    rois = torch.tensor([[0, 0, 0, side, side] for side in sides], dtype=torch.float64, device=device)
    return op([m.to(device) for m in maps], rois, 1, STRIDES, 1, profile=profile).flatten().round().int().tolist()


# A RoI this fraction smaller than 112, 224 and 448 pixels. MMDetection adds 1e-6 to size / 56, torchvision 1e-6 to the
# logarithm, Detectron2 1e-8 to size / 224.
@pytest.mark.parametrize(
    "short_by, profile, levels",
    [
        *[(0, p, [1, 2, 3]) for p in PROFILES],
        *[(2e-9, p, [1, 2, 3]) for p in PROFILES],
        *[(-1e-3, p, [1, 2, 3]) for p in PROFILES],
        (4e-7, "mmdet", [1, 1, 2]),
        (4e-7, "torchvision", [1, 2, 3]),
        (4e-7, "detectron2", [0, 1, 2]),
        (1.5e-7, "mmdet", [1, 2, 2]),
        (1.5e-7, "torchvision", [1, 2, 3]),
        (1.5e-7, "detectron2", [0, 1, 2]),
        *[(1e-5, p, [0, 1, 2]) for p in PROFILES],
    ],
)
def test_levels_at_the_boundaries(device, short_by, profile, levels):
    sides = [side * (1 - short_by) for side in (112.0, 224.0, 448.0)]
    assert chosen_levels(device, sides, profile) == levels
    assert chosen_levels(device, sides, profile, multilevel_roi_align_reference) == levels


@pytest.mark.parametrize("profile", PROFILES)
def test_levels_beyond_the_pyramid_are_its_ends(device, profile):
    assert chosen_levels(device, [0, 1e-3, 20, 500, 511], profile) == [0, 0, 0, 3, 3]
    for op in (multilevel_roi_align, multilevel_roi_align_reference):
        maps = [torch.full((1, 1, 64, 64), float(i), device=device) for i in range(2)]
        rois = torch.tensor([[0.0, 0, 0, 900, 900]], device=device)
        assert op(maps, rois, 1, [16, 16], 1, profile=profile).item() == 1


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_multilevel_equals_torchvisions_pooler(device, sampling_ratio):
    maps = pyramid(device, channels=8, images=3, size=512)
    rois = random_rois(60, images=3, size=512, largest=500).to(device)
    pooler = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, sampling_ratio)
    boxes = [rois[rois[:, 0] == i][:, 1:] for i in range(3)]
    expected = pooler({str(i): m for i, m in enumerate(maps)}, boxes, [(512, 512)] * 3)
    rois = rois[torch.sort(rois[:, 0], stable=True).indices]
    out = multilevel_roi_align(maps, rois, 7, STRIDES, sampling_ratio, aligned=False, profile="torchvision")
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("channels_last", [False, True])
def test_backward_gives_the_same_bits_with_any_number_of_threads(channels_last):
    maps = pyramid("cpu", channels=70, channels_last=channels_last)
    rois = random_rois(200, largest=128)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            out, grads = forward_and_gradients(multilevel_roi_align, maps, rois, 7, STRIDES, finest_scale=14)
            results.append([out, *grads])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_backward_repeats_bit_by_bit(device, need_kernel):
    need_kernel("multilevel_roi_align_backward", device)
    maps, rois = pyramid(device, channels=16), random_rois(300).to(device)
    runs = [forward_and_gradients(multilevel_roi_align, maps, rois, 7, STRIDES)[1] for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck(device, aligned, channels_last):
    x = layout(torch.randn(2, 2, 4, 5, dtype=torch.float64), channels_last).to(device).requires_grad_()
    rois = random_rois(4, size=6, largest=6).double().to(device)
    assert torch.autograd.gradcheck(lambda x: roi_align(x, rois, (2, 3), 0.9, 0, aligned), x)


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck_of_two_levels(device, channels_last):
    maps = [layout(torch.randn(2, 2, s, s, dtype=torch.float64), channels_last).to(device) for s in (5, 3)]
    maps = [m.requires_grad_() for m in maps]
    rois = torch.tensor([[0, 0.5, 1, 2, 2.2], [1, 0, 0, 4.5, 5], [-1, 0, 0, 3, 3.0]], dtype=torch.float64).to(device)
    kwargs = {"strides": [1, 2], "finest_scale": 1.5}
    assert all((g != 0).any() for g in forward_and_gradients(multilevel_roi_align, maps, rois, 2, **kwargs)[1])
    assert torch.autograd.gradcheck(lambda *maps: multilevel_roi_align(maps, rois, 2, **kwargs), maps)
