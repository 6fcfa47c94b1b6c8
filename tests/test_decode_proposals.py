"""decode_proposals against its reference and cases worked out by hand."""

import pytest
import torch
from conftest import assert_within_twice

from fastrcnn.ops import decode_proposals, decode_proposals_reference

NAN, INF = float("nan"), float("inf")
SHAPES = [(3, 16, 20), (3, 8, 10), (2, 4, 5)]  # anchors, height, width
STRIDES = [8, (16, 12), (32.0, 40.0)]
SIZES = [[128, 160], [100, 151], [64, 80]]  # height, width


def maps(device, batch: int = 3, shapes=SHAPES, spread: float = 12.0):
    """cls_logits, bbox_deltas and base_anchors. No two logits of a level lie so close that rounding could swap them."""
    logits, deltas, bases = [], [], []
    for a, h, w in shapes:
        n = a * h * w
        ranks = torch.stack([torch.randperm(n) for _ in range(batch)]) if batch else torch.zeros(0, n)
        logits.append((ranks / n - 0.5).mul(spread).view(batch, a, h, w).to(device))
        deltas.append((torch.randn(batch, 4 * a, h, w) * 0.4).to(device))
        half = torch.rand(a, 2) * 20 + 4
        bases.append(torch.cat([-half, half], 1).to(device))
    return logits, deltas, bases


def sizes(device, batch: int = 3) -> torch.Tensor:
    return torch.tensor(SIZES, device=device)[:batch]


def doubles(part: list) -> list:
    return [x.double() for x in part]


def assert_equals_reference(logits, deltas, bases, *args, **kwargs):
    """In float32 by the error from float64: coordinates near 0 are differences of large numbers."""
    actual = decode_proposals(logits, deltas, bases, *args, **kwargs)
    expected = decode_proposals_reference(logits, deltas, bases, *args, **kwargs)
    exact = decode_proposals_reference(doubles(logits), doubles(deltas), doubles(bases), *args, **kwargs)
    assert torch.equal(actual[2], expected[2])
    assert torch.equal(actual[3], expected[3])
    for a, e, x in zip(actual[:2], expected[:2], exact):
        assert a.dtype == e.dtype
        assert torch.equal(a.isnan(), e.isnan())
        if a.dtype == torch.float64:
            torch.testing.assert_close(a, e, equal_nan=True)
        elif a.numel():
            assert_within_twice(*(t.double().nan_to_num() for t in (a, e, x)))
    return actual


@pytest.mark.parametrize("function", [decode_proposals, decode_proposals_reference])
def test_strides_from_the_size_of_the_batch(device, function):
    args = maps(device)
    by_size = function(*args, None, sizes(device), 60, batch_shape=(130, 167))
    by_hand = function(*args, [(8, 8), (16, 16), (33, 32)], sizes(device), 60)  # 167 // 20, 130 // 16 and so on
    assert all(torch.equal(a, b) for a, b in zip(by_size, by_hand))
    for strides, shape in ((None, None), (STRIDES, (130, 167))):
        with pytest.raises(TypeError, match="strides"):
            function(*args, strides, sizes(device), 60, batch_shape=shape)


@pytest.mark.parametrize("nms_pre", [-1, 0, 1, 7, 60, 10**6])
@pytest.mark.parametrize("score", ["sigmoid", "logits"])
@pytest.mark.parametrize("topk_on", ["sigmoid", "logits"])
@pytest.mark.parametrize("symmetric_clip", [False, True])
def test_equals_reference(device, need_kernel, nms_pre, score, topk_on, symmetric_clip):
    need_kernel("decode_proposals", device)
    rules = {"min_size": 6, "symmetric_clip": symmetric_clip, "wh_ratio_clip": 0.5, "topk_on": topk_on, "score": score}
    rules.update(means=(0.1, 0, 0, 0), stds=(0.5, 1, 1, 2))
    out = assert_equals_reference(*maps(device), STRIDES, sizes(device), nms_pre, **rules)
    boxes, scores, levels, counts = out
    length = sum(min(nms_pre, a * h * w) if nms_pre > 0 else a * h * w for a, h, w in SHAPES)
    assert boxes.shape == (3, length, 4)
    assert [t.dtype for t in out] == [torch.float32, torch.float32, torch.int64, torch.int64]
    for i, count in enumerate(counts.tolist()):
        assert count < length or nms_pre == 1
        assert (boxes[i, count:] == 0).all()
        assert (scores[i, count:] == 0).all()
        assert (levels[i, count:] == -1).all()
        assert (levels[i, :count].diff() >= 0).all()
        for level in range(3):
            assert (scores[i, :count][levels[i, :count] == level].diff() <= 0).all()


