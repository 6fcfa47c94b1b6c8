"""How the kernels run on a GPU, the same for every op: on the current stream and without a word to the host, captured in a
CUDA graph, on the device of their input, and with the same bits on every run. What they compute is tested beside each op.
"""

from collections.abc import Callable

import pytest
import torch
import torchvision
from conftest import random_boxes
from torch import Tensor

from fastrcnn import ops
from fastrcnn.ops.conv_tile import TILES, conv_tile
from fastrcnn.ops.preprocess import RULES
from fastrcnn.ops.roi_align import level_rule

pytestmark = pytest.mark.gpu

OPS = torch.ops.fastrcnn
STRIDES = [4, 8, 16, 32]
ANCHORS = torch.tensor([[-8.0, -8, 8, 8], [-11, -6, 11, 6], [-6, -11, 6, 11]])


def random(*shape: int, dtype=torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rois(n: int, images: int) -> Tensor:
    return torch.cat([(torch.arange(n) % images)[:, None].float(), random_boxes(n, 256, 256, 250)], 1)


def pyramid(dtype=torch.bfloat16, channels_last: bool = True) -> list[Tensor]:
    maps = [random(2, 64, 64 >> i, 64 >> i, dtype=dtype, seed=i) for i in range(4)]
    return [m.contiguous(memory_format=torch.channels_last) if channels_last else m for m in maps]


def rpn_maps(anchors: int = 3) -> list[Tensor]:
    sides = (100, 50, 25, 13, 7)
    return [random(2, k * anchors, s, s, seed=s) for k in (1, 4) for s in sides]


def proposals(nms_pre: int) -> Callable:
    def call(image_sizes, base, *maps):
        return ops.decode_proposals(maps[:5], maps[5:], [base] * 5, [4, 8, 16, 32, 64], image_sizes, nms_pre)

    return call


def pooled(sampling_ratio: int) -> Callable:
    rules = [1 / s for s in STRIDES], sampling_ratio, True, level_rule(56.0, "mmdet")

    def call(rois, *maps):
        out = OPS.multilevel_roi_align(list(maps), rois, 7, 7, *rules)
        return [out, *OPS.multilevel_roi_align_backward(out, list(maps), rois, *rules)]

    return call


def resized(resize: str) -> Callable:
    def call(*images):
        sizes = [(96, 128)] * len(images)
        return ops.preprocess(images, sizes, (96, 128), (1, 2, 3), (4, 5, 6), resize, True, torch.bfloat16)

    return call


def images() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (60 + i, 90, 3), dtype=torch.uint8, generator=g).permute(2, 0, 1) for i in range(3)]


