"""The random sampler of both stages (MMDetection's RandomSampler)."""

import torch
from torch import Tensor

SAMPLER = dict(type="RandomSampler", num=512, pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=True)


def _choose(indices: Tensor, count: int) -> Tensor:
    if len(indices) <= count:
        return indices
    return indices[torch.randperm(len(indices))[:count].to(indices.device)]


def sample(matches: Tensor, sampler: dict) -> tuple[Tensor, Tensor]:
    """Indices of the sampled positives and negatives of one image, each in ascending order.

    matches [N]: ground-truth index, -1 background, -2 ignored. At most num * pos_fraction positives; negatives fill up to
    num, and are at most neg_pos_ub times the positives where that is >= 0.
    """
    rules = {**SAMPLER, **sampler}
    if set(rules) != set(SAMPLER) or rules["type"] != "RandomSampler":
        raise ValueError(f"sampler: expected RandomSampler with {sorted(SAMPLER)}, got {sampler}")
    positives = _choose((matches >= 0).nonzero()[:, 0], int(rules["num"] * rules["pos_fraction"]))
    most = rules["num"] - len(positives)
    if rules["neg_pos_ub"] >= 0:
        most = min(most, int(rules["neg_pos_ub"] * max(1, len(positives))))
    negatives = _choose((matches == -1).nonzero()[:, 0], most)
    return positives.sort().values, negatives.sort().values
