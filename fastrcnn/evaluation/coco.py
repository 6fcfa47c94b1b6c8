"""COCO's box AP, computed by hotcoco (the same numbers as pycocotools, in a fraction of the time)."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from fastrcnn.data import DetectionDataset
from fastrcnn.data.table import Truth
from fastrcnn.evaluation.predict import Predictions, opened

AREAS = {"s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}
MAX_DETS = (1, 10, 100)


def require_hotcoco():
    """hotcoco, or ImportError that says how to get it. To be called before anything takes long."""
    try:
        import hotcoco
    except ImportError:
        raise ImportError("COCO evaluation needs hotcoco: pip install 'fastrcnn[eval]'") from None
    return hotcoco


def _columns(rows: Sequence[tuple]) -> Truth:
    images, labels, boxes, areas, crowd = zip(*rows) if rows else [()] * 5
    return Truth(np.array(images, np.int64), np.array(labels, np.int64), np.array(boxes, np.float64).reshape(-1, 4),
                 np.array(areas, np.float64), np.array(crowd, bool))  # fmt: skip


def truth_of_targets(targets: Sequence[dict], num_classes: int | None, places: Sequence[int] | None = None) -> Truth:
    """As `DetectionDataset.truth`, of targets: boxes [N, 4] xyxy pixels, labels [N] from 0, optional ignore_boxes [R, 4],
    which hold for every class, since they have none. num_classes None: everything is one class, and labels are not asked
    for."""
    rows = []
    for place, target in zip(range(len(targets)) if places is None else places, targets):
        labels = [0] * len(target["boxes"]) if num_classes is None else target["labels"].tolist()
        if any(not 0 <= label < (num_classes or 1) for label in labels):
            raise ValueError(f"targets[{place}]: expected labels in 0..{num_classes - 1}, got {sorted(set(labels))}")
        found = [(b, label, 0) for b, label in zip(xywh(target["boxes"]).tolist(), labels)]
        ignored = xywh(target.get("ignore_boxes", torch.zeros(0, 4))).tolist()
        found += [(b, label, 1) for b in ignored for label in range(num_classes or 1)]
        rows += [(place, label, b, b[2] * b[3], crowd) for b, label, crowd in found]
    return _columns(rows)


def xywh(boxes) -> np.ndarray:
    """float64 [N, 4] x, y, width, height of xyxy boxes."""
    boxes = torch.as_tensor(boxes).cpu().double().numpy().reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)


def coco_eval(truth: Truth, found: Predictions, ids: Sequence, categories: int, **params):
    """hotcoco's COCOeval, accumulated. ids: of `found.pictures`, whose order decides between equal scores; categories: the
    number of classes; params: hotcoco's."""
    hotcoco = require_hotcoco()
    # Its ids are numbers: ours count from 1 in the order in which pycocotools takes the images.
    order = sorted(range(len(ids)), key=lambda i: (isinstance(ids[i], str), ids[i]))
    number = np.zeros(found.pictures.max(initial=0) + 1, np.int64)
    number[found.pictures[order]] = np.arange(1, len(ids) + 1)
    images = [dict(id=n, width=1, height=1, file_name=str(n)) for n in range(1, len(ids) + 1)]
    coco = hotcoco.COCO.from_arrays(images, [dict(id=c, name=str(c)) for c in range(categories)], number[truth.images],
                                    truth.labels, truth.boxes, area=truth.areas, iscrowd=truth.crowd)  # fmt: skip
    rows = np.column_stack([number[found.images], xywh(found.boxes), found.scores, found.labels])
    evaluation = hotcoco.COCOeval(coco, coco.load_res(rows.astype(np.float64)), "bbox")
    for name, value in params.items():
        setattr(evaluation.params, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that are not a detection benchmark's
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


class Judged(NamedTuple):
    """An accumulated COCOeval and what it was made of."""

    evaluation: object
    truth: Truth
    found: Predictions
    class_names: list[str]
    max_dets: list[int]
    area_names: list[str]

    def scores(self, label: int | None = None) -> dict[str, float]:
        """COCO's twelve numbers in percent, of all classes or of one; nan where there is no object."""
        kept = slice(None) if label is None else [label]
        precision = np.asarray(self.evaluation.eval["precision"])[
            :, :, kept
        ]  # [thresholds, recalls, classes, areas, max_dets]
        recall = np.asarray(self.evaluation.eval["recall"])[:, kept]  # [thresholds, classes, areas, max_dets]
        at = {name: np.isclose(self.evaluation.params.iou_thrs, t) for name, t in (("AP50", 0.5), ("AP75", 0.75))}
        areas = list(enumerate(self.area_names, 1))
        return {
            "AP": _percent(precision[..., 0, -1]),
            **{name: _percent(precision[..., 0, -1][mask]) for name, mask in at.items()},
            **{f"AP{name}": _percent(precision[..., a, -1]) for a, name in areas},
            **{f"AR{n}": _percent(recall[..., 0, m]) for m, n in enumerate(self.max_dets)},
            **{f"AR{name}": _percent(recall[..., a, -1]) for a, name in areas},
        }


def _percent(values: np.ndarray) -> float:
    values = values[values > -1]  # which stands for: no object
    return float(values.mean() * 100) if len(values) else math.nan


def check_settings(max_dets, areas) -> None:
    if not max_dets or not all(isinstance(n, int) and n > 0 for n in max_dets):
        raise ValueError(f"max_dets: expected whole numbers from 1 up, got {max_dets!r}")
    for name, bounds in areas.items():
        if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1] or name[:1].isdigit() or name == "":
            raise ValueError(f"areas: expected a name and (smallest, largest) square pixels, got {name!r}: {bounds!r}")


