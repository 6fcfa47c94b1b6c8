"""The results of an earlier run in the same folder: gone on with, or put aside, never mixed with new ones."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

FILES = ("detections.json", "detections.csv", "detections.parquet")
FOLDERS = dict(yolo="labels", crops="crops")


def _content(folder: Path) -> dict[str, Any]:
    """detections.json, as far as it is one of ours."""
    try:
        content = json.loads((folder / "detections.json").read_bytes())
        return content if "settings" in content.get("info", ()) else {}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _whole_lines(lines: BinaryIO) -> Iterator[tuple[bytes, dict[str, Any]]]:
    lines.seek(0)
    for line in lines:
        if line.endswith(b"\n"):
            try:
                yield line, json.loads(line)
            except ValueError:
                return


def put_aside(folder: Path, lines: BinaryIO, overwrite: bool = False) -> Path | None:
    """Empties `lines`, and moves what an earlier run wrote to the folder into a new one below it, which is returned; None
    where there was nothing. overwrite: it is deleted instead. Raises OSError."""
    content = _content(folder)
    images = [*content.get("images", ()), *(row["image"] for _, row in _whole_lines(lines) if "image" in row)]
    names = {Path(str(image["picture"])).name for image in images if "picture" in image}
    names |= {Path(str(name)).name for name in content.get("info", {}).get("videos", {}).values()}
    names |= {FOLDERS[f] for f in content.get("info", {}).get("formats", ()) if f in FOLDERS}
    old = [folder / name for name in (*FILES, *sorted(names - {""})) if (folder / name).exists()]
    unfinished = lines.seek(0, 2) > 0
    aside = next(p for n in range(1, len(images) + 10**6) if not (p := folder / f"earlier-{n}").exists())
    if (old or unfinished) and not overwrite:
        aside.mkdir()
        if unfinished:
            lines.seek(0)
            (aside / "detections.jsonl").write_bytes(lines.read())
    for path in old:
        if not overwrite:
            path.replace(aside / path.name)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    lines.truncate(0)
    return aside if (old or unfinished) and not overwrite else None


def check_foreign(folder: Path, formats: tuple[str, ...]) -> None:
    """Raises OSError where labels or crops would be mixed with files that no run of ours wrote."""
    for name in [FOLDERS[f] for f in formats if f in FOLDERS]:
        if (folder / name).exists():
            raise OSError(f"{folder / name}: is there already, and not of an earlier run; choose another folder")


def go_on(
    folder: Path, lines: BinaryIO, settings: dict[str, Any]
) -> tuple[Counter[str], list[dict[str, Any]], dict[str, str]]:
    """What an earlier run has done: how often each source is, the images' entries, and the videos with their pictures'
    names; `lines` is left with its whole lines, without an unfinished video's. A finished run's are made again from its
    detections.json.

    Raises ValueError where that run had other settings.
    """
    content = _content(folder)
    before = content.get("info", {}).get("settings")
    if before is not None and before != settings:
        differ = [f"{k} {before.get(k)!r}, now {settings.get(k)!r}" for k in {**before, **settings}
                  if before.get(k) != settings.get(k)]  # fmt: skip
        raise ValueError(
            f"resume: the run in {folder} had {'; '.join(differ)}: give the same options, or another folder"
        )
    if lines.seek(0, 2) == 0 and content:  # that run came to its end
        rows = {image["id"]: dict(image=image, annotations=[]) for image in content["images"]}
        for a in content["annotations"]:
            rows[a["image_id"]]["annotations"].append({k: a[k] for k in ("image_id", "category_id", "bbox", "score")})
        ends = [dict(finished=name, picture=picture) for name, picture in content["info"]["videos"].items()]
        for row in (*ends, *rows.values()):
            add_line(lines, row)
    kept = list(_whole_lines(lines))
    videos = {row["finished"]: row["picture"] for _, row in kept if "finished" in row}
    whole = [not _of_video(row) or row["image"]["file_name"] in videos for _, row in kept]
    kept = kept[: whole.index(False)] if False in whole else kept  # a video that was not finished is at the end
    lines.truncate(sum(len(line) for line, _ in kept))
    images = [row["image"] for _, row in kept if "image" in row]
    return Counter([i["file_name"] for i in images if "frame" not in i] + list(videos)), images, dict(videos)


def _of_video(row: dict[str, Any]) -> bool:
    return "frame" in row.get("image", ())


def add_line(lines: BinaryIO, content: dict[str, Any]) -> None:
    """Appends a line of JSON. Raises OSError naming the file."""
    line = json.dumps(content, allow_nan=False).encode() + b"\n"
    try:
        while line:
            line = line[lines.write(line) :]
    except OSError as error:
        raise OSError(f"{lines.name}: cannot be written ({error.strerror or error})") from None