def one_level(device, logits: list, base=(-5.0, -5.0, 5.0, 5.0)):
    """One image and one anchor a cell, deltas of zero. logits: rows of the map."""
    logits = torch.tensor(logits, dtype=torch.float32, device=device)[None, None]
    deltas = torch.zeros(1, 4, *logits.shape[2:], device=device)
    return [logits], [deltas], [torch.tensor([base], device=device)]


def test_anchors_step_by_their_own_stride_along_each_axis(device):
    args = *one_level(device, [[1, 2, 3], [6, 5, 4]]), [(10, 20)], torch.tensor([[100, 100]], device=device), 4
    boxes, scores, levels, counts = decode_proposals(*args, score="logits")
    assert boxes[0].tolist() == [[0, 15, 5, 25], [5, 15, 15, 25], [15, 15, 25, 25], [15, 0, 25, 5]]
    assert scores[0].tolist() == [6, 5, 4, 3]
    assert levels[0].tolist() == [0, 0, 0, 0]
    assert counts.tolist() == [4]
    torch.testing.assert_close(decode_proposals(*args)[1], scores.sigmoid())


def test_boxes_are_clipped_to_each_images_own_size(device):
    logits, deltas, bases = maps(device)
    boxes, _, _, counts = decode_proposals(logits, deltas, bases, STRIDES, sizes(device), 0)
    for i, (height, width) in enumerate(SIZES):
        valid = boxes[i, : counts[i]]
        assert valid.min() == 0
        assert valid[:, [0, 2]].max() == width
        assert valid[:, [1, 3]].max() == height


def test_levels_and_images_are_independent(device):
    logits, deltas, bases = maps(device)
    boxes, scores, levels, counts = decode_proposals(logits, deltas, bases, STRIDES, sizes(device), 30)
    for i in range(3):
        alone = decode_proposals(
            [x[i : i + 1] for x in logits], [x[i : i + 1] for x in deltas], bases, STRIDES, sizes(device)[i : i + 1], 30
        )
        for together, single in zip((boxes, scores, levels, counts), alone):
            assert torch.equal(together[i], single[0])
        parts = []
        for level in range(3):
            one = [x[level : level + 1] for x in (logits, deltas, bases, STRIDES)]
            b, _, _, c = decode_proposals(*one, sizes(device), 30)
            parts.append(b[i, : c[i]])
        assert torch.equal(boxes[i, : counts[i]], torch.cat(parts))


@pytest.mark.parametrize(
    "logits", [[40, 50, 60], [-120, -110, -100], [-INF, -INF, -INF], [-INF, -100, INF], [-0.0, 0.0, 0.0], [3, 3, 3]]
)
@pytest.mark.parametrize("function", [decode_proposals, decode_proposals_reference])
def test_equal_sigmoids_keep_the_order_of_the_cells(device, function, logits):
    args = *one_level(device, [logits]), [10], torch.tensor([[100, 100]], device=device), 2
    boxes, *_ = function(*args, topk_on="sigmoid")
    assert boxes[0, :, 2].tolist() == ([25, 5] if logits[2] == INF else [5, 15])


def test_logits_are_ranked_where_their_sigmoid_saturates(device):
    args = *one_level(device, [[40, 50, 60]]), [10], torch.tensor([[100, 100]], device=device), 2
    boxes, scores, _, _ = decode_proposals(*args, topk_on="logits")
    assert boxes[0, :, 2].tolist() == [25, 15]
    assert scores[0].tolist() == [1, 1]


