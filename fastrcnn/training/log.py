"""What a run says and writes on its way: lines, log.jsonl, results.csv, config.json, metrics.json, sample pictures."""

import csv
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastrcnn._write import write_whole
from fastrcnn.evaluation.results import as_json
from fastrcnn.inference.detections import Detections
from fastrcnn.inference.output import write_picture

COLUMNS = ("epoch", "loss", "val_loss", "AP", "AP50", "AP75", "lr")
PAUSE = 10.0  # seconds between two lines of progress


class Log:
    """Writes to a run's folder, or to none. A disk that takes nothing ends no run: it is said once."""

    def __init__(self, out: Path | None, say: Callable[[str], None], step: int = 0, tensorboard: bool = False):
        self.out, self.say, self.complained = out, say, False
        self.start, self.said = time.perf_counter(), time.perf_counter()
        self.first_step = step
        self.board = _tensorboard(out, say) if tensorboard and out is not None else None
        if out is not None:
            self.attempt(self._forget_steps_from, step)

    def attempt(self, write: Callable, *args) -> bool:
        try:
            write(*args)
            return True
        except OSError as error:
            if not self.complained:
                self.say(f"{self.out}: cannot be written ({error.strerror or error}); training goes on")
            self.complained = True
            return False

    def _forget_steps_from(self, step: int) -> None:
        """What a killed process logged behind the state from which the run goes on will be logged again."""
        path = self.out / "log.jsonl"
        if step == 0 or not path.exists():
            write_whole(path, lambda file: None)
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # cut by the kill
                continue
            if row["step"] < step:
                kept.append(_line(row))
        write_whole(path, lambda file: file.write("".join(kept).encode()))

    def steps(self, rows: list[dict], total: int) -> None:
        """Appends rows to log.jsonl; now and then the last is a line of progress."""
        if self.out is not None:
            self.attempt(self._append, "".join(map(_line, rows)))
        if self.board is not None:
            for row in rows:
                for name in ("loss", "lr"):
                    self.board.add_scalar(name, row[name], row["step"])
        now, row = time.perf_counter(), rows[-1]
        if now - self.said >= PAUSE:
            self.said = now
            done = row["step"] + 1
            left = (now - self.start) / max(1, done - self.first_step) * (total - done)
            memory = f"  {row['memory']:.1f} GB" if "memory" in row else ""
            self.say(f"step {done}/{total}  loss {row['loss']:.3f}  lr {row['lr']:.3g}  "
                     f"{row['images/s']:.1f} images/s{memory}  {_clock(left)} left")  # fmt: skip

    def _append(self, text: str) -> None:
        with open(self.out / "log.jsonl", "a") as file:
            file.write(text)

    def epochs(self, rows: Sequence[dict]) -> None:
        """Writes results.csv, whole each time."""
        if self.out is None:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: _cell(row.get(k)) for k in COLUMNS} for row in rows)
        self.whole("results.csv", text.getvalue())
        if self.board is not None and rows:
            for name in ("val_loss", "AP", "AP50", "AP75"):
                if rows[-1].get(name) is not None:
                    self.board.add_scalar(name, rows[-1][name], rows[-1]["epoch"])
            self.board.flush()

    def json(self, name: str, content: dict) -> None:
        if self.out is not None:
            self.whole(name, json.dumps(as_json(content), indent=1) + "\n")

    def whole(self, name: str, text: str) -> None:
        self.attempt(write_whole, self.out / name, lambda file: file.write(text.encode()))

    def samples(self, images: Sequence[Tensor], targets: Sequence[dict], indices: Sequence[int], names) -> None:
        """Draws pictures of a training batch with their boxes, so that wrong labels are seen in the first minute."""
        if self.out is not None:
            self.attempt(self._draw, images, targets, indices, names)

    def _draw(self, images, targets, indices, names) -> None:
        (self.out / "samples").mkdir(exist_ok=True)
        for image, target, index in zip(images, targets, indices):
            labels = target.get("labels", torch.zeros(len(target["boxes"]), dtype=torch.int64))
            most = max(len(names or ()), int(labels.max()) + 1 if len(labels) else 1)
            known = list(names or ()) + [str(i) for i in range(len(names or ()), most)]
            found = Detections(target["boxes"].float(), torch.ones(len(labels)), labels, known)
            picture = found.draw(image.expand(3, -1, -1) if len(image) == 1 else image[:3])
            write_picture(self.out / "samples" / f"{index:06d}.jpg", picture)


def _cell(value) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return repr(value)


def _line(row: dict) -> str:
    return json.dumps(as_json(row), allow_nan=False) + "\n"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _tensorboard(out: Path, say):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        say("TensorBoard's files need the package tensorboard: pip install tensorboard")
        return None
    return SummaryWriter(str(out / "tensorboard"))
