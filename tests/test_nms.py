"""nms, batched_nms and nms_padded against their references, torchvision and cases worked out by hand."""

import numpy as np
import pytest
import torch
import torchvision
from conftest import random_boxes

from fastrcnn.ops import batched_nms, batched_nms_reference, nms, nms_padded, nms_padded_reference, nms_reference

BLOCK_EDGES = [0, 1, 63, 64, 65, 511, 512, 513, 1025]  # the kernel works in blocks of 512 and looks up every 64
INF, NAN = float("inf"), float("nan")


def scores_with_ties(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).mul(50).round().div(50)


def integer_boxes(n: int, seed: int = 0) -> torch.Tensor:
    """Whole coordinates: torchvision's shift by group stays exact."""
    boxes = random_boxes(n, seed=seed).round()
    boxes[:, 2:] += 1
    return boxes


@pytest.mark.parametrize("n", BLOCK_EDGES)
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_nms_equals_reference_and_torchvision_at_block_edges(device, need_kernel, n, threshold):
    need_kernel("nms", device)
    boxes, scores = random_boxes(n).to(device), scores_with_ties(n).to(device)
    kept = nms(boxes, scores, threshold)
    assert kept.dtype == torch.int64
    assert torch.equal(kept, nms_reference(boxes, scores, threshold))
    assert torch.equal(kept, torchvision.ops.nms(boxes, scores, threshold))


def test_survivors_fill_more_than_one_block(device, need_kernel):
    need_kernel("nms", device)
    corner = torch.arange(1400, device=device) * 10.0
    boxes = torch.stack([corner, corner, corner + 8, corner + 8], 1).repeat(2, 1)  # every box twice
    scores = torch.cat([torch.full((1400,), 0.9, device=device), torch.full((1400,), 0.8, device=device)])
    assert torch.equal(nms(boxes, scores, 0.5), torch.arange(1400, device=device))


def test_equal_scores_count_in_index_order(device):
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60], [0, 0, 10, 10]], device=device)
    scores = torch.full((4,), 0.5, device=device)
    assert nms(boxes, scores, 0.5).tolist() == [0, 2]


@pytest.mark.device_rule
@pytest.mark.parametrize("tenths", range(1, 10))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iou_equal_to_the_threshold_is_settled_as_torchvision_does(device, tenths, dtype):
    boxes = torch.tensor([[0, 0, 10, 1], [0, 0, tenths, 1]], dtype=dtype, device=device)
    scores = torch.tensor([0.9, 0.8], dtype=dtype, device=device)
    threshold = tenths / 10
    kept = nms(boxes, scores, threshold)
    assert torch.equal(kept, torchvision.ops.nms(boxes, scores, threshold))
    assert torch.equal(kept, nms_reference(boxes, scores, threshold))
    if device == "cpu":  # a float32 IoU against the double threshold: rounding up is enough to suppress
        suppressed = dtype == torch.float32 and float(np.float32(threshold)) > threshold
        assert kept.tolist() == ([0] if suppressed else [0, 1])


@pytest.mark.device_rule
@pytest.mark.parametrize("threshold, cpu_keeps", [(1 / 3, 1), (float(np.float32(1 / 3)), 2), (0.34, 2), (0.33, 1)])
def test_a_third_lies_between_the_float_and_the_double_threshold(device, threshold, cpu_keeps):
    boxes = torch.tensor([[0.0, 0, 2, 1], [1, 0, 3, 1]], device=device)
    scores = torch.tensor([0.9, 0.8], device=device)
    kept = nms(boxes, scores, threshold)
    assert torch.equal(kept, torchvision.ops.nms(boxes, scores, threshold))
    if device == "cpu":
        assert len(kept) == cpu_keeps