@pytest.mark.parametrize("topk_on", ["sigmoid", "logits"])
def test_logits_far_below_zero_equal_reference(device, need_kernel, topk_on):
    need_kernel("decode_proposals", device)
    args = *one_level(device, [[-80, -60, -40, -87]]), [10], torch.tensor([[100, 100]], device=device), 3
    assert_equals_reference(*args, topk_on=topk_on)


@pytest.mark.parametrize("topk_on", ["sigmoid", "logits"])
def test_many_ties_keep_the_order_y_x_anchor(device, need_kernel, topk_on):
    need_kernel("decode_proposals", device)
    logits, deltas, bases = maps(device)
    logits = [x.round().div(4).floor() for x in logits]
    for nms_pre in (5, 100, 0):
        assert_equals_reference(logits, deltas, bases, STRIDES, sizes(device), nms_pre, topk_on=topk_on)
    same = [torch.zeros_like(x) for x in logits]
    boxes, *_ = assert_equals_reference(same[2:], deltas[2:], bases[2:], [1000], sizes(device), 1)
    deltas[2][:, 4:] = NAN  # the second anchor's: it comes second
    again, *_ = assert_equals_reference(same[2:], deltas[2:], bases[2:], [1000], sizes(device), 1)
    assert torch.equal(boxes, again)


@pytest.mark.parametrize("min_size, kept", [(9.99, [10, 11]), (10, [11]), (10.5, [11]), (11, [])])
def test_boxes_of_just_min_size_are_dropped(device, need_kernel, min_size, kept):
    need_kernel("decode_proposals", device)
    logits = [torch.tensor([3.0, 2, 1], device=device).view(1, 3, 1, 1)]
    bases = [torch.tensor([[0.0, 0, 10, 10], [0, 0, 11, 11], [0, 0, 11, 9]], device=device)]
    args = logits, [torch.zeros(1, 12, 1, 1, device=device)], bases, [1], torch.tensor([[50, 50]], device=device), 0
    boxes, _, _, counts = assert_equals_reference(*args, min_size=min_size)
    assert boxes[0, : counts[0], 2].tolist() == kept


def test_boxes_clipped_to_nothing_are_dropped_without_a_min_size(device):
    args = *one_level(device, [[1, 2, 3]]), [20], torch.tensor([[100, 35]], device=device), 0
    boxes, scores, levels, counts = decode_proposals(*args)
    assert counts.tolist() == [2]  # the third starts at x = 35, the image's edge
    assert boxes[0, :, 2].tolist() == [25, 5, 0]
    assert levels[0].tolist() == [0, 0, -1]
    assert scores[0, 2] == 0


def test_nan_and_infinite_values_equal_reference(device, need_kernel):
    need_kernel("decode_proposals", device)
    logits, deltas, bases = maps(device)
    logits[0][:, 0, 3, 4], logits[0][:, 1, 5, 6], logits[1][0, 2, 1, 1] = NAN, INF, -INF
    deltas[0][:, 5, 2:6], deltas[1][1, 2, 3], deltas[2][:, 0, 0, 0], deltas[2][:, 3, 1, 1] = NAN, INF, INF, -INF
    for topk_on in ("sigmoid", "logits"):
        for nms_pre in (0, 50):
            assert_equals_reference(logits, deltas, bases, STRIDES, sizes(device), nms_pre, topk_on=topk_on)
    boxes, _, _, counts = decode_proposals(logits, deltas, bases, STRIDES, sizes(device), 0)
    assert boxes.isfinite().all()
    assert (counts > 0).all()


