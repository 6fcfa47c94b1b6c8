"""Average recall of class-agnostic proposals, as COCO defines it and MMDetection's `proposal` metric prints it."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastrcnn.evaluation.coco import _xywh

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
    try:
        from hotcoco import COCO, COCOeval
    except ImportError:
        raise ImportError("Proposal recall needs hotcoco: pip install 'fastrcnn[eval]'") from None
    if len(targets) != len(proposals):
        raise ValueError(f"proposals: expected one for each of the {len(targets)} targets, got {len(proposals)}")
    if not max_nums or min(max_nums) < 1:
        raise ValueError(f"max_nums: expected numbers from 1 up, got {max_nums}")
    images = [dict(id=i, width=1, height=1, file_name=str(i)) for i in range(len(targets))]
    annotations, rows = [], [np.zeros((0, 7))]  # rows: image, x, y, width, height, score, category
    for i, (target, (boxes, scores)) in enumerate(zip(targets, proposals)):
        crowd = target.get("ignore_boxes", torch.zeros(0, 4))
        for iscrowd, group in enumerate((target["boxes"], crowd)):
            for box in _xywh(group.cpu().float()):
                annotations.append(dict(id=len(annotations) + 1, image_id=i, category_id=0, bbox=box,
                                        area=box[2] * box[3], iscrowd=iscrowd))  # fmt: skip
        table = torch.zeros(len(boxes), 7, dtype=torch.float64)
        table[:, 0] = i
        table[:, 1:5] = torch.tensor(_xywh(boxes.cpu().float())).reshape(-1, 4)
        table[:, 5] = scores
        rows.append(table.numpy())
    truth = COCO(dict(images=images, annotations=annotations, categories=[dict(id=0, name="object")]))
    evaluation = COCOeval(truth, truth.load_res(np.concatenate(rows)), "bbox")
    evaluation.params.use_cats = False
    evaluation.params.max_dets = sorted(max_nums)
    if iou_thrs is not None:
        evaluation.params.iou_thrs = [float(t) for t in iou_thrs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these are not the settings of a detection benchmark
        evaluation.evaluate()
        evaluation.accumulate()
    # [thresholds, sizes (all first), max_nums], -1 without objects
    recall = np.asarray(evaluation.eval["recall"])[:, 0]
    means = np.where(recall.min(0) < 0, np.nan, recall.mean(0) * 100)
    found = {f"AR@{n}": float(means[0, k]) for k, n in enumerate(sorted(max_nums))}
    return found | {f"AR{size}@{max(max_nums)}": float(means[k + 1, -1]) for k, size in enumerate(SIZES)}


@torch.inference_mode()
def evaluate_proposals(model, dataset, batch_size: int = 4) -> dict[str, float]:
    """`proposal_recall` of the first stage of a FasterRCNN, or of an RPN, on a dataset of (image uint8 [3, H, W], target)
    pairs. The model's mode is restored."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    targets, found = [], []
    for start in range(0, len(dataset), batch_size):
        pairs = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        batch, sizes, factors = model.data_preprocessor([image.to(device) for image, _ in pairs], model.dtype)
        for (boxes, scores), factor in zip(model.proposals(batch, sizes), factors):
            found.append(((boxes / factor.repeat(2)).cpu(), scores.cpu()))
        targets += [target for _, target in pairs]
    model.train(was_training)
    return proposal_recall(targets, found)
