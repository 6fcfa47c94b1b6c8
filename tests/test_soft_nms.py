"""soft_nms against its reference and cases worked out by hand."""

import math

import pytest
import torch
from conftest import random_boxes
from operator_cases import spread_scores

from fastrcnn.ops import (
    batched_soft_nms,
    batched_soft_nms_reference,
    nms,
    soft_nms,
    soft_nms_padded,
    soft_nms_reference,
)

METHODS = ["naive", "linear", "gaussian"]
NAN, INF = float("nan"), float("inf")


def assert_equals_reference(*args, **kwargs):
    dets, indices = soft_nms(*args, **kwargs)
    want_dets, want_indices = soft_nms_reference(*args, **kwargs)
    assert torch.equal(indices, want_indices)
    torch.testing.assert_close(dets, want_dets, equal_nan=True)  # a box of NaN is returned as it came
    return dets, indices


THREE = [[0.0, 0, 10, 10], [0, 0, 10, 5], [20, 20, 30, 30]]  # the second has IoU 1/2 with the first, the third none


@pytest.mark.parametrize(
    "method, scores, order",
    [
        ("naive", [0.9, 0.7], [0, 2]),
        ("linear", [0.9, 0.7, 0.8 * 0.5], [0, 2, 1]),
        ("gaussian", [0.9, 0.7, 0.8 * math.exp(-0.25 / 0.5)], [0, 2, 1]),
    ],
)
def test_three_boxes_by_hand(device, method, scores, order):
    boxes = torch.tensor(THREE, device=device)
    dets, indices = soft_nms(boxes, torch.tensor([0.9, 0.8, 0.7], device=device), method=method)
    assert indices.tolist() == order
    assert torch.equal(dets[:, :4], boxes[order])
    torch.testing.assert_close(dets[:, 4], torch.tensor(scores, device=device))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [0, 1, 2, 65, 300])
def test_equals_reference(device, need_kernel, method, n):
    need_kernel("soft_nms", device)
    boxes, scores = random_boxes(n, width=300, height=300).to(device), spread_scores(n).to(device)
    dets, indices = assert_equals_reference(boxes, scores, 0.3, 0.5, 0.05, method)
    assert dets.shape == (len(indices), 5)
    assert indices.dtype == torch.int64


def test_equals_reference_across_the_threads_shares(device, need_kernel):
    """More boxes than the 4096 of one share; the high min_score keeps the rounds few."""
    need_kernel("soft_nms", device)
    boxes, scores = random_boxes(9000, width=200, height=200, largest=180).to(device), spread_scores(9000).to(device)
    _, indices = assert_equals_reference(boxes, scores, 0.3, 0.5, 0.9, "gaussian")
    assert len(indices) > 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n, groups", [(0, 1), (1, 1), (300, 1), (300, 7), (300, 300), (2500, 2)])
def test_batched_equals_reference(device, need_kernel, method, n, groups):
    need_kernel("batched_soft_nms", device)
    boxes, scores = random_boxes(n, width=300, height=300).to(device), spread_scores(n).to(device)
    idxs = (torch.randperm(n) % groups * 2**61 - 2**62).to(device)  # any int64
    args = boxes, scores, idxs, 0.3, 0.5, 0.05 if n < 1000 else 0.9, method
    for most in (None, 0, 5, n + 1):
        dets, indices = batched_soft_nms(*args, max_output=most)
        want_dets, want_indices = batched_soft_nms_reference(*args, max_output=most)
        assert torch.equal(indices, want_indices)
        torch.testing.assert_close(dets, want_dets)


def test_batched_ties_go_to_the_lower_group_and_then_by_index(device, need_kernel):
    need_kernel("batched_soft_nms", device)
    boxes = torch.tensor([[20.0, 0, 30, 10], [0, 0, 10, 10], [40, 0, 50, 10], [60, 0, 70, 10]], device=device)
    scores = torch.full((4,), 0.5, device=device)
    idxs = torch.tensor([1, -3, 1, -3], device=device, dtype=torch.int32)
    dets, indices = batched_soft_nms(boxes, scores, idxs)
    assert indices.tolist() == [1, 3, 0, 2]
    assert torch.equal(dets[:, :4], boxes[indices])


