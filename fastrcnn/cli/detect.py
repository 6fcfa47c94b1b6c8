"""fastrcnn detect."""

import glob
import os
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
    MaxSize,
    MinSize,
    Model,
    Names,
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

NO_PICTURES = (".pth", ".pt", ".pkl", ".safetensors", ".onnx", ".py", ".yaml", ".yml", ".json")


def selected(names: list[str], wanted: str | None) -> set[int] | None:
    if wanted is None:
        return None
    asked = [c.strip() for c in wanted.split(",") if c.strip()]
    unknown = [c for c in asked if c not in names]
    if unknown:
        fail(f"--classes: unknown {', '.join(unknown)}; the model knows {', '.join(names)}")
    return {i for i, name in enumerate(names) if name in asked}


def run_detector(detector, sources: list[str], out: Path, **options) -> tuple[Counter, Counter]:
    """`write_detections` (options: its further arguments) with a progress bar, and what failed named. Returns how many
    images were "done", "unreadable", "not written", of "videos" and "frames", and how many objects there are of each
    name. Ends the command where results cannot be written."""
    from fastrcnn.inference.output import Video, write_detections

    warnings.filterwarnings("ignore", module="PIL")  # about what is in a picture: it is read, or it is named below
    images, objects = Counter(), Counter()
    try:
        with (
            progress_bar(len(sources)) as progress,
            closing(write_detections(detector, sources, out, say=warn, **options)) as results,
        ):
            task = progress.add_task("detecting", total=len(sources))
            for found in results:
                progress.advance(task)
                if isinstance(found, Exception):
                    images["not written" if isinstance(found, OSError) else "unreadable"] += 1
                    warn(f"skipped {found}")
                elif isinstance(found, Video):
                    images.update(done=1, videos=1, frames=found.frames)
                    objects.update(found.objects)
                else:
                    images["done"] += 1
                    objects.update(found.names)
    except (OSError, ValueError, ImportError) as error:
        fail(error)
    return images, objects


def find(sources: list[str], recursive: bool, shard: str | None, out: Path) -> tuple[list[str], list[int]]:
    """The pictures and videos asked for and their numbers; ends the command where there are none."""
    from fastrcnn.data import find_sources, shard_of
    from fastrcnn.data.images import is_image
    from fastrcnn.inference.video import is_video

    try:
        paths, below = find_sources(sources, recursive, lambda name: is_image(name) or is_video(name), out)
        chosen = shard_of(paths, shard or "1/1")
    except (ValueError, OSError) as error:
        fail(error)
    there = [source for source in sources if source == "-" or "://" in source or glob.has_magic(source) or
             is_video(source) or os.path.exists(os.path.expanduser(source))]  # fmt: skip
    if sources and not there:
        hint = "; the first camera is camera:0" if sources[0].isdigit() else ""
        fail(f"{', '.join(sources)}: no such file or folder{hint}")
    if misplaced := [source for source in there if source.lower().endswith(NO_PICTURES)]:
        fail(f"{misplaced[0]}: no picture. Weights are given by --weights, a config by --model")
    if below:
        warn(f"{below} more in sub-folders are left out: --recursive takes them")
    if not paths:
        fail(f"no images found in {' '.join(sources)}")
    return chosen