def nms_inputs(n: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    scores, groups = torch.rand(2, n, generator=g).mul(50).round(), torch.randint(0, 5, (2, n), generator=g)
    return [random_boxes(2 * n, largest=300).view(2, n, 4), scores, groups, torch.tensor([n, n // 2])]


def keep(boxes, scores, groups, counts):
    return ops.nms_padded(boxes, scores, groups, 0.5, 500, counts)


def matched(low_quality: str) -> Callable:
    def call(boxes, gts, counts, regions):
        return ops.match_boxes(boxes, gts, counts, regions, ignore_iof_thr=0.5, low_quality=low_quality)

    return call


def match_inputs() -> list[Tensor]:
    gts, regions = random_boxes(600, seed=1).view(2, 300, 4), random_boxes(6, seed=2).view(2, 3, 4)
    return [random_boxes(3000), gts, torch.tensor([300, 40]), regions]


def convolved(x, weight, bias):
    return ops.conv_bn_relu(x, weight, None, bias, None, None, padding=1)


def tiled(tile: str, groups: int) -> Callable:
    def call(x, weight):
        weight = weight.contiguous(memory_format=torch.channels_last)
        return conv_tile(x, weight, None, None, (1, 1), (1, 1), (1, 1), groups, False, True, TILES.index(tile))

    return call


# name -> (ops, call, its tensors)
CASES: dict[str, tuple[tuple[str, ...], Callable, Callable]] = {
    "nms_padded, one chunk": (("nms_padded",), keep, lambda: nms_inputs(900)),
    "nms_padded, merged chunks": (("nms_padded",), keep, lambda: nms_inputs(3000)),
    "nms_padded, torch's sort": (("nms_padded",), keep, lambda: nms_inputs(20000)),
    "decode_boxes": (
        ("decode_boxes",),
        lambda a, d, s: ops.decode_boxes(a, d, s),
        lambda: [random_boxes(600).view(2, 300, 4), random(2, 300, 12), torch.tensor([[400.0, 500], [300, 600]])],
    ),
    **{
        f"decode_proposals, nms_pre {n}": (
            ("decode_proposals",), proposals(n), lambda: [torch.tensor([[400.0, 390], [300, 400]]), ANCHORS, *rpn_maps()],
        )
        for n in (1000, 5000, 0)
    },
    **{
        f"match_boxes, {rule}": (("match_boxes",), matched(rule), match_inputs) for rule in ("last_gt", "argmax")
    },
    **{
        f"multilevel_roi_align, {name}": (
            ("multilevel_roi_align",), pooled(ratio), lambda layout=layout: [rois(400, 2), *pyramid(*layout)],
        )
        for name, ratio, layout in (
            ("bf16 channels-last", 2, (torch.bfloat16, True)),
            ("adaptive", 0, (torch.float16, True)),
            ("NCHW", 0, (torch.float32, False)),
        )
    },
    **{f"preprocess, {rule}": (("preprocess",), resized(rule), images) for rule in RULES},
    "conv_bn_relu": (
        ("conv_bn_relu",),
        convolved,
        lambda: [pyramid()[1], random(64, 64, 3, 3, dtype=torch.bfloat16), random(64)],
    ),
    **{
        f"_conv_tile, {tile}": (
            ("_conv_tile",), tiled(tile, groups),
            lambda groups=groups: [pyramid()[1], random(64, 64 // groups, 3, 3, dtype=torch.bfloat16)],
        )
        for tile, groups in (("128x64", 1), ("groups", 16))
    },
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request, need_kernel) -> tuple[Callable, list[Tensor]]:
    names, call, tensors = CASES[request.param]
    for name in names:
        need_kernel(name, "cuda")
    return call, [t.cuda() for t in tensors()]


def as_list(out) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def assert_same(actual, expected) -> None:
    for a, b in zip(as_list(actual), as_list(expected), strict=True):
        assert torch.equal(a, b)


def test_runs_on_the_current_stream_and_without_synchronisation(case):
    call, tensors = case
    expected = call(*tensors)
    late = [torch.zeros_like(tensors[0]), *tensors[1:]]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late[0].copy_(tensors[0])  # done only when the stream gets there
            actual = call(*late)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert_same(actual, expected)


def test_replays_in_a_cuda_graph(case):
    call, tensors = case
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(*tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(*tensors)
    changed = tensors[0].flip(0)
    for _ in range(2):
        tensors[0].copy_(changed)
        graph.replay()
        assert_same(captured, call(*tensors))


def test_repeats_bit_by_bit(case):
    call, tensors = case
    first = call(*tensors)
    for _ in range(5):
        assert_same(call(*tensors), first)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_answers_on_the_device_of_its_input(case):
    call, tensors = case
    there = as_list(call(*(t.to("cuda:1") for t in tensors)))
    assert {t.device.index for t in there} == {1}
    assert_same([t.cpu() for t in there], [t.cpu() for t in as_list(call(*tensors))])


def extra_memory(call: Callable) -> tuple[int, Tensor | tuple[Tensor, ...]]:
    """Bytes that a call takes at its peak beyond what it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    kept = sum(t.untyped_storage().nbytes() for t in as_list(out))
    return torch.cuda.max_memory_allocated() - before - kept, out


def test_nms_takes_memory_for_the_boxes_and_not_for_their_pairs():
    boxes, scores = random_boxes(100_000, 4000, 4000, 300).cuda(), random(100_000).cuda()
    extra, kept = extra_memory(lambda: ops.nms(boxes, scores, 0.5))
    assert extra < 32 << 20
    assert torch.equal(kept, torchvision.ops.nms(boxes, scores, 0.5))


def test_match_boxes_takes_no_memory_for_the_pairs():
    boxes, gts = random_boxes(268_569, 1344, 800).cuda(), random_boxes(800, 1344, 800, seed=1).view(8, 100, 4).cuda()
    extra, out = extra_memory(lambda: ops.match_boxes(boxes, gts))
    assert extra < 1 << 20
    assert_same(out, ops.match_boxes_reference(boxes, gts))