def test_batched_leaves_other_groups_alone(device):
    boxes = torch.tensor(THREE[:2], device=device)
    dets, _ = batched_soft_nms(boxes, torch.tensor([0.9, 0.8], device=device), torch.tensor([0, 1], device=device))
    torch.testing.assert_close(dets[:, 4], torch.tensor([0.9, 0.8], device=device))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_batched_takes_other_dtypes_and_odd_input(device, need_kernel, dtype):
    need_kernel("batched_soft_nms", device)
    boxes, scores = random_boxes(120).to(dtype), spread_scores(120).to(dtype)
    boxes[5], boxes[6:9, 2:], scores[[30, 31, 32]] = NAN, boxes[6:9, :2], torch.tensor([NAN, -INF, INF], dtype=dtype)
    args = boxes.to(device), scores.to(device), torch.arange(120, device=device) % 3, 0.3, 0.5, 0.01, "gaussian"
    for actual, expected in zip(batched_soft_nms(*args), batched_soft_nms_reference(*args)):
        torch.testing.assert_close(actual, expected, equal_nan=True)


def test_naive_is_hard_nms(device):
    boxes, scores = random_boxes(300).to(device), spread_scores(300).to(device)
    assert torch.equal(soft_nms(boxes, scores, 0.45, min_score=0.0005, method="naive")[1], nms(boxes, scores, 0.45))


@pytest.mark.parametrize("method", METHODS)
def test_equal_scores_go_to_the_lower_index(device, need_kernel, method):
    need_kernel("soft_nms", device)
    boxes = random_boxes(80, largest=60).to(device)
    scores = torch.full((80,), 0.5, device=device)
    _, indices = assert_equals_reference(boxes, scores, method=method)
    assert indices[0] == 0


@pytest.mark.parametrize("method, left", [("naive", [0]), ("linear", [0, 1])])
def test_iou_equal_to_the_threshold_counts_as_overlap(device, method, left):
    boxes, scores = torch.tensor(THREE[:2], device=device), torch.tensor([0.9, 0.8], device=device)
    dets, indices = soft_nms(boxes, scores, 0.5, method=method)
    assert indices.tolist() == left
    if method == "linear":
        assert dets[1, 4].item() == pytest.approx(0.4)
    assert soft_nms(boxes, scores, 0.500001, method=method)[0][1, 4].item() == pytest.approx(0.8)


def test_min_score_bounds_the_decayed_scores_inclusively_but_not_the_first(device):
    boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 4], [20, 20, 30, 30]], device=device)
    scores = torch.tensor([1.0, 0.5, 0.125], device=device)
    assert soft_nms(boxes, scores, min_score=0.25)[1].tolist() == [0, 1]
    assert soft_nms(boxes, scores, min_score=0.251)[1].tolist() == [0]
    assert soft_nms(boxes, scores, min_score=2.0)[1].tolist() == [0]


@pytest.mark.parametrize("method", METHODS)
def test_nan_infinite_and_degenerate_input_equals_reference(device, need_kernel, method):
    need_kernel("soft_nms", device)
    boxes, scores = random_boxes(100, largest=300), spread_scores(100)
    boxes[5], boxes[6, 2] = NAN, NAN
    boxes[10:14, 2:] = boxes[10:14, :2]  # points
    boxes[20:24] = boxes[20:24][:, [2, 3, 0, 1]]  # both axes inverted
    scores[30], scores[31] = NAN, -INF
    _, indices = assert_equals_reference(boxes.to(device), scores.to(device), method=method)
    assert not {30, 31} & set(indices.tolist())


@pytest.mark.parametrize("function", [soft_nms, soft_nms_reference])
@pytest.mark.parametrize("sigma", [1e-30, 1e-50, 5e-324])  # float32 rounds the last two to 0
def test_a_tiny_sigma_takes_all_from_what_overlaps_and_nothing_from_the_rest(device, function, sigma):
    boxes, scores = torch.tensor(THREE, device=device), torch.tensor([0.9, 0.8, 0.7], device=device)
    dets, indices = function(boxes, scores, sigma=sigma, method="gaussian")
    assert indices.tolist() == [0, 2]
    assert torch.equal(dets[:, 4], scores[[0, 2]])


