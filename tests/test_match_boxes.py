"""match_boxes against its reference, torchvision's Matcher and cases worked out by hand."""

import pytest
import torch
import torchvision
from conftest import random_boxes
from torchvision.models.detection._utils import Matcher

from fastrcnn.ops import match_boxes, match_boxes_reference

NAN, INF = float("nan"), float("inf")
LOW_QUALITY = ["last_gt", "argmax"]


def grid_boxes(n: int, seed: int = 0) -> torch.Tensor:
    """Boxes on a coarse grid: many equal IoUs."""
    return (random_boxes(n, 200, 200, 100, seed) / 10).round() * 10


def assert_equals_reference(*args, **kwargs):
    actual, expected = match_boxes(*args, **kwargs), match_boxes_reference(*args, **kwargs)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    assert actual[1].dtype == expected[1].dtype
    return actual


# The CPU kernel works in chunks of 1024 boxes, the CUDA kernel in blocks of 256 and warps of 32.
@pytest.mark.parametrize("n", [0, 1, 31, 33, 255, 256, 257, 1023, 1024, 1025, 2049])
@pytest.mark.parametrize("low_quality", LOW_QUALITY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_reference_at_chunk_edges(device, need_kernel, n, low_quality, dtype):
    need_kernel("match_boxes", device)
    gts = grid_boxes(9, seed=1).to(device, dtype)
    for boxes in (grid_boxes(n).to(device, dtype), random_boxes(n, 200, 200).to(device, dtype)):
        for min_pos_iou in (0.0, 0.3):
            kwargs = {"min_pos_iou": min_pos_iou, "low_quality": low_quality}
            matches, max_iou = assert_equals_reference(boxes, gts, **kwargs)
            assert matches.shape == max_iou.shape == (n,)


def test_boxes_just_past_a_chunk_take_a_ground_truths_best(device):
    boxes = torch.tensor([[500.0, 500, 510, 510]], device=device).repeat(1026, 1)
    boxes[[3, 1024, 1025]] = torch.tensor([[0.0, 0, 10, 5]] * 3, device=device)  # IoU 1/2 with the ground truth
    matches, max_iou = match_boxes(boxes, torch.tensor([[0.0, 0, 10, 10]], device=device))
    assert matches.nonzero().numel() == 1023
    assert matches[[3, 1024, 1025]].tolist() == [0, 0, 0]
    assert max_iou[[3, 1024, 1025]].tolist() == [0.5, 0.5, 0.5]


# One box of area 100; the ground truths cover 60 and 40 of it and nothing else has more.
@pytest.mark.parametrize(
    "kwargs, expected",
    [
        ({"low_quality": "last_gt"}, 1),
        ({"low_quality": "argmax"}, 0),
        ({"min_pos_iou": 0.5}, 0),
        ({"min_pos_iou": 0.65}, -2),
        ({"match_low_quality": False}, -2),
        ({"match_low_quality": False, "pos_iou_thr": 0.5}, 0),
        ({"match_low_quality": False, "neg_iou_thr": 0.7}, -1),
    ],
)
def test_a_box_that_is_the_best_of_two_ground_truths(device, kwargs, expected):
    box = torch.tensor([[0.0, 0, 10, 10]], device=device)
    gts = torch.tensor([[0.0, 0, 10, 6], [0, 0, 10, 4]], device=device)
    matches, max_iou = match_boxes(box, gts, **kwargs)
    assert matches.tolist() == [expected]
    assert max_iou.item() == pytest.approx(0.6)


@pytest.mark.parametrize(
    "kwargs, expected",
    [
        ({"pos_iou_thr": 0.5, "neg_iou_thr": 0.5}, 0),
        ({"pos_iou_thr": 0.500001, "neg_iou_thr": 0.5}, -2),
        ({"pos_iou_thr": 0.7, "neg_iou_thr": 0.500001}, -1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iou_equal_to_a_threshold(device, kwargs, expected, dtype):
    box = torch.tensor([[0, 0, 10, 5]], dtype=dtype, device=device)
    gt = torch.tensor([[0, 0, 10, 10]], dtype=dtype, device=device)
    assert match_boxes(box, gt, match_low_quality=False, **kwargs)[0].item() == expected


@pytest.mark.parametrize("min_pos_iou, expected", [(0.5, 0), (0.500001, -2)])
def test_best_equal_to_min_pos_iou_is_enough(device, min_pos_iou, expected):
    box, gt = torch.tensor([[0.0, 0, 10, 5]], device=device), torch.tensor([[0.0, 0, 10, 10]], device=device)
    assert match_boxes(box, gt, min_pos_iou=min_pos_iou)[0].item() == expected


def test_the_first_of_equal_ground_truths_is_a_boxs_best(device):
    box = torch.tensor([[0.0, 0, 10, 8]], device=device)
    gts = torch.tensor([[50.0, 50, 60, 60], [0, 0, 10, 10], [0, 0, 10, 10]], device=device)
    assert match_boxes(box, gts, match_low_quality=False)[0].item() == 1
    assert match_boxes(box, gts, low_quality="argmax")[0].item() == 1
    assert match_boxes(box, gts, low_quality="last_gt")[0].item() == 2


def with_area(boxes: torch.Tensor) -> torch.Tensor:
    return boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]


@pytest.mark.parametrize("thr, low_quality", [((0.7, 0.3), True), ((0.5, 0.5), False)])
@pytest.mark.parametrize("nothing_meets_the_last", [False, True])
def test_equals_torchvisions_matcher(device, thr, low_quality, nothing_meets_the_last):
    boxes = torch.cat([with_area(grid_boxes(900)), random_boxes(400, 200, 200)]).to(device)
    gts = with_area(grid_boxes(12, seed=1)).to(device)
    if nothing_meets_the_last:  # with low quality allowed every box attains its best, 0
        gts[-1] += 900
    expected = Matcher(*thr, allow_low_quality_matches=low_quality)(torchvision.ops.box_iou(gts, boxes))
    kwargs = {"min_pos_iou": 0.0, "low_quality": "argmax", "iou_eps": 0.0}
    assert torch.equal(match_boxes(boxes, gts, None, None, None, *thr, match_low_quality=low_quality, **kwargs)[0],
                       expected)  # fmt: skip


# The region covers exactly half of the first box, all of the second and nothing of the third.
@pytest.mark.parametrize(
    "thr, expected", [(-1, [0, -1, -1]), (0.5, [0, -2, -1]), (0.499, [-2, -2, -1]), (1.0, [0, -1, -1])]
)
def test_boxes_inside_an_ignore_region_take_no_part(device, thr, expected):
    boxes = torch.tensor([[0.0, 0, 10, 10], [52, 52, 58, 58], [30, 30, 40, 40]], device=device)
    gts = torch.tensor([[0.0, 0, 10, 10]], device=device)
    regions = torch.tensor([[200.0, 200, 201, 201], [-5, 0, 5, 10], [50, 50, 60, 60]], device=device)
    matches, max_iou = match_boxes(boxes, gts, ignore_boxes=regions, ignore_iof_thr=thr)
    assert matches.tolist() == expected
    assert max_iou.tolist() == [-1 if m == -2 else float(i == 0) for i, m in enumerate(expected)]
    assert match_boxes(boxes, gts, ignore_boxes=regions[:2], ignore_iof_thr=thr)[0][1] == -1


@pytest.mark.parametrize("low_quality", LOW_QUALITY)
def test_ground_truth_may_lose_its_best_to_an_ignore_region(device, need_kernel, low_quality):
    need_kernel("match_boxes", device)
    boxes, gts = grid_boxes(1500).to(device), grid_boxes(8, seed=1).to(device)
    regions = grid_boxes(3, seed=2).to(device)
    for min_pos_iou in (0.0, 0.3):
        kwargs = {"ignore_boxes": regions, "ignore_iof_thr": 0.5, "min_pos_iou": min_pos_iou}
        matches, max_iou = assert_equals_reference(boxes, gts, low_quality=low_quality, **kwargs)
        assert ((matches == -2) | (max_iou >= 0)).all()
        assert (max_iou == -1).any()


def batch(device, dtype=torch.float32):
    gts = grid_boxes(28, seed=1).view(4, 7, 4).to(device, dtype)
    regions = grid_boxes(8, seed=2).view(4, 2, 4).to(device, dtype)
    return gts, torch.tensor([7, 0, 3, 20], device=device), regions, torch.tensor([2, 2, 0, 9], device=device)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("low_quality", LOW_QUALITY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_batches_equal_reference_and_single_images(device, need_kernel, shared, low_quality, dtype):
    need_kernel("match_boxes", device)
    gts, counts, regions, region_counts = batch(device, dtype)
    boxes = grid_boxes(1100 if shared else 1200).to(device, dtype)
    boxes = boxes if shared else boxes.view(4, 300, 4)
    kwargs = {"low_quality": low_quality, "ignore_iof_thr": 0.5}
    matches, max_iou = assert_equals_reference(boxes, gts, counts, regions, region_counts, **kwargs)
    assert matches.dtype == torch.int64
    for i in range(4):
        own = boxes if shared else boxes[i]
        alone = match_boxes(own, gts[i, : counts[i]], ignore_boxes=regions[i, : region_counts[i]], **kwargs)
        assert torch.equal(alone[0], matches[i])
        assert torch.equal(alone[1], max_iou[i])
    assert (matches[1] == -1).all()
    assert (max_iou[1] == 0).all()


def test_rows_beyond_the_count_take_no_part(device):
    boxes, (gts, counts, regions, region_counts) = grid_boxes(200).to(device), batch(device)
    args = {"gt_counts": counts, "ignore_counts": region_counts, "ignore_iof_thr": 0.3}
    expected = match_boxes(boxes, gts, ignore_boxes=regions, **args)
    gts[2, 3:], regions[2] = boxes[:4], torch.tensor([-1e4, -1e4, 1e4, 1e4], device=device)
    actual = match_boxes(boxes, gts, ignore_boxes=regions, **args)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("batched", [False, True])
def test_without_ground_truth_all_is_background(device, need_kernel, batched):
    need_kernel("match_boxes", device)
    boxes, regions = grid_boxes(5).to(device), grid_boxes(5)[:, None].to(device)
    gts = torch.zeros(0, 4, device=device)
    ignore = {"ignore_boxes": regions.flatten(0, 1), "ignore_iof_thr": 0.5}
    for kwargs in ({}, {"pos_iou_thr": 0.0}, {"neg_iou_thr": 0.0}, ignore):
        if batched and "ignore_boxes" in kwargs:
            kwargs = {**kwargs, "ignore_boxes": regions}
        rows = gts.expand(5, 0, 4) if batched else gts
        matches, max_iou = assert_equals_reference(boxes, rows, **kwargs)
        assert (matches == -1).all()
        assert (max_iou == 0).all()


def test_no_images(device, need_kernel):
    need_kernel("match_boxes", device)
    matches, _ = assert_equals_reference(grid_boxes(5).to(device), torch.zeros(0, 3, 4, device=device))
    assert matches.shape == (0, 5)


@pytest.mark.parametrize("iou_eps", [0.0, 1e-6])
@pytest.mark.parametrize("min_pos_iou", [0.0, 0.3])
def test_degenerate_boxes_equal_reference(device, need_kernel, iou_eps, min_pos_iou):
    need_kernel("match_boxes", device)
    boxes, gts = grid_boxes(100), grid_boxes(6, seed=1)
    boxes[10:20, 2:] = boxes[10:20, :2]  # points
    boxes[20:30] = boxes[20:30][:, [2, 3, 0, 1]]  # both axes inverted
    boxes[30:40] = boxes[30:40][:, [2, 1, 0, 3]]  # one axis inverted
    gts[3] = boxes[10]
    gts[4] = gts[4][[2, 3, 0, 1]]
    for low_quality in LOW_QUALITY:
        kwargs = {"iou_eps": iou_eps, "min_pos_iou": min_pos_iou, "low_quality": low_quality}
        assert_equals_reference(boxes.to(device), gts.to(device), **kwargs)
        regions = torch.cat([gts[:1], boxes[10:11], boxes[20:21]])
        assert_equals_reference(boxes.to(device), gts.to(device), ignore_boxes=regions.to(device), ignore_iof_thr=0.3)


@pytest.mark.parametrize("low_quality", LOW_QUALITY)
@pytest.mark.parametrize("min_pos_iou", [-1.0, 0.0, 0.3])
def test_any_number_of_ground_truth_boxes(device, need_kernel, low_quality, min_pos_iou):
    need_kernel("match_boxes", device)
    counts = torch.tensor([600, 0, 255, 256, 257, 1], device=device)
    gts = torch.cat([grid_boxes(300, seed=1), random_boxes(300, 200, 200, seed=2)])[torch.randperm(600)]
    gts[257:300] = gts[:43]  # twins, in another chunk of 256 than the first
    gts[[5, 256, 599]] += 5000  # meet nothing
    gts = torch.stack([gts.roll(i, 0) for i in range(6)]).to(device)
    boxes = torch.cat([grid_boxes(300), random_boxes(30, 200, 200)]).to(device)
    kwargs = {"low_quality": low_quality, "min_pos_iou": min_pos_iou}
    matches, _ = assert_equals_reference(boxes, gts, counts, **kwargs)
    assert matches[0].max() >= 256


@pytest.mark.parametrize("low_quality", LOW_QUALITY)
def test_anchors_in_the_order_of_a_grid(device, need_kernel, low_quality):
    need_kernel("match_boxes", device)
    y, x, size = torch.meshgrid(torch.arange(20), torch.arange(30), torch.tensor([8, 24, 60]), indexing="ij")
    centre = torch.stack([x, y], -1).flatten(0, 2) * 8.0 + 4
    half = size.flatten()[:, None] / 2
    gts = torch.cat([random_boxes(60, 240, 160, 90), torch.tensor([[-50.0, -50, -40, -40]])]).to(device)
    for min_pos_iou in (0.0, 0.3):  # with 0 the last, outside, is attained by every anchor
        kwargs = {"low_quality": low_quality, "min_pos_iou": min_pos_iou}
        matches, _ = assert_equals_reference(torch.cat([centre - half, centre + half], 1).to(device), gts, **kwargs)
        if low_quality == "last_gt":
            assert (matches == 60).all() == (min_pos_iou == 0)


@pytest.mark.parametrize("low_quality", LOW_QUALITY)
@pytest.mark.parametrize("min_pos_iou", [-2.0, 0.0])
def test_no_low_quality_match_where_every_box_is_ignored(device, need_kernel, low_quality, min_pos_iou):
    need_kernel("match_boxes", device)
    boxes, region = grid_boxes(40).to(device), torch.tensor([[-1e4, -1e4, 1e4, 1e4]], device=device)
    boxes = with_area(boxes)
    kwargs = {"ignore_boxes": region, "ignore_iof_thr": 0.5, "low_quality": low_quality, "min_pos_iou": min_pos_iou}
    matches, max_iou = assert_equals_reference(boxes, boxes[:9], **kwargs)
    assert (matches == -2).all() and (max_iou == -1).all()


@pytest.mark.parametrize("low_quality", LOW_QUALITY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_coordinates_anywhere_equal_reference(device, need_kernel, low_quality, dtype):
    need_kernel("match_boxes", device)
    special = torch.tensor([NAN, INF, -INF, 1e30, -1e30, 1e-30, 0.0], dtype=dtype)
    for seed in range(6):
        torch.manual_seed(seed)
        boxes, gts, regions = (grid_boxes(n, seed).to(dtype) for n in (300, 20, 3))
        for t in (boxes, gts, regions):
            where = torch.rand(t.shape) < 0.08
            t[where] = special[torch.randint(len(special), (int(where.sum()),))]
        boxes, gts, regions = boxes.to(device), gts.to(device), regions.to(device)
        for eps, least in ((0.0, 0.0), (1e-6, 0.3)):
            kwargs = {"ignore_boxes": regions, "ignore_iof_thr": 0.4, "iou_eps": eps, "min_pos_iou": least}
            _, max_iou = assert_equals_reference(boxes, gts, low_quality=low_quality, **kwargs)
            assert not max_iou.isnan().any()


@pytest.mark.parametrize("column", [0, 1, 2, 3, slice(None)])
@pytest.mark.parametrize("low_quality", LOW_QUALITY)
def test_nan_boxes_are_background_and_nan_ground_truth_has_no_match(device, need_kernel, column, low_quality):
    need_kernel("match_boxes", device)
    boxes = torch.tensor([[0.0, 0, 10, 10]], device=device).repeat(3, 1)
    gts = torch.tensor([[0.0, 0, 10, 6], [0, 0, 10, 8]], device=device)
    boxes[1, column] = NAN
    matches, max_iou = assert_equals_reference(boxes, gts, low_quality=low_quality)
    assert matches[1] == -1
    assert max_iou[1] == 0
    gts[0, column] = NAN
    matches, _ = assert_equals_reference(boxes, gts, low_quality=low_quality)
    assert matches.tolist() == [1, -1, 1]


@pytest.mark.parametrize("low_quality", LOW_QUALITY)
def test_infinite_boxes_equal_reference(device, need_kernel, low_quality):
    need_kernel("match_boxes", device)
    far = torch.tensor([[-INF, -INF, INF, INF]], device=device)
    boxes = torch.cat([torch.tensor([[0.0, 0, 10, 10]], device=device), far])
    for gts in (boxes[:1], far, boxes):
        matches, max_iou = assert_equals_reference(boxes, gts, low_quality=low_quality)
        assert not max_iou.isnan().any()
        assert matches[1] != -2


def test_non_contiguous_input_equals_contiguous(device):
    boxes, (gts, counts, regions, region_counts) = grid_boxes(300).to(device), batch(device)
    expected = match_boxes(boxes, gts, counts, regions, region_counts, ignore_iof_thr=0.4)
    wide = torch.full((300, 6), NAN, device=device)
    wide[:, 1:5] = boxes
    turned = gts.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    twice = region_counts.repeat_interleave(2)[::2]
    actual = match_boxes(wide[:, 1:5], turned, counts.int(), regions.flip(2).flip(2), twice, ignore_iof_thr=0.4)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("counts", [[-1, 3], [3, -5]])
def test_a_negative_count_is_none(device, counts):
    boxes, gts = grid_boxes(20).to(device), grid_boxes(6, seed=1).view(2, 3, 4).to(device)
    actual = match_boxes(boxes, gts, torch.tensor(counts, device=device))
    expected = match_boxes(boxes, gts, torch.tensor(counts, device=device).clamp(min=0))
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
