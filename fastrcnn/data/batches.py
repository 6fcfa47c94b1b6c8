"""Batches to train on: which pictures, in what order, changed how, is a function of (seed, epoch, index) and of nothing
else, so that a run that goes on after a kill, with any number of workers, sees the same bits."""

import contextlib
import multiprocessing
import os
import random
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import torch
import torch.multiprocessing
from torch import Tensor

from fastrcnn.data.transforms import apply

AHEAD = 2  # batches that a worker prepares while others are trained on
DEATHS = 3  # of workers over one batch, after which it is the batch's fault
STAND_INS = 64
Batch = tuple[list[Tensor], list[dict], list[int]]


def steps_per_epoch(dataset, batch_size: int, world: int = 1, drop_empty: bool = False) -> int:
    """How many batches each of `world` processes gets in an epoch."""
    return _steps(len(_pictures(dataset, drop_empty)), batch_size, world)


def _pictures(dataset, drop_empty: bool) -> np.ndarray:
    """int [N]: the indices of the pictures to train on."""
    if not drop_empty:
        return np.arange(len(dataset), dtype=np.int32)
    if not hasattr(dataset, "objects"):
        raise ValueError("drop_empty: expected a dataset that knows how many `objects` its pictures have")
    return np.flatnonzero(dataset.objects).astype(np.int32)


def _steps(count: int, batch_size: int, world: int) -> int:
    if count < world:
        raise ValueError(f"dataset: {count} pictures are less than one for each of {world} processes")
    whole, rest = divmod(count, batch_size * world)
    # Too few for a batch in every process: they make the last batches larger by one.
    return whole + (rest >= world)


def plan(
    dataset, batch_size: int, *, seed: int, epoch: int, world: int = 1, group: bool = True, drop_empty: bool = False
):
    """(order int32 [N], ends int64 [steps]): the pictures of an epoch in the order in which all processes together take
    them, and where each step ends. Every picture stands there once.

    group: the pictures of a step are all wide or all high, as far as they go round, so that little is padded.
    """
    pictures, size = _pictures(dataset, drop_empty), batch_size * world
    steps = _steps(len(pictures), batch_size, world)
    order = np.random.default_rng([seed, epoch]).permutation(pictures)
    if group and hasattr(dataset, "sizes"):
        sizes = np.asarray(dataset.sizes)
        wide = (sizes[:, 1] >= sizes[:, 0])[order]
        whole, when, left = [], [], []
        for kind in (wide, ~wide):
            places = np.flatnonzero(kind)
            full = len(places) // size * size
            whole.append(order[places[:full]].reshape(-1, size))
            when.append(places[size - 1 : full : size])  # a batch is given when its last picture is drawn
            left.append(places[full:])
        turn = np.argsort(np.concatenate(when), kind="stable")
        order = np.concatenate([np.concatenate(whole)[turn].ravel(), order[np.sort(np.concatenate(left))]])
    ends = np.minimum(np.arange(1, steps + 1, dtype=np.int64) * size, len(order))
    ends[-1] = len(order)
    return order, ends


def _share(step: np.ndarray, rank: int, world: int) -> list[int]:
    """One process's part of a step: equal for all, but for one picture where it does not go round."""
    return np.array_split(step, world)[rank].tolist()


@contextlib.contextmanager
def _seeded(*numbers: int):
    """The generators that transforms draw from, set by some numbers, and back as they were."""
    words = np.random.SeedSequence(numbers).generate_state(4, np.uint64).tolist()
    before = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(words[0] >> 1)
    random.seed(words[1])
    np.random.seed(words[2] & 0xFFFFFFFF)
    try:
        yield
    finally:
        torch.default_generator.set_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])


def _one(dataset, index: int, transforms, seed: int, epoch: int) -> tuple[Tensor, dict]:
    with _seeded(seed, epoch, index):
        image, target = dataset[index]
        return (image, target) if transforms is None else apply(transforms, image, target)


def _load(dataset, indices: list[int], transforms, seed: int, epoch: int) -> tuple[Batch, list[tuple[int, str]]]:
    """(images, targets, the indices that they are of), and (index, reason) of those that cannot be read. Where none
    can, the next picture of the dataset that can stands in for them: a process without a picture would leave the others
    waiting."""
    images, targets, read, skipped = [], [], [], []

    def take(index: int) -> None:
        try:
            image, target = _one(dataset, index, transforms, seed, epoch)
        except (ValueError, OSError, MemoryError) as error:
            skipped.append((index, str(error) or type(error).__name__))
        else:
            images.append(image)
            targets.append(target)
            read.append(index)

    for index in indices:
        take(index)
    for step in range(1, STAND_INS):
        if not images:
            take((indices[0] + step) % len(dataset))
    return (images, targets, read), skipped


_work: tuple = ()  # of a worker: dataset, transforms, seed, epoch


