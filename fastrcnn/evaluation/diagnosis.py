"""Where a detector fails: confusion between classes, TIDE's kinds of errors, scores that promise too much, pictures that
went wrong. hotcoco computes most of it, from the same comparison as AP."""

from typing import NamedTuple

import numpy as np

from fastrcnn.data.table import Truth
from fastrcnn.evaluation.coco import Judged, coco_eval, xywh
from fastrcnn.evaluation.overlap import best_overlap

IOU = 0.5  # from which on a detection is on an object
STEPS = 100  # of scores between 0 and 1
KINDS = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")


def precision_recall(judged: Judged, iou: float, label: int | None = None) -> np.ndarray:
    """Precision [101] at the recalls 0, 0.01 ... 1, the mean over the classes that have objects, or of one class; nan where
    there are none. iou: one of COCO's thresholds."""
    thresholds = np.asarray(judged.evaluation.params.iou_thrs)
    curves = np.asarray(judged.evaluation.eval["precision"])[np.abs(thresholds - iou).argmin(), :, :, 0, -1]
    curves = curves[:, curves[0] > -1] if label is None else curves[:, [label]]
    return curves.mean(1) if curves.size and curves.min() > -1 else np.full(len(curves), np.nan)


class ByScore(NamedTuple):
    """How right detections of a score are at IoU 0.5, in STEPS steps of the score from 0 to 1."""

    score: np.ndarray  # lower edges of the steps
    right: np.ndarray  # detections in each step, on an object of their class
    wrong: np.ndarray
    objects: int

    @property
    def precision(self) -> np.ndarray:
        """Of the detections from each step up; nan where there are none."""
        right, all_ = (np.cumsum(column[::-1])[::-1] for column in (self.right, self.right + self.wrong))
        return np.divide(right, all_, out=np.full(len(all_), np.nan), where=all_ > 0)

    @property
    def recall(self) -> np.ndarray:
        return np.cumsum(self.right[::-1])[::-1] / max(self.objects, 1)

    @property
    def f1(self) -> np.ndarray:
        both = self.precision + self.recall
        return np.nan_to_num(np.divide(2 * self.precision * self.recall, both, out=np.zeros(len(both)), where=both > 0))

    @property
    def best(self) -> float:
        """The score threshold with the best F1, the middle one of equals."""
        equal = np.flatnonzero(self.f1 >= self.f1.max() - 1e-12)
        return float(self.score[equal[len(equal) // 2]])


def by_score(judged: Judged) -> ByScore:
    bins = judged.evaluation.calibration(STEPS, IOU)["bins"]
    counts = np.array([b["count"] for b in bins])
    right = np.rint(counts * [b["avg_accuracy"] for b in bins]).astype(np.int64)
    return ByScore(np.arange(STEPS) / STEPS, right, counts - right, np.count_nonzero(~judged.truth.crowd))


def calibration(judged: Judged) -> tuple[float, np.ndarray]:
    """The expected calibration error, and [bins, 3] of tenths of the scores: mean score, share of right detections at IoU
    0.5, how many. The error is the mean distance of the first two, each detection of the same weight."""
    found = judged.evaluation.calibration(10, IOU)
    bins = [(b["avg_confidence"], b["avg_accuracy"], b["count"]) for b in found["bins"] if b["count"]]
    return float(found["ece"]), np.array(bins).reshape(-1, 3)


def tide(judged: Judged) -> dict[str, dict[str, float]]:
    """What AP50 would gain, in percent, if one kind of error were mended, and how many errors of it there are, as TIDE
    (Bolya et al., 2020) counts them: wrong class, badly placed, both, a second box on one object, on background, missed."""
    found = judged.evaluation.tide_errors(IOU)
    return {kind: dict(dAP=100 * found["delta_ap"][kind], count=found["counts"][kind]) for kind in KINDS}


def at_score(judged: Judged, score: float) -> Judged:
    """The same with the detections from a score up, and without crowd regions and what only they explain: that counts
    neither for nor against."""
    crowd, found = judged.truth.crowd, judged.found.kept(judged.found.scores >= score)
    crowds, objects = (Truth(*(column[mask] for column in judged.truth)) for mask in (crowd, ~crowd))
    boxes = xywh(found.boxes)
    covered, _ = best_overlap(boxes, found.images, crowds.boxes, crowds.images, of_box=True)
    overlap, _ = best_overlap(boxes, found.images, objects.boxes, objects.images)
    found = found.kept((covered < IOU) | (overlap >= IOU))
    evaluation = coco_eval(
        objects, found, range(len(found.pictures)), len(judged.class_names), max_dets=judged.max_dets
    )
    return judged._replace(evaluation=evaluation, truth=objects, found=found)


def confusion(sure: Judged) -> np.ndarray:
    """int64 [C + 1, C + 1] of what `at_score` gave: objects by their class (rows) and that of the detection on them
    (columns) at IoU 0.5, the surest detection first; the last column counts what was missed, the last row what is on no
    object, or on one that is taken."""
    return np.asarray(sure.evaluation.confusion_matrix(IOU)["matrix"]).astype(np.int64)


class Looked(NamedTuple):
    """One picture's detections and what was missed there; boxes [N, 4] xyxy pixels."""

    picture: int  # place in the dataset
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    right: np.ndarray  # bool [N]: on an object of its class, at IoU 0.5
    missed: np.ndarray  # [M, 4]: the objects without such a detection
    missed_labels: np.ndarray


def worst_pictures(sure: Judged, count: int) -> tuple[list[Looked], list[dict]]:
    """Of what `at_score` gave: the pictures with the most errors, wrong detections and missed objects together, worst
    first, none without an error; and the detections that make an annotation doubtful, the surest first: dicts picture,
    score, found, annotated (class names, None where nothing is annotated), iou."""
    truth, found, names = sure.truth, sure.found, sure.class_names
    told = sure.evaluation.image_diagnostics(IOU)
    # Its ids count from 1.
    right = np.array([told["dt_status"].get(n) == "tp" for n in range(1, len(found) + 1)], bool)
    missed = np.array([told["gt_status"].get(n) == "fn" for n in range(1, len(truth.labels) + 1)], bool)
    errors = np.bincount(np.concatenate([found.images[~right], truth.images[missed]]))
    worst = [place for place in np.argsort(-errors, kind="stable")[:count].tolist() if errors[place]]
    looked = []
    for place in worst:
        own, lost = found.images == place, missed & (truth.images == place)
        corners = truth.boxes[lost]
        corners[:, 2:] += corners[:, :2]
        looked.append(Looked(place, found.boxes[own], found.scores[own], found.labels[own], right[own],
                             corners, truth.labels[lost]))  # fmt: skip
    suspects = [dict(picture=int(found.pictures[e["image_id"] - 1]), score=e["dt_score"], found=names[e["dt_category_id"]],
                     annotated=None if e["gt_category_id"] is None else names[e["gt_category_id"]], iou=e["iou"])
                for e in sorted(told["label_errors"], key=lambda e: -e["dt_score"])[:count]]  # fmt: skip
    return looked, suspects
