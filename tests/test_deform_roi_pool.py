"""deform_roi_pool and its layers against plain loops, roi_align, the reference and cases worked out by hand."""

import importlib
import math

import pytest
import torch
from conftest import assert_within_twice, layout, random_rois
from torch import nn

from fastrcnn.layers.deform_roi_pool import DeformRoIPool, DeformRoIPoolPack, ModulatedDeformRoIPoolPack
from fastrcnn.ops import deform_roi_pool, deform_roi_pool_reference, roi_align

NAN, INF = float("nan"), float("inf")
MAP, ROIS, OFFSET = torch.zeros(2, 3, 8, 8), torch.zeros(4, 5), torch.zeros(4, 2, 7, 7)


def odd_rois() -> torch.Tensor:
    rois = random_rois(30).double()
    rois[0:3, 3:] = rois[0:3, 1:3]  # points
    rois[3] = torch.tensor([1, 500, 500, 600, 600])  # wholly outside
    rois[4] = torch.tensor([0, -300, -300, 400, 400])  # larger than the map
    rois[24:27] = rois[24:27][:, [0, 3, 4, 1, 2]]  # both axes inverted
    rois[27:] = rois[27:][:, [0, 3, 2, 1, 4]]  # one axis inverted
    return rois


def forward_and_gradients(function, x, rois, offset, *args, **kwargs):
    """Output and the gradients in map and offset for one fixed gradient of the output."""
    leaves = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, offset) if t is not None
    ]
    out = function(leaves[0], rois, None if offset is None else leaves[1], *args, **kwargs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    return out.detach(), torch.autograd.grad(out, leaves, grad)


def assert_equals_reference(x, rois, offset, *args, **kwargs):
    out, grads = forward_and_gradients(deform_roi_pool, x, rois, offset, *args, **kwargs)
    want, want_grads = forward_and_gradients(deform_roi_pool_reference, x, rois, offset, *args, **kwargs)
    torch.testing.assert_close(out, want)
    for g, w in zip(grads, want_grads):
        single = torch.float32 in (g.dtype, x.dtype)  # a float64 offset of a float32 map has a float32's gradient
        assert g.dtype == w.dtype
        torch.testing.assert_close(g.float() if single else g, w.float() if single else w)
    return out


def pixel_or_between(plane, y: float, x: float) -> float:
    height, width = plane.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    y0, x0 = math.floor(y), math.floor(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    top = plane[y0, x0] * (1 - x + x0) + plane[y0, x1] * (x - x0)
    bottom = plane[y1, x0] * (1 - x + x0) + plane[y1, x1] * (x - x0)
    return float(top * (1 - y + y0) + bottom * (y - y0))


def loops(x, rois, offset, pooled, scale, ratio, gamma):
    """The definition, one sample at a time."""
    (ph, pw), out = pooled, torch.zeros(len(rois), x.shape[1], *pooled, dtype=torch.float64)
    for k, (image, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (edge * scale - 0.5 for edge in box)
        ny, nx = (ratio or math.ceil((y2 - y1) / ph)), (ratio or math.ceil((x2 - x1) / pw))
        for c in range(x.shape[1]):
            for p in range(ph):
                for q in range(pw):
                    dx, dy = (0, 0) if offset is None else offset[k, :, p, q].tolist()
                    top = y1 + gamma * (y2 - y1) * dy + p * (y2 - y1) / ph
                    left = x1 + gamma * (x2 - x1) * dx + q * (x2 - x1) / pw
                    for i in range(ny):
                        for j in range(nx):
                            y = top + (i + 0.5) * (y2 - y1) / ph / ny
                            at = left + (j + 0.5) * (x2 - x1) / pw / nx
                            out[k, c, p, q] += pixel_or_between(x[int(image), c], y, at) / (ny * nx)
    return out


@pytest.mark.parametrize("ratio", [0, 1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("function", [deform_roi_pool, deform_roi_pool_reference])
def test_equals_the_definition_in_plain_loops(device, function, ratio, channels_last):
    x = torch.randn(2, 2, 7, 9, dtype=torch.float64)
    rois = torch.tensor([[0, 1, 2, 11, 9], [1, -6, -5, 4, 20], [1, 15, 10, 19, 16], [0, 40, 40, 60, 60]]).double()
    offset = 4 * torch.randn(4, 2, 2, 3, dtype=torch.float64)
    for o in (offset, None):
        moved = None if o is None else o.to(device)
        out = function(layout(x, channels_last).to(device), rois.to(device), moved, (2, 3), 0.5, ratio, 0.2)
        torch.testing.assert_close(out.cpu(), loops(x, rois, o, (2, 3), 0.5, ratio, 0.2))


@pytest.mark.parametrize("function", [deform_roi_pool, deform_roi_pool_reference])
def test_one_bin_by_hand(device, function):
    """The RoI is 2 x 2 pixels, so an offset of 1 moves a bin by gamma * 2; the map rises by 1 along x, by 4 along y."""
    x = torch.arange(16.0, device=device).view(1, 1, 4, 4)
    rois = torch.tensor([[0.0, 1, 1, 3, 3]], device=device)

    def pool(dx, dy):
        offset = torch.tensor([dx, dy], device=device).view(1, 2, 1, 1).requires_grad_()
        out = function(x, rois, offset, 1, sampling_ratio=1, gamma=0.25)
        out.sum().backward()
        return out.item(), offset.grad.flatten().tolist()

    assert pool(0.0, 0.0) == (7.5, [0.5, 2])  # the middle: (1.5, 1.5)
    assert pool(0.5, 0.0) == (7.75, [0.5, 2])  # offset 0 is x
    assert pool(0.0, 0.5) == (8.5, [0.5, 2])  # offset 1 is y
    assert pool(-4.0, 0.0) == (6, [0, 2])  # x = -0.5 is held at the border
    assert pool(4.0, 0.0) == (9, [0, 2])  # x = 3.5, too
    assert pool(8.0, 0.0) == pool(-6.0, 0.0) == (0, [0, 0])  # x = 5.5 and x = -1.5 are outside
    assert pool(-3.0, 1.0) == (8, [0.5, 2])  # x = 0: the derivative at a pixel is the one to its right
    assert pool(3.0, 1.0) == (11, [0, 2])  # x = 3, the last


def test_each_bin_has_its_own_offset_by_hand(device):
    x, rois = torch.arange(16.0, device=device).view(1, 1, 4, 4), torch.tensor([[0.0, 1, 1, 3, 3]], device=device)
    offset = torch.zeros(1, 2, 2, 2, device=device)
    assert deform_roi_pool(x, rois, offset, 2, sampling_ratio=1).flatten().tolist() == [5, 6, 9, 10]
    offset[0, 0, 0, 1], offset[0, 1, 1, 0] = 5, -5  # default gamma 0.1: one pixel
    out = deform_roi_pool(x, rois, offset, 2, sampling_ratio=1)
    torch.testing.assert_close(out.flatten(), torch.tensor([5.0, 7, 5, 10], device=device))


@pytest.mark.parametrize("ratio", [-1, 0, 1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_without_offset_equals_roi_align(device, ratio, channels_last):
    x = layout(torch.randn(2, 17, 24, 20, dtype=torch.float64), channels_last).to(device)
    rois = odd_rois().to(device)
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    want = roi_align(leaf, rois, (7, 5), 0.2, ratio, aligned=True)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(2)).to(want)
    (want_grad,) = torch.autograd.grad(want, leaf, grad)
    for offset in (None, torch.zeros(30, 2, 7, 5, device=device)):
        out, grads = forward_and_gradients(deform_roi_pool, x, rois, offset, (7, 5), 0.2, ratio)
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(grads[0], want_grad)


@pytest.mark.parametrize("channels", [1, 3, 16, 31, 32, 33, 64, 65, 130])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("with_offset", [False, True])
def test_equals_reference_at_channel_block_edges(device, need_kernel, channels, channels_last, with_offset):
    need_kernel("deform_roi_pool_backward", device)
    x = layout(torch.randn(2, channels, 20, 24, dtype=torch.float64), channels_last).to(device)
    offset = torch.randn(12, 2, 7, 5, dtype=torch.float64).to(device) if with_offset else None
    out = assert_equals_reference(x, random_rois(12).to(device), offset, (7, 5), 0.2, 2)
    assert out.shape == (12, channels, 7, 5)
    kept = torch.channels_last if channels_last and channels > 1 else torch.contiguous_format
    assert out.is_contiguous(memory_format=kept)


@pytest.mark.parametrize("ratio", [-1, 0, 1, 3])
@pytest.mark.parametrize("gamma", [0.1, 1.0])
@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_reference_for_any_box_and_offset(device, need_kernel, ratio, gamma, channels_last):
    need_kernel("deform_roi_pool", device)
    x = layout(torch.randn(2, 9, 24, 20, dtype=torch.float64), channels_last).to(device)
    rois = odd_rois()
    offset = 2 * torch.randn(30, 2, 7, 7, dtype=torch.float64)
    offset[5, :, 2] = 1000.0
    offset[6, 0, 3], offset[6, 1, 4], offset[7, :, 0] = NAN, INF, -INF
    out = assert_equals_reference(x, rois.to(device), offset.to(device), 7, 0.2, ratio, gamma)
    assert out.isfinite().all()
    assert (out[5, :, 2] == 0).all() and (out[6, :, 3:5] == 0).all() and (out[7, :, 0] == 0).all()


@pytest.mark.parametrize("channels_last", [False, True])
def test_padding_and_non_finite_rois_give_zeros(device, need_kernel, channels_last):
    need_kernel("deform_roi_pool", device)
    x = layout(torch.randn(2, 5, 16, 16), channels_last).to(device)
    rois = random_rois(8)
    rois[0, 0], rois[1, 0], rois[2, 0] = -1, -7, NAN
    rois[3, 1], rois[4, 4], rois[5, 3], rois[6, 2] = NAN, NAN, INF, -INF
    for ratio in (0, 2):
        out = assert_equals_reference(x, rois.to(device), torch.randn(8, 2, 3, 3, device=device), 3, 0.12, ratio)
        assert (out[:7] == 0).all()
        assert (out[7] != 0).any()


@pytest.mark.parametrize("function", [deform_roi_pool, deform_roi_pool_reference])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_pixel_of_weight_0_is_not_read(device, function, value, channels_last):
    """2 x 2 bins of one sample, each on a pixel centre; the next pixel has weight 0."""
    x = layout(torch.arange(32.0).view(1, 2, 4, 4), channels_last).to(device)
    rois, offset = torch.tensor([[0.0, 1, 1, 3, 3]], device=device), torch.zeros(1, 2, 2, 2, device=device)
    x[0, :, 3, 3] = value
    assert function(x, rois, offset, 2, sampling_ratio=1)[0, 0].tolist() == [[5, 6], [9, 10]]
    x[0, :, 2, 1] = value
    out = function(x, rois, offset, 2, sampling_ratio=1)
    assert (~out.isfinite())[0, 0].tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_gradient_that_is_no_number_reaches_the_pixels_with_weight_alone(device, need_kernel, channels_last):
    need_kernel("deform_roi_pool_backward", device)
    x = layout(torch.arange(32.0).view(1, 2, 4, 4), channels_last).to(device)
    rois, offset = torch.tensor([[0.0, 1, 1, 3, 3]], device=device), torch.zeros(1, 2, 2, 2, device=device)
    grad = torch.ones(1, 2, 2, 2, device=device)
    grad[0, :, 0, 1] = NAN
    reference = importlib.import_module("fastrcnn.ops.deform_roi_pool")._backward
    for function in (torch.ops.fastrcnn.deform_roi_pool_backward, reference):
        into, moved = function(grad, x, rois, offset, 1.0, 1, 0.1)
        assert into[0, 0].isnan().nonzero().tolist() == [[1, 2]]
        assert moved[0].isnan().nonzero().tolist() == [[0, 0, 1], [1, 0, 1]]


@pytest.mark.parametrize("index", [2, 100, INF])
def test_image_index_out_of_range_raises(index):
    x, rois, offset = MAP, random_rois(4), OFFSET
    rois[2, 0] = index
    with pytest.raises(ValueError, match=r"^rois: row 2"):
        deform_roi_pool(x, rois, offset, 7)
    with pytest.raises(ValueError, match=r"^rois: row 2"):
        deform_roi_pool_reference(x, rois, offset, 7)
    with pytest.raises(ValueError, match=r"^rois: row 2"):
        torch.ops.fastrcnn.deform_roi_pool_backward(torch.zeros(4, 3, 7, 7), x, rois, offset, 1.0, 2, 0.1)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("with_offset", [False, True])
def test_no_rois_give_an_empty_output_and_zero_gradients(device, channels_last, with_offset):
    x = layout(torch.randn(2, 4, 8, 8), channels_last).to(device).requires_grad_()
    offset = torch.zeros(0, 2, 7, 7, device=device, requires_grad=True) if with_offset else None
    out = deform_roi_pool(x, torch.zeros(0, 5, device=device), offset, 7)
    assert out.shape == (0, 4, 7, 7)
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert offset is None or offset.grad.shape == offset.shape


SLICES = {
    "channels of NCHW": lambda x: x[:, 3:19],
    "channels of channels-last": lambda x: layout(x, True)[:, 3:19],
    "one map for all channels": lambda x: x[:, :1].expand(-1, 6, -1, -1),
}


@pytest.mark.parametrize("name", SLICES)
def test_strided_arguments_equal_contiguous(device, need_kernel, name):
    need_kernel("deform_roi_pool_backward", device)
    x = SLICES[name](torch.randn(2, 21, 24, 26).to(device))
    rois, offset = random_rois(10).to(device), torch.randn(3, 5, 10, 2).permute(2, 3, 1, 0).to(device)
    out = deform_roi_pool(x, rois.t().contiguous().t(), offset, (5, 3), 0.2)
    want = deform_roi_pool_reference(x.contiguous(), rois, offset.contiguous(), (5, 3), 0.2)
    torch.testing.assert_close(out, want)
    for grad in (torch.randn(out.shape[::-1]).permute(3, 2, 1, 0), torch.randn(1).expand(out.shape)):
        args = x, rois, offset, 0.2, 0, 0.1
        actual = torch.ops.fastrcnn.deform_roi_pool_backward(grad.to(device), *args)
        leaves = [t.contiguous().requires_grad_() for t in (x, offset)]
        expected = deform_roi_pool_reference(leaves[0], rois, leaves[1], (5, 3), 0.2)
        for a, b in zip(actual, torch.autograd.grad(expected, leaves, grad.to(device))):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_low_precision_errs_at_most_twice_as_much_as_the_reference(device, need_kernel, dtype, channels_last):
    need_kernel("deform_roi_pool", device)
    x = layout(torch.randn(2, 70, 32, 32), channels_last).to(device, dtype)
    rois, offset = random_rois(20).to(device), torch.randn(20, 2, 7, 7).to(device, dtype)
    out, grads = forward_and_gradients(deform_roi_pool, x, rois, offset, 7, 0.25)
    low, low_grads = forward_and_gradients(deform_roi_pool_reference, x, rois, offset, 7, 0.25)
    assert out.dtype == dtype
    leaves = [x.float().requires_grad_(), offset.float().requires_grad_()]
    exact = deform_roi_pool_reference(leaves[0], rois, leaves[1], 7, 0.25)
    assert_within_twice(out, low, exact)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out).float()
    for g, low_g, exact_g in zip(grads, low_grads, torch.autograd.grad(exact, leaves, grad)):
        assert g.dtype == dtype
        assert_within_twice(g, low_g, exact_g)


@pytest.mark.parametrize("roi_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset_dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_arguments_of_other_dtypes_equal_the_reference(device, need_kernel, dtype, roi_dtype, offset_dtype):
    need_kernel("deform_roi_pool_backward", device)
    x, rois = torch.randn(2, 3, 20, 20, dtype=dtype).to(device), random_rois(10).to(device, roi_dtype)
    offset = torch.randn(10, 2, 4, 4, dtype=offset_dtype).to(device)
    assert assert_equals_reference(x, rois, offset, 4, 0.2).dtype == dtype


@pytest.mark.parametrize("channels_last", [False, True])
def test_backward_gives_the_same_bits_with_any_number_of_threads(channels_last):
    x, rois = layout(torch.randn(2, 100, 32, 32), channels_last), random_rois(50)
    offset, before, results = torch.randn(50, 2, 5, 5), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(forward_and_gradients(deform_roi_pool, x, rois, offset, 5, 0.25)[1])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_cuda_kernel_alerts_where_determinism_is_asked(monkeypatch):
    op_module = importlib.import_module("fastrcnn.ops.deform_roi_pool")  # the package shows the function by this name
    monkeypatch.setattr(op_module, "has_kernel", lambda op, device: device == "cuda")
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    try:
        torch.use_deterministic_algorithms(True)
        op_module._alert_not_deterministic(cpu)
        with pytest.raises(RuntimeError, match="deterministic"):
            op_module._alert_not_deterministic(cuda)
        torch.use_deterministic_algorithms(True, warn_only=True)
        with pytest.warns(UserWarning, match="deterministic"):
            op_module._alert_not_deterministic(cuda)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck(device, ratio, channels_last):
    """Samples between pixels, held at each border and outside."""
    x = layout(torch.randn(2, 2, 4, 5, dtype=torch.float64), channels_last).to(device).requires_grad_()
    rois = random_rois(4, size=6, largest=6).double().to(device)
    offset = (4 * torch.randn(4, 2, 2, 3, dtype=torch.float64)).to(device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, o: deform_roi_pool(x, rois, o, (2, 3), 0.9, ratio), (x, offset))
    assert torch.autograd.gradcheck(lambda x: deform_roi_pool(x, rois, None, (2, 3), 0.9, ratio), x)


def random_layer(kind, channels: int = 3, **kwargs) -> nn.Module:
    """The last linear layers are zeros, and so would be every offset."""
    layer = kind((3, 2), channels, 8, spatial_scale=0.25, **kwargs)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


PACKS = [DeformRoIPoolPack, ModulatedDeformRoIPoolPack]


@pytest.mark.parametrize("kind", PACKS)
def test_compiles_as_one_graph_and_exports_with_any_number_of_rois(device, kind):
    layer, rois = random_layer(kind).to(device), random_rois(3, size=64).to(device)
    x = torch.randn(2, 3, 16, 16, device=device).requires_grad_()
    torch._dynamo.reset()
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, rois)
    assert torch.equal(out, layer(x, rois))
    leaves = [x, *layer.parameters()]
    got, want = torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(layer(x, rois).sum(), leaves)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)
    dynamic, more = ({}, {0: torch.export.Dim("rois", min=2)}), random_rois(8, size=64).to(device)
    exported = torch.export.export(layer, (x.detach(), rois), dynamic_shapes=dynamic).module()
    torch.testing.assert_close(exported(x, more), layer(x, more))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", PACKS)
def test_layer_pools_again_with_what_its_linear_layers_give(device, kind, channels_last):
    layer, rois = random_layer(kind, gamma=0.3, sampling_ratio=2).to(device), random_rois(4, size=64).to(device)
    x = layout(torch.randn(2, 3, 16, 16), channels_last).to(device)
    flat = roi_align(x, rois, (3, 2), 0.25, 2).reshape(4, -1)

    def hidden(value, name):
        return layer.get_submodule(name)(value)

    offset = hidden(hidden(hidden(flat, "offset_fc.0").relu(), "offset_fc.2").relu(), "offset_fc.4")
    want = deform_roi_pool(x, rois, offset.view(4, 2, 3, 2), (3, 2), 0.25, 2, 0.3)
    if kind is ModulatedDeformRoIPoolPack:
        want = want * hidden(hidden(flat, "mask_fc.0").relu(), "mask_fc.2").sigmoid().view(4, 1, 3, 2)
    out = layer(x, rois)
    torch.testing.assert_close(out, want)
    out.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())
    assert layer(x, rois[:0]).shape == (0, 3, 3, 2)


def test_layers_have_mmcvs_keys_and_start_as_roi_align(device):
    x, rois = torch.randn(2, 3, 16, 16, device=device), random_rois(4, size=64).to(device)
    pooled = roi_align(x, rois, 7, 0.25)
    torch.testing.assert_close(DeformRoIPool(7, 0.25)(x, rois), pooled)
    shapes = {"offset_fc.0": (8, 147), "offset_fc.2": (8, 8), "offset_fc.4": (98, 8)}
    for kind, factor, more in zip(PACKS, (1, 0.5), ({}, {"mask_fc.0": (8, 147), "mask_fc.2": (49, 8)})):
        layer = kind(7, 3, deform_fc_channels=8, spatial_scale=0.25).to(device)
        torch.testing.assert_close(layer(x, rois), pooled * factor)
        weights = {k[:-7]: tuple(v.shape) for k, v in layer.state_dict().items() if k.endswith("weight")}
        assert weights == {**shapes, **more}
        assert set(layer.state_dict()) == {f"{k}.{p}" for k in weights for p in ("weight", "bias")}
        with pytest.raises(ValueError, match="input"):
            layer(x[:, :2], rois)
