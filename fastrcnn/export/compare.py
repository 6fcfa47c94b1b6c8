"""Whether an exported file finds what the detector finds, in pictures of several sizes and batches."""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastrcnn.data.rendered_cells import render_cells
from fastrcnn.inference import Detector
from fastrcnn.models.base_detector import BaseDetector

PIXELS, SCORE = 0.05, 1e-3  # at most between two programs of one precision
ROUNDED = 2.0, 0.05  # and between float32 and a lower precision, of objects that float32 is sure of
SURE = 0.5
CASES = ((1, 480, 640), (2, 600, 451), (1, 333, 500))  # images, height, width


def cases(model: BaseDetector, dynamic: bool) -> tuple:
    """Those that a program takes: a static one only as many pixels as the model sees at most."""
    p = model.data_preprocessor
    return CASES if dynamic else ((1, p.min_size, p.max_size),)


class Difference(NamedTuple):
    """What a comparison found: pictures and objects compared, the largest differences of boxes in pixels and of scores."""

    images: int
    objects: int
    pixels: float
    score: float


def score_threshold(model: BaseDetector) -> float:
    """The score above which the model reports; 0 of a stand-alone RPN, which reports all that NMS leaves."""
    head = getattr(model, "roi_head", None) or getattr(model, "bbox_head", None)
    return 0.0 if head is None else head.test_cfg["score_thr"]


def _partners(these: dict, those: dict, pixels: float, score: float) -> tuple[Tensor, Tensor]:
    """Of each of these: (distance in pixels to the nearest of those that may be the same object, how much their scores
    differ). Infinite where there is none."""
    away = (these["boxes"][:, None] - those["boxes"][None]).abs().amax(-1)
    apart = (these["scores"][:, None] - those["scores"][None]).abs()
    other = (these["labels"][:, None] != those["labels"][None]) | (apart > score)
    away = torch.cat([away.masked_fill(other, torch.inf), torch.full((len(away), 1), torch.inf)], 1)
    nearest, which = away.min(1)
    apart = torch.cat([apart, torch.zeros(len(apart), 1)], 1)
    return nearest, apart.gather(1, which[:, None])[:, 0]


def difference(found: dict, expected: dict, floor: float, most: int, rounded: bool = False) -> Difference:
    """How far two programs' objects in a picture are apart; dicts of boxes [N, 4], scores [N], labels [N].

    floor: the score threshold, most: how many objects there can be. Objects that the last digits of a score may put on
    either side of these two limits need no partner. Raises ValueError naming the first object that lacks one, and for boxes
    or scores that are no finite numbers.
    """
    pixels, score = ROUNDED if rounded else (PIXELS, SCORE)
    result = Difference(1, 0, 0.0, 0.0)
    for objects, whose in ((expected, "the model's"), (found, "its")):
        if not all(bool(objects[key].isfinite().all()) for key in ("boxes", "scores")):
            raise ValueError(f"{whose} boxes or scores are no finite numbers")
    for these, those, what in ((expected, found, "lacks"), (found, expected, "has besides")):
        scores = these["scores"]
        if bool((scores[1:] > scores[:-1] + SCORE).any()):
            raise ValueError("its objects do not come by descending score")
        last = float(scores[-1]) if len(scores) >= most else floor
        needed = scores > (SURE + score if rounded else last + score)
        nearest, apart = _partners(these, those, pixels, score)
        alone = (needed & ~(nearest <= pixels)).nonzero()[:, 0].tolist()
        if alone:
            k = alone[0]
            box = [round(x, 2) for x in these["boxes"][k].tolist()]
            raise ValueError(f"it {what} label {int(these['labels'][k])} with score {scores[k]:.4f} at {box}")
        if needed.any():
            most_apart = max(result.pixels, float(nearest[needed].max())), max(result.score, float(apart[needed].max()))
            result = Difference(1, max(result.objects, int(needed.sum())), *most_apart)
    return result


def pictures(images: int, height: int, width: int) -> Tensor:
    """uint8 [images, 3, height, width], rendered."""
    rendered = [render_cells(100 * height + i, height, width)[0] for i in range(images)]
    return torch.from_numpy(np.stack(rendered)).permute(0, 3, 1, 2).contiguous()


def compare(
    run: Callable[[Tensor], Sequence[Tensor]], detector: Detector, precision: str, cases: Sequence = CASES
) -> Difference:
    """The largest differences between an exported program and the detector's own model, float32 and eager.

    run: images uint8 [B, 3, H, W] -> boxes [B, D, 4], scores [B, D], labels [B, D], counts [B]. Raises ValueError where
    they do not find the same; warns where there was no object to compare.
    """
    model, result = detector.model, Difference(0, 0, 0.0, 0.0)
    floor = score_threshold(model)
    for case in cases:
        images = pictures(*case)
        boxes, scores, labels, counts = (torch.as_tensor(x) for x in run(images))
        with torch.inference_mode():
            expected = model(list(images))
        for i, one in enumerate(expected):
            one = {**one, "labels": one["labels"] - model.label_offset}
            n = int(counts[i])
            found = dict(boxes=boxes[i, :n].float(), scores=scores[i, :n].float(), labels=labels[i, :n])
            try:
                new = difference(found, one, floor, boxes.shape[1], precision != "fp32")
            except ValueError as error:
                height, width = case[1:]
                said = f"picture {i} of {case[0]}, {width} x {height} pixels: {error}"
                raise ValueError(f"the exported program differs from the model: {said}") from None
            sums = result.images + 1, result.objects + new.objects
            result = Difference(*sums, max(result.pixels, new.pixels), max(result.score, new.score))
    if result.objects == 0:
        sure = "is sure of" if precision != "fp32" else "finds"
        warnings.warn(f"the model {sure} no object in the pictures rendered to compare in: the file was run, but what it "
                      "finds was not checked", stacklevel=2)  # fmt: skip
    return result
