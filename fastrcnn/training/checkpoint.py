"""A run's folder: one process at a time, files that are whole at every moment, and the state from which a run goes on as
if it had never stopped."""

import fcntl
import os
import pickle
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from fastrcnn._write import write_whole
from fastrcnn.weights import writable

STATES = "states"  # the folder of them in a run's folder


def check_out(out: str | Path, resume: bool) -> tuple[Path, Path | None]:
    """(`out` as a run's folder, made; None). For NAME.safetensors the folder is NAME, and the second is that file, which is
    to hold the best weights, too. Raises ValueError for another name of a file of weights, and for a folder that holds a
    run that is not to be resumed; OSError where it cannot be written."""
    out, copy = Path(out).expanduser(), None
    if not out.is_dir():
        if out.suffix.lower() in (".pth", ".pt"):
            raise ValueError(f"out: expected a folder, which will hold best.safetensors, last.safetensors, results.csv and "
                             f"the report, got the name of a file: {out}; try {out.with_suffix('')}")  # fmt: skip
        if out.suffix.lower() == ".safetensors":
            copy = writable(out)
            out = out.with_suffix("")
    if not resume and state_files(out):
        raise ValueError(f"out: {out} holds a run: resume it (--resume), or choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        trial = out / f".{os.getpid()}.part"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise OSError(f"{out}: cannot be written ({error.strerror})") from None
    return out, copy


def copy_whole(source: Path, target: Path) -> None:
    """`source` as `target`, in full or not at all. Raises OSError."""
    write_whole(target, lambda file: file.write(source.read_bytes()))


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps a second process out of a run's folder; the lock goes with the process, however that ends. Raises OSError
    naming the process that has it."""
    with open(out / ".lock", "a+") as file:
        try:
            # The process's own: its workers, who outlive a kill for a moment, do not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise OSError(
                f"{out}: another process ({file.read().strip() or 'unknown'}) trains in this folder"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        for part in (*out.glob(".*.part"), *out.glob(f"{STATES}/.*.part")):  # of a process that was killed as it wrote
            part.unlink(missing_ok=True)
        yield


def state_files(out: Path) -> list[Path]:
    """The states of a run, oldest first."""
    return sorted((out / STATES).glob("step_*.pt"))


def save_state(out: Path, content: dict, keep: int) -> Path:
    """Writes the state of a run after `content["step"]` steps, and leaves the `keep` newest. Raises OSError."""
    folder = out / STATES
    folder.mkdir(exist_ok=True)
    path = folder / f"step_{content['step']:09d}.pt"
    write_whole(path, lambda file: torch.save(content, file))
    for old in state_files(out)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def load_state(out: Path, log: Callable[[str], None]) -> dict | None:
    """The newest state that can be read; None where there is none. Only tensors and plain values are read, never code."""
    for path in reversed(state_files(out)):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            log(f"{path}: cannot be read ({' '.join(str(error).split())[:120]}), going on from an older one")
    return None


def random_state() -> dict:
    """Of every generator that a step may draw from."""
    kind, keys, *rest = np.random.get_state()
    state = dict(
        python=random.getstate(), numpy=(kind, torch.from_numpy(keys.copy()), *rest), torch=torch.get_rng_state()
    )
    return state | (dict(cuda=torch.cuda.get_rng_state()) if torch.cuda.is_initialized() else {})


def set_random_state(state: dict) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class Stop:
    """The signal that asked the run to end, 0 while there is none. A second one ends it at once."""

    number = 0

    def __call__(self, number: int, frame) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number

    def leave(self) -> None:
        """Ends as the signal would have."""
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.number)


@contextmanager
def stopping() -> Iterator[Stop]:
    """SIGTERM, SIGHUP and Ctrl-C are noted, to be obeyed between two steps."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {n: signal.signal(n, stop) for n in numbers}
    try:
        yield stop
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
