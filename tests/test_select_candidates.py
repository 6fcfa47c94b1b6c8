"""select_candidates against its reference, torch.topk and cases worked out by hand."""

import math

import pytest
import torch
from operator_cases import spread_scores

from fastrcnn.ops import select_candidates, select_candidates_reference

NAN, INF = math.nan, math.inf
either = pytest.mark.parametrize("function", [select_candidates, select_candidates_reference])


@either
def test_the_best_above_the_threshold_by_hand(device, function):
    scores = torch.tensor([[0.3, 0.9, NAN, 0.5, 0.9, -INF], [0.1, 0.3, 0.2, 0.0, -1, NAN]], device=device)
    values, indices, counts, found = function(scores, 0.3, 3)  # 0.3 itself is not above
    assert indices.tolist() == [[1, 4, 3], [-1, -1, -1]]
    torch.testing.assert_close(values, torch.tensor([[0.9, 0.9, 0.5], [0, 0, 0]], device=device))
    assert counts.tolist() == found.tolist() == [3, 0]
    values, indices, counts, found = function(scores, -0.5, 2)
    assert indices.tolist() == [[1, 4], [1, 2]]  # of equal scores the first
    assert counts.tolist() == [2, 2] and found.tolist() == [4, 4]


@either
def test_infinities_zeros_and_more_places_than_scores(device, function):
    scores = torch.tensor([[-0.0, INF, 0.0, -INF]], device=device)
    values, indices, counts, _ = function(scores, -1.0, 6)
    assert indices.tolist() == [[1, 0, 2, -1, -1, -1]] and values.tolist() == [[INF, 0, 0, 0, 0, 0]]
    assert counts.tolist() == [3]


# The CUDA kernel sorts up to 16,384 scores whole; of more a radix select leaves candidates. The CPU's blocks have 1,024.
@pytest.mark.parametrize("batch, n", [(0, 5), (2, 0), (3, 1), (2, 1024), (2, 4097), (1, 16384), (2, 16385), (2, 40000)])
@pytest.mark.parametrize("most", [0, 1, 100, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sizes_and_ties_equal_the_reference(device, need_kernel, batch, n, most, dtype):
    need_kernel("select_candidates", device, dtype)
    scores = spread_scores(batch, n).to(device, dtype)
    coarse = (scores * 20).round() / 20  # many equal ones
    for values in (scores, coarse, torch.where(coarse > 0.9, NAN, coarse)):
        for threshold in (-1.0, 0.5, 0.99, 2.0):
            answers = zip(
                select_candidates(values, threshold, most), select_candidates_reference(values, threshold, most)
            )
            for actual, expected in answers:
                assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
                assert torch.equal(actual, expected)


def test_distinct_scores_equal_topk(device):
    scores = spread_scores(3, 5000).to(device)
    values, indices, counts, found = select_candidates(scores, 0.2, 700)
    expected = scores.topk(700)
    assert torch.equal(values, expected.values) and torch.equal(indices, expected.indices)
    assert counts.tolist() == [700] * 3 and torch.equal(found, (scores > 0.2).sum(1))
