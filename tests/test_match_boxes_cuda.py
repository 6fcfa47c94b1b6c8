"""match_boxes on a GPU: memory, streams, devices and graphs. Its results are tested in test_match_boxes.py."""

import pytest
import torch
from conftest import random_boxes

from fastrcnn.ops import match_boxes, match_boxes_reference

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def kernel(need_kernel):
    need_kernel("match_boxes", "cuda")


def inputs(n: int = 3000) -> tuple[torch.Tensor, ...]:
    """boxes [n, 4], gt_boxes [2, 300, 4], gt_counts, ignore_boxes [2, 3, 4], ignore_counts."""
    gts, regions = random_boxes(600, seed=1).view(2, 300, 4), random_boxes(6, seed=2).view(2, 3, 4)
    args = random_boxes(n), gts, torch.tensor([300, 40]), regions, torch.tensor([1, 3])
    return tuple(t.cuda() for t in args)


def assert_same(actual, expected):
    for a, b in zip(actual, expected):
        assert torch.equal(a, b)


@pytest.mark.parametrize("low_quality", ["last_gt", "argmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_reference_bit_for_bit_on_either_device(low_quality, dtype):
    args = tuple(t.to(dtype) if t.is_floating_point() else t for t in inputs())
    kwargs = {"low_quality": low_quality, "ignore_iof_thr": 0.5, "min_pos_iou": 0.1}
    actual = match_boxes(*args, **kwargs)
    assert_same(actual, match_boxes_reference(*args, **kwargs))
    assert_same([t.cpu() for t in actual], match_boxes_reference(*(t.cpu() for t in args), **kwargs))


def test_runs_on_the_current_stream_and_without_synchronisation():
    args = inputs()
    expected = match_boxes_reference(*args, ignore_iof_thr=0.5)
    late = torch.zeros_like(args[0])
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late.copy_(args[0])  # done only when the stream gets there
            actual = match_boxes(late, *args[1:], ignore_iof_thr=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert_same(actual, expected)


@pytest.mark.parametrize("low_quality", ["last_gt", "argmax"])
def test_replays_in_a_cuda_graph(low_quality):
    static = inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        match_boxes(*static, low_quality=low_quality)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = match_boxes(*static, low_quality=low_quality)
    for seed in (5, 6):
        static[0].copy_(random_boxes(3000, seed=seed))
        static[2].copy_(torch.tensor([seed, 300]))
        graph.replay()
        assert_same(actual, match_boxes_reference(*static, low_quality=low_quality))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_answers_on_the_device_of_its_input():
    actual = match_boxes(*(t.to("cuda:1") for t in inputs()))
    assert {t.device.index for t in actual} == {1}
    assert_same([t.cpu() for t in actual], [t.cpu() for t in match_boxes(*inputs())])


def test_memory_does_not_grow_with_the_pairs():
    boxes, gts = random_boxes(268_569, 1344, 800).cuda(), random_boxes(800, 1344, 800, seed=1).view(8, 100, 4).cuda()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    matches, max_iou = match_boxes(boxes, gts)
    results = matches.numel() * (matches.element_size() + max_iou.element_size())
    assert torch.cuda.max_memory_allocated() - before - results < 1 << 20
    assert_same((matches, max_iou), match_boxes_reference(boxes, gts))
