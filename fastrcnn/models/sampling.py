"""Which boxes of an image enter the loss: MMDetection's samplers.

`sample` picks positives first, then negatives up to `num`. RandomSampler draws both at random, OHEMSampler takes those
with the highest loss (Shrivastava et al., 2016), InstanceBalancedPosSampler and IoUBalancedNegSampler (Libra R-CNN, Pang
et al., 2019) spread the draw over the ground-truth boxes and over the IoU; CombinedSampler names one for each side.
`sample_batch` is RandomSampler for a whole batch, in static shapes; `sample_images` takes it where it can. Under `seeded`
the draw of an image depends on its own seed alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

OPTIONS = dict(num=512, pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=True)
# type -> the options that are its alone
PICKS = {
    "RandomSampler": set(),
    "OHEMSampler": set(),
    "InstanceBalancedPosSampler": set(),
    "IoUBalancedNegSampler": {"floor_thr", "floor_fraction", "num_bins"},
}


def _choose(indices: Tensor, count: int) -> Tensor:
    if len(indices) <= count:
        return indices
    return indices[torch.randperm(len(indices))[:count].to(indices.device)]


def _filled(chosen: Tensor, candidates: Tensor, count: int) -> Tensor:
    """`chosen`, completed at random from the other candidates."""
    if len(chosen) >= count:
        return chosen
    others = candidates[~torch.isin(candidates, chosen)]
    return torch.cat([chosen, _choose(others, count - len(chosen))])


def _instance_balanced(candidates: Tensor, count: int, matches: Tensor) -> Tensor:
    """About the same number of positives for each ground-truth box."""
    if len(candidates) <= count:
        return candidates
    owners = matches[candidates]
    each = int(round(count / len(owners.unique())) + 1)
    chosen = torch.cat([_choose(candidates[owners == owner], each) for owner in owners.unique()])
    return _choose(_filled(chosen, candidates, count), count)


def _iou_balanced(
    candidates: Tensor, count: int, max_iou: Tensor, floor_thr: float = -1, floor_fraction: float = 0, num_bins: int = 3
) -> Tensor:
    """Negatives spread evenly over num_bins intervals of IoU above floor_thr, floor_fraction of them from below it."""
    if len(candidates) <= count:
        return candidates
    iou = max_iou[candidates]
    if floor_thr > 0:
        low, high = candidates[(iou >= 0) & (iou < floor_thr)], candidates[iou >= floor_thr]
    elif floor_thr == 0:
        low, high = candidates[iou == 0], candidates[iou > 0]
    else:
        low, high, floor_thr = candidates[:0], candidates[iou > -1], 0.0
    from_high = int(count * (1 - floor_fraction))
    chosen = high
    if len(high) > from_high:
        width = (max_iou.max() - floor_thr) / num_bins
        parts = []
        for i in range(num_bins):
            inside = (max_iou[high] >= floor_thr + i * width) & (max_iou[high] < floor_thr + (i + 1) * width)
            parts.append(_choose(high[inside], int(from_high / num_bins)))
        chosen = _filled(torch.cat(parts), high, from_high)
    chosen = torch.cat([_choose(low, count - len(chosen)), chosen])
    return _filled(chosen, candidates, count)


def _hard(candidates: Tensor, count: int, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
    if len(candidates) <= count:
        return candidates
    return candidates[loss_of(candidates).topk(count).indices]


def _pick(kind: str, options: dict, candidates, count, matches, max_iou, loss_of) -> Tensor:
    if kind == "RandomSampler":
        picked = _choose(candidates, count)
    elif kind == "OHEMSampler":
        if loss_of is None:
            raise ValueError("sampler: OHEMSampler ranks by the RoI head's loss and cannot serve an RPN")
        picked = _hard(candidates, count, loss_of)
    elif kind == "InstanceBalancedPosSampler":
        picked = _instance_balanced(candidates, count, matches)
    else:
        picked = _iou_balanced(candidates, count, max_iou, **options)
    return picked.sort().values


class Sampler(NamedTuple):
    """A sampler's settings: how many boxes an image, of them positives, negatives for a positive (below 0: any number),
    whether ground truth joins the proposals, and what picks each side, a type with its options."""

    num: int
    pos_fraction: float
    neg_pos_ub: float
    add_gt_as_proposals: bool
    pos: dict
    neg: dict


def build_sampler(cfg: dict) -> Sampler:
    """MMDetection's dict as settings that nobody checks again. Raises ValueError for an unknown type or option."""
    rules = {**OPTIONS, "type": "RandomSampler", **cfg}
    kind = rules.pop("type")
    shared = {k: rules.pop(k) for k in OPTIONS}
    sides = {"type": kind}, {"type": kind, **rules}
    if kind == "CombinedSampler":
        sides = tuple(rules.pop(side, {"type": "RandomSampler"}) for side in ("pos_sampler", "neg_sampler"))
        if rules:
            raise ValueError(f"sampler: unknown options {sorted(rules)} of {kind}")
    elif kind == "IoUBalancedNegSampler":
        sides = {"type": "RandomSampler"}, sides[1]
    elif kind == "InstanceBalancedPosSampler":
        sides = sides[0], {"type": "RandomSampler", **rules}
    for side in sides:
        unknown = set(side) - {"type"} - PICKS.get(side["type"], set())
        if side["type"] not in PICKS:
            raise ValueError(f"sampler: unknown type {side['type']!r}, expected one of {(*PICKS, 'CombinedSampler')}")
        if unknown:
            raise ValueError(f"sampler: unknown options {sorted(unknown)} of {side['type']}")
    return Sampler(**shared, pos=sides[0], neg=sides[1])