def test_nan_infinite_and_degenerate_input_equals_reference_and_torchvision(device, need_kernel):
    need_kernel("nms", device)
    boxes, scores = random_boxes(200, largest=300), scores_with_ties(200)
    boxes[5], boxes[17, 2], boxes[30, 1] = NAN, NAN, NAN
    boxes[40:44, 2:] = boxes[40:44, :2]  # points
    boxes[50:54] = boxes[50:54][:, [2, 3, 0, 1]]  # both axes inverted
    boxes[60:64] = boxes[60:64][:, [2, 1, 0, 3]]  # one axis inverted
    boxes[70], boxes[71] = torch.tensor([0, 0, INF, INF]), torch.tensor([-INF, 0, 10, INF])
    scores[[3, 5, 90]], scores[100], scores[101] = NAN, INF, -INF
    boxes, scores = boxes.to(device), scores.to(device)
    kept = nms(boxes, scores, 0.4)
    assert torch.equal(kept, nms_reference(boxes, scores, 0.4))
    assert torch.equal(kept, torchvision.ops.nms(boxes, scores, 0.4))
    assert kept[:3].tolist() == [3, 5, 90]  # NaN scores first, in index order


def test_empty_boxes_in_one_place_suppress_nothing(device):
    boxes = torch.full((3, 4), 7.0, device=device)
    assert nms(boxes, torch.tensor([0.1, 0.3, 0.2], device=device), 0.0).tolist() == [1, 2, 0]


def test_non_contiguous_input_equals_contiguous(device):
    boxes, scores = random_boxes(150).to(device), scores_with_ties(150).to(device)
    expected = nms(boxes, scores, 0.4)
    wide = torch.full((150, 7), NAN, device=device)
    wide[:, 2:6] = boxes
    every_other = torch.zeros(300, device=device)
    every_other[::2] = scores
    assert torch.equal(nms(wide[:, 2:6], every_other[::2], 0.4), expected)
    assert torch.equal(nms(boxes.t().contiguous().t(), scores, 0.4), expected)
    one_score = scores[:1].expand(150)
    assert torch.equal(nms(boxes, one_score, 0.4), nms(boxes, one_score.contiguous(), 0.4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_equal_the_reference(device, need_kernel, dtype):
    need_kernel("nms", device, dtype)
    need_kernel("batched_nms", device, dtype)
    boxes, scores = random_boxes(300).to(device, dtype), scores_with_ties(300).to(device, dtype)
    idxs = torch.arange(300, device=device) % 3
    assert torch.equal(nms(boxes, scores, 0.4), nms_reference(boxes, scores, 0.4))
    assert torch.equal(batched_nms(boxes, scores, idxs, 0.4), batched_nms_reference(boxes, scores, idxs, 0.4))


def test_double_scores_beside_float_boxes_equal_the_reference(device, need_kernel):
    need_kernel("nms", device)
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9]], device=device)
    scores = torch.tensor([0.5, 0.5 + 1e-12], dtype=torch.float64, device=device)
    assert torch.equal(nms(boxes, scores, 0.5), nms_reference(boxes, scores, 0.5))


@pytest.mark.parametrize("length", [2, 33, 300, 1300])
def test_a_chain_of_boxes_keeps_every_second(device, need_kernel, length):
    """Each box overlaps the next one only, so that whether the last one stays depends on all the others."""
    need_kernel("nms", device)
    left = torch.arange(length, device=device) * 5.0
    boxes = torch.stack([left, torch.zeros_like(left), left + 10, torch.full_like(left, 10)], 1)
    scores = torch.linspace(1, 0.1, length, device=device)
    assert torch.equal(nms(boxes, scores, 0.2), torch.arange(0, length, 2, device=device))


