"""fastrcnn detect."""

import time
import warnings
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from fastrcnn.cli.common import (
    Device,
    Json,
    Model,
    Precision,
    Score,
    Weights,
    fail,
    open_detector,
    progress_bar,
    say,
    say_json,
    warn,
)


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
    images, objects = Counter(), Counter()
    try:
        with (
            progress_bar(len(sources)) as progress,
            closing(write_detections(detector, sources, out, classes, batch, pictures)) as results,
        ):
            task = progress.add_task("detecting", total=len(sources))
            for found in results:
                progress.advance(task)
                if isinstance(found, Exception):
                    images["not written" if isinstance(found, OSError) else "unreadable"] += 1
                    warn(f"skipped {found}")
                else:
                    images["done"] += 1
                    objects.update(found.names)
    except OSError as error:
        fail(error)
    return images, objects


def detect(
    sources: Annotated[list[str], typer.Argument(help="images, folders, glob patterns, http(s) addresses")],
    weights: Weights = None,
    model: Model = None,
    out: Annotated[Path, typer.Option(help="folder for the pictures and detections.json")] = Path("out"),
    score: Score = 0.5,
    classes: Annotated[str | None, typer.Option(help="names of the classes to keep, comma-separated")] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    batch: Annotated[int | None, typer.Option(min=1, help="images of one shape per step")] = None,
    pictures: Annotated[bool, typer.Option(help="write pictures as well as detections.json")] = True,
    as_json: Json = False,
) -> None:
    """Find objects in pictures.

    Writes pictures with boxes, names and scores, and what was found in COCO's format.

    \b
    Examples
      fastrcnn detect street.jpg
      fastrcnn detect photos/valid --weights runs/mine/best.safetensors --out found --json
    """
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
    if as_json:
        say_json(dict(out=str(out), images=len(paths), **images, objects=objects, seconds=seconds))
    else:
        what = ", ".join(f"{n} {name}" for name, n in objects.most_common(6)) or "nothing"
        failed = "".join(f", {images[k]} {k} (named above)" for k in ("unreadable", "not written") if images[k])
        say(f"{images['done']} of {len(paths)} images in {seconds:.1f} s{failed}: {what}. See {out}/")
    if images["done"] < len(paths):
        raise typer.Exit(1)
