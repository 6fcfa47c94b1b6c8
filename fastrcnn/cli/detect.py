"""fastrcnn detect."""

import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastrcnn.cli.common import Device, Precision, console, err, fail, open_detector


def selected(names: list[str], wanted: str | None) -> set[int] | None:
    if wanted is None:
        return None
    asked = [c.strip() for c in wanted.split(",") if c.strip()]
    unknown = [c for c in asked if c not in names]
    if unknown:
        fail(f"--classes: unknown {', '.join(unknown)}; the model knows {', '.join(names)}")
    return {i for i, name in enumerate(names) if name in asked}


def run_detector(detector, sources: list[str], out: Path, classes: set[int] | None, batch: int | None, pictures: bool):
    """`write_detections` with a progress bar and the unreadable images named. Returns (images done, failed, objects)."""
    from fastrcnn.inference.output import write_detections

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    failed, objects = 0, Counter()
    with Progress(*columns, console=err, transient=True, disable=len(sources) < 2) as progress:
        task = progress.add_task("detecting", total=len(sources))
        for found in write_detections(detector, sources, out, classes, batch, pictures):
            progress.advance(task)
            if isinstance(found, Exception):
                failed += 1
                err.print(f"skipped {found}", style="yellow", markup=False, soft_wrap=True)
            else:
                objects.update(found.names)
    return len(sources) - failed, failed, objects


def detect(
    sources: Annotated[list[str], typer.Argument(help="images, folders, glob patterns, http(s) addresses")],
    weights: Annotated[
        str | None,
        typer.Option(help="checkpoint of MMDetection, torchvision or Detectron2: file or https address "
                          "[default: torchvision's COCO weights, fetched once]"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="name from `fastrcnn models` [default: told by the weights]")] = None,
    out: Annotated[Path, typer.Option(help="folder for the pictures and detections.json")] = Path("out"),
    score: Annotated[float, typer.Option(min=0.0, max=1.0, help="leave out objects below this score")] = 0.5,
    classes: Annotated[str | None, typer.Option(help="names of the classes to keep, comma-separated")] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    batch: Annotated[int | None, typer.Option(min=1, help="images of one shape per step")] = None,
    pictures: Annotated[bool, typer.Option(help="write pictures as well as detections.json")] = True,
) -> None:  # fmt: skip
    """Find objects in images: pictures with boxes, names and scores, and COCO-format JSON."""
    from fastrcnn.data import list_images

    paths = [path for source in sources for path in list_images(source)]
    if not paths:
        fail(f"no images found in {' '.join(sources)}")
    detector = open_detector(model, weights, device, precision, score)
    start = time.perf_counter()
    done, failed, objects = run_detector(detector, paths, out, selected(detector.class_names, classes), batch, pictures)
    seconds = time.perf_counter() - start
    what = ", ".join(f"{n} {name}" for name, n in objects.most_common(6)) or "nothing"
    skipped = f", {failed} unreadable (named above)" if failed else ""
    line = f"{done} of {len(paths)} images in {seconds:.1f} s{skipped}: {what}. See {out}/"
    console.print(line, markup=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)
