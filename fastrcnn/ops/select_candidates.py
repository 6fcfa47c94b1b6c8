"""The best scores above a threshold, of every image at once, with static shapes and no host synchronisation.

score > threshold makes a candidate; an image's max_candidates best are taken by descending score, equal scores in index
order, and what had no place is counted. A NaN is above nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrcnn.ops._bind import bind, declare
from fastrcnn.ops._checks import check_int, check_number, check_tensor, coordinates


def _op_reference(scores: Tensor, threshold: float, max_candidates: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values = coordinates(scores)
    above = values > threshold
    found = above.sum(1)
    values, indices = torch.where(above, values, -torch.inf).sort(dim=1, descending=True, stable=True)
    missing = max(max_candidates - scores.shape[1], 0)
    values, indices = (F.pad(t[:, :max_candidates], (0, missing)) for t in (values, indices))
    counts = found.clamp(max=max_candidates)
    beyond = torch.arange(max_candidates, device=scores.device) >= counts[:, None]
    return values.masked_fill(beyond, 0), indices.masked_fill(beyond, -1), counts, found


def _fake(scores, threshold, max_candidates):
    values = scores.new_empty(
        scores.shape[0], max_candidates, dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32
    )
    counts = scores.new_empty(scores.shape[0], dtype=torch.int64)
    return values, torch.empty_like(values, dtype=torch.int64), counts, torch.empty_like(counts)


declare("select_candidates", _op_reference, _fake)


def _select_candidates(
    op, scores: Tensor, threshold: float, max_candidates: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(scores [B, max_candidates], indices [B, max_candidates] int64, counts [B] int64, found [B] int64).

    scores [B, N], any floating dtype; threshold is compared in float32 (float64 for float64), as torch does. An image's
    first counts[b] rows are its candidates, best first; beyond them scores are 0 and indices -1. found[b] is how many
    candidates there were: more than max_candidates means that the lowest were left out. Not differentiable. Raises
    TypeError or ValueError naming the argument.
    """
    check_tensor("scores", scores, "B, N")
    rules = check_number("threshold", threshold), check_int("max_candidates", max_candidates, 0)
    with torch.no_grad():
        return op(scores, *rules)


select_candidates = bind(_select_candidates, torch.ops.fastrcnn.select_candidates.default, "select_candidates")
select_candidates_reference = bind(_select_candidates, _op_reference, "select_candidates_reference")
