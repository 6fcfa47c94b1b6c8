"""The one pass of a detector over a dataset, from which AP and recall are computed."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset

from fastrcnn.data import DetectionDataset, as_image
from fastrcnn.inference import Detector
from fastrcnn.models.base_detector import BaseDetector, unwrapped


def as_detector(model: nn.Module | Detector, precision: str | None = None):
    """A Detector that answers as a model of ours does: on its device, in its precision, above its own score threshold.
    Other modules, and Detectors, come back as they are."""
    model = unwrapped(model)
    if not isinstance(model, BaseDetector):
        return model
    head = next((getattr(model, name) for name in ("roi_head", "bbox_head") if hasattr(model, name)), None)
    threshold = 0.05 if head is None else head.test_cfg["score_thr"]
    own = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(model.dtype, "fp32")
    detector = Detector(model, None, next(model.parameters()).device, precision or own, threshold)
    if head is None:  # of proposals every one counts, and the scores of Detectron2's are logits
        detector.score_threshold = -math.inf
    return detector


def annotated(dataset) -> tuple[DetectionDataset, list[int]] | None:
    """The annotation file behind a dataset, or behind a Subset of one, and the indices of its images; None without."""
    if isinstance(dataset, Subset):
        below = annotated(dataset.dataset)
        if below is not None and len(set(dataset.indices)) != len(dataset.indices):
            raise ValueError("dataset: expected each picture once in a Subset to measure on")
        return None if below is None else (below[0], [below[1][i] for i in dataset.indices])
    if isinstance(dataset, ConcatDataset) and any(annotated(part) for part in dataset.datasets):
        raise ValueError("dataset: expected one annotation file to measure on, got several joined")
    if not isinstance(dataset, DetectionDataset):
        return None
    if dataset.transforms is not None:
        raise ValueError(f"{dataset.path}: expected a dataset without transforms to measure on")
    return dataset, list(range(len(dataset)))


def _stream(model: nn.Module, images) -> Iterator[tuple[int, Tensor, dict]]:
    """`Detector.stream` for a module that is none of ours: one picture at a time. The module's mode is restored."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for index, image in enumerate(images):
            image = as_image(image)
            with torch.inference_mode():
                (found,) = model([image.to(device)])
            yield index, image, found
    finally:
        model.train(was_training)


def predict(model, dataset, batch_size: int | None = None) -> tuple[list[dict[str, Tensor]], list[dict]]:
    """What a model finds on each picture of a dataset, in order: dicts boxes [N, 4] float32 xyxy pixels of the picture,
    scores [N], labels [N] counted from 0; and the dataset's targets.

    model: a detector of ours, a `Detector`, or any module that answers [image] with one such dict; dataset: a DetectionDataset,
    a Subset of one, or (image uint8 [3, H, W], target) pairs; batch_size: pictures of one shape that are taken together
    (default: the Detector's). Raises ValueError naming a picture that cannot be read or is not of its stated size.
    """
    file, targets = annotated(dataset), []

    def pictures() -> Iterator:
        for index in range(len(dataset)):
            if file is None:
                image, target = dataset[index]
            else:  # as a path, to be read ahead in a thread
                coco, indices = file
                image, target = coco.picture(indices[index]), coco.targets[indices[index]]
            targets.append(target)
            yield image

    detector = as_detector(model)
    ours = isinstance(detector, Detector)
    found: list = [None] * len(dataset)
    for index, image, result in detector.stream(pictures(), batch_size) if ours else _stream(detector, pictures()):
        if isinstance(result, Exception):
            where = f"{file[0].path}: images[{file[1][index]}]" if file else f"dataset[{index}]"
            raise ValueError(f"{where}: {result}")
        if file is not None:
            file[0].check_size(file[1][index], image)
        found[index] = {k: getattr(result, k) if ours else result[k].cpu() for k in ("boxes", "scores", "labels")}
    return found, targets
