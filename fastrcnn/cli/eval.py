"""fastrcnn eval."""

import math
from pathlib import Path
from typing import Annotated

import typer

from fastrcnn.cli.common import Device, Json, MaxSize, MinSize, Names, Precision, fail, progress_bar, say, say_json


def print_scores(scores: dict[str, float]) -> None:
    for name, value in scores.items():
        say(f"{name:8} {value:5.1f}")


def _numbers(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        fail(f"--max-dets: expected whole numbers with commas between them, got {text!r}")


def evaluate(
    data: Annotated[Path, typer.Argument(help="folder or annotation file: COCO, Pascal VOC or YOLO")],
    weights: Annotated[str, typer.Option(help="checkpoint of MMDetection, torchvision or Detectron2, or trained here")],
    names: Names = None,
    images: Annotated[Path | None, typer.Option(help="image folder [default: told by the annotations]")] = None,
    split: Annotated[
        str | None, typer.Option(help="train, val or test, of a folder that has them [default: val]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for report.html, metrics.json, predictions.json, charts")
    ] = None,
    min_size: MinSize = None,
    max_size: MaxSize = None,
    max_dets: Annotated[str | None, typer.Option(help="detections a picture that count [default: 1,10,100]")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="pictures at a time [default: 8 on CUDA, 1 on a CPU]")
    ] = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    as_json: Json = False,
) -> None:
    """Measure a detector on annotated pictures: COCO's numbers.

    Twelve, in percent: AP (average precision), AR (average recall); of a region proposal network its recall. Where there is
    no object to count a number is nan, in JSON null. Needs the extra eval.

    \b
    Examples
      fastrcnn eval photos/valid --weights runs/mine/best.safetensors
      fastrcnn eval photos --split val --weights runs/mine/best.safetensors --out report --json
    """
    from fastrcnn.data import open_dataset, read_names
    from fastrcnn.data.detect_format import detect_format
    from fastrcnn.evaluation import as_detector, evaluate, evaluate_proposals, write_numbers
    from fastrcnn.inference.detector import as_device
    from fastrcnn.inference.output import check_folder
    from fastrcnn.weights import infer_model

    most = _numbers(max_dets)
    try:
        chosen = as_device(device)
        if out is not None:
            check_folder(out)
        if split is None and {"val", "test"} & set(detect_format(data).splits):
            split = "val"
        dataset = open_dataset(data, images, split)
        about = dict(weights=weights, data=f"{data} ({split})" if split else str(data))
        model = infer_model(weights).to(chosen)
        model.data_preprocessor.resize_to(min_size, max_size)
        if names is not None:
            model.name_classes(read_names(names))
        detector = as_detector(model, precision, max(most or [0]))
        with progress_bar(len(dataset)) as progress:
            task = progress.add_task("detecting", total=len(dataset))
            options = dict(batch_size=batch, advance=lambda: progress.advance(task))
            if model.reads_labels:
                scores = evaluate(detector, dataset, max_dets=most or (1, 10, 100), out=out, about=about, **options)
            else:
                scores = evaluate_proposals(detector, dataset, max_nums=most or (100, 300, 1000), **options)
                if out is not None:
                    write_numbers(out, scores, about)
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    if as_json:
        say_json({name: None if math.isnan(value) else value for name, value in scores.items()})
    else:
        print_scores(scores)
        if out is not None:
            say(f"report: {out / 'report.html'}")
