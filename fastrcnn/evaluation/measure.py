"""A model and a dataset in, COCO's numbers out."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import distributed

from fastrcnn.data import DetectionDataset, read_through
from fastrcnn.evaluation.coco import AREAS, MAX_DETS, check_settings, judge_dataset, require_hotcoco
from fastrcnn.evaluation.predict import (
    Predictions,
    as_detector,
    class_names_of,
    most_detections,
    opened,
    predict,
    predict_together,
)
from fastrcnn.evaluation.results import write_evaluation
from fastrcnn.inference import Detector
from fastrcnn.inference.output import check_folder


def measure(dataset, found: Predictions, max_dets: Sequence[int] = MAX_DETS, areas=AREAS) -> dict[str, float]:
    """COCO's numbers, in percent, of what was found on a dataset: AP, AP50, AP75, AP<size>, AR<detections a picture>,
    AR<size>; nan where there is no object of the size.

    max_dets: how many of each picture's detections AR counts; AP counts the largest; areas: (smallest, largest) square
    pixels of an object by size. Raises ValueError where a picture was not looked at, and where no object is annotated.
    """
    return judge_dataset(dataset, found, max_dets, areas).scores()


def evaluate(
    model,
    dataset,
    batch_size: int | None = None,
    max_dets: Sequence[int] = MAX_DETS,
    areas: Mapping[str, tuple[float, float]] = AREAS,
    group=None,
    out: str | Path | None = None,
    about: Mapping[str, str] = {},
    advance: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """COCO's twelve numbers, in percent, of a model on a dataset; model, dataset and batch_size as in `predict`, max_dets
    and areas as in `measure`: a model of ours then finds as many objects in a picture as max_dets asks for; a Detector as
    many as it was made for, with a warning where that is less.

    On a DetectionDataset, or a Subset of one, the file as it is written is the truth, as for pycocotools, and classes are
    matched by name, and every picture is read once before the first is detected in; elsewhere the targets are the truth.
    With `group`, a torch.distributed group of which every process calls this, each looks at a share of the pictures, and
    all get the numbers of the whole. out, about: as in `write_evaluation`, which is then called, of a group in its first
    process; `advance` is called after every picture. Raises what `predict` does, and before that what `match_classes` does,
    ValueError where no object is annotated, OSError where `out` cannot be written to, and ImportError without hotcoco.
    """
    require_hotcoco()
    check_settings(max_dets, areas)
    if out is not None:
        check_folder(Path(out))
    model = as_detector(model, max_dets=0 if max_dets is MAX_DETS else max(max_dets))
    base, places = opened(dataset)
    if isinstance(model, Detector) and max_dets is not MAX_DETS and (most := most_detections(model)) < max(max_dets):
        said = f"max_dets: {max(max_dets)} detections a picture are to count, and this Detector gives {most} at most"
        warnings.warn(said, stacklevel=2)
    if isinstance(base, DetectionDataset):
        if isinstance(model, Detector):
            base.channels = model.channels
        base.truth(places)
        class_names_of(model, dataset)
    if group is not None:
        found = predict_together(model, dataset, batch_size, group, advance, read_first=True)
    else:
        if isinstance(base, DetectionDataset):
            read_through(dataset)
        found = predict(model, dataset, batch_size, advance=advance)
    if out is None or (group is not None and distributed.get_rank(group) != 0):
        return measure(dataset, found, max_dets, areas)
    return write_evaluation(out, dataset, found, max_dets, areas, about)
