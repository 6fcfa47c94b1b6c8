"""fastrcnn detect."""

import time
import warnings
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastrcnn.cli.common import Device, Precision, console, err, fail, open_detector, printable


def selected(names: list[str], wanted: str | None) -> set[int] | None:
    if wanted is None:
        return None
    asked = [c.strip() for c in wanted.split(",") if c.strip()]
    unknown = [c for c in asked if c not in names]
    if unknown:
        fail(f"--classes: unknown {', '.join(unknown)}; the model knows {', '.join(names)}")
    return {i for i, name in enumerate(names) if name in asked}


def run_detector(
    detector, sources: list[str], out: Path, classes: set[int] | None, batch: int | None, pictures: bool
) -> tuple[Counter, Counter]:
    """`write_detections` with a progress bar, and what failed named. Returns how many images were "done", "unreadable"
    and "not written", and how many objects there are of each name. Ends the command where results cannot be
    written."""
    from fastrcnn.inference.output import write_detections

    warnings.filterwarnings("ignore", module="PIL")  # about what is in a picture: it is read, or it is named below
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    images, objects = Counter(), Counter()
    try:
        with (
            Progress(*columns, console=err, transient=True, disable=len(sources) < 2) as progress,
            closing(write_detections(detector, sources, out, classes, batch, pictures)) as results,
        ):
            task = progress.add_task("detecting", total=len(sources))
            for found in results:
                progress.advance(task)
                if isinstance(found, Exception):
                    images["not written" if isinstance(found, OSError) else "unreadable"] += 1
                    err.print(printable(f"skipped {found}"), style="yellow", markup=False, soft_wrap=True)
                else:
                    images["done"] += 1
                    objects.update(found.names)
    except OSError as error:
        fail(error)
    return images, objects


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
    from fastrcnn.inference.output import check_folder

    paths = [path for source in sources for path in list_images(source)]
    if not paths:
        fail(f"no images found in {' '.join(sources)}")
    try:
        check_folder(out)
    except OSError as error:
        fail(error)
    detector = open_detector(model, weights, device, precision, score)
    start = time.perf_counter()
    images, objects = run_detector(detector, paths, out, selected(detector.class_names, classes), batch, pictures)
    seconds = time.perf_counter() - start
    what = ", ".join(f"{n} {name}" for name, n in objects.most_common(6)) or "nothing"
    failed = "".join(f", {images[k]} {k} (named above)" for k in ("unreadable", "not written") if images[k])
    line = f"{images['done']} of {len(paths)} images in {seconds:.1f} s{failed}: {what}. See {out}/"
    console.print(printable(line), markup=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)