@pytest.mark.parametrize("last", [[], [0], [0, 1, 2]])
def test_layouts_and_slices_equal_contiguous(device, last):
    logits, deltas, bases = maps(device)
    expected = decode_proposals(logits, deltas, bases, STRIDES, sizes(device), 30)
    for i in last:
        logits[i] = logits[i].contiguous(memory_format=torch.channels_last)
        deltas[i] = deltas[i].contiguous(memory_format=torch.channels_last)
    both = torch.cat([logits[1], deltas[1]], 1)
    logits[1], deltas[1] = both[:, :3], both[:, 3:]  # one head's output, split
    logits[2] = logits[2].transpose(2, 3).contiguous().transpose(2, 3)
    bases[0] = torch.cat([bases[0], bases[0]], 1)[:, :4]
    wide = torch.stack([sizes(device)] * 2, 2)[..., 0]
    actual = decode_proposals(logits, deltas, bases, STRIDES, wide, 30)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_runs_in_float32(device, need_kernel, dtype):
    need_kernel("decode_proposals", device)
    logits, deltas, bases = ([x.to(dtype) for x in part] for part in maps(device))
    same = [[x.float() for x in part] for part in (logits, deltas, bases)]
    actual = assert_equals_reference(logits, deltas, bases, STRIDES, sizes(device).to(dtype), 40)
    expected = decode_proposals(*same, STRIDES, sizes(device).to(dtype), 40)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


@pytest.mark.parametrize("topk_on", ["sigmoid", "logits"])
def test_double_logits_run_in_double(device, need_kernel, topk_on):
    need_kernel("decode_proposals", device)
    logits, deltas, bases = (doubles(part) for part in maps(device))
    logits[0] += torch.rand_like(logits[0]) * 1e-9
    actual = assert_equals_reference(logits, deltas, bases, STRIDES, sizes(device), 40, topk_on=topk_on)
    assert [t.dtype for t in actual[:2]] == [torch.float64] * 2
    close = one_level(device, [[1.0, 2, 3]])
    args = [close[0][0].double() * 1e-14], doubles(close[1]), doubles(close[2])
    boxes, *_ = decode_proposals(*args, [10], torch.tensor([[100, 100]], device=device), 1, topk_on=topk_on)
    assert boxes[0, 0, 2] == 25  # the three are one number in float32's sigmoid


@pytest.mark.parametrize("batch, shapes", [(0, SHAPES), (2, [(3, 4, 5), (3, 0, 5)]), (2, [(3, 0, 0)])])
def test_no_images_and_empty_levels_equal_reference(device, need_kernel, batch, shapes):
    need_kernel("decode_proposals", device)
    for nms_pre in (0, 10):
        assert_equals_reference(*maps(device, batch, shapes), [8] * len(shapes), sizes(device, batch), nms_pre)


# Blocks of the CUDA kernel take 4,096 candidates of a level, and sort as many in one go.
EDGES = [(3, 35, 39), (4, 32, 32), (1, 17, 241), (2, 64, 64), (3, 60, 60)]  # 4,095, 4,096, 4,097, 8,192, 10,800
LARGE = [[260, 250], [128, 1000]]


@pytest.mark.parametrize("nms_pre", [1, 1000, 2048, 4096, 4097, 5000, 0])
@pytest.mark.parametrize("topk_on", ["sigmoid", "logits"])
def test_sizes_around_the_edges_of_a_block_equal_reference(device, need_kernel, nms_pre, topk_on):
    need_kernel("decode_proposals", device)
    image_sizes = torch.tensor(LARGE, device=device)
    assert_equals_reference(*maps(device, 2, EDGES), [4] * len(EDGES), image_sizes, nms_pre, topk_on=topk_on)


@pytest.mark.parametrize("shape", [(300, 3, 2), (1, 2, 1500), (3, 700, 1), (257, 1, 17), (1, 1, 1)])
def test_long_and_deep_maps_equal_reference(device, need_kernel, shape):
    need_kernel("decode_proposals", device)
    assert_equals_reference(*maps(device, 2, [shape]), [(1, 2)], torch.tensor([[2000, 2000]] * 2, device=device), 500)


def tied(x: torch.Tensor, kind: str) -> torch.Tensor:
    """[B, A, H, W] with few different values, by the number of the candidate: y, x, anchor."""
    i = torch.arange(x[0].numel(), device=x.device)
    values = {
        "equal": torch.full_like(i, 3),
        "saturated": 40 + i % 50,  # every sigmoid is 1
        "first and last": 1 - 2 * ((i > 5) & (i < len(i) - 5)),
        "across the edge": 1 - 2 * ((i < 4090) | (i > 4110)),
        "two values": i % 2,
        "last bits": i % 7,  # keys that differ in their last digit
    }[kind].to(x.dtype)
    if kind == "last bits":
        values = 2 + values * 2**-22
    b, a, h, w = x.shape
    return values.view(h, w, a).permute(2, 0, 1).expand(b, a, h, w)


