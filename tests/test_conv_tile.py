"""The convolution kernels of csrc/cuda against float64: every tile, edge, stride, group, epilogue and depth of the
pipeline. They run on a GPU, or emulated with --emulate-cuda."""

import ctypes
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastrcnn.ops.conv_tile import FLOAT_TILES, TILES, conv_tile, half_size

LAST = torch.channels_last
GROUPS = TILES.index("groups")
HALVES = [torch.bfloat16, torch.float16]
# name: (channels, outputs, kernel, stride, padding, dilation, groups)
SHAPES = {
    "1x1": (64, 72, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "3x3": (24, 40, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3x3/2": (16, 136, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "dilated": (8, 16, (3, 3), (1, 1), (2, 2), (2, 2), 1),
    "pairs": (8, 16, (2, 5), (2, 1), (1, 3), (1, 2), 1),
    "stem": (3, 64, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    "15 outputs": (40, 15, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "odd channels": (9, 7, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    "wide groups": (64, 64, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "uneven groups": (48, 30, (1, 3), (1, 1), (0, 1), (1, 1), 3),
}
NARROW = {
    "4 in a group": (72, 72, (3, 3), (1, 1), (1, 1), (1, 1), 18),
    "8, stride 2": (64, 64, (3, 3), (2, 2), (1, 1), (1, 1), 8),
    "16": (48, 48, (3, 3), (1, 1), (1, 1), (1, 1), 3),
    "2, pairs": (24, 24, (1, 4), (1, 2), (0, 2), (1, 1), 12),
    "1, dilated": (8, 8, (3, 3), (1, 1), (2, 2), (2, 2), 8),
}
DTYPE_TILES = [(torch.bfloat16, t) for t in TILES[:GROUPS]] + [(torch.float32, t) for t in FLOAT_TILES]
DTYPE_TILES += [(torch.float16, "128x64")]


@pytest.fixture(autouse=True)
def kernel(device, need_cuda_kernel):
    need_cuda_kernel("_conv_tile", device)


def random(device, dtype, *shape, scale=1.0):
    x = (torch.randn(shape) * scale).to(device, dtype)
    return x.contiguous(memory_format=LAST) if len(shape) == 4 else x


def make(device, dtype, shape, size=(9, 15), images=2, residual="full", bias=torch.float32):
    c, o, kernel, *where, groups = shape
    x = random(device, dtype, images, c, *size)
    w = random(device, dtype, o, c // groups, *kernel, scale=(c // groups * math.prod(kernel)) ** -0.5)
    out = F.conv2d(x.float(), w.float(), None, *where, groups).shape
    sides = {"full": out[2:], "half": [half_size(n) for n in out[2:]], None: None}[residual]
    r = None if residual is None else random(device, dtype, *out[:2], *sides)
    b = random(device, bias, o) if bias else None
    return x, w, b, r, *where, groups, residual == "half"


def exact(x, w, bias, residual, stride, padding, dilation, groups, upsample, relu, tile, dtype=torch.float64):
    """The layers as a model writes them."""
    y = F.conv2d(x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype), stride, padding, dilation, groups)
    if residual is not None:
        up = residual.to(dtype)
        if upsample:
            up = up.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, : y.shape[2], : y.shape[3]]
        y = y + up
    return F.relu(y) if relu else y


def check(*call):
    """Sums as good as float32's, rounded once: a few of its roundings of the absolute terms, half a one of the dtype's."""
    out = conv_tile(*call)
    assert out.dtype == call[0].dtype and out.is_contiguous(memory_format=LAST)
    right, size = exact(*call), exact(*(t.abs() if isinstance(t, torch.Tensor) else t for t in call))
    allowed = 4 * torch.finfo(torch.float32).eps * size + 0.5 * torch.finfo(out.dtype).eps * right.abs()
    excess = ((out.double() - right).abs() - allowed).max()
    assert excess <= 0, f"error {excess:.3g} more than allowed"
    return out


@pytest.mark.parametrize("dtype, tile", DTYPE_TILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_tiles(device, dtype, tile, shape):
    check(*make(device, dtype, SHAPES[shape]), True, TILES.index(tile))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("shape", NARROW)
def test_narrow_groups(device, dtype, shape):
    check(*make(device, dtype, NARROW[shape], size=(11, 19)), True, GROUPS)


@pytest.mark.parametrize(
    "dtype, tile", [(torch.bfloat16, 1), (torch.float16, 3), (torch.float32, 2), (torch.float16, 5)]
)
@pytest.mark.parametrize("outputs", [32, 12])  # in packs of 16 bytes, and not
def test_epilogues(device, dtype, tile, outputs):
    shape = (outputs, outputs, (3, 3), (1, 1), (1, 1), (1, 1), outputs // 4) if tile == GROUPS else (
        8, outputs, (3, 3), (1, 1), (1, 1), (1, 1), 1)  # fmt: skip
    if tile == GROUPS and outputs == 12:
        with pytest.raises(ValueError, match="tile is for groups"):
            conv_tile(*make(device, dtype, shape), True, tile)
        return
    for residual, relu, bias in itertools.product(("full", "half", None), (False, True), (None, torch.float32, dtype)):
        check(*make(device, dtype, shape, (5, 7), residual=residual, bias=bias), relu, tile)


@pytest.mark.parametrize("dtype, tile", [*DTYPE_TILES[:5], (torch.float32, "64x64")])
def test_every_depth_of_the_pipeline(device, dtype, tile):
    """Fewer slices than stages, as many, one more, and several rounds; the last slice full and not."""
    slice_ = 128 // dtype.itemsize
    for slices in range(1, 9):
        for missing in (0, 8):
            shape = (slices * slice_ - missing, 16, (1, 1), (1, 1), (0, 0), (1, 1), 1)
            check(*make(device, dtype, shape, (3, 5), 1, None), False, TILES.index(tile))


@pytest.mark.parametrize("tile, shape", [(0, SHAPES["3x3"]), (2, SHAPES["stem"]), (5, NARROW["4 in a group"])])
def test_the_order_of_threads_blocks_and_copies_does_not_matter(device, monkeypatch, tile, shape):
    call = *make(device, torch.bfloat16, shape, (9, 17), 1), True, tile
    first = check(*call)
    for order, copies, blocks in itertools.product(("forward", "reverse"), ("early", "late"), "14"):
        for name, value in (("ORDER", order), ("COPIES", copies), ("BLOCKS", blocks)):
            monkeypatch.setenv(f"EMULATED_CUDA_{name}", value)
        assert torch.equal(conv_tile(*call), first)


def test_a_block_makes_several_tiles_of_narrow_groups(device):
    shape = (8, 8, (1, 1), (1, 1), (0, 0), (1, 1), 2)
    check(*make(device, torch.float16, shape, (1, 1), 1060, "half"), True, GROUPS)


@pytest.mark.parametrize(
    "dtype, tile", [(torch.bfloat16, 2), (torch.float32, 2), (torch.float32, 5), (torch.float16, 5)]
)
def test_infinity_and_nan_are_the_references(device, dtype, tile):
    """Under weights of one: NaN of both signs and of the card's own bits, infinities and their difference."""
    x = torch.zeros(1, 16, 2, 5, device=device, dtype=dtype).contiguous(memory_format=LAST)
    ones = torch.zeros(16, 16 if tile != GROUPS else 1, 1, 1, device=device, dtype=dtype)
    for i in range(16):
        ones[i, i if tile != GROUPS else 0] = 1
    large = torch.finfo(dtype).max / 2
    for i, value in enumerate((math.nan, -math.nan, math.inf, -math.inf, large, -large, -0.0, 1.0)):
        x[0, i, 0, i % 5] = value
    if dtype == torch.float32:
        x.view(torch.int32)[0, 9, 1, 1] = 0x7FFFFFFF
    call = (
        x,
        ones.contiguous(memory_format=LAST),
        None,
        None,
        (1, 1),
        (0, 0),
        (1, 1),
        1 if tile != GROUPS else 16,
        False,
    )
    for relu in (False, True):
        out, right = conv_tile(*call, relu, tile), exact(*call, relu, tile)
        torch.testing.assert_close(out.double(), right, equal_nan=True, rtol=0, atol=0)
    assert out.isnan().any() and out.isinf().any()


def test_float32_over_a_long_sum_is_no_worse_than_a_loop(device):
    """Of positive terms, one after another: sums that are cut instead of rounded would drift away."""
    x, w = (t.abs() for t in make(device, torch.float32, (2048, 16, (1, 1), (1, 1), (0, 0), (1, 1), 1), (3, 3), 1)[:2])
    call = x, w, None, None, (1, 1), (0, 0), (1, 1), 1, False, False, 2
    loop = torch.zeros_like(conv_tile(*call))
    for c in range(2048):
        loop += w[:, c] * x[:, c : c + 1]
    right = exact(*call)
    assert (conv_tile(*call) - right).abs().max() <= (loop - right).abs().max()


def test_more_than_2_to_the_31_elements(device):
    """A map of 4.3 GB of which four pixels are read; a CPU's memory is taken where it is touched."""
    n, c = 5800, 64
    if device == "cpu":
        x = torch.from_numpy(np.zeros(n * n * c, np.uint16)).view(torch.bfloat16)
    else:
        x = torch.zeros(n * n * c, dtype=torch.bfloat16, device=device)
    x = x.view(1, n, n, c).permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    x[0, :, 0, 0], x[0, :, -1, -1] = 1, 2
    w = random(device, torch.bfloat16, 8, c, 1, 1)
    out = conv_tile(x, w, None, None, (n - 1, n - 1), (0, 0), (1, 1), 1, False, False, 2)
    sums = w.double().sum((1, 2, 3))
    right = torch.stack([sums, sums * 0, sums * 0, 2 * sums], 1).view(1, 8, 2, 2)
    torch.testing.assert_close(out.double(), right, rtol=4e-3, atol=1e-5)


def test_fragments_are_read_without_bank_conflicts(device):
    if device != "cpu":
        pytest.skip("counted by the emulator")
    name = next(n for n in torch.ops.loaded_libraries if n.endswith("emulated_cuda.so"))
    count = ctypes.CDLL(name).emulated_cuda_conflicts
    count.restype = ctypes.c_uint64
    count()
    for dtype, tile in DTYPE_TILES:
        check(*make(device, dtype, SHAPES["3x3"], (3, 5)), True, TILES.index(tile))
    for shape in ("4 in a group", "16", "1, dilated"):
        check(*make(device, torch.bfloat16, NARROW[shape]), True, GROUPS)
    assert count() == 0
    check(*make(device, torch.bfloat16, NARROW["8, stride 2"]), True, GROUPS)  # every other pixel: half of the banks
    assert count() > 0


def test_wrong_arguments_are_refused(device):
    x, w, *rest = *make(device, torch.float16, SHAPES["3x3"]), True, 1
    wrong = {
        "tile must": (x, w, *rest[:-1], 6),
        "tile is for": (x, w, *rest[:-1], GROUPS),
        "input must be channels-last": (x.contiguous(), w, *rest),
        "weight must be channels-last": (x, w.contiguous(), *rest),
        "weight must have the dtype": (x, w.float(), *rest),
        "bias must be float32": (x, w, rest[0].double(), *rest[1:]),
        "bias must be cont": (x, w, rest[0].repeat(2)[::2], *rest[1:]),
        "residual must have shape": (x, w, rest[0], x, *rest[2:]),
        "input must be float32": (x.double(), w.double(), rest[0], None, *rest[2:]),
        "padding must fit": (x, w, None, None, (1, 1), (2**40, 0), *rest[4:]),
        "weight must have kernels": (x, random(device, x.dtype, 8, 24, 1, 16), None, None, (1, 1), (0, 9), *rest[4:]),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            conv_tile(*call)
    assert conv_tile(x[:0], w, rest[0], None, *rest[2:]).shape == (0, 40, 9, 15)
