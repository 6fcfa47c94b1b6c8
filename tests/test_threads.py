"""Kernels give the same bits on one thread and on several, at sizes that several share."""

from functools import partial

import pytest
import torch
from conftest import random_boxes, random_rois

from fastrcnn import ops


def random(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def proposals():
    sizes = [(260, 340), (130, 170)]
    base = [random_boxes(3, 8, 8, 40)] * 2
    maps = [[random(2, c, *size) - 0.5 for size in sizes] for c in (3, 12)]
    return ops.decode_proposals(*maps, base, [4, 8], torch.tensor([[1000, 1300]] * 2), 500)


def pyramid(channels_last: bool):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps = [random(2, 64, 64 >> i, 64 >> i).contiguous(memory_format=layout) for i in range(2)]
    return ops.multilevel_roi_align(maps, random_rois(400), 7, [2, 4], 2)


CALLS = {
    "batched_nms": lambda: ops.batched_nms(random_boxes(20000), random(20000), torch.arange(20000) % 7, 0.5),
    "nms of very many": lambda: ops.nms(random_boxes(30000, 9000, 9000, 40), random(30000), 0.5),
    "nms_padded": lambda: ops.nms_padded(random_boxes(20000).view(5, 4000, 4), random(5, 4000), None, 0.5, 100),
    "soft_nms": lambda: ops.soft_nms(random_boxes(5000), random(5000), min_score=0.5),
    "decode_boxes": lambda: ops.decode_boxes(random_boxes(3000), random(3000, 400) - 0.5),
    "decode_boxes of one class": lambda: ops.decode_boxes(random_boxes(300000), random(300000, 4) - 0.5),
    "decode_proposals": proposals,
    "match_boxes": lambda: ops.match_boxes(random_boxes(300000), random_boxes(30)[None]),
    "select_candidates": lambda: ops.select_candidates(random(2, 9000000), 0.9999, 5000),
    "roi_align": partial(pyramid, False),
    "roi_align, channels-last": partial(pyramid, True),
    "preprocess": lambda: ops.preprocess(
        [(random(3, 500, 700) * 255).byte()] * 2, [(720, 990), (700, 1000)], (720, 1000), [0.0] * 3, [1.0] * 3
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_any_number_of_threads_gives_the_same_bits(name):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            result = CALLS[name]()
            results.append(result if isinstance(result, tuple) else (result,))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