def sample(
    matches: Tensor, sampler: Sampler, max_iou: Tensor | None = None, loss_of: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Indices of the sampled positives and negatives of one image, each in ascending order.

    matches [N]: ground-truth index, -1 background, -2 ignored; max_iou [N]; loss_of: the loss of given indices, for OHEM.
    At most num * pos_fraction positives; negatives fill up to num, and are at most neg_pos_ub times the positives where
    that is >= 0. Raises ValueError for OHEM without its loss.
    """

    def side(cfg: dict, wanted: Tensor, count: int) -> Tensor:
        options = {k: v for k, v in cfg.items() if k != "type"}
        return _pick(cfg["type"], options, wanted.nonzero()[:, 0], count, matches, max_iou, loss_of)

    positives = side(sampler.pos, matches >= 0, int(sampler.num * sampler.pos_fraction))
    most = sampler.num - len(positives)
    if sampler.neg_pos_ub >= 0:
        most = min(most, int(sampler.neg_pos_ub * max(1, len(positives))))
    return positives, side(sampler.neg, matches == -1, most)


_seeds: ContextVar[Sequence[int] | None] = ContextVar("seeds", default=None)


@contextmanager
def seeded(seeds: Sequence[int]) -> Iterator[None]:
    """RandomSampler draws for each image of a batch from its own seed, so that neither the other images of the batch nor
    the process that has it changes the draw."""
    token = _seeds.set(seeds)
    try:
        yield
    finally:
        _seeds.reset(token)


def _random_keys(matches: Tensor, front: int) -> Tensor:
    """A random number of [0, 1) for each box [B, N]. With seeds the first `front` columns, ground truth padded to the
    largest count of the batch, draw last: those behind get the same numbers in any batch."""
    seeds, (batch, n), device = _seeds.get(), matches.shape, matches.device
    if seeds is None or not batch:
        return torch.rand(batch, n, device=device)
    if len(seeds) != batch:
        raise ValueError(f"seeds: expected one for each of the {batch} images, got {len(seeds)}")
    generator = torch.Generator(device)
    keys = [torch.rand(n, generator=generator.manual_seed(seed), device=device) for seed in seeds]
    return torch.stack(keys).roll(front, 1)


def sample_batch(
    matches: Tensor, num: int, pos_fraction: float, neg_pos_ub: float = -1, front: int = 0
) -> tuple[Tensor, Tensor]:
    """RandomSampler for a batch: (indices [B, S] with S = min(num, N), how many positives and negatives [B, 2]).

    matches [B, N] and the limits as in `sample`; front: how many columns are ground truth that joined in front. A row holds
    the positives, then the negatives, each in ascending order, then -1. Nothing waits for the device.
    """
    n = matches.shape[1]
    keys, last = _random_keys(matches, front), 2.0
    # The smallest of independent random keys are a uniform draw without replacement, and so is any prefix of them.
    pos_keys, pos = torch.where(matches >= 0, keys, last).topk(min(int(num * pos_fraction), n), largest=False)
    neg_keys, neg = torch.where(matches == -1, keys, last).topk(min(num, n), largest=False)
    num_pos = (pos_keys < last).sum(1)
    most = num - num_pos
    if neg_pos_ub >= 0:
        most = torch.minimum(most, (neg_pos_ub * num_pos.clamp(min=1).double()).long())
    num_neg = torch.minimum((neg_keys < last).sum(1), most)
    drawn = torch.arange(neg.shape[1], device=neg.device) < num_neg[:, None]
    # One sort puts all in order: positives are their index, negatives follow from n on, and 2 n is nothing.
    places = torch.cat([torch.where(pos_keys < last, pos, 2 * n), torch.where(drawn, neg + n, 2 * n)], 1)
    places = places.sort(1).values[:, : min(num, n)]
    indices = torch.where(places < n, places, torch.where(places < 2 * n, places - n, -1))
    return indices, torch.stack([num_pos, num_neg], 1)


def sample_images(
    matches: Tensor,
    sampler: Sampler,
    max_iou: Tensor,
    loss_of: Callable[[int, Tensor], Tensor] | None = None,
    front: int = 0,
) -> tuple[Tensor, Tensor]:
    """(indices [B, S], counts [B, 2]) as `sample_batch` gives them, by any sampler. matches and max_iou [B, N]; loss_of: of
    (image, indices).

    RandomSampler does not wait for the device; every other one does, several times an image.
    """
    if all(side == {"type": "RandomSampler"} for side in (sampler.pos, sampler.neg)):
        return sample_batch(matches, sampler.num, sampler.pos_fraction, sampler.neg_pos_ub, front)
    losses = [loss_of and partial(loss_of, i) for i in range(len(matches))]
    picks = [sample(m, sampler, iou, loss) for m, iou, loss in zip(matches, max_iou, losses)]
    counts = torch.tensor([[len(side) for side in sides] for sides in picks], device=matches.device)
    return pad_sequence([torch.cat(sides) for sides in picks], True, -1), counts
