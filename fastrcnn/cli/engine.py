"""fastrcnn detect --engine ray."""

import re
import time
from collections import Counter

import typer

from fastrcnn.cli.common import fail, progress_bar, say, say_json, warn


def is_remote(source: str) -> bool:
    """Whether it is an address for fsspec: s3://, gs://, file://..., but not http(s), which detect itself reads."""
    return "://" in source and not source.lower().startswith(("http://", "https://"))


def detect_on_ray(
    sources: list[str],
    out: str,
    weights: str | None,
    model: str | None,
    names: str | None,
    classes: str | None,
    workers: int | None,
    resume: bool,
    as_json: bool,
    **options,
) -> None:
    """`fastrcnn.ray.detect` with a progress bar, and what failed named; options: further arguments of Detector."""
    from fastrcnn.data import read_names
    from fastrcnn.ray import detect, find_pictures

    out = re.sub(r"^(\w+):/(?!/)", r"\1://", out)  # a path leaves out one of an address's slashes
    if weights is None:
        model, weights = model or "r50_fpn", "coco"
    named = (weights, None) if model is None else (model, weights)
    wanted = None if classes is None else [c.strip() for c in classes.split(",") if c.strip()]
    done, failed, objects, start = 0, 0, Counter(), time.perf_counter()
    try:
        if names is not None:
            options["class_names"] = read_names(names)
        pictures = find_pictures(sources)
        if not pictures:
            raise ValueError(f"no images found in {' '.join(sources)}")
        with progress_bar(len(pictures)) as progress:
            task = progress.add_task("detecting", total=len(pictures))
            for part in detect(pictures, out, *named, wanted, workers, resume, **options):
                progress.advance(task, part["pictures"])
                for line in part["failed"]:
                    warn(f"skipped {line}")
                done, failed = done + part["pictures"], failed + len(part["failed"])
                objects.update(part["objects"])
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        fail(error)
    seconds, before = time.perf_counter() - start, len(pictures) - done
    if as_json:
        say_json(dict(out=out, sources=len(pictures), before=before, done=done - failed, unreadable=failed,
                      objects=objects, seconds=seconds))  # fmt: skip
    else:
        what = ", ".join(f"{n} {name}" for name, n in objects.most_common(6)) or "nothing"
        extra = f", {failed} unreadable (named above)" * bool(failed) + f", {before} were done before" * bool(before)
        say(f"{done - failed} of {len(pictures)} images in {seconds:.1f} s{extra}: {what}. See {out}/")
    if failed:
        raise typer.Exit(1)