def detect(
    sources: Annotated[
        list[str],
        typer.Argument(help="pictures, videos, folders, glob patterns, http(s) addresses, lists of them in a .txt, or - "
                       "for one on standard input"),
    ],
    weights: Weights = None,
    model: Model = None,
    names: Names = None,
    out: Annotated[Path, typer.Option(help="folder for everything that is written")] = Path("out"),
    formats: Annotated[
        str, typer.Option("--format", help="beside pictures: json (COCO, always), csv, parquet, yolo, crops; with commas")
    ] = "json",
    score: Score = 0.5,
    iou: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="boxes that overlap more (IoU) are one object [default: the model's]"),
    ] = None,
    max_det: Annotated[int | None, typer.Option(min=1, help="objects a picture at most [default: the model's]")] = None,
    min_size: MinSize = None,
    max_size: MaxSize = None,
    classes: Annotated[str | None, typer.Option(help="names of the classes to keep, with commas [default: all]")] = None,
    tile: Annotated[
        int | None, typer.Option(min=32, help="look at larger pictures in tiles of so many pixels [default: whole]")
    ] = None,
    overlap: Annotated[float, typer.Option(min=0.0, max=0.9, help="part of a tile that its neighbour sees, too")] = 0.2,
    recursive: Annotated[bool, typer.Option("--recursive", help="sub-folders, too")] = False,
    shard: Annotated[
        str | None,
        typer.Option(help="i/n, on one of n machines: every n-th picture, from the i-th, into shard-i-of-n below --out"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out, nothing twice")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="delete an earlier run's results in --out")] = False,
    pictures: Annotated[bool, typer.Option(help="write the pictures with their boxes")] = True,
    line_width: Annotated[int | None, typer.Option(min=1, help="pixels [default: by the picture's size]")] = None,
    hide_labels: Annotated[bool, typer.Option("--hide-labels", help="boxes alone")] = False,
    device: Device = "auto",
    precision: Precision = "auto",
    batch: Annotated[
        int | None, typer.Option(min=1, help="pictures of one shape a step [default: 8 on CUDA, 1 on a CPU]")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local, or ray: pictures from any path of fsspec (s3://...), Parquet with a row a picture")
    ] = "local",
    workers: Annotated[int | None, typer.Option(min=1, help="of engine ray [default: a GPU each, or four cores]")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Find objects in pictures and videos.

    Writes pictures with boxes, names and scores, and what was found as tables; a video as a video.

    \b
    Examples
      fastrcnn detect street.jpg
      fastrcnn detect photos --recursive --format json,csv --score 0.3 --classes RBC,WBC
      fastrcnn detect photos/valid --weights runs/mine/best.safetensors --out found --json
      fastrcnn detect street.jpg --tile 480 --out tiles
      fastrcnn detect list.txt --shard 1/2 --resume
    """
    limits = dict(max_per_img=max_det, iou_threshold=iou, min_size=min_size, max_size=max_size)
    if engine != "local":
        if engine != "ray":
            fail(f"--engine: expected local or ray, got {engine!r}")
        from fastrcnn.cli.engine import detect_on_ray, is_remote

        if tile or shard or overwrite or line_width or hide_labels or set(formats.split(",")) - {"json", "parquet"}:
            fail("--engine ray writes Parquet files alone: leave out --tile, --shard, --overwrite, --line-width, "
                 "--hide-labels and other formats")  # fmt: skip
        own = [source for source in sources if not is_remote(source)]
        found = [source for source in sources if is_remote(source)] + (
            find(own, recursive, None, out)[0] if own else []
        )
        detect_on_ray(found, str(out), weights, model, names, classes, workers, resume, as_json, device=device,
                      precision=precision, score_threshold=score, **limits)  # fmt: skip
        return
    from fastrcnn.inference.formats import check_formats
    from fastrcnn.inference.output import check_folder
    from fastrcnn.inference.tiles import Tiled

    kinds = tuple(dict.fromkeys(("json", *filter(None, map(str.strip, formats.split(","))))))
    try:
        check_formats(kinds)
        if resume and overwrite:
            raise ValueError("--resume keeps the earlier results and --overwrite deletes them: give one")
        paths, ids = find(sources, recursive, shard, out)
        out = out if shard is None else out / f"shard-{shard.replace('/', '-of-')}"
        check_folder(out)
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    detector = open_detector(model, weights, device, precision, score, names, **limits)
    kept = selected(detector.class_names, classes)
    if tile is not None:
        detector = Tiled(detector, tile, overlap, max_det)
    settings = dict(
        weights=weights, model=model, score=score, classes=classes, tile=tile, formats=sorted(kinds), **limits
    )
    if tile is not None:
        settings["overlap"] = overlap
    if names is not None:
        settings["names"] = detector.class_names
    start = time.perf_counter()
    try:
        images, objects = run_detector(
            detector, paths, out, classes=kept, batch_size=batch, pictures=pictures, formats=kinds, resume=resume,
            overwrite=overwrite, ids=ids, settings=settings, line_width=line_width, labels=not hide_labels,
        )  # fmt: skip
    except KeyboardInterrupt:
        warn(f"interrupted: what was done is in {out}/, and --resume goes on from there")
        raise
    seconds = time.perf_counter() - start
    failed = [f"{images[k]} {k}" for k in ("unreadable", "not written") if images[k]]
    before = len(paths) - images["done"] - images["unreadable"] - images["not written"]
    if as_json:
        say_json(dict(out=str(out), sources=len(paths), before=before, **images, objects=objects, seconds=seconds))
    else:
        what = ", ".join(f"{n} {name}" for name, n in objects.most_common(6)) or "nothing"
        frames = f" ({images['frames']} frames of {images['videos']} videos)" if images["videos"] else ""
        extra = "".join(f", {part} (named above)" for part in failed) + (
            f", {before} were done before" if before else ""
        )
        say(f"{images['done']} of {len(paths)} images{frames} in {seconds:.1f} s{extra}: {what}. See {out}/")
    if failed:
        raise typer.Exit(1)
