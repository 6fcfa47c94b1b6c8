"""Average recall of class-agnostic proposals, as COCO defines it and MMDetection's `proposal` metric prints it."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastrcnn.data import DetectionDataset, read_through
from fastrcnn.data.table import Truth
from fastrcnn.evaluation.coco import coco_eval, require_hotcoco, truth_of_targets
from fastrcnn.evaluation.predict import Predictions, as_detector, opened, predict
from fastrcnn.inference import Detector
from fastrcnn.models.base_detector import BaseDetector, unwrapped
from fastrcnn.models.faster_rcnn import FasterRCNN
from fastrcnn.models.rpn import RPN

SIZES = ("s", "m", "l")  # areas below 32^2, up to 96^2, and beyond


def proposal_recall(
    targets: Sequence[dict],
    proposals: Sequence[tuple[Tensor, Tensor]],
    max_nums: Sequence[int] = (100, 300, 1000),
    iou_thrs: Sequence[float] | None = None,
) -> dict[str, float]:
    """The share of objects that the best max_nums proposals of each image reach, averaged over iou_thrs, in percent:
    AR@100, AR@300, AR@1000, and ARs@1000, ARm@1000, ARl@1000 by the objects' size (nan where there are none).

    targets: dicts boxes [N, 4] xyxy pixels, optional ignore_boxes [R, 4], whatever the labels; proposals: boxes [K, 4],
    scores [K]. One of each an image, in the same order. iou_thrs: None for COCO's 0.5, 0.55 ... 0.95. Raises ValueError
    naming the argument.
    """
    if len(targets) != len(proposals):
        raise ValueError(f"proposals: expected one for each of the {len(targets)} targets, got {len(proposals)}")
    results = [dict(boxes=boxes, scores=scores, labels=torch.zeros(len(boxes))) for boxes, scores in proposals]
    return _recall(range(len(targets)), truth_of_targets(targets, None), Predictions.of(results), max_nums, iou_thrs)


def _recall(
    ids: Sequence, truth: Truth, found: Predictions, max_nums=(100, 300, 1000), iou_thrs=None
) -> dict[str, float]:
    if not max_nums or min(max_nums) < 1:
        raise ValueError(f"max_nums: expected numbers from 1 up, got {max_nums}")
    params = dict(use_cats=False, max_dets=sorted(max_nums))
    if iou_thrs is not None:
        params["iou_thrs"] = [float(t) for t in iou_thrs]
    evaluation = coco_eval(truth, found, ids, 1 + int(truth.labels.max(initial=0)), **params)
    # [thresholds, sizes (all first), max_nums], -1 without objects
    recall = np.asarray(evaluation.eval["recall"])[:, 0]
    means = np.where(recall.min(0) < 0, np.nan, recall.mean(0) * 100)
    found = {f"AR@{n}": float(means[0, k]) for k, n in enumerate(sorted(max_nums))}
    return found | {f"AR{size}@{max(max_nums)}": float(means[k + 1, -1]) for k, size in enumerate(SIZES)}


class _FirstStage(BaseDetector):
    """The proposals of a two-stage detector as its detections, all of one class."""

    num_classes, reads_labels, label_offset = 1, False, 0
    detect = RPN.detect

    def __init__(self, model: BaseDetector):
        nn.Module.__init__(self)
        self.data_preprocessor = model.data_preprocessor
        self.backbone, self.neck, self.rpn_head = model.backbone, model.neck, model.rpn_head
        self.class_names, self.category_ids = ["object"], [1]


def evaluate_proposals(
    model: BaseDetector | Detector,
    dataset,
    batch_size: int | None = None,
    max_nums: Sequence[int] = (100, 300, 1000),
    advance: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """`proposal_recall` of an RPN, of the first stage of a FasterRCNN, or of what a Detector finds, on a dataset, whatever
    the objects' classes; dataset, batch_size and advance as in `predict`, truth and errors as in `evaluate`."""
    require_hotcoco()
    (base, places), model = opened(dataset), unwrapped(model)
    if not isinstance(model, RPN | FasterRCNN | Detector):
        raise TypeError(f"model: expected an RPN, a FasterRCNN or a Detector, got {type(model).__name__}")
    model = as_detector(_FirstStage(model) if isinstance(model, FasterRCNN) else model)
    if not isinstance(base, DetectionDataset):
        found = predict(model, dataset, batch_size, by_class=False, advance=advance)
        return _recall(places, truth_of_targets(found.targets, None, places), found, max_nums)
    truth, base.channels = base.truth(places), model.channels
    read_through(dataset)
    found = predict(model, dataset, batch_size, by_class=False, advance=advance)
    return _recall([base.image_ids[p] for p in places], truth, found, max_nums)