@pytest.mark.parametrize("group_size", [1, 3, 31, 100, 255, 257, 700])
def test_groups_of_any_size_and_place(device, need_kernel, group_size):
    need_kernel("batched_nms", device)
    n = 1500
    boxes, scores = random_boxes(n, width=300, height=300).to(device), scores_with_ties(n).to(device)
    idxs = (torch.randperm(n) // group_size * 7 - 50).to(device)
    assert torch.equal(batched_nms(boxes, scores, idxs, 0.3), batched_nms_reference(boxes, scores, idxs, 0.3))


@pytest.mark.parametrize("groups, spoiled", [(5, None), (16, None), (60, None), (5, "scores"), (5, "groups")])
def test_rows_that_come_sorted_by_group_and_score(device, need_kernel, groups, spoiled):
    """As decode_proposals leaves them, or all but the last row of the second image."""
    need_kernel("nms_padded", device)
    boxes, scores = random_boxes(2200, 300, 300).view(2, 1100, 4), scores_with_ties(2, 1100)
    scores[0, 5] = NAN
    runs = scores.tensor_split(groups, 1)
    scores = torch.cat([run.sort(1, descending=True).values for run in runs], 1)
    ids = torch.cat([torch.full_like(run, 2 * i - 9) for i, run in enumerate(runs)], 1).long()
    if spoiled == "scores":
        scores[1, -1] += 1
    elif spoiled == "groups":
        ids[1, -1] = -10
    args = boxes.to(device), scores.to(device), ids.to(device), 0.4, 700, torch.tensor([1090, 1100], device=device)
    for a, b in zip(nms_padded(*args), nms_padded_reference(*args)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [1e-38, 1e-22, 1e-19, 1e17, 1e36])
def test_areas_that_underflow_or_overflow(device, need_kernel, scale):
    need_kernel("nms", device)
    boxes, scores = (random_boxes(300, 200, 200) * scale).to(device), scores_with_ties(300).to(device)
    assert torch.equal(nms(boxes, scores, 0.3), nms_reference(boxes, scores, 0.3))
    smallest = torch.tensor([[0.0, 0, 2**-74, 2**-74]] * 2, device=device)  # areas of two units in the last place
    assert nms(smallest, scores[:2], 0.9).numel() == 1


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("n", [16384, 16385])
def test_long_lists(device, need_kernel, n, grouped):
    need_kernel("batched_nms", device)
    boxes, scores = random_boxes(n, 200, 200, 150).to(device), scores_with_ties(n).to(device)
    idxs = torch.arange(n, device=device) % (5 if grouped else 1)
    args = boxes, scores, idxs, 0.5, 300
    kept = batched_nms(*args)
    assert 200 < len(kept) <= 300
    assert torch.equal(kept, batched_nms_reference(*args))


def test_one_group_of_many_may_be_full_long_before_the_others(device, need_kernel):
    need_kernel("nms_padded", device)
    boxes, scores = random_boxes(2400, 2000, 2000, 30).to(device), scores_with_ties(2400).to(device)
    scores[:1200] += 1.0  # one group above, the other below
    groups = (torch.arange(2400, device=device) >= 1200).long()
    args = boxes.view(2, 1200, 4), scores.view(2, 1200), groups.view(2, 1200), 0.5, 40
    for a, b in zip(nms_padded(*args), nms_padded_reference(*args)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("n", BLOCK_EDGES)
def test_batched_nms_equals_reference_and_torchvision(device, need_kernel, n):
    need_kernel("batched_nms", device)
    boxes, scores = integer_boxes(n).to(device), scores_with_ties(n).to(device)
    idxs = torch.randint(0, 3, (n,), device=device)
    kept = batched_nms(boxes, scores, idxs, 0.43)  # no IoU of these boxes: what equals the threshold has its own test
    assert torch.equal(kept, batched_nms_reference(boxes, scores, idxs, 0.43))
    theirs = torchvision.ops.batched_nms(boxes, scores, idxs, 0.43)
    assert set(kept.tolist()) == set(theirs.tolist())
    assert torch.equal(scores[kept], scores[theirs])  # equal scores may stand in another order there


def test_groups_may_be_any_int64(device):
    boxes, scores = random_boxes(400).to(device), scores_with_ties(400).to(device)
    small = torch.arange(400, device=device) % 5
    ids = torch.tensor([-(2**63), -1, 0, 2**62 + 1, 2**63 - 1], device=device)
    expected = batched_nms(boxes, scores, small, 0.3)
    assert torch.equal(batched_nms(boxes, scores, ids[small], 0.3), expected)
    assert torch.equal(batched_nms(boxes, scores, small.to(torch.int32), 0.3), expected)
    padded, counts = nms_padded(boxes[None], scores[None], ids[small][None], 0.3, 400)
    assert torch.equal(padded[0, : len(expected)], expected)
    assert counts.tolist() == [len(expected)]


def test_neighbouring_huge_groups_stay_apart(device):
    boxes = torch.tensor([[0.0, 0, 10, 10]], device=device).repeat(3, 1)
    scores = torch.tensor([0.9, 0.8, 0.7], device=device)
    idxs = torch.tensor([2**62, 2**62 + 1, 2**62], device=device)  # one number in float64
    assert batched_nms(boxes, scores, idxs, 0.5).tolist() == [0, 1]


@pytest.mark.parametrize("max_output", [0, 1, 7, 100, 10**9])
def test_max_output_is_the_beginning_of_the_full_answer(device, max_output):
    boxes, scores = random_boxes(700).to(device), scores_with_ties(700).to(device)
    idxs = torch.arange(700, device=device) % 4
    full = batched_nms(boxes, scores, idxs, 0.5)
    assert len(full) > 100
    assert torch.equal(batched_nms(boxes, scores, idxs, 0.5, max_output), full[:max_output])


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("counts", [None, [0, 57, 130, 500, -3]])
@pytest.mark.parametrize("max_output", [0, 20, 200])
def test_nms_padded_equals_reference_and_nms_of_each_image(device, need_kernel, grouped, counts, max_output):
    need_kernel("nms_padded", device)
    boxes = random_boxes(650, width=200, height=200).view(5, 130, 4).to(device)
    scores = scores_with_ties(5, 130).to(device)
    groups = torch.randint(-1, 2, (5, 130), device=device) if grouped else None
    limit = None if counts is None else torch.tensor(counts, device=device)
    indices, kept = nms_padded(boxes, scores, groups, 0.4, max_output, limit)
    expected = nms_padded_reference(boxes, scores, groups, 0.4, max_output, limit)
    assert torch.equal(indices, expected[0])
    assert torch.equal(kept, expected[1])
    for i in range(5):
        n = 130 if counts is None else min(max(counts[i], 0), 130)
        idxs = torch.zeros(n, dtype=torch.int64, device=device) if groups is None else groups[i, :n]
        alone = batched_nms(boxes[i, :n], scores[i, :n], idxs, 0.4, max_output)
        assert kept[i] == len(alone)
        assert torch.equal(indices[i, : len(alone)], alone)
        assert (indices[i, len(alone) :] == -1).all()


def test_rows_beyond_the_count_take_no_part(device):
    boxes, scores = random_boxes(40).to(device), scores_with_ties(40).to(device)
    counts = torch.tensor([25], device=device)
    expected = nms_padded(boxes[None], scores[None], None, 0.3, 40, counts)
    boxes[25:], scores[25:] = torch.tensor([-1e4, -1e4, 1e4, 1e4], device=device), NAN
    actual = nms_padded(boxes[None], scores[None], None, 0.3, 40, counts)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_nms_padded_takes_slices_and_other_dtypes(device, need_kernel, dtype):
    need_kernel("nms_padded", device)
    boxes = random_boxes(200).view(100, 2, 4).transpose(0, 1).to(device, dtype)
    scores = scores_with_ties(2, 200)[:, ::2].to(device, dtype)
    groups = (torch.arange(200, device=device, dtype=torch.int32) % 2).view(100, 2).t()
    counts = torch.tensor([90, 0, 100, 0], device=device, dtype=torch.int32)[::2]
    actual = nms_padded(boxes, scores, groups, 0.4, 30, counts)
    expected = nms_padded_reference(boxes, scores, groups, 0.4, 30, counts)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("batch, n", [(0, 5), (2, 0)])
def test_nms_padded_of_nothing(device, batch, n):
    boxes, scores = torch.zeros(batch, n, 4, device=device), torch.zeros(batch, n, device=device)
    indices, kept = nms_padded(boxes, scores, torch.zeros(batch, n, dtype=torch.int64, device=device), 0.5, 3)
    assert indices.tolist() == [[-1, -1, -1]] * batch
    assert kept.tolist() == [0] * batch
