"""What an evaluation leaves in a folder: predictions, numbers, charts, the worst pictures, and one page with all of it."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from fastrcnn.data import DetectionDataset, as_image
from fastrcnn.evaluation import diagnosis, plots
from fastrcnn.evaluation.coco import AREAS, MAX_DETS, Judged, judge_dataset, xywh
from fastrcnn.evaluation.contact_sheet import contact_sheet
from fastrcnn.evaluation.predict import Predictions, opened
from fastrcnn.evaluation.report import CHARTS, evaluation_report
from fastrcnn.evaluation.voc import voc_ap
from fastrcnn.inference.output import replace_file

WORST = 12  # pictures on the sheet, and doubtful annotations in metrics.json
ROWS = 10_000  # detections that are Python objects at a time


def as_json(value):
    """A value as JSON has it: nan is null."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return as_json(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_predictions(path: Path, dataset, found: Predictions) -> None:
    """What was found as COCO's result rows image_id, category_id, bbox (x, y, width, height), score, with every digit, so
    that pycocotools comes to the same numbers. Ids are those of the dataset's file."""
    base, _ = opened(dataset)
    file = isinstance(base, DetectionDataset)
    parts = []
    for start in range(0, len(found), ROWS):
        part = found.kept(slice(start, start + ROWS))
        columns = part.images.tolist(), part.labels.tolist(), xywh(part.boxes).tolist(), part.scores.tolist()
        rows = [dict(image_id=as_json(base.image_ids[image]) if file else image,
                     category_id=base.category_ids[label] if file else label, bbox=box, score=score)
                for image, label, box, score in zip(*columns)]  # fmt: skip
        parts.append(json.dumps(rows, allow_nan=False)[1:-1])
    replace_file(path, ("[" + ",\n".join(parts) + "]").encode())


def _without_charts(folder: str | Path) -> Path:
    """The folder, made where there is none, and without the charts of an earlier evaluation."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in CHARTS:
        (folder / name).unlink(missing_ok=True)
    return folder


def _write_metrics(folder: Path, metrics: Mapping) -> None:
    replace_file(folder / "metrics.json", json.dumps(as_json(metrics), allow_nan=False, indent=1).encode())


def write_numbers(folder: str | Path, numbers: Mapping[str, float], about: Mapping[str, str] = {}) -> None:
    """metrics.json and report.html of numbers alone, such as the recall of proposals. Raises OSError where they cannot be
    written."""
    folder = _without_charts(folder)
    _write_metrics(folder, dict(numbers, **about))
    evaluation_report(folder)


def _classes(judged: Judged) -> list[dict]:
    counts = np.bincount(judged.truth.labels[~judged.truth.crowd], minlength=len(judged.class_names))
    voc = voc_ap(judged.truth, judged.found, len(judged.class_names))
    most = f"AR{judged.max_dets[-1]}"
    rows = []
    for label, name in enumerate(judged.class_names):
        scores = judged.scores(label)
        numbers = {key: scores[key] for key in ("AP", "AP50", "AP75", most)}
        rows.append(dict(name=name, objects=counts[label], **numbers, VOC=voc[label]))
    return rows


def _mean(values: Sequence[float]) -> float:
    values = np.asarray(values, np.float64)
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def _charts(judged: Judged, by_score: diagnosis.ByScore, kinds: dict, matrix: np.ndarray) -> dict[str, bytes]:
    """PNG files' bytes by name. Raises ImportError without matplotlib."""
    curves = {name: diagnosis.precision_recall(judged, 0.5, label) for label, name in enumerate(judged.class_names)}
    means = {f"IoU {iou}": diagnosis.precision_recall(judged, iou) for iou in (0.5, 0.75, 0.9)}
    error, bins = diagnosis.calibration(judged)
    return {
        "precision_recall.png": plots.precision_recall(means, curves),
        "confusion.png": plots.confusion(matrix, judged.class_names),
        "scores.png": plots.scores(by_score, bins, error),
        "errors.png": plots.errors(kinds),
    }


def write_evaluation(
    folder: str | Path,
    dataset,
    found: Predictions,
    max_dets: Sequence[int] = MAX_DETS,
    areas: Mapping[str, tuple[float, float]] = AREAS,
    about: Mapping[str, str] = {},
) -> dict[str, float]:
    """Writes predictions.json, metrics.json (COCO's numbers in percent, VOC's, each class, errors by kind, confusion,
    calibration, doubtful annotations), charts, worst.jpg and report.html of what was found on a dataset; gives what
    `measure` does, and raises that. about: texts for the page's head (weights, data).

    Without matplotlib (extra `plots`) the charts are left out. Raises OSError where something cannot be written.
    """
    judged = judge_dataset(dataset, found, max_dets, areas)
    scores, classes = judged.scores(), _classes(judged)
    folder = _without_charts(folder)
    write_predictions(folder / "predictions.json", dataset, judged.found)

    by_score = diagnosis.by_score(judged)
    sure = diagnosis.at_score(judged, by_score.best)
    at = int(np.searchsorted(by_score.score, by_score.best))
    kinds, matrix = diagnosis.tide(judged), diagnosis.confusion(sure)
    looked, suspects = diagnosis.worst_pictures(sure, WORST)
    voc = {"VOC": [row["VOC"] for row in classes], "VOC07": voc_ap(judged.truth, judged.found, len(classes), points=11)}
    numbers = dict(
        scores,
        **{name: _mean(values) for name, values in voc.items()},
        pictures=len(judged.found.pictures),
        objects=by_score.objects,
        detections=len(judged.found),
        best_score=by_score.best,
        precision=by_score.precision[at],
        recall=by_score.recall[at],
        F1=by_score.f1[at],
        calibration_error=diagnosis.calibration(judged)[0],
        classes=classes,
        errors=kinds,
        confusion=dict(classes=[*judged.class_names, None], matrix=matrix),
        suspects=[dict(one, picture=_name(dataset, one["picture"])) for one in suspects],
    )
    try:
        charts = _charts(judged, by_score, kinds, matrix)
    except ImportError as missing:
        charts, numbers = {}, dict(numbers, charts=str(missing))
    _write_metrics(folder, dict(numbers, **about))
    for name, content in charts.items():
        replace_file(folder / name, content)
    seen = [(_image(dataset, one.picture), one, _name(dataset, one.picture)) for one in looked]
    pictures = [one for one in seen if one[0] is not None]
    if pictures:
        replace_file(folder / "worst.jpg", contact_sheet(pictures, judged.class_names))
    evaluation_report(folder)
    return scores


def _image(dataset, place: int) -> Tensor | None:
    """A picture; None where it can no longer be read, or has channels that are no colours."""
    base, _ = opened(dataset)
    try:
        return as_image(base.picture(place) if isinstance(base, DetectionDataset) else base[place][0])
    except (ValueError, TypeError, OSError):
        return None


def _name(dataset, place: int) -> str:
    base, _ = opened(dataset)
    return base.picture(place).name if isinstance(base, DetectionDataset) else f"picture {place}"