def _begin(*work) -> None:
    """In a worker: what it works on, which it shares with its parent, whose signals it must not answer."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    parent = os.getppid()

    def leave_with_the_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=leave_with_the_parent, daemon=True).start()


def _in_worker(indices: list[int]):
    dataset, *how = _work
    return _load(dataset, indices, *how)


class Batches(Iterator[Batch]):
    """What `batches` gives. skipped: index -> reason, of the pictures that could not be read so far; deaths: how many
    worker processes ended before their time."""

    def __init__(self, work: tuple, indices: Iterator[list[int]], workers: int):
        self.work, self.workers, self.indices = work, workers, indices
        self.skipped: dict[int, str] = {}
        self.deaths = 0
        self._pool: ProcessPoolExecutor | None = None
        self._ahead: deque[tuple[list[int], Future]] = deque()

    def __next__(self) -> Batch:
        if self.workers:
            batch, skipped = self._from_workers()
        else:
            batch, skipped = self._here()
        for index, reason in skipped:
            if index not in self.skipped:
                warnings.warn(f"picture {index} is left out: {reason}", stacklevel=2)
            self.skipped[index] = reason
        if not batch[0]:
            raise ValueError(f"no picture can be read: {skipped[0][1]}")
        return batch

    def _here(self):
        dataset, *how = self.work
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a worker: some of torch's sums come in another order with more
        try:
            return _load(dataset, next(self.indices), *how)
        finally:
            torch.set_num_threads(threads)

    def _submit(self, indices: list[int]) -> None:
        if self._pool is None:
            ways = multiprocessing.get_all_start_methods()
            # A forked worker shares the index of the dataset; another one gets a copy of it.
            context = multiprocessing.get_context("fork" if "fork" in ways else None)
            self._pool = ProcessPoolExecutor(self.workers, context, _begin, self.work)
        try:
            work = self._pool.submit(_in_worker, indices)
        except BrokenProcessPool as error:  # said where the batch is wanted: none may be lost
            work = Future()
            work.set_exception(error)
        self._ahead.append((indices, work))

    def _fill(self) -> None:
        while len(self._ahead) < self.workers * AHEAD and (indices := next(self.indices, None)) is not None:
            self._submit(indices)

    def _from_workers(self):
        for attempt in range(DEATHS):
            try:
                self._fill()
                if not self._ahead:
                    self.close()
                    raise StopIteration
                result = self._ahead[0][1].result()
                self._ahead.popleft()
                self._fill()
                return result
            except BrokenProcessPool as error:
                self.deaths += 1
                again = [indices for indices, _ in self._ahead]
                warnings.warn(f"a worker process ended (of memory or a signal): begun again ({error})", stacklevel=3)
                self.close()
                if attempt + 1 == DEATHS:
                    raise OSError(
                        f"a worker process ended {DEATHS} times over the pictures {again[0]}: too little memory, or room "
                        "in /dev/shm, for so many workers?"
                    ) from None
                for indices in again:
                    self._submit(indices)
        raise AssertionError

    def close(self) -> None:
        """Ends the workers; the batches that they hold are let go."""
        self._ahead.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def __del__(self):
        self.close()


def batches(dataset, batch_size: int, *, seed: int, epoch: int, start: int = 0, rank: int = 0, world: int = 1,
            workers: int = 0, transforms=None, group: bool = True, drop_empty: bool = False) -> Batches:  # fmt: skip
    """Iterates over (images, targets, indices) of one epoch: lists of [C, H, W] tensors, of their targets, of their
    places in the dataset.

    Each of `world` processes gets `steps_per_epoch` batches, and all together every picture once: none is repeated to
    fill a batch, so that the last ones may be smaller, or larger by one. start: the first batch to give. transforms: of
    torchvision.transforms.v2, on each picture. group: see `plan`; for a dataset with `sizes`. drop_empty: without the
    pictures that have no objects. workers: processes that read and change pictures, 0: this one.

    A picture that cannot be read is left out, named by a warning and in `skipped`; a worker that ends is begun again.
    Raises ValueError for arguments out of range, OSError where workers end over and over on the same batch.
    """
    given = ("batch_size", batch_size, 1), ("start", start, 0), ("workers", workers, 0), ("world", world, 1)
    for name, value, least in given:
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected a whole number from {least} up, got {value!r}")
    if not 0 <= rank < world:
        raise ValueError(f"rank: expected one of 0..{world - 1}, got {rank}")
    order, ends = plan(dataset, batch_size, seed=seed, epoch=epoch, world=world, group=group, drop_empty=drop_empty)
    begins = np.concatenate([[0], ends[:-1]])
    indices = (_share(order[a:b], rank, world) for a, b in zip(begins[start:], ends[start:]))
    return Batches((dataset, transforms, seed, epoch), indices, workers)
