"""COCO's box AP, computed by hotcoco (the same six numbers as pycocotools, in a fraction of the time)."""

import contextlib
import io
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def _xywh(boxes: Tensor) -> list[list[float]]:
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()


def evaluate_coco(targets: Sequence[dict], results: Sequence[dict], num_classes: int) -> dict[str, float]:
    """COCO's twelve numbers in percent (nan where a size range is empty).

    targets: dicts boxes [N, 4] xyxy pixels, labels [N], optional ignore_boxes [R, 4]; results: dicts boxes, scores, labels;
    all labels counted from 0. One of each an image, in the same order.
    """
    try:
        from hotcoco import COCO, COCOeval
    except ImportError:
        raise ImportError("COCO evaluation needs hotcoco: pip install 'fastrcnn[eval]'") from None
    images = [dict(id=i, width=1, height=1, file_name=str(i)) for i in range(len(targets))]
    annotations, detections = [], []
    for i, (target, result) in enumerate(zip(targets, results)):
        rows = [(b, la, 0) for b, la in zip(_xywh(target["boxes"]), target["labels"].tolist())]
        crowd = target.get("ignore_boxes", torch.zeros(0, 4))
        rows += [(b, la, 1) for b in _xywh(crowd) for la in range(num_classes)]
        for box, label, iscrowd in rows:
            annotations.append(dict(id=len(annotations) + 1, image_id=i, category_id=label, bbox=box,
                                    area=box[2] * box[3], iscrowd=iscrowd))  # fmt: skip
        boxes = _xywh(result["boxes"].cpu().float())
        for box, score, label in zip(boxes, result["scores"].tolist(), result["labels"].tolist()):
            detections.append(dict(image_id=i, category_id=label, bbox=box, score=score))
    if not detections:
        return dict.fromkeys(METRICS, 0.0)
    categories = [dict(id=c, name=str(c)) for c in range(num_classes)]
    truth = COCO(dict(images=images, annotations=annotations, categories=categories))
    evaluation = COCOeval(truth, truth.load_res(detections), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its own table
        evaluation.summarize()
    stats = [float(v) * 100 if v >= 0 else float("nan") for v in evaluation.stats]
    return dict(zip(METRICS, stats))


@torch.inference_mode()
def evaluate(model, dataset: Iterable, batch_size: int = 4) -> dict[str, float]:
    """`evaluate_coco` of a model on a dataset of (image uint8 [3, H, W], target) pairs. The model's mode is restored."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    targets, results = [], []
    indices = range(len(dataset))
    for start in range(0, len(indices), batch_size):
        pairs = [dataset[i] for i in indices[start : start + batch_size]]
        found = model([image.to(device) for image, _ in pairs])
        targets += [target for _, target in pairs]
        results += [{**r, "labels": r["labels"] - model.label_offset} for r in found]
    model.train(was_training)
    return evaluate_coco(targets, results, model.num_classes)
