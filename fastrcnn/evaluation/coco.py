"""COCO's box AP, computed by hotcoco (the same twelve numbers as pycocotools, in a fraction of the time)."""

import contextlib
import io
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastrcnn.data import read_through
from fastrcnn.evaluation.classes import match_classes
from fastrcnn.evaluation.predict import annotated, as_detector, predict
from fastrcnn.inference import Detector

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def require_hotcoco():
    """hotcoco, or ImportError that says how to get it. To be called before anything takes long."""
    try:
        import hotcoco
    except ImportError:
        raise ImportError("COCO evaluation needs hotcoco: pip install 'fastrcnn[eval]'") from None
    return hotcoco


def truth_of_targets(targets: Sequence[dict], num_classes: int | None) -> list[dict]:
    """Rows as `DetectionDataset.truth` gives them, of targets: boxes [N, 4] xyxy pixels, labels [N] from 0, optional ignore_boxes [R, 4], which hold for every
    class, since they have none. num_classes None: everything is one class, and labels are not asked for."""
    rows = []
    for i, target in enumerate(targets):
        labels = [0] * len(target["boxes"]) if num_classes is None else target["labels"].tolist()
        if any(not 0 <= label < (num_classes or 1) for label in labels):
            raise ValueError(f"targets[{i}]: expected labels in 0..{num_classes - 1}, got {sorted(set(labels))}")
        found = [(b, label, 0) for b, label in zip(_xywh(target["boxes"]), labels)]
        crowd = _xywh(target.get("ignore_boxes", torch.zeros(0, 4)))
        found += [(b, label, 1) for b in crowd for label in range(num_classes or 1)]
        rows += [dict(image=i, category=c, bbox=b, area=b[2] * b[3], iscrowd=crowd) for b, c, crowd in found]
    return rows


def _xywh(boxes: Tensor) -> list[list[float]]:
    boxes = boxes.cpu().double()
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()


def coco_eval(images: Sequence, truth: Sequence[dict], results: Sequence[dict], categories: int, **params):
    """hotcoco's evaluation, accumulated. images: an id for each, whose order decides between equal scores; truth: rows of
    `DetectionDataset.truth`; results: of each image dicts boxes, scores, labels (places of categories); params: hotcoco's."""
    hotcoco = require_hotcoco()
    # Its ids are numbers: ours are places, in the order in which pycocotools takes the images.
    order = sorted(range(len(images)), key=lambda i: (isinstance(images[i], str), images[i]))
    number = {i: n for n, i in enumerate(order, 1)}
    rows = [dict(id=n, image_id=number[t["image"]], category_id=t["category"], bbox=t["bbox"], area=t["area"],
                 iscrowd=t["iscrowd"]) for n, t in enumerate(truth, 1)]  # fmt: skip
    table = [np.zeros((0, 7))]  # image, x, y, width, height, score, category
    for i, result in enumerate(results):
        columns = np.zeros((len(result["boxes"]), 7))
        columns[:, 0], columns[:, 5], columns[:, 6] = number[i], result["scores"].cpu(), result["labels"].cpu()
        columns[:, 1:5] = np.reshape(_xywh(result["boxes"]), (-1, 4))
        table.append(columns)
    coco = hotcoco.COCO(dict(
        images=[dict(id=n, width=1, height=1, file_name=str(n)) for n in sorted(number.values())],
        annotations=rows, categories=[dict(id=c, name=str(c)) for c in range(categories)]))  # fmt: skip
    evaluation = hotcoco.COCOeval(coco, coco.load_res(np.concatenate(table)), "bbox")
    for name, value in params.items():
        setattr(evaluation.params, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that are not a detection benchmark's
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _twelve(images, truth, results, categories: int) -> dict[str, float]:
    evaluation = coco_eval(images, truth, results, categories)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its own table
        evaluation.summarize()
    return {name: float(v) * 100 if v >= 0 else float("nan") for name, v in zip(METRICS, evaluation.stats)}


def evaluate_coco(targets: Sequence[dict], results: Sequence[dict], num_classes: int) -> dict[str, float]:
    """COCO's twelve numbers in percent (nan where there is no object of the size).

    targets: dicts boxes [N, 4] xyxy pixels, labels [N], optional ignore_boxes [R, 4]; results: dicts boxes, scores, labels;
    all labels counted from 0. One of each an image, in the same order. Raises ValueError naming the target, ImportError.
    """
    if len(targets) != len(results):
        raise ValueError(f"results: expected one for each of the {len(targets)} targets, got {len(results)}")
    return _twelve(range(len(targets)), truth_of_targets(targets, num_classes), results, num_classes)


def _classes(model) -> tuple[list[str], bool]:
    """A model's class names by label, and whether it said them itself."""
    if isinstance(model, Detector):
        return model.class_names, model.model.class_names is not None
    names = getattr(model, "class_names", None)
    return (names, True) if names else ([str(i) for i in range(model.num_classes)], False)


def evaluate(model, dataset, batch_size: int | None = None) -> dict[str, float]:
    """COCO's twelve numbers, in percent, of a model on a dataset; model, dataset and batch_size as in `predict`.

    On a DetectionDataset, or a Subset of one, the file as it is written is the truth, as for pycocotools, and classes are
    matched by name, and every picture is read once before the first is detected in; elsewhere the targets are the truth.
    Raises what `predict` does, and before that what `match_classes` does, ValueError where no object is annotated, and
    ImportError without hotcoco.
    """
    require_hotcoco()
    model, file = as_detector(model), annotated(dataset)
    names, told = _classes(model)
    if file is None:
        results, targets = predict(model, dataset, batch_size)
        return evaluate_coco(targets, results, len(names))
    coco, indices = file
    truth = coco.truth(indices)
    try:
        places = match_classes(names, coco.class_names, told)
    except ValueError as error:
        raise ValueError(f"{coco.path}: {error}") from None
    read_through(dataset)
    place = torch.tensor([-1 if p is None else p for p in places])
    results = []
    for found in predict(model, dataset, batch_size)[0]:
        labels = place[found["labels"]]
        results.append({"boxes": found["boxes"][labels >= 0], "scores": found["scores"][labels >= 0],
                        "labels": labels[labels >= 0]})  # fmt: skip
    return _twelve([coco.targets[i]["image_id"] for i in indices], truth, results, len(coco.class_names))