@pytest.mark.parametrize("argument", ["iou_threshold", "sigma", "min_score"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_rules_are_finite(argument, value):
    with pytest.raises(ValueError, match=f"^{argument}: expected a finite number"):
        soft_nms(torch.zeros(1, 4), torch.ones(1), **{argument: value})


def test_equals_the_reference_bit_for_bit_where_scores_tie(device, need_kernel):
    """Whole coordinates and few scores: what decays alike stays alike, and goes by index."""
    need_kernel("soft_nms", device)
    boxes = random_boxes(400, width=60, height=60, largest=40).round().to(device)
    scores = spread_scores(400).mul(8).round().div(8).to(device)
    for method in METHODS:
        for a, b in zip(
            soft_nms(boxes, scores, 0.2, 0.5, 1e-6, method), soft_nms_reference(boxes, scores, 0.2, 0.5, 1e-6, method)
        ):
            assert torch.equal(a, b)


def test_only_nan_scores_leave_nothing(device):
    dets, indices = soft_nms(torch.tensor(THREE, device=device), torch.full((3,), NAN, device=device))
    assert dets.shape == (0, 5)
    assert indices.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_equal_the_reference(device, need_kernel, dtype):
    need_kernel("soft_nms", device)
    boxes, scores = random_boxes(60).to(device, dtype), spread_scores(60).to(device, dtype)
    dets, _ = assert_equals_reference(boxes, scores, method="gaussian")
    assert dets.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_double_scores_beside_float_boxes_equal_the_reference(device, need_kernel):
    need_kernel("soft_nms", device)
    boxes, scores = random_boxes(40).to(device), spread_scores(40).double().to(device)
    dets, _ = assert_equals_reference(boxes, scores)
    assert dets.dtype == torch.float32


def test_non_contiguous_input_equals_contiguous(device):
    boxes, scores = random_boxes(60).to(device), spread_scores(60).to(device)
    expected = soft_nms(boxes, scores)
    wide = torch.full((60, 6), NAN, device=device)
    wide[:, 1:5] = boxes
    for b, s in ((wide[:, 1:5], scores.repeat_interleave(2)[::2]), (boxes.t().contiguous().t(), scores)):
        actual = soft_nms(b, s)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])


def test_input_is_left_as_it_was(device):
    boxes, scores = random_boxes(30).to(device), spread_scores(30).to(device)
    copies = boxes.clone(), scores.clone()
    soft_nms(boxes, scores)
    assert torch.equal(boxes, copies[0])
    assert torch.equal(scores, copies[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_padded_batch_is_its_images(device, need_kernel, method, dtype):
    """Against the operator without padding, whose rounds have a reference of their own above."""
    need_kernel("soft_nms_padded", device, dtype)
    boxes = random_boxes(4 * 90, width=200, height=200).view(4, 90, 4).to(device, dtype)
    scores = spread_scores(4, 90).to(device, dtype)
    scores[1, ::7] = NAN
    groups, counts = (torch.arange(90) % 3).expand(4, 90).to(device), torch.tensor([90, 60, 0, 1], device=device)
    for most, ids in ((20, groups), (200, groups), (200, None), (0, groups)):
        rules = dict(iou_threshold=0.3, sigma=0.4, min_score=0.05, method=method, max_output=most)
        decayed, indices, kept = soft_nms_padded(boxes, scores, ids, counts=counts, **rules)
        for i, n in enumerate(counts.tolist()):
            own = boxes[i, :n], scores[i, :n], groups[i, :n] * (ids is not None)
            dets, expected = batched_soft_nms(*own, **rules)
            k = len(expected)
            assert int(kept[i]) == k and indices[i].tolist() == [*expected.tolist(), *[-1] * (most - k)]
            assert torch.equal(decayed[i, :k], dets[:, 4]) and not decayed[i, k:].any()
