"""The one pass of a detector over a dataset, from which every number is computed, and what it found, as columns."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.utils.data import ConcatDataset, Subset

from fastrcnn.data import DetectionDataset, as_image, read_through
from fastrcnn.data.dataset import refuse_path
from fastrcnn.evaluation.classes import match_classes
from fastrcnn.inference import Detector
from fastrcnn.models.base_detector import BaseDetector, unwrapped

COLUMNS = ("images", "boxes", "scores", "labels")


@dataclass
class Predictions:
    """What was found on P pictures of a dataset, N detections in all, as columns: no object is made for each.

    pictures: int64 [P], the pictures' places in the dataset, of a Subset in what it is taken from; images: int64 [N], each
    detection's picture, a place as well; boxes [N, 4] xyxy pixels; scores [N]; labels int64 [N], places in class_names,
    which are those of the dataset's file. targets: the pictures', where the dataset is no file.
    """

    pictures: np.ndarray
    images: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    class_names: list[str] = field(default_factory=list)
    targets: list[dict] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return len(self.scores)

    def kept(self, mask: np.ndarray) -> "Predictions":
        """Some of the detections, on the same pictures. mask: bool [N]."""
        columns = {key: getattr(self, key)[mask] for key in COLUMNS}
        return replace(self, **columns)

    def on(self, pictures: Sequence[int]) -> "Predictions":
        """Those on some of the pictures. Raises ValueError where one of them was not looked at."""
        wanted = np.asarray(pictures, np.int64).reshape(-1)
        missing = np.setdiff1d(wanted, self.pictures)
        if len(missing):
            raise ValueError(f"predictions: {len(missing)} of the {len(wanted)} pictures were not looked at, "
                             f"the first is number {missing[0]} of the dataset")  # fmt: skip
        target = dict(zip(self.pictures.tolist(), self.targets))
        targets = [target[place] for place in wanted.tolist()] if target else []
        return replace(self.kept(np.isin(self.images, wanted)), pictures=wanted, targets=targets)

    @staticmethod
    def of(
        results: Sequence[dict],
        pictures: Sequence[int] | None = None,
        class_names: list[str] = [],
        targets: list[dict] = [],
    ) -> "Predictions":
        """Those of a dict of tensors boxes, scores, labels for each picture."""

        def column(key: str, empty: Tensor) -> np.ndarray:
            return torch.cat([empty, *(r[key].reshape(-1, *empty.shape[1:]).cpu() for r in results)]).numpy()

        places = np.arange(len(results)) if pictures is None else np.asarray(pictures, np.int64).reshape(-1)
        images = np.repeat(places, [len(r["scores"]) for r in results])
        labels = column("labels", torch.zeros(0, dtype=torch.int64)).astype(np.int64)
        boxes, scores = column("boxes", torch.zeros(0, 4)), column("scores", torch.zeros(0))
        return Predictions(places, images, boxes, scores, labels, class_names, targets)

    @staticmethod
    def merge(parts: Sequence["Predictions"]) -> "Predictions":
        """Those of one or more shards together. A picture that is in several counts once, as the first of them saw it."""
        seen, own = np.zeros(0, np.int64), []
        for part in parts:
            own.append(part.on(np.setdiff1d(part.pictures, seen)))
            seen = np.union1d(seen, part.pictures)
        columns = {key: np.concatenate([getattr(part, key) for part in own]) for key in ("pictures", *COLUMNS)}
        by_place = np.argsort(columns.pop("pictures"))
        by_image = np.argsort(columns["images"], kind="stable")
        columns = {key: column[by_image] for key, column in columns.items()}
        targets = [target for part in own for target in part.targets]
        targets = [targets[i] for i in by_place] if targets else []
        return Predictions(seen, **columns, class_names=parts[0].class_names, targets=targets)


def as_detector(model: nn.Module | Detector, precision: str | None = None, max_dets: int = 0):
    """A Detector that answers as a model of ours does: on its device, in its precision, above its own score threshold, with
    its own number of detections a picture, or max_dets where that is more. Other modules, and Detectors, come back as they
    are."""
    model = unwrapped(model)
    if not isinstance(model, BaseDetector):
        return model
    head = next((getattr(model, name) for name in ("roi_head", "bbox_head") if hasattr(model, name)), None)
    threshold = 0.05 if head is None else head.test_cfg["score_thr"]
    own = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(model.dtype, "fp32")
    detector = Detector(model, None, next(model.parameters()).device, precision or own, threshold)
    for name in ("roi_head", "bbox_head"):
        if head is not None and hasattr(detector.model, name):
            own_head = getattr(detector.model, name)
            own_head.test_cfg = own_head.test_cfg | dict(max_per_img=max(max_dets, own_head.test_cfg["max_per_img"]))
    if head is None:  # of proposals every one counts, and the scores of Detectron2's are logits
        detector.score_threshold = -math.inf
    return detector


def most_detections(detector: Detector) -> float:
    """How many objects it finds in a picture at most."""
    heads = [getattr(detector.model, name) for name in ("roi_head", "bbox_head") if hasattr(detector.model, name)]
    return min((head.test_cfg["max_per_img"] for head in heads), default=math.inf)


def opened(dataset) -> tuple[object, list[int]]:
    """What a dataset is a Subset of, itself where it is none, and the places of its pictures there. Raises ValueError for
    what cannot be measured on, TypeError for a path."""
    refuse_path("dataset", dataset)
    if isinstance(dataset, Subset):
        below, places = opened(dataset.dataset)
        if len(set(dataset.indices)) != len(dataset.indices):
            raise ValueError("dataset: expected each picture once in a Subset to measure on")
        return below, [places[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset) and any(
        isinstance(opened(part)[0], DetectionDataset) for part in dataset.datasets
    ):
        raise ValueError("dataset: expected one annotation file to measure on, got several joined")
    if isinstance(dataset, DetectionDataset) and dataset.transforms is not None:
        raise ValueError(f"{dataset.path}: expected a dataset without transforms to measure on")
    return dataset, list(range(len(dataset)))


def class_names_of(model, dataset) -> tuple[list[str], np.ndarray]:
    """The class names that a model's detections on a dataset are counted by, and for each label of the model its place
    there, -1 where it has none: the names of the dataset's file, else the model's own. Raises ValueError, naming the file,
    for classes that the model does not know."""
    if isinstance(model, Detector):
        names, told = model.class_names, model.model.class_names is not None
    else:
        names = getattr(model, "class_names", None)
        names, told = (names, True) if names else ([str(i) for i in range(model.num_classes)], False)
    file = opened(dataset)[0]
    if not isinstance(file, DetectionDataset):
        return list(names), np.arange(len(names))
    try:
        places = match_classes(names, file.class_names, told)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None
    return file.class_names, np.array([-1 if p is None else p for p in places])


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


def predict(
    model,
    dataset,
    batch_size: int | None = None,
    by_class: bool = True,
    advance: Callable[[], object] = lambda: None,
) -> Predictions:
    """What a model finds on each picture of a dataset, above the model's own score threshold.

    model: a detector of ours, a `Detector`, or any module that answers [image] with a dict boxes [N, 4] xyxy pixels of the
    picture, scores [N], labels [N] counted from 0; dataset: a DetectionDataset, whose classes are then matched by name, or
    (image uint8 [3, H, W], target) pairs, or a Subset of either; batch_size: pictures of one shape that are taken together
    (default: the Detector's); by_class: False leaves labels as they are; `advance` is called after every picture. Raises
    ValueError for classes that the model does not know, and naming a picture that cannot be read or is not of its stated
    size.
    """
    detector = as_detector(model)
    base, places = opened(dataset)
    file = base if isinstance(base, DetectionDataset) else None
    names, place_of = class_names_of(detector, dataset) if by_class else ([], None)
    targets: list[dict] = []

    def pictures() -> Iterator:
        for place in places:
            if file is None:
                image, target = base[place]
                targets.append(target)
            else:  # as a path, to be read ahead in a thread
                image = file.picture(place)
            yield image

    ours = isinstance(detector, Detector)
    found: list = [None] * len(places)
    for index, image, result in detector.stream(pictures(), batch_size) if ours else _stream(detector, pictures()):
        if isinstance(result, Exception):
            where = ": ".join(filter(None, file.where(places[index]))) if file else f"dataset[{places[index]}]"
            raise ValueError(f"{where}: {result}")
        if file is not None:
            file.check_size(places[index], image)
        found[index] = {k: getattr(result, k) if ours else result[k].cpu() for k in ("boxes", "scores", "labels")}
        advance()
    found = Predictions.of(found, places, names, targets)
    if by_class:
        strange = found.labels[(found.labels < 0) | (found.labels >= len(place_of))]
        if len(strange):
            raise ValueError(f"model: expected labels in 0..{len(place_of) - 1}, got {strange[0]}")
        found.labels = place_of[found.labels]
        found = found.kept(found.labels >= 0)
    return found


def predict_together(
    model,
    dataset,
    batch_size: int | None,
    group,
    advance: Callable[[], object] = lambda: None,
    read_first: bool = False,
) -> Predictions:
    """`predict`, in which every process of a torch.distributed group looks at its share of the pictures, and every one gets
    what all found. read_first: each picture of a file is read once before the first is detected in. What goes wrong in one
    process is raised in all of them."""
    rank, world = distributed.get_rank(group), distributed.get_world_size(group)
    share = Subset(dataset, range(rank, len(dataset), world))
    parts: list = [None] * world
    try:
        if read_first and isinstance(opened(dataset)[0], DetectionDataset):
            read_through(share)
        mine = predict(model, share, batch_size, advance=advance)
    except Exception as error:
        mine = error
    distributed.all_gather_object(parts, mine, group)
    for part in parts:
        if isinstance(part, Exception):
            raise part
    return Predictions.merge(parts)
