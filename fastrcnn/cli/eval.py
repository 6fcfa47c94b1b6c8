"""fastrcnn eval."""

from pathlib import Path
from typing import Annotated

import typer

from fastrcnn.cli.common import Device, Precision, console, fail


def print_scores(model, dataset, precision: str | None = None) -> None:
    """COCO's numbers; of an RPN alone, whose objects have no classes, its recall."""
    from fastrcnn.evaluation import as_detector, evaluate, evaluate_proposals

    measure = evaluate if model.reads_labels else evaluate_proposals
    for name, value in measure(as_detector(model, precision), dataset).items():
        console.print(f"{name:8} {value:5.1f}")


def evaluate(
    annotations: Annotated[Path, typer.Argument(help="COCO annotation file")],
    weights: Annotated[str, typer.Option(help="checkpoint of any peer, or trained here")],
    images: Annotated[Path | None, typer.Option(help="image folder [default: images/ beside the annotations]")] = None,
    device: Device = "auto",
    precision: Precision = "fp32",
) -> None:
    """COCO's twelve numbers of a checkpoint on annotated images, or the recall of a region proposal network."""
    from fastrcnn.data import CocoDataset
    from fastrcnn.inference.detector import as_device
    from fastrcnn.weights import infer_model

    try:
        chosen = as_device(device)
        dataset = CocoDataset(annotations, images)
        model = infer_model(weights).to(chosen)
        print_scores(model, dataset, precision)
    except (ValueError, OSError, ImportError) as error:
        fail(error)