def judge(
    truth: Truth,
    found: Predictions,
    ids: Sequence,
    class_names: Sequence[str],
    max_dets: Sequence[int] = MAX_DETS,
    areas: Mapping[str, tuple[float, float]] = AREAS,
) -> Judged:
    """Detections compared with objects at COCO's ten IoUs; arguments as in `measure` and `coco_eval`."""
    check_settings(max_dets, areas)
    max_dets = sorted(set(max_dets))
    params = dict(max_dets=max_dets, area_rng=[[0, 1e10], *([float(low), float(high)] for low, high in areas.values())],
                  area_rng_lbl=["all", *areas])  # fmt: skip
    evaluation = coco_eval(truth, found, ids, len(class_names), **params)
    return Judged(evaluation, truth, found, list(class_names), max_dets, list(areas))


def judge_dataset(dataset, found: Predictions, max_dets: Sequence[int] = MAX_DETS, areas=AREAS) -> Judged:
    """`judge` of what was found on a dataset, whose file, or else the targets, are the truth."""
    base, places = opened(dataset)
    found = found.on(places)
    if isinstance(base, DetectionDataset):
        ids, names = [base.image_ids[p] for p in places], base.class_names
        return judge(base.truth(places), found, ids, names, max_dets, areas)
    truth = truth_of_targets(found.targets, len(found.class_names), places)
    return judge(truth, found, places, found.class_names, max_dets, areas)


def evaluate_coco(targets: Sequence[dict], results: Sequence[dict], num_classes: int) -> dict[str, float]:
    """COCO's twelve numbers in percent (nan where there is no object of the size).

    targets: dicts boxes [N, 4] xyxy pixels, labels [N], optional ignore_boxes [R, 4]; results: dicts boxes, scores, labels;
    all labels counted from 0. One of each an image, in the same order. Raises ValueError naming the target, ImportError.
    """
    if len(targets) != len(results):
        raise ValueError(f"results: expected one for each of the {len(targets)} targets, got {len(results)}")
    names, places = [str(i) for i in range(num_classes)], range(len(targets))
    return judge(truth_of_targets(targets, num_classes), Predictions.of(results), places, names).scores()
