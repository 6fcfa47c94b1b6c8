"""Results on disk: pictures, and COCO-format JSON that is whole at every moment.

While a run lasts, detections.jsonl has a line for every image that is done: it is what a killed process leaves, and what
`resume` goes on with. detections.json is made from it at the end, however the run ends, and now and then before.
"""

import fcntl
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlsplit

from torch import Tensor

from fastrcnn._write import replacing
from fastrcnn.data.fetch import is_address
from fastrcnn.data.images import ImageError
from fastrcnn.inference.detections import Detections
from fastrcnn.inference.detector import Detector
from fastrcnn.inference.earlier import add_line, check_foreign, go_on, put_aside
from fastrcnn.inference.formats import OF_A_RUN, check_formats, write_coco, write_crops, write_yolo, written
from fastrcnn.inference.video import is_video, open_video, video_writer

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


def picture_path(folder: Path, source: str, taken: set[str], suffix: str | None = None) -> Path:
    """Where a source's picture goes in `folder`: under the source's own name, shortened where no file could be called
    so, and numbered where that path is in `taken` (resolved paths: sources and pictures so far). The path is added to
    `taken`."""
    name = Path(urlsplit(source).path if is_address(source) else source)
    suffix = suffix or (".jpg" if name.suffix.lower() in (".jpg", ".jpeg", ".jpe", ".jfif") else ".png")
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
    """Puts a file in the place of `path` in one step, when it is whole; of thousands of pictures none waits for the disk.
    Raises OSError naming the path."""
    with written(path) as place, replacing(place) as file:
        file.write(content)


def _open_lines(folder: Path) -> BinaryIO:
    """detections.jsonl, as it is, for this process alone. Raises OSError, also where another process has it."""
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
    return lines


class Video(NamedTuple):
    """A video that is done: how many frames, and how many objects of each name in all of them."""

    source: str
    frames: int
    objects: Counter[str]


@dataclass
class _Run:
    """What a run writes, where and how; `count` images are done."""

    folder: Path
    lines: BinaryIO
    categories: list[dict[str, Any]]
    info: dict[str, Any]
    pictures: bool
    formats: tuple[str, ...]
    line_width: int | None
    labels: bool
    count: int = 0

    def keep(self, image: Tensor, found: Detections, entry: dict[str, Any], path: Path) -> OSError | None:
        """Everything of an image that is done, its picture at `path`; returns why a part of it is not written."""
        failed = None
        try:
            if self.pictures and "frame" not in entry:
                write_picture(path, found.draw(image, self.line_width, self.labels))
                entry["picture"] = path.name
            if "yolo" in self.formats:
                write_yolo(found, image, self.folder, path.stem)
            if "crops" in self.formats:
                write_crops(found, image, self.folder, path.stem, write_picture)
        except OSError as error:
            failed = error
        except (MemoryError, ValueError) as error:
            failed = OSError(f"{entry['file_name']}: its picture cannot be drawn ({error})")
        add_line(self.lines, dict(image=entry, annotations=found.to_coco(entry["id"])))
        self.count += 1
        if self.count & (self.count - 1) == 0:
            write_coco(self.lines, self.folder / "detections.json", self.categories, self.info)
        return failed

    def finish(self) -> None:
        for name in dict.fromkeys(("json", *self.formats)):
            if name in OF_A_RUN:
                OF_A_RUN[name](self.lines, self.folder / f"detections.{name}", self.categories, self.info)
        Path(self.lines.name).unlink(missing_ok=True)


