"""Pascal VOC's average precision, of 2007 (eleven points) and since 2010 (the whole area)."""

import numpy as np

from fastrcnn.data.table import Truth
from fastrcnn.evaluation.coco import xywh
from fastrcnn.evaluation.overlap import best_overlap
from fastrcnn.evaluation.predict import Predictions


def voc_ap(
    truth: Truth, found: Predictions, num_classes: int, iou_threshold: float = 0.5, points: int | None = None
) -> np.ndarray:
    """AP float64 [num_classes] in percent; nan for a class without objects. Their mean is VOC's mAP.

    points: 11 for 2007's mean of the best precision at the recalls 0, 0.1 ... 1; None for the area under the precision
    curve made monotone. As in VOC's development kit a detection belongs to the object of its class that it overlaps most,
    and is wrong where a better one has that already, whatever else it overlaps (COCO gives it the next); where that object
    is crowd, which stands for `difficult`, it does not count. Boxes are continuous: one from 0 to 10 is 10 pixels wide.
    """
    groups = [column.images * num_classes + column.labels for column in (found, truth)]
    overlap, place = best_overlap(xywh(found.boxes), groups[0], truth.boxes, groups[1])
    rank = np.argsort(-found.scores, kind="stable")
    matched = rank[overlap[rank] >= iou_threshold]
    right, ignored = np.zeros(len(found), bool), np.zeros(len(found), bool)
    right[matched[np.unique(place[matched], return_index=True)[1]]] = True  # the best of those on one object
    ignored[matched] = truth.crowd[place[matched]]
    result = np.full(num_classes, np.nan)
    for label in range(num_classes):
        objects = np.count_nonzero((truth.labels == label) & ~truth.crowd)
        if objects:
            own = rank[(found.labels[rank] == label) & ~ignored[rank]]
            hits = np.cumsum(right[own])
            recall, precision = hits / objects, hits / np.arange(1, 1 + len(own))
            result[label] = 100 * _average(recall, precision, points)
    return result


def _average(recall: np.ndarray, precision: np.ndarray, points: int | None) -> float:
    best_from = np.maximum.accumulate(precision[::-1])[::-1]  # the best precision at this recall or a larger one
    if points is None:
        return float((np.diff(recall, prepend=0) * best_from).sum())
    # A recall of 3/10 is 0.3, whatever its last bit.
    reached = np.searchsorted(recall, np.linspace(0, 1, points) - 1e-9)
    return float(sum(best_from[i] for i in reached if i < len(recall)) / points)