@pytest.mark.parametrize("kind", ["equal", "saturated", "first and last", "across the edge", "two values", "last bits"])
@pytest.mark.parametrize("nms_pre", [7, 1000, 4500, 0])
def test_ties_over_several_blocks_go_by_index(device, need_kernel, kind, nms_pre):
    need_kernel("decode_proposals", device)
    logits, deltas, bases = maps(device, 2, EDGES)
    logits = [tied(x, kind) for x in logits]
    topk_on = "sigmoid" if kind == "saturated" else "logits"
    args = [4] * len(EDGES), torch.tensor(LARGE, device=device), nms_pre
    out = assert_equals_reference(logits, deltas, bases, *args, topk_on=topk_on)
    again = decode_proposals(logits, deltas, bases, *args, topk_on=topk_on)
    assert all(torch.equal(a, b) for a, b in zip(out, again))


@pytest.mark.parametrize("function", [decode_proposals, decode_proposals_reference])
def test_infinities_and_nan_are_ranked_below_numbers(device, function):
    lowest = torch.finfo(torch.float32).min
    args = *one_level(device, [[NAN, -INF, lowest, -1e38, INF]]), [10], torch.tensor([[99, 99]], device=device), 0
    boxes, *_ = function(*args, topk_on="logits")
    assert boxes[0, :, 2].tolist() == [45, 35, 15, 25, 5]  # -inf counts as the lowest number


@pytest.mark.parametrize("function", [decode_proposals, decode_proposals_reference])
def test_an_image_of_no_size_has_no_proposals(device, function):
    args = *one_level(device, [[1.0, 2]]), [10]
    for size, count in (([99.0, 99], 2), ([NAN, 99], 0), ([99, NAN], 0), ([INF, INF], 2), ([-9, 99], 0)):
        assert function(*args, torch.tensor([size], device=device), 0)[3].tolist() == [count]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("nms_pre", [1000, 5000, 0])
def test_dtypes_and_layouts_of_large_maps_equal_reference(device, need_kernel, dtype, nms_pre):
    need_kernel("decode_proposals", device)
    logits, deltas, bases = maps(device, 2, EDGES[2:])
    logits, deltas = [x.to(dtype) for x in logits], [x.to(dtype) for x in deltas]
    args = bases, [4] * 3, torch.tensor(LARGE, device=device), nms_pre
    expected = assert_equals_reference(logits, deltas, *args, topk_on="logits")
    logits[0] = torch.cat([logits[0]] * 2, 3)[..., : logits[0].shape[3]]
    logits[1:] = [x.contiguous(memory_format=torch.channels_last) for x in logits[1:]]
    deltas = [x.contiguous(memory_format=torch.channels_last) for x in deltas]
    actual = decode_proposals(logits, deltas, *args, topk_on="logits")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))
    mixed = decode_proposals(logits, [x.double() for x in deltas], *args, topk_on="logits")
    assert all(torch.equal(a, b) for a, b in zip(mixed, expected))


def test_proposals_carry_no_gradient(device):
    logits, deltas, bases = maps(device)
    logits = [x.requires_grad_() for x in logits]
    deltas = [x.requires_grad_() for x in deltas]
    out = decode_proposals(logits, deltas, bases, STRIDES, sizes(device), 10)
    assert not any(t.requires_grad for t in out)


@pytest.mark.gpu
def test_cuda_has_a_limit_of_eight_levels(need_kernel):
    need_kernel("decode_proposals", "cuda")
    with pytest.raises(ValueError, match="at most 8 levels"):
        decode_proposals(*maps("cuda", 1, [(1, 2, 2)] * 9), [8] * 9, sizes("cuda", 1), 5)
