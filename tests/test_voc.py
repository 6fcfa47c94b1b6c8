"""evaluation/voc.py and overlap.py against the development kit's rules written out as loops, and worked out by hand."""

import math

import numpy as np
import pytest
import torch

from fastrcnn.evaluation import overlap
from fastrcnn.evaluation.coco import truth_of_targets
from fastrcnn.evaluation.predict import Predictions
from fastrcnn.evaluation.voc import voc_ap

A, B, C = [10.0, 10, 60, 60], [100.0, 20, 220, 160], [300.0, 300, 310, 312]


def target(*boxes, labels=None, difficult=()):
    labels = [0] * len(boxes) if labels is None else labels
    return dict(boxes=torch.tensor(boxes).reshape(-1, 4), labels=torch.tensor(labels, dtype=torch.int64),
                ignore_boxes=torch.tensor(difficult).reshape(-1, 4))  # fmt: skip


def found(*boxes, scores=None, labels=None):
    scores = torch.linspace(0.9, 0.5, len(boxes)) if scores is None else torch.tensor(scores)
    return dict(target(*boxes, labels=labels), scores=scores)


def ap(targets, results, classes=1, **options):
    return voc_ap(truth_of_targets(targets, classes), Predictions.of(results), classes, **options)


def test_by_hand():
    # Right, wrong, right: precision 1 up to recall 1/2, and 2/3 up to 1.
    targets, results = [target(A, B)], [found(A, C, B)]
    assert ap(targets, results) == pytest.approx(100 * (1 / 2 + 2 / 3 / 2))
    assert ap(targets, results, points=11) == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)
    # A recall of 3/10 reaches the fourth of the eleven points.
    boxes = [[20.0 * i, 0, 20 * i + 10, 10] for i in range(10)]
    assert ap([target(*boxes)], [found(*boxes[:3])], points=11) == pytest.approx(100 * 4 / 11)
    assert ap([target(A)], [found([10.0, 10, 60, 35])])[0] == 100  # an IoU of just 0.5 is enough
    assert ap([target(A)], [found([10.0, 10, 60, 34.9])])[0] == 0
    assert ap([target(A)], [found()])[0] == 0 and math.isnan(ap([target()], [found(A)])[0])


def test_classes_and_pictures_are_kept_apart():
    assert ap([target(A, B, labels=[0, 1])], [found(A, B, labels=[1, 0])], 2).tolist() == [0, 0]
    assert ap([target(A), target(B)], [found(B), found(A)]).tolist() == [0]
    assert ap([target(A), target(B)], [found(A), found(B)]).tolist() == [100]


def test_what_a_better_detection_has_is_not_given_twice():
    """The second detection overlaps the taken object most: wrong, though COCO would give it the free one."""
    near, free = [10.0, 10, 60, 58], [10.0, 10, 60, 70]
    assert ap([target(A, free)], [found(A, near)])[0] == pytest.approx(50)


def test_difficult_objects_count_neither_for_nor_against():
    assert ap([target(A, difficult=[B])], [found(B, B, A)])[0] == pytest.approx(100)
    assert ap([target(A)], [found(B, B, A)])[0] == pytest.approx(100 / 3)


def iou(a, b):
    w, h = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    inter = max(w, 0) * max(h, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def kit(targets, results, label, points):
    """The development kit's evaluation of a class, detection by detection."""
    objects = [[b for b, c in zip(t["boxes"].tolist(), t["labels"].tolist()) if c == label] for t in targets]
    difficult = [t["ignore_boxes"].tolist() for t in targets]
    detections = []
    for i, r in enumerate(results):
        rows = zip(r["scores"].tolist(), r["boxes"].tolist(), r["labels"].tolist())
        detections += [(score, i, box) for score, box, c in rows if c == label]
    taken, hits = set(), []
    for _, i, box in sorted(detections, key=lambda d: -d[0]):
        every = [(iou(box, b), n) for n, b in enumerate(objects[i] + difficult[i])]
        best, n = max(every, default=(0, 0), key=lambda pair: (pair[0], -pair[1]))
        if best >= 0.5 and n >= len(objects[i]):
            continue
        hits.append(best >= 0.5 and (i, n) not in taken)
        taken.add((i, n) if best >= 0.5 else None)
    total, right = sum(map(len, objects)), 0
    curve = []
    for n, hit in enumerate(hits, 1):
        right += hit
        curve.append((right / total, right / n))
    best_from = lambda r: max((p for recall, p in curve if recall >= r - 1e-9), default=0)  # noqa: E731
    if points:
        return 100 * sum(best_from(k / 10) for k in range(11)) / 11
    return 100 * sum(best_from((k + 1) / total) for k in range(total)) / total


@pytest.mark.parametrize("block", [1 << 16, 7])
@pytest.mark.parametrize("points", [None, 11])
def test_random_pictures_agree_with_the_development_kit(monkeypatch, block, points):
    monkeypatch.setattr(overlap, "BLOCK", block)
    rng = np.random.default_rng(3)
    targets, results = [], []
    for _ in range(12):
        corner, side = rng.uniform(0, 200, (rng.integers(1, 8), 2)), rng.uniform(10, 80, 2)
        boxes = np.concatenate([corner, corner + side], 1).astype(np.float32)
        near = (boxes.repeat(4, 0) + rng.normal(0, 6, (4 * len(boxes), 4))).astype(np.float32)
        labels = rng.integers(0, 2, len(boxes))
        hard = rng.random(len(boxes)) < 0.2
        targets.append(target(*boxes[~hard].tolist(), labels=labels[~hard].tolist(), difficult=boxes[hard].tolist()))
        given = np.where(rng.random(len(near)) < 0.8, labels.repeat(4), 1 - labels.repeat(4))
        results.append(found(*near.tolist(), scores=rng.random(len(near)).round(2).tolist(), labels=given.tolist()))
    expected = [kit(targets, results, label, points) for label in (0, 1)]
    assert all(10 < value < 95 for value in expected)
    assert ap(targets, results, 2, points=points) == pytest.approx(expected)


def test_the_largest_overlap_is_within_the_group():
    boxes, groups = (
        np.array([[0, 0, 10, 10], [0, 0, 10, 10], [5, 0, 10, 10], [0, 0, 0, 0]], float),
        np.array([4, 7, 9, 4]),
    )
    others, other_groups = np.array([[0, 0, 10, 5], [0, 0, 5, 20], [0, 0, 10, 10]], float), np.array([4, 4, 9])
    best, place = overlap.best_overlap(boxes, groups, others, other_groups)
    assert best == pytest.approx([1 / 2, 0, 1 / 3, 0]) and place.tolist() == [0, -1, 2, 0]
    covered, _ = overlap.best_overlap(boxes, groups, others, other_groups, of_box=True)
    assert covered == pytest.approx([0.5, 0, 0.5, 0])
    assert overlap.best_overlap(boxes[:0], groups[:0], others, other_groups)[1].tolist() == []
