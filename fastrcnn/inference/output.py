"""Results on disk: pictures, and COCO-format JSON that is whole at every moment.

While a run lasts, detections.jsonl has a line for every image that is done: it is what a killed process leaves.
detections.json is made from it at the end, however the run ends, and now and then before.
"""

import fcntl
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from torch import Tensor

from fastrcnn.data.fetch import is_address
from fastrcnn.inference.detections import Detections
from fastrcnn.inference.detector import Detector

NAME_BYTES = 200  # of a picture's name without its number and suffix; file systems take 255 in all


def check_folder(folder: Path) -> None:
    """Raises OSError where results cannot be written to `folder`, which need not exist yet."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise OSError(f"{folder}: cannot be written to ({place} is no folder)")
    if not os.access(place, os.W_OK | os.X_OK):
        raise OSError(f"{folder}: cannot be written to (no permission for {place})")


def _resolved(path: str | Path) -> str:
    try:
        return os.path.realpath(path)
    except ValueError:  # a name with a zero byte, which no file has
        return str(path)


def picture_path(folder: Path, source: str, taken: set[str]) -> Path:
    """Where a source's picture goes in `folder`: under the source's own name, shortened where no file could be called
    so, and numbered where that path is in `taken` (resolved paths: sources and pictures so far). The path is added to
    `taken`."""
    name = Path(urlsplit(source).path if is_address(source) else source)
    suffix = ".jpg" if name.suffix.lower() in (".jpg", ".jpeg", ".jpe", ".jfif") else ".png"
    stem = os.fsdecode(os.fsencode(name.stem or "picture")[:NAME_BYTES])
    path, n = folder / f"{stem}{suffix}", 2
    while _resolved(path) in taken:
        path, n = folder / f"{stem}_{n}{suffix}", n + 1
    taken.add(_resolved(path))
    return path


def write_picture(path: Path, picture: Tensor) -> None:
    """Writes uint8 [3, H, W] as JPEG or PNG, by the suffix. Raises OSError where it cannot be written whole; what
    stood there before is then still there."""
    from PIL import Image

    encoded = io.BytesIO()
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    if path.suffix == ".jpg":
        image.save(encoded, "JPEG", quality=92)
    else:
        image.save(encoded, "PNG")
    replace_file(path, encoded.getvalue())


def replace_file(path: Path, content: bytes) -> None:
    """Puts a file in the place of `path` in one step, when it is whole. Raises OSError naming the path."""
    path = Path(_resolved(path))  # of a link what it points to
    part = path.with_name(f".{os.getpid()}.part")
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no regular file")
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({error.strerror or error})") from None


def _open_lines(folder: Path) -> BinaryIO:
    """detections.jsonl, emptied, for this process alone. Raises OSError, also where another process has it."""
    path = folder / "detections.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines = open(path, "ab+", buffering=0)  # noqa: SIM115  closed by who asked for it
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror or error})") from None
    try:
        fcntl.flock(lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lines.fileno()), os.stat(path)):  # another run ended just now
            raise BlockingIOError
    except (BlockingIOError, FileNotFoundError):
        lines.close()
        raise OSError(f"{folder}: another process writes its results there; choose another folder") from None
    except OSError:  # a file system without locks
        pass
    lines.truncate(0)
    return lines


def write_detections(
    detector: Detector,
    sources: list[str],
    folder: Path,
    classes: set[int] | None = None,
    batch_size: int | None = None,
    pictures: bool = True,
) -> Iterator[Detections | Exception]:
    """Detects in `sources` and gives, for each as it is done, its Detections, why nothing was found out about it, or,
    an OSError, why its picture could not be written.

    Pictures (with `pictures`) and a line of detections.jsonl go to `folder` as they are done; detections.json at the
    end or when it is interrupted, and after the first, second, fourth, eighth... image. Objects of other labels than
    `classes` are left out. Raises OSError where the results cannot be written, or another process writes to the same
    folder.
    """
    taken = {_resolved(source) for source in sources}
    categories = [dict(id=i, name=name) for i, name in zip(detector.category_ids, detector.class_names)]
    done = 0
    with _open_lines(folder) as lines:
        try:
            for index, image, found in detector.stream(sources, batch_size):
                if isinstance(found, Detections):
                    if classes is not None:
                        found = found[[i for i, label in enumerate(found.labels.tolist()) if label in classes]]
                    height, width = image.shape[1:]
                    entry = dict(id=index + 1, file_name=sources[index], width=width, height=height)
                    _add_line(lines, dict(image=entry, annotations=found.to_coco(index + 1)))
                    done += 1
                    if done & (done - 1) == 0:
                        _write_coco(lines, folder, categories)
                    if pictures:
                        try:
                            write_picture(picture_path(folder, sources[index], taken), found.draw(image))
                        except OSError as error:
                            found = error
                        except (MemoryError, ValueError) as error:
                            found = OSError(f"{sources[index]}: its picture cannot be drawn ({error})")
                yield found
        finally:
            _write_coco(lines, folder, categories)
            Path(lines.name).unlink(missing_ok=True)


def _add_line(lines: BinaryIO, content: dict) -> None:
    line = json.dumps(content, allow_nan=False).encode() + b"\n"
    try:
        while line:
            line = line[lines.write(line) :]
    except OSError as error:
        raise OSError(f"{lines.name}: cannot be written ({error.strerror or error})") from None


def _write_coco(lines: BinaryIO, folder: Path, categories: list[dict]) -> None:
    """detections.json, a COCO file of the detections (with scores) in the order of the images' ids, from
    detections.jsonl."""
    lines.seek(0)
    whole = lines.read().split(b"\n")[:-1]  # what follows the last line's end is a line that could not be finished
    rows = sorted(map(json.loads, whole), key=lambda row: row["image"]["id"])
    annotations = [a for row in rows for a in row["annotations"]]
    annotations = [dict(id=n, area=a["bbox"][2] * a["bbox"][3], iscrowd=0, **a) for n, a in enumerate(annotations, 1)]
    content = dict(images=[row["image"] for row in rows], annotations=annotations, categories=categories)
    replace_file(folder / "detections.json", json.dumps(content).encode())