def write_detections(
    detector: Detector,
    sources: list[str],
    folder: Path,
    classes: set[int] | None = None,
    batch_size: int | None = None,
    pictures: bool = True,
    formats: tuple[str, ...] = ("json",),
    resume: bool = False,
    overwrite: bool = False,
    ids: Sequence[int] | None = None,
    settings: dict[str, Any] | None = None,
    line_width: int | None = None,
    labels: bool = True,
    say: Callable[[str], object] = lambda line: None,
) -> Iterator[Detections | Video | Exception]:
    """Detects in `sources` and gives, for each as it is done, its Detections (of a video, which come last, a `Video`), why
    nothing was found out about it, or, an OSError, why its picture could not be written.

    Pictures (with `pictures`; line_width and labels as in `Detections.draw`), YOLO's text, crops and a line of
    detections.jsonl go to `folder` as they are done; detections.json, and .csv and .parquet where `formats` has them, at
    the end or when it is interrupted; the first also after the first, second, fourth, eighth... image. Objects of other
    labels than `classes` are left out. ids: of the images (default: their places in `sources`, from 1).

    resume: images that an earlier run in the folder has done are left out, its results are kept, and where it had other
    `settings` that is a ValueError. Without it an earlier run's files are put aside, or deleted (overwrite), and `say` gets
    a sentence. Raises OSError where the results cannot be written, or another process writes to the same folder.
    """
    check_formats(formats)
    categories = [dict(id=i, name=name) for i, name in zip(detector.category_ids, detector.class_names)]
    info: dict[str, Any] = dict(settings=settings or {}, formats=list(formats), videos={})
    with _open_lines(folder) as lines:
        taken, used = {_resolved(source) for source in sources}, {0}
        done: Counter[str] = Counter()
        if resume:
            done, images, info["videos"] = go_on(folder, lines, info["settings"])
            pictures_before = [i["picture"] for i in images if "picture" in i] + list(info["videos"].values())
            taken |= {_resolved(folder / name) for name in pictures_before}
            used |= {image["id"] for image in images}
        else:
            if (aside := put_aside(folder, lines, overwrite)) is not None:
                say(f"{folder} had the results of an earlier run: they are in {aside} now (--overwrite deletes them)")
            check_foreign(folder, formats)
        todo = []
        for source, number in zip(sources, ids or range(1, len(sources) + 1)):
            if done[source]:
                done[source] -= 1
                continue
            number = max(used) + 1 if number in used else number
            used.add(number)
            todo.append((source, number))
        run = _Run(folder, lines, categories, info, pictures, formats, line_width, labels)
        try:
            singles = [(source, number) for source, number in todo if not is_video(source)]
            for index, image, found in detector.stream([source for source, _ in singles], batch_size):
                source, number = singles[index]
                if isinstance(found, Exception) or image is None:
                    yield found
                    continue
                found, (height, width) = _of(found, classes), image.shape[1:]
                entry = dict(id=number, file_name=source, width=width, height=height)
                yield run.keep(image, found, entry, picture_path(folder, source, taken)) or found
            first = max(used)  # frames have ids beyond those of all sources
            for source in [source for source, _ in todo if is_video(source)]:
                try:
                    video = _detect_video(detector, source, first, run, taken, classes, batch_size)
                    first += video.frames
                    yield video
                except (ImageError, ImportError) as error:
                    yield error
        finally:
            run.finish()


def _of(found: Detections, classes: set[int] | None) -> Detections:
    if classes is None:
        return found
    return found[[i for i, label in enumerate(found.labels.tolist()) if label in classes]]


def _detect_video(
    detector: Detector,
    source: str,
    first: int,
    run: _Run,
    taken: set[str],
    classes: set[int] | None,
    batch_size: int | None,
) -> Video:
    """Every frame of a video: a line of its own, and with pictures an .mp4 of them with their boxes."""
    frames = open_video(source)
    path, objects = picture_path(run.folder, source.replace(":", "_"), taken, ".mp4"), Counter[str]()
    count = 0
    with video_writer(path, frames.size, frames.rate) if run.pictures else nullcontext() as write:
        for index, image, found in detector.stream(frames.read, batch_size):
            if isinstance(found, Exception) or image is None:
                raise ImageError(f"{source}: frame {index}: {found}")
            found, (height, width) = _of(found, classes), image.shape[1:]
            entry = dict(id=first + index + 1, file_name=source, width=width, height=height, frame=index)
            entry["seconds"] = round(index / frames.rate, 3)
            if write is not None:
                entry["picture"] = path.name
            if failed := run.keep(image, found, entry, path.with_stem(f"{path.stem}_{index:06d}")):
                raise failed
            if write is not None:
                write(found.draw(image, run.line_width, run.labels))
            objects.update(found.names)
            count += 1
    run.info["videos"][source] = path.name if run.pictures else ""
    add_line(run.lines, dict(finished=source, picture=run.info["videos"][source]))
    return Video(source, count, objects)
